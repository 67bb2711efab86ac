//! A store for the threads of one process: a map behind a mutex, and a condition variable for those who wait.
//!
//! Nothing leaves the process and nothing can break. A call costs one lock; every change wakes all waiters, who look
//! again for their keys.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use unisono_sync::Deadline;

use super::table::{Limits, Table};
use super::{Store, admit_key, admit_keys};
use crate::error::{Error, Result};

const NAME: &str = "memory://";
/// A waiter without a deadline looks again this often, whatever happens.
const LONGEST_SLEEP: Duration = Duration::from_secs(3600);

/// A store in the memory of this process. Clones share one map.
///
/// ```
/// use std::{thread, time::Duration};
/// use unisono::{Deadline, store::{MemoryStore, Store}};
///
/// let store = MemoryStore::new();
/// let deadline = Deadline::after(Duration::from_secs(5));
/// let other = store.clone();
/// let setter = thread::spawn(move || other.set("answer", b"42", deadline));
/// assert_eq!(store.get("answer", deadline)?, b"42");
/// # setter.join().unwrap()?;
/// # Ok::<(), unisono::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    table: Mutex<Table>,
    changed: Condvar,
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        let table = Mutex::new(Table::new(Limits::default(), NAME.to_owned()));
        Self { shared: Arc::new(Shared { table, changed: Condvar::new() }) }
    }

    // The table is whole between any two of its calls, so a poisoned lock is still good.
    fn table(&self) -> MutexGuard<'_, Table> {
        self.shared.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One change under the lock; wakes those who wait if it was made.
    fn change<T>(&self, key: &str, change: impl FnOnce(&mut Table) -> Result<T>) -> Result<T> {
        admit_key(NAME, key)?;
        let result = change(&mut self.table());
        if result.is_ok() {
            self.shared.changed.notify_all();
        }
        result
    }

    /// Waits until all `keys` are there and gives `read` the table in which they are.
    fn when_there<T>(&self, keys: &[&str], deadline: Deadline, read: impl FnOnce(&Table) -> T) -> Result<T> {
        admit_keys(NAME, keys)?;
        let begin = Instant::now();
        let mut table = self.table();
        while let Some(missing) = keys.iter().find(|key| table.value(key).is_none()) {
            if deadline.is_over() {
                return Err(Error::StoreTimeout {
                    store: NAME.to_owned(),
                    key: (*missing).to_owned(),
                    waited: begin.elapsed(),
                });
            }
            let sleep = deadline.remaining_up_to(LONGEST_SLEEP);
            table = self.shared.changed.wait_timeout(table, sleep).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(read(&table))
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl Store for MemoryStore {
    fn set(&self, key: &str, value: &[u8], _deadline: Deadline) -> Result<()> {
        self.change(key, |table| table.set(key, value))
    }

    fn get(&self, key: &str, deadline: Deadline) -> Result<Vec<u8>> {
        self.when_there(&[key], deadline, |table| table.value(key).unwrap_or_default().to_vec())
    }

    fn wait(&self, keys: &[&str], deadline: Deadline) -> Result<()> {
        self.when_there(keys, deadline, |_| ())
    }

    fn check(&self, keys: &[&str], _deadline: Deadline) -> Result<bool> {
        admit_keys(NAME, keys)?;
        Ok(self.table().has_all(keys))
    }

    fn add(&self, key: &str, amount: i64, _deadline: Deadline) -> Result<i64> {
        self.change(key, |table| table.add(key, amount))
    }

    fn compare_set(
        &self,
        key: &str,
        expected: &[u8],
        desired: &[u8],
        _deadline: Deadline,
    ) -> Result<Vec<u8>> {
        self.change(key, |table| table.compare_set(key, expected, desired))
    }

    fn delete(&self, key: &str, _deadline: Deadline) -> Result<bool> {
        self.change(key, |table| Ok(table.delete(key)))
    }

    fn multi_get(&self, keys: &[&str], deadline: Deadline) -> Result<Vec<Vec<u8>>> {
        self.when_there(keys, deadline, |table| {
            keys.iter().map(|key| table.value(key).unwrap_or_default().to_vec()).collect()
        })
    }

    fn append(&self, key: &str, value: &[u8], _deadline: Deadline) -> Result<()> {
        self.change(key, |table| table.append(key, value))
    }

    fn num_keys(&self, _deadline: Deadline) -> Result<u64> {
        Ok(self.table().len() as u64)
    }

    fn describe(&self) -> String {
        NAME.to_owned()
    }
}
