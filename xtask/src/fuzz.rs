//! `cargo xtask fuzz [TARGET] [--time 60s | --executions N]`: lets libFuzzer look for new paths through each decoder.
//!
//! Everything is compiled with coverage counters, which stable compilers have too; only libFuzzer itself is C++ and
//! needs a compiler for that. What it finds on the way stays in `target/fuzz/corpus`, and is where the next run begins; an input
//! that breaks a target in `target/fuzz/found`.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

/// What makes the compiler count coverage in the way that libFuzzer reads.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                        -Cllvm-args=-sanitizer-coverage-pc-table \
                        -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1";
/// With a target of its own, so that build scripts get no counters.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// How long each target runs if nothing is said.
const DEFAULT_SECONDS: u64 = 60;
/// Input lengths that are tried; the decoders' own caps are far above and tested by unit tests.
const MAX_BYTES: &str = "-max_len=4096";

/// What is to be run.
#[derive(Debug, PartialEq)]
pub(crate) struct Campaign<'a> {
    target: Option<&'a str>,
    limit: Limit,
}

/// When a target has run long enough.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Limit {
    Seconds(u64),
    Executions(u64),
}

impl<'a> Campaign<'a> {
    /// `None` if `words`, those behind `fuzz`, say something else.
    pub(crate) fn parse(words: &[&'a str]) -> Option<Self> {
        let (target, rest) = match words {
            [target, rest @ ..] if !target.starts_with('-') => (Some(*target), rest),
            rest => (None, rest),
        };
        let positive = |text: &str| text.parse::<u64>().ok().filter(|number| *number > 0);
        let limit = match rest {
            [] => Limit::Seconds(DEFAULT_SECONDS),
            ["--time", time] => Limit::Seconds(match time.strip_suffix('m') {
                Some(minutes) => positive(minutes)?.checked_mul(60)?,
                None => positive(time.strip_suffix('s')?)?,
            }),
            ["--executions", number] => Limit::Executions(positive(number)?),
            _ => return None,
        };
        Some(Self { target, limit })
    }

    /// True if nothing was found.
    pub(crate) fn run(&self, root: &Path) -> bool {
        match self.run_all(root) {
            Ok(all_hold) => all_hold,
            Err(message) => {
                println!("{message}");
                false
            }
        }
    }

    fn run_all(&self, root: &Path) -> Result<bool, String> {
        build(root)?;
        let names = list(root)?;
        let wanted: Vec<&String> =
            names.iter().filter(|name| self.target.is_none_or(|target| *name == target)).collect();
        if wanted.is_empty() {
            return Err(format!("{:?} is no target; there are {}", self.target, names.join(", ")));
        }
        println!("{:<16} {:>12} {:>9} {:>9}  result", "target", "executions", "a second", "coverage");
        let mut all_hold = true;
        for name in wanted {
            let (line, holds) = self.run_one(root, name)?;
            println!("{name:<16} {line}");
            all_hold &= holds;
        }
        Ok(all_hold)
    }

    /// The rest of the line about one target, and whether it holds.
    fn run_one(&self, root: &Path, name: &str) -> Result<(String, bool), String> {
        let folder = root.join("target/fuzz");
        let (corpus, found) = (folder.join("corpus").join(name), folder.join("found"));
        let failed = |error: io::Error| format!("{}: {error}", folder.display());
        fs::create_dir_all(&corpus).map_err(failed)?;
        fs::create_dir_all(&found).map_err(failed)?;
        let limit = match self.limit {
            Limit::Seconds(seconds) => format!("-max_total_time={seconds}"),
            Limit::Executions(number) => format!("-runs={number}"),
        };
        let output = program(root, name)
            .env("UNISONO_FUZZ_CORPUS", &corpus)
            .arg(&corpus)
            .args([&limit, MAX_BYTES, "-print_final_stats=1", "-rss_limit_mb=1024", "-timeout=10"])
            .arg(format!("-artifact_prefix={}/{name}-", found.display()))
            .stdout(Stdio::null())
            .output()
            .map_err(|error| format!("{name} could not be started: {error}"))?;
        let words = String::from_utf8_lossy(&output.stderr);
        let holds = output.status.success();
        if !holds {
            let tail: Vec<&str> = words.lines().rev().take(40).collect();
            tail.iter().rev().for_each(|line| println!("    {line}"));
        }
        let result = if holds { "ok".to_owned() } else { format!("FAILED, see {}", found.display()) };
        let (executions, rate, coverage) = (
            last_word_behind(&words, "stat::number_of_executed_units:"),
            last_word_behind(&words, "stat::average_exec_per_sec:"),
            last_word_behind(&words, "cov:"),
        );
        Ok((format!("{executions:>12} {rate:>9} {coverage:>9}  {result}"), holds))
    }
}

/// Builds the program, in a folder of its own, because the flags change every crate.
fn build(root: &Path) -> Result<(), String> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(program)
        .current_dir(root.join("crates/fuzz/libfuzzer"))
        .env("RUSTFLAGS", COVERAGE)
        .args(["build", "--release", "--target", TRIPLE, "--target-dir"])
        .arg(root.join("target/fuzz/build"))
        .status()
        .map_err(|error| format!("cargo could not be started: {error}"))?;
    if status.success() { Ok(()) } else { Err("the targets do not build".to_owned()) }
}

/// The program, for the target `name`.
fn program(root: &Path, name: &str) -> Command {
    let path = format!("target/fuzz/build/{TRIPLE}/release/unisono-libfuzzer");
    let mut command = Command::new(root.join(path));
    command.current_dir(root).env("UNISONO_FUZZ_TARGET", name);
    command
}

/// The names of all targets.
fn list(root: &Path) -> Result<Vec<String>, String> {
    let output =
        program(root, "--list").output().map_err(|error| format!("it could not be started: {error}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

/// The word behind the last `mark` in what libFuzzer says; nothing if it did not come to say it.
fn last_word_behind<'w>(words: &'w str, mark: &str) -> &'w str {
    words.rsplit_once(mark).and_then(|(_, rest)| rest.split_whitespace().next()).unwrap_or("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_and_a_limit_are_read_and_nothing_else() {
        let campaign = |target, limit| Some(Campaign { target, limit });
        assert_eq!(Campaign::parse(&[]), campaign(None, Limit::Seconds(60)));
        assert_eq!(Campaign::parse(&["hello"]), campaign(Some("hello"), Limit::Seconds(60)));
        assert_eq!(Campaign::parse(&["--time", "2m"]), campaign(None, Limit::Seconds(120)));
        let expected = campaign(Some("hello"), Limit::Executions(1000));
        assert_eq!(Campaign::parse(&["hello", "--executions", "1000"]), expected);
        for wrong in
            [&["--time"][..], &["--time", "0s"], &["--time", "5"], &["--executions", "x"], &["a", "b"]]
        {
            assert_eq!(Campaign::parse(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn the_figures_of_libfuzzer_are_found() {
        let words = "#2 INITED cov: 10 ft: 3\n#900 DONE   cov: 123 ft: 456 corp: 7/90b\n\
                     stat::number_of_executed_units: 900\nstat::average_exec_per_sec:     450\n";
        assert_eq!(last_word_behind(words, "stat::number_of_executed_units:"), "900");
        assert_eq!(last_word_behind(words, "stat::average_exec_per_sec:"), "450");
        assert_eq!(last_word_behind(words, "cov:"), "123");
        assert_eq!(last_word_behind("", "cov:"), "-");
    }
}
