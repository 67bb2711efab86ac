//! Ranks with several devices, or one that counts several times: operations on a buffer of each, which must give the bits of a world
//! in which every device is a rank. Ranks are threads here, which meet as processes do.
//!
//! Over 500 lines because all of it works with the same tools of a rank.

use std::sync::Arc;
use std::time::Duration;

use unisono::cuda::{Device, DeviceBuffer, Event, Stream as CudaStream};
use unisono::store::MemoryStore;
use unisono::{
    BufMut, Builder, Call, Communicator, DType, Error, Kind, Operations, Place, RawBuffer, ReduceOp, Result,
    Stream, group, recorder,
};
use unisono_core::device::Form;

use crate::case::{Case, Operation, expected, input};
use crate::world::{PATIENCE, devices};

pub(crate) const MOST_BYTES: usize = 4 << 20;
/// Bytes around a buffer that must stay as they are.
const MARGIN: usize = 64;
const AROUND: u8 = 0xa5;

/// What a rank has on one of its devices.
struct Seat {
    ordinal: u32,
    raw: CudaStream,
    memory: DeviceBuffer,
}

/// What a rank works with; the streams lie beside what they are made of.
pub(crate) struct Tools {
    pub(crate) rank: usize,
    /// The devices of each rank.
    pub(crate) layout: Vec<Vec<u32>>,
    pub(crate) streams: Vec<Stream>,
    seats: Vec<Seat>,
}

impl Tools {
    fn new(rank: usize, layout: &[Vec<u32>]) -> Self {
        let seat = |ordinal: &u32| {
            let device = Device::new(*ordinal).unwrap();
            let memory = DeviceBuffer::new(&device, MOST_BYTES + 2 * MARGIN).unwrap();
            Seat { ordinal: *ordinal, raw: CudaStream::new(&device).unwrap(), memory }
        };
        let seats: Vec<Seat> = layout[rank].iter().map(seat).collect();
        let stream = |seat: &Seat| {
            // SAFETY: the raw stream lies beside this one and lives as long.
            unsafe { Stream::cuda(seat.raw.raw(), seat.ordinal) }.unwrap()
        };
        Self { rank, layout: layout.to_vec(), streams: seats.iter().map(stream).collect(), seats }
    }

    /// The number of the first seat of `rank`.
    pub(crate) fn first_of(&self, rank: usize) -> usize {
        self.layout[..rank].iter().map(Vec::len).sum()
    }

    pub(crate) fn all(&self) -> usize {
        self.first_of(self.layout.len())
    }

    /// The rank that has seat `seat`, and which of its devices that is.
    pub(crate) fn seat_at(&self, seat: usize) -> (usize, usize) {
        let mut ranks = (0..self.layout.len()).rev();
        let rank = ranks.find(|rank| self.first_of(*rank) <= seat).unwrap();
        (rank, seat - self.first_of(rank))
    }

    pub(crate) fn raw_streams(&self) -> Vec<&CudaStream> {
        self.seats.iter().map(|seat| &seat.raw).collect()
    }

    pub(crate) fn buffer(&self, at: usize, dtype: DType, count: usize) -> RawBuffer {
        let Seat { ordinal, memory, .. } = &self.seats[at];
        RawBuffer {
            ptr: memory.address() + MARGIN as u64,
            count,
            dtype,
            place: Place::Cuda { ordinal: *ordinal },
        }
    }

