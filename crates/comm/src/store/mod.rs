//! Stores: where the ranks of a job meet. One trait, a file per implementation, one conformance suite for all.

mod file;
mod interface;
mod memory;
mod prefix;
mod table;
mod tcp;
mod torch;

/// The fuzz targets of all stores.
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing {
    pub use super::file::fuzzing::*;
    pub use super::tcp::fuzzing::*;
    pub use super::torch::fuzzing::*;
}

use std::fmt;

use unisono_sync::Deadline;

use crate::error::{Error, Result};

pub use self::file::FileStore;
pub use self::interface::interface_address;
pub use self::memory::MemoryStore;
pub use self::prefix::PrefixStore;
pub use self::tcp::{StoreServer, StoreServerConfig, TcpStore};
pub use self::torch::{TorchStore, TorchStoreServer};

/// A small key-value store that all ranks of a job can reach.
///
/// Every function may be called from any thread, by any rank, at any time. Each takes the deadline after which it
/// answers [`crate::Error::StoreTimeout`] (or `StoreIo` when the store cannot be reached) instead of waiting on.
/// Keys are non-empty UTF-8 of at most [`MAX_KEY_BYTES`]; values any bytes up to [`MAX_VALUE_BYTES`]; a store holds
/// at most [`MAX_KEYS`]; more is [`crate::Error::StoreLimit`] and stores nothing.
pub trait Store: Send + Sync + fmt::Debug {
    /// Stores `value` under `key`, replacing what was there.
    fn set(&self, key: &str, value: &[u8], deadline: Deadline) -> Result<()>;

    /// The value of `key`, waiting for it to appear.
    fn get(&self, key: &str, deadline: Deadline) -> Result<Vec<u8>>;

    /// Returns once all `keys` are there.
    fn wait(&self, keys: &[&str], deadline: Deadline) -> Result<()>;

    /// Whether all `keys` are there now.
    fn check(&self, keys: &[&str], deadline: Deadline) -> Result<bool>;

    /// Adds `amount` to the decimal integer under `key` (0 if missing), atomically, and returns the sum. The value is
    /// kept as ASCII decimal.
    fn add(&self, key: &str, amount: i64, deadline: Deadline) -> Result<i64>;

    /// Replaces the value of `key` by `desired` if it equals `expected`, atomically; an empty `expected` matches a
    /// missing key. Returns the value after the call (`expected` if the key is missing and `expected` is not empty).
    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8], deadline: Deadline) -> Result<Vec<u8>>;

    /// Removes `key`; true if it was there.
    fn delete(&self, key: &str, deadline: Deadline) -> Result<bool>;

    /// The values of all `keys`, in order, waiting for them to appear.
    fn multi_get(&self, keys: &[&str], deadline: Deadline) -> Result<Vec<Vec<u8>>>;

    /// Appends `value` to the value of `key` (empty if missing), atomically.
    fn append(&self, key: &str, value: &[u8], deadline: Deadline) -> Result<()>;

    /// The number of keys.
    fn num_keys(&self, deadline: Deadline) -> Result<u64>;

    /// Where it is, for messages: `tcp://10.0.0.5:29500`, `memory://`, `file:///…`.
    fn describe(&self) -> String;
}

/// The longest key.
pub const MAX_KEY_BYTES: usize = 8 * 1024;
/// The longest value.
pub const MAX_VALUE_BYTES: usize = 8 * 1024 * 1024;
/// The most keys that a store of ours holds.
pub const MAX_KEYS: usize = 131_072;

/// Refuses a key that no store takes: an empty one, or one above [`MAX_KEY_BYTES`].
pub(crate) fn admit_key(store: &str, key: &str) -> Result<()> {
    if key.is_empty() {
        return Err(Error::StoreKey { store: store.to_owned() });
    }
    if key.len() > MAX_KEY_BYTES {
        return Err(Error::StoreLimit {
            store: store.to_owned(),
            what: "key length",
            got: key.len() as u64,
            cap: MAX_KEY_BYTES as u64,
        });
    }
    Ok(())
}

/// [`admit_key`] for many; at most [`MAX_KEYS`] of them.
pub(crate) fn admit_keys(store: &str, keys: &[&str]) -> Result<()> {
    if keys.len() > MAX_KEYS {
        return Err(Error::StoreLimit {
            store: store.to_owned(),
            what: "number of keys",
            got: keys.len() as u64,
            cap: MAX_KEYS as u64,
        });
    }
    keys.iter().try_for_each(|key| admit_key(store, key))
}

/// Refuses a value above [`MAX_VALUE_BYTES`].
pub(crate) fn admit_value(store: &str, value: &[u8]) -> Result<()> {
    if value.len() > MAX_VALUE_BYTES {
        return Err(Error::StoreLimit {
            store: store.to_owned(),
            what: "value length",
            got: value.len() as u64,
            cap: MAX_VALUE_BYTES as u64,
        });
    }
    Ok(())
}
