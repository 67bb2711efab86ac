//! All-reduce with residual and norm on GPUs: every form, shape and output against the reference, in graphs, and ranks that do not come.

use std::time::{Duration, Instant};

use unisono::cuda::DeviceBuffer;
use unisono::half::{bf16, f16};
use unisono::{Builder, Call, DType, Error, Memory, Operations, Order, Place, RawBuffer};
use unisono_core::device::Form;
use unisono_core::fused::NormOutput;

use crate::for_worlds;
use crate::rows::{Given, Got, Rows, SCALE};
use crate::world::{self, PATIENCE, World, devices};

const BF16: Rows = Rows {
    dtype: DType::BF16,
    tokens: 3,
    hidden: 8,
    epsilon: 1e-5,
    output: NormOutput::Same,
    is_in_place: false,
    seed: 7,
};

/// Sums in the order of ranks, whatever the size: the reference knows no other.
fn prepared(builder: Builder) -> Builder {
    builder.prepare_rms_norm::<bf16>().prepare_rms_norm::<f16>().order(Order::Rank)
}

/// The buffers of a rank, each behind `offset` bytes and before some that nobody may touch.
struct Sides {
    offset: usize,
    input: DeviceBuffer,
    residual: DeviceBuffer,
    new: DeviceBuffer,
    weight: DeviceBuffer,
    output: DeviceBuffer,
    scales: DeviceBuffer,
}

const BEHIND: usize = 64;

impl Sides {
    fn new(world: &World, rank: usize, rows: &Rows, given: &Given, offset: usize) -> Self {
        let buffer = |content: &[u8], offset: usize| {
            let mut buffer =
                DeviceBuffer::new(&world.devices[rank], offset + content.len() + BEHIND).unwrap();
            buffer.write(0, &vec![0xa5; buffer.bytes()]).unwrap();
            buffer.write(offset, content).unwrap();
            buffer
        };
        let poison = vec![0xa5; rows.count() * 2];
        Self {
            offset,
            input: buffer(&given.input, offset),
            residual: buffer(&given.residual, offset),
            new: buffer(&poison, offset),
            weight: buffer(&given.weight, offset),
            output: buffer(&poison[..rows.count() * rows.output_size()], offset),
            scales: buffer(&SCALE.to_le_bytes().repeat(rows.tokens.max(1)), 0),
        }
    }

    fn submit(&self, world: &World, rank: usize, rows: &Rows) -> unisono::Result<()> {
        let raw = |buffer: &DeviceBuffer, count: usize, dtype: DType| RawBuffer {
            ptr: buffer.address() + if dtype == DType::F32 { 0 } else { self.offset as u64 },
            count,
            dtype,
            place: Place::Cuda { ordinal: world.devices[rank].ordinal() },
        };
        let (count, dtype) = (rows.count(), rows.dtype);
        let new = if rows.is_in_place { &self.residual } else { &self.new };
        let mut buffers = vec![
            raw(&self.input, count, dtype),
            raw(&self.residual, count, dtype),
            raw(new, count, dtype),
            raw(&self.weight, rows.hidden, dtype),
            raw(&self.output, count, rows.output.dtype(dtype)),
        ];
        match rows.output {
            NormOutput::Same => {}
            NormOutput::Fp8 => buffers.push(raw(&self.scales, 1, DType::F32)),
            NormOutput::Fp8PerToken => buffers.push(raw(&self.scales, rows.tokens, DType::F32)),
        }
        // SAFETY: tests wait for their streams before the buffers go.
        let call = unsafe { Call::from_raw(rows.kind(), &buffers, &[]) };
        world.ranks[rank].on(&world.streams[rank]).submit(call)
    }

    /// Compares every byte of the outputs, and of what lies around them.
    fn check(&self, rank: usize, rows: &Rows, expected: &Got) {
        let new = if rows.is_in_place { &self.residual } else { &self.new };
        let sides = [("new residual", new, &expected.residual), ("output", &self.output, &expected.output)];
        for (what, buffer, expected) in sides {
            let mut all = vec![0xa5; buffer.bytes()];
            all[self.offset..][..expected.len()].copy_from_slice(expected);
            let mut got = vec![0; buffer.bytes()];
            buffer.read(0, &mut got).unwrap();
            let wrong = all.iter().zip(&got).position(|(expected, got)| expected != got);
            let place = wrong.map(|at| (at - self.offset.min(at), all[at], got[at]));
            assert_eq!(place, None, "{what} on rank {rank} of {rows:?}: byte, expected, got");
        }
        let mut got = vec![0; rows.tokens * 4];
        self.scales.read(0, &mut got).unwrap();
        let got: Vec<f32> = got.as_chunks().0.iter().map(|scale| f32::from_le_bytes(*scale)).collect();
        assert!(got == expected.scales, "scales on rank {rank} of {rows:?}");
    }
}

