//! How a message is cut: into blocks, one chunk of staging each, and a block into pieces, one per rank.

use unisono_core::DType;

use super::plan::Plan;

/// A part of a call, cut into blocks, and blocks into pieces. Elements, not bytes.
pub(super) struct Blocks {
    /// Bytes per element.
    pub(super) size: usize,
    /// Number of blocks; one even if there is nothing, so that the call is announced.
    pub(super) number: u64,
    count: usize,
    block: usize,
}

impl Blocks {
    /// Blocks of `block` elements.
    pub(super) fn new(plan: &Plan, block: usize) -> Self {
        Self::of(plan.count, block, plan.dtype)
    }

    /// Blocks of `block` elements of a part of `count` elements.
    pub(super) fn of(count: usize, block: usize, dtype: DType) -> Self {
        Self { size: dtype.size(), number: count.div_ceil(block).max(1) as u64, count, block }
    }

    /// First element and number of elements of a block.
    pub(super) fn block(&self, index: u64) -> (usize, usize) {
        let start = index as usize * self.block;
        (start, self.block.min(self.count - start))
    }

    /// Where a block starts and how long it is, in bytes.
    pub(super) fn bytes(&self, index: u64) -> (usize, usize) {
        let (start, count) = self.block(index);
        (start * self.size, count * self.size)
    }

    /// The same in a part of only `count` elements, which may end before.
    pub(super) fn bytes_of(&self, index: u64, count: usize) -> (usize, usize) {
        let start = (index as usize * self.block).min(count);
        (start * self.size, self.block.min(count - start) * self.size)
    }

    /// Start within the block, and number of elements, of the piece that `owner` reduces. Pieces start on lines of 64
    /// bytes relative to the block, so that no two ranks write the same line.
    pub(super) fn piece(&self, index: u64, owner: usize, world_size: usize) -> (usize, usize) {
        let (_, count) = self.block(index);
        let line = (64 / self.size).max(1);
        let piece = count.div_ceil(world_size).next_multiple_of(line);
        let start = (owner * piece).min(count);
        (start, piece.min(count - start))
    }
}

#[cfg(test)]
mod tests {
    use unisono_core::call::Kind;
    use unisono_core::layout::CHUNK_BYTES;

    use super::*;

    #[test]
    fn blocks_and_pieces_cover_every_element_once() {
        for dtype in [DType::U8, DType::F32, DType::Complex128] {
            for count in [0usize, 1, 15, 16, 17, 1000, 16_384, 65_537, 200_000] {
                for world_size in [1, 2, 3, 7, 64] {
                    let plan = Plan { dtype, count, ..Plan::bare(Kind::AllGather) };
                    let blocks = Blocks::new(&plan, CHUNK_BYTES / dtype.size());
                    let mut next = 0;
                    for block in 0..blocks.number {
                        let (first, length) = blocks.block(block);
                        assert_eq!(first, next);
                        let mut inner = 0;
                        for owner in 0..world_size {
                            let (start, piece) = blocks.piece(block, owner, world_size);
                            assert!(start == inner || piece == 0, "{dtype} {count} {world_size} {owner}");
                            inner += piece;
                        }
                        assert_eq!(inner, length);
                        next += length;
                    }
                    assert_eq!(next, count);
                }
            }
        }
    }
}
