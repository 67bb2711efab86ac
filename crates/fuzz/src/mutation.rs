//! Changes to inputs that are right, so that decoders get far before they meet what is wrong: bits, numbers at their
//! limits, pieces that are cut out, doubled or taken from another input. All of it follows from a seed.

/// The longest input.
const MAX_BYTES: usize = 4096;
/// Where decoders change their mind.
const NUMBERS: [u64; 10] = [0, 1, 0x7f, 0x80, 0xff, 0xffff, 0x1_0000, 0x7fff_ffff, 0xffff_ffff, u64::MAX];

/// A source of inputs.
#[derive(Debug)]
pub struct Mutator<'a> {
    inputs: &'a [Vec<u8>],
    state: u64,
}

impl<'a> Mutator<'a> {
    /// Of `inputs`, which are not empty; equal seeds give equal mutations.
    pub const fn new(inputs: &'a [Vec<u8>], seed: u64) -> Self {
        Self { inputs, state: seed }
    }

    /// The next input.
    pub fn next_input(&mut self) -> Vec<u8> {
        let mut bytes = self.pick().to_vec();
        for _ in 0..=self.below(6) {
            self.mutate(&mut bytes);
        }
        bytes.truncate(MAX_BYTES);
        bytes
    }

    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        let at = self.below(bytes.len() + 1);
        let until = at + self.below((bytes.len() - at).min(32) + 1);
        match self.below(8) {
            0 => drop(bytes.drain(at..until)),
            1 => bytes.truncate(at),
            2 => {
                let copy = bytes[at..until].to_vec();
                bytes.splice(at..at, copy);
            }
            3 => {
                let other = self.pick();
                let from = self.below(other.len() + 1);
                bytes.splice(at..until, other[from..].iter().copied());
            }
            4 => {
                let random: Vec<u8> = (0..self.below(16)).map(|_| self.next() as u8).collect();
                bytes.splice(at..at, random);
            }
            5 => {
                let number = NUMBERS[self.below(NUMBERS.len())].wrapping_add(self.next() % 3).wrapping_sub(1);
                let width = [1, 2, 4, 8][self.below(4)].min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
            }
            6 if at < bytes.len() => bytes[at] = self.next() as u8,
            _ if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
            _ => bytes.push(self.next() as u8),
        }
    }

    fn pick(&mut self) -> &'a [u8] {
        &self.inputs[self.below(self.inputs.len())]
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_seed_repeats_itself_and_the_inputs_are_many_and_bounded() {
        let inputs = [b"first input".to_vec(), vec![7; MAX_BYTES], Vec::new()];
        let some = |seed| {
            let mut mutator = Mutator::new(&inputs, seed);
            (0..2000).map(|_| mutator.next_input()).collect::<Vec<_>>()
        };
        assert_eq!(some(5), some(5));
        let different: HashSet<_> = some(6).into_iter().collect();
        assert!(different.len() > 1500, "{}", different.len());
        assert!(different.iter().all(|input| input.len() <= MAX_BYTES));
        // A number of eight bytes is put whole into the middle of one that is right.
        assert!(different.iter().any(|input| input.windows(8).any(|window| window == [0xff; 8])));
    }
}
