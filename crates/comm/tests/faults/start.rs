//! Faults while the ranks meet: deaths at each step, ranks that must not join, connections that are tampered with.

use std::sync::Mutex;
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};
use unisono::store::{Store, TcpStore};
use unisono::{Deadline, Result, UniqueId};

use super::parts::setting;
use super::proxy::TamperingProxy;
use super::random::{self, Random};
use super::world::{Failure, Setup, World};
use super::{ms_between, now_ns, percentiles, scale, server};

/// Time to meet that the tests give.
const INIT_MS: u64 = 1500;
/// Time to meet where nobody should need it.
const PATIENT_MS: u64 = 20_000;
/// What an error may take beyond that.
const MARGIN_MS: f64 = 1500.0;
/// When everybody must have given up.
const BY_DEADLINE_MS: f64 = INIT_MS as f64 + MARGIN_MS;
/// Worlds of one test that run at once.
const AT_ONCE: usize = 6;

/// What a rank's store does to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strike {
    when: When,
    how: How,
}

#[derive(Clone, Copy, Debug)]
enum When {
    /// Before this operation, counted from 1.
    Before(u64),
    /// After the one that ends the meeting: the table of all ranks is written, or read.
    HasMet,
}

#[derive(Clone, Copy, Debug)]
enum How {
    Die,
    DieAfter(Duration),
    Stop,
}

/// A store that kills or stops its process at one of the operations.
#[derive(Debug)]
pub(crate) struct FaultyStore {
    store: TcpStore,
    strike: Strike,
    operations: Mutex<u64>,
}

impl FaultyStore {
    pub(crate) fn new(store: TcpStore, strike: Strike) -> Self {
        Self { store, strike, operations: Mutex::new(0) }
    }

    /// What the environment says.
    pub(crate) fn planned() -> Option<Strike> {
        let how = match setting::<String>("FAULTS_HOW")?.as_str() {
            "stop" => How::Stop,
            "die" => How::Die,
            microseconds => How::DieAfter(Duration::from_micros(microseconds.parse().ok()?)),
        };
        Some(Strike { when: setting("FAULTS_BEFORE").map_or(When::HasMet, When::Before), how })
    }

    fn operation(&self) -> &TcpStore {
        let mut operations = self.operations.lock().unwrap();
        *operations += 1;
        if matches!(self.strike.when, When::Before(at) if at == *operations) {
            self.strike();
        }
        &self.store
    }

    /// Looks whether the operation on `key` that is done was the one that ends the meeting.
    fn has_done<T>(&self, key: &str, result: Result<T>) -> Result<T> {
        if matches!(self.strike.when, When::HasMet) && key.contains("/table/") {
            self.strike();
        }
        result
    }

    fn strike(&self) {
        match self.strike.how {
            How::Die => die(),
            How::DieAfter(delay) => {
                std::thread::spawn(move || {
                    std::thread::sleep(delay);
                    die();
                });
            }
            How::Stop => kill_process(getpid(), Signal::STOP).unwrap(),
        }
    }
}

/// Ends this process as the out-of-memory killer would.
pub(crate) fn die() -> ! {
    kill_process(getpid(), Signal::KILL).unwrap();
    unreachable!("killed")
}

impl Store for FaultyStore {
    fn set(&self, key: &str, value: &[u8], deadline: Deadline) -> Result<()> {
        self.has_done(key, self.operation().set(key, value, deadline))
    }

    fn get(&self, key: &str, deadline: Deadline) -> Result<Vec<u8>> {
        self.has_done(key, self.operation().get(key, deadline))
    }

    fn wait(&self, keys: &[&str], deadline: Deadline) -> Result<()> {
        self.operation().wait(keys, deadline)
    }

    fn check(&self, keys: &[&str], deadline: Deadline) -> Result<bool> {
        self.operation().check(keys, deadline)
    }

