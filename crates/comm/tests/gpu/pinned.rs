//! Pinned windows: CPU and GPU take turns on them, whatever they are made of and however the devices are linked.
//!
//! No stream is waited for here: what lends a window, or begins a collective of the host on it, waits for the GPU.

use unisono::cuda::{Device, Stream as CudaStream};
use unisono::settings::PinnedWay;
use unisono::{
    Buf, Builder, Call, Communicator, DType, Error, Kind, Memory, Operations, ReduceOp, Stream, Window,
};
use unisono_core::device::Form;

use crate::world::{self, PATIENCE, devices};

/// A rank's stream, which lies beside what it is made of.
struct OnGpu {
    raw: CudaStream,
    stream: Stream,
}

impl OnGpu {
    fn new(ordinal: u32) -> Self {
        let raw = CudaStream::new(&Device::new(ordinal).unwrap()).unwrap();
        // SAFETY: the raw stream lies beside this one and lives as long.
        let stream = unsafe { Stream::cuda(raw.raw(), ordinal) }.unwrap();
        Self { raw, stream }
    }
}

/// The ways that the devices of this machine can take, and that ranks take in turn.
fn ways() -> Vec<Vec<PinnedWay>> {
    let mut all = vec![vec![PinnedWay::Memfd]];
    let takes_numa = |ordinal: &u32| {
        let facts = Device::new(*ordinal).unwrap().facts().clone();
        facts.takes_host_numa && facts.numa_node.is_some()
    };
    if devices().iter().all(takes_numa) {
        all.extend([vec![PinnedWay::Numa], vec![PinnedWay::Numa, PinnedWay::Memfd]]);
    } else {
        eprintln!("SKIPPED: memory of NUMA nodes, which a device here does not take");
    }
    all
}

/// Runs `work` on every rank of a world, each on a thread of its own, ranks taking `ways` in turn.
fn on_threads(
    ranks: usize,
    ways: &[PinnedWay],
    configure: impl FnOnce(Builder) -> Builder,
    work: impl Fn(Communicator, &OnGpu) + Sync,
) {
    let by_rank: Vec<PinnedWay> = (0..ranks).map(|rank| ways[rank % ways.len()]).collect();
    let configure = |builder: Builder| {
        let builder = builder.timeout(PATIENCE).pinned_by_rank(&by_rank);
        configure(builder.prepare(DType::I32, ReduceOp::Sum).unwrap())
    };
    world::on_threads(ranks, configure, |_, ordinal| OnGpu::new(ordinal), |rank, gpu| work(rank, gpu));
}

/// Two windows and what stands in them, as the CPU writes it.
struct Pair {
    source: Window<i32>,
    target: Window<i32>,
    count: usize,
}

/// Elements around what a call touches.
const MARGIN: usize = 64;
const POISON: i32 = -77;

impl Pair {
    fn new(rank: &Communicator, count: usize) -> Self {
        let window = |count| rank.window::<i32>(count + MARGIN, Memory::Pinned).unwrap();
        let mut both = Self { source: window(count), target: window(count * rank.world_size()), count };
        for window in [&mut both.source, &mut both.target] {
            assert!(window.lend().unwrap().iter().all(|value| *value == 0), "they begin as zeros");
        }
        both
    }

    fn value(rank: usize, at: usize) -> i32 {
        (at * 7 + rank * 1000) as i32
    }

    /// The CPU writes the input of `rank` from element `from` on, and poisons everything else.
    fn write(&mut self, rank: usize, from: usize) {
        self.target.lend().unwrap().fill(POISON);
        let source = self.source.lend().unwrap();
        source.fill(POISON);
        source[from..from + self.count]
            .iter_mut()
            .enumerate()
            .for_each(|(at, value)| *value = Self::value(rank, at));
    }

    fn close(self, rank: &Communicator) {
        self.source.close(rank).unwrap();
        self.target.close(rank).unwrap();
    }
}

/// The CPU reads that `window` holds `expected` from element `at` on, and poison elsewhere.
fn expect(window: &mut Window<i32>, at: usize, expected: impl Iterator<Item = i32>, what: &str) {
    let got = window.lend().unwrap();
    let mut all = vec![POISON; got.len()];
    all.iter_mut().skip(at).zip(expected).for_each(|(place, value)| *place = value);
    let wrong = got.iter().zip(&all).position(|(got, expected)| got != expected);
    let wrong = wrong.map(|place| (place, got[place], all[place]));
    assert_eq!(wrong, None, "{what}, from {at}: element, got, expected");
}

