//! The job secret, and the unique id: "a store is listening there, and this is its secret".
//!
//! A [`UniqueId`] is 128 bytes, so that it fits wherever other libraries pass an id of that size (a broadcast, a file,
//! an environment variable). Layout, little-endian: magic 6, version 2, address family 2, IP address 16 (IPv4 in
//! the first 4), port 2, job id 16, secret 32, zeros 44, checksum 8 (the first bytes of SHA-256 of the rest).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::error::{Error, Result};

/// The 256-bit secret of a job. Neither `Debug` nor `Display` shows it; two are compared in constant time.
#[derive(Clone)]
pub struct Secret([u8; 32]);

impl Secret {
    /// Wraps 32 random bytes.
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes, for key derivation and for handing the secret to a child. Never print or log them.
    pub const fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

const MAGIC: [u8; 6] = *b"unison";
const VERSION: u16 = 1;
const VERSION_AT: usize = 6;
const FAMILY_AT: usize = 8;
const IP_AT: usize = 10;
const PORT_AT: usize = 26;
const JOB_AT: usize = 28;
const SECRET_AT: usize = 44;
const RESERVED_AT: usize = 76;
const CHECKSUM_AT: usize = 120;
const FAMILY_IPV4: u16 = 4;
const FAMILY_IPV6: u16 = 6;

/// "A store is listening there, and this is its secret." Who has it can join the job.
///
/// ```
/// use unisono_core::{Secret, UniqueId};
/// let id = UniqueId::new("10.0.0.5:29500".parse().unwrap(), [0xab; 16], Secret::new([7; 32]))?;
/// assert_eq!(UniqueId::from_bytes(&id.to_bytes())?, id);
/// assert_eq!(id.to_string(), "job abababababababababababababababab at 10.0.0.5:29500");
/// # Ok::<(), unisono_core::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct UniqueId {
    address: SocketAddr,
    job: [u8; 16],
    secret: Secret,
}

impl UniqueId {
    /// Bytes of a unique id.
    pub const BYTES: usize = 128;

    /// Names the store at `address` of the job `job`. The scope and flow of an IPv6 address mean something on one host
    /// only and are left out.
    ///
    /// # Errors
    /// [`Error::UniqueId`] for an address that nobody can connect to: port 0, or the unspecified address.
    pub fn new(address: SocketAddr, job: [u8; 16], secret: Secret) -> Result<Self> {
        if address.port() == 0 {
            return Err(wrong("port", "1 to 65535", "0"));
        }
        if address.ip().to_canonical().is_unspecified() {
            return Err(wrong("address", "one that can be connected to", address.ip()));
        }
        Ok(Self { address: SocketAddr::new(address.ip(), address.port()), job, secret })
    }

    /// Where the store listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// The random id of the job.
    pub const fn job(&self) -> &[u8; 16] {
        &self.job
    }

    /// The secret of the job.
    pub const fn secret(&self) -> &Secret {
        &self.secret
    }

