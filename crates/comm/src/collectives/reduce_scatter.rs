//! Reduce and reduce-scatter: the reduction of all inputs for one rank, or a part of it for every rank. Sums are in rank
//! order from the same bytes as those of an all-reduce, so the bits are the same.

use unisono_core::ReduceOp;
use unisono_core::call::HEADER_WORDS;
use unisono_core::layout::CHUNK_BYTES;

use super::blocks::Blocks;
use super::engine::{Engine, State};
use super::exchange::{Part, stage_source};
use super::plan::Plan;
use super::waiting::Step;
use crate::reduce::Reduction;

impl Engine {
    /// Every rank but the root stages its input; the root reduces. Returns the number of steps.
    pub(super) fn reduce(
        &mut self,
        plan: &Plan,
        op: ReduceOp,
        root: usize,
        header: &[u64; HEADER_WORDS],
        at: &mut State,
    ) -> Step<u64> {
        let reduction = Reduction::new(plan.dtype, op)?;
        let blocks = Blocks::new(plan, CHUNK_BYTES / plan.dtype.size());
        let stage = stage_source(plan, &blocks);
        let part = Part::to_root(self.rank, root);
        self.exchange((header, at), 0..blocks.number, part, stage, |engine, block, chunk| {
            if engine.rank != root {
                return;
            }
            if block == 0 {
                engine.read_scalars(reduction, header);
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

    /// Every rank stages a piece for every other, and reduces its own from all. Returns the number of steps.
    pub(super) fn reduce_scatter(
        &mut self,
        plan: &Plan,
        op: ReduceOp,
        header: &[u64; HEADER_WORDS],
        at: &mut State,
    ) -> Step<u64> {
        let reduction = Reduction::new(plan.dtype, op)?;
        let blocks = self.pieces(plan);
        let stage = self.stage_pieces(plan, &blocks);
        self.exchange((header, at), 0..blocks.number, Part::ALL, stage, |engine, block, chunk| {
            if block == 0 {
                engine.read_scalars(reduction, header);
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
}
