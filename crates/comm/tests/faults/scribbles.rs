//! Row 22: somebody writes into the shared memory while all kinds of calls run. Whatever it writes, nobody panics, touches
//! memory outside, or stays in a call: either the calls go on, or they fail in time.
//!
//! The scribbler writes through the descriptor of the memory, as a peer that lost its mind could. Results may be wrong, so
//! they are not looked at; what lies around the buffers is.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use unisono::{Communicator, Error, Memory, Operations, ReduceOp, Result, Window};
use unisono_core::layout::{ControlLayout, Field, LINE, PAGE};
use unisono_sync::{Counter, Flag};

use super::parts::{Part, expect, setting};
use super::random::{self, Random};
use super::world::Setup;
use super::{scale, server};

const RANKS: usize = 3;
/// The longest that anybody may be held up; also the timeout of the ranks, for what cannot be told from a late peer.
const IN_TIME: Duration = Duration::from_secs(1);
/// What this machine may add, busy as it is.
const MARGIN: Duration = Duration::from_secs(2);
/// Elements of a large call: several blocks.
const MOST: usize = 45_000;
/// Bytes around the output that nobody may touch.
const GUARD: usize = 4096;
const POISON: u32 = 0x5a5a_5a5a;

/// One world's plan of destruction.
struct Scribbler {
    random: Random,
    aim: u64,
    files: Vec<File>,
    layout: ControlLayout,
}

impl Scribbler {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let aim = random.below(6);
        let layout = ControlLayout::new(RANKS);
        let files = shared_memory_of_this_process();
        Self { random, aim, files, layout }
    }

    /// Writes something somewhere.
    fn mutate(&mut self) {
        let at = self.random.below(self.files.len() as u64) as usize;
        let bytes = self.files[at].metadata().unwrap().len();
        let is_control = bytes as usize == self.layout.total_bytes().next_multiple_of(PAGE);
        let offset = if is_control { self.offset() } else { self.random.below(bytes / 8) * 8 };
        let mut old = [0; 8];
        self.files[at].read_exact_at(&mut old, offset).unwrap();
        let value = self.value(u64::from_le_bytes(old));
        let width = if self.random.below(4) == 0 { 4 } else { 8 };
        self.files[at].write_all_at(&value.to_le_bytes()[..width], offset).unwrap();
    }

    /// Where: anything, the words of a rank, its call slots, its channels' counts, its record of the cause, its data.
    fn offset(&mut self) -> u64 {
        let rank = self.random.below(RANKS as u64) as usize;
        let fields = self.layout.rank(rank);
        let aim = if self.random.below(8) == 0 { self.random.below(6) } else { self.aim };
        let field = match aim {
            0 => Field { offset: 0, bytes: self.layout.total_bytes() },
            1 => Field { offset: fields.produced.offset, bytes: 4 * LINE },
            2 => fields.slots,
            3 => {
                let channel = self.layout.channel(self.random.below(RANKS as u64) as usize, rank);
                if self.random.below(2) == 0 { channel.head } else { channel.tail }
            }
            4 if self.random.below(16) == 0 => self.layout.abort(),
            4 => fields.cause,
            _ => {
                let data = [fields.staging_in, fields.staging_out, fields.channels];
                data[self.random.below(3) as usize]
            }
        };
        // The first word of a field, which is where most of what matters lies, more often than the others.
        let words = if self.random.below(3) == 0 { 1 } else { (field.bytes as u64 / 8).max(1) };
        field.offset as u64 + self.random.below(words) * 8
    }

    fn value(&mut self, old: u64) -> u64 {
        match self.random.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => old.wrapping_add(1 + self.random.below(100)),
            3 => old.wrapping_sub(1 + self.random.below(100)),
            4 => old ^ 1 << self.random.below(64),
            5 => self.random.below(1000),
            6 => old.rotate_left(32),
            _ => self.random.next(),
        }
    }
}

/// The anonymous memory that this process shares with others, or could.
fn shared_memory_of_this_process() -> Vec<File> {
    let mut found: Vec<PathBuf> =
        std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| {
        std::fs::read_link(path).is_ok_and(|name| name.to_string_lossy().starts_with("/memfd:unisono"))
    });
    found.iter().filter_map(|path| File::options().read(true).write(true).open(path).ok()).collect()
}

