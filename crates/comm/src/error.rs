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
        /// `key length`, `value length`, `number of keys` or `total size`.
        what: &'static str,
        /// The size that came.
        got: u64,
        /// The largest allowed.
        cap: u64,
    },
    /// The empty key, which no store takes.
    #[error("{store}: a key must have at least one byte")]
    StoreKey {
        /// The store.
        store: String,
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
    /// An address on which a store must not listen.
    #[error("a store cannot listen on {address}: {reason}")]
    StoreAddress {
        /// The address asked for.
        address: std::net::SocketAddr,
        /// Why not, and what to do instead.
        reason: &'static str,
    },
}
