//! `cargo xtask faults [--scale N] [FILTER]`: a campaign of the fault tests, in release, N times as long as in the suite: first
//! survivors' agreements, simulated, then processes that are killed, stopped, late and so on.
//!
//! The counts and times that it prints go into docs/src/reliability.md.

use std::path::Path;
use std::process::Command;

/// How long a campaign is if nothing is said: minutes.
const DEFAULT_SCALE: &str = "10";

/// What is to be run.
#[derive(Debug, PartialEq)]
pub(crate) struct Campaign<'a> {
    scale: &'a str,
    filter: Option<&'a str>,
}

impl<'a> Campaign<'a> {
    /// `None` if `words`, those behind `faults`, say something else.
    pub(crate) fn parse(words: &[&'a str]) -> Option<Self> {
        let (scale, rest) = match words {
            ["--scale", scale, rest @ ..] => (*scale, rest),
            rest => (DEFAULT_SCALE, rest),
        };
        let is_count = scale.parse::<usize>().is_ok_and(|scale| scale > 0);
        let filter = match rest {
            [] => None,
            [filter] if !filter.starts_with('-') => Some(*filter),
            _ => return None,
        };
        is_count.then_some(Self { scale, filter })
    }

    /// True if all tests passed. One that fails does not keep the others from running.
    pub(crate) fn run(&self, root: &Path) -> bool {
        let filter: Vec<&str> = self.filter.into_iter().collect();
        let simulated = ["-p", "unisono-core", "--lib", "--", "--nocapture", "agreement::simulation"];
        let processes = [&["-p", "unisono", "--test", "faults_processes", "--"][..], &filter].concat();
        // What is simulated is a part of what the tests called `shrink::` do.
        let with_simulation = self.filter.is_none_or(|filter| filter.starts_with("shrink"));
        let agreed = !with_simulation || self.test(root, &simulated);
        self.test(root, &processes) && agreed
    }

    fn test(&self, root: &Path, arguments: &[&str]) -> bool {
        let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(program);
        command.current_dir(root).env("UNISONO_TEST_SCALE", self.scale).args(["test", "--release"]);
        command.args(arguments);
        println!("UNISONO_TEST_SCALE={} {command:?}", self.scale);
        match command.status() {
            Ok(status) => status.success(),
            Err(error) => {
                println!("it could not be started: {error}");
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_and_a_filter_are_read_and_nothing_else() {
        assert_eq!(Campaign::parse(&[]), Some(Campaign { scale: "10", filter: None }));
        assert_eq!(Campaign::parse(&["--scale", "3"]), Some(Campaign { scale: "3", filter: None }));
        let expected = Some(Campaign { scale: "3", filter: Some("kill::") });
        assert_eq!(Campaign::parse(&["--scale", "3", "kill::"]), expected);
        for wrong in [&["--scale"][..], &["--scale", "0"], &["--scale", "x"], &["--fast"], &["a", "b"]] {
            assert_eq!(Campaign::parse(wrong), None, "{wrong:?}");
        }
    }
}
