//! How the ranks of a job find each other: hellos go through the store, are gathered per host, merged by the lowest rank
//! of each host, and every rank ends with the same table.
//!
//! A rank that does not fit (another world size, a rank that is taken, other options, an older generation) is refused as
//! soon as it says hello, with an error that names both sides; the others go on waiting for the right one. Each rank
//! reads one list and one table, each host's lowest rank one list per host: n + h² values for n ranks on h hosts.
//!
//! A start that fails later pulls down rank after rank. Each leaves its cause in the store before it goes, so that the
//! others follow the causes back to the first and all tell the same.

use std::time::{Duration, Instant};

use unisono_core::hello::{Hello, MAX_HELLO_BYTES, WorldTable};
use unisono_core::{Secret, wire};
use unisono_sync::Deadline;

use crate::cause::Cause;
use crate::error::{Error, Result};
use crate::store::Store;

#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;

/// How long a rank that lost another waits for what that one may have to say. It says it before it goes.
const HEARSAY_TIME: Duration = Duration::from_secs(1);
/// The longest cause in the store.
const MAX_CAUSE_BYTES: usize = 1024;
/// What all ranks are doing here.
const DURING: &str = "the start of the job";
/// The most ranks that an error lists as missing.
const MAX_LISTED: usize = 64;

/// One rank's side of a rendezvous.
pub(crate) struct Rendezvous<'a> {
    store: &'a dyn Store,
    hello: &'a Hello,
    deadline: Deadline,
    prefix: String,
}

impl<'a> Rendezvous<'a> {
    pub(crate) fn new(store: &'a dyn Store, hello: &'a Hello, deadline: Deadline) -> Self {
        let prefix = format!("unisono/{}/{}", hello.job, hello.generation);
        Self { store, hello, deadline, prefix }
    }

    /// Says hello and returns the table of all ranks. Every rank calls this once per generation.
    pub(crate) fn meet(&self) -> Result<WorldTable> {
        let start = Instant::now();
        self.refuse_older_generations()?;
        let bytes = wire::encode_body(self.hello)?;
        let first: Hello = self.claim("world", &bytes)?;
        first.check_fits(self.hello)?;
        let rank = self.hello.member.rank();
        let holder: Hello = self.claim(&format!("rank/{rank}"), &bytes)?;
        if holder != *self.hello {
            let (first, second) = (holder.who(), self.hello.who());
            return Err(unisono_core::Error::DuplicateRank { rank, first, second }.into());
        }
        self.join_host(&bytes)?;
        self.wait_for_all(start)?;
        let table = self.table()?;
        if table.hello(rank as usize) != self.hello {
            let (first, second) = (table.hello(rank as usize).who(), self.hello.who());
            return Err(unisono_core::Error::DuplicateRank { rank, first, second }.into());
        }
        Ok(table)
    }

    /// The secret of this world where the launcher gave none: that of whoever offers one first.
    pub(crate) fn agree_on_secret(&self, offered: &Secret) -> Result<Secret> {
        let standing = self.store.compare_set(&self.key("secret"), b"", offered.expose(), self.deadline)?;
        match <[u8; 32]>::try_from(standing.as_slice()) {
            Ok(bytes) => Ok(Secret::new(bytes)),
            Err(_) => Err(self.malformed("secret", "32 bytes", standing.len())),
        }
    }

    fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.prefix)
    }

    fn malformed(&self, key: &str, expected: &str, got: usize) -> Error {
        let message = format!("{} should hold {expected}, holds {got} bytes", self.key(key));
        Error::StoreProtocol { store: self.store.describe(), message }
    }

    /// Moves the job's generation forward to ours; an error if it is already ahead.
    fn refuse_older_generations(&self) -> Result<()> {
        let key = format!("unisono/{}/generation", self.hello.job);
        let ours = self.hello.generation.to_string();
        let mut expected = Vec::new();
        loop {
            let standing = self.store.compare_set(&key, &expected, ours.as_bytes(), self.deadline)?;
            let number = std::str::from_utf8(&standing).ok().and_then(|text| text.parse::<u32>().ok());
            match number {
                Some(number) if number == self.hello.generation => return Ok(()),
                Some(number) if number > self.hello.generation => {
                    return Err(Error::StaleGeneration {
                        rank: self.hello.member.rank() as usize,
                        job: self.hello.job.clone(),
                        expected: number,
                        got: self.hello.generation,
                    });
                }
                Some(_) => expected = standing,
                None => return Err(self.malformed("../generation", "a number", standing.len())),
            }
        }
    }

    /// Sets `name` to our hello if nobody did, and returns the hello that stands there.
    fn claim(&self, name: &str, bytes: &[u8]) -> Result<Hello> {
        let standing = self.store.compare_set(&self.key(name), b"", bytes, self.deadline)?;
        if standing.len() > MAX_HELLO_BYTES {
            return Err(self.malformed(name, "a hello", standing.len()));
        }
        Ok(wire::decode_body(&standing)?)
    }

    /// Adds our hello to the list of our host, and our host to the list of hosts.
    fn join_host(&self, bytes: &[u8]) -> Result<()> {
        let host = self.hello.host.key();
        let mut entry = (bytes.len() as u32).to_le_bytes().to_vec();
        entry.extend_from_slice(bytes);
        self.store.append(&self.key(&format!("host/{host}")), &entry, self.deadline)?;
        if self.store.add(&self.key(&format!("seen/{host}")), 1, self.deadline)? == 1 {
            self.store.append(&self.key("hosts"), format!("{host}\n").as_bytes(), self.deadline)?;
        }
        Ok(())
    }

    /// Counts us as met and waits until all have.
    fn wait_for_all(&self, start: Instant) -> Result<()> {
        let world_size = self.hello.member.world_size() as usize;
        let all = self.key("all");
        // Whoever dies before it has done its part here is not among those that are here.
        if self.store.add(&self.key("met"), 1, self.deadline)? == world_size as i64 {
            return self.store.set(&all, b"1", self.deadline);
        }
        self.store.set(&self.key(&format!("here/{}", self.hello.member.rank())), b"1", self.deadline)?;
        match self.store.wait(&[&all], self.deadline) {
            Err(Error::StoreTimeout { .. }) => Err(self.missing(world_size, start)),
            other => other,
        }
    }

    /// Who did not come. The deadline is over, so this gets a second of its own.
    fn missing(&self, world_size: usize, start: Instant) -> Error {
        let waited = start.elapsed();
        let deadline = Deadline::after(Duration::from_secs(1));
        let is_there = |rank: &usize| {
            let key = self.key(&format!("here/{rank}"));
            self.store.check(&[&key], deadline).unwrap_or(false)
        };
        let absent: Vec<usize> = (0..world_size).filter(|rank| !is_there(rank)).collect();
        let met = world_size - absent.len();
        let missing = absent.into_iter().take(MAX_LISTED).collect();
        Error::InitTimeout { met, world_size, store: self.store.describe(), waited, missing }
    }

    /// The table: made by the lowest rank of our host, read by the others.
    fn table(&self) -> Result<WorldTable> {
        let host = self.hello.host.key();
        let local = self.hellos_of(&[&host])?;
        let lowest = local.iter().map(|hello| hello.member.rank()).min();
        let key = self.key(&format!("table/{host}"));
        if lowest != Some(self.hello.member.rank()) {
            let bytes = match self.store.get(&key, self.deadline) {
                Err(Error::StoreTimeout { waited, .. }) => return Err(stalled(&local, waited)),
                other => other?,
            };
            let merged: Result<WorldTable, String> = wire::decode_body(&bytes)?;
            let message = |message| Error::StoreProtocol { store: self.store.describe(), message };
            return Ok(merged.map_err(message)?.checked()?);
        }
        let hosts = self.store.get(&self.key("hosts"), self.deadline)?;
        let hosts = String::from_utf8_lossy(&hosts).into_owned();
        let hosts: Vec<&str> = hosts.lines().collect();
        let merged = self.hellos_of(&hosts).and_then(|hellos| Ok(WorldTable::merge(hellos)?));
        let told = merged.as_ref().map_err(Error::to_string);
        self.store.set(&key, &wire::encode_body(&told)?, self.deadline)?;
        merged
    }

    /// Tells the others why our start failed, and follows what they told to the first cause.
    pub(crate) fn first_cause(&self, error: Error, table: &WorldTable) -> Error {
        let me = self.hello.member.rank() as usize;
        let told = |rank: usize| self.key(&format!("failed/{rank}"));
        let (own, mut suspects) = own_cause(&error, me, table);
        let deadline = Deadline::after(HEARSAY_TIME);
        // If the store cannot be reached any more, what we saw ourselves is all there is.
        let _ = self.store.set(&told(me), &own.to_bytes(MAX_CAUSE_BYTES), deadline);
        let mut first = None;
        let mut seen = vec![me];
        while let Some(rank) = suspects.pop() {
            if seen.contains(&rank) || rank >= table.hellos().len() {
                continue;
            }
            seen.push(rank);
            let Ok(bytes) = self.store.get(&told(rank), deadline) else { continue };
            let Some(cause) = Cause::from_bytes(&bytes) else { continue };
            // It lives, or did: what it saw is closer to the beginning than what we did.
            suspects.clear();
            if let Cause::Died { rank, .. } = &cause {
                suspects.push(*rank as usize);
            }
            first = Some(cause);
        }
        let member = (me, table.hellos().len());
        let mut error = match (first, &error) {
            (Some(cause), _) => cause.into_error(DURING, member),
            (None, Error::Node(unisono_node::Error::PeerLost { .. })) => own.into_error(DURING, member),
            (None, _) => error,
        };
        if let Error::PeerDied { survivors, .. } = &mut error {
            // There is no communicator yet that could be shrunk.
            survivors.clear();
        }
        error
    }

    /// The hellos of all ranks of `hosts`.
    fn hellos_of(&self, hosts: &[&str]) -> Result<Vec<Hello>> {
        let keys: Vec<String> = hosts.iter().map(|host| self.key(&format!("host/{host}"))).collect();
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        let mut hellos = Vec::new();
        for list in self.store.multi_get(&keys, self.deadline)? {
            let mut rest = list.as_slice();
            while let Some((length, after)) = rest.split_first_chunk::<4>() {
                let length = u32::from_le_bytes(*length) as usize;
                if length > MAX_HELLO_BYTES || length > after.len() {
                    return Err(self.malformed("host", "whole hellos", list.len()));
                }
                hellos.push(wire::decode_body(&after[..length])?);
                rest = &after[length..];
            }
        }
        Ok(hellos)
    }
}

