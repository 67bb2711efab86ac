//! Combine as kernels: sources read results where they lie, in the pool of each rank.

use unisono_core::DType;
use unisono_core::ep::DEVICE_LINE;
use unisono_cuda::{Grid, Stream};

use super::args::{AddArgs, CombineArgs};
use super::kernels::{combine_threads, combined_together};
use super::pool::{For, Slab};
use super::throughput::DeviceRoutes;
use super::{Fields, OnGpu};
use crate::ep::tensor::Tensor;
use crate::ep::words::{CallWords, ToldWords};
use crate::error::{Error, Result};

const ADD_THREADS: u32 = 512;

/// What is combined, checked: addresses of our device.
#[derive(Clone, Copy, Debug)]
pub(in crate::ep) struct Results {
    pub(in crate::ep) x: u64,
    pub(in crate::ep) row_bytes: usize,
    pub(in crate::ep) per_token: usize,
    pub(in crate::ep) weights: Option<u64>,
    pub(in crate::ep) bias: [Option<u64>; 2],
    pub(in crate::ep) multiprocessors: Option<u32>,
}

/// Where peers read.
struct Readable {
    told: ToldWords,
    /// Until the kernels that read it are in the stream.
    _slab: Option<std::sync::Arc<Slab>>,
}

impl OnGpu {
    /// Brings results back to the sources of their tokens and adds them.
    pub(in crate::ep) fn combine(
        &mut self,
        words: &CallWords,
        results: &Results,
        routes: &DeviceRoutes,
        stream: &Stream,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (call, rank) = (words.operation.name(), self.rank);
        let mut aligned = vec![("bias", results.bias[0]), ("bias", results.bias[1])];
        if results.per_token > 1 {
            aligned.push(("x", Some(results.x)));
        }
        for (what, at) in aligned {
            if let Some(at) = at.filter(|at| !at.is_multiple_of(16)) {
                let (expected, got) = ("on 16 bytes".to_owned(), format!("{at:#x}"));
                return Err(Error::Argument { call, rank, what, expected, got });
            }
        }
        let is_captured = self.begin(call, stream)?;
        self.keep_routes(routes, (stream, is_captured))?;
        let readable = self.readable(words, results, routes, (stream, is_captured))?;
        let (tokens, top_k) = (routes.routing.tokens, words.top_k);
        let mut fields = Fields::default();
        let x = fields.add(tokens * results.row_bytes);
        let weights = fields.add(if results.weights.is_some() { tokens * top_k * 4 } else { 0 });
        let out = self.take_own(fields.end, (stream, is_captured))?;
        // Where there are few tokens, several warps share one.
        let threads = combine_threads(self.world_size);
        let (warps, most_workers) = (threads as usize / 32, self.workers(results.multiprocessors));
        let most_pieces = (results.row_bytes / 16).div_ceil(32 * combined_together(self.world_size));
        let pieces = (most_workers * warps / tokens.max(1)).clamp(1, most_pieces.max(1));
        let args = CombineArgs {
            buffer: self.round(words, 1, &readable.told),
            ways: routes.ways(),
            out: out.address() + x as u64,
            weights_out: if results.weights.is_some() { out.address() + weights as u64 } else { 0 },
            bias: results.bias.map(|bias| bias.unwrap_or(0)),
            row_bytes: results.row_bytes as u32,
            top_k: top_k as u32,
            pieces: pieces as u32,
            reserved: 0,
        };
        let workers = (tokens * pieces).div_ceil(warps).clamp(1, most_workers);
        let grid = Grid { blocks: workers as u32 + 1, threads, shared_bytes: 0, is_early: false };
        let (function, _) = self.core.kernels.sums(words.dtype);
        // SAFETY: the kernel takes `CombineArgs`; slabs are ours, what it reaches of peers stays as long as `Core`, and inputs are valid
        // until the stream has passed, as whoever made the call promised.
        unsafe { self.launch(function, stream, grid, args) }?;
        self.has_sent = true;
        self.conclude((stream, is_captured))?;
        let hidden = results.row_bytes / words.dtype.size();
        let combined = Tensor::on_device(&out, x, words.dtype, &[tokens, hidden]);
        let topk_weights =
            results.weights.map(|_| Tensor::on_device(&out, weights, DType::F32, &[tokens, top_k]));
        Ok((combined, topk_weights))
    }

