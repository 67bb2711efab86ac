//! Shared memory of other processes, found through `/proc`: no server, no name in a file system.
//!
//! A memory file can be opened through the descriptor table of whoever holds it, by the same user. It is read with `pread` (and a
//! word in it written with `pwrite`, where a reader has something to ask), never mapped: what a stranger writes there, or how long the file is, can do no harm. Holding the descriptor keeps the memory
//! after its owners died. Costs a look at every descriptor of every process that is looked at.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use crate::error::{Error, Result};
use crate::identity::ProcessStatus;

/// What `/proc` shows as the target of a descriptor of ours.
const LINK: &str = "/memfd:unisono (deleted)";

/// A memory file that other processes hold.
#[derive(Debug)]
pub struct ForeignMemory {
    file: File,
    bytes: usize,
    identity: (u64, u64),
    /// The processes that were seen to hold it.
    holders: Vec<u32>,
}

/// What a search came to.
#[derive(Debug, Default)]
pub struct Search {
    /// The memory files, each once, by the lowest process that holds it.
    pub memories: Vec<ForeignMemory>,
    /// Processes that were asked for and that may not be looked at, or, in a search of all, those of this user.
    pub denied: Vec<u32>,
}

impl ForeignMemory {
    /// Length in bytes.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Device and number of the file: what tells it from others.
    pub const fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// The processes that were seen to hold it, ascending.
    pub fn holders(&self) -> &[u32] {
        &self.holders
    }

    /// Copies `count` words at `offset`.
    ///
    /// # Errors
    /// [`Error::Inspect`], also where the file is too short.
    pub fn words(&self, offset: usize, count: usize) -> Result<Vec<u64>> {
        let mut bytes = vec![0; count * 8];
        self.file
            .read_exact_at(&mut bytes, offset as u64)
            .map_err(|error| inspect("the shared memory of another process", &error))?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }

    /// Writes one word at `offset`, whole.
    ///
    /// # Errors
    /// [`Error::Inspect`], also where the file may only be read, or is too short.
    pub fn write_word(&self, offset: usize, value: u64) -> Result<()> {
        let what = "a question in the shared memory of another process";
        if offset.checked_add(8).is_none_or(|end| end > self.bytes) {
            return Err(Error::Inspect {
                what: what.to_owned(),
                message: "the memory is shorter".to_owned(),
            });
        }
        self.file.write_all_at(&value.to_le_bytes(), offset as u64).map_err(|error| inspect(what, &error))
    }

    /// The holder that calls itself `pid` (in its own namespace) and was started at `started`, as we call it.
    pub fn holder(&self, pid: u32, started: u64) -> Option<u32> {
        let is_it = |holder: &u32| {
            ProcessStatus::of(*holder).is_some_and(|status| status.started == started)
                && (*holder == pid || own_pid(*holder) == Some(pid))
        };
        self.holders.iter().copied().find(is_it)
    }
}

/// Looks for our memory files in the processes `pids`; without them, in all of this user.
///
/// # Errors
/// [`Error::Inspect`] if `/proc` cannot be read.
pub fn search(pids: Option<&[u32]>) -> Result<Search> {
    let all;
    let pids = match pids {
        Some(pids) => pids,
        None => {
            all = processes()?;
            &all
        }
    };
    let mut found = Search::default();
    let mut known: HashMap<(u64, u64), usize> = HashMap::new();
    for pid in pids {
        if look_at(*pid, &mut found.memories, &mut known).is_err()
            && Path::new(&format!("/proc/{pid}")).exists()
        {
            found.denied.push(*pid);
        }
    }
    Ok(found)
}

/// `pid` and its descendants, as far as the system tells.
pub fn family(pid: u32) -> Vec<u32> {
    let mut family = vec![pid];
    let mut at = 0;
    while at < family.len() {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", family[at])).into_iter().flatten().flatten();
        for task in tasks {
            let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            let new: Vec<u32> = children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect();
            family.extend(new.into_iter().filter(|pid| *pid > 0));
        }
        at += 1;
    }
    family
}

