//! Every kernel of every level that this machine has, against the scalar reference, byte for byte.

use std::hash::{BuildHasher, RandomState};

use unisono_core::reduce_op::{is_supported, reference};
use unisono_core::{DType, ReduceOp};

use super::Reduction;
use super::level::Level;

#[path = "../../../../tests/golden/inputs.rs"]
mod inputs;

/// Bytes before and after every buffer, which no kernel may write.
const MARGIN: usize = 32;
const POISON: u8 = 0xa5;

struct Random(u64);

impl Random {
    /// A generator with a fresh seed, which every failure prints.
    fn fresh() -> (Self, u64) {
        let seed = RandomState::new().hash_one("seed");
        (Self(seed), seed)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// Size of the parts of an element, and the number of mantissa bits where they are floats.
fn shape(dtype: DType) -> (usize, Option<u32>) {
    match dtype {
        DType::F16 => (2, Some(10)),
        DType::BF16 => (2, Some(7)),
        DType::F32 | DType::Complex64 => (4, Some(23)),
        DType::F64 | DType::Complex128 => (8, Some(52)),
        DType::F8E4M3 => (1, Some(3)),
        DType::F8E5M2 => (1, Some(2)),
        other => (other.size(), None),
    }
}

/// Special values (zeros, denormals, extremes, infinities, NaN with payloads), any bits, and numbers around one.
fn element(random: &mut Random, size: usize, mantissa: Option<u32>) -> [u8; 8] {
    let width = 8 * size as u32;
    let (mask, sign) = (u64::MAX >> (64 - width), 1_u64 << (width - 1));
    let (kind, any) = (random.next() >> 62, random.next());
    let bits = match (kind, mantissa) {
        (0, None) => [0, 1, mask, sign, sign - 1, sign + 1][(any % 6) as usize],
        (0, Some(mantissa)) => {
            let unit = 1 << mantissa;
            let infinity = sign - unit;
            let values =
                [0, 1, unit - 1, unit, infinity - 1, infinity, infinity + 1, sign - 1, infinity + unit / 2];
            values[(any % 9) as usize] | ((any >> 63) * sign)
        }
        (1, _) | (_, None) => any,
        (_, Some(mantissa)) => {
            let one = sign / 2 - (1 << mantissa);
            (one - (1 << mantissa) + (any % (4 << mantissa))) | ((any >> 63) * sign)
        }
    };
    (bits & mask).to_le_bytes()
}

fn buffer(random: &mut Random, dtype: DType, count: usize) -> Vec<u8> {
    let (size, mantissa) = shape(dtype);
    (0..count * dtype.size() / size)
        .flat_map(|_| element(random, size, mantissa).into_iter().take(size))
        .collect()
}

/// A copy of `bytes` at an odd address inside poisoned margins.
struct Unaligned {
    storage: Vec<u8>,
    start: usize,
    length: usize,
}

impl Unaligned {
    fn new(bytes: &[u8], shift: usize) -> Self {
        let mut storage = vec![POISON; bytes.len() + 2 * MARGIN];
        let start = MARGIN / 2 + (shift | 1) % 16;
        storage[start..start + bytes.len()].copy_from_slice(bytes);
        Self { storage, start, length: bytes.len() }
    }

    fn pointer(&mut self) -> *mut u8 {
        self.storage[self.start..].as_mut_ptr()
    }

    fn bytes(&self) -> &[u8] {
        &self.storage[self.start..self.start + self.length]
    }

    fn margins_are_intact(&self) -> bool {
        let end = self.start + self.length;
        self.storage[..self.start].iter().chain(&self.storage[end..]).all(|byte| *byte == POISON)
    }
}

fn pairs() -> impl Iterator<Item = (DType, ReduceOp)> {
    DType::ALL
        .into_iter()
        .flat_map(|dtype| ReduceOp::ALL.map(|op| (dtype, op)))
        .filter(|(dtype, op)| is_supported(*dtype, *op))
}

/// Runs one case out of place, and in place on each source, and compares all bytes.
fn case_agrees(level: Level, dtype: DType, op: ReduceOp, inputs: &[Vec<u8>], scalars: &[f64], what: &str) {
    let length = inputs[0].len();
    let mut expected = vec![POISON; length];
    let slices: Vec<_> = inputs.iter().map(Vec::as_slice).collect();
    reference(dtype, op, &slices, scalars, &mut expected).unwrap();
    let reduction = Reduction::at_level(dtype, &op, level).unwrap();
    let scalars = if op.scalar().is_some() { scalars } else { &[] };
    for place in std::iter::once(None).chain((0..inputs.len()).map(Some)) {
        let mut sources: Vec<_> =
            inputs.iter().enumerate().map(|(rank, bytes)| Unaligned::new(bytes, 3 * rank)).collect();
        let mut separate = Unaligned::new(&vec![POISON; length], 7);
        let mut pointers: Vec<_> = sources.iter_mut().map(Unaligned::pointer).collect();
        let destination = place.map_or_else(|| separate.pointer(), |rank| pointers[rank]);
        let pointers: Vec<_> = pointers.iter_mut().map(|pointer| pointer.cast_const()).collect();
        // SAFETY: all buffers have `length` bytes; the destination is a buffer of its own or exactly one source.
        unsafe { reduction.run(&pointers, scalars, destination, length / dtype.size()) };
        let result = place.map_or(&separate, |rank| &sources[rank]);
        if result.bytes() != expected {
            let at = (0..length).find(|i| result.bytes()[*i] != expected[*i]).unwrap() / dtype.size();
            let bytes = |buffer: &[u8]| buffer[at * dtype.size()..][..dtype.size()].to_vec();
            panic!(
                "{level:?} {op} of {dtype}, {what}, in place on {place:?}: element {at} of {:02x?} should be {:02x?}, is {:02x?}",
                inputs.iter().map(|input| bytes(input)).collect::<Vec<_>>(),
                bytes(&expected),
                bytes(result.bytes())
            );
        }
        let untouched = |rank: usize| place == Some(rank) || sources[rank].bytes() == inputs[rank];
        assert!((0..inputs.len()).all(untouched), "{level:?} {op} of {dtype}, {what}: a source was written");
        let intact = separate.margins_are_intact() && sources.iter().all(Unaligned::margins_are_intact);
        assert!(intact, "{level:?} {op} of {dtype}, {what}, in place on {place:?}: wrote beside the buffer");
    }
}

#[test]
fn every_kernel_agrees_with_the_reference_to_the_bit() {
    let (mut random, seed) = Random::fresh();
    for (dtype, op) in pairs() {
        for ranks in [1, 2, 3, 5, 8] {
            for count in [0, 1, 3, 31, 257, 1000] {
                let inputs: Vec<_> = (0..ranks).map(|_| buffer(&mut random, dtype, count)).collect();
                let scalars: Vec<_> =
                    (0..ranks).map(|_| (random.next() as i64 as f64) * 2.0_f64.powi(-61)).collect();
                let what = format!("{ranks} sources, {count} elements, seed {seed:#x}");
                for level in Level::available() {
                    case_agrees(level, dtype, op, &inputs, &scalars, &what);
                }
            }
        }
    }
}

#[test]
fn every_small_count_agrees_with_the_reference() {
    let (mut random, seed) = Random::fresh();
    for (dtype, op) in pairs() {
        for count in 0..=70 {
            let inputs = [buffer(&mut random, dtype, count), buffer(&mut random, dtype, count)];
            let what = format!("2 sources, {count} elements, seed {seed:#x}");
            for level in Level::available() {
                case_agrees(level, dtype, op, &inputs, &[0.1, -3.0], &what);
            }
        }
    }
}

#[test]
fn every_pair_of_8_bit_and_every_16_bit_value_agrees_with_the_reference() {
    for (dtype, op) in pairs().filter(|(dtype, _)| dtype.size() <= 2) {
        let all: Vec<_> = (0..=u16::MAX).collect();
        let inputs: [Vec<u8>; 2] = if dtype.size() == 1 {
            [all.iter().map(|i| *i as u8).collect(), all.iter().map(|i| (*i >> 8) as u8).collect()]
        } else {
            let shuffled = all.iter().map(|i| i.wrapping_mul(40503).rotate_left(5));
            [
                all.iter().flat_map(|i| i.to_le_bytes()).collect(),
                shuffled.flat_map(u16::to_le_bytes).collect(),
            ]
        };
        for level in Level::available() {
            case_agrees(level, dtype, op, &inputs, &[1.0, 0.75], "all values");
            case_agrees(level, dtype, op, &inputs[..1], &[1.0], "all values alone");
        }
    }
}

#[test]
fn scalars_that_are_special_or_too_large_agree_with_the_reference() {
    let (mut random, seed) = Random::fresh();
    let specials =
        [0.0, -0.0, 1e300, -1e-300, f64::INFINITY, f64::NAN, f64::from_bits(1), 1.0 + 2.0_f64.powi(-24)];
    for (dtype, op) in pairs().filter(|(_, op)| op.scalar().is_some()) {
        let inputs: Vec<_> = specials.iter().map(|_| buffer(&mut random, dtype, 100)).collect();
        for level in Level::available() {
            for (input, scalar) in inputs.iter().zip(specials) {
                let what = format!("scalar {scalar:e}, seed {seed:#x}");
                case_agrees(level, dtype, op, std::slice::from_ref(input), &[scalar], &what);
            }
            case_agrees(level, dtype, op, &inputs, &specials, &format!("special scalars, seed {seed:#x}"));
        }
    }
}

#[test]
fn averages_of_more_sources_than_the_type_can_count_agree_with_the_reference() {
    let (mut random, seed) = Random::fresh();
    for dtype in [DType::I8, DType::U8, DType::I32, DType::U32, DType::F8E4M3] {
        let inputs: Vec<_> = (0..300).map(|_| buffer(&mut random, dtype, 67)).collect();
        for level in Level::available() {
            case_agrees(
                level,
                dtype,
                ReduceOp::Avg,
                &inputs[..200],
                &[],
                &format!("200 sources, seed {seed:#x}"),
            );
            case_agrees(level, dtype, ReduceOp::Avg, &inputs, &[], &format!("300 sources, seed {seed:#x}"));
        }
    }
}

#[test]
fn one_buffer_may_be_every_source_and_the_destination() {
    for level in Level::available() {
        let mut values: Vec<f32> = (0..100_u8).map(f32::from).collect();
        let pointer = values.as_mut_ptr().cast::<u8>();
        let reduction = Reduction::at_level(DType::F32, &ReduceOp::Sum, level).unwrap();
        // SAFETY: the buffer has 100 elements, and the destination is equal to each source.
        unsafe { reduction.run(&[pointer.cast_const(); 3], &[], pointer, 100) };
        assert!(
            values.iter().enumerate().all(|(i, value)| *value == 3.0 * i as f32),
            "{level:?}: {values:?}"
        );
    }
}

#[test]
fn without_a_source_nothing_is_written() {
    let mut out = [POISON; 16];
    let reduction = Reduction::new(DType::BF16, &ReduceOp::Avg);
    // SAFETY: there is no source, and the destination has 8 elements.
    unsafe { reduction.run(&[], &[], out.as_mut_ptr(), 8) };
    assert_eq!(out, [POISON; 16]);
}

#[test]
fn the_table_has_a_kernel_for_each_pair_that_exists_and_for_no_other() {
    for level in Level::available() {
        for (dtype, op) in DType::ALL.into_iter().flat_map(|dtype| ReduceOp::ALL.map(|op| (dtype, op))) {
            let found = Reduction::at_level(dtype, &op, level);
            assert_eq!(found.is_some(), is_supported(dtype, op), "{level:?} {op} of {dtype}");
        }
    }
}

#[test]
#[should_panic(expected = "1 scalars for 2 sources")]
fn a_missing_scalar_is_a_broken_invariant() {
    let (a, b, mut out) = ([0; 4], [0; 4], [0; 4]);
    let reduction = Reduction::new(DType::F32, &ReduceOp::PreMulSum(1.0));
    // SAFETY: all buffers have one element.
    unsafe { reduction.run(&[a.as_ptr(), b.as_ptr()], &[1.0], out.as_mut_ptr(), 1) };
}

#[test]
fn every_level_comes_to_the_golden_hashes() {
    let golden = std::fs::read_to_string(inputs::PATH).unwrap();
    let golden: Vec<&str> = golden.lines().collect();
    for level in Level::available() {
        for (dtype, op) in inputs::reductions() {
            let reduction = Reduction::at_level(dtype, &op, level).unwrap();
            for world_size in inputs::WORLDS {
                let buffers = inputs::inputs(dtype, op, world_size);
                let sources: Vec<*const u8> = buffers.iter().map(|buffer| buffer.as_ptr()).collect();
                let scalars: Vec<f64> = (0..world_size).map(inputs::scalar).collect();
                let mut output = vec![0xee; inputs::COUNT * dtype.size()];
                // SAFETY: all buffers hold `COUNT` elements, and this machine has the level.
                unsafe { reduction.run(&sources, &scalars, output.as_mut_ptr(), inputs::COUNT) };
                let line = inputs::line(dtype, op, world_size, &output);
                assert!(golden.contains(&line.as_str()), "{level:?}: {line}");
            }
        }
    }
}
