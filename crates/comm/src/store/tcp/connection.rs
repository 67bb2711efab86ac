//! The server's side of one connection: what was read and not understood yet, what is to be sent.
//!
//! Before its peer has proved itself a connection holds one handshake message of at most 72 bytes. Afterwards input
//! grows with what arrives, up to one frame; output with what the server answers.

use std::io::{self, ErrorKind, Read, Write};

use mio::net::TcpStream;
use unisono_core::auth::{Handshake, MAX_HANDSHAKE_BYTES, Opened, Role, Session};
use unisono_core::{Error, Secret};

use super::protocol::{CONTEXT, MAX_BODY_BYTES, REPLY, REQUEST};

/// Read from one connection before the others get their turn.
const BYTES_PER_TURN: usize = 1024 * 1024;
/// An empty buffer above this is given back.
const KEEP_BYTES: usize = 64 * 1024;

/// One accepted connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    phase: Phase,
    output: Vec<u8>,
    /// How much of `output` is sent.
    sent: usize,
}

#[derive(Debug)]
enum Phase {
    Proving(Box<Proving>),
    Open { session: Box<Session>, input: Vec<u8> },
}

#[derive(Debug)]
struct Proving {
    handshake: Handshake,
    bytes: [u8; MAX_HANDSHAKE_BYTES],
    have: usize,
}

/// What a connection costs besides itself until its peer has proved itself.
#[cfg(test)]
pub(super) const PROVING_BYTES: usize = size_of::<Proving>();

/// How reading ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filled {
    /// Nothing more is there now.
    Drained,
    /// There may be more; others should have their turn first.
    More,
    /// The peer has closed its side.
    Closed,
}

/// Why a connection must be closed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Refused(#[from] Error),
    #[error("a frame of kind {0} is no request")]
    Kind(u16),
}

impl Connection {
    /// Starts the handshake as responder with a fresh nonce.
    pub(super) fn new(stream: TcpStream, secret: &Secret, nonce: [u8; 32]) -> Self {
        let handshake = Handshake::new(Role::Responder, secret, CONTEXT, nonce);
        let proving = Proving { handshake, bytes: [0; MAX_HANDSHAKE_BYTES], have: 0 };
        Self { stream, phase: Phase::Proving(Box::new(proving)), output: Vec::new(), sent: 0 }
    }

    pub(super) fn stream(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// Whether the peer has proved that it knows the secret.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Open { .. })
    }

    /// Reads what is there, bounded; drives the handshake.
    pub(super) fn fill(&mut self, scratch: &mut [u8]) -> Result<Filled, Broken> {
        let mut total = 0;
        while total < BYTES_PER_TURN {
            let room = match &mut self.phase {
                Phase::Proving(proving) => {
                    let wants = proving.handshake.wants();
                    &mut proving.bytes[proving.have..wants]
                }
                Phase::Open { .. } => &mut *scratch,
            };
            let got = match self.stream.read(room) {
                Ok(0) => return Ok(Filled::Closed),
                Ok(got) => got,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Filled::Drained),
                Err(error) => return Err(error.into()),
            };
            total += got;
            match &mut self.phase {
                Phase::Open { input, .. } => input.extend_from_slice(&scratch[..got]),
                Phase::Proving(proving) => {
                    proving.have += got;
                    self.prove()?;
                }
            }
        }
        Ok(Filled::More)
    }

    fn prove(&mut self) -> Result<(), Broken> {
        let Phase::Proving(proving) = &mut self.phase else { return Ok(()) };
        if proving.have < proving.handshake.wants() {
            return Ok(());
        }
        let result = proving.handshake.on_input(&proving.bytes[..proving.have]);
        proving.have = 0;
        if let Some(message) = proving.handshake.poll_output() {
            self.output.extend_from_slice(&message);
        }
        if let Some(mut session) = proving.handshake.finish() {
            session.opener.set_cap(MAX_BODY_BYTES);
            self.phase = Phase::Open { session: Box::new(session), input: Vec::new() };
        }
        // Whatever there is to say, a refusal too, goes out before the connection is closed.
        self.flush()?;
        Ok(result?)
    }

    /// Takes what was read, to look at it with [`open`](Self::open).
    pub(super) fn take_input(&mut self) -> Vec<u8> {
        match &mut self.phase {
            Phase::Open { input, .. } => std::mem::take(input),
            Phase::Proving(_) => Vec::new(),
        }
    }

    /// Gives back what is left after the first `used` bytes.
    pub(super) fn put_input(&mut self, mut left: Vec<u8>, used: usize) {
        if let Phase::Open { input, .. } = &mut self.phase {
            left.drain(..used);
            if !left.is_empty() || left.capacity() <= KEEP_BYTES {
                *input = left;
            }
        }
    }

    /// Looks for the next request at the start of `bytes`: the range of its body and where the next one starts.
    pub(super) fn open(&mut self, bytes: &[u8]) -> Result<Option<(std::ops::Range<usize>, usize)>, Broken> {
        let Phase::Open { session, .. } = &mut self.phase else { return Ok(None) };
        match session.opener.open(bytes)? {
            Opened::NeedMore(_) => Ok(None),
            Opened::Frame { kind: REQUEST, body, consumed } => Ok(Some((body, consumed))),
            Opened::Frame { kind, .. } => Err(Broken::Kind(kind)),
        }
    }

    /// Seals a reply and sends what goes out now.
    pub(super) fn send(&mut self, body: &[u8]) -> Result<(), Broken> {
        if let Phase::Open { session, .. } = &mut self.phase {
            session.sealer.seal(REPLY, body, &mut self.output)?;
        }
        self.flush()?;
        Ok(())
    }

    /// Bytes that wait to be sent.
    pub(super) fn pending(&self) -> usize {
        self.output.len() - self.sent
    }

    /// Sends what goes out now.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while self.pending() > 0 {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.sent = 0;
        self.output.clear();
        if self.output.capacity() > KEEP_BYTES {
            self.output = Vec::new();
        }
        Ok(())
    }
}
