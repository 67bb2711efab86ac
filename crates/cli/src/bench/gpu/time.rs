//! The rounds of a measurement on GPUs, and what becomes of their times.

use std::time::Instant;

use unisono::{Operations, ReduceOp};

use super::super::gpu_record::Side;
use super::{Contender, Operation, Rank, Result};

/// Up to here, the host's time to submit a call is told.
const SUBMIT_TO: usize = 64 << 10;
const MOST_ROUNDS: usize = 500;

/// Microseconds per call, in each round.
#[derive(Default)]
pub(super) struct Times {
    eager: Vec<f64>,
    graphed: Vec<f64>,
    submitted: Vec<f64>,
}

impl Rank<'_> {
    /// Measures as many rounds as there is time for, and answers their number.
    pub(super) fn measure_rounds(&self, contenders: &mut [Contender]) -> Result<usize> {
        let rounds = self.rounds(contenders)?;
        for _ in 0..rounds {
            self.round(contenders)?;
        }
        Ok(rounds)
    }

    /// How many rounds fit into the time per size: measured on two, which warm up, and agreed by all ranks.
    fn rounds(&self, contenders: &mut [Contender]) -> Result<usize> {
        self.round(contenders)?;
        let start = Instant::now();
        self.round(contenders)?;
        let mut slowest = [start.elapsed().as_secs_f64()];
        self.communicator.all_reduce(&mut slowest, ReduceOp::Max)?;
        contenders.iter_mut().for_each(|contender| contender.times = Times::default());
        let rounds = self.workload.time_per_size.as_secs_f64() / slowest[0].max(1e-9);
        Ok((rounds as usize).clamp(self.workload.least_batches, MOST_ROUNDS))
    }

    fn round(&self, contenders: &mut [Contender]) -> Result<()> {
        for contender in contenders.iter_mut() {
            let calls = contender.job.calls as f64;
            let mut submitted = 0.0;
            let us = self.between_events(|| {
                let start = Instant::now();
                for _ in 0..contender.job.calls {
                    self.call(contender.whose, &contender.job)?;
                }
                submitted = start.elapsed().as_secs_f64() * 1e6;
                Ok(())
            })?;
            contender.times.eager.push(us / calls);
            contender.times.submitted.push(submitted / calls);
        }
        for contender in contenders.iter_mut() {
            let us = self.between_events(|| Ok(contender.graph.launch(&self.queue)?))?;
            contender.times.graphed.push(us / contender.job.calls as f64);
        }
        Ok(())
    }

    /// Microseconds that the device takes for what `submit` puts into the stream.
    pub(super) fn between_events(&self, submit: impl FnOnce() -> Result<()>) -> Result<f64> {
        let [start, end] = &self.events;
        self.communicator.barrier()?;
        start.record(&self.queue)?;
        submit()?;
        end.record(&self.queue)?;
        self.settle()?;
        Ok(end.us_since(start)?)
    }

    /// The figures of all ranks.
    pub(super) fn side(&self, contender: Contender) -> Result<Side> {
        let job = contender.job;
        let eager_us = self.median(contender.times.eager)?;
        let graph_us = self.median(contender.times.graphed)?;
        let submit_us = self.median(contender.times.submitted)?;
        let mut wrong = [contender.wrong];
        self.communicator.all_reduce(&mut wrong, ReduceOp::Sum)?;
        let (mut algbw, mut busbw) =
            job.operation.bandwidth(self.communicator.world_size(), job.bytes, graph_us);
        if job.operation == Operation::SendRecv {
            // One way.
            (algbw, busbw) = (algbw / 2.0, busbw / 2.0);
        }
        Ok(Side {
            eager_us,
            graph_us,
            submit_us: (job.bytes <= SUBMIT_TO).then_some(submit_us),
            algbw,
            busbw,
            is_exact: contender.is_exact,
            wrong: wrong[0],
        })
    }

    /// The median over rounds of the slowest rank's times.
    pub(super) fn median(&self, mut times: Vec<f64>) -> Result<f64> {
        self.communicator.all_reduce(&mut times, ReduceOp::Max)?;
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }
}
