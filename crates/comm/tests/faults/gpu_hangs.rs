//! Calls on GPUs that do not come to an end: what is said of one from outside, and loads of kernels that would wait for each other.
//!
//! Without a GPU each test says so and passes.

use std::time::{Duration, Instant};

use unisono::cuda::{Device, DeviceBuffer, Stream as CudaStream};
use unisono::{
    BufMut, Communicator, DType, Error, Operations, ReduceOp, Reducible, Result, Stream, recorder,
};

use super::gpu::device_count;
use super::parts::{Part, end_of_input, expect, setting};
use super::server;
use super::world::Setup;

const COUNT: usize = 1000;
const TIMEOUT: Duration = Duration::from_secs(8);

/// Rank 0 waits in a kernel for a call that rank 1 does not make. A third process, this one, finds the job as `unisono why` does, and
/// says in which call which GPU waits, and whose does not come.
pub(crate) fn a_call_that_hangs_is_explained_from_outside() {
    let Some(_) = device_count() else { return };
    let server = server();
    let mut world = Setup::new("gpu hang", 2, server.unique_id()).with("FAULTS_INIT_MS", 60_000).start();
    world.wait_until_all_said("ready");
    std::thread::sleep(Duration::from_millis(1500));
    let pids: Vec<u32> = world.ranks.iter().map(|rank| rank.pid).collect();
    let found = recorder::find(Some(&pids)).unwrap();
    let [recording] = &*found.recordings else { panic!("{found:?}\n{}", world.transcript()) };
    assert_eq!(recording.job(), world.job);
    let text = recorder::why(&recording.snapshot().unwrap());
    println!("{text}");
    for expected in [
        format!("The GPU of rank 0 has been in all_reduce #2 (f32, {COUNT}, sum) for "),
        "The GPU of rank 1 has not begun it: its last call was barrier #1, done ".to_owned(),
        " ago; its process has not called it.".to_owned(),
    ] {
        assert!(text.contains(&expected), "{expected}: {text}\n{}", world.transcript());
    }
    // Once rank 1 makes it, all is well.
    world.expect_good_end();
}

/// The part of a rank: rank 1 makes its second call only when it is asked to end.
pub(crate) fn hang(part: &Part) -> Result<()> {
    let ordinal = part.rank as u32 % device_count().unwrap_or(1);
    let communicator = part.builder().device(ordinal).build()?;
    let tools = Tools::new(ordinal, &1f32.to_le_bytes())?;
    communicator.on(&tools.stream).barrier()?;
    let asked_to_end = end_of_input();
    if part.rank == 1 {
        tools.wait(&communicator)?;
        println!("ready");
        while !asked_to_end() {
            std::thread::sleep(Duration::from_millis(5));
        }
        tools.reduce::<f32>(&communicator, ReduceOp::Sum)?;
    } else {
        tools.reduce::<f32>(&communicator, ReduceOp::Sum)?;
        println!("ready");
    }
    tools.wait(&communicator)?;
    tools.expect(&2f32.to_le_bytes());
    communicator.destroy()
}

/// Two ranks begin calls of a communicator and of its duplicate in opposite orders. If each still has to load what its second call needs,
/// and so would wait for a kernel that waits for the other's, both are refused before the kernels' patience ends; if all is
/// prepared, both calls come to their end.
pub(crate) fn opposite_orders_are_well_unless_kernels_must_be_loaded() {
    let Some(_) = device_count() else { return };
    let server = server();
    for is_prepared in [true, false] {
        let setup = Setup::new("gpu orders", 2, server.unique_id())
            .with("FAULTS_PREPARED", u8::from(is_prepared))
            .with("FAULTS_TIMEOUT_MS", TIMEOUT.as_millis())
            .with("FAULTS_INIT_MS", 60_000);
        let mut world = setup.start();
        world.wait_until_all_said(if is_prepared { "reduced" } else { "refused" });
        world.expect_good_end();
    }
}

