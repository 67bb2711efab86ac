//! The 8-bit floats: conversions to and from f32, exact in one direction and rounded to nearest even in the other.
//!
//! `f8e4m3` is the finite-only variant (bias 7, largest 448, NaN 0x7f and 0xff), `f8e5m2` the IEEE-like one (bias 15,
//! largest finite 57344, infinities 0x7c and 0xfc, NaN above). Encoding saturates: what is too large, infinities
//! included, becomes the largest finite value of its sign, and every NaN becomes 0x7f.
//!
//! Everything is branch-free integer arithmetic plus one float operation, some ten instructions per value, so that
//! a loop over it becomes SIMD code. The two functions underneath ([`widen`] and [`narrow`]) are generic in the
//! format and serve f16 as well.

use crate::element::{f8e4m3, f8e5m2};

/// Bits of the quiet NaN that encoding gives, in both formats.
pub const NAN: u8 = 0x7f;

/// Bits of the f32 that decoding gives for NaN.
const QUIET_NAN: u32 = 0x7fc0_0000;

/// The f32 with the value of these `f8e4m3` bits. NaN comes out as the quiet NaN of its sign.
#[inline(always)]
pub const fn decode_e4m3(bits: u8) -> f32 {
    let code = (bits & 0x7f) as u32;
    let magnitude = if code == 0x7f { QUIET_NAN } else { widen::<3, 7>(code) };
    with_sign(magnitude, bits)
}

/// The `f8e4m3` bits nearest to `value`: ties to even, saturating at ±448, NaN as 0x7f.
#[inline(always)]
pub const fn encode_e4m3(value: f32) -> u8 {
    encode::<3, 7>(value, 0x7e)
}

/// The f32 with the value of these `f8e5m2` bits. NaN comes out as the quiet NaN of its sign.
#[inline(always)]
pub const fn decode_e5m2(bits: u8) -> f32 {
    let code = (bits & 0x7f) as u32;
    let magnitude = if code > 0x7c {
        QUIET_NAN
    } else if code == 0x7c {
        f32::INFINITY.to_bits()
    } else {
        widen::<2, 15>(code)
    };
    with_sign(magnitude, bits)
}

/// The `f8e5m2` bits nearest to `value`: ties to even, saturating at ±57344 (infinities too), NaN as 0x7f.
#[inline(always)]
pub const fn encode_e5m2(value: f32) -> u8 {
    encode::<2, 15>(value, 0x7b)
}

/// The f32 bits of a small float's magnitude: `code` is its exponent and mantissa field, sign removed.
///
/// `MANTISSA` is the number of explicit mantissa bits, `BIAS` the exponent bias (at most 15). Subnormals are exact.
/// Codes that the format reserves for infinities and NaN come out as if they were ordinary numbers.
#[inline(always)]
pub const fn widen<const MANTISSA: u32, const BIAS: u32>(code: u32) -> u32 {
    let smallest = f32::from_bits((128 - BIAS - MANTISSA) << 23);
    let subnormal = (code as i32 as f32 * smallest).to_bits();
    let normal = (code << (23 - MANTISSA)).wrapping_add((127 - BIAS) << 23);
    if code < 1 << MANTISSA { subnormal } else { normal }
}

/// The exponent and mantissa field of the small float nearest to the magnitude of `value`, ties to even, at most
/// `largest`. The sign is ignored, and the answer for NaN has no meaning: both are the caller's.
///
/// With the pattern of infinity as `largest` the format overflows to infinity, with the largest finite value it
/// saturates.
#[inline(always)]
pub const fn narrow<const MANTISSA: u32, const BIAS: u32>(value: f32, largest: u32) -> u32 {
    let magnitude = value.to_bits() & 0x7fff_ffff;
    let shift = 23 - MANTISSA;
    let to_even = (1 << (shift - 1)) - 1 + ((magnitude >> shift) & 1);
    let normal = ((magnitude + to_even) >> shift).wrapping_sub((127 - BIAS) << MANTISSA);
    // One unit in the last place of `anchor` is the smallest subnormal: the addition rounds, its low bits are the code.
    let anchor = (151 - BIAS - MANTISSA) << 23;
    let subnormal = (f32::from_bits(magnitude) + f32::from_bits(anchor)).to_bits().wrapping_sub(anchor);
    let code = if magnitude < (128 - BIAS) << 23 { subnormal } else { normal };
    if code > largest { largest } else { code }
}

#[inline(always)]
const fn encode<const MANTISSA: u32, const BIAS: u32>(value: f32, largest: u32) -> u8 {
    let bits = value.to_bits();
    let code = narrow::<MANTISSA, BIAS>(value, largest) as u8;
    if bits & 0x7fff_ffff > 0x7f80_0000 { NAN } else { code | ((bits >> 24) as u8 & 0x80) }
}

#[inline(always)]
const fn with_sign(magnitude: u32, bits: u8) -> f32 {
    f32::from_bits(magnitude | ((bits as u32 & 0x80) << 24))
}

impl f8e4m3 {
    /// The nearest value: ties to even, saturating at ±448.
    pub const fn from_f32(value: f32) -> Self {
        Self(encode_e4m3(value))
    }

    /// The same value as f32, exactly.
    pub const fn to_f32(self) -> f32 {
        decode_e4m3(self.0)
    }
}

impl f8e5m2 {
    /// The nearest value: ties to even, saturating at ±57344.
    pub const fn from_f32(value: f32) -> Self {
        Self(encode_e5m2(value))
    }

    /// The same value as f32, exactly.
    pub const fn to_f32(self) -> f32 {
        decode_e5m2(self.0)
    }
}

#[cfg(test)]
mod tests {
    use float8::{F8E4M3, F8E5M2};

