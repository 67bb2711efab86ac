//! Ranks that make different calls: an error that names both, on every rank, and never other data.

use std::time::Duration;

use unisono::{Communicator, Error, Kind, Memory, Operations, ReduceOp, Result};

use super::parts::{Part, expect, setting};
use super::random::{self, Random};
use super::world::Setup;
use super::{scale, server};

/// A call as a rank of the table makes it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Made {
    Barrier,
    ReduceF32(usize, ReduceOp),
    ReduceI32(usize),
    Broadcast(usize, usize),
    BroadcastBytes(usize, usize),
    Gather(usize),
    /// An operation on parts or on several buffers: the elements of each.
    Parts(Kind, usize),
    Window(usize),
    Destroy,
}

/// Ranks of the world.
const RANKS: usize = 3;
/// Larger than all the staging of a rank: a root cannot run ahead to the end of it.
const HUGE: usize = 5 << 20;

/// Variations of operation, dtype, count, reduction and root; sizes of every algorithm.
const TABLE: [Made; 31] = [
    Made::Barrier,
    Made::ReduceF32(4, ReduceOp::Sum),
    Made::ReduceF32(4, ReduceOp::Max),
    Made::ReduceF32(5, ReduceOp::Sum),
    Made::ReduceI32(4),
    Made::ReduceF32(3000, ReduceOp::Sum),
    Made::ReduceF32(1 << 20, ReduceOp::Sum),
    Made::ReduceF32(0, ReduceOp::Sum),
    Made::Broadcast(4, 0),
    Made::Broadcast(4, 1),
    Made::Broadcast(3000, 0),
    Made::Broadcast(HUGE / 4, 0),
    Made::BroadcastBytes(HUGE, 1),
    Made::Gather(4),
    Made::Gather(3000),
    Made::Parts(Kind::Reduce { op: ReduceOp::Sum, root: 0 }, 4),
    Made::Parts(Kind::Reduce { op: ReduceOp::Sum, root: 1 }, 3000),
    Made::Parts(Kind::ReduceScatter { op: ReduceOp::Sum }, 4),
    Made::Parts(Kind::Gather { root: 1 }, 4),
    Made::Parts(Kind::Gather { root: 0 }, HUGE / 4),
    Made::Parts(Kind::Scatter { root: 0 }, 4),
    Made::Parts(Kind::AllToAll, 4),
    Made::Parts(Kind::AllGatherV, 4),
    Made::Parts(Kind::ReduceScatterV { op: ReduceOp::Sum }, 4),
    Made::Parts(Kind::GatherV { root: 0 }, 4),
    Made::Parts(Kind::ScatterV { root: 1 }, 4),
    Made::Parts(Kind::AllToAllV, 4),
    Made::Parts(Kind::AllReduceMulti { op: ReduceOp::Sum }, 4),
    Made::Parts(Kind::BroadcastMulti { root: 1, buffer: 0 }, 4),
    Made::Window(10),
    Made::Destroy,
];

/// What a rank puts in, and what it expects out where nothing differs.
const INPUT: f32 = 1.0;

impl Made {
    /// As errors write it, without number and rank.
    fn described(self) -> (&'static str, String) {
        match self {
            Self::Barrier => ("barrier", String::new()),
            Self::ReduceF32(count, op) => ("all_reduce", format!("(f32, {count}, {})", op.name())),
            Self::ReduceI32(count) => ("all_reduce", format!("(i32, {count}, sum)")),
            Self::Broadcast(count, root) => ("broadcast", format!("(f32, {count}, root {root})")),
            Self::BroadcastBytes(count, root) => ("broadcast", format!("(u8, {count}, root {root})")),
            Self::Gather(count) => ("all_gather", format!("(f32, {count})")),
            Self::Parts(kind, count) => {
                let count = match kind {
                    Kind::AllToAllV => 0,
                    _ if kind.is_uneven() => RANKS * count,
                    _ => count,
                };
                let op = if kind.op().is_some() { ", sum" } else { "" };
                let root = kind.root().map_or(String::new(), |root| format!(", root {root}"));
                (kind.name(), format!("(f32, {count}{op}{root}"))
            }
            Self::Window(count) => ("window", format!("(f32, {count})")),
            Self::Destroy => ("destroy", String::new()),
        }
    }

