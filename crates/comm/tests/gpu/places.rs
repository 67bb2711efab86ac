//! Calls that some ranks make in memory of the host and others in that of their GPUs: everybody is told, long before the deadline. And
//! calls of ranks whose streams are behind, while others wait on the host: nobody is.

use std::time::Duration;

use unisono::cuda::{Device, DeviceBuffer, Stream as CudaStream};
use unisono::recorder::{self, Reading};
use unisono::{
    Buf, BufMut, Call, Communicator, DType, Error, Kind, Operations, Place, RawBuffer, ReduceOp, Result,
    Stream,
};

use crate::OPERATIONS;
use crate::case::{Case, Operation};
use crate::seats::{MOST_BYTES, Tools, on_ranks, prepared};
use crate::world::{devices, on_threads};

const MOST: usize = 1 << 20;

/// What a rank works with: input and output on its GPU, and both on the host.
struct Room {
    ordinal: u32,
    raw: CudaStream,
    stream: Stream,
    on_gpu: [DeviceBuffer; 2],
    on_host: [Vec<u64>; 2],
}

impl Room {
    fn new(ordinal: u32) -> Self {
        let device = Device::new(ordinal).unwrap();
        let raw = CudaStream::new(&device).unwrap();
        // SAFETY: the raw stream lies beside this one and lives as long.
        let stream = unsafe { Stream::cuda(raw.raw(), ordinal) }.unwrap();
        let on_gpu = [(); 2].map(|()| DeviceBuffer::new(&device, MOST).unwrap());
        Self { ordinal, raw, stream, on_gpu, on_host: [(); 2].map(|()| vec![0; MOST / 8]) }
    }

    /// Makes the call of `case`, in memory of the host or of the GPU; there it is in the stream then.
    fn call(&mut self, communicator: &Communicator, case: &Case, is_on_host: bool) -> Result<()> {
        let shape = case.shape(communicator.rank(), communicator.world_size());
        assert!(shape.room().max(shape.inputs) * case.dtype.size() <= MOST, "{case:?}");
        let mut memory = |side: usize| match is_on_host {
            true => (self.on_host[side].as_mut_ptr().expose_provenance() as u64, Place::Host),
            false => (self.on_gpu[side].address(), Place::Cuda { ordinal: self.ordinal }),
        };
        let mut raw = |side: usize| {
            let (ptr, place) = memory(side);
            RawBuffer { ptr, count: 0, dtype: case.dtype, place }
        };
        let buffers = shape.buffers(raw(0), raw(1));
        // SAFETY: all memory is long enough, and stays until the stream was waited for.
        let call = unsafe { Call::from_raw(case.kind(communicator.rank()), &buffers, &shape.views()) };
        match is_on_host {
            true => communicator.submit(call),
            false => communicator.on(&self.stream).submit(call),
        }
    }

    fn wait(&self, communicator: &Communicator) -> Result<()> {
        self.raw.synchronize().unwrap();
        communicator.check()
    }
}

fn patient(builder: unisono::Builder) -> unisono::Builder {
    builder.timeout(Some(Duration::from_secs(60))).prepare(DType::F32, ReduceOp::Sum).unwrap()
}

