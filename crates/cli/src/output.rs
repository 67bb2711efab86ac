//! Where results go that were asked for as JSON.

use std::convert::Infallible;
use std::io::Write as _;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Serialize;

use crate::Failure;

/// The value of `--json[=FILE]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Target {
    /// `--json` or `--json=-`.
    Stdout,
    /// `--json=FILE`.
    File(PathBuf),
}

impl Target {
    /// Writes `value` there, as indented JSON.
    pub(crate) fn write(&self, value: &impl Serialize) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(value)
            .map_err(|error| Failure::new(format!("the result cannot be written as JSON: {error}")))?;
        let written = match self {
            Self::Stdout => writeln!(std::io::stdout().lock(), "{text}"),
            Self::File(path) => std::fs::write(path, text + "\n"),
        };
        written.map_err(|error| match self {
            Self::Stdout => Failure::new(format!("the result cannot be written to standard output: {error}")),
            Self::File(path) => {
                Failure::new(format!("the result cannot be written to {}: {error}", path.display()))
            }
        })
    }
}

impl FromStr for Target {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(if text == "-" { Self::Stdout } else { Self::File(PathBuf::from(text)) })
    }
}