fn wait(world: &World, what: &Rows) {
    world.raw_streams.iter().for_each(|stream| stream.synchronize().unwrap());
    for rank in &world.ranks {
        rank.check().unwrap_or_else(|error| panic!("{what:?}: {error}"));
    }
}

fn check(world: &World, rows: &Rows, offset: usize) {
    let given: Vec<Given> = (0..world.ranks.len()).map(|rank| rows.given(rank)).collect();
    let sum = rows.sum(&given);
    let sides: Vec<Sides> =
        given.iter().enumerate().map(|(rank, given)| Sides::new(world, rank, rows, given, offset)).collect();
    for (rank, sides) in sides.iter().enumerate() {
        sides.submit(world, rank, rows).unwrap();
    }
    wait(world, rows);
    for (rank, (sides, given)) in sides.iter().zip(&given).enumerate() {
        sides.check(rank, rows, &rows.expected(&sum, &given.residual, &given.weight));
    }
}

#[test]
fn rows_have_the_bits_of_the_reference_in_every_form() {
    for_worlds(|ranks, devices| {
        for form in [None, Some(Form::OneShot), Some(Form::TwoShot), Some(Form::Bulk)] {
            let world = World::new(ranks, devices, |builder| match form {
                Some(form) => prepared(builder).gpu_algorithm(form, 0),
                None => prepared(builder),
            });
            for dtype in [DType::BF16, DType::F16] {
                if form.is_some() && dtype == DType::F16 {
                    continue;
                }
                for output in [NormOutput::Same, NormOutput::Fp8, NormOutput::Fp8PerToken] {
                    for (tokens, hidden) in [
                        (0, 8),
                        (1, 8),
                        (3, 8),
                        (3, 1024),
                        (3, 7168),
                        (1, 8192),
                        (7, 8192),
                        (3, 16384),
                        (5, 24576),
                    ] {
                        for (is_in_place, offset) in [(false, 0), (true, 0), (true, 2)] {
                            let rows = Rows { dtype, tokens, hidden, output, is_in_place, ..BF16 };
                            check(&world, &rows, offset);
                        }
                    }
                }
            }
            world.end();
        }
    });
}

#[test]
fn many_rows_go_in_packets_or_behind_an_all_reduce() {
    for_worlds(|ranks, devices| {
        let world = World::new(ranks, devices, prepared);
        for (tokens, hidden) in [(128, 8192), (1000, 2048)] {
            for output in [NormOutput::Same, NormOutput::Fp8, NormOutput::Fp8PerToken] {
                // In place, sums of 8-bit outputs have no room: several kernels then.
                for is_in_place in [false, true] {
                    check(&world, &Rows { tokens, hidden, output, is_in_place, ..BF16 }, 0);
                }
            }
        }
        check(&world, &Rows { tokens: 1000, hidden: 7168, ..BF16 }, 0);
        world.end();
    });
}

#[test]
fn epochs_that_wrap_and_pinned_host_memory_serve_rows_too() {
    let devices = devices();
    if devices.is_empty() {
        return;
    }
    // One size of world: kernels for host memory are compiled for no other test of rows.
    for form in [Form::OneShot, Form::TwoShot] {
        for (epoch, has_access) in [(0x7fff_fffc, true), (0xffff_fffc, true), (0, false)] {
            let world = World::new(3, &devices, |builder| {
                let builder = builder.prepare_rms_norm::<bf16>().order(Order::Rank);
                builder.gpu_algorithm(form, 0).first_epoch(epoch).peer_access(has_access)
            });
            // The fourth call is the one that wraps, and both halves are used before and behind it.
            for tokens in 1..9 {
                check(&world, &Rows { tokens, hidden: 1024, ..BF16 }, 0);
            }
            world.end();
        }
    }
}

