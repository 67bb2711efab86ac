//! Random numbers that are equal on all ranks that start from one seed (SplitMix64).

/// A generator; print its seed.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A seed that differs from run to run; `FAULTS_SEED` repeats one.
    pub(crate) fn fresh_seed() -> u64 {
        let given = std::env::var("FAULTS_SEED").ok().and_then(|seed| seed.parse().ok());
        given.unwrap_or_else(super::now_ns)
    }

    pub(crate) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }

    /// A number below `bound`.
    pub(crate) const fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// A count whose magnitude is as random as its value: 1 to `most`.
    pub(crate) fn count(&mut self, most: usize) -> usize {
        let bits = self.below(u64::from(most.ilog2()) + 1) as u32;
        (self.below(2 << bits) as usize).clamp(1, most)
    }
}
