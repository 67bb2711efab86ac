//! Times all-reduces of rows with residual and norm in one kernel against an all-reduce alone and against an all-reduce with a kernel
//! behind it, in CUDA graphs on all GPUs of this machine.
//!
//! `gpu_fused [RANKS] [HIDDEN] [TOKENS,…] [same|fp8|fp8_per_token]`; prints a line for each number of tokens: microseconds per call of
//! the slowest rank, the least of several runs in turns. The separate kernel is what the same call takes in a world of one rank.
#![expect(clippy::print_stdout, reason = "a program that reports to the terminal")]

#[cfg(not(feature = "cuda"))]
fn main() {
    println!("built without the feature cuda");
}

#[cfg(feature = "cuda")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    fused::run()
}

#[cfg(feature = "cuda")]
mod fused {
    use unisono::cuda::{Device, DeviceBuffer, Event, Graph, Stream as CudaStream};
    use unisono::half::bf16;
    use unisono::{
        AllReduceRmsNorm, Buf, BufMut, Communicator, Normalised, Operations, ReduceOp, Stream, f8e4m3,
    };

    type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

    /// What is timed.
    #[derive(Clone, Copy, PartialEq)]
    enum Contender {
        /// All in one call, in the form that it takes.
        Fused,
        AllReduce,
        /// An all-reduce, and residual and norm in a kernel behind it.
        Separate,
    }

    const CONTENDERS: [Contender; 3] = [Contender::Fused, Contender::AllReduce, Contender::Separate];

    /// The buffers of a rank; of each side as many elements as the largest call has.
    struct Memory {
        ordinal: u32,
        input: DeviceBuffer,
        sum: DeviceBuffer,
        residual: DeviceBuffer,
        weight: DeviceBuffer,
        output: DeviceBuffer,
        scales: DeviceBuffer,
    }

    struct Rank {
        stream: CudaStream,
        graphs: Vec<Graph>,
        events: [Event; 2],
    }

    pub(crate) fn run() -> Outcome<()> {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let argument = |at: usize| arguments.get(at).map(String::as_str).filter(|text| *text != "-");
        let there_are = unisono::cuda::driver::device_count()? as usize;
        let ranks = argument(0).map_or(Ok(there_are), str::parse)?;
        let hidden: usize = argument(1).map_or(Ok(8192), str::parse)?;
        let tokens = argument(2).unwrap_or("1,2,4,8,16,32,64,128,256,1024,4096");
        let tokens: Vec<usize> = tokens.split(',').map(str::parse).collect::<Result<_, _>>()?;
        let output = argument(3).unwrap_or("same");
        let devices: Vec<u32> = (0..ranks).map(|rank| (rank % there_are) as u32).collect();
        let builder = || {
            let patience = Some(std::time::Duration::from_secs(10));
            Communicator::builder().timeout(patience).prepare_rms_norm::<bf16>()
        };
        let usual = builder().local(&devices)?;
        let mut alone = Vec::new();
        for device in &devices {
            alone.extend(builder().local(&[*device])?);
        }
        println!("{ranks} ranks on {there_are} devices, rows of {hidden}, {output}: microseconds per call");
        println!(
            "{:>7} {:>10} {:>9} {:>10} {:>9} {:>14}",
            "tokens", "KiB", "fused", "all-reduce", "fused +", "two kernels"
        );
        for tokens in tokens {
            let count = tokens * hidden;
            let mut all = Vec::new();
            for at in 0..ranks {
                all.push(prepare((&usual[at], &alone[at]), devices[at], (tokens, hidden), output)?);
            }
            let mut least = [f64::MAX; CONTENDERS.len()];
            for _ in 0..7 {
                for (which, least) in least.iter_mut().enumerate() {
                    *least = least.min(time(&all, which, calls(count))?);
                }
            }
            usual.iter().chain(&alone).try_for_each(Communicator::check)?;
            let [fused, alone, behind] = least;
            println!(
                "{tokens:>7} {:>10.0} {fused:>9.2} {alone:>10.2} {:>9.2} {behind:>14.2}",
                count as f64 * 2.0 / 1024.0,
                fused - alone
            );
        }
        std::thread::scope(|scope| {
            for rank in usual.into_iter().chain(alone) {
                scope.spawn(|| rank.destroy());
            }
        });
        Ok(())
    }

    /// Calls of a graph.
    fn calls(count: usize) -> usize {
        (32usize << 20).div_ceil(count.max(1) * 2).clamp(4, 200)
    }

