//! Broadcast: the root stages once, every other rank copies; or, in windows, reads the root's in place. The root runs
//! ahead as far as its credit goes.

use unisono_core::call::HEADER_WORDS;
use unisono_core::layout::{CHUNK_BYTES, INLINE_BYTES, INLINE_WORDS, SLOT_DATA};
use unisono_core::select::Algorithm;

use super::blocks::Blocks;
use super::copy::{copy, to_words};
use super::engine::Engine;
use super::exchange::{Part, stage_source};
use super::plan::Plan;
use crate::error::Result;

impl Engine {
    /// Returns the number of steps it took.
    #[inline]
    pub(super) fn broadcast(
        &mut self,
        plan: &Plan,
        root: usize,
        header: &[u64; HEADER_WORDS],
    ) -> Result<u64> {
        let bytes = plan.bytes();
        if plan.algorithm == Algorithm::Direct {
            return self.broadcast_direct(plan, root, header);
        }
        if bytes <= INLINE_BYTES {
            return self.broadcast_inline(plan, root, header);
        }
        let blocks = Blocks::new(plan, CHUNK_BYTES / plan.dtype.size());
        let stage = stage_source(plan, &blocks);
        let part = Part::from_root(self.rank, root);
        self.exchange(header, blocks.number, part, stage, |engine, block, chunk| {
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

    fn broadcast_inline(&mut self, plan: &Plan, root: usize, header: &[u64; HEADER_WORDS]) -> Result<u64> {
        let bytes = plan.bytes();
        let words = bytes.div_ceil(8);
        if self.rank == root {
            // SAFETY: the source is valid for `bytes`, at most the size of the words.
            let data: [u64; INLINE_WORDS] = unsafe { to_words(plan.source, bytes) };
            self.arrive(header, &data[..words]);
            // SAFETY: the root's own target is equal to or disjoint from its source.
            unsafe { copy(plan.source, plan.target, bytes) };
            return Ok(0);
        }
        self.arrive(header, &[]);
        self.hear(root)?;
        for at in 0..words {
            self.inline[root][at] = self.control.rank(root).slots.read(self.epoch, SLOT_DATA + at);
        }
        // SAFETY: our own copy of the data, into a target that is valid for `bytes`.
        unsafe { copy(self.inline_sources[root], plan.target, bytes) };
        Ok(0)
    }

    /// All buffers lie in windows: the root's is read in place. One step, for the barrier at the end.
    fn broadcast_direct(&mut self, plan: &Plan, root: usize, header: &[u64; HEADER_WORDS]) -> Result<u64> {
        let bytes = plan.bytes();
        let (sources, _) = self.exchange_places(plan, header, bytes)?;
        // SAFETY: the place of the root's source was checked, and the root does not write it before all have left.
        unsafe { copy(sources[root].cast_const(), plan.target, bytes) };
        self.leave_together(1)?;
        Ok(1)
    }

    /// Tells the peers where our buffers lie in their windows, and learns where theirs do: addresses of `bytes` each,
    /// by rank, of sources and of targets. Every rank is heard.
    pub(super) fn exchange_places(
        &mut self,
        plan: &Plan,
        header: &[u64; HEADER_WORDS],
        bytes: usize,
    ) -> Result<(Vec<*mut u8>, Vec<*mut u8>)> {
        let place =
            |window: Option<super::WindowPlace>| window.map_or((0, 0), |place| (place.id, place.offset));
        let ((source_id, source_at), (target_id, target_at)) =
            (place(plan.source_window), place(plan.target_window));
        self.arrive(header, &[source_at as u64, target_at as u64]);
        let mut places = vec![(source_at, target_at); self.world_size];
        for peer in self.peers() {
            self.hear(peer)?;
            let slots = self.control.rank(peer).slots;
            let offset = |at| slots.read(self.epoch, SLOT_DATA + at) as usize;
            places[peer] = (offset(0), offset(1));
        }
        self.heard_all();
        let (mut sources, mut targets) = (Vec::with_capacity(places.len()), Vec::with_capacity(places.len()));
        for (rank, (source, target)) in places.into_iter().enumerate() {
            sources.push(self.window_address(rank, source_id, source, bytes)?);
            targets.push(self.window_address(rank, target_id, target, bytes)?);
        }
        Ok((sources, targets))
    }

    /// The barrier at the end of a direct collective of `steps` steps: nobody touches a window after it.
    pub(super) fn leave_together(&mut self, steps: u64) -> Result<()> {
        self.announce(|words| words.consumed, self.step + steps);
        for peer in self.peers() {
            self.wait_for(peer, |words| words.consumed, self.step + steps)?;
        }
        Ok(())
    }
}
