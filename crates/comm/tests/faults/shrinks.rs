//! Survivors that go on with `shrink`, after ranks were killed or stopped, also in the middle of it.

use std::time::Duration;

use rustix::process::Signal;
use unisono::{Communicator, Error, Memory, Operations, ReduceOp, Result};

use super::parts::{Collectives, Part, end_of_input, expect};
use super::random::{self, Random};
use super::world::{Setup, World};
use super::{ms_between, now_ns, percentiles, scale, server};

/// The longest that survivors may take from the last death to working again.
const PROMISED_MS: f64 = 2000.0;
/// What finding a stopped process may add to the liveness time.
const MARGIN_MS: f64 = 1000.0;

/// The part `survivor`: random collectives until the input of any rank ends; whenever that fails because somebody was lost,
/// goes on without.
pub(crate) fn survive(part: &Part) -> Result<()> {
    let mut communicator = part.builder().build()?;
    let asked_to_end = end_of_input();
    println!("ready");
    loop {
        match work(&communicator, part.rank, &asked_to_end) {
            Ok(()) => break,
            Err(Error::PeerDied { .. } | Error::PeerLeft { .. } | Error::Aborted { .. }) => {
                communicator = communicator.shrink()?;
            }
            Err(error) => return Err(error),
        }
    }
    println!("quarantined {}", unisono_node::memory::quarantined_bytes());
    communicator.destroy()
}

/// One generation: tells who is in it, and works.
fn work(communicator: &Communicator, world_rank: usize, asked_to_end: &dyn Fn() -> bool) -> Result<()> {
    let mut members = vec![0; communicator.world_size()];
    communicator.all_gather_into(&[world_rank as u64], &mut members)?;
    let members: Vec<String> = members.iter().map(u64::to_string).collect();
    println!("members\t{}\t{}\t{}", now_ns(), communicator.generation(), members.join(" "));
    let mut window = communicator.window::<u64>(4000, Memory::Host)?;
    let mut collectives = Collectives::new(u64::from(communicator.generation()));
    let result = loop {
        let result = collectives.next(communicator).and_then(|()| {
            window.lend()?.fill(1);
            communicator.all_reduce(&mut window, ReduceOp::Sum)?;
            let sum = window.lend()?[3999];
            expect(sum as usize == communicator.world_size(), || format!("a sum of {sum} in a window"));
            let mut ends = [u8::from(asked_to_end())];
            communicator.all_reduce(&mut ends, ReduceOp::Max)?;
            Ok(ends[0] == 1)
        });
        match result {
            Ok(false) => {}
            Ok(true) => break Ok(()),
            // The window says what its communicator failed with, but only as a text.
            Err(Error::Poisoned { .. }) => {
                communicator.check()?;
                break Err(Error::PeerLeft { rank: 0, during: "a loan".into() });
            }
            Err(error) => break Err(error),
        }
    };
    expect(result.is_ok() || window.lend().is_err(), || "a window was lent after a failure".into());
    result
}

/// What a survivor said of a generation: when, its number, who is in it.
fn generations(world: &World, rank: usize) -> Vec<(u64, u32, String)> {
    let parse = |line: &String| {
        let mut fields = line.strip_prefix("members\t")?.split('\t');
        let (at, generation) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        Some((at, generation, fields.next()?.to_owned()))
    };
    world.ranks[rank].output.iter().filter_map(parse).collect()
}

/// Waits until all `survivors`, and nobody else, are one generation; when each said so.
fn expect_generation(world: &mut World, survivors: &[usize]) -> Vec<u64> {
    let expected: Vec<String> = survivors.iter().map(usize::to_string).collect();
    let expected = expected.join(" ");
    let is_there = |world: &World, rank: usize| {
        let last = generations(world, rank).pop()?;
        (last.2 == expected).then_some(last.0)
    };
    world.wait_until("the survivors' next generation", |world| {
        survivors.iter().all(|rank| {
            assert!(world.ranks[*rank].status.is_none(), "rank {rank} ended\n{}", world.transcript());
            is_there(world, *rank).is_some()
        })
    });
    survivors.iter().filter_map(|rank| is_there(world, *rank)).collect()
}

/// No two ranks took different ranks for the members of one generation.
fn expect_agreement(world: &World) {
    let all: Vec<_> = (0..world.ranks.len()).flat_map(|rank| generations(world, rank)).collect();
    for (_, generation, members) in &all {
        let differs = all.iter().find(|(_, other, them)| other == generation && them != members);
        assert!(
            differs.is_none(),
            "generation {generation}: {members} and {differs:?}\n{}",
            world.transcript()
        );
    }
}

/// The survivors end in good order, having worked together; how much memory each keeps in quarantine.
fn expect_good_end(world: &mut World, survivors: &[usize]) -> Vec<usize> {
    world.ask_to_end();
    world.wait_for_end();
    let quarantined = |rank: &usize| {
        let process = &world.ranks[*rank];
        assert!(process.said("done") && process.status.unwrap().success(), "{}", world.transcript());
        process.value("quarantined").unwrap().parse().unwrap()
    };
    let quarantined = survivors.iter().map(quarantined).collect();
    expect_agreement(world);
    quarantined
}

