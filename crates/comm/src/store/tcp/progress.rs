//! The thread of the TCP store server: accepts, reads, answers, and drops those who take too long.
//!
//! It sleeps in one epoll. Connections are named by numbers that are never used twice, so an event for one that is gone
//! is harmless. Every limit has an answer: too many unproved connections drop the oldest, a client that does not
//! read is dropped, and replies of waiting requests are built only while the output budget lasts.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token, Waker};
use socket2::{SockRef, TcpKeepalive};

use super::connection::{Broken, Connection, Filled};
use super::protocol::name;
use super::server::{StoreServerConfig, random};
use super::service::Service;

const LISTENER: usize = 0;
const WAKER: usize = 1;
const FIRST_CONNECTION: usize = 2;
const ACCEPTS_PER_TURN: usize = 256;
/// How long to wait before accepting again when the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How often clients with pending output are looked at.
const STALL_TICK: Duration = Duration::from_millis(100);

/// Everything the thread owns.
pub(super) struct Progress {
    config: StoreServerConfig,
    poll: Poll,
    listener: TcpListener,
    service: Service,
    connections: HashMap<usize, Connection>,
    next: usize,
    /// Connections that have not proved themselves, oldest first, and when they came.
    unproved: BTreeMap<usize, Instant>,
    /// Connections with pending output, and when they last took some of it.
    writing: BTreeMap<usize, Instant>,
    /// Connections that had more to read than fits into a turn.
    again: BTreeSet<usize>,
    accept_at: Option<Instant>,
    pending_bytes: usize,
    refused: u64,
    scratch: Vec<u8>,
}

impl Progress {
    /// Binds and listens; the waker stops [`run`](Self::run).
    pub(super) fn listen(config: StoreServerConfig) -> io::Result<(Self, SocketAddr, Waker)> {
        let poll = Poll::new()?;
        let mut listener = TcpListener::bind(config.address)?;
        let address = listener.local_addr()?;
        poll.registry().register(&mut listener, Token(LISTENER), Interest::READABLE)?;
        let waker = Waker::new(poll.registry(), Token(WAKER))?;
        let service = Service::new(name(address), config.limits, config.max_waiting_bytes);
        let progress = Self {
            config,
            poll,
            listener,
            service,
            connections: HashMap::new(),
            next: FIRST_CONNECTION,
            unproved: BTreeMap::new(),
            writing: BTreeMap::new(),
            again: BTreeSet::new(),
            accept_at: None,
            pending_bytes: 0,
            refused: 0,
            scratch: vec![0; 64 * 1024],
        };
        Ok((progress, address, waker))
    }