    /// The 128 bytes. They contain the secret: hand them to the ranks of the job only.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(VERSION_AT, &VERSION.to_le_bytes());
        match self.address.ip() {
            IpAddr::V4(ip) => {
                put(FAMILY_AT, &FAMILY_IPV4.to_le_bytes());
                put(IP_AT, &ip.octets());
            }
            IpAddr::V6(ip) => {
                put(FAMILY_AT, &FAMILY_IPV6.to_le_bytes());
                put(IP_AT, &ip.octets());
            }
        }
        put(PORT_AT, &self.address.port().to_le_bytes());
        put(JOB_AT, &self.job);
        put(SECRET_AT, self.secret.expose());
        let checksum = checksum(&bytes);
        bytes[CHECKSUM_AT..].copy_from_slice(&checksum);
        bytes
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    ///
    /// # Errors
    /// [`Error::UniqueId`] naming the first field that is wrong.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let bytes: &[u8; Self::BYTES] = bytes
            .try_into()
            .map_err(|_| wrong("length", "128 bytes", format_args!("{} bytes", bytes.len())))?;
        if bytes[..VERSION_AT] != MAGIC {
            return Err(wrong("magic", to_hex(&MAGIC), to_hex(&bytes[..VERSION_AT])));
        }
        let version = u16::from_le_bytes(field(bytes, VERSION_AT));
        if version != VERSION {
            return Err(wrong("version", VERSION, version));
        }
        let ip = match u16::from_le_bytes(field(bytes, FAMILY_AT)) {
            FAMILY_IPV4 => {
                let rest: [u8; 12] = field(bytes, IP_AT + 4);
                if rest != [0; 12] {
                    return Err(wrong("address", "12 zeros behind an IPv4 address", to_hex(&rest)));
                }
                IpAddr::V4(Ipv4Addr::from(field::<4>(bytes, IP_AT)))
            }
            FAMILY_IPV6 => IpAddr::V6(Ipv6Addr::from(field::<16>(bytes, IP_AT))),
            other => return Err(wrong("address family", "4 or 6", other)),
        };
        let port = u16::from_le_bytes(field(bytes, PORT_AT));
        let secret = Secret::new(field(bytes, SECRET_AT));
        let id = Self::new(SocketAddr::new(ip, port), field(bytes, JOB_AT), secret)?;
        let reserved = &bytes[RESERVED_AT..CHECKSUM_AT];
        if let Some(at) = reserved.iter().position(|&byte| byte != 0) {
            return Err(wrong("reserved", "all zeros", format_args!("{} at {at}", reserved[at])));
        }
        if !bool::from(bytes[CHECKSUM_AT..].ct_eq(&checksum(bytes))) {
            return Err(wrong("checksum", "that of the other 120 bytes", "another (was it cut or altered?)"));
        }
        Ok(id)
    }

    /// The bytes as 256 hexadecimal digits, for an environment variable or a file. It contains the secret: it must not
    /// be logged, and a file with it must be readable by its owner only.
    pub fn to_text(&self) -> String {
        to_hex(&self.to_bytes())
    }

    /// Reads what [`to_text`](Self::to_text) wrote; white space around it is ignored.
    ///
    /// # Errors
    /// [`Error::UniqueId`] naming what is wrong; nothing of the text is repeated in it.
    pub fn from_text(text: &str) -> Result<Self> {
        let digits = text.trim().as_bytes();
        if digits.len() != 2 * Self::BYTES {
            return Err(wrong("text length", "256 digits", format_args!("{} bytes", digits.len())));
        }
        let value = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
        let mut bytes = [0; Self::BYTES];
        for (at, (byte, pair)) in bytes.iter_mut().zip(digits.chunks_exact(2)).enumerate() {
            let (Some(high), Some(low)) = (value(pair[0]), value(pair[1])) else {
                return Err(wrong(
                    "text",
                    "hexadecimal digits",
                    format_args!("something else at {}", 2 * at),
                ));
            };
            *byte = (high << 4) | low;
        }
        Self::from_bytes(&bytes)
    }
}

impl fmt::Display for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "job {} at {}", to_hex(&self.job), self.address)
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UniqueId({self})")
    }
}

fn wrong(what: &'static str, expected: impl fmt::Display, got: impl fmt::Display) -> Error {
    Error::UniqueId { what, expected: expected.to_string(), got: got.to_string() }
}

fn checksum(bytes: &[u8; UniqueId::BYTES]) -> [u8; 8] {
    let hash: [u8; 32] = Sha256::digest(&bytes[..CHECKSUM_AT]).into();
    field(&hash, 0)
}