    fn add(&self, key: &str, amount: i64, deadline: Deadline) -> Result<i64> {
        self.operation().add(key, amount, deadline)
    }

    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8], deadline: Deadline) -> Result<Vec<u8>> {
        self.operation().compare_set(key, expected, desired, deadline)
    }

    fn delete(&self, key: &str, deadline: Deadline) -> Result<bool> {
        self.operation().delete(key, deadline)
    }

    fn multi_get(&self, keys: &[&str], deadline: Deadline) -> Result<Vec<Vec<u8>>> {
        self.operation().multi_get(keys, deadline)
    }

    fn append(&self, key: &str, value: &[u8], deadline: Deadline) -> Result<()> {
        self.operation().append(key, value, deadline)
    }

    fn num_keys(&self, deadline: Deadline) -> Result<u64> {
        self.operation().num_keys(deadline)
    }

    fn describe(&self) -> String {
        self.store.describe()
    }
}

/// A world of three in which `victim` is struck before that operation of the meeting, or after it has met.
fn struck(store: &UniqueId, victim: usize, before: Option<u64>, how: impl ToString) -> Setup {
    let setup = Setup::new("start", 3, store.clone()).with("FAULTS_VICTIM", victim).with("FAULTS_HOW", how);
    match before {
        Some(at) => setup.with("FAULTS_BEFORE", at),
        None => setup,
    }
}

/// Every rank but the victim says, in time, that it was the victim; how long it took, in milliseconds.
fn expect_the_victim_named(
    world: &World,
    victim: usize,
    (begun, within_ms): (u64, f64),
    what: &str,
) -> Vec<f64> {
    let mut samples = Vec::new();
    for (rank, process) in world.ranks.iter().enumerate().filter(|(rank, _)| *rank != victim) {
        let context = || format!("{what}: rank {rank}\n{}", world.transcript());
        let Failure { names, at_ns, .. } = process.failure().unwrap_or_else(|| panic!("{}", context()));
        assert_eq!(names, [victim], "{}", context());
        let took = ms_between(begun, at_ns);
        assert!(took <= within_ms, "{took} ms: {}", context());
        samples.push(took);
    }
    samples
}

/// Row 5: a death before and after each operation of meeting, on the lowest and on the highest rank.
pub(crate) fn a_death_at_each_step_of_meeting_is_named() {
    let server = server();
    let cases: Vec<(usize, u64)> =
        [0, 2].into_iter().flat_map(|victim| (1..=12).map(move |at| (victim, at))).collect();
    for cases in cases.chunks(AT_ONCE) {
        let begun = now_ns();
        let mut worlds: Vec<World> = cases
            .iter()
            .map(|(victim, at)| {
                struck(&server.unique_id(), *victim, Some(*at), "die").with("FAULTS_INIT_MS", INIT_MS).start()
            })
            .collect();
        for (world, (victim, at)) in worlds.iter_mut().zip(cases) {
            let traces = world.traces();
            world.wait_for_end();
            expect_the_victim_named(
                world,
                *victim,
                (begun, BY_DEADLINE_MS),
                &format!("death of {victim} before operation {at}"),
            );
            traces.expect_none_left();
        }
    }
}

/// Row 5: deaths between the meeting and the end of the start, at any moment. Nobody waits for the deadline.
pub(crate) fn a_death_while_connecting_is_named_at_once() {
    let server = server();
    let seed = random::seed();
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let cases: Vec<(usize, u64)> = (0..24 * scale())
        .map(|at| (at % 3, random.below(if at % 2 == 0 { 2_000 } else { 12_000 })))
        .collect();
    let mut samples = Vec::new();
    for cases in cases.chunks(AT_ONCE) {
        let begun = now_ns();
        let start = |(victim, delay): &(usize, u64)| {
            struck(&server.unique_id(), *victim, None, delay).with("FAULTS_INIT_MS", PATIENT_MS).start()
        };
        let mut worlds: Vec<World> = cases.iter().map(start).collect();
        for (world, (victim, delay)) in worlds.iter_mut().zip(cases) {
            world.wait_for_end();
            let what = format!("death of {victim} after {delay} µs");
            samples.extend(expect_the_victim_named(world, *victim, (begun, PATIENT_MS as f64 / 2.0), &what));
        }
    }
    println!(
        "{} deaths: survivors end, after their own start, within {}",
        cases.len(),
        percentiles(&mut samples).0
    );
}

