//! A server that torch's `TCPStore` clients, and ours, can connect to.
//!
//! One thread serves all connections with `mio`. Each has a receive and a send buffer that grow with the bytes that
//! really came; a client that does not read its replies is not read from either, and one that does not introduce
//! itself within ten seconds is closed. A request costs a hash look-up and no thread switch.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token, Waker};
use socket2::{Domain, Protocol, Socket, Type};
use tracing::{debug, error, warn};

use super::state::State;
use super::wire::{Decoded, Request, WAIT_OVER, decode};
use unisono_node::Process;

use crate::error::{Error, Result};

const LISTENER: Token = Token(0);
const STOP: Token = Token(1);
const FIRST_CONNECTION: usize = 2;
const BACKLOG: i32 = 4096;
const READ_BYTES: usize = 64 * 1024;
/// With more unsent than this, no further request of the connection is served.
const UNSENT_BYTES: usize = 1024 * 1024;
/// After so many requests in a row the other connections have their turn.
const REQUESTS_IN_A_ROW: usize = 256;
/// How long a connection may take to introduce itself.
const INTRODUCTION: Duration = Duration::from_secs(10);
/// How long to wait before `accept` is tried again after it failed, for example for want of descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(50);

/// A running server of torch's store protocol; dropping it stops the server and closes all connections.
///
/// The protocol has no authentication: whoever reaches the port can read and write everything. Limits: keys of
/// 8 KiB, values of 8 MiB, 131,072 keys; a client that goes beyond is disconnected, as the protocol has no error
/// replies.
#[derive(Debug)]
pub struct TorchStoreServer {
    address: SocketAddr,
    stop: Waker,
    thread: Option<JoinHandle<()>>,
    process: Process,
}

impl TorchStoreServer {
    /// Listens on a free port of 127.0.0.1.
    ///
    /// # Errors
    ///
    /// [`Error::StoreIo`] when the system refuses the socket or the thread.
    pub fn on_loopback() -> Result<Self> {
        Self::bind((Ipv4Addr::LOCALHOST, 0).into())
    }

    /// Listens on `address`; port 0 takes a free one. Use an address other than loopback only on a network where
    /// everybody is trusted.
    ///
    /// # Errors
    ///
    /// [`Error::StoreIo`] when the system refuses the address, the socket or the thread.
    pub fn bind(address: SocketAddr) -> Result<Self> {
        let failed = |error: io::Error| Error::StoreIo {
            store: format!("torch://{address}"),
            action: "listen",
            message: error.to_string(),
        };
        let (mut service, stop, address) = Service::bind(address).map_err(failed)?;
        let thread = std::thread::Builder::new()
            .name("unisono-torch-store".to_owned())
            .spawn(move || service.run())
            .map_err(failed)?;
        Ok(Self { address, stop, thread: Some(thread), process: Process::this() })
    }

    /// Where it listens, with the port that was chosen.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for TorchStoreServer {
    fn drop(&mut self) {
        // In a forked child the thread does not exist, and waking it would stop the parent's.
        if !self.process.is_this() {
            std::mem::forget(self.thread.take());
            return;
        }
        let woken = self.stop.wake();
        if let (Ok(()), Some(thread)) = (woken, self.thread.take()) {
            // A panic of the thread was reported by the panic hook already.
            _ = thread.join();
        }
    }
}

/// What the thread owns.
struct Service {
    name: String,
    poll: Poll,
    listener: TcpListener,
    state: State,
    connections: HashMap<usize, Connection>,
    next_connection: usize,
    /// Connections that have work left which no event will announce.
    unfinished: VecDeque<usize>,
    /// Until when a connection must have introduced itself, oldest first.
    introductions: VecDeque<(Instant, usize)>,
    accept_again: Option<Instant>,
}

