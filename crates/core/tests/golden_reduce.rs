//! Holds the scalar reference of every reduction still: one hash per (dtype, op), in `tests/golden/reduce.txt`.
//!
//! The inputs come from a generator of this file, so that they never change. A difference means that results change
//! for users; if that is meant, `UNISONO_BLESS=1 cargo test -p unisono-core --test golden_reduce` writes the file anew.

use std::fmt::Write as _;
use std::path::Path;

use sha2::{Digest, Sha256};
use unisono_core::reduce_op::{is_supported, reference};
use unisono_core::{DType, ReduceOp};

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/reduce.txt");
const COUNT: usize = 2048;
const HEADER: &str =
    "# SHA-256 of the reference results over seeded inputs of 1, 2, 3 and 8 ranks: dtype op hash\n";

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

fn hash(dtype: DType, op: ReduceOp) -> String {
    let mut random = Random(u64::from(dtype.code()) << 8 | u64::from(op.code()));
    let mut hasher = Sha256::new();
    for ranks in [1, 2, 3, 8] {
        let buffers: Vec<_> = (0..ranks).map(|_| buffer(&mut random, dtype)).collect();
        let inputs: Vec<_> = buffers.iter().map(Vec::as_slice).collect();
        let scalars: Vec<_> = (0..ranks).map(|rank| 1.0 / (f64::from(rank) + 1.5)).collect();
        let mut output = vec![0xee; COUNT * dtype.size()];
        reference(dtype, op, &inputs, &scalars, &mut output).unwrap();
        hasher.update(&output);
    }
    hasher.finalize().iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

#[test]
fn the_reference_answers_what_it_always_answered() {
    let mut text = HEADER.to_owned();
    for dtype in DType::ALL {
        for op in ReduceOp::ALL.into_iter().filter(|op| is_supported(dtype, *op)) {
            writeln!(text, "{dtype} {} {}", op.name(), hash(dtype, op)).unwrap();
        }
    }
    if std::env::var_os("UNISONO_BLESS").is_some_and(|value| value == "1") {
        std::fs::create_dir_all(Path::new(PATH).parent().unwrap()).unwrap();
        std::fs::write(PATH, &text).unwrap();
    }
    let golden = std::fs::read_to_string(PATH).unwrap();
    for (ours, golden) in text.lines().zip(golden.lines()) {
        assert_eq!(ours, golden);
    }
    assert_eq!(text.lines().count(), golden.lines().count());
}
