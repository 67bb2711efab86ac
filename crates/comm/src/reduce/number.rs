//! What kernels compute with: the accumulators and the operators on them, without a branch, so that loops become SIMD.
//!
//! Sums, products and bitwise operators do not depend on the sign, so signed integers borrow the unsigned ones.

/// An accumulator.
pub(super) trait Number: Copy {
    /// Any value, to fill arrays with before they are written.
    const ZERO: Self;
    /// The number of sources in the form that `divide` wants.
    type Divisor: Copy;

    fn add(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn divisor(count: usize) -> Self::Divisor;
    fn divide(self, divisor: Self::Divisor) -> Self;
    /// `self` times a real scalar, which is first rounded to the accumulator. Integers have no such operation.
    fn scale(self, scalar: f64) -> Self;
}

/// An accumulator with an order.
pub(super) trait Ordered: Number {
    fn min(self, other: Self) -> Self;
    fn max(self, other: Self) -> Self;
}

/// How two elements become one.
pub(super) trait Operator<A> {
    /// Elements are multiplied by their source's scalar first.
    const SCALED: bool = false;
    /// The result is divided by the number of sources.
    const AVERAGED: bool = false;

    fn combine(a: A, b: A) -> A;
}

macro_rules! operators {
    ($($name:ident: $bound:path, $combine:expr $(, $constant:ident)?);* $(;)?) => {$(
        pub(super) struct $name;

        impl<A: $bound> Operator<A> for $name {
            $(const $constant: bool = true;)?

            #[inline(always)]
            fn combine(a: A, b: A) -> A {
                $combine(a, b)
            }
        }
    )*};
}

operators! {
    Sum: Number, A::add;
    Prod: Number, A::mul;
    Min: Ordered, A::min;
    Max: Ordered, A::max;
    Avg: Number, A::add, AVERAGED;
    PreMulSum: Number, A::add, SCALED;
    And: Bits, A::and;
    Or: Bits, A::or;
    Xor: Bits, A::xor;
}

/// An accumulator with bitwise operators.
pub(super) trait Bits: Number {
    fn and(self, other: Self) -> Self;
    fn or(self, other: Self) -> Self;
    fn xor(self, other: Self) -> Self;
}

/// Truncates without the saturation of `as`, which costs more than the division.
macro_rules! truncated {
    ($quotient:expr, $ty:ident) => {
        // SAFETY: the dividend fits into the type, and the divisor is a count of sources, so at least 1.
        unsafe { ($quotient).to_int_unchecked::<$ty>() }
    };
}

macro_rules! integers {
    ($($ty:ident: $divisor:ident, $divide:expr);* $(;)?) => {$(
        impl Number for $ty {
            const ZERO: Self = 0;
            type Divisor = $divisor;

            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self.wrapping_add(other)
            }

            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                self.wrapping_mul(other)
            }

            #[inline(always)]
            fn divisor(count: usize) -> $divisor {
                count as $divisor
            }

            #[inline(always)]
            fn divide(self, divisor: $divisor) -> Self {
                $divide(self, divisor)
            }

            #[inline(always)]
            fn scale(self, _: f64) -> Self {
                self
            }
        }

        impl Ordered for $ty {
            #[inline(always)]
            fn min(self, other: Self) -> Self {
                Ord::min(self, other)
            }

            #[inline(always)]
            fn max(self, other: Self) -> Self {
                Ord::max(self, other)
            }
        }

        impl Bits for $ty {
            #[inline(always)]
            fn and(self, other: Self) -> Self {
                self & other
            }

            #[inline(always)]
            fn or(self, other: Self) -> Self {
                self | other
            }

            #[inline(always)]
            fn xor(self, other: Self) -> Self {
                self ^ other
            }
        }
    )*};
}

// Up to 32 bits an average divides in floats, which have SIMD division: the quotient of such an integer and a count is
// an integer or at least 1/count away from one. That is far more than the rounding of f32 for 16 bits, and of f64 for
// 32, so that truncation gives the exact answer. A count too large for the float is larger than every such integer.
integers! {
    i8: f32, |sum: i8, count: f32| truncated!(f32::from(sum) / count, i32) as i8;
    u8: f32, |sum: u8, count: f32| truncated!(f32::from(sum) / count, i32) as u8;
    i16: f32, |sum: i16, count: f32| truncated!(f32::from(sum) / count, i32) as i16;
    u16: f32, |sum: u16, count: f32| truncated!(f32::from(sum) / count, i32) as u16;
    i32: f64, |sum: i32, count: f64| truncated!(f64::from(sum) / count, i32);
    u32: f64, |sum: u32, count: f64| truncated!(f64::from(sum) / count, u32);
    i64: i64, |sum: i64, count| sum / count;
    u64: u64, |sum: u64, count| sum / count;
}

