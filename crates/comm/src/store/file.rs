//! A store in one file, for processes that share a file system and nothing else.
//!
//! The file is a log: changes are appended under an exclusive `flock`, and each client replays what it has not yet
//! seen into its own table. A record is `u32 length, key, u32 length, value`, little-endian; the key begins with `/`
//! for a value and with `-/` for a removal. That is the format of torch's `FileStore`, whose own counters (keys that
//! begin otherwise) are skipped; the two can share a file. A call costs one lock and one read of the new
//! records, a change one write more; a waiter asks for the file's size every 1 to 20 ms. A record that a killed writer
//! left unfinished is ignored, and cut off by the next writer.

#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod log;

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use unisono_sync::Deadline;

use self::log::{Log, REMOVAL_MARK, VALUE_MARK, encode, io_error, open_log};
use super::table::Table;
use super::{Store, admit_key, admit_keys};
use crate::error::{Error, Result};

const SHORTEST_SLEEP: Duration = Duration::from_millis(1);
const LONGEST_SLEEP: Duration = Duration::from_millis(20);
/// The lock is held for microseconds, so those who want it look more often.
const SHORTEST_LOCK_SLEEP: Duration = Duration::from_micros(20);

/// A store in a file that all ranks can open.
///
/// The file is created if it is missing, readable and writable by its owner only. It stays when the last client is
/// gone: who made the path removes it, and each job needs a fresh one. Locks are `flock` locks, which work between
/// processes of one host and on network file systems that pass them on.
#[derive(Debug)]
pub struct FileStore {
    path: PathBuf,
    name: String,
    log: Mutex<Log>,
}

impl FileStore {
    /// Opens or creates the store in the file `path`, whose directory must exist. The deadline bounds the wait for
    /// the lock.
    ///
    /// # Errors
    ///
    /// [`Error::StoreIo`] when the file cannot be opened or is no regular file, and [`Error::StoreProtocol`] when
    /// it holds something else than a store.
    pub fn open(path: impl AsRef<Path>, deadline: Deadline) -> Result<Self> {
        let given = path.as_ref();
        let path = std::path::absolute(given)
            .map_err(|error| io_error(&format!("file://{}", given.display()), "open", &error))?;
        let name = format!("file://{}", path.display());
        let file = open_log(&path).map_err(|error| io_error(&name, "open", &error))?;
        let log = Log::new(name.clone(), file);
        let store = Self { path, name, log: Mutex::new(log) };
        store.locked(FlockOperation::NonBlockingLockShared, deadline, |_| Ok(()))?;
        Ok(store)
    }

    /// Runs `work` on the log, brought up to date, under the file's lock.
    fn locked<T>(
        &self,
        lock: FlockOperation,
        deadline: Deadline,
        work: impl FnOnce(&mut Log) -> Result<T>,
    ) -> Result<T> {
        let mut log = self.take_lock(lock, deadline)?;
        let result = log.replay().and_then(|()| work(&mut log));
        let unlocked = flock(&log.file, FlockOperation::Unlock);
        let value = result?;
        unlocked.map_err(|error| io_error(&self.name, "unlock", &error.into()))?;
        Ok(value)
    }