    pub(crate) fn call(&self, kind: Kind, dtype: DType, count: usize) -> Call<'static> {
        let buffers: Vec<RawBuffer> = (0..self.seats.len()).map(|at| self.buffer(at, dtype, count)).collect();
        // SAFETY: the memory stays until the streams were waited for.
        unsafe { Call::from_raw(kind, &buffers, &[]) }
    }

    pub(crate) fn write(&mut self, at: usize, data: &[u8]) {
        let memory = &mut self.seats[at].memory;
        let around = [AROUND; MARGIN];
        memory.write(0, &[&around[..], data, &around].concat()).unwrap();
    }

    pub(crate) fn wait(&self) {
        self.seats.iter().for_each(|seat| seat.raw.synchronize().unwrap());
    }

    pub(crate) fn expect(&self, at: usize, data: &[u8], what: &str) {
        let around = [AROUND; MARGIN];
        let expected = [&around[..], data, &around].concat();
        let mut got = vec![0; expected.len()];
        self.seats[at].memory.read(0, &mut got).unwrap();
        let wrong = expected.iter().zip(&got).position(|(expected, got)| expected != got);
        let place = wrong.map(|at| (at, expected[at], got[at]));
        let (rank, ordinal) = (self.rank, self.seats[at].ordinal);
        assert_eq!(
            place, None,
            "{what}: buffer {at} of rank {rank} on cuda:{ordinal}: byte from {MARGIN}, expected, got"
        );
    }

    /// Carries `case` out, on a buffer of each device, and compares every byte.
    fn check(&mut self, communicator: &Communicator, case: &Case) {
        let (all, first) = (self.all(), self.first_of(self.rank));
        let inputs: Vec<Vec<u8>> = (0..all).map(|seat| input(case, seat, all)).collect();
        for at in 0..self.seats.len() {
            self.write(at, &inputs[first + at]);
        }
        let kind = match case.operation {
            Operation::AllReduce => Kind::AllReduceMulti { op: case.op },
            _ => {
                let (root, buffer) = self.seat_at(case.root);
                Kind::BroadcastMulti { root: root as u32, buffer: buffer as u32 }
            }
        };
        let taken = communicator.gpu_choice(kind, case.most_bytes(all), case.dtype.size());
        communicator.barrier().unwrap();
        communicator.on_each(&self.streams).submit(self.call(kind, case.dtype, case.count)).unwrap();
        self.wait();
        let what = format!("{case:?} on {:?}", self.layout);
        communicator.check().unwrap_or_else(|error| panic!("{what}: {error}"));
        communicator.barrier().unwrap();
        for at in 0..self.seats.len() {
            let pieces = expected(case, &inputs, taken.map(|launch| launch.form), first + at);
            let data: Vec<u8> = pieces.into_iter().flat_map(|(_, piece)| piece).collect();
            self.expect(at, &data, &what);
        }
    }
}

/// Layouts that this machine can have: one rank, several, and with different numbers of devices.
pub(crate) fn layouts() -> Vec<Vec<Vec<u32>>> {
    let mut all = match devices().len() {
        0 => return Vec::new(),
        1 => Vec::new(),
        2 => vec![vec![vec![1, 0]], vec![vec![0, 1], vec![0, 1]]],
        3 => vec![vec![vec![2, 0, 1]], vec![vec![0, 1], vec![2]]],
        _ => vec![vec![vec![3, 1, 0, 2]], vec![vec![0, 1], vec![2, 3]], vec![vec![0], vec![1, 2, 3]]],
    };
    all.extend([vec![vec![0, 0]], vec![vec![0, 0], vec![0]]]);
    all
}

fn builder(rank: usize, layout: &[Vec<u32>], store: &Arc<MemoryStore>) -> Builder {
    let builder = Communicator::builder().store(store.clone()).rank(rank).world_size(layout.len());
    // Kernels may have to be compiled first.
    builder.timeout(PATIENCE).init_timeout(Duration::from_mins(3)).devices(&layout[rank])
}

/// Runs `work` on every rank, each on a thread of its own, with memory that was there before and goes when all are done.
pub(crate) fn on_ranks(
    layout: &[Vec<u32>],
    configure: impl Fn(Builder) -> Builder + Sync,
    work: impl Fn(Communicator, &mut Tools) + Sync,
) {
    let store = Arc::new(MemoryStore::new());
    let mut tools: Vec<Tools> = (0..layout.len()).map(|rank| Tools::new(rank, layout)).collect();
    let (configure, work, store) = (&configure, &work, &store);
    std::thread::scope(|scope| {
        for (rank, tools) in tools.iter_mut().enumerate() {
            scope.spawn(move || {
                let communicator = configure(builder(rank, layout, store)).build().unwrap();
                assert_eq!(communicator.devices(), layout[rank]);
                work(communicator, tools);
            });
        }
    });
}

