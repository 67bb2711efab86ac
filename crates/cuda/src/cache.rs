//! Compiled kernels on disk, so that only the first process of a machine compiles.
//!
//! An entry's name is the hash of all that it is made from: sources, macros, options, architecture; behind it the version
//! of the compiler. Its content begins with a checksum: whatever was damaged or cut short is compiled again. Entries appear
//! whole (written beside, then renamed), so any number of processes may fill the cache at once. A machine without a compiler
//! takes an entry of any version. A folder that cannot be used costs time, and nothing else.
//!
//! Packs ([`crate::packs`]) hold entries that were compiled elsewhere: what the folder does not have is unpacked into it.

use std::fs::{DirBuilder, File};
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::nvrtc::{Architecture, Compiler, Source, options};
use crate::packs;

/// Changes when entries of before must not be used.
const FORMAT: &[u8] = b"unisono kernels 1\n";
const CHECKSUM_BYTES: usize = 32;
/// What is larger is no entry of ours: kernels take some hundred KiB.
const MAX_ENTRY_BYTES: u64 = 64 << 20;
const SUFFIX: &str = ".cubin";

/// A folder of compiled kernels.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: Option<PathBuf>,
    packs: Option<PathBuf>,
}

/// What one file of a cache holds, as its name tells.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Entry {
    /// The version of the compiler that made it, as (13, 0).
    pub version: (u32, u32),
    /// The hash of what it is made from.
    pub key: String,
    /// Bytes of the file.
    pub bytes: u64,
}

impl Cache {
    /// The folder that `UNISONO_CACHE_DIR` names, else `unisono` in the user's folder for caches.
    pub fn of_user() -> Self {
        let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let folder = from("UNISONO_CACHE_DIR")
            .or_else(|| from("XDG_CACHE_HOME").map(|caches| caches.join("unisono")))
            .or_else(|| from("HOME").map(|home| home.join(".cache/unisono")));
        Self { folder, packs: packs::of_process().cloned() }
    }

    /// The cache in `folder`.
    pub const fn at(folder: PathBuf) -> Self {
        Self { folder: Some(folder), packs: None }
    }

    /// The same, with the packs in a folder.
    pub fn with_packs(self, packs: PathBuf) -> Self {
        Self { packs: Some(packs), ..self }
    }

    /// Where it lies, if it has a place.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// The CUBIN of `source`: from the cache, else from a pack, else compiled with `compiler` and kept.
    ///
    /// # Errors
    /// Those of the compiler, [`Error::NoCompiler`] among them, if there is no entry.
    pub fn cubin(
        &self,
        source: &Source,
        architecture: Architecture,
        compiler: impl FnOnce() -> Result<&'static Compiler>,
    ) -> Result<Vec<u8>> {
        let compiler = compiler();
        let version = compiler.as_ref().ok().map(|compiler| compiler.version());
        if let Some(cubin) = self.find(source, architecture, version) {
            return Ok(cubin);
        }
        if let Some(cubin) = self.unpack(source, architecture) {
            return Ok(cubin);
        }
        let compiler = compiler?;
        let cubin = compiler.compile(source, architecture)?;
        if let Err(error) = self.keep(source, architecture, compiler.version(), &cubin) {
            tracing::debug!("{error}");
        }
        Ok(cubin)
    }

    /// The CUBIN of `source` that is kept: of this version of the compiler, or of the newest one that there is.
    pub fn find(
        &self,
        source: &Source,
        architecture: Architecture,
        version: Option<(u32, u32)>,
    ) -> Option<Vec<u8>> {
        let folder = self.folder.as_deref()?;
        let key = key(source, architecture);
        if let Some(version) = version {
            return read(&folder.join(file_name(&key, version)));
        }
        let mut entries = self.entries().ok()?;
        entries.retain(|entry| entry.key == key);
        entries.iter().rev().find_map(|entry| read(&folder.join(file_name(&key, entry.version))))
    }

