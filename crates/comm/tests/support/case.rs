//! Cases: what all ranks of a call agree on, and how they are drawn.

use unisono::reduce_op::is_supported;
use unisono::{DType, Kind, ReduceOp};
use unisono_core::layout::{CHUNK_BYTES, CHUNKS, INLINE_BYTES};

use super::data::Style;
use super::random::Random;

/// Most elements between two parts of a buffer, where the caller may leave gaps.
pub(crate) const MAX_GAP: usize = 20;
/// Most buffers of a rank, in operations on several.
const MAX_BUFFERS: usize = 4;

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

/// What all ranks do together.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Action {
    /// A collective.
    Call(Kind),
    /// One message.
    Message { from: usize, to: usize },
    /// A message of every rank to the one that is `by` further on.
    Shift { by: usize },
    /// A message of every other rank to this one, which takes them as they come.
    ToAnybody { to: usize },
}

impl Action {
    /// Its reduction, where it has one.
    pub(crate) const fn op(self) -> Option<ReduceOp> {
        match self {
            Self::Call(kind) => kind.op(),
            _ => None,
        }
    }

    pub(crate) const fn is_uneven(self) -> bool {
        matches!(self, Self::Call(kind) if kind.is_uneven())
    }

    pub(crate) const fn is_multi(self) -> bool {
        matches!(self, Self::Call(kind) if kind.is_multi())
    }

    /// Whether every rank gets the same.
    pub(crate) const fn has_common_result(self) -> bool {
        matches!(
            self,
            Self::Call(
                Kind::AllReduce { .. }
                    | Kind::Broadcast { .. }
                    | Kind::AllGather
                    | Kind::AllGatherV
                    | Kind::AllReduceMulti { .. }
                    | Kind::BroadcastMulti { .. }
            )
        )
    }

    /// Whether a side of some rank has a part for every rank.
    pub(crate) const fn has_part_for_all(self) -> bool {
        match self {
            Self::Call(kind) => matches!(
                kind,
                Kind::AllGather
                    | Kind::AllGatherV
                    | Kind::ReduceScatter { .. }
                    | Kind::ReduceScatterV { .. }
                    | Kind::Gather { .. }
                    | Kind::GatherV { .. }
                    | Kind::Scatter { .. }
                    | Kind::ScatterV { .. }
                    | Kind::AllToAll
                    | Kind::AllToAllV
            ),
            _ => matches!(self, Self::ToAnybody { .. }),
        }
    }
}

/// One call of all ranks.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Case {
    /// With the seed, what everything random in this case follows from.
    pub(crate) number: u64,
    /// The scalar of a pre-multiplied sum is drawn by each rank.
    pub(crate) action: Action,
    pub(crate) dtype: DType,
    /// Elements of one part; about so many, where parts have sizes of their own.
    pub(crate) count: usize,
    /// What sizes and numbers of parts follow from, where they are not all alike.
    pub(crate) shape: u64,
    pub(crate) memory: Memory,
    pub(crate) style: Style,
}

impl Case {
    /// No buffer of any rank has more bytes.
    pub(crate) fn most_bytes(&self, world_size: usize) -> usize {
        let parts = if self.action.has_part_for_all() { world_size } else { 1 };
        let elements = match (self.action.is_uneven(), self.action.is_multi()) {
            (false, false) => self.count * parts,
            (true, _) => (self.count + 1 + MAX_GAP) * parts + MAX_GAP,
            (_, true) => (self.count + MAX_GAP) * MAX_BUFFERS + MAX_GAP,
        };
        elements * self.dtype.size()
    }

    /// Elements of the part of each rank.
    pub(crate) fn sizes(&self, world_size: usize) -> Vec<usize> {
        if !self.action.is_uneven() {
            return vec![self.count; world_size];
        }
        let mut random = Random::of(&[self.shape, 1]);
        (0..world_size).map(|_| self.size(&mut random)).collect()
    }

