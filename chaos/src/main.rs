//! `chaos`: runs scenarios, judges histories, writes the report.

mod arguments;
mod planted;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use shoal_chaos::backend::{Backend, BackendKind};
use shoal_chaos::checkers::Judgement;
use shoal_chaos::doctor;
use shoal_chaos::faults::net::Net;
use shoal_chaos::faults::{Need, containers};
use shoal_chaos::report::{self, Entry, RunResult, Timeline};
use shoal_chaos::run;
use shoal_chaos::scenario::{Scenario, Size};
use shoal_tests::bench::machine;

use arguments::{Arguments, Command, RunArguments, SizeName};

/// The scenarios that CI has time for: rows 2, 5, 9, 12, 14, 18 and 21.
const SELECTION: [&str; 7] =
    ["kill-leader", "split-brain", "zombie-leader", "everything", "sessions", "power-cut", "bit-flips"];

/// Seconds that a build with a planted bug may take to settle: it may never do so.
const PLANTED_PATIENCE: u64 = 8;

/// How a command ended.
enum Ending {
    /// Everything held, or was done.
    Passed,
    /// Something did not hold.
    Failed,
    /// Nothing could be tried here, so that nobody knows.
    Skipped,
}

impl From<bool> for Ending {
    fn from(is_good: bool) -> Ending {
        if is_good { Ending::Passed } else { Ending::Failed }
    }
}

/// The exit code when everything was skipped. Errors have 2.
const EXIT_SKIPPED: u8 = 3;

