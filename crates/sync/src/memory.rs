//! From an address in shared memory to the words that lie there.

use core::sync::atomic::{AtomicU32, AtomicU64};

/// The 64-bit words at `base`.
///
/// # Safety
/// `base` is 8-byte aligned, and `count` words from there stay mapped and writable for `'m`. Whoever else touches them
/// while they are borrowed, in this process or another, does so atomically or not at all.
pub unsafe fn words64<'m>(base: *mut u8, count: usize) -> &'m [AtomicU64] {
    debug_assert!(base.cast::<u64>().is_aligned());
    // SAFETY: the caller vouches for alignment, extent and life; `AtomicU64` has the layout of `u64` and any bit
    // pattern is valid, so what a peer writes there is at worst a wrong number.
    unsafe { core::slice::from_raw_parts(base.cast(), count) }
}

/// The 32-bit words at `base`.
///
/// # Safety
/// As [`words64`], with 4-byte alignment.
pub unsafe fn words32<'m>(base: *mut u8, count: usize) -> &'m [AtomicU32] {
    debug_assert!(base.cast::<u32>().is_aligned());
    // SAFETY: as in `words64`.
    unsafe { core::slice::from_raw_parts(base.cast(), count) }
}
