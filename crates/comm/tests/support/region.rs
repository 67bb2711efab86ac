//! Memory for one buffer of a call, at any byte address, with guards on both sides: plain or inside a window.

use unisono::{DType, Element, Place, RawBuffer, Result, Window};

/// Bytes on each side of a buffer that no collective may touch.
pub(crate) const GUARD: usize = 64;
/// Largest distance of a buffer from the alignment of every type.
pub(crate) const MAX_SHIFT: usize = 15;
const GUARD_BYTE: u8 = 0xc3;

/// Bytes that a region occupies of a window.
pub(crate) const fn footprint(bytes: usize) -> usize {
    (GUARD + MAX_SHIFT + bytes + GUARD).next_multiple_of(16)
}

/// A buffer and its guards.
pub(crate) struct Region {
    /// First byte of the buffer; guards lie before and behind.
    base: *mut u8,
    bytes: usize,
    place: Place,
    /// The memory, unless it is a window's.
    _memory: Vec<u128>,
}

impl Region {
    /// Plain memory, `shift` bytes behind an address that suits every type.
    pub(crate) fn plain(bytes: usize, shift: usize) -> Self {
        let mut memory = vec![0u128; footprint(bytes) / 16];
        let base = memory.as_mut_ptr().cast::<u8>().wrapping_add(GUARD + shift);
        Self::guarded(base, bytes, Place::Host, memory)
    }

    /// Memory at byte `at` of our copy of `window`, `shift` bytes further, which must outlive the region.
    pub(crate) fn in_window(window: &mut Window<u8>, at: usize, bytes: usize, shift: usize) -> Result<Self> {
        let place = Place::Window { id: window.id() };
        let all = &mut window.lend()?[at..at + footprint(bytes)];
        Ok(Self::guarded(all.as_mut_ptr().wrapping_add(GUARD + shift), bytes, place, Vec::new()))
    }

    fn guarded(base: *mut u8, bytes: usize, place: Place, memory: Vec<u128>) -> Self {
        let mut region = Self { base, bytes, place, _memory: memory };
        let all = region.with_guards();
        all[..GUARD].fill(GUARD_BYTE);
        all[GUARD + bytes..].fill(GUARD_BYTE);
        region
    }

    fn with_guards(&mut self) -> &mut [u8] {
        // SAFETY: the constructors left a guard before `base` and one behind the buffer; the memory is ours while no
        // collective runs on it, and `self` is borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.base.wrapping_sub(GUARD), self.bytes + 2 * GUARD) }
    }

    /// The buffer.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        let end = GUARD + self.bytes;
        &mut self.with_guards()[GUARD..end]
    }

    /// Whether nobody wrote outside the buffer.
    pub(crate) fn is_guarded(&mut self) -> bool {
        let end = GUARD + self.bytes;
        let all = self.with_guards();
        all[..GUARD].iter().chain(&all[end..]).all(|byte| *byte == GUARD_BYTE)
    }

    /// Length of the buffer in bytes.
    pub(crate) const fn len(&self) -> usize {
        self.bytes
    }

    /// `count` elements from byte `at` of the buffer on, as the library is told about them.
    pub(crate) fn raw(&self, at: usize, count: usize, dtype: DType) -> RawBuffer {
        assert!(at + count * dtype.size() <= self.bytes);
        let ptr = (self.base.expose_provenance() + at) as u64;
        RawBuffer { ptr, count, dtype, place: self.place }
    }

    /// `count` elements from byte `at` on, of plain memory or a window.
    pub(crate) fn slice<T: Element>(&self, at: usize, count: usize) -> &[T] {
        let ptr = self.checked::<T>(at, count);
        // SAFETY: the range lies in the buffer, is aligned as was just checked, and valid for every bit pattern; nobody
        // writes it while the call runs.
        unsafe { std::slice::from_raw_parts(ptr, count) }
    }

    /// The same to be written.
    #[expect(clippy::mut_from_ref, reason = "the region is a cell; each part of it has one user, a call")]
    pub(crate) fn slice_mut<T: Element>(&self, at: usize, count: usize) -> &mut [T] {
        let ptr = self.checked::<T>(at, count);
        // SAFETY: as above; no other slice of these elements is held by the caller.
        unsafe { std::slice::from_raw_parts_mut(ptr, count) }
    }

    fn checked<T>(&self, at: usize, count: usize) -> *mut T {
        let ptr = self.base.wrapping_add(at).cast::<T>();
        assert!(at + count * size_of::<T>() <= self.bytes && ptr.is_aligned());
        ptr
    }
}