    /// Makes the call. Ok means that the data is right, which is checked.
    fn make(self, communicator: Communicator) -> Result<Option<Communicator>> {
        let size = communicator.world_size();
        let rank = communicator.rank();
        match self {
            Self::Barrier => communicator.barrier()?,
            Self::ReduceF32(count, op) => {
                let mut x = vec![INPUT; count];
                communicator.all_reduce(&mut x, op)?;
                let expected = if op == ReduceOp::Max { INPUT } else { INPUT * size as f32 };
                expect(x.iter().all(|x| *x == expected), || format!("{self:?} gave {:?}", x.first()));
            }
            Self::ReduceI32(count) => {
                let mut x = vec![1i32; count];
                communicator.all_reduce(&mut x, ReduceOp::Sum)?;
                expect(x.iter().all(|x| *x == size as i32), || format!("{self:?} gave {x:?}"));
            }
            Self::Broadcast(count, root) => {
                let mut x = vec![if rank == root { INPUT } else { f32::NAN }; count];
                communicator.broadcast(&mut x, root)?;
                expect(x.iter().all(|x| *x == INPUT), || format!("{self:?} gave {:?}", x.first()));
            }
            Self::BroadcastBytes(count, root) => {
                let mut x = vec![if rank == root { 7u8 } else { 0xff }; count];
                communicator.broadcast(&mut x, root)?;
                expect(x.iter().all(|x| *x == 7), || format!("{self:?} gave {:?}", x.first()));
            }
            Self::Gather(count) => {
                let mut all = vec![f32::NAN; count * size];
                communicator.all_gather_into(&vec![INPUT; count], &mut all)?;
                expect(all.iter().all(|x| *x == INPUT), || format!("{self:?} gave {:?}", all.first()));
            }
            Self::Parts(kind, count) => make_parts(&communicator, kind, count)?,
            Self::Window(count) => drop(communicator.window::<f32>(count, Memory::Host)?),
            Self::Destroy => return communicator.destroy().map(|()| None),
        }
        Ok(Some(communicator))
    }
}

/// Makes an operation on parts of `count` elements, and checks what this rank gets.
fn make_parts(communicator: &Communicator, kind: Kind, count: usize) -> Result<()> {
    let size = communicator.world_size();
    let (mine, all, counts) = (vec![INPUT; count], vec![INPUT; count * size], vec![count; size]);
    let (mut one, mut every) = (vec![f32::NAN; count], vec![f32::NAN; count * size]);
    let root = kind.root().map_or(usize::MAX, |root| root as usize);
    match kind {
        Kind::Reduce { op, root: _ } => communicator.reduce_into(&mine, &mut one, op, root)?,
        Kind::ReduceScatter { op } => communicator.reduce_scatter_into(&all, &mut one, op)?,
        Kind::Gather { .. } => communicator.gather(&mine, &mut every, root)?,
        Kind::Scatter { .. } => communicator.scatter(&all, &mut one, root)?,
        Kind::AllToAll => communicator.all_to_all_into(&all, &mut every)?,
        Kind::AllGatherV => communicator.all_gather_v(&mine, &mut every, &counts)?,
        Kind::ReduceScatterV { op } => communicator.reduce_scatter_v(&all, &mut one, &counts, op)?,
        Kind::GatherV { .. } => communicator.gather_v(&mine, &mut every, &counts, root)?,
        Kind::ScatterV { .. } => communicator.scatter_v(&all, &mut one, &counts, root)?,
        Kind::AllToAllV => communicator.all_to_all_v(&all, &counts, &mut every, &counts)?,
        Kind::AllReduceMulti { op } => {
            one.fill(INPUT);
            communicator.all_reduce_multi(vec![(&mut one).into()], op)?;
        }
        Kind::BroadcastMulti { .. } => {
            one.fill(INPUT);
            communicator.broadcast_multi(vec![(&mut one).into()], root, 0)?;
        }
        _ => unreachable!("{kind:?} has no parts"),
    }
    let is_ours = !matches!(kind, Kind::Reduce { .. } | Kind::Gather { .. } | Kind::GatherV { .. });
    let expected = if kind.op().is_some() { INPUT * size as f32 } else { INPUT };
    // The other one of the two was not written.
    let written = if one.first().is_none_or(|x| x.is_nan()) { every } else { one };
    if is_ours || root == communicator.rank() {
        expect(written.iter().all(|x| *x == expected), || format!("{kind:?} gave {:?}", written.first()));
    }
    Ok(())
}

