//! All-gathers and broadcasts by copy engines: chunks of all kinds, between other forms, in graphs, where ranks do not come or
//! leave in the middle, and longer than any queue.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use unisono::cuda::{DeviceBuffer, Graph, Stream as CudaStream};
use unisono::{Buf, BufMut, Builder, DType, Error, Form, Operations, ReduceOp, Result, Stream};
use unisono_core::device::Wish;

use crate::numbers::{Random, seed};
use crate::world::{Case, Operation, PATIENCE, World, devices, on_threads};

/// What a test asks for: `engine`, perhaps with lanes and vectors of a chunk.
fn asked(text: &str) -> impl FnOnce(Builder) -> Builder {
    let wish: Wish = text.parse().unwrap();
    assert_eq!(wish.form, Form::Engine);
    move |builder| builder.gpu_wish(wish)
}

/// A world with a device for each of as many ranks as there are devices, at most `most`; none, and said so, where there are not two.
fn world(most: usize, configure: impl FnOnce(Builder) -> Builder) -> Option<World> {
    let devices = devices();
    if devices.len() < 2 {
        eprintln!("SKIPPED: two GPUs are needed");
        return None;
    }
    let ranks = most.min(devices.len());
    Some(World::new(ranks, &devices, configure))
}

fn form_of(world: &World, case: &Case) -> Form {
    let bytes = case.most_bytes(world.ranks.len());
    world.ranks[0].gpu_choice(case.kind(0), bytes, case.dtype.size()).unwrap().form
}

#[test]
fn chunks_of_every_kind_arrive_in_lanes_of_every_number() {
    // A chunk is 1,024 bytes, or 128.
    for (text, counts) in [
        ("engine:1:64", &[1, 1023, 1024, 1025, 2048, 2049, 9000][..]),
        ("engine:2:64", &[1, 128, 129, 1024, 2047, 4096, 4097, 8193, 20_001]),
        ("engine:3:64", &[1, 127, 1024, 3072, 3073, 6144, 6145, 12_289, 30_000]),
        ("engine:8:8", &[1, 128, 129, 1024, 1025, 2048, 2049, 4000]),
        ("engine", &[1, 128, 1_000_003, 25_165_825]),
    ] {
        for most in [2, 3, 8] {
            let Some(world) = world(most, asked(text)) else { return };
            let ranks = world.ranks.len();
            if most < 8 && ranks < most {
                world.end();
                continue;
            }
            for &count in counts {
                let is_large = count > 1 << 20;
                for (is_in_place, offset) in [(false, 1), (true, 0), (false, 0), (true, 3)] {
                    // What takes long to compare is compared once.
                    if is_large && (is_in_place || offset == 0 || most < 8) {
                        continue;
                    }
                    let case = Case { dtype: DType::U8, count, is_in_place, offset, ..Case::default() };
                    let gathered = Case { operation: Operation::AllGather, ..case };
                    assert_eq!(form_of(&world, &gathered), Form::Engine);
                    world.check(&gathered, Some(Form::Engine));
                    for root in if is_large { ranks - 1..ranks } else { 0..ranks } {
                        let sent = Case { operation: Operation::Broadcast, root, ..case };
                        world.check(&sent, Some(Form::Engine));
                    }
                }
            }
            world.end();
        }
    }
}

#[test]
fn ranks_that_share_a_device_or_meet_in_host_memory_take_another_form() {
    let devices = devices();
    if devices.is_empty() {
        return;
    }
    for (devices, peer_access) in [(&devices[..1], true), (&devices[..], false)] {
        let world = World::new(2, devices, |builder| asked("engine")(builder.peer_access(peer_access)));
        for operation in [Operation::AllGather, Operation::Broadcast] {
            for count in [1000, 3 << 20] {
                let case = Case { operation, dtype: DType::U8, count, ..Case::default() };
                assert_ne!(form_of(&world, &case), Form::Engine);
                world.check(&case, None);
            }
        }
        world.end();
    }
}

