//! What to time on GPUs, and the row of a table that follows from the times: no GPU is needed for either.
//!
//! Each form is timed with a few grids, at sizes where it could be the best. First come the grids: of each form the number of blocks
//! that loses least over all sizes, where that is worth a change. With these, forms are compared two by two, from the largest size to
//! the smallest: ring against pipeline, two-shot against the better of these, copy engines against it too, one-shot against what is
//! best behind it, first in lines and then in packets, lines against packets, and direct against all of them. Borders stand where [`border`](super::border) finds them.

use std::collections::BTreeMap;

use serde::Serialize;
use unisono::tuning::device::select::{Launch, Question, Rules, Wish};
use unisono::tuning::device::table::Row;
use unisono::{Form, Kind};

use super::Named;
use super::border::{self, Point};

/// Blocks of packets and lines, and of direct.
const FEW_BLOCKS: [usize; 3] = [64, 32, 16];
/// Blocks of the pipeline by bulk copies.
const BULK_BLOCKS: [usize; 3] = [128, 64, 48];
/// Blocks of a ring: by threads, and by bulk copies.
const RING_BLOCKS: [usize; 2] = [128, 64];
/// What a communicator has that is not the first on its device.
const NARROW_BLOCKS: usize = 24;
/// From where on lines are timed.
const LINES_FROM: usize = 64 << 10;
/// From where on forms with tiles are timed.
const TILES_FROM: usize = 128 << 10;
const RING_FROM: usize = 512 << 10;
const ENGINE_FROM: usize = 32 << 20;
/// What fewer or more blocks must gain at each size, on average, as a part of the time.
const WORTH_OTHER_BLOCKS: f64 = 0.02;
/// Bytes of an element.
pub(super) const ELEMENT: usize = 2;

type Field = fn(&mut Row) -> &mut usize;

/// What was timed of one operation, in µs per call.
pub(super) struct Times {
    /// Those of the communicator, with the table that is built in.
    rules: Rules,
    kind: Kind,
    at: BTreeMap<usize, Vec<(Launch, f64)>>,
}

/// One time, for people and programs.
#[derive(Serialize)]
pub(super) struct Measured {
    bytes: usize,
    form: &'static str,
    blocks: u32,
    tile: u32,
    us: f64,
}

/// What [`Rules`] a form with one grid has.
fn forced(rules: &Rules, kind: Kind, form: Form, row: &Row) -> Rules {
    let mut forced = Rules { forced: Some(Wish { form, blocks: 0, tile: 0 }), ..*rules };
    *forced.table.row_mut(kind) = *row;
    forced
}

fn question(kind: Kind, bytes: usize) -> Question {
    Question { kind, bytes, size: ELEMENT, is_reachable: true }
}

fn with(row: &Row, field: Field, value: usize) -> Row {
    let mut row = *row;
    *field(&mut row) = value;
    row
}

/// A row by whose grids the pipeline goes by bulk copies, or by threads.
fn pipeline(row: &Row, by_threads: bool) -> Row {
    Row { threads_to: if by_threads { usize::MAX } else { 0 }, ..*row }
}

