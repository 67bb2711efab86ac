//! The quantised all-reduce on host memory: every type and length against the reference, in windows, and what is refused.

use unisono::half::bf16;
use unisono::{Call, Communicator, DType, Error, Kind, Memory, Operations, Place, RawBuffer, Result};

use crate::support::quantised::Sum;
use crate::support::random;
use crate::support::threads::on_threads;

fn raw(bytes: &mut [u8], dtype: DType) -> RawBuffer {
    let ptr = bytes.as_mut_ptr().expose_provenance() as u64;
    RawBuffer { ptr, count: bytes.len() / dtype.size(), dtype, place: Place::Host }
}

fn submit(communicator: &Communicator, buffers: &[RawBuffer]) -> Result<()> {
    // SAFETY: all buffers live until the call returns, which it does when it is complete.
    let call = unsafe { Call::from_raw(Kind::AllReduceQuantised, buffers, &[]) };
    communicator.submit(call)
}

#[test]
fn quantised_sums_of_every_length_have_the_bits_of_the_reference() {
    let seed = random::seed();
    for world_size in [1, 2, 3, 5] {
        on_threads(world_size, move |communicator| {
            for dtype in [DType::F16, DType::BF16, DType::F32] {
                // Beyond a chunk, too.
                for count in [0, 1, 7, 127, 128, 129, 1000, 16_384, 40_003] {
                    let sum = Sum { dtype, count, seed };
                    let inputs: Vec<_> = (0..world_size).map(|rank| sum.input(rank)).collect();
                    let expected = sum.expected(&inputs);
                    let mut mine = inputs[communicator.rank()].clone();
                    let mut output = vec![0xee; sum.bytes()];
                    submit(&communicator, &[raw(&mut mine, dtype), raw(&mut output, dtype)]).unwrap();
                    assert!(output == expected, "{sum:?} among {world_size}");
                    assert!(mine == inputs[communicator.rank()], "the input of {sum:?}");
                    submit(&communicator, &[raw(&mut mine, dtype)]).unwrap();
                    assert!(mine == expected, "{sum:?} in place among {world_size}");
                }
            }
            communicator.destroy().unwrap();
        });
    }
}

#[test]
fn windows_and_calls_in_flight_give_the_same() {
    let seed = random::seed();
    on_threads(2, move |communicator| {
        let sum = Sum { dtype: DType::BF16, count: 1000, seed };
        let inputs = [sum.input(0), sum.input(1)];
        let values = |bytes: &[u8]| -> Vec<bf16> {
            bytes.as_chunks().0.iter().map(|bits| bf16::from_le_bytes(*bits)).collect()
        };
        let bits = |values: &[bf16]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let expected = bits(&values(&sum.expected(&inputs)));
        let mine = values(&inputs[communicator.rank()]);
        let mut window = communicator.window::<bf16>(1000, Memory::Host).unwrap();
        window.lend().unwrap().copy_from_slice(&mine);
        communicator.all_reduce_quantised(&mut window).unwrap();
        assert_eq!(bits(window.lend().unwrap()), expected);
        window.close(&communicator).unwrap();
        let mut output = vec![bf16::ONE; 1000];
        communicator.scope(|scope| scope.all_reduce_quantised_into(&mine, &mut output)?.wait()).unwrap();
        assert_eq!(bits(&output), expected);
        communicator.destroy().unwrap();
    });
}

#[test]
fn other_types_and_counts_are_refused_and_other_calls_named() {
    on_threads(2, |communicator| {
        let mut memory = [0u8; 64];
        let error = submit(&communicator, &[raw(&mut memory, DType::F64)]).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Argument { .. }), "{text}");
        assert!(text.contains("dtype should be f16, bf16 or f32, got f64"), "{text}");
        let (input, output) = memory.split_at_mut(32);
        let both = [raw(input, DType::BF16), raw(&mut output[..16], DType::BF16)];
        let text = submit(&communicator, &both).unwrap_err().to_string();
        assert!(text.contains("count of the output should be 16, got 8"), "{text}");
        communicator.barrier().unwrap();
        let mut x = [bf16::ONE; 8];
        let result = match communicator.rank() {
            0 => communicator.all_reduce_quantised(&mut x),
            _ => communicator.all_reduce(&mut x, unisono::ReduceOp::Sum),
        };
        let text = result.unwrap_err().to_string();
        assert!(text.contains("all_reduce_quantised #2 on rank 0 (bf16, 8)"), "{text}");
        assert!(text.contains("all_reduce #2 on rank 1 (bf16, 8, sum)"), "{text}");
    });
}