/// A residual that goes from call to call, as through the layers of a model.
#[test]
fn graphs_of_rows_are_replayed() {
    for_worlds(|ranks, devices| {
        for (tokens, hidden) in [(1, 8192), (40, 1024), (600, 8192)] {
            let world = World::new(ranks, devices, prepared);
            let rows = Rows { tokens, hidden, is_in_place: true, ..BF16 };
            let given: Vec<Given> = (0..ranks).map(|rank| rows.given(rank)).collect();
            let sum = rows.sum(&given);
            let sides: Vec<Sides> = given
                .iter()
                .enumerate()
                .map(|(rank, given)| Sides::new(&world, rank, &rows, given, 0))
                .collect();
            let graphs: Vec<_> = (0..ranks)
                .map(|rank| {
                    world.raw_streams[rank].begin_capture().unwrap();
                    (0..2).for_each(|_| sides[rank].submit(&world, rank, &rows).unwrap());
                    world.raw_streams[rank].end_capture().unwrap()
                })
                .collect();
            for _ in 0..3 {
                for (graph, stream) in graphs.iter().zip(&world.raw_streams) {
                    graph.launch(stream).unwrap();
                }
            }
            wait(&world, &rows);
            for (rank, given) in given.iter().enumerate() {
                let mut expected = rows.expected(&sum, &given.residual, &given.weight);
                for _ in 1..6 {
                    expected = rows.expected(&sum, &expected.residual, &given.weight);
                }
                sides[rank].check(rank, &rows, &expected);
            }
            drop(graphs);
            world.end();
        }
    });
}

fn pair(configure: impl FnOnce(Builder) -> Builder) -> Option<World> {
    let devices = devices();
    (!devices.is_empty()).then(|| World::new(2, &devices, configure))
}

#[test]
fn ranks_that_differ_in_their_rows_are_named() {
    let Some(world) = pair(prepared) else { return };
    let sides: Vec<Sides> =
        (0..2).map(|rank| Sides::new(&world, rank, &BF16, &BF16.given(rank), 0)).collect();
    sides[0].submit(&world, 0, &BF16).unwrap();
    sides[1].submit(&world, 1, &Rows { epsilon: 1e-6, ..BF16 }).unwrap();
    world.raw_streams.iter().for_each(|stream| stream.synchronize().unwrap());
    for rank in &world.ranks {
        let text = rank.check().unwrap_err().to_string();
        for (rank, epsilon) in ["1e-5", "1e-6"].iter().enumerate() {
            let call =
                format!("all_reduce_rms_norm #1 on rank {rank} (bf16, 24, rows of 8, epsilon {epsilon})");
            assert!(text.contains(&call), "{text}");
        }
    }
}

/// Blocks that share a row leave together, so that none writes into the shared memory of one that is gone.
#[test]
fn rows_end_when_patience_does_or_at_an_abort_and_the_device_is_in_order() {
    for form in [Form::OneShot, Form::TwoShot] {
        for is_aborted in [false, true] {
            let configure = |builder: Builder| {
                prepared(builder).gpu_algorithm(form, 0).timeout(Some(Duration::from_millis(2500)))
            };
            let Some(world) = pair(configure) else { return };
            let rows = Rows { tokens: 20, hidden: 8192, output: NormOutput::Fp8PerToken, ..BF16 };
            let sides = Sides::new(&world, 0, &rows, &rows.given(0), 0);
            sides.submit(&world, 0, &rows).unwrap();
            let start = Instant::now();
            if is_aborted {
                std::thread::sleep(Duration::from_millis(20));
                world.ranks[1].observer().abort("enough");
            }
            world.raw_streams[0].synchronize().unwrap();
            let error = world.ranks[0].check().unwrap_err();
            match is_aborted {
                true => {
                    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
                    assert!(matches!(error, Error::Aborted { rank: 1, .. }), "{error}");
                }
                false => {
                    let Error::Timeout { rank: 0, missing, .. } = &error else { panic!("{error}") };
                    assert!(missing.len() == 1 && missing[0].starts_with("rank 1"), "{error}");
                }
            }
            // What is behind it leaves at once, too.
            assert!(sides.submit(&world, 0, &rows).is_err());
        }
    }
    let Some(next) = pair(prepared) else { return };
    check(&next, &Rows { tokens: 20, hidden: 8192, ..BF16 }, 0);
    next.end();
}

