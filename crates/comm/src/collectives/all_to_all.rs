//! All-to-all: every rank stages a piece for every other; each copies its own from all of them. Where parts have sizes of their
//! own, a first block tells all ranks all sizes.

use unisono_core::select::Algorithm;

use super::blocks::Blocks;
use super::copy::copy;
use super::engine::{Engine, State};
use super::exchange::Part;
use super::plan::Plan;
use super::waiting::Step;
use crate::cause::Cause;
use crate::error::Result;

impl Engine {
    /// Every rank stages, or leaves in its window, a part for every other. Returns the number of steps. In place, a block of every part is staged before any of it is overwritten.
    pub(super) fn all_to_all(&mut self, plan: &Plan, at: &mut State) -> Step<u64> {
        let bytes = plan.bytes();
        let all = bytes * self.world_size;
        if plan.algorithm == Algorithm::Direct {
            if self.exchange_places(plan, (all, 0), at)? {
                for (rank, (source, _)) in self.places.iter().enumerate() {
                    // SAFETY: the place of every source was checked; it lies in another window than any target, so nobody writes
                    // it before all have left.
                    unsafe {
                        let part = source.add(self.rank * bytes).cast_const();
                        copy(part, plan.target.add(rank * bytes), bytes);
                    }
                }
            }
            self.leave_together(1, at)?;
            return Ok(1);
        }
        if self.is_inline(plan) {
            self.exchange_inline(plan, all, Part::ALL, at)?;
            for (rank, data) in self.inline_sources.iter().enumerate() {
                // SAFETY: our part of our own copy of each rank's source; the target is valid for all parts.
                unsafe { copy(data.add(self.rank * bytes), plan.target.add(rank * bytes), bytes) };
            }
            return Ok(0);
        }
        let blocks = self.pieces(plan);
        self.swap_pieces(plan, &blocks, at, 0)
    }

    /// Runs all blocks, with `before` blocks of something else before them.
    fn swap_pieces(&mut self, plan: &Plan, blocks: &Blocks, at: &mut State, before: u64) -> Step<u64> {
        let stage_pieces = self.stage_pieces(plan, blocks);
        let stage = |block, chunk| stage_pieces(block - before, chunk);
        let all = before..before + blocks.number;
        let is_told = before > 0;
        self.exchange(at, all, Part::ALL, stage, |engine, block, chunk| {
            let mine = chunk + engine.rank * engine.piece_stride();
            for rank in 0..engine.world_size {
                let part = plan.target_part(rank);
                let count = if is_told { engine.size_from(rank) } else { part.count };
                let (at, bytes) = blocks.bytes_of(block - before, count);
                // SAFETY: every peer announced this block and keeps it until we have consumed the step; the target has a
                // part for every rank, and is equal to or disjoint from our source.
                unsafe {
                    let source = match rank == engine.rank {
                        true => plan.source.add(plan.source_part(rank).at + at),
                        false => engine.staged(rank, mine),
                    };
                    copy(source, plan.target.add(part.at + at), bytes);
                }
            }
        })
    }

    /// The first block holds what each rank sends to each other: all learn the largest part, from which the number of blocks
    /// follows, and compare what they are sent with what they expect, or have room for. Returns the number of steps.
    pub(super) fn all_to_all_v(&mut self, plan: &Plan, at: &mut State) -> Step<u64> {
        let ranks = 0..self.world_size;
        if !at.knows_sizes {
            let sent: Vec<u64> = ranks.clone().map(|rank| plan.source_part(rank).count as u64).collect();
            // SAFETY: a chunk has room for eight bytes per rank of a host, and is ours to write.
            let stage = |_, chunk| unsafe { copy(sent.as_ptr().cast(), chunk, 8 * sent.len()) };
            let mut sizes = std::mem::take(&mut self.sizes);
            let result = self.exchange(at, 0..1, Part::ALL, stage, |engine, _, chunk| {
                sizes.clear();
                sizes.resize(ranks.len() * ranks.len(), 0u64);
                for (rank, row) in sizes.chunks_mut(ranks.len()).enumerate() {
                    let theirs =
                        if rank == engine.rank { sent.as_ptr().cast() } else { engine.staged(rank, chunk) };
                    // SAFETY: whoever announced the block staged that many sizes; ours is our own list.
                    unsafe { copy(theirs, row.as_mut_ptr().cast(), 8 * row.len()) };
                }
            });
            self.sizes = sizes;
            result?;
            self.compare_sizes(plan)?;
            (at.turn, at.knows_sizes) = (1, true);
        }
        let most = self.sizes.iter().copied().max().unwrap_or(0);
        let blocks = Blocks::of(most as usize, self.piece_stride() / plan.dtype.size(), plan.dtype);
        let steps = self.swap_pieces(plan, &blocks, at, 1)?;
        plan.tell_counts((0..self.world_size).map(|rank| self.size_from(rank) as u64));
        Ok(steps)
    }

    /// Elements that `rank` sends to us, once it has told.
    fn size_from(&self, rank: usize) -> usize {
        self.sizes[rank * self.world_size + self.rank] as usize
    }

    /// What every rank sends to us is what we expect of it, or has room, and no part is larger than memory.
    fn compare_sizes(&self, plan: &Plan) -> Result<()> {
        for (rank, row) in self.sizes.chunks(self.world_size).enumerate() {
            let (sent, expected) = (row[self.rank], plan.target_part(rank).count as u64);
            let is_sound = row.iter().all(|count| *count <= (isize::MAX as u64) / plan.dtype.size() as u64);
            let is_counted = plan.numbers().is_some();
            let fits = if is_counted { sent <= expected } else { sent == expected };
            if fits && is_sound {
                continue;
            }
            let (call, me) = (self.call_name(), self.rank);
            let cause = match is_counted {
                true => Cause::Counts {
                    during: call,
                    from: rank as u32,
                    to: me as u32,
                    needed: sent,
                    room: expected,
                    is_input: false,
                },
                false => Cause::Mismatch {
                    left: format!("{call} on rank {me} ({}, {expected} from rank {rank})", plan.dtype),
                    right: format!("{call} on rank {rank} ({}, {sent} to rank {me})", plan.dtype),
                },
            };
            return Err(self.abort_with(cause));
        }
        Ok(())
    }
}
