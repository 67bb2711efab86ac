//! Low-latency calls as kernels: one for a whole call, or one for each of its halves, between which nothing of it runs.
//!
//! Calls are numbered on the device, so a graph goes on where calls before it ended. The host only sees to their order.

use std::sync::Arc;

use unisono_core::DType;
use unisono_core::device::layout::MAX_RANKS;
use unisono_core::ep::cast::{PACKED, ScaleKind};
use unisono_core::ep::{ArenaShape, LowLatencyLayout, Placement};
use unisono_cuda::{Grid, Stream};

use super::args::{BufferArgs, LowLatencyArgs};
use super::kernels::{LOW_LATENCY_THREADS, LowLatencyFunctions, PROGRESS_AT};
use super::pool::Slab;
use super::{Fields, OnGpu};
use crate::ep::tensor::Tensor;
use crate::ep::words::{CallWords, ToldWords};
use crate::error::Result;

/// Which halves of a call a kernel carries out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(in crate::ep) enum Phases {
    Send = 1,
    Receive = 2,
    Both = 3,
}

impl Phases {
    const fn sends(self) -> bool {
        self as u32 & Self::Send as u32 != 0
    }

    const fn receives(self) -> bool {
        self as u32 & Self::Receive as u32 != 0
    }
}

/// What low-latency calls of a buffer have in common.
#[derive(Debug)]
pub(super) struct LowLatency {
    args: LowLatencyArgs,
    functions: Arc<LowLatencyFunctions>,
    /// Blocks that may wait at once.
    blocks: u32,
    /// Whether a kernel may begin while the one before is at work. Where ranks share a device, the blocks of another rank need the room.
    is_early: bool,
    /// Calls put into streams.
    sent: u64,
    received: u64,
}

/// What a buffer's memory has to do with low-latency calls.
pub(super) struct Places<'a> {
    pub(super) shape: &'a ArenaShape,
    pub(super) placement: &'a Placement,
    pub(super) layout: &'a LowLatencyLayout,
    /// Where that begins in the memory of each rank.
    pub(super) offset: usize,
    /// The words of the buffer on our device, and its table of experts.
    pub(super) state: u64,
    pub(super) experts: u64,
}

impl LowLatency {
    pub(super) fn new(
        functions: Arc<LowLatencyFunctions>,
        (blocks, is_early): (u32, bool),
        places: &Places<'_>,
    ) -> Self {
        let Places { shape, placement, layout, .. } = *places;
        let at = |offset: usize| (places.offset + offset) as u64;
        let even = Placement::even(shape.experts, shape.world_size).is_ok_and(|even| even == *placement);
        let mut experts_of = [0; MAX_RANKS];
        for (rank, experts) in experts_of.iter_mut().enumerate().take(shape.world_size) {
            *experts = placement.local_experts(rank) as u32;
        }
        let args = LowLatencyArgs {
            progress: places.state + PROGRESS_AT as u64,
            credits_at: at(layout.credits.offset),
            halves: layout.halves.map(|half| at(half.offset)),
            counts_at: layout.counts.offset as u64,
            choices_at: layout.choices.offset as u64,
            pieces_told_at: layout.pieces_told.offset as u64,
            scales_at: layout.scales.offset as u64,
            rows_at: layout.rows.offset as u64,
            placement: places.experts,
            hidden: shape.hidden as u32,
            experts: shape.experts as u32,
            per_rank: if even { (shape.experts / shape.world_size) as u32 } else { 0 },
            capacity: shape.capacity as u32,
            most_top_k: shape.top_k as u32,
            most_experts: layout.experts as u32,
            pieces: layout.pieces as u32,
            row_scales: layout.scales_of_row as u32,
            row_stride: layout.row_stride as u32,
            experts_of,
            ..LowLatencyArgs::default()
        };
        Self { args, functions, blocks, is_early, sent: 0, received: 0 }
    }

    /// No more than a block for each warp's work: heads, the choices of tokens and their pieces, and pieces of all tokens that may come,
    /// which are sent, or made sums of, and received. Whoever stores at peers waits for that to arrive, so it is better done side by side.
    fn grid(&self, ranks: usize) -> Grid {
        let (tokens, pieces) = (self.args.capacity as usize, self.args.pieces as usize);
        let blocks = ranks + tokens * (1 + pieces) + 2 * ranks * tokens * pieces;
        Grid {
            blocks: blocks.min(self.blocks as usize) as u32,
            threads: LOW_LATENCY_THREADS,
            shared_bytes: 0,
            is_early: self.is_early,
        }
    }
}

