//! Cables that can be bad: every frame between a node and the switch passes through this process.
//!
//! ```text
//!  node's namespace                                     switch namespace
//!  eth0 (TAP) ══ file ══ thread each way ══ file ══ v1 (TAP, a port of br0)
//! ```
//!
//! The switch knows nothing of it, so that cuts work as ever. A frame suffers on its way to the
//! switch and not again on its way to the other node. Frames to and from the clients pass
//! unhurt: what is promised to them holds on a connection that TCP keeps whole. A byte that is
//! corrupted gets the checksum that fits it (RFC 1624), so that TCP takes it for good and whoever
//! reads the connection has to find out.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use parking_lot::RwLock;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// The longest frame: 1,500 bytes and an Ethernet header.
const FRAME_BYTES: usize = 2048;
/// How often a thread that has nothing to do looks whether it should end.
const IDLE: Duration = Duration::from_millis(100);

/// How bad all cables are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quality {
    /// How long a frame takes at most, in milliseconds: any time up to it, so that frames overtake
    /// each other.
    pub delay_ms: u64,
    /// Of a hundred frames, how many are lost.
    pub lost: u32,
    /// How many arrive twice.
    pub doubled: u32,
    /// How many arrive with a flipped bit, of those that carry TCP's payload.
    pub corrupted: u32,
}

/// What cables have done to frames so far.
#[derive(Debug, Default)]
pub struct Damage {
    passed: AtomicU64,
    lost: AtomicU64,
    doubled: AtomicU64,
    corrupted: AtomicU64,
}

