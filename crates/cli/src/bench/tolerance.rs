//! How far sums of floating-point numbers may lie apart when ranks are added in another order than the reference's.
//!
//! Adding n numbers with a rounding after each errs by at most n times half the precision times the sum of their magnitudes;
//! products likewise. That bound, doubled, is computed once for a period of the input, by the scalar reference over magnitudes.

use unisono::{DType, ReduceOp, f8e4m3, f8e5m2, half, reduce_op};

use super::pattern::Patterns;

/// A period of expected numbers and of what each may differ by. A complex number is two.
pub(crate) struct Tolerance {
    dtype: DType,
    expected: Vec<f64>,
    bounds: Vec<f64>,
}

/// Whether another order of the ranks gives other bits.
pub(crate) const fn depends_on_order(dtype: DType, op: ReduceOp) -> bool {
    let rounds = matches!(op, ReduceOp::Sum | ReduceOp::Prod | ReduceOp::Avg | ReduceOp::PreMulSum(_));
    rounds && (dtype.is_float() || dtype.is_complex())
}

impl Tolerance {
    /// For the reduction of all inputs of `patterns` by `op`.
    pub(crate) fn new(
        patterns: &Patterns,
        ranks: usize,
        dtype: DType,
        op: ReduceOp,
    ) -> Result<Self, unisono::Error> {
        let (epsilon, least) = precision(dtype);
        let magnitudes: Vec<Vec<u8>> =
            (0..ranks).map(|rank| magnitudes(dtype, patterns.input(rank))).collect();
        let inputs: Vec<&[u8]> = magnitudes.iter().map(Vec::as_slice).collect();
        let scalars = vec![op.scalar().unwrap_or(1.0).abs(); ranks];
        let mut output = vec![0; patterns.input(0).len()];
        reduce_op::reference(dtype, op, &inputs, &scalars, &mut output)?;
        let bound = |sum: f64| ranks as f64 * (epsilon * sum + least);
        let mut bounds: Vec<f64> = numbers(dtype, &output).into_iter().map(bound).collect();
        if dtype.is_complex() {
            // The magnitude is the real part, and bounds both.
            bounds.chunks_mut(2).for_each(|pair| pair[1] = pair[0]);
        }
        Ok(Self { dtype, expected: numbers(dtype, &patterns.reduced(dtype, op)?), bounds })
    }

    /// Numbers of `got`, which begins at element `first` of what repeats, that lie too far from what is expected.
    pub(crate) fn wrong_from(&self, first: usize, got: &[u8]) -> u64 {
        let size = number_bytes(self.dtype);
        let per_element = self.dtype.size() / size;
        let mut at = first * per_element % self.expected.len();
        let mut wrong = 0;
        for bytes in got.chunks_exact(size) {
            let distance = (number(self.dtype, bytes) - self.expected[at]).abs();
            // What is no number is wrong as well.
            wrong += u64::from(distance.is_nan() || distance > self.bounds[at]);
            at += 1;
            if at == self.expected.len() {
                at = 0;
            }
        }
        wrong
    }
}

/// The distance from 1 to the next number, and the least number above 0.
fn precision(dtype: DType) -> (f64, f64) {
    let (mantissa, least) = match dtype {
        DType::F16 => (10, -24),
        DType::BF16 => (7, -133),
        DType::F8E4M3 => (3, -9),
        DType::F8E5M2 => (2, -16),
        DType::F64 | DType::Complex128 => (52, -1074),
        _ => (23, -149),
    };
    (2f64.powi(-mantissa), 2f64.powi(least))
}

fn numbers(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let size = number_bytes(dtype);
    bytes.chunks_exact(size).map(|bytes| number(dtype, bytes)).collect()
}

/// Bytes of one number: an element, or half of a complex one.
const fn number_bytes(dtype: DType) -> usize {
    if dtype.is_complex() { dtype.size() / 2 } else { dtype.size() }
}

/// One number.
#[inline]
fn number(dtype: DType, bytes: &[u8]) -> f64 {
    match (dtype, bytes) {
        (DType::F16, &[a, b]) => f64::from(half::f16::from_le_bytes([a, b])),
        (DType::BF16, &[a, b]) => f64::from(half::bf16::from_le_bytes([a, b])),
        (DType::F8E4M3, &[a]) => f64::from(f8e4m3(a).to_f32()),
        (DType::F8E5M2, &[a]) => f64::from(f8e5m2(a).to_f32()),
        (_, &[a, b, c, d]) => f64::from(f32::from_le_bytes([a, b, c, d])),
        (_, &[a, b, c, d, e, f, g, h]) => f64::from_le_bytes([a, b, c, d, e, f, g, h]),
        _ => f64::NAN,
    }
}

/// The elements without their signs; of complex ones the sum of both parts' magnitudes, as a real number.
fn magnitudes(dtype: DType, bytes: &[u8]) -> Vec<u8> {
    let mut positive = bytes.to_vec();
    let size = number_bytes(dtype);
    positive.chunks_exact_mut(size).for_each(|number| number[size - 1] &= 0x7f);
    if dtype.is_complex() {
        for element in positive.chunks_exact_mut(2 * size) {
            let sum: f64 = numbers(dtype, element).iter().sum();
            element.fill(0);
            match dtype {
                DType::Complex64 => element[..size].copy_from_slice(&(sum as f32).to_le_bytes()),
                _ => element[..size].copy_from_slice(&sum.to_le_bytes()),
            }
        }
    }
    positive
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANKS: usize = 5;

    /// The sum by the reference with the ranks backwards, and rounded after each.
    fn backwards(patterns: &Patterns, dtype: DType, op: ReduceOp) -> Vec<u8> {
        let mut sum = patterns.input(RANKS - 1).to_vec();
        for rank in (0..RANKS - 1).rev() {
            let mut next = vec![0; sum.len()];
            reduce_op::reference(dtype, op, &[&sum, patterns.input(rank)], &[1.0, 1.0], &mut next).unwrap();
            sum = next;
        }
        sum
    }

    #[test]
    fn another_order_passes_and_other_numbers_do_not() {
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64, DType::Complex64, DType::Complex128] {
            for op in [ReduceOp::Sum, ReduceOp::Prod] {
                let patterns = Patterns::new(dtype, RANKS, 3);
                let tolerance = Tolerance::new(&patterns, RANKS, dtype, op).unwrap();
                let mut got = backwards(&patterns, dtype, op);
                assert_eq!(tolerance.wrong_from(0, &got), 0, "{dtype} {op}");
                let shifted = got[dtype.size() * 7..].to_vec();
                assert_eq!(tolerance.wrong_from(7, &shifted), 0, "{dtype} {op}");
                if op == ReduceOp::Sum {
                    assert!(tolerance.wrong_from(6, &shifted) > 1000, "{dtype}");
                    got[..dtype.size()].fill(0xff);
                    assert!(tolerance.wrong_from(0, &got) > 0, "{dtype}: no number");
                }
            }
        }
    }

    #[test]
    fn only_rounded_reductions_depend_on_the_order() {
        assert!(depends_on_order(DType::BF16, ReduceOp::Avg));
        assert!(!depends_on_order(DType::BF16, ReduceOp::Max));
        assert!(!depends_on_order(DType::I32, ReduceOp::Sum));
    }
}