/// The lowest rank of a host did not write the table.
fn stalled(local: &[Hello], waited: Duration) -> Error {
    let lowest = local.iter().min_by_key(|hello| hello.member.rank());
    Error::InitStalled {
        rank: lowest.map_or(0, |hello| hello.member.rank() as usize),
        who: lowest.map_or_else(String::new, Hello::who),
        what: "write the table of ranks",
        waited,
    }
}

/// `error` as it is told to the others, and the ranks that may have a better explanation.
fn own_cause(error: &Error, me: usize, table: &WorldTable) -> (Cause, Vec<usize>) {
    match error {
        Error::Node(unisono_node::Error::PeerLost { rank, lost, .. }) => {
            (Cause::died(*rank, table.hello(*rank).who(), *lost), vec![*rank])
        }
        Error::PeerDied { rank, who, how, .. } => {
            (Cause::Died { rank: *rank as u32, who: who.clone(), how: how.clone() }, vec![*rank])
        }
        other => {
            let suspects = match other {
                Error::Node(unisono_node::Error::Missing { missing, .. }) => missing.clone(),
                Error::Node(unisono_node::Error::Timeout { rank, .. }) => vec![*rank],
                _ => Vec::new(),
            };
            (Cause::Aborted { rank: me as u32, reason: other.to_string() }, suspects)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use unisono_core::Member;
    use unisono_core::hello::{HostIdentity, PROTOCOL_VERSION};

    use super::*;
    use crate::store::MemoryStore;

    fn hello(rank: usize, world_size: usize, host: &str) -> Hello {
        Hello {
            version: PROTOCOL_VERSION,
            job: "job".into(),
            generation: 1,
            member: Member::new(rank, world_size).unwrap(),
            host: HostIdentity { name: host.into(), boot_id: format!("boot-{host}"), network_namespace: 7 },
            pid: 100 + rank as u32,
            endpoint: [rank as u8; 16],
            devices: Vec::new(),
            options: vec![1],
            options_text: "order=fixed".into(),
        }
    }

    fn meet(store: &Arc<MemoryStore>, hello: &Hello, timeout_ms: u64) -> Result<WorldTable> {
        let deadline = Deadline::after(Duration::from_millis(timeout_ms));
        Rendezvous::new(store.as_ref(), hello, deadline).meet()
    }

    #[test]
    fn ranks_of_three_hosts_end_with_one_table() {
        let store = Arc::new(MemoryStore::new());
        let threads: Vec<_> = (0..9)
            .map(|rank| {
                let store = store.clone();
                std::thread::spawn(move || meet(&store, &hello(rank, 9, ["a", "b", "c"][rank % 3]), 20_000))
            })
            .collect();
        let tables: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect();
        assert!(tables.iter().all(|table| table.hash() == tables[0].hash()));
        assert_eq!(tables[0].hello(4).host.name, "b");
    }

    #[test]
    fn offenders_are_refused_by_name_and_the_others_still_meet() {
        let store = Arc::new(MemoryStore::new());
        let waiting = {
            let store = store.clone();
            std::thread::spawn(move || meet(&store, &hello(0, 2, "a"), 20_000))
        };
        store.get("unisono/job/1/rank/0", Deadline::after(Duration::from_secs(20))).unwrap();
        let refused = |hello: Hello| meet(&store, &hello, 20_000).unwrap_err().to_string();
        assert_eq!(
            refused(hello(1, 3, "b")),
            "world size differs: rank 0 (host a, pid 100) says 2, rank 1 (host b, pid 101) says 3"
        );
        assert_eq!(
            refused(Hello { pid: 7, ..hello(0, 2, "b") }),
            "two processes claim rank 0: rank 0 (host a, pid 100) and rank 0 (host b, pid 7)"
        );
        assert_eq!(
            refused(Hello { generation: 0, ..hello(1, 2, "b") }),
            "rank 1 belongs to generation 0 of job job, which is already at generation 1. It is left over \
             from an older start: end it."
        );
        assert!(meet(&store, &hello(1, 2, "b"), 20_000).is_ok());
        assert!(waiting.join().unwrap().is_ok());
    }

    #[test]
    fn whoever_is_missing_at_the_deadline_is_listed() {
        let store = Arc::new(MemoryStore::new());
        let other = {
            let store = store.clone();
            std::thread::spawn(move || meet(&store, &hello(2, 4, "a"), 200))
        };
        for error in [meet(&store, &hello(0, 4, "a"), 200).unwrap_err(), other.join().unwrap().unwrap_err()] {
            assert!(
                matches!(&error, Error::InitTimeout { met: 2, world_size: 4, missing, .. } if missing == &[1, 3]),
                "{error}"
            );
            assert!(error.to_string().starts_with("2 of 4 ranks met at memory://"), "{error}");
        }
    }

    /// What `hello` does of its meeting before it dies: all up to the count, or that too.
    fn meet_partly(store: &Arc<MemoryStore>, hello: &Hello, is_counted: bool) {
        let deadline = Deadline::after(Duration::from_secs(9));
        let rendezvous = Rendezvous::new(store.as_ref(), hello, deadline);
        let bytes = wire::encode_body(hello).unwrap();
        rendezvous.claim(&format!("rank/{}", hello.member.rank()), &bytes).unwrap();
        rendezvous.join_host(&bytes).unwrap();
        if is_counted {
            store.add(&rendezvous.key("met"), 1, deadline).unwrap();
        }
    }

    #[test]
    fn a_rank_that_died_before_it_was_counted_is_missing() {
        let store = Arc::new(MemoryStore::new());
        meet_partly(&store, &hello(1, 2, "a"), false);
        let error = meet(&store, &hello(0, 2, "a"), 100).unwrap_err();
        assert!(matches!(&error, Error::InitTimeout { met: 1, missing, .. } if missing == &[1]), "{error}");
    }

    #[test]
    fn a_lowest_rank_that_died_before_it_wrote_the_table_is_named() {
        let store = Arc::new(MemoryStore::new());
        meet_partly(&store, &hello(0, 2, "a"), true);
        let error = meet(&store, &hello(1, 2, "a"), 100).unwrap_err();
        assert!(matches!(&error, Error::InitStalled { rank: 0, .. }), "{error}");
    }

    #[test]
    fn the_first_cause_is_found_along_the_ranks_that_it_pulled_down() {
        let store = Arc::new(MemoryStore::new());
        let hellos: Vec<Hello> = (0..4).map(|rank| hello(rank, 4, "a")).collect();
        let table = WorldTable::merge(hellos.clone()).unwrap();
        let lost = |rank| {
            let lost = unisono_node::Lost::SocketClosed;
            Error::Node(unisono_node::Error::PeerLost { rank, pid: 100 + rank as u32, lost })
        };
        let first_cause = |rank: usize, error| {
            let deadline = Deadline::after(Duration::from_secs(9));
            Rendezvous::new(store.as_ref(), &hellos[rank], deadline).first_cause(error, &table)
        };
        // Rank 0 died; rank 1 saw that, rank 2 saw rank 1 go, and rank 3 waited in vain for rank 2.
        let memory = unisono_node::Error::Missing { rank: 3, missing: vec![2], waited: Duration::ZERO };
        for (rank, error) in [(1, lost(0)), (2, lost(1)), (3, memory.into())] {
            let error = first_cause(rank, error);
            assert!(
                matches!(&error, Error::PeerDied { rank: 0, who, .. } if who == &hellos[0].who()),
                "{error}"
            );
        }
        // Rank 0 has its own reason, and tells it.
        let store = Arc::new(MemoryStore::new());
        let first_cause = |rank: usize, error| {
            let deadline = Deadline::after(Duration::from_secs(9));
            Rendezvous::new(store.as_ref(), &hellos[rank], deadline).first_cause(error, &table)
        };
        let problem = Error::Builder { problem: "no memory" };
        assert_eq!(first_cause(0, problem.clone()), problem);
        let error = first_cause(1, lost(0));
        assert!(
            matches!(&error, Error::Aborted { rank: 0, reason, .. } if reason.contains("no memory")),
            "{error}"
        );
    }

    #[test]
    fn all_ranks_take_the_secret_that_was_offered_first() {
        let store = MemoryStore::new();
        let hello = hello(0, 2, "a");
        let rendezvous = Rendezvous::new(&store, &hello, Deadline::after(Duration::from_secs(9)));
        let first = rendezvous.agree_on_secret(&Secret::new([1; 32])).unwrap();
        let second = rendezvous.agree_on_secret(&Secret::new([2; 32])).unwrap();
        assert_eq!((first.expose(), second.expose()), (&[1; 32], &[1; 32]));
    }
}