/// What was done to frames in a while: how many of what.
pub type Suffered = [(&'static str, u64); 4];

impl Damage {
    /// What was done since the last call.
    pub fn take(&self) -> Suffered {
        let take = |count: &AtomicU64| count.swap(0, Ordering::Relaxed);
        [
            ("frames-passed", take(&self.passed)),
            ("frames-lost", take(&self.lost)),
            ("frames-doubled", take(&self.doubled)),
            ("frames-corrupted", take(&self.corrupted)),
        ]
    }
}

/// The cables of a network.
#[derive(Default)]
pub struct Cables {
    quality: Arc<RwLock<Quality>>,
    damage: Arc<Damage>,
    is_over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Cables {
    /// Lays the cable of one node between two devices, each in a namespace, which it makes.
    /// `spared` is the address of the clients.
    ///
    /// # Errors
    /// When a device cannot be made.
    pub fn lay(&mut self, node: (&Path, &str), switch: (&Path, &str), spared: Ipv4Addr) -> Result<()> {
        let node_end = tap(node.0, node.1)?;
        let switch_end = tap(switch.0, switch.1)?;
        let ways = [
            (node_end.try_clone()?, switch_end.try_clone()?, self.quality.clone()),
            (switch_end, node_end, Arc::default()),
        ];
        for (from, to, quality) in ways {
            let way = Way {
                from,
                to,
                spared,
                quality,
                damage: self.damage.clone(),
                is_over: self.is_over.clone(),
                coin: StdRng::seed_from_u64(self.threads.len() as u64),
                waiting: BinaryHeap::new(),
                number: 0,
            };
            self.threads.push(std::thread::spawn(move || way.run()));
        }
        Ok(())
    }

    /// How bad the cables are from now on.
    pub fn set(&self, quality: Quality) {
        *self.quality.write() = quality;
    }

    /// What they do.
    pub fn damage(&self) -> &Damage {
        &self.damage
    }
}

impl Drop for Cables {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

/// One direction of one cable.
struct Way {
    from: File,
    to: File,
    spared: Ipv4Addr,
    quality: Arc<RwLock<Quality>>,
    damage: Arc<Damage>,
    is_over: Arc<AtomicBool>,
    coin: StdRng,
    /// Frames on their way: when they arrive, and in which order they left.
    waiting: BinaryHeap<Reverse<(Instant, u64, Vec<u8>)>>,
    number: u64,
}

impl Way {
    fn run(mut self) {
        let mut buffer = [0u8; FRAME_BYTES];
        while !self.is_over.load(Ordering::Relaxed) {
            match self.wait() {
                Ok(true) => match self.from.read(&mut buffer) {
                    Ok(length) => self.take(&buffer[..length]),
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    // The device went with its namespace.
                    Err(_) => return,
                },
                Ok(false) => {}
                Err(_) => return,
            }
            self.deliver();
        }
    }

    /// Waits for a frame, or until one that is on its way arrives. Returns whether there is one
    /// to read.
    fn wait(&self) -> Result<bool> {
        let due = self
            .waiting
            .peek()
            .map_or(IDLE, |Reverse((due, ..))| due.saturating_duration_since(Instant::now()));
        let millis = due.min(IDLE).as_micros().div_ceil(1000);
        let mut ends = [PollFd::new(self.from.as_fd(), PollFlags::POLLIN)];
        let ready = match poll(&mut ends, PollTimeout::try_from(millis)?) {
            Err(nix::errno::Errno::EINTR) => 0,
            ready => ready?,
        };
        Ok(ready > 0)
    }

    fn take(&mut self, frame: &[u8]) {
        let now = Instant::now();
        if !is_between_nodes(frame, self.spared) {
            return self.send(now, frame.to_vec());
        }
        let quality = *self.quality.read();
        if quality == Quality::default() {
            return self.send(now, frame.to_vec());
        }
        self.damage.passed.fetch_add(1, Ordering::Relaxed);
        if self.happens(quality.lost) {
            self.damage.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut frame = frame.to_vec();
        if self.happens(quality.corrupted) && corrupt(&mut frame, &mut self.coin) {
            self.damage.corrupted.fetch_add(1, Ordering::Relaxed);
        }
        let mut arrival = || now + Duration::from_micros(self.coin.random_range(0..=1000 * quality.delay_ms));
        let (first, second) = (arrival(), arrival());
        if self.happens(quality.doubled) {
            self.damage.doubled.fetch_add(1, Ordering::Relaxed);
            self.send(second, frame.clone());
        }
        self.send(first, frame);
    }

    fn happens(&mut self, percent: u32) -> bool {
        percent > 0 && self.coin.random_range(0..100) < percent
    }

    fn send(&mut self, at: Instant, frame: Vec<u8>) {
        self.number += 1;
        self.waiting.push(Reverse((at, self.number, frame)));
    }

    fn deliver(&mut self) {
        while let Some(Reverse((due, ..))) = self.waiting.peek()
            && *due <= Instant::now()
        {
            let Some(Reverse((.., frame))) = self.waiting.pop() else { return };
            // A device that is full or down loses the frame, as a real one does.
            drop(self.to.write(&frame));
        }
    }
}

/// Where IPv4 begins in a frame.
const IP: usize = 14;

fn is_ipv4(frame: &[u8]) -> bool {
    frame.len() >= IP + 20 && frame[12..14] == [0x08, 0x00]
}

fn is_between_nodes(frame: &[u8], spared: Ipv4Addr) -> bool {
    is_ipv4(frame) && [IP + 12, IP + 16].iter().all(|at| frame[*at..at + 4] != spared.octets())
}

/// Flips a bit in the payload of a TCP segment and makes its checksum fit. Returns whether there
/// was a payload.
fn corrupt(frame: &mut [u8], coin: &mut StdRng) -> bool {
    const TCP_PROTOCOL: u8 = 6;
    if !is_ipv4(frame) || frame[IP + 9] != TCP_PROTOCOL {
        return false;
    }
    let tcp = IP + 4 * usize::from(frame[IP] & 0x0F);
    let end = frame.len().min(IP + usize::from(u16::from_be_bytes([frame[IP + 2], frame[IP + 3]])));
    if end < tcp + 20 {
        return false;
    }
    let payload = tcp + 4 * usize::from(frame[tcp + 12] >> 4);
    // Whole words of 16 bits, as the checksum counts them from the segment's beginning.
    let words = end.saturating_sub(payload) / 2;
    if words == 0 {
        return false;
    }
    let at = payload + 2 * coin.random_range(0..words);
    let word = |frame: &[u8], at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    let old = word(frame, at);
    let new = old ^ (1 << coin.random_range(0..16));
    frame[at..at + 2].copy_from_slice(&new.to_be_bytes());
    let mut sum = u32::from(!word(frame, tcp + 16)) + u32::from(!old) + u32::from(new);
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    let checksum = !(sum as u16);
    frame[tcp + 16..tcp + 18].copy_from_slice(&checksum.to_be_bytes());
    true
}

/// Makes a TAP device in a namespace. It lasts as long as its file.
fn tap(namespace: &Path, name: &str) -> Result<File> {
    let (namespace, name) = (namespace.to_owned(), name.to_owned());
    // A thread of its own moves into the namespace, and ends there.
    let made = std::thread::spawn(move || -> Result<File> {
        setns(File::open(&namespace)?, CloneFlags::CLONE_NEWNET)?;
        let file = File::options().read(true).write(true).open("/dev/net/tun").context("/dev/net/tun")?;
        attach(&file, &name)?;
        Ok(file)
    });
    made.join().map_err(|_| anyhow!("the thread that makes a device has panicked"))?
}

#[expect(unsafe_code, reason = "std has no ioctl")]
fn attach(file: &File, name: &str) -> Result<()> {
    ensure!(name.len() < libc::IFNAMSIZ, "{name} is too long for a device");
    // SAFETY: an `ifreq` of zeros is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the file is open, and the kernel reads and writes one `ifreq`.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    ensure!(done == 0, "TUNSETIFF {name}: {}", std::io::Error::last_os_error());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ethernet, IPv4 and TCP around a payload, with a right TCP checksum.
    fn segment(payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0u8; IP + 20 + 20];
        frame[12..14].copy_from_slice(&[0x08, 0x00]);
        frame[IP] = 0x45;
        let total = (40 + payload.len()) as u16;
        frame[IP + 2..IP + 4].copy_from_slice(&total.to_be_bytes());
        frame[IP + 9] = 6;
        frame[IP + 12..IP + 20].copy_from_slice(&[10, 64, 0, 1, 10, 64, 0, 2]);
        frame[IP + 32] = 5 << 4;
        frame.extend_from_slice(payload);
        let sum = !ones_sum(&frame);
        frame[IP + 36..IP + 38].copy_from_slice(&sum.to_be_bytes());
        frame
    }

    /// The sum of RFC 1071 over pseudo header and segment: all ones when the checksum fits.
    fn ones_sum(frame: &[u8]) -> u16 {
        let segment = &frame[IP + 20..];
        let mut bytes = frame[IP + 12..IP + 20].to_vec();
        bytes.extend_from_slice(&[0, 6]);
        bytes.extend_from_slice(&(segment.len() as u16).to_be_bytes());
        bytes.extend_from_slice(segment);
        if bytes.len() % 2 == 1 {
            bytes.push(0);
        }
        let mut sum: u32 =
            bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        while sum > 0xFFFF {
            sum = (sum & 0xFFFF) + (sum >> 16);
        }
        sum as u16
    }

    #[test]
    fn what_is_corrupted_still_has_a_right_checksum() {
        let mut coin = StdRng::seed_from_u64(1);
        for length in [2, 3, 64, 1001] {
            for _ in 0..200 {
                let whole = segment(&vec![0xA5; length]);
                assert_eq!(ones_sum(&whole), 0xFFFF);
                let mut hurt = whole.clone();
                assert!(corrupt(&mut hurt, &mut coin));
                assert_eq!(ones_sum(&hurt), 0xFFFF);
                assert_ne!(hurt[IP + 40..], whole[IP + 40..]);
                assert_eq!(hurt[..IP + 36], whole[..IP + 36]);
            }
        }
        assert!(!corrupt(&mut segment(&[]), &mut coin), "nothing to corrupt");
    }

    #[test]
    fn clients_are_spared() {
        let frame = segment(b"payload");
        assert!(is_between_nodes(&frame, Ipv4Addr::new(10, 64, 0, 254)));
        assert!(!is_between_nodes(&frame, Ipv4Addr::new(10, 64, 0, 2)));
        assert!(!is_between_nodes(&[0; 60], Ipv4Addr::new(10, 64, 0, 254)), "ARP passes");
    }
}