#[test]
fn calls_of_all_forms_take_turns_in_any_order_and_over_the_wrap_of_epochs() {
    let mut random = Random::new(seed());
    for epoch in [0, 0x7fff_ffd0, 0xffff_ffd0] {
        let Some(world) = world(8, |builder| asked("engine:2:512")(builder.first_epoch(epoch))) else {
            return;
        };
        for _ in 0..100 {
            let count = [1, 1000, 70_000, 600_000][random.below(4) as usize];
            let operation = [
                Operation::AllGather,
                Operation::Broadcast,
                Operation::AllReduce,
                Operation::AllToAll,
                Operation::ReduceScatter,
            ][random.below(5) as usize];
            let is_in_place = random.below(2) == 0 && operation != Operation::AllToAll;
            let root = random.below(world.ranks.len() as u64) as usize;
            let case = Case {
                operation,
                dtype: DType::I32,
                count: count / 8 + 1,
                root,
                is_in_place,
                ..Case::default()
            };
            world.check(&case, None);
        }
        world.end();
    }
}

/// Buffers of a rank in the tests of graphs.
struct Chain {
    /// What is summed over all ranks, and then gathered.
    sums: DeviceBuffer,
    gathered: DeviceBuffer,
    /// What the last rank sends to all.
    sent: DeviceBuffer,
}

const COUNT: usize = 12_000;

impl Chain {
    fn new(world: &World, rank: usize) -> Self {
        let filled = |count: usize, value: i32| {
            let mut buffer = DeviceBuffer::new(&world.devices[rank], 4 * count).unwrap();
            buffer.write(0, &value.to_le_bytes().repeat(count)).unwrap();
            buffer
        };
        let ranks = world.ranks.len();
        Self { sums: filled(COUNT, 1), gathered: filled(ranks * COUNT, -1), sent: filled(COUNT, rank as i32) }
    }

    /// Sums, gathers the sums, and sends what the last rank has.
    fn run(&self, world: &World, rank: usize, stream: &Stream) -> Result<()> {
        let ordinal = world.devices[rank].ordinal();
        let on = world.ranks[rank].on(stream);
        // SAFETY: tests wait for their streams before the buffers go.
        let all = |buffer: &DeviceBuffer| unsafe {
            BufMut::<i32>::cuda(buffer.address(), buffer.bytes() / 4, ordinal)
        };
        // SAFETY: as above.
        let sums = unsafe { Buf::<i32>::cuda(self.sums.address(), COUNT, ordinal) };
        on.all_reduce(all(&self.sums), ReduceOp::Sum)?;
        on.all_gather_into(sums, all(&self.gathered))?;
        on.broadcast(all(&self.sent), world.ranks.len() - 1)
    }

    /// After so many runs.
    fn check(&self, ranks: usize, runs: u32) {
        let sum = (ranks as i32).wrapping_pow(runs);
        for (buffer, value) in [(&self.sums, sum), (&self.gathered, sum), (&self.sent, ranks as i32 - 1)] {
            let mut bytes = vec![0; buffer.bytes()];
            buffer.read(0, &mut bytes).unwrap();
            let wrong = bytes.as_chunks().0.iter().position(|bytes| i32::from_le_bytes(*bytes) != value);
            assert_eq!(wrong, None, "{runs} runs of {ranks} ranks");
        }
    }
}

fn captured(world: &World, rank: usize, chain: &Chain, runs: usize) -> Graph {
    let stream = &world.raw_streams[rank];
    stream.begin_capture().unwrap();
    for _ in 0..runs {
        chain.run(world, rank, &world.streams[rank]).unwrap();
    }
    stream.end_capture().unwrap()
}

