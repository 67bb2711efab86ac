//! All-to-all with counts in memory of the operation: its buffers, checked, and what the host reads and writes of its counts.

use unisono_core::DType;
use unisono_core::call::CallHeader;

use super::parts::{Part, Uneven};
use super::plan::{Plan, Situation, argument, check_place};
use crate::buffer::RawBuffer;
use crate::call::Call;
use crate::error::Result;

/// Buffers of the call, in its order; offsets may be missing.
const NAMES: [&str; 5] = ["input", "output", "send counts", "receive counts", "send offsets"];
const RECV_COUNTS: usize = 3;

/// Checks a call with counts in memory. On the host they are there now, and are checked as well.
pub(super) fn plan_counted(call: &Call<'_>, situation: &Situation<'_>) -> Result<Plan> {
    let (kind, world_size, buffers) = (call.kind, situation.world_size, call.buffers());
    let refuse = |what, expected: String, got: String| Err(argument(situation, kind, what, expected, got));
    let &[input, output, counts, recv_counts, ref offsets @ ..] = buffers else {
        return refuse("number of buffers", "4 or 5".to_owned(), buffers.len().to_string());
    };
    if offsets.len() > 1 {
        return refuse("number of buffers", "4 or 5".to_owned(), buffers.len().to_string());
    }
    let (dtype, numbers) = (input.dtype, counts.dtype);
    if output.dtype != dtype {
        return refuse("dtype of the output", dtype.to_string(), output.dtype.to_string());
    }
    if !matches!(numbers, DType::U32 | DType::U64) {
        return refuse("dtype of the send counts", "u32 or u64".to_owned(), numbers.to_string());
    }
    for (what, list) in NAMES.into_iter().zip(buffers).skip(2) {
        if (list.dtype, list.count) != (numbers, world_size) {
            let got = format!("{} of {}", list.count, list.dtype);
            return refuse(what, format!("{world_size} of {numbers}"), got);
        }
    }
    let share = output.count / world_size;
    if !output.count.is_multiple_of(world_size) {
        let expected = format!("a multiple of {world_size}");
        return refuse("count of the output", expected, output.count.to_string());
    }
    if numbers == DType::U32 && u32::try_from(share).is_err() {
        let expected = format!("at most {} for each rank, whose counts are u32", u32::MAX);
        return refuse("count of the output", expected, share.to_string());
    }
    let mut windows = Vec::with_capacity(buffers.len());
    for (what, buffer) in NAMES.into_iter().zip(buffers) {
        windows.push(check_place(kind, buffer, situation)?);
        let size = buffer.dtype.size() as u64;
        if situation.device.is_some()
            && what != "input"
            && what != "output"
            && !buffer.ptr.is_multiple_of(size)
        {
            return refuse(what, format!("at a multiple of {size} bytes"), buffer.ptr.to_string());
        }
    }
    check_overlaps(call, situation)?;
    let mut uneven = Uneven { windows, numbers: Some(numbers), ..Uneven::default() };
    let address = |buffer: &RawBuffer| std::ptr::with_exposed_provenance_mut::<u8>(buffer.ptr as usize);
    uneven.locals = buffers.iter().map(address).collect();
    uneven.own = share;
    if situation.device.is_none() {
        let size = dtype.size();
        uneven.target = (0..world_size).map(|rank| Part { at: rank * share * size, count: share }).collect();
        uneven.source = sent(&input, (&counts, offsets.first()), (call, situation))?;
    }
    let (source, target) = (uneven.locals[0].cast_const(), uneven.locals[1]);
    debug_assert_eq!(uneven.locals[RECV_COUNTS], address(&recv_counts));
    Ok(Plan {
        header: CallHeader { dtype: Some(dtype), ..CallHeader::bare(kind) },
        dtype,
        count: input.count,
        source,
        target,
        uneven: Some(Box::new(uneven)),
        ..Plan::bare(kind)
    })
}

/// The parts of our input, as the host finds them in memory.
fn sent(
    input: &RawBuffer,
    (counts, offsets): (&RawBuffer, Option<&RawBuffer>),
    (call, situation): (&Call<'_>, &Situation<'_>),
) -> Result<Vec<Part>> {
    let mut next = 0u64;
    let mut parts = Vec::with_capacity(counts.count);
    for rank in 0..counts.count {
        let count = number_at(counts, rank);
        let start = offsets.map_or(next, |offsets| number_at(offsets, rank));
        let end = start.checked_add(count).filter(|end| *end <= input.count as u64);
        let Some(end) = end else {
            let expected = format!("within {} elements", input.count);
            let got = format!("{count} from {start} for rank {rank}");
            return Err(argument(situation, call.kind, "parts of the input", expected, got));
        };
        next = end;
        parts.push(Part { at: start as usize * input.dtype.size(), count: count as usize });
    }
    Ok(parts)
}

/// Element `at` of a list of counts in memory of the host.
fn number_at(list: &RawBuffer, at: usize) -> u64 {
    let first = std::ptr::with_exposed_provenance::<u8>(list.ptr as usize);
    // SAFETY: the list, which has an element for each rank, is valid until the call is complete, as whoever made it promised, and its
    // dtype is one of these two.
    unsafe {
        match list.dtype {
            DType::U32 => u64::from(first.cast::<u32>().add(at).read_unaligned()),
            _ => first.cast::<u64>().add(at).read_unaligned(),
        }
    }
}

/// Nothing that is written overlaps anything else.
fn check_overlaps(call: &Call<'_>, situation: &Situation<'_>) -> Result<()> {
    let buffers = call.buffers();
    let ends = |buffer: &RawBuffer| (buffer.ptr, buffer.ptr + buffer.bytes() as u64);
    for written in [1, RECV_COUNTS] {
        let (begin, end) = ends(&buffers[written]);
        let other = buffers.iter().enumerate().find(|(other, buffer)| {
            let (other_begin, other_end) = ends(buffer);
            *other != written && begin < other_end && other_begin < end
        });
        if let Some((other, _)) = other {
            let what = if written == 1 { "memory of the output" } else { "memory of the receive counts" };
            let expected = "disjoint from all else";
            return Err(argument(
                situation,
                call.kind,
                what,
                expected,
                format!("an overlap with the {}", NAMES[other]),
            ));
        }
    }
    Ok(())
}

impl Plan {
    /// The type of counts that lie in memory of the operation, where they do.
    pub(crate) fn numbers(&self) -> Option<DType> {
        self.uneven.as_ref()?.numbers
    }

    /// Elements that each rank may fill of our output, where counts lie in memory of the operation.
    #[cfg(feature = "cuda")]
    pub(crate) fn share(&self) -> usize {
        self.own()
    }

    /// Tells, where counts lie in memory of the host, how many elements came from each rank.
    pub(super) fn tell_counts(&self, counts: impl Iterator<Item = u64>) {
        let (Some(numbers), Some(list)) = (self.numbers(), self.locals().get(RECV_COUNTS)) else { return };
        for (rank, count) in counts.enumerate() {
            // SAFETY: the list has an element for each rank, of one of these two types, and is ours until the call is complete. Counts
            // have room in it, since our share has.
            unsafe {
                match numbers {
                    DType::U32 => list.cast::<u32>().add(rank).write_unaligned(count as u32),
                    _ => list.cast::<u64>().add(rank).write_unaligned(count),
                }
            }
        }
    }
}
