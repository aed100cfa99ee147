//! What to run: one file for each row of the matrix, in a size for CI and one for the night.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::checkers;
use crate::cluster::DiskKind;
use crate::faults::{Fault, Need, backup, reshard};
use crate::restore;
use crate::workloads::Workload;

/// Checkers that take the index of a point, or the shard of several, for something that stays. A shard that
/// is split or merged gives its points other indexes, and a batch may come to lie in two of them.
const BY_SHARD: [&str; 2] = ["register-versions", "batch"];

/// A scenario file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Its name; the file is called after it.
    #[serde(skip)]
    pub name: String,
    /// The row of the matrix.
    pub row: u32,
    /// What is promised, in a sentence.
    pub promise: String,
    /// What clients do.
    pub workload: Workload,
    /// What one more client each does all the time.
    #[serde(default)]
    pub alongside: Vec<Workload>,
    /// Who judges.
    pub checkers: Vec<String>,
    /// The faults, of which one at a time strikes.
    #[serde(default)]
    pub faults: Vec<Fault>,
    /// What the nodes' data is on.
    #[serde(default)]
    pub disk: DiskKind,
    /// Environment of the nodes.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Panics at places that contain this are expected and caught by the node: sled panics on
    /// some kinds of damage, raft-engine when fsync fails.
    pub expected_panics: Option<String>,
    /// Figures of coverage that must reach so much, besides that every fault strikes: a run in
    /// which nobody saw a 507 proves nothing about full disks.
    #[serde(default)]
    pub must_see: BTreeMap<String, u64>,
    /// Shards of the collection, instead of what the workload wants.
    pub shards: Option<u32>,
    /// Replicas of each shard, instead of one on every node.
    pub replicas: Option<usize>,
    /// How many leaders may be elected after the first of each group, where that is promised.
    pub most_elections: Option<u64>,
    /// The longest time without an acknowledged write, in milliseconds, where that is promised.
    pub longest_gap_ms: Option<u64>,
    /// The binary that the nodes run to begin with, where they are upgraded.
    #[serde(skip)]
    pub old_bin: Option<PathBuf>,
    /// In minutes.
    pub ci: Size,
    /// Through the night.
    pub nightly: Size,
}

/// How large a run is.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    /// Nodes.
    #[serde(default = "three")]
    pub nodes: usize,
    /// Seconds of work before the first fault.
    #[serde(default = "calm")]
    pub calm: u64,
    /// Seconds in which faults strike.
    pub seconds: u64,
    /// Clients.
    #[serde(default = "ten")]
    pub clients: u64,
    /// Operations a second of all clients together, at most.
    #[serde(default = "rate")]
    pub rate: u64,
    /// Seconds that a fault lasts: from, to.
    #[serde(default = "span")]
    pub hold: (u64, u64),
    /// Seconds between two faults: from, to.
    #[serde(default = "span")]
    pub pause: (u64, u64),
    /// Seconds that the cluster may take to settle after the last fault, and again to converge.
    #[serde(default = "patience")]
    pub patience: u64,
    /// How often each fault must have struck.
    #[serde(default)]
    pub each: u64,
    /// Whether shards are split and merged all the time while faults strike. Then at least one split and
    /// one merge must have been completed.
    #[serde(default)]
    pub reshards: bool,
    /// How many of the backups that are made all the time while faults strike are restored into new clusters
    /// afterwards, the last ones; none are made when it is zero.
    #[serde(default)]
    pub backups: usize,
    /// Seconds of work after the last fault: what grows slowly shows only in processes that live long.
    #[serde(default)]
    pub tail: u64,
    /// How much a node's memory may grow in an hour, in percent; only long runs can tell. Then every node
    /// must have had a process that ran for the window.
    pub most_growth_percent_per_hour: Option<f64>,
    /// Seconds that a node's process must have run for its memory and files to be judged; 1200 when absent.
    pub usage_window: Option<u64>,
    /// The least number of operations that must have succeeded.
    #[serde(default = "least_ok")]
    pub least_ok: u64,
}

fn three() -> usize {
    3
}

fn calm() -> u64 {
    3
}

fn ten() -> u64 {
    10
}

fn rate() -> u64 {
    300
}

fn span() -> (u64, u64) {
    (3, 5)
}

fn patience() -> u64 {
    30
}

fn least_ok() -> u64 {
    1000
}

