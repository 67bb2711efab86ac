//! All-reduce of rows with residual and norm: its buffers, checked, and how the host carries it out.

use unisono_core::call::{CallHeader, Kind};
use unisono_core::fused::{MAX_HIDDEN, NormOutput, RmsNorm, Row, is_normed};
use unisono_core::layout::CHUNK_BYTES;
use unisono_core::select::Algorithm;
use unisono_core::{DType, ReduceOp};

use super::blocks::Blocks;
use super::copy::copy;
use super::engine::{Engine, State};
use super::exchange::{Part, stage_source};
use super::parts::Uneven;
#[cfg(feature = "cuda")]
use super::plan::WindowPlace;
use super::plan::{Plan, Situation, argument, check_place};
use super::waiting::Step;
use crate::buffer::RawBuffer;
use crate::call::Call;
use crate::error::Result;
use crate::reduce::Reduction;

/// The sides of a call on rows, in the order of its buffers.
#[derive(Clone, Copy)]
pub(crate) struct Sides {
    pub(crate) residual: *mut u8,
    pub(crate) residual_out: *mut u8,
    pub(crate) weight: *mut u8,
    pub(crate) output: *mut u8,
    /// Null where there is none.
    pub(crate) scale: *mut u8,
}

impl Plan {
    /// The sides of a call on rows, as `plan_rows` found them.
    pub(crate) fn row_sides(&self) -> Sides {
        let at = |index: usize| self.locals().get(index).copied().unwrap_or(std::ptr::null_mut());
        Sides { residual: at(1), residual_out: at(2), weight: at(3), output: at(4), scale: at(5) }
    }
}

#[cfg(feature = "cuda")]
impl Plan {
    /// The buffers of a call on rows, or with counts in memory, in their order, and where they lie in windows.
    pub(crate) fn buffers(&self) -> impl Iterator<Item = (*mut u8, Option<WindowPlace>)> {
        let windows = self.uneven.iter().flat_map(|uneven| uneven.windows.iter().copied());
        self.locals().iter().copied().zip(windows)
    }

    /// The all-reduce alone that a call on rows begins with, from `source` into `target`, wherever they lie.
    pub(crate) fn sum_of_rows(&self, source: *const u8, target: *mut u8) -> Self {
        let kind = Kind::AllReduce { op: ReduceOp::Sum };
        let header = CallHeader { kind, ..self.header };
        let (dtype, count) = (self.dtype, self.count);
        Self { header, source, target, dtype, count, ..Self::bare(kind) }
    }
}

