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
    /// Whether all buffers that every rank has lie in windows; of an all-to-all, in two different ones.
    pub in_windows: bool,
}

/// What holds for all calls of a communicator; equal on all ranks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rules {
    /// An algorithm that was asked for, taken where it can serve the call.
    pub forced: Option<Algorithm>,
    /// The sizes at which the choice changes otherwise.
    pub thresholds: Thresholds,
}

/// The sizes, in bytes per rank, at which one algorithm becomes faster than another in worlds of one size.
/// `usize::MAX` as an upper end is “always”, as a lower end “never”.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Thresholds {
    /// All-reduces up to this are one-shot, larger ones two-shot.
    pub all_reduce_one_shot_to: usize,
    /// In windows these are direct from here on: of each operation of [`DIRECT_FORMS`], in that order.
    pub direct_from: [usize; DIRECT_FORMS.len()],
}

/// The operations with a direct form (the reduction and the root do not matter).
pub const DIRECT_FORMS: [Kind; 8] = Kind::EQUAL_PARTS;

/// Up to this much read per rank all-reduces are one-shot, measured with two ranks on two Zen 5 cores (`unisono bench
/// all_reduce`).
const ONE_SHOT_BYTES: usize = 16 * 1024;
/// Windows are worth their extra barrier from here on, in the order of [`DIRECT_FORMS`] (`unisono tune` on the same
/// machine): earlier where otherwise every rank would stage and read.
const DIRECT_FROM: [usize; DIRECT_FORMS.len()] =
    [16 << 10, 16 << 10, 4 << 10, 16 << 10, 4 << 10, 16 << 10, 16 << 10, 4 << 10];

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

impl Thresholds {
    /// What holds without a tuning file.
    pub const fn for_world(world_size: usize) -> Self {
        // One-shot reads (n − 1)·S and two-shot about 2·S: with more ranks the border moves down. A rank that is alone
        // reads nothing.
        let all_reduce_one_shot_to = match world_size {
            0 | 1 => usize::MAX,
            several => ONE_SHOT_BYTES / (several - 1),
        };
        Self { all_reduce_one_shot_to, direct_from: DIRECT_FROM }
    }

    /// From where on `kind` is direct, if all its buffers lie in windows; `None` if it has no direct form.
    pub const fn direct_from(&self, kind: Kind) -> Option<usize> {
        // Parts of any size, and several buffers of a rank, are staged, in windows or not.
        match kind.equal_parts_index() {
            Some(at) => Some(self.direct_from[at]),
            None => None,
        }
    }
}

/// What was chosen and why.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decision {
    /// The choice.
    pub algorithm: Algorithm,
    /// Why this one.
    pub reason: Reason,
    /// Why not direct, where the operation has that form and nobody asked for another.
    pub not_direct: Option<NotDirect>,
    /// What was asked for but cannot serve this call.
    pub unserved: Option<Algorithm>,
}

/// Why an algorithm was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Reason {
    /// It was asked for.
    Forced,
    /// The operation has no other, with buffers where they are.
    OnlyOne,
    /// The message has at most this many bytes.
    UpTo(usize),
    /// The message has more bytes than this.
    Above(usize),
    /// All buffers lie in windows, and the message has at least this many bytes.
    Windows(usize),
}

/// Why a call is not direct.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum NotDirect {
    /// A buffer lies in no window.
    NoWindows,
    /// It is smaller than this, from where on direct is faster.
    Below(usize),
}

/// The algorithm for this call.
#[inline]
pub fn algorithm(question: &Question, rules: &Rules) -> Algorithm {
    decide(question, rules).algorithm
}

