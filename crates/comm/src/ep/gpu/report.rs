//! What the kernels of a buffer report: they write it into a page of host memory, as those of collectives do.

use unisono_core::device::layout::HEADER_WORDS;
use unisono_core::layout::Field;
use unisono_sync::Word;

use crate::cause::Cause;
use crate::control::Control;
use crate::ep::words::{CallWords, operation_name};
use crate::error::{Error, Result};

/// The report, as `kernels/call.cuh` has it.
pub(super) const REPORT: Field = Field { offset: 0, bytes: 1024 };
/// `u64`: ranks that are lost, by bits, as the watch knows. Written by the host.
pub(super) const SUSPECTS: Field = Field { offset: 1024, bytes: 8 };
/// `u32` in a line of its own: ends waits where the communicator's word does not. Written by the host.
pub(super) const ABORT: Field = Field { offset: 1152, bytes: 8 };
/// `u32`: who sleeps until a kernel tells something. Nobody wakes them, and they sleep briefly.
pub(super) const SLEEPERS: Field = Field { offset: 1216, bytes: 8 };
/// `u64` for each rank: whether kernels left it out.
pub(super) const MASKED: Field = Field { offset: 1280, bytes: 16 * 8 };
/// `u64`: rows that came where there was no room for all.
pub(super) const OVERFLOW: Field = Field { offset: 1408, bytes: 8 };
/// `u64`: a selection that is no expert.
pub(super) const COMPLAINT: Field = Field { offset: 1536, bytes: 8 };
/// Ticket, rows, and selections of each of our experts, `u64` each.
pub(super) const TOLD_AT: usize = 2048;

const REASON: usize = 0;
const PEER: usize = 1;
const EPOCH: usize = 2;
const WHAT: usize = 3;
const EXPECTED: usize = 3;
const SEEN: usize = 4;
const WAITED_NS: usize = 5;
const MINE: usize = 8;
/// Words of one header in the report: two more halves fill its last packet.
const HEADER_SPAN: usize = HEADER_WORDS + 1;

/// Why kernels of this rank gave up.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Report {
    Mismatch {
        peer: usize,
        mine: CallWords,
        theirs: CallWords,
    },
    TimedOut {
        peer: usize,
        operation: u8,
        epoch: u64,
        waited_ms: u64,
    },
    /// Others left this rank out.
    GivenUp,
    /// A peer tells places that are not in its memory.
    Damaged {
        peer: usize,
        seen: u64,
    },
    /// Ours: a selection that is no expert, or the same one again. A peer's: an expert that did not get the token.
    Choice {
        peer: usize,
        epoch: u64,
        token: u64,
        chosen: u64,
    },
    Concurrent,
    /// The communicator failed meanwhile.
    Aborted,
    Unreadable,
}

impl Report {
    /// What stands in the page, if anything does.
    pub(super) fn read(words: &[impl Word<u64>]) -> Option<Self> {
        let reason = words[REASON].load_acquire();
        if reason == 0 {
            return None;
        }
        let word = |at: usize| words[at].load_relaxed();
        let header = |start: usize| CallWords::from_header(&std::array::from_fn(|at| word(start + at)));
        let peer = word(PEER) as usize;
        Some(match reason {
            1 => Self::Mismatch { peer, mine: header(MINE), theirs: header(MINE + HEADER_SPAN) },
            2 => Self::TimedOut {
                peer,
                operation: (word(WHAT) as u8).wrapping_sub(16),
                epoch: word(EPOCH),
                waited_ms: word(WAITED_NS) / 1_000_000,
            },
            3 => Self::Concurrent,
            6 => Self::Aborted,
            16 => Self::GivenUp,
            17 => Self::Damaged { peer, seen: word(SEEN) },
            18 => Self::Choice { peer, epoch: word(EPOCH), token: word(EXPECTED), chosen: word(SEEN) },
            _ => Self::Unreadable,
        })
    }

