//! What several commands do with their results: JSON to where it was asked for, and lines that fit a terminal.

use std::convert::Infallible;
use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::Failure;

/// The value of `--json[=FILE]`, and of others that write.
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
        self.write_text(&(text + "\n"))
    }

    /// Writes `text` there.
    pub(crate) fn write_text(&self, text: &str) -> Result<(), Failure> {
        let written = match self {
            Self::Stdout => std::io::stdout().lock().write_all(text.as_bytes()),
            Self::File(path) => std::fs::write(path, text),
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

/// A bar on standard error that counts sizes; hidden where nobody looks.
pub(crate) fn progress_bar(sizes: u64, quiet: bool) -> ProgressBar {
    if quiet || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(sizes);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} sizes · {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// Cuts `text` at spaces into lines of at most `width` characters; a longer word has a line of its own.
pub(crate) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut used = 0;
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if used > 0 && used + 1 + length > width {
            lines.push(String::new());
            used = 0;
        }
        if let Some(line) = lines.last_mut() {
            let space = if used > 0 { " " } else { "" };
            *line += space;
            *line += word;
            used += space.len() + length;
        }
    }
    lines
}

/// The first line of what describes this machine.
pub(crate) fn heading() -> String {
    let bold = anstyle::Style::new().bold();
    let system = rustix::system::uname();
    let (name, release) = (system.nodename().to_string_lossy(), system.release().to_string_lossy());
    format!("{bold}unisono {} · {name} · Linux {release}{bold:#}", env!("CARGO_PKG_VERSION"))
}

/// `1.5 GiB`, for people.
pub(crate) fn bytes(bytes: u64) -> String {
    let (value, unit) = match bytes {
        0..0x400 => return format!("{bytes} B"),
        0x400..0x10_0000 => (bytes as f64 / 1024.0, "KiB"),
        0x10_0000..0x4000_0000 => (bytes as f64 / 1_048_576.0, "MiB"),
        _ => (bytes as f64 / 1_073_741_824.0, "GiB"),
    };
    let text = format!("{value:.1}");
    format!("{} {unit}", text.strip_suffix(".0").unwrap_or(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_at_spaces() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("a longer-than-that b", 5), ["a", "longer-than-that", "b"]);
        assert_eq!(wrap("", 5), [""]);
    }

    #[test]
    fn sizes_are_short() {
        assert_eq!([12, 1536, 64 << 20, 3 << 29].map(bytes), ["12 B", "1.5 KiB", "64 MiB", "1.5 GiB"]);
    }
}
