//! Ranks, stores and parents that are killed while a job runs.

use std::os::fd::BorrowedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::io::FdFlags;
use rustix::process::{Pid, Signal, kill_process};
use unisono::{Operations, Result};

use super::parts::{Collectives, Part};
use super::random::{self, Random};
use super::world::{Setup, World};
use super::{ms_between, percentiles, scale, server};

/// The longest that a survivor may take to say who died.
const PROMISED_MAX_MS: f64 = 1000.0;
/// The same for 99 of 100. Held up by campaigns only: a single run on a machine with other work has too few.
const PROMISED_P99_MS: f64 = 50.0;

/// Row 1, and row 10 after each kill.
pub(crate) fn every_survivor_names_the_killed_rank() {
    let server = server();
    let seed = random::seed();
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let (mut samples, mut exits, kills) = (Vec::new(), Vec::new(), 18 * scale());
    for at in 0..kills {
        let size = [2, 4, 8][at % 3];
        let victim = random.below(size as u64) as usize;
        let setup = Setup::new("collectives", size, server.unique_id()).with("FAULTS_CALLS", random.next());
        let mut world = setup.start();
        world.wait_until_all_said("ready");
        let traces = world.traces();
        std::thread::sleep(Duration::from_micros(random.below(40_000)));
        let killed = world.kill(victim);
        world.wait_for_end();
        exits.push(ms_between(killed, super::now_ns()));
        samples.extend(expect_survivors_to_name(&world, victim, killed));
        traces.expect_none_left();
    }
    let (text, p99) = percentiles(&mut samples);
    println!(
        "{kills} kills: survivors name the rank after {text}; all gone after {}",
        percentiles(&mut exits).0
    );
    assert!(scale() < 10 || p99 <= PROMISED_P99_MS, "{text}");
}

/// Every survivor reports that `victim` died, with its process, and soon enough; how soon, in milliseconds.
fn expect_survivors_to_name(world: &World, victim: usize, killed: u64) -> Vec<f64> {
    let mut samples = Vec::new();
    for (rank, process) in world.ranks.iter().enumerate().filter(|(rank, _)| *rank != victim) {
        let context = || format!("rank {rank}, victim {victim}\n{}", world.transcript());
        let failure = process.failure().unwrap_or_else(|| panic!("{}", context()));
        assert_eq!((failure.variant.as_str(), &*failure.names), ("PeerDied", &[victim][..]), "{}", context());
        let pid = format!("pid {}", world.ranks[victim].pid);
        assert!(failure.sentence.contains(&pid), "{}", context());
        assert_eq!(process.status.unwrap().code(), Some(1), "{}", context());
        let took = ms_between(killed, failure.at_ns);
        assert!((0.0..=PROMISED_MAX_MS).contains(&took), "{took} ms: {}", context());
        samples.push(took);
    }
    samples
}

/// Row 26: a child that its parent forked, and that holds all its sockets.
pub(crate) fn a_forked_child_does_not_hide_it() {
    let server = server();
    let mut samples = Vec::new();
    for victim in (0..3 * scale().min(20)).map(|at| at % 3) {
        let setup = Setup::new("holder", 3, server.unique_id()).with("FAULTS_VICTIM", victim);
        let mut world = setup.start();
        world.wait_until_all_said("ready");
        let child: i32 = world.ranks[victim].value("child").unwrap().parse().unwrap();
        let killed = world.kill(victim);
        // The output of the victim stays open as long as the child lives.
        world.wait_until("the end of the survivors", |world| {
            (0..3).filter(|rank| *rank != victim).all(|rank| world.ranks[rank].status.is_some())
        });
        samples.extend(expect_survivors_to_name(&world, victim, killed));
        let (_, first) = world.ranks.iter().enumerate().find(|(rank, _)| *rank != victim).unwrap();
        let sentence = first.failure().unwrap().sentence;
        assert!(sentence.contains("its process ended"), "the sockets told it: {sentence}");
        let child = Pid::from_raw(child).unwrap();
        // It is an orphan of the killed rank; that it is still there proves that it held the sockets till now.
        kill_process(child, Signal::KILL).unwrap();
        world.wait_for_end();
    }
    println!("survivors name the rank after {}", percentiles(&mut samples).0);
}

/// The part `holder`: random collectives, and on one rank a child that inherits every descriptor.
pub(crate) fn hold_descriptors(part: &Part) -> Result<()> {
    let communicator = part.builder().build()?;
    communicator.barrier()?;
    if Some(part.rank) == super::parts::setting("FAULTS_VICTIM") {
        let mut command = Command::new("sleep");
        command.arg("60").stdin(Stdio::null());
        let open: Vec<i32> = std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|fd| *fd > 2)
            .collect();
        let keep_all_open = move || {
            for fd in open.iter().copied() {
                // SAFETY: the descriptor is used for this one call, in a child that is about to become another program;
                // one that was closed meanwhile (that of the folder that was read) gives an error.
                let fd = unsafe { BorrowedFd::borrow_raw(fd) };
                let _ = rustix::io::fcntl_setfd(fd, FdFlags::empty());
            }
            Ok(())
        };
        #[expect(clippy::zombie_processes, reason = "it outlives us: that is the fault")]
        // SAFETY: between fork and exec the closure makes system calls only, and allocates nothing.
        let child = unsafe { command.pre_exec(keep_all_open) }.spawn().unwrap();
        println!("child {}", child.id());
    }
    println!("ready");
    let mut collectives = Collectives::new(3);
    loop {
        collectives.next(&communicator)?;
    }
}

/// Row 6.
pub(crate) fn the_store_is_not_missed_after_the_start() {
    let placeholder = server();
    for _ in 0..2 * scale() {
        let mut stores = Setup::new("store", 1, placeholder.unique_id()).start();
        stores.wait_until("the store", |world| world.ranks[0].value("store").is_some());
        let id = unisono::UniqueId::from_text(stores.ranks[0].value("store").unwrap()).unwrap();
        let mut world = Setup::new("collectives", 3, id).start();
        world.wait_until_all_said("ready");
        stores.kill(0);
        stores.wait_for_end();
        std::thread::sleep(Duration::from_millis(300));
        let traces = world.traces();
        world.expect_good_end();
        traces.expect_none_left();
    }
}
