//! Inputs whose results are known: each rank's elements repeat with a prime period, so the expected result is computed
//! once for a period, by the scalar reference, and every element of every size is compared with it.

use unisono::{DType, ReduceOp, half, quantised, reduce_op};

use super::Operation;

/// Elements after which the input repeats; prime, so that a shift by a block or a piece never looks right.
const PERIOD: usize = 4093;

/// The inputs of all ranks for one dtype, a period each, as bytes.
pub(crate) struct Patterns {
    size: usize,
    inputs: Vec<Vec<u8>>,
}

impl Patterns {
    pub(crate) fn new(dtype: DType, world_size: usize, seed: u64) -> Self {
        let inputs = (0..world_size).map(|rank| input(dtype, seed ^ (rank as u64 + 1) << 32)).collect();
        Self { size: dtype.size(), inputs }
    }

    /// Of bf16, whole numbers of four bits: the sums of up to 16 ranks are exact in whatever order they are added.
    pub(crate) fn exact(world_size: usize, seed: u64) -> Self {
        let mut patterns = Self::new(DType::U8, world_size, seed);
        patterns.size = DType::BF16.size();
        for input in &mut patterns.inputs {
            let number = |byte: &u8| half::bf16::from_f32(f32::from(byte & 15)).to_le_bytes();
            *input = input.iter().flat_map(number).collect();
        }
        patterns
    }

    /// A period of what part `part` of the output of `rank` holds, and from which element on, if each part has `count` of them and
    /// `reduced` is a period of the reduction. The root is rank 0.
    pub(crate) fn expected<'p>(
        &'p self,
        operation: Operation,
        reduced: &'p [u8],
        (rank, part, count): (usize, usize, usize),
    ) -> (&'p [u8], usize) {
        match operation {
            Operation::AllReduce | Operation::Reduce => (reduced, 0),
            Operation::ReduceScatter => (reduced, rank * count),
            Operation::Scatter => (self.input(0), rank * count),
            Operation::AllToAll => (self.input(part), rank * count),
            Operation::SendRecv => (self.input((rank + self.inputs.len() - 1) % self.inputs.len()), 0),
            _ => (self.input(part), 0),
        }
    }

    /// Fills `target` with the input of `rank`.
    pub(crate) fn fill(&self, rank: usize, target: &mut [u8]) {
        fill(&self.inputs[rank], target);
    }

    /// A period of what a reduction of all inputs gives.
    pub(crate) fn reduced(&self, dtype: DType, op: ReduceOp) -> Result<Vec<u8>, unisono::Error> {
        let inputs: Vec<&[u8]> = self.inputs.iter().map(Vec::as_slice).collect();
        let scalars = vec![op.scalar().unwrap_or(1.0); inputs.len()];
        let mut output = vec![0; PERIOD * self.size];
        reduce_op::reference(dtype, op, &inputs, &scalars, &mut output)?;
        Ok(output)
    }

    /// What the quantised sum of all inputs gives for `count` elements from element `first` on, where a group begins; from the first one on
    /// up to so many that groups begin as before, if there are more.
    pub(crate) fn quantised(
        &self,
        dtype: DType,
        first: usize,
        count: usize,
    ) -> Result<Vec<u8>, unisono::Error> {
        let count = count.min(PERIOD * quantised::GROUP);
        let input = |period: &Vec<u8>| -> Vec<u8> {
            let begin = first % PERIOD * self.size;
            period.iter().cycle().skip(begin).take(count * self.size).copied().collect()
        };
        let inputs: Vec<Vec<u8>> = self.inputs.iter().map(input).collect();
        let views: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
        let mut output = vec![0; count * self.size];
        quantised::reference(dtype, &views, &mut output)?;
        Ok(output)
    }

    /// Elements of `got` that are not those of the quantised sum from element `first` on, where a group begins, to its end, or that of
    /// another group. `whole` has what whole groups give, from the first one on, as many as `got` ends with, or all.
    pub(crate) fn wrong_quantised(
        &self,
        dtype: DType,
        (whole, first): (&[u8], usize),
        got: &[u8],
    ) -> Result<u64, unisono::Error> {
        let count = got.len() / self.size;
        let rest = count % quantised::GROUP;
        let (groups, last) = got.split_at((count - rest) * self.size);
        let expected = self.quantised(dtype, first + count - rest, rest)?;
        Ok(self.wrong_from(whole, first, groups) + self.wrong_from(&expected, 0, last))
    }

    /// A period of the input of `rank`.
    pub(crate) fn input(&self, rank: usize) -> &[u8] {
        &self.inputs[rank]
    }

    /// Elements of `got` that differ from `expected`, which repeats.
    pub(crate) fn wrong(&self, expected: &[u8], got: &[u8]) -> u64 {
        self.wrong_from(expected, 0, got)
    }

    /// The same where `got` starts at element `first` of what repeats, which is not empty if `got` is not.
    pub(crate) fn wrong_from(&self, expected: &[u8], first: usize, got: &[u8]) -> u64 {
        let differing = |expected: &[u8], got: &[u8]| {
            let pairs = expected.chunks(self.size).zip(got.chunks(self.size));
            pairs.filter(|(expected, got)| expected != got).count() as u64
        };
        let period = (expected.len() / self.size).max(1);
        let (mut at, mut rest, mut wrong) = (first % period * self.size, got, 0);
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(expected.len() - at));
            let expected = &expected[at..at + now.len()];
            if expected != now {
                wrong += differing(expected, now);
            }
            (at, rest) = (0, later);
        }
        wrong
    }
}

