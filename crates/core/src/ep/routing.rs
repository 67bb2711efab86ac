//! Where tokens go: the layout of a dispatch.
//!
//! At a receiver, rows are ordered by source rank, then by the token's index at its source. So the final row of every token follows
//! from counts: [`source_prefix`] says where the rows of a source begin, and [`send_slots`] where each of its tokens goes.

use crate::error::{Error, Result};

use super::{MAX_TOP_K, Placement};

/// What one rank sends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Routing {
    /// For each token, the ranks that it goes to: bit r for rank r.
    pub destinations: Vec<u64>,
    /// Tokens that go to each rank; one that several experts of a rank take is counted once.
    pub tokens_per_rank: Vec<u32>,
    /// Selections of each expert.
    pub tokens_per_expert: Vec<u32>,
}

impl Routing {
    /// Of selections: tokens × `top_k`, each an expert or −1.
    ///
    /// # Errors
    /// [`Error::Malformed`] if `top_k` is none of 1 to [`MAX_TOP_K`], does not divide the selections, or one of these is neither an expert nor −1.
    pub fn of(selections: &[i64], top_k: usize, placement: &Placement) -> Result<Self> {
        if !(1..=MAX_TOP_K).contains(&top_k) || !selections.len().is_multiple_of(top_k) {
            let expected = format!("rows of 1 to {MAX_TOP_K}");
            let got = format!("{} in rows of {top_k}", selections.len());
            return Err(Error::Malformed { what: "top-k indices", expected, got });
        }
        let mut routing = Self::none(selections.len() / top_k, placement);
        for (token, row) in selections.chunks_exact(top_k).enumerate() {
            let mut ranks = 0u64;
            for selection in row {
                match placement.find(*selection) {
                    Some((rank, _)) => {
                        ranks |= 1 << rank;
                        routing.tokens_per_expert[*selection as usize] += 1;
                    }
                    None if *selection == -1 => {}
                    None => {
                        let expected = format!("−1, or below {} experts", placement.experts());
                        let got = format!("{selection} for token {token}");
                        return Err(Error::Malformed { what: "top-k index", expected, got });
                    }
                }
            }
            routing.send(token, ranks);
        }
        Ok(routing)
    }

    /// No selection of `tokens`.
    pub fn none(tokens: usize, placement: &Placement) -> Self {
        Self {
            destinations: vec![0; tokens],
            tokens_per_rank: vec![0; placement.world_size()],
            tokens_per_expert: vec![0; placement.experts()],
        }
    }

    /// Says where `token` goes, which went nowhere before.
    pub fn send(&mut self, token: usize, ranks: u64) {
        self.destinations[token] = ranks;
        for (rank, count) in self.tokens_per_rank.iter_mut().enumerate() {
            *count += (ranks >> rank & 1) as u32;
        }
    }
}

/// `[i][r]` = the tokens that ranks 0 to i send to rank r, of `counts[i][r]` that rank i sends there: row-major, ranks × ranks.
pub fn source_prefix(counts: &[Vec<u32>]) -> Vec<i32> {
    let ranks = counts.len();
    let mut prefix = vec![0; ranks * ranks];
    for (source, row) in counts.iter().enumerate() {
        for (rank, count) in row.iter().take(ranks).enumerate() {
            let before = if source == 0 { 0 } else { prefix[(source - 1) * ranks + rank] };
            prefix[source * ranks + rank] = before + *count as i32;
        }
    }
    prefix
}

/// The row at each rank in which each token of `source` ends, −1 where it does not go: row-major, tokens × ranks.
pub fn send_slots(destinations: &[u64], source: usize, prefix: &[i32], world_size: usize) -> Vec<i32> {
    let start = |rank| if source == 0 { 0 } else { prefix[(source - 1) * world_size + rank] };
    let mut next: Vec<i32> = (0..world_size).map(start).collect();
    let mut slots = Vec::with_capacity(destinations.len() * world_size);
    for ranks in destinations {
        slots.extend(next.iter_mut().enumerate().map(|(rank, next)| {
            let is_sent = ranks >> rank & 1 == 1;
            *next += i32::from(is_sent);
            if is_sent { *next - 1 } else { -1 }
        }));
    }
    slots
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_goes_once_to_a_rank_however_many_experts_take_it_there() {
        let placement = Placement::even(4, 2).unwrap();
        let routing = Routing::of(&[0, 1, 3, -1, -1, -1, 2, 2, 0], 3, &placement).unwrap();
        assert_eq!(routing.destinations, [0b11, 0, 0b11]);
        assert_eq!(routing.tokens_per_rank, [2, 2]);
        assert_eq!(routing.tokens_per_expert, [2, 1, 2, 1]);
        assert_eq!(Routing::of(&[], 3, &placement).unwrap(), Routing::none(0, &placement));
    }

    #[test]
    fn rows_follow_each_other_by_source_and_token() {
        let prefix = source_prefix(&[vec![1, 2], vec![0, 3]]);
        assert_eq!(prefix, [1, 2, 1, 5]);
        assert_eq!(send_slots(&[0b10, 0b11], 0, &prefix, 2), [-1, 0, 0, 1]);
        assert_eq!(send_slots(&[0b10, 0, 0b10, 0b10], 1, &prefix, 2), [-1, 2, -1, -1, -1, 3, -1, 4]);
    }

    #[test]
    fn selections_of_nobody_are_refused() {
        let placement = Placement::even(4, 2).unwrap();
        let text =
            |selections: &[i64], top_k| Routing::of(selections, top_k, &placement).unwrap_err().to_string();
        assert_eq!(
            text(&[0, 4], 1),
            "malformed top-k index: expected −1, or below 4 experts, got 4 for token 1"
        );
        assert!(text(&[-2], 1).ends_with("got -2 for token 0"));
        assert!(text(&[0; 3], 2).ends_with("got 3 in rows of 2"));
        assert!(text(&[], 0).ends_with("got 0 in rows of 0") && text(&[], 33).contains("rows of 33"));
    }
}
