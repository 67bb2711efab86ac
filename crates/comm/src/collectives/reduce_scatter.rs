//! Reduce and reduce-scatter: the reduction of all inputs for one rank, or a part of it for every rank. Sums are in rank
//! order from the same bytes as those of an all-reduce, so the bits are the same.

use unisono_core::ReduceOp;
use unisono_core::layout::CHUNK_BYTES;
use unisono_core::select::Algorithm;

use super::blocks::Blocks;
use super::engine::{Engine, State};
use super::exchange::{Part, stage_source};
use super::plan::Plan;
use super::waiting::Step;
use crate::reduce::Reduction;

impl Engine {
    /// Every rank but the root stages its input, or leaves it in its window; the root reduces. Returns the number of steps.
    pub(super) fn reduce(&mut self, plan: &Plan, op: &ReduceOp, root: usize, at: &mut State) -> Step<u64> {
        let reduction = Reduction::new(plan.dtype, op);
        let (part, bytes) = (Part::to_root(self.rank, root), plan.bytes());
        if plan.algorithm == Algorithm::Direct {
            if self.exchange_places(plan, (bytes, 0), at)? && self.rank == root {
                self.read_scalars(reduction);
                // SAFETY: the place of every source was checked for all its bytes; nobody writes one before all have left.
                unsafe { self.reduce_places(reduction, 0, plan.target, plan.count) };
            }
            self.leave_together(1, at)?;
            return Ok(1);
        }
        if self.is_inline(plan) {
            self.exchange_inline(plan, bytes, part, at)?;
            if self.rank == root {
                self.read_scalars(reduction);
                // SAFETY: all sources are our own copies; the target is valid for `count` elements.
                unsafe { reduction.run(&self.inline_sources, &self.scalars, plan.target, plan.count) };
            }
            return Ok(0);
        }
        let blocks = Blocks::new(plan, CHUNK_BYTES / plan.dtype.size());
        let stage = stage_source(plan, &blocks);
        self.exchange(at, 0..blocks.number, part, stage, |engine, block, chunk| {
            if engine.rank != root {
                return;
            }
            if block == 0 {
                engine.read_scalars(reduction);
            }
            let (at, _) = blocks.bytes(block);
            // SAFETY: every peer announced this block and keeps it until we have consumed the step; source and target of
            // the root hold it, and are equal or disjoint.
            unsafe {
                let (source, target) = (plan.source.add(at), plan.target.add(at));
                engine.reduce_staged(reduction, source, chunk, target, blocks.block(block).1);
            }
        })
    }

    /// Every rank stages a piece for every other, or leaves it in its window, and reduces its own from all. Returns the number of steps.
    pub(super) fn reduce_scatter(&mut self, plan: &Plan, op: &ReduceOp, at: &mut State) -> Step<u64> {
        let reduction = Reduction::new(plan.dtype, op);
        let (all, mine) = (plan.bytes() * self.world_size, plan.bytes() * self.rank);
        if plan.algorithm == Algorithm::Direct {
            if self.exchange_places(plan, (all, 0), at)? {
                self.read_scalars(reduction);
                // SAFETY: as in `reduce`; our target lies at our part of our source, which nobody else reads, or outside.
                unsafe { self.reduce_places(reduction, mine, plan.target, plan.count) };
            }
            self.leave_together(1, at)?;
            return Ok(1);
        }
        if self.is_inline(plan) {
            self.exchange_inline(plan, all, Part::ALL, at)?;
            self.read_scalars(reduction);
            self.sources.clear();
            // SAFETY: our part lies within our own copy of each rank's source, and the target is valid for it.
            unsafe {
                self.sources.extend(self.inline_sources.iter().map(|source| source.add(mine)));
                reduction.run(&self.sources, &self.scalars, plan.target, plan.count);
            }
            return Ok(0);
        }
        let blocks = self.pieces(plan);
        let stage = self.stage_pieces(plan, &blocks);
        self.exchange(at, 0..blocks.number, Part::ALL, stage, |engine, block, chunk| {
            if block == 0 {
                engine.read_scalars(reduction);
            }
            let (at, bytes) = blocks.bytes_of(block, plan.own());
            let mine = chunk + engine.rank * engine.piece_stride();
            // SAFETY: every peer announced this block and keeps it until we have consumed the step; our part of the source
            // and the target hold it, and are equal or disjoint.
            unsafe {
                let source = plan.source.add(plan.source_part(engine.rank).at + at);
                let count = bytes / plan.dtype.size();
                engine.reduce_staged(reduction, source, mine, plan.target.add(at), count);
            }
        })
    }

    /// Reduces `count` elements from byte `at` of every rank's input in its window into `target`.
    ///
    /// # Safety
    /// `self.places` holds inputs of as many elements, which nobody writes meanwhile; `target` is valid for writes of as many,
    /// and equal to that place in our own input or disjoint from it.
    unsafe fn reduce_places(&mut self, reduction: Reduction, at: usize, target: *mut u8, count: usize) {
        self.sources.clear();
        // SAFETY: as the caller vouches.
        unsafe {
            self.sources.extend(self.places.iter().map(|(source, _)| source.add(at).cast_const()));
            reduction.run(&self.sources, &self.scalars, target, count);
        }
    }
}