/// The rules by which a call of `kind` with `bytes` is to be timed: each gives another grid.
pub(super) fn candidates(rules: &Rules, kind: Kind, bytes: usize) -> Vec<Rules> {
    let row = rules.table.row(kind);
    let mut rows: Vec<(Form, Row)> = Vec::new();
    let mut add = |form, field: Field, counts: &[usize], row: Row| {
        rows.extend(counts.iter().map(|count| (form, with(&row, field, *count))));
    };
    add(Form::OneShot, |row| &mut row.packet_blocks, &FEW_BLOCKS, *row);
    add(Form::TwoShot, |row| &mut row.packet_blocks, &FEW_BLOCKS, *row);
    if bytes >= LINES_FROM {
        add(Form::OneShotLines, |row| &mut row.packet_blocks, &FEW_BLOCKS, *row);
        add(Form::TwoShotLines, |row| &mut row.packet_blocks, &FEW_BLOCKS, *row);
    }
    add(Form::Direct, |row| &mut row.direct_blocks, &FEW_BLOCKS, *row);
    if bytes >= TILES_FROM {
        let bulk: Field = |row| &mut row.bulk_blocks;
        add(Form::Bulk, bulk, &BULK_BLOCKS, pipeline(row, false));
        add(Form::Bulk, bulk, &[NARROW_BLOCKS], pipeline(row, false));
        add(Form::Bulk, bulk, &[row.bulk_blocks], pipeline(row, true));
    }
    if bytes >= RING_FROM {
        add(Form::Ring, |row| &mut row.ring_blocks, &RING_BLOCKS, *row);
        add(Form::Ring, |row| &mut row.ring_blocks, &[NARROW_BLOCKS], *row);
    }
    if bytes >= ENGINE_FROM {
        rows.push((Form::Engine, *row));
    }
    let mut chosen: Vec<(Launch, Rules)> = Vec::new();
    for (form, row) in rows {
        let rules = forced(rules, kind, form, &row);
        let launch = rules.decide(&question(kind, bytes));
        if launch.form == form && chosen.iter().all(|(other, _)| *other != launch) {
            chosen.push((launch, rules));
        }
    }
    chosen.into_iter().map(|(_, rules)| rules).collect()
}

impl Times {
    pub(super) const fn new(rules: Rules, kind: Kind) -> Self {
        Self { rules, kind, at: BTreeMap::new() }
    }

    /// Notes what a call of so many bytes took by these rules.
    pub(super) fn add(&mut self, bytes: usize, rules: &Rules, us: f64) {
        let launch = rules.decide(&question(self.kind, bytes));
        self.at.entry(bytes).or_default().push((launch, us));
    }

    /// All of them, the smallest size first.
    pub(super) fn measured(&self) -> Vec<Measured> {
        let one = |(bytes, (launch, us)): (usize, &(Launch, f64))| Measured {
            bytes,
            form: launch.form.name(),
            blocks: launch.blocks,
            tile: launch.tile,
            us: *us,
        };
        self.at.iter().flat_map(|(bytes, times)| times.iter().map(move |time| one((*bytes, time)))).collect()
    }

    /// What a form takes with the grid of `row`, where it was timed.
    fn us(&self, bytes: usize, form: Form, row: &Row) -> Option<f64> {
        let launch = forced(&self.rules, self.kind, form, row).decide(&question(self.kind, bytes));
        let times = self.at.get(&bytes)?;
        times.iter().find(|(other, _)| *other == launch && other.form == form).map(|(_, us)| *us)
    }

    /// The points at which both were timed.
    fn points(&self, times: impl Fn(usize) -> Option<(f64, f64)>) -> Vec<Point> {
        let point = |bytes| times(bytes).map(|(small_us, large_us)| Point { bytes, small_us, large_us });
        self.at.keys().filter_map(|bytes| point(*bytes)).collect()
    }

    /// Sets the blocks of a form to that of `counts` which loses least, where it is worth it.
    fn choose_blocks(&self, row: &mut Row, forms: &[Form], counts: &[usize], field: Field) {
        let default = *field(row);
        let mut losses = vec![0.0; counts.len()];
        let mut default_loss = 0.0;
        let mut sizes = 0.0;
        for bytes in self.at.keys() {
            for form in forms {
                let us = |count: usize| self.us(*bytes, *form, &with(row, field, count));
                let all: Option<Vec<f64>> = counts.iter().map(|count| us(*count)).collect();
                let (Some(all), Some(usual)) = (all, us(default)) else { continue };
                let least = all.iter().copied().fold(usual, f64::min);
                losses.iter_mut().zip(&all).for_each(|(loss, us)| *loss += (us / least).ln());
                default_loss += (usual / least).ln();
                sizes += 1.0;
            }
        }
        let best = losses.iter().zip(counts).min_by(|a, b| a.0.total_cmp(b.0));
        if let Some((loss, count)) = best
            && default_loss - loss > WORTH_OTHER_BLOCKS * sizes
        {
            *field(row) = *count;
        }
    }

