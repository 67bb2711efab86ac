//! How many multiprocessors the blocks of kernels fill while they wait for other ranks, and how many blocks fit on so many.
//!
//! A block for bulk copies takes one, or half of one, and one for lines takes one for its registers. Of others as many share one as have 1,024 threads together, and the device puts them further
//! apart where there is nothing else to run. In each kernel one block more exchanges headers.

use super::select::{Launch, PAIRED_THREADS, Rules, TEAM_BLOCKS};
use super::table::WIDE_BLOCKS;

/// The least that a communicator can work with: a team for rows, and the block that exchanges headers.
pub const LEAST_MULTIPROCESSORS: u32 = TEAM_BLOCKS + 1;

/// The most blocks that move data and fill no more than so many multiprocessors, whatever the form: see [`Rules::most_blocks`].
pub const fn blocks_on(multiprocessors: u32) -> u32 {
    let pairs = multiprocessors.saturating_mul(2).saturating_sub(2);
    if pairs < WIDE_BLOCKS as u32 { multiprocessors.saturating_sub(1) } else { pairs }
}

impl Launch {
    /// Multiprocessors that its blocks fill, that which exchanges headers among them.
    pub const fn multiprocessors(&self) -> u32 {
        let blocks = self.blocks + 1;
        let takes_one = (self.by_copies && self.threads > PAIRED_THREADS) || self.form.is_lines();
        if takes_one { blocks } else { (blocks * self.threads).div_ceil(1024) }
    }
}

impl Rules {
    /// The most multiprocessors that a kernel fills on its own, unless more blocks are asked for.
    pub const fn multiprocessors(&self) -> u32 {
        if self.is_narrow() { self.most_blocks + 1 } else { (self.most_blocks + 1).div_ceil(2) }
    }
}
