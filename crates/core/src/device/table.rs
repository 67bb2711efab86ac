//! Where the forms of collectives on GPUs change, and their grids, as data: measured on one kind of device, for worlds of some sizes.
//!
//! In text a row is a line: `gpus=4 all_reduce one_shot_to=262144 two_shot_to=2097152 …`, with every field in the order of
//! [`Row`]. A table of a world has a row for each operation of [`DIRECT_FORMS`]; tuning files hold such tables, and the one that is
//! built in ([`Table::built_in`]) is written likewise. Sizes are bytes of a part; `never` stands for none.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::LazyLock;

use super::layout::{MAX_BLOCKS, MAX_RANKS};
use crate::call::Kind;
use crate::select::DIRECT_FORMS;

/// The most blocks for which bulk copies move data. Each takes a multiprocessor, so these are half of an H200, as are twice as many
/// that move data by their threads.
pub const WIDE_BLOCKS: usize = 64;
/// The most vectors of 16 bytes in a tile that a file may ask for; there is room for no more anywhere.
const MAX_TILE: usize = 1 << 16;
/// On what the built-in table was measured.
pub const BUILT_IN_FROM: &str = "2, 4 and 8 × NVIDIA H200";

/// Where the forms of one operation change, among so many ranks, and their grids.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Row {
    /// One-shot up to here, where packets have room.
    pub one_shot_to: usize,
    /// Two-shot above that and up to here, where packets have room.
    pub two_shot_to: usize,
    /// In lines from here on, where data can travel so.
    pub lines_from: usize,
    /// These are one-shot up to here, where lines have room.
    pub one_shot_lines_to: usize,
    /// Two-shot above that and up to here, where lines have room.
    pub two_shot_lines_to: usize,
    /// Direct from here on, and below where packets have no room, if all buffers lie where all ranks reach them.
    pub direct_from: usize,
    /// Else a ring from here on, and the pipeline (bulk) below.
    pub ring_from: usize,
    /// The same where the communicator may have few blocks.
    pub narrow_ring_from: usize,
    /// Copy engines from here on, where they may serve calls that nobody asked it for.
    pub engine_from: usize,
    /// The most blocks of one-shot and two-shot, in packets or in lines.
    pub packet_blocks: usize,
    /// The most blocks of direct.
    pub direct_blocks: usize,
    /// Up to here the pipeline takes blocks as if there were no bulk copies.
    pub threads_to: usize,
    /// The most blocks of the pipeline where threads move the data.
    pub thread_blocks: usize,
    /// Its most blocks where bulk copies do; more than [`WIDE_BLOCKS`] share multiprocessors, two by two.
    pub bulk_blocks: usize,
    /// Vectors of 16 bytes in a tile of the pipeline, by bulk copies; twice as many where few blocks have a lot to do.
    pub bulk_tile: usize,
    /// The most blocks of a ring.
    pub ring_blocks: usize,
}

/// What a field may hold.
#[derive(Clone, Copy)]
enum Values {
    /// A number of bytes, or `never` for `usize::MAX`.
    Bytes,
    /// From 1 up to this.
    UpTo(usize),
}

type Field = (&'static str, Values, fn(&mut Row) -> &mut usize);

/// Name, values and place of each field, in the order of text.
const FIELDS: [Field; 16] = [
    ("one_shot_to", Values::Bytes, |row| &mut row.one_shot_to),
    ("two_shot_to", Values::Bytes, |row| &mut row.two_shot_to),
    ("lines_from", Values::Bytes, |row| &mut row.lines_from),
    ("one_shot_lines_to", Values::Bytes, |row| &mut row.one_shot_lines_to),
    ("two_shot_lines_to", Values::Bytes, |row| &mut row.two_shot_lines_to),
    ("direct_from", Values::Bytes, |row| &mut row.direct_from),
    ("ring_from", Values::Bytes, |row| &mut row.ring_from),
    ("narrow_ring_from", Values::Bytes, |row| &mut row.narrow_ring_from),
    ("engine_from", Values::Bytes, |row| &mut row.engine_from),
    ("packet_blocks", Values::UpTo(WIDE_BLOCKS), |row| &mut row.packet_blocks),
    ("direct_blocks", Values::UpTo(WIDE_BLOCKS), |row| &mut row.direct_blocks),
    ("threads_to", Values::Bytes, |row| &mut row.threads_to),
    ("thread_blocks", Values::UpTo(MAX_BLOCKS), |row| &mut row.thread_blocks),
    ("bulk_blocks", Values::UpTo(MAX_BLOCKS), |row| &mut row.bulk_blocks),
    ("bulk_tile", Values::UpTo(MAX_TILE), |row| &mut row.bulk_tile),
    ("ring_blocks", Values::UpTo(MAX_BLOCKS), |row| &mut row.ring_blocks),
];

impl Row {
    const EMPTY: Self = Self {
        one_shot_to: 0,
        two_shot_to: 0,
        lines_from: 0,
        one_shot_lines_to: 0,
        two_shot_lines_to: 0,
        direct_from: 0,
        ring_from: 0,
        narrow_ring_from: 0,
        engine_from: 0,
        packet_blocks: 0,
        direct_blocks: 0,
        threads_to: 0,
        thread_blocks: 0,
        bulk_blocks: 0,
        bulk_tile: 0,
        ring_blocks: 0,
    };
}

/// The rows of all operations, for worlds of one size.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Table {
    rows: [Row; DIRECT_FORMS.len()],
}

