//! Which algorithm a call takes: a pure function of values that are equal on all ranks.

use std::fmt;
use std::str::FromStr;

use crate::call::Kind;
use crate::error::{Error, Result};
use crate::layout::INLINE_BYTES;

/// How a collective is carried out over shared memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Algorithm {
    /// Each rank stages all of its input; every peer reads it and reduces for itself. One synchronisation.
    OneShot,
    /// Each rank stages the parts that others own; the owner reduces and stages the result. Two synchronisations,
    /// 2·S·(n−1)/n bytes read instead of (n−1)·S.
    TwoShot,
    /// Peers read each other's windows; nothing is staged.
    Direct,
}

impl Algorithm {
    /// Every algorithm.
    pub const ALL: [Self; 3] = [Self::OneShot, Self::TwoShot, Self::Direct];

    /// The field's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::OneShot => "one-shot",
            Self::TwoShot => "two-shot",
            Self::Direct => "direct",
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Algorithm {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|algorithm| algorithm.name() == name)
            .ok_or_else(|| Error::UnknownName { kind: "algorithm", got: name.to_owned() })
    }
}

/// What the choice depends on.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Question {
    /// The operation.
    pub kind: Kind,
    /// Bytes per rank.
    pub bytes: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// Whether all buffers that every rank has lie in windows; of an all-to-all, in two different ones.
    pub in_windows: bool,
    /// An algorithm that was asked for, taken where it can serve the call.
    pub forced: Option<Algorithm>,
}

/// Below this all-reduces are one-shot, measured with two ranks on two Zen 5 cores (`unisono bench all_reduce`).
const ONE_SHOT_BYTES: usize = 16 * 1024;
/// Windows are worth their extra barrier from here on (same measurement).
const DIRECT_BYTES: usize = 16 * 1024;

/// Whether parts of `bytes` travel inside the call slots, where the algorithm is one-shot: all that a rank publishes must fit.
pub const fn is_inline(kind: Kind, bytes: usize, world_size: usize) -> bool {
    match kind {
        Kind::AllReduce { .. }
        | Kind::Broadcast { .. }
        | Kind::AllGather
        | Kind::Reduce { .. }
        | Kind::Gather { .. } => bytes <= INLINE_BYTES,
        Kind::ReduceScatter { .. } | Kind::Scatter { .. } | Kind::AllToAll => {
            bytes <= INLINE_BYTES / world_size
        }
        _ => false,
    }
}

/// The algorithm for this call.
pub fn algorithm(question: &Question) -> Algorithm {
    let reduces = matches!(question.kind, Kind::AllReduce { .. });
    // Parts of any size, and several buffers of a rank, are staged, in windows or not.
    let can_be_direct = !question.kind.is_uneven() && !question.kind.is_multi();
    let in_windows = question.in_windows && can_be_direct;
    match question.forced {
        Some(Algorithm::Direct) if in_windows => return Algorithm::Direct,
        Some(Algorithm::TwoShot) if reduces => return Algorithm::TwoShot,
        Some(Algorithm::OneShot) => return Algorithm::OneShot,
        _ => {}
    }
    if in_windows && question.bytes >= DIRECT_BYTES {
        return Algorithm::Direct;
    }
    // One-shot reads (n − 1)·S and two-shot about 2·S: with more ranks the border moves down.
    if reduces && question.bytes.saturating_mul(question.world_size - 1) > ONE_SHOT_BYTES {
        Algorithm::TwoShot
    } else {
        Algorithm::OneShot
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reduce_op::ReduceOp;

    const SUM: Question = Question {
        kind: Kind::AllReduce { op: ReduceOp::Sum },
        bytes: 8,
        world_size: 2,
        in_windows: false,
        forced: None,
    };

    #[test]
    fn small_calls_take_one_shot_large_ones_two_and_windows_none() {
        assert_eq!(algorithm(&SUM), Algorithm::OneShot);
        assert_eq!(algorithm(&Question { bytes: 1 << 20, ..SUM }), Algorithm::TwoShot);
        assert_eq!(algorithm(&Question { bytes: 1 << 20, in_windows: true, ..SUM }), Algorithm::Direct);
        assert_eq!(algorithm(&Question { bytes: 1 << 20, kind: Kind::AllGather, ..SUM }), Algorithm::OneShot);
    }

    #[test]
    fn what_was_asked_for_is_taken_where_it_can_serve() {
        let force = |algorithm| Question { forced: Some(algorithm), ..SUM };
        assert_eq!(algorithm(&force(Algorithm::TwoShot)), Algorithm::TwoShot);
        assert_eq!(algorithm(&force(Algorithm::Direct)), Algorithm::OneShot);
        assert_eq!(algorithm(&Question { in_windows: true, ..force(Algorithm::Direct) }), Algorithm::Direct);
        assert_eq!(algorithm(&Question { bytes: 1 << 24, ..force(Algorithm::OneShot) }), Algorithm::OneShot);
        let gather = Question { kind: Kind::AllGather, ..force(Algorithm::TwoShot) };
        assert_eq!(algorithm(&gather), Algorithm::OneShot);
    }

    #[test]
    fn small_parts_travel_inside_the_call_where_all_that_a_rank_publishes_fits() {
        let inline = |kind, bytes, world_size| is_inline(kind, bytes, world_size);
        assert!(inline(Kind::Gather { root: 1 }, 48, 64) && !inline(Kind::Gather { root: 1 }, 49, 2));
        assert!(inline(Kind::AllToAll, 24, 2) && !inline(Kind::AllToAll, 25, 2));
        assert!(
            inline(Kind::AllToAll, 16, 3) && !inline(Kind::AllToAll, 16, 4) && inline(Kind::AllToAll, 0, 64)
        );
        assert!(!inline(Kind::AllToAllV, 1, 2));
    }

    #[test]
    fn names_round_trip() {
        for algorithm in Algorithm::ALL {
            assert_eq!(algorithm.name().parse::<Algorithm>().unwrap(), algorithm);
        }
        assert!("tree".parse::<Algorithm>().is_err());
    }
}
