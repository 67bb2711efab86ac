//! Frames and bodies: how bytes on a control connection are cut into messages.
//!
//! A frame is a fixed little-endian [`Header`] of 24 bytes, a body, and (once a connection is authenticated, see
//! [`crate::auth`]) a tag. The length in the header is checked against a cap before anyone allocates or waits for it.
//! Bodies are `postcard`: plain data, no code, decoded without copying strings and [`Bytes`]. Every decoder here is
//! total: whatever the bytes, it returns a value or a typed error.

use serde::de::{Deserialize, Deserializer, Visitor};
use serde::ser::{Serialize, Serializer};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Error, Result};

/// The first four bytes of every frame.
pub const MAGIC: u32 = u32::from_le_bytes(*b"uniF");
/// The version of frames and bodies. Peers compare it in the handshake and in every frame.
pub const VERSION: u16 = 1;
/// The largest body of any frame; an opener may set a smaller cap.
pub const MAX_BODY_BYTES: usize = 64 * 1024 * 1024;

/// The header as it lies in memory and on the wire.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    version: U16,
    kind: U16,
    length: U32,
    reserved: U32,
    sequence: U64,
}

/// What the header of a frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the body is; each protocol numbers its own kinds.
    pub kind: u16,
    /// Bytes of the body, without header and tag.
    pub length: u32,
    /// The number of the frame in its direction, from 0.
    pub sequence: u64,
}

impl Header {
    /// Bytes of a header on the wire.
    pub const BYTES: usize = size_of::<RawHeader>();

    /// The header as it goes on the wire.
    ///
    /// ```
    /// use unisono_core::wire::Header;
    /// let header = Header { kind: 7, length: 3, sequence: 9 };
    /// assert_eq!(Header::parse(&header.to_bytes(), 1024)?, header);
    /// # Ok::<(), unisono_core::Error>(())
    /// ```
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let raw = RawHeader {
            magic: U32::new(MAGIC),
            version: U16::new(VERSION),
            kind: U16::new(self.kind),
            length: U32::new(self.length),
            reserved: U32::ZERO,
            sequence: U64::new(self.sequence),
        };
        zerocopy::transmute!(raw)
    }

    /// Reads the header at the start of `bytes` (which may go on behind it).
    ///
    /// # Errors
    /// [`Error::Malformed`] for too few bytes, another magic number or a reserved field that is not zero,
    /// [`Error::Version`], and [`Error::TooLarge`] if the body would be longer than `cap`.
    pub fn parse(bytes: &[u8], cap: usize) -> Result<Self> {
        let malformed =
            |expected: String, got: String| Error::Malformed { what: "frame header", expected, got };
        let (raw, _) = RawHeader::ref_from_prefix(bytes)
            .map_err(|_| malformed(format!("{} bytes", Self::BYTES), format!("{} bytes", bytes.len())))?;
        if raw.magic != MAGIC {
            return Err(malformed(format!("magic {MAGIC:#010x}"), format!("{:#010x}", raw.magic)));
        }
        if raw.version != VERSION {
            return Err(Error::Version { expected: VERSION.into(), got: raw.version.get().into() });
        }
        if raw.reserved != 0 {
            return Err(malformed("a reserved field of 0".into(), raw.reserved.to_string()));
        }
        let (got, cap) = (u64::from(raw.length.get()), cap as u64);
        if got > cap {
            return Err(Error::TooLarge { what: "frame body", got, cap });
        }
        Ok(Self { kind: raw.kind.get(), length: raw.length.get(), sequence: raw.sequence.get() })
    }
}

/// Encodes the body of a frame.
///
/// # Errors
/// [`Error::TooLarge`] above [`MAX_BODY_BYTES`]; [`Error::Malformed`] for a value that the format cannot say (a sequence
/// of unknown length).
pub fn encode_body<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>> {
    let bytes = postcard::to_stdvec(value).map_err(|error| Error::Malformed {
        what: "frame body",
        expected: "a value that can be encoded".into(),
        got: error.to_string(),
    })?;
    if bytes.len() > MAX_BODY_BYTES {
        let (got, cap) = (bytes.len() as u64, MAX_BODY_BYTES as u64);
        return Err(Error::TooLarge { what: "frame body", got, cap });
    }
    Ok(bytes)
}

/// Decodes the body of a frame; all of it must be used up. Memory stays within a small multiple of `bytes.len()` for
/// types whose sequences have elements of at least one byte (so never send a sequence of units).
///
/// ```
/// use unisono_core::wire::{decode_body, encode_body};
/// let body = encode_body(&(7u32, "seven"))?;
/// assert_eq!(decode_body::<(u32, &str)>(&body)?, (7, "seven"));
/// assert!(decode_body::<(u32, &str)>(&body[..3]).is_err());
/// # Ok::<(), unisono_core::Error>(())
/// ```
///
/// # Errors
/// [`Error::TooLarge`] above [`MAX_BODY_BYTES`], [`Error::Malformed`] for bytes that are no `T` or go on behind it.
pub fn decode_body<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T> {
    if bytes.len() > MAX_BODY_BYTES {
        let (got, cap) = (bytes.len() as u64, MAX_BODY_BYTES as u64);
        return Err(Error::TooLarge { what: "frame body", got, cap });
    }
    let malformed = |expected: String, got: String| Error::Malformed { what: "frame body", expected, got };
    let (value, rest) = postcard::take_from_bytes(bytes)
        .map_err(|error| malformed(std::any::type_name::<T>().into(), error.to_string()))?;
    if !rest.is_empty() {
        return Err(malformed(
            format!("{} bytes", bytes.len() - rest.len()),
            format!("{} bytes more", rest.len()),
        ));
    }
    Ok(value)
}

