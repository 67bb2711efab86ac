//! All-to-all: every rank stages a piece for every other; each copies its own from all of them.

use unisono_core::call::HEADER_WORDS;

use super::copy::copy;
use super::engine::{Engine, State};
use super::exchange::Part;
use super::plan::Plan;
use super::waiting::Step;

impl Engine {
    /// Returns the number of steps. In place, a block of every part is staged before any of it is overwritten.
    pub(super) fn all_to_all(
        &mut self,
        plan: &Plan,
        header: &[u64; HEADER_WORDS],
        at: &mut State,
    ) -> Step<u64> {
        let blocks = self.pieces(plan);
        let stage = self.stage_pieces(plan, &blocks);
        self.exchange((header, at), blocks.number, Part::ALL, stage, |engine, block, chunk| {
            let (at, bytes) = blocks.bytes(block);
            let mine = chunk + engine.rank * engine.piece_stride();
            for rank in 0..engine.world_size {
                let place = rank * plan.bytes() + at;
                // SAFETY: every peer announced this block and keeps it until we have consumed the step; the target has a
                // part for every rank, and is equal to or disjoint from our source.
                unsafe {
                    let source =
                        if rank == engine.rank { plan.source.add(place) } else { engine.staged(rank, mine) };
                    copy(source, plan.target.add(place), bytes);
                }
            }
        })
    }
}
