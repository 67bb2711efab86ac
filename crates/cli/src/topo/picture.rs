//! The topology as a picture: hosts as boxes, in them the ranks (or processors) by NUMA node, and the GPUs on a ring.
//!
//! A line is what two of them reach each other by. Where switches link all GPUs, each has a line to them; otherwise each pair
//! has a line of its own. SVG is text, and what is drawn is boxes, lines and words, so it is written by hand.

use std::fmt::Write as _;

use unisono::cuda::Pcie;

use super::gpus::{Gpu, Gpus, Way};
use super::matrix::{Link, Matrix, Place};
use crate::hardware::format_set;
use crate::output::wrap;

const PLACE: (f64, f64) = (104.0, 40.0);
const GPU: (f64, f64) = (144.0, 58.0);
const PADDING: f64 = 16.0;
const GAP: f64 = 8.0;
/// Height of a title.
const TITLE: f64 = 26.0;
/// Room for a line with its name between two boxes.
const BETWEEN: f64 = 72.0;
const NOTE_CHARACTERS: usize = 100;

/// The picture of `matrix` and of the GPUs of `host`, on which its first place is.
pub(super) fn svg(host: &str, matrix: &Matrix, gpus: Option<&Gpus>) -> String {
    let mut canvas = Canvas::default();
    let mut at = PADDING + TITLE;
    canvas.text(PADDING, PADDING + 12.0, "start", "title", &matrix.title);
    let hosts = hosts(matrix);
    for (number, places) in hosts.iter().enumerate() {
        if number > 0 {
            canvas.line((PADDING + 60.0, at), (PADDING + 60.0, at + BETWEEN), "net");
            canvas.label(PADDING + 60.0, at + BETWEEN / 2.0, Link::Network.name());
            at += BETWEEN;
        }
        let name = if number == 0 { host.to_owned() } else { format!("host {number}") };
        at = draw_host(&mut canvas, at, &name, &matrix.places, places, gpus.filter(|_| number == 0));
    }
    at += PADDING;
    let notes = matrix.notes.iter().chain(gpus.iter().flat_map(|gpus| &gpus.notes));
    for line in notes.flat_map(|note| wrap(note, NOTE_CHARACTERS)) {
        at += 16.0;
        canvas.text(PADDING, at, "start", "note", &line);
    }
    canvas.finish()
}

/// The places of each host.
fn hosts(matrix: &Matrix) -> Vec<Vec<usize>> {
    let mut hosts: Vec<Vec<usize>> = Vec::new();
    for place in 0..matrix.places.len() {
        match hosts.iter_mut().find(|host| matrix.links[host[0]][place] != Link::Network) {
            Some(host) => host.push(place),
            None => hosts.push(vec![place]),
        }
    }
    hosts
}

/// Draws a host from `top` on, and answers where it ends.
fn draw_host(
    canvas: &mut Canvas,
    top: f64,
    name: &str,
    all: &[Place],
    places: &[usize],
    gpus: Option<&Gpus>,
) -> f64 {
    let mut nodes: Vec<&[usize]> = places.iter().map(|place| all[*place].nodes.as_slice()).collect();
    nodes.sort_unstable();
    nodes.dedup();
    let inside = top + TITLE + PADDING;
    let (mut left, mut bottom) = (2.0 * PADDING, inside);
    // What is drawn first lies below: the frame takes its place when its size is known.
    let frame = canvas.reserve();
    for (number, node) in nodes.iter().enumerate() {
        if number > 0 {
            canvas.line((left, inside + TITLE), (left + BETWEEN, inside + TITLE), "numa");
            canvas.label(left + BETWEEN / 2.0, inside + TITLE, Link::AcrossNodes.name());
            left += BETWEEN;
        }
        let on_it: Vec<&Place> = places.iter().map(|at| &all[*at]).filter(|at| at.nodes == *node).collect();
        let (right, end) = draw_node(canvas, (left, inside), node, &on_it);
        (left, bottom) = (right, bottom.max(end));
    }
    let mut right = left;
    if let Some(gpus) = gpus {
        let (width, end) =
            draw_gpus(canvas, (2.0 * PADDING, bottom + 2.0 * PADDING), left - 2.0 * PADDING, gpus);
        (right, bottom) = (right.max(2.0 * PADDING + width), end);
    }
    let size = (right, bottom + PADDING - top);
    canvas.fill(frame, (PADDING, top), size, "host");
    canvas.text(2.0 * PADDING, top + 20.0, "start", "title", name);
    bottom + PADDING
}