#[test]
fn graphs_with_copies_are_replayed_between_eager_calls() {
    let prepared = |builder: Builder| builder.prepare(DType::I32, ReduceOp::Sum).unwrap();
    for text in ["engine", "engine:1:512", "engine:4:256"] {
        let Some(world) = world(8, |builder| asked(text)(prepared(builder))) else { return };
        let ranks = world.ranks.len();
        let chains: Vec<Chain> = (0..ranks).map(|rank| Chain::new(&world, rank)).collect();
        let graphs: Vec<Graph> =
            chains.iter().enumerate().map(|(rank, chain)| captured(&world, rank, chain, 2)).collect();
        let mut runs = 0;
        for round in 0..20 {
            for (rank, chain) in chains.iter().enumerate() {
                graphs[rank].launch(&world.raw_streams[rank]).unwrap();
                if round % 3 == 0 {
                    chain.run(&world, rank, &world.streams[rank]).unwrap();
                }
            }
            runs += if round % 3 == 0 { 3 } else { 2 };
            if round % 5 == 4 {
                world.raw_streams.iter().for_each(|stream| stream.synchronize().unwrap());
                for (rank, chain) in chains.iter().enumerate() {
                    world.ranks[rank].check().unwrap();
                    chain.check(ranks, runs);
                }
            }
        }
        drop(graphs);
        world.end();
    }
}

/// While one stream is captured, calls on another one are as ever: a capture takes no streams of the communicator.
#[test]
fn eager_calls_go_on_while_another_stream_is_captured() {
    let prepared = |builder: Builder| builder.prepare(DType::I32, ReduceOp::Sum).unwrap();
    let Some(world) = world(8, |builder| asked("engine:2:256")(prepared(builder))) else { return };
    let ranks = world.ranks.len();
    let chains: Vec<Chain> = (0..ranks).map(|rank| Chain::new(&world, rank)).collect();
    let others: Vec<CudaStream> =
        world.devices.iter().map(|device| CudaStream::new(device).unwrap()).collect();
    let run = |rank: usize, is_captured: bool| {
        // SAFETY: the raw stream lives as long as this one.
        let other = unsafe { Stream::cuda(others[rank].raw(), others[rank].device().ordinal()) }.unwrap();
        let stream = if is_captured { &other } else { &world.streams[rank] };
        chains[rank].run(&world, rank, stream).unwrap();
    };
    // All ranks make the eager call before any waits for the device, as the end of a capture may.
    for (rank, other) in others.iter().enumerate() {
        other.begin_capture().unwrap();
        run(rank, true);
    }
    (0..ranks).for_each(|rank| run(rank, false));
    let end = |rank: usize| {
        run(rank, true);
        others[rank].end_capture().unwrap()
    };
    let graphs: Vec<Graph> = (0..ranks).map(end).collect();
    world.raw_streams.iter().for_each(|stream| stream.synchronize().unwrap());
    chains.iter().for_each(|chain| chain.check(ranks, 1));
    graphs.iter().zip(&others).for_each(|(graph, stream)| graph.launch(stream).unwrap());
    others.iter().for_each(|stream| stream.synchronize().unwrap());
    for (rank, chain) in chains.iter().enumerate() {
        world.ranks[rank].check().unwrap();
        chain.check(ranks, 3);
    }
    drop(graphs);
    world.end();
}

#[test]
fn the_recorder_tells_one_call_each_and_the_form() {
    let Some(world) = world(2, asked("engine:2:256")) else { return };
    for operation in [Operation::AllGather, Operation::Broadcast] {
        world.check(
            &Case { operation, dtype: DType::U8, count: 300_000, ..Case::default() },
            Some(Form::Engine),
        );
    }
    for rank in 0..2 {
        let calls = world.ranks[0].observer().gpu_calls(rank).unwrap();
        let texts: Vec<String> = calls.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["all_gather #1 (u8, 300000)", "broadcast #2 (u8, 300000, root 0)"]);
        for call in &calls {
            assert_eq!(call.way(), "engine");
            let (met, ended) = (call.met.expect("both came"), call.ended.expect("it is done"));
            assert!(!call.is_open() && call.begun >= met && met >= ended, "{call:?}");
        }
    }
    world.end();
}

