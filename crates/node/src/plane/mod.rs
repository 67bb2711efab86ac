//! The node plane: authenticated sockets between all processes of one host, with one thread that carries messages
//! and descriptors and watches that everybody lives.
//!
//! A peer is lost when its socket reaches end-of-file, when its process ends (told by its pidfd: a forked child can
//! hold the socket open), or when its heartbeat, a count in shared memory, stands still. The thread is independent of
//! the operating thread, whatever that one waits for. Cost when idle: a wake-up every quarter of a second.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use unisono_core::auth::Sealer;
use unisono_sync::{Deadline, Flag};

use crate::connect::{Endpoint, Link, PlaneConfig, connect_all};
use crate::error::{Error, Lost, Result};
use crate::socket::{self, MAX_MESSAGE_BYTES, Sent};
use progress::PlaneThread;

mod progress;

#[cfg(feature = "fuzzing")]
pub(crate) use progress::fuzzing;

const MESSAGE: u16 = 2;
const FAREWELL: u16 = 3;
/// Messages of one peer that nobody received yet; more than this no rank sends.
const MAX_UNREAD: usize = 4096;
/// Longest time between two looks at the peers.
const TICK: Duration = Duration::from_millis(250);

/// What the plane reports to, and where heartbeats are kept.
pub trait PlaneEvents: Send + Sync {
    /// Moves our own heartbeat.
    fn beat(&self);
    /// The heartbeat of `rank`.
    fn heartbeat_of(&self, rank: usize) -> u64;
    /// `rank` was lost; [`Lost::Left`] if it said farewell. Called once per peer, from the plane's thread (or from
    /// [`NodePlane::watch`]).
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
    inbox: Mutex<Inbox>,
    arrived: Condvar,
    events: OnceLock<Arc<dyn PlaneEvents>>,
    wake: OwnedFd,
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
    socket: OwnedFd,
    pidfd: Option<OwnedFd>,
    sealer: Mutex<Sealer>,
}

#[derive(Default)]
struct Inbox {
    messages: HashMap<(usize, u64), VecDeque<Message>>,
    unread: HashMap<usize, usize>,
    lost: HashMap<usize, Lost>,
}

impl NodePlane {
    /// Connects to all peers of `config` and starts the thread. Every local rank calls this at the same time.
    pub fn connect(endpoint: &Endpoint, config: &PlaneConfig, deadline: Deadline) -> Result<Self> {
        let links = connect_all(endpoint, config, deadline)?;
        let (mut peers, mut openers) = (Vec::new(), Vec::new());
        for Link { rank, pid, socket, pidfd, session } in links {
            peers.push(Peer { rank, pid, socket, pidfd, sealer: Mutex::new(session.sealer) });
            openers.push(session.opener);
        }
        let wake =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(Error::socket("eventfd"))?;
        let shared = Arc::new(Shared {
            peers,
            inbox: Mutex::default(),
            arrived: Condvar::new(),
            events: OnceLock::new(),
            wake,
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

    /// From now on, reports lost peers to `events` (those already lost at once) and keeps heartbeats there.
    pub fn watch(&self, events: Arc<dyn PlaneEvents>) {
        if self.shared.events.set(events.clone()).is_ok() {
            let lost: Vec<_> = self.shared.inbox().lost.iter().map(|(rank, lost)| (*rank, *lost)).collect();
            for (rank, lost) in lost {
                events.on_lost(rank, self.shared.pid_of(rank), lost);
            }
            self.shared.wake_up();
        }
    }

    /// Sends `body` and `fds` to `to` under `tag`.
    pub fn send(
        &self,
        to: usize,
        tag: u64,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<()> {
        let Some(peer) = self.shared.peers.iter().find(|peer| peer.rank == to) else {
            return Err(Error::Socket { action: "send", message: format!("rank {to} is not on this host") });
        };
        let mut message = tag.to_le_bytes().to_vec();
        message.extend_from_slice(body);
        match peer.send(MESSAGE, &message, fds, deadline)? {
            Sent::Whole => Ok(()),
            Sent::NoRoom => {
                Err(Error::Socket { action: "send", message: format!("rank {to} does not read") })
            }
            Sent::Closed => {
                let lost = self.shared.inbox().lost.get(&to).copied().unwrap_or(Lost::SocketClosed);
                Err(Error::PeerLost { rank: to, pid: peer.pid, lost })
            }
        }
    }

    /// The next message of `from` under `tag`, waiting for it. `is_aborted` ends the wait; `what` is for the error.
    pub fn receive(
        &self,
        from: usize,
        tag: u64,
        what: &'static str,
        deadline: Deadline,
        is_aborted: &dyn Fn() -> bool,
    ) -> Result<Message> {
        let start = Instant::now();
        let mut inbox = self.shared.inbox();
        loop {
            if let Some(message) = inbox.take(from, tag) {
                return Ok(message);
            }
            if let Some(lost) = inbox.lost.get(&from) {
                return Err(Error::PeerLost { rank: from, pid: self.shared.pid_of(from), lost: *lost });
            }
            if is_aborted() {
                return Err(Error::Aborted);
            }
            if deadline.is_over() {
                return Err(Error::Timeout { rank: from, what, waited: start.elapsed() });
            }
            let slice = deadline.remaining_up_to(Duration::from_millis(20));
            inbox = self.shared.arrived.wait_timeout(inbox, slice).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The process of `rank`, if it is a peer here.
    pub fn pid_of(&self, rank: usize) -> Option<u32> {
        self.shared.peers.iter().find(|peer| peer.rank == rank).map(|peer| peer.pid)
    }
}

impl Drop for NodePlane {
    fn drop(&mut self) {
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

impl Inbox {
    fn take(&mut self, from: usize, tag: u64) -> Option<Message> {
        let queue = self.messages.get_mut(&(from, tag))?;
        let message = queue.pop_front();
        if queue.is_empty() {
            self.messages.remove(&(from, tag));
        }
        if message.is_some() {
            *self.unread.entry(from).or_default() -= 1;
        }
        message
    }
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pid_of(&self, rank: usize) -> u32 {
        self.peers.iter().find(|peer| peer.rank == rank).map_or(0, |peer| peer.pid)
    }

    fn wake_up(&self) {
        // A full counter means that a wake-up is already on its way.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn lose(&self, peer: &Peer, lost: Lost) {
        let is_new = {
            let mut inbox = self.inbox();
            let is_new = !inbox.lost.contains_key(&peer.rank);
            inbox.lost.entry(peer.rank).or_insert(lost);
            is_new
        };
        self.arrived.notify_all();
        if is_new
            && !self.stopping.is_raised()
            && let Some(events) = self.events.get()
        {
            events.on_lost(peer.rank, peer.pid, lost);
        }
    }
}

#[cfg(test)]
mod tests;
