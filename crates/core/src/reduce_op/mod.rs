//! The reductions: their names and wire codes, which (dtype, op) pairs exist, and the scalar reference of each.
//!
//! One table ([`is_supported`]) says what a data type can do; everything else is a typed error before any byte is
//! read. Codes are part of the wire format and of golden hashes: they never change.

use std::fmt;
use std::str::FromStr;

use crate::dtype::DType;
use crate::error::{Error, Result};

mod reference;

pub(crate) use reference::check_buffers;
pub use reference::reference;

/// How a reduction combines elements.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum ReduceOp {
    /// Sum.
    Sum,
    /// Product.
    Prod,
    /// Minimum; −0 is less than +0; NaN wins.
    Min,
    /// Maximum; −0 is less than +0; NaN wins.
    Max,
    /// Sum divided by the world size, at the end (integers towards zero).
    Avg,
    /// Sum of each rank's elements times that rank's own scalar; the product is rounded in the accumulator.
    PreMulSum(f64),
    /// Bitwise and.
    BitAnd,
    /// Bitwise or.
    BitOr,
    /// Bitwise exclusive or.
    BitXor,
}

impl ReduceOp {
    /// Number of reductions; codes are below it.
    pub const COUNT: usize = 9;

    /// Every reduction in the order of the codes; the pre-multiplied sum has the scalar 1.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Sum,
        Self::Prod,
        Self::Min,
        Self::Max,
        Self::Avg,
        Self::PreMulSum(1.0),
        Self::BitAnd,
        Self::BitOr,
        Self::BitXor,
    ];

    /// The name used in messages, settings and Python, without the scalar: `sum`, `premul_sum`, `bit_and`, …
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sum => "sum",
            Self::Prod => "prod",
            Self::Min => "min",
            Self::Max => "max",
            Self::Avg => "avg",
            Self::PreMulSum(_) => "premul_sum",
            Self::BitAnd => "bit_and",
            Self::BitOr => "bit_or",
            Self::BitXor => "bit_xor",
        }
    }

    /// The code used on the wire. The scalar travels beside it.
    pub const fn code(self) -> u8 {
        match self {
            Self::Sum => 0,
            Self::Prod => 1,
            Self::Min => 2,
            Self::Max => 3,
            Self::Avg => 4,
            Self::PreMulSum(_) => 5,
            Self::BitAnd => 6,
            Self::BitOr => 7,
            Self::BitXor => 8,
        }
    }

    /// The reduction with this wire code, or `None`. Only the pre-multiplied sum keeps `scalar`.
    pub fn from_code(code: u8, scalar: f64) -> Option<Self> {
        match Self::ALL.get(usize::from(code)).copied() {
            Some(Self::PreMulSum(_)) => Some(Self::PreMulSum(scalar)),
            op => op,
        }
    }

    /// This rank's own scalar; only the pre-multiplied sum has one.
    pub const fn scalar(self) -> Option<f64> {
        match self {
            Self::PreMulSum(scalar) => Some(scalar),
            _ => None,
        }
    }
}

impl fmt::Display for ReduceOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PreMulSum(scalar) => write!(f, "premul_sum:{scalar:?}"),
            op => f.write_str(op.name()),
        }
    }
}

impl FromStr for ReduceOp {
    type Err = Error;

    /// Reads what `Display` writes: a name, and for the pre-multiplied sum its scalar, as in `premul_sum:2.5`.
    fn from_str(text: &str) -> Result<Self> {
        let (name, scalar) = match text.split_once(':') {
            Some((name, scalar)) => (name, Some(scalar)),
            None => (text, None),
        };
        let op = Self::ALL.into_iter().find(|op| op.name() == name);
        match (op, scalar.map(str::parse)) {
            (Some(Self::PreMulSum(_)), Some(Ok(scalar))) => Ok(Self::PreMulSum(scalar)),
            (Some(Self::PreMulSum(_)), _) => Err(Error::Setting {
                name: "reduction".to_owned(),
                value: text.to_owned(),
                expected: "a scalar after the colon, for example premul_sum:2.5",
            }),
            (Some(op), None) => Ok(op),
            _ => Err(Error::UnknownName { kind: "reduction", got: text.to_owned() }),
        }
    }
}

/// The table: for each dtype the set of its reductions, one bit per code.
const fn supported(dtype: DType) -> u16 {
    const fn bit(op: ReduceOp) -> u16 {
        1 << op.code()
    }
    const ORDER: u16 = bit(ReduceOp::Min) | bit(ReduceOp::Max);
    const RING: u16 = bit(ReduceOp::Sum) | bit(ReduceOp::Prod) | bit(ReduceOp::Avg);
    const BITS: u16 = bit(ReduceOp::BitAnd) | bit(ReduceOp::BitOr) | bit(ReduceOp::BitXor);
    const SCALE: u16 = bit(ReduceOp::PreMulSum(1.0));
    match dtype {
        DType::Bool => ORDER | BITS,
        DType::I8
        | DType::U8
        | DType::I16
        | DType::U16
        | DType::I32
        | DType::U32
        | DType::I64
        | DType::U64 => RING | ORDER | BITS,
        DType::F16 | DType::BF16 | DType::F32 | DType::F64 | DType::F8E4M3 | DType::F8E5M2 => {
            RING | ORDER | SCALE
        }
        DType::Complex64 | DType::Complex128 => RING | SCALE,
    }
}

