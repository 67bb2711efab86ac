//! What can go wrong between the ranks of one host.

use std::fmt;
use std::time::Duration;

/// Result of the functions of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// How a peer was lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Lost {
    /// Its socket reached end-of-file without a farewell.
    SocketClosed,
    /// Its process ended (a forked child may still hold its sockets).
    ProcessEnded,
    /// Its process is stopped (SIGSTOP, or a debugger) and did not answer for this long.
    Stopped {
        /// Time since its last heartbeat.
        silent_ms: u64,
    },
    /// Its process is there but did not answer for this long.
    Silent {
        /// Time since its last heartbeat.
        silent_ms: u64,
    },
    /// It sent something that no rank of ours sends.
    Misbehaved,
    /// It said farewell: its communicator was destroyed or dropped.
    Left,
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SocketClosed => write!(f, "its socket closed"),
            Self::ProcessEnded => write!(f, "its process ended"),
            Self::Stopped { silent_ms } => {
                write!(f, "its process is stopped and did not answer for {:.1} s", *silent_ms as f64 / 1e3)
            }
            Self::Silent { silent_ms } => write!(f, "it did not answer for {:.1} s", *silent_ms as f64 / 1e3),
            Self::Misbehaved => write!(f, "it sent what no rank sends"),
            Self::Left => write!(f, "it left the job, and its own output says why"),
        }
    }
}

/// Everything that can go wrong here. Peers are named by their rank in the world.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The authentication or the wire refused something.
    #[error(transparent)]
    Core(#[from] unisono_core::Error),
    /// The system refused memory. Nothing was left allocated.
    #[error("{bytes} bytes of shared memory cannot be had: {action} says {message}")]
    Memory {
        /// Bytes asked for.
        bytes: usize,
        /// The step that failed.
        action: &'static str,
        /// What the system said.
        message: String,
    },
    /// A peer's memory is not what was agreed. It was not mapped.
    #[error("the shared memory that came should be {expected}, but is {got}")]
    ForeignMemory {
        /// Size and seals that were agreed.
        expected: String,
        /// What came.
        got: String,
    },
    /// A system call on a socket failed.
    #[error("{action} between the ranks of this host failed: {message}")]
    Socket {
        /// What was being done.
        action: &'static str,
        /// What the system said.
        message: String,
    },
    /// A process of another user is on the other end. It was refused.
    #[error("a process of user {got} connected as a rank of this job; only user {expected} may")]
    ForeignUser {
        /// Our user id.
        expected: u32,
        /// Theirs.
        got: u32,
    },
    /// Some ranks of this host did not connect before the deadline.
    #[error(
        "no connection between rank {rank} and ranks {} of this host within {waited:.1?}. Are they alive, or stopped?",
        list(missing)
    )]
    Missing {
        /// The rank that waited.
        rank: usize,
        /// The ranks that did not come.
        missing: Vec<usize>,
        /// How long it waited.
        waited: Duration,
    },
    /// A peer was lost.
    #[error("rank {rank} (pid {pid}) is gone: {lost}")]
    PeerLost {
        /// The peer.
        rank: usize,
        /// Its process.
        pid: u32,
        /// How.
        lost: Lost,
    },
    /// A peer did not send what was waited for.
    #[error("rank {rank} did not send {what} within {waited:.1?}. Is it alive, or stopped?")]
    Timeout {
        /// The peer.
        rank: usize,
        /// What was waited for.
        what: &'static str,
        /// How long.
        waited: Duration,
    },
    /// Other processes, or their memory, cannot be looked at.
    #[error("{what} cannot be read: {message}")]
    Inspect {
        /// What was to be read.
        what: String,
        /// What the system said.
        message: String,
    },
    /// The wait was given up because the communicator failed meanwhile.
    #[error("given up, because the communicator failed meanwhile; its first cause says why")]
    Aborted,
}

/// `0, 1, 5` for messages.
fn list(ranks: &[usize]) -> String {
    ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

impl Error {
    /// A failed system call on a socket.
    pub(crate) fn socket(action: &'static str) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |errno| Self::Socket { action, message: errno.to_string() }
    }
}

#[cfg(test)]
mod sentences;