/// What tests reduce.
pub(crate) const PAIRS: [(DType, ReduceOp); 4] = [
    (DType::BF16, ReduceOp::Sum),
    (DType::F32, ReduceOp::Avg),
    (DType::I32, ReduceOp::Sum),
    (DType::I32, ReduceOp::Max),
];

pub(crate) fn prepared(builder: Builder) -> Builder {
    PAIRS.into_iter().fold(builder, |builder, (dtype, op)| builder.prepare(dtype, op).unwrap())
}

pub(crate) fn has_equal_ranks(layout: &[Vec<u32>]) -> bool {
    layout.iter().all(|devices| devices.len() == layout[0].len())
}

fn check_all(communicator: &Communicator, tools: &mut Tools, counts: &[usize]) {
    for count in counts.iter().copied() {
        for root in 0..tools.all() {
            let operation = Operation::Broadcast;
            tools
                .check(communicator, &Case { operation, root, dtype: DType::BF16, count, ..Case::default() });
        }
        if has_equal_ranks(&tools.layout) {
            for (dtype, op) in
                [(DType::BF16, ReduceOp::Sum), (DType::F32, ReduceOp::Avg), (DType::I32, ReduceOp::Max)]
            {
                tools.check(communicator, &Case { dtype, op, count, ..Case::default() });
            }
        }
    }
}

#[test]
fn buffers_of_all_devices_are_reduced_and_filled_in_every_form() {
    let forms = [
        None,
        Some(Form::OneShot),
        Some(Form::TwoShot),
        Some(Form::Bulk),
        Some(Form::Ring),
        Some(Form::OneShotLines),
        Some(Form::TwoShotLines),
    ];
    for layout in layouts() {
        for form in forms {
            let configure = |builder| match form {
                Some(form) => prepared(builder).gpu_algorithm(form, 0),
                None => prepared(builder),
            };
            on_ranks(&layout, configure, |communicator, tools| {
                check_all(&communicator, tools, &[0, 1, 7, 1000, 100_003, 1 << 20]);
                communicator.destroy().unwrap();
            });
        }
    }
}

#[test]
fn seats_meet_in_host_memory_too_and_their_epochs_wrap() {
    for layout in layouts() {
        for wraps in [false, true] {
            let configure = |builder| match wraps {
                true => prepared(builder).first_epoch(0x7fff_fffa),
                false => prepared(builder).peer_access(false),
            };
            on_ranks(&layout, configure, |communicator, tools| {
                check_all(&communicator, tools, &[5, 1000, 50_001]);
                communicator.destroy().unwrap();
            });
        }
    }
}

/// Calls of the ranks' world, on the first device, and on the host go on beside them; and communicators that come from this one have
/// the same devices.
#[test]
fn other_operations_stay_those_of_the_first_device_and_duplicates_have_all() {
    for layout in layouts() {
        on_ranks(&layout, prepared, |communicator, tools| {
            let twin = communicator.duplicate().unwrap();
            let alone = communicator.split(Some(tools.rank as u32), 0).unwrap().unwrap();
            let ranks = tools.layout.len();
            check_all(&twin, tools, &[1000]);
            tools.write(0, &1i32.to_le_bytes().repeat(1000));
            communicator.barrier().unwrap();
            let first = tools.buffer(0, DType::I32, 1000);
            let kind = Kind::AllReduce { op: ReduceOp::Sum };
            // SAFETY: the memory stays until the stream was waited for.
            let call = unsafe { Call::from_raw(kind, &[first], &[]) };
            communicator.on(&tools.streams[0]).submit(call).unwrap();
            tools.wait();
            communicator.barrier().unwrap();
            tools.expect(0, &(ranks as i32).to_le_bytes().repeat(1000), "on the first device");
            // A world of this rank alone has its devices only.
            let own = tools.seats.len();
            (0..own).for_each(|at| tools.write(at, &(at as i32 + 1).to_le_bytes().repeat(1000)));
            let kind = Kind::AllReduceMulti { op: ReduceOp::Sum };
            alone.on_each(&tools.streams).submit(tools.call(kind, DType::I32, 1000)).unwrap();
            tools.wait();
            alone.check().unwrap();
            let sum = (own * (own + 1) / 2) as i32;
            (0..own).for_each(|at| tools.expect(at, &sum.to_le_bytes().repeat(1000), "alone"));
            check_all(&communicator, tools, &[1000]);
            // Nothing is freed while kernels of a device wait for each other.
            communicator.barrier().unwrap();
            alone.destroy().unwrap();
            twin.destroy().unwrap();
            communicator.destroy().unwrap();
        });
    }
}

