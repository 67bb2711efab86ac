//! Expert parallelism when ranks are killed or stopped: named without masking, left out with it.

use std::time::Duration;

use rustix::process::Signal;
use unisono::ep::{Buffer, Combine, Dispatch, LowLatencyCombine, LowLatencyDispatch, Settings};
use unisono::half::bf16;
use unisono::{Communicator, Result};

use super::parts::{Part, end_of_input, expect, setting};
use super::random::{self, Random};
use super::world::{Setup, World};
use super::{ms_between, now_ns, percentiles, scale, server};

/// The longest until a death is known and left out (row 3).
const PROMISED_MASK_MS: f64 = 1000.0;
/// The longest until the next step is complete.
const PROMISED_STEP_MS: f64 = 2000.0;
/// The longest until a death is named.
const PROMISED_ERROR_MS: f64 = 1000.0;
const HIDDEN: usize = 64;
const TOKENS: usize = 6;

/// The part `experts`: steps in both modes, every result checked, until one that all survivors agree on after the input has ended.
pub(crate) fn play(part: &Part) -> Result<()> {
    let communicator = part.builder().build()?;
    let settings = Settings {
        capacity: TOKENS,
        low_latency: true,
        masking: setting("FAULTS_MASKING").unwrap_or(false),
        deadline: Duration::from_secs(20),
        ..Settings::new(HIDDEN, part.size)
    };
    let mut buffer = Buffer::new(&communicator, settings)?;
    buffer.exchange(&communicator)?;
    run_steps(&mut buffer, |buffer, wants_to_end| step(buffer, &communicator, wants_to_end))
}

/// Steps until one that ends, and what is said of each.
pub(super) fn run_steps(
    buffer: &mut Buffer,
    mut step: impl FnMut(&mut Buffer, bool) -> Result<bool>,
) -> Result<()> {
    println!("ready");
    let (asked_to_end, mut said) = (end_of_input(), Vec::new());
    loop {
        let ends = step(buffer, asked_to_end())?;
        if buffer.masked() != said {
            said = buffer.masked();
            let ranks: Vec<String> = said.iter().map(usize::to_string).collect();
            println!("masked\t{}\t{}", now_ns(), ranks.join(" "));
        }
        if ends {
            return Ok(());
        }
        println!("step {}", now_ns());
    }
}

/// One step in each mode. Its rows tell who wants to end; whether anybody does, as all survivors see it.
fn step(buffer: &mut Buffer, communicator: &Communicator, wants_to_end: bool) -> Result<bool> {
    let (ranks, me) = (communicator.world_size(), communicator.rank());
    let all: Vec<i64> = (0..TOKENS).flat_map(|_| 0..ranks as i64).collect();
    let value = if wants_to_end { 2.0 } else { 1.0 };
    let x = vec![bf16::from_f32(value); TOKENS * HIDDEN];
    let sent = buffer.dispatch(&Dispatch::new(&x).top_k(&all, ranks))?;
    let left = |buffer: &Buffer| ranks - buffer.masked().len();
    expect(sent.handle.rows() == TOKENS * left(buffer), || format!("{} rows", sent.handle.rows()));
    let rows = sent.x.as_slice::<bf16>()?;
    let ends = rows.iter().any(|value| *value > bf16::ONE);
    // Each rank gives back ones, so the sum says how many took part.
    let ones = vec![bf16::ONE; rows.len()];
    let combined = buffer.combine(&Combine::new(&ones, &sent.handle))?;
    let expected = bf16::from_f32(left(buffer) as f32);
    let is_right = combined.x.as_slice::<bf16>()?.iter().all(|sum| *sum == expected);
    expect(is_right, || format!("rank {me}: {} for {expected}", combined.x.as_slice::<bf16>().unwrap()[0]));
    let sent = buffer.low_latency_dispatch(&LowLatencyDispatch::new(&x, &all, ranks))?;
    let counts = sent.counts.as_slice::<i32>()?;
    expect(counts == [(TOKENS * left(buffer)) as i32], || format!("{counts:?} rows"));
    let ones = vec![bf16::ONE; sent.x.len()];
    let weights = vec![0.5f32; all.len()];
    let combined =
        buffer.low_latency_combine(&LowLatencyCombine::new(&ones, &all, &weights, &sent.handle))?;
    let expected = bf16::from_f32(left(buffer) as f32 / 2.0);
    let is_right = combined.x.as_slice::<bf16>()?.iter().all(|sum| *sum == expected);
    expect(is_right, || format!("rank {me}: {} for {expected}", combined.x.as_slice::<bf16>().unwrap()[0]));
    Ok(ends)
}

/// When each survivor said that these ranks are masked.
fn masked(world: &World, rank: usize, victims: &str) -> Option<u64> {
    world.ranks[rank].output.iter().find_map(|line| {
        let (at, ranks) = line.strip_prefix("masked\t")?.split_once('\t')?;
        if ranks == victims { at.parse().ok() } else { None }
    })
}