impl Service {
    fn bind(address: SocketAddr) -> io::Result<(Self, Waker, SocketAddr)> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        let mut listener = TcpListener::from_std(socket.into());
        let address = listener.local_addr()?;
        let poll = Poll::new()?;
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
        let stop = Waker::new(poll.registry(), STOP)?;
        let name = format!("torch://{address}");
        let service = Self {
            state: State::new(name.clone()),
            name,
            poll,
            listener,
            connections: HashMap::new(),
            next_connection: FIRST_CONNECTION,
            unfinished: VecDeque::new(),
            introductions: VecDeque::new(),
            accept_again: None,
        };
        Ok((service, stop, address))
    }

    fn run(&mut self) {
        let mut events = Events::with_capacity(1024);
        loop {
            match self.poll.poll(&mut events, self.sleep()) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => {
                    error!("{}: the server ends, its poll failed: {error}", self.name);
                    return;
                }
            }
            for event in &events {
                match event.token() {
                    STOP => return,
                    LISTENER => self.accept(),
                    Token(id) => self.unfinished.push_back(id),
                }
            }
            if self.accept_again.is_some_and(|at| at <= Instant::now()) {
                self.accept();
            }
            self.close_the_silent();
            for _ in 0..self.unfinished.len() {
                if let Some(id) = self.unfinished.pop_front() {
                    self.serve(id);
                }
            }
        }
    }

    /// How long nothing needs to be done without an event.
    fn sleep(&self) -> Option<Duration> {
        if !self.unfinished.is_empty() {
            return Some(Duration::ZERO);
        }
        let introduction = self.introductions.front().map(|(until, _)| *until);
        let next = introduction.into_iter().chain(self.accept_again).min();
        // The poll counts milliseconds and rounds up.
        next.map(|at| at.saturating_duration_since(Instant::now()))
    }

    fn accept(&mut self) {
        self.accept_again = None;
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    if let Err(error) = self.register(stream) {
                        warn!("{}: a connection was dropped: {error}", self.name);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error)
                    if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                Err(error) => {
                    warn!("{}: accept failed, trying again: {error}", self.name);
                    self.accept_again = Some(Instant::now() + ACCEPT_AGAIN);
                    return;
                }
            }
        }
    }

    fn register(&mut self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let id = self.next_connection;
        self.poll.registry().register(&mut stream, Token(id), Interest::READABLE | Interest::WRITABLE)?;
        self.next_connection += 1;
        self.introductions.push_back((Instant::now() + INTRODUCTION, id));
        self.connections.insert(id, Connection::new(stream));
        self.unfinished.push_back(id);
        Ok(())
    }

    fn close_the_silent(&mut self) {
        let now = Instant::now();
        while let Some((_, id)) = self.introductions.pop_front_if(|(until, _)| *until <= now) {
            if self.connections.get(&id).is_some_and(|connection| !connection.introduced) {
                self.close(id, "it did not introduce itself in time");
            }
        }
    }

    /// Does for one connection what can be done now, and for those that its requests released.
    fn serve(&mut self, id: usize) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let progress = connection.progress(id, &mut self.state);
        match progress {
            Ok(Progress::Blocked) => {}
            Ok(Progress::More) => self.unfinished.push_back(id),
            Ok(Progress::Ended) => self.close(id, "it ended"),
            Err(message) => {
                warn!("{}: closing a connection: {message}", self.name);
                self.close(id, "it was closed");
            }
        }
        for released in self.state.take_released() {
            if let Some(connection) = self.connections.get_mut(&released) {
                connection.output.push(WAIT_OVER);
                self.unfinished.push_back(released);
            }
        }
    }

    fn close(&mut self, id: usize, reason: &str) {
        debug!("{}: connection {id}: {reason}", self.name);
        self.state.forget(id);
        if let Some(mut connection) = self.connections.remove(&id) {
            // Closing the socket takes it out of the poll too.
            _ = self.poll.registry().deregister(&mut connection.stream);
        }
    }
}

/// How far a connection came.
enum Progress {
    /// An event will announce what comes next.
    Blocked,
    /// It could go on; others first.
    More,
    /// The other end closed it.
    Ended,
}

/// One client.
struct Connection {
    stream: TcpStream,
    input: Vec<u8>,
    /// How many bytes of `input` were served.
    served: usize,
    /// How many unserved bytes the next request has at least.
    at_least: usize,
    output: Vec<u8>,
    /// How many bytes of `output` were sent.
    sent: usize,
    introduced: bool,
}

impl Connection {
    fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            input: Vec::new(),
            served: 0,
            at_least: 1,
            output: Vec::new(),
            sent: 0,
            introduced: false,
        }
    }

    /// Sends, serves and reads until one of them must wait. The error says why the connection must be closed.
    fn progress(&mut self, id: usize, state: &mut State) -> Result<Progress, String> {
        for _ in 0..REQUESTS_IN_A_ROW {
            let broken = |error: io::Error| format!("its socket failed: {error}");
            self.flush().map_err(broken)?;
            if self.output.len() - self.sent > UNSENT_BYTES {
                return Ok(Progress::Blocked);
            }
            if self.serve_one(id, state)? {
                continue;
            }
            match self.fill() {
                Ok(0) => return Ok(Progress::Ended),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Progress::Blocked),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(Progress::Ended),
                Err(error) => return Err(broken(error)),
            }
        }
        Ok(Progress::More)
    }

    /// Serves the next request if it is all there.
    fn serve_one(&mut self, id: usize, state: &mut State) -> Result<bool, String> {
        let unserved = &self.input[self.served..];
        if unserved.len() < self.at_least {
            return Ok(false);
        }
        match decode(unserved)? {
            Decoded::Partial { at_least } => {
                self.at_least = at_least;
                Ok(false)
            }
            Decoded::Whole(request, length) => {
                let introduces = matches!(request, Request::Validate { .. });
                if !introduces && !self.introduced {
                    return Err(format!("it began with opcode {}, expected VALIDATE", unserved[0]));
                }
                state.serve(id, request, &mut self.output)?;
                self.introduced = true;
                self.served += length;
                self.at_least = 1;
                Ok(true)
            }
        }
    }

    /// Reads once, behind what is not yet served.
    fn fill(&mut self) -> io::Result<usize> {
        self.input.drain(..self.served);
        self.served = 0;
        if self.input.is_empty() && self.input.capacity() > READ_BYTES {
            self.input = Vec::new();
        }
        let mut chunk = [0; READ_BYTES];
        let count = self.stream.read(&mut chunk)?;
        self.input.extend_from_slice(&chunk[..count]);
        Ok(count)
    }

    /// Sends what the socket takes.
    fn flush(&mut self) -> io::Result<()> {
        while self.sent < self.output.len() {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.sent = 0;
        if self.output.capacity() > UNSENT_BYTES {
            self.output = Vec::new();
        } else {
            self.output.clear();
        }
        Ok(())
    }
}