fn argument(result: Result<()>, what: &str, expected: &str, got: &str) {
    match result {
        Err(Error::Argument { what: w, expected: e, got: g, .. }) => {
            assert_eq!((w, &*e, &*g), (what, expected, got));
        }
        other => panic!("{what}: {other:?}"),
    }
}

#[test]
fn what_does_not_fit_the_devices_is_refused_before_anything_happens() {
    if devices().is_empty() {
        return;
    }
    let layout = [vec![0, 0]];
    on_ranks(&layout, prepared, |communicator, tools| {
        let sum = Kind::AllReduceMulti { op: ReduceOp::Max };
        let call = |tools: &Tools| tools.call(sum, DType::I32, 100);
        for at in 0..2 {
            tools.write(at, &(at as i32).to_le_bytes().repeat(100));
        }
        let two = "2, one for each of cuda:0, cuda:0";
        let one_stream = communicator.on_each(&tools.streams[..1]).submit(call(tools));
        argument(one_stream, "number of streams", two, "1");
        let one = tools.buffer(0, DType::I32, 100);
        // SAFETY: the calls are refused.
        let [short, uneven, window] = unsafe {
            let other = tools.buffer(1, DType::I32, 99);
            let window = RawBuffer { place: Place::Window { id: 1 }, ..tools.buffer(1, DType::I32, 100) };
            [&[one][..], &[one, other], &[one, window]].map(|buffers| Call::from_raw(sum, buffers, &[]))
        };
        let on = || communicator.on_each(&tools.streams);
        argument(on().submit(short), "number of buffers", two, "1");
        argument(on().submit(uneven), "count", "100 of i32 in every buffer", "99 of i32 in buffer 1");
        let refused = on().submit(window);
        assert!(matches!(&refused, Err(Error::Place { got, .. }) if got.contains('1')), "{refused:?}");
        let missing = Kind::BroadcastMulti { root: 0, buffer: 2 };
        let refused = on().submit(tools.call(missing, DType::I32, 100));
        assert!(matches!(&refused, Err(Error::Argument { what: "root buffer", .. })), "{refused:?}");
        let single = communicator.on(&tools.streams[0]).submit(call(tools));
        argument(single, "streams", "one of each device, through on_each()", "one");
        let grouped = group(|group| group.on(&communicator, &tools.streams[0]).submit(call(tools)));
        argument(grouped, "streams", "one of each device, through on_each()", "one");
        argument(
            on().barrier(),
            "operation",
            "one on several buffers (all_reduce_multi, broadcast_multi)",
            "barrier",
        );
        // SAFETY: the raw stream lives as long as this one.
        let same = [0, 0].map(|at| unsafe { Stream::cuda(tools.seats[at].raw.raw(), 0) }.unwrap());
        let refused = communicator.on_each(&same).submit(call(tools));
        argument(refused, "streams", "another one for each buffer", "one for two of them");
        tools.seats[0].raw.begin_capture().unwrap();
        let refused = on().submit(call(tools));
        drop(tools.seats[0].raw.end_capture().unwrap());
        argument(refused, "streams", "all in a capture or none", "some in one");
        let mixed = [Stream::host(), Stream::host()];
        let on_host = communicator.on_each(&mixed).submit(call(tools));
        assert!(matches!(&on_host, Err(Error::Place { .. })), "{on_host:?}");
        // And all is as it was.
        (0..2).for_each(|at| tools.expect(at, &(at as i32).to_le_bytes().repeat(100), "refused"));
        on().submit(call(tools)).unwrap();
        tools.wait();
        communicator.check().unwrap();
        (0..2).for_each(|at| tools.expect(at, &1i32.to_le_bytes().repeat(100), "taken"));
        // The same code without GPUs.
        let (mut a, mut b) = ([1, 5], [4, 2]);
        let local: Vec<BufMut<'_, i32>> = vec![(&mut a).into(), (&mut b).into()];
        communicator.on_each(&mixed).all_reduce_multi(local, ReduceOp::Max).unwrap();
        assert_eq!((a, b), ([4, 5], [4, 5]));
        communicator.destroy().unwrap();
    });
}

