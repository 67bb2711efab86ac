//! Memory of GPUs that somebody else allocated: collectives that reach it where it lies, and its life.

use unisono::cuda::{Device, DeviceBuffer, Location, SharedPages};
use unisono::{
    Buf, BufMut, Call, Communicator, DType, Error, Kind, Memory, Operations, Place, RawBuffer, ReduceOp,
    Registration, Stream,
};

use crate::windows::on_threads;

/// Memory as programs get it.
enum Foreign {
    /// As `cudaMalloc` gives it.
    Plain(DeviceBuffer),
    /// As `cuMemCreate` gives it.
    Pages(SharedPages),
}

impl Foreign {
    fn both(ordinal: u32, bytes: usize) -> [Self; 2] {
        let device = Device::new(ordinal).unwrap();
        let plain = DeviceBuffer::new(&device, bytes).unwrap();
        [Self::Plain(plain), Self::Pages(SharedPages::create(&device, bytes, Location::Device).unwrap())]
    }

    fn address(&self) -> u64 {
        match self {
            Self::Plain(buffer) => buffer.address(),
            Self::Pages(pages) => pages.address(),
        }
    }
}

fn buffer(rank: &Communicator, ptr: u64, count: usize) -> RawBuffer {
    let place = Place::Cuda { ordinal: rank.device().unwrap() };
    RawBuffer { ptr, count, dtype: DType::I32, place }
}

/// Registers `count` elements, `at` elements behind the beginning.
fn register(rank: &Communicator, memory: &Foreign, at: usize, count: usize) -> Registration {
    // SAFETY: tests close their registrations before their memory goes.
    unsafe { rank.register(buffer(rank, memory.address() + at as u64 * 4, count)) }.unwrap()
}

fn source(registration: &Registration, at: usize, count: usize) -> Buf<'_, i32> {
    // SAFETY: tests wait for their streams before they touch the memory.
    unsafe { registration.buf(at..at + count) }
}

fn target(registration: &Registration, at: usize, count: usize) -> BufMut<'_, i32> {
    // SAFETY: as above.
    unsafe { registration.buf_mut(at..at + count) }
}

/// What element `at` of `rank` is.
fn value(rank: usize, at: usize) -> i32 {
    at as i32 * 7 + rank as i32 * 1000
}

fn sums(ranks: usize, count: usize) -> Vec<i32> {
    (0..count).map(|at| (0..ranks).map(|rank| value(rank, at)).sum()).collect()
}

#[test]
fn collectives_reach_registered_memory_where_it_lies_at_offsets_of_each_ranks_own() {
    const LARGEST: usize = 100_001;
    for ranks in [1, 2, 3, 5] {
        on_threads(ranks, |rank, tools| {
            let me = rank.rank();
            let stream = std::mem::replace(&mut tools.stream, Stream::host());
            let on = rank.on(&stream);
            // All memory at once: freeing some would wait for the device.
            let ordinal = rank.device().unwrap();
            let froms = Foreign::both(ordinal, (LARGEST + 99) * 4);
            let tos = Foreign::both(ordinal, (LARGEST * ranks + 99) * 4);
            let mut window = rank.window::<i32>(LARGEST * ranks + 99, Memory::Device).unwrap();
            for (from, to) in froms.iter().zip(tos.iter().rev()) {
                for count in [4, 1000, LARGEST] {
                    // Another place in the allocation on every rank, on 16 bytes and beside them.
                    let inputs = register(&rank, from, 5 * me + 1, count + 16);
                    let outputs = register(&rank, to, 4 * me, count * ranks + 16);
                    for (at, into) in [(0, 0), (2 * me, 3), (3, 4)] {
                        let mine: Vec<i32> = (0..count).map(|at| value(me, at)).collect();
                        tools.put(inputs.address() + at as u64 * 4, &mine);
                        let result = outputs.address() + into as u64 * 4;
                        on.all_reduce_into(
                            source(&inputs, at, count),
                            target(&outputs, into, count),
                            ReduceOp::Sum,
                        )
                        .unwrap();
                        assert_eq!(tools.get(result, count), sums(ranks, count));
                        on.broadcast_into(
                            source(&inputs, at, count),
                            target(&outputs, into, count),
                            ranks - 1,
                        )
                        .unwrap();
                        let last: Vec<i32> = (0..count).map(|at| value(ranks - 1, at)).collect();
                        assert_eq!(tools.get(result, count), last);
                        let all: Vec<i32> =
                            (0..ranks).flat_map(|rank| (0..count).map(move |at| value(rank, at))).collect();
                        on.all_gather_into(source(&inputs, at, count), target(&outputs, into, count * ranks))
                            .unwrap();
                        assert_eq!(tools.get(result, count * ranks), all);
                        // Out of a registration, into a window.
                        on.all_gather_into(
                            source(&inputs, at, count),
                            window.range_mut(into..into + count * ranks),
                        )
                        .unwrap();
                        assert_eq!(tools.get(window.address() + into as u64 * 4, count * ranks), all);
                        // In place.
                        on.all_reduce(target(&inputs, at, count), ReduceOp::Sum).unwrap();
                        let result = inputs.address() + at as u64 * 4;
                        assert_eq!(tools.get(result, count), sums(ranks, count));
                        rank.check().unwrap();
                    }
                    inputs.close(&rank).unwrap();
                    outputs.close(&rank).unwrap();
                }
            }
            window.close(&rank).unwrap();
            rank.destroy().unwrap();
        });
    }
}

