//! What a person reads about a job that did not go well, what a program reads (`--json`), and the exit code.

use std::time::Duration;

use serde::Serialize;
use unisono::recorder::ranks_phrase;

use super::policy::{Ended, Note, OnFailure, Policy, TERMINATE_WAIT};
use super::recordings::LastCall;
use super::signals;

/// The exit code of a job that its `--timeout` ended.
pub(super) const EXIT_TIMEOUT: u8 = 124;

/// The exit code of `run`: 124 after `--timeout`, else that of the first rank that failed (128 + signal), else 0.
pub(super) fn exit_code(policy: &Policy) -> u8 {
    if policy.timed_out() {
        return EXIT_TIMEOUT;
    }
    let first = policy.first_failure().and_then(|rank| policy.ends()[rank]);
    match first.map(|end| end.how) {
        Some(Ended::Code(code)) => code as u8,
        Some(Ended::Signal(signal)) => 128_u8.wrapping_add(signal as u8),
        None if policy.ends().iter().any(Option::is_none) => 128 + libc::SIGKILL as u8,
        None => 0,
    }
}

/// A sentence while the job still runs.
pub(super) fn announcement(note: Note, policy: &Policy, pids: &[i32]) -> String {
    let alive = living(policy);
    match note {
        Note::FirstFailure { rank } => {
            let Some(end) = policy.ends()[rank] else { return String::new() };
            let pid = pids[rank];
            let failed =
                format!("rank {rank} (pid {pid}) {} after {}.", outcome(end.how, 1), seconds(end.at));
            match policy.rules().on_failure {
                _ if alive.is_empty() => failed,
                OnFailure::Continue => {
                    let go = if alive.len() == 1 { "goes" } else { "go" };
                    format!("{failed} {} {go} on (--on-failure=continue).", subject(&alive))
                }
                OnFailure::Stop if policy.rules().grace.is_zero() => {
                    format!("{failed} Ending {}.", ranks(&alive))
                }
                OnFailure::Stop => {
                    let have = if alive.len() == 1 { "has" } else { "have" };
                    format!("{failed} {} {have} {} to end.", subject(&alive), seconds(policy.rules().grace))
                }
            }
        }
        Note::TimedOut => {
            let timeout = policy.rules().timeout.unwrap_or_default();
            format!("the job is not done after --timeout {}; ending {}.", seconds(timeout), ranks(&alive))
        }
        Note::Forwarded { signal } => {
            format!("{} handed on to {}; once more ends the job.", signals::name(signal), ranks(&alive))
        }
    }
}

/// The sentences at the end of a job; none if all went well, or if the only rank has been told of already.
pub(super) fn summary(policy: &Policy) -> Vec<String> {
    let failed = policy.first_failure();
    if failed.is_none() && !policy.timed_out() && policy.ends().iter().all(Option::is_some) {
        return Vec::new();
    }
    let told_already = !policy.timed_out() && policy.interrupted_by().is_none();
    if policy.rules().world_size == 1 && told_already && policy.ends()[0].is_some() {
        return Vec::new();
    }
    let (what, first) = match (policy.timed_out(), policy.interrupted_by()) {
        (true, _) => ("the job timed out".to_owned(), None),
        (false, Some(signal)) => (format!("the job ended after {}", signals::name(signal)), None),
        (false, None) => ("the job failed".to_owned(), failed),
    };
    let mut parts = Vec::new();
    if let Some((rank, end)) = first.and_then(|rank| Some((rank, policy.ends()[rank]?))) {
        parts.push(format!("rank {rank} {} first", outcome(end.how, 1)));
    }
    let mut groups: Vec<(Fate, Vec<usize>)> = Vec::new();
    for rank in (0..policy.rules().world_size).filter(|rank| Some(*rank) != first) {
        let fate = fate(policy, rank);
        match groups.iter_mut().find(|(known, _)| *known == fate) {
            Some((_, members)) => members.push(rank),
            None => groups.push((fate, vec![rank])),
        }
    }
    parts.extend(
        groups.iter().map(|(fate, members)| format!("{} {}", ranks(members), fate.sentence(members.len()))),
    );
    vec![format!("{what}: {}. Exit code {}.", parts.join("; "), exit_code(policy))]
}

/// What became of a rank, as far as it matters to a reader.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Itself(Ended),
    Terminated,
    Killed,
    Stuck,
}

