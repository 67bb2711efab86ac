//! What the kernel must let us do: each call is made once, with the flags that the library uses.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process::{Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::process::PidfdFlags;
use unisono::host;

use super::Finding;
use crate::output::bytes;
use crate::{Failure, ranks};

/// What a filter of system calls is, and how to lift it.
const FILTER: &str = "a system call filter (seccomp) of the container forbids it; try: docker run --security-opt seccomp=unconfined";

pub(super) fn check() -> Vec<Finding> {
    vec![shared_memory(), futex(), pidfd(), sockets(), looking_inside()]
}

fn shared_memory() -> Finding {
    const CHECK: &str = "shared memory";
    let size = host::communicator_bytes(2) as u64;
    let made = || -> Result<OwnedFd, (&'static str, rustix::io::Errno)> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file =
            rustix::fs::memfd_create("unisono-doctor", flags).map_err(|errno| ("memfd_create", errno))?;
        rustix::fs::ftruncate(&file, size).map_err(|errno| ("ftruncate", errno))?;
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size)
            .map_err(|errno| ("fallocate", errno))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).map_err(|errno| ("sealing", errno))?;
        Ok(file)
    };
    match made() {
        Ok(file) if rustix::fs::ftruncate(&file, 0).is_err() => Finding::ok(
            CHECK,
            format!("a memfd of {} was allocated and sealed; it cannot be resized", bytes(size)),
        ),
        Ok(_) => {
            Finding::fail(CHECK, "a sealed memfd could be made shorter", "a kernel from 3.17 on keeps seals")
        }
        Err((action, errno)) if matches!(errno, rustix::io::Errno::NOMEM | rustix::io::Errno::NOSPC) => {
            Finding::fail(
                CHECK,
                format!("{action} of {}: {errno}", bytes(size)),
                "free memory, or raise the limit of the control group",
            )
        }
        Err((action, errno)) => Finding::fail(CHECK, format!("{action}: {errno}"), FILTER),
    }
}

fn futex() -> Finding {
    match host::check_futex() {
        Ok(()) => Finding::ok("futex", "ranks that wait long can sleep on words in shared memory"),
        Err(error) => {
            Finding::fail("futex", format!("ranks cannot sleep on words in shared memory: {error}"), FILTER)
        }
    }
}

fn pidfd() -> Finding {
    let opened = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty());
    let moment = Timespec { tv_sec: 0, tv_nsec: 0 };
    let polled = opened.and_then(|pidfd| poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&moment)));
    match polled {
        Ok(0) => Finding::ok("pidfd", "the end of a rank's process is noticed at once"),
        Ok(_) => Finding::fail(
            "pidfd",
            "a descriptor of this process says that it has ended",
            "report it as a bug",
        ),
        Err(rustix::io::Errno::NOSYS) => Finding::fail(
            "pidfd",
            "pidfd_open is missing",
            "it needs Linux 5.3 or newer, and no filter that hides it",
        ),
        Err(errno) => Finding::fail("pidfd", format!("pidfd_open: {errno}"), FILTER),
    }
}

fn sockets() -> Finding {
    const CHECK: &str = "Unix sockets";
    let met = || -> io::Result<()> {
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(io::Error::other)?;
        let address = SocketAddr::from_abstract_name([b"unisono-doctor-".as_slice(), &random].concat())?;
        let listener = UnixListener::bind_addr(&address)?;
        let mut here = UnixStream::connect_addr(&address)?;
        let (mut there, _) = listener.accept()?;
        here.write_all(b"?")?;
        let mut heard = [0];
        there.read_exact(&mut heard)?;
        let who = rustix::net::sockopt::socket_peercred(&there)?;
        if who.pid != rustix::process::getpid() || &heard != b"?" {
            return Err(io::Error::other("the other end is somebody else"));
        }
        Ok(())
    };
    match met() {
        Ok(()) => Finding::ok(CHECK, "abstract addresses work, and the other end is known"),
        Err(error) => {
            Finding::fail(CHECK, format!("two ends on an abstract address did not meet: {error}"), FILTER)
        }
    }
}

/// Whether another process of the same user can be looked into through `/proc`, as tools do with a running job.
fn looking_inside() -> Finding {
    const CHECK: &str = "/proc/PID/fd";
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok();
    let scope = scope.map_or_else(|| "no yama".to_owned(), |scope| format!("ptrace_scope {}", scope.trim()));
    match look_inside() {
        Ok(()) => {
            Finding::ok(CHECK, format!("the memory of another process of this user can be opened ({scope})"))
        }
        Err(error) => Finding::warn(
            CHECK,
            format!("the memory of another process of this user cannot be opened ({scope}): {error}"),
            "jobs run all the same; to look into one, use the user and the container that it runs in, and mount /proc without hidepid",
        ),
    }
}

fn look_inside() -> io::Result<()> {
    const WORD: &[u8] = b"unisono";
    let memory = rustix::fs::memfd_create("unisono-doctor", MemfdFlags::CLOEXEC)?;
    File::from(memory.as_fd().try_clone_to_owned()?).write_all(WORD)?;
    let program = ranks::own_program().map_err(|failure| io::Error::other(failure.to_string()))?;
    let mut holder = Command::new(&program[0]);
    holder.args(["doctor", "--as-holder"]).stdin(Stdio::piped()).stdout(Stdio::from(memory));
    let mut child = holder.spawn()?;
    let looked = File::open(format!("/proc/{}/fd/1", child.id())).and_then(|mut file| {
        let mut seen = Vec::new();
        file.read_to_end(&mut seen)?;
        if seen == WORD { Ok(()) } else { Err(io::Error::other("it holds something else")) }
    });
    // It ends by itself when its input does; this is for one that cannot.
    drop(child.stdin.take());
    let _ = child.kill();
    child.wait()?;
    looked
}

/// What the other process does: keeps its files open until its input ends.
pub(super) fn hold() -> Result<u8, Failure> {
    io::copy(&mut io::stdin().lock(), &mut io::sink())
        .map(|_| 0)
        .map_err(|error| Failure::new(format!("standard input cannot be read: {error}")))
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn this_kernel_can_do_what_a_job_needs() {
        for finding in [shared_memory(), futex(), pidfd(), sockets()] {
            assert_eq!(finding.verdict, Verdict::Ok, "{finding:?}");
        }
    }
}