    use super::*;

    fn same(ours: f32, theirs: f32, bits: u8) {
        assert_eq!(ours.is_nan(), theirs.is_nan(), "{bits:#04x}: {ours} against {theirs}");
        if ours.is_nan() {
            assert_eq!(ours.to_bits(), 0x7fc0_0000 | (u32::from(bits & 0x80) << 24), "{bits:#04x}");
        } else {
            assert_eq!(ours.to_bits(), theirs.to_bits(), "{bits:#04x}: {ours} against {theirs}");
        }
    }

    #[test]
    fn every_e4m3_pattern_decodes_as_in_the_float8_crate() {
        (0..=255).for_each(|bits| same(decode_e4m3(bits), F8E4M3::from_bits(bits).to_f32(), bits));
    }

    #[test]
    fn every_e5m2_pattern_decodes_as_in_the_float8_crate() {
        (0..=255).for_each(|bits| same(decode_e5m2(bits), F8E5M2::from_bits(bits).to_f32(), bits));
    }

    #[test]
    fn known_values_decode() {
        assert_eq!(decode_e4m3(0x7e), 448.0);
        assert_eq!(decode_e4m3(0x01), 0.001_953_125);
        assert_eq!(decode_e4m3(0x38), 1.0);
        assert_eq!(decode_e4m3(0x80).to_bits(), (-0.0_f32).to_bits());
        assert!(decode_e4m3(0xff).is_nan());
        assert_eq!(decode_e5m2(0x7b), 57344.0);
        assert_eq!(decode_e5m2(0xfc), f32::NEG_INFINITY);
        assert_eq!(decode_e5m2(0x01), 2.0_f32.powi(-16));
        assert!(decode_e5m2(0x7d).is_nan());
    }

    /// Walks the finite codes 0..=largest, and looks at each value, at each midpoint, and just beside it.
    fn rounds_to_nearest_even(largest: u8, decode: fn(u8) -> f32, encode: fn(f32) -> u8) {
        for code in 0..=largest {
            let value = decode(code);
            assert_eq!(encode(value), code, "{value} is exact");
            assert_eq!(encode(-value), code | 0x80, "-{value} is exact");
            if code == largest {
                break;
            }
            // Neighbours have few bits: their sum and half of it are exact.
            let midpoint = (value + decode(code + 1)) / 2.0;
            let even = if code % 2 == 0 { code } else { code + 1 };
            for (probe, expected) in
                [(midpoint.next_down(), code), (midpoint, even), (midpoint.next_up(), code + 1)]
            {
                assert_eq!(encode(probe), expected, "{probe} lies beside the midpoint {midpoint}");
                assert_eq!(encode(-probe), expected | 0x80, "-{probe} lies beside the midpoint -{midpoint}");
            }
        }
    }

    #[test]
    fn encoding_e4m3_rounds_to_nearest_even_at_every_boundary() {
        rounds_to_nearest_even(0x7e, decode_e4m3, encode_e4m3);
    }

    #[test]
    fn encoding_e5m2_rounds_to_nearest_even_at_every_boundary() {
        rounds_to_nearest_even(0x7b, decode_e5m2, encode_e5m2);
    }

    #[test]
    fn encoding_saturates_and_has_one_nan() {
        for (encode, largest) in [(encode_e4m3 as fn(f32) -> u8, 0x7e_u8), (encode_e5m2, 0x7b)] {
            for large in [57345.0, 61440.0, 65536.0, 1e30, f32::MAX, f32::INFINITY] {
                assert_eq!(encode(large), largest, "{large}");
                assert_eq!(encode(-large), largest | 0x80, "-{large}");
            }
            for nan in [0x7fc0_0000, 0xffc0_0000, 0x7f80_0001, 0xff80_0001, 0x7fff_ffff, 0xffff_ffff] {
                assert_eq!(encode(f32::from_bits(nan)), 0x7f, "{nan:#x}");
            }
        }
        assert_eq!(encode_e4m3(463.9), 0x7e);
        assert_eq!(encode_e4m3(480.0), 0x7e);
    }

    #[test]
    fn values_below_half_the_smallest_keep_their_sign() {
        for tiny in [f32::from_bits(1), f32::MIN_POSITIVE, 1e-10] {
            assert_eq!(encode_e4m3(tiny), 0x00);
            assert_eq!(encode_e4m3(-tiny), 0x80);
            assert_eq!(encode_e5m2(tiny), 0x00);
            assert_eq!(encode_e5m2(-tiny), 0x80);
        }
    }

    #[test]
    fn encoding_agrees_with_the_float8_crate_below_overflow() {
        for step in 0..=0x0010_0000_u32 {
            // A coarse walk over all f32 magnitudes that do not overflow, low bits varied.
            let value = f32::from_bits(step * 0x7ff + (step & 0xff));
            if value < 448.0 {
                assert_eq!(encode_e4m3(value), F8E4M3::from_f32(value).to_bits(), "{value:e}");
            }
            if value < 57344.0 {
                assert_eq!(encode_e5m2(value), F8E5M2::from_f32(value).to_bits(), "{value:e}");
            }
        }
    }

    #[test]
    fn the_same_arithmetic_serves_f16() {
        for code in 0..0x7c00_u16 {
            let value = f32::from_bits(widen::<10, 15>(u32::from(code)));
            assert_eq!(value, half::f16::from_bits(code).to_f32());
            for probe in [value.next_down(), value, value.next_up(), value * 1.000_244_2, value * 1.000_488_3]
            {
                let expected = half::f16::from_f32(probe).to_bits() & 0x7fff;
                assert_eq!(narrow::<10, 15>(probe, 0x7c00), u32::from(expected), "{probe:e}");
            }
        }
    }
}
