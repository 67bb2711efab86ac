//! All that can be seen of a communicator at one moment, read from its shared memory.

use std::time::Duration;

use super::gpu::{GpuView, GpuWait};
use super::label::{JobLabel, Presence, RankLabel, TickSource};
use super::record::{Clock, Record};
use crate::error::{Error, Result};
use crate::layout::{ControlLayout, Field};

/// What the system says of a process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Process {
    /// It runs, or could.
    Running,
    /// It is stopped, by a signal or a debugger.
    Stopped,
    /// It is gone.
    Ended,
    /// The system does not tell.
    Unknown,
}

/// Why a communicator failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// The rank that found out.
    pub found_by: usize,
    /// The first cause, as its error says it.
    pub sentence: String,
}

/// What can be seen of a rank.
#[derive(Clone, PartialEq, Debug)]
pub struct RankView {
    /// The rank.
    pub rank: usize,
    /// Its process.
    pub pid: u32,
    /// When its process started, as the system tells it.
    pub started: u64,
    /// Whether it takes part.
    pub presence: Presence,
    /// What the system says of its process. Not in the memory: whoever reads it fills this in.
    pub process: Process,
    /// Whether it records its calls.
    pub is_recording: bool,
    /// Its last calls, oldest first.
    pub records: Vec<Record>,
    /// For whom a kernel of its GPU has waited for half a second or longer.
    pub gpu_waits: Option<GpuWait>,
    /// The calls on its GPU, if it works on one. What lies in the memory is as of the last time that somebody asked; whoever asks
    /// for this snapshot says so in [`GpuView::reading`].
    pub gpu: Option<GpuView>,
    /// Its devices, if it has several, by seat. They lie in memory of their own: whoever reads that fills this in.
    pub devices: Vec<SeatView>,
}

/// What can be seen of one of several devices of a rank: the parts that it takes in calls on a buffer of each.
#[derive(Clone, PartialEq, Debug)]
pub struct SeatView {
    /// Its number among the devices of all ranks, rank after rank.
    pub seat: usize,
    /// Its number in the process of the rank.
    pub ordinal: u32,
    /// For whom a kernel has waited for half a second or longer: a seat.
    pub waits: Option<GpuWait>,
    /// Its calls, which are counted apart from those of the rank.
    pub gpu: Option<GpuView>,
}

/// A communicator at one moment.
#[derive(Clone, PartialEq, Debug)]
pub struct Snapshot {
    /// The job's name.
    pub job: String,
    /// Which start of the job.
    pub generation: u32,
    /// The host's name.
    pub host: String,
    /// How long it has existed.
    pub age: Duration,
    /// Why it failed, if it did.
    pub failure: Option<Failure>,
    /// Its ranks.
    pub ranks: Vec<RankView>,
}

/// A clock for each source of ticks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Clocks {
    /// The processor's counter.
    pub counter: Clock,
    /// The monotonic clock.
    pub monotonic: Clock,
}

impl Clocks {
    /// That of this source.
    pub const fn of(&self, source: TickSource) -> &Clock {
        match source {
            TickSource::Counter => &self.counter,
            TickSource::Clock => &self.monotonic,
        }
    }
}

