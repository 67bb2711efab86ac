//! `cargo xtask test`: every check of the repository, one step after the other, all of them even if one fails.
//!
//! Output is passed on as it comes. At the end a line for each step says how long it took, and the last line is
//! `N passed, N failed` over all steps; a step that fails without a failed test (a build, a rule) counts as one.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use crate::count::{self, Count};
use crate::{kernels, python, tidy};

/// What was done, and how it went.
struct Report {
    name: &'static str,
    passed: bool,
    count: Count,
    took: Duration,
}

/// Runs all steps; true if all passed.
pub(crate) fn run(root: &Path) -> bool {
    let mut reports = vec![step("tidy: the house rules", || (tidy::run(root), Count::default()))];
    if !has_nextest(root) {
        let install = cargo(root, &["install", "cargo-nextest", "--locked"]);
        reports.push(step("cargo install cargo-nextest: it is missing", || execute(install, count::nextest)));
    }
    if kernels::is_missing(root) {
        let provide = || (kernels::provide(root), Count::default());
        reports.push(step("NVRTC, which kernels are compiled with: it is missing", provide));
    }
    let mut suite = cargo(root, &["nextest", "run", "--workspace", "--no-fail-fast"]);
    suite.envs(kernels::environment(root));
    reports.push(step("cargo nextest: the test suite", || execute(suite, count::nextest)));
    let mut examples = cargo(root, &["test", "--doc", "--workspace", "--no-fail-fast"]);
    examples.envs(kernels::environment(root));
    reports.push(step("cargo test --doc: the examples", || execute(examples, count::cargo_test)));
    reports.push(step("pytest: the Python package", || test_python(root)));
    let mut commands = vec![(
        "cargo check: without features",
        cargo(root, &["check", "-p", "unisono", "--no-default-features"]),
    )];
    if root.join("crates/sync/tests/loom.rs").exists() {
        commands.push(("loom: models of the shared-memory protocols", loom(root)));
    }
    commands.push(("cargo doc: the documentation", documentation(root)));
    for (name, command) in commands {
        reports.push(step(name, || execute(command, count::cargo_test)));
    }
    summarize(&reports)
}

/// The tests of the Python package alone; true if all passed.
pub(crate) fn run_python(root: &Path) -> bool {
    summarize(&[step("pytest: the Python package", || test_python(root))])
}

/// The tests that need torch, with this version of it; true if all passed.
pub(crate) fn run_torch(root: &Path, version: &str) -> bool {
    summarize(&[step("pytest: the backend of torch.distributed", || {
        run_pytest(python::prepare_torch(root, version))
    })])
}

fn test_python(root: &Path) -> (bool, Count) {
    run_pytest(python::prepare(root))
}

fn run_pytest(prepared: Result<Command, String>) -> (bool, Count) {
    match prepared {
        Ok(tests) => execute(tests, count::pytest),
        Err(reason) => {
            println!("the Python package cannot be tested: {reason}");
            (false, Count::default())
        }
    }
}

fn cargo(root: &Path, arguments: &[&str]) -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(root).env("CARGO_TERM_COLOR", "never").args(arguments);
    command
}

/// In release and in a folder of its own, because the flag changes every crate.
fn loom(root: &Path) -> Command {
    let arguments =
        ["test", "-p", "unisono-sync", "--test", "loom", "--release", "--target-dir", "target/loom"];
    let mut command = cargo(root, &arguments);
    command.env("RUSTFLAGS", "--cfg loom").env("LOOM_MAX_PREEMPTIONS", "2");
    command
}

/// Of libraries only: the program `unisono` and the library of that name would be written to the same place.
fn documentation(root: &Path) -> Command {
    let mut command = cargo(root, &["doc", "--no-deps", "--workspace", "--lib"]);
    command.env("RUSTDOCFLAGS", "-D warnings");
    command
}

fn has_nextest(root: &Path) -> bool {
    cargo(root, &["nextest", "--version"]).output().is_ok_and(|output| output.status.success())
}

/// Announces and times `work`.
fn step(name: &'static str, work: impl FnOnce() -> (bool, Count)) -> Report {
    println!("\n== {name}");
    let begin = Instant::now();
    let (passed, mut count) = work();
    if !passed && count.failed == 0 {
        count.failed = 1;
    }
    Report { name, passed, count, took: begin.elapsed() }
}

/// Runs `command`, passing its output on and reading the counts from each line with `read`.
fn execute(mut command: Command, read: fn(&str) -> Count) -> (bool, Count) {
    println!("{command:?}");
    let mut child = match command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn() {
        Ok(child) => child,
        Err(error) => {
            println!("it could not be started: {error}");
            return (false, Count::default());
        }
    };
    let (sender, lines) = mpsc::channel();
    if let Some(output) = child.stdout.take() {
        forward(output, sender.clone());
    }
    if let Some(errors) = child.stderr.take() {
        forward(errors, sender);
    }
    let mut count = Count::default();
    let mut terminal = std::io::stdout().lock();
    for line in lines {
        // Who closed the terminal still wants the exit status.
        _ = terminal.write_all(&line);
        count += read(&String::from_utf8_lossy(&line));
    }
    drop(terminal);
    (child.wait().is_ok_and(|status| status.success()), count)
}

/// Sends each line of `output` until it ends.
fn forward(output: impl Read + Send + 'static, lines: Sender<Vec<u8>>) {
    thread::spawn(move || {
        let mut reader = BufReader::new(output);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            if lines.send(std::mem::take(&mut line)).is_err() {
                return;
            }
        }
    });
}

fn summarize(reports: &[Report]) -> bool {
    let mut total = Count::default();
    println!("\n== where the time went");
    for report in reports {
        total += report.count;
        let outcome = if report.passed { "ok" } else { "FAILED" };
        println!("{:>7.1} s  {outcome:<6}  {}", report.took.as_secs_f64(), report.name);
    }
    println!("\n{} passed, {} failed", total.passed, total.failed);
    total.failed == 0 && reports.iter().all(|report| report.passed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn counts_are_read_from_both_streams() {
        let script = "echo 'test result: ok. 2 passed; 0 failed; 0 ignored'; \
                      echo 'test result: FAILED. 3 passed; 1 failed; 0 ignored' >&2; exit 1";
        assert_eq!(execute(shell(script), count::cargo_test), (false, Count { passed: 5, failed: 1 }));
    }

    #[test]
    fn a_step_that_fails_without_a_test_counts_as_one_failure() {
        let report = step("a step", || execute(shell("exit 3"), count::nextest));
        assert!(!report.passed);
        assert_eq!(report.count, Count { passed: 0, failed: 1 });
        assert!(!summarize(&[report]));
    }

    #[test]
    fn what_cannot_be_started_fails() {
        assert_eq!(
            execute(Command::new("a program that does not exist"), count::nextest),
            (false, Count::default())
        );
    }

    #[test]
    fn all_passed_is_a_pass() {
        assert!(summarize(&[step("a step", || execute(shell("exit 0"), count::nextest))]));
    }
}
