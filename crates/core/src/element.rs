//! The Rust types that stand for a [`DType`]: sealed, without padding, and valid for every bit pattern, so that a
//! buffer of them may be filled by a peer.

use half::{bf16, f16};
use num_complex::Complex;

use crate::dtype::DType;

mod sealed {
    pub trait Sealed {}
}

/// A type that collectives can move. Sealed: the implementations below are all there are.
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// The data type of this element.
    const DTYPE: DType;
}

/// An [`Element`] that reductions can combine. Which operations a dtype has is told by
/// `reduce_op::is_supported`.
pub trait Reducible: Element {}

/// A truth value that travels as one byte: zero is false, anything else is true. Reductions answer 0 or 1.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(transparent)]
pub struct Bool8(pub u8);

impl From<bool> for Bool8 {
    fn from(value: bool) -> Self {
        Self(u8::from(value))
    }
}

impl From<Bool8> for bool {
    fn from(value: Bool8) -> Self {
        value.0 != 0
    }
}

/// An 8-bit float with 4 exponent and 3 mantissa bits, finite only (largest value 448), by its bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(transparent)]
#[allow(non_camel_case_types)]
pub struct f8e4m3(pub u8);

/// An 8-bit float with 5 exponent and 2 mantissa bits (largest finite value 57344), by its bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(transparent)]
#[allow(non_camel_case_types)]
pub struct f8e5m2(pub u8);

macro_rules! elements {
    ($($ty:ty => $dtype:ident),* $(,)?) => {$(
        impl sealed::Sealed for $ty {}
        impl Element for $ty {
            const DTYPE: DType = DType::$dtype;
        }
        impl Reducible for $ty {}
    )*};
}

elements! {
    Bool8 => Bool, i8 => I8, u8 => U8, i16 => I16, u16 => U16, i32 => I32, u32 => U32, i64 => I64, u64 => U64,
    f16 => F16, bf16 => BF16, f32 => F32, f64 => F64, f8e4m3 => F8E4M3, f8e5m2 => F8E5M2,
    Complex<f32> => Complex64, Complex<f64> => Complex128,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_has_the_size_of_its_dtype() {
        fn check<T: Element>() {
            assert_eq!(size_of::<T>(), T::DTYPE.size(), "{}", T::DTYPE);
        }
        check::<Bool8>();
        check::<i8>();
        check::<u16>();
        check::<f16>();
        check::<bf16>();
        check::<f8e4m3>();
        check::<f8e5m2>();
        check::<f64>();
        check::<Complex<f32>>();
        check::<Complex<f64>>();
    }
}
