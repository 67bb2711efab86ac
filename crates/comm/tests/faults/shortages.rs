//! Row 12: the system refuses descriptors, memory or any one call while a rank starts. Every rank gets a typed error by the
//! deadline, and the one that was refused has given everything back.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use unisono::{Operations, ReduceOp, Result};

use super::leftovers::{Usage, settle};
use super::parts::{Part, expect, setting};
use super::random::{self, Random};
use super::world::{Setup, World};
use super::{scale, server};

/// Time to meet: those who wait for the one that failed before it said hello wait so long.
const INIT_MS: u64 = 1500;
/// Worlds at once.
const AT_ONCE: usize = 6;
/// System calls that a start makes and that can fail in good faith. Not `brk` and `mmap`: a process
/// without memory for its heap, or for the signal stack of a thread, ends by Rust's own rule.
const CALLS: [&str; 24] = [
    "memfd_create",
    "ftruncate",
    "fallocate",
    "fcntl",
    "socket",
    "bind",
    "listen",
    "connect",
    "accept4",
    "sendmsg",
    "recvmsg",
    "getsockopt",
    "setsockopt",
    "getsockname",
    "pidfd_open",
    "eventfd2",
    "epoll_create1",
    "epoll_ctl",
    "poll",
    "openat",
    "read",
    "sendto",
    "recvfrom",
    "clone3",
];

/// The part `short`: a rank whose limits are lowered between its baseline and its start.
pub(crate) fn start(part: &Part) -> Result<()> {
    let usage = Usage::now();
    if part.rank == setting("FAULTS_VICTIM").unwrap_or(usize::MAX) {
        // Whoever is to be traced waits for the tracer.
        println!("begun");
        if setting::<bool>("FAULTS_TRACED").unwrap_or(false) {
            // This read may be the call that fails, after the tracer has come.
            let _ = std::io::stdin().lock().read_line(&mut String::new());
        }
    }
    let limits = [(Resource::Nofile, "FAULTS_DESCRIPTORS"), (Resource::As, "FAULTS_ADDRESS_BYTES")];
    let usual: Vec<_> = limits.iter().map(|(resource, _)| (*resource, getrlimit(*resource))).collect();
    for (resource, name) in limits {
        let Some(more) = setting::<u64>(name) else { continue };
        let used = if resource == Resource::Nofile { usage.descriptors as u64 - 1 } else { address_space() };
        setrlimit(resource, Rlimit { current: Some(used + more), ..getrlimit(resource) }).unwrap();
    }
    let result = part.builder().build();
    for (resource, limit) in usual {
        setrlimit(resource, limit).unwrap();
    }
    let communicator = match result {
        Ok(communicator) => communicator,
        Err(error) => {
            settle(|now| now.is_back_at(&usage));
            let now = Usage::now();
            expect(now.is_back_at(&usage), || format!("{now:?} is above {usage:?} after: {error}"));
            println!("rolled back");
            return Err(error);
        }
    };
    println!("ready");
    let mut sum = vec![1u32; 20_000];
    communicator.all_reduce(&mut sum, ReduceOp::Sum)?;
    expect(sum.iter().all(|sum| *sum as usize == part.size), || format!("a sum of {}", sum[0]));
    communicator.destroy()
}

/// Bytes that are mapped now.
fn address_space() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').next().unwrap().parse::<u64>().unwrap() * rustix::param::page_size() as u64
}

/// All ranks end in order: all well, or all with an error and nothing left. Whether they are well.
fn expect_order(world: &World, victim: usize, what: &str) -> bool {
    let context = || format!("{what}\n{}", world.transcript());
    let done = world.ranks.iter().filter(|rank| rank.said("done")).count();
    for rank in &world.ranks {
        let panicked = rank.errors.iter().any(|line| line.contains("panicked"));
        assert!(!panicked && rank.status.unwrap().code().is_some_and(|code| code <= 1), "{}", context());
        assert!(rank.said("done") != rank.failure().is_some(), "{}", context());
    }
    assert!(done == 0 || done == world.ranks.len(), "{}", context());
    let tells = world.ranks[victim].said("rolled back") || world.ranks[victim].said("ready");
    assert!(tells, "{}", context());
    done > 0
}

/// Every number of descriptors from none to enough, on the lowest and on the highest rank.
pub(crate) fn too_few_descriptors_are_an_error_on_all_ranks() {
    stepped("FAULTS_DESCRIPTORS", "descriptors", (0..36).collect());
}

