//! A kernel of one's own over one-sided memory on GPUs: packets and signals between all ranks, many rounds in one launch, checked.
//!
//! `device_header [RANKS] [ROUNDS]` has as many ranks as there are GPUs (or `-`), threads of this process; under a launcher (`unisono
//! run -n 4 -- device_header`) each process is a rank with the GPU of its local rank. What the kernel does stands in
//! `device_header.cu`.
#![expect(clippy::print_stdout, reason = "a program that reports to the terminal")]

#[cfg(not(feature = "cuda"))]
fn main() {
    println!("built without the feature cuda");
}

#[cfg(feature = "cuda")]
fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    example::run()
}

#[cfg(feature = "cuda")]
mod example {
    use unisono::cuda::{
        Cache, Compiler, Device, DeviceBuffer, Event, Grid, Module, Source, Stream as CudaStream,
    };
    use unisono::gpu::kernels::architecture;
    use unisono::{Builder, Communicator, DeviceView, Memory, Operations};

    type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

    const KERNEL: &str = include_str!("device_header.cu");
    const PACKETS: usize = 256;

    /// What the kernel takes: the same structure as there.
    #[derive(Debug)]
    #[repr(C)]
    struct Arguments {
        shared: DeviceView,
        rounds_done: u64,
        first_round: u32,
        rounds: u32,
    }

    pub(crate) fn run() -> Outcome<()> {
        let mut arguments = std::env::args().skip(1);
        let devices = unisono::cuda::driver::device_count()?;
        let ranks = arguments.next().filter(|text| text != "-");
        let ranks: u32 = ranks.map_or(Ok(devices), |text| text.parse())?;
        let rounds = arguments.next().map_or(Ok(10_000), |text| text.parse())?;
        if let Some(local_rank) = std::env::var_os("LOCAL_RANK") {
            let local_rank: u32 = local_rank.to_string_lossy().parse()?;
            let communicator = Builder::from_env()?.device(local_rank % devices).build()?;
            return rank(communicator, rounds);
        }
        let devices: Vec<u32> = (0..ranks).map(|rank| rank % devices).collect();
        let communicators = Communicator::local(&devices)?;
        let threads = communicators.into_iter().map(|one| std::thread::spawn(move || rank(one, rounds)));
        for thread in threads.collect::<Vec<_>>() {
            thread.join().map_err(|_| "a rank panicked")??;
        }
        Ok(())
    }

    fn rank(communicator: Communicator, rounds: u32) -> Outcome<()> {
        let (me, ranks) = (communicator.rank(), communicator.world_size());
        let device = Device::new(communicator.device().ok_or("no device")?)?;
        let stream = CudaStream::new(&device)?;

        // 1. The kernel: compiled for this device with the header, or taken from the cache.
        let source = Source {
            name: "device_header.cu",
            text: KERNEL,
            headers: vec![unisono::device_header()],
            definitions: Vec::new(),
        };
        let cubin = Cache::of_user().cubin(&source, architecture(&device), Compiler::find)?;
        let kernel = Module::load(&device, &cubin)?.function("exchange")?;

        // 2. The memory: on every GPU two halves of packets from each rank, and of numbers from each.
        let bytes = 2 * ranks * (PACKETS * 16 + 8);
        let shared = communicator.window::<u8>(bytes, Memory::Device)?.into_symmetric(&communicator)?;
        let mut answer = DeviceBuffer::new(&device, 8)?;
        answer.write(0, &[0; 8])?;
        let mut arguments = Arguments {
            shared: shared.device_view()?,
            rounds_done: answer.address(),
            first_round: 1,
            rounds,
        };

        // 3. All ranks launch it at about the same time; it waits for theirs.
        let events = [Event::new(&device, true)?, Event::new(&device, true)?];
        communicator.barrier()?;
        events[0].record(&stream)?;
        let grid = Grid { blocks: 1, threads: PACKETS as u32, shared_bytes: 0, is_early: false };
        // SAFETY: the kernel takes `Arguments`; the memory stays until the stream was waited for, on all ranks.
        unsafe { kernel.launch(&stream, grid, (&raw mut arguments).cast()) }?;
        events[1].record(&stream)?;
        stream.synchronize()?;
        // Why, if a wait of the kernel ended without what it waited for.
        shared.check()?;

        // 4. What it answers.
        let mut words = [0; 8];
        answer.read(0, &mut words)?;
        let word = |at: usize| u32::from_le_bytes([words[at], words[at + 1], words[at + 2], words[at + 3]]);
        if (word(0), word(4)) != (rounds, 0) {
            return Err(format!("rank {me}: {} of {rounds} rounds, {} wrong values", word(0), word(4)).into());
        }
        let us = events[1].us_since(&events[0])? / f64::from(rounds.max(1));
        println!("rank {me} of {ranks}: {rounds} rounds of packets and signals, {us:.2} us each");
        communicator.barrier()?;
        shared.close(&communicator)?;
        communicator.destroy()?;
        Ok(())
    }
}