/// Where the rows of a dispatch came from, in memory of our device.
#[derive(Debug)]
pub(in crate::ep) struct DeviceOrigins {
    slab: Arc<Slab>,
    source_tokens: usize,
    ranges: usize,
    slots: usize,
    /// Experts, rows of each, and ranks.
    shape: [usize; 3],
}

impl DeviceOrigins {
    pub(in crate::ep) fn source_tokens(&self) -> Tensor {
        let [experts, rows, _] = self.shape;
        Tensor::on_device(&self.slab, self.source_tokens, DType::I32, &[experts, rows])
    }

    pub(in crate::ep) fn layout_range(&self) -> Tensor {
        let [experts, _, ranks] = self.shape;
        Tensor::on_device(&self.slab, self.ranges, DType::I64, &[experts, ranks])
    }

    /// Whether it came of a dispatch of a buffer with this memory.
    pub(in crate::ep) fn is_of(&self, gpu: &OnGpu) -> bool {
        Arc::ptr_eq(self.slab.core(), &gpu.core)
    }
}

/// What a dispatch brought.
pub(in crate::ep) struct Arrived {
    pub(in crate::ep) x: Tensor,
    pub(in crate::ep) scales: Option<Tensor>,
    pub(in crate::ep) counts: Tensor,
    pub(in crate::ep) waited: Tensor,
    pub(in crate::ep) origins: DeviceOrigins,
}

/// A call that was sent: for its other half.
#[derive(Debug)]
pub(in crate::ep) struct SentOnGpu {
    number: u64,
    stream: Stream,
    pub(in crate::ep) inputs: Inputs,
}

impl SentOnGpu {
    pub(in crate::ep) const fn stream(&self) -> &Stream {
        &self.stream
    }
}

/// What a call reads, checked: addresses of our device.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::ep) struct Inputs {
    pub(in crate::ep) x: u64,
    pub(in crate::ep) selections: u64,
    pub(in crate::ep) weights: u64,
}

impl OnGpu {
    /// Calls that were sent and not received.
    pub(in crate::ep) fn open_calls(&self) -> usize {
        self.low_latency.as_ref().map_or(0, |calls| (calls.sent - calls.received) as usize)
    }

    /// Whether `sent` is the oldest call that is not received.
    pub(in crate::ep) fn is_next(&self, sent: &SentOnGpu) -> bool {
        self.low_latency.as_ref().is_some_and(|calls| calls.received + 1 == sent.number)
    }

    /// Puts a dispatch into `stream`, or one half of it. What came, if that receives.
    pub(in crate::ep) fn low_latency_dispatch(
        &mut self,
        words: &CallWords,
        inputs: &Inputs,
        (phases, stream): (Phases, &Stream),
    ) -> Result<(SentOnGpu, Option<Arrived>)> {
        let is_captured = self.begin(words.operation.name(), stream)?;
        let mut args = self.low_latency_args(words, inputs, phases);
        let arrived = match phases.receives() {
            true => Some(self.room_for_rows(words, &mut args, (stream, is_captured))?),
            false => None,
        };
        let sent = self.put_low_latency(words, args, (phases, stream, is_captured))?;
        Ok((sent, arrived))
    }

    /// Puts a combine into `stream`, or one half of it. The sums and how long each rank was waited for, if that receives.
    pub(in crate::ep) fn low_latency_combine(
        &mut self,
        words: &CallWords,
        (inputs, origins): (&Inputs, Option<&DeviceOrigins>),
        (phases, stream): (Phases, &Stream),
    ) -> Result<(SentOnGpu, Option<(Tensor, Tensor)>)> {
        let is_captured = self.begin(words.operation.name(), stream)?;
        let mut args = self.low_latency_args(words, inputs, phases);
        if let Some(origins) = origins {
            self.keep(&origins.slab, (stream, is_captured))?;
            let at = |field: usize| origins.slab.address() + field as u64;
            (args.source_tokens, args.slots) = (at(origins.source_tokens), at(origins.slots));
        }
        let combined = match phases.receives() {
            true => Some(self.room_for_sums(words, &mut args, (stream, is_captured))?),
            false => None,
        };
        let sent = self.put_low_latency(words, args, (phases, stream, is_captured))?;
        Ok((sent, combined))
    }

    /// Memory of our own for results.
    pub(in crate::ep) fn room_for_results(
        &self,
        dtype: DType,
        shape: &[usize],
        stream: &Stream,
    ) -> Result<Tensor> {
        let is_captured = stream.is_capturing().map_err(|error| self.refused(error))?;
        let slab = self.take_own(shape.iter().product::<usize>() * dtype.size(), (stream, is_captured))?;
        Ok(Tensor::on_device(&slab, 0, dtype, shape))
    }

