//! Fused operations: a collective and what inference engines do right after it, in one call. And which types can be quantised.

use unisono_core::Reducible;
use unisono_core::element::f8e4m3;
pub use unisono_core::fused::{NormOutput, RmsNorm, Row};
use unisono_core::half::{bf16, f16};

use crate::buffer::{Buf, BufMut};
use crate::call::{Call, Kind};

/// An element type of rows that are normalised: [`struct@f16`] and [`bf16`].
pub trait HalfFloat: Reducible {}

impl HalfFloat for f16 {}
impl HalfFloat for bf16 {}

/// An element type whose sums can be quantised: [`struct@f16`], [`bf16`] and [`f32`].
pub trait Quantisable: Reducible {}

impl Quantisable for f16 {}
impl Quantisable for bf16 {}
impl Quantisable for f32 {}

/// An all-reduce of rows, the residual, and RMS normalisation: what stands between two layers of a transformer whose weights are
/// spread over the ranks. Submitted by [`Operations::all_reduce_rms_norm`](crate::Operations::all_reduce_rms_norm).
///
/// For each of `tokens` rows of `hidden` elements (a multiple of 8, at most 24,576), in f32 and every step rounded on its own:
///
/// 1. s = the sum of all ranks' `input`, rounded to `T`: the bits of an all-reduce.
/// 2. x = s + residual, rounded to `T`, goes to `residual_out`.
/// 3. y = x · (1 / √(mean of x² + epsilon)) · weight goes to `output`, rounded once.
///
/// The order of the squares' sum is fixed by `hidden` alone. So a call has the same bits on the CPU and on GPUs, whatever form it takes
/// there, and the same as an all-reduce with a kernel of the rest behind it; but where an all-reduce goes in a ring (large messages,
/// [`Order::Fixed`](crate::Order)), so does this.
///
/// All buffers lie in the same kind of memory: of the host, or of the stream's GPU, in windows or not. Outputs overlap nothing else.
#[derive(Debug)]
pub struct AllReduceRmsNorm<'b, T> {
    /// This rank's part of the sum: tokens × hidden.
    pub input: Buf<'b, T>,
    /// What is added to the sum: tokens × hidden. `None`: it lies in `residual_out`, and is replaced.
    pub residual: Option<Buf<'b, T>>,
    /// The new residual: tokens × hidden. Every rank writes its own.
    pub residual_out: BufMut<'b, T>,
    /// By what normalised elements are multiplied. Its length is `hidden`.
    pub weight: Buf<'b, T>,
    /// Added to the mean of squares: finite and not negative.
    pub epsilon: f32,
    /// Where the normalised rows go, and as what.
    pub output: Normalised<'b, T>,
}

/// What normalised rows are written as.
#[derive(Debug)]
pub enum Normalised<'b, T> {
    /// As they are: tokens × hidden.
    Same(BufMut<'b, T>),
    /// y / scale as f8e4m3, to nearest even, saturating at ±448. On GPUs `residual` and `residual_out` of large batches (from 2 MiB
    /// on) should be apart: the sum needs a place.
    Fp8 {
        /// tokens × hidden.
        output: BufMut<'b, f8e4m3>,
        /// One element.
        scale: Buf<'b, f32>,
    },
    /// The same with a scale of each token's own: max(largest |y| / 448, 1 / (448 · 512)), without NaN.
    Fp8PerToken {
        /// tokens × hidden.
        output: BufMut<'b, f8e4m3>,
        /// Gets the scale of each token: tokens.
        scales: BufMut<'b, f32>,
    },
}

impl<'b, T: HalfFloat> AllReduceRmsNorm<'b, T> {
    pub(crate) fn into_call(self) -> Call<'b> {
        let (output, rows, scale) = match &self.output {
            Normalised::Same(rows) => (NormOutput::Same, rows.raw(), None),
            Normalised::Fp8 { output, scale } => (NormOutput::Fp8, output.raw(), Some(scale.raw())),
            Normalised::Fp8PerToken { output, scales } => {
                (NormOutput::Fp8PerToken, output.raw(), Some(scales.raw()))
            }
        };
        let (weight, residual_out) = (self.weight.raw(), self.residual_out.raw());
        let kind = Kind::AllReduceRmsNorm {
            hidden: u32::try_from(weight.count).unwrap_or(u32::MAX),
            epsilon: self.epsilon,
            output,
            is_in_place: self.residual.is_none(),
        };
        let residual = self.residual.map_or(residual_out, |residual| residual.raw());
        let buffers = [self.input.raw(), residual, residual_out, weight, rows];
        Call::new(kind, buffers.into_iter().chain(scale))
    }
}