#[test]
fn calls_that_differ_are_named_and_nothing_hangs() {
    let Some(world) = world(2, asked("engine")) else { return };
    let chains: Vec<Chain> = (0..2).map(|rank| Chain::new(&world, rank)).collect();
    for (rank, chain) in chains.iter().enumerate() {
        // SAFETY: the buffers live until the streams were waited for.
        let x = unsafe { BufMut::<i32>::cuda(chain.gathered.address(), 1000, world.devices[rank].ordinal()) };
        let on = world.ranks[rank].on(&world.streams[rank]);
        if rank == 0 { on.all_gather(x) } else { on.broadcast(x, 1) }.unwrap();
    }
    world.raw_streams.iter().for_each(|stream| stream.synchronize().unwrap());
    for rank in &world.ranks {
        let Err(Error::Mismatch { left, right }) = rank.check() else { panic!("{:?}", rank.check()) };
        let mut both = [left, right];
        both.sort();
        assert_eq!(
            both,
            ["all_gather #1 on rank 0 (i32, 500)", "broadcast #1 on rank 1 (i32, 1000, root 1)"]
        );
    }
}

#[test]
fn a_rank_that_does_not_come_to_a_call_is_named_when_patience_ends() {
    let patience = Duration::from_millis(1500);
    let Some(world) = world(2, |builder| asked("engine")(builder).timeout(Some(patience))) else { return };
    let chain = Chain::new(&world, 0);
    // SAFETY: the buffer lives until the stream was waited for.
    let x = unsafe { BufMut::<i32>::cuda(chain.gathered.address(), 1000, world.devices[0].ordinal()) };
    world.ranks[0].on(&world.streams[0]).all_gather(x).unwrap();
    let start = Instant::now();
    world.raw_streams[0].synchronize().unwrap();
    assert!(start.elapsed() < 2 * patience, "{:?}", start.elapsed());
    let error = world.ranks[0].check().unwrap_err();
    let Error::Timeout { rank: 0, missing, .. } = &error else { panic!("{error}") };
    assert!(missing.len() == 1 && missing[0].starts_with("rank 1"), "{error}");
}

/// Ranks gather without end until one of them aborts, most likely amid the copies.
#[test]
fn an_abort_amid_copies_ends_the_call_on_all_ranks() {
    let count = devices().len();
    if count < 2 {
        eprintln!("SKIPPED: two GPUs are needed");
        return;
    }
    const PART: usize = 48 << 20;
    for after_ms in [30, 61] {
        let (aborted, ranks) = (Mutex::new(None), count);
        on_threads(
            ranks,
            |builder| asked("engine")(builder.timeout(PATIENCE)),
            |_, ordinal| {
                let device = unisono::cuda::Device::new(ordinal).unwrap();
                let buffer = DeviceBuffer::new(&device, ranks * PART + 64).unwrap();
                let stream = CudaStream::new(&device).unwrap();
                // SAFETY: the buffer outlives the stream's work.
                unsafe { stream.fill(buffer.address(), 0x77, buffer.bytes()) }.unwrap();
                stream.synchronize().unwrap();
                (buffer, stream)
            },
            |rank, (buffer, raw)| {
                let ordinal = buffer.device().ordinal();
                // SAFETY: the raw stream lives as long as this one.
                let stream = unsafe { Stream::cuda(raw.raw(), ordinal) }.unwrap();
                let observer = rank.observer();
                let start = Instant::now();
                let error = std::thread::scope(|scope| {
                    if rank.rank() == 0 {
                        scope.spawn(|| {
                            std::thread::sleep(Duration::from_millis(after_ms));
                            *aborted.lock().unwrap() = Some(Instant::now());
                            observer.abort("enough");
                        });
                    }
                    loop {
                        assert!(start.elapsed() < Duration::from_secs(10), "nobody tells of the abort");
                        let enqueued = (0..3).try_for_each(|_| {
                            // SAFETY: the buffer outlives the stream's work, and only the stream touches it.
                            let x = unsafe { BufMut::<u8>::cuda(buffer.address(), ranks * PART, ordinal) };
                            rank.on(&stream).all_gather(x)
                        });
                        raw.synchronize().unwrap();
                        if let Err(error) = enqueued.and_then(|()| rank.check()) {
                            break error;
                        }
                    }
                });
                let since = aborted.lock().unwrap().unwrap().elapsed();
                assert!(since < Duration::from_secs(1), "{since:?}");
                assert!(
                    matches!(&error, Error::Aborted { rank: 0, reason, .. } if reason == "enough"),
                    "{error}"
                );
                // Nobody touched our part, nor what lies behind the output.
                for (at, bytes) in [(rank.rank() * PART, PART), (ranks * PART, 64)] {
                    let mut got = vec![0; bytes];
                    buffer.read(at, &mut got).unwrap();
                    assert!(got.iter().all(|byte| *byte == 0x77), "rank {}", rank.rank());
                }
            },
        );
    }
    // The same devices serve another world at once.
    let Some(next) = world(8, asked("engine")) else { return };
    next.check(
        &Case { operation: Operation::AllGather, dtype: DType::U8, count: 1 << 20, ..Case::default() },
        Some(Form::Engine),
    );
    next.end();
}