/// True when `dtype` has the reduction `op`.
///
/// Integers have all but the pre-multiplied sum; floats all but the bitwise ones; complex numbers have no order and no
/// bitwise ones, and their scalar is real; bools have `min` (and), `max` (or) and the bitwise ones.
///
/// ```
/// use unisono_core::{DType, ReduceOp, reduce_op::is_supported};
/// assert!(is_supported(DType::BF16, ReduceOp::Avg));
/// assert!(!is_supported(DType::Complex64, ReduceOp::Max));
/// ```
#[inline]
pub const fn is_supported(dtype: DType, op: ReduceOp) -> bool {
    supported(dtype) >> op.code() & 1 == 1
}

/// Refuses a pair that does not exist, with the reductions that the dtype does have.
#[inline]
pub fn check(dtype: DType, op: ReduceOp) -> Result<()> {
    if is_supported(dtype, op) { Ok(()) } else { Err(unsupported(dtype, op.name())) }
}

#[cold]
pub(crate) fn unsupported(dtype: DType, op: &'static str) -> Error {
    let names: Vec<_> =
        ReduceOp::ALL.into_iter().filter(|op| is_supported(dtype, *op)).map(ReduceOp::name).collect();
    Error::Unsupported { op, dtype, supported: names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_names_round_trip() {
        for (code, op) in ReduceOp::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(op.code()), code);
            assert_eq!(ReduceOp::from_code(op.code(), 1.0), Some(op));
            assert_eq!(op.to_string().parse::<ReduceOp>(), Ok(op));
        }
        assert_eq!(ReduceOp::from_code(9, 1.0), None);
        assert_eq!(ReduceOp::from_code(255, 1.0), None);
    }

    #[test]
    fn only_the_premultiplied_sum_has_a_scalar() {
        assert_eq!(ReduceOp::from_code(5, -0.25), Some(ReduceOp::PreMulSum(-0.25)));
        assert_eq!(ReduceOp::PreMulSum(-0.25).scalar(), Some(-0.25));
        assert_eq!(ReduceOp::Sum.scalar(), None);
        assert_eq!(ReduceOp::PreMulSum(2.5).to_string(), "premul_sum:2.5");
        assert_eq!("premul_sum:1e300".parse(), Ok(ReduceOp::PreMulSum(1e300)));
        for scalar in [1.0 / 3.0, f64::MIN_POSITIVE, f64::INFINITY] {
            let op = ReduceOp::PreMulSum(scalar);
            assert_eq!(op.to_string().parse(), Ok(op));
        }
    }

    #[test]
    fn names_that_do_not_exist_are_told() {
        for text in ["", "SUM", "sum:1", "sum:", "mean", "bit_nand:2"] {
            let expected = Error::UnknownName { kind: "reduction", got: text.to_owned() };
            assert_eq!(text.parse::<ReduceOp>(), Err(expected));
        }
        for text in ["premul_sum", "premul_sum:", "premul_sum:two"] {
            let error = text.parse::<ReduceOp>().unwrap_err().to_string();
            let expected = format!(
                "reduction={text} cannot be read: expected a scalar after the colon, for example premul_sum:2.5"
            );
            assert_eq!(error, expected);
        }
    }

    #[test]
    fn the_table_of_pairs_is_the_documented_one() {
        let sets = |dtype: DType| ReduceOp::ALL.map(|op| is_supported(dtype, op));
        for dtype in DType::ALL {
            let expected = if dtype == DType::Bool {
                [false, false, true, true, false, false, true, true, true]
            } else if dtype.is_complex() {
                [true, true, false, false, true, true, false, false, false]
            } else if dtype.is_float() {
                [true, true, true, true, true, true, false, false, false]
            } else {
                [true, true, true, true, true, false, true, true, true]
            };
            assert_eq!(sets(dtype), expected, "{dtype}");
        }
    }

    #[test]
    fn a_pair_that_does_not_exist_is_an_error_that_lists_what_does() {
        assert_eq!(check(DType::F16, ReduceOp::Sum), Ok(()));
        assert_eq!(
            check(DType::Bool, ReduceOp::Sum).unwrap_err().to_string(),
            "sum is not defined for bool; bool has: min, max, bit_and, bit_or, bit_xor"
        );
        assert_eq!(
            check(DType::I32, ReduceOp::PreMulSum(2.0)).unwrap_err().to_string(),
            "premul_sum is not defined for i32; i32 has: sum, prod, min, max, avg, bit_and, bit_or, bit_xor"
        );
        assert_eq!(
            check(DType::Complex64, ReduceOp::Min).unwrap_err().to_string(),
            "min is not defined for complex64; complex64 has: sum, prod, avg, premul_sum"
        );
    }
}