/// When a rank completed a step, the first one after `since`.
fn next_step(world: &World, rank: usize, since: u64) -> Option<u64> {
    let steps = world.ranks[rank].output.iter().filter_map(|line| line.strip_prefix("step ")?.parse().ok());
    steps.into_iter().find(|at: &u64| *at > since)
}

/// Row 3 on the host: one rank, then another, is killed or stopped; the others mask it alike, and go on.
pub(crate) fn lost_ranks_are_masked_and_the_others_go_on() {
    lose_ranks("experts");
}

/// The same of ranks that play `part`.
pub(super) fn lose_ranks(part: &'static str) {
    let server = server();
    let seed = random::seed();
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let (mut masks, mut steps) = (Vec::new(), Vec::new());
    for round in 0..3 * scale() {
        let is_stopped = round % 3 == 2;
        let size = 3 + random.below(3usize);
        let mut world = Setup::new(part, size, server.unique_id())
            .with("FAULTS_MASKING", true)
            .with("FAULTS_INIT_MS", 60_000)
            .with("FAULTS_LIVENESS_MS", 400)
            .start();
        world.wait_until_all_said("ready");
        let mut victims: Vec<usize> = Vec::new();
        for _ in 0..2 {
            std::thread::sleep(Duration::from_micros(random.below(30_000)));
            let victim = std::iter::repeat_with(|| random.below(size)).find(|rank| !victims.contains(rank));
            let victim = victim.unwrap();
            let lost = now_ns();
            world.signal(victim, if is_stopped { Signal::STOP } else { Signal::KILL });
            victims.push(victim);
            victims.sort_unstable();
            let text = victims.iter().map(usize::to_string).collect::<Vec<_>>().join(" ");
            let survivors: Vec<usize> = (0..size).filter(|rank| !victims.contains(rank)).collect();
            let is_over = |world: &World| {
                let masked_at = |rank: &usize| masked(world, *rank, &text);
                survivors
                    .iter()
                    .all(|rank| masked_at(rank).is_some_and(|at| next_step(world, *rank, at).is_some()))
            };
            world.wait_until(&format!("a step without {text}"), is_over);
            let at = |of: &dyn Fn(usize) -> Option<u64>| {
                survivors.iter().filter_map(|rank| of(*rank)).max().map(|at| ms_between(lost, at)).unwrap()
            };
            let masked_ms = at(&|rank| masked(&world, rank, &text));
            let step_ms = at(&|rank| next_step(&world, rank, masked(&world, rank, &text)?));
            // A stopped process is suspected after the liveness time only.
            let more = if is_stopped { 400.0 + 1000.0 } else { 0.0 };
            assert!(masked_ms < PROMISED_MASK_MS + more, "{masked_ms} ms\n{}", world.transcript());
            assert!(step_ms < PROMISED_STEP_MS + more, "{step_ms} ms\n{}", world.transcript());
            if !is_stopped {
                masks.push(masked_ms);
                steps.push(step_ms);
            }
        }
        world.ask_to_end();
        let survivors: Vec<usize> = (0..size).filter(|rank| !victims.contains(rank)).collect();
        world.wait_until("the end of the survivors", |world| {
            survivors.iter().all(|rank| world.ranks[*rank].status.is_some())
        });
        for rank in survivors {
            let rank = &world.ranks[rank];
            assert!(rank.said("done") && rank.status.unwrap().success(), "{}", world.transcript());
        }
    }
    println!("masked after {}; next step after {}", percentiles(&mut masks).0, percentiles(&mut steps).0);
}

/// Row 3 without masking: every survivor names the killed rank.
pub(crate) fn a_killed_rank_is_named_without_masking() {
    kill_one("experts");
}

/// The same of ranks that play `part`.
pub(super) fn kill_one(part: &'static str) {
    let server = server();
    let mut random = Random::new(random::seed());
    let mut samples = Vec::new();
    for _ in 0..4 * scale() {
        let size = 2 + random.below(4usize);
        let victim = random.below(size);
        let mut world = Setup::new(part, size, server.unique_id()).with("FAULTS_INIT_MS", 60_000).start();
        world.wait_until_all_said("ready");
        std::thread::sleep(Duration::from_micros(random.below(30_000)));
        let killed = world.kill(victim);
        world.wait_for_end();
        for (_, rank) in world.ranks.iter().enumerate().filter(|(rank, _)| *rank != victim) {
            let failure = rank.failure().unwrap_or_else(|| panic!("{}", world.transcript()));
            assert_eq!((failure.variant.as_str(), &failure.names[..]), ("PeerDied", &[victim][..]));
            assert!(failure.sentence.contains("of an ep::Buffer"), "{}", failure.sentence);
            samples.push(ms_between(killed, failure.at_ns));
        }
    }
    let (text, _) = percentiles(&mut samples);
    println!("named after {text}");
    assert!(samples.iter().all(|sample| *sample < PROMISED_ERROR_MS), "{text}");
}