impl Snapshot {
    /// Reads a control memory of `bytes`. `fetch` copies the words of a field, which lies within; `explain` turns the
    /// record of a cause, which the rank of that number wrote, into a sentence.
    ///
    /// # Errors
    /// [`Error::Malformed`]: it is no control memory of this version; and those of `fetch`.
    pub fn read<E: From<Error>>(
        bytes: usize,
        clocks: &Clocks,
        fetch: impl Fn(Field) -> Result<Vec<u64>, E>,
        explain: impl Fn(&[RankView], usize, &[u64]) -> String,
    ) -> Result<Self, E> {
        // The label's place does not depend on the number of ranks.
        let label = ControlLayout::new(1).job();
        let too_short = |expected: usize| Error::Malformed {
            what: "control memory",
            expected: format!("{expected} bytes"),
            got: bytes.to_string(),
        };
        if bytes < label.end() {
            return Err(too_short(label.end()).into());
        }
        let job = JobLabel::from_words(&fetch(label)?)?;
        let layout = ControlLayout::new(job.ranks);
        if bytes < layout.total_bytes() {
            return Err(too_short(layout.total_bytes()).into());
        }
        let mut ranks = Vec::with_capacity(job.ranks);
        let mut first_source = TickSource::Counter;
        for rank in 0..job.ranks {
            let fields = layout.rank(rank);
            let label = RankLabel::from_words(&fetch(fields.identity)?);
            if rank == 0 {
                first_source = label.ticks;
            }
            let records = match label.presence {
                Presence::Absent => Vec::new(),
                _ => {
                    Record::of_ring(&fetch(fields.records)?, &fetch(fields.records)?, clocks.of(label.ticks))
                }
            };
            let on_gpu = (fields.gpu, fields.gpu_records);
            let (gpu_waits, gpu) = GpuView::read(on_gpu, clocks.of(label.ticks), &fetch)?;
            ranks.push(RankView {
                rank,
                pid: label.pid,
                started: label.started,
                presence: label.presence,
                process: Process::Unknown,
                is_recording: label.is_recording,
                records,
                gpu_waits,
                gpu,
                devices: Vec::new(),
            });
        }
        let abort = fetch(Field { offset: layout.abort().offset, bytes: 8 })?;
        let failure = match abort.first().and_then(|word| (*word as u32).checked_sub(1)) {
            None => None,
            Some(rank) => {
                let found_by = rank as usize;
                let sentence = match found_by < job.ranks {
                    true => explain(&ranks, found_by, &fetch(layout.rank(found_by).cause)?),
                    false => "the record of the cause is unreadable".to_owned(),
                };
                Some(Failure { found_by, sentence })
            }
        };
        let age = clocks.of(first_source).ago(job.created);
        Ok(Self { job: job.job, generation: job.generation, host: job.host, age, failure, ranks })
    }