/// A rank that makes calls of all kinds until one fails; rounds are counted.
fn work(communicator: &Communicator, seed: u64, rounds: &Counter) -> Result<()> {
    let mut window = communicator.window::<u32>(MOST, Memory::Host)?;
    let symmetric = communicator.window::<u32>(MOST, Memory::Host)?.into_symmetric(communicator)?;
    let mut random = Random::new(seed);
    let mut buffer = vec![POISON; MOST + 2 * GUARD];
    loop {
        let result = one_call(communicator, &mut random, &mut window, &mut buffer[GUARD..GUARD + MOST]);
        let is_guarded = [&buffer[..GUARD], &buffer[GUARD + MOST..]]
            .iter()
            .all(|guard| guard.iter().all(|word| *word == POISON));
        expect(is_guarded, || format!("memory around the buffer was written, seed {seed}"));
        result?;
        let right = (communicator.rank() + 1) % communicator.world_size();
        let signal = rounds.add(1) as u32;
        symmetric.write(right, 7, &buffer[GUARD..2 * GUARD])?;
        symmetric.signal(right, 3, signal)?;
        symmetric.wait_signal(3, signal, IN_TIME)?;
        symmetric.read(right, 9, &mut buffer[GUARD..2 * GUARD])?;
    }
}

/// The next random call, equal on all ranks.
fn one_call(
    communicator: &Communicator,
    random: &mut Random,
    window: &mut Window<u32>,
    x: &mut [u32],
) -> Result<()> {
    let (rank, size) = (communicator.rank(), communicator.world_size());
    let count = random.count(MOST / size);
    let root = random.below(size as u64) as usize;
    let (right, left) = ((rank + 1) % size, (rank + size - 1) % size);
    let counts: Vec<usize> = (0..size).map(|at| (count + at * 7) % (MOST / size)).collect();
    match random.below(14) {
        0 => communicator.all_reduce(&mut x[..count * size], ReduceOp::Sum),
        1 => communicator.all_reduce(&mut x[..count.min(12)], ReduceOp::Max),
        2 => communicator.broadcast(&mut x[..count * size], root),
        3 => communicator.all_gather(&mut x[..count * size]),
        4 => communicator.reduce(&mut x[..count], ReduceOp::Min, root),
        5 => communicator.reduce_scatter(&mut x[..count * size], ReduceOp::Sum),
        6 => communicator.all_to_all(&mut x[..count * size]),
        7 => communicator.all_gather_v(&vec![7; counts[rank]], x, &*counts),
        8 => {
            // As much to each as each has for its number.
            let (sent, got) = (counts.clone(), vec![counts[rank]; size]);
            let source = vec![3; sent.iter().sum()];
            communicator.all_to_all_v(&source, &*sent, x, &*got)
        }
        9 => {
            let (first, second) = x.split_at_mut(MOST / 2);
            communicator.all_reduce_multi(
                vec![(&mut first[..count]).into(), (&mut second[..count]).into()],
                ReduceOp::Sum,
            )
        }
        10 => communicator.send_recv(&vec![9; count], right, &mut x[..count], left, root as u32),
        11 => communicator.all_reduce(window.range_mut(0..count * size), ReduceOp::Sum),
        12 => communicator.scope(|scope| {
            let (first, rest) = x.split_at_mut(MOST / size);
            let (second, third) = rest.split_at_mut(MOST / size);
            let _sum = scope.all_reduce(&mut first[..count], ReduceOp::Sum)?;
            let _sent = scope.send(&third[..count], right, 5)?;
            let _got = scope.recv(&mut second[..count], left, 5)?;
            Ok(())
        }),
        _ => communicator.barrier(),
    }
}

/// How ranks ended, and how long after the last mutation.
#[derive(Default)]
struct Tally {
    worlds: usize,
    mutations: u64,
    ends: BTreeMap<String, usize>,
    longest: Duration,
}

impl Tally {
    fn count(&mut self, error: &Error) {
        let variant: String =
            format!("{error:?}").chars().take_while(|char| char.is_alphanumeric()).collect();
        *self.ends.entry(variant).or_default() += 1;
    }

    fn tell(&self) {
        let ends: Vec<String> = self.ends.iter().map(|(name, number)| format!("{name} {number}")).collect();
        println!(
            "tally {} worlds, {} mutations; ranks ended by {}; the longest hold-up {:.0?}",
            self.worlds,
            self.mutations,
            ends.join(", "),
            self.longest
        );
    }
}

/// The part `scribbled threads`: worlds of threads, one after the other.
pub(crate) fn threads() -> Result<()> {
    let seed: u64 = setting("FAULTS_SCRIBBLE_SEED").unwrap_or(1);
    let mut tally = Tally::default();
    for at in 0..setting("FAULTS_ROUNDS").unwrap_or(100) {
        thread_world(seed.wrapping_add(at), &mut tally)?;
    }
    tally.tell();
    Ok(())
}

