//! Low-latency calls of `bench moe` on GPUs: whole, and in halves, of which each is timed alone when all ranks have sent.
//!
//! To launch a graph and to look at events takes the device about as long as a call of few tokens. So a graph has several whole calls, and of
//! the halves, of which two calls at most may be under way, what counts is how much longer a graph of two takes than one of one.

use unisono::Result as Done;
use unisono::ep::Buffer;
use unisono::ep::{LowLatencyCombine, LowLatencyDispatch, LowLatencyDispatched, ScaleKind};

use super::gpu::{OnGpu, Result};
use super::rank::{LowLatencyRows, Moved, Rank};

/// Whole calls of a graph.
const CALLS: usize = 10;

impl Rank<'_> {
    pub(super) fn low_latency_on_gpu(&mut self, gpu: &OnGpu) -> Result<()> {
        let (rank, dtype, top_k) = (self.communicator.rank(), self.tokens.dtype, self.tokens.top_k);
        let x = gpu.upload(&self.x)?;
        let selections = self.selections[rank].iter().flat_map(|expert| expert.to_le_bytes());
        let selections = gpu.upload(&selections.collect::<Vec<u8>>())?;
        let topk_idx = gpu.elements::<i64>(&selections);
        let call = || {
            LowLatencyDispatch::new(gpu.input(&x, dtype), topk_idx, top_k)
                .cast(ScaleKind::F32)
                .on(&gpu.stream)
        };
        let sent = self.buffer.low_latency_dispatch(&call())?;
        let moved = self.moved_in_low_latency(&on_host(&sent, gpu)?)?;
        let multiprocessors = Some(gpu.device.facts().multiprocessors);
        let whole = |buffer: &mut Buffer| buffer.low_latency_dispatch(&call()).map(drop);
        let mut times = self.times_in_graphs(gpu, CALLS, whole)?;
        self.tell("low_latency_dispatch_fp8", &moved, &mut times, multiprocessors)?;
        let send = |buffer: &mut Buffer| buffer.low_latency_dispatch_send(&call());
        let receive = |buffer: &mut Buffer, sent| buffer.receive_dispatch(sent).map(drop);
        self.in_halves(gpu, ("low_latency_dispatch_fp8", &moved), send, receive)?;
        let results = gpu.upload(&self.given_back(sent.x.shape()[1]))?;
        let weights = self.tokens.weights();
        let of_weights: Vec<u8> = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
        let of_weights = gpu.upload(&of_weights)?;
        let topk_weights = gpu.elements::<f32>(&of_weights);
        let call = || {
            let results = gpu.input(&results, dtype);
            LowLatencyCombine::new(results, topk_idx, topk_weights, &sent.handle).on(&gpu.stream)
        };
        let combined = self.buffer.low_latency_combine(&call())?.x.to_host(&gpu.stream)?;
        let moved = self.summed_in_low_latency(&combined, &weights)?;
        let whole = |buffer: &mut Buffer| buffer.low_latency_combine(&call()).map(drop);
        let mut times = self.times_in_graphs(gpu, CALLS, whole)?;
        self.tell("low_latency_combine", &moved, &mut times, multiprocessors)?;
        let send = |buffer: &mut Buffer| buffer.low_latency_combine_send(&call());
        let receive = |buffer: &mut Buffer, sent| buffer.receive_combine(sent).map(drop);
        self.in_halves(gpu, ("low_latency_combine", &moved), send, receive)?;
        gpu.queue.synchronize()?;
        Ok(())
    }

    /// Times both halves of a call, the second when every rank's first is over.
    fn in_halves<S>(
        &mut self,
        gpu: &OnGpu,
        (operation, moved): (&str, &Moved),
        send: impl Fn(&mut Buffer) -> Done<S>,
        receive: impl Fn(&mut Buffer, S) -> Done<()>,
    ) -> Result<()> {
        let mut graphs = Vec::new();
        for calls in [1, 2] {
            let buffer = &mut self.buffer;
            let all = || (0..calls).map(|_| send(buffer)).collect::<Done<Vec<S>>>();
            let (sends, sent) = gpu.captured(all)?;
            let (receives, ()) =
                gpu.captured(|| sent.into_iter().try_for_each(|sent| receive(&mut self.buffer, sent)))?;
            graphs.push([sends, receives]);
        }
        let mut times = [const { Vec::new() }; 2];
        // The first rounds bring graphs to the device.
        let rounds = 20 * self.workload.least_batches.max(1);
        for round in 0..rounds + 2 {
            let mut took = [[0.0; 2]; 2];
            for (graphs, took) in graphs.iter().zip(&mut took) {
                for (graph, took) in graphs.iter().zip(took) {
                    *took = self.round(gpu, graph, 1)?;
                }
            }
            let [one, two] = took;
            for (half, times) in times.iter_mut().enumerate().filter(|_| round >= 2) {
                times.push(two[half] - one[half]);
            }
        }
        self.buffer.check()?;
        let multiprocessors = Some(gpu.device.facts().multiprocessors);
        for (half, mut times) in ["send", "receive"].into_iter().zip(times) {
            self.tell(&format!("{operation}_{half}"), moved, &mut times, multiprocessors)?;
        }
        Ok(())
    }
}

fn on_host(sent: &LowLatencyDispatched, gpu: &OnGpu) -> Result<LowLatencyRows> {
    Ok(LowLatencyRows {
        x: sent.x.to_host(&gpu.stream)?,
        scales: sent.scales.as_ref().map(|scales| scales.to_host(&gpu.stream)).transpose()?,
        counts: sent.counts.to_host(&gpu.stream)?,
    })
}
