//! The proof that the checkers see something: a build with bugs on purpose, each of which they must catch.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use shoal_chaos::backend::BackendKind;
use shoal_chaos::faults::crash;
use shoal_chaos::scenario::Scenario;
use shoal_proto::planted::Bug;

use crate::{Ending, missing};

/// How often a planted bug is looked for, each time by another schedule, before it counts as missed:
/// some show only when a fault falls into the right few milliseconds.
const ATTEMPTS: u32 = 3;
/// How long faults strike a build with a planted bug, in seconds.
const SECONDS: &str = "24";

/// Where each planted bug shows.
fn scenario_for(bug: Bug) -> &'static str {
    match bug {
        Bug::AckBeforeSync => "power-cut",
        Bug::ForgottenVote => "kill-all",
        Bug::ReadOnFollower => "baseline",
        Bug::ReadWithoutQuorum => "zombie-leader",
        Bug::RetryAppliedTwice => "retries",
        Bug::ForgottenDelete => "everything",
        Bug::SnapshotAheadOfItself => "snapshots",
    }
}

/// The fault that brings it out, where the others of the scenario would only take its time.
fn fault_for(bug: Bug) -> Option<&'static str> {
    match bug {
        Bug::RetryAppliedTwice => Some("answers-lost"),
        _ => None,
    }
}

/// Runs each bug, or one of them, in the scenario where it shows. Like rows of the matrix, bugs that this
/// machine cannot show are skipped and do not keep the others from passing; when all of them are, so is the
/// whole.
///
/// # Errors
/// When the binary is not such a build, or there is no such bug.
pub fn planted(bin: &Path, only: Option<&str>, out: &Path) -> Result<Ending> {
    ensure!(bin.is_file(), "{} does not exist", bin.display());
    let bin = bin.canonicalize()?;
    let mut list = Command::new(&bin);
    list.arg("crash-points");
    crash::check_points(list)?;
    let chaos = std::env::current_exe()?;
    let run = |arguments: &[&str], folder: &str| -> Result<bool> {
        let mut command = Command::new(&chaos);
        command.arg("run").args(arguments).arg("--out").arg(out.join(folder)).env("SHOAL_BIN", &bin);
        Ok(command.status()?.success())
    };
    let known = Scenario::shipped()?;
    let (mut caught, mut missed, mut skipped) = (Vec::new(), Vec::new(), Vec::new());
    // A build with bugs has points to die at as well: there it must keep its promises.
    let holds = only.is_some() || run(&["crash-points"], "crash-points")?;
    let wanted: Vec<_> = Bug::ALL.iter().filter(|(_, name)| only.is_none_or(|only| only == *name)).collect();
    ensure!(!wanted.is_empty(), "there is no such bug");
    for (bug, name) in wanted {
        println!("planted: {name}");
        let scenario = known.iter().find(|known| known.name == scenario_for(*bug));
        if let Some(reason) = scenario.and_then(|known| missing(known, &known.ci, BackendKind::Processes)) {
            println!("  skipped, so nobody knows whether it would be caught: {reason}");
            skipped.push(*name);
            continue;
        }
        let variable = format!("SHOAL_PLANTED_BUG={name}");
        let mut arguments =
            vec![scenario_for(*bug), "--expect-caught", "--seconds", SECONDS, "--env", &variable];
        arguments.extend(fault_for(*bug).into_iter().flat_map(|fault| ["--fault", fault]));
        let mut is_caught = false;
        for _ in 0..ATTEMPTS {
            is_caught = is_caught || run(&arguments, name)?;
        }
        let of = if is_caught { &mut caught } else { &mut missed };
        of.push(*name);
    }
    for (what, names) in [("caught", &caught), ("not caught", &missed), ("skipped", &skipped)] {
        if !names.is_empty() {
            println!("{what}: {}", names.join(", "));
        }
    }
    if !holds {
        println!("the crash points did not pass");
    }
    Ok(match (holds && missed.is_empty(), caught.is_empty()) {
        (false, _) => Ending::Failed,
        (true, true) => Ending::Skipped,
        (true, false) => Ending::Passed,
    })
}