fn thread_world(seed: u64, tally: &mut Tally) -> Result<()> {
    let rounds: Arc<[Counter; RANKS]> = Arc::default();
    let ranks = Communicator::threads(RANKS)?;
    let observers: Vec<_> = ranks.iter().map(Communicator::observer).collect();
    let threads: Vec<_> = ranks
        .into_iter()
        .map(|communicator| {
            let rounds = rounds.clone();
            std::thread::spawn(move || {
                let rank = communicator.rank();
                work(&communicator, seed, &rounds[rank]).unwrap_err()
            })
        })
        .collect();
    let has_begun = |rank: usize| rounds[rank].value() > 0;
    wait_until(|| (0..RANKS).all(has_begun) || threads.iter().all(|thread| thread.is_finished()), MARGIN);
    let mut scribbler = Scribbler::new(seed);
    for _ in 0..1u64 << scribbler.random.below(12) {
        scribbler.mutate();
        tally.mutations += 1;
        let pause = scribbler.random.below(200);
        if pause < 20 {
            std::thread::sleep(Duration::from_micros(pause));
        }
        // They look at anything, too.
        if pause == 21 {
            let _ =
                observers.iter().map(|observer| (observer.state(), observer.explain())).collect::<Vec<_>>();
        }
        if threads.iter().all(|thread| thread.is_finished()) {
            break;
        }
    }
    // From now on every rank either ends or goes on.
    let last = Instant::now();
    let before: Vec<u64> = rounds.iter().map(Counter::value).collect();
    let is_moving =
        || (0..RANKS).all(|rank| threads[rank].is_finished() || rounds[rank].value() > before[rank] + 1);
    let moves = wait_until(is_moving, IN_TIME + MARGIN);
    expect(moves, || format!("a rank is stuck, seed {seed}"));
    observers[0].abort("the end of the test");
    let ends = wait_until(|| threads.iter().all(|thread| thread.is_finished()), IN_TIME + MARGIN);
    expect(ends, || format!("a rank does not end, seed {seed}"));
    tally.longest = tally.longest.max(last.elapsed());
    tally.worlds += 1;
    for thread in threads {
        match thread.join() {
            Ok(error) => tally.count(&error),
            Err(_) => expect(false, || format!("a rank panicked, seed {seed}")),
        }
    }
    Ok(())
}

fn wait_until(is_so: impl Fn() -> bool, at_most: Duration) -> bool {
    let end = Instant::now() + at_most;
    while !is_so() {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    true
}

/// The part `scribbled process`: the last rank is the one who writes.
pub(crate) fn process(part: &Part) -> Result<()> {
    let communicator = part.builder().build()?;
    let seed: u64 = setting("FAULTS_SCRIBBLE_SEED").unwrap_or(1);
    let ended = Arc::new(Flag::new());
    if part.rank == part.size - 1 {
        let ended = ended.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            let mut scribbler = Scribbler::new(seed);
            while !ended.is_raised() {
                scribbler.mutate();
                std::thread::sleep(Duration::from_micros(scribbler.random.below(50)));
            }
        });
    }
    println!("ready");
    let result = work(&communicator, seed, &Counter::default());
    ended.raise();
    result
}

/// Row 22, for ranks that are threads: many worlds.
pub(crate) fn nothing_written_to_the_shared_memory_does_harm() {
    let seed = random::seed();
    println!("seed {seed}");
    let setup = Setup::new("scribbled threads", 1, server().unique_id())
        .with("UNISONO_TIMEOUT", "1s")
        .with("UNISONO_LOG", "error")
        .with("FAULTS_SCRIBBLE_SEED", seed)
        .with("FAULTS_ROUNDS", 100 * scale());
    let mut world = setup.start();
    world.wait_within(Duration::from_secs(60 * scale() as u64));
    let rank = &world.ranks[0];
    assert!(rank.said("done") && rank.status.unwrap().success(), "{}", world.transcript());
    println!("{}", rank.value("tally").unwrap());
}

/// Row 22, for ranks that are processes: also what the node plane reads.
pub(crate) fn a_peer_that_scribbles_is_an_error_in_time() {
    let server = server();
    let seed = random::seed();
    println!("seed {seed}");
    for at in 0..4 * scale() as u64 {
        let setup = Setup::new("scribbled process", RANKS, server.unique_id())
            .with("FAULTS_TIMEOUT_MS", IN_TIME.as_millis())
            .with("FAULTS_SCRIBBLE_SEED", seed.wrapping_add(at));
        let mut world = setup.start();
        world.wait_until_all_said("ready");
        world.wait_for_end();
        for rank in &world.ranks {
            // 1: with an error; a signal or a panic would be something else.
            assert_eq!(rank.status.unwrap().code(), Some(1), "seed {seed} + {at}\n{}", world.transcript());
            let panicked = rank.errors.iter().any(|line| line.contains("panicked"));
            assert!(rank.failure().is_some() && !panicked, "{}", world.transcript());
        }
    }
}
