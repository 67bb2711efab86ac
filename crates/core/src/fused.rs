//! What follows an all-reduce in a transformer, one row (token) at a time: residual, RMS normalisation, output. The scalar reference,
//! which the CPU runs and the kernels are tested against, bit for bit.
//!
//! For a row of `hidden` elements, all in f32 and every operation rounded to nearest even, nothing fused:
//!
//! 1. s = the sum of all ranks, rounded to the dtype: what an all-reduce gives.
//! 2. x = s + residual, rounded to the dtype: the new residual.
//! 3. v = (Σ x²) / hidden + epsilon, i = 1 / √v, y = (x · i) · weight.
//! 4. The output is y rounded once: to the dtype, or y / scale rounded to f8e4m3, saturating. A scale of each token's own is
//!    max(largest |y| / 448, 1 / (448 · 512)), where NaN does not count; it is what vLLM computes.
//!
//! A NaN is written as the canonical quiet one.
//!
//! So the bits are those of an all-reduce followed by the rest, in whatever form and on whatever device. The order of Σ x² is fixed
//! by the row alone: units of 6 elements (what a packet of a GPU carries) are summed from the left, lane l of 2,048 sums units l,
//! l + 2,048, …; 32 lanes make a warp, summed as a balanced binary tree (neighbours first), warp w being leaf 8·(w mod 8) + w/8 of
//! a balanced tree of 64. That is how eight blocks of eight warps do it, each with every eighth warp.

use half::{bf16, f16};

use crate::dtype::DType;
use crate::error::Result;
use crate::fp8;
use crate::reduce_op::{ReduceOp, reference};

/// Elements of a unit.
pub const UNIT: usize = 6;
/// Lanes that the units of a row are dealt to.
pub const LANES: usize = 2048;
/// The longest row: two units for each lane.
pub const MAX_HIDDEN: usize = 2 * LANES * UNIT;
/// The largest f8e4m3.
const LARGEST: f32 = 448.0;
/// The least scale of a token.
const LEAST_SCALE: f32 = 1.0 / (LARGEST * 512.0);

/// What the normalised row is written as.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum NormOutput {
    /// The dtype of the input.
    Same,
    /// f8e4m3, divided by one scale that the caller gives.
    Fp8,
    /// f8e4m3, divided by a scale of each token's own, which is written.
    Fp8PerToken,
}

impl NormOutput {
    /// As headers and kernels know it.
    pub const fn code(self) -> u8 {
        match self {
            Self::Same => 0,
            Self::Fp8 => 1,
            Self::Fp8PerToken => 2,
        }
    }

    /// That of a code.
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::Same,
            1 => Self::Fp8,
            2 => Self::Fp8PerToken,
            _ => return None,
        })
    }

    /// The type of its elements, where the input has `dtype`.
    pub const fn dtype(self, dtype: DType) -> DType {
        match self {
            Self::Same => dtype,
            Self::Fp8 | Self::Fp8PerToken => DType::F8E4M3,
        }
    }
}

/// Whether rows of this type are normalised.
pub const fn is_normed(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16)
}

/// How rows are normalised.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct RmsNorm {
    /// f16 or bf16.
    pub dtype: DType,
    /// Added to the mean of squares.
    pub epsilon: f32,
    /// What comes out.
    pub output: NormOutput,
}

/// The memory of one row, little-endian.
#[derive(Debug)]
pub struct Row<'r> {
    /// The rounded sum of all ranks.
    pub sum: &'r [u8],
    /// The residual, which becomes the new one.
    pub residual: &'r mut [u8],
    /// The weights.
    pub weight: &'r [u8],
    /// The output.
    pub output: &'r mut [u8],
    /// The scale that is given, or the one that is computed.
    pub scale: &'r mut f32,
}

impl RmsNorm {
    /// Steps 2 to 4 of one row.
    ///
    /// # Errors
    /// [`crate::Error::Reduction`] if the sides have other lengths. Nothing is written then.
    pub fn apply(&self, row: Row<'_>) -> Result<()> {
        let Row { sum, residual, weight, output, scale } = row;
        let before = residual.to_vec();
        reference(self.dtype, ReduceOp::Sum, &[sum, &before], &[], residual)?;
        let x: Vec<f32> = residual.as_chunks().0.iter().map(|bits| self.read(*bits)).collect();
        let mean = sum_of_squares(&x) / x.len() as f32;
        let inverse = 1.0 / (mean + self.epsilon).sqrt();
        let weights = weight.as_chunks().0.iter().map(|bits| self.read(*bits));
        let normalised: Vec<f32> = x.iter().zip(weights).map(|(x, weight)| x * inverse * weight).collect();
        if self.output == NormOutput::Fp8PerToken {
            let largest = normalised.iter().fold(0.0f32, |most, value| most.max(value.abs()));
            *scale = (largest / LARGEST).max(LEAST_SCALE);
        }
        match self.output {
            NormOutput::Same => {
                for (out, value) in output.as_chunks_mut().0.iter_mut().zip(normalised) {
                    *out = self.write(value);
                }
            }
            NormOutput::Fp8 | NormOutput::Fp8PerToken => {
                for (out, value) in output.iter_mut().zip(normalised) {
                    *out = fp8::encode_e4m3(value / *scale);
                }
            }
        }
        Ok(())
    }

