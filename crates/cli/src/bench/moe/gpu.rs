//! One rank of `bench moe` on GPUs: verifies every operation, then times it in a CUDA graph.
//!
//! A round begins behind a barrier of the hosts, and launches a graph some times between two events: of one call in throughput mode, because
//! outputs stay in the pool as long as their graph. What counts of each round is the slowest rank's time. Where the host waits for the
//! number of rows there is no graph; then its clock times a call and what follows.

use std::time::Instant;

use unisono::cuda::{Device, DeviceBuffer, Event, Graph, Stream as CudaStream};
use unisono::ep::{Buffer, CachedDispatch, Combine, Dispatch, Dispatched, Input, RowScales, Tokens as Sent};
use unisono::half::{bf16, f16};
use unisono::launch::Launch;
use unisono::{Buf, Builder, DType, Element, Operations, Stream, f8e4m3};

use super::Moe;
use super::rank::{Moved, Rank, bytes, has_low_latency};
use super::tokens::wrong;
use crate::bench::gpu::facts;
use crate::bench::record::Line;
use crate::bench::workload::Workload;

pub(super) type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Operations with one number of tokens, and those of low latency beside them.
const OPERATIONS: usize = 8;
const LOW_LATENCY_OPERATIONS: usize = 6;
/// Launches between two events take about so long, and are so many at least and at most.
const BATCH_US: f64 = 10_000.0;
const BATCHES: (usize, usize) = (4, 100);

/// What the calls of a rank run on.
pub(super) struct OnGpu {
    pub(super) device: Device,
    pub(super) queue: CudaStream,
    pub(super) stream: Stream,
    events: [Event; 2],
}

pub(super) fn run(workload: &Workload) -> std::result::Result<(), String> {
    measure(workload).map_err(|error| error.to_string())
}

fn measure(workload: &Workload) -> Result<()> {
    let local_rank = Launch::from_env()?.local_rank.unwrap_or(0);
    let ordinal = (local_rank % workload.devices) as u32;
    let communicator = Builder::from_env()?.device(ordinal).build()?;
    let device = Device::new(ordinal)?;
    let queue = CudaStream::new(&device)?;
    let gpu = OnGpu {
        stream: Stream::from(queue.clone()),
        events: [Event::new(&device, true)?, Event::new(&device, true)?],
        queue,
        device,
    };
    let facts = facts(&communicator, &gpu.device, workload, unisono::ep::kernels::sources_hash())?;
    Line::Gpus(facts).tell(communicator.rank());
    let few = workload.moe.tokens.iter().filter(|tokens| has_low_latency(**tokens)).count();
    let lines = workload.moe.tokens.len() * OPERATIONS + few * LOW_LATENCY_OPERATIONS;
    Line::Ready { sizes: lines as u64 }.tell(communicator.rank());
    for tokens in &workload.moe.tokens {
        let settings = workload.moe.settings_on_gpus(*tokens, workload);
        let mut rank = Rank::with(workload, &communicator, (*tokens, settings))?;
        rank.measure_on_gpu(&gpu)?;
        rank.buffer.close(&communicator)?;
    }
    Ok(communicator.destroy()?)
}

impl Moe {
    /// With room for what lives at a time: four outputs of all tokens at each rank.
    fn settings_on_gpus(&self, tokens: usize, workload: &Workload) -> unisono::ep::Settings {
        let row = self.hidden * workload.dtype.size() + self.hidden / 32 + 12 * self.top_k + 128;
        let bytes = 4 * workload.ranks * tokens * row;
        let settings = self.settings(tokens, workload.dtype);
        unisono::ep::Settings { pool_bytes: Some(bytes.max(64 << 20)), ..settings }
    }
}

impl OnGpu {
    pub(super) fn upload(&self, bytes: &[u8]) -> Result<DeviceBuffer> {
        let mut buffer = DeviceBuffer::new(&self.device, bytes.len())?;
        buffer.write(0, bytes)?;
        Ok(buffer)
    }

    /// What `call` puts into our stream, as a graph.
    pub(super) fn captured<T>(&self, call: impl FnOnce() -> unisono::Result<T>) -> Result<(Graph, T)> {
        self.queue.begin_capture()?;
        let done = call();
        let graph = self.queue.end_capture()?;
        Ok((graph, done?))
    }

    /// `buffer` as elements; it outlives the work on it.
    pub(super) fn elements<T: Element>(&self, buffer: &DeviceBuffer) -> Buf<'static, T> {
        // SAFETY: streams are waited for before a buffer goes.
        unsafe { Buf::cuda(buffer.address(), buffer.bytes() / size_of::<T>(), self.device.ordinal()) }
    }

    pub(super) fn input(&self, buffer: &DeviceBuffer, dtype: DType) -> Input<'static> {
        match dtype {
            DType::F32 => self.elements::<f32>(buffer).into(),
            DType::F16 => self.elements::<f16>(buffer).into(),
            DType::F8E4M3 => self.elements::<f8e4m3>(buffer).into(),
            _ => self.elements::<bf16>(buffer).into(),
        }
    }
}