    /// Elements from each rank to each, a row for every sender. One in three is symmetric.
    pub(crate) fn table(&self, world_size: usize) -> Vec<Vec<usize>> {
        if !self.action.is_uneven() {
            return vec![vec![self.count; world_size]; world_size];
        }
        let mut random = Random::of(&[self.shape, 2]);
        let is_symmetric = random.once_in(3);
        let mut row = || (0..world_size).map(|_| self.size(&mut random)).collect();
        let mut table: Vec<Vec<usize>> = (0..world_size).map(|_| row()).collect();
        for from in (0..world_size).filter(|_| is_symmetric) {
            let (above, below) = table.split_at_mut(from);
            for (to, row) in above.iter().enumerate() {
                below[0][to] = row[from];
            }
        }
        table
    }

    fn size(&self, random: &mut Random) -> usize {
        match random.below(6) {
            0 => 0,
            1 => self.count + 1,
            2 => random.below(self.count + 1),
            _ => self.count,
        }
    }

    /// Buffers of `rank`, in operations on several: as many on all ranks where they are reduced.
    pub(crate) fn buffers(&self, rank: usize) -> usize {
        match self.action {
            Action::Call(Kind::BroadcastMulti { root, buffer }) => {
                let number = 1 + Random::of(&[self.shape, 3, rank as u64]).below(MAX_BUFFERS);
                if root as usize == rank { number.max(buffer as usize + 1) } else { number }
            }
            _ => 1 + Random::of(&[self.shape, 3]).below(MAX_BUFFERS),
        }
    }

    /// Every other message has a tag of its own; the others share a few.
    pub(crate) fn tag(&self) -> u32 {
        if self.has_own_tag() { self.number as u32 + 3 } else { self.number as u32 % 3 }
    }

    /// Whether no other message of its batch has this tag.
    pub(crate) fn has_own_tag(&self) -> bool {
        matches!(self.action, Action::ToAnybody { .. }) || self.number.is_multiple_of(2)
    }

