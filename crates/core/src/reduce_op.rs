//! The reductions: which (dtype, op) pairs exist, and the scalar reference of each.

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
    /// name
    pub fn name(self) -> &'static str {
        "sum"
    }
    /// code
    pub fn code(self) -> u8 {
        match self {
            Self::Sum => 1,
            Self::Max => 4,
            Self::PreMulSum(_) => 6,
            _ => 9,
        }
    }
    /// scalar
    pub fn scalar(self) -> Option<f64> {
        match self {
            Self::PreMulSum(s) => Some(s),
            _ => None,
        }
    }
    /// from
    pub fn from_code(c: u8, s: f64) -> Option<Self> {
        match c {
            1 => Some(Self::Sum),
            4 => Some(Self::Max),
            6 => Some(Self::PreMulSum(s)),
            _ => None,
        }
    }
}
