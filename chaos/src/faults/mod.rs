//! What can be done to a cluster. A fault begins, lasts, and is healed; what it was done to is
//! recorded with it.

pub mod backup;
pub mod cable;
pub mod clock;
pub mod containers;
pub mod crash;
pub mod limits;
pub mod net;
pub mod partition;
pub mod reshard;
pub mod upgrade;

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::RngExt;
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};
use shoal_tests::Node;

use crate::cluster::{Cluster, DiskKind};
use crate::disk::flip;
use crate::disk::journal::Survivors;
use crate::shell;
use cable::{Quality, Suffered};
use clock::Clock;

/// How a node must exit after a sync has failed.
const EXIT_FSYNC: i32 = 74;
/// How long it may take to do so.
const EXIT_DEADLINE: Duration = Duration::from_secs(20);
/// How long a node may take to hand everything over.
const DRAIN_DEADLINE: Duration = Duration::from_secs(90);
/// How long a polite stop may take.
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// Frames take up to 100 ms.
const SLOW: Quality = Quality { delay_ms: 100, lost: 0, doubled: 0, corrupted: 0 };
/// How far a wall clock jumps, in seconds.
const JUMP_SECONDS: i64 = 3600;
/// How much of a jump may be missing or too much, in seconds: the question takes time.
const JUMP_LEEWAY_SECONDS: i64 = 30;
/// How often a strobing clock jumps.
const STROBES: u32 = 40;
/// The time between two jumps.
const STROBE_EVERY: Duration = Duration::from_millis(100);
/// Bytes left free on a disk that is filled up.
const LEFT_FREE: u64 = 4 << 20;

/// A fault by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// SIGKILL to the node that leads most shards.
    KillLeader,
    /// SIGKILL to the node that leads the control group, and so drives whatever takes long.
    KillControlLeader,
    /// SIGKILL to the node that makes a backup, in the middle of it.
    KillBackingUp,
    /// SIGKILL to a random minority.
    KillMinority,
    /// SIGKILL to every node at once.
    KillAll,
    /// SIGSTOP to the node that leads most shards.
    PauseLeader,
    /// SIGTERM to one node after the other, each back before the next.
    RollingRestart,
    /// The leader alone on one side.
    LeaderInMinority,
    /// The leader with a majority, the rest on the other side.
    LeaderInMajority,
    /// One follower alone.
    IsolateFollower,
    /// The leader hears nobody, but is heard.
    LeaderIsDeaf,
    /// The leader is heard by nobody, but hears.
    LeaderIsMute,
    /// Two halves that only one node sees both of.
    Bridge,
    /// Everybody sees a majority, and no two the same one.
    MajorityRing,
    /// Answers of one node do not reach its clients.
    AnswersLost,
    /// One frame in five between nodes is lost.
    PacketLoss,
    /// Frames between nodes take up to 100 ms and overtake each other.
    SlowCables,
    /// The same; and 10 % are lost, 5 % arrive twice, 1 % arrive with a flipped bit.
    BadCables,
    /// One node's wall clock jumps an hour forward.
    ClockForward,
    /// One node's wall clock jumps an hour back.
    ClockBack,
    /// One node's wall clock jumps 200 ms to and fro.
    ClockStrobe,
    /// One node's power fails: nothing survives that was not synced.
    PowerCutOne,
    /// Power fails everywhere at once: nothing survives that was not synced.
    PowerCutAll,
    /// Power fails everywhere at once: pages that were not synced survive or do not.
    PowerCutPages,
    /// Power fails everywhere at once, in the middle of writing pages.
    TornWrites,
    /// Fsync on the leader's disk fails.
    SyncFails,
    /// Fsync on the leader's disk takes 500 ms to 2 s.
    SyncIsSlow,
    /// The leader's disk is full.
    DiskFull,
    /// A bit flips in what one node has stored, while it is down.
    BitFlip,
    /// Ten times as many clients as before, each as fast as it can.
    Overload,
    /// One node hands everything over and stops.
    DrainOne,
    /// One node dies with its disk and comes back empty under its old name.
    WipeOne,
    /// The last two nodes hand everything over and stop, the last one first, as a StatefulSet gets smaller.
    ScaleIn,
    /// The same, and their disks go with them.
    ScaleInWiped,
    /// One node dies at a step of the durability order, each time at the next one of all.
    CrashPoint,
    /// One node is stopped and started with the next build, or with the one before.
    UpgradeStep,
}

