//! The GPUs of a host and the ways between them, as a matrix in the words of `nvidia-smi topo`, and what keeps pairs from the
//! best one.
//!
//! It is made from plain facts, so that machines which nobody has at hand can be described in tests.

use serde::{Serialize, Serializer};
use unisono::cuda::nvml::{self, GpuLinks};
use unisono::cuda::{Pcie, Remote};

use crate::hardware::format_set;
use crate::output::wrap;

/// How two GPUs reach each other.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Way {
    Itself,
    /// Over this many NVLinks.
    NvLink(u32),
    Pcie(Pcie),
    Unknown,
}

impl std::fmt::Display for Way {
    /// `NV18`, `PIX`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Itself => f.pad("self"),
            Self::NvLink(links) => f.pad(&format!("NV{links}")),
            Self::Pcie(pcie) => pcie.fmt(f),
            Self::Unknown => f.pad("?"),
        }
    }
}

impl Serialize for Way {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(super) struct Gpu {
    pub(super) index: usize,
    pub(super) name: String,
    pub(super) uuid: String,
    pub(super) pci: String,
    pub(super) numa_node: Option<u32>,
    /// NVLinks that carry data, and those that it has.
    pub(super) links: (usize, usize),
    /// The ranks whose device it is, if each takes the one of its local rank.
    pub(super) ranks: Vec<usize>,
}

/// The GPUs of a host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(super) struct Gpus {
    pub(super) gpus: Vec<Gpu>,
    /// A row for each GPU.
    pub(super) ways: Vec<Vec<Way>>,
    /// Whether all are linked through switches.
    pub(super) is_switched: bool,
    /// What keeps pairs from the best way, a sentence each; empty if nothing does.
    pub(super) notes: Vec<String>,
}

impl Gpus {
    /// The matrix of `links`; `ranks` holds the identity of each rank's device, where that is known.
    pub(super) fn new(links: &[GpuLinks], ranks: &[Option<String>]) -> Self {
        let gpu = |gpu: &GpuLinks| {
            let is_mine = |uuid: &Option<String>| uuid.as_ref() == Some(&gpu.uuid);
            Gpu {
                index: gpu.index,
                name: gpu.name.clone(),
                uuid: gpu.uuid.clone(),
                pci: gpu.pci.clone(),
                numa_node: gpu.numa_node,
                links: (gpu.links.iter().filter(|link| link.is_active).count(), gpu.links.len()),
                ranks: (0..ranks.len()).filter(|rank| is_mine(&ranks[*rank])).collect(),
            }
        };
        let way = |a: &GpuLinks, b: &GpuLinks| match (nvml::nvlinks(a, b), nvml::common(a, b)) {
            _ if a.index == b.index => Way::Itself,
            (0, Some(pcie)) => Way::Pcie(pcie),
            (0, None) => Way::Unknown,
            (links, _) => Way::NvLink(links),
        };
        let ways: Vec<Vec<Way>> = links.iter().map(|a| links.iter().map(|b| way(a, b)).collect()).collect();
        let to_switch =
            |gpu: &GpuLinks| gpu.links.iter().any(|link| link.is_active && link.remote == Remote::Switch);
        let is_linked = |way: &Way| matches!(way, Way::Itself | Way::NvLink(_));
        let is_switched =
            links.len() > 1 && links.iter().all(to_switch) && ways.iter().flatten().all(is_linked);
        let mut gpus = Self { gpus: links.iter().map(gpu).collect(), ways, is_switched, notes: Vec::new() };
        gpus.notes = gpus.explain();
        gpus
    }

    /// The ways between two different GPUs, each pair once.
    pub(super) fn pairs(&self) -> Vec<(usize, usize, Way)> {
        let all = 0..self.gpus.len();
        all.flat_map(|a| (a + 1..self.gpus.len()).map(move |b| (a, b, self.ways[a][b]))).collect()
    }

