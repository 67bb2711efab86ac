//! Collectives between processes on GPUs against the scalar reference: every form, a reduction of every dtype, kinds of sizes and
//! alignments, in and out of place. (`tests/gpu.rs` has more of it, with all ranks in one process.) Of ranks that share a device each waits
//! for its slice of time in every call: they do less of it.
//!
//! Without a GPU the test says so and passes.

#[path = "../support/gpu_case.rs"]
mod case;

use std::time::{Duration, Instant};

use case::{Case, Operation, expected, input};
use unisono::cuda::{Device, DeviceBuffer, Stream as CudaStream};
use unisono::{
    Buf, BufMut, Call, Communicator, DType, Form, Operations, Place, RawBuffer, ReduceOp, Result, Stream,
};

use super::gpu::device_count;
use super::parts::{Part, expect};
use super::random::Random;
use super::server;
use super::world::Setup;

/// Bytes behind and before a buffer that must stay as they are.
const MARGIN: usize = 64;

pub(crate) fn processes_have_the_bits_of_the_reference() {
    let Some(count) = device_count() else { return };
    let server = server();
    // Up to two of them share a device; three, where there is only one.
    let most = (2 * count as usize).max(3);
    for size in [1, 2, 3, 4, 5, 8].into_iter().filter(|size| *size <= most) {
        let begin = Instant::now();
        let setup = Setup::new("gpu matrix", size, server.unique_id()).with("FAULTS_INIT_MS", 60_000);
        let mut world = setup.start();
        // Kernels are compiled in it.
        world.wait_within(Duration::from_secs(150));
        world.expect_good_end();
        println!("{size} ranks on {count} GPUs: {:.0} s", begin.elapsed().as_secs_f64());
    }
}

/// One reduction of each dtype, all reductions among them.
fn reductions() -> impl Iterator<Item = (DType, ReduceOp)> {
    DType::ALL.into_iter().enumerate().filter_map(|(at, dtype)| {
        let ops = ReduceOp::ALL.into_iter().cycle().skip(at);
        let op = ops.take(9).find(|op| unisono::reduce_op::check(dtype, *op).is_ok())?;
        Some((dtype, op))
    })
}

struct Bench {
    communicator: Communicator,
    stream: Stream,
    raw: CudaStream,
    source: DeviceBuffer,
    target: DeviceBuffer,
    ordinal: u32,
}

/// The part of a rank.
pub(crate) fn play(part: &Part) -> Result<()> {
    let count = unisono::cuda::driver::device_count().unwrap_or(1);
    let ordinal = part.rank as u32 % count;
    let device = Device::new(ordinal).unwrap();
    let shares = part.size > count as usize;
    let most = 2 << 20;
    let mut forms = vec![
        Some((Form::OneShot, 0)),
        Some((Form::TwoShot, 0)),
        Some((Form::OneShotLines, 0)),
        Some((Form::TwoShotLines, 0)),
        Some((Form::Bulk, 0)),
        Some((Form::Bulk, 90)),
        Some((Form::Ring, 0)),
        Some((Form::Ring, 9)),
        Some((Form::Engine, 0)),
        None,
    ];
    let reductions: Vec<(DType, ReduceOp)> = reductions().step_by(if shares { 4 } else { 1 }).collect();
    let mut counts = vec![0, 1, 5, 1000, 4096, 1 << 18];
    if shares {
        forms.retain(|form| !matches!(form, Some((Form::Engine, _) | (_, 1..))));
        counts = vec![5, 1 << 18];
    }
    for (at, form) in forms.into_iter().enumerate() {
        let mut builder = part.builder().device(ordinal).job(format!("{}-{at}", part.job));
        if let Some((form, blocks)) = form {
            builder = builder.gpu_algorithm(form, blocks);
        }
        for (dtype, op) in &reductions {
            builder = builder.prepare(*dtype, *op)?;
        }
        let raw = CudaStream::new(&device).unwrap();
        // SAFETY: the raw stream lies beside this one and lives as long.
        let stream = unsafe { Stream::cuda(raw.raw(), ordinal) }?;
        let source = DeviceBuffer::new(&device, (most + MARGIN) * part.size + 2 * MARGIN).unwrap();
        let target = DeviceBuffer::new(&device, (most + MARGIN) * part.size + 2 * MARGIN).unwrap();
        let communicator = builder.build()?;
        let mut bench = Bench { communicator, stream, raw, source, target, ordinal };
        if at == 0 {
            println!("ready");
        }
        for (dtype, op) in reductions.iter().copied() {
            for (count, is_in_place, offset) in [(777, false, 0), (100_003, true, 0), (1000, false, 2)] {
                let count = count.min(most / dtype.size());
                for operation in [
                    Operation::AllReduce,
                    Operation::Reduce,
                    Operation::ReduceScatter,
                    Operation::ReduceScatterV,
                ] {
                    let root = 1 % part.size;
                    check(&mut bench, &Case { operation, dtype, op, count, root, is_in_place, offset })?;
                }
            }
        }
        for count in counts.iter().copied() {
            for (is_in_place, offset) in [(false, 0), (true, 0), (false, 4)] {
                for operation in [
                    Operation::Broadcast,
                    Operation::AllGather,
                    Operation::Gather,
                    Operation::Scatter,
                    Operation::AllToAll,
                    Operation::AllGatherV,
                ] {
                    let root = part.size - 1;
                    check(
                        &mut bench,
                        &Case { operation, root, count, is_in_place, offset, ..Case::default() },
                    )?;
                }
            }
        }
        for bytes in [0, 5, 32_768, 100_003, 2 << 20] {
            messages(&mut bench, bytes)?;
        }
        bench.communicator.destroy()?;
    }
    Ok(())
}

