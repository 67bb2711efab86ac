//! `unisono doctor`: tries what a job needs of this machine, and says what it found and what mends it.
//!
//! Each check is a function that tries the real thing where that is possible (makes memory, sleeps on a word, opens a
//! socket) and answers with a [`Finding`]; none changes anything. At the end two ranks really meet and reduce. Exit
//! code 1 if anything is [`Verdict::Fail`]; warnings are no failure.

use std::io::Write as _;

use anstyle::AnsiColor;
use clap::Args;
use serde::Serialize;

use crate::output::{Target, heading, wrap};
use crate::{Common, Failure};

mod environment;
mod gpus;
mod kernel;
mod limits;
mod machine;
mod self_test;

/// Exit code when something is wrong.
const EXIT_WRONG: u8 = 1;

/// The arguments of `unisono doctor`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit code: 0 if all is well or only warned about, 1 if something must be mended before a job can run."
)]
pub(crate) struct Arguments {
    /// List the UNISONO_* settings, with their values here and their defaults
    #[arg(long)]
    env: bool,
    /// Be a rank of the self-test: how the command calls itself
    #[arg(long, hide = true)]
    as_rank: bool,
    /// Hold an open file until standard input ends: how the command calls itself
    #[arg(long, hide = true)]
    as_holder: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

/// What one check found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    found: String,
    /// What to do about it: a command where there is one.
    mend: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Ok, found: found.into(), mend: None }
    }

    fn warn(check: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Warn, found: found.into(), mend: Some(mend.into()) }
    }

    fn fail(check: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Fail, found: found.into(), mend: Some(mend.into()) }
    }

    /// As people read it: a line, and more where it does not fit or something is to be done.
    fn lines(&self) -> Vec<String> {
        const INDENT: usize = 24;
        let (word, style) = match self.verdict {
            Verdict::Ok => ("ok", AnsiColor::Green.on_default()),
            Verdict::Warn => ("warn", AnsiColor::Yellow.on_default().bold()),
            Verdict::Fail => ("FAIL", AnsiColor::Red.on_default().bold()),
        };
        let mut lines = Vec::new();
        for text in self.found.lines() {
            lines.extend(wrap(text, 119 - INDENT));
        }
        if let Some(mend) = &self.mend {
            lines.extend(wrap(&format!("→ {mend}"), 119 - INDENT));
        }
        let first = format!("{style}{word:<4}{style:#}  {:<18}", self.check);
        let beginnings = std::iter::once(first).chain(std::iter::repeat(" ".repeat(INDENT)));
        beginnings.zip(lines).map(|(beginning, line)| beginning + &line).collect()
    }
}

/// Checks everything and answers the exit code.
pub(crate) fn execute(arguments: &Arguments, common: &Common) -> Result<u8, Failure> {
    if arguments.as_rank {
        return self_test::rank().map(|()| 0).map_err(Failure::new);
    }
    if arguments.as_holder {
        return kernel::hold();
    }
    if arguments.env {
        return environment::list(common);
    }
    let mut report = Report::new(common);
    report.print(&heading());
    let checks: [fn() -> Vec<Finding>; 6] =
        [machine::check, kernel::check, limits::check, gpus::check, environment::check, self_test::check];
    for check in checks {
        for finding in check() {
            report.add(finding);
        }
    }
    report.conclude(common)
}

struct Report {
    /// Whether only what is wrong is printed, or nothing.
    least: Option<Verdict>,
    findings: Vec<Finding>,
}

#[derive(Serialize)]
struct Document<'a> {
    version: &'static str,
    verdict: Verdict,
    findings: &'a [Finding],
}

impl Report {
    fn new(common: &Common) -> Self {
        let least = match (&common.json, common.quiet) {
            // With JSON on standard output, text would spoil it.
            (Some(Target::Stdout), _) => None,
            (_, true) => Some(Verdict::Fail),
            _ => Some(Verdict::Ok),
        };
        Self { least, findings: Vec::new() }
    }

    fn print(&self, line: &str) {
        if self.least == Some(Verdict::Ok) {
            // Whoever closed our output does not want the rest.
            let _ = writeln!(anstream::stdout(), "{line}");
        }
    }

    fn add(&mut self, finding: Finding) {
        if self.least.is_some_and(|least| finding.verdict >= least) {
            for line in finding.lines() {
                let _ = writeln!(anstream::stdout(), "{line}");
            }
        }
        self.findings.push(finding);
    }

    fn conclude(&self, common: &Common) -> Result<u8, Failure> {
        let count = |verdict| self.findings.iter().filter(|finding| finding.verdict == verdict).count();
        let (warnings, failures) = (count(Verdict::Warn), count(Verdict::Fail));
        let warned = format!("{warnings} warning{}", if warnings == 1 { "" } else { "s" });
        self.print(&match failures {
            0 => format!("\nJobs can run here; {warned}."),
            _ => format!("\n{failures} of {} checks failed; {warned}.", self.findings.len()),
        });
        let verdict = self.findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok);
        if let Some(target) = &common.json {
            let version = env!("CARGO_PKG_VERSION");
            target.write(&Document { version, verdict, findings: &self.findings })?;
        }
        Ok(if failures > 0 { EXIT_WRONG } else { 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_a_line_of_its_own_and_what_to_do_stands_below() {
        let plain = |finding: &Finding| -> Vec<String> {
            finding.lines().iter().map(|line| anstream::adapter::strip_str(line).to_string()).collect()
        };
        assert_eq!(plain(&Finding::ok("futex", "sleeps")), ["ok    futex             sleeps"]);
        let long = Finding::warn("open files", "word ".repeat(40), "ulimit -n 65536");
        let lines = plain(&long);
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[3], format!("{:24}→ ulimit -n 65536", ""));
        assert!(lines.iter().all(|line| line.chars().count() <= 120));
    }
}