    /// The row that follows, and why its borders stand where they do.
    pub(super) fn row(&self) -> (Row, Vec<Named>) {
        let mut row = *self.rules.table.row(self.kind);
        let mut borders = Vec::new();
        let packets = [Form::OneShot, Form::TwoShot, Form::OneShotLines, Form::TwoShotLines];
        self.choose_blocks(&mut row, &packets, &FEW_BLOCKS, |row| &mut row.packet_blocks);
        self.choose_blocks(&mut row, &[Form::Direct], &FEW_BLOCKS, |row| &mut row.direct_blocks);
        self.choose_pipeline(&mut row, &mut borders);
        self.choose_blocks(&mut row, &[Form::Ring], &RING_BLOCKS, |row| &mut row.ring_blocks);
        if Form::Ring.serves(self.kind) {
            self.choose_rings(&mut row, &mut borders);
        }
        self.choose_packets(&mut row, &mut borders);
        if self.rules.have_lines() {
            self.choose_lines(&mut row, &mut borders);
        }
        if Form::Engine.serves(self.kind) {
            let points =
                self.points(|bytes| Some((self.tiled(bytes, &row)?, self.us(bytes, Form::Engine, &row)?)));
            row.engine_from = self.from("copy engines from", &points, row.engine_from, &mut borders);
        }
        if Form::Direct.serves(self.kind) {
            let points =
                self.points(|bytes| Some((self.staged(bytes, &row)?, self.us(bytes, Form::Direct, &row)?)));
            row.direct_from = self.from("in windows direct from", &points, row.direct_from, &mut borders);
        }
        (row, borders)
    }

    /// The blocks of the pipeline, and up to where threads move the data.
    fn choose_pipeline(&self, row: &mut Row, borders: &mut Vec<Named>) {
        let usual = row.threads_to;
        *row = pipeline(row, false);
        self.choose_blocks(row, &[Form::Bulk], &BULK_BLOCKS, |row| &mut row.bulk_blocks);
        let points = self.points(|bytes| {
            let us = |by_threads| self.us(bytes, Form::Bulk, &pipeline(row, by_threads));
            Some((us(true)?, us(false)?))
        });
        // Where both are the same grid, there is nothing to choose.
        let points: Vec<Point> =
            points.into_iter().filter(|point| point.small_us != point.large_us).collect();
        row.threads_to = self.to("bulk by copies from", &points, usual, borders);
    }

    fn choose_rings(&self, row: &mut Row, borders: &mut Vec<Named>) {
        let narrow = |row: &Row| Row {
            bulk_blocks: NARROW_BLOCKS,
            ring_blocks: NARROW_BLOCKS,
            ..pipeline(row, false)
        };
        let points = |row: &Row| {
            self.points(|bytes| Some((self.us(bytes, Form::Bulk, row)?, self.us(bytes, Form::Ring, row)?)))
        };
        let (wide, few) = (points(row), points(&narrow(row)));
        row.ring_from = self.from("ring from", &wide, row.ring_from, borders);
        let name = "ring of few blocks from";
        row.narrow_ring_from = self.from(name, &few, row.narrow_ring_from, borders);
    }

    fn choose_packets(&self, row: &mut Row, borders: &mut Vec<Named>) {
        if Form::TwoShot.serves(self.kind) {
            let two = |bytes| self.us(bytes, Form::TwoShot, row);
            let points = self.points(|bytes| Some((two(bytes)?, self.tiled(bytes, row)?)));
            row.two_shot_to = self.to("bulk or ring from", &points, row.two_shot_to, borders);
        }
        let points = self.points(|bytes| {
            let behind = if bytes <= row.two_shot_to { self.us(bytes, Form::TwoShot, row) } else { None };
            Some((self.us(bytes, Form::OneShot, row)?, behind.or_else(|| self.tiled(bytes, row))?))
        });
        let name = if Form::TwoShot.serves(self.kind) { "two-shot from" } else { "bulk or ring from" };
        row.one_shot_to = self.to(name, &points, row.one_shot_to, borders);
    }

