//! A minimal counterexample: the smallest part of a history that a checker still calls invalid.
//!
//! Delta debugging (the ddmin of Zeller and Hildebrandt, "Simplifying and isolating
//! failure-inducing input", 2002): halves, quarters and ever smaller parts are left out, as long as
//! the same checker still says invalid.
//!
//! ```text
//!  history ─▶ keys, each with all its operations ─▶ operations of the keys left ─▶ what is left
//! ```
//!
//! An operation goes whole, with its end. A listing goes on saying what it said of the keys that are
//! left, and nothing of the others. What the checker does not look at (faults, samples, requirements
//! of the scenario) goes at once.
//!
//! Less of a history must never be worse than more of it, or something harmless would be shown as
//! the mistake: whoever read a value would have read a phantom, if its write were left out. So
//! operations that explain others stay as long as those stay (`parts.rs` has the rules).
//!
//! What nodes say of their groups has no such simple rules: a membership that is left out makes a
//! node that was let go a node that forgets. There, groups and then samples are left out as long as
//! the checker still finds something that it found in the whole, word for word.
//!
//! Checkers that measure a whole run (availability, overload, usage, coverage) have no smaller part
//! that shows the same, and are refused.

mod parts;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::checkers::{self, Judgement, MAX_EVIDENCE, Verdict, describe};
use crate::history::{Event, Header, History, Operation};
use parts::{Parts, project, units};

/// The checkers that judge operations.
const OF_OPERATIONS: [&str; 6] =
    ["register-search", "register-versions", "set", "visibility", "session", "batch"];
/// The checker that judges samples.
const OF_SAMPLES: &str = "raft";

/// How much may be spent on a smaller history.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// How often the checker may judge a part.
    pub judgements: u32,
    /// How long all of that may take; the judgement that is under way is finished.
    pub time: Duration,
}

/// What a minimal counterexample may cost.
pub const BUDGET: Budget = Budget { judgements: 2_000, time: Duration::from_secs(60) };

/// A part of a history that is still invalid.
#[derive(Debug)]
pub struct Shrunk {
    /// The part, which the same checker judges again.
    pub history: History,
    /// What the checker says of it.
    pub verdict: Verdict,
    /// What is left, one operation or sample a line, in the order in which they began.
    pub lines: Vec<String>,
    /// How often the checker has judged a part.
    pub judgements: u32,
    /// Whether nothing more can be left out; else the budget was used up before that was known.
    pub is_minimal: bool,
}

impl Shrunk {
    /// The lines for a verdict, with a word on what they lack.
    pub fn evidence(&self) -> Vec<String> {
        let mut lines: Vec<String> = self.lines.iter().take(MAX_EVIDENCE).cloned().collect();
        if self.lines.len() > MAX_EVIDENCE {
            lines.push(format!("and {} more", self.lines.len() - MAX_EVIDENCE));
        }
        if !self.is_minimal {
            lines.push(format!("perhaps not minimal: stopped after {} judgements", self.judgements));
        }
        lines
    }
}

/// Whether what that checker judges has parts.
pub fn has_parts(checker: &str) -> bool {
    OF_OPERATIONS.contains(&checker) || checker == OF_SAMPLES
}

