//! Frames with tags: what follows a handshake.
//!
//! Each direction has a key and a counter of its own. A tag is the first 16 bytes of HMAC-SHA256 over header (with the
//! counter) and body; the receiver counts too, so a frame is genuine only at its place.

use std::fmt;
use std::ops::Range;

use hmac::Mac;
use subtle::ConstantTimeEq;

use super::HmacSha256;
use crate::error::{Error, Result};
use crate::wire::{Header, MAX_BODY_BYTES};

/// Bytes of the tag behind each sealed frame.
pub const TAG_BYTES: usize = 16;

/// Both directions of an authenticated connection.
#[derive(Debug)]
pub struct Session {
    /// For what we send.
    pub sealer: Sealer,
    /// For what the peer sends.
    pub opener: Opener,
}

/// Makes tagged frames of one direction.
pub struct Sealer {
    key: HmacSha256,
    sequence: u64,
}

impl Sealer {
    pub(super) fn new(key: HmacSha256) -> Self {
        Self { key, sequence: 0 }
    }

    /// Appends one frame to `out`: header, `body`, tag. What is sealed must be sent, in this order, all of it.
    ///
    /// # Errors
    /// [`Error::TooLarge`] for a body above [`MAX_BODY_BYTES`]; then nothing was appended.
    pub fn seal(&mut self, kind: u16, body: &[u8], out: &mut Vec<u8>) -> Result<()> {
        let too_large =
            || Error::TooLarge { what: "frame body", got: body.len() as u64, cap: MAX_BODY_BYTES as u64 };
        if body.len() > MAX_BODY_BYTES {
            return Err(too_large());
        }
        let length = u32::try_from(body.len()).map_err(|_| too_large())?;
        let header = Header { kind, length, sequence: self.sequence }.to_bytes();
        self.sequence += 1;
        out.reserve(header.len() + body.len() + TAG_BYTES);
        out.extend_from_slice(&header);
        out.extend_from_slice(body);
        out.extend_from_slice(&tag(&self.key, &header, body));
        Ok(())
    }
}

/// Checks the frames of one direction.
pub struct Opener {
    key: HmacSha256,
    sequence: u64,
    cap: usize,
    failed: Option<Error>,
}

/// What [`Opener::open`] found at the start of a buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opened {
    /// The frame is not complete: call again with at least this many bytes in all, from the same start.
    NeedMore(usize),
    /// A genuine frame.
    Frame {
        /// The kind that was sealed.
        kind: u16,
        /// Where in the buffer its body is.
        body: Range<usize>,
        /// Where in the buffer the next frame starts.
        consumed: usize,
    },
}

impl Opener {
    pub(super) fn new(key: HmacSha256) -> Self {
        Self { key, sequence: 0, cap: MAX_BODY_BYTES, failed: None }
    }

    /// Refuses bodies above `cap` from now on ([`MAX_BODY_BYTES`] at first, and at most).
    pub fn set_cap(&mut self, cap: usize) {
        self.cap = cap.min(MAX_BODY_BYTES);
    }

    /// Looks at the start of `buffer` for the next frame.
    ///
    /// # Errors
    /// [`Error::Tampered`] for bytes that the peer did not send at this place; [`Error::TooLarge`] for a length above
    /// the cap, whether meant or altered, as soon as the header is there. A failed opener stays failed: the
    /// connection must be closed.
    pub fn open(&mut self, buffer: &[u8]) -> Result<Opened> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.look(buffer).inspect_err(|error| self.failed = Some(error.clone()))
    }

    fn look(&mut self, buffer: &[u8]) -> Result<Opened> {
        let tampered = Error::Tampered { sequence: self.sequence };
        if buffer.len() < Header::BYTES {
            return Ok(Opened::NeedMore(Header::BYTES));
        }
        let header = match Header::parse(buffer, self.cap) {
            Ok(header) if header.sequence == self.sequence => header,
            Err(error @ Error::TooLarge { .. }) => return Err(error),
            Ok(_) | Err(_) => return Err(tampered),
        };
        let body = Header::BYTES..Header::BYTES + header.length as usize;
        let consumed = body.end + TAG_BYTES;
        if buffer.len() < consumed {
            return Ok(Opened::NeedMore(consumed));
        }
        let expected = tag(&self.key, &buffer[..Header::BYTES], &buffer[body.clone()]);
        if !bool::from(expected[..].ct_eq(&buffer[body.end..consumed])) {
            return Err(tampered);
        }
        self.sequence += 1;
        Ok(Opened::Frame { kind: header.kind, body, consumed })
    }
}

fn tag(key: &HmacSha256, header: &[u8], body: &[u8]) -> [u8; TAG_BYTES] {
    let mut mac = key.clone();
    mac.update(header);
    mac.update(body);
    let mut tag = [0; TAG_BYTES];
    tag.copy_from_slice(&mac.finalize().into_bytes()[..TAG_BYTES]);
    tag
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealer").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opener")
            .field("sequence", &self.sequence)
            .field("cap", &self.cap)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}