/// Draws the places of a NUMA node, and answers where they end.
fn draw_node(canvas: &mut Canvas, at: (f64, f64), node: &[usize], places: &[&Place]) -> (f64, f64) {
    let columns = match places.len() {
        few @ 0..=16 => few.clamp(1, 4),
        many => (1..=12).find(|columns| columns * columns >= many).unwrap_or(12),
    };
    let rows = places.len().div_ceil(columns);
    let width = columns as f64 * (PLACE.0 + GAP) - GAP + 2.0 * PADDING;
    let height = rows as f64 * (PLACE.1 + GAP) - GAP + PADDING + TITLE;
    canvas.frame(at, (width, height), "node");
    let title = match node {
        [] => Link::SharedMemory.name().to_owned(),
        nodes => format!(
            "NUMA node{} {} · {}",
            if nodes.len() == 1 { "" } else { "s" },
            format_set(nodes),
            Link::SharedMemory.name()
        ),
    };
    canvas.text(at.0 + PADDING, at.1 + 17.0, "start", "small", &title);
    for (number, place) in places.iter().enumerate() {
        let left = at.0 + PADDING + (number % columns) as f64 * (PLACE.0 + GAP);
        let top = at.1 + TITLE + (number / columns) as f64 * (PLACE.1 + GAP);
        canvas.frame((left, top), PLACE, "place");
        let on = format_set(&place.processors);
        let on = if on.chars().count() > 11 {
            format!("{} processors", place.processors.len())
        } else {
            format!("cpu {on}")
        };
        let is_rank = place.name.starts_with("rank");
        let first = if is_rank { top + 17.0 } else { top + 24.0 };
        canvas.text(left + PLACE.0 / 2.0, first, "middle", "name", &place.name);
        if is_rank {
            canvas.text(left + PLACE.0 / 2.0, top + 32.0, "middle", "small", &on);
        }
    }
    (at.0 + width, at.1 + height)
}

/// Draws the GPUs on a ring in the middle of `room`, with the ways between them, and answers the width and where it ends.
fn draw_gpus(canvas: &mut Canvas, at: (f64, f64), room: f64, gpus: &Gpus) -> (f64, f64) {
    let count = gpus.gpus.len();
    let radius = if count == 1 { 0.0 } else { (count as f64 * 30.0).max(120.0) };
    // Wider than high, as the boxes are. Two lie side by side.
    let (wide, high) = (radius * 1.4, if count == 2 { 0.0 } else { radius });
    let width = room.max(2.0 * wide + GPU.0);
    let centre = (at.0 + width / 2.0, at.1 + high + GPU.1 / 2.0);
    let on_ring = |number: usize| {
        // The first pair lies on top, side by side.
        let angle =
            std::f64::consts::TAU * (number as f64 - 0.5) / count as f64 - std::f64::consts::FRAC_PI_2;
        (centre.0 + wide * angle.cos(), centre.1 + high * angle.sin())
    };
    if gpus.is_switched {
        for number in 0..count {
            let most = gpus.ways[number].iter().filter(|way| **way != Way::Itself).min();
            let way = most.copied().unwrap_or(Way::Unknown);
            let place = on_ring(number);
            canvas.line(place, centre, colour(way));
            canvas.label(between(place, centre, 0.55).0, between(place, centre, 0.55).1, &way.to_string());
        }
        canvas.frame((centre.0 - 52.0, centre.1 - 18.0), (104.0, 36.0), "switch");
        canvas.text(centre.0, centre.1 + 4.0, "middle", "name", "NVSwitch");
    } else {
        let mut pairs = gpus.pairs();
        // The best on top.
        pairs.sort_by_key(|(_, _, way)| std::cmp::Reverse(*way));
        for (a, b, way) in &pairs {
            canvas.line(on_ring(*a), on_ring(*b), colour(*way));
        }
        for (a, b, way) in &pairs {
            // Not in the middle, where the lines between opposite ones cross.
            let share = if (b - a) * 2 == count && count > 2 { 0.36 } else { 0.5 };
            let (x, y) = between(on_ring(*a), on_ring(*b), share);
            canvas.label(x, y, &way.to_string());
        }
    }
    for (number, gpu) in gpus.gpus.iter().enumerate() {
        draw_gpu(canvas, on_ring(number), gpu);
    }
    (width, at.1 + 2.0 * high + GPU.1)
}

