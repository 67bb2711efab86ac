//! How elements lie in memory: each becomes an accumulator, exactly, and comes back with one rounding.
//!
//! Everything is branch-free arithmetic, so that loops over it become SIMD code at every level; f16 has instructions of
//! its own on x86-64.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    _CMP_UNORD_Q, _MM_FROUND_TO_NEAREST_INT, _mm_blendv_ps, _mm_cmpunord_ps, _mm_cvtph_ps, _mm_cvtps_ph,
    _mm_cvtsi32_si128, _mm_cvtsi128_si32, _mm_cvtss_f32, _mm_loadl_epi64, _mm_loadu_ps, _mm_loadu_si128,
    _mm_set_ss, _mm_storel_epi64, _mm_storeu_ps, _mm_storeu_si128, _mm256_blendv_ps, _mm256_castps256_ps128,
    _mm256_cmp_ps, _mm256_cvtph_ps, _mm256_cvtps_ph, _mm256_loadu_ps, _mm256_set1_ps, _mm256_storeu_ps,
};
use std::marker::PhantomData;

use unisono_core::fp8;

use super::number::{Canonical, Number};

#[cfg(target_endian = "big")]
compile_error!("elements travel in little-endian order; a big-endian host would need swaps here");

/// An element type as it lies in memory.
pub(super) trait Storage {
    /// What is loaded and stored; every bit pattern is valid.
    type Stored: Copy;
    /// What is computed with.
    type Number: Number;

    /// Computed with in another type than stored: the kernel then works in tiles.
    const CONVERTED: bool;
    /// Rows are converted by instructions of their own, faster than element by element.
    const ROWS: bool = false;

    fn decode(stored: Self::Stored) -> Self::Number;
    fn encode(number: Self::Number) -> Self::Stored;

    /// Decodes `count` elements, unaligned, into `numbers`.
    ///
    /// # Safety
    ///
    /// `stored` is valid for reads and `numbers` for writes of `count` elements; where [`Storage::ROWS`] is set, the
    /// machine has the instructions.
    #[inline(always)]
    unsafe fn decode_row(stored: *const Self::Stored, numbers: *mut Self::Number, count: usize) {
        for i in 0..count {
            // SAFETY: `i` is below the count that the caller vouches for.
            unsafe { numbers.add(i).write(Self::decode(stored.add(i).read_unaligned())) };
        }
    }

    /// Encodes `count` elements into `stored`, unaligned.
    ///
    /// # Safety
    ///
    /// `numbers` is valid for reads and `stored` for writes of `count` elements; where [`Storage::ROWS`] is set, the
    /// machine has the instructions.
    #[inline(always)]
    unsafe fn encode_row(numbers: *const Self::Number, stored: *mut Self::Stored, count: usize) {
        for i in 0..count {
            // SAFETY: `i` is below the count that the caller vouches for.
            unsafe { stored.add(i).write_unaligned(Self::encode(numbers.add(i).read())) };
        }
    }
}

/// Stored as it is computed with.
pub(super) struct Native<T>(PhantomData<T>);

impl<T: Number + Canonical> Storage for Native<T> {
    type Stored = T;
    type Number = T;
    const CONVERTED: bool = false;

    #[inline(always)]
    fn decode(stored: T) -> T {
        stored
    }

    #[inline(always)]
    fn encode(number: T) -> T {
        number.canonical()
    }
}

