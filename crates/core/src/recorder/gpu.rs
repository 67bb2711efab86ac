//! The flight recorder of a GPU: its last calls, as the kernels themselves write them, replays of graphs among them.
//!
//! ```text
//! record, 8 words    epoch, form and grid │ begun │ kind, dtype, op, root │ count ║ epoch │ windows, or parts │ met │ ended
//! ```
//! The device writes a record into a ring in its own memory, with stores that nobody waits for. Who wants to know has the ring
//! copied while kernels run, or hang. So a record may be half of one call and half of another, but each half is whole: the
//! two must tell the same epoch, and one that belongs into this place. The two times at the end are stored later and never
//! cleared; those before the beginning are of a call 1,024 epochs ago.
//!
//! Times are nanoseconds of the device's clock. They become times before now by one pair of moments that was taken on both
//! clocks when the communicator was made: some ten microseconds apart, and what the clocks have drifted since. How long a call
//! took is not affected. Without that pair, times count from the last thing that the device recorded.

use std::time::Duration;

use super::gpu_message::{GpuMessage, GpuWork};
use super::record::{Clock, bytes_of, packed_header};
use crate::call::CallHeader;
use crate::device::Form;
use crate::device::layout::{
    HAS_CAPTURED, HAS_GPU, RECORD_WORDS, RECORDER_BYTES, RECORDER_KEPT, RECORDS, REPORT_CLOCKS, REPORT_MADE,
    REPORT_RECORDER, REPORT_WAITING, STATE_BYTES, STATE_EXPECTED_AT, STATE_LEFT_AT,
};
use crate::layout::Field;

/// One call on the GPU of one rank.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct GpuCall {
    /// The call's number, equal on all ranks. Calls on the host are counted apart.
    pub number: u32,
    /// The call. A pre-multiplied sum has lost its scalar.
    pub header: CallHeader,
    /// How it is carried out, where data is moved.
    pub form: Option<Form>,
    /// Blocks that move data.
    pub blocks: u32,
    /// When its kernel began, before the snapshot.
    pub begun: Duration,
    /// When this rank had heard from all others that they make it; `None`: not yet.
    pub met: Option<Duration>,
    /// When its kernel was done; `None`: it goes on. For small calls when the last rank was heard of, which is hardly before.
    pub ended: Option<Duration>,
}

/// One moment on two clocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Moment {
    /// Nanoseconds of the device.
    pub device_ns: u64,
    /// Ticks of the host.
    pub ticks: u64,
}

/// How current what is known of a GPU's calls is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reading {
    /// It is of now: the rank was asked and answered.
    Now,
    /// Its rank was not asked, or did not answer: it is as of the last time that it did.
    Earlier,
    /// The communicator failed or ended, and these were its last calls.
    Last,
}

/// What can be seen of the GPU of a rank.
#[derive(Clone, PartialEq, Debug)]
pub struct GpuView {
    /// How current it is.
    pub reading: Reading,
    /// The number of the latest call that its host has put into a stream; `None` if some went into graphs.
    pub made: Option<u32>,
    /// Its last calls, oldest first.
    pub calls: Vec<GpuCall>,
    /// The latest message to each rank and from each, by rank.
    pub messages: Vec<GpuMessage>,
}

/// For whom the GPU of a rank waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GpuWait {
    /// What it works on.
    pub work: GpuWork,
    /// The peer that it waits for; what is no rank stands for any.
    pub peer: usize,
}

impl GpuWait {
    /// What a kernel says in [`REPORT_WAITING`].
    pub fn from_word(word: u64) -> Option<Self> {
        let peer = usize::from((word as u16).checked_sub(1)?);
        Some(Self { work: GpuWork::new(word >> 16 & 0xffff, (word >> 32) as u32), peer })
    }
}

impl GpuView {
    /// What a memory tells of a GPU, whose kernels report into `page` and whose recorder is copied to `records`: for whom it waits, and its
    /// calls, if there is one. `fetch` copies the words of a field; `clock` is the rank's.
    ///
    /// # Errors
    /// Those of `fetch`.
    pub fn read<E>(
        (page, records): (Field, Field),
        clock: &Clock,
        fetch: &impl Fn(Field) -> Result<Vec<u64>, E>,
    ) -> Result<(Option<GpuWait>, Option<Self>), E> {
        let [device_ns, ticks] = REPORT_CLOCKS;
        let page = fetch(Field { bytes: 8 * (REPORT_MADE + 1), ..page })?;
        let word = |at: usize| page.get(at).copied().unwrap_or(0);
        let waits = GpuWait::from_word(word(REPORT_WAITING));
        let reading = match word(REPORT_RECORDER) {
            0 => return Ok((waits, None)),
            RECORDER_KEPT => Reading::Last,
            _ => Reading::Earlier,
        };
        let moment = Moment { device_ns: word(device_ns), ticks: word(ticks) };
        let copy = fetch(Field { bytes: RECORDER_BYTES, ..records })?;
        let calls = GpuCall::of_copy(&copy, moment, clock);
        let (made, messages) = (Self::made_of(word(REPORT_MADE)), GpuMessage::of_words(&copy, moment, clock));
        Ok((waits, Some(Self { reading, made, calls, messages })))
    }

    /// What a [`REPORT_MADE`] says.
    pub const fn made_of(word: u64) -> Option<u32> {
        if word & (HAS_GPU | HAS_CAPTURED) == HAS_GPU { Some(word as u32) } else { None }
    }

    /// Whether its host has made call `number`, if that is known.
    pub fn has_made(&self, number: u32) -> Option<bool> {
        Some(has_made(self.made?, number))
    }

