//! What a world does: the matrix of small cases, cases near borders until a budget is used up, a long sequence without
//! barriers, and one call of each operation with 64 MiB and one byte (16 MiB of each part, where there are several).
//!
//! Budgets are estimates of the cases' cost and not time, because all ranks must make the same calls.

use std::time::{Duration, Instant};

use unisono::{DType, Kind, ReduceOp};

use super::case::{Action, Case, Cases, Memory};
use super::data::Style;
use super::random::Random;
use super::rank::Rank;
use super::verify::Digests;

/// One byte more than this: a count that divides by nothing.
const HUGE_BYTES: usize = 64 << 20;
/// Most cases of a batch, which run back to back.
const BATCH: usize = 100;
/// Most bytes of the results of a batch.
const BATCH_BYTES: usize = 8 << 20;

/// How much of everything.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Workload {
    /// Small cases with the first communicator; `usize::MAX` for all of them.
    pub(crate) small: usize,
    /// The same with each other one.
    pub(crate) small_others: usize,
    /// Estimated milliseconds of processor time of cases near borders, with each algorithm.
    pub(crate) borders_ms: usize,
    /// Calls of the sequence.
    pub(crate) sequence: usize,
    /// Whether to move 64 MiB and a byte.
    pub(crate) huge: bool,
}

/// Everything, with each of these communicators. The digests of all results, equal in every run with this seed.
pub(crate) fn run(seed: u64, ranks: &mut [Rank], workload: &Workload) -> Result<Digests, String> {
    let mut digests = Digests::default();
    let world_size = ranks[0].world_size();
    for (index, rank) in ranks.iter_mut().enumerate() {
        let mut cases = Cases::new(seed, 1 + index as u64, world_size);
        let most = if index == 0 { workload.small } else { workload.small_others };
        digests = batches(rank, &small(&mut cases, most), &mut || ())?.after(digests);
        let borders = borders(&mut cases, workload.borders_ms, world_size);
        digests = batches(rank, &borders, &mut || ())?.after(digests);
    }
    let mut cases = Cases::new(seed, 100, world_size);
    for with_pauses in [false, true] {
        let sequence: Vec<Case> = (0..workload.sequence / 2).map(|_| cases.any()).collect();
        let mut random = Random::of(&[seed, 3, ranks[0].rank() as u64]);
        let mut pause = || {
            if with_pauses {
                pause(&mut random)
            }
        };
        digests = batches(&mut ranks[0], &sequence, &mut pause)?.after(digests);
    }
    if workload.huge {
        digests = batches(&mut ranks[0], &huge(&mut cases), &mut || ())?.after(digests);
    }
    Ok(digests)
}

fn small(cases: &mut Cases, most: usize) -> Vec<Case> {
    let mut all = cases.matrix();
    if most >= all.len() {
        return all;
    }
    // None twice: messages from anybody of the same case could not be told apart.
    (0..most).map(|_| all.swap_remove(cases.random().below(all.len()))).collect()
}

fn borders(cases: &mut Cases, budget_ms: usize, world_size: usize) -> Vec<Case> {
    let (mut left, mut chosen) = (budget_ms * 1000, Vec::new());
    while left > budget_ms * 50 {
        let case = cases.near_a_border();
        // What does not fit is not drawn, and costs a little, so that this ends.
        if case.cost_us(world_size) <= left / 4 {
            left -= case.cost_us(world_size);
            chosen.push(case);
        } else {
            left -= budget_ms;
        }
    }
    chosen
}

/// One call of each operation, on memory that is not aligned to anything.
fn huge(cases: &mut Cases) -> Vec<Case> {
    let mut actions = cases.reducing(ReduceOp::BitXor).to_vec();
    actions.push(Action::Call(Kind::AllReduce { op: ReduceOp::Sum }));
    actions.extend(cases.moving());
    let huge = |action: Action| {
        let has_many = action.has_part_for_all() || action.is_multi();
        let count = if has_many { HUGE_BYTES / 4 } else { HUGE_BYTES } + 1;
        Case { memory: Memory::Plain, style: Style::Wild, ..cases.case(action, DType::U8, count) }
    };
    actions.into_iter().map(huge).collect()
}

/// Runs the cases in batches of random length.
fn batches(rank: &mut Rank, cases: &[Case], pause: super::rank::Pause<'_>) -> Result<Digests, String> {
    let world_size = rank.world_size();
    let mut random = Random::of(&[cases.first().map_or(0, |case| case.number)]);
    let (mut digests, mut rest) = (Digests::default(), cases);
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = rest
            .iter()
            .take_while(|case| {
                bytes += case.most_bytes(world_size);
                bytes <= BATCH_BYTES
            })
            .count();
        let (now, later) = rest.split_at((1 + random.below(BATCH)).min(fits.max(1)));
        digests = rank.run(now, pause)?.after(digests);
        rest = later;
    }
    Ok(digests)
}

/// Sometimes nothing, sometimes some microseconds of work, sometimes a sleep.
fn pause(random: &mut Random) {
    match random.below(16) {
        0..3 => {
            let (start, time) = (Instant::now(), Duration::from_micros(random.below(60) as u64));
            while start.elapsed() < time {
                std::hint::black_box(random.next());
            }
        }
        3 => std::thread::sleep(Duration::from_micros(random.below(200) as u64)),
        _ => {}
    }
}
