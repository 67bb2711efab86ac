//! `unisono top`: what every rank of every job is doing, as a table that is renewed each second.

use std::io::Write as _;
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use clap::Args;
use serde::Serialize;
use unisono::recorder::{Snapshot, ranks_phrase, time_phrase};

use super::state::{Head, RankState};
use super::{BOLD, Seen, Selection, heading, print, terminal};
use crate::{Common, Failure};

/// From one table to the next.
const EVERY: Duration = Duration::from_secs(1);

/// The arguments of `unisono top`.
#[derive(Debug, Args)]
#[command(
    after_help = "States: running (makes calls), computing (outside of calls for a second or more), waiting (for the ranks \
                  named), stopped (by a signal), dead, failed, left, starting. calls/s and GB/s are over the last second; bytes are those of \
                  the call. On a terminal the table is renewed each second until Ctrl-C.\n\n\
                  Exit code: 0, 1 if there is no job to look at."
)]
pub(crate) struct Arguments {
    #[command(flatten)]
    selection: Selection,
    /// Print one table and end, as is done where the output is no terminal
    #[arg(long)]
    once: bool,
}

#[derive(Debug, Serialize)]
struct Job<'s> {
    #[serde(flatten)]
    head: Head<'s>,
    age_seconds: f64,
    ranks: Vec<RankState>,
}

impl<'s> Job<'s> {
    fn new(snapshot: &'s Snapshot) -> Self {
        Self {
            head: Head::new(snapshot),
            age_seconds: snapshot.age.as_secs_f64(),
            ranks: RankState::all(snapshot),
        }
    }
}

/// Shows the table, and answers the exit code.
pub(crate) fn execute(arguments: &Arguments, common: &Common) -> Result<u8, Failure> {
    let seen = arguments.selection.look()?;
    if let Some(target) = &common.json {
        let jobs: Vec<Job<'_>> = seen.iter().map(|seen| Job::new(&seen.snapshot)).collect();
        target.write(&jobs)?;
        return Ok(0);
    }
    let (Some(_), false) = (terminal(), arguments.once) else {
        print(&tables(&seen).join("\n"));
        return Ok(0);
    };
    live(&arguments.selection, seen);
    Ok(0)
}

/// Renews the table until the jobs are gone, or we are.
fn live(selection: &Selection, mut seen: Vec<Seen>) {
    let mut shown = 0;
    loop {
        let size = terminal().unwrap_or((80, 24));
        let lines = fit(tables(&seen), size);
        let mut output = anstream::stdout().lock();
        // Back to where the last table began, and away with it.
        let back = if shown > 0 { format!("\x1b[{shown}F\x1b[J") } else { String::new() };
        if writeln!(output, "{back}{}", lines.join("\n")).and_then(|()| output.flush()).is_err() {
            return;
        }
        drop(output);
        shown = lines.iter().map(|line| height(line, size.0)).sum();
        std::thread::sleep(EVERY);
        match selection.look() {
            Ok(again) => seen = again,
            Err(_) => return print("No job is left."),
        }
    }
}

/// As many lines as the terminal has room for, with a word about those left out.
fn fit(lines: Vec<String>, (columns, rows): (usize, usize)) -> Vec<String> {
    let mut room = rows.saturating_sub(2);
    let is_in = |line: &&String| {
        let height = height(line, columns);
        let fits = height <= room;
        room = room.saturating_sub(height);
        fits
    };
    let mut shown: Vec<String> = lines.iter().take_while(is_in).cloned().collect();
    if shown.len() < lines.len() {
        shown.push(format!("… {} more lines; --once shows all", lines.len() - shown.len()));
    }
    shown
}

/// The rows that a line takes.
fn height(line: &str, columns: usize) -> usize {
    let letters = anstream::adapter::strip_str(line).to_string().chars().count();
    letters.div_ceil(columns).max(1)
}

fn tables(seen: &[Seen]) -> Vec<String> {
    let mut lines = Vec::new();
    for Seen { snapshot, .. } in seen {
        if !lines.is_empty() {
            lines.push(String::new());
        }
        lines.push(heading(snapshot));
        if let Some(failure) = &snapshot.failure {
            lines.push(format!("failed: {}", cut(&failure.sentence, 110)));
        }
        lines.push(columns());
        lines.extend(RankState::all(snapshot).iter().map(row));
    }
    lines
}

