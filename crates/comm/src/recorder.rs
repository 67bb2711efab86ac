//! What the ranks of this machine do and did last, read from outside: the flight recorder's reading side.
//!
//! Every communicator keeps the last calls of its ranks in its shared memory. [`find`] finds the communicators of other
//! processes of this user, or of some of them; [`Recording::snapshot`] reads one, while it hangs or after its ranks died;
//! [`why`] says in plain English who waits for whom. Nothing of the job has to answer: it may be stopped. Only what GPUs did lies in
//! their own memory: a thread of each rank fetches it on request, while kernels hang, too. What the devices of ranks that have several do in
//! calls on a buffer of each is told by device ([`RankView::devices`]).
//!
//! ```
//! use unisono::{Communicator, Operations, recorder};
//!
//! let rank = Communicator::threads(1)?.remove(0);
//! rank.barrier()?;
//! let found = recorder::find(Some(&[std::process::id()]))?;
//! let snapshot = found.recordings[0].snapshot()?;
//! assert_eq!(snapshot.ranks[0].records.last().unwrap().to_string(), "barrier #1");
//! println!("{}", recorder::why(&snapshot));
//! # Ok::<(), unisono::Error>(())
//! ```

use std::num::NonZeroU64;
use std::sync::OnceLock;
use std::time::Duration;

pub use unisono_core::call::CallHeader;
use unisono_core::layout::{ControlLayout, Field};
use unisono_core::recorder::{Clock, Clocks, DeviceLabel, JobLabel};
pub use unisono_core::recorder::{
    End, Failure, GpuCall, GpuMessage, GpuView, GpuWait, GpuWork, MessageHeader, Presence, Process, RankView,
    Reading, Record, SeatView, Snapshot, Standing, Waits, WaitsOn, ranks_phrase, time_phrase, why,
};
use unisono_node::ForeignMemory;
use unisono_node::identity::ProcessStatus;
use unisono_node::inspect;
use unisono_sync::Ticks;
use unisono_sync::ticks::monotonic_ns;

use crate::cause::Cause;
use crate::error::Result;
use ask::Page;

pub(crate) mod ask;
#[cfg(all(test, feature = "cuda"))]
mod gpu_tests;

/// Over so long the rate of the processor's counter is measured, once per process.
const CALIBRATION: Duration = Duration::from_millis(20);

/// The shared memory of a communicator, held open: it stays readable after its ranks died.
#[derive(Debug)]
pub struct Recording {
    memory: ForeignMemory,
    label: JobLabel,
    /// The memory of each device of ranks that have several.
    devices: Vec<(DeviceLabel, ForeignMemory)>,
}

/// What a search came to.
#[derive(Debug, Default)]
pub struct Found {
    /// The communicators, oldest first.
    pub recordings: Vec<Recording>,
    /// Processes that the system does not let us look at.
    pub denied: Vec<u32>,
    /// Why memory that was found cannot be read, a sentence each: it belongs to another version of unisono.
    pub foreign: Vec<String>,
}

/// Finds the communicators in which `pids` take part; without them, those of all processes of this user.
///
/// # Errors
/// [`Error::Node`](crate::Error::Node) if `/proc` cannot be read.
pub fn find(pids: Option<&[u32]>) -> Result<Found> {
    let search = inspect::search(pids)?;
    let mut found = Found { denied: search.denied, ..Found::default() };
    let mut devices = Vec::new();
    for memory in search.memories {
        match read_label(&memory) {
            // Windows are such memory, too, and have no label.
            None => devices.extend(read_device_label(&memory).map(|label| (label, memory))),
            Some(Ok(label)) => found.recordings.push(Recording { memory, label, devices: Vec::new() }),
            Some(Err(error)) => found.foreign.push(error.to_string()),
        }
    }
    devices.sort_by_key(|(label, _)| label.seat);
    for (label, memory) in devices {
        // Whoever made the one holds the other.
        let is_its = |recording: &&mut Recording| {
            recording.label == label.job && memory.holders().iter().any(|pid| recording.pids().contains(pid))
        };
        if let Some(recording) = found.recordings.iter_mut().find(is_its) {
            recording.devices.push((label, memory));
        }
    }
    found.recordings.sort_by_key(|recording| (recording.label.created, recording.memory.identity()));
    Ok(found)
}

