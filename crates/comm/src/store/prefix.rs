//! A store inside another store: every key gets `prefix/` in front, so that several users share one store.
//!
//! It holds nothing of its own and costs one small string per key. Errors come from the store inside and name the key
//! with its prefix.

use std::sync::Arc;

use unisono_sync::Deadline;

use super::{Store, admit_key};
use crate::error::Result;

/// `key` of this store is `prefix/key` of the store inside.
///
/// Two values with the same prefix over the same store are the same store. Only [`Store::num_keys`] sees through: it
/// counts *all* keys of the store inside, because a store cannot count the keys of a prefix.
///
/// ```
/// use std::{sync::Arc, time::Duration};
/// use unisono::{Deadline, store::{MemoryStore, PrefixStore, Store}};
///
/// let whole = Arc::new(MemoryStore::new());
/// let part = PrefixStore::new("job/7", whole.clone());
/// let deadline = Deadline::after(Duration::from_secs(1));
/// part.set("hello", b"rank 0", deadline)?;
/// assert_eq!(whole.get("job/7/hello", deadline)?, b"rank 0");
/// # Ok::<(), unisono::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct PrefixStore {
    prefix: String,
    store: Arc<dyn Store>,
}

impl PrefixStore {
    /// The part of `store` whose keys begin with `prefix/`.
    pub fn new(prefix: impl Into<String>, store: Arc<dyn Store>) -> Self {
        Self { prefix: prefix.into(), store }
    }

    fn full(&self, key: &str) -> Result<String> {
        admit_key(&self.describe(), key)?;
        Ok(format!("{}/{key}", self.prefix))
    }

    fn with_full<T>(&self, keys: &[&str], call: impl FnOnce(&[&str]) -> Result<T>) -> Result<T> {
        let full = keys.iter().map(|key| self.full(key)).collect::<Result<Vec<_>>>()?;
        call(&full.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

impl Store for PrefixStore {
    fn set(&self, key: &str, value: &[u8], deadline: Deadline) -> Result<()> {
        self.store.set(&self.full(key)?, value, deadline)
    }

    fn get(&self, key: &str, deadline: Deadline) -> Result<Vec<u8>> {
        self.store.get(&self.full(key)?, deadline)
    }

    fn wait(&self, keys: &[&str], deadline: Deadline) -> Result<()> {
        self.with_full(keys, |full| self.store.wait(full, deadline))
    }

    fn check(&self, keys: &[&str], deadline: Deadline) -> Result<bool> {
        self.with_full(keys, |full| self.store.check(full, deadline))
    }

    fn add(&self, key: &str, amount: i64, deadline: Deadline) -> Result<i64> {
        self.store.add(&self.full(key)?, amount, deadline)
    }

    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8], deadline: Deadline) -> Result<Vec<u8>> {
        self.store.compare_set(&self.full(key)?, expected, desired, deadline)
    }

    fn delete(&self, key: &str, deadline: Deadline) -> Result<bool> {
        self.store.delete(&self.full(key)?, deadline)
    }

    fn multi_get(&self, keys: &[&str], deadline: Deadline) -> Result<Vec<Vec<u8>>> {
        self.with_full(keys, |full| self.store.multi_get(full, deadline))
    }

    fn append(&self, key: &str, value: &[u8], deadline: Deadline) -> Result<()> {
        self.store.append(&self.full(key)?, value, deadline)
    }

    /// The number of keys of the whole store inside, whatever their prefix.
    fn num_keys(&self, deadline: Deadline) -> Result<u64> {
        self.store.num_keys(deadline)
    }

    fn describe(&self) -> String {
        format!("{}#{}", self.store.describe(), self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::store::MemoryStore;

    #[test]
    fn prefixes_keep_apart_what_has_the_same_key_and_nest() {
        let deadline = Deadline::after(Duration::from_secs(5));
        let whole: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let a: Arc<dyn Store> = Arc::new(PrefixStore::new("a", whole.clone()));
        let inner = PrefixStore::new("b", a.clone());
        a.set("k", b"1", deadline).unwrap();
        inner.set("k", b"2", deadline).unwrap();
        assert_eq!(whole.multi_get(&["a/k", "a/b/k"], deadline).unwrap(), [b"1", b"2"]);
        assert_eq!(inner.num_keys(deadline).unwrap(), 2);
        assert_eq!(inner.describe(), "memory://#a#b");
    }

    #[test]
    fn an_empty_key_is_refused_although_the_prefix_would_make_it_longer() {
        let store = PrefixStore::new("a", Arc::new(MemoryStore::new()));
        let error = store.set("", b"1", Deadline::NEVER).unwrap_err();
        assert_eq!(error.to_string(), "memory://#a: a key must have at least one byte");
    }
}
