//! All-gather: every rank stages its part, every peer copies it to its place; or, in windows, reads it in place.

use unisono_core::layout::CHUNK_BYTES;
use unisono_core::select::Algorithm;

use super::blocks::Blocks;
use super::copy::copy;
use super::engine::{Engine, State};
use super::exchange::{Part, stage_source};
use super::plan::Plan;
use super::waiting::Step;

impl Engine {
    /// Returns the number of steps it took.
    #[inline]
    pub(super) fn all_gather(&mut self, plan: &Plan, at: &mut State) -> Step<u64> {
        if plan.algorithm == Algorithm::Direct {
            return self.all_gather_direct(plan, at);
        }
        if self.is_inline(plan) {
            return self.all_gather_inline(plan, at);
        }
        let blocks = Blocks::new(plan, CHUNK_BYTES / plan.dtype.size());
        let stage = stage_source(plan, &blocks);
        self.exchange(at, 0..blocks.number, Part::ALL, stage, |engine, block, chunk| {
            engine.collect(plan, &blocks, block, chunk);
        })
    }

    /// Puts one block of every rank to its place in our target: ours from our source, the others' from staging.
    pub(super) fn collect(&self, plan: &Plan, blocks: &Blocks, block: u64, chunk: usize) {
        for rank in 0..self.world_size {
            let part = plan.target_part(rank);
            let (at, bytes) = blocks.bytes_of(block, part.count);
            // SAFETY: the block lies in our source; whoever staged it keeps it until we have consumed the step; the
            // target has room for every rank's part, and ours is equal to or disjoint from our source.
            unsafe {
                let source = if rank == self.rank { plan.source.add(at) } else { self.staged(rank, chunk) };
                copy(source, plan.target.add(part.at + at), bytes);
            }
        }
    }

    fn all_gather_inline(&mut self, plan: &Plan, at: &mut State) -> Step<u64> {
        let bytes = plan.bytes();
        self.exchange_inline(plan, bytes, Part::ALL, at)?;
        for (rank, data) in self.inline_sources.iter().enumerate() {
            // SAFETY: our own copies of the data; the result is valid for all parts.
            unsafe { copy(*data, plan.target.add(rank * bytes), bytes) };
        }
        Ok(0)
    }

    /// Everybody's part lies in a window: it is read there. One step, for the barrier at the end.
    fn all_gather_direct(&mut self, plan: &Plan, at: &mut State) -> Step<u64> {
        let bytes = plan.bytes();
        if self.exchange_places(plan, (bytes, bytes), at)? {
            for (rank, (source, _)) in self.places.iter().enumerate() {
                // SAFETY: the place of every source was checked; nobody writes a part but its owner, before it arrived.
                unsafe { copy(source.cast_const(), plan.target.add(rank * bytes), bytes) };
            }
        }
        self.leave_together(1, at)?;
        Ok(1)
    }
}