/// More than 4 GiB, and more steps than a queue of a device holds: who enqueues them waits for room meanwhile.
#[test]
fn a_call_longer_than_a_queue_arrives() {
    const COUNT: usize = (4 << 30) + 12_345;
    const PERIOD: usize = 1_000_003;
    if devices().len() < 2 {
        eprintln!("SKIPPED: two GPUs are needed");
        return;
    }
    let mut random = Random::new(seed());
    let pattern: Vec<u8> = (0..PERIOD.div_ceil(8)).flat_map(|_| random.next().to_le_bytes()).collect();
    let pattern = &pattern[..PERIOD];
    on_threads(
        2,
        |builder| asked("engine")(builder.timeout(PATIENCE)),
        |rank, ordinal| {
            let device = unisono::cuda::Device::new(ordinal).unwrap();
            let mut buffer = DeviceBuffer::new(&device, COUNT).unwrap();
            let stream = CudaStream::new(&device).unwrap();
            if rank == 0 {
                buffer.write(0, pattern).unwrap();
            }
            let mut filled = PERIOD;
            while rank == 0 && filled < COUNT {
                // SAFETY: all lie in the buffer, which outlives the stream's work.
                unsafe {
                    let bytes = filled.min(COUNT - filled);
                    stream.copy(buffer.address() + filled as u64, buffer.address(), bytes).unwrap();
                }
                filled *= 2;
            }
            stream.synchronize().unwrap();
            (buffer, stream)
        },
        |rank, (buffer, raw)| {
            let ordinal = buffer.device().ordinal();
            // SAFETY: the raw stream lives as long as this one, the buffer as long as its work.
            let (stream, x) = unsafe {
                (
                    Stream::cuda(raw.raw(), ordinal).unwrap(),
                    BufMut::<u8>::cuda(buffer.address(), COUNT, ordinal),
                )
            };
            rank.on(&stream).broadcast(x, 0).unwrap();
            raw.synchronize().unwrap();
            rank.check().unwrap();
            let mut got = vec![0; 64 << 10];
            // What is read last crosses 4 GiB.
            let last = COUNT - got.len();
            for at in (0..last).step_by((128 << 20) + 77_777).chain([last]) {
                buffer.read(at, &mut got).unwrap();
                let wrong = got.iter().enumerate().find(|(i, byte)| **byte != pattern[(at + i) % PERIOD]);
                assert_eq!(wrong, None, "rank {} from byte {at} on", rank.rank());
            }
            rank.destroy().unwrap();
        },
    );
}
