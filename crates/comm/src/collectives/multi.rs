//! Collectives on several buffers of each rank, which take part as if each were a rank's own.

use unisono_core::ReduceOp;
use unisono_core::layout::CHUNK_BYTES;

use super::blocks::Blocks;
use super::copy::copy;
use super::engine::{Engine, State};
use super::exchange::{Part, stage_source};
use super::plan::Plan;
use super::waiting::Step;
use crate::reduce::Reduction;

impl Engine {
    /// Every rank stages all its buffers, and reduces those of all ranks, by rank and then by buffer. Returns the number of
    /// steps.
    pub(super) fn all_reduce_multi(&mut self, plan: &Plan, op: &ReduceOp, at: &mut State) -> Step<u64> {
        let reduction = Reduction::new(plan.dtype, op);
        let locals = plan.locals();
        let stride = (CHUNK_BYTES / locals.len()) & !63;
        let blocks = Blocks::new(plan, stride / plan.dtype.size());
        let stage = |block, chunk: *mut u8| {
            let (at, bytes) = blocks.bytes(block);
            for (index, local) in locals.iter().enumerate() {
                // SAFETY: the block lies in each of our buffers; the chunk has a piece for each and is ours to write.
                unsafe { copy(local.add(at).cast_const(), chunk.add(index * stride), bytes) };
            }
        };
        self.exchange(at, 0..blocks.number, Part::ALL, stage, |engine, block, chunk| {
            let (at, bytes) = blocks.bytes(block);
            if block == 0 {
                engine.read_scalars(reduction);
                let of_ranks = std::mem::take(&mut engine.scalars);
                let of_buffers =
                    of_ranks.iter().flat_map(|scalar| std::iter::repeat_n(*scalar, locals.len()));
                engine.scalars = of_buffers.collect();
            }
            let mut sources = std::mem::take(&mut engine.sources);
            sources.clear();
            for rank in 0..engine.world_size {
                for (index, local) in locals.iter().enumerate() {
                    // SAFETY: the block lies in our buffer; a peer's piece lies in its chunk.
                    sources.push(unsafe {
                        match rank == engine.rank {
                            true => local.add(at).cast_const(),
                            false => engine.staged(rank, chunk + index * stride),
                        }
                    });
                }
            }
            // SAFETY: every peer announced this block and keeps it until we have consumed the step; our own buffers hold it;
            // the first one, which gets the result, is one of the sources; the others are disjoint from it.
            unsafe {
                let first = locals[0].add(at);
                reduction.run(&sources, &engine.scalars, first, blocks.block(block).1);
                locals[1..].iter().for_each(|local| copy(first, local.add(at), bytes));
            }
            engine.sources = sources;
        })
    }

    /// The root stages one of its buffers; every rank copies it to all of its own. Returns the number of steps.
    pub(super) fn broadcast_multi(&mut self, plan: &Plan, root: usize, at: &mut State) -> Step<u64> {
        let blocks = Blocks::new(plan, CHUNK_BYTES / plan.dtype.size());
        let stage = stage_source(plan, &blocks);
        let part = Part::from_root(self.rank, root);
        self.exchange(at, 0..blocks.number, part, stage, |engine, block, chunk| {
            let (at, bytes) = blocks.bytes(block);
            for local in plan.locals() {
                // SAFETY: the root announced this block and keeps it until we have consumed the step; our buffers hold it, and
                // are disjoint or, on the root, the source itself.
                unsafe {
                    let source =
                        if engine.rank == root { plan.source.add(at) } else { engine.staged(root, chunk) };
                    copy(source, local.add(at), bytes);
                }
            }
        })
    }
}