impl Table {
    /// What holds without a tuning file, for worlds of `ranks`; beyond those that GPUs have, that of the nearest size.
    pub fn built_in(ranks: usize) -> Self {
        static TABLES: LazyLock<BTreeMap<usize, Table>> = LazyLock::new(|| {
            let mut tables = Tables::default();
            for line in include_str!("default.tune").lines().filter(|line| !line.starts_with('#')) {
                let Ok(()) = tables.add(line) else { unreachable!("a test reads every line") };
            }
            let Ok(tables) = tables.finish() else { unreachable!("a test reads all of it") };
            tables
        });
        TABLES[&ranks.clamp(2, MAX_RANKS)]
    }

    /// The row that serves `kind`.
    pub const fn row(&self, kind: Kind) -> &Row {
        &self.rows[index(kind)]
    }

    /// The same, to be changed.
    pub const fn row_mut(&mut self, kind: Kind) -> &mut Row {
        &mut self.rows[index(kind)]
    }

    /// Whether copy engines move anything.
    pub fn has_engines(&self) -> bool {
        self.rows.iter().any(|row| row.engine_from != usize::MAX)
    }

    /// Its lines, as they stand in files.
    pub fn to_text(&self, ranks: usize) -> String {
        let mut text = String::new();
        for (kind, row) in DIRECT_FORMS.into_iter().zip(self.rows) {
            let _ = write!(text, "gpus={ranks} {}", kind.name());
            for (name, _, field) in FIELDS {
                let _ = match *field(&mut row.clone()) {
                    usize::MAX => write!(text, " {name}=never"),
                    value => write!(text, " {name}={value}"),
                };
            }
            text.push('\n');
        }
        text
    }
}

/// The place of an operation in the order of [`DIRECT_FORMS`]. Parts of any size are as those of one size; the rest, where it comes to
/// GPUs, is moved as a gather is.
const fn index(kind: Kind) -> usize {
    match kind {
        Kind::AllReduce { .. } | Kind::AllReduceQuantised => 0,
        Kind::Broadcast { .. } => 1,
        Kind::AllGather | Kind::AllGatherV => 2,
        Kind::Reduce { .. } => 3,
        Kind::ReduceScatter { .. } | Kind::ReduceScatterV { .. } => 4,
        Kind::Scatter { .. } => 6,
        Kind::AllToAll => 7,
        _ => 5,
    }
}

/// Tables by world size, as their lines are read one after the other.
#[derive(Default)]
pub(crate) struct Tables {
    rows: BTreeMap<usize, [Option<Row>; DIRECT_FORMS.len()]>,
}

impl Tables {
    /// Reads one line; otherwise what was expected.
    pub(crate) fn add(&mut self, line: &str) -> Result<(), String> {
        let mut words = line.split(' ');
        let ranks = words.next().and_then(|word| word.strip_prefix("gpus=")).and_then(number);
        let ranks = ranks.filter(|ranks| (2..=MAX_RANKS).contains(ranks));
        let ranks = ranks.ok_or_else(|| format!("gpus= with a number from 2 to {MAX_RANKS}"))?;
        let name = words.next().unwrap_or("");
        let at = DIRECT_FORMS.iter().position(|kind| kind.name() == name);
        let at = at.ok_or_else(|| {
            let names: Vec<&str> = DIRECT_FORMS.iter().map(|kind| kind.name()).collect();
            format!("one of {} behind gpus={ranks}", names.join(", "))
        })?;
        let mut row = Row::EMPTY;
        for (name, values, field) in FIELDS {
            let text = words.next().and_then(|pair| pair.strip_prefix(name)?.strip_prefix('='));
            let value = match values {
                Values::Bytes if text == Some("never") => Some(usize::MAX),
                Values::Bytes => text.and_then(number),
                Values::UpTo(most) => text.and_then(number).filter(|value| (1..=most).contains(value)),
            };
            *field(&mut row) = value.ok_or_else(|| match values {
                Values::Bytes => format!("{name}= with a number of bytes or `never`"),
                Values::UpTo(most) => format!("{name}= with a number from 1 to {most}"),
            })?;
        }
        if words.next().is_some() {
            return Err("nothing after the last number".to_owned());
        }
        match self.rows.entry(ranks).or_default()[at].replace(row) {
            Some(_) => Err(format!("one line for {name} of gpus={ranks}")),
            None => Ok(()),
        }
    }

    /// All tables; otherwise what lacks.
    pub(crate) fn finish(self) -> Result<BTreeMap<usize, Table>, String> {
        let whole = |(ranks, rows): (usize, [Option<Row>; DIRECT_FORMS.len()])| {
            let mut table = Table { rows: [Row::EMPTY; DIRECT_FORMS.len()] };
            for ((to, row), kind) in table.rows.iter_mut().zip(rows).zip(DIRECT_FORMS) {
                *to = row.ok_or_else(|| format!("a line gpus={ranks} {}", kind.name()))?;
            }
            Ok((ranks, table))
        };
        self.rows.into_iter().map(whole).collect()
    }
}

fn number(text: &str) -> Option<usize> {
    text.parse().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
#[path = "table/tests.rs"]
mod tests;
