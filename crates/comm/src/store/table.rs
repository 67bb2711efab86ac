//! The map behind every store that we keep ourselves: pure logic, no locks, no clock, no IO.
//!
//! All limits are checked before anything changes, so a refused call leaves the table as it was. Sizes are counted
//! as key bytes plus value bytes. Each call is one hash look-up.

use std::collections::HashMap;

use super::{MAX_KEY_BYTES, MAX_KEYS, MAX_VALUE_BYTES};
use crate::error::{Error, Result};

/// What a table may hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// The longest key.
    pub(crate) key_bytes: usize,
    /// The longest value.
    pub(crate) value_bytes: usize,
    /// The most keys.
    pub(crate) keys: usize,
    /// The most bytes of all keys and values together.
    pub(crate) total_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            key_bytes: MAX_KEY_BYTES,
            value_bytes: MAX_VALUE_BYTES,
            keys: MAX_KEYS,
            total_bytes: 1024 * 1024 * 1024,
        }
    }
}

/// Keys and values under [`Limits`]; errors name the store as `name`.
#[derive(Debug)]
pub(crate) struct Table {
    entries: HashMap<String, Vec<u8>>,
    bytes: usize,
    limits: Limits,
    name: String,
}

impl Table {
    /// An empty table of the store `name`.
    pub(crate) fn new(limits: Limits, name: String) -> Self {
        Self { entries: HashMap::new(), bytes: 0, limits, name }
    }

    /// Stores `value` under `key`, replacing what was there.
    pub(crate) fn set(&mut self, key: &str, value: &[u8]) -> Result<()> {
        self.admit(key, value.len())?;
        self.bytes -= self.entries.get(key).map_or(0, |old| key.len() + old.len());
        self.bytes += key.len() + value.len();
        match self.entries.get_mut(key) {
            Some(old) => {
                old.clear();
                old.extend_from_slice(value);
            }
            None => {
                self.entries.insert(key.to_owned(), value.to_vec());
            }
        }
        Ok(())
    }

    /// The value of `key`.
    pub(crate) fn value(&self, key: &str) -> Option<&[u8]> {
        self.entries.get(key).map(Vec::as_slice)
    }

    /// Whether all `keys` are there.
    pub(crate) fn has_all(&self, keys: &[&str]) -> bool {
        keys.iter().all(|key| self.entries.contains_key(*key))
    }

    /// Adds `amount` to the decimal integer under `key`, 0 if missing.
    pub(crate) fn add(&mut self, key: &str, amount: i64) -> Result<i64> {
        let old = match self.entries.get(key) {
            None => 0,
            Some(value) => parse_integer(value).ok_or_else(|| {
                self.value_error(key, format!("its {} bytes are no 64-bit decimal integer", value.len()))
            })?,
        };
        let sum = old
            .checked_add(amount)
            .ok_or_else(|| self.value_error(key, format!("{old} + {amount} does not fit into 64 bits")))?;
        self.set(key, sum.to_string().as_bytes())?;
        Ok(sum)
    }