fn fate(policy: &Policy, rank: usize) -> Fate {
    match policy.ends()[rank] {
        None => Fate::Stuck,
        Some(end) => match (end.how, end.pressed) {
            (Ended::Signal(libc::SIGTERM), Some(_)) => Fate::Terminated,
            (Ended::Signal(libc::SIGKILL), Some(libc::SIGKILL)) => Fate::Killed,
            (how, _) => Fate::Itself(how),
        },
    }
}

impl Fate {
    fn sentence(self, count: usize) -> String {
        let were = if count == 1 { "was" } else { "were" };
        match self {
            Self::Itself(how) => outcome(how, count),
            Self::Terminated => format!("{were} ended by SIGTERM"),
            Self::Killed => {
                format!("did not end within {} of SIGTERM and {were} killed", seconds(TERMINATE_WAIT))
            }
            Self::Stuck => "did not end even after SIGKILL (stuck in the kernel?)".to_owned(),
        }
    }
}

/// `exited with code 3`, `was killed by SIGKILL (out of memory?)`.
fn outcome(how: Ended, count: usize) -> String {
    let were = if count == 1 { "was" } else { "were" };
    match how {
        Ended::Code(0) => "succeeded".to_owned(),
        Ended::Code(code) => format!("exited with code {code}"),
        Ended::Signal(signal) => {
            let hint = match signal {
                libc::SIGKILL => " (out of memory?)",
                libc::SIGSEGV => " (invalid memory access)",
                libc::SIGBUS => " (memory behind a mapping is gone: a full /dev/shm or a truncated file?)",
                libc::SIGILL => " (an instruction that this CPU does not have?)",
                libc::SIGPIPE => " (nobody read its output)",
                _ => "",
            };
            format!("{were} killed by {}{hint}", signals::name(signal))
        }
    }
}

fn living(policy: &Policy) -> Vec<usize> {
    (0..policy.ends().len()).filter(|rank| policy.ends()[*rank].is_none()).collect()
}

/// The ranks at the beginning of a sentence.
fn subject(list: &[usize]) -> String {
    ranks(list).replacen('r', "R", 1)
}

/// `rank 3`, `ranks 0, 1`, `ranks 0–6, 9`.
fn ranks(list: &[usize]) -> String {
    ranks_phrase(list).replace(" and ", ", ")
}

/// `30 ms`, `0.4 s`, `5 s`, `12 s`.
fn seconds(span: Duration) -> String {
    let tenths = (span.as_millis() + 50) / 100;
    match tenths {
        0 => format!("{} ms", span.as_millis()),
        1..100 if !tenths.is_multiple_of(10) => format!("{}.{} s", tenths / 10, tenths % 10),
        _ => format!("{} s", (span.as_millis() + 500) / 1000),
    }
}

/// The result for programs.
#[derive(Debug, Serialize)]
pub(super) struct Report<'r> {
    job: &'r str,
    world_size: usize,
    exit_code: u8,
    timed_out: bool,
    first_failure: Option<usize>,
    seconds: f64,
    ranks: Vec<RankReport>,
}

#[derive(Debug, Serialize)]
struct RankReport {
    rank: usize,
    pid: i32,
    exit_code: Option<i32>,
    signal: Option<String>,
    /// By which signal of ours, if we had to end it.
    ended_by: Option<String>,
    /// From the start of the job to its end; missing if it never ended.
    seconds: Option<f64>,
    /// What it did last; missing if it made no communicator.
    last_call: Option<LastCall>,
}

impl<'r> Report<'r> {
    pub(super) fn new(
        job: &'r str,
        policy: &Policy,
        pids: &[i32],
        last_calls: Vec<Option<LastCall>>,
        elapsed: Duration,
    ) -> Self {
        let ranks = policy.ends().iter().zip(pids).zip(last_calls).enumerate();
        let ranks = ranks.map(|(rank, ((end, pid), last_call))| RankReport {
            rank,
            pid: *pid,
            exit_code: end.and_then(|end| if let Ended::Code(code) = end.how { Some(code) } else { None }),
            signal: end.and_then(|end| {
                if let Ended::Signal(signal) = end.how { Some(signals::name(signal)) } else { None }
            }),
            ended_by: end.and_then(|end| end.pressed).map(signals::name),
            seconds: end.map(|end| end.at.as_secs_f64()),
            last_call,
        });
        Self {
            job,
            world_size: policy.rules().world_size,
            exit_code: exit_code(policy),
            timed_out: policy.timed_out(),
            first_failure: policy.first_failure(),
            seconds: elapsed.as_secs_f64(),
            ranks: ranks.collect(),
        }
    }
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
