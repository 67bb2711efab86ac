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
use unisono_core::call::HEADER_WORDS;
use unisono_core::layout::{CHUNK_BYTES, INLINE_BYTES, INLINE_WORDS, SLOT_DATA, SLOT_HEADER};
use unisono_core::select::Algorithm;

use super::copy::{copy, to_words};
use super::engine::{Engine, chunk};
use super::plan::Plan;
use crate::error::Result;
use crate::reduce::Reduction;

/// Header word of a rank's own scalar.
const SCALAR: usize = 5;
/// Bytes that are reduced before they are copied on, so that the copy finds them in the first-level cache.
const TILE_BYTES: usize = 8 * 1024;

impl Engine {
    /// Returns the number of steps it took.
    #[inline]
    pub(super) fn all_reduce(
        &mut self,
        plan: &Plan,
        op: ReduceOp,
        header: &[u64; HEADER_WORDS],
    ) -> Result<u64> {
        let reduction = Reduction::new(plan.dtype, op)?;
        let scaled = op.scalar().is_some();
        match plan.algorithm {
            Algorithm::OneShot if plan.bytes() <= INLINE_BYTES => {
                self.inline(plan, reduction, scaled, header)
            }
            Algorithm::TwoShot => self.two_shot(plan, reduction, scaled, header),
            Algorithm::Direct => self.direct(plan, reduction, scaled, header),
            _ => self.one_shot(plan, reduction, scaled, header),
        }
    }

    /// Up to 48 bytes travel in the slot itself.
    fn inline(
        &mut self,
        plan: &Plan,
        reduction: Reduction,
        scaled: bool,
        header: &[u64; HEADER_WORDS],
    ) -> Result<u64> {
        let bytes = plan.bytes();
        // SAFETY: the source is valid for `bytes`, at most the size of the words.
        let mine: [u64; INLINE_WORDS] = unsafe { to_words(plan.source, bytes) };
        let words = bytes.div_ceil(8);
        self.arrive(header, &mine[..words]);
        self.inline[self.rank] = mine;
        for peer in self.peers() {
            self.hear(peer)?;
            for at in 0..words {
                self.inline[peer][at] = self.control.rank(peer).slots.read(self.epoch, SLOT_DATA + at);
            }
        }
        self.heard_all();
        self.read_scalars(scaled, header);
        // SAFETY: all sources are our own copies of `INLINE_BYTES`; the target is valid for `count` elements.
        unsafe { reduction.run(&self.inline_sources, &self.scalars, plan.target, plan.count) };
        Ok(0)
    }

    /// Each block: stage mine, then reduce everybody's.
    fn one_shot(
        &mut self,
        plan: &Plan,
        reduction: Reduction,
        scaled: bool,
        header: &[u64; HEADER_WORDS],
    ) -> Result<u64> {
        let blocks = Blocks::new(plan, CHUNK_BYTES / plan.dtype.size());
        for turn in 0..=blocks.number {
            if turn < blocks.number {
                let (start, count) = blocks.block(turn);
                let at = self.reserve(self.step + 1 + turn)?;
                // SAFETY: the block lies in the source; the chunk is ours to write, by the credit just taken.
                unsafe {
                    let staging = self.control.rank(self.rank).staging_in.add(at);
                    copy(plan.source.add(start * blocks.size), staging, count * blocks.size);
                }
                self.announce_block(turn, header);
            }
            if turn > 0 {
                let block = turn - 1;
                let (start, count) = blocks.block(block);
                self.hear_block(block, scaled, header)?;
                let at = chunk(self.step + 1 + block);
                self.sources.clear();
                for rank in 0..self.world_size {
                    // SAFETY: inside that rank's staging, or inside our source.
                    self.sources.push(unsafe {
                        match rank == self.rank {
                            true => plan.source.add(start * blocks.size),
                            false => self.control.rank(rank).staging_in.add(at).cast_const(),
                        }
                    });
                }
                // SAFETY: every peer has announced this block, and none reuses its chunk before we announce that we
                // are done with it; the target is ours, and equal to or disjoint from our source.
                unsafe {
                    reduction.run(&self.sources, &self.scalars, plan.target.add(start * blocks.size), count);
                }
                self.announce(|words| words.consumed, self.step + 1 + block);
            }
        }
        Ok(blocks.number)
    }