    /// The same as all ranks tell it; none if it is no failure of theirs, or they know it.
    pub(super) fn cause(self, control: &Control) -> Option<Cause> {
        let rank = control.member().0;
        let name = |peer: usize| match peer < control.world_size() {
            true => control.name(peer).to_owned(),
            false => format!("rank {peer}"),
        };
        Some(match self {
            Self::Mismatch { peer, mine, theirs } => {
                Cause::Mismatch { left: mine.describe(rank), right: theirs.describe(peer) }
            }
            Self::TimedOut { peer, operation, epoch, waited_ms } => Cause::TimedOut {
                rank: rank as u32,
                call: format!(
                    "{} of an ep::Buffer on its GPU, round {epoch} (ep::Settings::deadline)",
                    operation_name(operation)
                ),
                waited_ms,
                missing: vec![name(peer)],
            },
            Self::Damaged { peer, seen } => Cause::Damaged {
                rank: rank as u32,
                who: name(peer),
                word: format!("it tells of {seen} rows of an ep::Buffer outside of its memory"),
            },
            Self::Choice { peer, epoch, token, chosen } if peer == rank => Cause::Aborted {
                rank: rank as u32,
                reason: format!(
                    "in low-latency call {epoch} of an ep::Buffer its token {token} selects {}: expected −1 or an expert, each once",
                    chosen as i64
                ),
            },
            Self::Choice { peer, epoch, token, chosen } => Cause::Mismatch {
                left: format!(
                    "low-latency call {epoch} of an ep::Buffer on rank {rank} (where expert {chosen} has no row for token {token} of rank {peer})"
                ),
                right: format!("the same on rank {peer} (which says it has)"),
            },
            Self::Concurrent => {
                Cause::Aborted { rank: rank as u32, reason: Error::ConcurrentUse { rank }.to_string() }
            }
            Self::Unreadable => Cause::Damaged {
                rank: rank as u32,
                who: name(rank),
                word: "the report of the kernels of its ep::Buffer".to_owned(),
            },
            Self::GivenUp | Self::Aborted => return None,
        })
    }

    /// The error of this rank, after the others were told.
    pub(super) fn into_error(self, control: &Control, during: &str) -> Error {
        let (rank, member) = (control.member().0, control.member());
        match self {
            Self::GivenUp => Error::GivenUp {
                rank,
                during: during.to_owned(),
                how: "its ep::Buffer was left out by them".to_owned(),
            },
            Self::Concurrent => Error::ConcurrentUse { rank },
            _ => {
                let unknown = || Cause::Aborted { rank: rank as u32, reason: "unknown".to_owned() };
                // Somebody else may have been first; then all tell the same.
                let cause = control.cause().or_else(|| self.cause(control)).unwrap_or_else(unknown);
                cause.into_error(during, member)
            }
        }
    }
}

/// What selections that are no experts answer.
pub(super) fn complaint(word: u64, (rank, top_k, experts): (usize, usize, usize)) -> Result<()> {
    let Some(at) = (word >> 32).checked_sub(1) else { return Ok(()) };
    Err(Error::Argument {
        call: "layout",
        rank,
        what: "topk_idx",
        expected: format!("−1, or below {experts} experts"),
        got: format!("{} for token {}", word as u32 as i32, at as usize / top_k.max(1)),
    })
}

#[cfg(test)]
mod tests {
    use unisono_core::DType;
    use unisono_node::SharedMemory;

    use super::*;
    use crate::control::words_in;
    use crate::ep::words::{Operation, ToldWords};

    #[test]
    fn reports_are_read_as_kernels_write_them() {
        let page = SharedMemory::create(4096).unwrap();
        let words = words_in(&page, REPORT);
        assert_eq!(Report::read(words), None);
        let set = |at: usize, value: u64| words[at].store_relaxed(value);
        let mine = CallWords::new(Operation::Combine, 7, DType::BF16);
        let theirs = CallWords { top_k: 3, tokens: 5, ..mine };
        for (start, call) in [(MINE, mine), (MINE + HEADER_SPAN, theirs)] {
            let header = call.to_header(1, &ToldWords::default());
            header.into_iter().enumerate().for_each(|(at, word)| set(start + at, word));
        }
        set(PEER, 2);
        set(REASON, 1);
        assert_eq!(Report::read(words), Some(Report::Mismatch { peer: 2, mine, theirs }));
        set(WHAT, 16 + 3);
        set(EPOCH, 9);
        set(WAITED_NS, 5_000_000);
        set(REASON, 2);
        let expected = Report::TimedOut { peer: 2, operation: 3, epoch: 9, waited_ms: 5 };
        assert_eq!(Report::read(words), Some(expected));
        set(REASON, 16);
        assert_eq!(Report::read(words), Some(Report::GivenUp));
        assert_eq!(complaint(0, (0, 8, 4)), Ok(()));
        let error = complaint(18 << 32 | 9, (1, 8, 4)).unwrap_err().to_string();
        assert!(error.contains("below 4 experts, got 9 for token 2"), "{error}");
    }
}