impl Scenario {
    /// Reads a scenario from its text.
    ///
    /// # Errors
    /// When it is not one, or names a checker or disk that does not fit.
    pub fn parse(name: &str, text: &str) -> Result<Scenario> {
        let mut scenario: Scenario = toml::from_str(text).with_context(|| format!("scenario {name}"))?;
        scenario.name = name.to_owned();
        for checker in &scenario.checkers {
            ensure!(checkers::NAMES.contains(&checker.as_str()), "scenario {name}: no checker {checker}");
        }
        for fault in &scenario.faults {
            let disk = fault.disk();
            let fits = disk == DiskKind::Plain || disk == scenario.disk;
            ensure!(fits, "scenario {name}: {} needs the disk {disk:?}", fault.name());
        }
        if scenario.ci.reshards || scenario.nightly.reshards {
            scenario.check_resharding()?;
        }
        for size in [&scenario.ci, &scenario.nightly] {
            scenario.check_backups(size)?;
        }
        Ok(scenario)
    }

    /// The scenarios that ship with this program, by row.
    ///
    /// # Errors
    /// When one is wrong; a test sees to it that none is.
    pub fn shipped() -> Result<Vec<Scenario>> {
        let scenarios = SHIPPED.iter().map(|(name, text)| Scenario::parse(name, text));
        Ok(by_row(scenarios.collect::<Result<_>>()?))
    }

    /// All scenarios of a folder, by row.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn all(dir: &Path) -> Result<Vec<Scenario>> {
        let mut scenarios = Vec::new();
        for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "toml") {
                let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
                let name = path.file_stem().unwrap_or_default().to_string_lossy();
                scenarios.push(Scenario::parse(&name, &text)?);
            }
        }
        Ok(by_row(scenarios))
    }

    /// What does not go with shards that change.
    fn check_resharding(&self) -> Result<()> {
        let name = &self.name;
        for checker in &self.checkers {
            ensure!(
                !BY_SHARD.contains(&checker.as_str()),
                "scenario {name}: {checker} judges shards that stay as they are"
            );
        }
        let unfit = self.faults.iter().find(|fault| fault.takes_a_replica());
        let fault = unfit.map(|fault| fault.name()).unwrap_or_default();
        ensure!(unfit.is_none(), "scenario {name}: {fault} waits until nothing changes any more");
        Ok(())
    }

    /// What does not go with backups, or needs them.
    fn check_backups(&self, size: &Size) -> Result<()> {
        let name = &self.name;
        if size.backups == 0 {
            let needs = |checker: &String| checker == "backup";
            let is_needed = self.faults.contains(&Fault::KillBackingUp) || self.checkers.iter().any(needs);
            ensure!(!is_needed, "scenario {name}: no backups are made");
            return Ok(());
        }
        ensure!(!size.reshards, "scenario {name}: backups are judged by shards that stay as they are");
        ensure!(size.nodes >= 3, "scenario {name}: nobody would see what a dead node has restored");
        Ok(())
    }

    /// Whether one of its faults needs that.
    pub fn needs(&self, need: Need) -> bool {
        self.faults.iter().any(|fault| fault.need() == need)
    }

    /// Figures of coverage, and the least that they must be: each fault struck so often, and shards were
    /// split and merged, or backups made, broken off and restored, where they are.
    pub fn required(&self, size: &Size) -> BTreeMap<String, u64> {
        let struck = self.faults.iter().map(|fault| (format!("fault_{}", fault.name()), size.each));
        let mut seen: Vec<&str> = Vec::new();
        if size.reshards {
            seen.extend([reshard::SPLIT, reshard::MERGED]);
        }
        if size.backups > 0 {
            seen.extend([backup::MADE, restore::RESTORED, restore::BROKEN_OFF]);
        }
        if self.faults.contains(&Fault::KillBackingUp) {
            seen.push(backup::BROKEN_OFF);
        }
        let seen = seen.into_iter().map(|what| (format!("fault_{what}"), 1));
        struck.chain(seen).chain(self.must_see.clone()).collect()
    }
}

/// Names and texts of the files in `scenarios/`.
macro_rules! shipped {
    ($($name:literal)*) => { &[$(($name, include_str!(concat!("../scenarios/", $name, ".toml")))),*] };
}

const SHIPPED: &[(&str, &str)] = shipped!(
    "backup"
    "baseline"
    "batches"
    "bit-flips"
    "bridge"
    "cables"
    "churn"
    "clocks"
    "crash-points"
    "disk-full"
    "everything"
    "failing-sync"
    "kill-all"
    "kill-leader"
    "kill-minority"
    "leaks"
    "one-way"
    "overload"
    "power-cut"
    "rejoin"
    "resharding"
    "retries"
    "rolling-restart"
    "scaling"
    "search"
    "sessions"
    "snapshots"
    "soak"
    "split-brain"
    "torn-writes"
    "upgrade"
    "zombie-leader"
);

