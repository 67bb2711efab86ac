//! What processes could leave behind: names of sockets, files in shared places, children.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Where a library of this kind could leave files.
const SHARED_PLACES: [&str; 3] = ["/dev/shm", "/tmp", "/run"];

/// What some processes held while they ran.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Traces {
    /// Abstract names of their sockets.
    names: BTreeSet<String>,
    /// Files in shared places that they had open or mapped.
    files: BTreeSet<String>,
    job: String,
}

impl Traces {
    pub(crate) fn of(pids: &[u32], job: &str) -> Self {
        let inodes: BTreeSet<String> = pids.iter().flat_map(|pid| socket_inodes(*pid)).collect();
        let held = |fields: &[&str]| fields.get(6).is_some_and(|inode| inodes.contains(*inode));
        let names = abstract_sockets(|fields| held(fields));
        let files = pids.iter().flat_map(|pid| files_of(*pid)).collect();
        Self { names, files, job: job.to_owned() }
    }

    /// Names of sockets, each with an `@` in front.
    pub(crate) fn names(&self) -> Vec<String> {
        self.names.iter().cloned().collect()
    }

    /// How many sockets had names.
    pub(crate) fn socket_names(&self) -> usize {
        self.names.len()
    }

    /// What is still there. Empty is as it should be, once the processes have ended.
    pub(crate) fn left(&self) -> Vec<String> {
        let mut left: Vec<String> = abstract_sockets(|_| true).intersection(&self.names).cloned().collect();
        left.extend(self.files.iter().filter(|file| Path::new(file).exists()).cloned());
        for place in SHARED_PLACES {
            let entries = fs::read_dir(place).into_iter().flatten().flatten();
            let names = entries.map(|entry| entry.path().display().to_string());
            left.extend(names.filter(|name| name.contains(&self.job)));
        }
        left.extend(processes_of(&self.job).into_iter().map(|pid| format!("process {pid}")));
        left
    }

    /// # Panics
    /// If anything is left, or if there was a file at all: nothing of a world has a name in a file system.
    pub(crate) fn expect_none_left(&self) {
        assert_eq!(self.left(), Vec::<String>::new());
        assert!(self.files.is_empty(), "files with names: {:?}", self.files);
    }
}

/// Abstract names that begin like ours, of the sockets for which `is_meant`.
fn abstract_sockets(is_meant: impl Fn(&[&str]) -> bool) -> BTreeSet<String> {
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let mut names = BTreeSet::new();
    for line in table.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let Some(name) = fields.get(7)
            && name.starts_with("@unisono-")
            && is_meant(&fields)
        {
            names.insert((*name).to_owned());
        }
    }
    names
}

fn links(pid: u32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Some(fs::read_link(entry.path()).ok()?.to_string_lossy().into_owned()))
        .collect()
}

fn socket_inodes(pid: u32) -> Vec<String> {
    let inode = |link: String| Some(link.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned());
    links(pid).into_iter().filter_map(inode).collect()
}

/// Files in shared places that `pid` has open or mapped.
fn files_of(pid: u32) -> Vec<String> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let mapped = maps.lines().filter_map(|line| Some(line[line.find('/')?..].to_owned()));
    let is_shared = |file: &String| SHARED_PLACES.iter().any(|place| file.starts_with(&format!("{place}/")));
    // The program itself may have been built in such a place.
    let program = std::env::current_exe().unwrap_or_default().display().to_string();
    mapped.chain(links(pid)).filter(|file| is_shared(file) && *file != program).collect()
}

/// Living processes with `job` in their environment, which children inherit.
fn processes_of(job: &str) -> Vec<u32> {
    let wanted = format!("FAULTS_JOB={job}");
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok());
    pids.filter(|pid| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
    })
    .collect()
}