/// The CPU writes, the GPU works, the CPU reads; then the CPU works on what the GPU wrote, and the GPU on that.
fn take_turns(rank: &Communicator, stream: &Stream, count: usize) {
    let (me, ranks) = (rank.rank(), rank.world_size());
    let (on, mut pair) = (rank.on(stream), Pair::new(rank, count));
    let sum = |at: usize| (0..ranks).map(|rank| Pair::value(rank, at)).sum::<i32>();
    // A different place on every rank: on 16 bytes, and beside them.
    for (from, to) in [(0, 0), (4 * me, 8), (3 * me + 1, 2 * me)] {
        let (source, target) = (from..from + count, to..to + count);
        pair.write(me, from);
        on.all_reduce_into(
            pair.source.range(source.clone()),
            pair.target.range_mut(target.clone()),
            ReduceOp::Sum,
        )
        .unwrap();
        expect(&mut pair.target, to, (0..count).map(sum), "all_reduce by GPUs");
        pair.write(me, from);
        on.broadcast_into(
            pair.source.range(source.clone()),
            pair.target.range_mut(target.clone()),
            ranks - 1,
        )
        .unwrap();
        let last = |at| Pair::value(ranks - 1, at);
        expect(&mut pair.target, to, (0..count).map(last), "broadcast by GPUs");
        pair.write(me, from);
        let all = to..to + count * ranks;
        on.all_gather_into(pair.source.range(source.clone()), pair.target.range_mut(all)).unwrap();
        let everything = (0..ranks).flat_map(|rank| (0..count).map(move |at| Pair::value(rank, at)));
        expect(&mut pair.target, to, everything, "all_gather by GPUs");
        // What only the root gets, and parts of any size, in windows all the same.
        pair.write(me, from);
        let whole = to..to + count * ranks;
        let gathered =
            if me == 0 { pair.target.range_mut(whole.clone()) } else { pair.target.range_mut(0..0) };
        on.gather(pair.source.range(source.clone()), gathered, 0).unwrap();
        let everything = (0..ranks).flat_map(|rank| (0..count).map(move |at| Pair::value(rank, at)));
        let everything = everything.take(if me == 0 { usize::MAX } else { 0 });
        expect(&mut pair.target, to, everything, "gather by GPUs");
        pair.write(me, from);
        let counts: Vec<usize> = (0..ranks).map(|rank| count.saturating_sub(rank)).collect();
        let all = to..to + counts.iter().sum::<usize>();
        on.all_gather_v(pair.source.range(from..from + counts[me]), pair.target.range_mut(all), &counts)
            .unwrap();
        let everything =
            (0..ranks).flat_map(|rank| (0..count.saturating_sub(rank)).map(move |at| Pair::value(rank, at)));
        expect(&mut pair.target, to, everything, "all_gather_v by GPUs");
        // The GPU in place, the CPU on its result, and the GPU again: nobody else waits.
        pair.write(me, from);
        on.all_reduce(pair.source.range_mut(source.clone()), ReduceOp::Sum).unwrap();
        rank.all_reduce_into(
            pair.source.range(source.clone()),
            pair.target.range_mut(target.clone()),
            ReduceOp::Sum,
        )
        .unwrap();
        let again = |at: usize| sum(at) * ranks as i32;
        on.all_reduce(pair.target.range_mut(target), ReduceOp::Sum).unwrap();
        expect(&mut pair.source, from, (0..count).map(sum), "all_reduce in place");
        expect(&mut pair.target, to, (0..count).map(|at| again(at) * ranks as i32), "GPU, CPU and GPU");
        rank.check().unwrap();
    }
    pair.close(rank);
}

#[test]
fn cpu_and_gpu_take_turns_whatever_the_windows_are_made_of() {
    if devices().is_empty() {
        return;
    }
    for ways in ways() {
        for (ranks, has_access, is_direct) in [
            (1, true, true),
            (2, true, true),
            (3, true, false),
            (5, true, true),
            (2, false, true),
            (3, false, false),
        ] {
            eprintln!("{ways:?}, {ranks} ranks, peer access {has_access}, direct {is_direct}");
            let configure = |builder: Builder| {
                let builder = builder.peer_access(has_access);
                if is_direct { builder.gpu_algorithm(Form::Direct, 0) } else { builder }
            };
            on_threads(ranks, &ways, configure, |rank, on| {
                for count in [1, 4, 1000, 100_001] {
                    take_turns(&rank, &on.stream, count);
                }
                rank.destroy().unwrap();
            });
        }
    }
}

