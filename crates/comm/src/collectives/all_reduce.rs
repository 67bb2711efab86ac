//! All-reduce: one-shot (inline or staged), two-shot and direct. See the table in `collectives`.
//!
//! Every rank reduces in rank order from the same bytes, so all ranks get the same bits, whatever the algorithm.
//!
//! Larger messages go in blocks of one chunk (of one chunk per rank for direct, which stages nothing). The phases of
//! neighbouring blocks overlap, so that a peer has had a whole phase of time before it is waited for:
//!
//! ```text
//! two-shot, block i:  1 stage what others own   2 reduce what I own, stage the result   3 copy what others own
//! at turn t:          phase 1 of block t        phase 2 of block t − 1                  phase 3 of block t − 2
//! ```
//! Staged input of block i may be overwritten when all peers have reduced it, staged results when all have copied them:
//! both are behind a peer's `consumed` count.

use unisono_core::ReduceOp;
use unisono_core::layout::{CHUNK_BYTES, SLOT_HEADER};
use unisono_core::select::Algorithm;

use super::blocks::Blocks;
use super::copy::copy;
use super::engine::{Engine, State, chunk};
use super::exchange::{Part, Reads, stage_source};
use super::plan::Plan;
use super::waiting::{On, Step};
use crate::reduce::Reduction;

/// Header word of a rank's own scalar.
const SCALAR: usize = 5;
/// Bytes that are reduced before they are copied on, so that the copy finds them in the first-level cache.
const TILE_BYTES: usize = 8 * 1024;

impl Engine {
    /// Returns the number of steps it took.
    #[inline]
    pub(super) fn all_reduce(&mut self, plan: &Plan, op: &ReduceOp, at: &mut State) -> Step<u64> {
        let reduction = Reduction::new(plan.dtype, op);
        match plan.algorithm {
            Algorithm::OneShot if self.is_inline(plan) => self.inline(plan, reduction, at),
            Algorithm::TwoShot => self.two_shot(plan, reduction, at),
            Algorithm::Direct => self.direct(plan, reduction, at),
            _ => self.one_shot(plan, reduction, at),
        }
    }

    /// Up to 48 bytes travel in the slot itself.
    fn inline(&mut self, plan: &Plan, reduction: Reduction, at: &mut State) -> Step<u64> {
        self.exchange_inline(plan, plan.bytes(), Part::ALL, at)?;
        self.read_scalars(reduction);
        // SAFETY: all sources are our own copies of `INLINE_BYTES`; the target is valid for `count` elements.
        unsafe { reduction.run(&self.inline_sources, &self.scalars, plan.target, plan.count) };
        Ok(0)
    }

    /// Each block: stage mine, then reduce everybody's.
    fn one_shot(&mut self, plan: &Plan, reduction: Reduction, at: &mut State) -> Step<u64> {
        let blocks = Blocks::new(plan, CHUNK_BYTES / plan.dtype.size());
        let stage = stage_source(plan, &blocks);
        self.exchange(at, 0..blocks.number, Part::ALL, stage, |engine, block, chunk| {
            if block == 0 {
                engine.read_scalars(reduction);
            }
            let (at, _) = blocks.bytes(block);
            // SAFETY: the block lies in our source and in our target.
            let (source, target) = unsafe { (plan.source.add(at), plan.target.add(at)) };
            // SAFETY: every peer has announced this block, and keeps it until we announce that we are done with it; the
            // target is equal to or disjoint from our source.
            unsafe { engine.reduce_staged(reduction, source, chunk, target, blocks.block(block).1) };
        })
    }

    /// Reduces `count` elements of what every peer staged at `chunk`, and of our own `source`, into `target`.
    ///
    /// # Safety
    /// The peers' chunks hold that many elements and are not written meanwhile; `source` is valid for reads and `target`
    /// for writes of as many, and they are equal or disjoint.
    pub(super) unsafe fn reduce_staged(
        &mut self,
        reduction: Reduction,
        source: *const u8,
        chunk: usize,
        target: *mut u8,
        count: usize,
    ) {
        self.sources.clear();
        for rank in 0..self.world_size {
            self.sources.push(if rank == self.rank { source } else { self.staged(rank, chunk) });
        }
        // SAFETY: as the caller vouches.
        unsafe { reduction.run(&self.sources, &self.scalars, target, count) };
    }

    fn two_shot(&mut self, plan: &Plan, reduction: Reduction, at: &mut State) -> Step<u64> {
        let blocks = Blocks::new(plan, CHUNK_BYTES / plan.dtype.size());
        while at.turn < blocks.number + 2 {
            let turn = at.turn;
            if at.phase == 0 {
                if turn < blocks.number {
                    self.stage_for_owners(plan, &blocks, turn)?;
                    self.announce_block(turn);
                }
                at.phase = 1;
            }
            if at.phase == 1 {
                if (1..=blocks.number).contains(&turn) {
                    self.hear_block(turn - 1, Reads::Everybody)?;
                    if turn == 1 {
                        self.read_scalars(reduction);
                    }
                    self.reduce_owned(plan, &blocks, turn - 1, reduction);
                }
                (at.phase, at.peers) = (2, 0);
            }
            if turn >= 2 {
                self.copy_results(plan, &blocks, turn - 2, at)?;
            }
            (at.turn, at.phase) = (turn + 1, 0);
        }
        Ok(blocks.number)
    }

