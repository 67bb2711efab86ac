//! One connection of the client: bytes with deadlines, and the replies' few shapes.
//!
//! A connection on which anything failed is thrown away by its user, because nobody can tell where in the stream of
//! replies it stands.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use unisono_sync::Deadline;

use super::wire::{Encoder, MAGIC, Opcode};
use crate::store::MAX_VALUE_BYTES;

/// What a value grows by while it arrives.
const CHUNK_BYTES: usize = 64 * 1024;

/// Why a call on a connection failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The reply did not come before the deadline.
    Late,
    /// The connection broke.
    Broken(io::Error),
    /// What came is not of the protocol.
    Protocol(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Self::Late,
            _ => Self::Broken(error),
        }
    }
}

/// A connection that has introduced itself to a server.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    nonce: u32,
}

impl Connection {
    /// Connects to `address` and introduces itself.
    pub(super) fn open(address: SocketAddr, deadline: Deadline) -> Result<Self, Failure> {
        let stream = match deadline.remaining() {
            None => TcpStream::connect(address)?,
            Some(left) if left.is_zero() => return Err(Failure::Late),
            Some(left) => TcpStream::connect_timeout(&address, left)?,
        };
        stream.set_nodelay(true)?;
        // A wait without a deadline must still notice that the server's host is gone.
        let keepalive =
            TcpKeepalive::new().with_time(Duration::from_secs(10)).with_interval(Duration::from_secs(3));
        SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
        let nonce = getrandom::u32().map_err(|error| Failure::Broken(io::Error::other(error)))?;
        let mut connection = Self { stream, nonce };
        connection.send(Encoder::new(Opcode::Validate).u32(MAGIC), deadline)?;
        connection.confirm(Encoder::default(), deadline)?;
        Ok(connection)
    }

    /// A connection over this stream, which has introduced itself.
    #[cfg(feature = "fuzzing")]
    pub(super) const fn of(stream: TcpStream) -> Self {
        Self { stream, nonce: 0 }
    }

    /// Sends requests.
    pub(super) fn send(&mut self, requests: Encoder, deadline: Deadline) -> Result<(), Failure> {
        let mut rest = requests.bytes();
        while !rest.is_empty() {
            self.stream.set_write_timeout(timeout(deadline)?)?;
            match self.stream.write(rest) {
                Ok(0) => return Err(Failure::Broken(ErrorKind::WriteZero.into())),
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Sends requests that have no reply and learns by a ping behind them that the server has served them.
    pub(super) fn confirm(&mut self, requests: Encoder, deadline: Deadline) -> Result<(), Failure> {
        self.nonce = self.nonce.wrapping_add(1);
        self.send(requests.opcode(Opcode::Ping).u32(self.nonce), deadline)?;
        let echo = u32::from_le_bytes(self.receive_array(deadline)?);
        if echo != self.nonce {
            let expected = self.nonce;
            return Err(Failure::Protocol(format!("ping {expected:#x} was answered by {echo:#x}")));
        }
        Ok(())
    }

    pub(super) fn receive_u8(&mut self, deadline: Deadline) -> Result<u8, Failure> {
        Ok(u8::from_le_bytes(self.receive_array(deadline)?))
    }

    pub(super) fn receive_i64(&mut self, deadline: Deadline) -> Result<i64, Failure> {
        Ok(i64::from_le_bytes(self.receive_array(deadline)?))
    }

    /// A value: its length, which is checked, and its bytes.
    pub(super) fn receive_value(&mut self, deadline: Deadline) -> Result<Vec<u8>, Failure> {
        let announced = u64::from_le_bytes(self.receive_array(deadline)?);
        let length = usize::try_from(announced).ok().filter(|length| *length <= MAX_VALUE_BYTES);
        let Some(length) = length else {
            return Err(Failure::Protocol(format!(
                "a value of {announced} bytes was announced, at most {MAX_VALUE_BYTES} are allowed"
            )));
        };
        let mut value = Vec::new();
        while value.len() < length {
            let begin = value.len();
            value.resize(length.min(begin + CHUNK_BYTES), 0);
            self.receive(&mut value[begin..], deadline)?;
        }
        Ok(value)
    }

    fn receive_array<const N: usize>(&mut self, deadline: Deadline) -> Result<[u8; N], Failure> {
        let mut array = [0; N];
        self.receive(&mut array, deadline)?;
        Ok(array)
    }

    fn receive(&mut self, mut buffer: &mut [u8], deadline: Deadline) -> Result<(), Failure> {
        while !buffer.is_empty() {
            self.stream.set_read_timeout(timeout(deadline)?)?;
            match self.stream.read(buffer) {
                Ok(0) => return Err(Failure::Broken(ErrorKind::UnexpectedEof.into())),
                Ok(count) => buffer = &mut buffer[count..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// The socket's timeout for one step before `deadline`.
fn timeout(deadline: Deadline) -> Result<Option<Duration>, Failure> {
    match deadline.remaining() {
        Some(left) if left.is_zero() => Err(Failure::Late),
        left => Ok(left),
    }
}
