//! Two ranks that really meet, as processes of this program: by the store, the secret, the node plane and the shared
//! memory of any job; they reduce in every way there is and check each element.

use std::io::{BufRead as _, BufReader, Write as _};
use std::time::{Duration, Instant};

use unisono::{Builder, Memory, Operations, ReduceOp};

use super::Finding;
use crate::Failure;
use crate::ranks::{Ranks, own_program};

/// Long enough for a machine that is busy, short enough for somebody who waits.
const PATIENCE: Duration = Duration::from_secs(15);
/// Elements of f32: in the call's line, one-shot, two-shot.
const COUNTS: [usize; 3] = [2, 1024, 1 << 18];
/// How late one rank is, so that the other goes to sleep and must be woken.
const LATE: Duration = Duration::from_millis(20);

pub(super) fn check() -> Vec<Finding> {
    const CHECK: &str = "two ranks";
    vec![match start_and_wait() {
        Ok(said) => Finding::ok(CHECK, said),
        Err(failure) => Finding::fail(
            CHECK,
            failure.to_string(),
            "mend what is said above; then: unisono run -n 2 -- PROGRAM",
        ),
    }]
}

fn start_and_wait() -> Result<String, Failure> {
    let mut program = own_program()?;
    program.extend(["doctor".into(), "--as-rank".into()]);
    let mut ranks = Ranks::start(2, program, false)?;
    let mut said = String::new();
    for line in BufReader::new(ranks.take_output()?).lines() {
        said = line.map_err(|error| Failure::new(format!("rank 0 cannot be read: {error}")))?;
    }
    match ranks.wait() {
        None => Ok(said),
        Some(failed) => Err(Failure::new(format!("two ranks could not work together {failed}"))),
    }
}

/// What each rank does; rank 0 says how it went.
pub(super) fn rank() -> Result<(), String> {
    work().map_err(|error| error.to_string())?
}

fn work() -> unisono::Result<Result<(), String>> {
    let start = Instant::now();
    let builder = Builder::from_env()?.init_timeout(PATIENCE).timeout(Some(PATIENCE));
    let communicator = builder.build()?;
    let met = start.elapsed();
    let rank = communicator.rank();
    for count in COUNTS {
        let mut data = input(rank, count);
        if rank == 1 {
            std::thread::sleep(LATE);
        }
        communicator.all_reduce(&mut data, ReduceOp::Sum)?;
        if let Err(wrong) = verify(&data) {
            return Ok(Err(wrong));
        }
    }
    let count = COUNTS[COUNTS.len() - 1];
    let mut window = communicator.window::<f32>(count, Memory::Host)?;
    window.lend()?.copy_from_slice(&input(rank, count));
    communicator.all_reduce(window.range_mut(0..count), ReduceOp::Sum)?;
    let checked = verify(window.lend()?);
    window.close(&communicator)?;
    communicator.destroy()?;
    if rank == 0 && checked.is_ok() {
        let met = met.as_secs_f64() * 1e3;
        // The parent tells whether it heard.
        let _ =
            writeln!(std::io::stdout(), "met in {met:.1} ms; {} all-reduces, all right", COUNTS.len() + 1);
    }
    Ok(checked)
}

/// Small whole numbers, whose sums are exact.
fn input(rank: usize, count: usize) -> Vec<f32> {
    (0..count).map(|at| ((rank + 1) * (at % 97)) as f32).collect()
}

fn verify(got: &[f32]) -> Result<(), String> {
    let expected = |at: usize| (3 * (at % 97)) as f32;
    match got.iter().enumerate().find(|(at, value)| **value != expected(*at)) {
        None => Ok(()),
        Some((at, value)) => Err(format!(
            "wrong result: element {at} of {} should be {}, got {value}",
            got.len(),
            expected(at)
        )),
    }
}
