//! The cheapest clock there is, for stamps on calls that take a tenth of a microsecond: the processor's time stamp counter.
//!
//! Reading it takes some ten nanoseconds and no system call. Where it does not run evenly through sleep and frequency
//! changes, or on other processors, ticks are nanoseconds of the system's monotonic clock, at twice that price. All
//! processes of a machine read the same counter, so one of them can tell how long ago another one took a stamp; how
//! fast it ticks is measured by who wants to know.

use std::sync::OnceLock;

use rustix::time::{ClockId, clock_gettime};

/// A source of ticks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ticks {
    /// The processor's counter, at a rate of its own.
    Counter,
    /// Nanoseconds of the monotonic clock.
    Clock,
}

impl Ticks {
    /// The best source of this machine.
    pub fn here() -> Self {
        static BEST: OnceLock<Ticks> = OnceLock::new();
        *BEST.get_or_init(|| if counter_is_even() { Self::Counter } else { Self::Clock })
    }

    /// Ticks since some fixed moment.
    #[inline(always)]
    pub fn now(self) -> u64 {
        match self {
            Self::Counter => counter(),
            Self::Clock => monotonic_ns(),
        }
    }
}

/// Nanoseconds of the system's monotonic clock.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    (now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64)
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn counter() -> u64 {
    // SAFETY: every x86-64 processor has the instruction; where a system forbids it, `counter_is_even` has not named it,
    // because no such system promises an even counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Bit 8 of leaf 0x8000_0007: the counter runs at one rate in all states of the processor.
#[cfg(target_arch = "x86_64")]
fn counter_is_even() -> bool {
    use core::arch::x86_64::__cpuid;
    const LEAF: u32 = 0x8000_0007;
    __cpuid(0x8000_0000).eax >= LEAF && __cpuid(LEAF).edx & 1 << 8 != 0
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> u64 {
    monotonic_ns()
}

#[cfg(not(target_arch = "x86_64"))]
fn counter_is_even() -> bool {
    false
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn both_sources_move_forward() {
        for source in [Ticks::here(), Ticks::Clock] {
            let first = source.now();
            std::thread::sleep(std::time::Duration::from_millis(2));
            assert!(source.now() > first, "{source:?}");
        }
    }
}
