//! Compiled kernels on disk, so that only the first process of a machine compiles.
//!
//! An entry's name is the hash of all that it is made from: sources, macros, options, architecture; behind it the version
//! of the compiler. Its content begins with a checksum: whatever was damaged or cut short is compiled again. Entries appear
//! whole (written beside, then renamed), so any number of processes may fill the cache at once. A machine without a compiler
//! takes an entry of any version. A folder that cannot be used costs time, and nothing else.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::nvrtc::{Architecture, Compiler, Source, options};

/// Changes when entries of before must not be used.
const FORMAT: &[u8] = b"unisono kernels 1\n";
const CHECKSUM_BYTES: usize = 32;

/// A folder of compiled kernels.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    /// The folder that `UNISONO_CACHE_DIR` names, else `unisono` in the user's folder for caches.
    pub fn of_user() -> Self {
        let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let folder = from("UNISONO_CACHE_DIR")
            .or_else(|| from("XDG_CACHE_HOME").map(|caches| caches.join("unisono")))
            .or_else(|| from("HOME").map(|home| home.join(".cache/unisono")));
        Self { folder }
    }

    /// The cache in `folder`.
    pub const fn at(folder: PathBuf) -> Self {
        Self { folder: Some(folder) }
    }

    /// Where it lies, if it has a place.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// The CUBIN of `source`: from the cache, else compiled with `compiler` and kept.
    ///
    /// # Errors
    /// Those of the compiler, [`Error::NoCompiler`] among them, if there is no entry.
    pub fn cubin(
        &self,
        source: &Source,
        architecture: Architecture,
        compiler: impl FnOnce() -> Result<&'static Compiler>,
    ) -> Result<Vec<u8>> {
        let key = key(source, architecture);
        let compiler = compiler();
        if let Some(cubin) = self.entry(&key, compiler.as_ref().ok().map(|compiler| compiler.version())) {
            return Ok(cubin);
        }
        let compiler = compiler?;
        let cubin = compiler.compile(source, architecture)?;
        if let Err(error) = self.keep(&key, compiler.version(), &cubin) {
            tracing::debug!("{error}");
        }
        Ok(cubin)
    }

    /// An entry of this version, or of the newest one.
    fn entry(&self, key: &str, version: Option<(u32, u32)>) -> Option<Vec<u8>> {
        let folder = self.folder.as_deref()?;
        if let Some(version) = version {
            return read(&folder.join(file_name(key, version)));
        }
        let entries = std::fs::read_dir(folder).ok()?.flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let mut versions: Vec<_> = names.filter_map(|name| version_of(&name, key)).collect();
        versions.sort_unstable();
        versions.into_iter().rev().find_map(|version| read(&folder.join(file_name(key, version))))
    }

    fn keep(&self, key: &str, version: (u32, u32), cubin: &[u8]) -> Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        let failed = |path: &Path| {
            let path = path.display().to_string();
            move |error: std::io::Error| Error::Cache { path, message: error.to_string() }
        };
        std::fs::create_dir_all(folder).map_err(failed(folder))?;
        let path = folder.join(file_name(key, version));
        // Another process, or another thread of this one, has another name beside it.
        let thread = format!("{:?}", std::thread::current().id());
        let thread: String = thread.chars().filter(char::is_ascii_digit).collect();
        let beside = folder.join(format!(".{key}.{}.{thread}", std::process::id()));
        let mut content = Sha256::digest(cubin).to_vec();
        content.extend_from_slice(cubin);
        let written = std::fs::write(&beside, &content).and_then(|()| std::fs::rename(&beside, &path));
        if written.is_err() {
            // Whatever was written is of no use to anybody.
            let _ = std::fs::remove_file(&beside);
        }
        written.map_err(failed(&path))
    }
}

/// The hash of all that a CUBIN is made from, but for the version of the compiler.
fn key(source: &Source, architecture: Architecture) -> String {
    let mut hash = Sha256::new();
    hash.update(FORMAT);
    let mut add = |text: &str| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text.as_bytes());
    };
    add(source.name);
    add(source.text);
    for (name, text) in &source.headers {
        add(name);
        add(text);
    }
    options(source, architecture).iter().for_each(|option| add(option));
    hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

fn file_name(key: &str, (major, minor): (u32, u32)) -> String {
    format!("{key}-{major}.{minor}.cubin")
}

fn version_of(name: &str, key: &str) -> Option<(u32, u32)> {
    let version = name.strip_prefix(key)?.strip_prefix('-')?.strip_suffix(".cubin")?;
    let (major, minor) = version.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A whole entry, or nothing.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut content = std::fs::read(path).ok()?;
    if content.len() <= CHECKSUM_BYTES {
        return None;
    }
    let cubin = content.split_off(CHECKSUM_BYTES);
    (content == Sha256::digest(&cubin)[..]).then_some(cubin)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SM_90: Architecture = Architecture { major: 9, minor: 0 };

    fn source(value: &str) -> Source {
        Source {
            name: "test.cu",
            text: "extern \"C\" __global__ void k(int* x) { *x = VALUE; }",
            headers: Vec::new(),
            definitions: vec![("VALUE", value.to_owned())],
        }
    }

    #[test]
    fn what_was_kept_is_found_again_without_a_compiler_newest_first() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().join("kernels"));
        let key = key(&source("1"), SM_90);
        let missing = || Err(Error::NoCompiler { reason: "none here".to_owned() });
        assert_eq!(cache.cubin(&source("1"), SM_90, missing).unwrap_err(), missing().unwrap_err());
        cache.keep(&key, (12, 9), b"old").unwrap();
        cache.keep(&key, (13, 0), b"new").unwrap();
        assert_eq!(cache.cubin(&source("1"), SM_90, missing).unwrap(), b"new");
        assert_eq!(cache.entry(&key, Some((12, 9))).unwrap(), b"old");
        assert_eq!(cache.entry(&key, Some((11, 8))), None);
    }

    #[test]
    fn a_damaged_entry_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().to_owned());
        let key = key(&source("1"), SM_90);
        cache.keep(&key, (13, 0), b"some machine code").unwrap();
        let path = folder.path().join(file_name(&key, (13, 0)));
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(cache.entry(&key, Some((13, 0))), None, "{length}");
        }
        let mut flipped = whole.clone();
        flipped[40] ^= 1;
        std::fs::write(&path, &flipped).unwrap();
        assert_eq!(cache.entry(&key, Some((13, 0))), None);
    }

    #[test]
    fn another_macro_or_architecture_is_another_entry() {
        let keys = [
            key(&source("1"), SM_90),
            key(&source("2"), SM_90),
            key(&source("1"), Architecture { major: 8, minor: 0 }),
        ];
        assert!(keys[0] != keys[1] && keys[0] != keys[2] && keys[1] != keys[2]);
    }
}