fn by_row(mut scenarios: Vec<Scenario>) -> Vec<Scenario> {
    scenarios.sort_by(|a, b| (a.row, &a.name).cmp(&(b.row, &b.name)));
    scenarios
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkers::usage::WINDOW_SECONDS;

    #[test]
    fn every_scenario_that_ships_can_be_read() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
        let scenarios = Scenario::all(&dir).expect("all are right");
        let names = |scenarios: &[Scenario]| -> Vec<String> {
            scenarios.iter().map(|scenario| scenario.name.clone()).collect()
        };
        let shipped = Scenario::shipped().expect("the same");
        assert_eq!(names(&scenarios), names(&shipped), "every file ships");
        for scenario in scenarios {
            let (ci, nightly) = (&scenario.ci, &scenario.nightly);
            assert!(ci.seconds <= nightly.seconds, "{}: the night is shorter than CI", scenario.name);
            assert!(scenario.faults.is_empty() || ci.each > 0, "{}: no fault has to strike", scenario.name);
        }
    }

    #[test]
    fn whoever_looks_for_leaks_lets_processes_live() {
        for scenario in Scenario::shipped().expect("all are right") {
            for size in [&scenario.ci, &scenario.nightly] {
                if size.most_growth_percent_per_hour.is_none() {
                    continue;
                }
                let lives = match scenario.faults.iter().any(|fault| fault.ends_processes()) {
                    true => size.tail,
                    false => size.calm + size.seconds + size.tail,
                };
                let window = size.usage_window.unwrap_or(WINDOW_SECONDS);
                assert!(lives > window, "{}: no process lives for {window} s", scenario.name);
                assert!(scenario.checkers.iter().any(|checker| checker == "usage"), "{}", scenario.name);
            }
        }
    }

    #[test]
    fn nodes_come_and_go_under_writers_and_a_searcher() {
        let shipped = Scenario::shipped().expect("all are right");
        for row in [23, 24, 26] {
            let scenario = shipped.iter().find(|known| known.row == row).expect("it ships");
            let does: Vec<Workload> =
                std::iter::once(scenario.workload).chain(scenario.alongside.iter().copied()).collect();
            for (workload, checker) in [(Workload::Set, "set"), (Workload::Visibility, "visibility")] {
                assert!(does.contains(&workload), "row {row}: {does:?}");
                assert!(scenario.checkers.iter().any(|known| known == checker), "row {row}: {checker}");
            }
        }
    }

    #[test]
    fn shards_that_change_must_have_changed() {
        let shipped = Scenario::shipped().expect("all are right");
        let scenario = shipped.iter().find(|known| known.name == "resharding").expect("it ships");
        let required = scenario.required(&scenario.ci);
        assert_eq!((required["fault_shard-split"], required["fault_shards-merged"]), (1, 1));
        let text = include_str!("../scenarios/resharding.toml");
        let by_index = text.replace("\"set\"", "\"register-versions\"");
        let refused = Scenario::parse("x", &by_index).expect_err("an index does not stay").to_string();
        assert!(refused.contains("register-versions"), "{refused}");
        let waits = text.replace("\"kill-all\"", "\"wipe-one\"");
        let refused = Scenario::parse("x", &waits).expect_err("it is never settled").to_string();
        assert!(refused.contains("wipe-one"), "{refused}");
    }
    #[test]
    fn backups_must_have_been_made_broken_off_and_restored() {
        let shipped = Scenario::shipped().expect("all are right");
        let scenario = shipped.iter().find(|known| known.name == "backup").expect("it ships");
        let required = scenario.required(&scenario.ci);
        for what in ["backup-made", "backup-broken-off", "backup-restored", "restore-broken-off"] {
            assert_eq!(required[&format!("fault_{what}")], 1, "{what}");
        }
        let text = include_str!("../scenarios/backup.toml");
        let refused = Scenario::parse("x", &text.replace("backups = ", "backups = 0 # "));
        let refused = refused.expect_err("there is nothing to judge").to_string();
        assert!(refused.contains("no backups"), "{refused}");
        let reshards = text.replace("[nightly]\n", "[nightly]\nreshards = true\n");
        let refused = Scenario::parse("x", &reshards).expect_err("shards do not stay").to_string();
        assert!(refused.contains("stay as they are"), "{refused}");
    }
}