    fn two_shot(
        &mut self,
        plan: &Plan,
        reduction: Reduction,
        scaled: bool,
        header: &[u64; HEADER_WORDS],
    ) -> Result<u64> {
        let blocks = Blocks::new(plan, CHUNK_BYTES / plan.dtype.size());
        for turn in 0..blocks.number + 2 {
            if turn < blocks.number {
                self.stage_for_owners(plan, &blocks, turn)?;
                self.announce_block(turn, header);
            }
            if (1..=blocks.number).contains(&turn) {
                self.hear_block(turn - 1, scaled, header)?;
                self.reduce_owned(plan, &blocks, turn - 1, reduction);
            }
            if turn >= 2 {
                self.copy_results(plan, &blocks, turn - 2)?;
            }
        }
        Ok(blocks.number)
    }

    /// Phase 1: every piece of the block that another rank owns.
    fn stage_for_owners(&mut self, plan: &Plan, blocks: &Blocks, block: u64) -> Result<()> {
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
            self.sources.clear();
            for rank in 0..self.world_size {
                // SAFETY: inside that rank's chunk, or inside our source.
                self.sources.push(unsafe {
                    match rank == self.rank {
                        true => plan.source.add(first * blocks.size + at),
                        false => self.control.rank(rank).staging_in.add(chunk(step) + at).cast_const(),
                    }
                });
            }
            // SAFETY: every peer has announced this block; our chunk of results is free, because all peers have
            // consumed the step that used it before (the credit of phase 1).
            unsafe {
                let target = plan.target.add(first * blocks.size + at);
                reduction.run(&self.sources, &self.scalars, target, now);
                copy(target, result.add(chunk(step) + done * blocks.size), now * blocks.size);
            }
            done += now;
        }
        self.announce(|words| words.reduced, step);
    }

    /// Phase 3: the pieces that others own.
    fn copy_results(&mut self, plan: &Plan, blocks: &Blocks, block: u64) -> Result<()> {
        let step = self.step + 1 + block;
        let (first, _) = blocks.block(block);
        for owner in self.peers() {
            let (start, count) = blocks.piece(block, owner, self.world_size);
            if count > 0 {
                self.wait_for(owner, |words| words.reduced, step)?;
            }
            // SAFETY: the owner announced this piece and keeps it until we have consumed the step.
            unsafe {
                let result = self.control.rank(owner).staging_out.add(chunk(step));
                copy(result, plan.target.add((first + start) * blocks.size), count * blocks.size);
            }
        }
        self.announce(|words| words.consumed, step);
        Ok(())
    }

    /// Both buffers lie in windows: peers read our input and our results in place.
    ///
    /// A rank overwrites a piece of its own target (which may be its source) only after the piece's owner announced
    /// that it has read it everywhere. Nobody leaves before all have read everything.
    fn direct(
        &mut self,
        plan: &Plan,
        reduction: Reduction,
        scaled: bool,
        header: &[u64; HEADER_WORDS],
    ) -> Result<u64> {
        let (sources, targets) = self.exchange_places(plan, header, plan.bytes())?;
        self.read_scalars(scaled, header);
        let blocks = Blocks::new(plan, self.world_size * CHUNK_BYTES / plan.dtype.size());
        for turn in 0..=blocks.number {
            if turn < blocks.number {
                let (first, _) = blocks.block(turn);
                let (start, count) = blocks.piece(turn, self.rank, self.world_size);
                let at = (first + start) * blocks.size;
                self.sources.clear();
                // SAFETY: the piece lies in every rank's source, whose place was checked.
                self.sources.extend(sources.iter().map(|source| unsafe { source.add(at).cast_const() }));
                // SAFETY: no peer writes this piece of any source: it is ours to reduce.
                unsafe { reduction.run(&self.sources, &self.scalars, plan.target.add(at), count) };
                self.announce(|words| words.reduced, self.step + 1 + turn);
            }
            if turn > 0 {
                let block = turn - 1;
                let (first, _) = blocks.block(block);
                for owner in self.peers() {
                    self.wait_for(owner, |words| words.reduced, self.step + 1 + block)?;
                    let (start, count) = blocks.piece(block, owner, self.world_size);
                    let at = (first + start) * blocks.size;
                    // SAFETY: the owner announced its result, and nobody reads this piece of our buffers any more.
                    unsafe { copy(targets[owner].add(at), plan.target.add(at), count * blocks.size) };
                }
            }
        }
        self.leave_together(blocks.number)?;
        Ok(blocks.number)
    }

    /// Announces that our part of `block` is staged: the first with the call itself, later ones by count.
    pub(super) fn announce_block(&mut self, block: u64, header: &[u64; HEADER_WORDS]) {
        if block == 0 {
            self.arrive(header, &[]);
        } else {
            self.announce(|words| words.produced, self.step + 1 + block);
        }
    }

    /// Waits until every peer has staged its part of `block`.
    fn hear_block(&mut self, block: u64, scaled: bool, header: &[u64; HEADER_WORDS]) -> Result<()> {
        for peer in self.peers() {
            if block == 0 {
                self.hear(peer)?;
            } else {
                self.wait_for(peer, |words| words.produced, self.step + 1 + block)?;
            }
        }
        if block == 0 {
            self.heard_all();
            self.read_scalars(scaled, header);
        }
        Ok(())
    }

    /// The scalars of a pre-multiplied sum, by rank; none for other reductions.
    fn read_scalars(&mut self, scaled: bool, header: &[u64; HEADER_WORDS]) {
        self.scalars.clear();
        if !scaled {
            return;
        }
        for rank in 0..self.world_size {
            let bits = match rank == self.rank {
                true => header[SCALAR],
                false => self.control.rank(rank).slots.read(self.epoch, SLOT_HEADER + SCALAR),
            };
            self.scalars.push(f64::from_bits(bits));
        }
    }
}

