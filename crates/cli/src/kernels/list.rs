//! `unisono kernels list`: the folder of the cache, and how many entries each version of the compiler left there.

use std::collections::BTreeMap;
use std::io::Write as _;

use serde::Serialize;
use unisono::cuda::{Cache, Entry};

use crate::output::{Target, bytes};
use crate::{Common, Failure};

#[derive(Debug, PartialEq, Serialize)]
struct Document {
    version: &'static str,
    folder: Option<String>,
    entries: usize,
    bytes: u64,
    /// By the version of NVRTC, newest first.
    compilers: Vec<Share>,
}

/// What one version of the compiler made.
#[derive(Debug, PartialEq, Serialize)]
struct Share {
    version: String,
    entries: usize,
    bytes: u64,
}

/// Lists, and answers the exit code.
pub(super) fn execute(common: &Common) -> Result<u8, Failure> {
    let cache = Cache::of_user();
    let entries = cache.entries().map_err(|error| Failure::new(error.to_string()))?;
    let folder = cache.folder().map(|folder| folder.display().to_string());
    let document = Document::new(folder, &entries);
    if !common.quiet && common.json != Some(Target::Stdout) {
        for line in document.lines() {
            // Whoever closed our output does not want the rest.
            let _ = writeln!(anstream::stdout(), "{line}");
        }
    }
    common.json.as_ref().map_or(Ok(()), |target| target.write(&document))?;
    Ok(0)
}

impl Document {
    fn new(folder: Option<String>, entries: &[Entry]) -> Self {
        let mut shares: BTreeMap<(u32, u32), (usize, u64)> = BTreeMap::new();
        for entry in entries {
            let (count, bytes) = shares.entry(entry.version).or_default();
            *count += 1;
            *bytes += entry.bytes;
        }
        let share = |((major, minor), (entries, bytes))| Share {
            version: format!("{major}.{minor}"),
            entries,
            bytes,
        };
        Self {
            version: env!("CARGO_PKG_VERSION"),
            folder,
            entries: entries.len(),
            bytes: entries.iter().map(|entry| entry.bytes).sum(),
            compilers: shares.into_iter().rev().map(share).collect(),
        }
    }

    fn lines(&self) -> Vec<String> {
        let Some(folder) = &self.folder else {
            return vec![
                "Kernels are not kept: there is no home folder. UNISONO_CACHE_DIR names a place.".to_owned(),
            ];
        };
        if self.entries == 0 {
            return vec![format!("{folder} holds no kernels yet; unisono kernels build puts some there.")];
        }
        let mut lines = vec![folder.clone(), format!("{:<12} {:>8} {:>10}", "compiler", "entries", "size")];
        let row =
            |name: &str, entries: usize, size: u64| format!("{name:<12} {entries:>8} {:>10}", bytes(size));
        let shares = self.compilers.iter();
        lines
            .extend(shares.map(|share| row(&format!("NVRTC {}", share.version), share.entries, share.bytes)));
        if self.compilers.len() > 1 {
            lines.push(row("all", self.entries, self.bytes));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(version: (u32, u32), bytes: u64) -> Entry {
        Entry { version, key: "ab".to_owned(), bytes }
    }

    #[test]
    fn entries_are_counted_by_the_version_of_the_compiler_newest_first() {
        let entries = [entry((12, 9), 1024), entry((12, 10), 512), entry((12, 10), 1536)];
        let lines = Document::new(Some("/cache".to_owned()), &entries).lines();
        assert_eq!(
            lines,
            [
                "/cache",
                "compiler      entries       size",
                "NVRTC 12.10         2      2 KiB",
                "NVRTC 12.9          1      1 KiB",
                "all                 3      3 KiB",
            ]
        );
    }

    #[test]
    fn a_cache_that_is_empty_or_has_no_place_says_what_to_do() {
        let empty = Document::new(Some("/cache".to_owned()), &[]).lines();
        assert_eq!(empty, ["/cache holds no kernels yet; unisono kernels build puts some there."]);
        assert!(Document::new(None, &[]).lines()[0].contains("UNISONO_CACHE_DIR"));
    }
}
