//! The node plane: authenticated sockets between all processes of one host, with one thread that carries messages
//! and descriptors and watches that everybody lives.
//!
//! A peer is lost when its socket reaches end-of-file, when its process ends (told by its pidfd: a forked child can
//! hold the socket open), or when its heartbeats, counts in shared memory, stand still. The thread is independent of
//! the operating thread, whatever that one waits for. Cost when idle: a wake-up every quarter of a second.
//!
//! One plane serves all groups of ranks that work together: each watches with memory of its own, in which its ranks have
//! other numbers, and hears of the losses among them.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use unisono_core::auth::Sealer;
use unisono_sync::{Counter, Deadline, Flag};

use crate::connect::{Endpoint, Link, PlaneConfig, connect_all};
use crate::error::{Error, Lost, Result};
use crate::fork::Process;
use crate::mailbox::{Mailbox, Tag};
use crate::socket::{self, MAX_MESSAGE_BYTES, Sent};
use progress::PlaneThread;

mod progress;

#[cfg(feature = "fuzzing")]
pub(crate) use progress::fuzzing;

const MESSAGE: u16 = 2;
const FAREWELL: u16 = 3;
/// Longest time between two looks at the peers.
const TICK: Duration = Duration::from_millis(250);

/// What the plane reports to, and where heartbeats are kept. Ranks are numbered as in the group that watches.
pub trait PlaneEvents: Send + Sync {
    /// Moves our own heartbeat.
    fn beat(&self);
    /// The heartbeat of `rank`.
    fn heartbeat_of(&self, rank: usize) -> u64;
    /// `rank` was lost; [`Lost::Left`] if it said farewell. Called at least once for each that is, from the plane's thread
    /// or from [`NodePlane::watch`].
    fn on_lost(&self, rank: usize, pid: u32, lost: Lost);
}

/// A message from a peer.
#[derive(Debug)]
pub struct Message {
    /// Its content.
    pub body: Vec<u8>,
    /// The descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

/// The plane of one rank. Dropping it says farewell and ends the thread, without waiting for it.
#[derive(Debug)]
pub struct NodePlane {
    shared: Arc<Shared>,
}

struct Shared {
    peers: Vec<Peer>,
    mailbox: Mailbox<Message>,
    watchers: Mutex<Vec<Arc<Watcher>>>,
    watches: Counter,
    wake: OwnedFd,
    process: Process,
    stopping: Flag,
    liveness: Option<Duration>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("peers", &self.peers).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Peer {
    rank: usize,
    pid: u32,
    /// The same, if we see it.
    seen_pid: Option<u32>,
    socket: OwnedFd,
    pidfd: Option<OwnedFd>,
    sealer: Mutex<Sealer>,
}

/// A group that watches: `ranks[r]` is the rank in the world of its rank r.
struct Watcher {
    number: u64,
    ranks: Arc<[usize]>,
    events: Arc<dyn PlaneEvents>,
}

/// Names a watch, for [`NodePlane::unwatch`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WatchId(u64);

impl NodePlane {
    /// Connects to all peers of `config` and starts the thread. Every local rank calls this at the same time.
    pub fn connect(endpoint: &Endpoint, config: &PlaneConfig, deadline: Deadline) -> Result<Self> {
        let links = connect_all(endpoint, config, deadline)?;
        let (mut peers, mut openers) = (Vec::new(), Vec::new());
        for Link { rank, pid, seen_pid, socket, pidfd, session } in links {
            peers.push(Peer { rank, pid, seen_pid, socket, pidfd, sealer: Mutex::new(session.sealer) });
            openers.push(session.opener);
        }
        let wake =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(Error::socket("eventfd"))?;
        let shared = Arc::new(Shared {
            peers,
            mailbox: Mailbox::default(),
            watchers: Mutex::default(),
            watches: Counter::new(0),
            wake,
            process: Process::this(),
            stopping: Flag::new(),
            liveness: config.liveness,
        });
        let tick =
            config.liveness.map_or(TICK, |liveness| (liveness / 8).clamp(Duration::from_millis(5), TICK));
        let thread = PlaneThread::new(shared.clone(), openers, tick);
        std::thread::Builder::new()
            .name(format!("unisono-node-{}", config.rank))
            .spawn(move || thread.run())
            .map_err(|error| Error::Socket { action: "thread", message: error.to_string() })?;
        Ok(Self { shared })
    }

