//! Calls whose parts are of any size, or that have several buffers on each rank: what is particular about them, checked.

use unisono_core::DType;
use unisono_core::call::{CallHeader, Kind, parts_hash};
use unisono_core::select::Algorithm;

use super::plan::{Plan, Situation, WindowPlace, argument, check_place};
use crate::buffer::{Place, RawBuffer};
use crate::call::{Call, Counts};
use crate::error::Result;

/// A part of a buffer: where it starts, in bytes, and its elements.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Part {
    pub(crate) at: usize,
    pub(crate) count: usize,
}

/// What a plan knows beyond one size for all.
#[derive(Clone, Default, Debug)]
pub(crate) struct Uneven {
    /// The parts of our input, by rank; empty where it is a single one.
    pub(super) source: Vec<Part>,
    /// The parts of our output, by rank; empty where it is a single one.
    pub(super) target: Vec<Part>,
    /// All buffers of this rank, where it may have several.
    pub(super) locals: Vec<*mut u8>,
    /// Of a call on rows, or with counts in memory, where each of these lies in a window.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(dead_code, reason = "the host reaches them by their addresses")
    )]
    pub(super) windows: Vec<Option<WindowPlace>>,
    /// Elements of our own part; of a call with counts in memory, of our output's share for each rank.
    pub(super) own: usize,
    /// The type of counts that lie in memory.
    pub(super) numbers: Option<DType>,
}

impl Plan {
    /// The parts of the side that has one for every rank, where they have sizes of their own and one side has them.
    #[cfg(feature = "cuda")]
    pub(crate) fn parts(&self) -> Option<&[Part]> {
        let uneven =
            self.uneven.as_ref().filter(|uneven| uneven.source.is_empty() != uneven.target.is_empty())?;
        Some(if uneven.source.is_empty() { &uneven.target } else { &uneven.source })
    }

    /// Where the part of our input for `rank` lies.
    #[inline]
    pub(super) fn source_part(&self, rank: usize) -> Part {
        let even = Part { at: rank * self.bytes(), count: self.count };
        self.uneven.as_ref().map_or(even, |uneven| uneven.source[rank])
    }

    /// Where the part of our output from `rank` lies.
    #[inline]
    pub(super) fn target_part(&self, rank: usize) -> Part {
        let even = Part { at: rank * self.bytes(), count: self.count };
        self.uneven.as_ref().map_or(even, |uneven| uneven.target[rank])
    }

    /// What this rank sends to `peer` and receives from it, in collectives that are a message for each pair of ranks; of this rank itself,
    /// what stays.
    #[cfg(feature = "cuda")]
    pub(crate) fn between(&self, rank: usize, peer: usize) -> (Option<Part>, Option<Part>) {
        let own = Part { at: 0, count: self.own() };
        let is_root = |rank: usize| self.header.kind.root() == Some(rank as u32);
        match self.header.kind {
            Kind::GatherV { .. } => {
                (is_root(peer).then_some(own), is_root(rank).then(|| self.target_part(peer)))
            }
            Kind::ScatterV { .. } => {
                (is_root(rank).then(|| self.source_part(peer)), is_root(peer).then_some(own))
            }
            _ => (Some(self.source_part(peer)), Some(self.target_part(peer))),
        }
    }

    /// Elements of our single part, in operations where we contribute or get one.
    #[inline]
    pub(super) fn own(&self) -> usize {
        self.uneven.as_ref().map_or(self.count, |uneven| uneven.own)
    }
}

