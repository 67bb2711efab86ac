//! The matrix of links between ranks (or processors), and what keeps pairs from the best one, in words.

use serde::Serialize;

use crate::hardware::{Hardware, format_set};
use crate::output::wrap;

/// More places than this are no table that anybody reads: they are listed by NUMA node.
const MOST_COLUMNS: usize = 20;

/// A rank, or a processor, and where it runs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(super) struct Place {
    /// `rank 3`.
    pub(super) name: String,
    pub(super) pid: Option<u64>,
    /// Processors on which it may run, ascending.
    pub(super) processors: Vec<usize>,
    /// Their NUMA nodes, ascending.
    pub(super) nodes: Vec<usize>,
}

impl Place {
    pub(super) const fn new(name: String, processors: Vec<usize>) -> Self {
        Self { name, pid: None, processors, nodes: Vec::new() }
    }
}

/// How two of them reach each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub(super) enum Link {
    #[serde(rename = "self")]
    Itself,
    #[serde(rename = "SHM")]
    SharedMemory,
    #[serde(rename = "NUMA")]
    AcrossNodes,
    #[serde(rename = "NET")]
    Network,
}

impl Link {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Itself => "self",
            Self::SharedMemory => "SHM",
            Self::AcrossNodes => "NUMA",
            Self::Network => "NET",
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(super) struct Matrix {
    pub(super) title: String,
    pub(super) places: Vec<Place>,
    /// A row for each place.
    pub(super) links: Vec<Vec<Link>>,
    /// What keeps pairs from the best link, a sentence each; empty if nothing does.
    pub(super) notes: Vec<String>,
}

impl Matrix {
    /// The matrix of `places`; `shares_memory` says for two of them whether they do at all.
    pub(super) fn new(
        title: &str,
        mut places: Vec<Place>,
        hardware: &Hardware,
        shares_memory: &dyn Fn(usize, usize) -> bool,
    ) -> Self {
        for place in &mut places {
            let node = |id: &usize| hardware.processor(*id).map(|processor| processor.node);
            place.nodes = place.processors.iter().filter_map(node).collect();
            place.nodes.sort_unstable();
            place.nodes.dedup();
        }
        let link = |a: usize, b: usize| {
            let (ours, theirs) = (&places[a].nodes, &places[b].nodes);
            if a == b {
                Link::Itself
            } else if !shares_memory(a, b) {
                Link::Network
            } else if ours.iter().any(|node| theirs.contains(node)) || ours.is_empty() || theirs.is_empty() {
                Link::SharedMemory
            } else {
                Link::AcrossNodes
            }
        };
        let all = 0..places.len();
        let links = all.clone().map(|a| all.clone().map(|b| link(a, b)).collect()).collect();
        let mut matrix = Self { title: title.to_owned(), places, links, notes: Vec::new() };
        matrix.notes = matrix.explain(hardware);
        matrix
    }

    /// The pairs with this link, each once.
    fn pairs(&self, wanted: Link) -> Vec<(&Place, &Place)> {
        let all = 0..self.places.len();
        let pairs = all.flat_map(|a| (a + 1..self.places.len()).map(move |b| (a, b)));
        let found = pairs.filter(|(a, b)| self.links[*a][*b] == wanted);
        found.map(|(a, b)| (&self.places[a], &self.places[b])).collect()
    }

