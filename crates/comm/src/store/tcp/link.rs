//! The client's side of one connection: blocking, with a deadline for every read and write.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, recv};
use socket2::SockRef;
use unisono_core::auth::{Handshake, Opened, Role, Session};
use unisono_core::{Error as CoreError, Secret};
use unisono_sync::Deadline;

use super::progress::keepalive;
use super::protocol::{CONTEXT, MAX_BODY_BYTES, REPLY, REQUEST, name};
use super::server::random;
use crate::error::{Error, Result};

/// One attempt to connect may take this long; then the next one starts.
const ATTEMPT: Duration = Duration::from_secs(3);
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);
const LEAST_READ: usize = 4 * 1024;
const MOST_READ: usize = 256 * 1024;

/// An authenticated connection to a server.
#[derive(Debug)]
pub(super) struct Link {
    stream: TcpStream,
    session: Session,
    input: Vec<u8>,
    next_number: u64,
}

/// Whether a server that refuses connections is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// It may come up later.
    UntilDeadline,
    /// It was there before.
    None,
}

/// Why something on a connection failed; whatever it was, the connection is of no use any more, except after `Late`.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("no answer came in time")]
    Late,
    #[error(transparent)]
    Io(io::Error),
    #[error(transparent)]
    Core(#[from] CoreError),
    #[error("a frame of kind {0} is no reply")]
    Kind(u16),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == ErrorKind::TimedOut { Self::Late } else { Self::Io(error) }
    }
}

impl Link {
    /// Connects and proves the secret, again and again until the deadline; a peer with another secret or version ends it
    /// at once.
    pub(super) fn connect(
        address: SocketAddr,
        secret: &Secret,
        deadline: Deadline,
        patience: Patience,
    ) -> Result<Self> {
        let begin = Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            let failure = match Self::attempt(address, secret, deadline.min(Deadline::after(ATTEMPT))) {
                Ok(link) => return Ok(link),
                Err(Failure::Core(error)) => return Err(error.into()),
                Err(failure) => failure,
            };
            let refused =
                matches!(&failure, Failure::Io(error) if error.kind() == ErrorKind::ConnectionRefused);
            if deadline.is_over() || (refused && patience == Patience::None) {
                let message = format!("{failure} (tried for {:?})", begin.elapsed());
                return Err(Error::StoreIo { store: name(address), action: "connect", message });
            }
            thread::sleep(deadline.remaining_up_to(pause));
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }

    fn attempt(address: SocketAddr, secret: &Secret, deadline: Deadline) -> Result<Self, Failure> {
        let mut stream = TcpStream::connect_timeout(&address, left(deadline)?.unwrap_or(ATTEMPT))?;
        if stream.local_addr()? == address {
            // On loopback a free port can be given to the very socket that wants to connect to it.
            return Err(Failure::Io(ErrorKind::ConnectionRefused.into()));
        }
        stream.set_nodelay(true)?;
        SockRef::from(&stream).set_tcp_keepalive(&keepalive())?;
        let nonce = random().map_err(|message| Failure::Io(io::Error::other(message)))?;
        let mut handshake = Handshake::new(Role::Initiator, secret, CONTEXT, nonce);
        loop {
            if let Some(message) = handshake.poll_output() {
                write_all(&mut stream, &message, deadline)?;
            }
            if let Some(mut session) = handshake.finish() {
                session.opener.set_cap(MAX_BODY_BYTES);
                return Ok(Self { stream, session, input: Vec::new(), next_number: 0 });
            }
            let mut message = vec![0; handshake.wants()];
            read_exact(&mut stream, &mut message, deadline)?;
            if let Err(error) = handshake.on_input(&message) {
                if let Some(refusal) = handshake.poll_output() {
                    // So that the server learns it too; if it cannot be told, our error is the same.
                    let _ = write_all(&mut stream, &refusal, deadline);
                }
                return Err(error.into());
            }
        }
    }

    /// A number for the next request.
    pub(super) fn next_number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    /// Whether it looks usable: not closed, and nothing unexpected came.
    pub(super) fn is_alive(&self) -> bool {
        let mut byte = [0u8; 1];
        let peeked = recv(&self.stream, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT);
        self.input.is_empty() && matches!(peeked, Err(rustix::io::Errno::AGAIN))
    }

    /// Sends one request. After an error the server has not executed it, because it did not get all of it.
    pub(super) fn send(&mut self, body: &[u8], deadline: Deadline) -> Result<(), Failure> {
        let mut frame = Vec::new();
        self.session.sealer.seal(REQUEST, body, &mut frame)?;
        write_all(&mut self.stream, &frame, deadline)
    }

    /// The next reply: a buffer and where in it the body is. After [`Failure::Late`] it may be called again.
    pub(super) fn receive(&mut self, deadline: Deadline) -> Result<(Vec<u8>, Range<usize>), Failure> {
        loop {
            match self.session.opener.open(&self.input)? {
                Opened::Frame { kind: REPLY, body, consumed } => {
                    let rest = self.input.split_off(consumed);
                    return Ok((std::mem::replace(&mut self.input, rest), body));
                }
                Opened::Frame { kind, .. } => return Err(Failure::Kind(kind)),
                Opened::NeedMore(needed) => {
                    let have = self.input.len();
                    self.input.resize(have + (needed - have).clamp(LEAST_READ, MOST_READ), 0);
                    let got = read_some(&mut self.stream, &mut self.input[have..], deadline);
                    self.input.truncate(have + got.as_ref().map_or(0, |got| *got));
                    got?;
                }
            }
        }
    }
}

/// What is left for one blocking call; `None` without a deadline. Never zero, which the system takes for "no limit".
fn left(deadline: Deadline) -> io::Result<Option<Duration>> {
    match deadline.remaining() {
        Some(Duration::ZERO) => Err(ErrorKind::TimedOut.into()),
        left => Ok(left),
    }
}

fn read_some(stream: &mut TcpStream, bytes: &mut [u8], deadline: Deadline) -> Result<usize, Failure> {
    loop {
        stream.set_read_timeout(left(deadline)?)?;
        match stream.read(bytes) {
            Ok(0) => return Err(Failure::Io(ErrorKind::UnexpectedEof.into())),
            Ok(count) => return Ok(count),
            Err(error) if is_transient(&error) => {}
            Err(error) => return Err(Failure::Io(error)),
        }
    }
}

fn read_exact(stream: &mut TcpStream, bytes: &mut [u8], deadline: Deadline) -> Result<(), Failure> {
    let mut have = 0;
    while have < bytes.len() {
        have += read_some(stream, &mut bytes[have..], deadline)?;
    }
    Ok(())
}

fn write_all(stream: &mut TcpStream, mut bytes: &[u8], deadline: Deadline) -> Result<(), Failure> {
    while !bytes.is_empty() {
        stream.set_write_timeout(left(deadline)?)?;
        match stream.write(bytes) {
            Ok(0) => return Err(Failure::Io(ErrorKind::WriteZero.into())),
            Ok(count) => bytes = &bytes[count..],
            Err(error) if is_transient(&error) => {}
            Err(error) => return Err(Failure::Io(error)),
        }
    }
    Ok(())
}

/// A signal, or the time-out of the socket: the deadline decides.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::TimedOut)
}