/// `pid` and all processes that it started, and those that they did.
pub fn family(pid: u32) -> Vec<u32> {
    inspect::family(pid)
}

/// `None` for memory that is no communicator's.
fn read_label(memory: &ForeignMemory) -> Option<unisono_core::Result<JobLabel>> {
    let field = ControlLayout::new(1).job();
    let words = memory.words(field.offset, field.bytes / 8).ok()?;
    JobLabel::is_one(&words).then(|| JobLabel::from_words(&words))
}

/// `None` for memory that is no device's.
fn read_device_label(memory: &ForeignMemory) -> Option<DeviceLabel> {
    let field = DeviceLabel::FIELD;
    let words = memory.words(field.offset, field.bytes / 8).ok()?;
    DeviceLabel::from_words(&words).filter(|_| memory.bytes() >= DeviceLabel::RECORDS.end())
}

impl Recording {
    /// The job's name.
    pub fn job(&self) -> &str {
        &self.label.job
    }

    /// Number of ranks.
    pub const fn world_size(&self) -> usize {
        self.label.ranks
    }

    /// The processes that held the memory when it was found, ascending.
    pub fn pids(&self) -> &[u32] {
        self.memory.holders()
    }

    /// What tells this communicator from all others of this machine.
    pub const fn identity(&self) -> (u64, u64) {
        self.memory.identity()
    }

    /// What its ranks do now. The first one in a process takes 20 ms, to learn how fast time goes. Ranks that work on GPUs are asked
    /// for their calls there, all at once, which takes some 0.1 s, and 1 s where one does not answer
    /// ([`GpuView::reading`] says so).
    ///
    /// # Errors
    /// [`Error::Core`](crate::Error::Core) if the memory is not what it says; [`Error::Node`](crate::Error::Node) if it cannot be
    /// read.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let first = self.glance()?;
        let layout = ControlLayout::new(first.ranks.len());
        let serves = |gpu: &Option<GpuView>| gpu.as_ref().is_some_and(|gpu| gpu.reading == Reading::Earlier);
        let (mut asked, mut pages) = (Vec::new(), Vec::new());
        for rank in first.ranks.iter().filter(|rank| rank.process == Process::Running) {
            if serves(&rank.gpu) {
                asked.push((rank.rank, None));
                pages.push(ForeignPage { memory: &self.memory, field: layout.rank(rank.rank).gpu });
            }
            for device in rank.devices.iter().filter(|device| serves(&device.gpu)) {
                let known = self.devices.iter().find(|(label, _)| label.seat == device.seat);
                asked.extend(known.map(|_| (rank.rank, Some(device.seat))));
                pages.extend(known.map(|(_, memory)| ForeignPage { memory, field: DeviceLabel::REPORT }));
            }
        }
        if asked.is_empty() {
            return Ok(first);
        }
        let answered = ask::ask(&pages);
        let mut snapshot = self.glance()?;
        for ((rank, seat), has_answered) in asked.into_iter().zip(answered) {
            let Some(rank) = snapshot.ranks.get_mut(rank) else { continue };
            let view = match seat {
                None => rank.gpu.as_mut(),
                Some(seat) => {
                    let device = rank.devices.iter_mut().find(|device| device.seat == seat);
                    device.and_then(|device| device.gpu.as_mut())
                }
            };
            if let Some(view) = view.filter(|view| has_answered && view.reading == Reading::Earlier) {
                view.reading = Reading::Now;
            }
        }
        Ok(snapshot)
    }

    /// As [`Recording::snapshot`], of what lies in the memory: nobody is asked, and nobody waited for.
    ///
    /// # Errors
    /// As there.
    pub fn glance(&self) -> Result<Snapshot> {
        let clocks = clocks();
        let fetch =
            |field: Field| -> Result<Vec<u64>> { Ok(self.memory.words(field.offset, field.bytes / 8)?) };
        let mut snapshot = Snapshot::read(self.memory.bytes(), &clocks, fetch, explain)?;
        for (label, memory) in &self.devices {
            let fetch =
                |field: Field| -> Result<Vec<u64>> { Ok(memory.words(field.offset, field.bytes / 8)?) };
            let places = (DeviceLabel::REPORT, DeviceLabel::RECORDS);
            let (waits, gpu) = GpuView::read(places, clocks.of(label.ticks), &fetch)?;
            if let Some(rank) = snapshot.ranks.get_mut(label.rank) {
                rank.devices.push(SeatView { seat: label.seat, ordinal: label.ordinal, waits, gpu });
            }
        }
        for rank in &mut snapshot.ranks {
            (rank.pid, rank.process) = self.process_of(rank);
        }
        Ok(snapshot)
    }

    /// The rank's process, as we call it, and what the system says of it.
    fn process_of(&self, rank: &RankView) -> (u32, Process) {
        if rank.presence == Presence::Absent {
            return (rank.pid, Process::Unknown);
        }
        let Some(pid) = self.memory.holder(rank.pid, rank.started) else {
            // Its number may belong to somebody else by now.
            let status = ProcessStatus::of(rank.pid).filter(|status| status.started == rank.started);
            return (rank.pid, status.map_or(Process::Ended, process));
        };
        (pid, ProcessStatus::of(pid).map_or(Process::Ended, process))
    }
}