/// Bytes inside a body, written and read in one piece (a plain `&[u8]` would be written byte by byte).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes<'a>(pub &'a [u8]);

impl Serialize for Bytes<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Bytes<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Borrowed;
        impl<'de> Visitor<'de> for Borrowed {
            type Value = Bytes<'de>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }
            fn visit_borrowed_bytes<E: serde::de::Error>(self, bytes: &'de [u8]) -> Result<Self::Value, E> {
                Ok(Bytes(bytes))
            }
        }
        deserializer.deserialize_bytes(Borrowed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    enum Sample<'a> {
        Unit,
        Text(&'a str),
        Data {
            id: u64,
            #[serde(borrow)]
            bytes: Bytes<'a>,
        },
        List(Vec<String>),
    }

    fn samples() -> Vec<Sample<'static>> {
        vec![
            Sample::Unit,
            Sample::Text("key"),
            Sample::Data { id: u64::MAX, bytes: Bytes(&[0, 1, 2, 255]) },
            Sample::List(vec!["a".into(), String::new(), "ccc".into()]),
        ]
    }

    #[test]
    fn a_header_lies_on_the_wire_as_documented() {
        let bytes = Header { kind: 0x0102, length: 0x0304_0506, sequence: 0x0708_090a_0b0c_0d0e }.to_bytes();
        let expected = [
            b'u', b'n', b'i', b'F', 1, 0, 2, 1, 6, 5, 4, 3, 0, 0, 0, 0, 0x0e, 0x0d, 0x0c, 0x0b, 0x0a, 9, 8, 7,
        ];
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_header_says_what_is_wrong_with_it() {
        let good = Header { kind: 1, length: 100, sequence: 0 }.to_bytes();
        let with = |at: usize, value: u8| {
            let mut bytes = good;
            bytes[at] = value;
            Header::parse(&bytes, 100)
        };
        assert!(matches!(with(0, 0), Err(Error::Malformed { what: "frame header", .. })));
        assert_eq!(with(4, 2), Err(Error::Version { expected: 1, got: 2 }));
        assert!(matches!(with(12, 1), Err(Error::Malformed { what: "frame header", .. })));
        assert_eq!(with(8, 101), Err(Error::TooLarge { what: "frame body", got: 101, cap: 100 }));
        assert!(matches!(Header::parse(&good[..23], 100), Err(Error::Malformed { .. })));
    }

    #[test]
    fn bodies_come_back_and_trailing_bytes_are_refused() {
        for sample in samples() {
            let mut body = encode_body(&sample).unwrap();
            assert_eq!(decode_body::<Sample<'_>>(&body).unwrap(), sample);
            body.push(0);
            let error = decode_body::<Sample<'_>>(&body).unwrap_err();
            assert!(error.to_string().ends_with("got 1 bytes more"), "{error}");
        }
    }

    #[test]
    fn every_truncation_of_a_body_is_refused() {
        for sample in samples() {
            let body = encode_body(&sample).unwrap();
            for cut in 0..body.len() {
                assert!(decode_body::<Sample<'_>>(&body[..cut]).is_err(), "{sample:?} cut to {cut}");
            }
        }
    }

    #[test]
    fn a_huge_claimed_length_is_refused_without_memory_for_it() {
        // Variant 3 (a list) of 2^63 strings; then variant 2 with 2^63 bytes.
        let huge = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
        for variant in [&[3u8][..], &[2, 0]] {
            let body = [variant, &huge].concat();
            assert!(matches!(decode_body::<Sample<'_>>(&body), Err(Error::Malformed { .. })));
        }
    }

    #[test]
    fn a_body_above_the_largest_is_refused_on_both_sides() {
        let bytes = vec![0u8; MAX_BODY_BYTES + 1];
        assert!(matches!(encode_body(&Bytes(&bytes)), Err(Error::TooLarge { what: "frame body", .. })));
        assert!(matches!(decode_body::<u8>(&bytes), Err(Error::TooLarge { what: "frame body", .. })));
    }

    proptest! {
        #[test]
        fn headers_come_back(kind: u16, length in 0u32..=1 << 20, sequence: u64) {
            let header = Header { kind, length, sequence };
            prop_assert_eq!(Header::parse(&header.to_bytes(), 1 << 20), Ok(header));
        }

        #[test]
        fn decoders_never_panic_on_random_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(header) = Header::parse(&bytes, 1000) {
                prop_assert!(header.length <= 1000);
            }
            if let Ok(sample) = decode_body::<Sample<'_>>(&bytes) {
                // What decodes can be encoded and decodes to the same again.
                let again = encode_body(&sample).unwrap();
                prop_assert_eq!(decode_body::<Sample<'_>>(&again).unwrap(), sample);
            }
        }

        #[test]
        fn decoders_never_panic_on_mutated_bytes(which in 0usize..4, at: prop::sample::Index, value: u8, kind: u16) {
            let mut body = encode_body(&samples()[which]).unwrap();
            let at_body = at.index(body.len());
            body[at_body] = value;
            let _ = decode_body::<Sample<'_>>(&body);
            let mut header = Header { kind, length: 5, sequence: 1 }.to_bytes();
            header[at.index(Header::BYTES)] = value;
            if let Ok(parsed) = Header::parse(&header, 64) {
                prop_assert!(parsed.length <= 64);
            }
        }
    }
}
