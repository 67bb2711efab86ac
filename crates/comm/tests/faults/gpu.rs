//! Ranks on GPUs that are killed, aborted or lose their context, while kernels of the others wait for them.
//!
//! Without a GPU each test says so and passes.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use unisono::cuda::{Device, DeviceBuffer, Stream as CudaStream};
use unisono::{
    Buf, BufMut, Builder, Communicator, DType, Error, Form, Memory, Operations, ReduceOp, Result, Stream,
};
use unisono_core::device::Link;

use super::parts::{Part, end_of_input, expect, report, setting};
use super::random::{self, Random};
use super::world::{Rank, Setup, World};
use super::{ms_between, percentiles, scale, server};

/// The longest that a survivor may take from the kill to its error.
const PROMISED_MS: f64 = 1000.0;

pub(super) fn device_count() -> Option<u32> {
    let count = unisono::cuda::driver::device_count();
    count.inspect_err(|error| println!("SKIPPED: {error}")).ok()
}

/// Row 2: who is killed under kernels that spin, or amid copies that wait for them, is named; the context of the survivors goes on, and so do they, in a new
/// communicator of the same process.
pub(crate) fn survivors_leave_their_kernels_and_go_on() {
    let Some(count) = device_count() else { return };
    let server = server();
    let seed = random::seed();
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let (mut samples, kills) = (Vec::new(), 4 * scale());
    for number in 0..kills {
        let size = (count as usize).max(2);
        let victim = random.below(size as u64) as usize;
        let setup = Setup::new("gpu", size, server.unique_id())
            .with("FAULTS_CALLS", random.next())
            .with("FAULTS_COPIES", number % 2)
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

/// Row 7 on GPUs: one of at least three ranks is killed under kernels; the others shrink, and sum on their GPUs in a new
/// generation of the same communicator, and in communicators that come from that.
pub(crate) fn survivors_shrink_and_sum_on_their_gpus() {
    let Some(count) = device_count() else { return };
    let server = server();
    let seed = random::seed();
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let (mut samples, kills) = (Vec::new(), 4 * scale());
    for number in 0..kills {
        let setup = Setup::new("gpu survivor", (count as usize).max(3), server.unique_id())
            .with("FAULTS_COPIES", number % 2);
        let (mut world, victim, killed) = lose_one(setup, Signal::KILL, &mut random);
        world.ask_to_end();
        world.wait_for_end();
        for process in expect_good_ends(&world, victim) {
            assert_eq!(process.value("quarantined"), Some("0"), "{}", world.transcript());
            samples.push(ms_between(killed, process.value("summed").unwrap().parse().unwrap()));
        }
    }
    println!("{kills} kills under kernels: survivors sum again after {}", percentiles(&mut samples).0);
}

/// Row 28 on GPUs: a rank that is stopped is left out, what it may still write to is kept, and it harms nobody when it runs again.
pub(crate) fn a_stopped_rank_is_left_out_and_its_memory_is_kept() {
    let Some(count) = device_count() else { return };
    let server = server();
    let mut random = Random::new(random::seed());
    let setup = Setup::new("gpu survivor", (count as usize).max(3), server.unique_id());
    let (mut world, victim, _) = lose_one(setup, Signal::STOP, &mut random);
    world.signal(victim, Signal::CONT);
    world.wait_until("the end of who was stopped", |world| world.ranks[victim].status.is_some());
    world.ask_to_end();
    world.wait_for_end();
    let failure = world.ranks[victim].failure().unwrap_or_else(|| panic!("{}", world.transcript()));
    assert_eq!(failure.variant, "GivenUp", "{}", world.transcript());
    for process in expect_good_ends(&world, victim) {
        let kept: usize = process.value("quarantined").unwrap().parse().unwrap();
        assert!(kept > 0, "{}", world.transcript());
    }
}

/// A world of survivors in which one rank gets `signal` under kernels, and all others have summed since; who it was, and when.
fn lose_one(setup: Setup, signal: Signal, random: &mut Random) -> (World, usize, u64) {
    let setup = setup.with("FAULTS_CALLS", random.next()).with("FAULTS_INIT_MS", 60_000);
    let mut world = setup.start();
    world.wait_until_all_said("ready");
    std::thread::sleep(Duration::from_micros(random.below(100_000)));
    let victim = random.below(setup.size as u64) as usize;
    let at = super::now_ns();
    world.signal(victim, signal);
    world.wait_until("sums of the survivors", |world| {
        (0..setup.size).filter(|rank| *rank != victim).all(|rank| {
            assert!(world.ranks[rank].status.is_none(), "rank {rank} ended\n{}", world.transcript());
            world.ranks[rank].value("quarantined").is_some()
        })
    });
    (world, victim, at)
}

/// All but the victim, with what all survivors have said.
fn expect_good_ends(world: &World, victim: usize) -> Vec<&Rank> {
    let survivors = world.ranks.iter().enumerate().filter(|(rank, _)| *rank != victim);
    let survivors: Vec<&Rank> = survivors.map(|(_, process)| process).collect();
    for process in &survivors {
        let is_well = process.said("done") && process.said("intact") && process.status.unwrap().success();
        assert!(is_well && process.value("summed").is_some(), "{}", world.transcript());
    }
    survivors
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
    let communicator = builder(part).device(ordinal).prepare(DType::I32, ReduceOp::Max)?.build()?;
    let raw = CudaStream::new(&device).unwrap();
    // SAFETY: the raw stream lives as long as this one.
    let stream = unsafe { Stream::cuda(raw.raw(), ordinal) }?;
    let elements = 1 << 22;
    let memory = DeviceBuffer::new(&device, elements * 4).unwrap();
    let received = DeviceBuffer::new(&device, elements * 4).unwrap();
    // SAFETY: nobody else uses the memory.
    unsafe { raw.fill(memory.address(), 1, memory.bytes()) }.unwrap();
    let before = unrelated(&device);
    let mut random = Random::new(setting("FAULTS_CALLS").unwrap_or(1));
    println!("ready");
    let (next, previous) = ((part.rank + 1) % part.size, (part.rank + part.size - 1) % part.size);
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
                gather(&communicator, &stream, &memory, count)?;
                // SAFETY: as above.
                let (out, into) = unsafe {
                    (
                        Buf::<i32>::cuda(memory.address(), count, ordinal),
                        BufMut::<i32>::cuda(received.address(), count, ordinal),
                    )
                };
                communicator.on(&stream).send_recv(out, next, into, previous, 0)?;
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

/// Where gathered data goes by copy engines, if it is gathered at all.
fn builder(part: &Part) -> Builder {
    match setting::<u8>("FAULTS_COPIES") {
        Some(1) => part.builder().gpu_algorithm(Form::Engine, 0),
        _ => part.builder(),
    }
}

/// Gathers what is the same on all ranks, where copy engines do that.
fn gather(communicator: &Communicator, stream: &Stream, memory: &DeviceBuffer, count: usize) -> Result<()> {
    if setting::<u8>("FAULTS_COPIES") != Some(1) {
        return Ok(());
    }
    let count = count - count % communicator.world_size();
    // SAFETY: the memory outlives the stream's work, and only the stream touches it.
    let x = unsafe { BufMut::<i32>::cuda(memory.address(), count, memory.device().ordinal()) };
    communicator.on(stream).all_gather(x)
}

/// The part of a rank that goes on with `shrink`: sums until somebody dies, shrinks, sums, and tells when it has.
pub(crate) fn survive(part: &Part) -> Result<()> {
    let ordinal = part.rank as u32 % device_count().unwrap_or(1);
    let device = Device::new(ordinal).unwrap();
    let communicator = builder(part).device(ordinal).prepare(DType::I32, ReduceOp::Sum)?.build()?;
    let raw = CudaStream::new(&device).unwrap();
    // SAFETY: the raw stream lives as long as this one.
    let stream = unsafe { Stream::cuda(raw.raw(), ordinal) }?;
    let memory = DeviceBuffer::new(&device, 4 << 22).unwrap();
    let before = unrelated(&device);
    let mut sums = Sums { random: Random::new(setting("FAULTS_CALLS").unwrap_or(1)), raw, stream, memory };
    let mut window = match communicator.gpu_link() {
        Some(Link::Device) => Some(communicator.window::<i32>(1000, Memory::Device)?),
        _ => None,
    };
    let asked_to_end = end_of_input();
    println!("ready");
    let error = loop {
        if let Err(error) = sums.next(&communicator) {
            break error;
        }
    };
    if let Error::GivenUp { .. } = error {
        return Err(error);
    }
    expect(matches!(error, Error::PeerDied { .. }), || format!("an error of a death: {error:?}"));
    if unrelated(&device) == before {
        println!("intact");
    }
    let next = communicator.shrink()?;
    let size = part.size - 1;
    expect(next.world_size() == size, || format!("{} ranks are left", next.world_size()));
    // All ranks draw the same again.
    sums.random = Random::new(7);
    sums.next(&next)?;
    println!("summed {}", super::now_ns());
    if let Some(window) = &mut window {
        let late = next.on(&sums.stream).all_reduce(window, ReduceOp::Sum);
        let expected = Error::Generation { window: 1, generation: 2 };
        expect(late == Err(expected), || format!("a window of the past: {late:?}"));
    }
    drop(window);
    let (pair, twin) = (next.split(Some(next.rank() as u32 / 2), 0)?, next.duplicate()?);
    for round in 0..20 {
        for (at, communicator) in [Some(&next), pair.as_ref(), Some(&twin)].into_iter().flatten().enumerate()
        {
            sums.random = Random::new(round * 3 + at as u64);
            sums.next(communicator)?;
        }
    }
    println!("quarantined {}", unisono_node::memory::quarantined_bytes());
    while !asked_to_end() {
        std::thread::sleep(Duration::from_millis(5));
    }
    if let Some(pair) = pair {
        pair.destroy()?;
    }
    twin.destroy()?;
    next.destroy()
}

/// Sums of random sizes, each checked.
struct Sums {
    random: Random,
    raw: CudaStream,
    stream: Stream,
    memory: DeviceBuffer,
}

impl Sums {
    /// A few sums, one after the other: what comes out of one goes into the next.
    fn next(&mut self, communicator: &Communicator) -> Result<()> {
        let (rank, size) = (communicator.rank(), communicator.world_size() as u32);
        let (count, times) = (self.random.count(1 << 22).max(1), self.random.below(4) as u32);
        let ordinal = self.memory.device().ordinal();
        // SAFETY: the memory stays, and only the stream touches it.
        unsafe { self.raw.fill(self.memory.address(), 1, count * 4) }.unwrap();
        for _ in 0..=times {
            // SAFETY: as above.
            let x = unsafe { BufMut::<i32>::cuda(self.memory.address(), count, ordinal) };
            communicator.on(&self.stream).all_reduce(x, ReduceOp::Sum)?;
            gather(communicator, &self.stream, &self.memory, count)?;
        }
        self.raw.synchronize().map_err(|error| Error::Cuda { rank, error })?;
        communicator.check()?;
        let expected = 0x0101_0101u32.wrapping_mul(size.pow(times + 1));
        let mut got = vec![0; count * 4];
        self.memory.read(0, &mut got).unwrap();
        let wrong = got.as_chunks().0.iter().position(|value| u32::from_le_bytes(*value) != expected);
        expect(wrong.is_none(), || format!("sum {times} of {count} elements of {size} ranks: {wrong:?}"));
        Ok(())
    }
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
        function.launch(
            stream,
            Grid { blocks: 1, threads: 1, shared_bytes: 0, is_early: false },
            (&raw mut nowhere).cast(),
        )
    };
    launched.unwrap();
    std::thread::sleep(Duration::from_secs(30));
    Ok(())
}
