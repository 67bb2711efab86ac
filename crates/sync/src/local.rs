//! Flags and counters inside one process: what the other crates use instead of raw atomics.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Something that happens once: raised by any thread, seen by all.
#[derive(Debug, Default)]
pub struct Flag(AtomicBool);

impl Flag {
    /// A flag that is not raised.
    pub const fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// Raises it; true if it was down before. What the caller wrote before is visible to who sees it raised.
    pub fn raise(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }

    /// Whether it is raised.
    #[inline(always)]
    pub fn is_raised(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// A number that several threads add to.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Starts at `value`.
    pub const fn new(value: u64) -> Self {
        Self(AtomicU64::new(value))
    }

    /// Adds `amount` (wrapping) and returns the value before.
    pub fn add(&self, amount: u64) -> u64 {
        self.0.fetch_add(amount, Ordering::AcqRel)
    }

    /// The value now.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Replaces the value; what the caller wrote before is visible to who sees it.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Release);
    }
}