/// A message of `bytes` to the next rank and one from the previous, and parts of other sizes from everybody to everybody.
fn messages(bench: &mut Bench, bytes: usize) -> Result<()> {
    let (rank, ranks) = (bench.communicator.rank(), bench.communicator.world_size());
    let (next, previous) = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
    let content = |from: usize, to: usize, bytes: usize| -> Vec<u8> {
        (0..bytes).map(|at| (at * 7 + at / 251 + from * 50 + to * 13) as u8).collect()
    };
    let run = |bench: &mut Bench,
               (input, room): (&[u8], usize),
               call: &dyn Fn(&Bench) -> Result<()>|
     -> Result<Vec<u8>> {
        bench.source.write(MARGIN, input).unwrap();
        bench.target.write(0, &vec![0xa5; room + 2 * MARGIN]).unwrap();
        call(bench)?;
        bench.raw.synchronize().unwrap();
        bench.communicator.check()?;
        let mut got = vec![0; room + 2 * MARGIN];
        bench.target.read(0, &mut got).unwrap();
        Ok(got)
    };
    let margin = [0xa5; MARGIN];
    let buffers = |bench: &Bench, (length, room): (usize, usize)| {
        let at = |buffer: &DeviceBuffer| buffer.address() + MARGIN as u64;
        // SAFETY: both live until the stream was waited for, and nobody else uses them.
        unsafe {
            (
                Buf::<u8>::cuda(at(&bench.source), length, bench.ordinal),
                BufMut::<u8>::cuda(at(&bench.target), room, bench.ordinal),
            )
        }
    };
    if ranks > 1 {
        let got = run(bench, (&content(rank, next, bytes), bytes), &|bench| {
            let (input, output) = buffers(bench, (bytes, bytes));
            bench.communicator.on(&bench.stream).send_recv(input, next, output, previous, 5)
        })?;
        let expected = [&margin, &content(previous, rank, bytes)[..], &margin].concat();
        expect(got == expected, || format!("a message of {bytes} bytes from rank {previous}"));
    }
    let count = |from: usize, to: usize| bytes * ((from + 2 * to) % 3) / 3 + from;
    let (out, into): (Vec<usize>, Vec<usize>) =
        (0..ranks).map(|peer| (count(rank, peer), count(peer, rank))).unzip();
    let input: Vec<u8> = (0..ranks).flat_map(|peer| content(rank, peer, out[peer])).collect();
    let room = into.iter().sum();
    let got = run(bench, (&input, room), &|bench| {
        let (input, output) = buffers(bench, (input.len(), room));
        bench.communicator.on(&bench.stream).all_to_all_v(input, &out, output, &into)
    })?;
    let parts: Vec<u8> = (0..ranks).flat_map(|peer| content(peer, rank, into[peer])).collect();
    expect(got == [&margin, &parts[..], &margin].concat(), || format!("parts of up to {bytes} bytes"));
    Ok(())
}

fn check(bench: &mut Bench, case: &Case) -> Result<()> {
    let (rank, ranks) = (bench.communicator.rank(), bench.communicator.world_size());
    let size = case.dtype.size();
    let begin = MARGIN + case.offset.next_multiple_of(size);
    let shape = case.shape(rank, ranks);
    let inputs: Vec<Vec<u8>> = (0..ranks).map(|rank| input(case, rank, ranks)).collect();
    let mut before = vec![0xa5; begin + shape.room() * size + MARGIN];
    if shape.is_in_place {
        before[begin + shape.input_at * size..][..inputs[rank].len()].copy_from_slice(&inputs[rank]);
    }
    bench.source.write(begin, &inputs[rank]).unwrap();
    bench.target.write(0, &before).unwrap();
    let raw = |buffer: &DeviceBuffer| RawBuffer {
        ptr: buffer.address() + begin as u64,
        count: 0,
        dtype: case.dtype,
        place: Place::Cuda { ordinal: bench.ordinal },
    };
    let buffers = shape.buffers(raw(&bench.source), raw(&bench.target));
    let taken = bench.communicator.gpu_choice(case.kind(rank), case.most_bytes(ranks), size);
    // SAFETY: both buffers live until the stream was waited for, and nobody else uses them.
    let call = unsafe { Call::from_raw(case.kind(rank), &buffers, &shape.views()) };
    bench.communicator.on(&bench.stream).submit(call)?;
    bench.raw.synchronize().unwrap();
    bench.communicator.check()?;
    for (at, piece) in expected(case, &inputs, taken.map(|launch| launch.form), rank) {
        before[begin + (shape.output_at + at) * size..][..piece.len()].copy_from_slice(&piece);
    }
    let mut got = vec![0; before.len()];
    bench.target.read(0, &mut got).unwrap();
    let wrong = before.iter().zip(&got).position(|(expected, got)| expected != got);
    expect(wrong.is_none(), || format!("{case:?} {taken:?}: byte {wrong:?} from {begin}"));
    Ok(())
}