    /// The CUBIN of `source` in a pack that the driver can load. All that is in the pack is kept here.
    fn unpack(&self, source: &Source, architecture: Architecture) -> Option<Vec<u8>> {
        let key = key(source, architecture);
        let driver = crate::driver::version().ok();
        packs::of(self.packs.as_deref()?, architecture, driver).into_iter().find_map(|(version, pack)| {
            let name = file_name(&key, version);
            if let Some(cubin) = self.folder.as_deref().and_then(|folder| read(&folder.join(&name))) {
                return Some(cubin);
            }
            let mut found = None;
            for (kept, content) in packs::read(&pack)? {
                if kept == name {
                    found = checked(content.clone());
                }
                if let Some(folder) = &self.folder
                    && parts(&kept).is_some()
                    && let Err(error) = put(folder, &kept, &[&content])
                {
                    tracing::debug!("{error}");
                }
            }
            found
        })
    }

    /// Keeps what this version of the compiler made of `source`. The folder is made if it is not there, for this user alone.
    /// A cache without a place, and an entry that is too large (64 MiB), keep nothing.
    ///
    /// # Errors
    /// [`Error::Cache`] if the file cannot be written.
    pub fn keep(
        &self,
        source: &Source,
        architecture: Architecture,
        version: (u32, u32),
        cubin: &[u8],
    ) -> Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        if (cubin.len() + CHECKSUM_BYTES) as u64 > MAX_ENTRY_BYTES {
            return Ok(());
        }
        put(folder, &file_name(&key(source, architecture), version), &[&Sha256::digest(cubin), cubin])
    }

    /// What it holds, by the version of the compiler; nothing if it has no place, or the folder was not made yet.
    ///
    /// # Errors
    /// [`Error::Cache`] if the folder cannot be read.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        let Some(folder) = &self.folder else { return Ok(Vec::new()) };
        let files = match std::fs::read_dir(folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            files => files.map_err(failed(folder))?,
        };
        let entry = |file: std::fs::DirEntry| {
            let name = file.file_name();
            let (key, version) = parts(name.to_str()?)?;
            Some(Entry { version, key: key.to_owned(), bytes: file.metadata().ok()?.len() })
        };
        let mut entries: Vec<Entry> = files.flatten().filter_map(entry).collect();
        entries.sort_unstable();
        Ok(entries)
    }
}

/// The name and the content of the entry of a CUBIN, as they are packed.
pub(crate) fn entry(
    source: &Source,
    architecture: Architecture,
    version: (u32, u32),
    cubin: &[u8],
) -> (String, Vec<u8>) {
    (file_name(&key(source, architecture), version), [&Sha256::digest(cubin)[..], cubin].concat())
}

/// Writes a file of `folder`, which is made if it is not there, so that it appears whole.
fn put(folder: &Path, name: &str, content: &[&[u8]]) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed(folder))?;
    let path = folder.join(name);
    // Another process, one of another container that shares the folder, or another thread has another name beside it.
    let random = RandomState::new().build_hasher().finish();
    let beside = folder.join(format!(".{name}.{}.{random:016x}", std::process::id()));
    let write = || {
        let mut file = File::create_new(&beside)?;
        content.iter().try_for_each(|part| file.write_all(part))?;
        std::fs::rename(&beside, &path)
    };
    let written = write();
    if written.is_err() {
        // Whatever was written is of no use to anybody.
        let _ = std::fs::remove_file(&beside);
    }
    written.map_err(failed(&path))
}

pub(crate) fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.display().to_string();
    move |error| Error::Cache { path, message: error.to_string() }
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
    format!("{key}-{major}.{minor}{SUFFIX}")
}

/// The key and the version in the name of an entry.
fn parts(name: &str) -> Option<(&str, (u32, u32))> {
    let (key, version) = name.strip_suffix(SUFFIX)?.split_once('-')?;
    let (major, minor) = version.split_once('.')?;
    Some((key, (major.parse().ok()?, minor.parse().ok()?)))
}

/// A whole entry, or nothing.
fn read(path: &Path) -> Option<Vec<u8>> {
    let file = File::open(path).ok()?;
    let metadata = file.metadata().ok()?;
    if !metadata.is_file() || metadata.len() > MAX_ENTRY_BYTES {
        return None;
    }
    let mut content = Vec::with_capacity(metadata.len() as usize);
    file.take(MAX_ENTRY_BYTES).read_to_end(&mut content).ok()?;
    checked(content)
}