/// Checks a call on rows.
pub(super) fn plan_rows(call: &Call<'_>, situation: &Situation<'_>) -> Result<Plan> {
    let kind = call.kind;
    let refuse = |what, expected: String, got: String| Err(argument(situation, kind, what, expected, got));
    let Kind::AllReduceRmsNorm { hidden, epsilon, output, is_in_place } = kind else {
        unreachable!("{kind:?} has no rows")
    };
    let number = if output == NormOutput::Same { 5 } else { 6 };
    let (&[input, residual, residual_out, weight, rows, ..], true) =
        (call.buffers(), call.buffers().len() == number)
    else {
        return refuse("number of buffers", number.to_string(), call.buffers().len().to_string());
    };
    let (dtype, hidden) = (input.dtype, hidden as usize);
    if !is_normed(dtype) {
        return refuse("dtype of the input", "f16 or bf16".to_owned(), dtype.to_string());
    }
    if !hidden.is_multiple_of(8) || !(8..=MAX_HIDDEN).contains(&hidden) {
        let expected = format!("a multiple of 8 from 8 to {MAX_HIDDEN}");
        return refuse("elements of a row", expected, hidden.to_string());
    }
    if !(0.0..f32::INFINITY).contains(&epsilon) {
        return refuse("epsilon", "finite and not negative".to_owned(), epsilon.to_string());
    }
    if !input.count.is_multiple_of(hidden) {
        return refuse("count of the input", format!("a multiple of {hidden}"), input.count.to_string());
    }
    let tokens = input.count / hidden;
    if i32::try_from(tokens).is_err() {
        return refuse("rows of the input", format!("at most {}", i32::MAX), tokens.to_string());
    }
    let scale = call.buffers().get(5);
    let scales = if output == NormOutput::Fp8 { 1 } else { tokens };
    let sides = [
        ("residual", &residual, dtype, input.count),
        ("new residual", &residual_out, dtype, input.count),
        ("weight", &weight, dtype, hidden),
        ("output", &rows, output.dtype(dtype), input.count),
    ];
    let scale_side = scale.map(|scale| ("scale", scale, DType::F32, scales));
    for (what, buffer, dtype, count) in sides.into_iter().chain(scale_side) {
        if (buffer.dtype, buffer.count) != (dtype, count) {
            let got = format!("{} of {}", buffer.count, buffer.dtype);
            return refuse(what, format!("{count} of {dtype}"), got);
        }
    }
    let mut windows = Vec::with_capacity(number);
    for buffer in call.buffers() {
        windows.push(check_place(kind, buffer, situation)?);
    }
    if let Some(scale) = scale.filter(|scale| situation.device.is_some() && !scale.ptr.is_multiple_of(4)) {
        return refuse("address of the scale", "a multiple of 4".to_owned(), scale.ptr.to_string());
    }
    if tokens > 0 && is_in_place != (residual.ptr == residual_out.ptr) {
        let place = |same| if same { "that of the residual" } else { "another than the residual's" };
        return refuse("memory of the new residual", place(is_in_place).into(), place(!is_in_place).into());
    }
    check_overlaps(call, (output, is_in_place), situation)?;
    let address = |buffer: &RawBuffer| std::ptr::with_exposed_provenance_mut::<u8>(buffer.ptr as usize);
    let locals: Vec<*mut u8> = call.buffers().iter().map(address).collect();
    let header = CallHeader { dtype: Some(dtype), count: input.count as u64, ..CallHeader::bare(kind) };
    Ok(Plan {
        header,
        algorithm: Algorithm::OneShot,
        dtype,
        count: input.count,
        source: locals[0].cast_const(),
        target: locals[2],
        uneven: Some(Box::new(Uneven { locals, windows, own: input.count, ..Uneven::default() })),
        ..Plan::bare(kind)
    })
}

/// Nothing that is written overlaps anything else; but the new residual may be the old one, and an output of the same type the input.
fn check_overlaps(
    call: &Call<'_>,
    (output, is_in_place): (NormOutput, bool),
    situation: &Situation<'_>,
) -> Result<()> {
    const NAMES: [&str; 6] =
        ["the input", "the residual", "the new residual", "the weight", "the output", "the scale"];
    let buffers = call.buffers();
    for written in 2..buffers.len() {
        if written == 3 || (written == 5 && output == NormOutput::Fp8) {
            continue;
        }
        for other in 0..buffers.len() {
            let (a, b) = (&buffers[written], &buffers[other]);
            let overlaps = a.ptr < b.ptr + b.bytes() as u64 && b.ptr < a.ptr + a.bytes() as u64;
            let may_be_same = other == written
                || (written == 2 && other == 1 && is_in_place)
                || (written == 4 && other == 0 && output == NormOutput::Same && a.ptr == b.ptr);
            if overlaps && !may_be_same {
                let got = format!("{} and {} that overlap", NAMES[other], NAMES[written]);
                return Err(argument(situation, call.kind, "memory", "disjoint buffers", got));
            }
        }
    }
    Ok(())
}

/// What the host keeps of a row while it comes.
#[derive(Default)]
pub(super) struct RowMemory {
    /// Sums of a block.
    block: Vec<u8>,
    /// The sums of the row so far, and which row it is.
    sum: Vec<u8>,
    row: usize,
    residual: Vec<u8>,
    weight: Vec<u8>,
    output: Vec<u8>,
}

