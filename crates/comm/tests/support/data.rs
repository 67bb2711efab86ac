//! Inputs: the bytes that a rank contributes to a case, in pieces, so that nobody has to hold all inputs of a large one.
//!
//! Integers are random bits. Floats are random bits, or of moderate size so that sums depend on every summand; and one in
//! sixteen is special: zeros of both signs, denormals, the largest, infinities, quiet and signalling NaNs with payload.

use unisono::DType;

use super::random::Random;

/// Bytes of a piece: a multiple of every element's size.
pub(crate) const PIECE_BYTES: usize = 1 << 16;

/// How the floats of a case are drawn.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Style {
    /// Any bits, and special values.
    Wild,
    /// Values around 1, and special values.
    Moderate,
    /// Values around 1 only.
    Tame,
}

/// Fills `out` with piece `piece` of part `part` of what `rank` puts in; `key` is the seed and the number of the case.
pub(crate) fn fill(
    key: (u64, u64),
    (rank, part): (usize, usize),
    piece: usize,
    (dtype, style): (DType, Style),
    out: &mut [u8],
) {
    let mut random = Random::of(&[key.0, key.1, rank as u64, part as u64, piece as u64]);
    match dtype {
        DType::Bool => {
            for byte in out {
                *byte = random.pick(&[0, 1, 1, 0, 1, 255, 2, 128]);
            }
        }
        DType::F16 => floats::<2>(&mut random, 10, style, out),
        DType::BF16 => floats::<2>(&mut random, 7, style, out),
        DType::F32 | DType::Complex64 => floats::<4>(&mut random, 23, style, out),
        DType::F64 | DType::Complex128 => floats::<8>(&mut random, 52, style, out),
        DType::F8E4M3 => floats::<1>(&mut random, 3, style, out),
        DType::F8E5M2 => floats::<1>(&mut random, 2, style, out),
        _ => {
            for chunk in out.chunks_mut(8) {
                chunk.copy_from_slice(&random.next().to_le_bytes()[..chunk.len()]);
            }
        }
    }
}

/// Floats of `SIZE` bytes with this many bits of mantissa.
fn floats<const SIZE: usize>(random: &mut Random, mantissa_bits: u32, style: Style, out: &mut [u8]) {
    let sign = 1u64 << (SIZE * 8 - 1);
    let mantissa = (1u64 << mantissa_bits) - 1;
    let exponent = (sign - 1) & !mantissa;
    let bias = (exponent >> mantissa_bits) / 2;
    let special = [0, 1, mantissa, exponent, exponent - 1, exponent | mantissa, exponent | 1, mantissa + 1];
    for bytes in out.as_chunks_mut::<SIZE>().0 {
        let bits = random.next();
        let value = if style != Style::Tame && bits >> 60 == 0 {
            special[(bits >> 50 & 7) as usize]
        } else if style == Style::Wild {
            bits
        } else {
            (bias - 2 + (bits >> 54 & 3)) << mantissa_bits | bits & mantissa
        };
        let value = value & (sign - 1) | if bits >> 49 & 1 == 1 { sign } else { 0 };
        bytes.copy_from_slice(&value.to_le_bytes()[..SIZE]);
    }
}
