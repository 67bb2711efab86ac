//! What a rank says of itself at rendezvous, and the table that all ranks end with.
//!
//! Hellos are gathered per host; the lowest rank of each host merges all hosts' hellos with [`WorldTable::merge`],
//! which refuses what does not fit together and names both sides. Every rank ends with the same table and its hash.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::member::Member;

/// The version of everything that ranks exchange. Ranks of different versions refuse each other.
pub const PROTOCOL_VERSION: u32 = 3;
/// The most bytes that an encoded hello may have.
pub const MAX_HELLO_BYTES: usize = 4096;

/// Which machine, as far as shared memory is concerned.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct HostIdentity {
    /// The name, for messages only.
    pub name: String,
    /// The kernel's boot id: equal in all containers of one machine.
    pub boot_id: String,
    /// The network namespace: ranks in one of them can reach each other's sockets.
    pub network_namespace: u64,
}

impl HostIdentity {
    /// Whether ranks there and here can share memory.
    pub fn is_same_host(&self, other: &Self) -> bool {
        self.boot_id == other.boot_id && self.network_namespace == other.network_namespace
    }

    /// A name for the store: letters and digits only, equal exactly for one host.
    pub fn key(&self) -> String {
        let boot: String = self.boot_id.chars().filter(char::is_ascii_alphanumeric).take(64).collect();
        format!("{boot}-{:x}", self.network_namespace)
    }
}

/// Which GPU, whatever number it has in which process.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct DeviceIdentity {
    /// The vendor's identity of it.
    pub uuid: [u8; 16],
    /// The name of the product.
    pub name: String,
    /// Where it is plugged in, as `0000:1b:00.0`.
    pub pci: String,
    /// Its number in the process of the rank.
    pub ordinal: u32,
}

impl fmt::Display for DeviceIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.name, self.pci)
    }
}

/// One rank's introduction.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`].
    pub version: u32,
    /// The job's name.
    pub job: String,
    /// Which start of the job: a launcher that restarts counts up.
    pub generation: u32,
    /// Rank and world size.
    pub member: Member,
    /// The machine.
    pub host: HostIdentity,
    /// The process.
    pub pid: u32,
    /// Random name of the socket on which this rank meets the others of its host.
    pub endpoint: [u8; 16],
    /// The GPUs that it works on, if it has any.
    pub devices: Vec<DeviceIdentity>,
    /// Every option that changes an algorithm, in the encoding of the settings.
    pub options: Vec<u8>,
    /// The same for people: `algorithm=auto order=fixed tuning=none`.
    pub options_text: String,
}

impl Hello {
    /// `rank 3 (host gpu07, pid 4121)`.
    pub fn who(&self) -> String {
        format!("rank {} ({})", self.member.rank(), self.place())
    }

    /// `host gpu07, pid 4121`: the same whatever its rank.
    pub fn place(&self) -> String {
        format!("host {}, pid {}", self.host.name, self.pid)
    }

    /// Refuses `other` unless both fit into one world: version, job, generation, world size and options.
    pub fn check_fits(&self, other: &Self) -> Result<()> {
        if self.version != other.version {
            return Err(Error::Version { expected: self.version, got: other.version });
        }
        let differs = |what, left: &dyn fmt::Display, right: &dyn fmt::Display| Error::Disagreement {
            what,
            left: self.who(),
            left_value: left.to_string(),
            right: other.who(),
            right_value: right.to_string(),
        };
        if self.job != other.job {
            return Err(differs("job", &self.job, &other.job));
        }
        if self.generation != other.generation {
            return Err(differs("generation", &self.generation, &other.generation));
        }
        if self.member.world_size() != other.member.world_size() {
            return Err(differs("world size", &self.member.world_size(), &other.member.world_size()));
        }
        if self.devices.is_empty() != other.devices.is_empty() {
            let text = |hello: &Self| hello.devices.first().map_or("none".to_owned(), ToString::to_string);
            return Err(differs("whether there is a GPU", &text(self), &text(other)));
        }
        if self.options != other.options {
            return Err(differs("an option that changes results", &self.options_text, &other.options_text));
        }
        Ok(())
    }
}

/// All ranks of a world, by rank. Equal on every rank.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WorldTable {
    hellos: Vec<Hello>,
}

