//! All-reduces of rows with residual and norm on GPUs: one call for all of it, the all-reduce alone, and the all-reduce with a kernel of
//! the rest behind it, in turns, in CUDA graphs. The kernel of the rest is what the same call takes in a world of one rank.

use unisono::cuda::{DeviceBuffer, Graph};
use unisono::fused::{NormOutput, RmsNorm, Row};
use unisono::{Call, Communicator, DType, Kind, Operations, Place, RawBuffer, ReduceOp};

use super::super::record::Line;
use super::super::rows::{OnRows, Output};
use super::{BATCH_BYTES, MOST_CALLS, POISON, Rank, Result, input};

const EPSILON: f32 = 1e-5;
/// Where one is given.
const SCALE: f32 = 0.03125;
/// Of larger batches, so many of the first and of the last rows are compared.
const COMPARED: usize = 64;
const MOST_ROUNDS: usize = 500;

/// What is timed.
#[derive(Clone, Copy)]
enum Contender {
    Fused,
    AllReduce,
    Separate,
}

const CONTENDERS: [Contender; 3] = [Contender::Fused, Contender::AllReduce, Contender::Separate];

/// What rows need beside the input: for as many as the largest call has.
struct Memory {
    /// A communicator of this rank alone, on the same GPU.
    alone: Communicator,
    sum: DeviceBuffer,
    residual: DeviceBuffer,
    new: DeviceBuffer,
    weight: DeviceBuffer,
    output: DeviceBuffer,
    scales: DeviceBuffer,
}

/// What is called: so many rows.
#[derive(Clone, Copy)]
struct Job {
    tokens: usize,
    hidden: usize,
    output: NormOutput,
}

impl Job {
    fn count(&self) -> usize {
        self.tokens * self.hidden
    }
}