/// Row 7, and row 10 after each: up to half of the ranks die, the later ones while the others shrink.
pub(crate) fn survivors_go_on_after_kills_at_any_moment() {
    let server = server();
    let seed = random::seed();
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let (mut samples, mut kills, rounds) = (Vec::new(), 0, 12 * scale());
    for at in 0..rounds {
        let size = 2 + at % 7;
        let mut survivors: Vec<usize> = (0..size).collect();
        let mut world = Setup::new("survivor", size, server.unique_id()).start();
        world.wait_until_all_said("ready");
        let traces = world.traces();
        std::thread::sleep(Duration::from_micros(random.below(30_000)));
        let mut killed = 0;
        for _ in 0..1 + random.below(size as u64 / 2) {
            let victim = survivors.remove(random.below(survivors.len() as u64) as usize);
            killed = world.kill(victim);
            kills += 1;
            // As long as finding out and agreeing takes, or not at all.
            std::thread::sleep(Duration::from_micros(random.below(2) * random.below(20_000)));
        }
        let arrivals = expect_generation(&mut world, &survivors);
        samples.extend(arrivals.iter().map(|arrived| ms_between(killed, *arrived)));
        let quarantined = expect_good_end(&mut world, &survivors);
        assert!(quarantined.iter().all(|bytes| *bytes == 0), "{quarantined:?}: memory of the dead is kept");
        traces.expect_none_left();
    }
    let text = percentiles(&mut samples).0;
    println!("{kills} kills in {rounds} worlds: survivors work again after {text}");
}

/// Row 7, as it is promised.
pub(crate) fn sixteen_ranks_are_back_within_two_seconds() {
    let server = server();
    let mut samples = Vec::new();
    for at in 0..1 + scale() / 5 {
        let mut world = Setup::new("survivor", 16, server.unique_id()).start();
        world.wait_until_all_said("ready");
        let victims = [at % 16, (at + 7) % 16];
        let survivors: Vec<usize> = (0..16).filter(|rank| !victims.contains(rank)).collect();
        world.kill(victims[0]);
        let killed = world.kill(victims[1]);
        let arrivals = expect_generation(&mut world, &survivors);
        samples.extend(arrivals.iter().map(|arrived| ms_between(killed, *arrived)));
        expect_good_end(&mut world, &survivors);
    }
    let text = percentiles(&mut samples).0;
    println!("14 of 16 ranks work again after {text}");
    assert!(samples.iter().all(|took| *took <= PROMISED_MS), "{text}");
}

/// Row 28: stop, shrink, continue. The others go on; who wakes up is told that it was given up, and harms nobody.
pub(crate) fn a_stopped_rank_is_left_out_and_harms_nobody_when_it_wakes_up() {
    const LIVENESS_MS: u64 = 600;
    let server = server();
    let mut random = Random::new(random::seed());
    let (mut samples, rounds) = (Vec::new(), 2 + scale());
    for at in 0..rounds {
        let size = 2 + at % 4;
        let victim = random.below(size as u64) as usize;
        let survivors: Vec<usize> = (0..size).filter(|rank| *rank != victim).collect();
        let setup = Setup::new("survivor", size, server.unique_id());
        let mut world = setup.with("FAULTS_LIVENESS_MS", LIVENESS_MS).start();
        world.wait_until_all_said("ready");
        let traces = world.traces();
        std::thread::sleep(Duration::from_micros(random.below(20_000)));
        let stopped = now_ns();
        world.signal(victim, Signal::STOP);
        let arrivals = expect_generation(&mut world, &survivors);
        samples.extend(arrivals.iter().map(|arrived| ms_between(stopped, *arrived)));
        world.signal(victim, Signal::CONT);
        world.wait_until("the end of who was stopped", |world| world.ranks[victim].status.is_some());
        let failure = world.ranks[victim].failure().unwrap_or_else(|| panic!("{}", world.transcript()));
        assert_eq!(failure.variant, "GivenUp", "{}", failure.sentence);
        // The others still work after it woke up, and nothing it wrote is theirs: all their results are verified.
        std::thread::sleep(Duration::from_millis(50));
        let quarantined = expect_good_end(&mut world, &survivors);
        assert!(quarantined.iter().all(|bytes| *bytes > size << 20), "{quarantined:?}");
        traces.expect_none_left();
    }
    let text = percentiles(&mut samples).0;
    println!("{rounds} stops, {LIVENESS_MS} ms of liveness: the others work again after {text}");
    let most = LIVENESS_MS as f64 + PROMISED_MS + MARGIN_MS;
    assert!(samples.iter().all(|took| *took <= most), "{text}");
}

/// Row 7 and row 28 together: one is stopped, another dies while the first is given up.
pub(crate) fn a_death_while_another_rank_is_given_up_is_left_out_too() {
    let server = server();
    let mut random = Random::new(random::seed());
    for at in 0..2 * scale() {
        let size = 4 + at % 3;
        let (stopped, killed) = (at % size, (at + 1 + random.below(size as u64 - 1) as usize) % size);
        let survivors: Vec<usize> = (0..size).filter(|rank| ![stopped, killed].contains(rank)).collect();
        let setup = Setup::new("survivor", size, server.unique_id());
        let mut world = setup.with("FAULTS_LIVENESS_MS", 600).start();
        world.wait_until_all_said("ready");
        world.signal(stopped, Signal::STOP);
        // Before, while or after it is given up.
        std::thread::sleep(Duration::from_millis(400 + random.below(400)));
        world.kill(killed);
        expect_generation(&mut world, &survivors);
        world.signal(stopped, Signal::CONT);
        world.wait_until("the end of who was stopped", |world| world.ranks[stopped].status.is_some());
        assert_eq!(world.ranks[stopped].failure().unwrap().variant, "GivenUp", "{}", world.transcript());
        expect_good_end(&mut world, &survivors);
    }
}
