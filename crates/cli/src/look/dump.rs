//! `unisono dump`: the last calls of every rank, as a table, as JSON, or as a trace for a viewer.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use unisono::recorder::{End, GpuCall, Reading, Record, SeatView, Snapshot};

use super::state::{self, Call, Head, RankState};
use super::top::bytes;
use super::trace::Trace;
use super::{BOLD, Seen, Selection, heading, print};
use crate::output::Target;
use crate::{Common, Failure};

/// The arguments of `unisono dump`.
#[derive(Debug, Args)]
#[command(
    after_help = "Each rank keeps its last 1,024 calls. `at once`: the call was small and never had to do more than spin, so \
                  nobody took the time of its end. Calls on GPUs are read from the device, which takes a moment, and \
                  counted apart; their times are exact to each other, and to other calls but for what the clocks drifted. A trace opens in ui.perfetto.dev or chrome://tracing, a line per rank.\n\n\
                  Exit code: 0, 1 if there is no job to look at."
)]
pub(crate) struct Arguments {
    #[command(flatten)]
    selection: Selection,
    /// Write a trace in the Chrome format to FILE instead
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Job<'s> {
    #[serde(flatten)]
    head: Head<'s>,
    ranks: Vec<Rank>,
}

#[derive(Debug, Serialize)]
struct Rank {
    rank: usize,
    pid: u32,
    state: &'static str,
    waits_for: Vec<usize>,
    /// Oldest first.
    calls: Vec<Call>,
    /// now; unanswered: as of the last time that its process answered; last: the communicator is over. None without a GPU.
    gpu_reading: Option<&'static str>,
    /// Oldest first.
    gpu_calls: Vec<Call>,
    /// The latest from each rank and to each.
    gpu_messages: Vec<Call>,
    /// Where the rank has several, what each does in calls on a buffer of each.
    devices: Vec<Device>,
}

#[derive(Debug, Serialize)]
struct Device {
    ordinal: u32,
    reading: Option<&'static str>,
    /// Oldest first; counted apart from those of the rank.
    calls: Vec<Call>,
}

impl<'s> Job<'s> {
    fn new(snapshot: &'s Snapshot) -> Self {
        let ranks = snapshot.ranks.iter().map(|view| {
            let RankState { rank, pid, state, waits_for, .. } = RankState::new(snapshot, view);
            let call = |record| Call::new(record, snapshot.ranks.len());
            let on_gpu = view.gpu.iter().flat_map(|gpu| &gpu.calls);
            let messages = view.gpu.iter().flat_map(|gpu| &gpu.messages);
            Rank {
                rank,
                pid,
                state,
                waits_for,
                calls: view.records.iter().map(call).collect(),
                gpu_reading: state::reading(view.gpu.as_ref()),
                gpu_calls: on_gpu.map(Call::on_gpu).collect(),
                gpu_messages: messages.map(Call::of_message).collect(),
                devices: view.devices.iter().map(Device::new).collect(),
            }
        });
        Self { head: Head::new(snapshot), ranks: ranks.collect() }
    }
}

impl Device {
    fn new(view: &SeatView) -> Self {
        let calls = view.gpu.iter().flat_map(|gpu| &gpu.calls);
        let reading = state::reading(view.gpu.as_ref());
        Self { ordinal: view.ordinal, reading, calls: calls.map(Call::on_gpu).collect() }
    }
}

/// Dumps, and answers the exit code.
pub(crate) fn execute(arguments: &Arguments, common: &Common) -> Result<u8, Failure> {
    let seen = arguments.selection.look()?;
    if let Some(path) = &arguments.trace {
        let trace = Trace::new(seen.iter().map(|seen| (&seen.snapshot, seen.taken)));
        Target::File(path.clone()).write(&trace)?;
    }
    if let Some(target) = &common.json {
        let jobs: Vec<Job<'_>> = seen.iter().map(|seen| Job::new(&seen.snapshot)).collect();
        target.write(&jobs)?;
    }
    if arguments.trace.is_none() && common.json.is_none() {
        for (index, Seen { snapshot, .. }) in seen.iter().enumerate() {
            let blank = if index > 0 { "\n" } else { "" };
            print(&format!("{blank}{}", table(snapshot)));
        }
    }
    Ok(0)
}

fn table(snapshot: &Snapshot) -> String {
    let mut lines = vec![heading(snapshot)];
    lines.push(format!(
        "{BOLD}{:>4} {:>14} {:>12} {:>10}  {:<9} {}{BOLD:#}",
        "rank", "begun before", "took", "bytes", "algorithm", "call"
    ));
    for rank in &snapshot.ranks {
        lines.extend(rank.records.iter().map(|record| row((rank.rank, snapshot.ranks.len()), record)));
        for device in &rank.devices {
            let place = format!("cuda:{}", device.ordinal);
            let calls = device.gpu.iter().flat_map(|gpu| &gpu.calls);
            lines.extend(calls.map(|call| gpu_row(rank.rank, &place, call)));
        }
        let Some(gpu) = &rank.gpu else { continue };
        lines.extend(gpu.calls.iter().map(|call| gpu_row(rank.rank, "GPU", call)));
        lines.extend(gpu.messages.iter().map(|message| message_row(rank.rank, &Call::of_message(message))));
        if gpu.reading == Reading::Earlier {
            lines.push(format!("{:>4} did not answer: its calls on the GPU are not those of now", rank.rank));
        }
    }
    lines.join("\n")
}

fn row((rank, world_size): (usize, usize), record: &Record) -> String {
    let took = match (record.end, record.took()) {
        (End::Open, _) => "goes on".to_owned(),
        (End::AtOnce, _) => "at once".to_owned(),
        (End::Failed(_), _) => "failed".to_owned(),
        (End::Done(_), took) => time(took.unwrap_or_default()),
    };
    let waits = record.waits.map_or_else(String::new, |waits| format!(" waits for rank {}", waits.peer));
    format!(
        "{rank:>4} {:>14} {took:>12} {:>10}  {:<9} {record}{waits}",
        format!("{:.6} s", record.begun.as_secs_f64()),
        bytes(record.bytes()),
        record.way(world_size)
    )
}

fn gpu_row(rank: usize, place: &str, call: &GpuCall) -> String {
    let waits = if call.is_open() && call.met.is_none() { " waits for other ranks" } else { "" };
    format!(
        "{rank:>4} {:>14} {:>12} {:>10}  {:<9} {place}: {call}{waits}",
        format!("{:.6} s", call.begun.as_secs_f64()),
        call.took().map_or_else(|| "goes on".to_owned(), time),
        bytes(call.bytes()),
        call.way()
    )
}

/// The latest message of a GPU to a rank, or from one.
fn message_row(rank: usize, message: &Call) -> String {
    format!(
        "{rank:>4} {:>14} {:>12} {:>10}  {:<9} GPU: {}",
        format!("{:.6} s", message.begun_seconds_ago),
        message.took_seconds.map_or_else(|| "goes on".to_owned(), |took| time(Duration::from_secs_f64(took))),
        bytes(message.bytes),
        message.algorithm,
        message.text
    )
}

/// `1.23 µs`, `12.3 ms`, `4.00 s`.
fn time(time: Duration) -> String {
    let us = time.as_secs_f64() * 1e6;
    match us {
        us if us < 1e3 => format!("{us:.2} µs"),
        us if us < 1e6 => format!("{:.2} ms", us / 1e3),
        us => format!("{:.2} s", us / 1e6),
    }
}
