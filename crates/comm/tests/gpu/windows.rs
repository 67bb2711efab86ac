//! Windows on devices: collectives that reach them where they lie, and their life.

use unisono::cuda::{Device, DeviceBuffer, Stream as CudaStream};
use unisono::{Builder, Communicator, DType, Error, Memory, Operations, ReduceOp, Stream, Window};
use unisono_core::device::Form;

use crate::world::{self, PATIENCE};

/// What a rank works with. Nothing is allocated or freed between its calls: that may wait for the whole device, and so for the
/// kernel of another rank there, which waits for us.
pub(crate) struct Tools {
    pub(crate) raw: CudaStream,
    pub(crate) stream: Stream,
    pub(crate) staging: DeviceBuffer,
}

impl Tools {
    fn new(ordinal: u32) -> Self {
        let device = Device::new(ordinal).unwrap();
        let raw = CudaStream::new(&device).unwrap();
        // SAFETY: the raw stream lies beside this one and lives as long.
        let stream = unsafe { Stream::cuda(raw.raw(), ordinal) }.unwrap();
        Self { raw, stream, staging: DeviceBuffer::new(&device, 4 << 20).unwrap() }
    }

    /// Copies `values` to an address of our device.
    pub(crate) fn put(&self, address: u64, values: &[i32]) {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        // SAFETY: tests give addresses of memory that is as long.
        unsafe { self.raw.write(address, &bytes) }.unwrap();
    }

    /// The `count` values at an address of our device.
    pub(crate) fn get(&self, address: u64, count: usize) -> Vec<i32> {
        let mut bytes = vec![0; count * 4];
        // SAFETY: as above.
        unsafe { self.raw.read(address, &mut bytes) }.unwrap();
        bytes.as_chunks().0.iter().map(|value| i32::from_le_bytes(*value)).collect()
    }

    /// Copies `values` to element `at` of a window.
    fn write(&self, window: &Window<i32>, at: usize, values: &[i32]) {
        assert!(at + values.len() <= window.len());
        self.put(window.address() + at as u64 * 4, values);
    }

    /// The `count` elements from `at` on.
    fn read(&self, window: &Window<i32>, at: usize, count: usize) -> Vec<i32> {
        self.get(window.address() + at as u64 * 4, count)
    }
}

/// Runs `work` on every rank of a world, each on a thread of its own.
pub(crate) fn on_threads(ranks: usize, work: impl Fn(Communicator, &mut Tools) + Sync) {
    let configure = |builder: Builder| {
        let builder = builder.timeout(PATIENCE).gpu_algorithm(Form::Direct, 0);
        builder.prepare(DType::I32, ReduceOp::Sum).unwrap()
    };
    world::on_threads(ranks, configure, |_, ordinal| Tools::new(ordinal), work);
}

#[test]
fn collectives_reach_windows_where_they_lie_at_offsets_of_each_ranks_own() {
    for ranks in [1, 2, 3, 5] {
        on_threads(ranks, |rank, tools| {
            let me = rank.rank();
            let stream = std::mem::replace(&mut tools.stream, Stream::host());
            for count in [4, 1000, 100_001] {
                let mut source = rank.window::<i32>(count + 64, Memory::Device).unwrap();
                let mut target = rank.window::<i32>(count * ranks + 64, Memory::Device).unwrap();
                assert_eq!(tools.read(&source, 0, 4), [0; 4]);
                // A different place on every rank: on 16 bytes, and beside them.
                for (from, to) in [(0, 0), (4 * me, 8), (3 * me + 1, 2 * me)] {
                    let mine: Vec<i32> = (0..count as i32).map(|at| at * 7 + me as i32 * 1000).collect();
                    tools.write(&source, from, &mine);
                    let on = rank.on(&stream);
                    on.all_reduce_into(
                        source.range(from..from + count),
                        target.range_mut(to..to + count),
                        ReduceOp::Sum,
                    )
                    .unwrap();
                    let sum =
                        |at: usize| (0..ranks as i32).map(|rank| at as i32 * 7 + rank * 1000).sum::<i32>();
                    assert_eq!(tools.read(&target, to, count), (0..count).map(sum).collect::<Vec<_>>());
                    on.broadcast_into(
                        source.range(from..from + count),
                        target.range_mut(to..to + count),
                        ranks - 1,
                    )
                    .unwrap();
                    let last: Vec<i32> =
                        (0..count as i32).map(|at| at * 7 + (ranks as i32 - 1) * 1000).collect();
                    assert_eq!(tools.read(&target, to, count), last);
                    on.all_gather_into(
                        source.range(from..from + count),
                        target.range_mut(to..to + count * ranks),
                    )
                    .unwrap();
                    let all: Vec<i32> = (0..ranks as i32)
                        .flat_map(|rank| (0..count as i32).map(move |at| at * 7 + rank * 1000))
                        .collect();
                    assert_eq!(tools.read(&target, to, count * ranks), all);
                    // In place, and what lies outside stays.
                    tools.write(&source, from, &mine);
                    on.all_reduce(source.range_mut(from..from + count), ReduceOp::Sum).unwrap();
                    assert_eq!(tools.read(&source, from, count), (0..count).map(sum).collect::<Vec<_>>());
                    rank.check().unwrap();
                }
                source.close(&rank).unwrap();
                target.close(&rank).unwrap();
            }
            rank.destroy().unwrap();
        });
    }
}

#[test]
fn a_window_on_a_device_is_not_lent_and_a_closed_one_is_refused() {
    on_threads(2, |rank, tools| {
        let stream = std::mem::replace(&mut tools.stream, Stream::host());
        let mut window = rank.window::<i32>(100, Memory::Device).unwrap();
        let error = window.lend().unwrap_err();
        assert!(matches!(error, Error::Place { call: "lend", .. }), "{error}");
        let raw_buffer = window.range_mut(0..100).raw();
        window.close(&rank).unwrap();
        // SAFETY: the call is refused before anything is touched.
        let call = unsafe {
            unisono::Call::from_raw(unisono::Kind::AllReduce { op: ReduceOp::Sum }, &[raw_buffer], &[])
        };
        let error = rank.on(&stream).submit(call).unwrap_err();
        assert!(matches!(error, Error::Argument { what: "window", .. }), "{error}");
        // A window of the host is none for a stream of a GPU.
        let mut on_host = rank.window::<i32>(10, Memory::Host).unwrap();
        let error = rank.on(&stream).all_reduce(&mut on_host, ReduceOp::Sum).unwrap_err();
        assert!(matches!(error, Error::Argument { what: "window", .. }), "{error}");
        tools.raw.synchronize().unwrap();
        rank.check().unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn ranks_that_ask_for_windows_in_different_memory_are_told() {
    on_threads(2, |rank, _| {
        let memory = if rank.rank() == 0 { Memory::Device } else { Memory::Host };
        let error = rank.window::<i32>(100, memory).unwrap_err();
        assert!(error.to_string().contains("window #") && error.to_string().contains("on GPUs"), "{error}");
    });
}
