//! Same inputs, same world: same bits, in every run, wherever the buffers lie and however the ranks are timed.

use unisono::settings::AlgorithmChoice;
use unisono::{Builder, Communicator, DType, Memory, Operations, Order, ReduceOp};

use crate::support::data::{Style, fill};
use crate::support::random;
use crate::support::scale::scale;
use crate::support::threads::{on_built, on_threads};
use crate::with_algorithm;

/// Inline, one chunk of staging, and several blocks with a rest.
const COUNTS: [usize; 3] = [11, 4_099, 20_011];

/// The input of `rank`: sums of it depend on their order.
fn input((seed, count): (u64, usize), rank: usize) -> Vec<f32> {
    let mut bytes = vec![0; 4 * count];
    fill((seed, 1), (rank, 0), 0, (DType::F32, Style::Moderate), &mut bytes);
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Sums of the same numbers, a hundred or more, in turn in plain memory, in windows and in place.
fn many_sums(communicator: &Communicator, of: (u64, usize)) -> Vec<u32> {
    let input = input(of, communicator.rank());
    let mut window = communicator.window::<f32>(of.1, Memory::Host).unwrap();
    let mut first = Vec::new();
    for turn in 0..100 * scale() {
        let mut output = vec![f32::NAN; of.1];
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
        assert_eq!(bits(&output), first, "turn {turn} of {} elements, UNISONO_TEST_SEED={}", of.1, of.0);
    }
    window.close(communicator).unwrap();
    first
}

#[test]
fn a_hundred_sums_on_every_rank_with_every_algorithm_have_the_same_bits() {
    let seed = random::seed();
    for (world_size, count) in
        [2, 3, 5].into_iter().flat_map(|world_size| COUNTS.map(|count| (world_size, count)))
    {
        let of = (seed, count);
        let mut all = on_threads(world_size, move |communicator| many_sums(&communicator, of));
        for algorithm in [AlgorithmChoice::OneShot, AlgorithmChoice::TwoShot, AlgorithmChoice::Direct] {
            let configure = move |builder| with_algorithm(builder, algorithm);
            all.extend(on_built(world_size, configure, move |communicator| many_sums(&communicator, of)));
        }
        let by_rank = |builder: Builder| builder.order(Order::Rank);
        all.extend(on_built(world_size, by_rank, move |communicator| many_sums(&communicator, of)));
        let mut expected = input(of, 0);
        for rank in 1..world_size {
            for (sum, value) in expected.iter_mut().zip(input(of, rank)) {
                *sum += value;
            }
        }
        for sums in &all {
            let differs = |at: &usize| sums[*at] != expected[*at].to_bits() && !expected[*at].is_nan();
            assert_eq!((0..count).find(differs), None, "{count} elements, UNISONO_TEST_SEED={seed}");
            assert!(sums == &all[0], "ranks or algorithms differ, UNISONO_TEST_SEED={seed}");
        }
    }
}
