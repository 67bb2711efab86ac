//! What copy engines move in an all-gather or a broadcast, step by step: a pure function of what is equal on all ranks, and of the
//! rank.
//!
//! ```text
//!             our slots              the next rank's slots
//!  input ──stage──► [s]  ──pull──► its output ──stage──► [s]  ──pull──► …
//! ```
//! The data goes round in chunks. Buffers of users may lie anywhere, so a rank *stages* a chunk in a slot of its own scratch, and the
//! next rank *pulls* it from there into its output, and stages it in turn for the rank behind. A rank writes into its own memory
//! only: whatever is enqueued behind a call that failed, and still runs, harms nobody.
//!
//! In step t a rank pulls what the previous one staged in step t − L, then stages what the next one will pull in step t + L, with L
//! lanes. Steps of one lane follow each other; those of different lanes overlap. Between the copies of step t − L and those of step t
//! stands a kernel, from step L on, that tells both neighbours that the former are done, and waits until theirs are. So
//!
//! - what is pulled in step t is there, because the previous rank staged it in its step t − L;
//! - what is overwritten in step t, in slot t mod 2·L, was staged in step t − 2·L, and the next rank pulled it in its step t − L;
//! - no kernel waits for anything behind the kernels of the same step, so every order that keeps these two rules ends, and also if all
//!   work of a device shares one queue.
//!
//! Bytes out of each rank: those of the operation. An all-gather takes L + chunks · (n − 1) steps, a broadcast chunks + (n − 1) · L.

use super::layout::ArenaLayout;
use crate::call::Kind;

/// The most lanes that are of any use.
pub const MOST_LANES: usize = 8;

/// The slots of each rank.
const fn slots(lanes: usize) -> usize {
    2 * lanes
}

/// The most bytes of a chunk: slots fill both halves of the scratch.
pub const fn slot_bytes(layout: &ArenaLayout, lanes: usize) -> usize {
    let bytes = layout.scratch().bytes / slots(lanes);
    bytes - bytes % 128
}

/// All steps of a call, of all ranks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Steps {
    /// Number of ranks, at least two.
    pub ranks: usize,
    /// Whose data it is; `None` if everybody's, as in an all-gather.
    pub root: Option<usize>,
    /// Bytes of one part.
    pub bytes: usize,
    /// Bytes of a chunk, not 0.
    pub chunk: usize,
    /// Steps that overlap, not 0.
    pub lanes: usize,
}

/// What is copied in one step on one rank: `pull`, then `stage`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// From a slot of the previous rank to our output.
    pub pull: Option<Piece>,
    /// From our output, or from our input if the part is our own, to a slot of ours.
    pub stage: Option<Piece>,
}

/// A chunk on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Whose it was in the beginning.
    pub owner: usize,
    /// Where in its owner's part it begins, in bytes.
    pub at: usize,
    /// Its length, not 0.
    pub bytes: usize,
    /// The slot.
    pub slot: usize,
}

impl Steps {
    /// Those of a call of `kind`, an all-gather or a broadcast.
    pub fn new(kind: Kind, ranks: usize, bytes: usize, (chunk, lanes): (usize, usize)) -> Self {
        Self { ranks, root: kind.root().map(|root| root as usize), bytes, chunk, lanes }
    }

    /// In whole rounds of lanes, so that who passes a chunk on never has to wait for a lane with nothing in it.
    const fn chunks(&self) -> usize {
        self.bytes.div_ceil(self.chunk).next_multiple_of(self.lanes)
    }

    /// How many steps there are, equally many on all ranks.
    pub const fn count(&self) -> usize {
        match self.root {
            None => self.lanes + self.chunks() * (self.ranks - 1),
            Some(_) => self.chunks() + (self.ranks - 1) * self.lanes,
        }
    }

    /// What `rank` copies in step `t`.
    pub fn step(&self, rank: usize, t: usize) -> Step {
        Step {
            pull: self
                .pulled(rank, t)
                .map(|piece| Piece { slot: (t - self.lanes) % slots(self.lanes), ..piece }),
            stage: self
                .pulled((rank + 1) % self.ranks, t + self.lanes)
                .map(|piece| Piece { slot: t % slots(self.lanes), ..piece }),
        }
    }

    /// What `rank` pulls in step `t`.
    fn pulled(&self, rank: usize, t: usize) -> Option<Piece> {
        let (ranks, lanes) = (self.ranks, self.lanes);
        let (owner, chunk) = match self.root {
            None => {
                // Rounds of as many chunks as lanes go round one after the other.
                let step = t.checked_sub(lanes)?;
                let round = (ranks - 1) * lanes;
                let (hop, lane) = (step % round / lanes + 1, step % lanes);
                ((rank + ranks - hop) % ranks, step / round * lanes + lane)
            }
            Some(root) => {
                let distance = (rank + ranks - root) % ranks;
                if distance == 0 {
                    return None;
                }
                (root, t.checked_sub(distance * lanes)?)
            }
        };
        let at = chunk * self.chunk;
        let bytes = self.bytes.saturating_sub(at).min(self.chunk);
        (bytes > 0).then_some(Piece { owner, at, bytes, slot: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A generator of numbers below a bound.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: usize) -> usize {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) as usize % bound
        }
    }

    /// A chunk: its owner and where it begins. `None` while somebody writes it.
    type Content = Option<(usize, usize)>;

    #[derive(Clone, Copy, PartialEq, Debug)]
    enum Copying {
        Waits,
        Pulls(Content),
        HasPulled,
        Stages(Content),
        Done,
    }

