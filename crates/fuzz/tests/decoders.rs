//! Every target for three seconds: what is right, the corpus, then mutations of both. `UNISONO_TEST_SCALE=20` makes it
//! a minute. A failure tells the seed (`UNISONO_FUZZ_SEED` repeats it) and the input.
#![expect(clippy::print_stdout, reason = "a test that counts")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use libtest_mimic::{Arguments, Failed, Trial};
use unisono_fuzz::mutation::Mutator;
use unisono_fuzz::{TARGETS, Target};

const TIME: Duration = Duration::from_secs(3);

fn main() {
    let mut arguments = Arguments::from_args();
    // Some targets count the descriptors of the process.
    arguments.test_threads = Some(1);
    let trials = TARGETS.iter().map(|target| Trial::test(target.name, || fuzz(target))).collect();
    libtest_mimic::run(&arguments, trials).exit();
}

fn fuzz(target: &Target) -> Result<(), Failed> {
    let seed = number("UNISONO_FUZZ_SEED").unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_nanos() as u64)
    });
    let inputs = target.inputs()?;
    for input in &inputs {
        execute(target, input, seed)?;
    }
    let time = TIME * number("UNISONO_TEST_SCALE").unwrap_or(1) as u32;
    let (begin, mut executions) = (Instant::now(), inputs.len());
    let mut mutator = Mutator::new(&inputs, seed);
    while begin.elapsed() < time {
        for _ in 0..64 {
            execute(target, &mutator.next_input(), seed)?;
        }
        executions += 64;
    }
    println!("{}: {executions} executions", target.name);
    Ok(())
}

fn execute(target: &Target, input: &[u8], seed: u64) -> Result<(), Failed> {
    catch_unwind(AssertUnwindSafe(|| target.execute(input))).map_err(|_| {
        Failed::from(format!("{} failed (seed {seed}), see above, with {:02x?}", target.name, input))
    })
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}