#[test]
fn calls_in_host_memory_and_on_gpus_are_named_to_all_ranks() {
    let ranks = devices().len().clamp(2, 4);
    let operations = [
        Operation::AllReduce,
        Operation::Broadcast,
        Operation::AllGather,
        Operation::ReduceScatterV,
        Operation::Gather,
        Operation::AllToAll,
    ];
    for (at, operation) in operations.into_iter().enumerate() {
        // One on the host, and one on its GPU; small and large.
        let is_on_host = |rank: usize| (rank == ranks - 1) == (at % 2 == 0);
        let case = Case { operation, count: if at % 3 == 0 { 20_000 } else { 10 }, ..Case::default() };
        on_threads(
            ranks,
            patient,
            |_, ordinal| Room::new(ordinal),
            |communicator, room| {
                let rank = communicator.rank();
                for warm in [&Case { count: 1000, ..Case::default() }, &case] {
                    room.call(&communicator, warm, false).unwrap();
                }
                room.wait(&communicator).unwrap();
                let made = room.call(&communicator, &case, is_on_host(rank));
                let failed = made.and_then(|()| match is_on_host(rank) {
                    // A rank that only gives, or that has what it is to get, waits in the next call.
                    true => communicator.barrier(),
                    false => room.wait(&communicator),
                });
                let Err(Error::Mismatch { left, right }) = &failed else {
                    panic!("{operation:?}: {failed:?}")
                };
                let name = case.kind(rank).name();
                let is_of = |text: &str, is_there: &dyn Fn(usize) -> bool| {
                    let on = |rank: usize| text.contains(&format!(" on rank {rank} "));
                    (0..ranks).filter(|rank| is_there(*rank)).any(on)
                };
                let is_left = left.starts_with(name) || left.starts_with("barrier");
                assert!(is_left && is_of(left, &is_on_host) && left.ends_with(" in host memory"), "{left}");
                let is_right = right.starts_with(&format!("{name} #3 on rank "));
                assert!(is_right && is_of(right, &|rank| !is_on_host(rank)), "{right}");
                assert!(right.ends_with(") on its GPU"), "{right}");
                // And the next call.
                assert_eq!(communicator.barrier(), failed);
            },
        );
    }
}

#[test]
fn calls_on_all_devices_that_meet_one_on_the_host_are_named() {
    if devices().is_empty() {
        return;
    }
    let last = devices().len() as u32 - 1;
    let patience = |builder| prepared(builder).timeout(Some(Duration::from_secs(60)));
    on_ranks(&[vec![0, last], vec![last, 0]], patience, |communicator, tools: &mut Tools| {
        let kind = Kind::AllReduceMulti { op: ReduceOp::Max };
        let call = |tools: &Tools| {
            communicator.on_each(&tools.streams).submit(tools.call(kind, DType::I32, 100)).unwrap();
            tools.wait();
            communicator.check()
        };
        call(tools).unwrap();
        let failed = if tools.rank == 0 {
            let mut memory = [[0i32; 100]; 2];
            let [a, b] = &mut memory;
            communicator.all_reduce_multi(vec![BufMut::from(a), BufMut::from(b)], ReduceOp::Max)
        } else {
            call(tools)
        };
        let Err(Error::Mismatch { left, right }) = failed else { panic!("{failed:?}") };
        let (call, place) = left.split_once(" on rank 0 ").unwrap();
        assert!(call.starts_with("all_reduce_multi #"), "{left}");
        assert_eq!(place, "(i32, 100, max, 2 buffers) in host memory");
        assert_eq!(right, "call #2 on all GPUs of rank 1");
    });
}

/// The stream of rank 1 is behind, once with a call and once with a graph that was captured from one. It waits for rank 0 on the host
/// meanwhile, whose GPU waits for the call.
#[test]
fn a_rank_whose_stream_is_behind_is_waited_for() {
    for is_captured in [false, true] {
        on_threads(
            2,
            patient,
            |_, ordinal| (Room::new(ordinal), Room::new(ordinal)),
            |communicator, (room, beside)| {
                let gate = communicator.duplicate().unwrap();
                let case = Case { count: 1000, ..Case::default() };
                room.call(&communicator, &case, false).unwrap();
                room.wait(&communicator).unwrap();
                beside.call(&gate, &case, false).unwrap();
                beside.wait(&gate).unwrap();
                let is_late = communicator.rank() == 1;
                if is_late {
                    // Ends when rank 0 comes to it.
                    room.call(&gate, &case, false).unwrap();
                }
                if is_captured {
                    room.raw.begin_capture().unwrap();
                    room.call(&communicator, &case, false).unwrap();
                    room.raw.end_capture().unwrap().launch(&room.raw).unwrap();
                } else {
                    room.call(&communicator, &case, false).unwrap();
                }
                if !is_late {
                    std::thread::sleep(Duration::from_millis(1800));
                    beside.call(&gate, &case, false).unwrap();
                }
                communicator.barrier().unwrap();
                room.wait(&communicator).unwrap();
                beside.wait(&gate).unwrap();
                gate.destroy().unwrap();
                communicator.destroy().unwrap();
            },
        );
    }
}