    /// Whether any rank may still do something.
    pub fn is_live(&self) -> bool {
        let may_act = |rank: &RankView| {
            rank.process != Process::Ended && matches!(rank.presence, Presence::Here | Presence::Absent)
        };
        self.ranks.iter().any(may_act)
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use proptest::prelude::*;

    use super::super::gpu::Reading;
    use super::*;
    use crate::call::{CallHeader, Kind};
    use crate::device::layout::{
        self as device, RECORDER_KEPT, RECORDER_LOST, RECORDER_SERVES, REPORT_CLOCKS, REPORT_RECORDER,
        REPORT_WAITING, STATE_BYTES,
    };
    use crate::layout::{RECORD_WORDS, RECORDS};
    use crate::select::Algorithm;

    const CLOCK: Clock = Clock { now: 10_000, rate: NonZeroU64::new(1000).unwrap() };
    const CLOCKS: Clocks = Clocks { counter: CLOCK, monotonic: CLOCK };

    fn memory(ranks: usize) -> Vec<u64> {
        let layout = ControlLayout::new(ranks);
        let mut words = vec![0; layout.total_bytes() / 8];
        let mut put = |field: Field, content: &[u64]| {
            words[field.offset / 8..][..content.len()].copy_from_slice(content);
        };
        let label =
            JobLabel { ranks, generation: 3, created: 4000, job: "run-7".into(), host: "gpu07".into() };
        put(layout.job(), &label.to_words());
        for rank in 0..ranks {
            let fields = layout.rank(rank);
            let label = RankLabel {
                presence: Presence::Here,
                pid: 100 + rank as u32,
                started: 5,
                ticks: TickSource::Counter,
                is_recording: true,
            };
            put(fields.identity, &label.to_words());
            let header = CallHeader::bare(Kind::Barrier).to_words();
            let mut record = Record::begin_collective(&header, Algorithm::OneShot, 2, 9000);
            record[0] = 1;
            let at = Field { offset: fields.records.offset + RECORD_WORDS * 8, ..fields.records };
            put(at, &record);
        }
        words
    }

    fn read(words: &[u64]) -> Result<Snapshot> {
        let fetch = |field: Field| Ok(words[field.offset / 8..field.end() / 8].to_vec());
        Snapshot::read(words.len() * 8, &CLOCKS, fetch, |_, rank, cause| format!("{rank} {}", cause[0]))
    }

    #[test]
    fn a_memory_tells_its_job_its_ranks_and_their_calls() {
        let mut words = memory(3);
        let snapshot = read(&words).unwrap();
        assert_eq!((snapshot.job.as_str(), snapshot.host.as_str()), ("run-7", "gpu07"));
        assert_eq!((snapshot.generation, snapshot.age), (3, Duration::from_secs(6)));
        assert_eq!(snapshot.failure, None);
        let calls: Vec<_> =
            snapshot.ranks.iter().map(|rank| (rank.pid, rank.records[0].to_string())).collect();
        assert_eq!(calls, [100, 101, 102].map(|pid| (pid, "barrier #1".to_owned())));
        words[0] = 2;
        words[ControlLayout::new(3).rank(1).cause.offset / 8] = 66;
        let failure = read(&words).unwrap().failure;
        assert_eq!(failure, Some(Failure { found_by: 1, sentence: "1 66".into() }));
        words[0] = 99;
        assert_eq!(read(&words).unwrap().failure.unwrap().found_by, 98);
    }

    #[test]
    fn what_a_gpu_did_is_told_with_how_current_that_is() {
        let mut words = memory(2);
        assert!(read(&words).unwrap().ranks.iter().all(|rank| rank.gpu.is_none()));
        let fields = ControlLayout::new(2).rank(1);
        let (page, copy) = (fields.gpu.offset / 8, fields.gpu_records.offset / 8);
        words[page + REPORT_WAITING] = 1 << 32 | 1;
        let header = CallHeader::bare(Kind::Barrier).to_words();
        words[copy] = 1;
        words[copy + STATE_BYTES / 8 + device::RECORD_WORDS..][..6].copy_from_slice(&[
            1 << 32,
            7,
            header[0],
            header[1],
            1 << 32,
            0,
        ]);
        // By the clock of the host it is 10 s; at 4 s the one of the device stood where the call began.
        (words[page + REPORT_CLOCKS[0]], words[page + REPORT_CLOCKS[1]]) = (7, 4000);
        for (state, reading) in [
            (RECORDER_SERVES, Reading::Earlier),
            (RECORDER_KEPT, Reading::Last),
            (RECORDER_LOST, Reading::Earlier),
        ] {
            words[page + REPORT_RECORDER] = state;
            let snapshot = read(&words).unwrap();
            let view = snapshot.ranks[1].gpu.as_ref().unwrap();
            assert_eq!((view.reading, view.calls.len()), (reading, 1));
            assert_eq!(view.latest().is_some(), reading == Reading::Last);
            assert_eq!(
                (view.calls[0].to_string(), view.calls[0].begun),
                ("barrier #1".into(), Duration::from_secs(6))
            );
            assert_eq!(
                snapshot.ranks[1].gpu_waits,
                Some(GpuWait { work: crate::recorder::GpuWork::Call(1), peer: 0 })
            );
            assert!(snapshot.ranks[0].gpu.is_none());
        }
    }

    #[test]
    fn a_memory_shorter_than_it_says_is_refused() {
        let words = memory(2);
        let error = read(&words[..words.len() - 512]).unwrap_err().to_string();
        assert!(error.starts_with("malformed control memory: expected"), "{error}");
        assert!(read(&words[..10]).is_err() && read(&[]).is_err());
    }

    proptest! {
        #[test]
        fn no_content_does_harm(noise: Vec<(u16, u64)>, clock: (u64, u64)) {
            let mut words = memory(2);
            // Everything that is read lies in the first pages of each part, and in its last.
            let layout = ControlLayout::new(2);
            let parts = [0, 1].map(|rank| [layout.rank(rank).produced, layout.rank(rank).gpu]);
            let parts: Vec<usize> = parts.concat().iter().map(|field| field.offset).chain([0]).collect();
            for rank in 0..2 {
                words[layout.rank(rank).gpu.offset / 8 + REPORT_RECORDER] = 1;
            }
            for (at, value) in noise {
                let near = usize::from(at) % (RECORDS * RECORD_WORDS + 600);
                words[parts[usize::from(at) % parts.len()] / 8 + near] = value;
            }
            let clock = Clock { now: clock.0, rate: NonZeroU64::new(clock.1).unwrap_or(NonZeroU64::MIN) };
            let clocks = Clocks { counter: clock, monotonic: clock };
            let fetch = |field: Field| -> Result<Vec<u64>> {
                Ok(words.get(field.offset / 8..field.end() / 8).ok_or("outside").unwrap().to_vec())
            };
            if let Ok(snapshot) = Snapshot::read(words.len() * 8, &clocks, fetch, |_, _, _| String::new()) {
                prop_assert!(!super::super::why(&snapshot).is_empty());
            }
        }
    }
}
