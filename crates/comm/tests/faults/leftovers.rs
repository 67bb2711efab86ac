//! What is left when communicators and processes are gone: nothing.

use std::process::Command;
use std::time::{Duration, Instant};

use unisono::{Communicator, Memory, Operations, ReduceOp, Result};

use super::parts::{Part, setting};
use super::traces::Traces;
use super::world::{Setup, World};
use super::{scale, server};

/// Communicators that are made before the baseline is taken: allocators and threads settle.
const WARM_UP: usize = 20;

/// What this process holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    pub(crate) descriptors: usize,
    threads: usize,
    mappings: usize,
    anonymous_kb: usize,
    shared_kb: usize,
}

impl Usage {
    pub(crate) fn now() -> Self {
        // Where any system call may be made to fail, the second try succeeds.
        let read = |path| std::fs::read_to_string(path).or_else(|_| std::fs::read_to_string(path)).unwrap();
        let list = |path| std::fs::read_dir(path).or_else(|_| std::fs::read_dir(path)).unwrap();
        let status = read("/proc/self/status");
        let field = |name: &str| -> usize {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        Self {
            descriptors: list("/proc/self/fd").count(),
            threads: field("Threads:"),
            mappings: read("/proc/self/maps").lines().count(),
            anonymous_kb: field("RssAnon:"),
            shared_kb: field("RssShmem:"),
        }
    }

    /// Row 24's bound: no descriptor, no mapping of shared memory, at most 1 MiB of anything else.
    pub(crate) fn is_back_at(&self, baseline: &Self) -> bool {
        self.descriptors <= baseline.descriptors
            && self.threads <= baseline.threads
            && self.mappings <= baseline.mappings + 8
            && self.anonymous_kb <= baseline.anonymous_kb + 1024
            && self.shared_kb <= baseline.shared_kb
    }
}

/// Calls `round` again and again; at the end everything is back where it was after some of them.
fn churn(rounds: usize, mut round: impl FnMut(usize) -> Result<()>) -> Result<()> {
    let mut baseline = None;
    for at in 0..WARM_UP + rounds {
        if at == WARM_UP {
            // What the last communicators left to their threads is not part of the baseline.
            settle(|usage| usage.threads <= 1);
            baseline = Some(Usage::now());
        }
        round(at)?;
    }
    let baseline = baseline.unwrap();
    settle(|usage| usage.is_back_at(&baseline));
    let usage = Usage::now();
    println!("usage {baseline:?} before and {usage:?} after {rounds} communicators");
    super::parts::expect(usage.is_back_at(&baseline), || format!("{usage:?} is above {baseline:?}"));
    Ok(())
}

/// Threads of the node plane end by themselves, a moment after their communicator.
pub(crate) fn settle(is_settled: impl Fn(&Usage) -> bool) {
    let end = Instant::now() + Duration::from_secs(5);
    while !is_settled(&Usage::now()) && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Something with every kind of memory in it.
fn work(communicator: &Communicator) -> Result<()> {
    let mut x = vec![1u32; 30_000];
    communicator.all_reduce(&mut x, ReduceOp::Sum)?;
    let mut window = communicator.window::<f32>(5000, Memory::Host)?;
    window.lend()?.fill(1.0);
    communicator.all_reduce(window.range_mut(0..5000), ReduceOp::Sum)?;
    let size = communicator.world_size();
    super::parts::expect(x[29_999] as usize == size && window.lend()?[4999] as usize == size, || {
        "sums".into()
    });
    Ok(())
}

/// The part `thread churn`: every second world is destroyed, the others are just dropped.
pub(crate) fn thread_churn() -> Result<()> {
    churn(setting("FAULTS_ROUNDS").unwrap_or(200), |at| {
        let threads: Vec<_> = Communicator::threads(3)?
            .into_iter()
            .map(|communicator| {
                std::thread::spawn(move || {
                    work(&communicator)?;
                    if at % 2 == 0 { communicator.destroy() } else { Ok(()) }
                })
            })
            .collect();
        // A rank that is dropped early is an error of the slower ones, and of nobody's memory.
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        if at % 2 == 0 { results.into_iter().collect() } else { Ok(()) }
    })
}

/// The part `process churn`.
pub(crate) fn process_churn(part: &Part) -> Result<()> {
    churn(setting("FAULTS_ROUNDS").unwrap_or(60), |at| {
        let communicator = part.builder().job(format!("{} {at}", part.job)).build()?;
        work(&communicator)?;
        communicator.destroy()
    })
}

/// The part `family churn`: communicators split off one that stays, and off each other.
pub(crate) fn family_churn(part: &Part) -> Result<()> {
    let communicator = part.builder().build()?;
    churn(setting("FAULTS_ROUNDS").unwrap_or(200), |at| {
        let child = communicator.split((part.rank != at % 3).then_some(1), part.rank as i32)?;
        if let Some(child) = child {
            let twin = child.duplicate()?;
            twin.barrier()?;
            child.destroy()?;
            twin.destroy()?;
        }
        communicator.barrier()
    })?;
    communicator.destroy()
}

/// The part `shrink churn`: worlds of threads that lose a rank, and go on twice.
pub(crate) fn shrink_churn() -> Result<()> {
    churn(setting("FAULTS_ROUNDS").unwrap_or(50), |at| {
        let threads: Vec<_> = Communicator::threads(4)?
            .into_iter()
            .map(|communicator| {
                std::thread::spawn(move || {
                    if communicator.rank() == at % 4 {
                        return Ok(());
                    }
                    let next = communicator.shrink()?;
                    work(&next)?;
                    // Whoever shrinks ends the generation for all.
                    next.barrier()?;
                    next.shrink()?.destroy()
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap())
    })
}

/// Row 24: a thousand communicators that come from one.
pub(crate) fn children_give_everything_back() {
    let server = server();
    let setup = Setup::new("family churn", 3, server.unique_id()).with("FAULTS_ROUNDS", 500 * scale());
    let mut world = setup.start();
    world.expect_good_end();
    println!("{}", world.ranks[0].value("usage").unwrap());
}

/// Row 10, for ranks that shrink.
pub(crate) fn earlier_generations_give_everything_back() {
    let server = server();
    let setup = Setup::new("shrink churn", 1, server.unique_id()).with("FAULTS_ROUNDS", 60 * scale());
    let mut world = setup.start();
    world.expect_good_end();
    println!("{}", world.ranks[0].value("usage").unwrap());
}

/// Row 10, for ranks that are threads.
pub(crate) fn threads_give_everything_back() {
    let server = server();
    let setup = Setup::new("thread churn", 1, server.unique_id()).with("FAULTS_ROUNDS", 200 * scale());
    let mut world = setup.start();
    world.expect_good_end();
    println!("{}", world.ranks[0].value("usage").unwrap());
}

/// Row 10, for ranks that are processes.
pub(crate) fn processes_give_everything_back() {
    let server = server();
    let setup = Setup::new("process churn", 3, server.unique_id()).with("FAULTS_ROUNDS", 60 * scale());
    let mut world = setup.start();
    world.expect_good_end();
    let traces = Traces::of(&[], &world.job);
    traces.expect_none_left();
    println!("{}", world.ranks[0].value("usage").unwrap());
}

/// Row 11.
pub(crate) fn a_tiny_shared_memory_file_system_is_enough() {
    let mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm && mount -t tmpfs -o size=64k tmpfs /tmp";
    let inside = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script]);
        command
    };
    if !inside(mount).output().is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: no right to mount a tiny /dev/shm (root and `unshare --mount` are needed)");
        return;
    }
    let server = server();
    let setup = Setup::new("collectives", 3, server.unique_id());
    let program = std::env::current_exe().unwrap();
    let commands = (0..3).map(|rank| {
        // By descriptor: the program may lie in the /tmp that is hidden.
        let mut command = inside(&format!("exec 3<\"$0\" && {mount} && exec /proc/self/fd/3"));
        setup.tell(&mut command, rank);
        command.arg(&program);
        command
    });
    let mut world = World::start(commands, setup.job.clone());
    world.wait_until_all_said("ready");
    world.expect_good_end();
    let calls: u64 = world.ranks[0].value("calls").unwrap().parse().unwrap();
    assert!(calls > 0);
}

/// The check itself: a name, a child and a file are found as long as they are there.
pub(crate) fn the_check_for_leftovers_finds_some() {
    let server = server();
    let job = format!("faults-leftover-{}", std::process::id());
    let setup = Setup { job: job.clone(), ..Setup::new("start", 2, server.unique_id()) };
    // One rank alone waits for the other, with its socket bound.
    let mut world = World::start([setup.command(0)], job.clone());
    let pid = world.ranks[0].pid;
    world.wait_until("its socket", |_| Traces::of(&[pid], &job).socket_names() == 1);
    let traces = world.traces();
    let file = tempfile::Builder::new().prefix(&job).tempfile_in("/tmp").unwrap();
    let left = traces.left();
    assert!(left.iter().any(|left| left.starts_with("@unisono-")), "{left:?}");
    assert!(left.contains(&file.path().display().to_string()), "{left:?}");
    assert!(left.contains(&format!("process {pid}")), "{left:?}");
    drop((file, world));
    traces.expect_none_left();
}
