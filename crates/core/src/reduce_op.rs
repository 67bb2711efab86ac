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