#[test]
fn rows_that_are_not_prepared_cannot_be_captured_and_bad_scales_and_places_are_refused() {
    // No other test of this process loads these kernels.
    let Some(world) = pair(|builder| builder.peer_access(false)) else { return };
    let rows = Rows { dtype: DType::F16, output: NormOutput::Fp8, ..BF16 };
    let sides = Sides::new(&world, 0, &rows, &rows.given(0), 0);
    world.raw_streams[0].begin_capture().unwrap();
    let error = sides.submit(&world, 0, &rows).unwrap_err();
    drop(world.raw_streams[0].end_capture().unwrap());
    assert!(matches!(error, Error::NotPrepared { call: "all_reduce_rms_norm", rank: 0, .. }), "{error}");
    let ordinal = world.devices[0].ordinal();
    let raw = |at: u64, count: usize, dtype: DType| RawBuffer {
        ptr: sides.new.address() + at,
        count,
        dtype,
        place: Place::Cuda { ordinal },
    };
    // One row in six sides of 16 bytes.
    let mut buffers = [0, 16, 32, 48, 64].map(|at| raw(at, 8, rows.dtype)).to_vec();
    buffers[4].dtype = DType::F8E4M3;
    buffers.push(raw(82, 1, DType::F32));
    let refused = |buffers: &[RawBuffer], expected: &str| {
        // SAFETY: the call is refused.
        let call = unsafe { Call::from_raw(rows.kind(), buffers, &[]) };
        let text = world.ranks[0].on(&world.streams[0]).submit(call).unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
    };
    refused(&buffers, "address of the scale should be a multiple of 4");
    buffers[5] = raw(84, 1, DType::F32);
    buffers[0].place = Place::Host;
    refused(&buffers, "host memory");
    world.ranks.iter().for_each(|rank| rank.check().unwrap());
    world.end();
}

/// Each side at a place of its own in one window, on every rank.
#[test]
fn rows_in_windows_are_those_outside_of_them() {
    let prepare = |builder: Builder| prepared(builder).timeout(PATIENCE);
    let tools = |_: usize, ordinal: u32| {
        let device = unisono::cuda::Device::new(ordinal).unwrap();
        let raw = unisono::cuda::Stream::new(&device).unwrap();
        // SAFETY: the raw stream lies beside this one and lives as long.
        let stream = unsafe { unisono::Stream::cuda(raw.raw(), ordinal) }.unwrap();
        (raw, stream)
    };
    // In packets, and behind an all-reduce.
    for (memory, tokens) in [(Memory::Device, 3), (Memory::Device, 300), (Memory::Pinned, 3)] {
        world::on_threads(2, prepare, tools, |rank, (raw, stream)| {
            let rows = Rows { tokens, hidden: 8192, ..BF16 };
            let given: Vec<Given> = (0..2).map(|rank| rows.given(rank)).collect();
            let mine = &given[rank.rank()];
            let expected = rows.expected(&rows.sum(&given), &mine.residual, &mine.weight);
            let (count, hidden) = (rows.count(), rows.hidden);
            // Input, residual, new residual, output, and the weight.
            let mut window = rank.window::<bf16>(4 * count + hidden, memory).unwrap();
            let contents = [(0, &mine.input), (count, &mine.residual), (4 * count, &mine.weight)];
            for (at, bytes) in contents {
                if memory == Memory::Device {
                    // SAFETY: the window is as long.
                    unsafe { raw.write(window.address() + 2 * at as u64, bytes) }.unwrap();
                } else {
                    let lent = &mut window.lend().unwrap()[at..at + bytes.len() / 2];
                    for (element, bits) in lent.iter_mut().zip(bytes.as_chunks().0) {
                        *element = bf16::from_le_bytes(*bits);
                    }
                }
            }
            let side = |window: &mut unisono::Window<bf16>, at, count| window.range_mut(at..at + count).raw();
            let buffers =
                [(0, count), (count, count), (2 * count, count), (4 * count, hidden), (3 * count, count)]
                    .map(|(at, count)| side(&mut window, at, count));
            // SAFETY: the window is closed when the call is through.
            let call = unsafe { Call::from_raw(rows.kind(), &buffers, &[]) };
            rank.on(stream).submit(call).unwrap();
            for (what, at, expected) in
                [("new residual", 2 * count, &expected.residual), ("output", 3 * count, &expected.output)]
            {
                let mut got = vec![0; expected.len()];
                if memory == Memory::Device {
                    // SAFETY: as above.
                    unsafe { raw.read(window.address() + 2 * at as u64, &mut got) }.unwrap();
                } else {
                    let lent = &window.lend().unwrap()[at..at + count];
                    got = lent.iter().flat_map(|value| value.to_le_bytes()).collect();
                }
                assert!(got == *expected, "{what} of {rows:?} in {memory:?} on rank {}", rank.rank());
            }
            window.close(&rank).unwrap();
            rank.destroy().unwrap();
        });
    }
}
