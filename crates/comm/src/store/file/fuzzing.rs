//! A file that somebody else wrote, opened as a store.

use std::fs::File;
use std::io::Write;

use rustix::fs::{MemfdFlags, memfd_create};

use super::*;

/// The content of the file.
///
/// # Panics
/// If what was replayed is not replayed again, or a record behind it cannot be read.
pub fn file_log(content: &[u8]) {
    let mut file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(content).unwrap();
    let open = || Log::new("file://fuzz".to_owned(), file.try_clone().unwrap());
    let mut log = open();
    if let Err(error) = log.replay() {
        return drop(error.to_string());
    }
    assert!(log.offset <= content.len() as u64);
    log.append(&encode(VALUE_MARK, "last", b"value")).unwrap();
    let mut again = open();
    again.replay().unwrap();
    assert_eq!((again.offset, again.table.value("last")), (log.offset, Some(&b"value"[..])));
    let others = |log: &Log| log.table.keys().filter(|key| *key != "last").count();
    assert_eq!(others(&again), others(&log));
}

/// Values, removals, a key of torch's own, and a record that was left half-written.
pub fn file_seeds() -> Vec<Vec<u8>> {
    let records = [
        encode(VALUE_MARK, "a", b"one"),
        encode(VALUE_MARK, "b", &[0xff; 40]),
        encode(REMOVAL_MARK, "a", &[]),
        encode("", "barrier_count", b"1"),
    ];
    let whole = records.concat();
    let cut = whole[..whole.len() - 3].to_vec();
    vec![whole, cut, Vec::new()]
}
