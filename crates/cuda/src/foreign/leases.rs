//! Things of which a process may have one for each key: made for the first who asks, shared, and gone with the last.
//!
//! The table is locked while something is made and while it goes, so that nobody gets what is about to go, and nothing is
//! made again before it is gone.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// All there are now.
#[derive(Debug)]
pub(super) struct Leases<K, V> {
    entries: Mutex<Vec<Entry<K, V>>>,
}

#[derive(Debug)]
struct Entry<K, V> {
    key: K,
    users: usize,
    value: V,
}

/// A user of one of them.
#[derive(Debug)]
pub(super) struct Lease<K: PartialEq + 'static, V: 'static> {
    table: &'static Leases<K, V>,
    key: K,
}

impl<K: Clone + PartialEq, V> Leases<K, V> {
    pub(super) const fn new() -> Self {
        Self { entries: Mutex::new(Vec::new()) }
    }

    fn entries(&self) -> MutexGuard<'_, Vec<Entry<K, V>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What there is for `key`, made now if there is none, and what `tell` says of it.
    pub(super) fn take<R, E>(
        &'static self,
        key: K,
        make: impl FnOnce() -> Result<V, E>,
        tell: impl FnOnce(&V) -> R,
    ) -> Result<(Lease<K, V>, R), E> {
        let mut entries = self.entries();
        let at = match entries.iter().position(|entry| entry.key == key) {
            Some(at) => at,
            None => {
                let value = make()?;
                entries.push(Entry { key: key.clone(), users: 0, value });
                entries.len() - 1
            }
        };
        entries[at].users += 1;
        let told = tell(&entries[at].value);
        Ok((Lease { table: self, key }, told))
    }
}

impl<K: PartialEq + 'static, V: 'static> Drop for Lease<K, V> {
    fn drop(&mut self) {
        let mut entries = self.table.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(at) = entries.iter().position(|entry| entry.key == self.key) else { return };
        entries[at].users -= 1;
        if entries[at].users == 0 {
            entries.swap_remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn what_is_there_is_shared_and_goes_with_its_last_user() {
        static TABLE: Leases<u32, Arc<String>> = Leases::new();
        let take = |key, what: &'static str| {
            TABLE.take(key, || Ok::<_, ()>(Arc::new(what.to_owned())), Arc::downgrade).unwrap()
        };
        let (first, value) = take(1, "one");
        let (second, same) = take(1, "never made");
        let (third, other) = take(2, "two");
        assert!(value.ptr_eq(&same));
        assert_eq!(other.upgrade(), Some(Arc::new("two".to_owned())));
        drop(first);
        assert_eq!(value.upgrade(), Some(Arc::new("one".to_owned())), "it still has a user");
        drop(second);
        assert_eq!(value.upgrade(), None);
        let (again, anew) = take(1, "one again");
        assert_eq!(anew.upgrade(), Some(Arc::new("one again".to_owned())));
        drop((third, again));
        assert!(TABLE.entries().is_empty());
    }

    #[test]
    fn what_cannot_be_made_is_not_there() {
        static TABLE: Leases<u32, u32> = Leases::new();
        let failed = TABLE.take(1, || Err("no"), |_| ()).unwrap_err();
        assert_eq!((failed, TABLE.entries().len()), ("no", 0));
    }
}
