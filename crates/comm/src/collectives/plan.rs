//! From a call with its buffers to what the algorithms need: addresses, counts and the header, all checked.

use unisono_core::call::{CallHeader, Kind};
use unisono_core::quantised::is_quantised;
use unisono_core::select::{Algorithm, Rules};
use unisono_core::{DType, select};

use super::counted::plan_counted;
use super::fused::plan_rows;
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
    pub(crate) algorithm: Algorithm,
    pub(crate) header: CallHeader,
    pub(crate) dtype: DType,
    /// Elements of one part: what each rank contributes, or gets where it contributes a part to every rank; of the largest
    /// one, where they differ; all of our input, where counts lie in memory.
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

/// Finds the place of so many bytes at an address in the window with an id.
pub(crate) type FindWindow<'a> = &'a dyn Fn(u64, u64, usize) -> Option<WindowPlace>;

/// What the engine knows that checks need.
#[derive(Clone, Copy)]
pub(crate) struct Situation<'a> {
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    pub(crate) rules: &'a Rules,
    /// Finds the place of an address range in an open window.
    pub(crate) find_window: FindWindow<'a>,
    /// Windows with lower ids belong to earlier generations than this one.
    pub(crate) first_window: u64,
    pub(crate) generation: u32,
    /// The GPU that the call is for; none for the host.
    pub(crate) device: Option<u32>,
    /// That of each buffer, where they are several.
    pub(crate) devices: &'a [u32],
}

impl Plan {
    /// Checks `call` and chooses its algorithm. Nothing was sent or written when this fails.
    #[inline]
    pub(crate) fn new(call: &Call<'_>, situation: &Situation<'_>) -> Result<Self> {
        // Not copied before the end: it was just written, in narrow pieces.
        let kind = &call.kind;
        if matches!(kind, Kind::Barrier) {
            return match call.buffers().len() {
                0 => Ok(Self::bare(*kind)),
                buffers => Err(argument(situation, *kind, "number of buffers", 0, buffers)),
            };
        }
        if let Some(root) = kind.root()
            && root as usize >= situation.world_size
        {
            let expected = format!("below {}", situation.world_size);
            return Err(argument(situation, *kind, "root", expected, root));
        }
        if matches!(kind, Kind::AllToAllCounted) {
            return plan_counted(call, situation);
        }
        if kind.is_uneven() {
            return plan_uneven(call, situation);
        }
        if kind.is_multi() {
            return plan_multi(call, situation);
        }
        if matches!(kind, Kind::AllReduceRmsNorm { .. }) {
            return plan_rows(call, situation);
        }
        Self::even(kind, call.buffers(), situation)
    }

