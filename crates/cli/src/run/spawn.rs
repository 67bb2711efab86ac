//! Starting one rank: its variables, its pipes, its process group, and the promise that it does not outlive us.

use std::ffi::OsString;
use std::io::{self, IsTerminal as _};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, Signal};
use rustix::thread::CpuSet;
use unisono::store::StoreServer;

use super::secret;
use super::signals::SignalMask;
use super::writer::{Source, Stream};
use crate::{Failure, hardware};

/// What all ranks of a job have in common, and the store in which they meet.
pub(crate) struct Job {
    pub(super) name: String,
    pub(super) world_size: usize,
    pub(super) store: StoreServer,
    /// A port that was free, for the program's own use.
    master_port: u16,
    secret: OwnedFd,
    program: Vec<OsString>,
    mask: Option<SignalMask>,
    /// The processors that we may use, if each rank is to be bound to one.
    processors: Option<Vec<usize>>,
}

/// A started rank.
#[derive(Debug)]
pub(crate) struct Rank {
    pub(crate) child: Child,
    pub(super) pid: Pid,
    /// Readable once the process has ended.
    pub(super) pidfd: OwnedFd,
}

/// Variables of launchers, which would tell the ranks something about another job.
const FOREIGN_PREFIXES: [&str; 5] = ["OMPI_", "PMIX_", "PMI_", "TORCHELASTIC_", "HYDRA_"];
const FOREIGN_NAMES: [&str; 14] = [
    "MPI_LOCALRANKID",
    "MPI_LOCALNRANKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_STEP_ID",
    "SLURM_STEPID",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_NAME",
    "ROLE_WORLD_SIZE",
    "UNISONO_SECRET_FILE",
    "UNISONO_GENERATION",
    "UNISONO_SECRET_FD",
];

