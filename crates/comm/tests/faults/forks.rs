//! Row 16: a process that forks after its start, and signals that interrupt every system call.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use unisono::store::MemoryStore;
use unisono::{Communicator, Error, Memory, Operations, ReduceOp, Result, Stream, Symmetric, Window};

use super::parts::{Collectives, Part, expect, setting};
use super::world::Setup;
use super::{scale, server};

/// How long the storm lasts in which ranks meet and work.
const STORM: Duration = Duration::from_millis(1500);
/// Between two signals to one rank.
const PAUSE: Duration = Duration::from_micros(50);

/// The part `forks`: every rank forks again and again, and goes on.
pub(crate) fn fork_and_go_on(part: &Part) -> Result<()> {
    let communicator = part.builder().build()?;
    let mut window = communicator.window::<u32>(100, Memory::Host)?;
    let symmetric = communicator.window::<u32>(100, Memory::Host)?.into_symmetric(&communicator)?;
    let mut collectives = Collectives::new(4);
    println!("ready");
    for round in 0..setting("FAULTS_ROUNDS").unwrap_or(10) {
        collectives.next(&communicator)?;
        // SAFETY: the child calls what any code may call, and ends without running what its parent has left to do; no other
        // thread of this process holds a lock that the child needs: the plane's has nothing to do meanwhile.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let is_right =
                catch_unwind(AssertUnwindSafe(|| child_is_refused(&communicator, &mut window, &symmetric)));
            let mut is_right = is_right.unwrap_or(false);
            match round % 4 {
                // Half of the children also leave as a program does that drops what it has, or goes on without others.
                0 => drop((communicator, window, symmetric)),
                2 => is_right &= matches!(communicator.shrink(), Err(Error::Forked { .. })),
                _ => {}
            }
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(if is_right { 0 } else { 9 }) };
        }
        collectives.next(&communicator)?;
        let status = waitpid(Pid::from_raw(child), WaitOptions::empty()).unwrap().unwrap().1;
        expect(status.exit_status() == Some(0), || format!("a child ended with {status:?}"));
        communicator.all_reduce(window.range_mut(0..100), ReduceOp::Sum)?;
        collectives.next(&communicator)?;
    }
    // What a child did to its copy is no rank's leaving.
    communicator.barrier()?;
    let next = communicator.shrink()?;
    expect(next.world_size() == part.size, || format!("{} ranks", next.world_size()));
    collectives.next(&next)?;
    next.destroy()
}

/// Whether everything that a forked child can ask for is refused, and a communicator of its own works.
fn child_is_refused(
    communicator: &Communicator,
    window: &mut Window<u32>,
    symmetric: &Symmetric<u32>,
) -> bool {
    let (parent, child) = (std::os::unix::process::parent_id(), std::process::id());
    let expected = Error::Forked { rank: communicator.rank(), parent, child };
    let is_refused = |result: Result<()>| result == Err(expected.clone());
    let (mut x, stream) = ([1u32; 1000], Stream::host());
    let results = [
        communicator.check(),
        communicator.all_reduce(&mut x, ReduceOp::Sum),
        communicator.barrier(),
        communicator.recv_any(&mut x, 1).map(drop),
        communicator.scope(|scope| scope.broadcast(&mut x, 0)?.wait()),
        communicator.window::<u8>(10, Memory::Host).map(drop),
        communicator.split(Some(1), 0).map(drop),
        unisono::group(|group| group.on(communicator, &stream).barrier().map(drop)),
        window.lend().map(drop),
        symmetric.write(0, 0, &[1]),
        symmetric.signal(0, 0, 1),
        symmetric.wait_signal(0, 1, Duration::from_secs(1)),
    ];
    communicator.observer().abort("a child has no say");
    let store = Arc::new(MemoryStore::new());
    let own = Communicator::builder().store(store).rank(0).world_size(1).build();
    let own_works =
        own.is_ok_and(|own| own.all_reduce(&mut x, ReduceOp::Sum).is_ok() && own.destroy().is_ok());
    results.into_iter().all(is_refused) && own_works
}

extern "C" fn nothing(_: libc::c_int) {}

/// The part `stormed`: handlers that interrupt system calls, then a start and collectives.
pub(crate) fn be_stormed(part: &Part) -> Result<()> {
    for signal in [libc::SIGUSR1, libc::SIGALRM] {
        // SAFETY: all of the structure may be zero: an empty mask, and no SA_RESTART; the handler does nothing.
        let installed = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut())
        };
        assert_eq!(installed, 0);
    }
    println!("begun");
    let communicator = part.builder().build()?;
    println!("ready");
    let mut collectives = Collectives::new(6);
    let end = Instant::now() + STORM;
    let mut ends = [0u8];
    while ends[0] == 0 {
        collectives.next(&communicator)?;
        // A call that all wait for, so that some sleep.
        if collectives.calls % 5 == part.rank as u64 {
            std::thread::sleep(Duration::from_millis(1));
        }
        ends[0] = u8::from(Instant::now() > end);
        communicator.all_reduce(&mut ends, ReduceOp::Max)?;
    }
    println!("calls {}", collectives.calls);
    communicator.destroy()
}

/// Row 16, forks.
pub(crate) fn a_forked_child_is_refused_and_its_parent_goes_on() {
    let server = server();
    let setup = Setup::new("forks", 3, server.unique_id()).with("FAULTS_ROUNDS", 10 * scale());
    let mut world = setup.start();
    world.wait_until_all_said("ready");
    world.expect_good_end();
}

/// Row 16, signals.
pub(crate) fn a_storm_of_signals_does_no_harm() {
    let server = server();
    for _ in 0..scale() {
        let setup = Setup::new("stormed", 3, server.unique_id());
        let mut world = setup.start();
        world.wait_until_all_said("begun");
        let pids: Vec<Pid> = world.ranks.iter().map(|rank| Pid::from_raw(rank.pid as i32).unwrap()).collect();
        // They are waited for below: until then the numbers are theirs.
        let storm = std::thread::spawn(move || {
            let (begun, mut sent) = (Instant::now(), 0);
            while begun.elapsed() < STORM {
                for pid in &pids {
                    let signal = if sent % 2 == 0 { Signal::USR1 } else { Signal::ALARM };
                    kill_process(*pid, signal).unwrap();
                    sent += 1;
                }
                std::thread::sleep(PAUSE);
            }
            sent
        });
        let sent = storm.join().unwrap();
        world.expect_good_end();
        let calls: u64 = world.ranks[0].value("calls").unwrap().parse().unwrap();
        println!("{sent} signals, {calls} calls");
        assert!(sent > 300 && calls > 20, "{sent} {calls}");
    }
}
