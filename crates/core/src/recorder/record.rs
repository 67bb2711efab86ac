//! One call of one rank: its words, and what they mean.

use std::num::NonZeroU64;
use std::time::Duration;

use crate::call::{CallHeader, HEADER_WORDS, Kind};
use crate::dtype::DType;
use crate::layout::{RECORD_WORDS, RECORDS};
use crate::select::{Algorithm, is_inline};

/// The word of a record that says how it ended: 0 not yet, 1 well and at once, else ticks, odd after a failure.
pub const ENDED: usize = 6;
/// The word of a record that says what the call waits on: 0 nothing that lasts.
pub const WAITS: usize = 7;

/// How ticks turn into times: what it is now, and ticks in a second.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Clock {
    /// Ticks now.
    pub now: u64,
    /// Ticks in a second.
    pub rate: NonZeroU64,
}

impl Clock {
    /// How long ago `ticks` were; zero for the future.
    pub fn ago(&self, ticks: u64) -> Duration {
        let (passed, rate) = (self.now.saturating_sub(ticks), self.rate.get());
        let nanoseconds = u128::from(passed % rate) * 1_000_000_000 / u128::from(rate);
        Duration::new(passed / rate, nanoseconds as u32)
    }
}

/// What became of a call. Times are before the snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// It goes on.
    Open,
    /// It was done so soon that nobody took the time: it was small and never had to sleep.
    AtOnce,
    /// It was done.
    Done(Duration),
    /// It failed.
    Failed(Duration),
}

/// What is missing while a call waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum WaitsOn {
    /// That the peer makes the same call.
    Arrival = 1,
    /// That the peer, which has begun the call, goes on with it.
    Data = 2,
    /// That the peer is done with earlier calls, whose memory is needed again.
    Credit = 3,
    /// That the peer sends.
    Message = 4,
    /// That the peer receives.
    Room = 5,
}

/// A wait that lasts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Waits {
    /// The rank that it waits for; the first of them, if there are several.
    pub peer: usize,
    /// What is missing.
    pub on: WaitsOn,
}

impl Waits {
    /// The word [`WAITS`].
    pub const fn to_word(self) -> u64 {
        (self.peer as u64) << 8 | self.on as u64
    }

    fn from_word(word: u64) -> Option<Self> {
        let on = match word as u8 {
            1 => WaitsOn::Arrival,
            2 => WaitsOn::Data,
            3 => WaitsOn::Credit,
            4 => WaitsOn::Message,
            5 => WaitsOn::Room,
            _ => return None,
        };
        Some(Self { peer: usize::try_from(word >> 8).ok()?, on })
    }
}

/// One call of one rank.
#[derive(Clone, PartialEq, Debug)]
pub struct Record {
    /// Its place in all that this rank recorded, from 1.
    pub serial: u64,
    /// The call's number, equal on all ranks; `None` for a message. The meeting at the start is number 0.
    pub number: Option<u64>,
    /// The call. A pre-multiplied sum has lost its scalar.
    pub header: CallHeader,
    /// How it is carried out; `None` for a message.
    pub algorithm: Option<Algorithm>,
    /// When it was begun, before the snapshot.
    pub begun: Duration,
    /// What became of it.
    pub end: End,
    /// What it waits on, if that lasts.
    pub waits: Option<Waits>,
}

impl Record {
    /// The words of a collective that begins: of `header`, carried out by `algorithm`, with this epoch, at `begun`.
    #[inline(always)]
    pub fn begin_collective(
        header: &[u64; HEADER_WORDS],
        algorithm: Algorithm,
        epoch: u64,
        begun: u64,
    ) -> [u64; RECORD_WORDS] {
        let algorithm = match algorithm {
            Algorithm::OneShot => 1,
            Algorithm::TwoShot => 2,
            Algorithm::Direct => 3,
        };
        // A call has windows, or parts, or neither.
        let extra = if header[4] != 0 { header[4] } else { header[2] << 32 | header[3] & 0xffff_ffff };
        [0, header[0] | algorithm << 24, header[1], epoch, extra, begun, 0, 0]
    }

