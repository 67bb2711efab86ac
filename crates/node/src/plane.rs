//! The node plane: authenticated sockets between all processes of one host, with one thread that carries messages
//! and descriptors and watches that everybody lives.
//!
//! A peer is lost when its socket reaches end-of-file, when its process ends (told by its pidfd: a forked child can
//! hold the socket open), or when its heartbeat, a count in shared memory, stands still. The thread is independent of
//! the operating thread, whatever that one waits for. Cost when idle: a wake-up every quarter of a second.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
use unisono_core::auth::{Opened, Opener, Sealer};
use unisono_sync::{Deadline, Flag};

use crate::connect::{Endpoint, Link, PlaneConfig, connect_all};
use crate::error::{Error, Lost, Result};
use crate::identity;
use crate::socket::{self, MAX_MESSAGE_BYTES, Received};

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
    /// `rank` was lost. Called once per peer, from the plane's thread (or from [`NodePlane::watch`]).
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
        let thread =
            PlaneThread { shared: shared.clone(), openers, hearts: HashMap::new(), last_look: None, tick };
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
                if lost != Lost::Left {
                    events.on_lost(rank, self.shared.pid_of(rank), lost);
                }
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
        peer.send(MESSAGE, &message, fds, deadline).map_err(|error| match self.shared.inbox().lost.get(&to) {
            Some(lost) => Error::PeerLost { rank: to, pid: peer.pid, lost: *lost },
            None => error,
        })
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
    fn send(&self, kind: u16, body: &[u8], fds: &[BorrowedFd<'_>], deadline: Deadline) -> Result<()> {
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
            && lost != Lost::Left
            && !self.stopping.is_raised()
            && let Some(events) = self.events.get()
        {
            events.on_lost(peer.rank, peer.pid, lost);
        }
    }
}

/// A peer's heartbeat as last seen.
struct Heart {
    count: u64,
    since: Instant,
}

struct PlaneThread {
    shared: Arc<Shared>,
    openers: Vec<Opener>,
    hearts: HashMap<usize, Heart>,
    last_look: Option<Instant>,
    tick: Duration,
}

impl PlaneThread {
    fn run(mut self) {
        let mut buffer = vec![0; MAX_MESSAGE_BYTES];
        while !self.shared.stopping.is_raised() {
            if let Err(error) = self.turn(&mut buffer) {
                tracing::error!("the node plane failed: {error}");
                std::thread::sleep(self.tick);
            }
        }
    }