    fn explain(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let pairs = self.pairs();
        let is_linked = |way: Way| matches!(way, Way::NvLink(_));
        let apart: Vec<_> = pairs.iter().filter(|(_, _, way)| !is_linked(*way)).collect();
        if let Some((a, b, way)) = apart.iter().max_by_key(|(_, _, way)| *way) {
            let which = match (apart.len(), pairs.len()) {
                (1, _) => format!("GPU {a} and GPU {b}"),
                (some, all) if some == all => "the GPUs".to_owned(),
                (some, all) => format!("{some} of {all} pairs"),
            };
            notes.push(format!(
                "Not linked: {which} have no NVLink between them and meet on PCIe, at worst over {way} (GPU {a} and \
                 GPU {b}).",
            ));
        }
        let mut linked: Vec<Way> =
            pairs.iter().map(|(_, _, way)| *way).filter(|way| is_linked(*way)).collect();
        linked.sort_unstable();
        if let (Some(fewest), Some(most)) = (linked.first(), linked.last())
            && fewest != most
        {
            notes.push(format!(
                "Uneven: some pairs have {fewest} and some {most}; a collective is as fast as its slowest pair."
            ));
        }
        for gpu in &self.gpus {
            let (active, all) = gpu.links;
            if active < all {
                let fewer = all - active;
                let verb = if fewer == 1 { "is" } else { "are" };
                notes.push(format!(
                    "Inactive: {fewer} of the {all} NVLinks of GPU {} {verb} not in use (nvidia-smi nvlink -s).",
                    gpu.index
                ));
            }
            if gpu.ranks.len() > 1 {
                notes.push(format!(
                    "Shared: ranks {} take the same device, GPU {}, if each takes the one of its local rank; their \
                     kernels take turns there, and those that wait for each other may not.",
                    format_set(&gpu.ranks),
                    gpu.index
                ));
            }
        }
        notes
    }

    /// The GPUs as rows of a name and what it is.
    pub(super) fn rows(&self) -> Vec<(String, String)> {
        let row = |gpu: &Gpu| {
            let node = gpu.numa_node.map_or_else(String::new, |node| format!(", node {node}"));
            (format!("GPU {}", gpu.index), format!("{}, {}{node}, {}", gpu.name, gpu.pci, gpu.uuid))
        };
        self.gpus.iter().map(row).collect()
    }

    /// The matrix, and the notes.
    pub(super) fn lines(&self) -> Vec<String> {
        let head: String = self.gpus.iter().map(|gpu| format!("{:>6}", gpu.index)).collect();
        let mut lines = vec![format!("{:<9}{head}", "")];
        for (gpu, ways) in self.gpus.iter().zip(&self.ways) {
            let row: String = ways.iter().map(|way| format!("{way:>6}")).collect();
            let line = format!("{:<9}{row}", format!("GPU {}", gpu.index));
            let wide = format!("{line}{}", self.ranks_of(gpu));
            lines.push(if wide.chars().count() <= 120 { wide } else { line });
        }
        lines.push(String::new());
        match (self.notes.is_empty(), self.pairs().first()) {
            (true, Some((.., way))) => lines.push(format!("No pair fell back: all have {way}.")),
            (true, None) => lines.push("There is one GPU.".to_owned()),
            (false, _) => {}
        }
        lines.extend(self.notes.iter().flat_map(|note| wrap(note, 118)));
        lines
    }