/// Address space for the thread's stack and for none, some or all of the shared memory.
pub(crate) fn too_little_memory_is_an_error_on_all_ranks() {
    stepped("FAULTS_ADDRESS_BYTES", "memory", (2..14).map(|half| half << 20).collect());
}

/// Worlds of three in which one rank has so much more of something than it uses already.
fn stepped(name: &'static str, reason: &str, steps: Vec<u64>) {
    let server = server();
    let cases: Vec<(usize, u64)> =
        [0, 2].into_iter().flat_map(|victim| steps.iter().map(move |more| (victim, *more))).collect();
    let (mut well, mut refused) = (0, 0);
    for cases in cases.chunks(AT_ONCE) {
        let start = |(victim, more): &(usize, u64)| {
            let setup = Setup::new("short", 3, server.unique_id())
                .with("FAULTS_VICTIM", victim)
                .with("FAULTS_INIT_MS", INIT_MS);
            let limited = setup.clone().with(name, more);
            let commands =
                (0..3).map(|rank| if rank == *victim { limited.command(rank) } else { setup.command(rank) });
            World::start(commands, setup.job.clone())
        };
        let mut worlds: Vec<World> = cases.iter().map(start).collect();
        for (world, (victim, more)) in worlds.iter_mut().zip(cases) {
            let traces = world.traces();
            world.wait_for_end();
            let what = format!("rank {victim} with {more} of {name}");
            if expect_order(world, *victim, &what) {
                well += 1;
            } else {
                refused += 1;
            }
            traces.expect_none_left();
        }
    }
    assert!(refused > 0 && well > 0, "the steps do not reach from too little to enough: {refused} {well}");
    println!("{refused} starts failed for want of {reason}, {well} had enough");
}

/// Any single system call of a start fails: a random one, the n-th time.
pub(crate) fn a_system_call_that_fails_is_an_error_on_all_ranks() {
    if !Command::new("strace")
        .args(["-o", "/dev/null", "true"])
        .output()
        .is_ok_and(|output| output.status.success())
    {
        eprintln!("SKIPPED: strace is not installed, or may not trace (apt-get install strace)");
        return;
    }
    let server = server();
    let seed = random::seed();
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let (mut well, mut refused) = (0, 0);
    let cases: Vec<(&str, usize, &str)> = (0..12 * scale())
        .map(|_| {
            let call = CALLS[random.below(CALLS.len() as u64) as usize];
            (call, random.count(20), ["ENOMEM", "EMFILE", "ENOBUFS"][random.below(3) as usize])
        })
        .collect();
    for cases in cases.chunks(3) {
        let mut worlds: Vec<(World, Child)> = cases.iter().map(|case| traced_world(&server, *case)).collect();
        for ((world, tracer), (call, at, errno)) in worlds.iter_mut().zip(cases) {
            world.wait_for_end();
            let injected = tracer.wait().unwrap();
            let what = format!("{call} number {at} fails with {errno}; the tracer: {injected}");
            if expect_order(world, 0, &what) {
                well += 1;
            } else {
                refused += 1;
            }
        }
    }
    println!("{refused} starts failed, {well} did without the call");
}

/// A world whose rank 0 gets `errno` the `at`-th time that it makes a system call in its start.
fn traced_world(
    server: &unisono::store::StoreServer,
    (call, at, errno): (&str, usize, &str),
) -> (World, Child) {
    let setup = Setup::new("short", 2, server.unique_id())
        .with("FAULTS_VICTIM", 0)
        .with("FAULTS_TRACED", true)
        .with("FAULTS_INIT_MS", 2 * INIT_MS);
    let mut world = setup.start();
    world.wait_until("its beginning", |world| world.ranks[0].said("begun"));
    let mut tracer = Command::new("strace")
        .args(["-f", "-o", "/dev/null", "-p", &world.ranks[0].pid.to_string()])
        .arg(format!("--inject={call}:error={errno}:when={at}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(tracer.stderr.take().unwrap()).lines().map_while(std::io::Result::ok);
    assert!(lines.any(|line| line.contains("attached")), "strace is not attached");
    // What it says later is read by nobody, and must not fill a pipe.
    std::thread::spawn(move || lines.for_each(drop));
    world.ask_to_end();
    (world, tracer)
}