/// All processes of this user, ascending. A privileged user looks at everybody's.
fn processes() -> Result<Vec<u32>> {
    let user = rustix::process::geteuid().as_raw();
    let entries = std::fs::read_dir("/proc").map_err(|error| inspect("/proc", &error))?;
    let mut pids: Vec<u32> = entries
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            (user == 0 || entry.metadata().ok()?.uid() == user).then_some(pid)
        })
        .collect();
    pids.sort_unstable();
    Ok(pids)
}

fn look_at(
    pid: u32,
    memories: &mut Vec<ForeignMemory>,
    known: &mut HashMap<(u64, u64), usize>,
) -> std::io::Result<()> {
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let path = entry.path();
        if std::fs::read_link(&path).is_ok_and(|link| link.as_os_str() == LINK) {
            // A descriptor may be closed, and its number given to another file, at any time: what is opened counts.
            let opened = OpenOptions::new().read(true).write(true).open(&path).or_else(|_| File::open(&path));
            let Ok(file) = opened else { continue };
            let Ok(metadata) = file.metadata() else { continue };
            if !metadata.is_file() {
                continue;
            }
            let identity = (metadata.dev(), metadata.ino());
            let at = *known.entry(identity).or_insert_with(|| {
                let bytes = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
                memories.push(ForeignMemory { file, bytes, identity, holders: Vec::new() });
                memories.len() - 1
            });
            if memories[at].holders.last() != Some(&pid) {
                memories[at].holders.push(pid);
            }
        }
    }
    Ok(())
}

/// What a process is called in its own namespace of processes.
fn own_pid(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_whitespace().next_back()?.parse().ok()
}

fn inspect(what: &str, error: &std::io::Error) -> Error {
    Error::Inspect { what: what.to_owned(), message: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::SharedMemory;

    #[test]
    fn memory_is_found_once_though_it_is_held_twice_and_outlives_its_owner() {
        let pid = std::process::id();
        let ours = SharedMemory::create(8192).unwrap();
        let again = std::os::fd::AsFd::as_fd(&ours).try_clone_to_owned().unwrap();
        // SAFETY: the mapping is 8,192 bytes long, and nobody else knows it yet.
        unsafe { ours.as_ptr().add(4096).cast::<u64>().write(0x1234_5678_9abc_def0) };
        let is_it = |memory: &&ForeignMemory| {
            memory.bytes() == 8192 && memory.words(4096, 1).unwrap() == [0x1234_5678_9abc_def0]
        };
        for pids in [Some(&[pid][..]), None] {
            let found = search(pids).unwrap();
            let mine: Vec<_> = found.memories.iter().filter(is_it).collect();
            assert_eq!(mine.len(), 1);
            assert_eq!(mine[0].holders(), [pid]);
            let started = ProcessStatus::of(pid).unwrap().started;
            assert_eq!((mine[0].holder(pid, started), mine[0].holder(pid, started + 1)), (Some(pid), None));
        }
        let found = search(Some(&[pid])).unwrap();
        let asked = found.memories.iter().find(is_it).unwrap();
        asked.write_word(4104, 77).unwrap();
        // SAFETY: the word lies in the mapping, and nobody writes it now.
        assert_eq!(unsafe { ours.as_ptr().add(4104).cast::<u64>().read() }, 77);
        assert!(asked.write_word(8192, 1).is_err() && asked.write_word(usize::MAX, 1).is_err());
        drop((ours, again));
        let kept = found.memories.iter().find(is_it).expect("the memory is still there");
        let error = kept.words(8192, 1).unwrap_err().to_string();
        assert!(error.starts_with("the shared memory of another process cannot be read: "), "{error}");
    }

    #[test]
    fn a_process_that_is_not_there_has_nothing_and_denies_nothing() {
        let found = search(Some(&[u32::MAX])).unwrap();
        assert!(found.memories.is_empty() && found.denied.is_empty());
    }

    #[test]
    fn a_family_is_a_process_and_what_it_started() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let family = family(std::process::id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(family[0], std::process::id());
        assert!(family.contains(&child.id()), "{family:?}");
    }
}