    fn low_latency_args(&self, words: &CallWords, inputs: &Inputs, phases: Phases) -> LowLatencyArgs {
        let mut args = self.low_latency.as_ref().map_or_else(LowLatencyArgs::default, |calls| calls.args);
        let buffer: BufferArgs = self.round(words, 0, &ToldWords::default());
        (args.buffer, args.phases, args.cast) = (buffer, phases as u32, u32::from(words.cast));
        (args.tokens, args.top_k) = (words.tokens as u32, words.top_k as u32);
        (args.x, args.selections, args.weights) = (inputs.x, inputs.selections, inputs.weights);
        args
    }

    fn room_for_rows(
        &self,
        words: &CallWords,
        args: &mut LowLatencyArgs,
        stream: (&Stream, bool),
    ) -> Result<Arrived> {
        let ranks = self.world_size;
        let (capacity, hidden) = (args.capacity as usize, args.hidden as usize);
        let (experts, rows) = (args.experts_of[self.rank] as usize, ranks * capacity);
        let is_cast = words.cast > 0;
        let dtype = if is_cast { DType::F8E4M3 } else { words.dtype };
        let is_packed = words.cast == ScaleKind::Ue8m0 as u8 + 1;
        let columns = args.row_scales as usize / if is_packed { PACKED } else { 1 };
        let mut fields = Fields::default();
        let x = fields.add(experts * rows * hidden * dtype.size());
        let scales = fields.add(if is_cast { experts * columns * rows * 4 } else { 0 });
        let (counts, waited) = (fields.add(experts * 4), fields.add(ranks * 8));
        let slab = self.take_own(fields.end, stream)?;
        let mut fields = Fields::default();
        let (source_tokens, ranges) = (fields.add(experts * rows * 4), fields.add(experts * ranks * 8));
        let slots = fields.add(rows * words.top_k * 4);
        let origins = self.take_own(fields.end, stream)?;
        let at = |field: usize| slab.address() + field as u64;
        (args.out, args.out_scales, args.counts, args.waited) = (at(x), at(scales), at(counts), at(waited));
        let at = |field: usize| origins.address() + field as u64;
        (args.source_tokens, args.ranges, args.slots) = (at(source_tokens), at(ranges), at(slots));
        let tensor = |at, dtype, shape: &[usize]| Tensor::on_device(&slab, at, dtype, shape);
        let scale_dtype = if is_packed { DType::I32 } else { DType::F32 };
        Ok(Arrived {
            x: tensor(x, dtype, &[experts, rows, hidden]),
            scales: is_cast.then(|| tensor(scales, scale_dtype, &[experts, columns, rows])),
            counts: tensor(counts, DType::I32, &[experts]),
            waited: tensor(waited, DType::I64, &[ranks]),
            origins: DeviceOrigins {
                slab: origins,
                source_tokens,
                ranges,
                slots,
                shape: [experts, rows, ranks],
            },
        })
    }

    fn room_for_sums(
        &self,
        words: &CallWords,
        args: &mut LowLatencyArgs,
        stream: (&Stream, bool),
    ) -> Result<(Tensor, Tensor)> {
        let (ranks, hidden) = (self.world_size, args.hidden as usize);
        let mut fields = Fields::default();
        let x = fields.add(words.tokens * hidden * words.dtype.size());
        let waited = fields.add(ranks * 8);
        let slab = self.take_own(fields.end, stream)?;
        (args.out, args.waited) = (slab.address() + x as u64, slab.address() + waited as u64);
        let sums = Tensor::on_device(&slab, x, words.dtype, &[words.tokens, hidden]);
        Ok((sums, Tensor::on_device(&slab, waited, DType::I64, &[ranks])))
    }

    fn put_low_latency(
        &mut self,
        words: &CallWords,
        args: LowLatencyArgs,
        (phases, stream, is_captured): (Phases, &Stream, bool),
    ) -> Result<SentOnGpu> {
        let ranks = self.world_size;
        let Some(calls) = &self.low_latency else { unreachable!("checked by whoever calls") };
        let function = calls.functions.of(words.operation, words.dtype);
        // SAFETY: the kernel takes `LowLatencyArgs`; slabs are ours, what it reaches of peers stays as long as `Core`, and inputs are valid
        // until the stream has passed, as whoever made the call promised.
        unsafe { self.launch(function, stream, calls.grid(ranks), args) }?;
        self.has_sent = true;
        let Some(calls) = &mut self.low_latency else { unreachable!("as above") };
        calls.sent += u64::from(phases.sends());
        calls.received += u64::from(phases.receives());
        let number = if phases.sends() { calls.sent } else { calls.received };
        let inputs = Inputs { x: args.x, selections: args.selections, weights: args.weights };
        self.conclude((stream, is_captured))?;
        Ok(SentOnGpu { number, stream: stream.clone(), inputs })
    }
}