/// What a fault needs of the machine and of the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Signals alone.
    Nothing,
    /// Containers instead of processes.
    Containers,
    /// A network of its own.
    Net,
    /// Cables that can be bad.
    Cables,
    /// Wall clocks that can be set.
    Clock,
    /// Breakable disks.
    BreakableDisk,
    /// Small disks.
    SmallDisk,
    /// Limits of memory and processor time.
    Limits,
    /// A build that can be told where to die.
    CrashPoints,
    /// The binary of an earlier build.
    OldBinary,
}

/// Something that happened although it must not: recorded, and never a pass.
#[derive(Clone, Debug)]
pub struct Wrong {
    /// Its name.
    pub name: &'static str,
    /// What was seen.
    pub detail: String,
}

/// What an injection came to.
#[derive(Clone, Debug, Default)]
pub struct Injected {
    /// What it was done to.
    pub detail: String,
    /// What must not have happened.
    pub wrong: Option<Wrong>,
}

impl Fault {
    /// Its name, as scenarios and histories have it.
    pub fn name(self) -> String {
        let name = serde_json::to_value(self).ok().and_then(|name| Some(name.as_str()?.to_owned()));
        name.expect("a fault is a name")
    }

    /// What it needs where nodes are processes; [`crate::backend`] knows what containers can do.
    pub fn need(self) -> Need {
        use Fault::*;
        match self {
            KillLeader | KillControlLeader | KillBackingUp | KillMinority | KillAll | PauseLeader
            | RollingRestart | BitFlip | DrainOne | WipeOne | ScaleIn | ScaleInWiped => Need::Nothing,
            LeaderInMinority | LeaderInMajority | IsolateFollower | LeaderIsDeaf | LeaderIsMute | Bridge
            | MajorityRing | AnswersLost | PacketLoss => Need::Net,
            SlowCables | BadCables => Need::Cables,
            ClockForward | ClockBack | ClockStrobe => Need::Clock,
            PowerCutOne | PowerCutAll | PowerCutPages | TornWrites | SyncFails | SyncIsSlow => {
                Need::BreakableDisk
            }
            DiskFull => Need::SmallDisk,
            Overload => Need::Limits,
            CrashPoint => Need::CrashPoints,
            UpgradeStep => Need::OldBinary,
        }
    }

    /// Whether nodes end by it: with any other fault, one that has ended has crashed.
    pub fn ends_processes(self) -> bool {
        use Fault::*;
        matches!(
            self,
            KillLeader
                | KillControlLeader
                | KillBackingUp
                | KillMinority
                | KillAll
                | RollingRestart
                | PowerCutOne
                | PowerCutAll
                | PowerCutPages
                | TornWrites
                | SyncFails
                | BitFlip
                | DrainOne
                | WipeOne
                | ScaleIn
                | ScaleInWiped
                | CrashPoint
                | UpgradeStep
        )
    }

    /// Whether it may cost a replica, so that everything must be whole before the next one.
    pub fn takes_a_replica(self) -> bool {
        use Fault::*;
        matches!(self, BitFlip | DrainOne | WipeOne | ScaleIn | ScaleInWiped | CrashPoint | UpgradeStep)
    }

    /// The disks that it needs.
    pub fn disk(self) -> DiskKind {
        match self.need() {
            Need::BreakableDisk => DiskKind::Breakable,
            Need::SmallDisk => DiskKind::Small,
            _ => DiskKind::Plain,
        }
    }

