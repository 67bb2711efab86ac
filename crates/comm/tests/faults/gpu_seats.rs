//! Processes with two devices each (or one that counts twice), of which one is killed under kernels: the others name it, and go on
//! with all their devices.
//!
//! Without a GPU the test says so and passes.

use std::time::Duration;

use unisono::cuda::{Device, DeviceBuffer, Stream as CudaStream};
use unisono::{BufMut, Communicator, DType, Error, Operations, ReduceOp, Result, Stream};

use super::gpu::device_count;
use super::parts::{Part, end_of_input, expect, setting};
use super::random::{self, Random};
use super::world::Setup;
use super::{ms_between, percentiles, scale, server};

const RANKS: usize = 3;
const COUNT: usize = 1 << 21;

pub(crate) fn ranks_with_two_devices_are_killed_and_the_others_go_on() {
    let Some(_) = device_count() else { return };
    let server = server();
    let seed = random::seed();
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let (mut samples, kills) = (Vec::new(), 2 * scale());
    for _ in 0..kills {
        let victim = random.below(RANKS as u64) as usize;
        let setup = Setup::new("gpu seats", RANKS, server.unique_id())
            .with("FAULTS_CALLS", random.next())
            .with("FAULTS_INIT_MS", 120_000);
        let mut world = setup.start();
        world.wait_until_all_said("ready");
        std::thread::sleep(Duration::from_micros(random.below(300_000)));
        let killed = world.kill(victim);
        world.wait_until("sums of the survivors", |world| {
            (0..RANKS).filter(|rank| *rank != victim).all(|rank| {
                assert!(world.ranks[rank].status.is_none(), "rank {rank} ended\n{}", world.transcript());
                world.ranks[rank].value("summed").is_some()
            })
        });
        world.ask_to_end();
        world.wait_for_end();
        for (rank, process) in world.ranks.iter().enumerate().filter(|(rank, _)| *rank != victim) {
            let context = || format!("rank {rank}, victim {victim}\n{}", world.transcript());
            assert!(process.said("done") && process.status.unwrap().success(), "{}", context());
            assert_eq!(process.value("died"), Some(&*victim.to_string()), "{}", context());
            samples.push(ms_between(killed, process.value("summed").unwrap().parse().unwrap()));
        }
    }
    println!(
        "{kills} kills under kernels: all devices of survivors sum again after {}",
        percentiles(&mut samples).0
    );
}

/// The part of a rank.
pub(crate) fn survive(part: &Part) -> Result<()> {
    let count = device_count().unwrap_or(1);
    let ordinals = [0, 1].map(|at| (2 * part.rank as u32 + at) % count);
    let communicator = part.builder().devices(&ordinals).prepare(DType::I32, ReduceOp::Sum)?.build()?;
    let mut calls = Calls::new(ordinals, setting("FAULTS_CALLS").unwrap_or(1))?;
    let asked_to_end = end_of_input();
    println!("ready");
    let error = loop {
        if let Err(error) = calls.next(&communicator) {
            break error;
        }
    };
    let Error::PeerDied { rank: dead, .. } = error else { return Err(error) };
    println!("died {dead}");
    let next = communicator.shrink()?;
    // All ranks draw the same again.
    calls.random = Random::new(7);
    for _ in 0..20 {
        calls.next(&next)?;
    }
    println!("summed {}", super::now_ns());
    while !asked_to_end() {
        std::thread::sleep(Duration::from_millis(5));
    }
    next.destroy()
}

/// Sums and broadcasts of random sizes on two devices, each checked.
struct Calls {
    random: Random,
    ordinals: [u32; 2],
    raw: [CudaStream; 2],
    streams: [Stream; 2],
    memory: [DeviceBuffer; 2],
}

impl Calls {
    fn new(ordinals: [u32; 2], seed: u64) -> Result<Self> {
        let devices = ordinals.map(|ordinal| Device::new(ordinal).unwrap());
        let raw = devices.each_ref().map(|device| CudaStream::new(device).unwrap());
        let memory = devices.each_ref().map(|device| DeviceBuffer::new(device, 4 * COUNT).unwrap());
        // SAFETY: the raw streams lie beside these and live as long.
        let stream = |at: usize| unsafe { Stream::cuda(raw[at].raw(), ordinals[at]) };
        let streams = [stream(0)?, stream(1)?];
        Ok(Self { random: Random::new(seed), ordinals, raw, streams, memory })
    }

    fn buffers(&self, count: usize) -> Vec<BufMut<'static, i32>> {
        let address = |at: usize| (self.memory[at].address(), self.ordinals[at]);
        // SAFETY: the memory stays, and only the streams touch it.
        [0, 1].map(address).map(|(address, ordinal)| unsafe { BufMut::cuda(address, count, ordinal) }).into()
    }

    /// A few sums, one after the other, and a broadcast of what one buffer is filled with.
    fn next(&mut self, communicator: &Communicator) -> Result<()> {
        let (rank, size) = (communicator.rank(), communicator.world_size());
        let (count, times) = (self.random.count(COUNT).max(1), self.random.below(4) as u32);
        let (root, buffer) = (self.random.below(size as u64) as usize, self.random.below(2) as usize);
        self.fill([1, 1], count);
        for _ in 0..=times {
            communicator.on_each(&self.streams).all_reduce_multi(self.buffers(count), ReduceOp::Sum)?;
        }
        self.wait(communicator)?;
        let seats = 2 * size as u32;
        self.expect(count, 0x0101_0101u32.wrapping_mul(seats.pow(times + 1)), "sum");
        self.fill([0, 1].map(|at| (2 * rank + at) as u8 + 1), count);
        communicator.on_each(&self.streams).broadcast_multi(self.buffers(count), root, buffer)?;
        self.wait(communicator)?;
        self.expect(count, 0x0101_0101 * (2 * root + buffer + 1) as u32, "broadcast");
        Ok(())
    }

    fn fill(&self, values: [u8; 2], count: usize) {
        for (at, value) in values.into_iter().enumerate() {
            // SAFETY: the memory is as long.
            unsafe { self.raw[at].fill(self.memory[at].address(), value, 4 * count) }.unwrap();
        }
    }

    fn wait(&self, communicator: &Communicator) -> Result<()> {
        let rank = communicator.rank();
        for stream in &self.raw {
            stream.synchronize().map_err(|error| Error::Cuda { rank, error })?;
        }
        communicator.check()
    }

    /// Ends the process if an element of a buffer is not `value`.
    fn expect(&self, count: usize, value: u32, what: &str) {
        for (at, memory) in self.memory.iter().enumerate() {
            let mut got = vec![0; 4 * count];
            memory.read(0, &mut got).unwrap();
            let wrong = got.as_chunks().0.iter().position(|got| u32::from_le_bytes(*got) != value);
            expect(wrong.is_none(), || format!("{what} of {count} elements in buffer {at}: {wrong:?}"));
        }
    }
}
