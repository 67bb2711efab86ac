//! Ranks on GPUs that are killed, aborted or lose their context, while kernels of the others wait for them.
//!
//! Without a GPU each test says so and passes.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use unisono::cuda::{Device, DeviceBuffer, Stream as CudaStream};
use unisono::{BufMut, Communicator, DType, Error, Operations, ReduceOp, Result, Stream};

use super::parts::{Part, report, setting};
use super::random::Random;
use super::world::Setup;
use super::{ms_between, percentiles, scale, server};

/// The longest that a survivor may take from the kill to its error.
const PROMISED_MS: f64 = 1000.0;

pub(super) fn device_count() -> Option<u32> {
    let count = unisono::cuda::driver::device_count();
    count.inspect_err(|error| println!("SKIPPED: {error}")).ok()
}

/// Row 2: who is killed under kernels that spin is named; the context of the survivors goes on, and so do they, in a new
/// communicator of the same process.
pub(crate) fn survivors_leave_their_kernels_and_go_on() {
    let Some(count) = device_count() else { return };
    let server = server();
    let seed = Random::fresh_seed();
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let (mut samples, kills) = (Vec::new(), 2 * scale());
    for _ in 0..kills {
        let size = (count as usize).max(2);
        let victim = random.below(size as u64) as usize;
        let setup = Setup::new("gpu", size, server.unique_id())
            .with("FAULTS_CALLS", random.next())
            .with("FAULTS_INIT_MS", 60_000);
        let mut world = setup.start();
        world.wait_until_all_said("ready");
        std::thread::sleep(Duration::from_micros(random.below(100_000)));
        let killed = world.kill(victim);
        world.wait_for_end();
        for (rank, process) in world.ranks.iter().enumerate().filter(|(rank, _)| *rank != victim) {
            let context = || format!("rank {rank}, victim {victim}\n{}", world.transcript());
            let failure = process.failure().unwrap_or_else(|| panic!("{}", context()));
            assert_eq!(
                (failure.variant.as_str(), &*failure.names),
                ("PeerDied", &[victim][..]),
                "{}",
                context()
            );
            assert!(process.said("intact") && process.said("again"), "{}", context());
            let took = ms_between(killed, failure.at_ns);
            assert!((0.0..=PROMISED_MS).contains(&took), "{took} ms: {}", context());
            samples.push(took);
        }
    }
    println!("{kills} kills under kernels: survivors name the rank after {}", percentiles(&mut samples).0);
}

/// Row 27: a rank whose kernel goes where it must not loses its context, lives on, and is named.
pub(crate) fn a_rank_that_loses_its_context_is_named() {
    let Some(count) = device_count() else { return };
    if count < 2 {
        println!("SKIPPED: ranks of one device lose their contexts together");
        return;
    }
    let server = server();
    let setup =
        Setup::new("gpu", 2, server.unique_id()).with("FAULTS_VICTIM", 1).with("FAULTS_INIT_MS", 60_000);
    let mut world = setup.start();
    world.wait_until("the error of rank 0", |world| world.ranks[0].failure().is_some());
    let failure = world.ranks[0].failure().unwrap();
    assert_eq!(failure.variant, "Aborted", "{}", world.transcript());
    assert!(failure.sentence.starts_with("rank 1 aborted"), "{}", failure.sentence);
    assert!(failure.sentence.contains("it lost its CUDA context"), "{}", failure.sentence);
    world.signal(1, Signal::KILL);
    world.wait_for_end();
}

