//! Communicators that are made of others on GPUs: groups that sum while others do, duplicates on other streams, and what is left
//! of a world. Ranks are threads of one process here, or all of one thread.
//!
//! Where ranks share a device, nothing is allocated or freed on it between calls that wait for one another: buffers are there
//! before, results are looked at when all streams are done, and communicators end together.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use unisono::cuda::{Device, DeviceBuffer, Stream as CudaStream};
use unisono::{
    BufMut, Builder, Communicator, DType, Error, Kind, Memory, Operations, Place, RawBuffer, ReduceOp,
    Result, Stream, group,
};
use unisono_core::device::{Form, Link};

use crate::world::devices;

/// Elements of a part of a buffer, and how many parts there are.
const COUNT: usize = 200_000;
const PARTS: usize = 24;
/// The value of an element is so often what its rank contributes: fills write bytes.
const BYTES: i32 = 0x0101_0101;

fn configured(builder: Builder) -> Builder {
    builder.timeout(Some(Duration::from_secs(20))).prepare(DType::I32, ReduceOp::Sum).unwrap()
}

/// Where all ranks wait for each other, but not for ever: one of them may have failed.
struct Meeting {
    ranks: usize,
    come: Mutex<usize>,
    change: Condvar,
}

impl Meeting {
    fn new(ranks: usize) -> Self {
        Self { ranks, come: Mutex::new(0), change: Condvar::new() }
    }

    fn wait(&self) {
        let mut come = self.come.lock().unwrap();
        *come += 1;
        let all = come.next_multiple_of(self.ranks);
        self.change.notify_all();
        let late =
            self.change.wait_timeout_while(come, Duration::from_secs(60), |come| *come < all).unwrap().1;
        assert!(!late.timed_out(), "another rank does not come");
    }
}

/// What a rank works with, made before anybody calls anything.
struct Tools {
    rank: usize,
    ordinal: u32,
    streams: Vec<(CudaStream, Stream)>,
    buffer: DeviceBuffer,
    all: Arc<Meeting>,
}

impl Tools {
    fn new(rank: usize, ordinal: u32, all: Arc<Meeting>) -> Self {
        let device = Device::new(ordinal).unwrap();
        let stream = || {
            let raw = CudaStream::new(&device).unwrap();
            // SAFETY: the raw stream lies beside this one and lives as long.
            let stream = unsafe { Stream::cuda(raw.raw(), ordinal) }.unwrap();
            (raw, stream)
        };
        let streams = vec![stream(), stream()];
        let buffer = DeviceBuffer::new(&device, PARTS * COUNT * 4).unwrap();
        Self { rank, ordinal, streams, buffer, all }
    }

    /// The first `count` elements of a part.
    fn part(&self, part: usize, count: usize) -> BufMut<'static, i32> {
        let at = self.buffer.address() + (part * COUNT * 4) as u64;
        // SAFETY: the buffer stays until all streams were waited for, and each part is used by one call.
        unsafe { BufMut::cuda(at, count, self.ordinal) }
    }

    /// Puts a sum of what each rank has into a stream.
    fn sum(&self, on: &Communicator, stream: usize, part: usize, count: usize) -> Result<()> {
        let (raw, stream) = &self.streams[stream];
        let at = self.buffer.address() + (part * COUNT * 4) as u64;
        // SAFETY: as above.
        unsafe { raw.fill(at, self.rank as u8 + 1, count * 4) }.unwrap();
        on.on(stream).all_reduce(self.part(part, count), ReduceOp::Sum)
    }

    /// Waits for our streams, and then for all ranks: from here on nothing waits on any device.
    fn wait(&self) {
        self.streams.iter().for_each(|(raw, _)| raw.synchronize().unwrap());
        self.all.wait();
    }

    /// What a part has is the sum of these ranks' shares.
    fn expect(&self, part: usize, count: usize, members: &[usize], what: &str) {
        let mut bytes = vec![0; count * 4];
        self.buffer.read(part * COUNT * 4, &mut bytes).unwrap();
        let expected = BYTES * members.iter().map(|member| *member as i32 + 1).sum::<i32>();
        let got = bytes.as_chunks().0.iter().map(|value| i32::from_le_bytes(*value));
        let wrong = got.enumerate().find(|(_, value)| *value != expected);
        assert_eq!(wrong, None, "{what}: part {part} of rank {}: {members:?}", self.rank);
    }
}

