//! A rank in its world, checked once.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The largest world: every table of ranks stays far from overflow.
pub const MAX_WORLD_SIZE: u32 = 65_536;

/// Who one rank is: its number and the size of its world. Always `rank < world_size`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "(u32, u32)", into = "(u32, u32)")]
pub struct Member {
    rank: u32,
    world_size: u32,
}

impl Member {
    /// Checks `rank < world_size` and `1 ≤ world_size ≤` [`MAX_WORLD_SIZE`].
    pub fn new(rank: usize, world_size: usize) -> Result<Self> {
        if world_size == 0 || world_size > MAX_WORLD_SIZE as usize || rank >= world_size {
            return Err(Error::Member {
                rank: rank as u64,
                world_size: world_size as u64,
                max: u64::from(MAX_WORLD_SIZE),
            });
        }
        Ok(Self { rank: rank as u32, world_size: world_size as u32 })
    }

    /// The rank, from 0.
    pub const fn rank(self) -> u32 {
        self.rank
    }

    /// The number of ranks.
    pub const fn world_size(self) -> u32 {
        self.world_size
    }
}

impl TryFrom<(u32, u32)> for Member {
    type Error = Error;

    fn try_from((rank, world_size): (u32, u32)) -> Result<Self> {
        Self::new(rank as usize, world_size as usize)
    }
}

impl From<Member> for (u32, u32) {
    fn from(member: Member) -> Self {
        (member.rank, member.world_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ranks_below_the_world_size_exist() {
        assert_eq!(Member::new(3, 4).unwrap().rank(), 3);
        for (rank, world_size) in [(4, 4), (0, 0), (0, 65_537), (usize::MAX, 2)] {
            assert!(matches!(Member::new(rank, world_size), Err(Error::Member { .. })));
        }
    }
}
