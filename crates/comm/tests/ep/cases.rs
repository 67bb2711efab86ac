//! Random cases and what must come of them, for test programs beside this one.

#![allow(dead_code, reason = "the host's own calls are made in the other one")]

pub(crate) use super::support;

pub(crate) mod case;
pub(crate) mod low_latency;
pub(crate) mod throughput;

use case::Case;

impl Case {
    /// A low-latency case of the same shape with other values and choices.
    pub(crate) fn again(&self, number: u64) -> Self {
        Self { number, ..self.clone() }.with_tokens(false)
    }

    /// What is left of it where `rank` takes no part.
    pub(crate) fn without(&self, rank: usize) -> Self {
        let mut case = self.clone();
        case.tokens[rank] = 0;
        case.drawn.weights[rank].clear();
        case.drawn.selections[rank].clear();
        let is_there = |expert: i64| expert < 0 || case.owners[expert as usize] != rank;
        for expert in case.drawn.selections.iter_mut().flatten().filter(|expert| !is_there(**expert)) {
            *expert = -1;
        }
        case
    }
}
