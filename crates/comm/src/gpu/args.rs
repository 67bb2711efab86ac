//! What kernels are given, and what they report: both as they lie in memory. The other side is `kernels/call.cuh`.

use unisono_core::call::{self, CallHeader};
pub(crate) use unisono_core::device::layout::HEADER_LAUNCH;
use unisono_core::device::layout::{HEADER_WORDS, MAX_MESSAGES, MAX_RANKS, REPORT_WAITING};
use unisono_core::recorder::{GpuWait, GpuWork, MessageHeader};
use unisono_sync::Word;

/// The argument of every kernel, by value.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Args {
    /// The arena of each rank.
    pub(crate) arenas: [u64; MAX_RANKS],
    /// Where each rank's input lies; in all but direct forms our own only.
    pub(crate) sources: [u64; MAX_RANKS],
    /// Where each rank's output lies.
    pub(crate) targets: [u64; MAX_RANKS],
    /// Our words in memory of our device.
    pub(crate) state: u64,
    /// The word that ends all waits.
    pub(crate) abort: u64,
    /// Our page in host memory.
    pub(crate) report: u64,
    /// The call, as peers compare it.
    pub(crate) header: [u64; HEADER_WORDS],
    /// Bytes of one part.
    pub(crate) bytes: u64,
    /// Bytes of the windows that the sides lie in, in direct forms.
    pub(crate) source_bytes: u64,
    pub(crate) target_bytes: u64,
    /// How long a kernel waits; 0 for ever.
    pub(crate) patience_ns: u64,
    pub(crate) rank: u32,
    pub(crate) root: u32,
    /// Vectors of 16 bytes that a block moves in one round.
    pub(crate) tile: u32,
    /// Whether input and output are the same memory.
    pub(crate) is_same: u32,
}

/// What kernels of rows are given beyond the call. The other side is `kernels/fused.cuh`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Rows {
    pub(crate) residual: u64,
    pub(crate) residual_out: u64,
    pub(crate) weight: u64,
    pub(crate) output: u64,
    pub(crate) scale: u64,
    pub(crate) rows: u32,
    pub(crate) hidden: u32,
    pub(crate) epsilon: f32,
    /// The code of a [`NormOutput`](unisono_core::fused::NormOutput).
    pub(crate) kind: u32,
}

/// The argument of kernels of rows, by value.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct FusedArgs {
    pub(crate) args: Args,
    pub(crate) rows: Rows,
}

/// The argument of kernels whose parts have sizes of their own. In it, of the side that has a part for each rank,
/// [`Args::sources`] or [`Args::targets`] are those of our parts, and [`Args::bytes`] are of the largest.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct UnevenArgs {
    pub(crate) args: Args,
    /// Bytes of the part of each rank.
    pub(crate) part_bytes: [u64; MAX_RANKS],
}

/// The argument of kernels between the steps of copy engines, by value. The other side is `kernels/engine.cuh`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct StepArgs {
    pub(crate) args: Args,
    /// The step before which the kernel stands, from 1 on.
    pub(crate) step: u64,
}

/// One message, as kernels carry it out.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Message {
    /// Where it lies or goes to.
    pub(crate) at: u64,
    pub(crate) bytes: u64,
    pub(crate) tag: u32,
    /// By its code.
    pub(crate) dtype: u8,
    /// The code of the collective that it is a part of; 0 of a message of its own.
    pub(crate) kind: u8,
    /// The other end.
    pub(crate) peer: u8,
    pub(crate) is_sent: u8,
}

/// The argument of the kernels of messages, by value.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Messages {
    pub(crate) call: Args,
    /// Those of one lane (a peer and a direction) follow each other.
    pub(crate) list: [Message; MAX_MESSAGES],
    /// Where each lane begins in the list, and the end.
    pub(crate) begins: [u16; 2 * MAX_RANKS + 1],
    /// Blocks of each lane.
    pub(crate) blocks: u16,
    /// The rank that is looked at first where a message from any is asked for.
    pub(crate) first: u32,
}

/// The argument of kernels of an all-to-all whose counts lie in memory of the device, by value. Of [`Args::sources`] and
/// [`Args::targets`] ours are there. The other side is `kernels/all_to_all_v.cuh`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Counted {
    pub(crate) call: Args,
    /// Lists with a number for each rank: elements for it, where they begin (0: parts follow each other), and elements from it.
    pub(crate) counts: u64,
    pub(crate) offsets: u64,
    pub(crate) told: u64,
    /// Elements of our input, and those of our output that each rank may fill.
    pub(crate) most_in: u64,
    pub(crate) most_out: u64,
    /// Bytes of an element.
    pub(crate) size: u32,
    /// Blocks of each lane.
    pub(crate) blocks: u16,
    /// By its code.
    pub(crate) dtype: u8,
    /// The code of the collective.
    pub(crate) kind: u8,
    /// Whether numbers have 64 bits.
    pub(crate) is_wide: u32,
    pub(crate) reserved: u32,
}

const REASON: usize = 0;
const PEER: usize = 1;
const EPOCH: usize = 2;
const WHAT: usize = 3;
const ROOM: usize = 3;
const NEEDED: usize = 4;
const WAITED_NS: usize = 5;
const IS_INPUT: usize = 5;
/// The word in which a kernel tells one more than the rank whose message it has found.
pub(crate) const FOUND: usize = 7;
const MINE: usize = 8;
/// Words of one header in the report: two more halves fill its last packet.
const HEADER_SPAN: usize = HEADER_WORDS + 1;

