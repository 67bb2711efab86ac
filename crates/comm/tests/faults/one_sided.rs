//! One-sided memory on devices between processes: the host's accesses, kernels of users over the device header, and a rank that is
//! killed while such kernels wait for it.
//!
//! Without a GPU each test says so and passes.

use std::time::Duration;

use unisono::cuda::{Cache, Compiler, Device, DeviceBuffer, Grid, Module, Source, Stream};
use unisono::gpu::kernels::architecture;
use unisono::{Communicator, DeviceView, Memory, Operations, Result, Symmetric};

use super::gpu::device_count;
use super::parts::{Part, expect, setting};
use super::random::{self, Random};
use super::world::Setup;
use super::{ms_between, scale, server};

/// The longest that a survivor may take from the kill to its error.
const PROMISED_MS: f64 = 1000.0;
const KERNEL: &str = include_str!("../../examples/device_header.cu");
const PACKETS: usize = 256;

/// What the kernel takes.
#[repr(C)]
struct Arguments {
    shared: DeviceView,
    rounds_done: u64,
    first_round: u32,
    rounds: u32,
}

fn setup(size: usize, rounds: u32, store: unisono::UniqueId) -> Setup {
    Setup::new("one-sided", size, store).with("FAULTS_ROUNDS", rounds).with("FAULTS_INIT_MS", 60_000)
}

pub(crate) fn processes_exchange_packets_and_signals() {
    let Some(count) = device_count() else { return };
    let server = server();
    for size in [2, (count as usize).clamp(3, 8)] {
        // Kernels of processes that share a device run in turn.
        let rounds = if size <= count as usize { 3000 } else { 50 };
        setup(size, rounds, server.unique_id()).start().expect_good_end();
    }
}

/// Row 2, for kernels that are not ours.
pub(crate) fn a_killed_rank_ends_the_waits_of_kernels_and_is_named() {
    let Some(count) = device_count() else { return };
    let server = server();
    let seed = random::seed();
    println!("seed {seed}");
    let mut random = Random::new(seed);
    for _ in 0..2 * scale() {
        let size = (count as usize).clamp(2, 8);
        let victim = random.below(size as u64) as usize;
        let mut world = setup(size, u32::MAX / 2, server.unique_id()).start();
        world.wait_until_all_said("ready");
        std::thread::sleep(Duration::from_micros(50_000 + random.below(100_000)));
        let killed = world.kill(victim);
        world.wait_for_end();
        for (rank, process) in world.ranks.iter().enumerate().filter(|(rank, _)| *rank != victim) {
            let context = || format!("rank {rank}, victim {victim}\n{}", world.transcript());
            let failure = process.failure().unwrap_or_else(|| panic!("{}", context()));
            assert_eq!(failure.variant, "PeerDied", "{}", context());
            assert_eq!(&*failure.names, &[victim][..], "{}", context());
            assert!(process.said("intact"), "{}", context());
            let took = ms_between(killed, failure.at_ns);
            assert!((0.0..=PROMISED_MS).contains(&took), "{took} ms: {}", context());
        }
    }
}

/// The part of a rank.
pub(crate) fn play(part: &Part) -> Result<()> {
    let ordinal = part.rank as u32 % device_count().unwrap_or(1);
    let device = Device::new(ordinal).unwrap();
    let communicator = part.builder().device(ordinal).build()?;
    let bytes = 2 * part.size * (PACKETS * 16 + 8);
    let shared = communicator.window::<u8>(bytes, Memory::Device)?.into_symmetric(&communicator)?;
    accesses(&communicator, &shared)?;
    let headers = vec![unisono::device_header()];
    let source = Source { name: "device_header.cu", text: KERNEL, headers, definitions: Vec::new() };
    let cubin = Cache::of_user().cubin(&source, architecture(&device), Compiler::find).unwrap();
    let kernel = Module::load(&device, &cubin).unwrap().function("exchange").unwrap();
    let (stream, rounds) = (Stream::new(&device).unwrap(), setting("FAULTS_ROUNDS").unwrap_or(1));
    let mut answer = DeviceBuffer::new(&device, 8).unwrap();
    answer.write(0, &[0; 8]).unwrap();
    let rounds_done = answer.address();
    let mut arguments = Arguments { shared: shared.device_view()?, rounds_done, first_round: 1, rounds };
    communicator.barrier()?;
    let grid = Grid { blocks: 1, threads: PACKETS as u32, shared_bytes: 0, is_early: false };
    // SAFETY: the kernel takes these arguments; what they name stays until the stream was waited for.
    unsafe { kernel.launch(&stream, grid, (&raw mut arguments).cast()) }.unwrap();
    println!("ready");
    stream.synchronize().unwrap();
    let checked = shared.check();
    let mut words = [0; 8];
    answer.read(0, &mut words).unwrap();
    println!("intact");
    expect(words[4..] == [0; 4], || format!("{words:?}"));
    checked?;
    expect(words[..4] == rounds.to_le_bytes(), || format!("{words:?} of {rounds} rounds"));
    communicator.barrier()?;
    shared.close(&communicator)?;
    communicator.destroy()
}

/// Everybody writes to all copies and signals, in slots that the kernel does not use, and leaves the memory as it was.
fn accesses(communicator: &Communicator, shared: &Symmetric<u8>) -> Result<()> {
    const STRETCH: usize = 1003;
    let (me, size) = (communicator.rank(), communicator.world_size());
    let content = |from: usize, to: usize| (from * 16 + to + 1) as u8;
    for to in 0..size {
        shared.write(to, me * STRETCH, &[content(me, to); STRETCH])?;
        shared.signal(to, 32 + me, 1)?;
    }
    for from in 0..size {
        shared.wait_signal(32 + from, 1, Duration::from_secs(20))?;
        for (at, from, to) in [(me, from, me), (from, me, from)] {
            let mut got = [0; STRETCH];
            shared.read(at, from * STRETCH, &mut got)?;
            expect(got == [content(from, to); STRETCH], || format!("{got:?} of {from} at {to}"));
        }
    }
    communicator.barrier()?;
    shared.write(me, 0, &vec![0; shared.len()])?;
    communicator.barrier()
}
