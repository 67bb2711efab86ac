//! The quantised all-reduce on the host: inputs are staged as they are, and every rank computes what quantised ones would have given. It
//! has the bits of GPUs, and saves nothing.

use unisono_core::layout::CHUNK_BYTES;
use unisono_core::quantised::{GROUP, reference};

use super::blocks::Blocks;
use super::copy::copy;
use super::engine::{Engine, State};
use super::exchange::{Part, stage_source};
use super::plan::Plan;
use super::waiting::Step;

/// Elements of a block: whole groups.
const fn block(size: usize) -> usize {
    let elements = CHUNK_BYTES / size;
    elements - elements % GROUP
}

/// What the host keeps of a block: those of all ranks, and the sum.
#[derive(Default)]
pub(super) struct BlockMemory {
    inputs: Vec<Vec<u8>>,
    output: Vec<u8>,
}

impl Engine {
    /// Blocks are staged as in an all-reduce. Returns the number of steps.
    pub(super) fn all_reduce_quantised(&mut self, plan: &Plan, at: &mut State) -> Step<u64> {
        let blocks = Blocks::new(plan, block(plan.dtype.size()));
        let stage = stage_source(plan, &blocks);
        self.exchange(at, 0..blocks.number, Part::ALL, stage, |engine, block, chunk| {
            let (at, bytes) = blocks.bytes(block);
            let mut memory = std::mem::take(&mut engine.quantised);
            memory.inputs.resize_with(engine.world_size, Vec::new);
            memory.output.resize(bytes, 0);
            for (rank, input) in memory.inputs.iter_mut().enumerate() {
                input.resize(bytes, 0);
                // SAFETY: the block lies in our source; every peer has announced it, and keeps it until we announce that we are done
                // with it.
                unsafe {
                    let from =
                        if rank == engine.rank { plan.source.add(at) } else { engine.staged(rank, chunk) };
                    copy(from, input.as_mut_ptr(), bytes);
                }
            }
            let inputs: Vec<&[u8]> = memory.inputs.iter().map(|input| &input[..]).collect();
            if let Err(error) = reference(plan.dtype, &inputs, &mut memory.output) {
                unreachable!("blocks of a checked call: {error}");
            }
            // SAFETY: the block lies in our target.
            unsafe { copy(memory.output.as_ptr(), plan.target.add(at), bytes) };
            engine.quantised = memory;
        })
    }
}

#[cfg(feature = "cuda")]
impl Plan {
    /// The same call on parts of at most `most` elements, one after the other; an empty one has one.
    pub(crate) fn in_parts(&self, most: usize) -> impl Iterator<Item = Self> {
        (0..self.count.max(1)).step_by(most).map(move |first| {
            let at = first * self.dtype.size();
            let mut part = Self { count: most.min(self.count - first), ..self.clone() };
            (part.source, part.target) = (self.source.wrapping_add(at), self.target.wrapping_add(at));
            for place in [&mut part.source_window, &mut part.target_window].into_iter().flatten() {
                place.offset += at;
            }
            part
        })
    }
}