    /// Takes the file's lock, and this client's, which it holds only while it has the file's.
    fn take_lock(&self, lock: FlockOperation, deadline: Deadline) -> Result<MutexGuard<'_, Log>> {
        let mut sleep = SHORTEST_LOCK_SLEEP;
        loop {
            let mut log = self.log();
            log.reopen_after_fork(&self.path)?;
            match flock(&log.file, lock) {
                Ok(()) => return Ok(log),
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
                Err(error) => return Err(io_error(&self.name, "lock", &error.into())),
            }
            drop(log);
            if deadline.is_over() {
                let held = io::Error::new(ErrorKind::TimedOut, "another client held it until the deadline");
                return Err(io_error(&self.name, "lock", &held));
            }
            thread::sleep(deadline.remaining_up_to(sleep));
            sleep = (sleep * 2).min(LONGEST_SLEEP);
        }
    }

    /// A change to `key`, decided by `change` on the table as it is now. The log gets the value that results.
    fn change<T>(
        &self,
        key: &str,
        deadline: Deadline,
        change: impl FnOnce(&mut Table) -> Result<T>,
    ) -> Result<T> {
        admit_key(&self.name, key)?;
        self.locked(FlockOperation::NonBlockingLockExclusive, deadline, |log| {
            let before = log.table.value(key).map(<[u8]>::to_vec);
            let result = change(&mut log.table)?;
            let after = log.table.value(key);
            if before.as_deref() == after {
                return Ok(result);
            }
            let record = match after {
                Some(value) => encode(VALUE_MARK, key, value),
                None => encode(REMOVAL_MARK, key, &[]),
            };
            if let Err(error) = log.append(&record) {
                // What was not written did not happen.
                match before {
                    Some(value) => log.table.set(key, &value)?,
                    None => _ = log.table.delete(key),
                }
                return Err(error);
            }
            Ok(result)
        })
    }

    /// Waits until all `keys` are there and gives `read` the table in which they are.
    fn when_there<T>(&self, keys: &[&str], deadline: Deadline, read: impl Fn(&Table) -> T) -> Result<T> {
        admit_keys(&self.name, keys)?;
        let begin = Instant::now();
        let mut sleep = SHORTEST_SLEEP;
        let mut seen = None;
        let mut first_missing = None;
        loop {
            let length = self.length()?;
            if seen != Some(length) {
                // The last look must not fail only because a writer holds the lock at this very moment.
                let until = if deadline.is_over() { Deadline::after(LONGEST_SLEEP) } else { deadline };
                let found = self.locked(FlockOperation::NonBlockingLockShared, until, |log| {
                    seen = Some(log.offset);
                    first_missing = keys.iter().find(|key| log.table.value(key).is_none());
                    Ok(first_missing.is_none().then(|| read(&log.table)))
                })?;
                if let Some(value) = found {
                    return Ok(value);
                }
            }
            if deadline.is_over() {
                return Err(Error::StoreTimeout {
                    store: self.name.clone(),
                    key: first_missing.map_or_else(String::new, |key| (*key).to_owned()),
                    waited: begin.elapsed(),
                });
            }
            thread::sleep(deadline.remaining_up_to(sleep));
            sleep = (sleep * 2).min(LONGEST_SLEEP);
        }
    }

    /// The length of the file now.
    fn length(&self) -> Result<u64> {
        let mut log = self.log();
        log.reopen_after_fork(&self.path)?;
        Ok(log.file.metadata().map_err(|error| io_error(&self.name, "read", &error))?.len())
    }

    // Every change of the log is complete or undone before the lock is given back, so a poisoned one is still good.
    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for FileStore {
    fn set(&self, key: &str, value: &[u8], deadline: Deadline) -> Result<()> {
        self.change(key, deadline, |table| table.set(key, value))
    }

    fn get(&self, key: &str, deadline: Deadline) -> Result<Vec<u8>> {
        self.when_there(&[key], deadline, |table| table.value(key).unwrap_or_default().to_vec())
    }

    fn wait(&self, keys: &[&str], deadline: Deadline) -> Result<()> {
        self.when_there(keys, deadline, |_| ())
    }

    fn check(&self, keys: &[&str], deadline: Deadline) -> Result<bool> {
        admit_keys(&self.name, keys)?;
        self.locked(FlockOperation::NonBlockingLockShared, deadline, |log| Ok(log.table.has_all(keys)))
    }

    fn add(&self, key: &str, amount: i64, deadline: Deadline) -> Result<i64> {
        self.change(key, deadline, |table| table.add(key, amount))
    }

    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8], deadline: Deadline) -> Result<Vec<u8>> {
        self.change(key, deadline, |table| table.compare_set(key, expected, desired))
    }

    fn delete(&self, key: &str, deadline: Deadline) -> Result<bool> {
        self.change(key, deadline, |table| Ok(table.delete(key)))
    }

    fn multi_get(&self, keys: &[&str], deadline: Deadline) -> Result<Vec<Vec<u8>>> {
        self.when_there(keys, deadline, |table| {
            keys.iter().map(|key| table.value(key).unwrap_or_default().to_vec()).collect()
        })
    }

    /// Appends `value`; the log gets the whole new value, so many appends to one long value make the file grow fast.
    fn append(&self, key: &str, value: &[u8], deadline: Deadline) -> Result<()> {
        self.change(key, deadline, |table| table.append(key, value))
    }

    fn num_keys(&self, deadline: Deadline) -> Result<u64> {
        self.locked(FlockOperation::NonBlockingLockShared, deadline, |log| Ok(log.table.len() as u64))
    }

    fn describe(&self) -> String {
        self.name.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;

    use super::*;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(5))
    }

    #[test]
    fn the_file_holds_the_documented_bytes_and_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        let store = FileStore::open(&path, soon()).unwrap();
        store.set("a", b"xyz", soon()).unwrap();
        assert_eq!(store.add("n", 5, soon()).unwrap(), 5);
        assert!(store.delete("a", soon()).unwrap());
        assert!(!store.delete("a", soon()).unwrap());
        let expected = b"\x02\0\0\0/a\x03\0\0\0xyz\x02\0\0\0/n\x01\0\0\x005\x03\0\0\0-/a\0\0\0\0";
        assert_eq!(std::fs::read(&path).unwrap(), expected);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(store.describe(), format!("file://{}", path.display()));
    }

    #[test]
    fn a_file_that_torch_wrote_is_understood() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        let bytes = b"\x09\0\0\0refcount/\x01\0\0\x001\x02\0\0\0/a\x03\0\0\0xyz";
        std::fs::write(&path, bytes).unwrap();
        let store = FileStore::open(&path, soon()).unwrap();
        assert_eq!(store.get("a", soon()).unwrap(), b"xyz");
        assert_eq!(store.num_keys(soon()).unwrap(), 1);
    }

    #[test]
    fn half_a_record_of_a_killed_writer_is_ignored_and_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        let whole = encode("/", "a", b"1");
        // Longer than what is written next, which would not cover it.
        let torn = encode("/", "b", &[b'2'; 40]);
        for cut in 1..torn.len() {
            std::fs::write(&path, [&whole[..], &torn[..cut]].concat()).unwrap();
            let store = FileStore::open(&path, soon()).unwrap();
            assert!(!store.check(&["b"], soon()).unwrap(), "cut at {cut}");
            store.set("c", b"3", soon()).unwrap();
            let expected = [&whole[..], &encode("/", "c", b"3")].concat();
            assert_eq!(std::fs::read(&path).unwrap(), expected, "cut at {cut}");
        }
    }

    #[test]
    fn what_is_no_store_is_refused_with_the_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        std::fs::write(&path, "once upon a time").unwrap();
        let error = FileStore::open(&path, soon()).unwrap_err();
        let message = "at byte 0 of the file: key length above the cap".to_owned();
        assert_eq!(error, Error::StoreProtocol { store: format!("file://{}", path.display()), message });
        assert!(matches!(FileStore::open(folder.path(), soon()), Err(Error::StoreIo { action: "open", .. })));
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(FileStore::open(&link, soon()), Err(Error::StoreIo { action: "open", .. })));
    }

    #[test]
    fn a_file_cut_under_a_client_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        let store = FileStore::open(&path, soon()).unwrap();
        store.set("a", b"1", soon()).unwrap();
        std::fs::write(&path, b"").unwrap();
        let error = store.get("a", soon()).unwrap_err();
        assert!(error.to_string().contains("the file became shorter"), "{error}");
    }

    #[test]
    fn a_lock_held_by_another_client_ends_at_the_deadline() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        let store = FileStore::open(&path, soon()).unwrap();
        let other = open_log(&path).unwrap();
        flock(&other, FlockOperation::LockExclusive).unwrap();
        let error = store.set("a", b"1", Deadline::after(Duration::from_millis(30))).unwrap_err();
        assert!(error.to_string().contains("lock failed: another client held it"), "{error}");
        drop(other);
        store.set("a", b"1", soon()).unwrap();
    }

    proptest! {
        #[test]
        fn any_bytes_are_replayed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("store");
            std::fs::write(&path, &bytes).unwrap();
            match FileStore::open(&path, soon()) {
                Ok(store) => prop_assert!(store.num_keys(soon()).unwrap() as usize <= bytes.len() / 8),
                Err(error) => prop_assert!(matches!(error, Error::StoreProtocol { .. }), "{error}"),
            }
        }
    }
}
