//! Memory that each process allocated for itself and all registered together: by CUDA IPC, and as descriptors.
//!
//! Without a GPU the test says so and passes.

use unisono::cuda::{Device, DeviceBuffer, Location, SharedPages, Stream as CudaStream};
use unisono::{
    Buf, BufMut, Communicator, DType, Error, Form, Operations, Place, RawBuffer, ReduceOp, Registration,
    Result, Stream,
};

use super::gpu::device_count;
use super::parts::{Part, expect};
use super::server;
use super::world::Setup;

/// Elements of the largest buffers.
const COUNT: usize = 300_000;

/// Memory that somebody else allocated is reached where it lies, kept by graphs, refused by name, and never mistaken
/// for what lay at its address before.
pub(crate) fn processes_reach_each_others_memory() {
    let Some(count) = device_count() else { return };
    let server = server();
    for size in [2, (count as usize).clamp(3, 8)] {
        let setup = Setup::new("registered", size, server.unique_id()).with("FAULTS_INIT_MS", 60_000);
        setup.start().expect_good_end();
    }
}

/// What a rank works with.
struct Bench {
    rank: usize,
    size: usize,
    ordinal: u32,
    device: Device,
    communicator: Communicator,
    raw: CudaStream,
    stream: Stream,
}

impl Bench {
    fn register(&self, ptr: u64, count: usize) -> Result<Registration> {
        let place = Place::Cuda { ordinal: self.ordinal };
        // SAFETY: registrations are closed before their memory goes, or refused.
        unsafe { self.communicator.register(RawBuffer { ptr, count, dtype: DType::I32, place }) }
    }

    fn write(&self, to: u64, values: &[i32]) {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        // SAFETY: callers give addresses of memory that is as long.
        unsafe { self.raw.write(to, &bytes) }.unwrap();
    }

    fn expect(&self, at: u64, expected: &[i32], what: &str) -> Result<()> {
        let mut bytes = vec![0; expected.len() * 4];
        // SAFETY: as above.
        unsafe { self.raw.read(at, &mut bytes) }.unwrap();
        self.communicator.check()?;
        let got = bytes.as_chunks().0.iter().map(|value| i32::from_le_bytes(*value));
        let wrong = got.zip(expected).enumerate().find(|(_, (got, expected))| got != *expected);
        expect(wrong.is_none(), || format!("{what}: element, got and expected: {wrong:?}"));
        Ok(())
    }

    /// What this rank has, and the sum of what all have.
    fn numbers(&self, seed: i32) -> (Vec<i32>, Vec<i32>) {
        let value = |rank: usize, at: usize| seed + at as i32 * 3 + rank as i32 * 10_000;
        let mine = (0..COUNT).map(|at| value(self.rank, at)).collect();
        let sums = (0..COUNT).map(|at| (0..self.size).map(|rank| value(rank, at)).sum()).collect();
        (mine, sums)
    }

    /// Sums, broadcasts and gathers between two registrations.
    fn use_both(&mut self, from: &Registration, to: &Registration, seed: i32, what: &str) -> Result<()> {
        let (mine, sums) = self.numbers(seed);
        self.write(from.address(), &mine);
        let on = self.communicator.on(&self.stream);
        on.all_reduce_into(source(from, COUNT), target(to, COUNT), ReduceOp::Sum)?;
        self.expect(to.address(), &sums, what)?;
        let on = self.communicator.on(&self.stream);
        let part = COUNT / self.size;
        on.all_gather_into(source(from, part), target(to, part * self.size))?;
        let value = |at: usize| seed + (at % part) as i32 * 3 + (at / part) as i32 * 10_000;
        self.expect(to.address(), &(0..part * self.size).map(value).collect::<Vec<_>>(), what)?;
        let on = self.communicator.on(&self.stream);
        on.broadcast_into(source(from, COUNT), target(to, COUNT), self.size - 1)?;
        let last = self.size as i32 - 1;
        let value = |at: usize| seed + at as i32 * 3 + last * 10_000;
        self.expect(to.address(), &(0..COUNT).map(value).collect::<Vec<_>>(), what)
    }
}

fn source(from: &Registration, count: usize) -> Buf<'_, i32> {
    // SAFETY: ranks wait for their streams before they touch the memory.
    unsafe { from.buf(0..count) }
}

fn target(to: &Registration, count: usize) -> BufMut<'_, i32> {
    // SAFETY: as above.
    unsafe { to.buf_mut(0..count) }
}

/// The part of a rank.
pub(crate) fn register(part: &Part) -> Result<()> {
    let count = unisono::cuda::driver::device_count().unwrap_or(1);
    let ordinal = part.rank as u32 % count;
    let device = Device::new(ordinal).unwrap();
    let builder = part.builder().device(ordinal).gpu_algorithm(Form::Direct, 0);
    let communicator = builder.prepare(DType::I32, ReduceOp::Sum)?.build()?;
    let raw = CudaStream::new(&device).unwrap();
    // SAFETY: the raw stream lives as long as this one.
    let stream = unsafe { Stream::cuda(raw.raw(), ordinal) }?;
    let (rank, size) = (part.rank, part.size);
    let mut bench = Bench { rank, size, ordinal, device, communicator, raw, stream };
    println!("ready");
    reach(&mut bench)?;
    replay(&mut bench)?;
    follow(&mut bench)?;
    refuse(&bench)?;
    bench.communicator.destroy()
}

