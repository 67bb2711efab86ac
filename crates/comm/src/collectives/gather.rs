//! Gather and scatter: one rank collects everybody's part, or hands everybody its own.

use unisono_core::layout::CHUNK_BYTES;
use unisono_core::select::Algorithm;

use super::blocks::Blocks;
use super::copy::copy;
use super::engine::{Engine, State};
use super::exchange::{Part, stage_source};
use super::plan::Plan;
use super::waiting::Step;

impl Engine {
    /// Every rank but the root stages its part, or leaves it in its window; the root collects. Returns the number of steps.
    pub(super) fn gather(&mut self, plan: &Plan, root: usize, at: &mut State) -> Step<u64> {
        let (part, bytes) = (Part::to_root(self.rank, root), plan.bytes());
        if plan.algorithm == Algorithm::Direct {
            if self.exchange_places(plan, (bytes, 0), at)? && self.rank == root {
                for (rank, (source, _)) in self.places.iter().enumerate() {
                    // SAFETY: the place of every source was checked; nobody writes it before all have left.
                    unsafe { copy(source.cast_const(), plan.target.add(rank * bytes), bytes) };
                }
            }
            self.leave_together(1, at)?;
            return Ok(1);
        }
        if self.is_inline(plan) {
            self.exchange_inline(plan, bytes, part, at)?;
            if self.rank == root {
                for (rank, data) in self.inline_sources.iter().enumerate() {
                    // SAFETY: our own copies of the data; the root's target is valid for all parts.
                    unsafe { copy(*data, plan.target.add(rank * bytes), bytes) };
                }
            }
            return Ok(0);
        }
        let blocks = Blocks::new(plan, CHUNK_BYTES / plan.dtype.size());
        let stage = stage_source(plan, &blocks);
        self.exchange(at, 0..blocks.number, part, stage, |engine, block, chunk| {
            if engine.rank == root {
                engine.collect(plan, &blocks, block, chunk);
            }
        })
    }

    /// The root stages a piece for every rank, and each copies its own; or writes it into their windows. Returns the number of steps.
    pub(super) fn scatter(&mut self, plan: &Plan, root: usize, at: &mut State) -> Step<u64> {
        let (part, bytes) = (Part::from_root(self.rank, root), plan.bytes());
        if plan.algorithm == Algorithm::Direct {
            if self.exchange_places(plan, (0, bytes), at)? && self.rank == root {
                for (rank, (_, target)) in self.places.iter().enumerate() {
                    // SAFETY: the place of every target was checked; its rank waits for us to leave. Our own is equal to our part
                    // of the source or disjoint from it.
                    unsafe { copy(plan.source.add(rank * bytes), *target, bytes) };
                }
            }
            self.leave_together(1, at)?;
            return Ok(1);
        }
        if self.is_inline(plan) {
            self.exchange_inline(plan, bytes * self.world_size, part, at)?;
            // SAFETY: our part of our own copy of the data; the target is valid for it.
            unsafe { copy(self.inline_sources[root].add(self.rank * bytes), plan.target, bytes) };
            return Ok(0);
        }
        let blocks = self.pieces(plan);
        let stage = self.stage_pieces(plan, &blocks);
        self.exchange(at, 0..blocks.number, part, stage, |engine, block, chunk| {
            let (at, bytes) = blocks.bytes_of(block, plan.own());
            // SAFETY: the root announced this block and keeps it until we have consumed the step; its own part of the
            // source is equal to or disjoint from its target.
            unsafe {
                let source = match engine.rank == root {
                    true => plan.source.add(plan.source_part(root).at + at),
                    false => engine.staged(root, chunk + engine.rank * engine.piece_stride()),
                };
                copy(source, plan.target.add(at), bytes);
            }
        })
    }

    /// Blocks of which a chunk holds a piece for every rank.
    pub(super) fn pieces(&self, plan: &Plan) -> Blocks {
        Blocks::new(plan, self.piece_stride() / plan.dtype.size())
    }

    /// Stages, of every other rank's part of our source, one block: a piece each.
    pub(super) fn stage_pieces<'p>(
        &self,
        plan: &'p Plan,
        blocks: &'p Blocks,
    ) -> impl Fn(u64, *mut u8) + use<'p> {
        let (rank, world_size, stride) = (self.rank, self.world_size, self.piece_stride());
        move |block, chunk| {
            for peer in (rank + 1..world_size).chain(0..rank) {
                let part = plan.source_part(peer);
                let (at, bytes) = blocks.bytes_of(block, part.count);
                // SAFETY: the block lies in the peer's part of our source; the chunk, which has room for a piece of every
                // rank, is ours to write.
                unsafe { copy(plan.source.add(part.at + at), chunk.add(peer * stride), bytes) };
            }
        }
    }
}
