//! The quantised all-reduce on GPUs: every form, type, length and place against the reference, in graphs, and ranks that do not come.

use std::time::{Duration, Instant};

use unisono::cuda::DeviceBuffer;
use unisono::half::{bf16, f16};
use unisono::{Builder, Call, DType, Error, Kind, Memory, Operations, Place, RawBuffer};
use unisono_core::device::Form;

use crate::for_worlds;
use crate::quantised_sums::Sum;
use crate::world::{self, PATIENCE, World, devices};

const BF16: Sum = Sum { dtype: DType::BF16, count: 1000, seed: 5 };
const BEHIND: usize = 64;

fn prepared(builder: Builder) -> Builder {
    builder.prepare_quantised::<bf16>().prepare_quantised::<f16>().prepare_quantised::<f32>()
}

/// The buffers of a rank, each behind `offset` bytes and before some that nobody may touch.
struct Sides {
    offset: usize,
    source: DeviceBuffer,
    target: DeviceBuffer,
}

impl Sides {
    fn new(world: &World, rank: usize, input: &[u8], offset: usize) -> Self {
        let buffer = |content: &[u8]| {
            let mut buffer =
                DeviceBuffer::new(&world.devices[rank], offset + content.len() + BEHIND).unwrap();
            buffer.write(0, &vec![0xa5; buffer.bytes()]).unwrap();
            buffer.write(offset, content).unwrap();
            buffer
        };
        Self { offset, source: buffer(input), target: buffer(&vec![0xa5; input.len()]) }
    }

    fn submit(&self, world: &World, rank: usize, sum: &Sum, is_in_place: bool) -> unisono::Result<()> {
        let raw = |buffer: &DeviceBuffer| RawBuffer {
            ptr: buffer.address() + self.offset as u64,
            count: sum.count,
            dtype: sum.dtype,
            place: Place::Cuda { ordinal: world.devices[rank].ordinal() },
        };
        let both = [raw(&self.source), raw(&self.target)];
        let used = if is_in_place { &both[..1] } else { &both[..] };
        // SAFETY: tests wait for their streams before the buffers go.
        let call = unsafe { Call::from_raw(Kind::AllReduceQuantised, used, &[]) };
        world.ranks[rank].on(&world.streams[rank]).submit(call)
    }

    /// Compares every byte of the output, and of what lies around it.
    fn check(&self, rank: usize, sum: &Sum, is_in_place: bool, expected: &[u8]) {
        let buffer = if is_in_place { &self.source } else { &self.target };
        let mut all = vec![0xa5; buffer.bytes()];
        all[self.offset..][..expected.len()].copy_from_slice(expected);
        let mut got = vec![0; buffer.bytes()];
        buffer.read(0, &mut got).unwrap();
        let wrong = all.iter().zip(&got).position(|(expected, got)| expected != got);
        let place = wrong.map(|at| (at as i64 - self.offset as i64, all[at], got[at]));
        assert_eq!(place, None, "rank {rank} of {sum:?}, {is_in_place}: byte, expected, got");
    }
}

fn wait(world: &World, what: &Sum) {
    world.raw_streams.iter().for_each(|stream| stream.synchronize().unwrap());
    for rank in &world.ranks {
        rank.check().unwrap_or_else(|error| panic!("{what:?}: {error}"));
    }
}

fn check(world: &World, sum: &Sum, is_in_place: bool, offset: usize) {
    let inputs: Vec<_> = (0..world.ranks.len()).map(|rank| sum.input(rank)).collect();
    let expected = sum.expected(&inputs);
    let sides: Vec<_> =
        inputs.iter().enumerate().map(|(rank, input)| Sides::new(world, rank, input, offset)).collect();
    for (rank, sides) in sides.iter().enumerate() {
        sides.submit(world, rank, sum, is_in_place).unwrap();
    }
    wait(world, sum);
    for (rank, sides) in sides.iter().enumerate() {
        sides.check(rank, sum, is_in_place, &expected);
    }
}

#[test]
fn quantised_sums_have_the_bits_of_the_reference_in_every_form() {
    for_worlds(|ranks, devices| {
        for form in [None, Some(Form::OneShot), Some(Form::TwoShot)] {
            let world = World::new(ranks, devices, |builder| match form {
                Some(form) => prepared(builder).gpu_algorithm(form, 0),
                None => prepared(builder),
            });
            for dtype in [DType::BF16, DType::F16, DType::F32] {
                let size = dtype.size();
                for count in [0, 1, 7, 8, 127, 128, 129, 1000, 4096, 30_003] {
                    for (is_in_place, offset) in [(false, 0), (true, 0), (false, size), (true, size)] {
                        check(&world, &Sum { dtype, count, ..BF16 }, is_in_place, offset);
                    }
                }
            }
            world.end();
        }
    });
}

#[test]
fn what_packets_have_no_room_for_is_quantised_in_several_kernels() {
    let devices = devices();
    if devices.is_empty() {
        return;
    }
    for has_access in [true, false] {
        let world =
            World::new(3, &devices, |builder| builder.prepare_quantised::<f32>().peer_access(has_access));
        // Two and a part of a third where devices reach each other.
        let count = if has_access { 5_000_003 } else { 600_001 };
        let sum = Sum { dtype: DType::F32, count, seed: 9 };
        check(&world, &sum, false, 0);
        check(&world, &sum, true, 4);
        world.end();
    }
}

