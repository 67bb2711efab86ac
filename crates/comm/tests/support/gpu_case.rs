//! What a case of a collective on GPUs is given, and what it must give: the same for ranks of one process and for processes.

use unisono::{Counts, DType, Kind, RawBuffer, ReduceOp};
use unisono_core::device::Form;

use super::Random;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Operation {
    AllReduce,
    Broadcast,
    AllGather,
    Reduce,
    ReduceScatter,
    Gather,
    Scatter,
    AllToAll,
    AllGatherV,
    ReduceScatterV,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) operation: Operation,
    pub(crate) dtype: DType,
    pub(crate) op: ReduceOp,
    /// Elements of a part; of the largest, where they differ.
    pub(crate) count: usize,
    pub(crate) root: usize,
    pub(crate) is_in_place: bool,
    /// Bytes by which buffers miss a line.
    pub(crate) offset: usize,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            operation: Operation::AllReduce,
            dtype: DType::F32,
            op: ReduceOp::Sum,
            count: 1,
            root: 0,
            is_in_place: false,
            offset: 0,
        }
    }
}

impl Case {
    /// The call of a rank.
    pub(crate) fn kind(&self, rank: usize) -> Kind {
        let root = self.root as u32;
        let op = match self.op {
            ReduceOp::PreMulSum(_) => ReduceOp::PreMulSum(scalar(rank)),
            op => op,
        };
        match self.operation {
            Operation::AllReduce => Kind::AllReduce { op },
            Operation::Broadcast => Kind::Broadcast { root },
            Operation::AllGather => Kind::AllGather,
            Operation::Reduce => Kind::Reduce { op, root },
            Operation::ReduceScatter => Kind::ReduceScatter { op },
            Operation::Gather => Kind::Gather { root },
            Operation::Scatter => Kind::Scatter { root },
            Operation::AllToAll => Kind::AllToAll,
            Operation::AllGatherV => Kind::AllGatherV,
            Operation::ReduceScatterV => Kind::ReduceScatterV { op },
        }
    }

    fn is_uneven(&self) -> bool {
        matches!(self.operation, Operation::AllGatherV | Operation::ReduceScatterV)
    }

    /// Elements of the part of each rank. Where they differ, one of four has nothing.
    pub(crate) fn counts(&self, ranks: usize) -> Vec<usize> {
        let size = |rank: usize| match (self.is_uneven(), (rank + self.count) % 4) {
            (false, _) | (true, 0) => self.count,
            (true, 1) => 0,
            (true, 2) => self.count / 3,
            (true, _) => self.count.saturating_sub(1),
        };
        (0..ranks).map(size).collect()
    }

    /// Bytes of the largest part.
    pub(crate) fn most_bytes(&self, ranks: usize) -> usize {
        self.counts(ranks).into_iter().max().unwrap_or(0) * self.dtype.size()
    }

    /// Where buffers and parts lie on a rank.
    pub(crate) fn shape(&self, rank: usize, ranks: usize) -> Shape {
        let counts = self.counts(ranks);
        let mut starts: Vec<usize> = (0..ranks).map(|part| part * self.count).collect();
        let mut all = ranks * self.count;
        if self.is_uneven() {
            // With gaps; and where every rank is asked for its own order, some have another.
            let is_reversed = self.operation == Operation::AllGatherV && rank % 2 == 1;
            all = 0;
            for at in 0..ranks {
                let part = if is_reversed { ranks - 1 - at } else { at };
                starts[part] = all + part % 3;
                all = starts[part] + counts[part];
            }
        }
        let (own, count) = (counts[rank], self.count);
        let at_root = |elements| if rank == self.root { elements } else { 0 };
        let (inputs, outputs) = match self.operation {
            Operation::AllReduce | Operation::Broadcast => (count, count),
            Operation::AllGather | Operation::AllGatherV => (own, all),
            Operation::Reduce => (count, at_root(count)),
            Operation::ReduceScatter | Operation::ReduceScatterV => (all, own),
            Operation::Gather => (count, at_root(all)),
            Operation::Scatter => (at_root(all), count),
            Operation::AllToAll => (all, all),
        };
        let is_parted = matches!(self.operation, Operation::Gather | Operation::Scatter);
        let is_in_place = self.is_in_place && (!is_parted || rank == self.root);
        let (mut input_at, mut output_at) = (0, 0);
        match self.operation {
            Operation::AllGather | Operation::AllGatherV | Operation::Gather => input_at = starts[rank],
            Operation::ReduceScatter | Operation::ReduceScatterV | Operation::Scatter => {
                output_at = starts[rank];
            }
            _ => {}
        }
        if !is_in_place {
            (input_at, output_at) = (0, 0);
        }
        let is_one_buffer = is_in_place && !is_parted && !self.is_uneven();
        let is_uneven = self.is_uneven();
        Shape { inputs, outputs, is_in_place, input_at, output_at, counts, starts, is_one_buffer, is_uneven }
    }
}

