//! Whole clusters in one thread, in simulated time: the groups, the log's writer, sleep and
//! membership as they are, over a network, disks and a clock that are simulated.
//!
//! | module | what |
//! |---|---|
//! | [`disk`] | disks that lose what was not synced when their node crashes |
//! | [`runtime`] | tokio without chance |
//! | [`net`] | a network that delays, drops, repeats and cuts |
//! | [`ledger`] | the state machine: a shard's history of writes, or the control group's state |
//! | [`truth`] | what has been promised, and whether it is kept |
//! | [`world`] | the nodes, what happens to them, and the clients |
//!
//! A seed gives the schedule, and the same seed gives the same run to the last message. After the
//! faults everything heals, and then every group must have a leader, every replica the same log,
//! and every acknowledged write must be where it was acknowledged. At last a node is cut off and comes back:
//! nobody loses office over it.

mod disk;
mod ledger;
mod net;
mod runtime;
mod truth;
mod world;

use std::cell::Cell;
use std::panic;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::time::Instant;

pub use runtime::Seeded;
use truth::Outcome;
use world::Lie;

/// Seeds that one run of the tests goes through.
const SEEDS: u64 = 1000;

thread_local! {
    static PANICS: Cell<u64> = const { Cell::new(0) };
}

/// A panic in a task is caught by the runtime and would pass unseen.
fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            PANICS.with(|panics| panics.set(panics.get() + 1));
            before(info);
        }));
    });
}

/// Runs one cluster through one schedule.
fn simulate(seed: u64, lie: Option<Lie>) -> Outcome {
    count_panics();
    let panics_before = PANICS.with(Cell::get);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime");
    let world = Seeded::scope(seed, world::run(seed, lie));
    let mut outcome = runtime.block_on(world);
    let panics = PANICS.with(Cell::get) - panics_before;
    if panics > 0 {
        outcome.violations.push(format!("{panics} tasks have panicked"));
    }
    outcome
}

fn report(seed: u64, outcome: &Outcome) -> String {
    format!(
        "seed {seed}: {}\nreplay: SHOAL_SIMULATION_SEED={seed} cargo test --release --workspace --lib \
         simulation::seeds -- --nocapture",
        outcome.violations.join("\n  ")
    )
}

/// As many threads as there are cores go through the seeds.
#[test]
fn seeds() {
    if let Ok(seed) = std::env::var("SHOAL_SIMULATION_SEED") {
        let seed = seed.parse().expect("SHOAL_SIMULATION_SEED is a number");
        let outcome = simulate(seed, None);
        println!("{}\n{:?}", outcome.story.join("\n"), outcome.counts);
        assert!(outcome.violations.is_empty(), "{}", report(seed, &outcome));
        return;
    }
    let count = std::env::var("SHOAL_SIMULATION_SEEDS")
        .map_or(SEEDS, |count| count.parse().expect("SHOAL_SIMULATION_SEEDS is a number"));
    let started = Instant::now();
    let (next, sum) = (AtomicU64::new(0), Mutex::new(Outcome::default()));
    let failed = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= count {
                        return;
                    }
                    let outcome = simulate(seed, None);
                    if !outcome.violations.is_empty() {
                        failed.lock().unwrap_or_else(PoisonError::into_inner).push(report(seed, &outcome));
                    }
                    sum.lock().unwrap_or_else(PoisonError::into_inner).add(&outcome);
                }
            });
        }
    });
    let sum = sum.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!("{count} seeds in {:.0} s: {:?}", started.elapsed().as_secs_f64(), sum.counts);
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    assert!(failed.is_empty(), "{} of {count} failed\n{}", failed.len(), failed.join("\n"));
    for what in world::MUST_HAPPEN {
        assert!(sum.counts.get(what).copied().unwrap_or_default() > 0, "{what} has never happened");
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in [3, 14, 159] {
        let (first, second) = (simulate(seed, None), simulate(seed, None));
        assert_eq!(first, second, "seed {seed}");
        assert!(first.counts["messages"] > 1000);
    }
}

/// What is checked can fail: a disk that says "synced" and is not, a vote that is not kept, a
/// leader that reads without asking, a node that forgets that it was there, one that claims office without
/// asking. Each shows in some of the seeds that every run goes through.
#[test]
fn lies_are_found_out() {
    for lie in [Lie::Sync, Lie::Vote, Lie::Read, Lie::Leave, Lie::Manners] {
        let found = (0..SEEDS).find(|seed| !simulate(*seed, Some(lie)).violations.is_empty());
        assert!(found.is_some(), "{lie:?} was found by none of {SEEDS} seeds");
    }
}
