//! Inputs whose results are held still, and the hashes of those results: part of the tests of several crates, which must all come
//! to the same bits. The generator lies here so that the inputs never change.

use std::fmt::Write as _;

use sha2::{Digest, Sha256};
use unisono_core::reduce_op::is_supported;
use unisono_core::{DType, ReduceOp};

/// Where the hashes are.
pub(crate) const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/reduce.txt");
/// Elements of each rank.
pub(crate) const COUNT: usize = 2048;
/// Worlds that have a hash.
pub(crate) const WORLDS: [usize; 4] = [1, 2, 3, 8];

/// Sebastiano Vigna's splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Bytes of one element without its parts, and for floats the number of mantissa bits.
fn shape(dtype: DType) -> (usize, Option<u32>) {
    match dtype {
        DType::F16 => (2, Some(10)),
        DType::BF16 => (2, Some(7)),
        DType::F32 => (4, Some(23)),
        DType::F64 => (8, Some(52)),
        DType::F8E4M3 => (1, Some(3)),
        DType::F8E5M2 => (1, Some(2)),
        DType::Complex64 => (4, Some(23)),
        DType::Complex128 => (8, Some(52)),
        integer => (integer.size(), None),
    }
}

/// A quarter special values, a quarter any bits, half numbers of a size that leaves room for arithmetic.
fn value(random: &mut Random, size: usize, mantissa: Option<u32>) -> u64 {
    let width = 8 * size as u32;
    let mask = u64::MAX >> (64 - width);
    let sign = 1 << (width - 1);
    let (kind, any) = (random.next() % 4, random.next());
    let bits = match (kind, mantissa) {
        (0, None) => [0, 1, 2, mask, sign, sign - 1, sign + 1, mask - 1][(any % 8) as usize],
        (0, Some(mantissa)) => {
            let infinity = sign - (1 << mantissa);
            let quiet = 1 << (mantissa - 1);
            let specials = [
                0,
                1,
                (1 << mantissa) - 1,
                1 << mantissa,
                infinity - 1,
                infinity,
                infinity + 1,
                infinity + quiet,
                sign - 1,
                sign / 2 - (1 << mantissa),
            ];
            specials[(any >> 1) as usize % specials.len()] | ((any & 1) * sign)
        }
        (1, _) => any,
        (_, None) => (any as i64 >> (64 - width / 2)) as u64,
        (_, Some(mantissa)) => {
            // Exponents around that of one, any sign and mantissa.
            let one = sign / 2 - (1 << mantissa);
            let fraction = any & ((1 << mantissa) - 1);
            (one + (((any >> 60) & 3) << mantissa) - (1 << mantissa)) | fraction | ((any >> 63) * sign)
        }
    };
    bits & mask
}

fn buffer(random: &mut Random, dtype: DType) -> Vec<u8> {
    let (size, mantissa) = shape(dtype);
    (0..COUNT * dtype.size() / size)
        .flat_map(|_| value(random, size, mantissa).to_le_bytes().into_iter().take(size))
        .collect()
}

/// What each rank puts in.
pub(crate) fn inputs(dtype: DType, op: ReduceOp, world_size: usize) -> Vec<Vec<u8>> {
    let seed = u64::from(dtype.code()) << 16 | u64::from(op.code()) << 8 | world_size as u64;
    let mut random = Random(seed);
    (0..world_size).map(|_| buffer(&mut random, dtype)).collect()
}

/// The scalar of a rank in a pre-multiplied sum.
pub(crate) fn scalar(rank: usize) -> f64 {
    1.0 / (rank as f64 + 1.5)
}

/// The line of a result: `dtype op world hash`.
pub(crate) fn line(dtype: DType, op: ReduceOp, world_size: usize, result: &[u8]) -> String {
    let mut line = format!("{dtype} {} {world_size} ", op.name());
    for byte in Sha256::digest(result) {
        write!(line, "{byte:02x}").unwrap();
    }
    line
}

/// Every reduction that exists, in the order of the file.
pub(crate) fn reductions() -> Vec<(DType, ReduceOp)> {
    let of = |dtype| {
        ReduceOp::ALL.into_iter().filter(move |op| is_supported(dtype, *op)).map(move |op| (dtype, op))
    };
    DType::ALL.into_iter().flat_map(of).collect()
}
