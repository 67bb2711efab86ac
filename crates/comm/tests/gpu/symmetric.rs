//! One-sided memory on devices: accesses and signals of the host, kernels of users over the header, and how waits end.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use unisono::cuda::{Cache, Compiler, Device, DeviceBuffer, Function, Grid, Module, Source};
use unisono::gpu::kernels::architecture;
use unisono::{Communicator, DeviceView, Element, Error, Memory, Operations, Stream, Symmetric};

use crate::windows::{Tools, on_threads};

const LONG: Duration = Duration::from_secs(20);
const EXAMPLE: (&str, &str) = ("device_header.cu", include_str!("../../examples/device_header.cu"));
const TESTS: (&str, &str) = ("symmetric.cu", include_str!("symmetric.cu"));

/// What `exchange` of the example takes.
#[repr(C)]
struct Exchange {
    shared: DeviceView,
    rounds_done: u64,
    first_round: u32,
    rounds: u32,
}

/// What the kernels of `symmetric.cu` take.
#[repr(C)]
struct One {
    shared: DeviceView,
    answer: u64,
    slot: u32,
    value: u32,
}

/// What a rank launches with, made before anybody waits.
struct Kernel {
    function: Function,
    answer: DeviceBuffer,
}

impl Kernel {
    fn new(tools: &Tools, (name, text): (&'static str, &'static str), function: &str) -> Self {
        let device: &Device = tools.raw.device();
        let source = Source { name, text, headers: vec![unisono::device_header()], definitions: Vec::new() };
        let cubin = Cache::of_user().cubin(&source, architecture(device), Compiler::find).unwrap();
        let function = Module::load(device, &cubin).unwrap().function(function).unwrap();
        let mut answer = DeviceBuffer::new(device, 8).unwrap();
        answer.write(0, &[0; 8]).unwrap();
        Self { function, answer }
    }

    fn launch<A>(&self, tools: &Tools, (blocks, threads): (u32, u32), mut arguments: A) {
        let grid = Grid { blocks, threads, shared_bytes: 0, is_early: false };
        // SAFETY: the arguments are those of the kernel, and what they name stays until the stream was waited for.
        unsafe { self.function.launch(&tools.raw, grid, (&raw mut arguments).cast()) }.unwrap();
    }

    /// Once the stream was waited for.
    fn answer(&self) -> [u32; 2] {
        let mut words = [0; 8];
        self.answer.read(0, &mut words).unwrap();
        [0, 4].map(|at| u32::from_le_bytes(words[at..at + 4].try_into().unwrap()))
    }
}

fn symmetric<T: Element>(rank: &Communicator, count: usize) -> Symmetric<T> {
    rank.window::<T>(count, Memory::Device).unwrap().into_symmetric(rank).unwrap()
}

fn end<T: Element>(rank: Communicator, shared: Symmetric<T>) {
    rank.barrier().unwrap();
    shared.close(&rank).unwrap();
    rank.destroy().unwrap();
}

#[test]
fn kernels_exchange_packets_and_signals_for_many_rounds() {
    for ranks in [1, 2, 3, 5] {
        on_threads(ranks, |rank, tools| {
            let shared = symmetric::<u8>(&rank, 2 * ranks * (256 * 16 + 8));
            let kernel = Kernel::new(tools, EXAMPLE, "exchange");
            // Later launches go on where the first one ended.
            for (first_round, rounds) in [(1, 1), (2, 3000), (3002, 777)] {
                let view = shared.device_view().unwrap();
                rank.barrier().unwrap();
                let rounds_done = kernel.answer.address();
                kernel.launch(tools, (1, 256), Exchange { shared: view, rounds_done, first_round, rounds });
                tools.raw.synchronize().unwrap();
                shared.check().unwrap();
                assert_eq!(kernel.answer(), [rounds, 0], "rank {} of {ranks}", rank.rank());
            }
            assert_eq!(shared.signal_value(ranks - 1), Ok(3778));
            end(rank, shared);
        });
    }
}