    fn explain(&self, hardware: &Hardware) -> Vec<String> {
        let mut notes = Vec::new();
        if let Some((a, b)) = self.pairs(Link::Network).first() {
            notes.push(format!("NET: {} and {} are on different hosts.", a.name, b.name));
        }
        let across = self.pairs(Link::AcrossNodes);
        if let Some((a, b)) = across.first() {
            notes.push(format!(
                "NUMA: {} share memory across NUMA nodes, as {} (node {}) and {} (node {}); each cache line crosses \
                 between them.",
                pairs(across.len()),
                a.name,
                format_set(&a.nodes),
                b.name,
                format_set(&b.nodes),
            ));
        }
        let is_rank = |place: &&Place| place.name.starts_with("rank");
        let roaming: Vec<&Place> =
            self.places.iter().filter(is_rank).filter(|place| place.nodes.len() > 1).collect();
        if let Some(first) = roaming.first() {
            notes.push(format!(
                "Not bound: {} may run on NUMA nodes {} and change between them, as {}; SHM is the best they get. \
                 unisono run --bind gives each rank a processor.",
                number(roaming.len(), "rank"),
                format_set(&first.nodes),
                first.name,
            ));
        }
        notes.extend(self.explain_crowding(hardware));
        notes
    }

    /// Ranks that take turns on processors, or share a core.
    fn explain_crowding(&self, hardware: &Hardware) -> Vec<String> {
        let mut notes = Vec::new();
        let ranks: Vec<&Place> = self.places.iter().filter(|place| place.name.starts_with("rank")).collect();
        let mut used: Vec<usize> = ranks.iter().flat_map(|place| place.processors.iter().copied()).collect();
        used.sort_unstable();
        used.dedup();
        if ranks.len() > used.len() && !used.is_empty() {
            notes.push(format!(
                "Crowded: {} take turns on {} ({}): a rank that waits must let the other run, and does not spin.",
                number(ranks.len(), "rank"),
                number(used.len(), "processor"),
                format_set(&used),
            ));
            return notes;
        }
        let core = |place: &Place| match place.processors.as_slice() {
            [one] => hardware.processor(*one).map(|processor| processor.core),
            _ => None,
        };
        let pairs_of =
            ranks.iter().enumerate().flat_map(|(at, a)| ranks[at + 1..].iter().map(move |b| (*a, *b)));
        let shared: Vec<_> = pairs_of.filter(|(a, b)| core(a).is_some() && core(a) == core(b)).collect();
        if let Some((a, b)) = shared.first() {
            let (first, second) = (a.processors[0], b.processors[0]);
            let what = if first == second { "one processor" } else { "hyper-threads of one core" };
            notes.push(format!(
                "Shared cores: {} run on {what}, as {} and {} (processors {first} and {second}).",
                pairs(shared.len()),
                a.name,
                b.name,
            ));
        }
        notes
    }

    /// As people read it.
    pub(super) fn lines(&self) -> Vec<String> {
        let mut lines = if self.places.len() <= MOST_COLUMNS { self.table() } else { self.by_node() };
        lines.push(String::new());
        if self.notes.is_empty() {
            lines.push("No pair fell back: all share the memory of one NUMA node.".to_owned());
        }
        for note in &self.notes {
            lines.extend(wrap(note, 118));
        }
        lines
    }

    fn table(&self) -> Vec<String> {
        let number = |place: &Place| place.name.split(' ').next_back().unwrap_or_default().to_owned();
        let head: String = self.places.iter().map(|place| format!("{:>5}", number(place))).collect();
        let mut lines = vec![format!("{:<9}{head}", "")];
        for (place, links) in self.places.iter().zip(&self.links) {
            let row: String = links.iter().map(|link| format!("{:>5}", link.name())).collect();
            let pid = place.pid.map_or_else(String::new, |pid| format!("   pid {pid}"));
            let on = match (place.name.starts_with("rank"), place.processors.as_slice()) {
                (false, _) | (true, []) => String::new(),
                (true, [one]) => format!("   on processor {one}"),
                (true, several) => format!("   on processors {}", format_set(several)),
            };
            let line = format!("{:<9}{row}", place.name);
            let wide = format!("{line}{pid}{on}");
            lines.push(if wide.chars().count() <= 120 { wide } else { line });
        }
        lines
    }

