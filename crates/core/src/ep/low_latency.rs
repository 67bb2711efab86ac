//! Where everything lies in the memory of a GPU's rank that its peers write in low-latency calls.
//!
//! ```text
//! credits │ half 0 │ half 1
//!
//! half    heads │ counts │ choices │ pieces told │ scales │ rows
//! ```
//! Calls use the halves in turn. In a half each rank has a part of its own of everything, which only it writes: a place for each of its
//! tokens, whatever becomes of the others. Heads, counts and choices are packets: 8 bytes of data, and the number of the call that they are
//! of. A row is told in *pieces* of [`PIECE`] elements, each by a number beside. Numbers are 64 bits wide, so nothing is ever cleared. The
//! credit of a rank says how many calls it has read here.
//!
//! 8 ranks with 128 tokens of 7168 bf16 elements each need 2 · 8 · 128 · 14336 bytes for rows: 28 MiB, and 3 % for the rest.

use super::cast::blocks;
use super::{ArenaShape, MAX_TOP_K};
use crate::error::{Error, Result};
use crate::layout::{Field, LINE};

/// Elements of a row that are told together: what a warp moves at once. A multiple of the elements that share a scale.
pub const PIECE: usize = 1024;
/// Bytes of a packet.
const PACKET: usize = 16;
/// Bytes from the credit, or the head, of a rank to that of the next one.
const STRIDE: usize = LINE;

/// The fields, in bytes from the start of the memory, and those of a half from its beginning.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LowLatencyLayout {
    /// `u64` of each rank.
    pub credits: Field,
    /// The halves.
    pub halves: [Field; 2],
    /// Packets of each rank.
    pub heads: Field,
    /// Packets × ranks × half of [`LowLatencyLayout::experts`]: selections of two experts of the receiver in each.
    pub counts: Field,
    /// Packets × ranks × capacity × top-k: of each selection the expert, and what goes with it.
    pub choices: Field,
    /// `u64` × ranks × capacity × [`LowLatencyLayout::pieces`].
    pub pieces_told: Field,
    /// `f32` × ranks × capacity × [`LowLatencyLayout::scales`].
    pub scales: Field,
    /// Ranks × capacity rows, [`LowLatencyLayout::row_stride`] bytes apart.
    pub rows: Field,
    /// The most experts of a rank.
    pub experts: usize,
    /// Pieces of a row.
    pub pieces: usize,
    /// Scales of a row.
    pub scales_of_row: usize,
    /// Bytes from one row to the next.
    pub row_stride: usize,
    total: usize,
}

impl LowLatencyLayout {
    /// The layout for this shape, if no rank has more than `experts` of the experts.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if it is above 2⁴⁰ bytes.
    pub fn new(shape: &ArenaShape, experts: usize) -> Result<Self> {
        let ArenaShape { world_size, hidden, element_bytes, capacity, top_k, .. } = *shape;
        let (pieces, scales_of_row) = (hidden.div_ceil(PIECE), blocks(hidden));
        let row_stride = (hidden * element_bytes).next_multiple_of(LINE);
        let of_token = row_stride + 4 * scales_of_row + 8 * pieces + PACKET * MAX_TOP_K;
        let most =
            2 * world_size as u128 * (capacity as u128 * of_token as u128 + (PACKET * experts) as u128);
        let cap = 1u128 << 40;
        if most > cap {
            let got = u64::try_from(most).unwrap_or(u64::MAX);
            return Err(Error::TooLarge { what: "memory for low-latency calls", got, cap: cap as u64 });
        }
        let mut end = 0;
        let mut take = |bytes: usize| {
            let field = Field { offset: end, bytes };
            end = field.end().next_multiple_of(LINE);
            field
        };
        let tokens = world_size * capacity;
        let heads = take(world_size * STRIDE);
        let counts = take(world_size * experts.div_ceil(2) * PACKET);
        let choices = take(tokens * top_k * PACKET);
        let pieces_told = take(tokens * pieces * 8);
        let scales = take(tokens * scales_of_row * 4);
        let rows = take(tokens * row_stride);
        let credits = Field { offset: 0, bytes: world_size * STRIDE };
        let halves = [0, 1].map(|half| Field { offset: credits.bytes + half * end, bytes: end });
        Ok(Self {
            credits,
            halves,
            heads,
            counts,
            choices,
            pieces_told,
            scales,
            rows,
            experts,
            pieces,
            scales_of_row,
            row_stride,
            total: credits.bytes + 2 * end,
        })
    }

    /// Bytes of the memory of one rank.
    pub const fn total_bytes(&self) -> usize {
        self.total
    }

    /// What is the same for all shapes, as kernels know it.
    pub const fn definitions() -> [(&'static str, usize); 2] {
        [("PIECE", PIECE), ("PLACE_STRIDE", STRIDE)]
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::ep) const SHAPE: ArenaShape = ArenaShape {
        world_size: 8,
        experts: 288,
        hidden: 7168,
        element_bytes: 2,
        capacity: 128,
        top_k: 8,
        low_latency: true,
    };

    #[test]
    fn fields_follow_each_other_and_have_room_for_every_token_of_every_rank() {
        for (hidden, capacity, experts) in [(7168, 128, 36), (8, 1, 1), (1032, 7, 0), (2560, 33, 5)] {
            let shape = ArenaShape { hidden, capacity, ..SHAPE };
            let layout = LowLatencyLayout::new(&shape, experts).unwrap();
            let LowLatencyLayout { heads, counts, choices, pieces_told, scales, rows, .. } = layout;
            let fields = [heads, counts, choices, pieces_told, scales, rows];
            for (field, next) in fields.iter().zip(&fields[1..]) {
                assert!(field.offset.is_multiple_of(LINE) && next.offset >= field.end(), "{fields:?}");
            }
            let [first, second] = layout.halves;
            assert!(rows.end() <= first.bytes && first.bytes == second.bytes);
            assert!(layout.credits.end() <= first.offset && first.end() <= second.offset);
            assert!(second.end() <= layout.total_bytes() && first.offset.is_multiple_of(LINE));
            assert!(layout.row_stride >= hidden * 2 && layout.row_stride.is_multiple_of(LINE));
            assert!(layout.pieces * PIECE >= hidden && (layout.pieces - 1) * PIECE < hidden);
            assert_eq!(rows.bytes, 8 * capacity * layout.row_stride);
        }
        let bytes = LowLatencyLayout::new(&SHAPE, 36).unwrap().total_bytes();
        assert!((28 << 20..29 << 20).contains(&bytes), "{bytes}");
    }

    #[test]
    fn sizes_beyond_reason_are_refused() {
        let shape = ArenaShape { capacity: 1 << 24, hidden: 1 << 20, ..SHAPE };
        assert!(matches!(LowLatencyLayout::new(&shape, 36), Err(Error::TooLarge { .. })));
    }
}
