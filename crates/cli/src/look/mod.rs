//! Looking at running jobs from outside: `unisono top`, `dump` and `why`.
//!
//! Nothing of a job has to answer: the memory of its ranks is found through `/proc` and read. Which jobs are meant is said
//! by their names or by processes; without either, all of this user that still do something.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use anstyle::Style;
use clap::Args;
use unisono::recorder::{self, Found, Recording, Snapshot};

use crate::Failure;

pub(crate) mod dump;
pub(crate) mod state;
pub(crate) mod top;
mod trace;
pub(crate) mod why;

/// Exit code when there is no job to look at.
const EXIT_NO_JOB: u8 = 1;
/// What tables and paragraphs are at most as wide as.
const MAX_COLUMNS: usize = 100;
const BOLD: Style = Style::new().bold();

/// Which jobs to look at.
#[derive(Clone, Debug, Args)]
pub(crate) struct Selection {
    /// Jobs by name, or processes: a rank, or whatever started it; all jobs of this user if none is named
    #[arg(value_name = "PID|JOB")]
    which: Vec<String>,
}

/// A communicator as it was at one moment.
struct Seen {
    snapshot: Snapshot,
    /// After the first of those that were looked at together.
    taken: Duration,
}

impl Selection {
    /// Looks at all communicators of the selected jobs, oldest first.
    fn look(&self) -> Result<Vec<Seen>, Failure> {
        let found = self.find()?;
        for sentence in &found.foreign {
            tracing::warn!("a communicator is left out: {sentence}");
        }
        let start = Instant::now();
        let mut seen = Vec::new();
        for recording in found.recordings.iter().filter(|recording| self.names(recording)) {
            let snapshot = recording.snapshot();
            // GPUs took their time to answer.
            let taken = start.elapsed();
            match snapshot {
                // What has ended is of interest only to who asks for it.
                Ok(snapshot) if self.which.is_empty() && !snapshot.is_live() => {}
                Ok(snapshot) => seen.push(Seen { snapshot, taken }),
                Err(error) => tracing::warn!("a communicator of {} is left out: {error}", recording.job()),
            }
        }
        if seen.is_empty() { Err(self.nothing(&found)) } else { Ok(seen) }
    }

    fn find(&self) -> Result<Found, Failure> {
        let failed = |error: unisono::Error| Failure::new(error.to_string());
        let pids: Vec<u32> = self.which.iter().filter_map(|word| word.parse().ok()).collect();
        if pids.is_empty() || pids.len() < self.which.len() {
            return recorder::find(None).map_err(failed);
        }
        let family: Vec<u32> = pids.into_iter().flat_map(recorder::family).collect();
        recorder::find(Some(&family)).map_err(failed)
    }

    fn names(&self, recording: &Recording) -> bool {
        let is_it = |word: &String| match word.parse::<u32>() {
            Ok(pid) => recorder::family(pid).iter().any(|pid| recording.pids().contains(pid)),
            Err(_) => recording.job() == word,
        };
        self.which.is_empty() || self.which.iter().any(is_it)
    }

    /// Why there is nothing to see.
    fn nothing(&self, found: &Found) -> Failure {
        let denied = match found.denied.as_slice() {
            [] => String::new(),
            [pid] => {
                format!(" The system does not let us look at process {pid}: ask as its user, or as root.")
            }
            pids => format!(
                " The system does not let us look at {} processes, {} among them: ask as their user, or as root.",
                pids.len(),
                pids[0]
            ),
        };
        let message = match self.which.as_slice() {
            [] => "no job of this user runs here that has made a communicator.".to_owned(),
            [one] if one.parse::<u32>().is_ok_and(|pid| !exists(pid)) => {
                format!("there is no process {one}.")
            }
            [one] if one.parse::<u32>().is_ok() => format!("process {one} has no communicator."),
            which => format!("nothing here is called {}; `unisono top` lists all jobs.", which.join(" or ")),
        };
        Failure { message: message + &denied, exit_code: EXIT_NO_JOB }
    }
}

fn exists(pid: u32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}

/// `run-0123 · 4 ranks on gpu07 · up 12 s`.
fn heading(snapshot: &Snapshot) -> String {
    let noun = if snapshot.ranks.len() == 1 { "rank" } else { "ranks" };
    let start =
        if snapshot.generation > 0 { format!(" · start {}", snapshot.generation) } else { String::new() };
    let age = recorder::time_phrase(snapshot.age);
    format!(
        "{BOLD}{}{BOLD:#}{start} · {} {noun} on {} · up {age}",
        snapshot.job,
        snapshot.ranks.len(),
        snapshot.host
    )
}

/// Prints lines to standard output. Whoever closed it does not want the rest.
fn print(text: &str) {
    let _ = writeln!(anstream::stdout().lock(), "{text}");
}

/// Columns and rows of the terminal that we write to, if it is one.
fn terminal() -> Option<(usize, usize)> {
    if !std::io::stdout().is_terminal() {
        return None;
    }
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
    // Some terminals do not know their size.
    let or = |value: u16, other: usize| if value == 0 { other } else { usize::from(value) };
    Some((or(size.ws_col, 80), or(size.ws_row, 24)))
}

/// Breaks a paragraph into lines of at most `columns` letters.
fn wrap(text: &str, columns: usize) -> String {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let last = lines.len() - 1;
        let length = lines[last].chars().count();
        if length > 0 && length + 1 + word.chars().count() > columns {
            lines.push(word.to_owned());
        } else {
            if length > 0 {
                lines[last].push(' ');
            }
            lines[last] += word;
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_are_broken_between_words() {
        assert_eq!(wrap("Rank 0 waits for rank 1.", 10), "Rank 0\nwaits for\nrank 1.");
        assert_eq!(wrap("extraordinarily long", 5), "extraordinarily\nlong");
        assert_eq!(wrap("short", 80), "short");
    }
}
