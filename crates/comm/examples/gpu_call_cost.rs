//! What a call costs that is on its own: the host's time to put it into a stream, beside a bare launch of the driver with arguments
//! of the same size, and the device's time on the rank that comes last, 50 µs after the others.
//!
//! `gpu_call_cost [RANKS]`; medians of 2,000 calls, bf16 sums. Ranks are GPUs of this machine, driven by one thread. Before that, what
//! the first all-reduce takes, from the start of the program on: with `UNISONO_CACHE_DIR` in an empty folder all kernels are compiled.
#![expect(clippy::print_stdout, reason = "a program that reports to the terminal")]

#[cfg(not(feature = "cuda"))]
fn main() {
    println!("built without the feature cuda");
}

#[cfg(feature = "cuda")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    cost::run(std::time::Instant::now())
}

#[cfg(feature = "cuda")]
mod cost {
    use std::time::{Duration, Instant};

    use unisono::cuda::{
        Architecture, Cache, Compiler, Device, DeviceBuffer, Event, Grid, Module, Source,
        Stream as CudaStream,
    };
    use unisono::{Call, Communicator, DType, Kind, Operations, Place, RawBuffer, ReduceOp, Stream};

    type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

    const CALLS: usize = 2000;
    const SKEW: Duration = Duration::from_micros(50);
    /// As many bytes as our kernels take.
    const BARE: &str = "struct Bytes { char bytes[536]; };\nextern \"C\" __global__ void bare(const __grid_constant__ Bytes) {}\n";

    struct Rank {
        raw: CudaStream,
        stream: Stream,
        buffer: DeviceBuffer,
        events: [Event; 2],
        ordinal: u32,
    }

    impl Rank {
        fn new(ordinal: u32) -> Outcome<Self> {
            let device = Device::new(ordinal)?;
            let raw = CudaStream::new(&device)?;
            // SAFETY: the raw stream lies beside this one and lives as long.
            let stream = unsafe { Stream::cuda(raw.raw(), ordinal) }?;
            let buffer = DeviceBuffer::new(&device, 1 << 20)?;
            let events = [Event::new(&device, true)?, Event::new(&device, true)?];
            Ok(Self { raw, stream, buffer, events, ordinal })
        }

        fn call(&self, communicator: &Communicator, bytes: usize) -> unisono::Result<()> {
            let place = Place::Cuda { ordinal: self.ordinal };
            let buffer =
                RawBuffer { ptr: self.buffer.address(), count: bytes / 2, dtype: DType::BF16, place };
            // SAFETY: the buffer lives until the streams were waited for, and nobody else uses it.
            let call = unsafe { Call::from_raw(Kind::AllReduce { op: ReduceOp::Sum }, &[buffer], &[]) };
            communicator.on(&self.stream).submit(call)
        }
    }

    fn median(mut times: Vec<f64>) -> f64 {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }

    pub(crate) fn run(start: Instant) -> Outcome<()> {
        let reached = |what: &str| println!("{:>8.1} ms: {what}", start.elapsed().as_secs_f64() * 1e3);
        let there_are = unisono::cuda::driver::device_count()?;
        let count = std::env::args().nth(1).map_or(Ok(there_are), |text| text.parse())?;
        let ordinals: Vec<u32> = (0..count).map(|rank| rank % there_are).collect();
        println!("{count} ranks on {there_are} devices, all_reduce bf16 sum");
        let cache = Cache::of_user();
        match cache.folder() {
            Some(folder) => println!("{} kernels cached in {}", cache.entries()?.len(), folder.display()),
            None => println!("no cache of kernels"),
        }
        let ranks: Vec<Rank> = ordinals.iter().map(|ordinal| Rank::new(*ordinal)).collect::<Outcome<_>>()?;
        reached("the devices are open");
        let world = Communicator::local(&ordinals)?;
        reached("the communicator is built");
        let wait = || ranks.iter().try_for_each(|rank| rank.raw.synchronize());
        for (rank, communicator) in ranks.iter().zip(&world) {
            rank.call(communicator, 1024)?;
        }
        wait()?;
        reached("the first all-reduce is done");

        let mut ours = Vec::new();
        for _ in 0..CALLS {
            for (rank, communicator) in ranks.iter().zip(&world) {
                let start = Instant::now();
                rank.call(communicator, 1024)?;
                ours.push(start.elapsed().as_secs_f64() * 1e6);
            }
            wait()?;
        }
        let device = Device::new(ordinals[0])?;
        let (major, minor) = device.facts().capability;
        let source = Source { name: "bare.cu", text: BARE, headers: Vec::new(), definitions: Vec::new() };
        let cubin = Cache::of_user().cubin(&source, Architecture { major, minor }, Compiler::find)?;
        let bare = Module::load(&device, &cubin)?.function("bare")?;
        let mut arguments = [0u8; 536];
        let mut launches = Vec::new();
        for _ in 0..CALLS * ranks.len() {
            let start = Instant::now();
            // SAFETY: the kernel takes so many bytes, and does nothing.
            unsafe {
                bare.launch(
                    &ranks[0].raw,
                    Grid { blocks: 2, threads: 256, shared_bytes: 0, is_early: false },
                    arguments.as_mut_ptr().cast(),
                )?;
            }
            launches.push(start.elapsed().as_secs_f64() * 1e6);
            ranks[0].raw.synchronize()?;
        }
        let (ours, launches) = (median(ours), median(launches));
        println!(
            "host: {ours:.2} us a call, {launches:.2} us a bare launch, {:.2} us above it",
            ours - launches
        );

        for bytes in [8, 1 << 10, 8 << 10, 64 << 10, 256 << 10, 1 << 20] {
            let mut times = Vec::new();
            for _ in 0..CALLS / 4 {
                for (at, (rank, communicator)) in ranks.iter().zip(&world).enumerate() {
                    if at + 1 == ranks.len() {
                        let start = Instant::now();
                        while start.elapsed() < SKEW {}
                        rank.events[0].record(&rank.raw)?;
                    }
                    rank.call(communicator, bytes)?;
                }
                let last = &ranks[ranks.len() - 1];
                last.events[1].record(&last.raw)?;
                wait()?;
                times.push(last.events[1].us_since(&last.events[0])?);
            }
            println!("{bytes:>8} B: {:.2} us on the rank that comes last", median(times));
        }
        for communicator in &world {
            communicator.check()?;
        }
        Ok(())
    }
}
