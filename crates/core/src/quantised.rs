//! The quantised all-reduce: a sum whose addends, and which itself, travel as f8e4m3 with a scale for each group of elements. The scalar
//! reference, which the CPU runs and the kernels are tested against, bit for bit.
//!
//! Elements are grouped by [`GROUP`] from the first one on; the last group may be short. All in f32, every operation rounded to nearest
//! even, nothing fused:
//!
//! 1. Of each group of each rank: amax = the largest |x| that is finite, 0 if none is; scale = max(amax / 448, 2⁻¹²⁶). An element becomes
//!    q = x / scale as f8e4m3, to nearest even, saturating; what is not finite (infinities and NaN) becomes NaN.
//! 2. s = Σ q · scale, in the order of ranks, from the first one's value on.
//! 3. s is quantised in the same way, and the result is q · scale, rounded to the dtype. A NaN is written as the canonical quiet one.
//!
//! So a group of zeros stays zeros, and one element that overflowed spoils no other. An element that is not the largest of its group is
//! rounded to 4 bits of precision: each addend, and the sum once more, by up to 1/16 of itself, or by up to 2⁻¹⁰ · scale if it is very
//! small (amax / 448 · 2⁻¹⁰ is amax / 458,752).
//!
//! The sum is quantised whether or not it travels: in two hops it does, in one it does not. So the bits depend on neither the form nor the
//! size of the message nor the device.

use half::{bf16, f16};

use crate::dtype::DType;
use crate::error::Result;
use crate::fp8;
use crate::reduce_op::{ReduceOp, check_buffers, unsupported};

/// Elements that share a scale.
pub const GROUP: usize = 128;
/// Bytes of a group on its way: an f8e4m3 for each element, and an f32.
pub const GROUP_BYTES: usize = GROUP + 4;
/// The largest f8e4m3.
const LARGEST: f32 = 448.0;

/// Whether sums of this type can be quantised: f16, bf16 and f32.
pub const fn is_quantised(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16 | DType::F32)
}

/// The quantised sum of `inputs`, one for each rank in order, into `output`. All are elements of `dtype`, little-endian, and equally long.
///
/// # Errors
/// [`crate::Error::Reduction`] if there is no input, a length differs from that of `output` or is no whole number of elements;
/// [`crate::Error::Unsupported`] if `dtype` is none of [`is_quantised`]. Nothing is written then.
pub fn reference(dtype: DType, inputs: &[&[u8]], output: &mut [u8]) -> Result<()> {
    if !is_quantised(dtype) {
        return Err(unsupported(dtype, "quantised sum"));
    }
    check_buffers(dtype, ReduceOp::Sum, inputs, &[], output)?;
    let size = dtype.size();
    for at in (0..output.len()).step_by(GROUP * size) {
        let bytes = (GROUP * size).min(output.len() - at);
        let mut sums = [0.0; GROUP];
        for (rank, input) in inputs.iter().enumerate() {
            let mut values = [0.0; GROUP];
            for (value, element) in values.iter_mut().zip(input[at..][..bytes].chunks_exact(size)) {
                *value = read(dtype, element);
            }
            let received = travel(&values);
            for (sum, value) in sums.iter_mut().zip(received) {
                *sum = if rank == 0 { value } else { *sum + value };
            }
        }
        for (element, value) in output[at..][..bytes].chunks_exact_mut(size).zip(travel(&sums)) {
            write(dtype, value, element);
        }
    }
    Ok(())
}

/// What becomes of a group that is quantised, and back.
fn travel(values: &[f32; GROUP]) -> [f32; GROUP] {
    let largest =
        values.iter().filter(|value| value.is_finite()).fold(0.0f32, |most, value| most.max(value.abs()));
    let scale = (largest / LARGEST).max(f32::MIN_POSITIVE);
    values.map(|value| {
        let quotient = if value.is_finite() { value / scale } else { f32::NAN };
        fp8::decode_e4m3(fp8::encode_e4m3(quotient)) * scale
    })
}

pub(crate) fn read(dtype: DType, element: &[u8]) -> f32 {
    match *element {
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
        [a, b] if dtype == DType::F16 => f16::from_le_bytes([a, b]).to_f32(),
        [a, b] => bf16::from_le_bytes([a, b]).to_f32(),
        _ => unreachable!("{dtype} has 2 or 4 bytes"),
    }
}

