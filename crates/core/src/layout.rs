//! Where everything lies in the shared memory of one host's ranks. Computed once, here; whoever touches the memory
//! takes named fields from it and does no arithmetic of its own.
//!
//! ```text
//! page 0            the abort word │ what job this is
//! per rank          produced │ reduced │ consumed │ liveness │ cause │ call slots │ identity │ records │
//!                   staging in │ staging out │ channels │ gpu │ gpu records
//! ```
//! What the memory says of itself (job, identity, records) is enough to read it from another process:
//! [`recorder`](crate::recorder).
//!
//! Lines are 128 bytes apart: processors fetch neighbouring 64-byte lines in pairs, and two writers must not share one.

use crate::device::layout::RECORDER_BYTES;
use crate::error::{Error, Result};

/// Distance between words that different ranks write.
pub const LINE: usize = 128;
/// The most ranks of one host: a chunk then has a line for each.
pub const MAX_LOCAL_RANKS: usize = 1024;
/// Size of a page; staging starts on one.
pub const PAGE: usize = 4096;
/// Calls that a rank may be ahead of its slowest peer.
pub const CALL_SLOTS: usize = 64;
/// 64-bit words in a call slot: epoch, chain, [`INLINE_WORDS`] of data, then the header on a line of its own.
pub const SLOT_WORDS: usize = 16;
/// Words of data that travel in the slot itself.
pub const INLINE_WORDS: usize = 6;
/// Bytes of data that travel in the slot itself, on the line that announces them.
pub const INLINE_BYTES: usize = INLINE_WORDS * 8;
/// Payload word (after the epoch) that holds the chain.
pub const SLOT_CHAIN: usize = 0;
/// First payload word of the inline data.
pub const SLOT_DATA: usize = 1;
/// First payload word of the call header.
pub const SLOT_HEADER: usize = 7;
/// Room for the first cause of a failure, as encoded bytes behind a length word.
pub const CAUSE_BYTES: usize = 2048;
/// Changes whenever anything here or in [`recorder`](crate::recorder) does: readers of another one do not guess.
pub const LAYOUT_VERSION: u64 = 4;
/// The words in which the memory says what job it belongs to, as [`recorder::JobLabel`](crate::recorder::JobLabel).
pub const JOB_WORDS: usize = 64;
/// The words in which a rank says who it is, as [`recorder::RankLabel`](crate::recorder::RankLabel).
pub const IDENTITY_WORDS: usize = 16;
/// Calls that the flight recorder of a rank keeps, a power of two.
pub const RECORDS: usize = 1024;
/// 64-bit words in a record: one line.
pub const RECORD_WORDS: usize = 8;
/// Chunks of staging, a power of two: steps that a rank may be ahead of its slowest peer.
pub const CHUNKS: usize = 8;
/// Bytes in a chunk: what one rank stages in one step. Measured on two Zen 5 cores with 1 MiB of L2 each
/// (`unisono bench all_reduce`): 32 KiB pays for synchronisation, 256 KiB falls out of the cache.
pub const CHUNK_BYTES: usize = 64 * 1024;

/// The largest ring of a channel: what a sender may be ahead of its receiver.
pub const MAX_RING_BYTES: usize = 64 * 1024;

/// Words beside the head of a channel: the number of the latest message, two of its header, and its first bytes.
pub const LATEST_WORDS: usize = 7;

/// A part of the shared memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Field {
    /// Bytes from the start of the mapping.
    pub offset: usize,
    /// Length in bytes.
    pub bytes: usize,
}

impl Field {
    /// The first byte after it.
    pub const fn end(self) -> usize {
        self.offset + self.bytes
    }
}

