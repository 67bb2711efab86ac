//! All-reduce with residual and norm on host memory: every shape and output against the reference, and against plain arithmetic.

use unisono::half::bf16;
use unisono::{
    AllReduceRmsNorm, Buf, BufMut, Call, Communicator, DType, Error, Normalised, Operations, Place,
    RawBuffer, ReduceOp, Result, Stream,
};
use unisono_core::fused::NormOutput;

use crate::support::random;
use crate::support::rows::{Rows, SCALE};
use crate::support::threads::on_threads;

const BF16: Rows = Rows {
    dtype: DType::BF16,
    tokens: 3,
    hidden: 8,
    epsilon: 1e-5,
    output: NormOutput::Same,
    is_in_place: false,
    seed: 0,
};

fn raw(bytes: &mut [u8], dtype: DType) -> RawBuffer {
    let ptr = bytes.as_mut_ptr().expose_provenance() as u64;
    RawBuffer { ptr, count: bytes.len() / dtype.size(), dtype, place: Place::Host }
}

/// Makes the call of `rows` and compares all that this rank gets.
fn check(communicator: &Communicator, rows: &Rows) {
    let given: Vec<_> = (0..communicator.world_size()).map(|rank| rows.given(rank)).collect();
    let sum = rows.sum(&given);
    let mut mine = rows.given(communicator.rank());
    let expected = rows.expected(&sum, &mine.residual, &mine.weight);
    let mut apart = vec![0xee; rows.count() * 2];
    let mut output = vec![0xee; rows.count() * rows.output_size()];
    let mut scales = match rows.output {
        NormOutput::Fp8 => SCALE.to_le_bytes().to_vec(),
        _ => vec![0xee; rows.tokens * 4],
    };
    let residual = raw(&mut mine.residual, rows.dtype);
    let new = if rows.is_in_place { residual } else { raw(&mut apart, rows.dtype) };
    let mut buffers =
        vec![raw(&mut mine.input, rows.dtype), residual, new, raw(&mut mine.weight, rows.dtype)];
    buffers.push(raw(&mut output, rows.output.dtype(rows.dtype)));
    if rows.output != NormOutput::Same {
        buffers.push(raw(&mut scales, DType::F32));
    }
    // SAFETY: all buffers live until the call returns, which it does when it is complete.
    let call = unsafe { Call::from_raw(rows.kind(), &buffers, &[]) };
    communicator.on(&Stream::host()).submit(call).unwrap();
    let got = if rows.is_in_place { &mine.residual } else { &apart };
    assert!(*got == expected.residual, "new residual of {rows:?}");
    assert!(output == expected.output, "output of {rows:?}");
    if rows.output == NormOutput::Fp8PerToken {
        let scales: Vec<f32> = scales.as_chunks().0.iter().map(|scale| f32::from_le_bytes(*scale)).collect();
        assert!(scales == expected.scales, "scales of {rows:?}");
    }
}

#[test]
fn rows_of_every_shape_have_the_bits_of_the_reference() {
    let seed = random::seed();
    for world_size in [1, 2, 5] {
        on_threads(world_size, move |communicator| {
            for dtype in [DType::BF16, DType::F16] {
                for output in [NormOutput::Same, NormOutput::Fp8, NormOutput::Fp8PerToken] {
                    for (tokens, hidden) in [
                        (0, 8),
                        (1, 8),
                        (3, 8),
                        (128, 8),
                        (3, 1024),
                        (5, 7168),
                        (3, 8192),
                        (5, 16384),
                        (3, 24576),
                    ] {
                        for is_in_place in [false, true] {
                            let rows = Rows { dtype, tokens, hidden, output, is_in_place, seed, ..BF16 };
                            check(&communicator, &rows);
                        }
                    }
                }
            }
            communicator.destroy().unwrap();
        });
    }
}

fn in_place<'b>(
    (input, weight): (&'b Vec<bf16>, &'b Vec<bf16>),
    (residual, output): (&'b mut Vec<bf16>, &'b mut Vec<bf16>),
) -> AllReduceRmsNorm<'b, bf16> {
    AllReduceRmsNorm {
        input: input.into(),
        residual: None,
        residual_out: residual.into(),
        weight: weight.into(),
        epsilon: 1e-5,
        output: Normalised::Same(output.into()),
    }
}

#[test]
fn rows_are_what_plain_arithmetic_says_and_an_all_reduce_with_the_rest_behind_it() {
    on_threads(3, |communicator| {
        let rows = Rows { tokens: 2, hidden: 1000, seed: random::seed(), ..BF16 };
        let values = |bytes: &[u8]| -> Vec<bf16> {
            bytes.as_chunks().0.iter().map(|bits| bf16::from_le_bytes(*bits)).collect()
        };
        let given = rows.given(communicator.rank());
        let (input, weight) = (values(&given.input), values(&given.weight));
        let before = values(&given.residual);
        let (mut residual, mut output) = (before.clone(), input.clone());
        communicator.all_reduce_rms_norm(in_place((&input, &weight), (&mut residual, &mut output))).unwrap();
        let mut sum = input.clone();
        communicator.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
        for token in 0..2 {
            let row = |values: &[bf16]| -> Vec<f64> {
                values[token * 1000..][..1000].iter().map(|value| value.to_f64()).collect()
            };
            let added: Vec<f64> =
                row(&sum).iter().zip(row(&before)).map(|(sum, before)| sum + before).collect();
            for (added, x) in added.iter().zip(row(&residual)) {
                assert!(bf16::from_f64(*added).to_f64() == x, "{added} {x}");
            }
            let x = row(&residual);
            let mean = x.iter().map(|x| x * x).sum::<f64>() / 1000.0;
            for (at, got) in row(&output).into_iter().enumerate() {
                let y = x[at] / (mean + 1e-5).sqrt() * weight[at].to_f64();
                // Half a unit in the last place of eight bits, and a little for f32.
                assert!((got - y).abs() <= y.abs() / 255.0, "{y} {got}");
            }
        }
        // In flight, and in a group, it is the same call.
        let (mut again, mut behind) = (before.clone(), output.clone());
        communicator
            .scope(|scope| {
                let first =
                    scope.all_reduce_rms_norm(in_place((&input, &weight), (&mut again, &mut behind)))?;
                first.wait()
            })
            .unwrap();
        assert!(again == residual && behind == output);
        communicator.destroy().unwrap();
    });
}

