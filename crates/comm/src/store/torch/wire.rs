//! The bytes of torch's store protocol: requests encoded for the client, decoded for the server.
//!
//! Decoding borrows from the receive buffer and allocates in proportion to bytes that have arrived, never to a length
//! that was merely announced. An incomplete request tells how many bytes it needs at least, so that a long one is
//! not decoded again at every packet.

use crate::store::{MAX_KEY_BYTES, MAX_KEYS, MAX_VALUE_BYTES};

/// What a client says first, behind `VALIDATE`.
pub(super) const MAGIC: u32 = 0x3C85_F7CE;
/// The longest request that a server takes.
pub(super) const MAX_REQUEST_BYTES: usize = 64 * 1024 * 1024;

/// The reply to `WAIT` and `BARRIER` once they are over.
pub(super) const WAIT_OVER: u8 = 0;
/// The reply to `CANCEL_WAIT`.
pub(super) const WAIT_CANCELLED: u8 = 1;
/// The reply to `CHECK` when all keys are there.
pub(super) const ALL_THERE: u8 = 0;
/// The reply to `CHECK` when not all keys are there.
pub(super) const NOT_ALL_THERE: u8 = 1;

/// The first byte of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Opcode {
    Validate = 0,
    Set = 1,
    CompareSet = 2,
    Get = 3,
    Add = 4,
    Check = 5,
    Wait = 6,
    NumKeys = 7,
    Delete = 8,
    Append = 9,
    MultiGet = 10,
    MultiSet = 11,
    CancelWait = 12,
    Ping = 13,
    QueuePush = 14,
    QueuePop = 15,
    QueueLength = 16,
    ListKeys = 17,
    Barrier = 18,
}

impl Opcode {
    const ALL: [Self; 19] = [
        Self::Validate,
        Self::Set,
        Self::CompareSet,
        Self::Get,
        Self::Add,
        Self::Check,
        Self::Wait,
        Self::NumKeys,
        Self::Delete,
        Self::Append,
        Self::MultiGet,
        Self::MultiSet,
        Self::CancelWait,
        Self::Ping,
        Self::QueuePush,
        Self::QueuePop,
        Self::QueueLength,
        Self::ListKeys,
        Self::Barrier,
    ];
}

/// One or more requests of a client, as bytes.
#[derive(Debug, Default)]
pub(super) struct Encoder {
    bytes: Vec<u8>,
}

impl Encoder {
    /// A request that begins with `opcode`.
    pub(super) fn new(opcode: Opcode) -> Self {
        Self::default().opcode(opcode)
    }

    /// Begins a further request.
    pub(super) fn opcode(mut self, opcode: Opcode) -> Self {
        self.bytes.push(opcode as u8);
        self
    }

    /// A key, with the `/` that torch's client puts in front of it.
    pub(super) fn key(mut self, key: &str) -> Self {
        self.bytes.extend_from_slice(&(key.len() as u64 + 1).to_le_bytes());
        self.bytes.push(b'/');
        self.bytes.extend_from_slice(key.as_bytes());
        self
    }

    /// The number of keys, then the keys.
    pub(super) fn keys(self, keys: &[&str]) -> Self {
        keys.iter().fold(self.u64(keys.len() as u64), |encoder, key| encoder.key(key))
    }

    /// A value.
    pub(super) fn value(mut self, value: &[u8]) -> Self {
        self.bytes.extend_from_slice(&(value.len() as u64).to_le_bytes());
        self.bytes.extend_from_slice(value);
        self
    }

    pub(super) fn u32(mut self, number: u32) -> Self {
        self.bytes.extend_from_slice(&number.to_le_bytes());
        self
    }

    pub(super) fn i64(mut self, number: i64) -> Self {
        self.bytes.extend_from_slice(&number.to_le_bytes());
        self
    }