/// `N` bytes at a constant place inside a larger array.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample(address: &str) -> UniqueId {
        UniqueId::new(address.parse().unwrap(), [0x0a; 16], Secret::new([0x5e; 32])).unwrap()
    }

    /// The sample with `value` at `at` and a right checksum: what is refused is the field itself.
    fn with(at: usize, value: &[u8]) -> Result<UniqueId> {
        let mut bytes = sample("10.0.0.5:29500").to_bytes();
        bytes[at..at + value.len()].copy_from_slice(value);
        let sum = checksum(&bytes);
        bytes[CHECKSUM_AT..].copy_from_slice(&sum);
        UniqueId::from_bytes(&bytes)
    }

    fn field_of(result: Result<UniqueId>) -> &'static str {
        match result {
            Err(Error::UniqueId { what, .. }) => what,
            other => panic!("expected Error::UniqueId, got {other:?}"),
        }
    }

    #[test]
    fn ids_come_back_from_bytes_and_text() {
        for address in ["10.0.0.5:29500", "127.0.0.1:1", "[::1]:65535", "[2001:db8::7]:80"] {
            let id = sample(address);
            assert_eq!(UniqueId::from_bytes(&id.to_bytes()).unwrap(), id);
            assert_eq!(UniqueId::from_text(&format!(" {}\n", id.to_text().to_uppercase())).unwrap(), id);
            assert_eq!(id.address().to_string(), address);
        }
    }

    #[test]
    fn the_bytes_lie_as_documented() {
        let bytes = sample("10.0.0.5:29500").to_bytes();
        assert_eq!(&bytes[..16], b"unison\x01\x00\x04\x00\x0a\x00\x00\x05\x00\x00");
        assert_eq!(bytes[26..28], 29500u16.to_le_bytes());
        assert_eq!((&bytes[28..44], &bytes[44..76]), (&[0x0a; 16][..], &[0x5e; 32][..]));
        assert_eq!(bytes[76..120], [0; 44]);
        // Held still: ids are passed between processes, maybe of different builds.
        assert_eq!(to_hex(&bytes[120..]), "d2969ada1fb24b8c");
    }

    #[test]
    fn each_malformed_field_is_named() {
        assert_eq!(field_of(UniqueId::from_bytes(&[0; 127])), "length");
        assert_eq!(field_of(with(0, b"U")), "magic");
        assert_eq!(field_of(with(6, &[2])), "version");
        assert_eq!(field_of(with(8, &[5])), "address family");
        assert_eq!(field_of(with(20, &[1])), "address");
        assert_eq!(field_of(with(10, &[0, 0, 0, 0])), "address");
        assert_eq!(field_of(with(26, &[0, 0])), "port");
        assert_eq!(field_of(with(119, &[1])), "reserved");
        let mut bytes = sample("10.0.0.5:29500").to_bytes();
        bytes[127] ^= 1;
        assert_eq!(field_of(UniqueId::from_bytes(&bytes)), "checksum");
        assert_eq!(field_of(UniqueId::from_text("ab")), "text length");
        assert_eq!(field_of(UniqueId::from_text(&"g".repeat(256))), "text");
        assert_eq!(field_of(UniqueId::from_text(&"\u{e9}".repeat(128))), "text");
    }

    #[test]
    fn an_address_that_cannot_be_connected_to_is_refused() {
        let new = |address: &str| UniqueId::new(address.parse().unwrap(), [0; 16], Secret::new([0; 32]));
        assert_eq!(
            new("10.0.0.5:0").unwrap_err().to_string(),
            "this is no unisono unique id: port should be 1 to 65535, got 0"
        );
        assert_eq!(field_of(new("0.0.0.0:80")), "address");
        assert_eq!(field_of(new("[::]:80")), "address");
        assert_eq!(field_of(new("[::ffff:0.0.0.0]:80")), "address");
    }

    #[test]
    fn every_flipped_byte_is_refused_and_no_message_shows_the_secret() {
        for address in ["10.0.0.5:29500", "[2001:db8::7]:80"] {
            let good = sample(address).to_bytes();
            for at in 0..good.len() {
                for flip in 1..=255u8 {
                    let mut bytes = good;
                    bytes[at] ^= flip;
                    let error = UniqueId::from_bytes(&bytes).unwrap_err();
                    assert!(matches!(error, Error::UniqueId { .. }), "byte {at}: {error}");
                    assert!(!error.to_string().contains("5e5e"), "byte {at}: {error}");
                }
            }
        }
    }

    #[test]
    fn neither_debug_nor_display_shows_the_secret() {
        let id = sample("10.0.0.5:29500");
        let shown = format!("{id} {id:?} {id:#?} {:?}", id.secret());
        assert!(shown.contains("10.0.0.5:29500") && shown.contains(&"0a".repeat(16)), "{shown}");
        assert!(!shown.contains("5e") && !shown.contains("94"), "{shown}");
    }

    #[test]
    fn secrets_are_equal_only_if_all_bytes_are() {
        let mut other = [0x5e; 32];
        assert_eq!(Secret::new([0x5e; 32]), Secret::new(other));
        other[31] ^= 1;
        assert_ne!(Secret::new([0x5e; 32]), Secret::new(other));
    }

    proptest! {
        #[test]
        fn any_id_comes_back(ip: [u8; 16], v4: bool, port in 1u16.., job: [u8; 16], secret: [u8; 32]) {
            let ip = if v4 { IpAddr::from(field::<4>(&ip, 0)) } else { IpAddr::from(ip) };
            prop_assume!(!ip.to_canonical().is_unspecified());
            let id = UniqueId::new(SocketAddr::new(ip, port), job, Secret::new(secret)).unwrap();
            prop_assert_eq!(&UniqueId::from_bytes(&id.to_bytes()).unwrap(), &id);
            prop_assert_eq!(&UniqueId::from_text(&id.to_text()).unwrap(), &id);
        }

        #[test]
        fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), text: String) {
            prop_assert!(UniqueId::from_bytes(&bytes).is_err());
            prop_assert!(UniqueId::from_text(&text).is_err());
        }
    }
}
