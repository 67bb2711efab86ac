//! The scalar reference: one element at a time, in the plainest words, what every reduction must answer to the bit.
//!
//! 1. Each rank's element is widened to the accumulator (f32 for f16, bf16 and fp8; itself otherwise), and scaled by the
//!    rank's scalar for a pre-multiplied sum.
//! 2. The fold starts from rank 0 and goes on in rank order; every step rounds in the accumulator, nothing is fused.
//! 3. An average divides once. The result is rounded once to the dtype, and a NaN becomes the canonical quiet one.
//!
//! It is what the fast kernels, on the CPU and on the GPU, are tested against; it is not meant to be fast.

use half::{bf16, f16};
use num_complex::Complex;

use super::{ReduceOp, check};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::fp8;

/// Reduces `inputs`, one little-endian buffer per rank in rank order, into `output`.
///
/// `scalars[r]` is rank r's own scalar; only the pre-multiplied sum reads them, and the scalar inside `op` is not used.
/// An operation is applied to one input too: it is averaged, scaled, made canonical. Bools answer 0 or 1.
///
/// # Errors
///
/// [`Error::Unsupported`] for a pair that does not exist; [`Error::Reduction`] for no input at all, lengths that differ
/// or are no multiple of the element's size, or a number of scalars that is not the number of inputs. Nothing is
/// written then.
pub fn reference(
    dtype: DType,
    op: ReduceOp,
    inputs: &[&[u8]],
    scalars: &[f64],
    output: &mut [u8],
) -> Result<()> {
    check(dtype, op)?;
    check_buffers(dtype, op, inputs, scalars, output)?;
    match dtype {
        DType::Bool => reduce::<bool, 1>(op, inputs, scalars, output),
        DType::I8 => reduce::<i8, 1>(op, inputs, scalars, output),
        DType::U8 => reduce::<u8, 1>(op, inputs, scalars, output),
        DType::I16 => reduce::<i16, 2>(op, inputs, scalars, output),
        DType::U16 => reduce::<u16, 2>(op, inputs, scalars, output),
        DType::I32 => reduce::<i32, 4>(op, inputs, scalars, output),
        DType::U32 => reduce::<u32, 4>(op, inputs, scalars, output),
        DType::I64 => reduce::<i64, 8>(op, inputs, scalars, output),
        DType::U64 => reduce::<u64, 8>(op, inputs, scalars, output),
        DType::F16 => reduce::<F16, 2>(op, inputs, scalars, output),
        DType::BF16 => reduce::<Bf16, 2>(op, inputs, scalars, output),
        DType::F32 => reduce::<f32, 4>(op, inputs, scalars, output),
        DType::F64 => reduce::<f64, 8>(op, inputs, scalars, output),
        DType::F8E4M3 => reduce::<F8E4M3, 1>(op, inputs, scalars, output),
        DType::F8E5M2 => reduce::<F8E5M2, 1>(op, inputs, scalars, output),
        DType::Complex64 => reduce::<Complex<f32>, 8>(op, inputs, scalars, output),
        DType::Complex128 => reduce::<Complex<f64>, 16>(op, inputs, scalars, output),
    }
    Ok(())
}

/// Refuses buffers that do not fit together.
pub(crate) fn check_buffers(
    dtype: DType,
    op: ReduceOp,
    inputs: &[&[u8]],
    scalars: &[f64],
    output: &[u8],
) -> Result<()> {
    let refuse = |what: String, expected: String, got: usize| {
        Err(Error::Reduction { op: op.name(), dtype, what, expected, got: got as u64 })
    };
    if inputs.is_empty() {
        return refuse("the number of inputs".into(), "at least 1".into(), 0);
    }
    if !output.len().is_multiple_of(dtype.size()) {
        let expected = format!("a multiple of {}", dtype.size());
        return refuse("the length of the output in bytes".into(), expected, output.len());
    }
    if let Some(rank) = inputs.iter().position(|input| input.len() != output.len()) {
        let what = format!("the length of input {rank} in bytes");
        return refuse(what, format!("that of the output, {}", output.len()), inputs[rank].len());
    }
    if op.scalar().is_some() && scalars.len() != inputs.len() {
        let expected = format!("that of the inputs, {}", inputs.len());
        return refuse("the number of scalars".into(), expected, scalars.len());
    }
    Ok(())
}

