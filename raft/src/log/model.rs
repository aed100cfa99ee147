//! Group commit in many orders of its callers and the writer, chosen by a scheduler of its own.

use std::io;
use std::time::Duration;

use shuttle::sync::{Arc, Mutex, mpsc};
use shuttle::{future, thread};
use tokio::sync::oneshot;

use super::record;
use super::writer::{Change, Done, Op, Records, Writer};

const CALLERS: u64 = 3;
const ROUNDS: u8 = 2;
/// Orders that are tried of each kind.
const ORDERS: usize = 2000;
/// Changes of the order that matter, for the scheduler that looks for rare ones.
const DEPTH: usize = 3;

#[derive(Default)]
struct Platter {
    /// Which caller wrote which value, in order.
    written: Vec<(u64, u8)>,
    /// How many of them are durable.
    synced: usize,
}

impl Platter {
    fn is_durable(&self, caller: u64, value: u8) -> bool {
        self.written[..self.synced].contains(&(caller, value))
    }
}

struct Disk {
    platter: Arc<Mutex<Platter>>,
    is_honest: bool,
}

impl Records for Disk {
    fn write(&mut self, changes: Vec<(u64, Change)>, sync: bool) {
        for (group, change) in changes {
            let Change::Put { value, .. } = change else { unreachable!("nothing else is written here") };
            self.platter.lock().expect("whole").written.push((group, value[0]));
        }
        thread::yield_now();
        if sync && self.is_honest {
            let mut platter = self.platter.lock().expect("whole");
            platter.synced = platter.written.len();
        }
    }

    fn entries(&self, _: u64, _: u64, _: u64) -> io::Result<Vec<Vec<u8>>> {
        Ok(Vec::new())
    }

    fn get(&self, group: u64, _: &[u8]) -> Option<Vec<u8>> {
        let platter = self.platter.lock().expect("whole");
        platter.written.iter().rev().find(|(caller, _)| *caller == group).map(|(_, value)| vec![*value])
    }

    fn span(&self, _: u64) -> Option<(u64, u64)> {
        None
    }

    fn groups(&self) -> Vec<u64> {
        Vec::new()
    }

    fn patience(&self) -> Duration {
        Duration::MAX
    }

    fn tend(&mut self, _: bool) {}
}

fn put(caller: u64, value: u8, sync: bool, done: Done) -> Op {
    let change = Change::Put { key: record::VOTE, value: vec![value] };
    Op::Write { group: caller, change, sync, done }
}

/// Each caller writes without waiting, writes and waits, and reads.
fn call(caller: u64, queue: &mpsc::Sender<Op>, platter: &Mutex<Platter>) {
    for round in 0..ROUNDS {
        let (unsynced, synced) = (round * 2, round * 2 + 1);
        queue.send(put(caller, unsynced, false, Done::Nobody)).expect("the writer runs");
        let (done, answer) = oneshot::channel();
        queue.send(put(caller, synced, true, Done::Wait(done))).expect("the writer runs");
        future::block_on(answer).expect("every waiter is answered");
        {
            let platter = platter.lock().expect("whole");
            assert!(platter.is_durable(caller, synced), "acknowledged and not durable");
            assert!(platter.is_durable(caller, unsynced), "later than what came after it");
        }
        let (reply, answer) = oneshot::channel();
        queue.send(Op::Get { group: caller, key: record::VOTE, reply }).expect("the writer runs");
        assert_eq!(future::block_on(answer).expect("an answer"), Some(vec![synced]), "its own last write");
    }
}

fn group_commit(is_honest: bool) {
    let platter: Arc<Mutex<Platter>> = Arc::default();
    let (queue, ops) = mpsc::channel();
    let disk = Disk { platter: platter.clone(), is_honest };
    let writer = thread::spawn(move || {
        let mut writer = Writer::new(disk);
        while let Ok(op) = ops.recv() {
            writer.step(op, || ops.try_recv().ok());
        }
    });
    let callers: Vec<_> = (1..=CALLERS)
        .map(|caller| {
            let (queue, platter) = (queue.clone(), platter.clone());
            thread::spawn(move || call(caller, &queue, &platter))
        })
        .collect();
    drop(queue);
    callers.into_iter().for_each(|caller| caller.join().expect("no caller fails"));
    writer.join().expect("the writer ends");
    let platter = platter.lock().expect("whole");
    for caller in 1..=CALLERS {
        let order: Vec<u8> =
            platter.written.iter().filter(|(of, _)| *of == caller).map(|(_, value)| *value).collect();
        assert_eq!(order, (0..ROUNDS * 2).collect::<Vec<u8>>(), "a caller's writes keep their order");
    }
}

#[test]
fn what_is_acknowledged_is_durable_whatever_the_order() {
    shuttle::check_random(|| group_commit(true), ORDERS);
    shuttle::check_pct(|| group_commit(true), ORDERS, DEPTH);
}

#[test]
#[should_panic(expected = "acknowledged and not durable")]
fn a_disk_that_lies_is_found_out() {
    shuttle::check_random(|| group_commit(false), ORDERS);
}