fn draw_gpu(canvas: &mut Canvas, centre: (f64, f64), gpu: &Gpu) {
    canvas.frame((centre.0 - GPU.0 / 2.0, centre.1 - GPU.1 / 2.0), GPU, "gpu");
    let ranks = match gpu.ranks.as_slice() {
        [] => String::new(),
        [one] => format!(" · rank {one}"),
        several => format!(" · ranks {}", format_set(several)),
    };
    let node = gpu.numa_node.map_or_else(String::new, |node| format!(" · node {node}"));
    canvas.text(centre.0, centre.1 - 12.0, "middle", "name", &format!("GPU {}{ranks}", gpu.index));
    canvas.text(centre.0, centre.1 + 4.0, "middle", "small", &gpu.name);
    canvas.text(centre.0, centre.1 + 19.0, "middle", "small", &format!("{}{node}", gpu.pci));
}

/// The class of a line.
const fn colour(way: Way) -> &'static str {
    match way {
        Way::NvLink(_) | Way::Itself => "nvlink",
        Way::Pcie(Pcie::Pix | Pcie::Pxb) => "pcie",
        Way::Pcie(Pcie::Phb | Pcie::Node) => "bridge",
        Way::Pcie(Pcie::Sys) | Way::Unknown => "system",
    }
}

fn between(a: (f64, f64), b: (f64, f64), share: f64) -> (f64, f64) {
    (a.0 + (b.0 - a.0) * share, a.1 + (b.1 - a.1) * share)
}

/// What was drawn, and how far it reaches.
#[derive(Default)]
struct Canvas {
    elements: Vec<String>,
    reach: (f64, f64),
}

const STYLE: &str = "text{font-family:sans-serif;font-size:13px;fill:#1c2733}.title{font-size:15px;font-weight:bold}\
    .name{font-weight:bold}.small{font-size:11px}.note{font-size:13px}\
    .label{font-size:11px;font-weight:bold}.halo{fill:#ffffff}\
    rect{rx:6px}.host{fill:#f4f6f8;stroke:#8794a1}.node{fill:#e4eaf0;stroke:#b3bec9}.place{fill:#ffffff;stroke:#5b7fa6}\
    .gpu{fill:#eaf6e6;stroke:#4c9a2a}.switch{fill:#d5ecc9;stroke:#4c9a2a}\
    line{stroke-width:2}.nvlink{stroke:#4c9a2a}.pcie{stroke:#2f6db5;stroke-dasharray:6 3}\
    .bridge{stroke:#d98a1f;stroke-dasharray:6 3}.system{stroke:#c4372c;stroke-dasharray:3 3}\
    .numa{stroke:#d98a1f}.net{stroke:#c4372c}";

impl Canvas {
    fn reaches(&mut self, x: f64, y: f64) {
        self.reach = (self.reach.0.max(x), self.reach.1.max(y));
    }

    /// Keeps a place among the elements, for [`Canvas::fill`].
    fn reserve(&mut self) -> usize {
        self.elements.push(String::new());
        self.elements.len() - 1
    }

    fn fill(&mut self, place: usize, at: (f64, f64), size: (f64, f64), class: &str) {
        self.reaches(at.0 + size.0, at.1 + size.1);
        self.elements[place] = format!(
            r#"<rect class="{class}" x="{:.0}" y="{:.0}" width="{:.0}" height="{:.0}" rx="6"/>"#,
            at.0, at.1, size.0, size.1
        );
    }