/// Checks a call with parts of any size.
pub(super) fn plan_uneven(call: &Call<'_>, situation: &Situation<'_>) -> Result<Plan> {
    let (kind, rank) = (call.kind, situation.rank);
    let [source, target] = call.buffers() else {
        return Err(argument(situation, kind, "number of buffers", 2, call.buffers().len()));
    };
    let is_root = kind.root().is_none_or(|root| root as usize == rank);
    // Whether a side has a part for every rank, and whether it is there at all.
    let (from_all, into_all) = match kind {
        Kind::AllGatherV | Kind::GatherV { .. } => (false, true),
        Kind::ReduceScatterV { .. } | Kind::ScatterV { .. } => (true, false),
        _ => (true, true),
    };
    // The side with all parts is there on the root only.
    let here = situation.device.map_or(Place::Host, |ordinal| Place::Cuda { ordinal });
    let absent = |buffer: &RawBuffer, dtype| RawBuffer { count: 0, place: here, dtype, ..*buffer };
    let (source, target) = match (is_root, from_all) {
        (true, _) => (*source, *target),
        (false, true) => (absent(source, target.dtype), *target),
        (false, false) => (*source, absent(target, source.dtype)),
    };
    let dtype = source.dtype;
    let windows = [check_place(kind, &source, situation)?, check_place(kind, &target, situation)?];
    // Only kernels have other names for what lies there.
    let [source_window, target_window] = windows.map(|window| window.filter(|_| situation.device.is_some()));
    if target.dtype != dtype {
        return Err(argument(situation, kind, "dtype of the output", dtype, target.dtype));
    }
    if let Some(op) = kind.op() {
        unisono_core::reduce_op::check(dtype, op)?;
    }
    let views = call.counts();
    let expected = if from_all && into_all { 2 } else { 1 };
    if views.len() != expected {
        return Err(argument(situation, kind, "lists of counts", expected, views.len()));
    }
    let resolve = |what, view: &Counts<'_>, buffer: &RawBuffer| {
        let room = is_root.then_some(buffer.count);
        parts(what, view, room, dtype.size(), (kind, situation))
    };
    let mut uneven = Uneven::default();
    if from_all {
        uneven.source = resolve("parts of the input", &views[0], &source)?;
    }
    if into_all {
        uneven.target = resolve("parts of the output", &views[views.len() - 1], &target)?;
    }
    let mut header = CallHeader { dtype: Some(dtype), ..CallHeader::bare(kind) };
    let mut most = 0;
    if from_all != into_all {
        let all = if from_all { &uneven.source } else { &uneven.target };
        uneven.own = all[rank].count;
        most = all.iter().map(|part| part.count).max().unwrap_or(0);
        header.count = all.iter().map(|part| part.count as u64).sum();
        header.parts = parts_hash(views[0].counts);
        let (what, single) =
            if from_all { ("count of the output", &target) } else { ("count of the input", &source) };
        if single.count != uneven.own {
            return Err(argument(situation, kind, what, uneven.own, single.count));
        }
    }
    check_overlap(&source, &target, &uneven, (kind, situation))?;
    Ok(Plan {
        header,
        dtype,
        count: most,
        source: std::ptr::with_exposed_provenance(source.ptr as usize),
        target: std::ptr::with_exposed_provenance_mut(target.ptr as usize),
        source_window,
        target_window,
        uneven: Some(Box::new(uneven)),
        ..Plan::bare(kind)
    })
}

