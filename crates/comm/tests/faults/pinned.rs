//! Pinned windows between processes, a GPU for each (or one for several): descriptors of both kinds go from one to the other, and
//! who receives one sees what it is.
//!
//! Without a GPU each test says so and passes, but for the first, which needs none.

use unisono::cuda::{Device, Stream as CudaStream};
use unisono::settings::{HandleKind, PinnedWay};
use unisono::{Communicator, Memory, Operations, ReduceOp, Result, Stream, Window};

use super::gpu::device_count;
use super::parts::{Part, expect, setting};
use super::server;
use super::world::{Setup, World};

const COUNT: usize = 150_001;

fn run(size: usize, settings: &[(&'static str, &str)]) -> World {
    let server = server();
    let setup = Setup::new("pinned", size, server.unique_id()).with("FAULTS_INIT_MS", 60_000);
    let setup = settings.iter().fold(setup, |setup, (name, value)| setup.with(name, value));
    let mut world = setup.start();
    world.wait_for_end();
    world
}

fn run_well(size: usize, settings: &[(&'static str, &str)]) {
    let world = run(size, settings);
    assert!(world.ranks.iter().all(|rank| rank.said("done")), "{settings:?}\n{}", world.transcript());
}

/// Without GPUs they are plain windows, and the same code runs.
pub(crate) fn the_same_code_runs_without_gpus() {
    run_well(3, &[("FAULTS_ON_HOST", "1")]);
}

pub(crate) fn processes_work_on_windows_of_either_kind() {
    let Some(count) = device_count() else { return };
    let facts = Device::new(0).unwrap().facts().clone();
    let mut all = vec!["memfd", "auto"];
    if facts.takes_host_numa && facts.numa_node.is_some() {
        all.extend(["numa", "mixed"]);
    } else {
        println!("SKIPPED: memory of NUMA nodes, which the device does not take");
    }
    for ways in all {
        run_well((count as usize).clamp(2, 4), &[("FAULTS_PINNED", ways)]);
        run_well(2, &[("FAULTS_PINNED", ways), ("FAULTS_PEER_ACCESS", "off")]);
    }
}

/// Fabric handles serve, or every rank says which error kept it from its work; nobody waits.
pub(crate) fn fabric_handles_serve_or_are_a_typed_error() {
    if device_count().is_none() {
        return;
    }
    let world = run(2, &[("FAULTS_HANDLES", "fabric"), ("FAULTS_ON_DEVICES", "1")]);
    if world.ranks.iter().all(|rank| rank.said("done")) {
        println!("the driver gives fabric handles here");
        return;
    }
    let failures: Vec<_> = world.ranks.iter().filter_map(|rank| rank.failure()).collect();
    assert_eq!(failures.len(), 2, "{}", world.transcript());
    let is_known = |variant: &str| matches!(variant, "Cuda" | "Device");
    assert!(failures.iter().all(|failure| is_known(&failure.variant)), "{}", world.transcript());
    let names_it = failures.iter().any(|failure| failure.sentence.contains("fabric handles"));
    assert!(names_it, "{}", world.transcript());
    println!("no fabric handles here: {}", failures[0].sentence);
    // On their own, ranks take descriptors then.
    run_well(2, &[("FAULTS_HANDLES", "auto"), ("FAULTS_ON_DEVICES", "1")]);
}

/// One rank: the CPU writes, the GPU adds, the CPU reads and adds, and all over again in another window.
pub(crate) fn work(part: &Part) -> Result<()> {
    let ways = setting::<String>("FAULTS_PINNED").unwrap_or_default();
    let way = match (&*ways, part.rank % 2) {
        ("memfd", _) | ("mixed", 1) => PinnedWay::Memfd,
        ("numa" | "mixed", _) => PinnedWay::Numa,
        _ => PinnedWay::Auto,
    };
    let fabric = setting::<String>("FAULTS_HANDLES").is_some_and(|handles| handles == "fabric");
    let handles = if fabric { HandleKind::Fabric } else { HandleKind::Auto };
    let has_access = setting::<String>("FAULTS_PEER_ACCESS").is_none_or(|access| access != "off");
    let builder = part.builder().pinned(way).handles(handles).peer_access(has_access);
    if setting::<u32>("FAULTS_ON_HOST").is_some() {
        let communicator = builder.build()?;
        turns(&communicator, &Stream::host())?;
        return communicator.destroy();
    }
    let ordinal = part.rank as u32 % unisono::cuda::driver::device_count().unwrap();
    let builder = builder.prepare(unisono::DType::I32, ReduceOp::Sum)?;
    let communicator = builder.device(ordinal).build()?;
    let raw = CudaStream::new(&Device::new(ordinal).unwrap()).unwrap();
    // SAFETY: the raw stream lives as long as this one.
    let stream = unsafe { Stream::cuda(raw.raw(), ordinal) }?;
    if setting::<u32>("FAULTS_ON_DEVICES").is_some() {
        let mut window = communicator.window::<i32>(COUNT, Memory::Device)?;
        communicator.on(&stream).all_reduce(&mut window, ReduceOp::Sum)?;
        window.close(&communicator)?;
    }
    turns(&communicator, &stream)?;
    communicator.destroy()
}

fn turns(communicator: &Communicator, stream: &Stream) -> Result<()> {
    let (rank, size) = (communicator.rank() as i32, communicator.world_size() as i32);
    for turn in 0..4 {
        let mut window: Window<i32> = communicator.window(COUNT, Memory::Pinned)?;
        window.lend()?.iter_mut().zip(0..).for_each(|(value, at)| *value = at + rank + turn);
        communicator.on(stream).all_reduce(&mut window, ReduceOp::Sum)?;
        let sum = |at: i32| size * (at + turn) + size * (size - 1) / 2;
        check(&mut window, "the GPUs", sum)?;
        communicator.all_reduce(window.range_mut(turn as usize..COUNT), ReduceOp::Sum)?;
        let again = |at: i32| if at < turn { sum(at) } else { sum(at) * size };
        check(&mut window, "the CPUs", again)?;
        communicator.on(stream).broadcast(&mut window, size as usize - 1)?;
        check(&mut window, "the broadcast", again)?;
        // Every other one is left to the communicator.
        if turn % 2 == 0 {
            window.close(communicator)?;
        }
    }
    Ok(())
}

fn check(window: &mut Window<i32>, who: &str, expected: impl Fn(i32) -> i32) -> Result<()> {
    for (value, at) in window.lend()?.iter().zip(0..) {
        expect(*value == expected(at), || {
            format!("{who} left {value} in element {at}, not {}", expected(at))
        });
    }
    Ok(())
}