fn reduce<T: Storage<SIZE>, const SIZE: usize>(
    op: ReduceOp,
    inputs: &[&[u8]],
    scalars: &[f64],
    output: &mut [u8],
) {
    let contribution = |rank: usize, element: usize| {
        let value = T::read(inputs[rank].as_chunks::<SIZE>().0[element]);
        if op.scalar().is_some() { value.scale(scalars[rank]) } else { value }
    };
    for (element, out) in output.as_chunks_mut::<SIZE>().0.iter_mut().enumerate() {
        let mut accumulator = contribution(0, element);
        for rank in 1..inputs.len() {
            accumulator = accumulator.combine(op, contribution(rank, element));
        }
        if op == ReduceOp::Avg {
            accumulator = accumulator.divide(inputs.len());
        }
        *out = T::write(accumulator);
    }
}

/// An element as it lies in memory.
trait Storage<const SIZE: usize> {
    type Accumulator: Accumulator;

    /// Widens, exactly.
    fn read(bytes: [u8; SIZE]) -> Self::Accumulator;

    /// Rounds once to nearest even, and makes NaN canonical.
    fn write(value: Self::Accumulator) -> [u8; SIZE];
}

/// The type that a reduction computes in.
trait Accumulator: Copy {
    fn combine(self, op: ReduceOp, other: Self) -> Self;

    fn divide(self, count: usize) -> Self;

    fn scale(self, scalar: f64) -> Self;
}

/// `check` stands before every reduction.
fn refused<T>(op: ReduceOp) -> T {
    unreachable!("{op} got past the table of supported pairs")
}

impl Storage<1> for bool {
    type Accumulator = Self;

    fn read(bytes: [u8; 1]) -> Self {
        bytes[0] != 0
    }

    fn write(value: Self) -> [u8; 1] {
        [u8::from(value)]
    }
}

impl Accumulator for bool {
    fn combine(self, op: ReduceOp, other: Self) -> Self {
        match op {
            ReduceOp::Min | ReduceOp::BitAnd => self && other,
            ReduceOp::Max | ReduceOp::BitOr => self || other,
            ReduceOp::BitXor => self != other,
            ReduceOp::Sum | ReduceOp::Prod | ReduceOp::Avg | ReduceOp::PreMulSum(_) => refused(op),
        }
    }

    fn divide(self, _: usize) -> Self {
        refused(ReduceOp::Avg)
    }

    fn scale(self, scalar: f64) -> Self {
        refused(ReduceOp::PreMulSum(scalar))
    }
}

macro_rules! integers {
    ($($ty:ty, $size:literal);* $(;)?) => {$(
        impl Storage<$size> for $ty {
            type Accumulator = Self;

            fn read(bytes: [u8; $size]) -> Self {
                Self::from_le_bytes(bytes)
            }

            fn write(value: Self) -> [u8; $size] {
                value.to_le_bytes()
            }
        }

        impl Accumulator for $ty {
            fn combine(self, op: ReduceOp, other: Self) -> Self {
                match op {
                    ReduceOp::Sum | ReduceOp::Avg => self.wrapping_add(other),
                    ReduceOp::Prod => self.wrapping_mul(other),
                    ReduceOp::Min => self.min(other),
                    ReduceOp::Max => self.max(other),
                    ReduceOp::BitAnd => self & other,
                    ReduceOp::BitOr => self | other,
                    ReduceOp::BitXor => self ^ other,
                    ReduceOp::PreMulSum(_) => refused(op),
                }
            }

            /// In a type that holds both, because 200 ranks do not fit into an i8. Division truncates.
            fn divide(self, count: usize) -> Self {
                (i128::from(self) / count as i128) as Self
            }

            fn scale(self, scalar: f64) -> Self {
                refused(ReduceOp::PreMulSum(scalar))
            }
        }
    )*};
}

integers! { i8, 1; u8, 1; i16, 2; u16, 2; i32, 4; u32, 4; i64, 8; u64, 8 }