impl WorldTable {
    /// Merges the hellos of all hosts, in any order. Refuses hellos that do not fit together, duplicate ranks and a
    /// table with holes.
    pub fn merge(hellos: impl IntoIterator<Item = Hello>) -> Result<Self> {
        let mut hellos: Vec<Hello> = hellos.into_iter().collect();
        hellos.sort_by_key(|hello| hello.member.rank());
        let Some(first) = hellos.first() else {
            return Err(Error::Malformed {
                what: "world table",
                expected: "at least one rank".into(),
                got: "none".into(),
            });
        };
        for hello in &hellos {
            first.check_fits(hello)?;
        }
        for pair in hellos.windows(2) {
            if pair[0].member.rank() == pair[1].member.rank() {
                return Err(Error::DuplicateRank {
                    rank: pair[0].member.rank(),
                    first: pair[0].who(),
                    second: pair[1].who(),
                });
            }
        }
        let expected = first.member.world_size();
        if hellos.len() != expected as usize {
            return Err(Error::Malformed {
                what: "world table",
                expected: format!("{expected} ranks"),
                got: format!("{}", hellos.len()),
            });
        }
        Ok(Self { hellos })
    }

    /// Checks a table that came from elsewhere: as if it were merged anew.
    pub fn checked(self) -> Result<Self> {
        Self::merge(self.hellos)
    }

    /// The hello of `rank`.
    pub fn hello(&self, rank: usize) -> &Hello {
        &self.hellos[rank]
    }

    /// All hellos, by rank.
    pub fn hellos(&self) -> &[Hello] {
        &self.hellos
    }

    /// SHA-256 of the table.
    pub fn hash(&self) -> [u8; 32] {
        // Encoding plain strings and numbers into memory cannot fail.
        let bytes = postcard::to_stdvec(self).unwrap_or_default();
        Sha256::digest(bytes).into()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn hello(rank: usize, world_size: usize, host: &str) -> Hello {
        Hello {
            version: PROTOCOL_VERSION,
            job: "job".into(),
            generation: 0,
            member: Member::new(rank, world_size).unwrap(),
            host: HostIdentity { name: host.into(), boot_id: format!("boot-{host}"), network_namespace: 7 },
            pid: 100 + rank as u32,
            endpoint: [rank as u8; 16],
            devices: Vec::new(),
            options: vec![1],
            options_text: "order=fixed".into(),
        }
    }

    #[test]
    fn every_order_of_arrival_gives_one_table() {
        let forward = WorldTable::merge((0..4).map(|rank| hello(rank, 4, "a"))).unwrap();
        let backward = WorldTable::merge((0..4).rev().map(|rank| hello(rank, 4, "a"))).unwrap();
        assert_eq!(forward.hash(), backward.hash());
        assert_eq!(forward.hello(2).member.rank(), 2);
        let other = WorldTable::merge((0..4).map(|rank| hello(rank, 4, "b"))).unwrap();
        assert_ne!(forward.hash(), other.hash());
    }

    #[test]
    fn what_does_not_fit_names_both_sides() {
        let merge = |second: Hello| WorldTable::merge([hello(0, 2, "a"), second]).unwrap_err().to_string();
        assert_eq!(
            merge(Hello { member: Member::new(1, 3).unwrap(), ..hello(1, 2, "b") }),
            "world size differs: rank 0 (host a, pid 100) says 2, rank 1 (host b, pid 101) says 3"
        );
        assert_eq!(
            merge(Hello { options: vec![2], options_text: "order=rank".into(), ..hello(1, 2, "b") }),
            "an option that changes results differs: rank 0 (host a, pid 100) says order=fixed, \
             rank 1 (host b, pid 101) says order=rank"
        );
        let device =
            DeviceIdentity { uuid: [7; 16], name: "H200".into(), pci: "0000:1b:00.0".into(), ordinal: 3 };
        assert_eq!(
            merge(Hello { devices: vec![device], ..hello(1, 2, "b") }),
            "whether there is a GPU differs: rank 0 (host a, pid 100) says none, \
             rank 1 (host b, pid 101) says H200 at 0000:1b:00.0"
        );
        assert_eq!(
            merge(Hello { generation: 4, ..hello(1, 2, "b") }),
            "generation differs: rank 0 (host a, pid 100) says 0, rank 1 (host b, pid 101) says 4"
        );
        assert_eq!(
            merge(Hello { pid: 9, ..hello(0, 2, "b") }),
            "two processes claim rank 0: rank 0 (host a, pid 100) and rank 0 (host b, pid 9)"
        );
        assert_eq!(
            merge(Hello { version: 7, ..hello(1, 2, "b") }),
            "protocol version 7 met version 3: all ranks must use the same unisono release"
        );
    }

    #[test]
    fn a_table_with_holes_is_refused() {
        let error = WorldTable::merge([hello(0, 3, "a"), hello(2, 3, "a")]).unwrap_err();
        assert_eq!(error.to_string(), "malformed world table: expected 3 ranks, got 2");
        assert!(WorldTable::merge([]).is_err());
    }
}
