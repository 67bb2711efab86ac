//! A Rust program that torchrun starts: `torchrun --nproc-per-node 4 --no-python target/release/examples/torchrun`.
//!
//! `Communicator::from_env` reads what the launcher says (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, …) and meets the others in torchrun's own store; `unisono run`,
//! mpirun and srun do as well, and without a launcher there are four threads. With GPUs each rank works on that of its local rank.
//!
//! Each rank has a part of a vector and of a matrix. They find the largest eigenvalue by power iteration: every step gathers the vector, multiplies, and adds up
//! its length.

#![expect(clippy::print_stdout, reason = "a program that people run")]

use unisono::{Communicator, Error, Operations, ReduceOp, Result};

/// Rows of the matrix, on all ranks together: a multiple of the ranks.
const ROWS: usize = 840;

fn main() -> Result<()> {
    let ranks = match Communicator::from_env() {
        Err(Error::LaunchNothing) => Communicator::threads(4)?,
        communicator => return run(communicator?),
    };
    let threads: Vec<_> = ranks.into_iter().map(|rank| std::thread::spawn(move || run(rank))).collect();
    threads
        .into_iter()
        .try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

fn run(rank: Communicator) -> Result<()> {
    let value = largest_eigenvalue(&rank)?;
    // 2 + 2 cos(π / (n + 1)), which that of this matrix is known to be.
    let expected = 2.0 + 2.0 * (std::f64::consts::PI / (ROWS + 1) as f64).cos();
    assert!((value - expected).abs() < 1e-4 * expected, "{value} is not {expected}");
    println!("rank {} of {}: the largest eigenvalue is {value:.5}", rank.rank(), rank.world_size());
    rank.destroy()
}

/// Of the matrix with 2 on the diagonal and −1 beside it.
fn largest_eigenvalue(rank: &Communicator) -> Result<f64> {
    let rows = ROWS / rank.world_size();
    let first = rank.rank() * rows;
    // Alternating, as the eigenvector nearly is.
    let mut mine: Vec<f64> = (first..first + rows).map(|row| if row % 2 == 0 { 1.0 } else { -1.0 }).collect();
    let mut all = vec![0.0; rows * rank.world_size()];
    let mut value = 0.0;
    for _ in 0..200 {
        rank.all_gather_into(&mine, &mut all)?;
        let at = |row: usize| all.get(row).copied().unwrap_or(0.0);
        for (row, element) in (first..).zip(&mut mine) {
            *element = 2.0 * at(row) - at(row.wrapping_sub(1)) - at(row + 1);
        }
        let mut square = [mine.iter().map(|element| element * element).sum::<f64>()];
        rank.all_reduce(&mut square, ReduceOp::Sum)?;
        value = square[0].sqrt();
        mine.iter_mut().for_each(|element| *element /= value);
    }
    Ok(value)
}
