//! Messages between GPUs, as kernels tell of them: the latest of each direction of each pair of ranks, and what a wait is for.
//!
//! ```text
//! record, 8 words    number, tag │ begun │ bytes │ dtype, kind ║ number │ ended │ – │ –
//! ```
//! Numbers count the messages of a pair of ranks in one direction, from 1, and are equal on both. A record that is torn tells other
//! numbers in its halves. A time of an end before the beginning is that of the message before.

use std::fmt;
use std::time::Duration;

use super::gpu::Moment;
use super::record::Clock;
use crate::call::{CallHeader, Kind};
use crate::device::layout::{MAX_RANKS, MESSAGE_RECORD_WORDS, MESSAGE_RECORDS_AT, STATE_BYTES};
use crate::dtype::DType;

/// What a kernel works on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GpuWork {
    /// The call with this number.
    Call(u32),
    /// A message with this tag to a peer.
    Send(u32),
    /// A message with this tag from a peer.
    Recv(u32),
}

impl GpuWork {
    /// From the code and the number (or tag) that a kernel tells.
    pub const fn new(code: u64, number: u32) -> Self {
        match code {
            1 => Self::Send(number),
            2 => Self::Recv(number),
            _ => Self::Call(number),
        }
    }

    /// `call #812`, `send to rank 1 (tag 7)`; a peer that is no rank stands for any.
    pub fn describe(self, peer: usize, ranks: usize) -> String {
        match self {
            Self::Call(number) => format!("call #{number}"),
            Self::Send(tag) => format!("send to rank {peer} (tag {tag})"),
            Self::Recv(tag) if peer >= ranks => format!("recv from any rank (tag {tag})"),
            Self::Recv(tag) => format!("recv from rank {peer} (tag {tag})"),
        }
    }
}

/// What a message says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MessageHeader {
    /// The tag; 0 of a part of a collective.
    pub tag: u32,
    /// The type of its elements, if it is one.
    pub dtype: Option<DType>,
    /// The code of the collective that it is a part of; 0 of a message of its own.
    pub kind: u8,
    /// Its length.
    pub bytes: u64,
}

impl MessageHeader {
    /// From the word with dtype and kind, and the others.
    pub fn new(tag: u32, facts: u32, bytes: u64) -> Self {
        let [dtype, kind, ..] = facts.to_le_bytes();
        Self { tag, dtype: DType::from_code(dtype), kind, bytes }
    }

    /// The collective that it is a part of, or `itself`.
    pub fn name(&self, itself: &'static str) -> &'static str {
        let uneven = [Kind::AllToAllV, Kind::AllToAllCounted];
        let kinds = [Kind::GatherV { root: 0 }, Kind::ScatterV { root: 0 }].into_iter().chain(uneven);
        let code = |kind: &Kind| CallHeader::bare(*kind).to_words()[0] as u8;
        kinds.filter(|kind| code(kind) == self.kind).map(|kind| kind.name()).next().unwrap_or(itself)
    }
}

/// `f32, 4, tag 7`; a part of a collective has no tag.
impl fmt::Display for MessageHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.dtype {
            Some(dtype) => write!(f, "{dtype}, {}", self.bytes / dtype.size() as u64)?,
            None => write!(f, "unknown type, {} bytes", self.bytes)?,
        }
        if self.kind == 0 { write!(f, ", tag {}", self.tag) } else { Ok(()) }
    }
}

/// The latest message of a GPU to one rank, or from one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GpuMessage {
    /// Whether it goes to the peer.
    pub is_sent: bool,
    /// The other end.
    pub peer: usize,
    /// It is so manieth of this pair of ranks in this direction.
    pub number: u32,
    /// What it is.
    pub header: MessageHeader,
    /// When its kernel came to it, before the snapshot.
    pub begun: Duration,
    /// When its kernel was through with it; `None`: it goes on. Of a large one, parts may still be under way.
    pub ended: Option<Duration>,
}

