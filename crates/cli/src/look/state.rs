//! What a rank is doing, in one word and a few figures, from a snapshot alone.

use std::time::Duration;

use serde::Serialize;
use unisono::recorder::{End, Presence, Process, RankView, Record, Snapshot, Standing};

/// Rates are over so long, or over what the recorder still holds.
const WINDOW: Duration = Duration::from_secs(1);

/// What documents say of a job.
#[derive(Debug, Serialize)]
pub(super) struct Head<'s> {
    job: &'s str,
    generation: u32,
    host: &'s str,
    world_size: usize,
    failure: Option<&'s str>,
}

impl<'s> Head<'s> {
    pub(super) fn new(snapshot: &'s Snapshot) -> Self {
        Self {
            job: &snapshot.job,
            generation: snapshot.generation,
            host: &snapshot.host,
            world_size: snapshot.ranks.len(),
            failure: snapshot.failure.as_ref().map(|failure| failure.sentence.as_str()),
        }
    }
}

/// What a rank is doing.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct RankState {
    pub(super) rank: usize,
    pub(super) host: String,
    pub(super) pid: u32,
    /// running, computing, waiting, stopped, dead, failed, left, starting, or unrecorded.
    pub(super) state: &'static str,
    /// The call that it is in, or the last one.
    pub(super) call: Option<Call>,
    pub(super) calls_per_second: f64,
    pub(super) gigabytes_per_second: f64,
    /// Ranks.
    pub(super) waits_for: Vec<usize>,
    /// How long it has been so; missing where nobody knows.
    pub(super) since_seconds: Option<f64>,
}

/// A call, for programs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Call {
    /// `all_reduce`, `recv`.
    pub(crate) operation: &'static str,
    /// The number that all ranks give it; none for a message.
    pub(crate) number: Option<u64>,
    /// As people read it: `all_reduce #812 (f32, 4096, sum)`.
    pub(crate) text: String,
    pub(crate) dtype: Option<&'static str>,
    pub(crate) count: u64,
    pub(crate) bytes: u64,
    pub(crate) op: Option<&'static str>,
    pub(crate) root: Option<u32>,
    pub(crate) to: Option<usize>,
    pub(crate) from: Option<usize>,
    pub(crate) tag: Option<u32>,
    pub(crate) algorithm: &'static str,
    /// open, done or failed.
    pub(crate) state: &'static str,
    pub(crate) begun_seconds_ago: f64,
    /// Missing while it goes on, and for small calls that were done at once.
    pub(crate) took_seconds: Option<f64>,
}

impl Call {
    pub(crate) fn new(record: &Record, world_size: usize) -> Self {
        let header = &record.header;
        Self {
            operation: header.kind.name(),
            number: record.number,
            text: record.to_string(),
            dtype: header.dtype.map(|dtype| dtype.name()),
            count: header.count,
            bytes: record.bytes(),
            op: header.kind.op().map(|op| op.name()),
            root: header.kind.root(),
            to: record.receiver(),
            from: record.sender(),
            tag: record.tag(),
            algorithm: record.way(world_size),
            state: match record.end {
                End::Open => "open",
                End::AtOnce | End::Done(_) => "done",
                End::Failed(_) => "failed",
            },
            begun_seconds_ago: record.begun.as_secs_f64(),
            took_seconds: record.took().map(|took| took.as_secs_f64()),
        }
    }
}

impl RankState {
    pub(super) fn new(snapshot: &Snapshot, rank: &RankView) -> Self {
        let standing = rank.standing();
        let record = standing.record();
        let ended = |record: &Record| record.ended().unwrap_or(record.begun);
        let since = match standing {
            Standing::Nowhere => None,
            Standing::Outside(record) | Standing::Failed(record) => Some(ended(record)),
            Standing::Inside(record) | Standing::Waiting(record) => Some(record.begun),
        };
        let state = match (rank.process, rank.presence, standing) {
            (_, Presence::Destroyed | Presence::Dropped, _) => "left",
            (_, Presence::Absent, _) => "starting",
            (Process::Ended, ..) => "dead",
            (Process::Stopped, ..) => "stopped",
            _ if !rank.is_recording => "unrecorded",
            (.., Standing::Failed(_)) => "failed",
            (.., Standing::Waiting(_)) => "waiting",
            (.., Standing::Inside(_)) => "running",
            (.., Standing::Outside(record)) if ended(record) < WINDOW => "running",
            (.., Standing::Outside(_) | Standing::Nowhere) => "computing",
        };
        let (calls_per_second, gigabytes_per_second) = rates(rank);
        Self {
            rank: rank.rank,
            host: snapshot.host.clone(),
            pid: rank.pid,
            state,
            call: record.map(|record| Call::new(record, snapshot.ranks.len())),
            calls_per_second,
            gigabytes_per_second,
            waits_for: snapshot.waits_for(rank.rank),
            since_seconds: since.map(|since| since.as_secs_f64()),
        }
    }

    /// The states of all ranks.
    pub(super) fn all(snapshot: &Snapshot) -> Vec<Self> {
        snapshot.ranks.iter().map(|rank| Self::new(snapshot, rank)).collect()
    }
}

/// Calls and gigabytes per second, over those that ended within the last second.
fn rates(rank: &RankView) -> (f64, f64) {
    let is_recent = |record: &&Record| record.ended().is_some_and(|ended| ended <= WINDOW);
    let recent: Vec<&Record> = rank.records.iter().filter(is_recent).collect();
    // Where the recorder has forgotten the beginning of the second, what it holds counts.
    let window = match (recent.first(), recent.len() == rank.records.len()) {
        (Some(first), true) => first.begun.min(WINDOW),
        _ => WINDOW,
    };
    let seconds = window.as_secs_f64().max(1e-6);
    let bytes: f64 = recent.iter().map(|record| record.bytes() as f64).sum();
    (recent.len() as f64 / seconds, bytes / seconds / 1e9)
}