/// The fields of one rank. Only that rank writes them, unless said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RankFields {
    /// `u64`: steps whose input chunk is staged.
    pub produced: Field,
    /// `u64`: steps whose reduced chunk is staged.
    pub reduced: Field,
    /// `u64` × 3: the trail (calls completed and chain, packed), steps whose chunks of all peers were read, calls completed.
    pub consumed: Field,
    /// `u64` heartbeat; at byte 8 the `u32` fate, which peers may write; at byte 64 the `u32` count of sleepers, which they do.
    pub liveness: Field,
    /// Why this rank raised the abort word.
    pub cause: Field,
    /// The ring of [`CALL_SLOTS`] call slots.
    pub slots: Field,
    /// [`IDENTITY_WORDS`] × `u64`: who this rank is, and whether it is still there.
    pub identity: Field,
    /// [`RECORDS`] × [`RECORD_WORDS`] × `u64`: the flight recorder.
    pub records: Field,
    /// Staged input: [`CHUNKS`] × [`CHUNK_BYTES`].
    pub staging_in: Field,
    /// Staged results: [`CHUNKS`] × [`CHUNK_BYTES`].
    pub staging_out: Field,
    /// Channels from every rank to this one, by sender: see [`ControlLayout::channel`].
    pub channels: Field,
    /// A page that the kernels of this rank's GPU write: what they report. See [`device`](crate::device). One word of it,
    /// a request, is written by readers.
    pub gpu: Field,
    /// The recorder of this rank's GPU, as it was when somebody last asked for it.
    pub gpu_records: Field,
}

impl RankFields {
    /// All fields, in order.
    pub const fn all(&self) -> [Field; 13] {
        [
            self.produced,
            self.reduced,
            self.consumed,
            self.liveness,
            self.cause,
            self.slots,
            self.identity,
            self.records,
            self.staging_in,
            self.staging_out,
            self.channels,
            self.gpu,
            self.gpu_records,
        ]
    }
}

/// A channel: messages from one rank to another, in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChannelFields {
    /// `u64`, written by the sender: bytes written so far. Behind it, on the same 64 bytes, [`LATEST_WORDS`] × `u64`:
    /// how the latest message begins.
    pub head: Field,
    /// `u64`, written by the receiver: bytes read so far.
    pub tail: Field,
    /// The bytes, a power of two of them.
    pub ring: Field,
}

/// The shared memory of `ranks` ranks of one host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ControlLayout {
    ranks: usize,
}

impl ControlLayout {
    /// The layout for this number of local ranks, which must be one that [`ControlLayout::check`] accepts.
    pub const fn new(ranks: usize) -> Self {
        Self { ranks }
    }

    /// Refuses more ranks than a host can have.
    ///
    /// # Errors
    /// [`Error::TooLarge`].
    pub fn check(ranks: usize) -> Result<()> {
        let (got, cap) = (ranks as u64, MAX_LOCAL_RANKS as u64);
        if got > cap {
            Err(Error::TooLarge { what: "number of ranks of one host", got, cap })
        } else {
            Ok(())
        }
    }

    /// `u32`, any rank may write it once: 0, or 1 + the local rank that recorded the first cause.
    pub const fn abort(&self) -> Field {
        Field { offset: 0, bytes: 4 }
    }

    /// [`JOB_WORDS`] × `u64`, written by rank 0: what job this is.
    pub const fn job(&self) -> Field {
        Field { offset: LINE, bytes: JOB_WORDS * 8 }
    }

    /// Bytes of one rank's part; staging at most 16 MiB of it.
    pub const fn rank_bytes(&self) -> usize {
        self.rank_at(0).gpu_records.end()
    }

    /// Bytes of the ring of one channel: together about 1 MiB per rank, however many ranks there are.
    pub const fn ring_bytes(&self) -> usize {
        let share = (1 << 20) / self.ranks.next_power_of_two();
        if share > MAX_RING_BYTES {
            MAX_RING_BYTES
        } else if share < PAGE {
            PAGE
        } else {
            share
        }
    }

    const fn channel_bytes(&self) -> usize {
        2 * LINE + self.ring_bytes()
    }

    /// The channel from `sender` to `receiver`, both below the number of ranks. It lies in the receiver's part.
    pub fn channel(&self, sender: usize, receiver: usize) -> ChannelFields {
        assert!(sender < self.ranks, "sender {sender} of {}", self.ranks);
        let base = self.rank(receiver).channels.offset + sender * self.channel_bytes();
        let ring = Field { offset: base + 2 * LINE, bytes: self.ring_bytes() };
        ChannelFields { head: line(base, 0), tail: line(base, 1), ring }
    }