    fn choose_lines(&self, row: &mut Row, borders: &mut Vec<Named>) {
        let us = |bytes, form, row: &Row| self.us(bytes, form, row);
        let has_two = Form::TwoShotLines.serves(self.kind);
        if has_two {
            let points =
                self.points(|bytes| Some((us(bytes, Form::TwoShotLines, row)?, self.tiled(bytes, row)?)));
            row.two_shot_lines_to = self.to("behind lines from", &points, row.two_shot_lines_to, borders);
        }
        let points = self.points(|bytes| {
            let has_two = bytes <= row.two_shot_lines_to;
            let behind = if has_two { us(bytes, Form::TwoShotLines, row) } else { None };
            Some((us(bytes, Form::OneShotLines, row)?, behind.or_else(|| self.tiled(bytes, row))?))
        });
        let name = if has_two { "two-shot lines from" } else { "behind lines from" };
        row.one_shot_lines_to = self.to(name, &points, row.one_shot_lines_to, borders);
        let points = self.points(|bytes| Some((self.in_packets(bytes, row)?, self.in_lines(bytes, row)?)));
        row.lines_from = self.from("in lines from", &points, row.lines_from, borders);
    }

    /// What is taken beyond packets and lines, where nothing is reached directly.
    fn tiled(&self, bytes: usize, row: &Row) -> Option<f64> {
        let ring = if bytes >= row.ring_from { self.us(bytes, Form::Ring, row) } else { None };
        ring.or_else(|| self.us(bytes, Form::Bulk, row))
    }

    /// What is taken where nothing is reached directly.
    fn staged(&self, bytes: usize, row: &Row) -> Option<f64> {
        let lines = if bytes >= row.lines_from { self.in_lines(bytes, row) } else { None };
        lines.or_else(|| self.in_packets(bytes, row))
    }

    /// What is taken in lines.
    fn in_lines(&self, bytes: usize, row: &Row) -> Option<f64> {
        let lines = |form, to| if bytes <= to { self.us(bytes, form, row) } else { None };
        lines(Form::OneShotLines, row.one_shot_lines_to)
            .or_else(|| lines(Form::TwoShotLines, row.two_shot_lines_to))
    }

    /// What is taken where there are no lines.
    fn in_packets(&self, bytes: usize, row: &Row) -> Option<f64> {
        let packets = |form, to| if bytes <= to { self.us(bytes, form, row) } else { None };
        packets(Form::OneShot, row.one_shot_to)
            .or_else(|| packets(Form::TwoShot, row.two_shot_to))
            .or_else(|| self.tiled(bytes, row))
    }

    /// From which size on the second is taken. What it always wins holds from the smallest size on that was timed.
    fn from(&self, name: &str, points: &[Point], default: usize, borders: &mut Vec<Named>) -> usize {
        let mut border = border::best(points, default);
        if border.chosen == 0 && default != 0 {
            border.chosen = points.first().map_or(default, |point| point.bytes);
        }
        let chosen = border.chosen;
        borders.push(Named { name: format!("{}: {name}", self.kind.name()), border });
        chosen
    }

    /// Up to which size the first is taken: the border stands behind it. What it always wins holds up to the largest size that was
    /// timed.
    fn to(&self, name: &str, points: &[Point], default: usize, borders: &mut Vec<Named>) -> usize {
        let mut border = border::best(points, default.saturating_add(1));
        if border.chosen == usize::MAX && default != usize::MAX {
            border.chosen = points.last().map_or(default, |point| point.bytes) + 1;
        }
        let chosen = border.chosen;
        borders.push(Named { name: format!("{}: {name}", self.kind.name()), border });
        if chosen == usize::MAX { chosen } else { chosen.saturating_sub(1) }
    }
}