#[test]
fn the_host_reads_writes_and_signals_all_copies() {
    const STRETCH: usize = 1003;
    for ranks in [1, 2, 3] {
        on_threads(ranks, |rank, _| {
            let (me, shared) = (rank.rank(), symmetric::<u8>(&rank, ranks * STRETCH));
            let content = |from: usize, to: usize, round: u32| {
                let seed = (from * 31 + to * 7 + round as usize * 13) as u8;
                (0..STRETCH).map(|at| (at as u8).wrapping_mul(5) ^ seed).collect::<Vec<_>>()
            };
            for round in 1..=20 {
                for to in 0..ranks {
                    shared.write(to, me * STRETCH, &content(me, to, round)).unwrap();
                    shared.signal(to, me, round).unwrap();
                }
                let mut got = vec![0; STRETCH];
                for from in 0..ranks {
                    shared.wait_signal(from, round, LONG).unwrap();
                    shared.read(me, from * STRETCH, &mut got).unwrap();
                    assert!(got == content(from, me, round), "round {round}, from {from} to {me}");
                    shared.read(from, me * STRETCH, &mut got).unwrap();
                    assert!(got == content(me, from, round), "round {round}, of {me} at {from}");
                }
                rank.barrier().unwrap();
            }
            end(rank, shared);
        });
    }
}