#[test]
fn large_windows_take_the_usual_forms() {
    if devices().is_empty() {
        return;
    }
    for ways in ways() {
        on_threads(
            2,
            &ways,
            |builder| builder,
            |rank, on| {
                take_turns(&rank, &on.stream, 1 << 20);
                rank.destroy().unwrap();
            },
        );
    }
}

#[test]
fn lending_waits_for_graphs_too() {
    on_threads(
        2,
        &[PinnedWay::Auto],
        |builder| builder,
        |rank, on| {
            let mut window = rank.window::<i32>(300_000, Memory::Pinned).unwrap();
            on.raw.begin_capture().unwrap();
            rank.on(&on.stream).all_reduce(&mut window, ReduceOp::Sum).unwrap();
            let graph = on.raw.end_capture().unwrap();
            // No rank waits for a device on which another one captures.
            rank.barrier().unwrap();
            let mut expected = 1;
            window.lend().unwrap().fill(1);
            // Lending waits for the whole device from here on, which the ranks may share: so they meet before each launch.
            for _ in 0..10 {
                rank.barrier().unwrap();
                graph.launch(&on.raw).unwrap();
                graph.launch(&on.raw).unwrap();
                expected *= 4;
                assert!(window.lend().unwrap().iter().all(|value| *value == expected));
            }
            rank.barrier().unwrap();
            drop(graph);
            window.close(&rank).unwrap();
            rank.destroy().unwrap();
        },
    );
}

#[test]
fn a_graph_keeps_a_pinned_window_that_is_closed() {
    if devices().is_empty() {
        return;
    }
    for ways in ways() {
        // Through the arenas, and as usual: both reach our copy, and the second those of peers.
        for count in [100, 300_000] {
            on_threads(
                2,
                &ways,
                |builder| builder,
                |rank, on| {
                    let mut source = rank.window::<i32>(count, Memory::Pinned).unwrap();
                    let mut target = rank.window::<i32>(count, Memory::Pinned).unwrap();
                    source.lend().unwrap().fill(rank.rank() as i32 + 1);
                    on.raw.begin_capture().unwrap();
                    rank.on(&on.stream).all_reduce_into(&source, &mut target, ReduceOp::Sum).unwrap();
                    let graph = on.raw.end_capture().unwrap();
                    // Closing waits for the device, which must not capture then for another rank.
                    rank.barrier().unwrap();
                    // Only the graph has the memory now.
                    source.close(&rank).unwrap();
                    for _ in 0..3 {
                        target.lend().unwrap().fill(POISON);
                        rank.barrier().unwrap();
                        graph.launch(&on.raw).unwrap();
                        assert!(target.lend().unwrap().iter().all(|value| *value == 3));
                    }
                    rank.barrier().unwrap();
                    drop(graph);
                    target.close(&rank).unwrap();
                    rank.destroy().unwrap();
                },
            );
        }
    }
}

#[test]
fn what_a_failed_call_left_is_not_lent() {
    on_threads(
        2,
        &[PinnedWay::Auto],
        |builder| builder,
        |rank, on| {
            let mut window = rank.window::<i32>(1000, Memory::Pinned).unwrap();
            if rank.rank() == 0 {
                // Its kernel waits for one that never comes, and lending for the kernel.
                rank.on(&on.stream).all_reduce(&mut window, ReduceOp::Sum).unwrap();
            } else {
                std::thread::sleep(std::time::Duration::from_millis(300));
                rank.observer().abort("on purpose");
            }
            let error = window.lend().unwrap_err();
            assert!(matches!(error, Error::Poisoned { .. }), "{error}");
            assert!(error.to_string().contains("on purpose"), "{error}");
            rank.all_reduce(&mut window, ReduceOp::Sum).unwrap_err();
        },
    );
}

#[test]
fn ranks_that_differ_are_told_when_they_lend() {
    on_threads(
        2,
        &[PinnedWay::Auto],
        |builder| builder,
        |rank, on| {
            let mut window = rank.window::<i32>(1000, Memory::Pinned).unwrap();
            match rank.rank() {
                0 => rank.on(&on.stream).all_reduce(&mut window, ReduceOp::Sum).unwrap(),
                _ => rank.on(&on.stream).broadcast(&mut window, 0).unwrap(),
            }
            let error = window.lend().unwrap_err().to_string();
            assert!(error.contains("all_reduce") && error.contains("broadcast"), "{error}");
        },
    );
}