/// A message has no number, so what is left is the deadline.
#[test]
fn messages_between_host_and_gpu_fail_everybody_at_the_deadline() {
    for is_sent_on_host in [true, false] {
        on_threads(
            2,
            |builder| builder.timeout(Some(Duration::from_millis(1500))),
            |_, ordinal| Room::new(ordinal),
            |communicator, room| {
                let rank = communicator.rank();
                let is_on_host = (rank == 0) == is_sent_on_host;
                let mut on_host = [1.0f32; 10];
                let at = room.on_gpu[0].address();
                // SAFETY: the memory is as long, and stays until the stream was waited for.
                let (from, to) = unsafe {
                    (Buf::<f32>::cuda(at, 10, room.ordinal), BufMut::<f32>::cuda(at, 10, room.ordinal))
                };
                let on = communicator.on(&room.stream);
                let made = match (rank, is_on_host) {
                    (0, true) => communicator.send(&on_host, 1, 7),
                    (0, false) => on.send(from, 1, 7),
                    (_, true) => communicator.recv(&mut on_host, 0, 7),
                    (_, false) => on.recv(to, 0, 7),
                };
                // The one that sends may be through with it.
                let failed = made.and_then(|()| {
                    while communicator.check().is_ok() {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    room.wait(&communicator)
                });
                let Err(Error::Timeout { rank: 1, call, missing, .. }) = &failed else {
                    panic!("{failed:?}")
                };
                assert!(call.starts_with("recv from rank 0 (tag 7"), "{call}");
                assert!(missing[0].starts_with("rank 0"), "{missing:?}");
            },
        );
    }
}

/// Hosts count the calls that they put into streams as their GPUs count them, whatever a call is made of.
#[test]
fn calls_are_counted_as_gpus_count_them() {
    const JOB: &str = "calls that are counted";
    let last = devices().len().saturating_sub(1) as u32;
    let named = |builder: unisono::Builder| {
        let builder = builder.prepare(DType::F32, ReduceOp::Sum).unwrap().prepare_quantised::<f32>();
        builder.timeout(Some(Duration::from_secs(60))).job(JOB)
    };
    if devices().is_empty() {
        return;
    }
    on_ranks(&[vec![0], vec![last]], named, |communicator, tools: &mut Tools| {
        let mut room = Room::new(tools.layout[communicator.rank()][0]);
        for count in [0, 3, 5000, 120_000] {
            for operation in OPERATIONS {
                room.call(&communicator, &Case { operation, count, ..Case::default() }, false).unwrap();
            }
            communicator.on(&room.stream).barrier().unwrap();
        }
        for count in [100, MOST_BYTES / 4] {
            let call = tools.call(Kind::AllReduceQuantised, DType::F32, count);
            communicator.on(&room.stream).submit(call).unwrap();
        }
        room.wait(&communicator).unwrap();
        communicator.barrier().unwrap();
        let found = recorder::find(Some(&[std::process::id()])).unwrap();
        let recording = found.recordings.iter().find(|recording| recording.job() == JOB).unwrap();
        for rank in &recording.snapshot().unwrap().ranks {
            let view = rank.gpu.as_ref().unwrap();
            assert_eq!(view.reading, Reading::Now);
            assert_eq!(view.made, view.calls.last().map(|call| call.number), "rank {}", rank.rank);
            assert!(view.made >= Some(46), "{:?}", view.made);
        }
        communicator.barrier().unwrap();
        communicator.destroy().unwrap();
    });
}
