//! Where results go that were asked for as JSON.

use std::convert::Infallible;
use std::path::PathBuf;
use std::str::FromStr;

/// The value of `--json[=FILE]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Target {
    /// `--json` or `--json=-`.
    Stdout,
    /// `--json=FILE`.
    File(PathBuf),
}

impl FromStr for Target {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(if text == "-" { Self::Stdout } else { Self::File(PathBuf::from(text)) })
    }
}