#[test]
fn ranks_with_other_numbers_of_devices_broadcast_but_do_not_reduce() {
    if devices().is_empty() {
        return;
    }
    let layout = [vec![0, 0], vec![0]];
    on_ranks(&layout, prepared, |communicator, tools| {
        let kind = Kind::AllReduceMulti { op: ReduceOp::Max };
        let refused = communicator.on_each(&tools.streams).submit(tools.call(kind, DType::I32, 100));
        let (expected, got) =
            [("as many on every rank, 2", "1 on rank 1"), ("as many on every rank, 1", "2 on rank 0")]
                [tools.rank];
        argument(refused, "number of devices", expected, got);
        let kind = Kind::BroadcastMulti { root: 1, buffer: 1 };
        let refused = communicator.on_each(&tools.streams).submit(tools.call(kind, DType::I32, 100));
        assert!(matches!(&refused, Err(Error::Argument { what: "root buffer", .. })), "{refused:?}");
        check_all(&communicator, tools, &[1000]);
        communicator.destroy().unwrap();
    });
}

#[test]
fn calls_that_differ_are_named_by_their_ranks() {
    if devices().is_empty() {
        return;
    }
    let layout = [vec![0, 0], vec![0, 0]];
    on_ranks(&layout, prepared, |communicator, tools| {
        check_all(&communicator, tools, &[10]);
        let kind = Kind::AllReduceMulti { op: ReduceOp::Max };
        let count = 100 + tools.rank;
        communicator.on_each(&tools.streams).submit(tools.call(kind, DType::I32, count)).unwrap();
        tools.wait();
        match communicator.check() {
            Err(Error::Mismatch { left, right }) => {
                for call in [&left, &right] {
                    assert!(call.starts_with("all_reduce_multi #8 on rank "), "{call}");
                }
                let both = format!("{left} {right}");
                for rank in 0..2 {
                    let named = format!("on rank {rank} (i32, {}, max, 2 buffers)", 100 + rank);
                    assert!(both.contains(&named), "{both}");
                }
            }
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn who_does_not_come_is_named_with_its_device() {
    if devices().is_empty() {
        return;
    }
    let last = devices().len() as u32 - 1;
    let layout = [vec![0, last], vec![last, 0]];
    let patience = |builder: Builder| prepared(builder).timeout(Some(Duration::from_secs(2)));
    on_ranks(&layout, patience, |communicator, tools| {
        check_all(&communicator, tools, &[10]);
        if tools.rank == 0 {
            let kind = Kind::AllReduceMulti { op: ReduceOp::Max };
            communicator.on_each(&tools.streams).submit(tools.call(kind, DType::I32, 100)).unwrap();
            // Told with the devices, while it waits.
            std::thread::sleep(Duration::from_millis(1000));
            let found = recorder::find(Some(&[std::process::id()])).unwrap();
            let ours = found.recordings.iter().map(|recording| recorder::why(&recording.snapshot().unwrap()));
            let ours: Vec<String> = ours.collect();
            let waits = format!(
                "Devices cuda:0 of rank 0 and cuda:{last} of rank 0 have been in all_reduce_multi #8 (i32, 100, max, 2 buffers) for "
            );
            let tells = |text: &String| {
                text.contains(&waits) && text.contains(" of rank 1 ") && text.contains(" not begun it: ")
            };
            assert!(ours.iter().any(tells), "{ours:#?}");
            tools.wait();
        } else {
            // Until the other has given up.
            std::thread::sleep(Duration::from_secs(4));
        }
        match communicator.check() {
            Err(Error::Timeout { rank: 0, call, missing, .. }) => {
                assert!(call.starts_with("call #8 on its cuda:"), "{call}");
                let [one] = &*missing else { panic!("{missing:?}") };
                assert!(one.starts_with("rank 1 (") && one.contains(") on its cuda:"), "{one}");
            }
            other => panic!("{other:?}"),
        }
    });
}

/// Streams are forked from one and joined behind the calls; the graph is launched into the first.
#[test]
fn a_graph_captures_the_streams_of_all_devices() {
    let ordinals = devices();
    if ordinals.len() < 2 {
        eprintln!("SKIPPED: branches of a graph need not run at once on one device");
        return;
    }
    let number = ordinals.len().min(4) as u32;
    let layout = [(0..number).collect::<Vec<u32>>()];
    on_ranks(&layout, prepared, |communicator, tools| {
        let counts = [10, 1_000_000];
        for count in counts {
            let kind = Kind::AllReduceMulti { op: ReduceOp::Sum };
            let raw = tools.raw_streams();
            let events: Vec<Event> =
                raw.iter().map(|stream| Event::new(stream.device(), false).unwrap()).collect();
            raw[0].begin_capture().unwrap();
            events[0].record(raw[0]).unwrap();
            raw[1..].iter().for_each(|stream| stream.wait(&events[0]).unwrap());
            for _ in 0..2 {
                communicator.on_each(&tools.streams).submit(tools.call(kind, DType::I32, count)).unwrap();
            }
            for (stream, event) in raw.iter().zip(&events).skip(1) {
                event.record(stream).unwrap();
                raw[0].wait(event).unwrap();
            }
            let graph = raw[0].end_capture().unwrap();
            for at in 0..tools.seats.len() {
                tools.write(at, &1i32.to_le_bytes().repeat(count));
            }
            for _ in 0..3 {
                graph.launch(&tools.seats[0].raw).unwrap();
            }
            // Later calls come behind the graph, in every stream.
            let behind = Event::new(tools.seats[0].raw.device(), false).unwrap();
            behind.record(&tools.seats[0].raw).unwrap();
            tools.seats[1..].iter().for_each(|seat| seat.raw.wait(&behind).unwrap());
            communicator.on_each(&tools.streams).submit(tools.call(kind, DType::I32, count)).unwrap();
            tools.wait();
            communicator.check().unwrap();
            let value = (number as i32).pow(7).to_le_bytes().repeat(count);
            (0..tools.seats.len()).for_each(|at| tools.expect(at, &value, "behind the graph"));
        }
        communicator.destroy().unwrap();
    });
}

#[test]
fn more_devices_than_arenas_have_room_for_are_refused_on_all_ranks() {
    if devices().is_empty() {
        return;
    }
    let layout = [vec![0; 9], vec![0; 8]];
    let store = Arc::new(MemoryStore::new());
    std::thread::scope(|scope| {
        let build = |rank: usize| {
            let (layout, store) = (&layout, &store);
            scope.spawn(move || builder(rank, layout, store).build().unwrap_err())
        };
        for (rank, thread) in [build(0), build(1)].into_iter().enumerate() {
            let reason = "at most 16 devices of all ranks work together, and these are 17".to_owned();
            assert_eq!(thread.join().unwrap(), Error::Device { rank, reason });
        }
    });
}
