//! This machine: its processors as the kernel describes them below `/sys` (sockets, NUMA nodes, cores, caches), and its
//! network interfaces.
//!
//! Processors are read from files, so tests give a directory of their own. What a file does not tell is left out: a
//! container may hide `/sys`, and then each processor is a core of its own on one socket and one node.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// What the kernel says of the processors.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(crate) struct Hardware {
    /// The name of the processor.
    pub(crate) model: String,
    /// Online processors (hyper-threads), ascending.
    pub(crate) processors: Vec<Processor>,
    pub(crate) nodes: Vec<Node>,
    /// Data and unified caches, from the first level up; those of one kind together.
    pub(crate) caches: Vec<Cache>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(crate) struct Processor {
    pub(crate) id: usize,
    /// The lowest processor of its core: equal for hyper-threads of one core.
    pub(crate) core: usize,
    pub(crate) socket: usize,
    pub(crate) node: usize,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(crate) struct Node {
    pub(crate) id: usize,
    pub(crate) processors: Vec<usize>,
    /// 0 if the kernel does not tell.
    pub(crate) memory_bytes: u64,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(crate) struct Cache {
    /// `L1d`, `L2`, `L3`.
    pub(crate) name: String,
    pub(crate) bytes: u64,
    /// The processors that share each one.
    pub(crate) shared_by: Vec<Vec<usize>>,
}

impl Hardware {
    /// This machine.
    pub(crate) fn here() -> Self {
        Self::read(Path::new("/sys/devices/system"), &unisono::host::processor_model())
    }

    fn read(root: &Path, model: &str) -> Self {
        let online = text(&root.join("cpu/online")).map(|list| parse_set(&list));
        let online = online.filter(|list| !list.is_empty()).unwrap_or_else(|| {
            (0..std::thread::available_parallelism().map_or(1, std::num::NonZero::get)).collect()
        });
        let mut nodes = nodes(root);
        if nodes.is_empty() {
            nodes.push(Node { id: 0, processors: online.clone(), memory_bytes: 0 });
        }
        let processor = |id: &usize| {
            let file = |name: &str| text(&root.join(format!("cpu/cpu{id}/topology/{name}")));
            let siblings = file("core_cpus_list").or_else(|| file("thread_siblings_list"));
            let core =
                siblings.and_then(|list| parse_set(&list).into_iter().find(|cpu| online.contains(cpu)));
            let socket = file("physical_package_id").and_then(|number| number.parse().ok());
            let node = nodes.iter().find(|node| node.processors.contains(id));
            Processor {
                id: *id,
                core: core.unwrap_or(*id),
                socket: socket.unwrap_or(0),
                node: node.map_or(0, |node| node.id),
            }
        };
        Self {
            model: model.to_owned(),
            processors: online.iter().map(processor).collect(),
            caches: caches(root, &online),
            nodes,
        }
    }

    pub(crate) fn sockets(&self) -> usize {
        distinct(self.processors.iter().map(|processor| processor.socket))
    }

    pub(crate) fn cores(&self) -> usize {
        distinct(self.processors.iter().map(|processor| processor.core))
    }

    pub(crate) fn processor(&self, id: usize) -> Option<&Processor> {
        self.processors.iter().find(|processor| processor.id == id)
    }

    /// `AMD EPYC, 1 socket, 2 cores, 2 processors, 1 NUMA node`.
    pub(crate) fn summary(&self) -> String {
        let count = |count: usize, noun: &str| format!("{count} {noun}{}", if count == 1 { "" } else { "s" });
        format!(
            "{}, {}, {}, {}, {}",
            self.model,
            count(self.sockets(), "socket"),
            count(self.cores(), "core"),
            count(self.processors.len(), "processor"),
            count(self.nodes.len(), "NUMA node")
        )
    }
}

/// The processors that this process may run on, ascending.
pub(crate) fn allowed() -> Vec<usize> {
    use rustix::thread::CpuSet;
    let allowed = rustix::thread::sched_getaffinity(None).unwrap_or_else(|_| CpuSet::new());
    (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect()
}

/// An address of a network interface.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(crate) struct Interface {
    name: String,
    address: IpAddr,
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.address)
    }
}

/// The network interfaces that have an address, without addresses that hold for one link only.
pub(crate) fn interfaces() -> Vec<Interface> {
    // Where they cannot be listed there is nothing to list; who needs one finds out when it is used.
    let all = if_addrs::get_if_addrs().unwrap_or_default();
    let wide = all.into_iter().filter(|interface| !interface.is_link_local());
    wide.map(|interface| Interface { address: interface.ip(), name: interface.name }).collect()
}

fn distinct(numbers: impl Iterator<Item = usize>) -> usize {
    numbers.collect::<BTreeSet<_>>().len()
}

fn text(path: &Path) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
}

/// Entries of `directory` called `prefix` and a number, by that number.
fn numbered(directory: &Path, prefix: &str) -> BTreeMap<usize, PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()?;
            Some((number, entry.path()))
        })
        .collect()
}

fn nodes(root: &Path) -> Vec<Node> {
    let node = |(id, path): (usize, PathBuf)| {
        let processors = parse_set(&text(&path.join("cpulist"))?);
        // Nodes without processors hold memory of devices; no rank runs there.
        if processors.is_empty() {
            return None;
        }
        let memory = text(&path.join("meminfo")).and_then(|meminfo| {
            let line = meminfo.lines().find(|line| line.contains("MemTotal:"))?.to_owned();
            line.split_whitespace().rev().nth(1)?.parse::<u64>().ok()
        });
        Some(Node { id, processors, memory_bytes: memory.unwrap_or(0) << 10 })
    };
    numbered(&root.join("node"), "node").into_iter().filter_map(node).collect()
}