#[test]
fn pinned_and_device_windows_meet_in_one_call() {
    on_threads(
        2,
        &[PinnedWay::Auto],
        |builder| builder.gpu_algorithm(Form::Direct, 0),
        |rank, on| {
            let mut pinned = rank.window::<i32>(50_000, Memory::Pinned).unwrap();
            let mut device = rank.window::<i32>(50_000, Memory::Device).unwrap();
            pinned.lend().unwrap().fill(rank.rank() as i32 + 1);
            let gpu = rank.on(&on.stream);
            gpu.all_reduce_into(&pinned, &mut device, ReduceOp::Sum).unwrap();
            gpu.broadcast_into(&device, &mut pinned, 1).unwrap();
            assert!(pinned.lend().unwrap().iter().all(|value| *value == 3));
            // SAFETY: the window is not closed before it was waited for.
            let plain = unsafe { Buf::<i32>::cuda(device.address(), 50_000, rank.device().unwrap()) };
            gpu.all_reduce_into(plain, &mut pinned, ReduceOp::Sum).unwrap();
            assert!(pinned.lend().unwrap().iter().all(|value| *value == 6));
            pinned.close(&rank).unwrap();
            device.close(&rank).unwrap();
            rank.destroy().unwrap();
        },
    );
}

#[test]
fn a_pinned_window_becomes_one_sided_and_a_closed_one_is_refused() {
    if devices().is_empty() {
        return;
    }
    for ways in ways() {
        on_threads(
            2,
            &ways,
            |builder| builder.peer_access(false),
            |rank, on| {
                let (me, peer) = (rank.rank(), 1 - rank.rank());
                let error = rank.window::<i32>(10, Memory::Device).unwrap_err();
                assert!(matches!(error, Error::Device { .. }), "{error}");
                let mut window = rank.window::<i32>(1001, Memory::Pinned).unwrap();
                window.lend().unwrap().fill(me as i32);
                rank.on(&on.stream).all_reduce(&mut window, ReduceOp::Sum).unwrap();
                let shared = window.into_symmetric(&rank).unwrap();
                shared.write(peer, 1000, &[me as i32 + 5]).unwrap();
                shared.signal(peer, 3, 1).unwrap();
                shared.wait_signal(3, 1, std::time::Duration::from_secs(20)).unwrap();
                let mut got = [0; 2];
                shared.read(me, 999, &mut got).unwrap();
                assert_eq!(got, [1, peer as i32 + 5]);
                shared.close(&rank).unwrap();
                let mut window = rank.window::<i32>(100, Memory::Pinned).unwrap();
                let raw_buffer = window.range_mut(0..100).raw();
                window.close(&rank).unwrap();
                for stream in [&on.stream, &Stream::host()] {
                    // SAFETY: the call is refused before anything is touched.
                    let call =
                        unsafe { Call::from_raw(Kind::AllReduce { op: ReduceOp::Sum }, &[raw_buffer], &[]) };
                    let error = rank.on(stream).submit(call).unwrap_err();
                    assert!(matches!(error, Error::Argument { what: "window", .. }), "{error}");
                }
                rank.check().unwrap();
                rank.destroy().unwrap();
            },
        );
    }
}

#[test]
fn windows_that_are_not_closed_go_with_their_communicator() {
    on_threads(
        2,
        &[PinnedWay::Numa, PinnedWay::Memfd],
        |builder| builder,
        |rank, on| {
            // A device that takes no such memory says so on all ranks.
            let Ok(mut window) = rank.window::<i32>(100_000, Memory::Pinned) else { return };
            window.lend().unwrap().fill(2);
            rank.on(&on.stream).all_reduce(&mut window, ReduceOp::Sum).unwrap();
            on.raw.synchronize().unwrap();
            rank.destroy().unwrap();
            assert!(window.lend().unwrap().iter().all(|value| *value == 4));
        },
    );
}

#[test]
fn ranks_that_ask_for_device_and_pinned_memory_are_told() {
    on_threads(
        2,
        &[PinnedWay::Auto],
        |builder| builder,
        |rank, _| {
            let memory = if rank.rank() == 0 { Memory::Device } else { Memory::Pinned };
            let error = rank.window::<i32>(100, memory).unwrap_err().to_string();
            assert!(error.contains(", on GPUs") && error.contains(", pinned"), "{error}");
        },
    );
}
