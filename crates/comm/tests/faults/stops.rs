//! Ranks that are stopped, late or absent: who is suspected, when, and who is not.

use std::time::Duration;

use rustix::process::Signal;

use super::random::{self, Random};
use super::world::Setup;
use super::{ms_between, now_ns, percentiles, scale, server};

/// What detection may add to the liveness time.
const MARGIN_MS: f64 = 500.0;

/// Row 4.
pub(crate) fn a_stopped_rank_is_named_in_time() {
    let mut random = Random::new(random::seed());
    let mut samples = Vec::new();
    for at in 0..3 * scale() {
        let size = [2, 4, 3][at % 3];
        let victim = random.below(size as u64) as usize;
        samples.extend(stop_one(size, victim, Some(600)));
    }
    println!("600 ms of liveness: survivors name the rank after {}", percentiles(&mut samples).0);
}

/// Row 4, as it comes out of the box.
pub(crate) fn three_seconds_by_default() {
    let mut samples = stop_one(2, 1, None);
    println!("3 s of liveness: survivors name the rank after {}", percentiles(&mut samples).0);
}

/// Stops `victim`, expects the others to say so, lets it run again and expects it to give up.
fn stop_one(size: usize, victim: usize, liveness_ms: Option<u64>) -> Vec<f64> {
    let server = server();
    let mut setup = Setup::new("collectives", size, server.unique_id());
    if let Some(liveness) = liveness_ms {
        setup = setup.with("FAULTS_LIVENESS_MS", liveness);
    }
    let liveness_ms = liveness_ms.unwrap_or(3000) as f64;
    let mut world = setup.start();
    world.wait_until_all_said("ready");
    let traces = world.traces();
    let stopped = now_ns();
    world.signal(victim, Signal::STOP);
    world.wait_until("the end of the survivors", |world| {
        (0..size).filter(|rank| *rank != victim).all(|rank| world.ranks[rank].status.is_some())
    });
    let mut samples = Vec::new();
    for (_, process) in world.ranks.iter().enumerate().filter(|(rank, _)| *rank != victim) {
        let failure = process.failure().unwrap_or_else(|| panic!("{}", world.transcript()));
        assert_eq!((failure.variant.as_str(), &*failure.names), ("PeerDied", &[victim][..]));
        assert!(failure.sentence.contains("is stopped"), "{}", failure.sentence);
        let took = ms_between(stopped, failure.at_ns);
        // Its last heartbeat may have been a while ago when it was stopped.
        assert!(took >= liveness_ms * 0.6, "{took} ms: {}", failure.sentence);
        assert!(took <= liveness_ms + MARGIN_MS, "{took} ms: {}", failure.sentence);
        samples.push(took);
    }
    world.signal(victim, Signal::CONT);
    world.wait_for_end();
    let failure = world.ranks[victim].failure().unwrap_or_else(|| panic!("{}", world.transcript()));
    assert_eq!(failure.variant, "GivenUp", "{}", failure.sentence);
    traces.expect_none_left();
    samples
}

/// Row 4: late is not dead. The waiting ranks warn, naming the late one, and get the right result.
pub(crate) fn a_late_rank_is_waited_for() {
    let server = server();
    let setup = Setup::new("late", 3, server.unique_id())
        .with("FAULTS_LIVENESS_MS", 250)
        .with("FAULTS_LATE_MS", 5 * 250)
        .with("FAULTS_WARN_MS", 300);
    let mut world = setup.start();
    world.expect_good_end();
    let late = format!("rank 2 (host {}, pid {})", host_name(), world.ranks[2].pid);
    for rank in [0, 1] {
        let warnings: Vec<&String> =
            world.ranks[rank].errors.iter().filter(|line| line.contains("has waited")).collect();
        assert_eq!(warnings.len(), 2, "{}", world.transcript());
        assert!(warnings.iter().all(|line| line.contains(&late) && line.contains("all_reduce #")));
    }
    assert!(world.ranks[2].errors.is_empty(), "{}", world.transcript());
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Row 4: patience is not for ever.
pub(crate) fn a_timeout_names_who_did_not_come() {
    let server = server();
    let setup = Setup::new("absent", 4, server.unique_id())
        .with("FAULTS_ABSENT", "1 3")
        .with("FAULTS_TIMEOUT_MS", 400);
    let mut world = setup.start();
    world.wait_until_all_said("ready");
    let ready = now_ns();
    world.wait_until("the end of those that came", |world| {
        [0, 2].iter().all(|rank| world.ranks[*rank].status.is_some())
    });
    world.ask_to_end();
    world.wait_for_end();
    let pid = |rank: usize| format!("rank {rank} (host {}, pid {})", host_name(), world.ranks[rank].pid);
    // The absent ones learn it, too, when they come.
    for process in &world.ranks {
        let failure = process.failure().unwrap_or_else(|| panic!("{}", world.transcript()));
        assert_eq!(failure.variant, "Timeout", "{}", failure.sentence);
        assert!(
            failure.sentence.contains(&format!("for {}, {}, which", pid(1), pid(3))),
            "{}",
            failure.sentence
        );
        assert!(failure.sentence.contains("waited 0.4 s in barrier #1"), "{}", failure.sentence);
    }
    assert!(ms_between(ready, world.ranks[0].failure().unwrap().at_ns) < 400.0 + MARGIN_MS);
}

/// Row 4: many ranks share few cores, and nobody is suspected: 16 with little liveness, in campaigns 64 out of the box.
pub(crate) fn many_ranks_raise_no_alarm() {
    let server = server();
    let (size, liveness_ms) = if scale() < 10 { (16, 600) } else { (64, 3000) };
    let setup = Setup::new("collectives", size, server.unique_id()).with("FAULTS_LIVENESS_MS", liveness_ms);
    let mut world = setup.start();
    world.wait_until_all_said("ready");
    std::thread::sleep(Duration::from_secs(3 * scale().min(20) as u64));
    let traces = world.traces();
    world.expect_good_end();
    traces.expect_none_left();
    println!("{} calls of {size} ranks and no alarm", world.ranks[0].value("calls").unwrap());
}

/// Row 4: control-Z and `fg`. All were away for longer than the liveness time, so nobody was.
pub(crate) fn a_job_that_is_stopped_as_a_whole_goes_on() {
    let server = server();
    let mut world = Setup::new("collectives", 4, server.unique_id()).with("FAULTS_LIVENESS_MS", 400).start();
    world.wait_until_all_said("ready");
    for signal in [Signal::STOP, Signal::CONT] {
        (0..4).for_each(|rank| world.signal(rank, signal));
        std::thread::sleep(Duration::from_millis(900));
    }
    world.expect_good_end();
}