#[cfg(test)]
mod tests {
    use unisono::Order;
    use unisono::ReduceOp;
    use unisono::gpu::Link;
    use unisono::tuning::device::Table;

    use super::super::gpu::sizes;
    use super::*;

    const SUM: Kind = Kind::AllReduce { op: ReduceOp::Sum };

    fn rules(ranks: usize) -> Rules {
        Rules {
            ranks,
            link: Link::Device,
            crowd: 1,
            order: Order::Fixed,
            bulk_copies: true,
            most_blocks: 130,
            engines: false,
            forced: None,
            table: Table::built_in(ranks),
        }
    }

    /// Times of a machine on which a form takes `start + bytes / speed` µs, with noise of up to ±1 % that a seed gives.
    fn timed(kind: Kind, ranks: usize, seed: u64, us: impl Fn(&Launch, f64) -> f64) -> Times {
        let mut times = Times::new(rules(ranks), kind);
        let mut state = seed;
        for bytes in sizes() {
            for candidate in candidates(&rules(ranks), kind, bytes) {
                let launch = candidate.decide(&question(kind, bytes));
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let noise = 0.99 + 0.02 * (state >> 40) as f64 / (1u64 << 24) as f64;
                times.add(bytes, &candidate, us(&launch, bytes as f64) * noise);
            }
        }
        times
    }

    /// One-shot wins up to 64 KiB, one-shot lines up to 256 KiB, two-shot lines (and of packets two-shot) up to 1 MiB, direct from 8 MiB on, the pipeline up to 32 MiB and a ring beyond.
    fn usual(launch: &Launch, bytes: f64) -> f64 {
        match launch.form {
            Form::OneShot => 3.0 + bytes / 30e3,
            Form::TwoShot => 6.0 + bytes / 90e3,
            Form::OneShotLines => 4.5 + bytes / 70e3,
            Form::TwoShotLines => 7.0 + bytes / 130e3,
            Form::Bulk if launch.by_copies && launch.blocks >= 60 => 12.0 + bytes / 200e3,
            Form::Ring if !launch.by_copies => 40.0 + bytes / 240e3,
            Form::Direct => 25.0 + bytes / 400e3,
            _ => 60.0 + bytes / 100e3,
        }
    }

    #[test]
    fn borders_stand_where_the_times_cross_whatever_the_noise() {
        for seed in 1..50 {
            let (row, borders) = timed(SUM, 4, seed, usual).row();
            // One-shot and two-shot cross at 135 KB, two-shot and the pipeline at 980 KB, pipeline and ring at 34 MB.
            assert!((65_535..=262_143).contains(&row.one_shot_to), "{seed}: {row:?}");
            assert!((524_287..=2_097_152).contains(&row.two_shot_to), "{seed}: {row:?}");
            assert!((16 << 20..=64 << 20).contains(&row.ring_from), "{seed}: {row:?}");
            // Lines and one-shot cross at 80 KB, their own two forms at 379 KB, lines and the pipeline at 1.9 MB.
            assert!((65_536..=131_072).contains(&row.lines_from), "{seed}: {row:?}");
            assert!((262_143..=524_288).contains(&row.one_shot_lines_to), "{seed}: {row:?}");
            assert!((1_048_575..=4_194_304).contains(&row.two_shot_lines_to), "{seed}: {row:?}");
            // Direct crosses the pipeline at 5.2 MB.
            assert!((2 << 20..=8 << 20).contains(&row.direct_from), "{seed}: {row:?}");
            // Grids stay where nothing else is worth it.
            let built_in = *Table::built_in(4).row(SUM);
            assert_eq!((row.packet_blocks, row.ring_blocks, row.bulk_blocks), (64, 128, 64), "{seed}");
            assert_eq!((row.threads_to, row.bulk_tile), (0, built_in.bulk_tile), "{seed}");
            // By few blocks both are equally slow, so the default stays.
            assert_eq!(row.narrow_ring_from, built_in.narrow_ring_from, "{seed}");
            assert_eq!(borders.len(), 9);
        }
    }