fn write(dtype: DType, value: f32, element: &mut [u8]) {
    match (dtype, value.is_nan()) {
        (DType::F16, false) => element.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        (DType::F16, true) => element.copy_from_slice(&0x7e00u16.to_le_bytes()),
        (DType::BF16, false) => element.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
        (DType::BF16, true) => element.copy_from_slice(&0x7fc0u16.to_le_bytes()),
        (_, false) => element.copy_from_slice(&value.to_le_bytes()),
        (_, true) => element.copy_from_slice(&0x7fc0_0000u32.to_le_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    fn sum(inputs: &[&[f32]]) -> Vec<f32> {
        let inputs: Vec<Vec<u8>> = inputs.iter().map(|input| bytes(input)).collect();
        let views: Vec<&[u8]> = inputs.iter().map(|input| &input[..]).collect();
        let mut output = vec![0xee; inputs[0].len()];
        reference(DType::F32, &views, &mut output).unwrap();
        output.as_chunks().0.iter().map(|bits| f32::from_le_bytes(*bits)).collect()
    }

    #[test]
    fn what_eight_bits_hold_is_summed_exactly_and_the_rest_is_rounded_to_them() {
        // Scales are 1, and so is that of the sums.
        assert_eq!(sum(&[&[448.0, 3.0, -0.5, 0.0], &[0.0, -3.0, 8.0, 448.0]]), [448.0, 0.0, 7.5, 448.0]);
        // Ties go to even: 17 lies between 16 and 18, 19 between 18 and 20.
        assert_eq!(
            sum(&[&[448.0, 17.0, 19.0, 17.1, 0.001_953_125, 0.000_9]]),
            [448.0, 16.0, 20.0, 18.0, 0.001_953_125, 0.0]
        );
        // The sum is rounded, too: 16 + 1 are 16. Twice the scale keeps the largest.
        assert_eq!(sum(&[&[448.0, 16.0], &[0.0, 1.0]]), [448.0, 16.0]);
        assert_eq!(sum(&[&[448.0, 16.0], &[448.0, 1.0]]), [896.0, 16.0]);
    }

    #[test]
    fn groups_have_scales_of_their_own_and_the_last_may_be_short() {
        let mut values = vec![1.0; GROUP + 2];
        values[0] = 1e6;
        let result = sum(&[&values]);
        // 1 is less than half of the least that the first scale leaves.
        assert_eq!((result[0], result[1], result[GROUP - 1]), (1e6, 0.0, 0.0));
        assert_eq!(result[GROUP..], [1.0, 1.0]);
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_not_finite_spoils_nothing_else() {
        assert_eq!(sum(&[&[0.0; 3], &[0.0; 3]]), [0.0; 3]);
        let negative = sum(&[&[-0.0, 1.0]]);
        assert_eq!(negative[0].to_bits(), (-0.0f32).to_bits());
        let result = sum(&[&[f32::INFINITY, 448.0, f32::NAN, f32::NEG_INFINITY, 2.0], &[0.0; 5]]);
        assert!(result[0].is_nan() && result[2].is_nan() && result[3].is_nan(), "{result:?}");
        assert_eq!((result[0].to_bits(), result[4]), (0x7fc0_0000, 2.0));
        // A sum that overflows is not finite; neither are its addends what spoils the rest.
        let large = sum(&[&[f32::MAX / 1.5, 1.0e35], &[f32::MAX / 1.5, 1.0e35]]);
        assert!(large[0].is_nan() && large[1] > 1.9e35 && large[1] < 2.1e35, "{large:?}");
        // Below the least scale there is nothing but zeros, and no quotient of nothing by nothing.
        assert_eq!(sum(&[&[f32::from_bits(1), 1e-39]])[0], 0.0);
    }

    #[test]
    fn random_sums_are_as_near_as_is_told() {
        let mut state = 0x1234_5678_9abc_def0u64;
        let mut next = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let inputs: Vec<Vec<f32>> = (0..4).map(|_| (0..1000).map(|_| next()).collect()).collect();
        let views: Vec<&[f32]> = inputs.iter().map(|input| &input[..]).collect();
        for (at, got) in sum(&views).into_iter().enumerate() {
            let exact: f32 = inputs.iter().map(|input| input[at]).sum();
            let magnitudes: f32 = inputs.iter().map(|input| input[at].abs()).sum();
            // Of the addends, and of a sum that is as large as they are together; the least steps of five scales, of at most 4 / 448.
            let most = magnitudes / 16.0 * (2.0 + 1.0 / 16.0) + 5.0 * 4.0 / 448.0 / 1024.0;
            assert!((got - exact).abs() <= most, "{at}: {got} for {exact}, up to {most} apart");
        }
    }

    #[test]
    fn types_and_lengths_that_do_not_fit_are_refused() {
        let mut output = [7; 8];
        assert!(matches!(reference(DType::F64, &[&[0; 8]], &mut output), Err(Error::Unsupported { .. })));
        let others: [&[&[u8]]; 2] = [&[], &[&[0; 8], &[0; 6]]];
        for inputs in others {
            assert!(matches!(reference(DType::F16, inputs, &mut output), Err(Error::Reduction { .. })));
        }
        assert!(matches!(reference(DType::F32, &[&[0; 6]], &mut output[..6]), Err(Error::Reduction { .. })));
        assert_eq!(output, [7; 8]);
    }
}