    /// The words of a message that begins.
    pub fn begin_message(kind: Kind, dtype: DType, count: u64, begun: u64) -> [u64; RECORD_WORDS] {
        let (peer, tag, other) = match kind {
            Kind::Send { to, tag } => (to, tag, 0),
            Kind::Recv { from, tag } => (from, tag, 0),
            Kind::SendRecv { to, from, tag } => (to, tag, from),
            _ => (0, 0, 0),
        };
        let first = u64::from(kind.code()) | u64::from(dtype.code() + 1) << 8 | u64::from(peer) << 32;
        [0, first, count, u64::from(tag), u64::from(other), begun, 0, 0]
    }

    /// The word [`ENDED`] of a call that ended at `ticks`.
    #[inline(always)]
    pub const fn ended_word(ticks: u64, is_failed: bool) -> u64 {
        (ticks | 2) & !1 | is_failed as u64
    }

    /// The word [`ENDED`] of a call that was done at once.
    pub const AT_ONCE: u64 = 1;

    /// Reads a record; `None` if the words are none.
    pub fn from_words(words: &[u64; RECORD_WORDS], clock: &Clock) -> Option<Self> {
        let [serial, first, count, number, extra, begun, ended, waits] = *words;
        if serial == 0 {
            return None;
        }
        let end = match ended {
            0 => End::Open,
            Self::AT_ONCE => End::AtOnce,
            ticks if ticks & 1 == 1 => End::Failed(clock.ago(ticks)),
            ticks => End::Done(clock.ago(ticks)),
        };
        let (header, number, algorithm) = match message_header(first, count, number, extra) {
            Some(header) => (header, None, None),
            None => {
                let (header, algorithm) = collective_header(first, count, extra)?;
                (header, Some(number.checked_sub(1)?), Some(algorithm))
            }
        };
        let waits = if end == End::Open { Waits::from_word(waits) } else { None };
        Some(Self { serial, number, header, algorithm, begun: clock.ago(begun), end, waits })
    }

    /// The records of a rank, by number, from two readings of its ring one after the other: a record that changed between
    /// them, other than by what became of it, is left out.
    pub fn of_ring(first: &[u64], second: &[u64], clock: &Clock) -> Vec<Self> {
        let pairs = first.as_chunks::<RECORD_WORDS>().0.iter().zip(second.as_chunks::<RECORD_WORDS>().0);
        let mut records: Vec<Self> = pairs
            .enumerate()
            .filter(|(at, (before, after))| {
                before[..ENDED] == after[..ENDED] && after[0] % RECORDS as u64 == *at as u64
            })
            .filter_map(|(_, (_, words))| Self::from_words(words, clock))
            .collect();
        records.sort_by_key(|record| record.serial);
        let latest = records.last().map_or(0, |record| record.serial);
        records.retain(|record| latest - record.serial < RECORDS as u64);
        records
    }

    /// Whether the call goes on.
    pub fn is_open(&self) -> bool {
        self.end == End::Open
    }

    /// When it was done or failed; for one that was done at once, when it was begun.
    pub fn ended(&self) -> Option<Duration> {
        match self.end {
            End::Open => None,
            End::AtOnce => Some(self.begun),
            End::Done(ago) | End::Failed(ago) => Some(ago),
        }
    }

    /// How long it took, where that is known.
    pub fn took(&self) -> Option<Duration> {
        match self.end {
            End::Done(ago) | End::Failed(ago) => Some(self.begun.saturating_sub(ago)),
            End::Open | End::AtOnce => None,
        }
    }

    /// Bytes of this rank's part.
    pub fn bytes(&self) -> u64 {
        bytes_of(&self.header)
    }

    /// The tag of a message.
    pub fn tag(&self) -> Option<u32> {
        match self.header.kind {
            Kind::Send { tag, .. } | Kind::Recv { tag, .. } | Kind::SendRecv { tag, .. } => Some(tag),
            _ => None,
        }
    }

    /// The rank that it sends to.
    pub fn receiver(&self) -> Option<usize> {
        match self.header.kind {
            Kind::Send { to, .. } | Kind::SendRecv { to, .. } => Some(to as usize),
            _ => None,
        }
    }

    /// The rank that it receives from; `None` also for one that receives from any.
    pub fn sender(&self) -> Option<usize> {
        match self.header.kind {
            Kind::Recv { from, .. } | Kind::SendRecv { from, .. } if from != u32::MAX => Some(from as usize),
            _ => None,
        }
    }