/// The parts that `view` describes, of a buffer with `room` for so many elements, if it is there.
fn parts(
    what: &'static str,
    view: &Counts<'_>,
    room: Option<usize>,
    size: usize,
    (kind, situation): (Kind, &Situation<'_>),
) -> Result<Vec<Part>> {
    let world_size = situation.world_size;
    let lengths = [Some(view.counts.len()), view.offsets.map(<[usize]>::len)];
    if let Some(got) = lengths.into_iter().flatten().find(|length| *length != world_size) {
        return Err(argument(situation, kind, what, format!("one of each for {world_size} ranks"), got));
    }
    let mut next = 0usize;
    let mut parts = Vec::with_capacity(world_size);
    for (rank, count) in view.counts.iter().copied().enumerate() {
        let start = view.offsets.map_or(next, |offsets| offsets[rank]);
        let end = start.checked_add(count).filter(|end| end.checked_mul(size).is_some());
        let Some(end) = end.filter(|end| room.is_none_or(|room| *end <= room)) else {
            let expected = format!("within {} elements", room.unwrap_or(usize::MAX / size));
            return Err(argument(
                situation,
                kind,
                what,
                expected,
                format!("{count} from {start} for rank {rank}"),
            ));
        };
        next = end;
        parts.push(Part { at: start * size, count });
    }
    let mut filled: Vec<_> = parts.iter().filter(|part| part.count > 0).collect();
    filled.sort_by_key(|part| part.at);
    if let Some(pair) = filled.windows(2).find(|pair| pair[0].at + pair[0].count * size > pair[1].at) {
        let got = format!("two that overlap at element {}", pair[1].at / size);
        return Err(argument(situation, kind, what, "disjoint ones", got));
    }
    Ok(parts)
}

/// Input and output are disjoint, or the single part lies at its place, or (all-to-all) both are the same.
fn check_overlap(
    source: &RawBuffer,
    target: &RawBuffer,
    uneven: &Uneven,
    (kind, situation): (Kind, &Situation<'_>),
) -> Result<()> {
    let overlaps =
        source.ptr < target.ptr + target.bytes() as u64 && target.ptr < source.ptr + source.bytes() as u64;
    let at = |parts: &[Part]| parts.get(situation.rank).map_or(0, |part| part.at as u64);
    let is_at_home = match (uneven.source.is_empty(), uneven.target.is_empty()) {
        (false, false) => source.ptr == target.ptr && uneven.source == uneven.target,
        _ => source.ptr + at(&uneven.source) == target.ptr + at(&uneven.target),
    };
    if overlaps && !is_at_home {
        let expected = "the input itself or disjoint from it";
        return Err(argument(situation, kind, "memory of the output", expected, "a partial overlap"));
    }
    Ok(())
}

/// Checks a call on several buffers of this rank.
pub(super) fn plan_multi(call: &Call<'_>, situation: &Situation<'_>) -> Result<Plan> {
    /// A chunk of staging has a piece of at least a line for each buffer.
    const MOST: usize = 1024;
    let (kind, buffers) = (call.kind, call.buffers());
    let Some(first) = buffers.first().filter(|_| buffers.len() <= MOST) else {
        return Err(argument(situation, kind, "number of buffers", format!("1 to {MOST}"), buffers.len()));
    };
    for (at, buffer) in buffers.iter().enumerate() {
        let device = situation.devices.get(at).copied().or(situation.device);
        check_place(kind, buffer, &Situation { device, ..*situation })?;
        if (buffer.dtype, buffer.count) != (first.dtype, first.count) {
            let expected = format!("{} of {} in every buffer", first.count, first.dtype);
            let got = format!("{} of {} in buffer {at}", buffer.count, buffer.dtype);
            return Err(argument(situation, kind, "count", expected, got));
        }
    }
    let mut sorted: Vec<u64> = buffers.iter().map(|buffer| buffer.ptr).collect();
    sorted.sort_unstable();
    if sorted.windows(2).any(|pair| pair[0] + first.bytes() as u64 > pair[1]) {
        return Err(argument(situation, kind, "memory", "disjoint buffers", "two that overlap"));
    }
    if let Some(op) = kind.op() {
        unisono_core::reduce_op::check(first.dtype, op)?;
    }
    let mut source = 0;
    if let Kind::BroadcastMulti { root, buffer } = kind
        && root as usize == situation.rank
    {
        source = buffer as usize;
        if source >= buffers.len() {
            let expected = format!("below {}", buffers.len());
            return Err(argument(situation, kind, "root buffer", expected, buffer));
        }
    }
    let address = |buffer: &RawBuffer| std::ptr::with_exposed_provenance_mut(buffer.ptr as usize);
    let locals: Vec<*mut u8> = buffers.iter().map(address).collect();
    let number = if kind.op().is_some() { buffers.len() as u64 } else { 0 };
    let header = CallHeader {
        dtype: Some(first.dtype),
        count: first.count as u64,
        parts: number,
        ..CallHeader::bare(kind)
    };
    Ok(Plan {
        header,
        algorithm: Algorithm::OneShot,
        dtype: first.dtype,
        count: first.count,
        source: locals[source].cast_const(),
        target: locals[0],
        uneven: Some(Box::new(Uneven { locals, own: first.count, ..Uneven::default() })),
        ..Plan::bare(kind)
    })
}