/// The algorithm for this call, with the reasons.
#[inline]
pub fn decide(question: &Question, rules: &Rules) -> Decision {
    let reduces = matches!(question.kind, Kind::AllReduce { .. });
    let direct_from = rules.thresholds.direct_from(question.kind);
    let can_be_direct = question.in_windows && direct_from.is_some();
    let serves = |algorithm| match algorithm {
        Algorithm::OneShot => true,
        Algorithm::TwoShot => reduces,
        Algorithm::Direct => can_be_direct,
    };
    let decision = |algorithm, reason| Decision { algorithm, reason, not_direct: None, unserved: None };
    if let Some(forced) = rules.forced.filter(|forced| serves(*forced)) {
        return decision(forced, Reason::Forced);
    }
    let not_direct = match direct_from {
        None => None,
        Some(_) if !question.in_windows => Some(NotDirect::NoWindows),
        Some(from) if question.bytes < from => Some(NotDirect::Below(from)),
        Some(from) => {
            return Decision { unserved: rules.forced, ..decision(Algorithm::Direct, Reason::Windows(from)) };
        }
    };
    let border = rules.thresholds.all_reduce_one_shot_to;
    let staged = match reduces {
        false => decision(Algorithm::OneShot, Reason::OnlyOne),
        true if question.bytes <= border => decision(Algorithm::OneShot, Reason::UpTo(border)),
        true => decision(Algorithm::TwoShot, Reason::Above(border)),
    };
    Decision { not_direct, unserved: rules.forced, ..staged }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reduce_op::ReduceOp;

    const SUM: Question =
        Question { kind: Kind::AllReduce { op: ReduceOp::Sum }, bytes: 8, in_windows: false };
    const MIB: Question = Question { bytes: 1 << 20, ..SUM };

    fn chosen(question: Question) -> Algorithm {
        algorithm(&question, &Rules { forced: None, thresholds: Thresholds::for_world(2) })
    }

    fn forced(forced: Algorithm, question: Question) -> Decision {
        decide(&question, &Rules { forced: Some(forced), thresholds: Thresholds::for_world(2) })
    }

    #[test]
    fn small_calls_take_one_shot_large_ones_two_and_windows_none() {
        assert_eq!(chosen(SUM), Algorithm::OneShot);
        assert_eq!(chosen(MIB), Algorithm::TwoShot);
        assert_eq!(chosen(Question { in_windows: true, ..MIB }), Algorithm::Direct);
        assert_eq!(chosen(Question { kind: Kind::AllGather, ..MIB }), Algorithm::OneShot);
        assert_eq!(chosen(Question { kind: Kind::AllToAll, in_windows: true, ..MIB }), Algorithm::Direct);
        assert_eq!(chosen(Question { kind: Kind::AllToAllV, in_windows: true, ..MIB }), Algorithm::OneShot);
    }

    #[test]
    fn every_direct_form_has_its_own_border() {
        let thresholds = Thresholds { direct_from: [0, 1, 2, 3, 4, 5, 6, 7], ..Thresholds::for_world(2) };
        assert_eq!(DIRECT_FORMS.map(|kind| thresholds.direct_from(kind)), [0, 1, 2, 3, 4, 5, 6, 7].map(Some));
        assert_eq!(thresholds.direct_from(Kind::AllToAllV), None);
    }

    #[test]
    fn borders_belong_to_the_smaller_side_and_move_with_the_world() {
        let at = |bytes, world| {
            let rules = Rules { forced: None, thresholds: Thresholds::for_world(world) };
            algorithm(&Question { bytes, ..SUM }, &rules)
        };
        assert_eq!([at(16_384, 2), at(16_385, 2)], [Algorithm::OneShot, Algorithm::TwoShot]);
        assert_eq!([at(2340, 8), at(2341, 8)], [Algorithm::OneShot, Algorithm::TwoShot]);
        assert_eq!(at(usize::MAX, 1), Algorithm::OneShot);
    }

    #[test]
    fn what_was_asked_for_is_taken_where_it_can_serve() {
        let algorithm = |asked, question| forced(asked, question).algorithm;
        assert_eq!(algorithm(Algorithm::TwoShot, SUM), Algorithm::TwoShot);
        assert_eq!(algorithm(Algorithm::Direct, SUM), Algorithm::OneShot);
        assert_eq!(algorithm(Algorithm::Direct, Question { in_windows: true, ..SUM }), Algorithm::Direct);
        assert_eq!(algorithm(Algorithm::OneShot, Question { bytes: 1 << 24, ..SUM }), Algorithm::OneShot);
        assert_eq!(
            algorithm(Algorithm::TwoShot, Question { kind: Kind::AllGather, ..SUM }),
            Algorithm::OneShot
        );
    }

    #[test]
    fn each_choice_has_its_reasons() {
        let rules = Rules { forced: None, thresholds: Thresholds::for_world(2) };
        let no_windows = Some(NotDirect::NoWindows);
        let expected =
            |algorithm, reason, not_direct| Decision { algorithm, reason, not_direct, unserved: None };
        assert_eq!(decide(&SUM, &rules), expected(Algorithm::OneShot, Reason::UpTo(16_384), no_windows));
        assert_eq!(decide(&MIB, &rules), expected(Algorithm::TwoShot, Reason::Above(16_384), no_windows));
        let small = Question { in_windows: true, ..SUM };
        let below = Some(NotDirect::Below(16_384));
        assert_eq!(decide(&small, &rules), expected(Algorithm::OneShot, Reason::UpTo(16_384), below));
        let large = Question { in_windows: true, ..MIB };
        assert_eq!(decide(&large, &rules), expected(Algorithm::Direct, Reason::Windows(16_384), None));
        let only = Question { kind: Kind::AllToAllV, ..large };
        assert_eq!(decide(&only, &rules), expected(Algorithm::OneShot, Reason::OnlyOne, None));
        assert_eq!(forced(Algorithm::TwoShot, large).reason, Reason::Forced);
        assert_eq!(forced(Algorithm::Direct, MIB).unserved, Some(Algorithm::Direct));
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