    /// Does it.
    ///
    /// # Errors
    /// When it cannot be done.
    pub async fn inject(self, cluster: &mut Cluster, coin: &mut StdRng) -> Result<Injected> {
        let count = cluster.len();
        let all: Vec<usize> = (0..count).collect();
        let detail = match self {
            Fault::KillLeader => kill(cluster, &[cluster.leader().await?])?,
            Fault::KillControlLeader => kill(cluster, &[cluster.control_leader().await?])?,
            Fault::KillBackingUp => {
                let node = backup::in_the_middle(cluster, coin).await?;
                kill(cluster, &[node])?
            }
            Fault::KillMinority => {
                let first = coin.random_range(0..count);
                let victims: Vec<usize> = (0..(count - 1) / 2).map(|step| (first + step) % count).collect();
                kill(cluster, &victims)?
            }
            Fault::KillAll => kill(cluster, &all)?,
            Fault::PauseLeader => {
                let leader = cluster.leader().await?;
                cluster.members[leader].node.pause()?;
                names(&[leader])
            }
            Fault::RollingRestart => return rolling_restart(cluster).await,
            Fault::UpgradeStep => return upgrade::next(cluster).await,
            Fault::LeaderInMinority
            | Fault::LeaderInMajority
            | Fault::IsolateFollower
            | Fault::LeaderIsDeaf
            | Fault::LeaderIsMute
            | Fault::Bridge
            | Fault::MajorityRing
            | Fault::AnswersLost => partition::begin(self, cluster, coin).await?,
            Fault::PacketLoss => {
                cluster.backend.net()?.lose(20)?;
                "20 percent".to_owned()
            }
            Fault::SlowCables => {
                cluster.backend.net()?.cables()?.set(SLOW);
                "all".to_owned()
            }
            Fault::BadCables => {
                let bad = Quality { lost: 10, doubled: 5, corrupted: 1, ..SLOW };
                cluster.backend.net()?.cables()?.set(bad);
                "all".to_owned()
            }
            Fault::ClockForward => return jump(cluster, coin, JUMP_SECONDS).await,
            Fault::ClockBack => return jump(cluster, coin, -JUMP_SECONDS).await,
            Fault::ClockStrobe => {
                let node = coin.random_range(0..count);
                for step in 0..STROBES {
                    clock_of(cluster, node)?.set(if step % 2 == 0 { 0.2 } else { -0.2 })?;
                    tokio::time::sleep(STROBE_EVERY).await;
                }
                names(&[node])
            }
            Fault::PowerCutOne => {
                let node = coin.random_range(0..count);
                power_cut(cluster, &[node], Survivors::None, coin)?
            }
            Fault::PowerCutAll => power_cut(cluster, &all, Survivors::None, coin)?,
            Fault::PowerCutPages => power_cut(cluster, &all, Survivors::Pages, coin)?,
            Fault::TornWrites => power_cut(cluster, &all, Survivors::Torn, coin)?,
            Fault::SyncFails => return sync_fails(cluster).await,
            Fault::SyncIsSlow => {
                let leader = cluster.leader().await?;
                let delay = coin.random_range(500..2000);
                faults_of(cluster, leader)?.sync_delay_ms.store(delay, Ordering::Relaxed);
                format!("{} by {delay} ms", names(&[leader]))
            }
            Fault::DiskFull => {
                let leader = cluster.leader().await?;
                fill(cluster, leader)?;
                names(&[leader])
            }
            Fault::BitFlip => {
                let node = coin.random_range(0..count);
                kill(cluster, &[node])?;
                let below = cluster.members[node].data_below();
                let flipped = flip::flip(&below, is_in_use, coin)?;
                let flipped = flipped.context("the node has stored nothing")?;
                cluster.start(node)?;
                let (file, offset, bit) = (flipped.file.display(), flipped.offset, flipped.bit);
                format!("{}: {file} at {offset}, bit {bit}", names(&[node]))
            }
            Fault::Overload => {
                let crowd = cluster.crowd.as_mut().context("there are no clients")?;
                format!("{} clients more", crowd.start())
            }
            Fault::DrainOne => {
                let node = coin.random_range(0..count);
                return drain(cluster, &[node], false).await;
            }
            Fault::WipeOne => {
                let node = coin.random_range(0..count);
                kill(cluster, &[node])?;
                wipe(cluster, node)?;
                names(&[node])
            }
            Fault::ScaleIn | Fault::ScaleInWiped => {
                return drain(cluster, &[count - 1, count - 2], self == Fault::ScaleInWiped).await;
            }
            Fault::CrashPoint => {
                let node = coin.random_range(0..count);
                crash::at_next_point(cluster, node).await?
            }
        };
        Ok(Injected { detail, wrong: None })
    }
}