fn columns() -> String {
    format!(
        "{BOLD}{:>4} {:<12} {:>8} {:<10} {:<16} {:>10} {:>9} {:>9} {:>7}  {:<14} {:>8}{BOLD:#}",
        "rank",
        "host",
        "pid",
        "state",
        "operation",
        "number",
        "bytes",
        "calls/s",
        "GB/s",
        "waits for",
        "since"
    )
}

fn row(rank: &RankState) -> String {
    let style = match rank.state {
        "stopped" | "dead" | "failed" => AnsiColor::Red.on_default().bold(),
        "waiting" => AnsiColor::Yellow.on_default(),
        _ => Style::new(),
    };
    let call = rank.call.as_ref();
    let waits_for = match rank.waits_for.as_slice() {
        [] => "–".to_owned(),
        ranks => ranks_phrase(ranks)
            .trim_start_matches("ranks ")
            .trim_start_matches("rank ")
            .replace(" and ", ", "),
    };
    let rate =
        |value: f64, digits: usize| if value > 0.0 { format!("{value:.digits$}") } else { "–".to_owned() };
    let number =
        call.and_then(|call| call.number).map_or_else(|| "–".to_owned(), |number| number.to_string());
    let since = rank.since_seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    format!(
        "{:>4} {:<12} {:>8} {style}{:<10}{style:#} {:<16} {number:>10} {:>9} {:>9} {:>7}  {:<14} {:>8}",
        rank.rank,
        cut(&rank.host, 12),
        rank.pid,
        rank.state,
        cut(call.map_or("–", |call| call.operation), 16),
        call.map_or_else(|| "–".to_owned(), |call| bytes(call.bytes)),
        rate(rank.calls_per_second, 0),
        rate(rank.gigabytes_per_second, 2),
        cut(&waits_for, 14),
        since.map_or_else(|| "–".to_owned(), short_time),
    )
}

/// As [`time_phrase`], in a narrow column.
fn short_time(time: Duration) -> String {
    time_phrase(time).replace("less than 1", "< 1")
}

/// `16.0 KiB`, `12 B`.
pub(super) fn bytes(bytes: u64) -> String {
    let units = [(1_u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.into_iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) => format!("{:.1} {name}", bytes as f64 / unit as f64),
        None => format!("{bytes} B"),
    }
}

/// At most `width` letters, the last one a sign that there are more.
fn cut(text: &str, width: usize) -> String {
    match text.char_indices().nth(width) {
        None => text.to_owned(),
        Some(_) => text.chars().take(width - 1).chain(['…']).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> RankState {
        RankState {
            rank: 1000,
            host: "a-very-long-host-name".into(),
            pid: 4_194_304,
            state: "unrecorded",
            call: None,
            calls_per_second: 8_123_456.0,
            gigabytes_per_second: 123.456,
            waits_for: vec![0, 1, 2, 3, 7, 9, 11, 13],
            since_seconds: Some(0.0001),
        }
    }

    #[test]
    fn rows_are_as_wide_as_their_heading_and_fit_into_120_columns() {
        let plain = |text: &str| anstream::adapter::strip_str(text).to_string();
        let row = plain(&row(&state()));
        assert!(row.starts_with("1000 a-very-long…  4194304 unrecorded –  "), "{row}");
        assert!(row.ends_with(" 8123456  123.46  0–3, 7, 9, 11…   < 1 ms"), "{row}");
        let heading = plain(&columns());
        assert_eq!(row.chars().count(), heading.chars().count());
        assert!(row.chars().count() <= 120, "{}", row.chars().count());
    }

    #[test]
    fn what_does_not_fit_on_the_terminal_is_counted() {
        let lines = || (0..10).map(|at| at.to_string().repeat(50)).collect::<Vec<_>>();
        assert_eq!(fit(lines(), (80, 24)), lines());
        let shown = fit(lines(), (30, 10));
        assert_eq!((shown.len(), shown[4].as_str()), (5, "… 6 more lines; --once shows all"));
        assert_eq!((height("", 80), height(&format!("{BOLD}{}{BOLD:#}", "x".repeat(81)), 80)), (1, 2));
    }

    #[test]
    fn sizes_are_short() {
        assert_eq!(
            (bytes(12), bytes(16_384), bytes(3 << 29)),
            ("12 B".into(), "16.0 KiB".into(), "1.5 GiB".into())
        );
    }
}