impl Rank<'_> {
    /// Measures every number of tokens.
    pub(super) fn measure_rows(&self) -> Result<()> {
        let rows = &self.workload.rows;
        let most = rows.tokens.iter().copied().max().unwrap_or(0);
        let (size, me) = (self.workload.dtype.size(), self.communicator.rank());
        let ranks = self.communicator.world_size();
        let builder = super::prepare_rows(Communicator::builder(), self.workload.dtype);
        let bytes = most * rows.hidden * size;
        let mut scales = DeviceBuffer::new(&self.device, most.max(1) * 4)?;
        scales.write(0, &SCALE.to_le_bytes().repeat(most.max(1)))?;
        let memory = Memory {
            alone: builder.local(&[self.device.ordinal()])?.remove(0),
            sum: DeviceBuffer::new(&self.device, bytes)?,
            residual: input(&self.device, &self.patterns, (me + 1) % ranks, bytes)?,
            new: DeviceBuffer::new(&self.device, bytes)?,
            weight: input(&self.device, &self.patterns, 0, rows.hidden * size)?,
            output: DeviceBuffer::new(&self.device, bytes)?,
            scales,
        };
        for tokens in &rows.tokens {
            let output = match rows.output {
                Output::Same => NormOutput::Same,
                Output::Fp8 => NormOutput::Fp8,
                Output::Fp8PerToken => NormOutput::Fp8PerToken,
            };
            let measured =
                self.measure_tokens(&memory, Job { tokens: *tokens, hidden: rows.hidden, output })?;
            Line::Rows(measured).tell(me);
        }
        Ok(memory.alone.destroy()?)
    }

    fn measure_tokens(&self, memory: &Memory, job: Job) -> Result<OnRows> {
        let size = self.workload.dtype.size();
        let bytes = job.count() * size;
        let mut wrong = [self.wrong_rows(memory, job)?];
        self.communicator.all_reduce(&mut wrong, ReduceOp::Sum)?;
        let calls = (BATCH_BYTES / bytes.max(1)).clamp(2, MOST_CALLS);
        let mut graphs = Vec::new();
        for contender in CONTENDERS {
            graphs.push(self.capture(memory, contender, (job, calls))?);
        }
        let mut times: [Vec<f64>; 3] = Default::default();
        let mut rounds = 1;
        let mut round = 0;
        // The first warms up, the second tells how many there is time for.
        while round < rounds + 2 {
            let start = std::time::Instant::now();
            for (graph, times) in graphs.iter().zip(&mut times) {
                let us = self.between_events(|| Ok(graph.launch(&self.queue)?))?;
                if round >= 2 {
                    times.push(us / calls as f64);
                }
            }
            if round == 1 {
                let mut slowest = [start.elapsed().as_secs_f64()];
                self.communicator.all_reduce(&mut slowest, ReduceOp::Max)?;
                let fit = self.workload.time_per_size.as_secs_f64() / slowest[0].max(1e-9);
                rounds = (fit as usize).clamp(self.workload.least_batches, MOST_ROUNDS);
            }
            round += 1;
        }
        let [fused, all_reduce, separate] = times;
        let fused_us = self.median(fused)?;
        let all_reduce_us = self.median(all_reduce)?;
        let launch = self.communicator.gpu_choice(self.kind(job), bytes, size);
        Ok(OnRows {
            tokens: job.tokens as u64,
            hidden: job.hidden as u64,
            bytes: bytes as u64,
            output: self.workload.rows.output.name().to_owned(),
            form: launch.map_or("flags", |launch| launch.form.name()).to_owned(),
            blocks: launch.map_or(1, |launch| launch.blocks),
            rounds: rounds as u64,
            batch: calls as u64,
            fused_us,
            all_reduce_us,
            difference_us: fused_us - all_reduce_us,
            separate_us: self.median(separate)?,
            wrong: wrong[0],
        })
    }

    fn kind(&self, job: Job) -> Kind {
        let is_in_place = self.workload.in_place;
        Kind::AllReduceRmsNorm {
            hidden: job.hidden as u32,
            epsilon: EPSILON,
            output: job.output,
            is_in_place,
        }
    }

    fn capture(&self, memory: &Memory, contender: Contender, (job, calls): (Job, usize)) -> Result<Graph> {
        self.queue.begin_capture()?;
        let mut captured = Ok(());
        for _ in 0..calls {
            captured = captured.and_then(|()| self.call_rows(memory, contender, job));
        }
        // The stream is given back to its work, whatever the calls answered.
        let graph = self.queue.end_capture();
        captured?;
        Ok(graph?)
    }

    fn call_rows(&self, memory: &Memory, contender: Contender, job: Job) -> Result<()> {
        let (on, source) = match contender {
            Contender::Fused => (&self.communicator, &self.source),
            Contender::AllReduce | Contender::Separate => (&memory.alone, &memory.sum),
        };
        let raw = |buffer: &DeviceBuffer, count: usize, dtype: DType| RawBuffer {
            ptr: buffer.address(),
            count,
            dtype,
            place: Place::Cuda { ordinal: self.device.ordinal() },
        };
        let (count, dtype) = (job.count(), self.workload.dtype);
        if !matches!(contender, Contender::Fused) {
            let both = [raw(&self.source, count, dtype), raw(&memory.sum, count, dtype)];
            // SAFETY: the buffers are as long, and live until the stream was waited for.
            let call = unsafe { Call::from_raw(Kind::AllReduce { op: ReduceOp::Sum }, &both, &[]) };
            self.communicator.on(&self.stream).submit(call)?;
        }
        if matches!(contender, Contender::AllReduce) {
            return Ok(());
        }
        let residual = if self.workload.in_place { &memory.new } else { &memory.residual };
        let scales = match job.output {
            NormOutput::Same => None,
            NormOutput::Fp8 => Some(1),
            NormOutput::Fp8PerToken => Some(job.tokens),
        };
        let sides = [
            raw(source, count, dtype),
            raw(residual, count, dtype),
            raw(&memory.new, count, dtype),
            raw(&memory.weight, job.hidden, dtype),
            raw(&memory.output, count, job.output.dtype(dtype)),
        ];
        let scales = scales.map(|count| raw(&memory.scales, count, DType::F32));
        let buffers: Vec<_> = sides.into_iter().chain(scales).collect();
        // SAFETY: as above.
        let call = unsafe { Call::from_raw(self.kind(job), &buffers, &[]) };
        Ok(on.on(&self.stream).submit(call)?)
    }

    /// Bytes of our outputs that are not what the reference makes of the sum; of that of the all-reduce alone, which
    /// `bench all_reduce` verifies, because its order is that of the fused call, too.
    fn wrong_rows(&self, memory: &Memory, job: Job) -> Result<u64> {
        let (dtype, size) = (self.workload.dtype, self.workload.dtype.size());
        let out_size = job.output.dtype(dtype).size();
        self.call_rows(memory, Contender::AllReduce, job)?;
        self.settle()?;
        let rows = (0..job.tokens).filter(|row| *row < COMPARED || row + COMPARED >= job.tokens);
        let norm = RmsNorm { dtype, epsilon: EPSILON, output: job.output };
        let mut weight = vec![0; job.hidden * size];
        memory.weight.read(0, &mut weight)?;
        let mut wrong = 0;
        for contender in [Contender::Fused, Contender::Separate] {
            // SAFETY: the buffers are as long, and live until the stream was waited for.
            unsafe {
                self.queue.fill(memory.output.address(), POISON, job.count() * out_size)?;
                self.queue.fill(memory.new.address(), POISON, job.count() * size)?;
            }
            self.settle()?;
            if self.workload.in_place {
                let mut before = vec![0; job.count() * size];
                memory.residual.read(0, &mut before)?;
                // SAFETY: as above.
                unsafe { self.queue.write(memory.new.address(), &before) }?;
            }
            self.communicator.barrier()?;
            self.call_rows(memory, contender, job)?;
            self.settle()?;
            for row in rows.clone() {
                let read = |buffer: &DeviceBuffer, size: usize| -> Result<Vec<u8>> {
                    let mut bytes = vec![0; job.hidden * size];
                    buffer.read(row * job.hidden * size, &mut bytes)?;
                    Ok(bytes)
                };
                let (sum, mut residual) = (read(&memory.sum, size)?, read(&memory.residual, size)?);
                let mut output = vec![0; job.hidden * out_size];
                let mut scale = SCALE;
                let sides = Row {
                    sum: &sum,
                    residual: &mut residual,
                    weight: &weight,
                    output: &mut output,
                    scale: &mut scale,
                };
                norm.apply(sides)?;
                let mut got_scale = SCALE.to_le_bytes();
                if job.output == NormOutput::Fp8PerToken {
                    memory.scales.read(row * 4, &mut got_scale)?;
                }
                let differing = |expected: &[u8], got: &[u8]| {
                    expected.iter().zip(got).filter(|(expected, got)| expected != got).count() as u64
                };
                wrong += differing(&residual, &read(&memory.new, size)?);
                wrong += differing(&output, &read(&memory.output, out_size)?);
                wrong += differing(&scale.to_le_bytes(), &got_scale);
            }
        }
        Ok(wrong)
    }
}
