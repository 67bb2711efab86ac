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

/// Writes `bytes` at `source` into as many words as they take, the last one zero-filled: data that travels inside a call slot.
///
/// # Safety
/// `source` is valid for reads of `bytes`.
#[inline]
pub(super) unsafe fn to_words(source: *const u8, bytes: usize, words: &mut [u64]) {
    let (whole, rest) = (bytes / 8, bytes % 8);
    for (at, word) in words[..whole].iter_mut().enumerate() {
        // SAFETY: inside the source.
        *word = unsafe { source.add(8 * at).cast::<u64>().read_unaligned() };
    }
    if rest > 0 {
        let mut last = [0u8; 8];
        // SAFETY: inside the source; nobody else knows `last`.
        unsafe { std::ptr::copy_nonoverlapping(source.add(8 * whole), last.as_mut_ptr(), rest) };
        words[whole] = u64::from_ne_bytes(last);
    }
}