/// The CUBIN in the content of an entry, if that is whole.
fn checked(mut content: Vec<u8>) -> Option<Vec<u8>> {
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

    const NEW: (u32, u32) = (13, 0);

    #[test]
    fn what_was_kept_is_found_again_without_a_compiler_newest_first() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().join("kernels"));
        let missing = || Err(Error::NoCompiler { reason: "none here".to_owned() });
        assert_eq!(cache.cubin(&source("1"), SM_90, missing).unwrap_err(), missing().unwrap_err());
        assert_eq!(cache.entries(), Ok(Vec::new()));
        for (version, cubin) in [((12, 10), "old"), (NEW, "new"), ((12, 9), "oldest")] {
            cache.keep(&source("1"), SM_90, version, cubin.as_bytes()).unwrap();
        }
        assert_eq!(cache.cubin(&source("1"), SM_90, missing).unwrap(), b"new");
        assert_eq!(cache.find(&source("1"), SM_90, Some((12, 9))).unwrap(), b"oldest");
        assert_eq!(cache.find(&source("1"), SM_90, Some((11, 8))), None);
        assert_eq!(cache.find(&source("2"), SM_90, None), None);
        std::fs::write(folder.path().join("kernels/notes.txt"), "not ours").unwrap();
        let entries: Vec<_> =
            cache.entries().unwrap().iter().map(|entry| (entry.version, entry.bytes)).collect();
        assert_eq!(entries, [((12, 9), 38), ((12, 10), 35), (NEW, 35)]);
    }

    #[test]
    fn the_folder_is_the_users_alone() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().join("a/b"));
        cache.keep(&source("1"), SM_90, NEW, b"some machine code").unwrap();
        for made in ["a", "a/b"] {
            let mode = std::fs::metadata(folder.path().join(made)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o700, "{made}");
        }
    }

    #[test]
    fn a_damaged_entry_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().to_owned());
        let found = || cache.find(&source("1"), SM_90, Some(NEW));
        cache.keep(&source("1"), SM_90, NEW, b"some machine code").unwrap();
        let path = folder.path().join(file_name(&key(&source("1"), SM_90), NEW));
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(found(), None, "{length}");
        }
        let mut flipped = whole.clone();
        flipped[40] ^= 1;
        std::fs::write(&path, &flipped).unwrap();
        assert_eq!(found(), None);
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert_eq!(found(), None, "a folder");
    }

    #[test]
    fn an_entry_that_is_too_large_is_neither_read_nor_kept() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().to_owned());
        cache.keep(&source("1"), SM_90, NEW, &vec![0; 64 << 20]).unwrap();
        assert_eq!(cache.entries(), Ok(Vec::new()));
        // A whole one: nothing but its size is wrong.
        let cubin = vec![0; (64 << 20) - CHECKSUM_BYTES + 1];
        let content = [Sha256::digest(&cubin).to_vec(), cubin].concat();
        let path = folder.path().join(file_name(&key(&source("1"), SM_90), NEW));
        std::fs::write(&path, &content).unwrap();
        assert_eq!(cache.find(&source("1"), SM_90, Some(NEW)), None);
        std::fs::write(&path, [&Sha256::digest(b"small")[..], b"small"].concat()).unwrap();
        assert_eq!(cache.find(&source("1"), SM_90, Some(NEW)).unwrap(), b"small");
    }

    #[test]
    fn what_the_folder_does_not_have_is_unpacked_into_it_and_not_compiled() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("packs");
        let mut packer = packs::Packer::default();
        for value in ["1", "2"] {
            packer.add(&source(value), SM_90, NEW, value.as_bytes());
        }
        packer.write(&at).unwrap();
        let missing = || Err(Error::NoCompiler { reason: "none here".to_owned() });
        let cache = Cache::at(folder.path().join("kernels")).with_packs(at.clone());
        assert_eq!(cache.cubin(&source("2"), SM_90, missing).unwrap(), b"2");
        assert_eq!(cache.entries().unwrap().len(), 2);
        std::fs::remove_dir_all(&at).unwrap();
        assert_eq!(cache.cubin(&source("1"), SM_90, missing).unwrap(), b"1");
        assert!(cache.cubin(&source("3"), SM_90, missing).is_err());
        packer.write(&at).unwrap();
        let nowhere = Cache { folder: None, packs: Some(at) };
        assert_eq!(nowhere.cubin(&source("1"), SM_90, missing).unwrap(), b"1");
        let other = Architecture { major: 8, minor: 0 };
        assert!(nowhere.cubin(&source("1"), other, missing).is_err());
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