    /// The latest call, if that is known.
    pub fn latest(&self) -> Option<&GpuCall> {
        if self.reading == Reading::Earlier { None } else { self.calls.last() }
    }

    /// The latest message to `peer`, or from it, if that is known.
    pub fn message(&self, peer: usize, is_sent: bool) -> Option<&GpuMessage> {
        let mut messages = self.messages.iter().filter(|_| self.reading != Reading::Earlier);
        messages.find(|message| (message.peer, message.is_sent) == (peer, is_sent))
    }
}

/// Whether a host whose latest call is `made` has made call `number`. Numbers wrap.
pub const fn has_made(made: u32, number: u32) -> bool {
    number.wrapping_sub(made).cast_signed() <= 0
}

impl Moment {
    /// How long ago the device's clock stood at `ns`; zero for the future.
    pub(super) fn ago(self, ns: u64, clock: &Clock) -> Duration {
        let since = clock.ago(self.ticks);
        match ns.checked_sub(self.device_ns) {
            Some(later) => since.saturating_sub(Duration::from_nanos(later)),
            None => since.saturating_add(Duration::from_nanos(self.device_ns - ns)),
        }
    }
}

impl GpuCall {
    /// The calls of a device's words and ring, copied in this order while it runs.
    pub fn of_copy(words: &[u64], moment: Moment, clock: &Clock) -> Vec<Self> {
        let Some((state, ring)) = words.split_at_checked(STATE_BYTES / 8) else { return Vec::new() };
        let moment =
            if moment.ticks == 0 { Moment { device_ns: newest(ring), ticks: clock.now } } else { moment };
        let epoch = state[0] as u32;
        let count = |at: usize| (state[at / 8] >> (at % 8 * 8)) as u32;
        let is_idle = count(STATE_LEFT_AT).wrapping_sub(count(STATE_EXPECTED_AT)) as i32 >= 0;
        // Epochs wrap: what counts is how far one is from the device's.
        let distance = |call: &Self| call.number.wrapping_sub(epoch) as i32;
        let records = ring.as_chunks::<RECORD_WORDS>().0.iter().take(RECORDS).enumerate();
        let mut calls: Vec<Self> =
            records.filter_map(|(at, words)| Self::from_words(words, at, moment, clock)).collect();
        calls.retain(|call| distance(call).unsigned_abs() <= RECORDS as u32);
        calls.sort_by_key(distance);
        let Some(latest) = calls.last().copied() else { return calls };
        calls.retain(|call| latest.number.wrapping_sub(call.number) < RECORDS as u32);
        for call in &mut calls {
            // Kernels follow each other, so only the last one may still run. The ring may be younger than the counts.
            let may_run = call.number == latest.number && (!is_idle || call.number != epoch);
            call.ended = match may_run {
                true => None,
                false => Some(call.ended.or(call.met).unwrap_or(call.begun)),
            };
        }
        calls
    }

    /// A record at place `at` of the ring; `None` if it is none, or torn.
    fn from_words(words: &[u64; RECORD_WORDS], at: usize, moment: Moment, clock: &Clock) -> Option<Self> {
        let [launch, begun, first, count, second, extra, met, ended] = *words;
        let number = (launch >> 32) as u32;
        if second >> 32 != launch >> 32 || number as usize % RECORDS != at {
            return None;
        }
        let header = packed_header(first, count, extra)?;
        let blocks = launch as u32 >> 8 & 0xfff;
        let form = Form::ALL.get(launch as usize & 0xff).copied();
        let since = |ns: u64| (ns >= begun).then(|| moment.ago(ns, clock));
        Some(Self {
            number,
            header,
            // What is a message for each pair of ranks has as many as each rank needs.
            form: form.filter(|_| blocks > 0 || header.kind.is_uneven()),
            blocks,
            begun: moment.ago(begun, clock),
            met: since(met),
            ended: since(ended.max(met)),
        })
    }

    /// Whether the call goes on.
    pub const fn is_open(&self) -> bool {
        self.ended.is_none()
    }

    /// How long it took, once it is done.
    pub fn took(&self) -> Option<Duration> {
        Some(self.begun.saturating_sub(self.ended?))
    }

    /// Bytes of this rank's part.
    pub fn bytes(&self) -> u64 {
        bytes_of(&self.header)
    }

    /// Whether both are the same call, as all ranks must make it.
    pub fn is_same_call(&self, other: &Self) -> bool {
        self.number == other.number && self.header == other.header
    }

    /// How many calls this one is behind `other`; negative if it comes after it.
    pub const fn behind(&self, other: &Self) -> i32 {
        other.number.wrapping_sub(self.number) as i32
    }

    /// The form's name; `headers` where no data is moved.
    pub fn way(&self) -> &'static str {
        self.form.map_or("headers", Form::name)
    }

    /// `all_reduce #812`.
    pub fn call(&self) -> String {
        format!("{} #{}", self.header.kind.name(), self.number)
    }
}

/// The last time that any record tells.
fn newest(ring: &[u64]) -> u64 {
    let times = |record: &[u64; RECORD_WORDS]| record[1].max(record[6]).max(record[7]);
    ring.as_chunks::<RECORD_WORDS>().0.iter().map(times).max().unwrap_or(0)
}

/// `all_reduce #812 (f32, 4096, sum)`.
impl std::fmt::Display for GpuCall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.call())?;
        match self.header.to_string() {
            arguments if arguments.is_empty() => Ok(()),
            arguments => write!(f, " ({arguments})"),
        }
    }
}

#[cfg(test)]
#[path = "gpu_tests.rs"]
mod tests;