#[test]
fn a_window_keeps_its_content_and_its_signals_lie_outside() {
    on_threads(2, |rank, _| {
        // As long as pages are: the signals lie right behind.
        let shared = symmetric::<u64>(&rank, (2 << 20) / 8);
        let last = shared.len() - 1;
        let mut got = [7; 2];
        shared.read(1 - rank.rank(), last - 1, &mut got).unwrap();
        assert_eq!((got, shared.signal_value(63)), ([0; 2], Ok(0)));
        rank.barrier().unwrap();
        for slot in 0..64 {
            shared.signal(1 - rank.rank(), slot, u32::MAX).unwrap();
        }
        shared.write(1 - rank.rank(), last, &[u64::MAX]).unwrap();
        rank.barrier().unwrap();
        shared.read(rank.rank(), last - 1, &mut got).unwrap();
        assert_eq!((got, shared.signal_value(0)), ([0, u64::MAX], Ok(u32::MAX)));
        assert_ne!(shared.address(0), shared.address(1));
        end(rank, shared);
    });
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_happens() {
    on_threads(2, |rank, _| {
        let shared = symmetric::<u16>(&rank, 10);
        let complaint = |error: Error| match error {
            Error::Argument { what, expected, got, .. } => (what, expected, got),
            error => panic!("{error}"),
        };
        let mut two = [7; 2];
        let (what, expected, got) = complaint(shared.read(0, 9, &mut two).unwrap_err());
        assert_eq!((what, expected.as_str(), got.as_str()), ("range", "within 10 elements", "2 from 9"));
        assert_eq!(complaint(shared.write(1, usize::MAX, &two).unwrap_err()).0, "range");
        assert_eq!(complaint(shared.write(2, 0, &two).unwrap_err()).0, "peer");
        for error in [
            shared.signal(1, 64, 1).unwrap_err(),
            shared.wait_signal(64, 1, LONG).unwrap_err(),
            shared.signal_value(usize::MAX).unwrap_err(),
        ] {
            assert_eq!(complaint(error).0, "slot");
        }
        shared.read(0, 10, &mut []).unwrap();
        assert_eq!(two, [7; 2]);
        let on_host = rank.window::<u8>(10, Memory::Host).unwrap().into_symmetric(&rank).unwrap();
        let error = on_host.device_view().unwrap_err();
        assert!(matches!(error, Error::Place { call: "device_view", .. }), "{error}");
        // It may go without being closed: the communicator keeps its memory.
        drop(shared);
        rank.barrier().unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn host_and_kernels_signal_each_other() {
    const COUNT: usize = 5000;
    for ranks in [1, 2, 3] {
        on_threads(ranks, |rank, tools| {
            let (me, shared) = (rank.rank(), symmetric::<u32>(&rank, 2 * COUNT));
            let kernel = Kernel::new(tools, TESTS, "pass_on");
            for round in 1..=10u32 {
                let numbers =
                    |rank: usize| (0..COUNT as u32).map(move |at| at * 3 + round + rank as u32 * 1000);
                rank.barrier().unwrap();
                let (shared_view, answer) = (shared.device_view().unwrap(), kernel.answer.address());
                kernel.launch(tools, (1, 256), One { shared: shared_view, answer, slot: 3, value: round });
                // While it waits: the host's accesses wait for no kernel.
                shared.write(me, 0, &numbers(me).collect::<Vec<_>>()).unwrap();
                shared.signal(me, 3, round).unwrap();
                shared.wait_signal(4, round, LONG).unwrap();
                let mut got = vec![0; COUNT];
                shared.read(me, COUNT, &mut got).unwrap();
                let before = (me + ranks - 1) % ranks;
                assert!(got.iter().copied().eq(numbers(before).map(|number| number + 1)), "{round} at {me}");
                tools.raw.synchronize().unwrap();
                shared.check().unwrap();
            }
            end(rank, shared);
        });
    }
}

#[test]
fn signals_come_in_the_order_of_a_stream_and_of_a_graph() {
    const COUNT: usize = 1 << 20;
    on_threads(2, |rank, tools| {
        let (me, peer, shared) = (rank.rank(), 1 - rank.rank(), symmetric::<u8>(&rank, COUNT));
        let copy = |value: u32| {
            // SAFETY: both sides are as long, and stay until the stream was waited for.
            unsafe {
                tools.raw.fill(tools.staging.address(), value as u8, COUNT).unwrap();
                tools.raw.copy(shared.address(peer).unwrap(), tools.staging.address(), COUNT).unwrap();
            }
            shared.signal_on(&tools.stream, peer, 5, value).unwrap();
        };
        let check = |value: u32| {
            shared.wait_signal(5, value, LONG).unwrap();
            let mut got = vec![0; COUNT];
            shared.read(me, 0, &mut got).unwrap();
            assert!(got.iter().all(|byte| *byte == value as u8), "{value}");
            rank.barrier().unwrap();
        };
        for value in 1..=20 {
            copy(value);
            check(value);
        }
        tools.raw.begin_capture().unwrap();
        copy(21);
        let graph = tools.raw.end_capture().unwrap();
        assert_eq!(shared.signal_value(5), Ok(20));
        rank.barrier().unwrap();
        graph.launch(&tools.raw).unwrap();
        check(21);
        tools.raw.synchronize().unwrap();
        drop(graph);
        let on_host = rank.window::<u8>(10, Memory::Host).unwrap().into_symmetric(&rank).unwrap();
        let error = on_host.signal_on(&tools.stream, peer, 0, 1).unwrap_err();
        assert!(matches!(error, Error::Place { call: "signal_on", .. }), "{error}");
        on_host.signal_on(&Stream::host(), me, 0, 7).unwrap();
        assert_eq!(on_host.signal_value(0), Ok(7));
        end(rank, shared);
    });
}

#[test]
fn a_graph_keeps_what_its_kernels_touch_when_all_else_is_gone() {
    on_threads(2, |rank, tools| {
        let shared = symmetric::<u32>(&rank, 1000);
        let kernel = Kernel::new(tools, TESTS, "wait_each");
        let view = shared.device_view().unwrap();
        rank.barrier().unwrap();
        tools.raw.begin_capture().unwrap();
        shared.signal_on(&tools.stream, rank.rank(), 2, 1).unwrap();
        let answer = kernel.answer.address();
        kernel.launch(tools, (2, 64), One { shared: view, answer, slot: 1, value: 1 });
        let graph = tools.raw.end_capture().unwrap();
        // Others must not wait for a device while a stream of it is captured.
        rank.barrier().unwrap();
        drop((rank, shared));
        // Whoever gives memory back has done so.
        std::thread::sleep(Duration::from_secs(1));
        graph.launch(&tools.raw).unwrap();
        tools.raw.synchronize().unwrap();
        assert_eq!(kernel.answer(), [0, 2 * 64]);
    });
}

#[test]
fn waits_in_vain_end_by_their_patience_and_are_told_once() {
    on_threads(2, |rank, tools| {
        let shared = symmetric::<u32>(&rank, 1000);
        let kernels = ["wait_each", "receive_each"].map(|name| Kernel::new(tools, TESTS, name));
        let patience = Duration::from_millis(200);
        let view = shared.device_view().unwrap().with_patience(Some(patience));
        shared.signal(1 - rank.rank(), 9, 5).unwrap();
        shared.wait_signal(9, 5, LONG).unwrap();
        rank.barrier().unwrap();
        for kernel in &kernels {
            let start = Instant::now();
            let answer = kernel.answer.address();
            kernel.launch(tools, (4, 96), One { shared: view, answer, slot: 9, value: 7 });
            tools.raw.synchronize().unwrap();
            assert!(start.elapsed() >= patience && start.elapsed() < patience * 10, "{:?}", start.elapsed());
            assert_eq!(kernel.answer(), [0, 4 * 96]);
        }
        let error = shared.check().unwrap_err();
        let Error::Signal { slot: 9, expected: 7, got: 5, waited, .. } = error else { panic!("{error}") };
        assert!(waited >= patience && waited < patience * 10, "{waited:?}");
        let error = shared.check().unwrap_err();
        assert!(matches!(error, Error::Packet { place: 0, expected: 7, got: 0, .. }), "{error}");
        shared.check().unwrap();
        // Nothing has failed: what comes later is seen.
        shared.signal(1 - rank.rank(), 9, 7).unwrap();
        kernels[0].launch(
            tools,
            (4, 96),
            One { shared: view, answer: kernels[0].answer.address(), slot: 9, value: 7 },
        );
        tools.raw.synchronize().unwrap();
        assert_eq!(kernels[0].answer(), [4 * 96, 4 * 96]);
        let error = shared.wait_signal(9, 8, Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, Error::Signal { slot: 9, expected: 8, got: 7, .. }), "{error}");
        end(rank, shared);
    });
}

#[test]
fn an_abort_ends_waits_of_kernels_and_of_the_host() {
    let aborted = OnceLock::new();
    on_threads(3, |rank, tools| {
        let shared = symmetric::<u32>(&rank, 1000);
        let kernel = Kernel::new(tools, TESTS, "wait_each");
        let view = shared.device_view().unwrap();
        rank.barrier().unwrap();
        let answer = kernel.answer.address();
        kernel.launch(tools, (8, 128), One { shared: view, answer, slot: 1, value: 1 });
        match rank.rank() {
            0 => {
                std::thread::sleep(Duration::from_millis(100));
                aborted.set(Instant::now()).unwrap();
                rank.observer().abort("enough");
            }
            1 => {
                let error = shared.wait_signal(2, 1, LONG).unwrap_err();
                assert_eq!(
                    error.to_string(),
                    "rank 0 aborted the communicator during wait_signal on slot 2: enough"
                );
            }
            _ => {}
        }
        tools.raw.synchronize().unwrap();
        let took = aborted.get().unwrap().elapsed();
        assert!(took < Duration::from_millis(100), "{took:?}");
        // Its context works, and everybody tells the first cause.
        assert_eq!(kernel.answer(), [0, 8 * 128]);
        for error in [
            shared.check().unwrap_err(),
            shared.read(0, 0, &mut [0]).unwrap_err(),
            shared.write(0, 0, &[0]).unwrap_err(),
            shared.signal(0, 0, 1).unwrap_err(),
        ] {
            assert!(matches!(error, Error::Aborted { rank: 0, .. }), "{error}");
        }
    });
}

#[test]
fn memory_goes_when_the_last_kernel_on_it_has_gone_whoever_is_dropped_first() {
    for drops_the_communicator_first in [true, false] {
        on_threads(2, |rank, tools| {
            let shared = symmetric::<u32>(&rank, 1000);
            let kernel = Kernel::new(tools, TESTS, "wait_each");
            let view = shared.device_view().unwrap();
            rank.barrier().unwrap();
            let answer = kernel.answer.address();
            kernel.launch(tools, (2, 64), One { shared: view, answer, slot: 1, value: 1 });
            if drops_the_communicator_first {
                drop(rank);
                drop(shared);
            } else {
                drop(shared);
                drop(rank);
            }
            tools.raw.synchronize().unwrap();
            assert_eq!(kernel.answer(), [0, 2 * 64]);
        });
    }
}