macro_rules! floats {
    ($($ty:ident, $size:literal, $complex_size:literal, $nan:literal);* $(;)?) => {$(
        impl Storage<$size> for $ty {
            type Accumulator = Self;

            fn read(bytes: [u8; $size]) -> Self {
                Self::from_le_bytes(bytes)
            }

            fn write(value: Self) -> [u8; $size] {
                (if value.is_nan() { $ty::from_bits($nan) } else { value }).to_le_bytes()
            }
        }

        impl Accumulator for $ty {
            fn combine(self, op: ReduceOp, other: Self) -> Self {
                match op {
                    ReduceOp::Sum | ReduceOp::Avg | ReduceOp::PreMulSum(_) => self + other,
                    ReduceOp::Prod => self * other,
                    ReduceOp::Min | ReduceOp::Max if self.is_nan() || other.is_nan() => $ty::from_bits($nan),
                    // The total order is the usual one between numbers, and puts −0 before +0.
                    ReduceOp::Min => if self.total_cmp(&other).is_le() { self } else { other },
                    ReduceOp::Max => if self.total_cmp(&other).is_ge() { self } else { other },
                    ReduceOp::BitAnd | ReduceOp::BitOr | ReduceOp::BitXor => refused(op),
                }
            }

            fn divide(self, count: usize) -> Self {
                self / count as $ty
            }

            fn scale(self, scalar: f64) -> Self {
                self * scalar as $ty
            }
        }

        impl Storage<$complex_size> for Complex<$ty> {
            type Accumulator = Self;

            fn read(bytes: [u8; $complex_size]) -> Self {
                let (re, im) = bytes.split_at($size);
                let part = |bytes: &[u8]| {
                    let mut part = [0; $size];
                    part.copy_from_slice(bytes);
                    $ty::from_le_bytes(part)
                };
                Self::new(part(re), part(im))
            }

            fn write(value: Self) -> [u8; $complex_size] {
                let mut bytes = [0; $complex_size];
                bytes[..$size].copy_from_slice(&<$ty as Storage<$size>>::write(value.re));
                bytes[$size..].copy_from_slice(&<$ty as Storage<$size>>::write(value.im));
                bytes
            }
        }

        impl Accumulator for Complex<$ty> {
            fn combine(self, op: ReduceOp, other: Self) -> Self {
                match op {
                    ReduceOp::Sum | ReduceOp::Avg | ReduceOp::PreMulSum(_) => {
                        Self::new(self.re + other.re, self.im + other.im)
                    }
                    ReduceOp::Prod => Self::new(
                        self.re * other.re - self.im * other.im,
                        self.re * other.im + self.im * other.re,
                    ),
                    _ => refused(op),
                }
            }

            fn divide(self, count: usize) -> Self {
                Self::new(self.re / count as $ty, self.im / count as $ty)
            }

            fn scale(self, scalar: f64) -> Self {
                Self::new(self.re * scalar as $ty, self.im * scalar as $ty)
            }
        }
    )*};
}

floats! { f32, 4, 8, 0x7fc0_0000; f64, 8, 16, 0x7ff8_0000_0000_0000 }

/// Floats that are stored small and computed in f32.
macro_rules! small_floats {
    ($($ty:ident, $size:literal, $read:expr, $write:expr);* $(;)?) => {$(
        struct $ty;

        impl Storage<$size> for $ty {
            type Accumulator = f32;

            fn read(bytes: [u8; $size]) -> f32 {
                $read(bytes)
            }

            fn write(value: f32) -> [u8; $size] {
                $write(value)
            }
        }
    )*};
}