/// Why kernels of this rank gave up.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Report {
    /// The peer made another call.
    Mismatch { peer: usize, epoch: u32, mine: Option<CallHeader>, theirs: Option<CallHeader>, is_grid: bool },
    /// The peer did not come in time.
    TimedOut { peer: usize, work: GpuWork, waited_ms: u64 },
    /// The peer sent another message.
    OtherMessage { peer: usize, expected: MessageHeader, got: MessageHeader },
    /// A part, from the peer or (where our input is too short) for it, has no room.
    Counts { peer: usize, epoch: u32, needed: u64, room: u64, is_input: bool },
    /// Another kernel of this communicator was running.
    Concurrent,
    /// The communicator failed while they waited. Not every cause alone says that a call has not been done: one who left may have
    /// done its part.
    Aborted,
    /// Words that no kernel of ours writes.
    Unreadable,
}

impl Report {
    /// What stands in the page, if anything does. One load if nothing does.
    #[inline]
    pub(crate) fn read(words: &[impl Word<u64>]) -> Option<Self> {
        match words[REASON].load_acquire() {
            0 => None,
            reason => Some(Self::decode(reason, words)),
        }
    }

    #[cold]
    fn decode(reason: u64, words: &[impl Word<u64>]) -> Self {
        let word = |at: usize| words[at].load_relaxed();
        let (peer, epoch) = (word(PEER) as usize, word(EPOCH) as u32);
        let header =
            |start: usize| std::array::from_fn::<u64, { call::HEADER_WORDS }, _>(|at| word(start + at));
        match reason {
            1 => {
                let (mine, theirs) = (header(MINE), header(MINE + HEADER_SPAN));
                Self::Mismatch {
                    peer,
                    epoch,
                    mine: CallHeader::from_words(&mine),
                    theirs: CallHeader::from_words(&theirs),
                    is_grid: mine[..5] == theirs[..5],
                }
            }
            2 => Self::TimedOut {
                peer,
                work: GpuWork::new(word(WHAT), epoch),
                waited_ms: word(WAITED_NS) / 1_000_000,
            },
            3 => Self::Concurrent,
            5 => {
                let header = |start: usize| {
                    let [first, bytes] = [word(start), word(start + 1)];
                    MessageHeader::new(first as u32, (first >> 32) as u32, bytes)
                };
                Self::OtherMessage { peer, expected: header(MINE), got: header(MINE + HEADER_SPAN) }
            }
            6 => Self::Aborted,
            7 => Self::Counts {
                peer,
                epoch,
                needed: word(NEEDED),
                room: word(ROOM),
                is_input: word(IS_INPUT) != 0,
            },
            _ => Self::Unreadable,
        }
    }
}

/// What a kernel which lasts works on, and the peer that it is waiting for, if one said so.
pub(crate) fn waiting(words: &[impl Word<u64>]) -> Option<GpuWait> {
    GpuWait::from_word(words[REPORT_WAITING].load_relaxed())
}

#[cfg(test)]
mod tests {
    use unisono_core::device::layout::{STATE_EXPECTED_AT, STATE_LEFT_AT};
    use unisono_core::device::{ArenaLayout, Link};
    use unisono_cuda::{Cache, Compiler, Device, DeviceBuffer, Grid, Module, Stream};

    use super::*;
    use crate::gpu::kernels::{Purpose, architecture, source};

    #[test]
    fn kernels_read_arguments_where_the_host_writes_them() {
        let Ok(device) = Device::new(0) else { return };
        let layout = ArenaLayout::new(3, Link::Device);
        let source = source(&layout, Purpose::Copies);
        let cubin = Cache::of_user().cubin(&source, architecture(&device), Compiler::find).unwrap();
        let probe = Module::load(&device, &cubin).unwrap().function("probe").unwrap();
        let facts = DeviceBuffer::new(&device, 21 * 8).unwrap();
        let mut args = Args {
            abort: 4,
            report: 5,
            bytes: 7,
            source_bytes: 71,
            target_bytes: 72,
            patience_ns: 8,
            rank: 9,
            root: 10,
            tile: 11,
            is_same: 12,
            ..Args::default()
        };
        (args.arenas[MAX_RANKS - 1], args.sources[1], args.targets[2]) = (1, 2, 3);
        args.header[HEADER_WORDS - 1] = 6;
        args.targets[0] = facts.address();
        let stream = Stream::new(&device).unwrap();
        let grid = Grid { blocks: 1, threads: 1, shared_bytes: 0, is_early: false };
        // SAFETY: the kernel takes `Args` and writes 21 words to the first target.
        unsafe { probe.launch(&stream, grid, (&raw mut args).cast()) }.unwrap();
        stream.synchronize().unwrap();
        let mut bytes = [0; 21 * 8];
        facts.read(0, &mut bytes).unwrap();
        let facts: Vec<u64> = bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
        assert_eq!(facts[..3], [size_of::<Args>() as u64, 64 + 2 * 88, 36]);
        assert_eq!(facts[3..17], [1, 2, 3, 4, 5, 6, 7, 71, 72, 8, 9, 10, 11, 12]);
        assert_eq!(facts[17], layout.packet_bytes() as u64);
        let scratch_end = facts[18] as usize + 2 * layout.scratch_half_bytes();
        assert!(
            scratch_end <= layout.message_flags().offset && facts[18].is_multiple_of(2 << 20),
            "{scratch_end}"
        );
        assert_eq!(facts[19..], [STATE_LEFT_AT as u64, STATE_EXPECTED_AT as u64]);
    }
}