impl Engine {
    /// Blocks are staged and reduced as in an all-reduce; each row goes on when its last block has come. Returns the number of
    /// steps.
    pub(super) fn all_reduce_rms_norm(&mut self, plan: &Plan, at: &mut State) -> Step<u64> {
        let reduction = Reduction::new(plan.dtype, &ReduceOp::Sum);
        let blocks = Blocks::new(plan, CHUNK_BYTES / plan.dtype.size());
        let stage = stage_source(plan, &blocks);
        self.exchange(at, 0..blocks.number, Part::ALL, stage, |engine, block, chunk| {
            let (at, bytes) = blocks.bytes(block);
            let mut memory = std::mem::take(&mut engine.row);
            if block == 0 {
                (memory.row, memory.sum) = (0, Vec::new());
            }
            memory.block.resize(bytes, 0);
            // SAFETY: the block lies in our source; every peer has announced it, and keeps it until we announce that we are done
            // with it; our own memory has room for it.
            unsafe {
                let (source, count) = (plan.source.add(at), blocks.block(block).1);
                engine.reduce_staged(reduction, source, chunk, memory.block.as_mut_ptr(), count);
            }
            memory.take_sums(plan);
            engine.row = memory;
        })
    }
}

impl RowMemory {
    /// Finishes the rows that the block completes.
    fn take_sums(&mut self, plan: &Plan) {
        let Kind::AllReduceRmsNorm { hidden, epsilon, output, .. } = plan.header.kind else { return };
        let (hidden, dtype) = (hidden as usize, plan.dtype);
        let norm = RmsNorm { dtype, epsilon, output };
        let block = std::mem::take(&mut self.block);
        let mut rest = &block[..];
        while !rest.is_empty() {
            let (sums, behind) = rest.split_at(rest.len().min(hidden * dtype.size() - self.sum.len()));
            self.sum.extend_from_slice(sums);
            rest = behind;
            if self.sum.len() == hidden * dtype.size() {
                self.finish(&norm, hidden, plan.row_sides());
                self.sum.clear();
                self.row += 1;
            }
        }
        self.block = block;
    }

    fn finish(&mut self, norm: &RmsNorm, hidden: usize, sides: Sides) {
        let bytes = hidden * norm.dtype.size();
        let out_bytes = hidden * norm.output.dtype(norm.dtype).size();
        self.residual.resize(bytes, 0);
        self.weight.resize(bytes, 0);
        self.output.resize(out_bytes, 0);
        let scale_at = if norm.output == NormOutput::Fp8PerToken { self.row * 4 } else { 0 };
        let mut scale = 0f32;
        // SAFETY: the row lies in the residual, and as many elements in the weights; a scale is there if one is given. Peers may
        // map some of this memory, so it is copied and never lent.
        unsafe {
            copy(sides.residual.add(self.row * bytes), self.residual.as_mut_ptr(), bytes);
            copy(sides.weight, self.weight.as_mut_ptr(), bytes);
            if norm.output == NormOutput::Fp8 {
                copy(sides.scale, (&raw mut scale).cast(), 4);
            }
        }
        let row = Row {
            sum: &self.sum,
            residual: &mut self.residual,
            weight: &self.weight,
            output: &mut self.output,
            scale: &mut scale,
        };
        if let Err(error) = norm.apply(row) {
            unreachable!("a row of checked sides: {error}");
        }
        // SAFETY: the row lies in the outputs, which were checked; what they may be the same memory as was read.
        unsafe {
            copy(self.residual.as_ptr(), sides.residual_out.add(self.row * bytes), bytes);
            copy(self.output.as_ptr(), sides.output.add(self.row * out_bytes), out_bytes);
            if norm.output == NormOutput::Fp8PerToken {
                copy((&raw const scale).cast(), sides.scale.add(scale_at), 4);
            }
        }
    }
}
