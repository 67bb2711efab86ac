//! Where everything lies in the shared memory of an expert-parallel buffer on the host: one copy for each rank, all alike.
//!
//! ```text
//! attendance │ consumed │ sleepers │ failure │ calls: 8 × 128 bytes │ data, twice │ weights, twice
//!
//! data       counts: to each rank, of each expert │ destinations │ top-k indices │ top-k weights │ scales │ rows
//! weights    top-k indices │ top-k weights
//! ```
//! Only the rank whose copy it is writes there, but for the count of sleepers, the attendance (which peers may close) and the failure.

use super::MAX_TOP_K;
use crate::error::{Error, Result};
use crate::layout::{Field, LINE};

/// Words in which a rank says which call a round belongs to.
pub const CALL_WORDS: usize = 16;
/// Rounds whose calls are kept: more than any rank can be ahead of another.
pub const CALLS: usize = 8;

/// What the sizes follow from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ArenaShape {
    /// Ranks of the world.
    pub world_size: usize,
    /// Experts of all ranks.
    pub experts: usize,
    /// Elements of a row.
    pub hidden: usize,
    /// Bytes of the widest element.
    pub element_bytes: usize,
    /// Tokens of a rank in a low-latency call, and about as many as are staged at once in others.
    pub capacity: usize,
    /// The most experts of a token.
    pub top_k: usize,
    /// Whether there is room for the rows of all ranks at once.
    pub low_latency: bool,
}

/// One half of the data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DataFields {
    /// `u32` × (ranks + experts): tokens to each rank, selections of each expert.
    pub counts: Field,
    /// `u64` × rows: the ranks that each token goes to.
    pub destinations: Field,
    /// `i64` × rows × top-k.
    pub indices: Field,
    /// `f32` × rows × top-k.
    pub weights: Field,
    /// 4 bytes × rows × [`ArenaLayout::scales`].
    pub scales: Field,
    /// Rows, [`ArenaLayout::row_stride`] bytes apart.
    pub rows: Field,
}

/// One half of the weights that a low-latency combine sends ahead.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WeightFields {
    /// `i64` × capacity × top-k.
    pub indices: Field,
    /// `f32` × capacity × top-k.
    pub weights: Field,
}

/// The fields of one copy, in bytes from its start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ArenaLayout {
    /// `u64`: rounds sent, or that this rank takes part no more.
    pub attendance: Field,
    /// `u64`: rounds of all ranks read.
    pub consumed: Field,
    /// `u32`: who sleeps on these two.
    pub sleepers: Field,
    /// `u32`, of rank 0's copy: which rank failed, if communicators' failures do not tell.
    pub failure: Field,
    /// [`CALLS`] × [`CALL_WORDS`] × `u64`: what the latest rounds belong to.
    pub calls: Field,
    /// Halves that rounds with rows use in turn.
    pub data: [DataFields; 2],
    /// Halves that rounds with weights use in turn.
    pub weights: [WeightFields; 2],
    /// Rows that a half of the data holds.
    pub rows: usize,
    /// Bytes from one row to the next.
    pub row_stride: usize,
    /// The most scales of a row.
    pub scales: usize,
    total: usize,
}

impl ArenaLayout {
    /// The layout for this shape.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if it is above 2⁴⁰ bytes.
    pub fn new(shape: &ArenaShape) -> Result<Self> {
        let ArenaShape { world_size, experts, hidden, element_bytes, capacity, top_k, low_latency } = *shape;
        let cap = 1u128 << 40;
        let rows = if low_latency { world_size * capacity } else { capacity.max(world_size) };
        let row_stride = (hidden * element_bytes).next_multiple_of(LINE);
        // One for each eight elements is more than any format has.
        let scales = hidden.div_ceil(8);
        let most = row_stride + scales * 4 + MAX_TOP_K * 12 + 64;
        let bytes = 2 * (rows as u128 * most as u128 + (world_size + experts) as u128 * 4) + (1 << 16);
        if bytes > cap {
            return Err(Error::TooLarge {
                what: "size of an expert-parallel buffer",
                got: u64::try_from(bytes).unwrap_or(u64::MAX),
                cap: cap as u64,
            });
        }
        let mut total = 0;
        let mut take = |bytes: usize| {
            let field = Field { offset: total, bytes };
            total = field.end().next_multiple_of(LINE);
            field
        };
        let (attendance, consumed, sleepers, failure) = (take(8), take(8), take(4), take(4));
        let calls = take(CALLS * CALL_WORDS * 8);
        let mut data = || DataFields {
            counts: take((world_size + experts) * 4),
            destinations: take(rows * 8),
            indices: take(rows * top_k * 8),
            weights: take(rows * top_k * 4),
            scales: take(rows * scales * 4),
            rows: take(rows * row_stride),
        };
        let data = [data(), data()];
        let mut weights = || WeightFields {
            indices: take(if low_latency { capacity * top_k * 8 } else { 0 }),
            weights: take(if low_latency { capacity * top_k * 4 } else { 0 }),
        };
        let weights = [weights(), weights()];
        Ok(Self {
            attendance,
            consumed,
            sleepers,
            failure,
            calls,
            data,
            weights,
            rows,
            row_stride,
            scales,
            total,
        })
    }

    /// Bytes of one copy.
    pub const fn total_bytes(&self) -> usize {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: ArenaShape = ArenaShape {
        world_size: 3,
        experts: 7,
        hidden: 40,
        element_bytes: 2,
        capacity: 5,
        top_k: 3,
        low_latency: true,
    };

    #[test]
    fn fields_follow_each_other_on_lines_of_their_own() {
        for low_latency in [true, false] {
            let layout = ArenaLayout::new(&ArenaShape { low_latency, ..SHAPE }).unwrap();
            let mut fields =
                vec![layout.attendance, layout.consumed, layout.sleepers, layout.failure, layout.calls];
            for data in layout.data {
                let DataFields { counts, destinations, indices, weights, scales, rows } = data;
                fields.extend([counts, destinations, indices, weights, scales, rows]);
            }
            fields.extend(layout.weights.iter().flat_map(|half| [half.indices, half.weights]));
            for (field, next) in fields.iter().zip(&fields[1..]) {
                assert!(field.offset.is_multiple_of(LINE) && next.offset >= field.end(), "{fields:?}");
            }
            assert!(layout.total_bytes() >= fields.last().unwrap().end());
            assert_eq!((layout.rows, layout.row_stride), (if low_latency { 15 } else { 5 }, 128));
        }
    }

    #[test]
    fn sizes_beyond_reason_are_refused() {
        let shape = ArenaShape { capacity: 1 << 25, hidden: 1 << 16, ..SHAPE };
        assert!(matches!(ArenaLayout::new(&shape), Err(Error::TooLarge { .. })));
    }
}