/// Ends every fault: everything is whole again and every node runs. Returns what has happened on the
/// cables meanwhile, where that is known.
///
/// # Errors
/// When that cannot be done.
pub fn heal(cluster: &mut Cluster) -> Result<Option<Suffered>> {
    let mut suffered = None;
    cluster.backend.cut(&BTreeSet::new())?;
    if let Ok(net) = cluster.backend.net() {
        net.lose(0)?;
        if let Ok(cables) = net.cables() {
            cables.set(Quality::default());
            suffered = Some(cables.damage().take());
        }
    }
    if let Some(crowd) = &cluster.crowd {
        crowd.stop();
    }
    for member in &cluster.members {
        if let Some(clock) = &member.clock {
            clock.set(0.0)?;
        }
        if let Some(disk) = &member.disk {
            disk.heal();
        }
        // Only a disk that was filled up has the file.
        drop(std::fs::remove_file(filler(&member.node.data_dir())));
    }
    cluster.start_missing()?;
    Ok(suffered)
}

/// Whether a file of a data directory is still needed: what was set aside as damaged is not.
fn is_in_use(path: &std::path::Path) -> bool {
    !path.components().any(|part| part.as_os_str().to_string_lossy().ends_with("damaged"))
        && !path.ends_with("LOCK")
}

fn names(nodes: &[usize]) -> String {
    nodes.iter().map(|at| format!("n{}", at + 1)).collect::<Vec<_>>().join(", ")
}

fn kill(cluster: &mut Cluster, nodes: &[usize]) -> Result<String> {
    let mut running = Vec::new();
    for at in nodes {
        if !cluster.members[*at].node.has_exited()? {
            running.push(*at);
        }
    }
    // All at once: first the signals, side by side because an engine takes its time for each, then
    // the waiting.
    let running: Vec<&Node> = running.iter().map(|at| &cluster.members[*at].node).collect();
    std::thread::scope(|scope| {
        let strikes: Vec<_> = running.iter().map(|node| scope.spawn(move || node.strike())).collect();
        strikes.into_iter().try_for_each(|strike| strike.join().expect("a signal does not panic"))
    })?;
    for at in nodes {
        cluster.members[*at].node.kill()?;
    }
    Ok(names(nodes))
}

fn clock_of(cluster: &Cluster, at: usize) -> Result<&Clock> {
    cluster.members[at].clock.as_ref().context("the clocks cannot be set")
}

/// Lets one node's wall clock jump, and asks the node what time it is then.
async fn jump(cluster: &Cluster, coin: &mut StdRng, seconds: i64) -> Result<Injected> {
    let node = coin.random_range(0..cluster.len());
    clock_of(cluster, node)?.set(seconds as f64)?;
    let ahead = clock::seconds_ahead(cluster.members[node].node.client()).await?;
    let detail = format!("{} is {ahead:+} s ahead by its own word", names(&[node]));
    let has_jumped = (ahead - seconds).abs() <= JUMP_LEEWAY_SECONDS;
    let wrong = (!has_jumped).then(|| Wrong {
        name: "clock_did_not_jump",
        detail: format!("{detail} and was to be {seconds:+} s"),
    });
    Ok(Injected { detail, wrong })
}

