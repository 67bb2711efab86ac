//! Copies between a user's buffer and memory that peers write: plain bytes through raw pointers, never references.

/// The most that is copied at once. The C library writes larger copies past the caches, which costs a third more time where
/// both sides would have fitted, and gains nothing where they do not (1 and 64 MiB on Zen 5).
const CUT_BYTES: usize = 64 * 1024;

/// Copies `bytes` from `source` to `target`.
///
/// # Safety
/// `source` is valid for reads and `target` for writes of `bytes`; they are disjoint or equal.
#[inline]
pub(super) unsafe fn copy(source: *const u8, target: *mut u8, bytes: usize) {
    if !std::ptr::eq(source, target) {
        let mut at = 0;
        while at < bytes {
            let some = (bytes - at).min(CUT_BYTES);
            // SAFETY: valid and, not being equal, disjoint, as the caller vouches.
            unsafe { std::ptr::copy_nonoverlapping(source.add(at), target.add(at), some) }
            at += some;
        }
    }
}

/// The bytes at `source` as words, zero-filled: data that travels inside a call slot.
///
/// # Safety
/// `source` is valid for reads of `bytes`, at most `8 × N`.
#[inline]
pub(super) unsafe fn to_words<const N: usize>(source: *const u8, bytes: usize) -> [u64; N] {
    let mut words = [0u64; N];
    debug_assert!(bytes <= size_of_val(&words));
    // SAFETY: `words` has room for `bytes`, and nobody else knows it.
    unsafe { std::ptr::copy_nonoverlapping(source, words.as_mut_ptr().cast(), bytes) };
    words
}
