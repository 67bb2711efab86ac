//! Fuzz targets: one for each decoder of bytes that come from outside of a process.
//!
//! A [`Target`] is a function of bytes that panics if something is wrong, and encodings that are right. Two programs drive
//! them. `tests/decoders.rs` runs each for three seconds on mutations of what is right and of the corpus, in the usual
//! test run and with nothing to install. `libfuzzer/` lets libFuzzer look for new paths through the code, for as long as
//! one likes: `cargo xtask fuzz`.
//!
//! What every target promises: no panic; what is accepted is the same once it was written and read again; and no more
//! memory at any time than [`memory_cap`] says for the length of the input.

pub mod allocations;
pub mod mutation;
mod targets;

use std::fs;
use std::path::{Path, PathBuf};

pub use targets::TARGETS;

/// What a decoder may take besides what follows from its input: buffers of fixed size, and the most that `serde` reserves for
/// a sequence whose announced length it has not seen yet (1 MiB).
const FIXED_BYTES: usize = 2 << 20;
/// What it may take for each byte of input.
const BYTES_PER_BYTE: usize = 64;

/// A decoder and what it is called with.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// For the command line and the corpus.
    pub name: &'static str,
    /// What is called, and encodings that are right.
    pub input: Input,
}

/// How a target takes its input.
#[derive(Clone, Copy, Debug)]
pub enum Input {
    /// All bytes.
    Whole(fn(&[u8]), fn() -> Vec<Vec<u8>>),
    /// Several messages or values, see [`parts`].
    Parts(fn(&[&[u8]]), fn() -> Vec<Vec<Vec<u8>>>),
}

impl Target {
    /// The target of this name.
    pub fn find(name: &str) -> Option<&'static Self> {
        TARGETS.iter().find(|target| target.name == name)
    }

    /// Runs the target once.
    ///
    /// # Panics
    /// If it does, or if it takes more memory than [`memory_cap`].
    pub fn execute(&self, bytes: &[u8]) {
        let peak = allocations::peak_during(|| match self.input {
            Input::Whole(run, _) => run(bytes),
            Input::Parts(run, _) => run(&parts(bytes)),
        });
        let cap = memory_cap(bytes.len());
        assert!(
            peak <= cap,
            "{}: {peak} bytes of memory for {} bytes, at most {cap}",
            self.name,
            bytes.len()
        );
    }

    /// Encodings that are right, then the corpus.
    ///
    /// # Errors
    /// A corpus that cannot be read.
    pub fn inputs(&self) -> std::io::Result<Vec<Vec<u8>>> {
        let mut inputs = match self.input {
            Input::Whole(_, seeds) => seeds(),
            Input::Parts(_, seeds) => seeds().iter().map(|parts| join(parts)).collect(),
        };
        let mut files: Vec<PathBuf> =
            fs::read_dir(self.corpus())?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
        files.sort();
        for file in files {
            inputs.push(fs::read(file)?);
        }
        Ok(inputs)
    }

    /// The directory of its corpus.
    pub fn corpus(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(self.name)
    }
}

/// The most memory that a decoder may hold at any time, for an input of `bytes`.
pub const fn memory_cap(bytes: usize) -> usize {
    FIXED_BYTES + BYTES_PER_BYTE * bytes
}

/// `bytes` as parts: each is two bytes of length and the data; the last one takes what there is.
pub fn parts(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut parts = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<2>() {
        let (part, rest) = rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()));
        parts.push(part);
        bytes = rest;
    }
    parts
}

/// What [`parts`] takes apart; each part must be shorter than 64 KiB.
fn join(parts: &[Vec<u8>]) -> Vec<u8> {
    parts.iter().flat_map(|part| [&(part.len() as u16).to_le_bytes()[..], part].concat()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_apart_as_they_were_joined_and_a_short_last_one_is_taken() {
        let joined = join(&[b"one".to_vec(), Vec::new(), b"three".to_vec()]);
        assert_eq!(parts(&joined), [&b"one"[..], b"", b"three"]);
        assert_eq!(parts(&joined[..joined.len() - 2]).last(), Some(&&b"thr"[..]));
        assert!(parts(&[1]).is_empty());
    }

    #[test]
    fn too_much_memory_is_a_failure() {
        let greedy = Target {
            name: "greedy",
            input: Input::Whole(|bytes| drop(vec![0u8; bytes.len() << 20]), Vec::new),
        };
        greedy.execute(&[0; 2]);
        assert!(std::panic::catch_unwind(|| greedy.execute(&[0; 3])).is_err());
    }

    #[test]
    fn every_target_has_its_own_name_and_a_corpus() {
        for target in TARGETS {
            assert_eq!(Target::find(target.name).map(Target::corpus), Some(target.corpus()));
            assert!(target.inputs().is_ok_and(|inputs| inputs.len() > 1), "{}", target.name);
        }
    }
}