    /// Which places are on which nodes, for many of them.
    fn by_node(&self) -> Vec<String> {
        let mut sets: Vec<&[usize]> = self.places.iter().map(|place| place.nodes.as_slice()).collect();
        sets.sort_unstable();
        sets.dedup();
        let line = |nodes: &[usize]| {
            let on = self.places.iter().enumerate().filter(|(_, place)| place.nodes == nodes);
            let ranks: Vec<usize> = on.map(|(at, _)| at).collect();
            let names = format!("ranks {} on NUMA node {}: SHM", format_set(&ranks), format_set(nodes));
            let others = if sets.len() > 1 { "; NUMA to those on other nodes" } else { "" };
            format!("{names} among each other{others}")
        };
        sets.iter().flat_map(|nodes| wrap(&line(nodes), 118)).collect()
    }
}

fn number(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

fn pairs(count: usize) -> String {
    number(count, "pair")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware::tests::two_sockets;

    fn ranks(processors: &[&[usize]]) -> Matrix {
        let place = |(rank, on): (usize, &&[usize])| Place::new(format!("rank {rank}"), on.to_vec());
        let places = processors.iter().enumerate().map(place).collect();
        Matrix::new("ranks", places, &two_sockets(), &|_, _| true)
    }

    #[test]
    fn ranks_on_other_nodes_are_marked_and_explained() {
        let matrix = ranks(&[&[0], &[1], &[2]]);
        assert_eq!(matrix.links[0], [Link::Itself, Link::SharedMemory, Link::AcrossNodes]);
        assert_eq!(
            matrix.notes,
            [
                "NUMA: 2 pairs share memory across NUMA nodes, as rank 0 (node 0) and rank 2 (node 1); each cache line \
              crosses between them."
            ]
        );
        let lines = matrix.lines();
        assert_eq!(lines[0], "             0    1    2");
        assert_eq!(lines[3], "rank 2    NUMA NUMA self   on processor 2");
    }

    #[test]
    fn one_node_is_the_best_there_is() {
        let matrix = ranks(&[&[0], &[1]]);
        assert_eq!(matrix.notes, [""; 0]);
        assert_eq!(
            matrix.lines().last().unwrap(),
            "No pair fell back: all share the memory of one NUMA node."
        );
    }

    #[test]
    fn what_is_not_bound_crowded_or_on_one_core_is_said() {
        let roaming = ranks(&[&[0, 1, 2, 3], &[0, 1, 2, 3]]);
        assert_eq!(roaming.links[0][1], Link::SharedMemory);
        assert!(
            roaming.notes[0].starts_with("Not bound: 2 ranks may run on NUMA nodes 0-1"),
            "{:?}",
            roaming.notes
        );
        let crowded = ranks(&[&[0, 1], &[0, 1], &[0, 1]]);
        assert!(
            crowded.notes[0].starts_with("Crowded: 3 ranks take turns on 2 processors (0-1)"),
            "{crowded:?}"
        );
        let siblings = ranks(&[&[1], &[5]]);
        assert!(
            siblings.notes[0].contains("1 pair run on hyper-threads of one core, as rank 0 and rank 1"),
            "{siblings:?}"
        );
    }

    #[test]
    fn many_ranks_are_listed_by_node() {
        let on: Vec<&[usize]> =
            (0..32).map(|rank| if rank < 16 { [0].as_slice() } else { [2].as_slice() }).collect();
        let lines = ranks(&on).lines();
        assert_eq!(lines[0], "ranks 0-15 on NUMA node 0: SHM among each other; NUMA to those on other nodes");
        assert!(lines.iter().all(|line| line.chars().count() <= 120));
    }

    #[test]
    fn hosts_that_differ_are_reached_by_the_network() {
        let places = (0..2).map(|rank| Place::new(format!("rank {rank}"), vec![rank])).collect();
        let matrix = Matrix::new("ranks", places, &two_sockets(), &|_, _| false);
        assert_eq!(matrix.links[1][0], Link::Network);
        assert_eq!(matrix.notes, ["NET: rank 0 and rank 1 are on different hosts."]);
    }
}