    #[test]
    fn a_row_says_the_same_as_the_times_that_it_comes_from() {
        let times = timed(SUM, 4, 7, usual);
        let (row, _) = times.row();
        let mut tuned = rules(4);
        *tuned.table.row_mut(SUM) = row;
        // What is chosen at each size is within the noise of the best that was timed there.
        for (bytes, all) in &times.at {
            let launch = tuned.decide(&question(SUM, *bytes));
            let us = all.iter().find(|(other, _)| *other == launch).map(|(_, us)| *us);
            let best = all.iter().map(|(_, us)| *us).fold(f64::MAX, f64::min);
            let us = us.unwrap_or_else(|| panic!("{bytes}: {launch:?} was not timed"));
            assert!(us < 1.15 * best, "{bytes}: {launch:?} takes {us}, the best {best}");
        }
    }

    #[test]
    fn fewer_blocks_are_taken_where_they_are_faster() {
        let (row, _) = timed(SUM, 4, 3, |launch, bytes| match launch.form {
            Form::OneShot | Form::TwoShot => usual(launch, bytes) * (1.0 + f64::from(launch.blocks) / 200.0),
            Form::Ring => 40.0 + bytes / if launch.by_copies { 300e3 } else { 240e3 },
            _ => usual(launch, bytes),
        })
        .row();
        assert_eq!((row.packet_blocks, row.ring_blocks), (16, 64));
    }

    #[test]
    fn operations_without_a_form_keep_its_fields() {
        let kind = Kind::Scatter { root: 0 };
        let built_in = *Table::built_in(4).row(kind);
        // Threads win up to 4 MiB.
        let (row, borders) = timed(kind, 4, 5, |launch, bytes| match launch.form {
            Form::Bulk if !launch.by_copies => 10.0 + bytes / 150e3,
            _ => usual(launch, bytes) + 10.0,
        })
        .row();
        assert_eq!((row.ring_from, row.direct_from, row.two_shot_to), (usize::MAX, usize::MAX, 0));
        assert_eq!((row.direct_blocks, row.ring_blocks), (built_in.direct_blocks, built_in.ring_blocks));
        assert!((2 << 20..16 << 20).contains(&row.threads_to), "{row:?}");
        let names: Vec<&str> = borders.iter().map(|named| named.name.as_str()).collect();
        let expected = ["bulk by copies from", "bulk or ring from", "behind lines from", "in lines from"];
        assert_eq!(names, expected.map(|name| format!("scatter: {name}")));
        // Nothing timed, nothing changed.
        assert_eq!(Times::new(rules(4), kind).row().0, built_in);
    }

    #[test]
    fn each_candidate_has_a_grid_of_its_own() {
        for ranks in [2, 4, 8] {
            for kind in unisono::tuning::DIRECT_FORMS {
                for bytes in sizes() {
                    let launches: Vec<Launch> = candidates(&rules(ranks), kind, bytes)
                        .iter()
                        .map(|rules| rules.decide(&question(kind, bytes)))
                        .collect();
                    let unequal = |at: usize| launches[..at].iter().all(|other| *other != launches[at]);
                    assert!((0..launches.len()).all(unequal), "{kind:?} {bytes}: {launches:?}");
                    // What the built-in table takes is among them, so that there is something to compare with.
                    let usual =
                        rules(ranks).decide(&Question { is_reachable: false, ..question(kind, bytes) });
                    assert!(launches.contains(&usual), "{kind:?} of {bytes} among {ranks}: {usual:?}");
                }
            }
        }
    }
}