/// Row 15.
pub(crate) fn both_calls_are_named_on_every_rank() {
    let server = server();
    let seed = random::seed();
    println!("seed {seed}");
    let setup = Setup::new("mismatches", RANKS, server.unique_id())
        .with("FAULTS_SEED", seed)
        .with("FAULTS_ROUNDS", scale())
        .with("FAULTS_TIMEOUT_MS", 20_000);
    let mut world = setup.start();
    world.expect_good_end();
    println!("{} pairs of calls", world.ranks[0].value("pairs").unwrap());
}

/// The part `mismatches`: all ordered pairs of the table, each in a world of its own, after some equal calls.
pub(crate) fn all_pairs(part: &Part) -> Result<()> {
    let mut random = Random::new(setting("FAULTS_SEED").unwrap_or(1));
    let rounds: usize = setting("FAULTS_ROUNDS").unwrap_or(1);
    let mut pairs = 0;
    for round in 0..rounds {
        for (at, left) in TABLE.into_iter().enumerate() {
            for right in TABLE.into_iter().filter(|right| *right != left) {
                pairs += 1;
                // Rank 0 makes the left call, rank 1 the right one, rank 2 either.
                let third = if random.below(2) == 0 { left } else { right };
                let mine = [left, right, third][part.rank];
                let history: Vec<Made> = (0..random.below(12))
                    .map(|_| TABLE[random.below(TABLE.len() as u64 - 2) as usize])
                    .collect();
                let history: Vec<Made> = history.into_iter().filter(|made| !is_large(*made)).collect();
                let job = format!("{} {round} {at} {pairs}", part.job);
                let context = || format!("round {round}: {left:?}, {right:?}, {third:?} after {history:?}");
                let error = differ(part, job, &history, mine)?;
                let Some(error) = error else {
                    expect(false, || format!("no error of {mine:?} in {}", context()));
                    continue;
                };
                check(&error, (left, right), history.len(), &context());
            }
        }
    }
    println!("pairs {pairs}");
    Ok(())
}

fn is_large(made: Made) -> bool {
    matches!(made, Made::Broadcast(count, _) | Made::BroadcastBytes(count, _) | Made::ReduceF32(count, _) | Made::Parts(_, count) if count > 10_000)
}

/// Makes equal calls, then `mine`, and if that succeeds a barrier; the error of either.
fn differ(part: &Part, job: String, history: &[Made], mine: Made) -> Result<Option<Error>> {
    let mut communicator = part.builder().job(job).init_timeout(Duration::from_secs(30)).build()?;
    for made in history {
        // Who is behind may learn already here that the others differ.
        match made.make(communicator) {
            Err(error @ Error::Mismatch { .. }) => return Ok(Some(error)),
            other => communicator = other?.expect("the history holds no end"),
        }
    }
    match mine.make(communicator) {
        Err(error) => Ok(Some(error)),
        Ok(None) => Ok(None),
        Ok(Some(communicator)) => Ok(communicator.barrier().err()),
    }
}

/// The error names both calls, with their numbers.
fn check(error: &Error, (left, right): (Made, Made), calls_before: usize, context: &str) {
    let sentence = error.to_string();
    let is_mismatch = matches!(error, Error::Mismatch { .. });
    let names = |made: Made| {
        let (name, arguments) = made.described();
        let beginning = format!("{name} #{} on rank ", calls_before + 1);
        sentence.match_indices(&beginning).any(|(at, _)| {
            let rest = &sentence[at + beginning.len()..];
            // Behind the rank's digit.
            arguments.is_empty() || rest[1..].starts_with(&format!(" {arguments}"))
        })
    };
    expect(is_mismatch && names(left) && names(right), || format!("`{sentence}` in {context}"));
}
