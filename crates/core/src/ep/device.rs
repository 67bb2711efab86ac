//! Where everything lies in the memory that an expert-parallel buffer has on each rank's GPU, all ranks alike.
//!
//! ```text
//! headers │ flags │ packets │ gates │ attendance │ low latency │ pool │ staging
//! └─ as in the arena of a communicator ┘
//! ```
//! What comes first is laid out as in [`device::ArenaLayout`](crate::device::ArenaLayout), so that kernels enter calls, poll and tell flags in the
//! same way; the packets are counts of tokens here. Peers write into all of it but the attendance, which they only close.

use super::{ArenaShape, LowLatencyLayout};
use crate::device::layout::{ArenaLayout, Link, PACKET_DATA};
use crate::error::{Error, Result};
use crate::layout::Field;

/// Outputs begin on multiples of this: a line of NVLink.
pub const DEVICE_LINE: usize = 128;
/// The most local experts of a rank on GPUs.
pub const MOST_LOCAL_EXPERTS: usize = 1 << 15;
const LARGE_PAGE: usize = 2 << 20;

/// The fields of one rank's memory, in bytes from its start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceLayout {
    /// `u64`: rounds in which the rank took part, and whether it takes part no more.
    pub attendance: Field,
    /// What low-latency calls need; empty without them.
    pub low_latency: Field,
    /// Where everything lies in that.
    pub low_latency_layout: Option<LowLatencyLayout>,
    /// What outputs are made of.
    pub pool: Field,
    /// Where rows arrive for which the pool has no room.
    pub staging: Field,
    /// Bytes from the counts of one source to those of the next.
    pub counts_stride: usize,
    total: usize,
}

impl DeviceLayout {
    /// The layout for this shape, where no rank has more than `local_experts`; `pool_bytes` are for outputs, and half as many for staging.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if there are too many experts on a rank, or it is above 2⁴⁰ bytes.
    pub fn new(shape: &ArenaShape, local_experts: usize, pool_bytes: usize) -> Result<Self> {
        let too_large = |what, got: u128, cap: u128| Error::TooLarge {
            what,
            got: u64::try_from(got).unwrap_or(u64::MAX),
            cap: cap as u64,
        };
        if local_experts > MOST_LOCAL_EXPERTS {
            let what = "number of experts of a rank";
            return Err(too_large(what, local_experts as u128, MOST_LOCAL_EXPERTS as u128));
        }
        let front = ArenaLayout::new(shape.world_size, Link::Device);
        let words = shape.world_size + local_experts;
        let counts_stride =
            ((words * 4).div_ceil(PACKET_DATA) * front.packet_bytes()).next_multiple_of(DEVICE_LINE);
        let low_latency_layout =
            shape.low_latency.then(|| LowLatencyLayout::new(shape, local_experts)).transpose()?;
        let low_latency_bytes = low_latency_layout.map_or(0, |layout| layout.total_bytes());
        let all = low_latency_bytes as u128
            + 2 * pool_bytes as u128
            + front.scratch().offset as u128
            + 4 * LARGE_PAGE as u128;
        if all > 1 << 40 {
            return Err(too_large("size of an expert-parallel buffer", all, 1 << 40));
        }
        let mut total = front.scratch().offset;
        let mut take = |bytes: usize, step: usize| {
            let field = Field { offset: total, bytes };
            total = field.end().next_multiple_of(step);
            field
        };
        let attendance = take(8, DEVICE_LINE);
        let low_latency = take(low_latency_bytes, LARGE_PAGE);
        let pool = take(pool_bytes.next_multiple_of(DEVICE_LINE), DEVICE_LINE);
        let staging = take((pool_bytes / 2).next_multiple_of(DEVICE_LINE), DEVICE_LINE);
        Ok(Self { attendance, low_latency, low_latency_layout, pool, staging, counts_stride, total })
    }

    /// Bytes of one rank's memory.
    pub const fn total_bytes(&self) -> usize {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::super::low_latency::tests::SHAPE;
    use super::*;

    #[test]
    fn fields_follow_each_other_behind_those_of_a_communicator() {
        for low_latency in [true, false] {
            let shape = ArenaShape { low_latency, ..SHAPE };
            let layout = DeviceLayout::new(&shape, 36, 1 << 28).unwrap();
            let front = ArenaLayout::new(8, Link::Device);
            let fields =
                [front.packets(), layout.attendance, layout.low_latency, layout.pool, layout.staging];
            for pair in fields.windows(2) {
                assert!(pair[1].offset >= pair[0].end(), "{layout:?}");
            }
            assert!(fields.iter().all(|field| field.offset.is_multiple_of(DEVICE_LINE)));
            assert!(layout.total_bytes() >= layout.staging.end());
            assert!(layout.pool.offset.is_multiple_of(LARGE_PAGE));
            assert_eq!((layout.pool.bytes, layout.staging.bytes), (1 << 28, 1 << 27));
        }
    }

    #[test]
    fn counts_of_all_sources_fit_into_half_of_the_packets() {
        for world_size in 1..=crate::device::layout::MAX_RANKS {
            let shape = ArenaShape { world_size, ..SHAPE };
            let layout = DeviceLayout::new(&shape, MOST_LOCAL_EXPERTS, 0).unwrap();
            let front = ArenaLayout::new(world_size, Link::Device);
            assert!(world_size * layout.counts_stride <= front.half_bytes());
            assert!(layout.counts_stride / 16 * PACKET_DATA >= (world_size + MOST_LOCAL_EXPERTS) * 4);
        }
        let error = DeviceLayout::new(&SHAPE, MOST_LOCAL_EXPERTS + 1, 0).unwrap_err().to_string();
        assert!(error.contains("experts of a rank") && error.contains("32769"), "{error}");
        assert!(DeviceLayout::new(&SHAPE, 36, 1 << 41).is_err());
    }
}
