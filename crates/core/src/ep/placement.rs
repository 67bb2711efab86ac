//! Which rank has which expert.

use crate::error::{Error, Result};

/// The rank of every expert, and the number that the expert has there: experts of a rank are numbered in ascending order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Placement {
    owners: Vec<u32>,
    local: Vec<u32>,
    counts: Vec<usize>,
}

impl Placement {
    /// Equal blocks: rank r has the experts r·E/R to (r + 1)·E/R − 1.
    ///
    /// # Errors
    /// [`Error::Malformed`] if there is no expert, or the ranks do not divide them.
    pub fn even(experts: usize, world_size: usize) -> Result<Self> {
        if experts == 0 || world_size == 0 || !experts.is_multiple_of(world_size) {
            let expected = format!("a multiple of {world_size} ranks (or a table that says where each is)");
            return Err(Error::Malformed { what: "number of experts", expected, got: experts.to_string() });
        }
        let owners: Vec<usize> = (0..experts).map(|expert| expert / (experts / world_size)).collect();
        Self::table(&owners, world_size)
    }

    /// Expert e on rank `owners[e]`. A rank may have none.
    ///
    /// # Errors
    /// [`Error::Malformed`] if there is no expert, or one is on no rank of the world.
    pub fn table(owners: &[usize], world_size: usize) -> Result<Self> {
        let malformed = |expected, got| Err(Error::Malformed { what: "placement of experts", expected, got });
        if owners.is_empty() || owners.len() > i32::MAX as usize {
            return malformed("1 to 2³¹ − 1 experts".to_owned(), owners.len().to_string());
        }
        if let Some((expert, owner)) = owners.iter().enumerate().find(|(_, owner)| **owner >= world_size) {
            return malformed(format!("ranks below {world_size}"), format!("{owner} for expert {expert}"));
        }
        let mut counts = vec![0; world_size];
        let mut number = |owner: &usize| {
            counts[*owner] += 1;
            counts[*owner] as u32 - 1
        };
        let local = owners.iter().map(&mut number).collect();
        Ok(Self { owners: owners.iter().map(|owner| *owner as u32).collect(), local, counts })
    }

    /// Number of experts.
    pub const fn experts(&self) -> usize {
        self.owners.len()
    }

    /// Number of ranks.
    pub const fn world_size(&self) -> usize {
        self.counts.len()
    }

    /// Number of experts of `rank`.
    pub fn local_experts(&self, rank: usize) -> usize {
        self.counts[rank]
    }

    /// The experts of `rank`, ascending.
    pub fn experts_of(&self, rank: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.experts()).filter(move |expert| self.owners[*expert] as usize == rank)
    }

    /// The rank that a selection goes to, and the expert's number there; `None` for what selects nothing.
    #[inline]
    pub fn find(&self, selection: i64) -> Option<(usize, usize)> {
        let expert = usize::try_from(selection).ok()?;
        Some((*self.owners.get(expert)? as usize, self.local[expert] as usize))
    }

    /// A hash that is equal for equal placements: what ranks compare.
    pub fn fingerprint(&self) -> u64 {
        let start = (self.world_size() as u64) << 32 | self.experts() as u64;
        self.owners.iter().fold(start, |hash, owner| {
            (hash.rotate_left(5) ^ u64::from(*owner)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_and_tables_number_the_experts_of_each_rank() {
        let even = Placement::even(6, 3).unwrap();
        assert_eq!((even.find(0), even.find(3), even.find(5)), (Some((0, 0)), Some((1, 1)), Some((2, 1))));
        assert_eq!((even.find(-1), even.find(6), even.find(i64::MIN)), (None, None, None));
        let table = Placement::table(&[2, 0, 2, 2], 3).unwrap();
        assert_eq!((0..3).map(|rank| table.local_experts(rank)).collect::<Vec<_>>(), [1, 0, 3]);
        assert_eq!((table.find(1), table.find(3)), (Some((0, 0)), Some((2, 2))));
        assert_eq!(table.experts_of(2).collect::<Vec<_>>(), [0, 2, 3]);
        assert_eq!(even, Placement::table(&[0, 0, 1, 1, 2, 2], 3).unwrap());
        assert_ne!(even.fingerprint(), Placement::table(&[0, 0, 1, 2, 1, 2], 3).unwrap().fingerprint());
    }

    #[test]
    fn what_fits_no_world_is_refused() {
        let text = |result: Result<Placement>| result.unwrap_err().to_string();
        assert_eq!(
            text(Placement::even(7, 2)),
            "malformed number of experts: expected a multiple of 2 ranks (or a table that says where each is), got 7"
        );
        assert!(Placement::even(0, 2).is_err() && Placement::table(&[], 2).is_err());
        assert_eq!(
            text(Placement::table(&[0, 2], 2)),
            "malformed placement of experts: expected ranks below 2, got 2 for expert 1"
        );
    }
}
