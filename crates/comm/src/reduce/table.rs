//! Which kernel reduces which (dtype, op) pair. The pairs are those of
//! `unisono_core::reduce_op::is_supported`; a test holds the two together.

use unisono_core::{DType, ReduceOp};

use super::kernel::Kernel;
use super::kernel::portable;
#[cfg(target_arch = "x86_64")]
use super::kernel::{avx2, avx512};
use super::level::Level;
use super::number::{And, Avg, Max, Min, Or, PreMulSum, Prod, Sum, Xor};
#[cfg(target_arch = "x86_64")]
use super::storage::F16c;
use super::storage::{Bf16, E4m3, E5m2, F16, Native, Truth};

/// The kernels of one level: a row per dtype, a column per op, by their codes.
type Kernels = [[Option<Kernel>; ReduceOp::COUNT]; DType::ALL.len()];

/// The kernel of this pair at this level, if the pair exists, and how many of its elements make one of the dtype.
#[inline]
pub(super) fn find(dtype: DType, op: ReduceOp, level: Level) -> Option<(Kernel, usize)> {
    let kernels = match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => &AVX512,
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => &AVX2,
        _ => &PORTABLE,
    };
    let kernel = kernels[usize::from(dtype.code())][usize::from(op.code())]?;
    // Complex numbers are summed part by part; only their product is an operation on pairs.
    let parts = if dtype.is_complex() && !matches!(op, ReduceOp::Prod) { 2 } else { 1 };
    Some((kernel, parts))
}

macro_rules! kernels {
    ($level:ident, $f16:ty) => {{
        macro_rules! integer {
            ($signed:ty, $unsigned:ty) => {
                [
                    Some($level::<Native<$unsigned>, Sum> as Kernel),
                    Some($level::<Native<$unsigned>, Prod>),
                    Some($level::<Native<$signed>, Min>),
                    Some($level::<Native<$signed>, Max>),
                    Some($level::<Native<$signed>, Avg>),
                    None,
                    Some($level::<Native<$unsigned>, And>),
                    Some($level::<Native<$unsigned>, Or>),
                    Some($level::<Native<$unsigned>, Xor>),
                ]
            };
        }
        macro_rules! float {
            ($storage:ty) => {
                [
                    Some($level::<$storage, Sum> as Kernel),
                    Some($level::<$storage, Prod>),
                    Some($level::<$storage, Min>),
                    Some($level::<$storage, Max>),
                    Some($level::<$storage, Avg>),
                    Some($level::<$storage, PreMulSum>),
                    None,
                    None,
                    None,
                ]
            };
        }
        macro_rules! complex {
            ($part:ty) => {
                [
                    Some($level::<Native<$part>, Sum> as Kernel),
                    Some($level::<Native<[$part; 2]>, Prod>),
                    None,
                    None,
                    Some($level::<Native<$part>, Avg>),
                    Some($level::<Native<$part>, PreMulSum>),
                    None,
                    None,
                    None,
                ]
            };
        }
        let and = Some($level::<Truth, And> as Kernel);
        let or = Some($level::<Truth, Or> as Kernel);
        let xor = Some($level::<Truth, Xor> as Kernel);
        [
            [None, None, and, or, None, None, and, or, xor],
            integer!(i8, u8),
            integer!(u8, u8),
            integer!(i16, u16),
            integer!(u16, u16),
            integer!(i32, u32),
            integer!(u32, u32),
            integer!(i64, u64),
            integer!(u64, u64),
            float!($f16),
            float!(Bf16),
            float!(Native<f32>),
            float!(Native<f64>),
            float!(E4m3),
            float!(E5m2),
            complex!(f32),
            complex!(f64),
        ]
    }};
}

static PORTABLE: Kernels = kernels!(portable, F16);
#[cfg(target_arch = "x86_64")]
static AVX2: Kernels = kernels!(avx2, F16c);
#[cfg(target_arch = "x86_64")]
static AVX512: Kernels = kernels!(avx512, F16c);