    /// Microseconds of processor time, very roughly, that this case takes all ranks together.
    pub(crate) fn cost_us(&self, world_size: usize) -> usize {
        let per_element = match (self.action.op(), self.dtype) {
            (Some(_), DType::F8E4M3 | DType::F8E5M2) => 40,
            (Some(_), _) => 15,
            _ => self.dtype.size(),
        };
        let buffers = if self.action.is_multi() { MAX_BUFFERS } else { 1 };
        world_size * (20 + self.count * buffers * world_size * per_element / 1000)
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

    /// This call; where its memory lies, how its values look and how it is divided is drawn.
    pub(crate) fn case(&mut self, action: Action, dtype: DType, count: usize) -> Case {
        self.next += 1;
        use Memory::{FromWindow, OneWindow, Plain, ToWindow, TwoWindows};
        let memory = [Plain, Plain, Plain, OneWindow, OneWindow, TwoWindows, FromWindow, ToWindow];
        let style = [Style::Wild, Style::Moderate, Style::Tame, Style::Tame];
        Case {
            number: self.next,
            action,
            dtype,
            count: if action == Action::Call(Kind::Barrier) { 0 } else { count },
            shape: self.random.next(),
            memory: self.random.pick(&memory),
            style: self.random.pick(&style),
        }
    }

    pub(crate) fn root(&mut self) -> u32 {
        self.random.below(self.world_size) as u32
    }

    /// Every operation that reduces, with any root.
    pub(crate) fn reducing(&mut self, op: ReduceOp) -> [Action; 5] {
        [
            Kind::AllReduce { op },
            Kind::Reduce { op, root: self.root() },
            Kind::ReduceScatter { op },
            Kind::ReduceScatterV { op },
            Kind::AllReduceMulti { op },
        ]
        .map(Action::Call)
    }

    /// Every operation that only moves, with any root, and messages where there is another rank.
    pub(crate) fn moving(&mut self) -> Vec<Action> {
        let buffer = self.random.below(MAX_BUFFERS) as u32;
        let kinds = [
            Kind::Broadcast { root: self.root() },
            Kind::AllGather,
            Kind::Gather { root: self.root() },
            Kind::Scatter { root: self.root() },
            Kind::AllToAll,
            Kind::AllGatherV,
            Kind::GatherV { root: self.root() },
            Kind::ScatterV { root: self.root() },
            Kind::AllToAllV,
            Kind::BroadcastMulti { root: self.root(), buffer },
            Kind::Barrier,
        ];
        let mut actions = kinds.map(Action::Call).to_vec();
        if self.world_size > 1 {
            let (from, by) = (self.random.below(self.world_size), 1 + self.random.below(self.world_size - 1));
            actions.push(Action::Message { from, to: (from + by) % self.world_size });
            actions.push(Action::Shift { by });
            actions.push(Action::ToAnybody { to: from });
        }
        actions
    }

    /// Any operation on any dtype that has it.
    pub(crate) fn operation(&mut self) -> (Action, DType) {
        let dtype = self.random.pick(&DType::ALL);
        let op = self.random.pick(&reductions(dtype));
        let action = match self.random.below(8) {
            0 => Action::Call(Kind::AllReduce { op }),
            1..4 => {
                let all = self.reducing(op);
                self.random.pick(&all)
            }
            _ => {
                let all = self.moving();
                self.random.pick(&all)
            }
        };
        (action, dtype)
    }

    /// Every operation × every dtype that has it × every small count.
    pub(crate) fn matrix(&mut self) -> Vec<Case> {
        let mut cases = Vec::new();
        for dtype in DType::ALL {
            for count in small_counts(dtype) {
                let mut actions = self.moving();
                for op in reductions(dtype) {
                    actions.extend(self.reducing(op));
                }
                for action in actions {
                    cases.push(self.case(action, dtype, count));
                }
            }
        }
        cases
    }

    /// Any operation on a count near a border of the algorithms.
    pub(crate) fn near_a_border(&mut self) -> Case {
        let (action, dtype) = self.operation();
        let count = self.random.pick(&border_counts(dtype, self.world_size));
        self.case(action, dtype, count)
    }

    /// A call as programs make them: mostly small, some large. Sometimes one root broadcasts many times in a row, as far
    /// ahead of the others as it may.
    pub(crate) fn any(&mut self) -> Case {
        let (mut action, dtype) = self.operation();
        if self.in_a_row.1 == 0 && self.random.once_in(60) {
            self.in_a_row = (self.root(), 20 + self.random.below(40));
        }
        if let (root, left @ 1..) = self.in_a_row {
            self.in_a_row.1 = left - 1;
            action = Action::Call(Kind::Broadcast { root });
        }
        let bytes = match self.random.below(100) {
            0..45 => self.random.below(INLINE_BYTES + 9),
            45..80 => self.random.below(2048),
            80..95 => self.random.below(40_000),
            95..99 => self.random.below(3 * CHUNK_BYTES),
            _ => self.random.below((CHUNKS + 4) * CHUNK_BYTES),
        };
        let parts = if action.has_part_for_all() { self.world_size } else { 1 };
        // In the largest world no call moves more than some 64 MiB.
        let most = (1 << 20) / (parts * self.world_size).div_ceil(64);
        self.case(action, dtype, (bytes.min(most) / dtype.size()).min(150_000))
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

/// Counts around the borders of algorithms, chunks, pieces of chunks and the ring of chunks.
fn border_counts(dtype: DType, world_size: usize) -> Vec<usize> {
    let around = |bytes: usize| {
        let count = bytes / dtype.size();
        [count - 1, count, count + 1]
    };
    let piece = (CHUNK_BYTES / world_size) & !63;
    let borders = [
        16 * 1024,
        16 * 1024 / world_size,
        CHUNK_BYTES,
        2 * CHUNK_BYTES,
        3 * CHUNK_BYTES,
        CHUNKS * CHUNK_BYTES,
        (CHUNKS + 1) * CHUNK_BYTES,
        world_size * CHUNK_BYTES,
        piece,
        3 * piece,
        CHUNKS * piece,
        (CHUNKS + 1) * piece,
    ];
    let mut counts: Vec<usize> = borders.into_iter().flat_map(around).collect();
    counts.extend([4097, 5000, 10_007]);
    counts
}