/// Leaves out of a history whatever the checker can do without and still call it invalid.
/// `elapsed` tells how long it has taken so far.
///
/// # Errors
/// When there is no such checker, when it does not call the whole history invalid, or when it
/// judges a run as a whole.
pub fn shrink(
    history: &History,
    checker: &str,
    budget: Budget,
    elapsed: &dyn Fn() -> Duration,
) -> Result<Shrunk> {
    let whole = checkers::run(checker, history, &history.operations())?;
    let judgement = format!("{:?}", whole.judgement).to_lowercase();
    ensure!(
        whole.judgement == Judgement::Invalid,
        "{checker} calls this history {judgement}, not invalid: there is nothing to shrink"
    );
    ensure!(has_parts(checker), "{checker} judges a run as a whole: no part of it shows the same");
    let header = Header {
        checkers: vec![checker.to_owned()],
        required: BTreeMap::new(),
        least_ok: 0,
        longest_gap_ms: None,
        most_growth_percent_per_hour: None,
        usage_window_seconds: None,
        ..history.header.clone()
    };
    let mut trials = Trials { checker, header, budget, elapsed, used: 0 };
    let (events, is_minimal) = match checker == OF_SAMPLES {
        true => shrink_samples(history, &whole.findings, &mut trials),
        false => shrink_operations(history, &mut trials),
    };
    let small = History { header: trials.header, events };
    let operations = small.operations();
    let verdict = checkers::run(checker, &small, &operations)?;
    ensure!(verdict.judgement == Judgement::Invalid, "{checker} does not call what is left invalid");
    let mut lines: Vec<String> = operations.iter().map(describe).collect();
    lines.extend(small.events.iter().filter_map(|event| match event {
        Event::Probe { ns, sample, .. } => Some(format!("{:>10.1} ms  {sample:?}", *ns as f64 / 1e6)),
        _ => None,
    }));
    Ok(Shrunk { history: small, verdict, lines, judgements: trials.used, is_minimal })
}

/// Judges parts, within a budget.
struct Trials<'a> {
    checker: &'a str,
    header: Header,
    budget: Budget,
    elapsed: &'a dyn Fn() -> Duration,
    used: u32,
}

impl Trials<'_> {
    /// None when the budget is used up.
    fn judge(&mut self, events: Vec<Event>, operations: &[Operation]) -> Option<Verdict> {
        if self.used >= self.budget.judgements || (self.elapsed)() >= self.budget.time {
            return None;
        }
        self.used += 1;
        let part = History { header: self.header.clone(), events };
        Some(checkers::run(self.checker, &part, operations).expect("it has judged the whole history"))
    }

    /// Judges the closed part of some operations and keys.
    fn judge_part(&mut self, parts: &Parts, operations: &[usize], keys: &BTreeSet<u64>) -> Trial {
        let left = parts.close(operations, keys);
        match self.judge(Vec::new(), &parts.select(&left, keys)) {
            Some(verdict) if verdict.judgement == Judgement::Invalid => Trial::Invalid(left),
            Some(_) => Trial::Other,
            None => Trial::OverBudget,
        }
    }
}

/// What came of a part.
enum Trial {
    /// It is invalid, with only these of its items.
    Invalid(Vec<usize>),
    /// It is not.
    Other,
    /// Nobody has looked.
    OverBudget,
}

/// Items of which none can be left out any more, and whether that is certain.
fn ddmin(mut items: Vec<usize>, mut attempt: impl FnMut(&[usize]) -> Trial) -> (Vec<usize>, bool) {
    let mut parts = 2;
    while items.len() > 1 {
        let size = items.len().div_ceil(parts);
        match attempt_pieces(&items, size, &mut attempt) {
            (Trial::Invalid(left), next_parts) => (items, parts) = (left, next_parts),
            (Trial::Other, _) if size == 1 => break,
            (Trial::Other, _) => parts = (2 * parts).min(items.len()),
            (Trial::OverBudget, _) => return (items, false),
        }
    }
    (items, true)
}

/// Tries pieces of a size, each alone and then each left out, up to the first that is invalid; and in
/// how many pieces what is left is to be cut then.
fn attempt_pieces(
    items: &[usize],
    size: usize,
    attempt: &mut impl FnMut(&[usize]) -> Trial,
) -> (Trial, usize) {
    let pieces: Vec<&[usize]> = items.chunks(size).collect();
    for piece in &pieces {
        match attempt(piece) {
            Trial::Other => {}
            decided => return (decided, 2),
        }
    }
    // Of two pieces each is what the other leaves.
    for left_out in (0..pieces.len()).filter(|_| pieces.len() > 2) {
        let rest = pieces.iter().enumerate().filter(|(at, _)| *at != left_out);
        let rest: Vec<usize> = rest.flat_map(|(_, piece)| piece.iter().copied()).collect();
        match attempt(&rest) {
            Trial::Other => {}
            decided => return (decided, pieces.len() - 1),
        }
    }
    (Trial::Other, pieces.len())
}

