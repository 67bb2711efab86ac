//! From a call with its buffers to what the algorithms need: addresses, counts and the header, all checked.

use unisono_core::call::{CallHeader, Kind};
use unisono_core::select::Algorithm;
use unisono_core::{DType, select};

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
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) kind: Kind,
    pub(crate) algorithm: Algorithm,
    pub(crate) header: CallHeader,
    pub(crate) dtype: DType,
    /// Elements that each rank contributes.
    pub(crate) count: usize,
    /// Our input; for an all-gather our own part.
    pub(crate) source: *const u8,
    /// Our output; for an all-gather the whole result.
    pub(crate) target: *mut u8,
    pub(crate) source_window: Option<WindowPlace>,
    pub(crate) target_window: Option<WindowPlace>,
}

/// What the engine knows that checks need.
pub(crate) struct Situation<'a> {
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    pub(crate) forced: Option<Algorithm>,
    /// Finds the place of an address range in an open window.
    pub(crate) find_window: &'a dyn Fn(u64, u64, usize) -> Option<WindowPlace>,
}

impl Plan {
    /// Checks `call` and chooses its algorithm. Nothing was sent or written when this fails.
    #[inline]
    pub(crate) fn new(call: &Call<'_>, situation: &Situation<'_>) -> Result<Self> {
        let (source, target) = match (call.kind, call.buffers()) {
            (Kind::Barrier, []) => return Ok(Self::bare(call.kind)),
            (Kind::AllReduce { .. } | Kind::Broadcast { .. }, [both]) => (*both, *both),
            (Kind::AllGather, [all]) => (own_part(all, situation)?, *all),
            (Kind::AllReduce { .. } | Kind::Broadcast { .. } | Kind::AllGather, [source, target]) => {
                (*source, *target)
            }
            (kind @ Kind::Barrier, buffers) => {
                return Err(argument(situation, kind, "number of buffers", 0, buffers.len()));
            }
            (kind @ (Kind::AllReduce { .. } | Kind::Broadcast { .. } | Kind::AllGather), buffers) => {
                return Err(argument(situation, kind, "number of buffers", "1 or 2", buffers.len()));
            }
            (kind, _) => {
                let expected = "all_reduce, broadcast, all_gather or barrier";
                return Err(argument(situation, kind, "operation", expected, kind.name()));
            }
        };
        check(call.kind, &source, &target, situation)?;
        let source_window = window_of(call.kind, &source, situation)?;
        let target_window = window_of(call.kind, &target, situation)?;
        let question = select::Question {
            kind: call.kind,
            bytes: source.bytes(),
            world_size: situation.world_size,
            in_windows: source_window.is_some() && target_window.is_some(),
            forced: situation.forced,
        };
        let header = CallHeader {
            kind: call.kind,
            dtype: Some(source.dtype),
            count: source.count as u64,
            source_window: source_window.map_or(0, |window| window.id),
            target_window: target_window.map_or(0, |window| window.id),
        };
        Ok(Self {
            kind: call.kind,
            algorithm: select::algorithm(&question),
            header,
            dtype: source.dtype,
            count: source.count,
            source: std::ptr::with_exposed_provenance(source.ptr as usize),
            target: std::ptr::with_exposed_provenance_mut(target.ptr as usize),
            source_window,
            target_window,
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
        }
    }

    /// Bytes that each rank contributes.
    pub(crate) const fn bytes(&self) -> usize {
        self.count * self.dtype.size()
    }
}

/// Our part of an all-gather's result.
fn own_part(all: &RawBuffer, situation: &Situation<'_>) -> Result<RawBuffer> {
    let world_size = situation.world_size;
    if !all.count.is_multiple_of(world_size) {
        let expected = format!("a multiple of {world_size}");
        return Err(argument(situation, Kind::AllGather, "count", &expected, all.count));
    }
    let count = all.count / world_size;
    Ok(RawBuffer { count, ptr: all.ptr + (situation.rank * count * all.dtype.size()) as u64, ..*all })
}

fn check(kind: Kind, source: &RawBuffer, target: &RawBuffer, situation: &Situation<'_>) -> Result<()> {
    let parts = if matches!(kind, Kind::AllGather) { situation.world_size } else { 1 };
    if target.count != source.count * parts {
        return Err(argument(situation, kind, "count of the output", source.count * parts, target.count));
    }
    if target.dtype != source.dtype {
        return Err(argument(situation, kind, "dtype of the output", source.dtype, target.dtype));
    }
    if let Kind::Broadcast { root } = kind
        && root as usize >= situation.world_size
    {
        return Err(argument(situation, kind, "root", format!("below {}", situation.world_size), root));
    }
    if let Kind::AllReduce { op } = kind {
        unisono_core::reduce_op::check(source.dtype, op)?;
    }
    // One buffer may be both, and an all-gather's input may lie at its place in the output; nothing else may overlap.
    let at_home = match kind {
        Kind::AllGather => target.ptr + (situation.rank * source.bytes()) as u64,
        _ => target.ptr,
    };
    let overlaps =
        source.ptr < target.ptr + target.bytes() as u64 && target.ptr < source.ptr + source.bytes() as u64;
    if overlaps && source.ptr != at_home {
        return Err(argument(
            situation,
            kind,
            "memory of the output",
            "the input itself or disjoint from it",
            "a partial overlap",
        ));
    }
    Ok(())
}

fn window_of(kind: Kind, buffer: &RawBuffer, situation: &Situation<'_>) -> Result<Option<WindowPlace>> {
    match buffer.place {
        Place::Host => Ok(None),
        Place::Window { id } => match (situation.find_window)(id, buffer.ptr, buffer.bytes()) {
            Some(place) => Ok(Some(place)),
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
fn argument(
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