macro_rules! floats {
    ($($ty:ident, $nan:literal);* $(;)?) => {$(
        impl Number for $ty {
            const ZERO: Self = 0.0;
            type Divisor = $ty;

            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self + other
            }

            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                self * other
            }

            #[inline(always)]
            fn divisor(count: usize) -> $ty {
                count as $ty
            }

            #[inline(always)]
            fn divide(self, divisor: $ty) -> Self {
                self / divisor
            }

            #[inline(always)]
            fn scale(self, scalar: f64) -> Self {
                self * scalar as $ty
            }
        }

        impl Ordered for $ty {
            /// Equal numbers have equal bits, except for the zeros, where *or* gives −0 and *and* gives +0.
            #[inline(always)]
            fn min(self, other: Self) -> Self {
                let less = if self < other { self } else { other };
                let equal = $ty::from_bits(self.to_bits() | other.to_bits());
                let number = if self == other { equal } else { less };
                if self.is_nan() | other.is_nan() { $ty::NAN } else { number }
            }

            #[inline(always)]
            fn max(self, other: Self) -> Self {
                let greater = if self > other { self } else { other };
                let equal = $ty::from_bits(self.to_bits() & other.to_bits());
                let number = if self == other { equal } else { greater };
                if self.is_nan() | other.is_nan() { $ty::NAN } else { number }
            }
        }

        impl Canonical for $ty {
            #[inline(always)]
            fn canonical(self) -> Self {
                if self.is_nan() { $ty::from_bits($nan) } else { self }
            }
        }

        impl Number for [$ty; 2] {
            const ZERO: Self = [0.0; 2];
            type Divisor = $ty;

            #[inline(always)]
            fn add(self, other: Self) -> Self {
                [self[0] + other[0], self[1] + other[1]]
            }

            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                [self[0] * other[0] - self[1] * other[1], self[0] * other[1] + self[1] * other[0]]
            }

            #[inline(always)]
            fn divisor(count: usize) -> $ty {
                count as $ty
            }

            #[inline(always)]
            fn divide(self, divisor: $ty) -> Self {
                [self[0] / divisor, self[1] / divisor]
            }

            #[inline(always)]
            fn scale(self, scalar: f64) -> Self {
                [self[0] * scalar as $ty, self[1] * scalar as $ty]
            }
        }

        impl Canonical for [$ty; 2] {
            #[inline(always)]
            fn canonical(self) -> Self {
                [self[0].canonical(), self[1].canonical()]
            }
        }
    )*};
}

/// A result as it is stored: floats have one NaN.
pub(super) trait Canonical {
    fn canonical(self) -> Self;
}

floats! { f32, 0x7fc0_0000; f64, 0x7ff8_0000_0000_0000 }

macro_rules! canonical_integers {
    ($($ty:ident)*) => {$(
        impl Canonical for $ty {
            #[inline(always)]
            fn canonical(self) -> Self {
                self
            }
        }
    )*};
}

canonical_integers! { i8 u8 i16 u16 i32 u32 i64 u64 }

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_in_floats_are_exact_for_every_16_bit_sum() {
        for sum in 0..=u16::MAX {
            for count in [1, 2, 3, 5, 7, 8, 255, 256, 257, 32_767, 32_768, 65_535, 65_536, 1 << 25, 1 << 40] {
                assert_eq!(u64::from(sum.divide(u16::divisor(count))), u64::from(sum) / count as u64);
                let signed = sum as i16;
                assert_eq!(i64::from(signed.divide(i16::divisor(count))), i64::from(signed) / count as i64);
            }
        }
    }

    #[test]
    fn averages_in_floats_are_exact_around_every_multiple_that_32_bits_hold() {
        for count in [1_u64, 3, 7, 10, 641, 65_537, 6_700_417, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 1 << 33]
        {
            for multiple in (0..=u64::from(u32::MAX)).step_by((count as usize).max(1 << 20)) {
                for sum in [multiple.wrapping_sub(1), multiple, multiple + 1].map(|sum| sum as u32) {
                    let average = sum.divide(u32::divisor(count as usize));
                    assert_eq!(u64::from(average), u64::from(sum) / count, "{sum} / {count}");
                    let signed = sum as i32;
                    let average = signed.divide(i32::divisor(count as usize));
                    assert_eq!(i64::from(average), i64::from(signed) / count as i64, "{signed} / {count}");
                }
            }
        }
    }
}
