//! The cast of rows to f8e4m3 with a scale for each block of [`BLOCK`] elements, as low-latency dispatch sends them.
//!
//! Of each block (the last may be short), all in f32 and every operation rounded to nearest even: amax = max(largest |x| that is finite, 1e-4);
//! scale = amax / 448, or the next power of two that is not below it; inverse = 448 / amax, or 1 / scale where that is a power of two;
//! q = x · inverse as f8e4m3, saturating; what is not finite becomes NaN. So a block of zeros gives zeros, and one element that overflowed
//! spoils no other.

use super::rows::widen;
use crate::dtype::DType;
use crate::fp8::{decode_e4m3, encode_e4m3};

/// Elements that share a scale.
pub const BLOCK: usize = 128;
/// Blocks whose scales share a word as [`ScaleKind::Ue8m0`].
pub const PACKED: usize = 4;
/// The largest f8e4m3.
const LARGEST: f32 = 448.0;
/// The least amax.
const LEAST: f32 = 1e-4;

/// What scales are, and how they are written.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ScaleKind {
    /// amax / 448, as f32.
    F32,
    /// Rounded up to a power of two, as f32.
    PowerOfTwo,
    /// The same as its exponent alone (8 bits, bias 127), four blocks in an i32, the first in the low byte. Rows are multiples of 512 elements.
    Ue8m0,
}

/// Scales of a row of `hidden` elements.
pub const fn blocks(hidden: usize) -> usize {
    hidden.div_ceil(BLOCK)
}

/// Casts a row of `dtype` (bf16, f16 or f32): `out` has a byte for each element, `scales` one for each block.
pub fn cast_row(dtype: DType, row: &[u8], kind: ScaleKind, out: &mut [u8], scales: &mut [f32]) {
    let size = dtype.size();
    let blocks = row.chunks(BLOCK * size).zip(out.chunks_mut(BLOCK));
    for ((row, out), scale) in blocks.zip(scales) {
        let mut values = [0.0; BLOCK];
        let values = &mut values[..out.len()];
        widen(dtype, row, values);
        *scale = cast_block(values, kind, out);
    }
}

/// Casts one block of at most [`BLOCK`] values; its scale.
pub fn cast_block(values: &[f32], kind: ScaleKind, out: &mut [u8]) -> f32 {
    let finite = values.iter().filter(|value| value.is_finite());
    let amax = finite.fold(LEAST, |most, value| most.max(value.abs()));
    let (scale, inverse) = match kind {
        ScaleKind::F32 => (amax / LARGEST, LARGEST / amax),
        ScaleKind::PowerOfTwo | ScaleKind::Ue8m0 => {
            let scale = power_of_two(amax / LARGEST);
            (scale, 1.0 / scale)
        }
    };
    for (code, value) in out.iter_mut().zip(values) {
        *code = encode_e4m3(if value.is_finite() { value * inverse } else { f32::NAN });
    }
    scale
}

/// The values of a row that was cast.
pub fn uncast_row(codes: &[u8], scales: &[f32], values: &mut [f32]) {
    let blocks = codes.chunks(BLOCK).zip(values.chunks_mut(BLOCK)).zip(scales);
    for ((codes, values), scale) in blocks {
        for (value, code) in values.iter_mut().zip(codes) {
            *value = decode_e4m3(*code) * scale;
        }
    }
}

/// Four scales that are powers of two, as their exponents.
pub fn pack(scales: &[f32]) -> i32 {
    let byte = |at: usize| (scales.get(at).copied().unwrap_or(0.0).to_bits() >> 23) as u8;
    i32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)])
}

/// The next power of two that is not below `scale`, which is normal.
const fn power_of_two(scale: f32) -> f32 {
    let bits = scale.to_bits();
    let up = (bits & 0x007f_ffff != 0) as u32;
    f32::from_bits(((bits >> 23) + up) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cast(values: &[f32], kind: ScaleKind) -> (Vec<f32>, f32) {
        let mut codes = vec![0xee; values.len()];
        let scale = cast_block(values, kind, &mut codes);
        let mut back = vec![0.0; values.len()];
        uncast_row(&codes, &[scale], &mut back);
        (back, scale)
    }

    #[test]
    fn scales_fit_the_largest_value_and_powers_of_two_are_not_below_them() {
        let (back, scale) = cast(&[448.0, 17.0, -3.0], ScaleKind::F32);
        assert_eq!((back, scale), (vec![448.0, 16.0, -3.0], 1.0));
        let (back, scale) = cast(&[449.0, 34.0], ScaleKind::PowerOfTwo);
        assert_eq!((back, scale), (vec![448.0, 32.0], 2.0));
        assert_eq!(cast(&[896.0], ScaleKind::Ue8m0), (vec![896.0], 2.0));
        assert_eq!(pack(&[1.0, 2.0, 0.5, 1.0]), i32::from_le_bytes([127, 128, 126, 127]));
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_not_finite_spoils_nothing() {
        let (back, scale) = cast(&[0.0, -0.0], ScaleKind::F32);
        assert_eq!((back[0], back[1].to_bits(), scale), (0.0, (-0.0f32).to_bits(), 1e-4 / 448.0));
        let (back, scale) = cast(&[f32::INFINITY, 448.0, f32::NAN, 2.0], ScaleKind::F32);
        assert!(back[0].is_nan() && back[2].is_nan());
        assert_eq!((back[1], back[3], scale), (448.0, 2.0, 1.0));
        let (back, _) = cast(&[1e38, 1.0], ScaleKind::PowerOfTwo);
        assert!(back[0] > 9.3e37 && back[0] < 1.07e38 && back[1] == 0.0, "{back:?}");
    }

    #[test]
    fn a_row_has_a_scale_for_each_block_and_the_last_may_be_short() {
        let values: Vec<f32> = (0..136).map(|at| if at < 128 { 448.0 } else { 896.0 }).collect();
        let row: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let (mut codes, mut scales, mut back) = (vec![0; 136], [0.0; 2], vec![0.0; 136]);
        cast_row(DType::F32, &row, ScaleKind::F32, &mut codes, &mut scales);
        uncast_row(&codes, &scales, &mut back);
        assert_eq!((scales, back), ([1.0, 2.0], values));
        assert_eq!((blocks(8), blocks(128), blocks(136)), (1, 1, 2));
    }
}