/// True for a variable that another launcher sets for its ranks.
fn is_foreign(name: &str) -> bool {
    FOREIGN_NAMES.contains(&name) || FOREIGN_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

impl Job {
    /// A job of `world_size` ranks of `program`, with a store and a secret of its own. The ranks block the signals of
    /// `mask`; without one, those that we block.
    pub(crate) fn new(
        world_size: usize,
        program: Vec<OsString>,
        mask: Option<SignalMask>,
    ) -> Result<Self, Failure> {
        let secret = secret::random()?;
        let store = StoreServer::start(secret.clone())
            .map_err(|error| Failure::new(format!("the store of the job cannot be started: {error}")))?;
        Ok(Self {
            name: format!("run-{:016x}", u64::from_ne_bytes(secret::random_bytes()?)),
            world_size,
            store,
            master_port: free_port()?,
            secret: secret::memory_file(&secret)?,
            program,
            mask,
            processors: None,
        })
    }

    /// From now on binds each rank to a processor of its own, if there are enough; whether there are.
    pub(crate) fn bind(&mut self) -> bool {
        let processors = hardware::allowed();
        let enough = processors.len() >= self.world_size;
        self.processors = enough.then_some(processors);
        enough
    }

    /// Starts `rank` and gives the pipes of its output: standard output and standard error.
    pub(crate) fn start(&self, rank: usize) -> Result<(Rank, [Source; 2]), Failure> {
        let mut command = self.command(rank);
        let mut child = command.spawn().map_err(|error| self.cannot_start(rank, &error))?;
        let pipes = child.stdout.take().zip(child.stderr.take());
        let pid = Pid::from_child(&child);
        let watched = rustix::process::pidfd_open(pid, PidfdFlags::empty());
        let ((stdout, stderr), pidfd) = match (pipes, watched) {
            (Some(pipes), Ok(pidfd)) => (pipes, pidfd),
            (_, watched) => {
                let error =
                    watched.err().map_or_else(|| io::Error::other("it has no pipes"), io::Error::from);
                // It may have ended already; then there is nothing to kill, and only its status to collect.
                let _ = child.kill();
                let _ = child.wait();
                return Err(self.cannot_start(rank, &error));
            }
        };
        let sources = [
            Source { rank, stream: Stream::Out, pipe: OwnedFd::from(stdout) },
            Source { rank, stream: Stream::Err, pipe: OwnedFd::from(stderr) },
        ];
        Ok((Rank { child, pid, pidfd }, sources))
    }

    fn command(&self, rank: usize) -> Command {
        let mut command = Command::new(&self.program[0]);
        command.args(&self.program[1..]);
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(is_foreign) {
                command.env_remove(name);
            }
        }
        let secret = self.secret.as_raw_fd();
        command
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("WORLD_SIZE", self.world_size.to_string())
            .env("LOCAL_WORLD_SIZE", self.world_size.to_string())
            .env("MASTER_ADDR", self.store.address().ip().to_string())
            .env("MASTER_PORT", self.master_port.to_string())
            .env("UNISONO_STORE", format!("tcp://{}", self.store.address()))
            .env("UNISONO_JOB", &self.name)
            .env("UNISONO_SECRET_FD", secret.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .stdin(input(rank))
            // A group of its own, so that a signal reaches what the rank has started too, and Ctrl-C only once.
            .process_group(0);
        let (mask, parent) = (self.mask, rustix::process::getpid());
        let processor = self.processors.as_ref().map(|processors| {
            let mut set = CpuSet::new();
            set.set(processors[rank]);
            set
        });
        let prepare = move || {
            if let Some(mask) = mask {
                mask.restore()?;
            }
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            // We may have died before that call.
            if rustix::process::getppid() != Some(parent) {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            if let Some(set) = &processor {
                rustix::thread::sched_setaffinity(None, set)?;
            }
            // SAFETY: the descriptor is open in the parent, which keeps it in `Job` until all ranks are started, and
            // the forked child has a copy under the same number.
            let secret = unsafe { BorrowedFd::borrow_raw(secret) };
            rustix::io::fcntl_setfd(secret, FdFlags::empty())?;
            Ok(())
        };
        // SAFETY: `prepare` runs between fork and exec: it makes at most five system calls, allocates nothing (an error of the
        // system is a number), takes no lock, and touches only values that were copied into it.
        unsafe { command.pre_exec(prepare) };
        command
    }

    /// The sentence and the exit code that shells use: 127 for no such program, 126 for one that cannot run.
    fn cannot_start(&self, rank: usize, error: &io::Error) -> Failure {
        let program = self.program[0].to_string_lossy();
        let (message, exit_code) = match error.kind() {
            io::ErrorKind::NotFound if program.contains('/') => {
                (format!("cannot start `{program}`: there is no such file (or not its interpreter)"), 127)
            }
            io::ErrorKind::NotFound => {
                (format!("cannot start `{program}`: there is no such program in PATH"), 127)
            }
            io::ErrorKind::PermissionDenied => (
                format!("cannot start `{program}`: it is not executable (chmod +x, or name its interpreter)"),
                126,
            ),
            _ if error.raw_os_error() == Some(libc::ENOEXEC) => (
                format!("cannot start `{program}`: it is neither a program nor a script that begins with #!"),
                126,
            ),
            _ if error.raw_os_error() == Some(libc::EMFILE) => {
                (format!("cannot start rank {rank}: {error}; raise the limit of open files (ulimit -n)"), 126)
            }
            _ => (format!("cannot start rank {rank} of `{program}`: {error}"), 126),
        };
        Failure { message, exit_code }
    }
}

/// Rank 0 reads our input; the others, and everybody when it is a terminal (whose reader must be in the foreground
/// group), read nothing.
fn input(rank: usize) -> Stdio {
    if rank == 0 && !io::stdin().is_terminal() { Stdio::inherit() } else { Stdio::null() }
}

/// A port of the loopback interface that nobody uses at this moment.
fn free_port() -> Result<u16, Failure> {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
    port.map(|address| address.port())
        .map_err(|error| Failure::new(format!("no free port on the loopback interface: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_of_other_launchers_are_foreign_and_others_are_not() {
        for name in
            ["OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "TORCHELASTIC_RUN_ID", "PMIX_NAMESPACE"]
        {
            assert!(is_foreign(name), "{name}");
        }
        for name in [
            "PATH",
            "SLURM_JOB_ID",
            "UNISONO_TIMEOUT",
            "UNISONO_LOG",
            "OMP_NUM_THREADS",
            "CUDA_VISIBLE_DEVICES",
        ] {
            assert!(!is_foreign(name), "{name}");
        }
    }
}
