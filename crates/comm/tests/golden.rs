//! Whole all-reduces are held to the hashes of the scalar reference in `tests/golden/reduce.txt`: by every algorithm, between
//! processes and between threads. (The kernels of every level of the instruction set are held to them in `reduce/tests.rs`.)

#![allow(clippy::print_stderr, reason = "a rank tells its parent what went wrong")]

#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../../../tests/golden/inputs.rs"]
mod inputs;
mod support;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use inputs::{COUNT, PATH, line, reductions, scalar};
use libtest_mimic::{Arguments, Failed, Trial};
use support::processes::{self, Orders};
use unisono::settings::AlgorithmChoice;
use unisono::store::{FileStore, MemoryStore, Store};
use unisono::{Call, Communicator, DType, Deadline, Kind, Memory, Operations, RawBuffer, ReduceOp, Window};

const ALGORITHMS: [AlgorithmChoice; 4] =
    [AlgorithmChoice::Auto, AlgorithmChoice::OneShot, AlgorithmChoice::TwoShot, AlgorithmChoice::Direct];
const WORLD_SIZES: [usize; 3] = [2, 3, 8];
/// Of the widest element.
const WINDOW_BYTES: usize = 16 * COUNT;

fn main() -> ExitCode {
    if let Some(orders) = Orders::from_env() {
        let store = FileStore::open(&orders.store, Deadline::after(Duration::from_secs(30)));
        let result = store
            .map_err(|error| error.to_string())
            .and_then(|store| run(&(Arc::new(store) as Arc<dyn Store>), orders.rank, orders.world_size));
        return match result {
            Ok(()) => {
                orders.report(&[]);
                ExitCode::SUCCESS
            }
            Err(problem) => {
                eprintln!("{problem}");
                ExitCode::FAILURE
            }
        };
    }
    let trials = WORLD_SIZES.into_iter().flat_map(|world_size| {
        [
            Trial::test(format!("processes_of_a_world_of_{world_size}"), move || {
                processes::run(world_size, 0).map(drop).map_err(Failed::from)
            }),
            Trial::test(format!("threads_of_a_world_of_{world_size}"), move || run_threads(world_size)),
        ]
    });
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

fn run_threads(world_size: usize) -> Result<(), Failed> {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ranks: Vec<_> = (0..world_size)
        .map(|rank| {
            let store = store.clone();
            std::thread::spawn(move || run(&store, rank, world_size))
        })
        .collect();
    ranks.into_iter().try_for_each(|rank| rank.join().expect("no panic")).map_err(Failed::from)
}

/// All reductions with every algorithm, on one rank.
fn run(store: &Arc<dyn Store>, rank: usize, world_size: usize) -> Result<(), String> {
    let golden = std::fs::read_to_string(PATH).map_err(|error| error.to_string())?;
    let golden: Vec<&str> = golden.lines().collect();
    for algorithm in ALGORITHMS {
        let name = format!("{algorithm:?}");
        let builder = Communicator::builder().store(store.clone()).rank(rank).world_size(world_size);
        let with = builder.job(name.as_str()).algorithm(algorithm).build();
        let check = with.and_then(|communicator| {
            let mut window = communicator.window::<u8>(WINDOW_BYTES, Memory::Host)?;
            let mut wrong = Vec::new();
            for (dtype, op) in reductions() {
                let result = reduce(&communicator, &mut window, dtype, op)?;
                let line = line(dtype, op, world_size, &result);
                if !golden.contains(&line.as_str()) {
                    wrong.push(line);
                }
            }
            window.close(&communicator)?;
            communicator.destroy()?;
            Ok(wrong)
        });
        match check {
            Ok(wrong) if wrong.is_empty() => {}
            Ok(wrong) => {
                return Err(format!(
                    "rank {rank}, {name}: {} hashes differ: {}",
                    wrong.len(),
                    wrong.join("; ")
                ));
            }
            Err(error) => return Err(format!("rank {rank}, {name}: {error}")),
        }
    }
    Ok(())
}

/// The result of one reduction in place in a window, which every algorithm can work on.
fn reduce(
    rank: &Communicator,
    window: &mut Window<u8>,
    dtype: DType,
    op: ReduceOp,
) -> unisono::Result<Vec<u8>> {
    let bytes = COUNT * dtype.size();
    let input = inputs::inputs(dtype, op, rank.world_size()).swap_remove(rank.rank());
    window.lend()?[..bytes].copy_from_slice(&input);
    let op = if op.scalar().is_some() { ReduceOp::PreMulSum(scalar(rank.rank())) } else { op };
    let buffer = RawBuffer { dtype, count: COUNT, ..window.range_mut(0..bytes).raw() };
    // SAFETY: the window is borrowed mutably over this call, which is complete on return.
    rank.submit(unsafe { Call::from_raw(Kind::AllReduce { op }, &[buffer], &[]) })?;
    Ok(window.lend()?[..bytes].to_vec())
}
