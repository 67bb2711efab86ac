//! From a call with its buffers to what the algorithms need: addresses, counts and the header, all checked.

use unisono_core::call::{CallHeader, Kind};
use unisono_core::select::Algorithm;
use unisono_core::{DType, select};

use super::parts::{Uneven, plan_multi, plan_uneven};
use crate::buffer::{Place, RawBuffer};
use crate::call::Call;
use crate::error::{Error, Result};

/// Where a buffer lies in a window: the window's id and the offset in bytes from the start of our own copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct WindowPlace {
    pub(crate) id: u64,
    pub(crate) offset: usize,
}

/// A call that passed all local checks.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) kind: Kind,
    pub(crate) algorithm: Algorithm,
    pub(crate) header: CallHeader,
    pub(crate) dtype: DType,
    /// Elements of one part: what each rank contributes, or gets where it contributes a part to every rank; of the largest
    /// one, where they differ.
    pub(crate) count: usize,
    /// Our input.
    pub(crate) source: *const u8,
    /// Our output.
    pub(crate) target: *mut u8,
    pub(crate) source_window: Option<WindowPlace>,
    pub(crate) target_window: Option<WindowPlace>,
    /// Where parts have sizes of their own, or this rank several buffers.
    pub(super) uneven: Option<Box<Uneven>>,
}

/// What the engine knows that checks need.
pub(crate) struct Situation<'a> {
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    pub(crate) forced: Option<Algorithm>,
    /// Finds the place of an address range in an open window.
    pub(crate) find_window: &'a dyn Fn(u64, u64, usize) -> Option<WindowPlace>,
    /// Windows with lower ids belong to earlier generations than this one.
    pub(crate) first_window: u64,
    pub(crate) generation: u32,
}

impl Plan {
    /// Checks `call` and chooses its algorithm. Nothing was sent or written when this fails.
    #[inline]
    pub(crate) fn new(call: &Call<'_>, situation: &Situation<'_>) -> Result<Self> {
        if call.kind == Kind::Barrier {
            return match call.buffers().len() {
                0 => Ok(Self::bare(call.kind)),
                buffers => Err(argument(situation, call.kind, "number of buffers", 0, buffers)),
            };
        }
        if let Some(root) = call.kind.root()
            && root as usize >= situation.world_size
        {
            let expected = format!("below {}", situation.world_size);
            return Err(argument(situation, call.kind, "root", expected, root));
        }
        if call.kind.is_uneven() {
            return plan_uneven(call, situation);
        }
        if call.kind.is_multi() {
            return plan_multi(call, situation);
        }
        let Buffers { source, target, count, dtype } = Buffers::new(call, situation)?;
        let (by_source, by_target) = call.kind.sides_everywhere();
        let source_window = window_of(call.kind, &source, situation)?.filter(|_| by_source);
        let target_window = window_of(call.kind, &target, situation)?.filter(|_| by_target);
        let header = CallHeader {
            kind: call.kind,
            dtype: Some(dtype),
            count: count as u64,
            parts: 0,
            source_window: source_window.map_or(0, |window| window.id),
            target_window: target_window.map_or(0, |window| window.id),
        };
        let question = select::Question {
            kind: call.kind,
            bytes: count * dtype.size(),
            world_size: situation.world_size,
            in_windows: header.is_in_windows(),
            forced: situation.forced,
        };
        Ok(Self {
            kind: call.kind,
            algorithm: select::algorithm(&question),
            header,
            dtype,
            count,
            source: std::ptr::with_exposed_provenance(source.ptr as usize),
            target: std::ptr::with_exposed_provenance_mut(target.ptr as usize),
            source_window,
            target_window,
            uneven: None,
        })
    }

    /// A call that moves nothing.
    pub(crate) const fn bare(kind: Kind) -> Self {
        Self {
            kind,
            algorithm: Algorithm::OneShot,
            header: CallHeader::bare(kind),
            dtype: DType::U8,
            count: 0,
            source: std::ptr::null(),
            target: std::ptr::null_mut(),
            source_window: None,
            target_window: None,
            uneven: None,
        }
    }

    /// All buffers of this rank, where it may have several.
    pub(super) fn locals(&self) -> &[*mut u8] {
        self.uneven.as_ref().map_or(&[], |uneven| &uneven.locals)
    }

    /// Bytes of one part.
    pub(crate) const fn bytes(&self) -> usize {
        self.count * self.dtype.size()
    }
}

/// The input and output of a call, checked. A side that this rank has no part in is empty.
struct Buffers {
    source: RawBuffer,
    target: RawBuffer,
    /// Elements of one part.
    count: usize,
    dtype: DType,
}

/// How many parts of `count` elements one side of an operation has on this rank: none, one, or one for each rank.
#[derive(Clone, Copy)]
struct Sides {
    source: usize,
    target: usize,
}

impl Sides {
    fn new(kind: Kind, rank: usize, world_size: usize) -> Option<Self> {
        let at_root = |parts| if kind.root() == Some(rank as u32) { parts } else { 0 };
        let (source, target) = match kind {
            Kind::AllReduce { .. } | Kind::Broadcast { .. } => (1, 1),
            Kind::AllGather => (1, world_size),
            Kind::Reduce { .. } => (1, at_root(1)),
            Kind::ReduceScatter { .. } => (world_size, 1),
            Kind::Gather { .. } => (1, at_root(world_size)),
            Kind::Scatter { .. } => (at_root(world_size), 1),
            Kind::AllToAll => (world_size, world_size),
            _ => return None,
        };
        Some(Self { source, target })
    }
}