    /// Serves until the waker is used.
    pub(super) fn run(mut self) {
        let mut events = Events::with_capacity(1024);
        loop {
            let timeout = self.timeout(Instant::now());
            match self.poll.poll(&mut events, timeout) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "the store server cannot wait for its connections and stops");
                    return;
                }
            }
            for event in &events {
                match event.token().0 {
                    WAKER => return,
                    LISTENER => self.accept_at = Some(Instant::now()),
                    token => {
                        if event.is_writable() {
                            self.flush(token);
                        }
                        if event.is_readable() || event.is_read_closed() || event.is_error() {
                            self.again.insert(token);
                        }
                    }
                }
            }
            for token in std::mem::take(&mut self.again) {
                self.serve(token);
            }
            self.answer();
            let now = Instant::now();
            if self.accept_at.is_some_and(|at| at <= now) {
                self.accept(now);
            }
            self.drop_late(now);
        }
    }

    /// How long the next poll may sleep.
    fn timeout(&self, now: Instant) -> Option<Duration> {
        if !self.again.is_empty() {
            return Some(Duration::ZERO);
        }
        let proof = self.unproved.first_key_value().map(|(_, came)| *came + self.config.handshake_timeout);
        let stall = (!self.writing.is_empty()).then(|| now + STALL_TICK);
        let next = [proof, stall, self.accept_at].into_iter().flatten().min()?;
        Some(next.saturating_duration_since(now))
    }

    /// Accepts what is there, up to a turn's worth.
    fn accept(&mut self, now: Instant) {
        self.accept_at = None;
        for _ in 0..ACCEPTS_PER_TURN {
            match self.listener.accept() {
                Ok((stream, peer)) => {
                    if let Err(error) = self.welcome(stream, now) {
                        tracing::debug!(%error, %peer, "a connection to the store could not be set up");
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error)
                    if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                Err(error) => {
                    // Most likely no file descriptor is left: whoever has proved nothing goes first.
                    tracing::warn!(%error, connections = self.connections.len(), "the store cannot accept");
                    if let Some((&oldest, _)) = self.unproved.first_key_value() {
                        self.close(oldest, None);
                    }
                    self.accept_at = Some(now + ACCEPT_PAUSE);
                    return;
                }
            }
        }
        self.accept_at = Some(now);
    }

    fn welcome(&mut self, mut stream: TcpStream, now: Instant) -> io::Result<()> {
        stream.set_nodelay(true)?;
        SockRef::from(&stream).set_tcp_keepalive(&keepalive())?;
        let nonce = random().map_err(io::Error::other)?;
        let token = self.next;
        self.next += 1;
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(&mut stream, Token(token), interest)?;
        self.connections.insert(token, Connection::new(stream, &self.config.secret, nonce));
        self.unproved.insert(token, now);
        while self.unproved.len() > self.config.max_unproved {
            let Some((&oldest, _)) = self.unproved.first_key_value() else { break };
            self.close(oldest, None);
        }
        Ok(())
    }

    /// Reads from a connection and executes what it asks.
    fn serve(&mut self, token: usize) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let before = connection.pending();
        let filled = connection.fill(&mut self.scratch);
        let (after, is_open, input) = (connection.pending(), connection.is_open(), connection.take_input());
        self.book(token, before, after);
        let filled = match filled {
            Ok(filled) => filled,
            Err(broken) => return self.close(token, Some(broken)),
        };
        if is_open {
            self.unproved.remove(&token);
            match self.execute(token, &input) {
                Ok(used) => {
                    if let Some(connection) = self.connections.get_mut(&token) {
                        connection.put_input(input, used);
                    }
                }
                Err(broken) => return self.close(token, Some(broken)),
            }
        }
        match filled {
            Filled::Drained => {}
            Filled::More => drop(self.again.insert(token)),
            Filled::Closed => self.close(token, None),
        }
    }

    /// Executes all whole requests in `input`; gives the number of bytes they took.
    fn execute(&mut self, token: usize, input: &[u8]) -> Result<usize, Broken> {
        let mut used = 0;
        while let Some(connection) = self.connections.get_mut(&token) {
            let rest = &input[used..];
            let Some((body, consumed)) = connection.open(rest)? else { break };
            let reply = self.service.request(token, &rest[body]).map_err(|error| match error {
                crate::Error::Core(error) => Broken::Refused(error),
                other => Broken::Io(io::Error::other(other)),
            })?;
            if let Some(reply) = reply {
                self.send(token, &reply);
            }
            self.answer();
            used += consumed;
        }
        Ok(used)
    }

    /// Answers requests that waited, as long as the budget for output lasts.
    fn answer(&mut self) {
        while self.pending_bytes < self.config.output_budget {
            let Some((token, reply)) = self.service.next_ready() else { return };
            self.send(token, &reply);
        }
    }

    fn send(&mut self, token: usize, body: &[u8]) {
        self.with_output(token, |connection| connection.send(body));
    }

    fn flush(&mut self, token: usize) {
        self.with_output(token, |connection| Ok(connection.flush()?));
    }

    /// Does something that changes what a connection has to send, and keeps the books.
    fn with_output(&mut self, token: usize, act: impl FnOnce(&mut Connection) -> Result<(), Broken>) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let before = connection.pending();
        let result = act(connection);
        let after = connection.pending();
        self.book(token, before, after);
        if let Err(broken) = result {
            return self.close(token, Some(broken));
        }
        if after > self.config.max_pending_bytes {
            self.close(token, Some(slow("it asks for more than it reads")));
        }
    }

    /// Notes that the output of a connection went from `before` to `after` bytes.
    fn book(&mut self, token: usize, before: usize, after: usize) {
        self.pending_bytes = self.pending_bytes - before + after;
        if after == 0 {
            self.writing.remove(&token);
        } else if after < before || before == 0 {
            self.writing.insert(token, Instant::now());
        }
    }

    /// Drops who has not proved itself, and who has not read, in time.
    fn drop_late(&mut self, now: Instant) {
        while let Some((&token, &came)) = self.unproved.first_key_value() {
            if now < came + self.config.handshake_timeout {
                break;
            }
            self.close(token, Some(slow("it did not prove in time that it knows the secret")));
        }
        let late = |since: &Instant| now >= *since + self.config.stall_timeout;
        let stalled: Vec<usize> =
            self.writing.iter().filter(|(_, since)| late(since)).map(|(token, _)| *token).collect();
        for token in stalled {
            self.close(token, Some(slow("it does not read its replies")));
        }
    }

    fn close(&mut self, token: usize, why: Option<Broken>) {
        let Some(mut connection) = self.connections.remove(&token) else { return };
        self.pending_bytes -= connection.pending();
        self.unproved.remove(&token);
        self.writing.remove(&token);
        self.again.remove(&token);
        self.service.forget(token);
        let Some(why) = why else { return };
        let peer = connection.stream().peer_addr().ok();
        tracing::debug!(?peer, %why, "a connection to the store was closed");
        if matches!(why, Broken::Refused(_)) {
            self.refused += 1;
            // A port scan must not fill the log: the 1st, 2nd, 4th, 8th … are told.
            if self.refused.is_power_of_two() {
                tracing::warn!(?peer, %why, refused = self.refused, "the store refused a connection");
            }
        }
    }
}

fn slow(why: &'static str) -> Broken {
    Broken::Io(io::Error::new(ErrorKind::TimedOut, why))
}

/// Finds out within a minute that the host at the other end is gone.
pub(super) fn keepalive() -> TcpKeepalive {
    TcpKeepalive::new().with_time(Duration::from_secs(30)).with_interval(Duration::from_secs(10))
}