macro_rules! converted {
    ($($(#[$doc:meta])* $name:ident: $stored:ty, $number:ty, $decode:expr, $encode:expr;)*) => {$(
        $(#[$doc])*
        pub(super) struct $name;

        impl Storage for $name {
            type Stored = $stored;
            type Number = $number;
            const CONVERTED: bool = size_of::<$stored>() != size_of::<$number>();

            #[inline(always)]
            fn decode(stored: $stored) -> $number {
                $decode(stored)
            }

            #[inline(always)]
            fn encode(number: $number) -> $stored {
                $encode(number)
            }
        }
    )*};
}

converted! {
    /// A byte that is zero or not.
    Truth: u8, u8, |byte| u8::from(byte != 0), |truth| truth;
    /// IEEE half precision.
    F16: u16, f32, f16_to_f32, f16_from_f32;
    /// The upper half of an f32.
    Bf16: u16, f32, |bits| f32::from_bits(u32::from(bits) << 16), bf16_from_f32;
    /// `f8e4m3`.
    E4m3: u8, f32, fp8::decode_e4m3, fp8::encode_e4m3;
    /// `f8e5m2`: the upper half of an f16.
    E5m2: u8, f32, |byte| f16_to_f32(u16::from(byte) << 8), fp8::encode_e5m2;
}
/// Rounds to nearest even in integers, denormals included. The canonical NaN keeps its upper half.
#[inline(always)]
fn bf16_from_f32(value: f32) -> u16 {
    let bits = value.canonical().to_bits();
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

#[inline(always)]
fn f16_to_f32(bits: u16) -> f32 {
    let code = u32::from(bits & 0x7fff);
    let number = fp8::widen::<10, 15>(code);
    // Infinities and NaN are as many exponents further up in f32.
    let magnitude = if code >= 0x7c00 { number + ((255 - 31 - 127 + 15) << 23) } else { number };
    f32::from_bits(magnitude | (u32::from(bits & 0x8000) << 16))
}

#[inline(always)]
fn f16_from_f32(value: f32) -> u16 {
    let code = fp8::narrow::<10, 15>(value, 0x7c00) as u16;
    let sign = (value.to_bits() >> 16) as u16 & 0x8000;
    if value.is_nan() { 0x7e00 } else { code | sign }
}

/// IEEE half precision, by the conversion instructions of F16C.
#[cfg(target_arch = "x86_64")]
pub(super) struct F16c;

#[cfg(target_arch = "x86_64")]
impl Storage for F16c {
    type Stored = u16;
    type Number = f32;
    const CONVERTED: bool = true;
    const ROWS: bool = true;

    #[inline(always)]
    fn decode(stored: u16) -> f32 {
        f16_to_f32(stored)
    }

    #[inline(always)]
    fn encode(number: f32) -> u16 {
        f16_from_f32(number)
    }

    #[inline(always)]
    unsafe fn decode_row(stored: *const u16, numbers: *mut f32, count: usize) {
        let mut at = 0;
        // SAFETY: every step ends at or below the count, and the caller vouches for F16C.
        unsafe {
            while at + 8 <= count {
                _mm256_storeu_ps(numbers.add(at), _mm256_cvtph_ps(_mm_loadu_si128(stored.add(at).cast())));
                at += 8;
            }
            while at + 4 <= count {
                _mm_storeu_ps(numbers.add(at), _mm_cvtph_ps(_mm_loadl_epi64(stored.add(at).cast())));
                at += 4;
            }
            while at < count {
                let half = i32::from(stored.add(at).read_unaligned());
                numbers.add(at).write(_mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half))));
                at += 1;
            }
        }
    }

    #[inline(always)]
    unsafe fn encode_row(numbers: *const f32, stored: *mut u16, count: usize) {
        const EVEN: i32 = _MM_FROUND_TO_NEAREST_INT;
        let mut at = 0;
        // SAFETY: every step ends at or below the count, and the caller vouches for F16C.
        unsafe {
            let nan = _mm256_set1_ps(f32::NAN.canonical());
            while at + 8 <= count {
                let row = _mm256_loadu_ps(numbers.add(at));
                let row = _mm256_blendv_ps(row, nan, _mm256_cmp_ps::<_CMP_UNORD_Q>(row, row));
                _mm_storeu_si128(stored.add(at).cast(), _mm256_cvtps_ph::<EVEN>(row));
                at += 8;
            }
            let nan = _mm256_castps256_ps128(nan);
            while at + 4 <= count {
                let row = _mm_loadu_ps(numbers.add(at));
                let row = _mm_blendv_ps(row, nan, _mm_cmpunord_ps(row, row));
                _mm_storel_epi64(stored.add(at).cast(), _mm_cvtps_ph::<EVEN>(row));
                at += 4;
            }
            while at < count {
                let number = _mm_set_ss(numbers.add(at).read().canonical());
                stored.add(at).write_unaligned(_mm_cvtsi128_si32(_mm_cvtps_ph::<EVEN>(number)) as u16);
                at += 1;
            }
        }
    }
}
