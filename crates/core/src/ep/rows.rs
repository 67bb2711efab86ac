//! Sums of rows, in f32: the one order in which every backend adds.
//!
//! A sum starts from the first row's value, each product and each sum is rounded on its own, nothing is fused, and the result is rounded once
//! to its dtype. A NaN is written as the canonical quiet one. The sum of no row is +0.

use half::{bf16, f16};

use crate::dtype::DType;
use crate::quantised::read;

/// Whether rows of this type can be summed: bf16, f16 and f32.
pub const fn is_summed(dtype: DType) -> bool {
    matches!(dtype, DType::BF16 | DType::F16 | DType::F32)
}

/// The sum of some rows of one length.
#[derive(Clone, Debug)]
pub struct RowSum {
    values: Vec<f32>,
    is_empty: bool,
}

impl RowSum {
    /// Of rows of `hidden` elements; no row yet.
    pub fn new(hidden: usize) -> Self {
        Self { values: vec![0.0; hidden], is_empty: true }
    }

    /// Begins anew.
    pub fn clear(&mut self) {
        self.values.fill(0.0);
        self.is_empty = true;
    }

    /// Adds `row`, little-endian elements of `dtype`.
    ///
    /// # Panics
    /// If [`is_summed`] does not hold for `dtype`: callers check what users give them.
    pub fn add(&mut self, dtype: DType, row: &[u8]) {
        self.merge(dtype, row, |value| value);
    }

    /// Adds `weight` · `row`.
    ///
    /// # Panics
    /// As [`RowSum::add`].
    pub fn add_weighted(&mut self, dtype: DType, row: &[u8], weight: f32) {
        self.merge(dtype, row, |value| weight * value);
    }

    /// Adds values.
    pub fn add_values(&mut self, values: &[f32]) {
        let is_first = std::mem::replace(&mut self.is_empty, false);
        accumulate(&mut self.values, is_first, values, |value| *value);
    }

    /// The sum so far.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Writes the sum, rounded to `dtype`.
    ///
    /// # Panics
    /// As [`RowSum::add`].
    pub fn write(&self, dtype: DType, row: &mut [u8]) {
        let canonical = |value: f32| if value.is_nan() { f32::from_bits(0x7fc0_0000) } else { value };
        let sums = self.values.iter().map(|value| canonical(*value));
        match dtype {
            DType::BF16 => {
                let row = row.as_chunks_mut().0.iter_mut();
                row.zip(sums).for_each(|(element, value)| *element = bf16::from_f32(value).to_le_bytes());
            }
            DType::F16 => {
                let row = row.as_chunks_mut().0.iter_mut();
                row.zip(sums).for_each(|(element, value)| *element = f16::from_f32(value).to_le_bytes());
            }
            DType::F32 => {
                let row = row.as_chunks_mut().0.iter_mut();
                row.zip(sums).for_each(|(element, value)| *element = value.to_le_bytes());
            }
            _ => unreachable!("sums of {dtype}"),
        }
    }

    fn merge(&mut self, dtype: DType, row: &[u8], term: impl Fn(f32) -> f32) {
        let is_first = std::mem::replace(&mut self.is_empty, false);
        match dtype {
            // A signalling NaN stays one here. The sum, or the term, makes it quiet, and it is written as the canonical one.
            DType::BF16 => {
                let widen = |bytes: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                accumulate(&mut self.values, is_first, row.as_chunks().0, |bytes| term(widen(bytes)));
            }
            DType::F16 => {
                let widen = |bytes: &[u8; 2]| f16::from_le_bytes(*bytes).to_f32();
                accumulate(&mut self.values, is_first, row.as_chunks().0, |bytes| term(widen(bytes)));
            }
            DType::F32 => {
                let widen = |bytes: &[u8; 4]| f32::from_le_bytes(*bytes);
                accumulate(&mut self.values, is_first, row.as_chunks().0, |bytes| term(widen(bytes)));
            }
            _ => unreachable!("sums of {dtype}"),
        }
    }
}

/// Adds `value` of each of `elements` to its sum, or begins the sum with it. Two loops, so that each becomes SIMD code.
fn accumulate<E>(sums: &mut [f32], is_first: bool, elements: &[E], value: impl Fn(&E) -> f32) {
    if is_first {
        sums.iter_mut().zip(elements).for_each(|(sum, element)| *sum = value(element));
    } else {
        sums.iter_mut().zip(elements).for_each(|(sum, element)| *sum += value(element));
    }
}

/// The elements of a row as f32.
pub(super) fn widen(dtype: DType, row: &[u8], values: &mut [f32]) {
    for (value, element) in values.iter_mut().zip(row.chunks_exact(dtype.size())) {
        *value = read(dtype, element);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect()
    }

    fn result(sum: &RowSum) -> Vec<f32> {
        let mut row = vec![0xee; sum.values.len() * 2];
        sum.write(DType::BF16, &mut row);
        row.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect()
    }

    #[test]
    fn sums_start_from_the_first_row_and_are_rounded_once() {
        let mut sum = RowSum::new(3);
        assert_eq!(result(&sum), [0.0; 3]);
        sum.add(DType::BF16, &bytes(&[-0.0, 256.0, 1.0]));
        assert_eq!(result(&sum)[0].to_bits(), (-0.0f32).to_bits());
        // 257 needs nine bits; three of its steps are one of bf16's.
        sum.add(DType::BF16, &bytes(&[0.0, 1.0, 1.0]));
        sum.add(DType::BF16, &bytes(&[0.0, 1.0, 1.0]));
        assert_eq!(result(&sum), [0.0, 258.0, 3.0]);
        sum.clear();
        sum.add_weighted(DType::BF16, &bytes(&[2.0, -4.0, 0.0]), 0.25);
        sum.add_values(&[1.0, f32::NAN, 3.0]);
        assert_eq!((result(&sum)[0], result(&sum)[2], result(&sum)[1].to_bits()), (1.5, 3.0, 0x7fc0_0000));
    }
}
