//! Cases: what all ranks of a call agree on, and how they are drawn.

use unisono::reduce_op::is_supported;
use unisono::{DType, Kind, ReduceOp};
use unisono_core::layout::{CHUNK_BYTES, CHUNKS, INLINE_BYTES};

use super::data::Style;
use super::random::Random;

/// Where the buffers of a call lie. Equal on all ranks, because windows are part of what ranks compare.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Memory {
    Plain,
    /// Both in the second window: one buffer or two, as each rank likes.
    OneWindow,
    /// From the first window to the second.
    TwoWindows,
    FromWindow,
    ToWindow,
}

/// One call of all ranks.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Case {
    /// With the seed, what everything random in this case follows from.
    pub(crate) number: u64,
    /// The scalar of a pre-multiplied sum is drawn by each rank.
    pub(crate) kind: Kind,
    pub(crate) dtype: DType,
    /// Elements that each rank contributes.
    pub(crate) count: usize,
    pub(crate) memory: Memory,
    pub(crate) style: Style,
}

impl Case {
    /// Bytes that each rank contributes.
    pub(crate) const fn bytes(&self) -> usize {
        self.count * self.dtype.size()
    }

    /// Bytes of the result.
    pub(crate) fn result_bytes(&self, world_size: usize) -> usize {
        self.bytes() * if matches!(self.kind, Kind::AllGather) { world_size } else { 1 }
    }

    /// Microseconds of processor time, very roughly, that this case takes all ranks together.
    pub(crate) fn cost_us(&self, world_size: usize) -> usize {
        let per_element = match (self.kind, self.dtype) {
            (Kind::AllReduce { .. }, DType::F8E4M3 | DType::F8E5M2) => 40,
            (Kind::AllReduce { .. }, _) => 15,
            _ => self.dtype.size(),
        };
        world_size * (20 + self.count * world_size * per_element / 1000)
    }
}

/// Draws cases one after the other, equally on all ranks.
pub(crate) struct Cases {
    random: Random,
    next: u64,
    world_size: usize,
    /// Broadcasts from one root that are still to come in a row.
    in_a_row: (u32, usize),
}

impl Cases {
    /// The cases of `topic`.
    pub(crate) fn new(seed: u64, topic: u64, world_size: usize) -> Self {
        Self { random: Random::of(&[seed, topic]), next: topic << 32, world_size, in_a_row: (0, 0) }
    }

    /// The stream that they are drawn from.
    pub(crate) const fn random(&mut self) -> &mut Random {
        &mut self.random
    }

    /// This call; where its memory lies and how its values look is drawn.
    pub(crate) fn case(&mut self, kind: Kind, dtype: DType, count: usize) -> Case {
        self.next += 1;
        use Memory::{FromWindow, OneWindow, Plain, ToWindow, TwoWindows};
        let memory = [Plain, Plain, Plain, OneWindow, OneWindow, TwoWindows, FromWindow, ToWindow];
        let style = [Style::Wild, Style::Moderate, Style::Tame, Style::Tame];
        Case {
            number: self.next,
            kind,
            dtype,
            count,
            memory: self.random.pick(&memory),
            style: self.random.pick(&style),
        }
    }

    /// Any operation on any dtype that has it.
    pub(crate) fn operation(&mut self) -> (Kind, DType) {
        let dtype = self.random.pick(&DType::ALL);
        let kind = match self.random.below(8) {
            0..4 => Kind::AllReduce { op: self.random.pick(&reductions(dtype)) },
            4 | 5 => self.broadcast(),
            6 => Kind::AllGather,
            _ => Kind::Barrier,
        };
        (kind, dtype)
    }

    /// A broadcast from any root.
    pub(crate) fn broadcast(&mut self) -> Kind {
        Kind::Broadcast { root: self.random.below(self.world_size) as u32 }
    }

    /// Every operation × every dtype that has it × every small count.
    pub(crate) fn matrix(&mut self) -> Vec<Case> {
        let mut cases = Vec::new();
        for dtype in DType::ALL {
            let mut kinds: Vec<Kind> =
                reductions(dtype).into_iter().map(|op| Kind::AllReduce { op }).collect();
            kinds.extend([Kind::Broadcast { root: 0 }, Kind::AllGather, Kind::Barrier]);
            for kind in kinds {
                for count in small_counts(dtype) {
                    let kind = if matches!(kind, Kind::Broadcast { .. }) { self.broadcast() } else { kind };
                    let count = if kind == Kind::Barrier { 0 } else { count };
                    cases.push(self.case(kind, dtype, count));
                }
            }
        }
        cases
    }

    /// Any operation on a count near a border of the algorithms.
    pub(crate) fn near_a_border(&mut self) -> Case {
        let (kind, dtype) = self.operation();
        let count = self.random.pick(&border_counts(dtype, self.world_size));
        let count = if kind == Kind::Barrier { 0 } else { count };
        self.case(kind, dtype, count)
    }

    /// A call as programs make them: mostly small, some large. Sometimes one root broadcasts many times in a row, as far
    /// ahead of the others as it may.
    pub(crate) fn any(&mut self) -> Case {
        let (mut kind, dtype) = self.operation();
        if self.in_a_row.1 == 0 && self.random.once_in(60) {
            self.in_a_row = (self.random.below(self.world_size) as u32, 20 + self.random.below(40));
        }
        if let (root, left @ 1..) = self.in_a_row {
            self.in_a_row.1 = left - 1;
            kind = Kind::Broadcast { root };
        }
        let bytes = match self.random.below(100) {
            0..45 => self.random.below(INLINE_BYTES + 9),
            45..80 => self.random.below(2048),
            80..95 => self.random.below(40_000),
            95..99 => self.random.below(3 * CHUNK_BYTES),
            _ => self.random.below((CHUNKS + 4) * CHUNK_BYTES),
        };
        let count = if kind == Kind::Barrier { 0 } else { (bytes / dtype.size()).min(150_000) };
        self.case(kind, dtype, count)
    }
}

/// The reductions of a dtype.
pub(crate) fn reductions(dtype: DType) -> Vec<ReduceOp> {
    ReduceOp::ALL.into_iter().filter(|op| is_supported(dtype, *op)).collect()
}

/// Counts up to a few hundred, those around the border of what travels inside a call slot among them.
fn small_counts(dtype: DType) -> Vec<usize> {
    let inline = INLINE_BYTES / dtype.size();
    let mut counts = vec![0, 1, 3, 7, 12, 13, 31, 257, inline - 1, inline, inline + 1];
    counts.sort_unstable();
    counts.dedup();
    counts
}

/// Counts around the borders of algorithms, chunks and the ring of chunks.
fn border_counts(dtype: DType, world_size: usize) -> Vec<usize> {
    let around = |bytes: usize| {
        let count = bytes / dtype.size();
        [count - 1, count, count + 1]
    };
    let borders = [
        16 * 1024,
        16 * 1024 / world_size,
        CHUNK_BYTES,
        2 * CHUNK_BYTES,
        3 * CHUNK_BYTES,
        CHUNKS * CHUNK_BYTES,
        (CHUNKS + 1) * CHUNK_BYTES,
        world_size * CHUNK_BYTES,
    ];
    let mut counts: Vec<usize> = borders.into_iter().flat_map(around).collect();
    counts.extend([4097, 5000, 10_007]);
    counts
}