    /// Phase 1: every piece of the block that another rank owns.
    fn stage_for_owners(&mut self, plan: &Plan, blocks: &Blocks, block: u64) -> Step<()> {
        let at = self.reserve(self.step + 1 + block)?;
        let staging = self.control.rank(self.rank).staging_in;
        let (first, _) = blocks.block(block);
        for owner in self.peers() {
            let (start, count) = blocks.piece(block, owner, self.world_size);
            // SAFETY: the piece lies in the source and, at the same place, in the chunk that the credit gave us.
            unsafe {
                let target = staging.add(at + start * blocks.size);
                copy(plan.source.add((first + start) * blocks.size), target, count * blocks.size);
            }
        }
        Ok(())
    }

    /// Phase 2: the piece that we own, from all ranks in rank order, to our target and to our staged results.
    fn reduce_owned(&mut self, plan: &Plan, blocks: &Blocks, block: u64, reduction: Reduction) {
        let step = self.step + 1 + block;
        let (first, _) = blocks.block(block);
        let (start, count) = blocks.piece(block, self.rank, self.world_size);
        let result = self.control.rank(self.rank).staging_out;
        let tile = TILE_BYTES / blocks.size;
        let mut done = 0;
        while done < count {
            let now = tile.min(count - done);
            let at = (start + done) * blocks.size;
            // SAFETY: the tile lies in our source, in our target and in our chunk of results.
            let (source, target, staged) = unsafe {
                let at = first * blocks.size + at;
                (plan.source.add(at), plan.target.add(at), result.add(chunk(step) + done * blocks.size))
            };
            // SAFETY: every peer has announced this block; our chunk of results is free, because all peers have
            // consumed the step that used it before (the credit of phase 1).
            unsafe {
                self.reduce_staged(reduction, source, chunk(step) + at, target, now);
                copy(target, staged, now * blocks.size);
            }
            done += now;
        }
        self.announce(|words| words.reduced, step);
    }

    /// Phase 3: the pieces that others own.
    fn copy_results(&mut self, plan: &Plan, blocks: &Blocks, block: u64, at: &mut State) -> Step<()> {
        let step = self.step + 1 + block;
        let (first, _) = blocks.block(block);
        for owner in self.peers().skip(at.peers) {
            let (start, count) = blocks.piece(block, owner, self.world_size);
            if count > 0 {
                self.until(owner, On::Reduced, step)?;
            }
            // SAFETY: the owner announced this piece and keeps it until we have consumed the step.
            unsafe {
                let result = self.control.rank(owner).staging_out.add(chunk(step));
                copy(result, plan.target.add((first + start) * blocks.size), count * blocks.size);
            }
            at.peers += 1;
        }
        self.announce(|words| words.consumed, step);
        Ok(())
    }

    /// Both buffers lie in windows: peers read our input and our results in place.
    ///
    /// A rank overwrites a piece of its own target (which may be its source) only after the piece's owner announced
    /// that it has read it everywhere. Nobody leaves before all have read everything.
    fn direct(&mut self, plan: &Plan, reduction: Reduction, at: &mut State) -> Step<u64> {
        self.exchange_places(plan, (plan.bytes(), plan.bytes()), at)?;
        self.read_scalars(reduction);
        let blocks = Blocks::new(plan, self.world_size * CHUNK_BYTES / plan.dtype.size());
        // Twice a turn: even ones reduce, odd ones copy what was reduced one turn before.
        while at.turn < 2 * (blocks.number + 1) {
            let turn = at.turn / 2;
            if at.turn.is_multiple_of(2) {
                if turn < blocks.number {
                    self.reduce_in_place(plan, &blocks, turn, reduction);
                }
                at.peers = 0;
            } else if turn > 0 {
                self.copy_in_place(plan, &blocks, turn - 1, at)?;
            }
            at.turn += 1;
        }
        self.leave_together(blocks.number, at)?;
        Ok(blocks.number)
    }

    /// The piece of the block that we own, from all ranks' inputs to our output.
    fn reduce_in_place(&mut self, plan: &Plan, blocks: &Blocks, block: u64, reduction: Reduction) {
        let (first, _) = blocks.block(block);
        let (start, count) = blocks.piece(block, self.rank, self.world_size);
        let at = (first + start) * blocks.size;
        self.sources.clear();
        // SAFETY: the piece lies in every rank's source, whose place was checked.
        self.sources.extend(self.places.iter().map(|(source, _)| unsafe { source.add(at).cast_const() }));
        // SAFETY: no peer writes this piece of any source: it is ours to reduce.
        unsafe { reduction.run(&self.sources, &self.scalars, plan.target.add(at), count) };
        self.announce(|words| words.reduced, self.step + 1 + block);
    }

    /// The pieces of the block that others own, from their outputs to ours.
    fn copy_in_place(&mut self, plan: &Plan, blocks: &Blocks, block: u64, at: &mut State) -> Step<()> {
        let (first, _) = blocks.block(block);
        for owner in self.peers().skip(at.peers) {
            self.until(owner, On::Reduced, self.step + 1 + block)?;
            let (start, count) = blocks.piece(block, owner, self.world_size);
            let at_byte = (first + start) * blocks.size;
            // SAFETY: the owner announced its result, and nobody reads this piece of our buffers any more.
            unsafe {
                copy(self.places[owner].1.add(at_byte), plan.target.add(at_byte), count * blocks.size);
            }
            at.peers += 1;
        }
        Ok(())
    }

    /// The scalars of a pre-multiplied sum, by rank; none for other reductions.
    pub(super) fn read_scalars(&mut self, reduction: Reduction) {
        self.scalars.clear();
        if !reduction.is_scaled() {
            return;
        }
        for rank in 0..self.world_size {
            let bits = match rank == self.rank {
                true => self.current[SCALAR],
                false => self.control.rank(rank).slots.read(self.epoch, SLOT_HEADER + SCALAR),
            };
            self.scalars.push(f64::from_bits(bits));
        }
    }
}
