//! Who reaches whom, and how: computed by every rank from the same world table, so that all agree.

use serde::Serialize;

use crate::hello::{HostIdentity, WorldTable};

/// How two ranks reach each other, fastest first.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[non_exhaustive]
pub enum Link {
    /// A rank and itself.
    Itself,
    /// Loads and stores in shared memory of one host.
    SharedMemory,
    /// Messages between hosts.
    Network,
}

impl Link {
    /// The short name of the topology matrix.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Itself => "self",
            Self::SharedMemory => "SHM",
            Self::Network => "NET",
        }
    }
}

/// One host and its ranks, ascending.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// Its ranks, ascending.
    pub ranks: Vec<usize>,
}

/// The hosts of a world, in the order of their lowest ranks, and which ranks each has.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Topology {
    hosts: Vec<Host>,
    host_of: Vec<usize>,
}

impl Topology {
    /// The topology of this table.
    pub fn new(table: &WorldTable) -> Self {
        let mut hosts: Vec<Host> = Vec::new();
        let mut identities: Vec<&HostIdentity> = Vec::new();
        let mut keys = std::collections::HashMap::new();
        let mut host_of = Vec::with_capacity(table.hellos().len());
        for (rank, hello) in table.hellos().iter().enumerate() {
            let host = *keys.entry(hello.host.key()).or_insert_with(|| {
                identities.push(&hello.host);
                hosts.push(Host { name: hello.host.name.clone(), ranks: Vec::new() });
                hosts.len() - 1
            });
            hosts[host].ranks.push(rank);
            host_of.push(host);
        }
        // Containers of one machine often share its name: what tells them apart is told.
        for (host, identity) in hosts.iter_mut().zip(&identities) {
            if identities
                .iter()
                .any(|other| other.boot_id == identity.boot_id && !other.is_same_host(identity))
            {
                host.name = format!("{} in network namespace {}", identity.name, identity.network_namespace);
            }
        }
        Self { hosts, host_of }
    }

    /// All ranks in one process: one host.
    pub fn one_host(name: &str, world_size: usize) -> Self {
        let hosts = vec![Host { name: name.to_owned(), ranks: (0..world_size).collect() }];
        Self { hosts, host_of: vec![0; world_size] }
    }

    /// The topology of some of these ranks: `ranks[r]` is the number here of what becomes rank r.
    #[must_use]
    pub fn of(&self, ranks: &[usize]) -> Self {
        let mut hosts: Vec<Host> = Vec::new();
        let mut numbers = std::collections::HashMap::new();
        let mut host_of = Vec::with_capacity(ranks.len());
        for (rank, old) in ranks.iter().enumerate() {
            let host = *numbers.entry(self.host_of[*old]).or_insert_with(|| {
                hosts.push(Host { name: self.hosts[self.host_of[*old]].name.clone(), ranks: Vec::new() });
                hosts.len() - 1
            });
            hosts[host].ranks.push(rank);
            host_of.push(host);
        }
        Self { hosts, host_of }
    }

    /// The hosts, in the order of their lowest ranks.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The ranks whose memory `rank` can load and store, itself included, ascending.
    pub fn local_ranks(&self, rank: usize) -> &[usize] {
        &self.hosts[self.host_of[rank]].ranks
    }

    /// The place of `rank` among the ranks of its host.
    pub fn local_rank(&self, rank: usize) -> usize {
        self.local_ranks(rank).partition_point(|other| *other < rank)
    }

    /// How `a` reaches `b`.
    pub fn link(&self, a: usize, b: usize) -> Link {
        if a == b {
            Link::Itself
        } else if self.host_of[a] == self.host_of[b] {
            Link::SharedMemory
        } else {
            Link::Network
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hello::tests::hello;

    #[test]
    fn ranks_are_grouped_by_host_however_they_are_dealt() {
        let hosts = ["a", "b", "a", "b", "c"];
        let table =
            WorldTable::merge(hosts.iter().enumerate().map(|(rank, host)| hello(rank, 5, host))).unwrap();
        let topology = Topology::new(&table);
        assert_eq!(topology.hosts().len(), 3);
        assert_eq!(topology.local_ranks(3), [1, 3]);
        assert_eq!((topology.local_rank(1), topology.local_rank(3)), (0, 1));
        assert_eq!(topology.link(0, 2), Link::SharedMemory);
        assert_eq!(topology.link(0, 1), Link::Network);
        assert_eq!(topology.link(4, 4), Link::Itself);
    }

    #[test]
    fn some_ranks_keep_their_hosts_under_new_numbers() {
        let hosts = ["a", "b", "a", "b", "c"];
        let table =
            WorldTable::merge(hosts.iter().enumerate().map(|(rank, host)| hello(rank, 5, host))).unwrap();
        let some = Topology::new(&table).of(&[3, 2, 1]);
        let names: Vec<&str> = some.hosts().iter().map(|host| &*host.name).collect();
        assert_eq!(
            (names, some.local_ranks(0), some.local_ranks(1)),
            (vec!["b", "a"], &[0, 2][..], &[1][..])
        );
    }

    #[test]
    fn threads_of_one_process_are_one_host() {
        let topology = Topology::one_host("laptop", 3);
        assert_eq!(topology.local_ranks(1), [0, 1, 2]);
        assert_eq!(topology.link(0, 2), Link::SharedMemory);
    }
}