    fn frame(&mut self, at: (f64, f64), size: (f64, f64), class: &str) {
        let place = self.reserve();
        self.fill(place, at, size, class);
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), class: &str) {
        self.elements.push(format!(
            r#"<line class="{class}" x1="{:.0}" y1="{:.0}" x2="{:.0}" y2="{:.0}"/>"#,
            from.0, from.1, to.0, to.1
        ));
    }

    /// The name of a line, on a ground of its own.
    fn label(&mut self, x: f64, y: f64, text: &str) {
        let width = text.chars().count() as f64 * 8.0 + 6.0;
        self.frame((x - width / 2.0, y - 8.0), (width, 16.0), "halo");
        self.text(x, y + 4.0, "middle", "label", text);
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, class: &str, text: &str) {
        if anchor == "start" {
            // As wide as letters are at most on average.
            self.reaches(x + text.chars().count() as f64 * 7.2, y + 4.0);
        }
        self.elements.push(format!(
            r#"<text class="{class}" x="{x:.0}" y="{y:.0}" text-anchor="{anchor}">{}</text>"#,
            escape(text)
        ));
    }

    fn finish(self) -> String {
        let (width, height) = (self.reach.0 + PADDING, self.reach.1 + PADDING);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" viewBox=\"0 0 {width:.0} \
             {height:.0}\">\n<style>{STYLE}</style>\n<rect width=\"{width:.0}\" height=\"{height:.0}\" fill=\"#ffffff\"/>\n"
        );
        for element in self.elements.iter().filter(|element| !element.is_empty()) {
            let _ = writeln!(svg, "{element}");
        }
        svg + "</svg>\n"
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::gpus::tests::{devices, host, switched};
    use super::*;
    use crate::hardware::tests::two_sockets;

    fn ranks(count: usize, name: &str) -> Matrix {
        let places = (0..count).map(|rank| Place::new(format!("rank {rank}"), vec![rank % 8])).collect();
        Matrix::new(name, places, &two_sockets(), &|a, b| a / 8 == b / 8)
    }

    /// The elements, if each that opens closes, and no text breaks out of its own.
    fn elements(svg: &str) -> Vec<String> {
        let (mut open, mut all) = (Vec::new(), Vec::new());
        for part in svg.split('<').skip(1) {
            let (tag, text) = part.split_once('>').unwrap_or_else(|| panic!("`{part}` does not end"));
            assert!(tag.matches('"').count() % 2 == 0 && !text.contains('"'), "{part}");
            let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap().to_owned();
            if tag.starts_with('/') {
                assert_eq!(open.pop(), Some(name));
            } else if !tag.ends_with('/') {
                open.push(name.clone());
                all.push(format!("{name} {text}"));
            } else {
                all.push(name);
            }
        }
        assert_eq!(open, Vec::<String>::new());
        all
    }

    fn count(all: &[String], element: &str) -> usize {
        all.iter().filter(|one| *one == element).count()
    }

    /// Writes it where somebody wants to look at it.
    fn keep(name: &str, svg: &str) {
        if let Some(folder) = std::env::var_os("UNISONO_TEST_PICTURES") {
            std::fs::write(std::path::Path::new(&folder).join(format!("{name}.svg")), svg).unwrap();
        }
    }

    #[test]
    fn gpus_behind_switches_have_a_line_each() {
        let gpus = Gpus::new(&host(8, &|_| switched(18)), &devices(8, 8));
        let svg = svg("node7", &ranks(8, "8 ranks"), Some(&gpus));
        keep("switched", &svg);
        let all = elements(&svg);
        // One more between the NUMA nodes.
        assert_eq!(count(&all, "line"), 8 + 1);
        assert_eq!(count(&all, "text NV18"), 8);
        assert_eq!((count(&all, "text NVSwitch"), count(&all, "text GPU 7 · rank 7")), (1, 1));
        assert_eq!(count(&all, "text NUMA node 1 · SHM"), 1);
    }

    #[test]
    fn gpus_without_switches_have_a_line_for_each_pair() {
        let svg =
            svg("node7", &ranks(4, "4 ranks"), Some(&Gpus::new(&host(4, &|_| Vec::new()), &devices(4, 4))));
        keep("pcie", &svg);
        let all = elements(&svg);
        assert_eq!((count(&all, "text SYS"), count(&all, "text NODE")), (4, 2));
        assert_eq!(count(&all, "line"), 6 + 1);
    }

    #[test]
    fn hosts_and_names_with_signs_of_xml_are_drawn() {
        let svg = svg("a<b> & \"c\"", &ranks(16, "16 <ranks>"), None);
        keep("hosts", &svg);
        let all = elements(&svg);
        assert_eq!(count(&all, "text a&lt;b&gt; &amp; &quot;c&quot;"), 1);
        assert_eq!((count(&all, "text NET"), count(&all, "text NUMA")), (1, 2));
        assert_eq!(all.iter().filter(|text| text.starts_with("text rank ")).count(), 16);
    }
}
