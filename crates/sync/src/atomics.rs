//! The family of atomic words that a protocol is written over: the machine's own ([`Native`]), or loom's, which are
//! larger and record every access.
//!
//! Only the orderings that the protocols use are offered, by name, so that each use says what it means.

/// An atomic word of type `V` (`u32` or `u64`).
pub trait Word<V>: Send + Sync + std::fmt::Debug {
    /// Loads with no ordering: for polling before [`Word::load_acquire`], and for words that carry no announcement.
    fn load_relaxed(&self) -> V;
    /// Loads; what the writer did before the matching release is visible after it.
    fn load_acquire(&self) -> V;
    /// Stores with no ordering.
    fn store_relaxed(&self, value: V);
    /// Stores; everything before it is visible to whoever acquires this value.
    fn store_release(&self, value: V);
    /// Adds (wrapping) and returns the value before; acquire and release.
    fn fetch_add(&self, amount: V) -> V;
    /// Subtracts (wrapping) and returns the value before; acquire and release.
    fn fetch_sub(&self, amount: V) -> V;
    /// Replaces `current` by `new`; the value before, `Ok` if it was `current`. Acquire and release.
    fn compare_exchange(&self, current: V, new: V) -> Result<V, V>;
}

/// A family of atomic words.
pub trait Atomics: 'static {
    /// A 32-bit word, the size a futex can sleep on.
    type Word32: Word<u32>;
    /// A 64-bit word, wide enough to count calls for ever.
    type Word64: Word<u64>;
    /// Lets others run: a pause on the machine, a scheduling point under loom.
    fn pause();
}

macro_rules! word {
    ($word:ty, $value:ty, $order:path) => {
        impl Word<$value> for $word {
            #[inline(always)]
            fn load_relaxed(&self) -> $value {
                use $order as Ordering;
                self.load(Ordering::Relaxed)
            }
            #[inline(always)]
            fn load_acquire(&self) -> $value {
                use $order as Ordering;
                self.load(Ordering::Acquire)
            }
            #[inline(always)]
            fn store_relaxed(&self, value: $value) {
                use $order as Ordering;
                self.store(value, Ordering::Relaxed);
            }
            #[inline(always)]
            fn store_release(&self, value: $value) {
                use $order as Ordering;
                self.store(value, Ordering::Release);
            }
            #[inline(always)]
            fn fetch_add(&self, amount: $value) -> $value {
                use $order as Ordering;
                self.fetch_add(amount, Ordering::AcqRel)
            }
            #[inline(always)]
            fn fetch_sub(&self, amount: $value) -> $value {
                use $order as Ordering;
                self.fetch_sub(amount, Ordering::AcqRel)
            }
            #[inline(always)]
            fn compare_exchange(&self, current: $value, new: $value) -> Result<$value, $value> {
                use $order as Ordering;
                self.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
            }
        }
    };
}

/// The machine's own atomics.
#[derive(Debug)]
pub enum Native {}

word!(core::sync::atomic::AtomicU32, u32, core::sync::atomic::Ordering);
word!(core::sync::atomic::AtomicU64, u64, core::sync::atomic::Ordering);

impl Atomics for Native {
    type Word32 = core::sync::atomic::AtomicU32;
    type Word64 = core::sync::atomic::AtomicU64;

    #[inline(always)]
    fn pause() {
        core::hint::spin_loop();
    }
}

/// Loom's atomics, which explore every interleaving.
#[cfg(loom)]
#[derive(Debug)]
pub enum Loom {}

#[cfg(loom)]
word!(loom::sync::atomic::AtomicU32, u32, loom::sync::atomic::Ordering);
#[cfg(loom)]
word!(loom::sync::atomic::AtomicU64, u64, loom::sync::atomic::Ordering);

#[cfg(loom)]
impl Atomics for Loom {
    type Word32 = loom::sync::atomic::AtomicU32;
    type Word64 = loom::sync::atomic::AtomicU64;

    fn pause() {
        loom::thread::yield_now();
    }
}