    struct Rank {
        /// Kernels that have told, and those that have ended; the kernel of step t is number t.
        told: usize,
        through: usize,
        copies: Vec<Copying>,
        slots: Vec<Content>,
        output: Vec<(usize, usize)>,
    }

    /// Carries out the steps of all ranks in a random order of what the rules allow, where a copy takes its time, and says what each
    /// rank has then. `is_serial`: each device has one queue.
    fn run(steps: &Steps, is_serial: bool, random: &mut Random) -> Vec<Vec<(usize, usize)>> {
        let (count, lanes, ranks) = (steps.count(), steps.lanes, steps.ranks);
        let rank = || Rank {
            told: lanes,
            through: lanes,
            copies: vec![Copying::Waits; count],
            slots: vec![None; slots(lanes)],
            output: Vec::new(),
        };
        let mut world: Vec<Rank> = (0..ranks).map(|_| rank()).collect();
        loop {
            // (rank, None) is a kernel's move, (rank, Some(t)) one of the copies of step t.
            let mut moves: Vec<(usize, Option<usize>)> = Vec::new();
            for (me, rank) in world.iter().enumerate() {
                let (next, previous) = ((me + 1) % ranks, (me + ranks - 1) % ranks);
                let is_done = |t: usize| rank.copies[t] == Copying::Done;
                let t = rank.through;
                if t < count {
                    let may_tell = if is_serial { (0..t).all(is_done) } else { (0..=t - lanes).all(is_done) };
                    let is_heard = world[next].told > t && world[previous].told > t;
                    if (rank.told == t && may_tell) || (rank.told > t && is_heard) {
                        moves.push((me, None));
                    }
                }
                // Copies of a lane follow each other, because the kernel between them waits for the earlier.
                moves.extend((0..rank.through.min(count)).filter(|t| !is_done(*t)).map(|t| (me, Some(t))));
            }
            if moves.is_empty() {
                assert!(world.iter().all(|rank| rank.through == count), "nobody can go on: {steps:?}");
                return world.into_iter().map(|rank| rank.output).collect();
            }
            let (me, copy) = moves[random.below(moves.len())];
            let Some(t) = copy else {
                let rank = &mut world[me];
                if rank.told == rank.through {
                    rank.told += 1
                } else {
                    rank.through += 1
                }
                continue;
            };
            let Step { pull, stage } = steps.step(me, t);
            let previous = (me + ranks - 1) % ranks;
            world[me].copies[t] = match (world[me].copies[t], pull, stage) {
                (Copying::Waits, Some(piece), _) => Copying::Pulls(world[previous].slots[piece.slot]),
                (Copying::Waits, None, _) => Copying::HasPulled,
                (Copying::Pulls(found), Some(piece), _) => {
                    assert_eq!(found, Some((piece.owner, piece.at)), "{steps:?} rank {me} step {t}");
                    assert_eq!(
                        found, world[previous].slots[piece.slot],
                        "overwritten in step {t}: {steps:?}"
                    );
                    world[me].output.push((piece.owner, piece.at));
                    Copying::HasPulled
                }
                (Copying::HasPulled, _, Some(piece)) => {
                    let content = (piece.owner, piece.at);
                    let is_own = piece.owner == me;
                    assert!(
                        is_own || world[me].output.contains(&content),
                        "not there in step {t}: {steps:?}"
                    );
                    world[me].slots[piece.slot] = None;
                    Copying::Stages(Some(content))
                }
                (Copying::Stages(content), _, Some(piece)) => {
                    world[me].slots[piece.slot] = content;
                    Copying::Done
                }
                _ => Copying::Done,
            };
        }
    }

    #[test]
    fn every_rank_gets_every_chunk_once_in_whatever_order_the_devices_work() {
        let mut random = Random(7);
        for ranks in 2..=5 {
            for lanes in 1..=4 {
                for (bytes, chunk) in [(1, 128), (640, 128), (641, 128), (5000, 256), (256, 256)] {
                    for root in [None, Some(0), Some(ranks - 1), Some(ranks / 2)] {
                        let steps = Steps { ranks, root, bytes, chunk, lanes };
                        for is_serial in [false, true, false] {
                            for (me, mut got) in run(&steps, is_serial, &mut random).into_iter().enumerate() {
                                got.sort_unstable();
                                let owners =
                                    (0..ranks).filter(|owner| root.is_none_or(|root| root == *owner));
                                let others = owners.filter(|owner| *owner != me);
                                let expected: Vec<_> = others
                                    .flat_map(|owner| (0..bytes).step_by(chunk).map(move |at| (owner, at)))
                                    .collect();
                                assert_eq!(got, expected, "rank {me}: {steps:?}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_a_rank_stages_of_others_it_pulled_in_the_same_step() {
        for root in [None, Some(1)] {
            let steps = Steps { ranks: 4, root, bytes: 10_000, chunk: 512, lanes: 3 };
            for rank in 0..4 {
                let mut own = Vec::new();
                for t in 0..steps.count() {
                    let Step { pull, stage } = steps.step(rank, t);
                    let Some(staged) = stage else { continue };
                    if staged.owner == rank {
                        own.push(staged.at);
                    } else {
                        let pulled = pull.unwrap();
                        assert_eq!(
                            (pulled.owner, pulled.at, pulled.bytes),
                            (staged.owner, staged.at, staged.bytes)
                        );
                    }
                }
                let is_giver = root.is_none_or(|root| root == rank);
                let all: Vec<usize> = if is_giver { (0..10_000).step_by(512).collect() } else { Vec::new() };
                assert_eq!(own, all);
            }
        }
    }
}
