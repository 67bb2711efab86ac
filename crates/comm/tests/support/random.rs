//! Random numbers that follow from a key or a seed alone, so that all ranks can draw each other's. SplitMix64; no state to share.

#![allow(dead_code, reason = "each test binary uses its part")]

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// The stream of this seed.
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The stream of this key.
    pub(crate) fn of(key: &[u64]) -> Self {
        let mut random = Self(0x6a09_e667_f3bc_c909);
        for word in key {
            random.0 = random.0.rotate_left(29) ^ word;
            random.0 = random.next();
        }
        random
    }

    /// 64 random bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ bits >> 31
    }

    /// A number below `bound`, which is above 0.
    pub(crate) fn below<N: TryFrom<u64> + TryInto<u64>>(&mut self, bound: N) -> N {
        let below = bound.try_into().ok().and_then(|bound| N::try_from(self.next() % bound).ok());
        below.expect("it is below a number of its type")
    }

    /// A count whose magnitude is as random as its value: 1 to `most`.
    pub(crate) fn count(&mut self, most: usize) -> usize {
        let bits = self.below(most.ilog2() + 1);
        self.below(2 << bits).clamp(1, most)
    }

    /// True once in `times`.
    pub(crate) fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// One of these.
    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// The seed of this run: `UNISONO_TEST_SEED`, or a fresh one.
pub(crate) fn seed() -> u64 {
    match std::env::var("UNISONO_TEST_SEED") {
        Ok(text) => text.parse().expect("UNISONO_TEST_SEED is a number"),
        Err(_) => {
            let mut bytes = [0; 4];
            getrandom::fill(&mut bytes).expect("the system has random bytes");
            u64::from(u32::from_le_bytes(bytes))
        }
    }
}
