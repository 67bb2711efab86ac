//! Kernels that were compiled ahead of time and travel with a package: a file for each architecture and compiler, `sm_90-13.0.xz`, in which
//! the entries of a cache are compressed together (kernels of several sizes of a world have much in common: a fifteenth of their bytes is left).
//!
//! Inside: a line that names the format; then of each entry its name (its length in two bytes before it) and its content (its length in four).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use lzma_rust2::{XzOptions, XzReader, XzWriter};

use crate::cache::{self, failed};
use crate::error::Result;
use crate::nvrtc::{Architecture, Source};

const FORMAT: &[u8] = b"unisono pack 1\n";
const SUFFIX: &str = ".xz";
/// What is larger, unpacked, is no pack of ours.
const MAX_BYTES: u64 = 512 << 20;
/// How far back the compressor finds what is alike: the kernels of an architecture.
const WINDOW_BYTES: u32 = 32 << 20;

static OF_PROCESS: OnceLock<PathBuf> = OnceLock::new();

/// From now on caches of the user look into the packs in `folder`, too. The first folder of a process stays.
pub fn look_into(folder: PathBuf) {
    OF_PROCESS.get_or_init(|| folder);
}

pub(crate) fn of_process() -> Option<&'static PathBuf> {
    OF_PROCESS.get()
}

/// Packs that are to be written, by architecture and version of the compiler.
#[derive(Default, Debug)]
pub struct Packer(BTreeMap<(Architecture, (u32, u32)), Entries>);

/// Contents of entries, by name.
#[derive(Default, Debug)]
struct Entries(BTreeMap<String, Vec<u8>>);

impl Packer {
    /// Adds what this version of the compiler made of `source`.
    pub fn add(&mut self, source: &Source, architecture: Architecture, version: (u32, u32), cubin: &[u8]) {
        let (name, content) = cache::entry(source, architecture, version, cubin);
        self.0.entry((architecture, version)).or_default().0.insert(name, content);
    }

    /// Writes the packs into `folder`, which is made if it is not there; how many bytes they take.
    ///
    /// # Errors
    /// [`crate::Error::Cache`] if a file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<u64> {
        std::fs::create_dir_all(folder).map_err(failed(folder))?;
        let mut bytes = 0;
        for ((architecture, version), entries) in &self.0 {
            let path = folder.join(format!("{architecture}-{}.{}{SUFFIX}", version.0, version.1));
            let packed = pack(entries).map_err(failed(&path))?;
            std::fs::write(&path, &packed).map_err(failed(&path))?;
            bytes += packed.len() as u64;
        }
        Ok(bytes)
    }
}

fn pack(entries: &Entries) -> std::io::Result<Vec<u8>> {
    let mut options = XzOptions::with_preset(9);
    options.lzma_options.dict_size = WINDOW_BYTES;
    let mut writer = XzWriter::new(Vec::new(), options)?;
    writer.write_all(FORMAT)?;
    for (name, content) in &entries.0 {
        // A name is a hash and a version, an entry of a cache at most 64 MiB.
        writer.write_all(&(name.len() as u16).to_le_bytes())?;
        writer.write_all(name.as_bytes())?;
        writer.write_all(&(content.len() as u32).to_le_bytes())?;
        writer.write_all(content)?;
    }
    writer.finish()
}

/// The packs in `folder` for `architecture` that a driver of this version can load (any, if there is none), newest first, with the version of
/// their compiler.
pub(crate) fn of(
    folder: &Path,
    architecture: Architecture,
    driver: Option<(u32, u32)>,
) -> Vec<((u32, u32), PathBuf)> {
    let start = format!("{architecture}-");
    let version = |name: &str| -> Option<(u32, u32)> {
        let (major, minor) = name.strip_prefix(&start)?.strip_suffix(SUFFIX)?.split_once('.')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    };
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut packs: Vec<_> =
        files.filter_map(|file| Some((version(file.file_name().to_str()?)?, file.path()))).collect();
    // What a compiler makes is loaded by drivers of its own major version, and by newer ones.
    packs.retain(|(version, _)| driver.is_none_or(|driver| version.0 <= driver.0));
    packs.sort_unstable_by(|a, b| b.cmp(a));
    packs
}

/// The entries of a pack, with their names; `None` if it cannot be read to its end.
pub(crate) fn read(path: &Path) -> Option<Vec<(String, Vec<u8>)>> {
    let mut unpacked = Vec::new();
    XzReader::new(File::open(path).ok()?, false).take(MAX_BYTES).read_to_end(&mut unpacked).ok()?;
    let mut rest = unpacked.strip_prefix(FORMAT)?;
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let (length, behind) = rest.split_first_chunk()?;
        let (name, behind) = behind.split_at_checked(u16::from_le_bytes(*length).into())?;
        let (length, behind) = behind.split_first_chunk()?;
        let (content, behind) = behind.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        entries.push((std::str::from_utf8(name).ok()?.to_owned(), content.to_vec()));
        rest = behind;
    }
    Some(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SM_90: Architecture = Architecture { major: 9, minor: 0 };

    fn packer(version: (u32, u32)) -> Packer {
        let source = |value: &str| Source {
            name: "test.cu",
            text: "",
            headers: Vec::new(),
            definitions: vec![("VALUE", value.to_owned())],
        };
        let mut packer = Packer::default();
        for (value, architecture) in [("1", SM_90), ("2", SM_90), ("1", Architecture { major: 10, minor: 0 })]
        {
            packer.add(&source(value), architecture, version, &vec![7; 100_000]);
        }
        packer
    }

    #[test]
    fn alike_entries_take_the_room_of_one_and_come_out_whole() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = packer((13, 0)).write(folder.path()).unwrap();
        assert!(bytes < 2_000, "{bytes}");
        let [(version, pack)] = &of(folder.path(), SM_90, None)[..] else { panic!("one pack") };
        assert_eq!((*version, pack.file_name().unwrap().to_str()), ((13, 0), Some("sm_90-13.0.xz")));
        let entries = read(pack).unwrap();
        assert_eq!(entries.len(), 2);
        for (name, content) in entries {
            assert!(name.ends_with("-13.0.cubin") && content[32..] == vec![7; 100_000], "{name}");
        }
        let whole = std::fs::read(pack).unwrap();
        for length in (0..whole.len()).step_by(7) {
            std::fs::write(pack, &whole[..length]).unwrap();
            assert_eq!(read(pack), None, "{length}");
        }
    }

    #[test]
    fn a_pack_that_the_driver_is_too_old_for_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        for version in [(12, 9), (13, 0), (13, 1)] {
            packer(version).write(folder.path()).unwrap();
        }
        let versions = |driver| {
            let packs = of(folder.path(), SM_90, driver);
            packs.into_iter().map(|(version, _)| version).collect::<Vec<_>>()
        };
        assert_eq!(versions(None), [(13, 1), (13, 0), (12, 9)]);
        assert_eq!(versions(Some((13, 0))), [(13, 1), (13, 0), (12, 9)]);
        assert_eq!(versions(Some((12, 4))), [(12, 9)]);
        assert_eq!(versions(Some((11, 8))), []);
        assert_eq!(of(&folder.path().join("none"), SM_90, None), []);
    }
}