    fn read(&self, bits: [u8; 2]) -> f32 {
        match self.dtype {
            DType::F16 => f16::from_le_bytes(bits).to_f32(),
            _ => bf16::from_le_bytes(bits).to_f32(),
        }
    }

    fn write(&self, value: f32) -> [u8; 2] {
        match (self.dtype, value.is_nan()) {
            (DType::F16, false) => f16::from_f32(value).to_le_bytes(),
            (DType::F16, true) => 0x7e00u16.to_le_bytes(),
            (_, false) => bf16::from_f32(value).to_le_bytes(),
            (_, true) => 0x7fc0u16.to_le_bytes(),
        }
    }
}

/// Σ x² in the order that the module tells.
fn sum_of_squares(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    for (at, unit) in x.chunks(UNIT).enumerate() {
        let mut squares = unit.iter().map(|x| x * x);
        let first = squares.next().unwrap_or(0.0);
        lanes[at % LANES] += squares.fold(first, |sum, square| sum + square);
    }
    let mut leaves = [0.0; 64];
    for (warp, lanes) in lanes.chunks(32).enumerate() {
        leaves[8 * (warp % 8) + warp / 8] = tree(lanes);
    }
    tree(&leaves)
}

/// The sum of a power of two of values, neighbours first.
fn tree(values: &[f32]) -> f32 {
    match values {
        [] => 0.0,
        [value] => *value,
        _ => {
            let (left, right) = values.split_at(values.len() / 2);
            tree(left) + tree(right)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect()
    }

    fn apply(output: NormOutput, scale: f32, row: [&[f32]; 3]) -> (Vec<u8>, Vec<u8>, f32) {
        let [sum, residual, weight] = row.map(bytes);
        let (mut residual, mut scale) = (residual, scale);
        let mut out = vec![0xee; sum.len() / 2 * output.dtype(DType::BF16).size()];
        let norm = RmsNorm { dtype: DType::BF16, epsilon: 0.0, output };
        let sides =
            Row { sum: &sum, residual: &mut residual, weight: &weight, output: &mut out, scale: &mut scale };
        norm.apply(sides).unwrap();
        (residual, out, scale)
    }

    #[test]
    fn a_row_is_added_normalised_and_weighted() {
        let row: [&[f32]; 3] = [&[1.0, -4.0, 2.0, 2.0], &[2.0, 0.0, -2.0, -2.0], &[1.0, 2.0, 5.0, 1.0]];
        // x = 3, −4, 0, 0: the root of the mean of squares is 2.5.
        let (residual, out, _) = apply(NormOutput::Same, 0.0, row);
        assert_eq!(residual, bytes(&[3.0, -4.0, 0.0, 0.0]));
        assert_eq!(out, bytes(&[1.2, -3.2, 0.0, 0.0]));
    }

    #[test]
    fn eight_bits_are_scaled_by_what_is_given_or_by_the_largest_of_the_token() {
        let row: [&[f32]; 3] = [&[3.0, -4.0, 0.0, 0.0], &[0.0; 4], &[1.0, 1.0, 1.0, 1.0]];
        let (_, out, scale) = apply(NormOutput::Fp8, 0.1, row);
        let encode = |values: &[f32]| values.iter().map(|v| fp8::encode_e4m3(*v)).collect::<Vec<_>>();
        assert_eq!((out, scale), (encode(&[12.0, -16.0, 0.0, 0.0]), 0.1));
        let (_, out, scale) = apply(NormOutput::Fp8PerToken, 0.0, row);
        assert_eq!((out[1], scale), (0xfe, 1.6 / 448.0));
        let (_, out, scale) = apply(NormOutput::Fp8PerToken, 0.0, [&[0.0; 4], &[0.0; 4], &[1.0; 4]]);
        assert_eq!(scale, LEAST_SCALE);
        // Nothing over nothing.
        assert_eq!(out, [0x7f; 4]);
    }

    #[test]
    fn squares_of_a_row_are_summed_in_the_order_that_is_told() {
        // Every square is 1: exact in any order, whatever the length.
        for hidden in [8, 1024, 7168, 8192, 16384, MAX_HIDDEN] {
            assert_eq!(sum_of_squares(&vec![1.0; hidden]), hidden as f32);
        }
        // 2²⁴ swallows a 1 that is added to it alone, and not two of them: so the order shows.
        let mut x = vec![0.0; 13];
        (x[0], x[1], x[6], x[7]) = (4096.0, 1.0, 1.0, 1.0);
        assert_eq!(sum_of_squares(&x), 16_777_218.0);
        (x[6], x[7], x[12]) = (1.0, 0.0, 1.0);
        // Lanes 0 and 1 meet first, and only then 2 and 3.
        assert_eq!(sum_of_squares(&x), 16_777_216.0);
    }

    #[test]
    fn sides_of_other_lengths_are_refused() {
        let norm = RmsNorm { dtype: DType::F16, epsilon: 1e-5, output: NormOutput::Same };
        let (mut residual, mut output, mut scale) = ([7; 8], [7; 8], 0.0);
        let row = Row {
            sum: &[0; 6],
            residual: &mut residual,
            weight: &[0; 8],
            output: &mut output,
            scale: &mut scale,
        };
        assert!(matches!(norm.apply(row), Err(crate::Error::Reduction { got: 6, .. })));
        assert_eq!((residual, output), ([7; 8], [7; 8]));
    }
}