    /// Bytes of the whole mapping.
    pub const fn total_bytes(&self) -> usize {
        PAGE + self.ranks * self.rank_bytes()
    }

    /// The fields of local rank `rank`, which must be below the number of ranks.
    pub fn rank(&self, rank: usize) -> RankFields {
        assert!(rank < self.ranks, "local rank {rank} of {}", self.ranks);
        self.rank_at(PAGE + rank * self.rank_bytes())
    }

    const fn rank_at(&self, base: usize) -> RankFields {
        let cause = Field { offset: base + 4 * LINE, bytes: CAUSE_BYTES };
        let slots = Field { offset: cause.end(), bytes: CALL_SLOTS * SLOT_WORDS * 8 };
        let identity = Field { offset: slots.end(), bytes: IDENTITY_WORDS * 8 };
        let records = Field {
            offset: base + (identity.end() - base).next_multiple_of(PAGE),
            bytes: RECORDS * RECORD_WORDS * 8,
        };
        let staging_in = Field {
            offset: base + (records.end() - base).next_multiple_of(PAGE),
            bytes: CHUNKS * CHUNK_BYTES,
        };
        let staging_out = Field { offset: staging_in.end(), bytes: CHUNKS * CHUNK_BYTES };
        let channels = Field {
            offset: staging_out.end(),
            bytes: (self.ranks * self.channel_bytes()).next_multiple_of(PAGE),
        };
        let gpu = Field { offset: channels.end(), bytes: PAGE };
        let gpu_records = Field { offset: gpu.end(), bytes: RECORDER_BYTES.next_multiple_of(PAGE) };
        RankFields {
            produced: line(base, 0),
            reduced: line(base, 1),
            consumed: line(base, 2),
            liveness: line(base, 3),
            cause,
            slots,
            identity,
            records,
            staging_in,
            staging_out,
            channels,
            gpu,
            gpu_records,
        }
    }
}

/// Signal slots of each rank in a window.
pub const SIGNAL_SLOTS: usize = 64;
/// Bytes from one signal slot to the next.
pub const SIGNAL_STRIDE: usize = 64;

/// The memory of a window: for each rank a page of signal slots, a page with the count of who sleeps on them, and its copy
/// of the elements, in whole pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WindowLayout {
    ranks: usize,
    bytes: usize,
    stride: usize,
}

impl WindowLayout {
    /// The layout for copies of `count` elements of `size` bytes.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if no address space has room for it.
    pub fn new(ranks: usize, count: usize, size: usize) -> Result<Self> {
        let too_large = || {
            let cap = (isize::MAX as usize / size.max(1) / ranks.max(1)) as u64;
            Error::TooLarge { what: "window", got: count as u64, cap }
        };
        let bytes = count.checked_mul(size).ok_or_else(too_large)?;
        let stride = bytes.checked_next_multiple_of(PAGE).and_then(|bytes| bytes.checked_add(2 * PAGE));
        let total = stride.and_then(|stride| stride.checked_mul(ranks));
        match (stride, total) {
            (Some(stride), Some(total)) if isize::try_from(total).is_ok() => {
                Ok(Self { ranks, bytes, stride })
            }
            _ => Err(too_large()),
        }
    }

    /// Bytes of one copy, as they were asked for.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes of the whole mapping.
    pub const fn total_bytes(&self) -> usize {
        self.ranks * self.stride
    }

    /// The signal slots of `rank`: a `u64` every [`SIGNAL_STRIDE`] bytes, written by peers.
    pub const fn signals(&self, rank: usize) -> Field {
        Field { offset: rank * self.stride, bytes: SIGNAL_SLOTS * SIGNAL_STRIDE }
    }

    /// `u32`: how many threads of `rank` sleep on its slots.
    pub const fn sleepers(&self, rank: usize) -> Field {
        Field { offset: rank * self.stride + PAGE, bytes: 4 }
    }