/// The page of a GPU in the memory of another process.
struct ForeignPage<'m> {
    memory: &'m ForeignMemory,
    field: Field,
}

impl Page for ForeignPage<'_> {
    fn load(&self, word: usize) -> Option<u64> {
        self.memory.words(self.field.offset + word * 8, 1).ok()?.first().copied()
    }

    fn store(&self, word: usize, value: u64) -> bool {
        self.memory.write_word(self.field.offset + word * 8, value).is_ok()
    }
}

/// The clocks of this machine.
fn clocks() -> Clocks {
    let rate = counter_rate();
    Clocks {
        counter: Clock { now: Ticks::here().now(), rate },
        monotonic: Clock { now: monotonic_ns(), rate: NANOSECONDS },
    }
}

/// The one that ranks of this machine take their ticks from.
#[cfg(feature = "cuda")]
pub(crate) fn clock() -> Clock {
    let clocks = clocks();
    match Ticks::here() {
        Ticks::Counter => clocks.counter,
        Ticks::Clock => clocks.monotonic,
    }
}

const NANOSECONDS: NonZeroU64 = NonZeroU64::new(1_000_000_000).unwrap();

fn process(status: ProcessStatus) -> Process {
    match status {
        status if status.has_ended() => Process::Ended,
        status if status.is_stopped() => Process::Stopped,
        _ => Process::Running,
    }
}

/// The sentence of a cause that the rank `found_by` recorded.
fn explain(ranks: &[RankView], found_by: usize, words: &[u64]) -> String {
    let Some(cause) = Cause::from_words(words) else {
        return "the record of the cause is unreadable".to_owned();
    };
    let during = ranks[found_by].standing().record().map_or_else(|| "the job".to_owned(), Record::call);
    cause.into_error(&during, (usize::MAX, ranks.len())).to_string()
}

/// Ticks of the processor's counter in a second.
fn counter_rate() -> NonZeroU64 {
    static RATE: OnceLock<NonZeroU64> = OnceLock::new();
    *RATE.get_or_init(|| {
        let source = Ticks::here();
        let (ticks, time) = pair(source);
        std::thread::sleep(CALIBRATION);
        let (later_ticks, later_time) = pair(source);
        let (ticks, time) = (later_ticks.saturating_sub(ticks), later_time.saturating_sub(time).max(1));
        let rate = u128::from(ticks) * 1_000_000_000 / u128::from(time);
        u64::try_from(rate).ok().and_then(NonZeroU64::new).unwrap_or(NANOSECONDS)
    })
}

/// Both clocks at one moment: of several attempts, the one in which least time passed between them.
fn pair(source: Ticks) -> (u64, u64) {
    let attempt = |_| {
        let before = monotonic_ns();
        let ticks = source.now();
        let after = monotonic_ns();
        (after.saturating_sub(before), ticks, before + after.saturating_sub(before) / 2)
    };
    let (_, ticks, time) = (0..8).map(attempt).min().unwrap_or_default();
    (ticks, time)
}
