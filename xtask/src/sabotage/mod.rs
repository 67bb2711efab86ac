//! `cargo xtask sabotage [FILTER]`: breaks one line at a time and looks whether the test that should notice does.
//!
//! The work is done in a copy of the repository below `target/sabotage`, with uncommitted changes and with build folders
//! of its own, so that only what a patch touches is built again. A patch passes if its test, green without it, is red
//! with it: it fails, or is still running after [`TIME_LIMIT`].

mod copy;
mod patches;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Instant;

use self::copy::update_copy;
use self::patches::PATCHES;

/// How long a test may take, in seconds. Some patches make theirs wait for ever.
const TIME_LIMIT: &str = "60";
/// What `timeout` of the coreutils exits with if it had to end the program.
const TIMED_OUT: i32 = 124;

/// One line that is made wrong, and the test that must notice.
#[derive(Debug)]
struct Patch {
    /// What is broken.
    name: &'static str,
    /// Relative to the root.
    file: &'static str,
    /// The line without its indentation; no other line of the file is equal.
    line: &'static str,
    /// What stands there instead.
    instead: &'static str,
    test: Test,
}

/// Which test.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Test {
    package: &'static str,
    target: Target,
    /// As the harness calls it, modules included.
    name: &'static str,
}

/// Where it is.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Target {
    /// Among the unit tests.
    Lib,
    /// In this integration test.
    Integration(&'static str),
    /// Among the loom models.
    Loom,
}

/// What became of a test.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Outcome {
    Green,
    /// Green with a patch: nobody notices it.
    StayedGreen,
    Red,
    RedByTime,
    /// No test of that name was run.
    Missing,
    /// The patch, or the test, does not build.
    DoesNotBuild,
}

/// Tries the patches whose name, file or test contains `filter`; true if each turned its test red.
pub(crate) fn run(root: &Path, filter: Option<&str>) -> bool {
    let is_wanted = |patch: &&Patch| {
        filter.is_none_or(|filter| {
            [patch.name, patch.file, patch.test.name].iter().any(|text| text.contains(filter))
        })
    };
    let wanted: Vec<&Patch> = PATCHES.iter().filter(is_wanted).collect();
    let folder = root.join("target/sabotage");
    let tree = folder.join("tree");
    if let Err(message) = update_copy(root, &tree) {
        println!("{message}");
        return false;
    }
    let mut tests: Vec<Test> = Vec::new();
    for patch in &wanted {
        if !tests.contains(&patch.test) {
            tests.push(patch.test);
        }
    }
    let bench = Bench { tree, folder };
    let is_green =
        |test: &&Test| tell(test, "without a patch", || bench.execute(**test)) == Some(Outcome::Green);
    if tests.iter().filter(is_green).count() < tests.len() {
        println!("\nwhat is not green without a patch says nothing");
        return false;
    }
    println!();
    let is_red = |patch: &&&Patch| {
        let outcome = tell(&patch.test, patch.name, || bench.execute_with(patch));
        matches!(outcome, Some(Outcome::Red | Outcome::RedByTime))
    };
    let red = wanted.iter().filter(is_red).count();
    println!("\n{} patches, {red} noticed, {} not", wanted.len(), wanted.len() - red);
    red == wanted.len() && red > 0
}

/// Runs `work` and prints a line about it.
fn tell(test: &Test, title: &str, work: impl FnOnce() -> Result<Outcome, String>) -> Option<Outcome> {
    let begin = Instant::now();
    let result = work();
    let words = match &result {
        Ok(outcome) => outcome.words(),
        Err(message) => message,
    };
    println!("{:>4.0} s  {words:<14}  {title}", begin.elapsed().as_secs_f64());
    println!("{:24}{} {}", "", test.package, test.name);
    result.ok()
}

/// Where patches are tried.
struct Bench {
    tree: PathBuf,
    folder: PathBuf,
}

impl Bench {
    /// What becomes of the test of `patch` with it; the tree is as it was afterwards.
    fn execute_with(&self, patch: &Patch) -> Result<Outcome, String> {
        let file = self.tree.join(patch.file);
        let failed = |error: std::io::Error| format!("{}: {error}", patch.file);
        let text = fs::read_to_string(&file).map_err(failed)?;
        fs::write(&file, apply(patch, &text)?).map_err(failed)?;
        let outcome = self.execute(patch.test);
        fs::write(&file, text).map_err(failed)?;
        outcome.map(|outcome| if outcome == Outcome::Green { Outcome::StayedGreen } else { outcome })
    }

    /// Builds and runs `test`.
    fn execute(&self, test: Test) -> Result<Outcome, String> {
        let mut build = Command::new("cargo");
        if !output(self.arrange(&mut build, test).arg("--no-run"))?.status.success() {
            return Ok(Outcome::DoesNotBuild);
        }
        let mut run = Command::new("timeout");
        run.args(["--kill-after=5", TIME_LIMIT, "cargo"]);
        let output = output(self.arrange(&mut run, test).args(["--", "--exact", test.name]))?;
        Ok(outcome(output.status.code(), &String::from_utf8_lossy(&output.stdout)))
    }

