//! Broadcast: the root stages once, every other rank copies; or, in windows, reads the root's in place. The root runs
//! ahead as far as its credit goes.

use unisono_core::layout::{CHUNK_BYTES, SLOT_DATA};
use unisono_core::select::Algorithm;

use super::blocks::Blocks;
use super::copy::copy;
use super::engine::{Engine, State};
use super::exchange::{Part, stage_source};
use super::plan::Plan;
use super::waiting::{On, Step};

impl Engine {
    /// Returns the number of steps it took.
    #[inline]
    pub(super) fn broadcast(&mut self, plan: &Plan, root: usize, at: &mut State) -> Step<u64> {
        if plan.algorithm == Algorithm::Direct {
            return self.broadcast_direct(plan, root, at);
        }
        if self.is_inline(plan) {
            return self.broadcast_inline(plan, root, at);
        }
        let blocks = Blocks::new(plan, CHUNK_BYTES / plan.dtype.size());
        let stage = stage_source(plan, &blocks);
        let part = Part::from_root(self.rank, root);
        self.exchange(at, 0..blocks.number, part, stage, |engine, block, chunk| {
            let (at, bytes) = blocks.bytes(block);
            // SAFETY: the root announced this block and keeps it until we have consumed the step; its own target is equal
            // to or disjoint from its source.
            unsafe {
                let source =
                    if engine.rank == root { plan.source.add(at) } else { engine.staged(root, chunk) };
                copy(source, plan.target.add(at), bytes);
            }
        })
    }

    fn broadcast_inline(&mut self, plan: &Plan, root: usize, at: &mut State) -> Step<u64> {
        let bytes = plan.bytes();
        self.exchange_inline(plan, bytes, Part::from_root(self.rank, root), at)?;
        // SAFETY: our own copy of the data, into a target that is valid for `bytes`.
        unsafe { copy(self.inline_sources[root], plan.target, bytes) };
        Ok(0)
    }

    /// All buffers lie in windows: the root's is read in place. One step, for the barrier at the end.
    fn broadcast_direct(&mut self, plan: &Plan, root: usize, at: &mut State) -> Step<u64> {
        let bytes = plan.bytes();
        if self.exchange_places(plan, (bytes, bytes), at)? {
            // SAFETY: the place of the root's source was checked, and the root does not write it before all have left.
            unsafe { copy(self.places[root].0.cast_const(), plan.target, bytes) };
        }
        self.leave_together(1, at)?;
        Ok(1)
    }

    /// Tells the peers where our buffers lie in their windows, and learns where theirs do: afterwards `self.places` holds the
    /// addresses, by rank, of inputs and of outputs, of so many bytes; null where they do not count. Every rank is heard. True the first time that it is
    /// complete: the phase is then 2.
    pub(super) fn exchange_places(
        &mut self,
        plan: &Plan,
        (source_bytes, target_bytes): (usize, usize),
        at: &mut State,
    ) -> Step<bool> {
        if at.phase > 1 {
            return Ok(false);
        }
        let place =
            |window: Option<super::WindowPlace>| window.map_or((0, 0), |place| (place.id, place.offset));
        let (source, target) = (place(plan.source_window), place(plan.target_window));
        self.arrive_once(&[source.1 as u64, target.1 as u64], at);
        self.places.clear();
        for rank in 0..self.world_size {
            let mut offsets = (source.1, target.1);
            if rank != self.rank {
                self.hear(rank)?;
                let slots = self.control.rank(rank).slots;
                let offset = |at| slots.read(self.epoch, SLOT_DATA + at) as usize;
                offsets = (offset(0), offset(1));
            }
            let source = self.window_address(rank, source.0, offsets.0, source_bytes)?;
            let target = self.window_address(rank, target.0, offsets.1, target_bytes)?;
            self.places.push((source, target));
        }
        self.heard_all();
        at.phase = 2;
        Ok(true)
    }

    /// The barrier at the end of a direct collective of `steps` steps: nobody touches a window after it.
    pub(super) fn leave_together(&mut self, steps: u64, at: &mut State) -> Step<()> {
        if at.phase < 3 {
            at.phase = 3;
            self.announce(|words| words.consumed, self.step + steps);
        }
        for peer in self.peers() {
            self.until(peer, On::Consumed, self.step + steps)?;
        }
        Ok(())
    }
}