    /// Our results where peers can read them: as they lie, if that is in the pool; else a copy, or the sums of the rows of each token.
    fn readable(
        &mut self,
        words: &CallWords,
        results: &Results,
        routes: &DeviceRoutes,
        (stream, is_captured): (&Stream, bool),
    ) -> Result<Readable> {
        let (rows, row_bytes) = (routes.rows, results.row_bytes);
        let weight_bytes = rows * words.top_k * 4;
        let line_of = |at: u64, bytes: usize| {
            let offset = self.core.pool.find(at, bytes)?;
            offset.is_multiple_of(DEVICE_LINE).then_some((offset / DEVICE_LINE) as u32)
        };
        let x = if results.per_token == 1 { line_of(results.x, rows * row_bytes) } else { None };
        let weights = results.weights.map_or(Some(0), |weights| line_of(weights, weight_bytes));
        let told = ToldWords { rows: rows as u32, ..ToldWords::default() };
        if let (Some(x), Some(weights)) = (x, weights) {
            self.taken.direct_combines += 1;
            return Ok(Readable { told: ToldWords { x, weights, ..told }, _slab: None });
        }
        let mut fields = Fields::default();
        let x_at = fields.add(if x.is_none() { rows * row_bytes } else { 0 });
        let weights_at = fields.add(if weights.is_none() { weight_bytes } else { 0 });
        let slab = self.take(fields.end, (stream, is_captured), For::Peers)?;
        let offset = match slab.as_ref().and_then(|slab| slab.offset()) {
            Some(offset) => offset,
            None if fields.end <= self.layout.staging.bytes => self.layout.staging.offset,
            None => return Err(self.no_room(words.operation.name(), fields.end)),
        };
        let base = self.args.call.arenas[self.rank] + offset as u64;
        let copy = |at: usize, from: u64, bytes: usize| {
            // SAFETY: the memory is ours until the stream has passed, as the staging is; the input is valid as long, as whoever made the call
            // promised.
            unsafe { stream.copy(base + at as u64, from, bytes) }.map_err(|error| self.refused(error))
        };
        if x.is_none() && results.per_token == 1 {
            copy(x_at, results.x, rows * row_bytes)?;
        }
        if let (None, Some(from)) = (weights, results.weights) {
            copy(weights_at, from, weight_bytes)?;
        }
        if results.per_token > 1 && rows > 0 {
            let args = AddArgs {
                x: results.x,
                out: base + x_at as u64,
                rows: rows as u64,
                row_bytes: row_bytes as u32,
                parts: results.per_token as u32,
            };
            let blocks = (rows * row_bytes / 16).div_ceil(ADD_THREADS as usize);
            let blocks = blocks.clamp(1, 2 * (self.workers(results.multiprocessors) + 1)) as u32;
            let (_, function) = self.core.kernels.sums(words.dtype);
            // SAFETY: the kernel takes `AddArgs`; as above.
            unsafe {
                let grid = Grid { blocks, threads: ADD_THREADS, shared_bytes: 0, is_early: false };
                self.launch(function, stream, grid, args)
            }?;
        }
        self.taken.copied_combines += 1;
        let line = |at: usize| ((offset + at) / DEVICE_LINE) as u32;
        let told = ToldWords {
            x: x.unwrap_or_else(|| line(x_at)),
            weights: weights.unwrap_or_else(|| line(weights_at)),
            ..told
        };
        Ok(Readable { told, _slab: slab })
    }
}