impl Buffers {
    #[inline]
    fn new(call: &Call<'_>, situation: &Situation<'_>) -> Result<Self> {
        let kind = call.kind;
        let Some(sides) = Sides::new(kind, situation.rank, situation.world_size) else {
            return Err(argument(
                situation,
                kind,
                "operation",
                "one that moves data, or barrier",
                kind.name(),
            ));
        };
        let (source, target) = match (kind, call.buffers()) {
            (Kind::AllGather, [all]) => (own_part(kind, all, situation)?, *all),
            (Kind::ReduceScatter { .. }, [all]) => (*all, own_part(kind, all, situation)?),
            (Kind::Gather { .. } | Kind::Scatter { .. }, [_]) => {
                return Err(argument(situation, kind, "number of buffers", 2, 1));
            }
            (_, [both]) => (*both, *both),
            (_, [source, target]) => (*source, *target),
            (_, buffers) => {
                return Err(argument(situation, kind, "number of buffers", "1 or 2", buffers.len()));
            }
        };
        let (source, target) = (present(source, sides.source), present(target, sides.target));
        let dtype = if sides.source > 0 { source.dtype } else { target.dtype };
        if sides.source > 0 && sides.target > 0 && target.dtype != dtype {
            return Err(argument(situation, kind, "dtype of the output", dtype, target.dtype));
        }
        if let Some(op) = kind.op() {
            unisono_core::reduce_op::check(dtype, op)?;
        }
        // The side that is a single part tells the count; where both have parts for all, the ranks divide it.
        let (parts, told) = match sides {
            Sides { source: 1, .. } => (1, source.count),
            Sides { target: 1, .. } => (1, target.count),
            Sides { source: parts, .. } => (parts, source.count),
        };
        if !told.is_multiple_of(parts) {
            return Err(argument(situation, kind, "count", format!("a multiple of {parts}"), told));
        }
        let count = told / parts;
        for (what, expected, got) in [
            ("count of the input", count * sides.source, source.count),
            ("count of the output", count * sides.target, target.count),
        ] {
            if expected != got {
                return Err(argument(situation, kind, what, expected, got));
            }
        }
        let buffers = Self { source, target, count, dtype };
        if buffers.overlap_badly(sides, situation.rank) {
            let expected = "the input itself or disjoint from it";
            return Err(argument(situation, kind, "memory of the output", expected, "a partial overlap"));
        }
        Ok(buffers)
    }

    /// One buffer may be both, and the smaller side may lie at its place in the larger one; nothing else may overlap.
    fn overlap_badly(&self, sides: Sides, rank: usize) -> bool {
        let (source, target) = (&self.source, &self.target);
        let overlaps = source.ptr < target.ptr + target.bytes() as u64
            && target.ptr < source.ptr + source.bytes() as u64;
        let own = (rank * self.count * self.dtype.size()) as u64;
        let (in_source, in_target) = (
            if sides.source > sides.target { own } else { 0 },
            if sides.target > sides.source { own } else { 0 },
        );
        overlaps && source.ptr + in_source != target.ptr + in_target
    }
}

/// `buffer`, or an empty one where this rank has no part in it.
fn present(buffer: RawBuffer, parts: usize) -> RawBuffer {
    if parts > 0 { buffer } else { RawBuffer { count: 0, place: Place::Host, ..buffer } }
}

/// Our part of a buffer that has one for each rank.
fn own_part(kind: Kind, all: &RawBuffer, situation: &Situation<'_>) -> Result<RawBuffer> {
    let world_size = situation.world_size;
    if !all.count.is_multiple_of(world_size) {
        let expected = format!("a multiple of {world_size}");
        return Err(argument(situation, kind, "count", &expected, all.count));
    }
    let count = all.count / world_size;
    Ok(RawBuffer { count, ptr: all.ptr + (situation.rank * count * all.dtype.size()) as u64, ..*all })
}

/// Refuses a buffer that this communicator cannot use.
pub(super) fn check_place(kind: Kind, buffer: &RawBuffer, situation: &Situation<'_>) -> Result<()> {
    window_of(kind, buffer, situation).map(drop)
}

fn window_of(kind: Kind, buffer: &RawBuffer, situation: &Situation<'_>) -> Result<Option<WindowPlace>> {
    match buffer.place {
        Place::Host => Ok(None),
        Place::Window { id } => match (situation.find_window)(id, buffer.ptr, buffer.bytes()) {
            Some(place) => Ok(Some(place)),
            None if id < situation.first_window => {
                Err(Error::Generation { window: id, generation: situation.generation })
            }
            None => Err(argument(
                situation,
                kind,
                "window",
                "an open window of this communicator that holds the buffer",
                format!("window {id}"),
            )),
        },
        got @ Place::Cuda { .. } => Err(Error::Place {
            call: kind.name(),
            rank: situation.rank,
            expected: "host memory and its windows".to_owned(),
            got: got.to_string(),
        }),
    }
}

#[cold]
pub(super) fn argument(
    situation: &Situation<'_>,
    kind: Kind,
    what: &'static str,
    expected: impl ToString,
    got: impl ToString,
) -> Error {
    Error::Argument {
        call: kind.name(),
        rank: situation.rank,
        what,
        expected: expected.to_string(),
        got: got.to_string(),
    }
}
