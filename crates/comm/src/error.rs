//! The errors of the library. Each says what was expected, what came, and which rank.

use std::time::Duration;

/// Result of the public functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong. `Clone`, so that a failed communicator can repeat its first cause cheaply.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Words, numbers or bytes that the pure logic refused.
    #[error(transparent)]
    Core(#[from] unisono_core::Error),
    /// A key did not appear in the store before the deadline.
    #[error("{store} has no `{key}` after {waited:?}. Was every rank started, and can it reach the store?")]
    StoreTimeout {
        /// The store, as `tcp://10.0.0.5:29500`.
        store: String,
        /// The (first) key waited for.
        key: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The store could not be reached, or its connection broke.
    #[error("{store}: {action} failed: {message}")]
    StoreIo {
        /// The store, as `tcp://10.0.0.5:29500`.
        store: String,
        /// What was being done, for example `connect` or `set`.
        action: &'static str,
        /// What the system said.
        message: String,
    },
    /// A key, a value or the number of keys is above the store's cap; nothing was stored.
    #[error("{store}: {what} of {got} is above the cap of {cap}; nothing was stored")]
    StoreLimit {
        /// The store.
        store: String,
        /// `key length`, `value length` or `number of keys`.
        what: &'static str,
        /// The size that came.
        got: u64,
        /// The largest allowed.
        cap: u64,
    },
    /// The other end of a store connection said something that is not of its protocol.
    #[error("{store}: the other end does not speak our protocol: {message}")]
    StoreProtocol {
        /// The store.
        store: String,
        /// What came, and what should have come.
        message: String,
    },
    /// `add` on a value that is no integer, or whose sum does not fit into 64 bits.
    #[error("{store}: `{key}` cannot be added to: {message}")]
    StoreValue {
        /// The store.
        store: String,
        /// The key.
        key: String,
        /// What its value is.
        message: String,
    },
    /// Nothing says that a launcher started this process.
    #[error(
        "this process is no rank of a job: RANK and WORLD_SIZE are not set (looked for: unisono run, torchrun, Open MPI, PMI, Slurm). Start with: unisono run -n 4 -- PROGRAM"
    )]
    LaunchNothing,
    /// One of two variables that belong together is missing.
    #[error(
        "{set} is set but {missing} is not (looked for: unisono run, torchrun, Open MPI, PMI, Slurm). Start with: unisono run -n 4 -- PROGRAM"
    )]
    LaunchHalfSet {
        /// The one that is set, as `RANK=0`.
        set: String,
        /// The one that is missing.
        missing: &'static str,
    },
    /// A rank that is not below its world size.
    #[error("{rank_name}={rank} does not fit {size_name}={size}: ranks go from 0 to {size_name} − 1")]
    LaunchRank {
        /// The variable that gives the rank.
        rank_name: &'static str,
        /// The rank.
        rank: usize,
        /// The variable that gives the number of ranks.
        size_name: &'static str,
        /// The number of ranks.
        size: usize,
    },
    /// Ranks on several hosts, and no store that all can reach.
    #[error(
        "{launcher} started {world_size} ranks on several hosts and tells them no place to meet. Set UNISONO_STORE=tcp://HOST:PORT on all of them, with a host that all can reach (for example that of rank 0) and a free port"
    )]
    LaunchHosts {
        /// The launcher.
        launcher: &'static str,
        /// The world size.
        world_size: usize,
    },
    /// Several ranks, and nothing that says where they meet.
    #[error(
        "{launcher} says that there are {world_size} ranks, but not where they meet: neither MASTER_ADDR and MASTER_PORT nor UNISONO_STORE are set. Start with: unisono run -n {world_size} -- PROGRAM"
    )]
    LaunchNoStore {
        /// The launcher.
        launcher: &'static str,
        /// The world size.
        world_size: usize,
    },
    /// The job's secret is not where it should be. Never shows any of it.
    #[error("the job's secret cannot be read from {from}: {message}")]
    SecretSource {
        /// Where it should be, as `UNISONO_SECRET_FD=7`.
        from: String,
        /// What is wrong there.
        message: String,
    },
    /// The private directory for the files of a job cannot be used.
    #[error("the job directory {path} {message}")]
    JobDirectory {
        /// Its path.
        path: String,
        /// What is wrong with it.
        message: String,
    },
}
