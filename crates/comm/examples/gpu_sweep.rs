//! Times every form of a collective on all GPUs of this machine, with several grids, in CUDA graphs: what the borders and grids in
//! `unisono_core::device::select` are chosen from.
//!
//! `gpu_sweep [OPERATION] [RANKS] [SIZES] [FORM:BLOCKS:TILE,…]`; prints a line for each size and form: microseconds
//! per call of the slowest rank, the least of several runs, and GB/s of the bus as nccl-tests counts them.
#![expect(clippy::print_stdout, reason = "a program that reports to the terminal")]

#[cfg(not(feature = "cuda"))]
fn main() {
    println!("built without the feature cuda");
}

#[cfg(feature = "cuda")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    sweep::run()
}

#[cfg(feature = "cuda")]
mod sweep {
    use unisono::cuda::{Device, DeviceBuffer, Event, Stream as CudaStream};
    use unisono::{
        Call, Communicator, DType, Kind, Operations, Order, Place, RawBuffer, ReduceOp, Stream, settings,
    };
    use unisono_core::device::Wish;

    type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

    pub(crate) fn run() -> Outcome<()> {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let argument = |at: usize| arguments.get(at).map(String::as_str).filter(|text| *text != "-");
        let there_are = unisono::cuda::driver::device_count()? as usize;
        let ranks = argument(1).map_or(Ok(there_are), str::parse)?;
        let kind = match argument(0) {
            None | Some("all_reduce") => Kind::AllReduce { op: ReduceOp::Sum },
            Some("broadcast") => Kind::Broadcast { root: 0 },
            Some("all_gather") => Kind::AllGather,
            Some("reduce") => Kind::Reduce { op: ReduceOp::Sum, root: 0 },
            Some("reduce_scatter") => Kind::ReduceScatter { op: ReduceOp::Sum },
            Some("gather") => Kind::Gather { root: 0 },
            Some("scatter") => Kind::Scatter { root: 0 },
            Some("all_to_all") => Kind::AllToAll,
            Some(other) => return Err(format!("no operation {other}").into()),
        };
        let sizes = argument(2).unwrap_or("96,1KiB,8KiB,64KiB,256KiB,1MiB,4MiB,16MiB,64MiB,256MiB,1GiB");
        let sizes: Vec<usize> =
            sizes.split(',').map(|size| settings::parse_size(size).unwrap_or(0) as usize).collect();
        let forms = argument(3).unwrap_or(
            "one-shot:0,one-shot:8,one-shot:16,one-shot:32,two-shot:0,two-shot:8,two-shot:16,two-shot:32,bulk:0,bulk:12,bulk:36,bulk:48,ring:0,ring:8,ring:24,ring:32",
        );
        let devices: Vec<u32> = (0..ranks).map(|rank| (rank % there_are) as u32).collect();
        println!("{} {ranks} ranks on {there_are} devices: bytes form:blocks tile us busbw", kind.name());
        for text in forms.split(',') {
            let wish: Wish = text.parse().map_err(|_| format!("no form {text}"))?;
            let patience = Some(std::time::Duration::from_secs(5));
            let builder = Communicator::builder().timeout(patience).gpu_wish(wish).order(Order::Fixed);
            let world = builder.local(&devices)?;
            for bytes in &sizes {
                let launch = world[0].gpu_choice(kind, *bytes, 2).ok_or("no device")?;
                if launch.form == wish.form {
                    let us = time(&world, kind, *bytes)?;
                    let factor = match kind {
                        Kind::AllReduce { .. } => 2.0 * (ranks - 1) as f64 / ranks as f64,
                        Kind::Broadcast { .. } | Kind::Reduce { .. } => 1.0,
                        _ => (ranks - 1) as f64,
                    };
                    let busbw = *bytes as f64 * factor / us / 1e3;
                    println!(
                        "{bytes:>11} {wish} {}x{} {} {us:.2} {busbw:.1}",
                        launch.blocks, launch.threads, launch.tile
                    );
                }
            }
            std::thread::scope(|scope| {
                for rank in world {
                    scope.spawn(|| rank.destroy());
                }
            });
        }
        Ok(())
    }

    /// Parts of the input and of the output of a rank.
    fn parts(kind: Kind, rank: usize, ranks: usize) -> (usize, usize) {
        let at_root = |parts| if rank == 0 { parts } else { 0 };
        match kind {
            Kind::AllGather => (1, ranks),
            Kind::Reduce { .. } => (1, at_root(1)),
            Kind::ReduceScatter { .. } => (ranks, 1),
            Kind::Gather { .. } => (1, at_root(ranks)),
            Kind::Scatter { .. } => (at_root(ranks), 1),
            Kind::AllToAll => (ranks, ranks),
            _ => (1, 1),
        }
    }

    fn time(world: &[Communicator], kind: Kind, bytes: usize) -> Outcome<f64> {
        let calls = (64usize << 20).div_ceil(bytes.max(1)).clamp(2, 100);
        let mut all = Vec::new();
        for rank in world {
            let device = Device::new(rank.device().ok_or("no device")?)?;
            let stream = CudaStream::new(&device)?;
            let (parts_in, parts_out) = parts(kind, rank.rank(), world.len());
            let source = DeviceBuffer::new(&device, bytes * parts_in.max(1))?;
            let target = DeviceBuffer::new(&device, bytes * parts_out.max(1))?;
            // SAFETY: the buffers live until the streams were waited for.
            unsafe {
                stream.fill(source.address(), 0x3c, source.bytes())?;
                stream.fill(target.address(), 0, target.bytes())?;
            }
            // SAFETY: the stream lives as long as this one.
            let ours = unsafe { Stream::cuda(stream.raw(), device.ordinal()) }?;
            let raw = |buffer: &DeviceBuffer, parts: usize| RawBuffer {
                ptr: buffer.address(),
                count: bytes / 2 * parts,
                dtype: DType::BF16,
                place: Place::Cuda { ordinal: device.ordinal() },
            };
            stream.begin_capture()?;
            for _ in 0..calls {
                // SAFETY: the buffers live until the streams were waited for.
                let call =
                    unsafe { Call::from_raw(kind, &[raw(&source, parts_in), raw(&target, parts_out)], &[]) };
                rank.on(&ours).submit(call)?;
            }
            let graph = stream.end_capture()?;
            let events = [Event::new(&device, true)?, Event::new(&device, true)?];
            all.push((graph, stream, events, source, target));
        }
        let mut least = f64::MAX;
        for _ in 0..5 {
            for (graph, stream, [start, end], ..) in &all {
                graph.launch(stream)?;
                start.record(stream)?;
                graph.launch(stream)?;
                end.record(stream)?;
            }
            let mut slowest = 0.0f64;
            for (_, stream, [start, end], ..) in &all {
                stream.synchronize()?;
                slowest = slowest.max(end.us_since(start)? / calls as f64);
            }
            for rank in world {
                rank.check()?;
            }
            least = least.min(slowest);
        }
        Ok(least)
    }
}