    /// The graphs of a rank, one for each contender, and their memory, which is never freed.
    fn prepare(
        (usual, alone): (&Communicator, &Communicator),
        ordinal: u32,
        (tokens, hidden): (usize, usize),
        output: &str,
    ) -> Outcome<Rank> {
        let device = Device::new(ordinal)?;
        let stream = CudaStream::new(&device)?;
        let bytes = tokens * hidden * 2;
        let memory = Memory {
            ordinal,
            input: DeviceBuffer::new(&device, bytes)?,
            sum: DeviceBuffer::new(&device, bytes)?,
            residual: DeviceBuffer::new(&device, bytes)?,
            weight: DeviceBuffer::new(&device, hidden * 2)?,
            output: DeviceBuffer::new(&device, bytes)?,
            scales: DeviceBuffer::new(&device, tokens * 4)?,
        };
        for (buffer, bytes) in
            [(&memory.input, bytes), (&memory.residual, bytes), (&memory.weight, hidden * 2)]
        {
            // SAFETY: the buffer is as long and is not freed.
            unsafe { stream.fill(buffer.address(), 0x3c, bytes) }?;
        }
        // SAFETY: as above.
        unsafe { stream.fill(memory.scales.address(), 0x3c, tokens * 4) }?;
        // SAFETY: the stream lives as long as this one.
        let ours = unsafe { Stream::cuda(stream.raw(), ordinal) }?;
        let mut graphs = Vec::new();
        for contender in CONTENDERS {
            stream.begin_capture()?;
            let mut captured = Ok(());
            for _ in 0..calls(tokens * hidden) {
                captured = captured
                    .and_then(|()| memory.call(contender, (usual, alone), &ours, (tokens, hidden), output));
            }
            let graph = stream.end_capture();
            captured?;
            graphs.push(graph?);
        }
        std::mem::forget(memory);
        Ok(Rank { graphs, events: [Event::new(&device, true)?, Event::new(&device, true)?], stream })
    }

    impl Memory {
        fn call(
            &self,
            contender: Contender,
            (usual, alone): (&Communicator, &Communicator),
            stream: &Stream,
            (tokens, hidden): (usize, usize),
            output: &str,
        ) -> unisono::Result<()> {
            let count = tokens * hidden;
            // SAFETY: the buffers are as long and are not freed, and only this stream touches them.
            unsafe {
                let input = Buf::<bf16>::cuda(self.input.address(), count, self.ordinal);
                let rows = BufMut::<bf16>::cuda(self.output.address(), count, self.ordinal);
                let sum = || BufMut::<bf16>::cuda(self.sum.address(), count, self.ordinal);
                let (norm, input) = match contender {
                    Contender::AllReduce => {
                        return usual.on(stream).all_reduce_into(input, sum(), ReduceOp::Sum);
                    }
                    Contender::Fused => (usual, input),
                    Contender::Separate => {
                        usual.on(stream).all_reduce_into(input, sum(), ReduceOp::Sum)?;
                        (alone, Buf::cuda(self.sum.address(), count, self.ordinal))
                    }
                };
                let eight = || BufMut::<f8e4m3>::cuda(self.output.address(), count, self.ordinal);
                let output = match output {
                    "fp8" => Normalised::Fp8 {
                        output: eight(),
                        scale: Buf::cuda(self.scales.address(), 1, self.ordinal),
                    },
                    "fp8_per_token" => Normalised::Fp8PerToken {
                        output: eight(),
                        scales: BufMut::cuda(self.scales.address(), tokens, self.ordinal),
                    },
                    _ => Normalised::Same(rows),
                };
                norm.on(stream).all_reduce_rms_norm(AllReduceRmsNorm {
                    input,
                    residual: None,
                    residual_out: BufMut::cuda(self.residual.address(), count, self.ordinal),
                    weight: Buf::cuda(self.weight.address(), hidden, self.ordinal),
                    epsilon: 1e-5,
                    output,
                })
            }
        }
    }

    /// Microseconds per call of the slowest rank.
    fn time(all: &[Rank], which: usize, calls: usize) -> Outcome<f64> {
        for Rank { stream, graphs, events: [start, end] } in all {
            // The first lets all arrive.
            graphs[which].launch(stream)?;
            start.record(stream)?;
            graphs[which].launch(stream)?;
            end.record(stream)?;
        }
        let mut slowest = 0.0f64;
        for Rank { stream, events: [start, end], .. } in all {
            stream.synchronize()?;
            slowest = slowest.max(end.us_since(start)? / calls as f64);
        }
        Ok(slowest)
    }
}