/// A message cut into blocks, and blocks into pieces, one per rank. Elements, not bytes.
pub(super) struct Blocks {
    /// Bytes per element.
    pub(super) size: usize,
    /// Number of blocks; one even if there is nothing, so that the call is announced.
    pub(super) number: u64,
    count: usize,
    block: usize,
}

impl Blocks {
    /// Blocks of `block` elements.
    pub(super) fn new(plan: &Plan, block: usize) -> Self {
        let number = plan.count.div_ceil(block).max(1) as u64;
        Self { size: plan.dtype.size(), number, count: plan.count, block }
    }

    /// First element and number of elements of a block.
    pub(super) fn block(&self, index: u64) -> (usize, usize) {
        let start = index as usize * self.block;
        (start, self.block.min(self.count - start))
    }

    /// Start within the block, and number of elements, of the piece that `owner` reduces. Pieces start on lines of 64
    /// bytes relative to the block, so that no two ranks write the same line.
    fn piece(&self, index: u64, owner: usize, world_size: usize) -> (usize, usize) {
        let (_, count) = self.block(index);
        let line = (64 / self.size).max(1);
        let piece = count.div_ceil(world_size).next_multiple_of(line);
        let start = (owner * piece).min(count);
        (start, piece.min(count - start))
    }
}

#[cfg(test)]
mod tests {
    use unisono_core::DType;
    use unisono_core::call::Kind;

    use super::*;

    #[test]
    fn blocks_and_pieces_cover_every_element_once() {
        for dtype in [DType::U8, DType::F32, DType::Complex128] {
            for count in [0usize, 1, 15, 16, 17, 1000, 16_384, 65_537, 200_000] {
                for world_size in [1, 2, 3, 7, 64] {
                    let plan = Plan { dtype, count, ..Plan::bare(Kind::AllGather) };
                    let blocks = Blocks::new(&plan, CHUNK_BYTES / dtype.size());
                    let mut next = 0;
                    for block in 0..blocks.number {
                        let (first, length) = blocks.block(block);
                        assert_eq!(first, next);
                        let mut inner = 0;
                        for owner in 0..world_size {
                            let (start, piece) = blocks.piece(block, owner, world_size);
                            assert!(start == inner || piece == 0, "{dtype} {count} {world_size} {owner}");
                            inner += piece;
                        }
                        assert_eq!(inner, length);
                        next += length;
                    }
                    assert_eq!(next, count);
                }
            }
        }
    }
}
