//! SIMD reductions with run-time dispatch.