#[test]
fn memory_is_registered_as_often_as_one_likes_and_a_closed_registration_is_refused() {
    on_threads(2, |rank, tools| {
        let me = rank.rank();
        let stream = std::mem::replace(&mut tools.stream, Stream::host());
        for memory in &Foreign::both(rank.device().unwrap(), 4096) {
            let first = register(&rank, memory, 0, 1024);
            let second = register(&rank, memory, 24 + me, 900);
            assert!(first.id() != second.id() && second.bytes() == 3600);
            let closed = target(&first, 0, 500).raw();
            first.close(&rank).unwrap();
            let mine: Vec<i32> = (0..900).map(|at| value(me, at)).collect();
            tools.put(second.address(), &mine);
            rank.on(&stream).all_reduce(target(&second, 0, 900), ReduceOp::Sum).unwrap();
            assert_eq!(tools.get(second.address(), 900), sums(2, 900));
            // Beyond the end, before the beginning, of a registration that is no more: refused before anything is touched.
            let beyond = target(&second, 500, 401).raw();
            let nowhere = target(&second, usize::MAX / 2, 1).raw();
            let before = RawBuffer { ptr: beyond.ptr - 501 * 4, ..beyond };
            for wrong in [beyond, nowhere, before, closed] {
                // SAFETY: as said.
                let call = unsafe { Call::from_raw(Kind::AllReduce { op: ReduceOp::Sum }, &[wrong], &[]) };
                let error = rank.on(&stream).submit(call).unwrap_err();
                assert!(matches!(error, Error::Argument { what: "window", .. }), "{error}");
            }
            second.close(&rank).unwrap();
        }
        rank.check().unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn a_graph_keeps_what_it_reaches_when_windows_and_registrations_are_closed() {
    const COUNT: usize = 20_000;
    on_threads(2, |rank, tools| {
        let me = rank.rank();
        let stream = std::mem::replace(&mut tools.stream, Stream::host());
        let memory = Foreign::both(rank.device().unwrap(), COUNT * 4);
        let registered = memory.each_ref().map(|memory| register(&rank, memory, 0, COUNT));
        let mut window = rank.window::<i32>(COUNT, Memory::Device).unwrap();
        let addresses = [registered[0].address(), registered[1].address(), window.address()];
        tools.raw.begin_capture().unwrap();
        let on = rank.on(&stream);
        for registered in &registered {
            on.all_reduce(target(registered, 0, COUNT), ReduceOp::Sum).unwrap();
            on.all_reduce(target(registered, 0, COUNT), ReduceOp::Sum).unwrap();
        }
        on.all_reduce(&mut window, ReduceOp::Sum).unwrap();
        on.all_reduce(&mut window, ReduceOp::Sum).unwrap();
        let graph = tools.raw.end_capture().unwrap();
        // Closing waits for the device, which must not capture then for another rank.
        rank.barrier().unwrap();
        for registered in registered {
            registered.close(&rank).unwrap();
        }
        // Only the graph has the memory of the window now.
        window.close(&rank).unwrap();
        let mine: Vec<i32> = (0..COUNT).map(|at| value(me, at)).collect();
        let twice: Vec<i32> = sums(2, COUNT).into_iter().map(|sum| sum * 2).collect();
        for _ in 0..3 {
            for address in addresses {
                tools.put(address, &mine);
            }
            // Nobody writes its input while another still reads that of the round before.
            rank.barrier().unwrap();
            graph.launch(&tools.raw).unwrap();
            tools.raw.synchronize().unwrap();
            for address in addresses {
                assert_eq!(tools.get(address, COUNT), twice);
            }
            rank.check().unwrap();
        }
        rank.barrier().unwrap();
        drop(graph);
        // What it kept goes at the latest now, and the communicator is as before.
        let again = register(&rank, &memory[0], 0, 16);
        again.close(&rank).unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn memory_that_cannot_be_registered_is_refused_on_all_ranks_who_go_on() {
    on_threads(3, |rank, tools| {
        let me = rank.rank();
        let stream = std::mem::replace(&mut tools.stream, Stream::host());
        let ordinal = rank.device().unwrap();
        let [plain, _pages] = Foreign::both(ordinal, 4 << 20);
        let host = vec![0i32; 1024];
        // SAFETY: all of these are refused.
        let register_raw = |buffer: RawBuffer| unsafe { rank.register(buffer) }.unwrap_err();
        // What is wrong on every rank is said at once.
        let on_host = RawBuffer { place: Place::Host, ..buffer(&rank, host.as_ptr() as u64, 1024) };
        assert!(matches!(register_raw(on_host), Error::Place { call: "register", .. }));
        let window = rank.window::<i32>(10, Memory::Device).unwrap();
        assert!(matches!(register_raw(window.range(0..10).raw()), Error::Place { call: "register", .. }));
        let elsewhere = RawBuffer { place: Place::Cuda { ordinal: 99 }, ..buffer(&rank, plain.address(), 1) };
        assert!(matches!(register_raw(elsewhere), Error::Place { call: "register", .. }));
        assert!(matches!(register_raw(buffer(&rank, plain.address(), 0)), Error::Argument { .. }));
        // What is wrong on one rank is said on all.
        let good = buffer(&rank, plain.address(), 1024);
        let beyond = buffer(&rank, plain.address() + (4 << 20) - 16, 1024);
        let unknown = buffer(&rank, host.as_ptr() as u64, 1024);
        for (culprit, wrong, got) in
            [(1, beyond, "only 16 bytes there"), (2, unknown, "an address that the driver does not know")]
        {
            match register_raw(if me == culprit { wrong } else { good }) {
                Error::Argument { call: "register", what: "buffer", got: found, .. } if me == culprit => {
                    // Systems where GPUs reach all host memory know its addresses.
                    assert!(found == got || found == "host memory", "{found}");
                }
                Error::Registration { rank: named, reason } if me != culprit => {
                    assert_eq!(named, culprit);
                    assert!(
                        reason.starts_with(&format!("register on rank {culprit}: buffer should be")),
                        "{reason}"
                    );
                }
                other => panic!("{other}"),
            }
        }
        let registered = register(&rank, &plain, 0, 1024);
        tools.put(registered.address(), &[1; 1024]);
        rank.on(&stream).all_reduce(target(&registered, 0, 1024), ReduceOp::Sum).unwrap();
        assert_eq!(tools.get(registered.address(), 1024), [3; 1024]);
        registered.close(&rank).unwrap();
        window.close(&rank).unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn ranks_that_register_different_sizes_are_both_named() {
    on_threads(2, |rank, _| {
        let [plain, _pages] = Foreign::both(rank.device().unwrap(), 4096);
        // SAFETY: it is refused.
        let error = unsafe { rank.register(buffer(&rank, plain.address(), 100 + rank.rank())) }.unwrap_err();
        let sentence = error.to_string();
        assert!(matches!(error, Error::Mismatch { .. }), "{sentence}");
        for part in ["on rank 0 (u8, 400)", "on rank 1 (u8, 404)"] {
            assert!(sentence.contains("register #") && sentence.contains(part), "{sentence}");
        }
    });
}

#[test]
fn gpus_that_do_not_reach_each_other_register_nothing() {
    let devices = crate::world::devices();
    let Some(first) = devices.first() else { return };
    let rank = Communicator::builder().peer_access(false).local(&[*first]).unwrap().remove(0);
    let [plain, _pages] = Foreign::both(*first, 4096);
    // SAFETY: it is refused.
    let error = unsafe { rank.register(buffer(&rank, plain.address(), 100)) }.unwrap_err();
    assert!(matches!(error, Error::Device { rank: 0, .. }), "{error}");
    rank.destroy().unwrap();
}