#[test]
fn epochs_that_wrap_serve_quantised_sums_too() {
    let devices = devices();
    if devices.is_empty() {
        return;
    }
    for form in [Form::OneShot, Form::TwoShot] {
        for epoch in [0x7fff_fffc, 0xffff_fffc] {
            let world = World::new(3, &devices, |builder| {
                builder.prepare_quantised::<bf16>().gpu_algorithm(form, 0).first_epoch(epoch)
            });
            for count in 100..108 {
                check(&world, &Sum { count, ..BF16 }, false, 0);
            }
            world.end();
        }
    }
}

#[test]
fn graphs_of_quantised_sums_are_replayed() {
    for_worlds(|ranks, devices| {
        let sum = Sum { count: 70_000, ..BF16 };
        let world = World::new(ranks, devices, |builder| builder.prepare_quantised::<bf16>());
        let mut inputs: Vec<_> = (0..ranks).map(|rank| sum.input(rank)).collect();
        let sides: Vec<_> =
            inputs.iter().enumerate().map(|(rank, input)| Sides::new(&world, rank, input, 0)).collect();
        let graphs: Vec<_> = (0..ranks)
            .map(|rank| {
                world.raw_streams[rank].begin_capture().unwrap();
                // What comes out goes in again.
                (0..2).for_each(|_| sides[rank].submit(&world, rank, &sum, true).unwrap());
                world.raw_streams[rank].end_capture().unwrap()
            })
            .collect();
        for _ in 0..2 {
            for (graph, stream) in graphs.iter().zip(&world.raw_streams) {
                graph.launch(stream).unwrap();
            }
        }
        wait(&world, &sum);
        for _ in 0..4 {
            inputs = vec![sum.expected(&inputs); ranks];
        }
        for (rank, sides) in sides.iter().enumerate() {
            sides.check(rank, &sum, true, &inputs[0]);
        }
        drop(graphs);
        world.end();
    });
}

#[test]
fn quantised_sums_in_windows_are_those_outside_of_them() {
    for memory in [Memory::Device, Memory::Pinned] {
        let prepare = |builder: Builder| builder.timeout(PATIENCE).prepare_quantised::<bf16>();
        let tools = |_: usize, ordinal: u32| {
            let device = unisono::cuda::Device::new(ordinal).unwrap();
            let raw = unisono::cuda::Stream::new(&device).unwrap();
            // SAFETY: the raw stream lies beside this one and lives as long.
            let stream = unsafe { unisono::Stream::cuda(raw.raw(), ordinal) }.unwrap();
            (raw, stream)
        };
        world::on_threads(2, prepare, tools, |rank, (raw, stream)| {
            let sum = Sum { count: 1001, ..BF16 };
            let inputs = [sum.input(0), sum.input(1)];
            let mut window = rank.window::<bf16>(1001 + 3, memory).unwrap();
            let at = if memory == Memory::Device { 3 } else { 0 };
            let values = |bytes: &[u8]| -> Vec<bf16> {
                bytes.as_chunks().0.iter().map(|bits| bf16::from_le_bytes(*bits)).collect()
            };
            let (mine, mut got) = (&inputs[rank.rank()], vec![0; sum.bytes()]);
            if memory == Memory::Device {
                // SAFETY: the window is as long.
                unsafe { raw.write(window.address() + 2 * at as u64, mine) }.unwrap();
            } else {
                window.lend().unwrap()[at..at + sum.count].copy_from_slice(&values(mine));
            }
            rank.on(stream).all_reduce_quantised(window.range_mut(at..at + sum.count)).unwrap();
            if memory == Memory::Device {
                // SAFETY: as above.
                unsafe { raw.read(window.address() + 2 * at as u64, &mut got) }.unwrap();
            } else {
                let lent = &window.lend().unwrap()[at..at + sum.count];
                got = lent.iter().flat_map(|value| value.to_le_bytes()).collect();
            }
            assert!(got == sum.expected(&inputs), "{memory:?} on rank {}", rank.rank());
            window.close(&rank).unwrap();
            rank.destroy().unwrap();
        });
    }
}

#[test]
fn quantised_sums_that_differ_or_wait_in_vain_end_with_a_name() {
    let devices = devices();
    if devices.is_empty() {
        return;
    }
    for form in [Form::OneShot, Form::TwoShot] {
        let world =
            World::new(2, &devices, |builder| builder.prepare_quantised::<bf16>().gpu_algorithm(form, 0));
        let other = Sum { count: 999, ..BF16 };
        let sides = [0, 1].map(|rank| Sides::new(&world, rank, &BF16.input(rank), 0));
        sides[0].submit(&world, 0, &BF16, false).unwrap();
        sides[1].submit(&world, 1, &other, false).unwrap();
        world.raw_streams.iter().for_each(|stream| stream.synchronize().unwrap());
        for rank in &world.ranks {
            let text = rank.check().unwrap_err().to_string();
            assert!(text.contains("all_reduce_quantised #1 on rank 0 (bf16, 1000)"), "{text}");
            assert!(text.contains("all_reduce_quantised #1 on rank 1 (bf16, 999)"), "{text}");
        }
        let impatient = |builder: Builder| {
            let builder = builder.timeout(Some(Duration::from_millis(2500)));
            builder.prepare_quantised::<bf16>().gpu_algorithm(form, 0)
        };
        let world = World::new(2, &devices, impatient);
        let sides = Sides::new(&world, 0, &BF16.input(0), 0);
        let start = Instant::now();
        sides.submit(&world, 0, &BF16, false).unwrap();
        world.raw_streams[0].synchronize().unwrap();
        let error = world.ranks[0].check().unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        let Error::Timeout { rank: 0, missing, .. } = &error else { panic!("{error}") };
        assert!(missing.len() == 1 && missing[0].starts_with("rank 1"), "{error}");
    }
}