    /// Whether both are the same call, as all ranks must make it.
    pub fn is_same_call(&self, other: &Self) -> bool {
        self.number.is_some() && self.number == other.number && self.header == other.header
    }

    /// The field's name of the way that it is carried out in a world of this size: `inline`, `two-shot`; `message`.
    pub fn way(&self, world_size: usize) -> &'static str {
        match self.algorithm {
            None => "message",
            Some(Algorithm::OneShot) if is_inline(self.header.kind, self.bytes() as usize, world_size) => {
                "inline"
            }
            Some(algorithm) => algorithm.name(),
        }
    }

    /// `all_reduce #812`, `recv from rank 1`, `the start of the job`.
    pub fn call(&self) -> String {
        match (self.number, self.header.kind) {
            (_, Kind::Send { to, .. }) => format!("send to rank {to}"),
            (_, Kind::Recv { from: u32::MAX, .. }) => "recv from any rank".to_owned(),
            (_, Kind::Recv { from, .. }) => format!("recv from rank {from}"),
            (_, Kind::SendRecv { to, from, .. }) => format!("send_recv to rank {to} and from rank {from}"),
            (Some(0), _) => "the start of the job".to_owned(),
            (number, kind) => format!("{} #{}", kind.name(), number.unwrap_or(0)),
        }
    }

    /// `f32, 4096, sum`; `f32, 4, tag 7`; empty where nothing is moved.
    pub fn arguments(&self) -> String {
        let arguments = self.header.to_string();
        match self.tag() {
            Some(tag) => format!("{arguments}, tag {tag}"),
            None => arguments,
        }
    }
}

/// `all_reduce #812 (f32, 4096, sum)`.
impl std::fmt::Display for Record {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let arguments = self.arguments();
        if arguments.is_empty() {
            return f.write_str(&self.call());
        }
        write!(f, "{} ({arguments})", self.call())
    }
}

/// Bytes of a rank's part of a call.
pub(super) fn bytes_of(header: &CallHeader) -> u64 {
    let element = header.dtype.map_or(0, |dtype| dtype.size() as u64);
    let buffers = if matches!(header.kind, Kind::AllReduceMulti { .. }) { header.parts } else { 1 };
    header.count.saturating_mul(element).saturating_mul(buffers)
}

fn message_header(first: u64, count: u64, tag: u64, other: u64) -> Option<CallHeader> {
    let [code, dtype, ..] = first.to_le_bytes();
    let (peer, tag) = ((first >> 32) as u32, tag as u32);
    let kind = [
        Kind::Send { to: peer, tag },
        Kind::Recv { from: peer, tag },
        Kind::SendRecv { to: peer, from: other as u32, tag },
    ];
    let kind = kind.into_iter().find(|kind| kind.code() == code)?;
    let dtype = DType::from_code(dtype.checked_sub(1)?)?;
    Some(CallHeader { dtype: Some(dtype), count, ..CallHeader::bare(kind) })
}

fn collective_header(first: u64, count: u64, extra: u64) -> Option<(CallHeader, Algorithm)> {
    let algorithm = match first.to_le_bytes()[3] {
        1 => Algorithm::OneShot,
        2 => Algorithm::TwoShot,
        3 => Algorithm::Direct,
        _ => return None,
    };
    Some((packed_header(first & !0xff00_0000, count, extra)?, algorithm))
}

/// The call of which `extra` holds the parts, or the windows.
pub(super) fn packed_header(first: u64, count: u64, extra: u64) -> Option<CallHeader> {
    let mut words = [first, count, 0, 0, extra, 1f64.to_bits(), 0, 0];
    let is_fused = |kind| matches!(kind, Kind::AllReduceRmsNorm { .. });
    let has_parts =
        |header: &CallHeader| header.kind.is_uneven() || header.kind.is_multi() || is_fused(header.kind);
    if !CallHeader::from_words(&words).as_ref().is_some_and(has_parts) {
        words[2..5].copy_from_slice(&[extra >> 32, extra & 0xffff_ffff, 0]);
    }
    CallHeader::from_words(&words)
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
