//! The thread of the node plane: reads what comes, and watches that everybody lives.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use unisono_core::auth::{Opened, Opener};

use super::{FAREWELL, MESSAGE, Message, Shared, Watcher};
use crate::error::{Lost, Result};
use crate::identity;
use crate::mailbox::{MAX_UNREAD, Tag};
use crate::socket::{self, MAX_MESSAGE_BYTES, Received};

/// A peer's heartbeat as last seen.
struct Heart {
    count: u64,
    since: Instant,
}

pub(super) struct PlaneThread {
    shared: Arc<Shared>,
    openers: Vec<Opener>,
    hearts: HashMap<usize, Heart>,
    last_look: Option<Instant>,
    tick: Duration,
}

impl PlaneThread {
    /// `openers[i]` belongs to peer i of `shared`; looks at all hearts every `tick`.
    pub(super) fn new(shared: Arc<Shared>, openers: Vec<Opener>, tick: Duration) -> Self {
        Self { shared, openers, hearts: HashMap::new(), last_look: None, tick }
    }

    pub(super) fn run(mut self) {
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
        let is_alive = |at: &usize| shared.mailbox.lost(shared.peers[*at].rank).is_none();
        let alive: Vec<usize> = (0..shared.peers.len()).filter(is_alive).collect();
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
            MESSAGE => {
                let Some((tag, body)) = body.split_first_chunk() else {
                    return Err(malformed(format!("a message of {} bytes", body.len())).into());
                };
                let message = Message { body: body.to_vec(), fds };
                if !self.shared.mailbox.put(peer.rank, Tag::from_bytes(tag), message) {
                    return Err(malformed(format!("{MAX_UNREAD} messages that nobody asked for")).into());
                }
                Ok(())
            }
            kind => Err(malformed(format!("kind {kind}")).into()),
        }
    }

    /// Beats, and suspects peers whose heartbeat stands still. A process that is stopped is suspected after the
    /// liveness time; one that is only starved of processor time gets three times as long.
    fn look_at_hearts(&mut self, alive: &[usize]) {
        let shared = self.shared.clone();
        let Some(liveness) = shared.liveness else { return };
        let watchers = shared.watchers();
        watchers.iter().for_each(|watcher| watcher.events.beat());
        let now = Instant::now();
        // If we ourselves were not running (the machine slept, or we were stopped) what we remember is worth nothing.
        let slept = self.last_look.is_none_or(|last| now - last > (liveness / 3).max(self.tick * 2));
        self.last_look = Some(now);
        for peer in alive.iter().map(|at| &shared.peers[*at]) {
            let heart_in = |watcher: &Arc<Watcher>| {
                watcher.number_of(peer.rank).map(|rank| watcher.events.heartbeat_of(rank))
            };
            // It lives if it beats in any memory that we share. The sum also moves when a watch begins or ends; that
            // starts the clock anew.
            let hearts = watchers.iter().filter_map(heart_in);
            let Some(count) = hearts.reduce(u64::wrapping_add) else {
                self.hearts.remove(&peer.rank);
                continue;
            };
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
            match peer.seen_pid.and_then(identity::is_stopped) {
                Some(true) => shared.lose(peer, Lost::Stopped { silent_ms }),
                _ if silent >= liveness * 3 => shared.lose(peer, Lost::Silent { silent_ms }),
                _ => {}
            }
        }
    }
}
