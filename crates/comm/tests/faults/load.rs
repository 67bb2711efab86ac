//! Row 24: many calls, and many ranks on few cores. That communicators come and go without a trace is in `leftovers`.

use std::time::{Duration, Instant};

use unisono::{Operations, ReduceOp, Result};

use super::leftovers::{Usage, settle};
use super::parts::{Part, expect, setting};
use super::world::Setup;
use super::{scale, server};

/// The part `small calls`: 8-byte all-reduces, and nothing grows.
pub(crate) fn small_calls(part: &Part) -> Result<()> {
    let communicator = part.builder().build()?;
    let calls: u64 = setting("FAULTS_CALLS").unwrap_or(1000);
    let mut baseline = None;
    // The first tenth settles what is made once.
    for call in 0..calls + calls / 10 {
        if call == calls / 10 {
            baseline = Some(Usage::now());
        }
        let mut x = [call + part.rank as u64];
        communicator.all_reduce(&mut x, ReduceOp::Sum)?;
        let ranks = part.size as u64;
        expect(x[0] == ranks * call + ranks * (ranks - 1) / 2, || format!("call {call}: {}", x[0]));
    }
    let baseline = baseline.unwrap();
    settle(|usage| usage.is_back_at(&baseline));
    let usage = Usage::now();
    println!("usage {baseline:?} before and {usage:?} after {calls} calls");
    expect(usage.is_back_at(&baseline), || format!("{usage:?} is above {baseline:?}"));
    communicator.destroy()
}

/// The part `one large call`: an all-reduce of 1 MiB, every element checked.
pub(crate) fn one_large_call(part: &Part) -> Result<()> {
    let communicator = part.builder().build()?;
    println!("ready");
    let mut x: Vec<u64> = (0..1 << 17).map(|at| at * 3 + part.rank as u64).collect();
    let begun = Instant::now();
    communicator.all_reduce(&mut x, ReduceOp::Sum)?;
    let took = begun.elapsed();
    let ranks = part.size as u64;
    let is_right = |(at, got): (usize, &u64)| *got == ranks * 3 * at as u64 + ranks * (ranks - 1) / 2;
    expect(x.iter().enumerate().all(is_right), || "a sum".to_owned());
    println!("took {}", took.as_millis());
    communicator.destroy()
}

/// Calls without end cost no memory and no descriptor. A campaign of scale 10 makes a million.
pub(crate) fn small_calls_without_end_grow_nothing() {
    let server = server();
    let setup = Setup::new("small calls", 2, server.unique_id()).with("FAULTS_CALLS", 100_000 * scale());
    let mut world = setup.start();
    world.wait_within(Duration::from_secs(60 * scale() as u64));
    world.expect_good_end();
    println!("{}", world.ranks[0].value("usage").unwrap());
}

/// Many more ranks than cores: 16, in a campaign 64.
pub(crate) fn a_crowd_of_ranks_reduces_rightly_and_in_time() {
    let server = server();
    let ranks = if scale() > 1 { 64 } else { 16 };
    let mut world = Setup::new("one large call", ranks, server.unique_id()).start();
    world.wait_until_all_said("ready");
    world.expect_good_end();
    let took = |rank: &super::world::Rank| rank.value("took").unwrap().parse::<u64>().unwrap();
    let longest_ms = world.ranks.iter().map(took).max().unwrap();
    println!("{ranks} ranks reduced 1 MiB in {longest_ms} ms");
    assert!(longest_ms < 60_000);
}