/// Row 5: it is alive, but never answers. The others end by the deadline.
pub(crate) fn a_rank_that_stops_while_connecting_is_named() {
    let server = server();
    let begun = now_ns();
    let cases = [(0, Some(4)), (0, None), (1, Some(7)), (1, None), (2, None)];
    let start = |(victim, at): &(usize, Option<u64>)| {
        struck(&server.unique_id(), *victim, *at, "stop").with("FAULTS_INIT_MS", INIT_MS).start()
    };
    let mut worlds: Vec<World> = cases.iter().map(start).collect();
    for (world, (victim, at)) in worlds.iter_mut().zip(cases) {
        world.wait_until("the end of the others", |world| {
            (0..3).filter(|rank| *rank != victim).all(|rank| world.ranks[rank].status.is_some())
        });
        let what = format!("stop of {victim} before {at:?}");
        expect_the_victim_named(world, victim, (begun, BY_DEADLINE_MS), &what);
        // It wakes up and finds that its time is over, or nobody there.
        world.signal(victim, Signal::CONT);
        world.wait_for_end();
        assert!(world.ranks[victim].failure().is_some(), "{what}\n{}", world.transcript());
    }
}

/// Row 5: two of four are never started.
pub(crate) fn a_rank_that_never_comes_is_named() {
    let server = server();
    let setup = Setup::new("start", 4, server.unique_id()).with("FAULTS_INIT_MS", INIT_MS);
    let begun = now_ns();
    let mut world = World::start([setup.command(1), setup.command(2)], setup.job.clone());
    world.wait_for_end();
    for process in &world.ranks {
        let failure = process.failure().unwrap_or_else(|| panic!("{}", world.transcript()));
        assert_eq!((failure.variant.as_str(), &*failure.names), ("InitTimeout", &[0, 3][..]));
        assert!(failure.sentence.contains("2 of 4 ranks met at tcp://127.0.0.1:"), "{}", failure.sentence);
        assert!(ms_between(begun, failure.at_ns) <= BY_DEADLINE_MS);
    }
}

/// Row 13.
pub(crate) fn an_older_generation_is_refused() {
    let server = server();
    let setup = Setup::new("collectives", 3, server.unique_id());
    let newer = setup.clone().with("FAULTS_GENERATION", 7);
    let mut world = newer.start();
    world.wait_until_all_said("ready");
    for generation in (0..7).rev().take(3 * scale().min(2)) {
        let begun = now_ns();
        let old = setup.clone().with("FAULTS_GENERATION", generation);
        let mut late = World::start([old.command(1)], old.job.clone());
        late.wait_for_end();
        let failure = late.ranks[0].failure().unwrap_or_else(|| panic!("{}", late.transcript()));
        assert_eq!(failure.variant, "StaleGeneration", "{}", failure.sentence);
        let expected =
            format!("generation {generation} of job {}, which is already at generation 7", setup.job);
        assert!(failure.sentence.contains(&expected), "{}", failure.sentence);
        assert!(ms_between(begun, failure.at_ns) < MARGIN_MS, "refused at once");
    }
    world.expect_good_end();
}

