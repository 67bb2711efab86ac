//! Recorded calls in the trace format that Chrome and Perfetto read: a line for each rank, messages on one beside it, and calls
//! on its GPU on a third.

use std::time::Duration;

use serde::Serialize;
use unisono::recorder::{End, Record, Snapshot};

use super::state::Call;

/// How long a call is drawn that was done at once, unless the next one begins before.
const AT_ONCE_US: f64 = 1.0;
/// Lines of each rank for each communicator.
const LINES: usize = 3;

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
        let calls = |snapshot: &'s Snapshot| {
            snapshot.ranks.iter().filter_map(|rank| rank.gpu.as_ref()).flat_map(|gpu| &gpu.calls)
        };
        let begun = |snapshot| {
            let host = records(snapshot).map(|record| record.begun);
            host.chain(calls(snapshot).map(|call| call.begun))
        };
        let first = seen
            .clone()
            .flat_map(|(snapshot, taken)| begun(snapshot).map(move |begun| moment(taken, begun)))
            .fold(f64::INFINITY, f64::min);
        let mut events = Vec::new();
        for (index, (snapshot, taken)) in seen.enumerate() {
            for rank in &snapshot.ranks {
                let (pid, name) = (rank.rank, format!("rank {} (pid {})", rank.rank, rank.pid));
                events.push(Event::Name { name: "process_name", ph: "M", pid, tid: 0, args: Name { name } });
                let line = LINES * index;
                let lines = [(line, "collectives"), (line + 1, "messages"), (line + 2, "calls on the GPU")];
                let used = if rank.gpu.is_some() { LINES } else { LINES - 1 };
                for (tid, what) in lines.into_iter().take(used) {
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
                        tid: line + usize::from(record.number.is_none()),
                        args: Box::new(Call::new(record, snapshot.ranks.len())),
                    });
                }
                events.extend(rank.gpu.iter().flat_map(|gpu| &gpu.calls).map(|call| Event::Call {
                    name: call.call(),
                    cat: call.header.kind.name(),
                    ph: "X",
                    ts: moment(taken, call.begun) - first,
                    dur: call.took().unwrap_or(call.begun).as_secs_f64() * 1e6,
                    pid,
                    tid: line + 2,
                    args: Box::new(Call::on_gpu(call)),
                }));
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
