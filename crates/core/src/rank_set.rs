//! A set of ranks of one world, as bits: what ranks tell each other about who is there.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Ranks below a world size.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RankSet {
    words: Vec<u64>,
}

impl RankSet {
    /// No rank of a world of `world_size`.
    pub fn empty(world_size: usize) -> Self {
        Self { words: vec![0; world_size.div_ceil(64)] }
    }

    /// All ranks of a world of `world_size`.
    pub fn all(world_size: usize) -> Self {
        let mut set = Self::empty(world_size);
        for rank in 0..world_size {
            set.insert(rank);
        }
        set
    }

    /// A set that came from elsewhere.
    ///
    /// # Errors
    /// [`Error::Malformed`] if it is not one of a world of `world_size`.
    pub fn checked(self, world_size: usize) -> Result<Self> {
        let is_outside = |rank: usize| rank >= world_size;
        if self.words.len() == world_size.div_ceil(64) && !self.iter().any(is_outside) {
            return Ok(self);
        }
        Err(Error::Malformed {
            what: "set of ranks",
            expected: format!("ranks below {world_size}"),
            got: format!("{} words, the highest rank {:?}", self.words.len(), self.iter().max()),
        })
    }

    /// Adds `rank`, which is below the world size; true if it is new.
    pub fn insert(&mut self, rank: usize) -> bool {
        let is_new = !self.contains(rank);
        self.words[rank / 64] |= 1 << (rank % 64);
        is_new
    }

    /// Adds all of `other`; true if any is new.
    pub fn merge(&mut self, other: &Self) -> bool {
        let mut is_new = false;
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            is_new |= *theirs & !*mine != 0;
            *mine |= theirs;
        }
        is_new
    }

    /// Whether `rank` is in it.
    pub fn contains(&self, rank: usize) -> bool {
        self.words.get(rank / 64).is_some_and(|word| word >> (rank % 64) & 1 == 1)
    }

    /// Whether all of `other` are in it.
    pub fn contains_all(&self, other: &Self) -> bool {
        other.iter().all(|rank| self.contains(rank))
    }

    /// The ranks, ascending.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.words.len() * 64).filter(|rank| self.contains(*rank))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_added_merged_and_listed() {
        let mut set = RankSet::empty(70);
        assert!(set.insert(69) && set.insert(3) && !set.insert(3));
        let mut other = RankSet::empty(70);
        other.insert(64);
        assert!(set.merge(&other) && !set.merge(&other));
        assert_eq!(set.iter().collect::<Vec<_>>(), [3, 64, 69]);
        assert!(set.contains_all(&other) && !other.contains_all(&set));
        assert!(RankSet::all(70).contains_all(&set) && !set.contains(70));
    }

    #[test]
    fn a_set_of_another_world_is_refused() {
        assert!(RankSet::all(64).checked(64).is_ok());
        let error = RankSet::all(64).checked(63).unwrap_err().to_string();
        assert_eq!(
            error,
            "malformed set of ranks: expected ranks below 63, got 1 words, the highest rank Some(63)"
        );
        assert!(RankSet::all(64).checked(65).is_err());
    }
}
