//! Expert parallelism on GPUs when ranks are killed or stopped: as on the host, in both modes. Without a GPU each test says so and passes.

use std::time::Duration;

use unisono::cuda::{Device, DeviceBuffer, Stream as CudaStream};
use unisono::ep::{Buffer, Combine, Dispatch, LowLatencyCombine, LowLatencyDispatch, Settings};
use unisono::half::bf16;
use unisono::{Buf, Result, Stream};

use super::experts::{kill_one, lose_ranks, run_steps};
use super::gpu::device_count;
use super::parts::{Part, expect, setting};

const HIDDEN: usize = 64;
const TOKENS: usize = 600;
/// The same in a low-latency call.
const FEW: usize = 48;

/// Row 3: survivors leave lost ranks out, alike, and go on in the same context.
pub(crate) fn lost_ranks_are_masked_and_the_others_go_on() {
    if device_count().is_some() {
        lose_ranks("gpu experts");
    }
}

/// Row 3 without masking: every survivor names the killed rank.
pub(crate) fn a_killed_rank_is_named_without_masking() {
    if device_count().is_some() {
        kill_one("gpu experts");
    }
}

/// What a rank works with.
struct Tools {
    stream: Stream,
    device: Device,
    /// Tokens of ones, and of twos.
    tokens: [DeviceBuffer; 2],
    selections: DeviceBuffer,
    /// As many as may come.
    ones: DeviceBuffer,
    weights: DeviceBuffer,
}

/// The part `gpu experts`: steps, every result checked, until one that all survivors agree on after the input has ended.
pub(crate) fn play(part: &Part) -> Result<()> {
    let count = device_count().unwrap_or(1);
    let ordinal = part.rank as u32 % count;
    let communicator = part.builder().device(ordinal).build()?;
    let device = Device::new(ordinal).unwrap();
    let ranks = communicator.world_size();
    let upload = |bytes: Vec<u8>| {
        let mut buffer = DeviceBuffer::new(&device, bytes.len()).unwrap();
        buffer.write(0, &bytes).unwrap();
        buffer
    };
    let values =
        |value: f32, count: usize| upload(bf16::from_f32(value).to_le_bytes().repeat(count * HIDDEN));
    let selections = (0..TOKENS).flat_map(|_| 0..ranks as i64).flat_map(i64::to_le_bytes).collect();
    let tools = Tools {
        stream: Stream::from(CudaStream::new(&device).unwrap()),
        tokens: [values(1.0, TOKENS), values(2.0, TOKENS)],
        selections: upload(selections),
        ones: values(1.0, TOKENS * ranks),
        weights: upload(1f32.to_le_bytes().repeat(FEW * ranks)),
        device: device.clone(),
    };
    let settings = Settings {
        masking: setting("FAULTS_MASKING").unwrap_or(false),
        deadline: Duration::from_secs(20),
        low_latency: true,
        capacity: FEW,
        ..Settings::new(HIDDEN, ranks)
    };
    let mut buffer = Buffer::new(&communicator, settings)?;
    buffer.exchange(&communicator)?;
    run_steps(&mut buffer, |buffer, wants_to_end| step(buffer, &tools, (ranks, wants_to_end)))
}

/// One step. Its rows tell who wants to end; whether anybody does, as all survivors see it.
fn step(buffer: &mut Buffer, tools: &Tools, (ranks, wants_to_end): (usize, bool)) -> Result<bool> {
    let (ordinal, stream) = (tools.device.ordinal(), &tools.stream);
    let rows_of = |buffer: &DeviceBuffer, rows: usize| {
        // SAFETY: all of it lives as long as the stream.
        unsafe { Buf::<bf16>::cuda(buffer.address(), rows * HIDDEN, ordinal) }
    };
    // SAFETY: as above.
    let topk_idx = unsafe { Buf::<i64>::cuda(tools.selections.address(), TOKENS * ranks, ordinal) };
    let x = rows_of(&tools.tokens[usize::from(wants_to_end)], TOKENS);
    let sent = buffer.dispatch(&Dispatch::new(x).top_k(topk_idx, ranks).on(stream))?;
    let (rows, origins) = (sent.x.to_host(stream)?, sent.handle.source_tokens().to_host(stream)?);
    // What a call that failed left is undefined.
    buffer.check()?;
    let left = |buffer: &Buffer| ranks - buffer.masked().len();
    let came = origins.as_slice::<i32>()?.iter().filter(|token| **token >= 0).count();
    expect(came == TOKENS * left(buffer), || format!("{came} rows without {:?}", buffer.masked()));
    let ends = rows.as_slice::<bf16>()?.iter().any(|value| *value > bf16::ONE);
    // Each rank gives back ones, so the sum says how many took part.
    let ones = rows_of(&tools.ones, sent.handle.rows());
    let combined = buffer.combine(&Combine::new(ones, &sent.handle).on(stream))?.x.to_host(stream)?;
    buffer.check()?;
    let expected = bf16::from_f32(left(buffer) as f32);
    let wrong = combined.as_slice::<bf16>()?.iter().find(|sum| **sum != expected);
    expect(wrong.is_none(), || format!("{wrong:?} for {expected}"));
    few_tokens(buffer, tools, ranks)?;
    Ok(ends)
}

/// The same in low-latency mode, where a rank that is lost meanwhile is in all of a call or in nothing of it, for each survivor.
fn few_tokens(buffer: &mut Buffer, tools: &Tools, ranks: usize) -> Result<()> {
    let (ordinal, stream) = (tools.device.ordinal(), &tools.stream);
    let bf16s = |buffer: &DeviceBuffer, rows: usize| {
        // SAFETY: all of it lives as long as the stream.
        unsafe { Buf::<bf16>::cuda(buffer.address(), rows * HIDDEN, ordinal) }
    };
    // SAFETY: as above.
    let (topk_idx, weights) = unsafe {
        let topk_idx = Buf::<i64>::cuda(tools.selections.address(), FEW * ranks, ordinal);
        (topk_idx, Buf::<f32>::cuda(tools.weights.address(), FEW * ranks, ordinal))
    };
    let x = bf16s(&tools.ones, FEW);
    let sent = buffer.low_latency_dispatch(&LowLatencyDispatch::new(x, topk_idx, ranks).on(stream))?;
    let counts = sent.counts.to_host(stream)?;
    buffer.check()?;
    let left = |buffer: &Buffer| ranks - buffer.masked().len();
    expect(counts.as_slice::<i32>()? == [(FEW * left(buffer)) as i32], || {
        format!("{counts:?} rows without {:?}", buffer.masked())
    });
    let ones = bf16s(&tools.ones, FEW * ranks);
    let call = LowLatencyCombine::new(ones, topk_idx, weights, &sent.handle).on(stream);
    let combined = buffer.low_latency_combine(&call)?.x.to_host(stream)?;
    buffer.check()?;
    let expected = bf16::from_f32(left(buffer) as f32);
    let wrong = combined.as_slice::<bf16>()?.iter().find(|sum| **sum != expected);
    expect(wrong.is_none(), || format!("{wrong:?} for {expected}"));
    Ok(())
}