/// A thread for each of `ranks`, dealt to the devices in turn. Nothing happens without a device.
fn on_threads(
    ranks: usize,
    configure: impl FnOnce(Builder) -> Builder,
    work: impl Fn(Communicator, Tools) + Sync,
) {
    let devices = devices();
    if devices.is_empty() {
        return;
    }
    let chosen: Vec<u32> = (0..ranks).map(|rank| devices[rank % devices.len()]).collect();
    let communicators = configure(configured(Communicator::builder())).local(&chosen).unwrap();
    let all = Arc::new(Meeting::new(ranks));
    let tools = chosen.iter().enumerate().map(|(rank, ordinal)| Tools::new(rank, *ordinal, all.clone()));
    let tools: Vec<_> = tools.collect();
    std::thread::scope(|scope| {
        for (communicator, tools) in communicators.into_iter().zip(tools) {
            let work = &work;
            scope.spawn(move || work(communicator, tools));
        }
    });
}

/// Ends communicators that all ranks hold in the same order, some of them in groups.
fn end(communicators: impl IntoIterator<Item = Communicator>) {
    communicators.into_iter().for_each(|communicator| communicator.destroy().unwrap());
}

#[test]
fn halves_of_a_world_sum_at_the_same_time() {
    on_threads(
        4,
        |builder| builder,
        |world, tools| {
            let half = world.split(Some(world.rank() as u32 / 2), 0).unwrap().unwrap();
            assert_eq!((half.rank(), half.world_size()), (world.rank() % 2, 2));
            assert_eq!(half.device(), world.device());
            // The halves make different numbers of calls of different sizes.
            let which = world.rank() / 2;
            let (rounds, largest) = [(PARTS - 4, COUNT), (PARTS / 2, 7777)][which];
            let counts: Vec<usize> =
                (0..rounds).map(|round| [13, 4096, largest, 1000][round % 4].min(largest)).collect();
            for (part, count) in counts.iter().enumerate() {
                tools.sum(&half, 0, part, *count).unwrap();
            }
            tools.sum(&world, 1, PARTS - 1, COUNT).unwrap();
            tools.wait();
            half.check().unwrap();
            world.check().unwrap();
            for (part, count) in counts.iter().enumerate() {
                tools.expect(part, *count, &[2 * which, 2 * which + 1], "a half");
            }
            tools.expect(PARTS - 1, COUNT, &[0, 1, 2, 3], "the whole");
            end([half, world]);
        },
    );
}

#[test]
fn groups_of_groups_and_of_one_rank_work_on_their_devices() {
    on_threads(
        4,
        |builder| builder,
        |world, tools| {
            let rank = world.rank();
            // Backwards: ranks 2 and 0, and 3 and 1.
            let pair = world.split(Some(rank as u32 % 2), -(rank as i32)).unwrap().unwrap();
            assert_eq!(pair.rank(), 1 - rank / 2);
            let single = pair.split(Some(rank as u32), 0).unwrap().unwrap();
            let some = world.split((rank != 3).then_some(9), 0).unwrap();
            assert_eq!(some.is_some(), rank != 3);
            let members = [rank % 2, rank % 2 + 2];
            for round in 0..3 {
                tools.sum(&pair, 0, round, COUNT).unwrap();
                tools.sum(&single, 0, 3 + round, 500).unwrap();
                if let Some(some) = &some {
                    tools.sum(some, 0, 6 + round, 60_000).unwrap();
                }
            }
            tools.wait();
            for communicator in [&world, &pair, &single].into_iter().chain(&some) {
                communicator.check().unwrap();
                assert_eq!(communicator.device(), Some(tools.ordinal));
            }
            for round in 0..3 {
                tools.expect(round, COUNT, &members, "a pair");
                tools.expect(3 + round, 500, &[rank], "a single rank");
                if some.is_some() {
                    tools.expect(6 + round, 60_000, &[0, 1, 2], "three of four");
                }
            }
            tools.all.wait();
            end([single, pair].into_iter().chain(some).chain([world]));
        },
    );
}

