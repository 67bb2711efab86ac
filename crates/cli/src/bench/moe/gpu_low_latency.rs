//! Low-latency calls of `bench moe` on GPUs: whole, and in halves, of which each is timed alone when all ranks have sent.

use unisono::cuda::Graph;
use unisono::ep::{LowLatencyCombine, LowLatencyDispatch, LowLatencyDispatched, ScaleKind};

use super::gpu::{OnGpu, Result};
use super::rank::{LowLatencyRows, Moved, Rank};

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
        let mut times = self.times_in_graphs(gpu, |buffer| buffer.low_latency_dispatch(&call()).map(drop))?;
        self.tell("low_latency_dispatch_fp8", &moved, &mut times, multiprocessors)?;
        let halves = |this: &mut Self| {
            let sent = gpu.captured(|| this.buffer.low_latency_dispatch_send(&call()))?;
            let received = gpu.captured(|| this.buffer.receive_dispatch(sent.1))?;
            Ok([sent.0, received.0])
        };
        self.in_halves(gpu, "low_latency_dispatch_fp8", &moved, halves)?;
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
        let mut times = self.times_in_graphs(gpu, |buffer| buffer.low_latency_combine(&call()).map(drop))?;
        self.tell("low_latency_combine", &moved, &mut times, multiprocessors)?;
        let halves = |this: &mut Self| {
            let sent = gpu.captured(|| this.buffer.low_latency_combine_send(&call()))?;
            let received = gpu.captured(|| this.buffer.receive_combine(sent.1))?;
            Ok([sent.0, received.0])
        };
        self.in_halves(gpu, "low_latency_combine", &moved, halves)?;
        gpu.queue.synchronize()?;
        Ok(())
    }

    /// Times the graphs of both halves of a call, the second one when every rank's first is over.
    fn in_halves(
        &mut self,
        gpu: &OnGpu,
        operation: &str,
        moved: &Moved,
        capture: impl FnOnce(&mut Self) -> Result<[Graph; 2]>,
    ) -> Result<()> {
        let graphs = capture(self)?;
        let mut times = [const { Vec::new() }; 2];
        // The first rounds bring graphs to the device.
        let rounds = 20 * self.workload.least_batches.max(1);
        for round in 0..rounds + 2 {
            for (graph, times) in graphs.iter().zip(&mut times) {
                let time = self.round(gpu, graph, 1)?;
                if round >= 2 {
                    times.push(time);
                }
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