/// The part of a rank.
pub(crate) fn opposite(part: &Part) -> Result<()> {
    let ordinal = part.rank as u32 % device_count().unwrap_or(1);
    let is_prepared = setting::<u8>("FAULTS_PREPARED") == Some(1);
    let mut builder = part.builder().device(ordinal);
    for (rank, dtype) in [DType::F64, DType::I64].into_iter().enumerate() {
        if is_prepared || rank == part.rank {
            builder = builder.prepare(dtype, ReduceOp::Max)?;
        }
    }
    let first = builder.build()?;
    let second = first.duplicate()?;
    let floats = Tools::new(ordinal, &(part.rank as f64).to_le_bytes())?;
    let integers = Tools::new(ordinal, &(part.rank as i64).to_le_bytes())?;
    first.barrier()?;
    let start = Instant::now();
    let refused = if part.rank == 0 {
        floats.reduce::<f64>(&first, ReduceOp::Max)?;
        integers.reduce::<i64>(&second, ReduceOp::Max)
    } else {
        integers.reduce::<i64>(&second, ReduceOp::Max)?;
        floats.reduce::<f64>(&first, ReduceOp::Max)
    };
    if is_prepared {
        refused?;
        floats.wait(&first)?;
        integers.wait(&second)?;
        floats.expect(&1f64.to_le_bytes());
        integers.expect(&1i64.to_le_bytes());
        println!("reduced");
        second.destroy()?;
        return first.destroy();
    }
    let is_right = matches!(&refused, Err(Error::NotPrepared { call: "all_reduce", rank, why, .. })
        if *rank == part.rank && why.contains("wait for their peers"));
    expect(is_right, || format!("{refused:?}"));
    let took = start.elapsed();
    expect((TIMEOUT / 2..TIMEOUT).contains(&took), || format!("refused after {took:?}"));
    println!("refused");
    // Whoever leaves first ends the kernels of the other, which could load then.
    let asked_to_end = end_of_input();
    while !asked_to_end() {
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// One of three ranks reduces in memory of the host, the others on their GPUs: long before the deadline all are told both calls.
pub(crate) fn calls_on_host_and_gpu_are_told_both() {
    let Some(_) = device_count() else { return };
    let server = server();
    let setup = Setup::new("gpu places", 3, server.unique_id())
        .with("FAULTS_TIMEOUT_MS", 60_000)
        .with("FAULTS_INIT_MS", 60_000);
    let mut world = setup.start();
    world.wait_until_all_said("told");
    world.expect_good_end();
}

/// The part of a rank.
pub(crate) fn places(part: &Part) -> Result<()> {
    let ordinal = part.rank as u32 % device_count().unwrap_or(1);
    let communicator = part.builder().device(ordinal).build()?;
    let tools = Tools::new(ordinal, &1f32.to_le_bytes())?;
    communicator.on(&tools.stream).barrier()?;
    let failed = if part.rank == 1 {
        communicator.all_reduce(&mut [1f32; COUNT], ReduceOp::Sum)
    } else {
        tools.reduce::<f32>(&communicator, ReduceOp::Sum)?;
        tools.wait(&communicator)
    };
    let Err(Error::Mismatch { left, right }) = &failed else { panic!("{failed:?}") };
    let is_left = left.starts_with("all_reduce #")
        && left.ends_with(&format!(" on rank 1 (f32, {COUNT}, sum) in host memory"));
    expect(is_left, || left.clone());
    let on_gpu = |rank| format!("all_reduce #2 on rank {rank} (f32, {COUNT}, sum) on its GPU");
    expect([0, 2].map(on_gpu).contains(right), || right.clone());
    println!("told");
    Ok(())
}

/// A stream of one device, and what is reduced in it.
struct Tools {
    raw: CudaStream,
    stream: Stream,
    memory: DeviceBuffer,
}

impl Tools {
    /// For elements that begin as `value`.
    fn new(ordinal: u32, value: &[u8]) -> Result<Self> {
        let device = Device::new(ordinal).unwrap();
        let raw = CudaStream::new(&device).unwrap();
        // SAFETY: the raw stream lives as long as this one.
        let stream = unsafe { Stream::cuda(raw.raw(), ordinal) }?;
        let mut memory = DeviceBuffer::new(&device, value.len() * COUNT).unwrap();
        memory.write(0, &value.repeat(COUNT)).unwrap();
        Ok(Self { raw, stream, memory })
    }

    fn reduce<T: Reducible>(&self, communicator: &Communicator, op: ReduceOp) -> Result<()> {
        let ordinal = self.memory.device().ordinal();
        // SAFETY: the memory is as long, and stays until the stream was waited for or the process ends.
        let x = unsafe { BufMut::<T>::cuda(self.memory.address(), COUNT, ordinal) };
        communicator.on(&self.stream).all_reduce(x, op)
    }

    fn wait(&self, communicator: &Communicator) -> Result<()> {
        let rank = communicator.rank();
        self.raw.synchronize().map_err(|error| Error::Cuda { rank, error })?;
        communicator.check()
    }

    /// Ends the process if not all elements are `value`.
    fn expect(&self, value: &[u8]) {
        let mut got = vec![0; self.memory.bytes()];
        self.memory.read(0, &mut got).unwrap();
        expect(got == value.repeat(COUNT), || format!("not {value:?} but {:?}…", &got[..8]));
    }
}