#[test]
fn a_duplicate_works_on_another_stream_at_the_same_time_as_its_parent() {
    on_threads(
        2,
        |builder| builder,
        |world, tools| {
            let duplicate = world.duplicate().unwrap();
            for part in 0..PARTS / 2 {
                let count = [11, COUNT][part % 2];
                let one = || tools.sum(&world, 0, 2 * part, count).unwrap();
                let other = || tools.sum(&duplicate, 1, 2 * part + 1, count).unwrap();
                // In another order on the other rank.
                if world.rank() == part % 2 {
                    one();
                    other();
                } else {
                    other();
                    one();
                }
            }
            tools.wait();
            for part in 0..PARTS {
                tools.expect(part, [11, COUNT][part / 2 % 2], &[0, 1], "parent and duplicate");
            }
            world.check().unwrap();
            duplicate.check().unwrap();
            // Each has its own numbers, and recorder.
            let calls = duplicate.observer().gpu_calls(1 - world.rank()).unwrap();
            assert_eq!(calls.len(), PARTS / 2);
            assert_eq!(calls[0].to_string(), "all_reduce #1 (i32, 11, sum)");
            tools.all.wait();
            end([duplicate, world]);
        },
    );
}

#[test]
fn children_have_the_settings_of_their_parent_and_windows_of_their_own() {
    let forced = |builder: Builder| builder.gpu_algorithm(Form::TwoShot, 5).peer_access(false);
    on_threads(3, forced, |world, tools| {
        // Without a color for rank 1.
        let rank = world.rank();
        let child = world.split((rank != 1).then_some(0), 0).unwrap();
        if let Some(child) = &child {
            let kind = Kind::AllReduce { op: ReduceOp::Sum };
            let choice = child.gpu_choice(kind, 4000, 4).unwrap();
            assert_eq!((choice.form, choice.blocks), (Form::TwoShot, 5));
            assert_eq!(child.gpu_link(), Some(Link::Host));
            assert!(!child.observer().explain().to_string().is_empty());
            let mut window = child.window::<i32>(5000, Memory::Pinned).unwrap();
            window.lend().unwrap().fill(rank as i32 + 1);
            child.on(&tools.streams[0].1).all_reduce(&mut window, ReduceOp::Sum).unwrap();
            assert!(window.lend().unwrap().iter().all(|value| *value == 1 + 3));
            window.close(child).unwrap();
        }
        tools.all.wait();
        tools.sum(&world, 1, 0, 1000).unwrap();
        tools.wait();
        tools.expect(0, 1000, &[0, 1, 2], "the parent");
        tools.all.wait();
        end(child.into_iter().chain([world]));
    });
}

#[test]
fn a_group_that_cannot_be_made_fails_on_all_ranks_and_the_parent_works_on() {
    on_threads(
        3,
        |builder| builder.refused_size(2),
        |world, tools| {
            // Rank 0 and 2 are a group that fails on its rank 0, which is our rank 2; rank 1 would be well.
            let rank = world.rank();
            let error = world.split(Some(rank as u32 % 2), -(rank as i32)).unwrap_err();
            let Error::Device { rank: told, reason } = &error else { panic!("{error}") };
            assert_eq!(*told, rank);
            let expected = if rank == 2 { "a test wants it so" } else { "another rank" };
            assert!(reason.starts_with(expected), "{error}");
            let duplicate = world.duplicate().unwrap();
            tools.sum(&world, 0, 0, COUNT).unwrap();
            tools.sum(&duplicate, 0, 1, COUNT).unwrap();
            tools.wait();
            tools.expect(0, COUNT, &[0, 1, 2], "the parent");
            tools.expect(1, COUNT, &[0, 1, 2], "a duplicate");
            world.check().unwrap();
            tools.all.wait();
            end([duplicate, world]);
        },
    );
}

#[test]
fn one_thread_splits_all_its_ranks_in_a_group() {
    let devices = devices();
    if devices.is_empty() {
        return;
    }
    let chosen: Vec<u32> = (0..4).map(|rank| devices[rank % devices.len()]).collect();
    let ranks = configured(Communicator::builder()).local(&chosen).unwrap();
    let alone = Arc::new(Meeting::new(1));
    let tools = chosen.iter().enumerate().map(|(rank, ordinal)| Tools::new(rank, *ordinal, alone.clone()));
    let (tools, host): (Vec<_>, _) = (tools.collect(), Stream::host());
    // Calls of the parent are under way meanwhile.
    for (rank, tools) in ranks.iter().zip(&tools) {
        tools.sum(rank, 0, 0, COUNT).unwrap();
    }
    let promised = group(|group| {
        let ask = |rank| group.on(rank, &host).split(Some(Communicator::rank(rank) as u32 / 2), 0);
        ranks.iter().map(ask).collect::<Result<Vec<_>>>()
    });
    let halves: Vec<Communicator> =
        promised.unwrap().into_iter().map(|half| half.take().unwrap().unwrap()).collect();
    for round in 1..5 {
        for (half, tools) in halves.iter().zip(&tools) {
            tools.sum(half, 0, round, [99, COUNT][round % 2]).unwrap();
        }
    }
    for tools in &tools {
        tools.streams.iter().for_each(|(raw, _)| raw.synchronize().unwrap());
    }
    for (rank, tools) in tools.iter().enumerate() {
        tools.expect(0, COUNT, &[0, 1, 2, 3], "the parent");
        for round in 1..5 {
            let members = [rank / 2 * 2, rank / 2 * 2 + 1];
            tools.expect(round, [99, COUNT][round % 2], &members, "a half");
        }
    }
    group(|group| {
        halves.into_iter().chain(ranks).for_each(|communicator| group.destroy(communicator));
        Ok(())
    })
    .unwrap();
}