/// Where buffers and parts of a case lie on a rank, in elements. In place, both sides lie in the memory of the output.
#[derive(Debug)]
pub(crate) struct Shape {
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) is_in_place: bool,
    pub(crate) input_at: usize,
    pub(crate) output_at: usize,
    pub(crate) counts: Vec<usize>,
    pub(crate) starts: Vec<usize>,
    is_one_buffer: bool,
    is_uneven: bool,
}

impl Shape {
    /// Elements that the memory of the output must hold.
    pub(crate) fn room(&self) -> usize {
        let inputs = if self.is_in_place { self.input_at + self.inputs } else { 0 };
        inputs.max(self.output_at + self.outputs)
    }

    /// The buffers of the call: `input` and `output` are the memory of each.
    pub(crate) fn buffers(&self, input: RawBuffer, output: RawBuffer) -> Vec<RawBuffer> {
        let size = output.dtype.size();
        let cut = |memory: RawBuffer, at: usize, count| RawBuffer {
            ptr: memory.ptr + (at * size) as u64,
            count,
            ..memory
        };
        match (self.is_one_buffer, self.is_in_place) {
            (true, _) => vec![cut(output, 0, self.room())],
            (false, is_in_place) => {
                let input = if is_in_place { output } else { input };
                vec![cut(input, self.input_at, self.inputs), cut(output, self.output_at, self.outputs)]
            }
        }
    }

    /// The sizes and places of parts, of calls that are told them.
    pub(crate) fn views(&self) -> Vec<Counts<'_>> {
        let view = Counts { counts: &self.counts, offsets: Some(&self.starts) };
        if self.is_uneven { vec![view] } else { Vec::new() }
    }
}

/// The scalar of a rank in pre-multiplied sums.
pub(crate) fn scalar(rank: usize) -> f64 {
    0.75 + rank as f64 * 1.5
}

/// Random bits: every pattern of every dtype comes, NaN and subnormals too. As much as the rank gives, at least one part.
pub(crate) fn input(case: &Case, rank: usize, ranks: usize) -> Vec<u8> {
    let bytes = case.dtype.size() * case.shape(rank, ranks).inputs.max(case.counts(ranks)[rank]);
    let mut random = Random::new(0x9e37_79b9_7f4a_7c15u64.wrapping_mul(rank as u64 + 1) ^ case.count as u64);
    let words = (0..bytes.div_ceil(8)).flat_map(|_| random.next().to_le_bytes());
    words.take(bytes).collect()
}

