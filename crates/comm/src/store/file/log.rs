//! The log in the file of a [`super::FileStore`]: records encoded, decoded, replayed and appended.
//!
//! Replaying reads the file in pieces of 64 KiB and keeps of them what is no whole record yet, so memory is bounded by
//! the longest record, whatever lengths the file claims. The caller holds the file's lock.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use crate::error::{Error, Result};
use crate::store::table::{Limits, Table};
use crate::store::{MAX_KEY_BYTES, MAX_VALUE_BYTES};

/// How much of the file is read at once.
const CHUNK_BYTES: usize = 64 * 1024;
/// The longest log. Nothing is ever taken out of a log, so a store that counts forever ends here with an error.
const MAX_FILE_BYTES: u64 = 4 << 30;

/// The file, and what was replayed of it.
#[derive(Debug)]
pub(super) struct Log {
    name: String,
    pub(super) file: File,
    /// The process that opened `file`.
    process: u32,
    /// Where the first record begins that was not replayed.
    pub(super) offset: u64,
    pub(super) table: Table,
}

impl Log {
    /// The log in `file`, of which nothing was replayed yet; errors name the store as `name`.
    pub(super) fn new(name: String, file: File) -> Self {
        let table = Table::new(Limits::default(), name.clone());
        Self { name, file, process: std::process::id(), offset: 0, table }
    }

    /// After a fork parent and child would share one lock, which keeps neither out: the child opens its own.
    pub(super) fn reopen_after_fork(&mut self, path: &Path) -> Result<()> {
        let process = std::process::id();
        if self.process != process {
            self.file = open_log(path).map_err(|error| io_error(&self.name, "open", &error))?;
            self.process = process;
        }
        Ok(())
    }

    /// Replays the records behind `offset`. Call it under the file's lock.
    pub(super) fn replay(&mut self) -> Result<()> {
        let length = self.file.metadata().map_err(|error| io_error(&self.name, "read", &error))?.len();
        if length < self.offset {
            return Err(self.malformed(length, "the file became shorter"));
        }
        let mut unread: Vec<u8> = Vec::new();
        let mut position = self.offset;
        while position < length {
            let kept = unread.len();
            let wanted = usize::try_from(length - position).unwrap_or(usize::MAX).min(CHUNK_BYTES);
            unread.resize(kept + wanted, 0);
            let count = self
                .file
                .read_at(&mut unread[kept..], position)
                .map_err(|error| io_error(&self.name, "read", &error))?;
            unread.truncate(kept + count);
            if count == 0 {
                break;
            }
            position += count as u64;
            let consumed = self.replay_whole_records(&unread)?;
            unread.drain(..consumed);
        }
        Ok(())
    }

    /// Replays the records that lie whole in `bytes`, which begin at `offset`; the length of those records.
    fn replay_whole_records(&mut self, bytes: &[u8]) -> Result<usize> {
        let mut rest = bytes;
        while let Some((record, after)) = decode(rest).map_err(|what| self.malformed(self.offset, what))? {
            if let Some(key) = record.key.strip_prefix(REMOVAL_MARK) {
                self.table.delete(key);
            } else if let Some(key) = record.key.strip_prefix(VALUE_MARK) {
                self.table.set(key, record.value)?;
            }
            self.offset += (rest.len() - after.len()) as u64;
            rest = after;
        }
        Ok(bytes.len() - rest.len())
    }

    /// Writes one record behind the last whole one. Call it under the exclusive lock, replayed.
    pub(super) fn append(&mut self, record: &[u8]) -> Result<()> {
        let end = self.offset + record.len() as u64;
        if end > MAX_FILE_BYTES {
            return Err(Error::StoreLimit {
                store: self.name.clone(),
                what: "file size",
                got: end,
                cap: MAX_FILE_BYTES,
            });
        }
        // The lock is ours, so what lies behind the last whole record was left by a writer that died.
        let length = self.file.metadata().map_err(|error| io_error(&self.name, "write", &error))?.len();
        let written = if length == self.offset { Ok(()) } else { self.file.set_len(self.offset) }
            .and_then(|()| self.file.write_all_at(record, self.offset));
        if let Err(error) = written {
            // Half a record would be cut off by the next writer too; not being able to cut it now is no new harm.
            _ = self.file.set_len(self.offset);
            return Err(io_error(&self.name, "write", &error));
        }
        self.offset = end;
        Ok(())
    }

    fn malformed(&self, offset: u64, what: &str) -> Error {
        Error::StoreProtocol {
            store: self.name.clone(),
            message: format!("at byte {offset} of the file: {what}"),
        }
    }
}

/// Opens the log. A symbolic link in the last place is not followed, for the path may lie in a directory that others
/// write to.
pub(super) fn open_log(path: &Path) -> io::Result<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(flags)
        .open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(ErrorKind::InvalidInput, "it is no regular file"))
    }
}

/// What the key of a value begins with.
pub(super) const VALUE_MARK: &str = "/";
/// What the key of a removal begins with.
pub(super) const REMOVAL_MARK: &str = "-/";

struct Record<'a> {
    key: &'a str,
    value: &'a [u8],
}

/// A record of `key` and `value`; `mark` says what it does.
pub(super) fn encode(mark: &str, key: &str, value: &[u8]) -> Vec<u8> {
    let mut record = Vec::with_capacity(8 + mark.len() + key.len() + value.len());
    // Both lengths were admitted before: far below 2³².
    record.extend_from_slice(&((mark.len() + key.len()) as u32).to_le_bytes());
    record.extend_from_slice(mark.as_bytes());
    record.extend_from_slice(key.as_bytes());
    record.extend_from_slice(&(value.len() as u32).to_le_bytes());
    record.extend_from_slice(value);
    record
}

/// The first record of `bytes` and what follows it; `None` when it is not all there.
fn decode(bytes: &[u8]) -> Result<Option<(Record<'_>, &[u8])>, &'static str> {
    let mut rest = bytes;
    let Some(key) = take_field(&mut rest, MAX_KEY_BYTES + REMOVAL_MARK.len(), "key length above the cap")?
    else {
        return Ok(None);
    };
    let key = std::str::from_utf8(key).map_err(|_| "key is not UTF-8")?;
    let Some(value) = take_field(&mut rest, MAX_VALUE_BYTES, "value length above the cap")? else {
        return Ok(None);
    };
    Ok(Some((Record { key, value }, rest)))
}

/// Takes one field of at most `cap` bytes from the beginning of `bytes`; `None` when it is not all there.
fn take_field<'a>(
    bytes: &mut &'a [u8],
    cap: usize,
    too_long: &'static str,
) -> Result<Option<&'a [u8]>, &'static str> {
    let Some((length, rest)) = bytes.split_first_chunk::<4>() else {
        return Ok(None);
    };
    let length = u32::from_le_bytes(*length) as usize;
    if length > cap {
        return Err(too_long);
    }
    Ok(rest.split_at_checked(length).map(|(field, rest)| {
        *bytes = rest;
        field
    }))
}

pub(super) fn io_error(name: &str, action: &'static str, error: &io::Error) -> Error {
    Error::StoreIo { store: name.to_owned(), action, message: error.to_string() }
}