fn power_cut(
    cluster: &mut Cluster,
    nodes: &[usize],
    survivors: Survivors,
    coin: &mut StdRng,
) -> Result<String> {
    kill(cluster, nodes)?;
    let mut lost = Vec::new();
    for at in nodes {
        let disk = cluster.members[*at].disk.as_mut().context("the disk is not breakable")?;
        let damage = disk.cut_power(survivors, coin.random())?;
        lost.push(format!("n{}: {} writes and {} names", at + 1, damage.writes, damage.names));
    }
    Ok(lost.join("; "))
}

fn faults_of(cluster: &Cluster, at: usize) -> Result<&crate::disk::Faults> {
    Ok(cluster.members[at].disk.as_ref().context("the disk is not breakable")?.faults())
}

async fn sync_fails(cluster: &mut Cluster) -> Result<Injected> {
    let leader = cluster.leader().await?;
    faults_of(cluster, leader)?.sync_fails.store(true, Ordering::Relaxed);
    let exit = cluster.members[leader].node.exited(EXIT_DEADLINE).await;
    let wrong = match &exit {
        Ok(Some(EXIT_FSYNC)) => None,
        other => Some(Wrong {
            name: "wrong_exit",
            detail: format!("n{} after a failed fsync: {other:?}, not code {EXIT_FSYNC}", leader + 1),
        }),
    };
    Ok(Injected { detail: names(&[leader]), wrong })
}

/// Lets nodes hand everything over and stop, one after the other; perhaps their disks go with them.
async fn drain(cluster: &mut Cluster, nodes: &[usize], are_wiped: bool) -> Result<Injected> {
    let mut wrong = None;
    for at in nodes {
        let code = cluster.members[*at].node.terminate(DRAIN_DEADLINE).await;
        let log = cluster.members[*at].node.log_tail(50);
        if !matches!(code, Ok(Some(0))) || log.contains("before it is drained") {
            wrong =
                Some(Wrong { name: "not_drained", detail: format!("n{} after SIGTERM: {code:?}", at + 1) });
        }
        if are_wiped {
            wipe(cluster, *at)?;
        }
    }
    Ok(Injected { detail: names(nodes), wrong })
}

/// Deletes all that a node which does not run has stored.
fn wipe(cluster: &Cluster, at: usize) -> Result<()> {
    let member = &cluster.members[at];
    let data = member.node.data_dir();
    std::fs::remove_dir_all(&data).with_context(|| format!("wipe {}", data.display()))?;
    member.lost_disks.fetch_add(1, Ordering::Release);
    Ok(())
}

async fn rolling_restart(cluster: &mut Cluster) -> Result<Injected> {
    let mut wrong = None;
    for at in 0..cluster.len() {
        let code = cluster.members[at].node.terminate(STOP_DEADLINE).await;
        if !matches!(code, Ok(Some(0))) {
            wrong =
                Some(Wrong { name: "wrong_exit", detail: format!("n{} after SIGTERM: {code:?}", at + 1) });
        }
        cluster.start(at)?;
        cluster.members[at].node.ready().await?;
    }
    Ok(Injected { detail: "all".to_owned(), wrong })
}

fn filler(data: &std::path::Path) -> std::path::PathBuf {
    data.join("filler-of-chaos")
}

fn fill(cluster: &Cluster, at: usize) -> Result<()> {
    let data = cluster.members[at].node.data_dir();
    let stat = nix::sys::statvfs::statvfs(&data)?;
    let free = stat.blocks_available() * stat.fragment_size();
    ensure!(free > LEFT_FREE, "the disk of n{} is full already", at + 1);
    shell::run(&format!("fallocate -l {} {}", free - LEFT_FREE, filler(&data).display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_scenarios_say() {
        assert_eq!(Fault::KillLeader.name(), "kill-leader");
        let read: Fault = serde_json::from_str("\"power-cut-all\"").expect("a fault");
        assert_eq!((read, read.disk()), (Fault::PowerCutAll, DiskKind::Breakable));
    }
}
