//! Inputs for the quantised all-reduce, and what ranks must get, bit for bit.

use unisono::DType;
use unisono::half::{bf16, f16};
use unisono_core::quantised::{GROUP, reference};

/// A sum of so many elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sum {
    pub(crate) dtype: DType,
    pub(crate) count: usize,
    /// Of the random values.
    pub(crate) seed: u64,
}

impl Sum {
    pub(crate) fn bytes(&self) -> usize {
        self.count * self.dtype.size()
    }

    /// The input of `rank`, little-endian. Groups have other magnitudes; some are zero, and of some all bits are random, so that there
    /// are NaN, infinities and the smallest and largest numbers too.
    pub(crate) fn input(&self, rank: usize) -> Vec<u8> {
        let mut state = self.seed ^ (rank as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut next = move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ mixed >> 31
        };
        let mut all = Vec::with_capacity(self.bytes());
        let (mut magnitude, mut is_random) = (0.0, false);
        for at in 0..self.count {
            if at % GROUP == 0 {
                let kind = next() % 8;
                is_random = kind == 0;
                magnitude = if kind == 1 { 0.0 } else { 2f32.powi((next() % 24) as i32 - 12) };
            }
            let bits = next();
            let value = ((bits as u32) as f32 / 2f32.powi(31) - 1.0) * magnitude;
            match self.dtype {
                DType::F32 if is_random => all.extend((bits as u32).to_le_bytes()),
                DType::F32 => all.extend(value.to_le_bytes()),
                _ if is_random => all.extend((bits as u16).to_le_bytes()),
                DType::F16 => all.extend(f16::from_f32(value).to_le_bytes()),
                _ => all.extend(bf16::from_f32(value).to_le_bytes()),
            }
        }
        all
    }

    /// What every rank gets.
    pub(crate) fn expected(&self, inputs: &[Vec<u8>]) -> Vec<u8> {
        let views: Vec<&[u8]> = inputs.iter().map(|input| &input[..]).collect();
        let mut output = vec![0xee; self.bytes()];
        reference(self.dtype, &views, &mut output).unwrap();
        output
    }
}