fn caches(root: &Path, online: &[usize]) -> Vec<Cache> {
    let mut found: BTreeMap<(String, u64), Vec<Vec<usize>>> = BTreeMap::new();
    for processor in online {
        for index in numbered(&root.join(format!("cpu/cpu{processor}/cache")), "index").into_values() {
            let file = |name: &str| text(&index.join(name));
            let (Some(level), Some(kind), Some(size)) = (file("level"), file("type"), file("size")) else {
                continue;
            };
            let suffix = match kind.as_str() {
                "Data" => "d",
                "Unified" => "",
                _ => continue,
            };
            let Some(kilobytes) = size.strip_suffix('K').and_then(|number| number.parse::<u64>().ok()) else {
                continue;
            };
            let shared = file("shared_cpu_list").map_or_else(|| vec![*processor], |list| parse_set(&list));
            let all = found.entry((format!("L{level}{suffix}"), kilobytes << 10)).or_default();
            if !all.contains(&shared) {
                all.push(shared);
            }
        }
    }
    found.into_iter().map(|((name, bytes), shared_by)| Cache { name, bytes, shared_by }).collect()
}

/// Reads `0-3,8`; what is no such list is empty.
pub(crate) fn parse_set(list: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(
            first.trim().parse::<usize>().ok()?
                ..=last.trim().parse::<usize>().ok().filter(|last| *last < 1 << 20)?,
        )
    };
    list.split(',').filter_map(range).flatten().collect()
}

/// Writes ascending numbers as `0-3,8`.
pub(crate) fn format_set(numbers: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for number in numbers.iter().copied() {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => parts.push((number, number)),
        }
    }
    let part = |(first, last): &(usize, usize)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    parts.iter().map(part).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Two sockets that are two nodes, two cores each, two hyper-threads per core: processors 0 and 4 are one core.
    pub(crate) fn two_sockets() -> Hardware {
        let directory = tempfile::tempdir().unwrap();
        let write = |path: String, text: String| {
            let path = directory.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text + "\n").unwrap();
        };
        write("cpu/online".into(), "0-7".into());
        for cpu in 0..8 {
            let (core, socket) = (cpu % 4, cpu % 4 / 2);
            write(format!("cpu/cpu{cpu}/topology/core_cpus_list"), format!("{core},{}", core + 4));
            write(format!("cpu/cpu{cpu}/topology/physical_package_id"), socket.to_string());
            let threads = format!("{core},{}", core + 4);
            let package = format!("{}-{},{}-{}", 2 * socket, 2 * socket + 1, 2 * socket + 4, 2 * socket + 5);
            for (index, (level, kind, size, shared)) in [
                (1, "Data", "32K", &threads),
                (1, "Instruction", "32K", &threads),
                (2, "Unified", "1024K", &threads),
                (3, "Unified", "16384K", &package),
            ]
            .into_iter()
            .enumerate()
            {
                let directory = format!("cpu/cpu{cpu}/cache/index{index}");
                write(format!("{directory}/level"), level.to_string());
                write(format!("{directory}/type"), kind.into());
                write(format!("{directory}/size"), size.into());
                write(format!("{directory}/shared_cpu_list"), shared.clone());
            }
        }
        for node in 0..2 {
            write(
                format!("node/node{node}/cpulist"),
                format!("{}-{},{}-{}", 2 * node, 2 * node + 1, 2 * node + 4, 2 * node + 5),
            );
            write(format!("node/node{node}/meminfo"), format!("Node {node} MemTotal:       1048576 kB"));
        }
        write("node/node2/cpulist".into(), String::new());
        Hardware::read(directory.path(), "Model")
    }

    #[test]
    fn sockets_nodes_cores_and_caches_are_read() {
        let hardware = two_sockets();
        assert_eq!(hardware.summary(), "Model, 2 sockets, 4 cores, 8 processors, 2 NUMA nodes");
        assert_eq!(hardware.processor(6), Some(&Processor { id: 6, core: 2, socket: 1, node: 1 }));
        assert_eq!(hardware.nodes[1], Node { id: 1, processors: vec![2, 3, 6, 7], memory_bytes: 1 << 30 });
        let caches: Vec<_> = hardware
            .caches
            .iter()
            .map(|cache| (cache.name.as_str(), cache.bytes, cache.shared_by.len()))
            .collect();
        assert_eq!(caches, [("L1d", 32 << 10, 4), ("L2", 1 << 20, 4), ("L3", 16 << 20, 2)]);
        assert_eq!(hardware.caches[2].shared_by[1], [2, 3, 6, 7]);
    }

    #[test]
    fn without_sys_every_processor_is_a_core() {
        let nothing = tempfile::tempdir().unwrap();
        let hardware = Hardware::read(nothing.path(), "Model");
        assert_eq!((hardware.sockets(), hardware.nodes.len(), hardware.caches.len()), (1, 1, 0));
        assert_eq!(hardware.cores(), hardware.processors.len());
    }

    #[test]
    fn sets_of_processors_read_as_they_are_written() {
        for list in ["0", "0-3,8", "1,3,5-7", ""] {
            assert_eq!(format_set(&parse_set(list)), list);
        }
        assert_eq!(parse_set("0-99999999999"), [0; 0]);
        assert_eq!(parse_set("x,2"), [2]);
    }
}