    /// Waits for something to happen, at most one tick, and deals with it.
    fn turn(&mut self, buffer: &mut [u8]) -> Result<()> {
        let shared = self.shared.clone();
        let alive: Vec<usize> = {
            let inbox = shared.inbox();
            (0..shared.peers.len()).filter(|at| !inbox.lost.contains_key(&shared.peers[*at].rank)).collect()
        };
        let mut fds = vec![PollFd::from_borrowed_fd(shared.wake.as_fd(), PollFlags::IN)];
        let mut owners = Vec::new();
        for at in &alive {
            let peer = &shared.peers[*at];
            fds.push(PollFd::from_borrowed_fd(peer.socket.as_fd(), PollFlags::IN));
            owners.push((*at, false));
            if let Some(pidfd) = &peer.pidfd {
                fds.push(PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN));
                owners.push((*at, true));
            }
        }
        socket::wait_for(&mut fds, self.tick)?;
        if !fds[0].revents().is_empty() {
            let _ = rustix::io::read(&shared.wake, &mut [0u8; 8]);
        }
        for (fd, (at, is_process)) in fds[1..].iter().zip(owners) {
            if fd.revents().is_empty() {
                continue;
            }
            if is_process {
                // What the process sent before it ended is still worth reading: a farewell, above all.
                self.read(at, buffer);
                shared.lose(&shared.peers[at], Lost::ProcessEnded);
            } else {
                self.read(at, buffer);
            }
        }
        self.look_at_hearts(&alive);
        Ok(())
    }

    /// Reads all that peer `at` sent.
    fn read(&mut self, at: usize, buffer: &mut [u8]) {
        let shared = self.shared.clone();
        let peer = &shared.peers[at];
        loop {
            match socket::receive(&peer.socket, buffer) {
                Ok(Received::Nothing) => return,
                Ok(Received::EndOfFile) => return shared.lose(peer, Lost::SocketClosed),
                Ok(Received::Message(length, fds)) => {
                    if let Err(error) = self.deliver(at, &buffer[..length], fds) {
                        tracing::error!("rank {}: {error}", peer.rank);
                        return shared.lose(peer, Lost::Misbehaved);
                    }
                }
                Err(error) => {
                    tracing::error!("rank {}: {error}", peer.rank);
                    return shared.lose(peer, Lost::Misbehaved);
                }
            }
        }
    }

    fn deliver(&mut self, at: usize, message: &[u8], fds: Vec<OwnedFd>) -> Result<()> {
        let peer = &self.shared.peers[at];
        let malformed = |got: String| unisono_core::Error::Malformed {
            what: "node plane message",
            expected: "one whole frame".to_owned(),
            got,
        };
        let (kind, body) = match self.openers[at].open(message)? {
            Opened::Frame { kind, body, consumed } if consumed == message.len() => (kind, &message[body]),
            _ => return Err(malformed(format!("{} bytes", message.len())).into()),
        };
        match kind {
            FAREWELL => {
                self.shared.lose(peer, Lost::Left);
                Ok(())
            }
            MESSAGE if body.len() >= 8 => {
                let (tag, body) = body.split_at(8);
                let tag = u64::from_le_bytes(tag.try_into().unwrap_or_default());
                let mut inbox = self.shared.inbox();
                let unread = inbox.unread.entry(peer.rank).or_default();
                if *unread >= MAX_UNREAD {
                    return Err(malformed(format!("{MAX_UNREAD} messages that nobody asked for")).into());
                }
                *unread += 1;
                let message = Message { body: body.to_vec(), fds };
                inbox.messages.entry((peer.rank, tag)).or_default().push_back(message);
                self.shared.arrived.notify_all();
                Ok(())
            }
            kind => Err(malformed(format!("kind {kind}")).into()),
        }
    }

    /// Beats, and suspects peers whose heartbeat stands still. A process that is stopped is suspected after the
    /// liveness time; one that is only starved of processor time gets three times as long.
    fn look_at_hearts(&mut self, alive: &[usize]) {
        let shared = self.shared.clone();
        let (Some(events), Some(liveness)) = (shared.events.get(), shared.liveness) else { return };
        events.beat();
        let now = Instant::now();
        // If we ourselves were not running (the machine slept, or we were stopped) what we remember is worth nothing.
        let slept = self.last_look.is_none_or(|last| now - last > (liveness / 3).max(self.tick * 2));
        self.last_look = Some(now);
        for peer in alive.iter().map(|at| &shared.peers[*at]) {
            let count = events.heartbeat_of(peer.rank);
            let heart = self.hearts.entry(peer.rank).or_insert(Heart { count, since: now });
            if slept || heart.count != count {
                *heart = Heart { count, since: now };
                continue;
            }
            let silent = now - heart.since;
            // A beat may have come just before we looked last: that much is already on the clock.
            if silent + self.tick < liveness {
                continue;
            }
            let silent_ms = silent.as_millis() as u64;
            match identity::is_stopped(peer.pid) {
                Some(true) => shared.lose(peer, Lost::Stopped { silent_ms }),
                _ if silent >= liveness * 3 => shared.lose(peer, Lost::Silent { silent_ms }),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use unisono_core::Secret;
    use unisono_sync::Counter;

    use super::*;
    use crate::connect::PeerAddress;
    use crate::memory::SharedMemory;

    const SECRET: [u8; 32] = [7; 32];

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(20))
    }

    fn configs(endpoints: &[Endpoint]) -> Vec<PlaneConfig> {
        let peer =
            |(rank, endpoint): (usize, &Endpoint)| PeerAddress { rank, pid: 1, endpoint: endpoint.name() };
        (0..endpoints.len())
            .map(|rank| PlaneConfig {
                context: "test 0".into(),
                rank,
                peers: endpoints.iter().enumerate().filter(|(other, _)| *other != rank).map(peer).collect(),
                secret: Secret::new(SECRET),
                liveness: Some(Duration::from_millis(400)),
            })
            .collect()
    }

    fn world(ranks: usize) -> Vec<NodePlane> {
        let endpoints: Vec<_> = (0..ranks).map(|_| Endpoint::bind().unwrap()).collect();
        let threads: Vec<_> = configs(&endpoints)
            .into_iter()
            .zip(endpoints)
            .map(|(config, endpoint)| {
                std::thread::spawn(move || NodePlane::connect(&endpoint, &config, soon()).unwrap())
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    }

    struct Recorder {
        hearts: Vec<Counter>,
        lost: Mutex<mpsc::Sender<(usize, u32, Lost)>>,
    }

    impl PlaneEvents for Recorder {
        fn beat(&self) {}
        fn heartbeat_of(&self, rank: usize) -> u64 {
            self.hearts[rank].value()
        }
        fn on_lost(&self, rank: usize, pid: u32, lost: Lost) {
            self.lost.lock().unwrap().send((rank, pid, lost)).unwrap();
        }
    }

    fn recorder(ranks: usize) -> (Arc<Recorder>, mpsc::Receiver<(usize, u32, Lost)>) {
        let (sender, receiver) = mpsc::channel();
        let hearts = (0..ranks).map(|_| Counter::new(0)).collect();
        (Arc::new(Recorder { hearts, lost: Mutex::new(sender) }), receiver)
    }

    #[test]
    fn five_ranks_meet_and_pass_memory_to_each_other() {
        let planes = world(5);
        let memory = SharedMemory::create(4096).unwrap();
        for to in [0, 1, 3, 4] {
            planes[2].send(to, 9, b"window", &[memory.as_fd()], soon()).unwrap();
            let message = planes[to].receive(2, 9, "memory", soon(), &|| false).unwrap();
            assert_eq!(message.body, b"window");
            let fd = message.fds.into_iter().next().unwrap();
            assert!(SharedMemory::from_fd(fd, 4096).is_ok());
            assert_eq!(planes[to].pid_of(2), Some(std::process::id()));
        }
    }

    #[test]
    fn a_farewell_is_no_death_but_ends_waits() {
        let mut planes = world(2);
        let (events, lost) = recorder(2);
        planes[0].watch(events);
        drop(planes.remove(1));
        let error = planes[0].receive(1, 1, "anything", soon(), &|| false).unwrap_err();
        assert!(matches!(error, Error::PeerLost { rank: 1, lost: Lost::Left, .. }), "{error:?}");
        assert!(lost.try_recv().is_err());
    }

    #[test]
    fn a_message_that_nobody_sends_ends_by_deadline_or_abort() {
        let planes = world(2);
        let short = Deadline::after(Duration::from_millis(30));
        let error = planes[0].receive(1, 1, "its memory", short, &|| false).unwrap_err();
        assert!(matches!(error, Error::Timeout { rank: 1, what: "its memory", .. }));
        assert_eq!(planes[0].receive(1, 1, "x", soon(), &|| true).unwrap_err(), Error::Aborted);
    }

    #[test]
    fn a_heart_that_stands_still_is_reported_once_and_a_beating_one_never() {
        let planes = world(3);
        let (events, lost) = recorder(3);
        planes[0].watch(events.clone());
        let start = Instant::now();
        let found = loop {
            events.hearts[2].add(1);
            if let Ok(found) = lost.recv_timeout(Duration::from_millis(10)) {
                break found;
            }
            assert!(start.elapsed() < Duration::from_secs(20));
        };
        // Rank 1 is a thread of this running process: silent, but not stopped.
        assert!(matches!(found, (1, _, Lost::Silent { silent_ms }) if silent_ms >= 1200), "{found:?}");
        assert!(lost.try_recv().is_err());
    }

    #[test]
    fn a_stranger_is_turned_away_and_the_ranks_still_meet() {
        let endpoints: Vec<_> = (0..2).map(|_| Endpoint::bind().unwrap()).collect();
        let stranger = socket::new_socket().unwrap();
        rustix::net::connect(&stranger, &socket::address(endpoints[0].name()).unwrap()).unwrap();
        socket::try_send(&stranger, b"uni1\x01\0\0\0\0\0\0\0", &[]).unwrap();
        let liar = socket::new_socket().unwrap();
        rustix::net::connect(&liar, &socket::address(endpoints[0].name()).unwrap()).unwrap();
        socket::try_send(&liar, b"GET / HTTP/1.1", &[]).unwrap();
        let mut configs = configs(&endpoints).into_iter();
        let (first, second) = (configs.next().unwrap(), configs.next().unwrap());
        let mut endpoints = endpoints.into_iter();
        let (left, right) = (endpoints.next().unwrap(), endpoints.next().unwrap());
        let thread = std::thread::spawn(move || NodePlane::connect(&left, &first, soon()));
        let right = NodePlane::connect(&right, &second, soon()).unwrap();
        let left = thread.join().unwrap().unwrap();
        left.send(1, 1, b"hello", &[], soon()).unwrap();
        assert_eq!(right.receive(0, 1, "hello", soon(), &|| false).unwrap().body, b"hello");
    }

    #[test]
    fn a_rank_with_another_secret_is_refused_and_the_absent_are_listed() {
        let endpoints: Vec<_> = (0..3).map(|_| Endpoint::bind().unwrap()).collect();
        let mut configs = configs(&endpoints);
        configs[1].secret = Secret::new([8; 32]);
        let mut endpoints = endpoints.into_iter();
        let (left, right) = (endpoints.next().unwrap(), endpoints.next().unwrap());
        let (second, first) = (configs.remove(1), configs.remove(0));
        let short = Deadline::after(Duration::from_millis(300));
        let thread = std::thread::spawn(move || NodePlane::connect(&left, &first, short).unwrap_err());
        let refused = NodePlane::connect(&right, &second, short).unwrap_err();
        assert!(matches!(refused, Error::Core(unisono_core::Error::Auth { .. })), "{refused}");
        let missing = thread.join().unwrap();
        assert!(
            matches!(&missing, Error::Missing { rank: 0, missing, .. } if missing == &[1, 2]),
            "{missing}"
        );
    }
}