    /// Where a rank's signal slots lie behind its copy, if that lies in memory of a device: `u32`s there, at the same places.
    pub const fn device_signals(&self) -> Field {
        Field { offset: self.stride - 2 * PAGE, bytes: SIGNAL_SLOTS * SIGNAL_STRIDE }
    }

    /// Bytes of one copy in memory of a device, with its signal slots.
    pub const fn device_bytes(&self) -> usize {
        self.device_signals().end()
    }

    /// The copy of `rank`, in whole pages.
    pub const fn copy(&self, rank: usize) -> Field {
        Field { offset: rank * self.stride + 2 * PAGE, bytes: self.stride - 2 * PAGE }
    }
}

/// Line number `index` from `base`.
const fn line(base: usize, index: usize) -> Field {
    Field { offset: base + index * LINE, bytes: LINE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_aligned_disjoint_and_inside() {
        for ranks in [1, 2, 3, 64] {
            let layout = ControlLayout::new(ranks);
            assert!(layout.job().offset >= layout.abort().end() && layout.job().end() <= PAGE);
            let mut end = PAGE;
            for rank in 0..ranks {
                for field in layout.rank(rank).all() {
                    assert!(
                        field.offset >= end && field.offset.is_multiple_of(LINE),
                        "{ranks} {rank} {field:?}"
                    );
                    end = field.end();
                }
                assert!(layout.rank(rank).staging_in.offset.is_multiple_of(PAGE));
            }
            assert_eq!(end, layout.total_bytes());
            for receiver in 0..ranks {
                let channels = layout.rank(receiver).channels;
                let mut end = channels.offset;
                for sender in 0..ranks {
                    let channel = layout.channel(sender, receiver);
                    for field in [channel.head, channel.tail, channel.ring] {
                        assert!(field.offset >= end && field.offset.is_multiple_of(LINE));
                        end = field.end();
                    }
                    assert!(channel.ring.bytes.is_power_of_two());
                }
                assert!(end <= channels.end());
            }
        }
        assert!(ControlLayout::new(64).rank_bytes() <= 16 << 20);
        assert_eq!(SLOT_HEADER + crate::call::HEADER_WORDS, SLOT_WORDS - 1);
        assert_eq!((1 + SLOT_HEADER) * 8, 64, "the header starts the slot's second line");
    }

    #[test]
    fn windows_have_all_fields_apart_and_refuse_what_no_memory_holds() {
        for (ranks, count, size) in [(1, 0, 4), (3, 1, 1), (5, 4096, 8), (64, 100_000, 2)] {
            let layout = WindowLayout::new(ranks, count, size).unwrap();
            let mut end = 0;
            for rank in 0..ranks {
                for field in [layout.signals(rank), layout.sleepers(rank), layout.copy(rank)] {
                    assert!(
                        field.offset >= end && field.offset.is_multiple_of(PAGE),
                        "{ranks} {rank} {field:?}"
                    );
                    end = field.end();
                }
                assert!(layout.copy(rank).bytes >= count * size && layout.bytes() == count * size);
            }
            assert_eq!(end, layout.total_bytes());
            let signals = layout.device_signals();
            assert!(signals.offset >= layout.bytes() && signals.offset.is_multiple_of(PAGE));
            assert_eq!((signals.bytes, layout.device_bytes()), (PAGE, signals.end()));
        }
        for (ranks, count) in [(1, usize::MAX), (2, usize::MAX / 8), (1024, isize::MAX as usize / 512)] {
            assert!(matches!(WindowLayout::new(ranks, count, 8), Err(Error::TooLarge { .. })));
        }
    }

    #[test]
    fn a_host_has_a_line_of_each_chunk_for_every_rank() {
        const { assert!(CHUNK_BYTES / MAX_LOCAL_RANKS >= 64) };
        assert!(ControlLayout::check(MAX_LOCAL_RANKS).is_ok());
        let error = ControlLayout::check(MAX_LOCAL_RANKS + 1).unwrap_err();
        assert_eq!(error, Error::TooLarge { what: "number of ranks of one host", got: 1025, cap: 1024 });
    }
}
