//! A case with its buffers on one rank, ready to be submitted.
//!
//! A buffer is described part by part: what it holds before the call and what it must hold after it. So input and output
//! may be one buffer, the smaller one may lie at its place in the larger one, and what a call must leave alone is
//! described like what it writes.

use std::cell::RefCell;
use std::ops::Range;

use unisono::{Kind, RawBuffer, ReduceOp};

use super::case::{Action, Case};
use super::region::Region;
use super::sides::{Content, Side, Spread};

/// Which buffers a rank hands over.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Form {
    /// One buffer.
    InPlace,
    /// Two that are the same memory, or the smaller one at its place in the larger one.
    SameMemory,
    OutOfPlace,
}

/// The door to the library.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Door {
    Raw,
    Slices,
    Stream,
}

/// A part of a buffer, in bytes, and what it holds.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Part {
    pub(crate) at: usize,
    pub(crate) bytes: usize,
    pub(crate) before: Content,
    pub(crate) after: Content,
}

/// What a buffer holds; between its parts lies poison, before and after.
#[derive(Clone, PartialEq, Default, Debug)]
pub(crate) struct Layout {
    pub(crate) spread: Spread,
    /// Before and after.
    contents: Vec<(Content, Content)>,
    /// The parts that are results.
    pub(crate) results: Range<usize>,
}

impl Layout {
    pub(crate) fn input(side: &Side) -> Self {
        let contents = side.contents.iter().map(|content| (content.clone(), content.clone())).collect();
        Self { spread: side.spread.clone(), contents, results: 0..0 }
    }

    pub(crate) fn output(side: &Side) -> Self {
        let contents = side.contents.iter().map(|content| (Content::Poison, content.clone())).collect();
        Self { spread: side.spread.clone(), contents, results: 0..side.contents.len() }
    }

    /// One buffer for both sides of `rank`.
    pub(crate) fn both(source: &Side, target: &Side, rank: usize) -> Self {
        let (sent, got) = (&source.contents, &target.contents);
        if target.is_idle() {
            return Self::input(source);
        }
        if source.is_idle() {
            return Self::output(target);
        }
        let mut both = match sent.len() >= got.len() {
            true => Self::input(source),
            false => Self::output(target),
        };
        if sent.len() == got.len() {
            both.contents = sent.iter().cloned().zip(got.iter().cloned()).collect();
            both.results = 0..got.len();
        } else if sent.len() > got.len() {
            both.contents[rank].1 = got[0].clone();
            both.results = rank..rank + 1;
        } else {
            both.contents[rank].0 = sent[0].clone();
        }
        both
    }

    /// Elements of the buffer: anything, where the rank has no part in it.
    pub(crate) fn is_idle(&self) -> bool {
        self.contents.is_empty()
    }

    /// The parts in bytes.
    pub(crate) fn parts(&self, size: usize) -> Vec<Part> {
        let Spread { starts, counts, .. } = &self.spread;
        let each = starts.iter().zip(counts).zip(&self.contents);
        each.map(|((start, count), (before, after))| Part {
            at: start * size,
            bytes: count * size,
            before: before.clone(),
            after: after.clone(),
        })
        .collect()
    }
}

/// Memory with parts.
pub(crate) struct Buffer {
    pub(crate) region: Region,
    pub(crate) parts: Vec<Part>,
    pub(crate) results: Range<usize>,
}

/// A case with its buffers.
pub(crate) struct Prepared {
    pub(crate) case: Case,
    pub(crate) form: Form,
    pub(crate) door: Door,
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    /// This rank's own, of a pre-multiplied sum.
    pub(crate) scalar: f64,
    /// Where parts lie, as the library is told, where their sizes are not all alike.
    pub(crate) out: Spread,
    pub(crate) into: Spread,
    /// Both sides, or only the input.
    pub(crate) first: Buffer,
    /// The output, out of place.
    pub(crate) second: Option<Buffer>,
    pub(crate) poison: u8,
    /// Who sent the messages that came from anybody, in the order in which they came.
    pub(crate) senders: RefCell<Vec<usize>>,
}

impl Prepared {
    /// What this rank submits; a message each way may be two calls. Nothing where it takes messages as they come.
    pub(crate) fn kinds(&self, is_split: bool) -> Vec<Kind> {
        let (me, tag) = (self.rank, self.case.tag());
        let ahead = |by: usize| ((me + by) % self.world_size) as u32;
        match self.case.action {
            Action::Call(kind) => vec![with_scalar(kind, self.scalar)],
            Action::Message { from, to } if me == from => vec![Kind::Send { to: to as u32, tag }],
            Action::Message { from, to } if me == to => vec![Kind::Recv { from: from as u32, tag }],
            Action::Shift { by } => {
                let (to, from) = (ahead(by), ahead(self.world_size - by));
                match is_split {
                    true => vec![Kind::Send { to, tag }, Kind::Recv { from, tag }],
                    false => vec![Kind::SendRecv { to, from, tag }],
                }
            }
            Action::ToAnybody { to } if me != to => vec![Kind::Send { to: to as u32, tag }],
            Action::Message { .. } | Action::ToAnybody { .. } => Vec::new(),
        }
    }

    /// Whether this rank takes messages as they come.
    pub(crate) fn takes_from_anybody(&self) -> bool {
        matches!(self.case.action, Action::ToAnybody { to } if to == self.rank)
    }

    /// The buffer that holds the output.
    pub(crate) fn output(&self) -> &Buffer {
        self.second.as_ref().unwrap_or(&self.first)
    }

    /// The buffers as the library is told about them.
    pub(crate) fn raw(&self, kind: Kind) -> Vec<RawBuffer> {
        let (dtype, size) = (self.case.dtype, self.case.dtype.size());
        let whole = |buffer: &Buffer| buffer.region.raw(0, buffer.region.len() / size, dtype);
        let part = |part: &Part| self.first.region.raw(part.at, part.bytes / size, dtype);
        let (input, output) = (whole(&self.first), whole(self.output()));
        if kind == Kind::Barrier {
            return Vec::new();
        }
        if kind.is_multi() {
            return self.first.parts.iter().map(part).collect();
        }
        match (kind, self.form) {
            (Kind::Send { .. }, _) => vec![input],
            (Kind::Recv { .. }, _) => vec![output],
            (_, Form::InPlace) => vec![input],
            (_, Form::OutOfPlace) => vec![input, output],
            (_, Form::SameMemory) => {
                // Both sides are there: the smaller one lies at its place.
                let home = self.first.parts.get(self.rank).map(part);
                let parts = self.first.parts.len();
                match (self.out.counts.len() < parts, self.into.counts.len() < parts) {
                    (true, _) => vec![home.unwrap_or(input), output],
                    (_, true) => vec![input, home.unwrap_or(output)],
                    _ => vec![input, output],
                }
            }
        }
    }
}

/// The same with this rank's own scalar.
fn with_scalar(mut kind: Kind, scalar: f64) -> Kind {
    if let Kind::AllReduce { op }
    | Kind::Reduce { op, .. }
    | Kind::ReduceScatter { op }
    | Kind::ReduceScatterV { op }
    | Kind::AllReduceMulti { op } = &mut kind
        && let ReduceOp::PreMulSum(own) = op
    {
        *own = scalar;
    }
    kind
}
