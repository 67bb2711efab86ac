//! Recorded calls in the trace format that Chrome and Perfetto read: a line for each rank, messages on one beside it.

use std::time::Duration;

use serde::Serialize;
use unisono::recorder::{End, Record, Snapshot};

use super::state::Call;

/// How long a call is drawn that was done at once, unless the next one begins before.
const AT_ONCE_US: f64 = 1.0;

/// The whole file.
#[derive(Debug, Serialize)]
pub(super) struct Trace {
    #[serde(rename = "displayTimeUnit")]
    unit: &'static str,
    #[serde(rename = "traceEvents")]
    events: Vec<Event>,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Event {
    /// Names a process or a thread, as viewers call our ranks and their lines.
    Name { name: &'static str, ph: &'static str, pid: usize, tid: usize, args: Name },
    /// A call.
    Call {
        name: String,
        cat: &'static str,
        ph: &'static str,
        ts: f64,
        dur: f64,
        pid: usize,
        tid: usize,
        args: Box<Call>,
    },
}

#[derive(Debug, Serialize)]
struct Name {
    name: String,
}

impl Trace {
    /// A trace of communicators, each with when it was looked at. Times count from the first call.
    pub(super) fn new<'s>(seen: impl Iterator<Item = (&'s Snapshot, Duration)> + Clone) -> Self {
        let moment = |taken: Duration, ago: Duration| taken.as_secs_f64() * 1e6 - ago.as_secs_f64() * 1e6;
        let records = |snapshot: &'s Snapshot| snapshot.ranks.iter().flat_map(|rank| &rank.records);
        let first = seen
            .clone()
            .flat_map(|(snapshot, taken)| records(snapshot).map(move |record| moment(taken, record.begun)))
            .fold(f64::INFINITY, f64::min);
        let mut events = Vec::new();
        for (index, (snapshot, taken)) in seen.enumerate() {
            for rank in &snapshot.ranks {
                let (pid, name) = (rank.rank, format!("rank {} (pid {})", rank.rank, rank.pid));
                events.push(Event::Name { name: "process_name", ph: "M", pid, tid: 0, args: Name { name } });
                for (tid, what) in [(2 * index, "collectives"), (2 * index + 1, "messages")] {
                    let name = format!("{} of {}", what, snapshot.job);
                    events.push(Event::Name { name: "thread_name", ph: "M", pid, tid, args: Name { name } });
                }
                let begun: Vec<f64> = rank.records.iter().map(|record| moment(taken, record.begun)).collect();
                for (at, record) in rank.records.iter().enumerate() {
                    let next = begun.get(at + 1).map_or(AT_ONCE_US, |next| next - begun[at]);
                    events.push(Event::Call {
                        name: record.call(),
                        cat: record.header.kind.name(),
                        ph: "X",
                        ts: begun[at] - first,
                        dur: duration(record, next),
                        pid,
                        tid: 2 * index + usize::from(record.number.is_none()),
                        args: Box::new(Call::new(record, snapshot.ranks.len())),
                    });
                }
            }
        }
        Self { unit: "ns", events }
    }
}

/// In microseconds; `next` is how long after this call the next one began.
fn duration(record: &Record, next: f64) -> f64 {
    match record.end {
        End::Open => record.begun.as_secs_f64() * 1e6,
        End::AtOnce => next.clamp(0.0, AT_ONCE_US),
        End::Done(_) | End::Failed(_) => record.took().unwrap_or_default().as_secs_f64() * 1e6,
    }
}
