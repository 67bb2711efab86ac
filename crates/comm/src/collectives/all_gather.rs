//! All-gather: every rank stages its part, every peer copies it to its place; or, in windows, reads it in place.

use unisono_core::call::HEADER_WORDS;
use unisono_core::layout::{CHUNK_BYTES, INLINE_BYTES, INLINE_WORDS, SLOT_DATA};
use unisono_core::select::Algorithm;

use super::all_reduce::Blocks;
use super::copy::{copy, to_words};
use super::engine::{Engine, chunk};
use super::plan::Plan;
use crate::error::Result;

impl Engine {
    /// Returns the number of steps it took.
    #[inline]
    pub(super) fn all_gather(&mut self, plan: &Plan, header: &[u64; HEADER_WORDS]) -> Result<u64> {
        let bytes = plan.bytes();
        if plan.algorithm == Algorithm::Direct {
            return self.all_gather_direct(plan, header);
        }
        if bytes <= INLINE_BYTES {
            return self.all_gather_inline(plan, header);
        }
        let blocks = Blocks::new(plan, CHUNK_BYTES / plan.dtype.size());
        for turn in 0..=blocks.number {
            if turn < blocks.number {
                let (start, count) = blocks.block(turn);
                let at = self.reserve(self.step + 1 + turn)?;
                // SAFETY: the block lies in our part; the chunk is ours to write, by the credit just taken; our place
                // in the result is equal to or disjoint from our part.
                unsafe {
                    let source = plan.source.add(start * blocks.size);
                    copy(source, self.control.rank(self.rank).staging_in.add(at), count * blocks.size);
                    self.announce_block(turn, header);
                    copy(
                        source,
                        plan.target.add(self.rank * bytes + start * blocks.size),
                        count * blocks.size,
                    );
                }
            }
            if turn > 0 {
                let block = turn - 1;
                let step = self.step + 1 + block;
                let (start, count) = blocks.block(block);
                for peer in self.peers() {
                    if block == 0 {
                        self.hear(peer)?;
                    } else {
                        self.wait_for(peer, |words| words.produced, step)?;
                    }
                    // SAFETY: the peer announced this block and keeps it until we have consumed the step.
                    unsafe {
                        let staged = self.control.rank(peer).staging_in.add(chunk(step));
                        copy(
                            staged,
                            plan.target.add(peer * bytes + start * blocks.size),
                            count * blocks.size,
                        );
                    }
                }
                if block == 0 {
                    self.heard_all();
                }
                self.announce(|words| words.consumed, step);
            }
        }
        Ok(blocks.number)
    }

    fn all_gather_inline(&mut self, plan: &Plan, header: &[u64; HEADER_WORDS]) -> Result<u64> {
        let bytes = plan.bytes();
        let words = bytes.div_ceil(8);
        // SAFETY: our part is valid for `bytes`, at most the size of the words.
        let mine: [u64; INLINE_WORDS] = unsafe { to_words(plan.source, bytes) };
        self.arrive(header, &mine[..words]);
        self.inline[self.rank] = mine;
        for peer in self.peers() {
            self.hear(peer)?;
            for at in 0..words {
                self.inline[peer][at] = self.control.rank(peer).slots.read(self.epoch, SLOT_DATA + at);
            }
        }
        self.heard_all();
        for (rank, data) in self.inline_sources.iter().enumerate() {
            // SAFETY: our own copies of the data; the result is valid for all parts.
            unsafe { copy(*data, plan.target.add(rank * bytes), bytes) };
        }
        Ok(0)
    }

    /// Everybody's part lies in a window: it is read there. One step, for the barrier at the end.
    fn all_gather_direct(&mut self, plan: &Plan, header: &[u64; HEADER_WORDS]) -> Result<u64> {
        let bytes = plan.bytes();
        let (sources, _) = self.exchange_places(plan, header, bytes)?;
        for (rank, source) in sources.iter().enumerate() {
            // SAFETY: the place of every source was checked; nobody writes a part but its owner, before it arrived.
            unsafe { copy(source.cast_const(), plan.target.add(rank * bytes), bytes) };
        }
        self.leave_together(1)?;
        Ok(1)
    }
}