fn main() -> ExitCode {
    match run_command(Arguments::parse().command) {
        Ok(Ending::Passed) => ExitCode::SUCCESS,
        Ok(Ending::Failed) => ExitCode::FAILURE,
        Ok(Ending::Skipped) => ExitCode::from(EXIT_SKIPPED),
        Err(error) => {
            eprintln!("chaos: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run_command(command: Command) -> Result<Ending> {
    match command {
        Command::Doctor => examine()?,
        Command::List => list()?,
        Command::Run(arguments) => return Ok(run_all(&arguments)?.into()),
        Command::Planted { bin, bug, out } => return planted::planted(&bin, bug.as_deref(), &out),
        Command::Check { file } => return Ok(check(&file)?.into()),
        Command::Shrink { file, checker, out } => {
            let out = out.unwrap_or_else(|| file.with_file_name("minimal.jsonl.zst"));
            shrink(&file, checker.as_deref(), &out)?;
        }
        Command::Report { out } => write_page(&out)?,
        Command::ProbeNet { cables } => drop(Net::create(1, cables)?),
    }
    Ok(Ending::Passed)
}

fn examine() -> Result<()> {
    let faults = [
        ("processes: kill, pause, restart, flipped bits", Need::Nothing),
        ("containers: kill, pause, isolation (Docker Engine)", Need::Containers),
        ("network: partitions of any shape, loss (ip netns, veth, nft bridge)", Need::Net),
        ("network: delay, reordering, duplication, corruption (TAP)", Need::Cables),
        ("wall clocks that jump (libfaketime)", Need::Clock),
        ("disk: power cuts, torn writes, failing and slow fsync (FUSE)", Need::BreakableDisk),
        ("disk: full (tmpfs)", Need::SmallDisk),
        ("limits of memory and processor time (cgroups)", Need::Limits),
        ("crash points (a build with the feature planted-bugs)", Need::CrashPoints),
    ];
    for (what, need) in faults {
        match doctor::probe(need) {
            Ok(()) => println!("yes  {what}"),
            Err(error) => println!("no   {what}: {error:#}"),
        }
    }
    Ok(())
}

fn list() -> Result<()> {
    for scenario in Scenario::shipped()? {
        println!("{:>3}  {:20} {}", scenario.row, scenario.name, scenario.promise);
    }
    Ok(())
}

fn check(file: &Path) -> Result<bool> {
    let mut judged = run::judge(file)?;
    judged.minimize();
    print!("{}", report::text(&judged, true));
    Ok(report::passed(&judged.verdicts))
}

fn shrink(file: &Path, checker: Option<&str>, out: &Path) -> Result<()> {
    let judged = run::judge(file)?;
    let shrunk = run::shrink(&judged, checker)?;
    shrunk.history.write(out)?;
    let findings = shrunk.verdict.findings.iter().map(|finding| format!("  - {finding}"));
    println!("{} calls this invalid:", shrunk.verdict.checker);
    findings.chain(shrunk.lines.iter().cloned()).for_each(|line| println!("{line}"));
    let certainty = if shrunk.is_minimal { "minimal" } else { "perhaps not minimal" };
    println!("{certainty} after {} judgements; {}", shrunk.judgements, out.display());
    Ok(())
}

/// Each run gets a process of its own, because it moves into a network of its own.
fn run_all(arguments: &RunArguments) -> Result<bool> {
    let known = match &arguments.dir {
        Some(dir) => Scenario::all(dir)?,
        None => Scenario::shipped()?,
    };
    let wanted: Vec<&Scenario> = match arguments.scenarios.as_slice() {
        [name] if name == "all" => known.iter().collect(),
        names => {
            let selection: Vec<String> = SELECTION.iter().map(|name| (*name).to_owned()).collect();
            let names = if names == ["ci"] { &selection } else { names };
            let find = |name: &String| {
                known.iter().find(|known| known.name == *name).with_context(|| format!("no scenario {name}"))
            };
            names.iter().map(find).collect::<Result<_>>()?
        }
    };
    if let [scenario] = wanted.as_slice() {
        return run_one(scenario, arguments);
    }
    let mut all_passed = true;
    for scenario in wanted {
        let mut command = std::process::Command::new(std::env::current_exe()?);
        command.args(arguments.words(&scenario.name, arguments.seed));
        all_passed &= command.status()?.success();
    }
    write_page(&arguments.out)?;
    Ok(all_passed)
}

fn run_one(scenario: &Scenario, arguments: &RunArguments) -> Result<bool> {
    let mut scenario = scenario.clone();
    for variable in &arguments.env {
        let (name, value) =
            variable.split_once('=').with_context(|| format!("{variable:?} is not NAME=VALUE"))?;
        scenario.env.insert(name.to_owned(), value.to_owned());
    }
    if !arguments.fault.is_empty() {
        let unknown =
            arguments.fault.iter().find(|name| !scenario.faults.iter().any(|fault| fault.name() == **name));
        ensure!(unknown.is_none(), "{} has no fault {}", scenario.name, unknown.map_or("", String::as_str));
        scenario.faults.retain(|fault| arguments.fault.contains(&fault.name()));
    }
    if scenario.needs(Need::OldBinary) {
        scenario.old_bin.clone_from(&arguments.old_bin);
    }
    let scenario = &scenario;
    let mut size: Size = match arguments.size {
        SizeName::Ci => scenario.ci.clone(),
        SizeName::Nightly => scenario.nightly.clone(),
    };
    size.seconds = arguments.seconds.unwrap_or(size.seconds);
    if arguments.expect_caught {
        size.patience = PLANTED_PATIENCE;
    }
    let seed = arguments.seed.unwrap_or_else(rand::random);
    let command = arguments.replay(&scenario.name, seed);
    println!("row {} {}: {}", scenario.row, scenario.name, scenario.promise);
    println!("  {command}");
    let mut entry = Entry {
        row: scenario.row,
        scenario: scenario.name.clone(),
        promise: scenario.promise.clone(),
        seed,
        result: RunResult::Passed,
        verdicts: Vec::new(),
        seconds: 0.0,
        command,
        timeline: Timeline::default(),
    };
    if let Some(reason) = missing(scenario, &size, arguments.backend) {
        println!("  skipped: {reason}");
        if arguments.expect_caught {
            return Ok(false);
        }
        entry.result = RunResult::Skipped(reason);
        keep(&arguments.out, entry)?;
        return Ok(true);
    }
    let began = Instant::now();
    let work = arguments.out.join(&scenario.name);
    clear(&work, arguments.backend)?;
    let work = work.canonicalize()?;
    // Before there is any other thread: threads inherit the network of who starts them.
    let backend = Backend::create(arguments.backend, size.nodes, scenario.needs(Need::Cables), &work)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut judged = match runtime.block_on(run::run(scenario, &size, seed, backend, &work)) {
        Ok(judged) => judged,
        Err(error) => {
            entry.result = RunResult::Failed;
            keep(&arguments.out, entry)?;
            return Err(error);
        }
    };
    if !arguments.expect_caught {
        judged.minimize();
    }
    print!("{}", report::text(&judged, !arguments.expect_caught));
    let passed = report::passed(&judged.verdicts);
    entry.result = if passed { RunResult::Passed } else { RunResult::Failed };
    entry.timeline = Timeline::of(&judged.history);
    entry.verdicts = judged.verdicts;
    entry.seconds = began.elapsed().as_secs_f64();
    println!(
        "  {} in {:.0} s; {}",
        if passed { "PASSED" } else { "FAILED" },
        entry.seconds,
        judged.file.display()
    );
    // A slow or shaky machine proves nothing: only a broken promise about data does.
    let is_proof = |checker: &str| !["coverage", "availability"].contains(&checker);
    let is_caught = entry
        .verdicts
        .iter()
        .any(|verdict| verdict.judgement == Judgement::Invalid && is_proof(&verdict.checker));
    if arguments.expect_caught {
        println!("  the planted bug was {}", if is_caught { "caught" } else { "NOT caught" });
        return Ok(is_caught);
    }
    keep(&arguments.out, entry)?;
    Ok(passed)
}

/// Why a scenario cannot run here, if it cannot.
fn missing(scenario: &Scenario, size: &Size, backend: BackendKind) -> Option<String> {
    if scenario.needs(Need::OldBinary) && scenario.old_bin.is_none() {
        return Some("no earlier build is given with --old-bin; `make upgrade-test` makes one".to_owned());
    }
    match backend.needs(scenario, size.nodes) {
        Ok(needs) => needs.into_iter().find_map(|(who, need)| {
            let error = doctor::probe(need).err()?;
            Some(format!("{who}: {error:#}"))
        }),
        Err(error) => Some(format!("{error:#}")),
    }
}

/// An empty folder, whatever a run before has left there.
fn clear(dir: &Path, backend: BackendKind) -> Result<()> {
    if dir.exists() {
        let is_ours = dir.join("history.jsonl.zst").exists() || std::fs::read_dir(dir)?.next().is_none();
        let is_ours = is_ours || dir.join("n1").exists();
        ensure!(is_ours, "{} is not a folder of a run", dir.display());
        if backend == BackendKind::Docker {
            containers::clear(&dir.canonicalize()?)?;
        }
        unmount_below(&dir.canonicalize()?)?;
        std::fs::remove_dir_all(dir).with_context(|| format!("remove {}", dir.display()))?;
    }
    std::fs::create_dir_all(dir)?;
    Ok(())
}

/// A run that was killed has left its disks mounted.
fn unmount_below(dir: &Path) -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    for path in mounts.lines().filter_map(|line| line.split(' ').nth(1)) {
        if Path::new(path).starts_with(dir) {
            let status = std::process::Command::new("umount").arg("-l").arg(path).status()?;
            ensure!(status.success(), "{path} cannot be unmounted");
        }
    }
    Ok(())
}

fn results_file(out: &Path) -> PathBuf {
    out.join("results.json")
}

fn results(out: &Path) -> Result<Vec<Entry>> {
    match std::fs::read(results_file(out)) {
        Ok(bytes) => serde_json::from_slice(&bytes).context("results.json"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => bail!("{}: {error}", results_file(out).display()),
    }
}

/// Adds an entry to the results, in place of an older one of the same scenario.
fn keep(out: &Path, entry: Entry) -> Result<()> {
    std::fs::create_dir_all(out)?;
    let mut entries = results(out)?;
    entries.retain(|known| known.scenario != entry.scenario);
    entries.push(entry);
    entries.sort_by(|a, b| (a.row, &a.scenario).cmp(&(b.row, &b.scenario)));
    std::fs::write(results_file(out), serde_json::to_vec_pretty(&entries)?)?;
    Ok(())
}

fn write_page(out: &Path) -> Result<()> {
    let entries = results(out)?;
    ensure!(!entries.is_empty(), "{} has no results", out.display());
    let facts = machine::describe();
    let fact = |name: &str| facts.iter().find(|(known, _)| *known == name).map_or("", |(_, fact)| fact);
    let page = report::html(&entries, fact("machine"), fact("date"));
    let path = out.join("report.html");
    std::fs::write(&path, page)?;
    print!("{}", report::markdown(&entries));
    println!("{}", path.display());
    Ok(())
}