    /// A collective whose parts have the same size, on one buffer or two.
    #[inline]
    fn even(kind: &Kind, buffers: &[RawBuffer], situation: &Situation<'_>) -> Result<Self> {
        let Some(sides) = Sides::new(kind, situation.rank, situation.world_size) else {
            let expected = "one that moves data, or barrier";
            return Err(argument(situation, *kind, "operation", expected, kind.name()));
        };
        let (input, output) = match buffers {
            [both] => (both, both),
            [input, output] => (input, output),
            _ => return Err(argument(situation, *kind, "number of buffers", "1 or 2", buffers.len())),
        };
        let (mut source, mut target) = (Side::new(input, sides.source), Side::new(output, sides.target));
        if let [all] = buffers {
            match kind {
                Kind::AllGather => source = own_part(*kind, all, situation)?,
                Kind::ReduceScatter { .. } => target = own_part(*kind, all, situation)?,
                Kind::Gather { .. } | Kind::Scatter { .. } => {
                    return Err(argument(situation, *kind, "number of buffers", 2, 1));
                }
                _ => {}
            }
        }
        let dtype = if sides.source > 0 { input.dtype } else { output.dtype };
        if sides.source > 0 && sides.target > 0 && output.dtype != dtype {
            return Err(argument(situation, *kind, "dtype of the output", dtype, output.dtype));
        }
        if let Some(op) = kind.op() {
            unisono_core::reduce_op::check(dtype, op)?;
        }
        if matches!(kind, Kind::AllReduceQuantised) && !is_quantised(dtype) {
            return Err(argument(situation, *kind, "dtype", "f16, bf16 or f32", dtype));
        }
        // The side that is a single part tells the count; where both have parts for all, the ranks divide it.
        let (parts, told) = match sides {
            Sides { source: 1, .. } => (1, source.count),
            Sides { target: 1, .. } => (1, target.count),
            Sides { source: parts, .. } => (parts, source.count),
        };
        if !told.is_multiple_of(parts) {
            return Err(argument(situation, *kind, "count", format!("a multiple of {parts}"), told));
        }
        let count = told / parts;
        for (what, expected, got) in [
            ("count of the input", count * sides.source, source.count),
            ("count of the output", count * sides.target, target.count),
        ] {
            if expected != got {
                return Err(argument(situation, *kind, what, expected, got));
            }
        }
        let size = dtype.size();
        let bytes = count * size;
        if overlap_badly((source, target), sides, (situation.rank * bytes, size)) {
            let expected = "the input itself or disjoint from it";
            return Err(argument(situation, *kind, "memory of the output", expected, "a partial overlap"));
        }
        let (by_source, by_target) = kind.sides_everywhere();
        let mut windows = [None; 2];
        let all = [(input, source, sides.source, by_source), (output, target, sides.target, by_target)];
        for (window, (buffer, side, parts, everywhere)) in windows.iter_mut().zip(all) {
            if parts > 0 && (situation.device.is_some() || !matches!(buffer.place, Place::Host)) {
                let place = window_of(*kind, buffer.place, (side.ptr, side.count * size), situation)?;
                // On a GPU, whoever keeps windows or lends them must know of each.
                *window = place.filter(|_| everywhere || situation.device.is_some());
            }
        }
        let [source_window, target_window] = windows;
        let id = |window: &Option<WindowPlace>, everywhere: bool| {
            window.as_ref().filter(|_| everywhere).map_or(0, |window| window.id)
        };
        let header = CallHeader {
            kind: *kind,
            dtype: Some(dtype),
            count: count as u64,
            parts: 0,
            source_window: id(&source_window, by_source),
            target_window: id(&target_window, by_target),
        };
        let question = select::Question { kind: *kind, bytes, in_windows: header.is_in_windows() };
        Ok(Self {
            algorithm: select::algorithm(&question, situation.rules),
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
    pub(crate) fn locals(&self) -> &[*mut u8] {
        self.uneven.as_ref().map_or(&[], |uneven| &uneven.locals)
    }

    /// The part that one of several buffers has in this call, as a call of `kind` on that buffer alone.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_local(&self, at: usize, kind: Kind) -> Self {
        let buffer = self.locals()[at];
        Self {
            header: CallHeader { kind, parts: 0, ..self.header },
            dtype: self.dtype,
            count: self.count,
            source: buffer.cast_const(),
            target: buffer,
            ..Self::bare(kind)
        }
    }

    /// Bytes of one part.
    pub(crate) const fn bytes(&self) -> usize {
        self.count * self.dtype.size()
    }
}

/// Where one side of a call lies; one that this rank has no part in is empty.
#[derive(Clone, Copy)]
struct Side {
    ptr: u64,
    count: usize,
}

impl Side {
    const fn new(buffer: &RawBuffer, parts: usize) -> Self {
        Self { ptr: buffer.ptr, count: if parts > 0 { buffer.count } else { 0 } }
    }
}

/// How many parts of `count` elements one side of an operation has on this rank: none, one, or one for each rank.
#[derive(Clone, Copy)]
struct Sides {
    source: usize,
    target: usize,
}

impl Sides {
    #[inline]
    fn new(kind: &Kind, rank: usize, world_size: usize) -> Option<Self> {
        let at_root = |parts| if kind.root() == Some(rank as u32) { parts } else { 0 };
        let (source, target) = match kind {
            Kind::AllReduce { .. } | Kind::AllReduceQuantised | Kind::Broadcast { .. } => (1, 1),
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

/// One buffer may be both, and the smaller side may lie at its place in the larger one; nothing else may overlap.
const fn overlap_badly((source, target): (Side, Side), sides: Sides, (own, size): (usize, usize)) -> bool {
    let overlaps = source.ptr < target.ptr + (target.count * size) as u64
        && target.ptr < source.ptr + (source.count * size) as u64;
    let in_source = if sides.source > sides.target { own } else { 0 };
    let in_target = if sides.target > sides.source { own } else { 0 };
    overlaps && source.ptr + in_source as u64 != target.ptr + in_target as u64
}

/// Our part of a buffer that has one for each rank.
fn own_part(kind: Kind, all: &RawBuffer, situation: &Situation<'_>) -> Result<Side> {
    let world_size = situation.world_size;
    if !all.count.is_multiple_of(world_size) {
        let expected = format!("a multiple of {world_size}");
        return Err(argument(situation, kind, "count", &expected, all.count));
    }
    let count = all.count / world_size;
    Ok(Side { count, ptr: all.ptr + (situation.rank * count * all.dtype.size()) as u64 })
}

/// Refuses a buffer that this communicator cannot use; else where it lies in a window, if it does.
pub(super) fn check_place(
    kind: Kind,
    buffer: &RawBuffer,
    situation: &Situation<'_>,
) -> Result<Option<WindowPlace>> {
    window_of(kind, buffer.place, (buffer.ptr, buffer.bytes()), situation)
}

/// Where `bytes` at `ptr` lie in a window, if they do.
fn window_of(
    kind: Kind,
    place: Place,
    (ptr, bytes): (u64, usize),
    situation: &Situation<'_>,
) -> Result<Option<WindowPlace>> {
    match place {
        Place::Host if situation.device.is_none() => Ok(None),
        Place::Cuda { ordinal } if situation.device == Some(ordinal) => Ok(None),
        Place::Window { id } => match (situation.find_window)(id, ptr, bytes) {
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
        got @ (Place::Host | Place::Cuda { .. }) => Err(Error::Place {
            call: kind.name(),
            rank: situation.rank,
            expected: situation.device.map_or_else(
                || "host memory and its windows, except through on() with a stream of its GPU".to_owned(),
                |ordinal| format!("cuda:{ordinal} on this stream"),
            ),
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
