//! Why a communicator failed, as it is told to all its ranks: the first cause floods, and every survivor reports it.

use serde::{Deserialize, Serialize};
use unisono_node::Lost;

use crate::error::Error;

/// The first cause of a failure. Recorded in shared memory by the rank that found it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Cause {
    /// A rank's process is gone, or does not answer.
    Died { rank: u32, who: String, how: String },
    /// Two ranks made different calls.
    Mismatch { left: String, right: String },
    /// A part whose size lies in memory of the operation has no room.
    Counts { during: String, from: u32, to: u32, needed: u64, room: u64, is_input: bool },
    /// Live ranks did not make the call in time.
    TimedOut { rank: u32, call: String, waited_ms: u64, missing: Vec<String> },
    /// Somebody called `Observer::abort`.
    Aborted { rank: u32, reason: String },
    /// A rank dropped its communicator without `destroy`, or shrinks it.
    Dropped { rank: u32 },
    /// A word of `who` says what no rank can have written.
    Damaged { rank: u32, who: String, word: String },
}

impl Cause {
    pub(crate) fn died(rank: usize, who: String, lost: Lost) -> Self {
        Self::Died { rank: rank as u32, who, how: lost.to_string() }
    }

    /// Bytes for the shared record, at most `cap`: long texts are cut rather than lost.
    pub(crate) fn to_bytes(&self, cap: usize) -> Vec<u8> {
        match postcard::to_stdvec(self) {
            Ok(bytes) if bytes.len() <= cap => bytes,
            _ => postcard::to_stdvec(&self.shortened(cap / 8)).unwrap_or_default(),
        }
    }

    /// Reads a shared record: its length in bytes, then the bytes. `None` if it makes no sense.
    pub(crate) fn from_words(words: &[u64]) -> Option<Self> {
        let (length, words) = words.split_first()?;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Self::from_bytes(bytes.get(..usize::try_from(*length).ok()?)?)
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        postcard::from_bytes(bytes).ok()
    }

    fn shortened(&self, chars: usize) -> Self {
        let cut = |text: &String| text.chars().take(chars / 4).collect::<String>();
        match self {
            Self::Died { rank, who, how } => Self::Died { rank: *rank, who: cut(who), how: cut(how) },
            Self::Mismatch { left, right } => Self::Mismatch { left: cut(left), right: cut(right) },
            Self::Counts { during, from, to, needed, room, is_input } => Self::Counts {
                during: cut(during),
                from: *from,
                to: *to,
                needed: *needed,
                room: *room,
                is_input: *is_input,
            },
            Self::TimedOut { rank, call, waited_ms, missing } => Self::TimedOut {
                rank: *rank,
                call: cut(call),
                waited_ms: *waited_ms,
                missing: missing.iter().take(4).map(cut).collect(),
            },
            Self::Aborted { rank, reason } => Self::Aborted { rank: *rank, reason: cut(reason) },
            Self::Dropped { rank } => Self::Dropped { rank: *rank },
            Self::Damaged { rank, who, word } => {
                Self::Damaged { rank: *rank, who: cut(who), word: cut(word) }
            }
        }
    }

    /// The error that rank `me` reports, which was `during` a call (`all_reduce #812`).
    pub(crate) fn into_error(self, during: &str, (me, world_size): (usize, usize)) -> Error {
        let during = during.to_owned();
        match self {
            // We were stopped, and run again.
            Self::Died { rank, how, .. } if rank as usize == me => Error::GivenUp { rank: me, during, how },
            Self::Died { rank, who, how } => {
                let rank = rank as usize;
                let survivors = (0..world_size).filter(|other| *other != rank).collect();
                Error::PeerDied { rank, who, during, how, survivors }
            }
            Self::Mismatch { left, right } => Error::Mismatch { left, right },
            Self::Counts { during, from, to, needed, room, is_input } => {
                Error::Counts { during, from: from as usize, to: to as usize, needed, room, is_input }
            }
            Self::TimedOut { rank, call, waited_ms, missing } => {
                Error::Timeout { rank: rank as usize, call, waited_ms, missing }
            }
            Self::Aborted { rank, reason } => Error::Aborted { rank: rank as usize, during, reason },
            Self::Dropped { rank } => Error::PeerLeft { rank: rank as usize, during },
            Self::Damaged { rank, who, word } => {
                Error::DamagedMemory { rank: rank as usize, during, who, word }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rank_that_was_given_up_is_told_so_and_the_others_that_it_died() {
        let cause = Cause::died(1, "rank 1".into(), Lost::Stopped { silent_ms: 3000 });
        let error = |me| cause.clone().into_error("barrier #3", (me, 3));
        assert!(matches!(error(1), Error::GivenUp { rank: 1, .. }));
        assert!(matches!(error(2), Error::PeerDied { rank: 1, survivors, .. } if survivors == [0, 2]));
    }

    #[test]
    fn causes_round_trip_and_long_ones_are_cut_to_fit() {
        let cause = Cause::Aborted { rank: 3, reason: "because".into() };
        assert_eq!(Cause::from_bytes(&cause.to_bytes(2000)), Some(cause));
        let long = Cause::TimedOut {
            rank: 1,
            call: "é".repeat(5000),
            waited_ms: 5,
            missing: vec!["x".repeat(9000); 50],
        };
        let bytes = long.to_bytes(2000);
        assert!(bytes.len() <= 2000, "{}", bytes.len());
        assert!(matches!(Cause::from_bytes(&bytes), Some(Cause::TimedOut { rank: 1, .. })));
        assert_eq!(Cause::from_bytes(&[0xff; 40]), None);
    }
}
