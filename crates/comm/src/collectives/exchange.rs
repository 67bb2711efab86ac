//! What all staged collectives share: blocks are staged by those who have data and consumed by those who need it, one
//! block behind. A collective says who stages, who reads from whom, and what the two steps copy or reduce.
//!
//! ```text
//! turn t:   stage block t (credit, copy, announce)      consume block t − 1 (wait for those we read from, copy or reduce)
//! ```
//! Ranks that only stage wait for nobody but their credit; ranks that only read announce themselves at once.

use std::ops::Range;

use unisono_core::layout::{CHUNK_BYTES, SLOT_DATA};

use super::blocks::Blocks;
use super::copy::{copy, to_words};
use super::engine::{Engine, State, chunk};
use super::plan::Plan;
use super::waiting::{On, Step};

/// From whom a rank reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Reads {
    /// From every other rank.
    Everybody,
    /// From this rank.
    From(usize),
    /// From nobody.
    Nobody,
}

/// A rank's part in a staged collective.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) stages: bool,
    pub(super) reads: Reads,
}

impl Part {
    /// Everybody stages and reads from everybody.
    pub(super) const ALL: Self = Self { stages: true, reads: Reads::Everybody };

    /// One rank stages, the others read from it.
    pub(super) const fn from_root(rank: usize, root: usize) -> Self {
        let is_root = rank == root;
        Self { stages: is_root, reads: if is_root { Reads::Nobody } else { Reads::From(root) } }
    }

    /// All but one rank stage, that one reads from all.
    pub(super) const fn to_root(rank: usize, root: usize) -> Self {
        let is_root = rank == root;
        Self { stages: !is_root, reads: if is_root { Reads::Everybody } else { Reads::Nobody } }
    }
}

impl Engine {
    /// Runs these blocks, from where the last turn stopped. `stage` gets a block and our chunk for it; `consume` gets a block and where its chunk lies
    /// within the staging of every rank that we read from. Returns the number of steps.
    pub(super) fn exchange(
        &mut self,
        at: &mut State,
        blocks: Range<u64>,
        part: Part,
        stage: impl Fn(u64, *mut u8),
        mut consume: impl FnMut(&mut Self, u64, usize),
    ) -> Step<u64> {
        if !part.stages && at.turn == 0 {
            self.arrive_once(&[], at);
        }
        while at.turn <= blocks.end {
            if at.phase == 0 && at.turn < blocks.end && part.stages {
                let chunk = self.reserve(self.step + 1 + at.turn)?;
                // SAFETY: the chunk lies inside our staging.
                stage(at.turn, unsafe { self.control.rank(self.rank).staging_in.add(chunk) });
                self.announce_block(at.turn);
            }
            at.phase = 1;
            if at.turn > blocks.start {
                let block = at.turn - 1;
                self.hear_block(block, part.reads)?;
                consume(self, block, chunk(self.step + 1 + block));
                self.announce(|words| words.consumed, self.step + 1 + block);
            }
            (at.turn, at.phase) = (at.turn + 1, 0);
        }
        Ok(blocks.end)
    }

    /// The sources, of `bytes`, at most 48, travel in the call slots of those who stage: afterwards `self.inline` holds ours,
    /// if there is one, and those that we read.
    #[inline]
    pub(super) fn exchange_inline(
        &mut self,
        plan: &Plan,
        bytes: usize,
        part: Part,
        at: &mut State,
    ) -> Step<()> {
        let words = bytes.div_ceil(8);
        if part.stages || part.reads == Reads::Everybody {
            // SAFETY: the source is valid for its length, at most the size of the words.
            unsafe { to_words(plan.source, bytes, &mut self.inline[self.rank]) };
        }
        if at.phase == 0 {
            at.phase = 1;
            self.write_header();
            self.publish(&self.inline[self.rank][..if part.stages { words } else { 0 }]);
        }
        match part.reads {
            Reads::Nobody => {}
            Reads::From(peer) => self.read_inline(peer, words)?,
            Reads::Everybody => {
                for peer in self.peers() {
                    self.read_inline(peer, words)?;
                }
                self.heard_all();
            }
        }
        Ok(())
    }

    #[inline]
    fn read_inline(&mut self, peer: usize, words: usize) -> Step<()> {
        self.hear(peer)?;
        for at in 0..words {
            self.inline[peer][at] = self.control.rank(peer).slots.read(self.epoch, SLOT_DATA + at);
        }
        Ok(())
    }

    /// The chunk at `at` of what `rank` staged.
    pub(super) fn staged(&self, rank: usize, at: usize) -> *const u8 {
        debug_assert!(at < unisono_core::layout::CHUNKS * CHUNK_BYTES);
        // SAFETY: the chunk lies inside that rank's staging.
        unsafe { self.control.rank(rank).staging_in.add(at).cast_const() }
    }

    /// Announces that our part of `block` is staged: the first with the call itself, later ones by count.
    pub(super) fn announce_block(&mut self, block: u64) {
        if block == 0 {
            self.arrive(&[]);
        } else {
            self.announce(|words| words.produced, self.step + 1 + block);
        }
    }

    /// Waits until those we read from have staged their part of `block`.
    pub(super) fn hear_block(&mut self, block: u64, reads: Reads) -> Step<()> {
        let hear = |peer| match block {
            0 => self.hear(peer),
            _ => self.until(peer, On::Produced, self.step + 1 + block),
        };
        match reads {
            Reads::Nobody => {}
            Reads::From(peer) => hear(peer)?,
            Reads::Everybody => {
                for peer in self.peers() {
                    hear(peer)?;
                }
                if block == 0 {
                    self.heard_all();
                }
            }
        }
        Ok(())
    }

    /// Bytes between the pieces of different ranks in one chunk: whole lines, so that no two ranks read the same one.
    pub(super) const fn piece_stride(&self) -> usize {
        (CHUNK_BYTES / self.world_size) & !63
    }
}

/// Stages our own part, block by block.
pub(super) fn stage_source<'p>(plan: &'p Plan, blocks: &'p Blocks) -> impl Fn(u64, *mut u8) + use<'p> {
    move |block, chunk| {
        let (at, bytes) = blocks.bytes_of(block, plan.own());
        // SAFETY: the block lies in our source; the chunk is ours to write, by the credit taken for it.
        unsafe { copy(plan.source.add(at), chunk, bytes) };
    }
}