    fn u64(mut self, number: u64) -> Self {
        self.bytes.extend_from_slice(&number.to_le_bytes());
        self
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// A request as the server sees it. Keys are as they came, with whatever stands in front of them.
#[derive(Debug, PartialEq)]
pub(super) enum Request<'a> {
    Validate { magic: u32 },
    Set { key: &'a str, value: &'a [u8] },
    CompareSet { key: &'a str, expected: &'a [u8], desired: &'a [u8] },
    Get { key: &'a str },
    Add { key: &'a str, amount: i64 },
    Check { keys: Vec<&'a str> },
    Wait { keys: Vec<&'a str> },
    NumKeys,
    Delete { key: &'a str },
    Append { key: &'a str, value: &'a [u8] },
    MultiGet { keys: Vec<&'a str> },
    MultiSet { entries: Vec<(&'a str, &'a [u8])> },
    CancelWait,
    Ping { nonce: u32 },
    QueuePush { key: &'a str, value: &'a [u8] },
    QueuePop { key: &'a str },
    QueueLength { key: &'a str },
    ListKeys,
    Barrier { key: &'a str, world_size: i64 },
}

/// What the bytes received so far hold.
#[derive(Debug, PartialEq)]
pub(super) enum Decoded<'a> {
    /// A request, and its length.
    Whole(Request<'a>, usize),
    /// The beginning of a request, which has at least so many bytes.
    Partial { at_least: usize },
}

/// Decodes the request at the beginning of `bytes`; the error says what is wrong with it.
pub(super) fn decode(bytes: &[u8]) -> Result<Decoded<'_>, String> {
    let mut cursor = Cursor { bytes, at: 0 };
    match cursor.request() {
        Ok(request) => Ok(Decoded::Whole(request, cursor.at)),
        Err(Stop::Short { at_least }) if at_least <= MAX_REQUEST_BYTES => Ok(Decoded::Partial { at_least }),
        Err(Stop::Short { at_least }) => {
            Err(format!("a request of {at_least} bytes or more, at most {MAX_REQUEST_BYTES} are taken"))
        }
        Err(Stop::Malformed(message)) => Err(message),
    }
}

enum Stop {
    Short { at_least: usize },
    Malformed(String),
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn request(&mut self) -> Result<Request<'a>, Stop> {
        let [code] = self.array::<1>()?;
        let Some(opcode) = Opcode::ALL.get(usize::from(code)) else {
            return Err(Stop::Malformed(format!("opcode {code}, the largest is {}", Opcode::Barrier as u8)));
        };
        Ok(match opcode {
            Opcode::Validate => Request::Validate { magic: u32::from_le_bytes(self.array()?) },
            Opcode::Set => Request::Set { key: self.key()?, value: self.value()? },
            Opcode::CompareSet => {
                Request::CompareSet { key: self.key()?, expected: self.value()?, desired: self.value()? }
            }
            Opcode::Get => Request::Get { key: self.key()? },
            Opcode::Add => Request::Add { key: self.key()?, amount: self.i64()? },
            Opcode::Check => Request::Check { keys: self.many(Self::key)? },
            Opcode::Wait => Request::Wait { keys: self.many(Self::key)? },
            Opcode::NumKeys => Request::NumKeys,
            Opcode::Delete => Request::Delete { key: self.key()? },
            Opcode::Append => Request::Append { key: self.key()?, value: self.value()? },
            Opcode::MultiGet => Request::MultiGet { keys: self.many(Self::key)? },
            Opcode::MultiSet => {
                Request::MultiSet { entries: self.many(|cursor| Ok((cursor.key()?, cursor.value()?)))? }
            }
            Opcode::CancelWait => Request::CancelWait,
            Opcode::Ping => Request::Ping { nonce: u32::from_le_bytes(self.array()?) },
            Opcode::QueuePush => Request::QueuePush { key: self.key()?, value: self.value()? },
            Opcode::QueuePop => Request::QueuePop { key: self.key()? },
            Opcode::QueueLength => Request::QueueLength { key: self.key()? },
            Opcode::ListKeys => Request::ListKeys,
            Opcode::Barrier => Request::Barrier { key: self.key()?, world_size: self.i64()? },
        })
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], Stop> {
        let end = self.at.saturating_add(length);
        let taken = self.bytes.get(self.at..end).ok_or(Stop::Short { at_least: end })?;
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn i64(&mut self) -> Result<i64, Stop> {
        Ok(i64::from_le_bytes(self.array()?))
    }

    /// A length or count of at most `cap`.
    fn bounded(&mut self, what: &str, cap: usize) -> Result<usize, Stop> {
        let got = u64::from_le_bytes(self.array()?);
        usize::try_from(got)
            .ok()
            .filter(|got| *got <= cap)
            .ok_or_else(|| Stop::Malformed(format!("{what} of {got}, at most {cap} is taken")))
    }

    fn key(&mut self) -> Result<&'a str, Stop> {
        let length = self.bounded("a key length", MAX_KEY_BYTES)?;
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes).map_err(|_| Stop::Malformed("a key that is not UTF-8".to_owned()))
    }

    fn value(&mut self) -> Result<&'a [u8], Stop> {
        let length = self.bounded("a value length", MAX_VALUE_BYTES)?;
        self.take(length)
    }

    /// A count, then so many items. Grows with the bytes that are there, as each item takes some.
    fn many<T>(&mut self, item: impl Fn(&mut Self) -> Result<T, Stop>) -> Result<Vec<T>, Stop> {
        let count = self.bounded("a number of keys", MAX_KEYS)?;
        let mut items = Vec::new();
        for _ in 0..count {
            items.push(item(self)?);
        }
        Ok(items)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_the_client_encodes_the_server_decodes() {
        let encoder = Encoder::new(Opcode::Wait).keys(&["a", "bc"]).opcode(Opcode::Add).key("n").i64(-3);
        let bytes = encoder.bytes();
        let Decoded::Whole(request, length) = decode(bytes).unwrap() else { panic!("WAIT is whole") };
        assert_eq!(request, Request::Wait { keys: vec!["/a", "/bc"] });
        assert_eq!(
            decode(&bytes[length..]).unwrap(),
            Decoded::Whole(Request::Add { key: "/n", amount: -3 }, bytes.len() - length)
        );
    }

    #[test]
    fn every_beginning_of_a_request_asks_for_more_but_never_for_too_much() {
        let encoder = Encoder::new(Opcode::CompareSet).key("key").value(b"old").value(b"new value");
        let bytes = encoder.bytes();
        for cut in 0..bytes.len() {
            match decode(&bytes[..cut]).unwrap() {
                Decoded::Partial { at_least } => assert!(cut < at_least && at_least <= bytes.len(), "{cut}"),
                Decoded::Whole(request, _) => panic!("{request:?} from {cut} bytes"),
            }
        }
    }

    #[test]
    fn lengths_above_the_caps_are_refused_before_the_bytes_come() {
        let huge = [&[Opcode::Get as u8][..], &u64::MAX.to_le_bytes()].concat();
        assert_eq!(decode(&huge).unwrap_err(), "a key length of 18446744073709551615, at most 8192 is taken");
        let many = [&[Opcode::Wait as u8][..], &131_073u64.to_le_bytes()].concat();
        assert_eq!(decode(&many).unwrap_err(), "a number of keys of 131073, at most 131072 is taken");
        assert_eq!(decode(&[19]).unwrap_err(), "opcode 19, the largest is 18");
    }

    proptest! {
        #[test]
        fn any_bytes_decode_without_a_panic(opcode in 0u8..20, bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let bytes = [&[opcode][..], &bytes].concat();
            if let Ok(Decoded::Whole(_, length)) = decode(&bytes) {
                prop_assert!(length <= bytes.len());
            }
        }
    }
}