/// Calls without end; what comes after the error depends on it.
pub(crate) fn calls(part: &Part) -> Result<()> {
    let count = device_count().unwrap_or(1);
    let ordinal = part.rank as u32 % count;
    let device = Device::new(ordinal).unwrap();
    // Loading kernels takes seconds where nothing is cached, and who loads hears of nobody.
    let communicator = part.builder().device(ordinal).prepare(DType::I32, ReduceOp::Max)?.build()?;
    let raw = CudaStream::new(&device).unwrap();
    // SAFETY: the raw stream lives as long as this one.
    let stream = unsafe { Stream::cuda(raw.raw(), ordinal) }?;
    let elements = 1 << 22;
    let memory = DeviceBuffer::new(&device, elements * 4).unwrap();
    // SAFETY: nobody else uses the memory.
    unsafe { raw.fill(memory.address(), 1, memory.bytes()) }.unwrap();
    let before = unrelated(&device);
    let mut random = Random::new(setting("FAULTS_CALLS").unwrap_or(1));
    println!("ready");
    let is_victim = setting("FAULTS_VICTIM") == Some(part.rank);
    let start = Instant::now();
    let error = loop {
        let count = random.count(elements).max(1);
        let times = random.below(8);
        let enqueue = || -> Result<()> {
            for _ in 0..=times {
                // SAFETY: the memory outlives the stream's work, and only the stream touches it.
                let x = unsafe { BufMut::<i32>::cuda(memory.address(), count, ordinal) };
                communicator.on(&stream).all_reduce(x, ReduceOp::Max)?;
            }
            Ok(())
        };
        if is_victim && start.elapsed() > Duration::from_millis(300) {
            return lose_context(&raw);
        }
        let result = enqueue().and_then(|()| {
            raw.synchronize().map_err(|error| Error::Cuda { rank: part.rank, error })?;
            communicator.check()
        });
        if let Err(error) = result {
            break error;
        }
    };
    report(&error);
    if unrelated(&device) == before {
        println!("intact");
    }
    if let Error::PeerDied { rank: dead, .. } = &error
        && part.size > 2
    {
        let rank = part.rank - usize::from(part.rank > *dead);
        let again = part.builder().rank(rank).world_size(part.size - 1).job(format!("{}-again", part.job));
        go_on(&again.device(ordinal).build()?, &device, part.size - 1)?;
    } else {
        go_on(&Communicator::local(&[ordinal])?[0], &device, 1)?;
    }
    println!("again");
    Err(error)
}

/// A sum in a new communicator of this process.
fn go_on(communicator: &Communicator, device: &Device, size: usize) -> Result<()> {
    let raw = CudaStream::new(device).unwrap();
    // SAFETY: the raw stream lives as long as this one.
    let stream = unsafe { Stream::cuda(raw.raw(), device.ordinal()) }?;
    let mut memory = DeviceBuffer::new(device, 400).unwrap();
    memory.write(0, &1f32.to_le_bytes().repeat(100)).unwrap();
    // SAFETY: the memory outlives the stream's work, and only the stream touches it.
    let x = unsafe { BufMut::<f32>::cuda(memory.address(), 100, device.ordinal()) };
    communicator.on(&stream).all_reduce(x, ReduceOp::Sum)?;
    raw.synchronize().unwrap();
    communicator.check()?;
    let mut got = [0; 400];
    memory.read(0, &mut got).unwrap();
    assert_eq!(got[396..], (size as f32).to_le_bytes());
    Ok(())
}

/// Something else that the device computes: fills and copies, read back.
fn unrelated(device: &Device) -> Vec<u8> {
    let stream = CudaStream::new(device).unwrap();
    let (source, target) =
        (DeviceBuffer::new(device, 4096).unwrap(), DeviceBuffer::new(device, 4096).unwrap());
    for at in 0..16 {
        // SAFETY: both buffers outlive the stream's work.
        unsafe {
            stream.fill(source.address() + at * 256, at as u8 * 7, 256).unwrap();
            stream.copy(target.address() + (15 - at) * 256, source.address() + at * 256, 256).unwrap();
        }
    }
    stream.synchronize().unwrap();
    let mut bytes = vec![0; 4096];
    target.read(0, &mut bytes).unwrap();
    bytes
}

/// Runs a kernel that goes where it must not, and then does nothing for a while.
fn lose_context(stream: &CudaStream) -> Result<()> {
    const WILD: &str = "extern \"C\" __global__ void wild(unsigned long long* at) { *at = 1; }";
    use unisono::cuda::{Architecture, Cache, Compiler, Grid, Module, Source};
    let source = Source { name: "wild.cu", text: WILD, headers: Vec::new(), definitions: Vec::new() };
    let (major, minor) = stream.device().facts().capability;
    let cubin = Cache::of_user().cubin(&source, Architecture { major, minor }, Compiler::find).unwrap();
    let function = Module::load(stream.device(), &cubin).unwrap().function("wild").unwrap();
    let mut nowhere = 8u64;
    // SAFETY: the argument is as the kernel takes it. That it points nowhere is the point.
    let launched = unsafe {
        function.launch(stream, Grid { blocks: 1, threads: 1, shared_bytes: 0 }, (&raw mut nowhere).cast())
    };
    launched.unwrap();
    std::thread::sleep(Duration::from_secs(30));
    Ok(())
}