    /// From now on, reports lost peers to `events` (those already lost at once) and keeps heartbeats there. `ranks[r]` is the
    /// rank in the world of what `events` calls rank r.
    pub fn watch(&self, ranks: Arc<[usize]>, events: Arc<dyn PlaneEvents>) -> WatchId {
        let number = self.shared.watches.add(1);
        let watcher = Arc::new(Watcher { number, ranks, events });
        self.shared.lock_watchers().push(watcher.clone());
        for (rank, pid, lost) in self.shared.mailbox.all_lost() {
            watcher.on_lost(rank, pid, lost);
        }
        self.shared.wake_up();
        WatchId(number)
    }

    /// Ends a watch. A report that is under way may still come.
    pub fn unwatch(&self, watch: WatchId) {
        // In a forked child nobody watches, and the lock may have been held when it was made.
        if !self.shared.process.is_this() {
            return;
        }
        self.shared.lock_watchers().retain(|watcher| watcher.number != watch.0);
    }

    /// Sends `body` and `fds` to `to` under `tag`.
    pub fn send(
        &self,
        to: usize,
        tag: Tag,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<()> {
        let Some(peer) = self.shared.peers.iter().find(|peer| peer.rank == to) else {
            return Err(Error::Socket { action: "send", message: format!("rank {to} is not on this host") });
        };
        let mut message = tag.to_bytes().to_vec();
        message.extend_from_slice(body);
        match peer.send(MESSAGE, &message, fds, deadline)? {
            Sent::Whole => Ok(()),
            Sent::NoRoom => {
                Err(Error::Socket { action: "send", message: format!("rank {to} does not read") })
            }
            Sent::Closed => {
                let lost = self.shared.mailbox.lost(to).unwrap_or(Lost::SocketClosed);
                Err(Error::PeerLost { rank: to, pid: peer.pid, lost })
            }
        }
    }

    /// What was sent to us, and who is lost.
    pub fn mailbox(&self) -> &Mailbox<Message> {
        &self.shared.mailbox
    }

    /// The process of `rank`, if it is a peer here.
    pub fn pid_of(&self, rank: usize) -> Option<u32> {
        self.shared.peers.iter().find(|peer| peer.rank == rank).map(|peer| peer.pid)
    }
}

impl Drop for NodePlane {
    fn drop(&mut self) {
        // The sockets of a forked child are those of its parent, which goes on.
        if !self.shared.process.is_this() {
            return;
        }
        for peer in &self.shared.peers {
            // A peer that does not read, or is gone, needs no farewell.
            let _ = peer.send(FAREWELL, &[], &[], Deadline::after(Duration::ZERO));
        }
        self.shared.stopping.raise();
        self.shared.wake_up();
    }
}

impl Peer {
    fn send(&self, kind: u16, body: &[u8], fds: &[BorrowedFd<'_>], deadline: Deadline) -> Result<Sent> {
        // The lock is held over the send: sealed frames must leave in the order of their numbers.
        let mut sealer = self.sealer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut frame = Vec::with_capacity(body.len() + 64);
        sealer.seal(kind, body, &mut frame)?;
        if frame.len() > MAX_MESSAGE_BYTES {
            let (got, cap) = (frame.len() as u64, MAX_MESSAGE_BYTES as u64);
            return Err(unisono_core::Error::TooLarge { what: "message", got, cap }.into());
        }
        socket::send(&self.socket, &frame, fds, deadline)
    }
}

impl Watcher {
    /// The number here of `rank` of the world, if it is one of ours.
    fn number_of(&self, rank: usize) -> Option<usize> {
        self.ranks.iter().position(|other| *other == rank)
    }

    fn on_lost(&self, rank: usize, pid: u32, lost: Lost) {
        if let Some(rank) = self.number_of(rank) {
            self.events.on_lost(rank, pid, lost);
        }
    }
}

impl Shared {
    fn lock_watchers(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Watcher>>> {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those that watch now: what they are told must not happen under the lock.
    fn watchers(&self) -> Vec<Arc<Watcher>> {
        self.lock_watchers().clone()
    }

    fn wake_up(&self) {
        // A full counter means that a wake-up is already on its way.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn lose(&self, peer: &Peer, lost: Lost) {
        if self.mailbox.lose(peer.rank, peer.pid, lost) && !self.stopping.is_raised() {
            for watcher in self.watchers() {
                watcher.on_lost(peer.rank, peer.pid, lost);
            }
        }
    }
}

#[cfg(test)]
mod tests;
