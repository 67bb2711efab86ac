//! The layout of one rank's tokens as a kernel.

use std::sync::Arc;

use unisono_core::DType;
use unisono_cuda::{Grid, Stream};

use super::args::LayoutArgs;
use super::kernels::{LAYOUT_FINISHED_AT, LAYOUT_THREADS};
use super::pool::Slab;
use super::report::COMPLAINT;
use super::{Fields, OnGpu};
use crate::ep::tensor::Tensor;
use crate::error::Result;

/// The most blocks.
const MOST_PORTIONS: usize = 16;

/// Where the tokens of this rank go, in memory of its device.
#[derive(Debug)]
pub(in crate::ep) struct DeviceRouting {
    pub(super) slab: Arc<Slab>,
    pub(in crate::ep) tokens: usize,
    pub(super) ranks: usize,
    experts: usize,
    /// Tokens of each block of the kernel, and blocks.
    pub(super) portion: u32,
    pub(super) portions: u32,
    pub(super) places: usize,
    is_in_rank: usize,
    pub(super) portion_counts: usize,
    pub(super) rank_counts: usize,
    pub(super) expert_counts: usize,
}

impl PartialEq for DeviceRouting {
    fn eq(&self, other: &Self) -> bool {
        self.slab == other.slab
    }
}

impl DeviceRouting {
    fn tensor(&self, at: usize, dtype: DType, shape: &[usize]) -> Tensor {
        Tensor::on_device(&self.slab, at, dtype, shape)
    }

    pub(in crate::ep) fn rank_counts(&self) -> Tensor {
        self.tensor(self.rank_counts, DType::I32, &[self.ranks])
    }

    pub(in crate::ep) fn expert_counts(&self) -> Tensor {
        self.tensor(self.expert_counts, DType::I32, &[self.experts])
    }

    pub(in crate::ep) fn is_in_rank(&self) -> Tensor {
        self.tensor(self.is_in_rank, DType::Bool, &[self.tokens, self.ranks])
    }

    /// Whether it was made by a buffer with this memory.
    pub(in crate::ep) fn is_of(&self, gpu: &OnGpu) -> bool {
        Arc::ptr_eq(self.slab.core(), &gpu.core)
    }
}

impl OnGpu {
    /// Where tokens go: `selections` are `tokens` × `top_k`. Tells nobody.
    pub(in crate::ep) fn layout(
        &mut self,
        (selections, tokens, top_k): (u64, usize, usize),
        stream: &Stream,
    ) -> Result<Arc<DeviceRouting>> {
        let is_captured = self.begin("layout", stream)?;
        let routing = self.put_layout((selections, tokens, top_k), (stream, is_captured))?;
        self.order_only((stream, is_captured))?;
        Ok(routing)
    }

    /// What follows a kernel that meets nobody.
    fn order_only(&mut self, (stream, is_captured): (&Stream, bool)) -> Result<()> {
        let has_met = self.has_met;
        self.conclude((stream, is_captured))?;
        self.has_met = has_met;
        Ok(())
    }

    /// The kernel of a layout, in a call that has begun.
    pub(super) fn put_layout(
        &self,
        (selections, tokens, top_k): (u64, usize, usize),
        (stream, is_captured): (&Stream, bool),
    ) -> Result<Arc<DeviceRouting>> {
        let (ranks, experts) = (self.world_size, self.tables.number);
        let portions = tokens.div_ceil(LAYOUT_THREADS as usize).clamp(1, MOST_PORTIONS);
        let mut fields = Fields::default();
        let places = fields.add(tokens * ranks * 4);
        let is_in_rank = fields.add(tokens * ranks);
        let portion_counts = fields.add(portions * ranks * 4);
        let portion_selections = fields.add(portions * experts * 4);
        let (rank_counts, expert_counts) = (fields.add(ranks * 4), fields.add(experts * 4));
        let slab = self.take_own(fields.end, (stream, is_captured))?;
        let at = |field: usize| slab.address() + field as u64;
        let portion = tokens.div_ceil(portions).max(1) as u32;
        let args = LayoutArgs {
            selections,
            experts: self.tables.experts,
            places: at(places),
            is_in_rank: at(is_in_rank),
            portion_counts: at(portion_counts),
            portion_selections: at(portion_selections),
            rank_counts: at(rank_counts),
            expert_counts: at(expert_counts),
            finished: self.core.state.address() + LAYOUT_FINISHED_AT as u64,
            complaint: self.page_at(COMPLAINT),
            tokens: tokens as u32,
            top_k: top_k as u32,
            number: experts as u32,
            portion,
        };
        let grid =
            Grid { blocks: portions as u32, threads: LAYOUT_THREADS, shared_bytes: 0, is_early: false };
        // SAFETY: the kernel takes `LayoutArgs`; the slab is ours, and the selections are valid until the stream has passed, as whoever
        // made the call promised.
        unsafe { self.launch(&self.core.kernels.layout, stream, grid, args) }?;
        Ok(Arc::new(DeviceRouting {
            slab,
            tokens,
            ranks,
            experts,
            portion,
            portions: portions as u32,
            places,
            is_in_rank,
            portion_counts,
            rank_counts,
            expert_counts,
        }))
    }
}