    /// Replaces the value of `key` by `desired` if it equals `expected`; an empty `expected` matches a missing key.
    /// Returns what is there afterwards, or `expected` when the key is missing.
    pub(crate) fn compare_set(&mut self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>> {
        let matches = match self.entries.get(key) {
            Some(value) if value != expected => return Ok(value.clone()),
            Some(_) => true,
            None => expected.is_empty(),
        };
        if !matches {
            self.admit(key, expected.len())?;
            return Ok(expected.to_vec());
        }
        self.set(key, desired)?;
        Ok(desired.to_vec())
    }

    /// Removes `key`; true if it was there.
    pub(crate) fn delete(&mut self, key: &str) -> bool {
        let removed = self.entries.remove(key);
        self.bytes -= removed.as_ref().map_or(0, |value| key.len() + value.len());
        removed.is_some()
    }

    /// Appends `value` to the value of `key`, empty if missing.
    pub(crate) fn append(&mut self, key: &str, value: &[u8]) -> Result<()> {
        let old = self.entries.get(key).map_or(0, Vec::len);
        self.admit(key, old.saturating_add(value.len()))?;
        if old == 0 {
            return self.set(key, value);
        }
        if let Some(entry) = self.entries.get_mut(key) {
            entry.extend_from_slice(value);
            self.bytes += value.len();
        }
        Ok(())
    }

    /// The number of keys.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// All keys, in no order.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether `key` may be stored with a value of `value_bytes`.
    fn admit(&self, key: &str, value_bytes: usize) -> Result<()> {
        let old = self.entries.get(key);
        let keys = self.entries.len() + usize::from(old.is_none());
        let old_bytes = old.map_or(0, |value| key.len() + value.len());
        let total = (self.bytes - old_bytes).saturating_add(key.len()).saturating_add(value_bytes);
        for (what, got, cap) in [
            ("key length", key.len(), self.limits.key_bytes),
            ("value length", value_bytes, self.limits.value_bytes),
            ("number of keys", keys, self.limits.keys),
            ("total size", total, self.limits.total_bytes),
        ] {
            if got > cap {
                return Err(Error::StoreLimit {
                    store: self.name.clone(),
                    what,
                    got: got as u64,
                    cap: cap as u64,
                });
            }
        }
        Ok(())
    }

    fn value_error(&self, key: &str, message: String) -> Error {
        Error::StoreValue { store: self.name.clone(), key: key.to_owned(), message }
    }
}

/// The ASCII decimal in `value`.
fn parse_integer(value: &[u8]) -> Option<i64> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Table {
        Table::new(Limits { key_bytes: 4, value_bytes: 8, keys: 2, total_bytes: 12 }, "test://".to_owned())
    }

    fn limit(what: &'static str, got: u64, cap: u64) -> Result<()> {
        Err(Error::StoreLimit { store: "test://".to_owned(), what, got, cap })
    }

    #[test]
    fn each_limit_is_checked_and_a_refused_call_changes_nothing() {
        let mut table = small();
        assert_eq!(table.set("abcde", b""), limit("key length", 5, 4));
        assert_eq!(table.set("a", b"123456789"), limit("value length", 9, 8));
        table.set("a", b"12345").unwrap();
        assert_eq!(table.set("b", b"123456"), limit("total size", 13, 12));
        table.set("b", b"12345").unwrap();
        assert_eq!(table.set("c", b""), limit("number of keys", 3, 2));
        assert_eq!(table.append("a", b"6"), limit("total size", 13, 12));
        assert_eq!(table.value("a"), Some(&b"12345"[..]));
        assert_eq!(table.len(), 2);
        assert!(table.delete("b"));
        table.append("a", b"678").unwrap();
        assert_eq!(table.append("a", b"9"), limit("value length", 9, 8));
        assert_eq!(table.value("a"), Some(&b"12345678"[..]));
    }

    #[test]
    fn an_integer_that_cannot_be_added_to_stays() {
        let mut table = small();
        table.set("a", b"x1").unwrap();
        assert!(matches!(table.add("a", 1), Err(Error::StoreValue { key, .. }) if key == "a"));
        assert_eq!(table.value("a"), Some(&b"x1"[..]));
        let mut table = Table::new(Limits::default(), "test://".to_owned());
        assert_eq!(table.add("n", i64::MAX).unwrap(), i64::MAX);
        assert!(matches!(table.add("n", 1), Err(Error::StoreValue { .. })));
        assert_eq!(table.add("n", -1).unwrap(), i64::MAX - 1);
    }

    #[test]
    fn compare_set_follows_the_documented_rule_for_missing_keys() {
        let mut table = small();
        assert_eq!(table.compare_set("a", b"old", b"new").unwrap(), b"old");
        assert_eq!(table.value("a"), None);
        assert_eq!(table.compare_set("a", b"", b"new").unwrap(), b"new");
        assert_eq!(table.compare_set("a", b"", b"x").unwrap(), b"new");
        assert_eq!(table.compare_set("a", b"new", b"x").unwrap(), b"x");
        assert!(table.has_all(&["a"]) && !table.has_all(&["a", "b"]));
        assert_eq!(table.keys().collect::<Vec<_>>(), ["a"]);
    }
}
