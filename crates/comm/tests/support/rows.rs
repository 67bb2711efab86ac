//! Rows for an all-reduce with residual and norm: what ranks give, and what they must get, bit for bit.

use unisono::half::{bf16, f16};
use unisono::{DType, Kind, ReduceOp};
use unisono_core::fused::{NormOutput, RmsNorm, Row};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub(crate) dtype: DType,
    pub(crate) tokens: usize,
    pub(crate) hidden: usize,
    pub(crate) epsilon: f32,
    pub(crate) output: NormOutput,
    pub(crate) is_in_place: bool,
    /// Of the random values.
    pub(crate) seed: u64,
}

/// What a rank gives, little-endian.
pub(crate) struct Given {
    pub(crate) input: Vec<u8>,
    pub(crate) residual: Vec<u8>,
    pub(crate) weight: Vec<u8>,
}

/// What it must get.
#[derive(PartialEq)]
pub(crate) struct Got {
    pub(crate) residual: Vec<u8>,
    pub(crate) output: Vec<u8>,
    /// One for each token.
    pub(crate) scales: Vec<f32>,
}

/// The scale of 8-bit outputs where one is given.
pub(crate) const SCALE: f32 = 0.037;

impl Rows {
    pub(crate) fn kind(&self) -> Kind {
        Kind::AllReduceRmsNorm {
            hidden: self.hidden as u32,
            epsilon: self.epsilon,
            output: self.output,
            is_in_place: self.is_in_place,
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.tokens * self.hidden
    }

    /// Bytes of an element of the output.
    pub(crate) fn output_size(&self) -> usize {
        self.output.dtype(self.dtype).size()
    }

    /// Every rank has another residual and other weights. Of the third token all bits are random: NaN and infinities too.
    pub(crate) fn given(&self, rank: usize) -> Given {
        let mut state = self.seed ^ (rank as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut next = move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ mixed >> 31
        };
        let mut values = |tokens: usize| -> Vec<u8> {
            let mut all = Vec::with_capacity(tokens * self.hidden * 2);
            for at in 0..tokens * self.hidden {
                let bits = next();
                let value =
                    (bits as u32 as f32 / 2f32.powi(29) - 4.0) * if bits >> 60 == 0 { 40.0 } else { 1.0 };
                let element = match (at / self.hidden == 2, self.dtype) {
                    (true, _) => bits as u16,
                    (_, DType::F16) => f16::from_f32(value).to_bits(),
                    _ => bf16::from_f32(value).to_bits(),
                };
                all.extend(element.to_le_bytes());
            }
            all
        };
        Given { input: values(self.tokens), residual: values(self.tokens), weight: values(1) }
    }

    /// The sum of all inputs, as an all-reduce gives it.
    pub(crate) fn sum(&self, given: &[Given]) -> Vec<u8> {
        let inputs: Vec<&[u8]> = given.iter().map(|given| &given.input[..]).collect();
        let mut sum = vec![0; self.count() * 2];
        unisono::reduce_op::reference(self.dtype, ReduceOp::Sum, &inputs, &[], &mut sum).unwrap();
        sum
    }

    /// What a rank with this `residual` and `weight` gets of these sums.
    pub(crate) fn expected(&self, sum: &[u8], residual: &[u8], weight: &[u8]) -> Got {
        let norm = RmsNorm { dtype: self.dtype, epsilon: self.epsilon, output: self.output };
        let mut residual = residual.to_vec();
        let mut output = vec![0; self.count() * self.output_size()];
        let mut scales = vec![SCALE; self.tokens];
        let (row, out) = (self.hidden * 2, self.hidden * self.output_size());
        for (token, scale) in scales.iter_mut().enumerate() {
            let sides = Row {
                sum: &sum[token * row..][..row],
                residual: &mut residual[token * row..][..row],
                weight,
                output: &mut output[token * out..][..out],
                scale,
            };
            norm.apply(sides).unwrap();
        }
        Got { residual, output, scales }
    }
}
