//! Same inputs, same world: same bits, in every run, wherever the buffers lie and however the ranks are timed.

use unisono::settings::AlgorithmChoice;
use unisono::{Communicator, DType, Memory, Operations, ReduceOp};

use crate::support::data::{Style, fill};
use crate::support::random;
use crate::support::threads::{on_built, on_threads};
use crate::with_algorithm;

const COUNT: usize = 20_011;

/// The input of `rank`: sums of it depend on their order.
fn input(seed: u64, rank: usize) -> Vec<f32> {
    let mut bytes = vec![0; 4 * COUNT];
    fill((seed, 1), (rank, 0), 0, (DType::F32, Style::Moderate), &mut bytes);
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// A hundred sums of the same numbers, in turn in plain memory, in windows and in place.
fn hundred_sums(communicator: &Communicator, seed: u64) -> Vec<u32> {
    let input = input(seed, communicator.rank());
    let mut window = communicator.window::<f32>(COUNT, Memory::Host).unwrap();
    let mut first = Vec::new();
    for turn in 0..100 {
        let mut output = vec![f32::NAN; COUNT];
        match turn % 3 {
            0 => communicator.all_reduce_into(&input, &mut output, ReduceOp::Sum).unwrap(),
            1 => {
                window.lend().unwrap().copy_from_slice(&input);
                communicator.all_reduce(&mut window, ReduceOp::Sum).unwrap();
                output.copy_from_slice(window.lend().unwrap());
            }
            _ => {
                output.copy_from_slice(&input);
                communicator.all_reduce(&mut output, ReduceOp::Sum).unwrap();
            }
        }
        if turn == 0 {
            first = bits(&output);
        }
        assert_eq!(bits(&output), first, "turn {turn}, UNISONO_TEST_SEED={seed}");
    }
    window.close(communicator).unwrap();
    first
}

#[test]
fn a_hundred_sums_on_every_rank_with_every_algorithm_have_the_same_bits() {
    let seed = random::seed();
    let mut all = on_threads(3, move |communicator| hundred_sums(&communicator, seed));
    for algorithm in [AlgorithmChoice::OneShot, AlgorithmChoice::TwoShot, AlgorithmChoice::Direct] {
        let configure = move |builder| with_algorithm(builder, algorithm);
        all.extend(on_built(3, configure, move |communicator| hundred_sums(&communicator, seed)));
    }
    let mut expected = input(seed, 0);
    for rank in 1..3 {
        for (sum, value) in expected.iter_mut().zip(input(seed, rank)) {
            *sum += value;
        }
    }
    for sums in &all {
        let differs = |at: &usize| sums[*at] != expected[*at].to_bits() && !expected[*at].is_nan();
        assert_eq!((0..COUNT).find(differs), None, "UNISONO_TEST_SEED={seed}");
        assert!(sums == &all[0], "ranks or algorithms differ, UNISONO_TEST_SEED={seed}");
    }
}