impl GpuMessage {
    /// `send`, `recv`, or the collective that it is a part of.
    pub fn name(&self) -> &'static str {
        self.header.name(if self.is_sent { "send" } else { "recv" })
    }

    /// Those that the words of a device tell, by peer.
    pub fn of_words(state: &[u64], moment: Moment, clock: &Clock) -> Vec<Self> {
        let area = state.get(MESSAGE_RECORDS_AT / 8..STATE_BYTES / 8).unwrap_or(&[]);
        let records = area.as_chunks::<MESSAGE_RECORD_WORDS>().0.iter().take(2 * MAX_RANKS).enumerate();
        records.filter_map(|(at, words)| Self::from_words(words, at, moment, clock)).collect()
    }

    fn from_words(
        words: &[u64; MESSAGE_RECORD_WORDS],
        at: usize,
        moment: Moment,
        clock: &Clock,
    ) -> Option<Self> {
        let [first, begun, bytes, facts, second, ended, ..] = *words;
        if first >> 32 == 0 || first >> 32 != second >> 32 {
            return None;
        }
        Some(Self {
            is_sent: at % 2 == 1,
            peer: at / 2,
            number: (first >> 32) as u32,
            header: MessageHeader::new(first as u32, facts as u32, bytes),
            begun: moment.ago(begun, clock),
            ended: (ended >= begun).then(|| moment.ago(ended, clock)),
        })
    }
}

/// `send to rank 1 #5 (f32, 4096, tag 7)`.
impl fmt::Display for GpuMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = if self.is_sent { "to" } else { "from" };
        write!(f, "{} {way} rank {} #{} ({})", self.name(), self.peer, self.number, self.header)
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::*;

    const CLOCK: Clock = Clock { now: 10_000_000_000, rate: NonZeroU64::new(1_000_000_000).unwrap() };
    const MOMENT: Moment = Moment { device_ns: 0, ticks: 0 };

    #[test]
    fn the_latest_message_of_each_direction_is_told_unless_it_is_torn() {
        let mut words = vec![0; STATE_BYTES / 8];
        let at = |peer: usize, is_sent: bool| {
            MESSAGE_RECORDS_AT / 8 + (2 * peer + usize::from(is_sent)) * MESSAGE_RECORD_WORDS
        };
        assert!(GpuMessage::of_words(&words, MOMENT, &CLOCK).is_empty());
        let bf16 = u64::from(DType::BF16.code());
        words[at(3, true)..][..6].copy_from_slice(&[5 << 32 | 7, 4_000_000_000, 64, bf16, 5 << 32, 9]);
        words[at(0, false)..][..6].copy_from_slice(&[
            1 << 32,
            1_000_000_000,
            8,
            bf16 | 20 << 8,
            1 << 32,
            2_000_000_000,
        ]);
        words[at(1, false)..][..6].copy_from_slice(&[2 << 32, 1, 8, bf16, 1 << 32, 2]);
        let [received, sent] = GpuMessage::of_words(&words, MOMENT, &CLOCK).try_into().unwrap();
        assert_eq!((sent.is_sent, sent.peer, sent.number, sent.ended), (true, 3, 5, None));
        assert_eq!((sent.header.to_string(), sent.begun), ("bf16, 32, tag 7".into(), Duration::from_secs(6)));
        assert_eq!((received.is_sent, received.peer), (false, 0));
        assert_eq!(sent.to_string(), "send to rank 3 #5 (bf16, 32, tag 7)");
        assert_eq!(received.to_string(), "all_to_all_v from rank 0 #1 (bf16, 4)");
        assert_eq!((received.begun, received.ended), (Duration::from_secs(9), Some(Duration::from_secs(8))));
        assert_eq!(
            (received.header.name("recv"), received.header.to_string().as_str()),
            ("all_to_all_v", "bf16, 4")
        );
    }
}