/// What a rank has afterwards, if the call takes the form `taken`: pieces, with the element of the output that each begins at.
/// Nothing where it gets nothing.
pub(crate) fn expected(
    case: &Case,
    inputs: &[Vec<u8>],
    taken: Option<Form>,
    rank: usize,
) -> Vec<(usize, Vec<u8>)> {
    let (ranks, size) = (inputs.len(), case.dtype.size());
    let shape = case.shape(rank, ranks);
    let part = |from: usize, to: usize| {
        let start = case.shape(from, ranks).starts[to];
        &inputs[from][start * size..][..shape.counts[to] * size]
    };
    let all = || inputs.iter().map(Vec::as_slice).collect::<Vec<_>>();
    let is_root = rank == case.root;
    match case.operation {
        Operation::Broadcast => vec![(0, inputs[case.root].clone())],
        Operation::AllReduce if ranks > 1 && taken == Some(Form::Ring) => vec![(0, ring(case, inputs))],
        Operation::AllReduce => vec![(0, reduce(case, &all()))],
        Operation::Reduce if is_root && ranks > 1 && taken == Some(Form::Ring) => {
            vec![(0, passed_on(case, &all(), rank))]
        }
        Operation::Reduce if is_root => vec![(0, reduce(case, &all()))],
        Operation::Gather if !is_root => Vec::new(),
        Operation::Reduce => Vec::new(),
        Operation::AllGather | Operation::AllGatherV | Operation::Gather => {
            shape.starts.into_iter().zip(inputs.iter().cloned()).collect()
        }
        Operation::Scatter => vec![(0, part(case.root, rank).to_vec())],
        Operation::AllToAll => {
            (0..ranks).map(|from| (shape.starts[from], part(from, rank).to_vec())).collect()
        }
        Operation::ReduceScatter | Operation::ReduceScatterV => {
            let parts: Vec<&[u8]> = (0..ranks).map(|from| part(from, rank)).collect();
            match taken {
                Some(Form::Ring) if ranks > 1 => vec![(0, passed_on(case, &parts, rank))],
                _ => vec![(0, reduce(case, &parts))],
            }
        }
    }
}

/// What began at the rank behind `owner` and went round to it, each rank adding its own, rounded at each hop. Only the last one
/// divides an average.
fn passed_on(case: &Case, inputs: &[&[u8]], owner: usize) -> Vec<u8> {
    let ranks = inputs.len();
    let on_the_way = if case.op == ReduceOp::Avg { ReduceOp::Sum } else { case.op };
    let first = (owner + 1) % ranks;
    let first = reduce_scaled(case, on_the_way, &[inputs[first]], &[scalar(first)]);
    let partial = (2..ranks).fold(first, |partial, hop| {
        let rank = (owner + hop) % ranks;
        reduce_scaled(case, on_the_way, &[&partial, inputs[rank]], &[1.0, scalar(rank)])
    });
    // The reference divides by the number of inputs, so there must be as many as ranks: the others are −0, which changes nothing.
    let nothing = nothing(case.dtype, partial.len());
    let mut all = vec![&nothing[..]; ranks];
    (all[0], all[1]) = (&partial, inputs[owner]);
    let mut scalars = vec![1.0; ranks];
    scalars[1] = scalar(owner);
    let used = if case.op == ReduceOp::Avg { ranks } else { 2 };
    reduce_scaled(case, case.op, &all[..used], &scalars[..used])
}

fn reduce(case: &Case, inputs: &[&[u8]]) -> Vec<u8> {
    reduce_scaled(case, case.op, inputs, &(0..inputs.len()).map(scalar).collect::<Vec<_>>())
}

fn reduce_scaled(case: &Case, op: ReduceOp, inputs: &[&[u8]], scalars: &[f64]) -> Vec<u8> {
    let mut output = vec![0; inputs[0].len()];
    unisono::reduce_op::reference(case.dtype, op, inputs, scalars, &mut output).unwrap();
    output
}

/// Each shard goes round to its owner.
fn ring(case: &Case, inputs: &[Vec<u8>]) -> Vec<u8> {
    let (ranks, bytes) = (inputs.len(), inputs[0].len());
    let shard = bytes.div_ceil(ranks).next_multiple_of(128);
    let of_owner = |owner: usize| {
        let (begin, end) = ((owner * shard).min(bytes), ((owner + 1) * shard).min(bytes));
        let shards: Vec<&[u8]> = inputs.iter().map(|input| &input[begin..end]).collect();
        passed_on(case, &shards, owner)
    };
    (0..ranks).flat_map(of_owner).collect()
}

/// Zeros to which anything may be added without a change of its bits: −0 of a floating-point type.
fn nothing(dtype: DType, bytes: usize) -> Vec<u8> {
    let part = match dtype {
        DType::Complex64 => 4,
        DType::Complex128 => 8,
        _ => dtype.size(),
    };
    let last = if dtype.is_float() || dtype.is_complex() { 0x80 } else { 0 };
    (0..bytes).map(|at| if at % part == part - 1 { last } else { 0 }).collect()
}
