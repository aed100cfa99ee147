//! Bugs that are planted on purpose, to prove that the checkers of `chaos` would find them. They
//! exist only in builds with the feature `planted-bugs`, where `SHOAL_PLANTED_BUG` names one; in
//! any other build [`is_planted`] is a constant. Such a build also has points at which it can be
//! told to die ([`crash_point`]).

/// A bug by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// Log entries are acknowledged without having been synced.
    AckBeforeSync,
    /// A vote is given and not written down.
    ForgottenVote,
    /// A follower answers a linearizable read from what it has.
    ReadOnFollower,
    /// A leader answers a linearizable read without asking whether it still leads.
    ReadWithoutQuorum,
    /// A write that was applied already is applied again.
    RetryAppliedTwice,
    /// Deletes do not reach the disk.
    ForgottenDelete,
    /// A snapshot says that it holds more than it does.
    SnapshotAheadOfItself,
}

impl Bug {
    /// All bugs with their names.
    pub const ALL: [(Bug, &'static str); 7] = [
        (Bug::AckBeforeSync, "ack-before-sync"),
        (Bug::ForgottenVote, "forgotten-vote"),
        (Bug::ReadOnFollower, "read-on-follower"),
        (Bug::ReadWithoutQuorum, "read-without-quorum"),
        (Bug::RetryAppliedTwice, "retry-applied-twice"),
        (Bug::ForgottenDelete, "forgotten-delete"),
        (Bug::SnapshotAheadOfItself, "snapshot-ahead-of-itself"),
    ];
}

/// Whether this process has that bug.
///
/// # Panics
/// When `SHOAL_PLANTED_BUG` names none.
#[cfg(feature = "planted-bugs")]
pub fn is_planted(bug: Bug) -> bool {
    use std::sync::OnceLock;

    static PLANTED: OnceLock<Option<Bug>> = OnceLock::new();
    let planted = PLANTED.get_or_init(|| {
        let name = std::env::var("SHOAL_PLANTED_BUG").ok()?;
        let known = Bug::ALL.iter().find(|(_, known)| *known == name);
        Some(known.unwrap_or_else(|| panic!("SHOAL_PLANTED_BUG: there is no bug {name}")).0)
    });
    *planted == Some(bug)
}

/// Never, in this build.
#[cfg(not(feature = "planted-bugs"))]
pub const fn is_planted(_: Bug) -> bool {
    false
}

/// The points at which a build with planted bugs can die, in the durability order, each with the
/// percentage of the times it is passed that make one death in a second or so.
pub const CRASH_POINTS: [(&str, f32); 16] = [
    ("log-unwritten", 1.0),
    ("log-synced", 1.0),
    ("log-marked", 1.0),
    ("entry-applied", 1.0),
    ("checkpoint-begun", 50.0),
    ("store-flushed", 50.0),
    ("checkpoint-durable", 50.0),
    ("graph-written", 100.0),
    ("snapshot-loaded", 100.0),
    ("snapshot-current", 100.0),
    ("rebuild-loaded", 100.0),
    ("rebuild-aside", 100.0),
    ("rejoin-joined", 100.0),
    ("rejoin-identity-aside", 100.0),
    ("rejoin-parts-aside", 100.0),
    ("rejoin-saved", 100.0),
];

/// How the line ends that a process writes to standard error before it dies at a point: any other death
/// looks the same from outside.
pub fn crash_mark(point: &str) -> String {
    format!("dies at the crash point {point}")
}

/// Where a build with planted bugs dies if `FAILPOINTS` says so, as `NAME=PERCENT%return`. It says so first
/// ([`crash_mark`]).
#[cfg(feature = "planted-bugs")]
pub fn crash_point(name: &'static str) {
    debug_assert!(CRASH_POINTS.iter().any(|(known, _)| *known == name), "{name} is not in the list");
    fail::fail_point!(name, |_| {
        eprintln!("shoal: {}", crash_mark(name));
        std::process::abort()
    });
}

/// Nothing, in this build.
#[cfg(not(feature = "planted-bugs"))]
pub const fn crash_point(_: &'static str) {}

/// Reads `FAILPOINTS`; before it is called no crash point does anything.
#[cfg(feature = "planted-bugs")]
pub fn set_up() {
    std::mem::forget(fail::FailScenario::setup());
}

/// Nothing, in this build.
#[cfg(not(feature = "planted-bugs"))]
pub const fn set_up() {}