/// Both kinds of memory, at offsets of each rank's own, twice, and new memory where other was.
fn reach(bench: &mut Bench) -> Result<()> {
    let bytes = COUNT * 4 + 4096;
    for turn in 0..3 {
        // As large as the last time: it lies where that lay, as a rule.
        let plain = DeviceBuffer::new(&bench.device, bytes).unwrap();
        let small = DeviceBuffer::new(&bench.device, 1000).unwrap();
        let pages = SharedPages::create(&bench.device, bytes, Location::Device).unwrap();
        let offset = 16 * bench.rank as u64 + 4 * turn;
        let first = bench.register(plain.address() + offset, COUNT)?;
        let second = bench.register(pages.address() + 2 * offset, COUNT)?;
        // The same allocation again, and one that shares a page with others.
        let again = bench.register(plain.address(), COUNT + 16)?;
        let tiny = bench.register(small.address() + offset, 100)?;
        bench.use_both(&first, &second, turn as i32 * 777, "from cudaMalloc to cuMemCreate")?;
        bench.use_both(&second, &first, turn as i32 * 555, "from cuMemCreate to cudaMalloc")?;
        first.close(&bench.communicator)?;
        bench.use_both(&second, &again, turn as i32 * 333, "after the first of two was closed")?;
        let (mine, sums) = bench.numbers(1);
        bench.write(tiny.address(), &mine[..100]);
        bench.communicator.on(&bench.stream).all_reduce(target(&tiny, 100), ReduceOp::Sum)?;
        bench.expect(tiny.address(), &sums[..100], "a small allocation")?;
        for registration in [second, tiny, again] {
            registration.close(&bench.communicator)?;
        }
    }
    Ok(())
}

/// A graph whose registrations are closed, on memory that is still there.
fn replay(bench: &mut Bench) -> Result<()> {
    let plain = DeviceBuffer::new(&bench.device, COUNT * 4).unwrap();
    let pages = SharedPages::create(&bench.device, COUNT * 4, Location::Device).unwrap();
    let all = [bench.register(plain.address(), COUNT)?, bench.register(pages.address(), COUNT)?];
    bench.raw.begin_capture().unwrap();
    for registration in &all {
        bench.communicator.on(&bench.stream).all_reduce(target(registration, COUNT), ReduceOp::Sum)?;
    }
    let graph = bench.raw.end_capture().unwrap();
    for registration in all {
        registration.close(&bench.communicator)?;
    }
    for turn in 0..3 {
        let (mine, sums) = bench.numbers(turn);
        bench.write(plain.address(), &mine);
        bench.write(pages.address(), &mine);
        bench.communicator.barrier()?;
        graph.launch(&bench.raw).unwrap();
        bench.expect(plain.address(), &sums, "a replay on cudaMalloc")?;
        bench.expect(pages.address(), &sums, "a replay on cuMemCreate")?;
    }
    drop(graph);
    // All ranks have let go of their graphs before anybody frees the memory.
    bench.communicator.barrier()?;
    bench.register(plain.address(), 4)?.close(&bench.communicator)
}

/// Memory that lies where that of a graph lay, which is gone, though the driver may not have told yet.
fn follow(bench: &mut Bench) -> Result<()> {
    for turn in 0..20 {
        let plain = DeviceBuffer::new(&bench.device, COUNT * 4).unwrap();
        let registration = bench.register(plain.address(), COUNT)?;
        bench.raw.begin_capture().unwrap();
        bench.communicator.on(&bench.stream).all_reduce(target(&registration, COUNT), ReduceOp::Sum)?;
        let graph = bench.raw.end_capture().unwrap();
        registration.close(&bench.communicator)?;
        let (mine, sums) = bench.numbers(turn);
        bench.write(plain.address(), &mine);
        bench.communicator.barrier()?;
        graph.launch(&bench.raw).unwrap();
        bench.expect(plain.address(), &sums, "a replay before other memory takes the place")?;
        drop(graph);
        bench.communicator.barrier()?;
    }
    Ok(())
}

/// The memory of one rank cannot be registered: all are told who it is, and go on.
fn refuse(bench: &Bench) -> Result<()> {
    let plain = DeviceBuffer::new(&bench.device, 4096).unwrap();
    let host = vec![0i32; 64];
    let culprit = bench.size - 1;
    let ptr = if bench.rank == culprit { host.as_ptr() as u64 } else { plain.address() };
    let error = bench.register(ptr, 64).err();
    let is_right = match &error {
        Some(Error::Argument { call: "register", what: "buffer", .. }) => bench.rank == culprit,
        Some(Error::Registration { rank, .. }) => bench.rank != culprit && *rank == culprit,
        _ => false,
    };
    expect(is_right, || format!("an error of rank {culprit}: {error:?}"));
    bench.register(plain.address(), 64)?.close(&bench.communicator)
}
