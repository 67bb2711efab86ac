//! What a rank is doing, in one word and a few figures, from a snapshot alone.

use std::time::Duration;

use serde::Serialize;
use unisono::recorder::{
    End, GpuCall, GpuMessage, GpuView, GpuWork, Presence, Process, RankView, Reading, Record, Snapshot,
    Standing,
};

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
    /// host, or gpu: calls there are counted apart.
    pub(crate) device: &'static str,
    /// On a GPU, how long ago all ranks had come to it; missing until they have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) met_seconds_ago: Option<f64>,
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
            device: "host",
            met_seconds_ago: None,
        }
    }

    pub(crate) fn on_gpu(call: &GpuCall) -> Self {
        let header = &call.header;
        Self {
            operation: header.kind.name(),
            number: Some(u64::from(call.number)),
            text: call.to_string(),
            dtype: header.dtype.map(|dtype| dtype.name()),
            count: header.count,
            bytes: call.bytes(),
            op: header.kind.op().map(|op| op.name()),
            root: header.kind.root(),
            to: None,
            from: None,
            tag: None,
            algorithm: call.way(),
            state: if call.is_open() { "open" } else { "done" },
            begun_seconds_ago: call.begun.as_secs_f64(),
            took_seconds: call.took().map(|took| took.as_secs_f64()),
            device: "gpu",
            met_seconds_ago: call.met.map(|met| met.as_secs_f64()),
        }
    }
}

impl Call {
    /// A message between GPUs. Its number counts those of its pair of ranks in its direction.
    pub(crate) fn of_message(message: &GpuMessage) -> Self {
        let GpuMessage { header, peer, .. } = message;
        let took = message.ended.map(|ended| message.begun.saturating_sub(ended).as_secs_f64());
        Self {
            operation: message.name(),
            number: Some(u64::from(message.number)),
            text: message.to_string(),
            dtype: header.dtype.map(|dtype| dtype.name()),
            count: header.dtype.map_or(0, |dtype| header.bytes / dtype.size() as u64),
            bytes: header.bytes,
            op: None,
            root: None,
            to: message.is_sent.then_some(*peer),
            from: (!message.is_sent).then_some(*peer),
            tag: (header.kind == 0).then_some(header.tag),
            algorithm: "message",
            state: if message.ended.is_none() { "open" } else { "done" },
            begun_seconds_ago: message.begun.as_secs_f64(),
            took_seconds: took,
            device: "gpu",
            met_seconds_ago: None,
        }
    }
}

/// How current what is known of a GPU's calls is, in a word; nothing without a GPU.
pub(super) fn reading(gpu: Option<&GpuView>) -> Option<&'static str> {
    gpu.map(|gpu| match gpu.reading {
        Reading::Now => "now",
        Reading::Earlier => "unanswered",
        Reading::Last => "last",
    })
}

impl RankState {
    pub(super) fn new(snapshot: &Snapshot, rank: &RankView) -> Self {
        let standing = rank.standing();
        let record = standing.record();
        let ended = |record: &Record| record.ended().unwrap_or(record.begun);
        // What the GPU did last tells more, where that is more recent than what the host did.
        let on_gpu = rank.gpu.as_ref().and_then(GpuView::latest);
        let on_gpu = on_gpu.filter(|call| {
            let last = call.ended.unwrap_or_default();
            record.is_none_or(|record| !record.is_open() && last <= ended(record))
        });
        let since = match standing {
            Standing::Nowhere => None,
            Standing::Outside(record) | Standing::Failed(record) => Some(ended(record)),
            Standing::Inside(record) | Standing::Waiting(record) => Some(record.begun),
        };
        let since = on_gpu.map_or(since, |call| Some(call.ended.unwrap_or(call.begun)));
        let state = match (rank.process, rank.presence, standing) {
            (_, Presence::Destroyed | Presence::Dropped, _) => "left",
            (_, Presence::Absent, _) => "starting",
            (Process::Ended, ..) => "dead",
            (Process::Stopped, ..) => "stopped",
            _ if !rank.is_recording => "unrecorded",
            (.., Standing::Failed(_)) => "failed",
            _ if message_peer(rank).is_some() => "waiting",
            _ if on_gpu
                .is_some_and(|call| call.is_open() && call.met.is_none() && rank.gpu_waits.is_some()) =>
            {
                "waiting"
            }
            _ if on_gpu.is_some_and(|call| call.ended.is_none_or(|ended| ended < WINDOW)) => "running",
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
            call: match on_gpu {
                Some(call) => Some(Call::on_gpu(call)),
                None => record.map(|record| Call::new(record, snapshot.ranks.len())),
            },
            calls_per_second,
            gigabytes_per_second,
            waits_for: match rank.gpu_waits {
                Some(wait) if on_gpu.is_some_and(GpuCall::is_open) => vec![wait.peer],
                Some(_) if message_peer(rank).is_some_and(|peer| peer < snapshot.ranks.len()) => {
                    message_peer(rank).into_iter().collect()
                }
                _ => snapshot.waits_for(rank.rank),
            },
            since_seconds: since.map(|since| since.as_secs_f64()),
        }
    }

    /// The states of all ranks.
    pub(super) fn all(snapshot: &Snapshot) -> Vec<Self> {
        snapshot.ranks.iter().map(|rank| Self::new(snapshot, rank)).collect()
    }
}

/// For whose message, to or from it, the GPU of a rank waits.
fn message_peer(rank: &RankView) -> Option<usize> {
    rank.gpu_waits.filter(|wait| !matches!(wait.work, GpuWork::Call(_))).map(|wait| wait.peer)
}

/// Calls and gigabytes per second, on the host and on the GPU.
fn rates(rank: &RankView) -> (f64, f64) {
    let host = rank.records.iter().filter_map(|record| Some((record.begun, record.ended()?, record.bytes())));
    let host = rate(rank.records.len(), host);
    let calls = rank.gpu.as_ref().filter(|gpu| gpu.reading == Reading::Now).map_or(&[][..], |gpu| &gpu.calls);
    let gpu = calls.iter().filter_map(|call| Some((call.begun, call.ended?, call.bytes())));
    let gpu = rate(calls.len(), gpu);
    (host.0 + gpu.0, host.1 + gpu.1)
}

/// Calls and gigabytes per second, over those that ended within the last second. Each of `ended`, oldest first, says when it began,
/// when it ended, and its bytes; a recorder holds `calls`.
fn rate(calls: usize, ended: impl Iterator<Item = (Duration, Duration, u64)>) -> (f64, f64) {
    let recent: Vec<_> = ended.filter(|(_, ended, _)| *ended <= WINDOW).collect();
    // Where the recorder has forgotten the beginning of the second, what it holds counts.
    let window = match (recent.first(), recent.len() == calls) {
        (Some((begun, ..)), true) => (*begun).min(WINDOW),
        _ => WINDOW,
    };
    let seconds = window.as_secs_f64().max(1e-6);
    let bytes: f64 = recent.iter().map(|(_, _, bytes)| *bytes as f64).sum();
    (recent.len() as f64 / seconds, bytes / seconds / 1e9)
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