/// Row 14: while the job meets, and while it runs.
pub(crate) fn offenders_are_refused_and_the_job_goes_on() {
    let server = server();
    let setup = Setup::new("collectives", 3, server.unique_id());
    let mut world = World::start([setup.command(0), setup.command(1)], setup.job.clone());
    let store = TcpStore::from_unique_id(&server.unique_id(), soon()).unwrap();
    for rank in [0, 1] {
        store.get(&format!("unisono/{}/1/rank/{rank}", setup.job), soon()).unwrap();
    }
    let pids: Vec<u32> = world.ranks.iter().map(|rank| rank.pid).collect();
    offend(&setup, &pids);
    let last = world.add(setup.command(2));
    world.wait_until_all_said("ready");
    let pids = [pids[0], pids[1], world.ranks[last].pid];
    offend(&setup, &pids);
    world.expect_good_end();
}

/// Ranks that are taken, and another world size, with the processes `pids` there.
fn offend(setup: &Setup, pids: &[u32]) {
    let refused = |setup: &Setup, rank: usize| {
        let mut world = World::start([setup.command(rank)], setup.job.clone());
        world.wait_for_end();
        let failure = world.ranks[0].failure().unwrap_or_else(|| panic!("{}", world.transcript()));
        assert_eq!(failure.variant, "Core", "{}", failure.sentence);
        assert!(failure.sentence.contains(&format!("pid {}", world.ranks[0].pid)), "{}", failure.sentence);
        failure.sentence
    };
    for (rank, pid) in pids.iter().enumerate() {
        let sentence = refused(setup, rank);
        assert!(sentence.starts_with(&format!("two processes claim rank {rank}: ")), "{sentence}");
        assert!(sentence.contains(&format!("pid {pid})")), "{sentence}");
    }
    for size in [2, 4] {
        let sentence = refused(&Setup { size, ..setup.clone() }, 1);
        assert!(sentence.starts_with("world size differs: "), "{sentence}");
        assert!(sentence.contains(" says 3") && sentence.contains(&format!(" says {size}")), "{sentence}");
        assert!(pids.iter().any(|pid| sentence.contains(&format!("pid {pid})"))), "{sentence}");
    }
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

/// Row 23: one byte is flipped on the way between a rank and the store. The world is right, or there is none.
pub(crate) fn a_tampered_store_connection_never_lies() {
    let server = server();
    let seed = random::seed();
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let (mut built, mut refused) = (0, 0);
    let cases: Vec<(usize, u64)> =
        (0..24 * scale()).map(|at| (at % 2, random.below(if at % 4 < 2 { 400 } else { 2000 }))).collect();
    for cases in cases.chunks(AT_ONCE) {
        let begun = now_ns();
        let mut worlds = Vec::new();
        for (direction, at) in cases {
            let proxy = TamperingProxy::start(server.address(), *direction, *at as usize);
            let id =
                UniqueId::new(proxy.address, *server.unique_id().job(), server.secret().clone()).unwrap();
            let honest = Setup::new("start", 2, server.unique_id())
                .with("FAULTS_INIT_MS", INIT_MS)
                .with("FAULTS_ROUNDS", 20);
            let tampered = Setup { store: id, ..honest.clone() };
            worlds.push(World::start([honest.command(0), tampered.command(1)], honest.job));
        }
        for (world, case) in worlds.iter_mut().zip(cases) {
            world.wait_for_end();
            let done = world.ranks.iter().filter(|rank| rank.said("done")).count();
            let failed = world.ranks.iter().filter_map(|rank| rank.failure()).collect::<Vec<_>>();
            // Both or none, and nothing wrong in between.
            assert!(done + failed.len() == 2 && done != 1, "{case:?}\n{}", world.transcript());
            for failure in &failed {
                let took = ms_between(begun, failure.at_ns);
                assert!(took <= BY_DEADLINE_MS, "{case:?} {took} ms\n{}", world.transcript());
            }
            built += done / 2;
            refused += failed.len() / 2;
        }
    }
    println!("{} flipped bytes: {refused} worlds refused, {built} built and right", cases.len());
    assert!(refused > 0 && built + refused == cases.len());
}
