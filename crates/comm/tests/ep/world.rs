//! All that one rank does of a world of random cases: several buffers, and on each several calls.

use std::time::{Duration, Instant};

use unisono::ep::Buffer;
use unisono::{Communicator, Operations, Result};

use super::case::{Case, settings};
use super::support::scale::scale;
use super::{low_latency, throughput};

/// When a campaign ends, whatever its scale: before a test may take no longer.
const LONGEST: Duration = Duration::from_secs(60);

/// Runs `buffers` buffers with `cases` cases each, as often as the scale says.
pub(crate) fn run(communicator: &Communicator, seed: u64, (buffers, cases): (u64, u64)) -> Result<()> {
    let ranks = communicator.world_size();
    let start = Instant::now();
    for number in 0..buffers * scale() as u64 {
        let mut is_over = [u8::from(start.elapsed() > LONGEST)];
        communicator.broadcast(&mut is_over, 0)?;
        if is_over[0] == 1 {
            break;
        }
        let with = settings(seed, number, ranks);
        let mut buffer = Buffer::new(communicator, with.0.clone())?;
        buffer.exchange(communicator)?;
        for at in 0..cases {
            let draw = |more| Case::draw(seed, (number << 8 | at << 1) + more, ranks, &with);
            if with.0.low_latency && at % 2 == 0 {
                let both = [draw(0).low_latency(), draw(1).low_latency()];
                low_latency::run(&mut buffer, communicator, [&both[0], &both[1]])?;
            } else {
                throughput::run(&mut buffer, communicator, &draw(0))?;
            }
            assert!(buffer.masked().is_empty() && buffer.is_available());
        }
        buffer.close(communicator)?;
    }
    Ok(())
}