fn refused(change: impl Fn(&mut Vec<RawBuffer>, &mut Rows) + Send + Sync + 'static, expected: &'static str) {
    on_threads(2, move |communicator| {
        let mut rows = BF16;
        // Three rows for each of five sides.
        let mut memory = vec![0u8; 5 * 48];
        let mut buffers: Vec<RawBuffer> = memory.chunks_mut(48).map(|side| raw(side, DType::BF16)).collect();
        buffers[3].count = 8;
        change(&mut buffers, &mut rows);
        // SAFETY: the memory outlives the call, which is refused.
        let call = unsafe { Call::from_raw(rows.kind(), &buffers, &[]) };
        let error = communicator.submit(call).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Argument { .. }) && text.contains(expected), "{text}");
        communicator.barrier().unwrap();
        communicator.destroy().unwrap();
    });
}

#[test]
fn sides_that_do_not_fit_are_refused_before_anything_happens() {
    refused(
        |_, rows| rows.hidden = 12,
        "elements of a row should be a multiple of 8 from 8 to 24576, got 12",
    );
    refused(|_, rows| rows.hidden = 24584, "elements of a row");
    refused(|_, rows| rows.hidden = 16, "count of the input should be a multiple of 16, got 24");
    refused(|_, rows| rows.epsilon = -1.0, "epsilon should be finite and not negative, got -1");
    refused(|_, rows| rows.epsilon = f32::NAN, "epsilon should be finite and not negative, got NaN");
    refused(|_, rows| rows.output = NormOutput::Fp8, "number of buffers should be 6, got 5");
    refused(|_, rows| rows.is_in_place = true, "memory of the new residual should be that of the residual");
    refused(|buffers, _| buffers[0].dtype = DType::F32, "dtype of the input should be f16 or bf16, got f32");
    refused(|buffers, _| buffers[1].count = 16, "residual should be 24 of bf16, got 16 of bf16");
    refused(|buffers, _| buffers[3].dtype = DType::F16, "weight should be 8 of bf16, got 8 of f16");
    refused(
        |buffers, _| buffers[4].ptr = buffers[0].ptr + 2,
        "memory should be disjoint buffers, got the input and the output that overlap",
    );
    refused(
        |buffers, _| buffers[4].ptr = buffers[2].ptr,
        "memory should be disjoint buffers, got the output and the new residual that overlap",
    );
}

#[test]
fn the_output_may_take_the_place_of_the_input() {
    let seed = random::seed();
    on_threads(2, move |communicator| {
        // Rows that end within blocks of what travels at once.
        let rows = Rows { tokens: 9, hidden: 7168, seed, ..BF16 };
        let given: Vec<_> = (0..2).map(|rank| rows.given(rank)).collect();
        let mut mine = rows.given(communicator.rank());
        let expected = rows.expected(&rows.sum(&given), &mine.residual, &mine.weight);
        let mut new = vec![0; mine.residual.len()];
        let input = raw(&mut mine.input, DType::BF16);
        let buffers = [
            input,
            raw(&mut mine.residual, DType::BF16),
            raw(&mut new, DType::BF16),
            raw(&mut mine.weight, DType::BF16),
            input,
        ];
        // SAFETY: all buffers live until the call returns.
        let call = unsafe { Call::from_raw(rows.kind(), &buffers, &[]) };
        communicator.submit(call).unwrap();
        assert!(mine.input == expected.output && new == expected.residual);
        communicator.destroy().unwrap();
    });
}

#[test]
fn ranks_that_normalise_otherwise_are_named() {
    let results = on_threads(2, |communicator| -> Result<()> {
        let (input, weight) = (vec![bf16::ONE; 16], vec![bf16::ONE; 8]);
        let (mut residual, mut output) = (input.clone(), input.clone());
        communicator.all_reduce_rms_norm(AllReduceRmsNorm {
            input: Buf::from(&input),
            residual: None,
            residual_out: BufMut::from(&mut residual),
            weight: Buf::from(&weight),
            epsilon: [1e-5, 1e-6][communicator.rank()],
            output: Normalised::Same(BufMut::from(&mut output)),
        })
    });
    for result in results {
        let text = result.unwrap_err().to_string();
        for (rank, epsilon) in ["1e-5", "1e-6"].iter().enumerate() {
            let call = format!("on rank {rank} (bf16, 16, rows of 8, epsilon {epsilon}, in place)");
            assert!(text.contains(&format!("all_reduce_rms_norm #1 {call}")), "{text}");
        }
    }
}