impl Rank<'_> {
    fn measure_on_gpu(&mut self, gpu: &OnGpu) -> Result<()> {
        let (rank, ranks, dtype, top_k) =
            (self.communicator.rank(), self.communicator.world_size(), self.tokens.dtype, self.tokens.top_k);
        let x = gpu.upload(&self.x)?;
        let of_indices: Vec<u8> =
            self.selections[rank].iter().flat_map(|expert| expert.to_le_bytes()).collect();
        let indices = gpu.upload(&of_indices)?;
        let topk_idx = gpu.elements::<i64>(&indices);
        let origins = self.origins(rank);
        let worst = origins.len();
        let row = self.tokens.hidden * dtype.size();
        let left = (0..ranks).filter(|to| *to != rank).map(|to| self.goes(rank, to)).sum();
        let nothing = Moved { rows: (0, 0), row_bytes: (0, 0), wrong: 0 };
        self.in_graphs(gpu, "layout", &nothing, |buffer| {
            buffer.layout_on(topk_idx, top_k, &gpu.stream).map(drop)
        })?;
        // Beside its row a token takes its indices, and its number.
        let moved = |wrong| Moved { rows: (worst, left), row_bytes: (row, row + top_k * 8 + 4), wrong };
        let call = || Dispatch::new(gpu.input(&x, dtype)).top_k(topk_idx, top_k).on(&gpu.stream);
        let expected: Vec<u8> = origins.iter().flat_map(|(s, t)| self.tokens.row(*s, *t)).collect();
        let sent = self.buffer.dispatch(&call())?;
        let wrong_rows = wrong(&bytes(&sent.x.to_host(&gpu.stream)?)?, &expected, dtype.size());
        self.eagerly(gpu, "dispatch_eager", &moved(wrong_rows), |buffer| buffer.dispatch(&call()).map(drop))?;
        self.in_graphs(gpu, "dispatch", &moved(0), |buffer| {
            buffer.dispatch(&call().worst_tokens(worst)).map(drop)
        })?;
        let call = || CachedDispatch::new(gpu.input(&x, dtype), &sent.handle).on(&gpu.stream);
        let (again, _) = self.buffer.dispatch_cached(&call())?;
        let wrong_rows = wrong(&bytes(&again.to_host(&gpu.stream)?)?, &expected, dtype.size());
        drop((again, expected));
        let cached = Moved { row_bytes: (row, row), ..moved(wrong_rows) };
        self.in_graphs(gpu, "dispatch_cached", &cached, |buffer| buffer.dispatch_cached(&call()).map(drop))?;
        self.fp8_on_gpu(gpu, topk_idx, (&origins, left))?;
        self.combine_on_gpu(gpu, &sent, &origins)?;
        if has_low_latency(self.tokens.count) {
            self.low_latency_on_gpu(gpu)?;
        }
        if rank == 0 {
            tracing::info!("{}", self.buffer.explain());
        }
        Ok(())
    }

    /// Rows that are 8 bits already, with scales that are column-major, as they usually are.
    fn fp8_on_gpu(
        &mut self,
        gpu: &OnGpu,
        topk_idx: Buf<'static, i64>,
        (origins, left): (&[(usize, usize)], usize),
    ) -> Result<()> {
        let (hidden, top_k, count) = (self.tokens.hidden, self.tokens.top_k, self.tokens.count);
        let (codes, scales) = self.in_fp8();
        let per_token = hidden.div_ceil(128);
        let columns: Vec<u8> = (0..per_token)
            .flat_map(|column| (0..count).map(move |token| token * per_token + column))
            .flat_map(|at| scales[at].to_le_bytes())
            .collect();
        let (codes, scales) = (gpu.upload(&codes)?, gpu.upload(&columns)?);
        let rows = || {
            let scales = RowScales::strided(gpu.input(&scales, DType::F32), per_token, (1, count));
            Sent::scaled(gpu.input(&codes, DType::F8E4M3), scales)
        };
        let call = || Dispatch::new(rows()).top_k(topk_idx, top_k).on(&gpu.stream);
        let sent = self.buffer.dispatch(&call())?;
        let (expected, expected_scales) = self.expected_fp8(origins);
        let got = bytes(&sent.x.to_host(&gpu.stream)?)?;
        let got_scales = match &sent.scales {
            Some(scales) => bytes(&scales.to_host(&gpu.stream)?)?,
            None => Vec::new(),
        };
        let wrong = wrong(&got, &expected, 1) + wrong(&got_scales, &expected_scales, 4);
        drop((expected, expected_scales, got, got_scales));
        let row = hidden + per_token * 4;
        let moved = Moved { rows: (origins.len(), left), row_bytes: (row, row + top_k * 8 + 4), wrong };
        self.in_graphs(gpu, "dispatch_fp8", &moved, |buffer| {
            buffer.dispatch(&call().worst_tokens(origins.len())).map(drop)
        })?;
        let moved = Moved { row_bytes: (row, row), ..moved };
        self.in_graphs(gpu, "dispatch_fp8_cached", &moved, |buffer| {
            buffer.dispatch_cached(&CachedDispatch::new(rows(), &sent.handle).on(&gpu.stream)).map(drop)
        })
    }

    /// Experts give back what they got: where it lies, and from memory outside of the pool.
    fn combine_on_gpu(&mut self, gpu: &OnGpu, sent: &Dispatched, origins: &[(usize, usize)]) -> Result<()> {
        let (rank, dtype) = (self.communicator.rank(), self.tokens.dtype);
        let row = self.tokens.hidden * dtype.size();
        let back = origins.iter().filter(|(source, _)| *source != rank).count();
        let expected = self.sums();
        let outside = DeviceBuffer::new(&gpu.device, origins.len() * row)?;
        // SAFETY: both are as long, and live until the stream was waited for.
        unsafe { gpu.queue.copy(outside.address(), sent.x.raw().ptr, outside.bytes()) }?;
        for (operation, x) in
            [("combine", Input::from(&sent.x)), ("combine_copied", gpu.input(&outside, dtype))]
        {
            let call = || Combine::new(x, &sent.handle).on(&gpu.stream);
            let combined = self.buffer.combine(&call())?;
            let got = bytes(&combined.x.to_host(&gpu.stream)?)?;
            let wrong = wrong(&got, &expected, dtype.size());
            let moved = Moved { rows: (origins.len(), back), row_bytes: (row, row), wrong };
            self.in_graphs(gpu, operation, &moved, |buffer| buffer.combine(&call()).map(drop))?;
        }
        gpu.queue.synchronize()?;
        Ok(())
    }

    /// Times a graph of one call in throughput mode, and tells.
    fn in_graphs(
        &mut self,
        gpu: &OnGpu,
        operation: &str,
        moved: &Moved,
        call: impl FnMut(&mut Buffer) -> unisono::Result<()>,
    ) -> Result<()> {
        let mut times = self.times_in_graphs(gpu, 1, call)?;
        Ok(self.tell(operation, moved, &mut times, Some(self.workload.moe.multiprocessors))?)
    }

    /// Microseconds of one of the `calls` of a graph.
    pub(super) fn times_in_graphs(
        &mut self,
        gpu: &OnGpu,
        calls: usize,
        mut call: impl FnMut(&mut Buffer) -> unisono::Result<()>,
    ) -> Result<Vec<f64>> {
        // What the driver does for the first time is done before.
        call(&mut self.buffer)?;
        let (graph, ()) = gpu.captured(|| (0..calls).try_for_each(|_| call(&mut self.buffer)))?;
        let first = self.round(gpu, &graph, BATCHES.0)?;
        let mut slowest = [first];
        self.communicator.all_reduce(&mut slowest, unisono::ReduceOp::Max)?;
        let batch = ((BATCH_US / slowest[0].max(1.0)) as usize).clamp(BATCHES.0, BATCHES.1);
        let rounds = self.workload.time_per_size.as_secs_f64() * 1e6 / (slowest[0].max(1.0) * batch as f64);
        let mut times = vec![0.0; (rounds as usize).clamp(self.workload.least_batches, 200)];
        for time in &mut times {
            *time = self.round(gpu, &graph, batch)? / calls as f64;
        }
        self.buffer.check()?;
        Ok(times)
    }

    /// Microseconds of one of `batch` launches.
    pub(super) fn round(&self, gpu: &OnGpu, graph: &Graph, batch: usize) -> Result<f64> {
        self.communicator.barrier()?;
        gpu.events[0].record(&gpu.queue)?;
        for _ in 0..batch {
            graph.launch(&gpu.queue)?;
        }
        gpu.events[1].record(&gpu.queue)?;
        gpu.queue.synchronize()?;
        Ok(gpu.events[1].us_since(&gpu.events[0])? / batch as f64)
    }

    /// Times calls by the clock of the host, until their work is done.
    fn eagerly(
        &mut self,
        gpu: &OnGpu,
        operation: &str,
        moved: &Moved,
        mut call: impl FnMut(&mut Buffer) -> unisono::Result<()>,
    ) -> Result<()> {
        let mut times = vec![0.0; 4 * self.workload.least_batches];
        for time in &mut times {
            self.communicator.barrier()?;
            let start = Instant::now();
            call(&mut self.buffer)?;
            gpu.queue.synchronize()?;
            *time = start.elapsed().as_secs_f64() * 1e6;
        }
        Ok(self.tell(operation, moved, &mut times, Some(self.workload.moe.multiprocessors))?)
    }
}