small_floats! {
    F16, 2, |bytes| f16::from_le_bytes(bytes).to_f32(), |value: f32| {
        (if value.is_nan() { f16::from_bits(0x7e00) } else { f16::from_f32(value) }).to_le_bytes()
    };
    Bf16, 2, |bytes| bf16::from_le_bytes(bytes).to_f32(), |value: f32| {
        (if value.is_nan() { bf16::from_bits(0x7fc0) } else { bf16::from_f32(value) }).to_le_bytes()
    };
    F8E4M3, 1, |bytes: [u8; 1]| fp8::decode_e4m3(bytes[0]), |value| [fp8::encode_e4m3(value)];
    F8E5M2, 1, |bytes: [u8; 1]| fp8::decode_e5m2(bytes[0]), |value| [fp8::encode_e5m2(value)];
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reduces one element per rank, each given by its little-endian bits.
    fn bits(dtype: DType, op: ReduceOp, inputs: &[u64], scalars: &[f64]) -> u64 {
        let size = dtype.size();
        let inputs: Vec<_> = inputs.iter().map(|input| input.to_le_bytes()).collect();
        let inputs: Vec<_> = inputs.iter().map(|input| &input[..size]).collect();
        let mut output = [0; 8];
        reference(dtype, op, &inputs, scalars, &mut output[..size]).unwrap();
        u64::from_le_bytes(output)
    }

    fn f32s(op: ReduceOp, inputs: &[f32], scalars: &[f64]) -> f32 {
        let inputs: Vec<_> = inputs.iter().map(|input| u64::from(input.to_bits())).collect();
        f32::from_bits(bits(DType::F32, op, &inputs, scalars) as u32)
    }

    #[test]
    fn sums_fold_in_rank_order_from_rank_0() {
        assert_eq!(f32s(ReduceOp::Sum, &[1e30, -1e30, 1.0], &[]), 1.0);
        assert_eq!(f32s(ReduceOp::Sum, &[1.0, 1e30, -1e30], &[]), 0.0);
        assert_eq!(f32s(ReduceOp::Sum, &[-0.0], &[]).to_bits(), (-0.0_f32).to_bits());
    }

    #[test]
    fn small_floats_are_rounded_once_at_the_end() {
        // 2048 + 1 + 1 in f16 steps would stay at 2048.
        assert_eq!(bits(DType::F16, ReduceOp::Sum, &[0x6800, 0x3c00, 0x3c00], &[]), 0x6801);
        // 65504 + 65504 - 65504: the overflow in between does not exist in f32.
        assert_eq!(bits(DType::F16, ReduceOp::Sum, &[0x7bff, 0x7bff, 0xfbff], &[]), 0x7bff);
        assert_eq!(bits(DType::F16, ReduceOp::Sum, &[0x7bff, 0x7bff], &[]), 0x7c00);
        assert_eq!(bits(DType::BF16, ReduceOp::Sum, &[0x4380, 0x3f80, 0x3f80], &[]), 0x4381);
        assert_eq!(bits(DType::F8E4M3, ReduceOp::Sum, &[0x7e, 0x7e], &[]), 0x7e);
        assert_eq!(bits(DType::F8E5M2, ReduceOp::Sum, &[0xfc, 0x00], &[]), 0xfb);
    }

    #[test]
    fn denormals_survive() {
        assert_eq!(f32s(ReduceOp::Sum, &[f32::from_bits(1), f32::from_bits(2)], &[]).to_bits(), 3);
        assert_eq!(bits(DType::F16, ReduceOp::Sum, &[1, 2], &[]), 3);
        assert_eq!(bits(DType::BF16, ReduceOp::Sum, &[1, 2], &[]), 3);
        assert_eq!(bits(DType::F8E5M2, ReduceOp::Sum, &[1, 2], &[]), 3);
    }

    #[test]
    fn every_nan_becomes_the_canonical_one_even_of_a_single_input() {
        for op in [ReduceOp::Sum, ReduceOp::Prod, ReduceOp::Min, ReduceOp::Max, ReduceOp::Avg] {
            assert_eq!(bits(DType::F32, op, &[0xffc0_1234], &[]), 0x7fc0_0000, "{op}");
            assert_eq!(bits(DType::F64, op, &[0xfff0_0000_0000_0001], &[]), 0x7ff8_0000_0000_0000, "{op}");
            assert_eq!(bits(DType::F16, op, &[0xfc01, 0x3c00], &[]), 0x7e00, "{op}");
            assert_eq!(bits(DType::BF16, op, &[0x3f80, 0xff81], &[]), 0x7fc0, "{op}");
            assert_eq!(bits(DType::F8E4M3, op, &[0xff, 0x38], &[]), 0x7f, "{op}");
            assert_eq!(bits(DType::F8E5M2, op, &[0x38, 0xfd], &[]), 0x7f, "{op}");
        }
        // Infinity minus infinity in the real part only.
        let re = |bits: u64| bits & 0xffff_ffff;
        let sum = bits(DType::Complex64, ReduceOp::Sum, &[0x3f80_0000_7f80_0000, 0x3f80_0000_ff80_0000], &[]);
        assert_eq!((re(sum), sum >> 32), (0x7fc0_0000, 0x4000_0000));
    }

    #[test]
    fn minus_zero_is_less_than_zero_in_either_order() {
        for inputs in [[0.0, -0.0], [-0.0, 0.0]] {
            assert!(f32s(ReduceOp::Min, &inputs, &[]).is_sign_negative());
            assert!(f32s(ReduceOp::Max, &inputs, &[]).is_sign_positive());
        }
    }

    #[test]
    fn averages_divide_at_the_end_integers_towards_zero() {
        assert_eq!(f32s(ReduceOp::Avg, &[1.0, 2.0, 4.0], &[]), 7.0 / 3.0);
        assert_eq!(bits(DType::I8, ReduceOp::Avg, &[0xfd, 0xfc], &[]), 0xfd); // -7 / 2 = -3
        assert_eq!(bits(DType::I8, ReduceOp::Avg, &[100, 100], &[]), 0xe4); // -56 / 2 = -28
        assert_eq!(bits(DType::U8, ReduceOp::Avg, &[200, 100], &[]), 22); // 44 / 2
        assert_eq!(bits(DType::I8, ReduceOp::Avg, &[0x81; 200], &[]), 0); // -56 / 200; as an i8, 200 is -56
        assert_eq!(bits(DType::U64, ReduceOp::Avg, &[u64::MAX, 0], &[]), u64::MAX / 2);
    }

    #[test]
    fn premultiplied_sums_use_each_ranks_own_scalar_rounded_in_the_accumulator() {
        let op = ReduceOp::PreMulSum(99.0);
        assert_eq!(f32s(op, &[1.0, 10.0], &[2.0, 0.5]), 7.0);
        assert_eq!(f32s(op, &[3.0], &[0.1]), 3.0 * 0.1_f32);
        // (1 + 2^-12)² − (1 + 2^-11): the product loses its last bit before the sum; fused it would leave 2^-24.
        let x = 1.0 + 2.0_f32.powi(-12);
        assert_eq!(f32s(op, &[1.0 + 2.0_f32.powi(-11), x], &[-1.0, f64::from(x)]), 0.0);
        assert_eq!(bits(DType::F16, op, &[0x3c00, 0x3c00], &[1.0, 2.0]), 0x4200);
    }

    #[test]
    fn complex_products_follow_the_schoolbook() {
        let complex = |re: f32, im: f32| u64::from(re.to_bits()) | u64::from(im.to_bits()) << 32;
        let product = bits(DType::Complex64, ReduceOp::Prod, &[complex(1.0, 2.0), complex(3.0, -4.0)], &[]);
        assert_eq!(product, complex(11.0, 2.0));
        let scaled = bits(DType::Complex64, ReduceOp::PreMulSum(0.0), &[complex(1.0, 2.0)], &[3.0]);
        assert_eq!(scaled, complex(3.0, 6.0));
    }

    #[test]
    fn bools_answer_0_or_1_and_take_any_non_zero_for_true() {
        let table = [
            (ReduceOp::Min, [0, 0, 1, 1]),
            (ReduceOp::BitAnd, [0, 0, 1, 1]),
            (ReduceOp::Max, [0, 1, 1, 1]),
            (ReduceOp::BitOr, [0, 1, 1, 1]),
            (ReduceOp::BitXor, [0, 1, 0, 1]),
        ];
        for (op, expected) in table {
            let got = [[0, 0].as_slice(), &[0, 7], &[2, 4], &[0x80]].map(|x| bits(DType::Bool, op, x, &[]));
            assert_eq!(got, expected, "{op}");
        }
    }

    #[test]
    fn integers_wrap_and_compare_with_their_own_sign() {
        assert_eq!(bits(DType::I32, ReduceOp::Sum, &[0x7fff_ffff, 1], &[]), 0x8000_0000);
        assert_eq!(bits(DType::U16, ReduceOp::Prod, &[0xffff, 0xffff], &[]), 1);
        assert_eq!(bits(DType::I16, ReduceOp::Min, &[0xffff, 1], &[]), 0xffff);
        assert_eq!(bits(DType::U16, ReduceOp::Min, &[0xffff, 1], &[]), 1);
        assert_eq!(bits(DType::U64, ReduceOp::BitXor, &[6, 3, u64::MAX], &[]), !5);
    }

    #[test]
    fn buffers_that_do_not_fit_are_told_and_nothing_is_written() {
        let says = |inputs: &[&[u8]], scalars: &[f64], op: ReduceOp, length: usize| {
            let mut output = vec![0xaa; length];
            let error = reference(DType::F32, op, inputs, scalars, &mut output).unwrap_err();
            assert!(output.iter().all(|byte| *byte == 0xaa));
            error.to_string()
        };
        assert_eq!(
            says(&[], &[], ReduceOp::Sum, 4),
            "sum of f32: the number of inputs should be at least 1, got 0"
        );
        assert_eq!(
            says(&[&[0; 6]], &[], ReduceOp::Sum, 6),
            "sum of f32: the length of the output in bytes should be a multiple of 4, got 6"
        );
        assert_eq!(
            says(&[&[0; 8], &[0; 4]], &[], ReduceOp::Sum, 8),
            "sum of f32: the length of input 1 in bytes should be that of the output, 8, got 4"
        );
        assert_eq!(
            says(&[&[0; 8], &[0; 8]], &[1.0], ReduceOp::PreMulSum(1.0), 8),
            "premul_sum of f32: the number of scalars should be that of the inputs, 2, got 1"
        );
        let refused = reference(DType::Bool, ReduceOp::Sum, &[&[1]], &[], &mut [0]);
        assert!(matches!(refused, Err(Error::Unsupported { op: "sum", dtype: DType::Bool, .. })));
    }
}
