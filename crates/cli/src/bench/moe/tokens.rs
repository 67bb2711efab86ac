//! The tokens of `bench moe`, and what must come of them. Every rank can compute every rank's.

use unisono::DType;
use unisono::ep::reference::cast::{BLOCK, ScaleKind, cast_row};
use unisono::half::{bf16, f16};

use super::{Distribution, Moe};

/// SplitMix64.
#[derive(Clone, Copy)]
struct Random(u64);

impl Random {
    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ bits >> 31
    }

    /// 0 to below 1.
    fn part(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The tokens of all ranks.
pub(super) struct Tokens {
    pub(super) count: usize,
    pub(super) hidden: usize,
    pub(super) top_k: usize,
    pub(super) dtype: DType,
    experts: usize,
    distribution: Distribution,
}

impl Tokens {
    pub(super) const fn new(moe: &Moe, count: usize, dtype: DType) -> Self {
        let Moe { hidden, top_k, experts, distribution, .. } = *moe;
        Self { count, hidden, top_k, dtype, experts, distribution }
    }

    /// The experts of each token of `rank`, all different.
    pub(super) fn selections(&self, rank: usize) -> Vec<i64> {
        let mut random = Random(rank as u64 + 1);
        let mut all: Vec<i64> = Vec::with_capacity(self.count * self.top_k);
        for _ in 0..self.count {
            let start = all.len();
            while all.len() < start + self.top_k {
                let part = random.part();
                let expert = match self.distribution {
                    Distribution::OneHot if all.len() == start => 0,
                    Distribution::Skewed => ((self.experts as f64 + 1.0).powf(part) - 1.0) as usize,
                    _ => (part * self.experts as f64) as usize,
                };
                let mut expert = expert.min(self.experts - 1) as i64;
                while all[start..].contains(&expert) {
                    expert = (expert + 1) % self.experts as i64;
                }
                all.push(expert);
            }
        }
        all
    }

    /// The weights of all selections of a rank.
    pub(super) fn weights(&self) -> Vec<f32> {
        vec![1.0 / self.top_k as f32; self.count * self.top_k]
    }

    /// The rank of `expert`, of so many ranks.
    pub(super) const fn owner(&self, expert: i64, ranks: usize) -> usize {
        expert as usize / (self.experts / ranks)
    }

    /// Element `at` of token `token` of `rank`: of moderate size, with all bits of its type.
    fn element(&self, rank: usize, token: usize, at: usize) -> f32 {
        let bits = (rank as u64) << 48 | (token as u64) << 24 | at as u64;
        let bits =
            bits.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (bits >> 40) as f32 / (1 << 22) as f32 - 2.0
    }

    /// A token's bytes.
    pub(super) fn row(&self, rank: usize, token: usize) -> Vec<u8> {
        let mut row = Vec::with_capacity(self.hidden * self.dtype.size());
        for at in 0..self.hidden {
            let value = self.element(rank, token, at);
            match self.dtype {
                DType::F32 => row.extend(value.to_le_bytes()),
                DType::F16 => row.extend(f16::from_f32(value).to_le_bytes()),
                _ => row.extend(bf16::from_f32(value).to_le_bytes()),
            }
        }
        row
    }

    /// All tokens of a rank.
    pub(super) fn rows(&self, rank: usize) -> Vec<u8> {
        (0..self.count).flat_map(|token| self.row(rank, token)).collect()
    }

    /// A row, cast to 8 bits: its codes, and its scales.
    pub(super) fn cast(&self, row: &[u8]) -> (Vec<u8>, Vec<f32>) {
        let (mut codes, mut scales) = (vec![0; self.hidden], vec![0.0; self.hidden.div_ceil(BLOCK)]);
        cast_row(self.dtype, row, ScaleKind::F32, &mut codes, &mut scales);
        (codes, scales)
    }
}

/// Elements of `size` bytes that differ.
pub(super) fn wrong(got: &[u8], expected: &[u8], size: usize) -> u64 {
    let differing =
        got.chunks(size).zip(expected.chunks(size)).filter(|(got, expected)| got != expected).count();
    (differing + got.len().abs_diff(expected.len()) / size) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_choose_as_they_are_told_and_each_expert_once() {
        let choose = |distribution| {
            let moe =
                Moe { tokens: vec![], hidden: 8, top_k: 4, experts: 16, distribution, multiprocessors: 12 };
            Tokens::new(&moe, 1000, DType::BF16).selections(3)
        };
        for distribution in [Distribution::Uniform, Distribution::Skewed, Distribution::OneHot] {
            let selections = choose(distribution);
            let times = |expert: i64| selections.iter().filter(|chosen| **chosen == expert).count();
            let is_once = |row: &[i64]| row.iter().all(|x| row.iter().filter(|y| x == *y).count() == 1);
            assert!(selections.chunks(4).all(is_once));
            assert!(selections.iter().all(|expert| (0..16).contains(expert)));
            match distribution {
                Distribution::Uniform => assert!(times(0).abs_diff(250) < 80, "{}", times(0)),
                Distribution::Skewed => assert!(times(0) > 2 * times(15), "{} {}", times(0), times(15)),
                Distribution::OneHot => assert_eq!(times(0), 1000),
            }
        }
    }

    #[test]
    fn wrong_elements_are_counted_missing_ones_too() {
        assert_eq!((wrong(&[1, 2, 3, 4], &[1, 2, 3, 5], 2), wrong(&[1, 2], &[1, 2, 3, 4], 2)), (1, 1));
    }
}