fn fill(period: &[u8], target: &mut [u8]) {
    for block in target.chunks_mut(period.len()) {
        block.copy_from_slice(&period[..block.len()]);
    }
}

/// A period of random numbers of moderate size, so that sums of many ranks stay finite in every float type.
fn input(dtype: DType, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    };
    let float = |bits: u64| (bits >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
    let mut bytes = Vec::with_capacity(PERIOD * dtype.size());
    for _ in 0..PERIOD {
        let bits = next();
        match dtype {
            DType::F16 => bytes.extend(half::f16::from_f32(float(bits)).to_le_bytes()),
            DType::BF16 => bytes.extend(half::bf16::from_f32(float(bits)).to_le_bytes()),
            DType::F32 => bytes.extend(float(bits).to_le_bytes()),
            DType::F64 => bytes.extend(f64::from(float(bits)).to_le_bytes()),
            DType::F8E4M3 => bytes.push(unisono::f8e4m3::from_f32(float(bits)).0),
            DType::F8E5M2 => bytes.push(unisono::f8e5m2::from_f32(float(bits)).0),
            DType::Complex64 => {
                bytes.extend(float(bits).to_le_bytes());
                bytes.extend(float(next()).to_le_bytes());
            }
            DType::Complex128 => {
                bytes.extend(f64::from(float(bits)).to_le_bytes());
                bytes.extend(f64::from(float(next())).to_le_bytes());
            }
            integer => bytes.extend(&bits.to_le_bytes()[..integer.size()]),
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_wrong_element_is_counted_wherever_it_is() {
        let patterns = Patterns::new(DType::F32, 2, 9);
        let expected = patterns.reduced(DType::F32, ReduceOp::Sum).unwrap();
        let mut got = vec![0; 3 * expected.len() + 40];
        fill(&expected, &mut got);
        assert_eq!(patterns.wrong(&expected, &got), 0);
        for at in [0, expected.len() + 5, got.len() - 1] {
            let mut broken = got.clone();
            broken[at] ^= 1;
            assert_eq!(patterns.wrong(&expected, &broken), 1);
        }
        got.rotate_left(4);
        assert!(patterns.wrong(&expected, &got) > 10_000);
    }

    #[test]
    fn quantised_sums_repeat_where_groups_do_and_the_last_group_is_on_its_own() {
        let dtype = DType::BF16;
        let patterns = Patterns::new(dtype, 2, 9);
        let whole = patterns.quantised(dtype, 0, usize::MAX).unwrap();
        assert_eq!(whole.len(), PERIOD * quantised::GROUP * 2);
        // Longer than all of it, and with a short group.
        let count = PERIOD * quantised::GROUP + 3 * quantised::GROUP + 5;
        let inputs: Vec<Vec<u8>> = (0..2)
            .map(|rank| {
                let mut input = vec![0; count * 2];
                patterns.fill(rank, &mut input);
                input
            })
            .collect();
        let mut got = vec![0; count * 2];
        quantised::reference(dtype, &[&inputs[0], &inputs[1]], &mut got).unwrap();
        assert_eq!(patterns.wrong_quantised(dtype, (&whole, 0), &got), Ok(0));
        let first = 1000 * quantised::GROUP;
        assert_eq!(patterns.wrong_quantised(dtype, (&whole, first), &got[first * 2..]), Ok(0));
        for at in [0, count - 1, count - 6] {
            got[2 * at] ^= 1;
        }
        assert_eq!(patterns.wrong_quantised(dtype, (&whole, 0), &got), Ok(3));
        let plain = patterns.reduced(dtype, ReduceOp::Sum).unwrap();
        assert!(patterns.wrong(&plain, &got) > 100_000);
    }

    #[test]
    fn sums_of_whole_numbers_are_the_same_in_every_order() {
        let patterns = Patterns::exact(16, 3);
        let forwards = patterns.reduced(DType::BF16, ReduceOp::Sum).unwrap();
        let backwards = Patterns { size: 2, inputs: patterns.inputs.iter().rev().cloned().collect() };
        assert_eq!(backwards.reduced(DType::BF16, ReduceOp::Sum).unwrap(), forwards);
        let sum = |at: usize| {
            let element =
                |input: &Vec<u8>| half::bf16::from_le_bytes([input[2 * at], input[2 * at + 1]]).to_f32();
            patterns.inputs.iter().map(element).sum::<f32>()
        };
        for at in 0..PERIOD {
            let got = half::bf16::from_le_bytes([forwards[2 * at], forwards[2 * at + 1]]).to_f32();
            assert_eq!(got, sum(at));
        }
        assert!((1..PERIOD).any(|at| sum(at) != sum(0)));
    }

    #[test]
    fn every_dtype_has_an_input_that_differs_from_rank_to_rank() {
        for dtype in DType::ALL {
            let patterns = Patterns::new(dtype, 2, 1);
            assert_eq!(patterns.input(0).len(), PERIOD * dtype.size());
            assert_ne!(patterns.input(0), patterns.input(1), "{dtype}");
        }
    }
}
