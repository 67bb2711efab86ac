//! The `UNISONO_*` variables here: names that nobody knows, values that cannot be read, and the table of all.

use std::collections::BTreeMap;
use std::io::Write as _;

use anstyle::Style;
use serde::Serialize;
use unisono::settings::{self, SETTINGS, Setting, Settings};

use super::{EXIT_WRONG, Finding};
use crate::output::{Target, wrap};
use crate::{Common, Failure};

type Variables = BTreeMap<String, String>;

pub(super) fn check() -> Vec<Finding> {
    judge(&ours())
}

/// The variables of this process that begin like ours and are not empty.
fn ours() -> Variables {
    let pairs = std::env::vars_os();
    let ours = pairs
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned())));
    ours.filter(|(name, value)| name.starts_with("UNISONO_") && !value.trim().is_empty()).collect()
}

fn judge(variables: &Variables) -> Vec<Finding> {
    const CHECK: &str = "settings";
    let mut findings = Vec::new();
    for (name, nearest) in settings::unknown_names(variables.keys().map(String::as_str)) {
        let mend = match nearest {
            Some(nearest) => format!("unset {name}; did you mean {nearest}? unisono doctor --env lists all"),
            None => format!("unset {name}; unisono doctor --env lists all"),
        };
        findings.push(Finding::warn(
            CHECK,
            format!("{name} is no setting of unisono and does nothing"),
            mend,
        ));
    }
    let known: Vec<&Setting> = SETTINGS.iter().filter(|row| variables.contains_key(row.name)).collect();
    for row in &known {
        if let Err(error) = read(row, &variables[row.name]) {
            findings.push(Finding::fail(
                CHECK,
                error,
                format!("unset {}, or give it such a value", row.name),
            ));
        }
    }
    if findings.is_empty() {
        let set: Vec<String> =
            known.iter().map(|row| format!("{}={}", row.name, variables[row.name])).collect();
        let found = if set.is_empty() { "none is set; the defaults hold".to_owned() } else { set.join(" ") };
        findings.push(Finding::ok(CHECK, found));
    }
    findings
}

/// Reads one setting as a job would.
fn read(row: &Setting, value: &str) -> Result<(), String> {
    let lookup = |name: &str| (name == row.name).then(|| value.to_owned());
    let settings = Settings::from_lookup(&lookup).map_err(|error| error.to_string())?;
    let tuning = settings.tune_file.as_deref().map(unisono::tuning::load).transpose();
    tuning.map(|_| ()).map_err(|error| error.to_string())
}

#[derive(Serialize)]
struct Row<'a> {
    name: &'static str,
    /// `None` where it is not set.
    value: Option<&'a str>,
    default: &'static str,
    expected: &'static str,
    meaning: &'static str,
    same_on_all_ranks: bool,
    /// Why the value cannot be read.
    problem: Option<String>,
}

/// Prints the table and answers the exit code.
pub(super) fn list(common: &Common) -> Result<u8, Failure> {
    let variables = ours();
    let row = |row: &'static Setting| {
        let value = variables.get(row.name).map(String::as_str);
        Row {
            name: row.name,
            value,
            default: row.default,
            expected: row.kind.expected(),
            meaning: row.meaning,
            same_on_all_ranks: row.agreed,
            problem: value.and_then(|value| read(row, value).err()),
        }
    };
    // Those that launchers set for their children are shown only where they are set.
    let shown = SETTINGS.iter().filter(|row| !row.internal || variables.contains_key(row.name));
    let rows: Vec<Row<'_>> = shown.map(row).collect();
    if !common.quiet && common.json != Some(Target::Stdout) {
        for line in rows.iter().flat_map(Row::lines) {
            // Whoever closed our output does not want the rest.
            let _ = writeln!(anstream::stdout(), "{line}");
        }
    }
    if let Some(target) = &common.json {
        target.write(&rows)?;
    }
    Ok(if rows.iter().any(|row| row.problem.is_some()) { EXIT_WRONG } else { 0 })
}

impl Row<'_> {
    fn lines(&self) -> Vec<String> {
        let bold = Style::new().bold();
        let default = if self.default.is_empty() { "–" } else { self.default };
        let first = match self.value {
            Some(value) => format!("{bold}{:<22} {value}{bold:#}   (default {default})", self.name),
            None => format!("{:<22} {default}", self.name),
        };
        let agreed = if self.same_on_all_ranks { " The same on all ranks." } else { "" };
        let mut lines = vec![first];
        let text = format!("{}{agreed} Values: {}.", self.meaning, self.expected);
        let problem = self.problem.iter().flat_map(|problem| wrap(&format!("FAIL  {problem}"), 96));
        lines.extend(wrap(&text, 96).into_iter().chain(problem).map(|line| format!("{:23}{line}", "")));
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict::{Fail, Ok, Warn};
    use super::*;

    fn findings(pairs: &[(&str, &str)]) -> Vec<Finding> {
        judge(&pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn unknown_names_warn_and_bad_values_fail() {
        let found =
            findings(&[("UNISONO_TIMOUT", "3s"), ("UNISONO_TIMEOUT", "soon"), ("UNISONO_SPIN", "1us")]);
        assert_eq!(found.iter().map(|finding| finding.verdict).collect::<Vec<_>>(), [Warn, Fail]);
        assert!(found[0].mend.as_ref().unwrap().contains("did you mean UNISONO_TIMEOUT?"));
        assert!(found[1].found.starts_with("UNISONO_TIMEOUT=soon cannot be read: expected"), "{found:?}");
    }

    #[test]
    fn good_values_are_listed() {
        let found = findings(&[("UNISONO_SPIN", "1us"), ("UNISONO_ORDER", "rank")]);
        assert_eq!((found.len(), found[0].verdict), (1, Ok));
        assert_eq!(found[0].found, "UNISONO_ORDER=rank UNISONO_SPIN=1us");
    }
}