/// What belongs to the first generation says so.
fn expect_outdated(error: Error, window: u64) {
    assert_eq!(error, Error::Generation { window, generation: 1 });
}

#[test]
fn who_is_left_goes_on_on_its_device_and_windows_and_registrations_are_of_the_past() {
    on_threads(
        3,
        |builder| builder,
        |world, tools| {
            let rank = world.rank();
            let reaches = world.gpu_link() == Some(Link::Device);
            let mut pinned = world.window::<i32>(1000, Memory::Pinned).unwrap();
            let mut window = reaches.then(|| world.window::<i32>(1000, Memory::Device).unwrap());
            let registration = reaches.then(|| {
                let place = Place::Cuda { ordinal: tools.ordinal };
                let raw = RawBuffer { ptr: tools.buffer.address(), count: COUNT, dtype: DType::I32, place };
                // SAFETY: the buffer stays until all ranks are done.
                unsafe { world.register(raw) }.unwrap()
            });
            tools.sum(&world, 0, 0, COUNT).unwrap();
            tools.wait();
            tools.expect(0, COUNT, &[0, 1, 2], "before");
            if rank == 1 {
                drop(world);
                tools.all.wait();
                return;
            }
            // Kernels wait for a rank that is gone, or goes.
            let first = tools.sum(&world, 0, 1, COUNT);
            let left = first.and_then(|()| {
                tools.streams[0].0.synchronize().unwrap();
                world.check()?;
                world.barrier()
            });
            assert!(matches!(&left, Err(Error::PeerLeft { rank: 1, .. })), "{left:?}");
            let next = world.shrink().unwrap();
            assert_eq!((next.world_size(), next.generation(), next.rank()), (2, 1, rank / 2));
            assert_eq!(next.device(), Some(tools.ordinal));
            // What the rank that left had on its device goes in the background.
            std::thread::sleep(Duration::from_millis(300));
            let on = || next.on(&tools.streams[1].1);
            expect_outdated(on().all_reduce(&mut pinned, ReduceOp::Sum).unwrap_err(), 1);
            expect_outdated(pinned.lend().unwrap_err(), 1);
            if let (Some(mut window), Some(registration)) = (window.take(), registration) {
                expect_outdated(on().all_reduce(&mut window, ReduceOp::Sum).unwrap_err(), 2);
                expect_outdated(window.close(&next).unwrap_err(), 2);
                // SAFETY: the call is refused.
                let all = unsafe { registration.buf_mut::<i32>(0..10) };
                expect_outdated(on().all_reduce(all, ReduceOp::Sum).unwrap_err(), 3);
                expect_outdated(registration.close(&next).unwrap_err(), 3);
            }
            next.barrier().unwrap();
            for part in 2..10 {
                tools.sum(&next, part % 2, part, [5, COUNT][part / 2 % 2]).unwrap();
            }
            tools.streams.iter().for_each(|(raw, _)| raw.synchronize().unwrap());
            next.check().unwrap();
            let calls = next.observer().gpu_calls(1 - next.rank()).unwrap();
            assert_eq!(calls.last().unwrap().number, 8, "epochs begin anew: {calls:?}");
            next.barrier().unwrap();
            for part in 2..10 {
                tools.expect(part, [5, COUNT][part / 2 % 2], &[0, 2], "after");
            }
            // And once more, when nobody is lost.
            let last = next.shrink().unwrap();
            tools.sum(&last, 0, 10, COUNT).unwrap();
            tools.streams[0].0.synchronize().unwrap();
            last.barrier().unwrap();
            tools.expect(10, COUNT, &[0, 2], "once more");
            last.destroy().unwrap();
            tools.all.wait();
        },
    );
}