fn shrink_samples(history: &History, findings: &[String], trials: &mut Trials) -> (Vec<Event>, bool) {
    let samples: Vec<(u64, &Event)> = history
        .events
        .iter()
        .filter_map(|event| match event {
            Event::Probe { sample, .. } => Some((sample.group, event)),
            _ => None,
        })
        .collect();
    let mut attempt = |left: Vec<usize>| {
        let events = left.iter().map(|at| samples[*at].1.clone()).collect();
        let is_same = |verdict: &Verdict| {
            verdict.judgement == Judgement::Invalid
                && verdict.findings.iter().any(|finding| findings.contains(finding))
        };
        match trials.judge(events, &[]) {
            Some(verdict) if is_same(&verdict) => Trial::Invalid(left),
            Some(_) => Trial::Other,
            None => Trial::OverBudget,
        }
    };
    let groups: BTreeSet<u64> = samples.iter().map(|(group, _)| *group).collect();
    let groups: Vec<u64> = groups.into_iter().collect();
    let of_groups = |chosen: &[usize]| -> Vec<usize> {
        let is_chosen = |group: u64| chosen.iter().any(|at| groups[*at] == group);
        (0..samples.len()).filter(|at| is_chosen(samples[*at].0)).collect()
    };
    let (chosen, are_few) = ddmin((0..groups.len()).collect(), |chosen| match attempt(of_groups(chosen)) {
        Trial::Invalid(_) => Trial::Invalid(chosen.to_vec()),
        other => other,
    });
    let (left, is_minimal) = ddmin(of_groups(&chosen), |left| attempt(left.to_vec()));
    (left.iter().map(|at| samples[*at].1.clone()).collect(), are_few && is_minimal)
}

fn shrink_operations(history: &History, trials: &mut Trials) -> (Vec<Event>, bool) {
    let whole = Parts::of(history.operations());
    let all: Vec<usize> = (0..whole.operations.len()).collect();
    let units = units(&whole.operations);
    let keys_of = |chosen: &[usize]| -> BTreeSet<u64> {
        chosen.iter().flat_map(|at| units[*at].iter().copied()).collect()
    };
    let (chosen, are_few) =
        ddmin((0..units.len()).collect(), |chosen| match trials.judge_part(&whole, &all, &keys_of(chosen)) {
            Trial::Invalid(_) => Trial::Invalid(chosen.to_vec()),
            other => other,
        });
    let keys = keys_of(&chosen);
    let of_keys = whole.close(&all, &keys);
    // The rules of the part are those of the whole for what is left, and they are fewer.
    let part = Parts::of(whole.select(&of_keys, &keys));
    let (left, is_minimal) =
        ddmin((0..of_keys.len()).collect(), |left| trials.judge_part(&part, left, &keys));
    let left: Vec<usize> = left.into_iter().map(|at| of_keys[at]).collect();
    (events_of(history, &left, &keys), are_few && is_minimal)
}

/// The events of operations, by the numbers that [`History::operations`] gives them; listings say
/// nothing of other keys.
fn events_of(history: &History, operations: &[usize], keys: &BTreeSet<u64>) -> Vec<Event> {
    let mut spans: Vec<Vec<usize>> = Vec::new();
    let mut open: BTreeMap<u64, usize> = BTreeMap::new();
    for (at, event) in history.events.iter().enumerate() {
        match event {
            Event::Invoke { process, .. } => {
                open.insert(*process, spans.len());
                spans.push(vec![at]);
            }
            Event::Complete { process, .. } => {
                if let Some(of) = open.remove(process) {
                    spans[of].push(at);
                }
            }
            Event::Fault { .. }
            | Event::Probe { .. }
            | Event::BackupBegan { .. }
            | Event::BackupMade { .. }
            | Event::Restored { .. }
            | Event::Usage { .. } => {}
        }
    }
    let events: BTreeSet<usize> = operations.iter().flat_map(|of| spans[*of].iter().copied()).collect();
    let mut events: Vec<Event> = events.into_iter().map(|at| history.events[at].clone()).collect();
    for event in &mut events {
        if let Event::Complete { answer, .. } = event {
            project(answer, keys);
        }
    }
    events
}

#[cfg(test)]
mod tests;