    fn ranks_of(&self, gpu: &Gpu) -> String {
        match gpu.ranks.as_slice() {
            [] => String::new(),
            [one] => format!("   rank {one}"),
            several => format!("   ranks {}", format_set(several)),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use unisono::cuda::Link;

    use super::*;

    /// `count` GPUs on two NUMA nodes, with these links each.
    pub(crate) fn host(count: usize, links: &dyn Fn(usize) -> Vec<Link>) -> Vec<GpuLinks> {
        let node = |index: usize| index * 2 / count;
        let common =
            |a: usize, b: usize| (a != b).then(|| if node(a) == node(b) { Pcie::Node } else { Pcie::Sys });
        let gpu = |index: usize| GpuLinks {
            index,
            uuid: format!("GPU-00000000-0000-0000-0000-{index:012x}"),
            name: "NVIDIA H200".to_owned(),
            pci: format!("0000:{:02x}:00.0", 0x1b + index * 16),
            numa_node: Some(node(index) as u32),
            links: links(index),
            pcie: (0..count).map(|other| common(index, other)).collect(),
        };
        (0..count).map(gpu).collect()
    }

    pub(crate) fn switched(count: usize) -> Vec<Link> {
        let link = Link { is_active: true, remote: Remote::Switch, remote_pci: Some("0000:07:00.0".into()) };
        vec![link; count]
    }

    /// The device of each rank: that of its number, of `count`.
    pub(crate) fn devices(ranks: usize, count: usize) -> Vec<Option<String>> {
        let uuid = |rank: usize| Some(format!("GPU-00000000-0000-0000-0000-{:012x}", rank % count));
        (0..ranks).map(uuid).collect()
    }

    #[test]
    fn behind_switches_all_pairs_are_equal_and_nothing_is_to_be_said() {
        let gpus = Gpus::new(&host(4, &|_| switched(18)), &devices(4, 4));
        assert!(gpus.is_switched);
        assert_eq!(
            gpus.lines(),
            [
                "              0     1     2     3",
                "GPU 0      self  NV18  NV18  NV18   rank 0",
                "GPU 1      NV18  self  NV18  NV18   rank 1",
                "GPU 2      NV18  NV18  self  NV18   rank 2",
                "GPU 3      NV18  NV18  NV18  self   rank 3",
                "",
                "No pair fell back: all have NV18.",
            ]
        );
        assert_eq!(
            gpus.rows()[1],
            (
                "GPU 1".to_owned(),
                "NVIDIA H200, 0000:2b:00.0, node 0, GPU-00000000-0000-0000-0000-000000000001".to_owned()
            )
        );
    }

    #[test]
    fn pairs_without_links_and_ranks_that_share_a_device_are_said() {
        let bridge = |index: usize| {
            let beside = format!("0000:{:02x}:00.0", 0x1b + (index ^ 1) * 16);
            vec![Link { is_active: true, remote: Remote::Gpu, remote_pci: Some(beside) }; 4]
        };
        let gpus = Gpus::new(&host(4, &bridge), &devices(6, 4));
        assert!(!gpus.is_switched);
        let lines = gpus.lines();
        assert_eq!(lines[1], "GPU 0      self   NV4   SYS   SYS   ranks 0,4");
        assert!(
            gpus.notes[0].starts_with(
                "Not linked: 4 of 6 pairs have no NVLink between them and meet on PCIe, at worst over SYS"
            ),
            "{:?}",
            gpus.notes
        );
        assert!(
            gpus.notes[1].starts_with("Shared: ranks 0,4 take the same device, GPU 0,"),
            "{:?}",
            gpus.notes
        );
        assert_eq!(gpus.notes.len(), 3);
        let none = Gpus::new(&host(2, &|_| Vec::new()), &[]);
        assert!(none.notes[0].starts_with("Not linked: GPU 0 and GPU 1 have no NVLink"), "{:?}", none.notes);
        assert_eq!(
            serde_json::to_value(&none.ways).unwrap(),
            serde_json::json!([["self", "SYS"], ["SYS", "self"]])
        );
    }

    #[test]
    fn links_that_are_not_in_use_make_pairs_uneven() {
        let mut links = host(3, &|_| switched(18));
        for link in &mut links[2].links[..2] {
            link.is_active = false;
        }
        let gpus = Gpus::new(&links, &[]);
        assert_eq!(gpus.ways[0][1..], [Way::NvLink(18), Way::NvLink(16)]);
        assert_eq!(
            gpus.notes,
            [
                "Uneven: some pairs have NV16 and some NV18; a collective is as fast as its slowest pair.",
                "Inactive: 2 of the 18 NVLinks of GPU 2 are not in use (nvidia-smi nvlink -s).",
            ]
        );
        assert_eq!(Gpus::new(&host(1, &|_| Vec::new()), &[]).lines().last().unwrap(), "There is one GPU.");
    }
}