    /// Gives `cargo` the arguments, variables and place that it needs for `test`.
    fn arrange<'c>(&self, command: &'c mut Command, test: Test) -> &'c mut Command {
        command.current_dir(&self.tree).args(["test", "--offline", "--package", test.package]);
        // What a surrounding cargo set is about another build.
        command.env_remove("RUSTFLAGS").env_remove("CARGO_TARGET_DIR");
        let folder = if test.target == Target::Loom { "loom" } else { "build" };
        command.arg("--target-dir").arg(self.folder.join(folder));
        match test.target {
            Target::Lib => command.arg("--lib"),
            Target::Integration(name) => command.args(["--test", name]),
            Target::Loom => command.env("RUSTFLAGS", "--cfg loom").env("LOOM_MAX_PREEMPTIONS", "2").args([
                "--release",
                "--test",
                "loom",
            ]),
        }
    }
}

impl Outcome {
    const fn words(self) -> &'static str {
        match self {
            Self::Green => "green",
            Self::StayedGreen => "STAYED GREEN",
            Self::Red => "red",
            Self::RedByTime => "red, by time",
            Self::Missing => "NO SUCH TEST",
            Self::DoesNotBuild => "DOES NOT BUILD",
        }
    }
}

/// `text` with the line replaced; the error says that it is not there, or more than once.
fn apply(patch: &Patch, text: &str) -> Result<String, String> {
    let found = text.lines().filter(|line| line.trim() == patch.line).count();
    if found != 1 {
        return Err(format!("{}: {found} lines are `{}`, expected 1", patch.file, patch.line));
    }
    let lines = text.lines().map(|line| match line.trim() == patch.line {
        true => format!("{}{}\n", &line[..line.len() - line.trim_start().len()], patch.instead),
        false => format!("{line}\n"),
    });
    Ok(lines.collect())
}

fn output(command: &mut Command) -> Result<Output, String> {
    command.output().map_err(|error| format!("{:?} could not be started: {error}", command.get_program()))
}

/// What the end of a harness and its words mean. A crash ends without words, after its test was begun.
fn outcome(code: Option<i32>, words: &str) -> Outcome {
    let has_run = words.contains("running 1 test");
    match code {
        _ if !has_run => Outcome::Missing,
        Some(0) => Outcome::Green,
        Some(TIMED_OUT) => Outcome::RedByTime,
        _ => Outcome::Red,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATCH: Patch = Patch {
        name: "a",
        file: "a.rs",
        line: "b();",
        instead: "c();",
        test: Test { package: "p", target: Target::Lib, name: "t" },
    };

    #[test]
    fn every_patch_still_applies_and_its_test_exists() {
        let root = crate::root();
        for patch in PATCHES {
            let text = fs::read_to_string(root.join(patch.file)).unwrap();
            assert_ne!(apply(patch, &text).unwrap(), text, "{}: it changes nothing", patch.name);
            let folder = match patch.test.package {
                "unisono" => "crates/comm".to_owned(),
                package => package.replace("unisono-", "crates/"),
            };
            let name = patch.test.name.rsplit("::").next().unwrap();
            let holds_it =
                |file: &PathBuf| fs::read_to_string(file).unwrap().contains(&format!("fn {name}("));
            let files = copy::files(&root, &[folder.as_str()]).unwrap();
            let mut sources = files
                .iter()
                .map(|file| root.join(file))
                .filter(|file| file.extension().is_some_and(|ending| ending == "rs"));
            assert!(sources.any(|file| holds_it(&file)), "{}: no test {name} in {folder}", patch.name);
        }
    }

    #[test]
    fn a_line_is_replaced_where_it_is_and_only_if_there_is_one() {
        assert_eq!(apply(&PATCH, "a();\n    b();\n").unwrap(), "a();\n    c();\n");
        assert_eq!(apply(&PATCH, "a();\n").unwrap_err(), "a.rs: 0 lines are `b();`, expected 1");
        assert_eq!(apply(&PATCH, "b();\n  b();\n").unwrap_err(), "a.rs: 2 lines are `b();`, expected 1");
    }

    #[test]
    fn only_a_test_that_ran_has_a_colour() {
        assert_eq!(outcome(Some(0), "running 1 test\ntest a ... ok\n"), Outcome::Green);
        assert_eq!(outcome(Some(101), "running 1 test\ntest a ... FAILED\n"), Outcome::Red);
        assert_eq!(outcome(None, "running 1 test\n"), Outcome::Red);
        assert_eq!(outcome(Some(TIMED_OUT), "running 1 test\n"), Outcome::RedByTime);
        assert_eq!(outcome(Some(0), "running 0 tests\n"), Outcome::Missing);
        assert_eq!(outcome(Some(101), ""), Outcome::Missing);
    }
}
