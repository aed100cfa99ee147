//! What `chaos` is told on the command line, and the line that says the same again: a run is repeated by what
//! its report prints, so whatever differs from the default is in there.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use shoal_chaos::backend::BackendKind;

/// Where runs leave what they have recorded.
const OUT: &str = "target/chaos";
/// The variable that names the nodes' binary.
const BIN: &str = "SHOAL_BIN";

/// Breaks a Shoal cluster on purpose, and judges whether it kept its promises.
#[derive(Parser)]
#[command(version)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Says which faults this machine can do.
    Doctor,
    /// Lists the scenarios.
    List,
    /// Runs scenarios and judges them.
    Run(RunArguments),
    /// Runs a build with planted bugs, one bug after the other: each must be caught. Exits with 3 when none
    /// could be tried here.
    Planted {
        /// The binary that was built with the feature `planted-bugs`.
        #[arg(long)]
        bin: PathBuf,
        /// Only this bug.
        #[arg(long)]
        bug: Option<String>,
        /// Where histories, logs and data go.
        #[arg(long, default_value = "target/chaos/planted")]
        out: PathBuf,
    },
    /// Judges a history again.
    Check {
        /// A history file.
        file: PathBuf,
    },
    /// Finds the smallest part of a history that a checker still calls invalid.
    Shrink {
        /// A history file.
        file: PathBuf,
        /// The checker; the first that calls the history invalid when absent.
        #[arg(long)]
        checker: Option<String>,
        /// Where the part goes, as a history file; beside the history when absent.
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Writes the page from the results of runs, and prints them as a table.
    Report {
        /// The folder with `results.json`.
        #[arg(long, default_value = OUT)]
        out: PathBuf,
    },
    /// Makes a private network and takes it down again.
    #[command(hide = true)]
    ProbeNet {
        /// With cables that can be bad.
        #[arg(long)]
        cables: bool,
    },
}

#[derive(clap::Args)]
pub struct RunArguments {
    /// Names of scenarios, or `ci` for the selection that CI runs, or `all`.
    #[arg(required = true)]
    pub scenarios: Vec<String>,
    /// How large.
    #[arg(long, value_enum, default_value = "ci")]
    pub size: SizeName,
    /// What the nodes run as.
    #[arg(long, value_enum, default_value = "processes")]
    pub backend: BackendKind,
    /// The seed of the schedule; random when absent, and printed.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Seconds in which faults strike, instead of the scenario's own.
    #[arg(long)]
    pub seconds: Option<u64>,
    /// Only these of the scenario's faults.
    #[arg(long)]
    pub fault: Vec<String>,
    /// Where histories, logs, data and results go.
    #[arg(long, default_value = OUT)]
    pub out: PathBuf,
    /// A folder with scenarios, instead of those in this program.
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// A variable for the nodes, as NAME=VALUE.
    #[arg(long)]
    pub env: Vec<String>,
    /// The binary of an earlier build, which upgrades begin with.
    #[arg(long, value_name = "FILE")]
    pub old_bin: Option<PathBuf>,
    /// Succeed exactly when a checker says that a promise was broken: for planted bugs.
    #[arg(long)]
    pub expect_caught: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SizeName {
    Ci,
    Nightly,
}

impl RunArguments {
    /// What runs one scenario in the same way, after the program's name: all that is not as it is by default.
    pub fn words(&self, scenario: &str, seed: Option<u64>) -> Vec<OsString> {
        let mut words = ["run", scenario].map(OsString::from).to_vec();
        let mut add = |name: &str, value: &OsStr| words.extend([OsString::from(name), value.to_owned()]);
        if self.size == SizeName::Nightly {
            add("--size", OsStr::new("nightly"));
        }
        if self.backend != BackendKind::Processes {
            add("--backend", OsStr::new(self.backend.name()));
        }
        for (name, number) in [("--seed", seed), ("--seconds", self.seconds)] {
            if let Some(number) = number {
                add(name, OsStr::new(&number.to_string()));
            }
        }
        self.fault.iter().for_each(|fault| add("--fault", OsStr::new(fault)));
        self.env.iter().for_each(|variable| add("--env", OsStr::new(variable)));
        for (name, path) in [("--dir", &self.dir), ("--old-bin", &self.old_bin)] {
            if let Some(path) = path {
                add(name, path.as_os_str());
            }
        }
        if self.out.as_os_str() != OUT {
            add("--out", self.out.as_os_str());
        }
        if self.expect_caught {
            words.push(OsString::from("--expect-caught"));
        }
        words
    }

    /// The whole command that runs one scenario again, for a shell.
    pub fn replay(&self, scenario: &str, seed: u64) -> String {
        let bin = std::env::var_os(BIN).map(|bin| format!("{BIN}={} ", quoted(&bin))).unwrap_or_default();
        let words: Vec<String> = self.words(scenario, Some(seed)).iter().map(|word| quoted(word)).collect();
        format!("{bin}chaos {}", words.join(" "))
    }
}

/// A word as a shell takes it for one.
fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "-_=+:,./@%".contains(letter);
    match !word.is_empty() && word.chars().all(is_plain) {
        true => word.into_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: impl IntoIterator<Item = OsString>) -> RunArguments {
        let words = [OsString::from("chaos")].into_iter().chain(words);
        match Arguments::try_parse_from(words).expect("arguments").command {
            Command::Run(arguments) => arguments,
            _ => panic!("another command"),
        }
    }

    fn split(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn a_run_is_repeated_with_all_that_it_was_told() {
        let told = "run kill-leader --size nightly --backend docker --seed 7 --seconds 26 --fault kill-leader \
                    --env A=1 --env B=2 --dir scenarios --old-bin old --out elsewhere --expect-caught";
        let arguments = read(split(told));
        assert_eq!(arguments.words("kill-leader", arguments.seed), split(told));
        assert!(arguments.replay("kill-leader", 7).ends_with(&format!("chaos {told}")));
        let again = read(arguments.words("kill-leader", Some(7)));
        assert_eq!(again.words("kill-leader", again.seed), split(told));
    }

    #[test]
    fn what_is_as_by_default_is_not_said() {
        let arguments = read(split("run all --size ci --backend processes --out target/chaos"));
        assert_eq!(arguments.words("baseline", None), split("run baseline"));
    }

    #[test]
    fn words_with_spaces_stay_one() {
        assert_eq!(quoted(OsStr::new("A=1")), "A=1");
        assert_eq!(quoted(OsStr::new("A=it's b")), r"'A=it'\''s b'");
        assert_eq!(quoted(OsStr::new("")), "''");
    }
}
