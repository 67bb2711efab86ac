//! What a case of a collective on GPUs is given, and what it must give: the same for ranks of one process and for processes.

use unisono::{DType, Kind, ReduceOp};
use unisono_core::device::Form;

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
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) operation: Operation,
    pub(crate) dtype: DType,
    pub(crate) op: ReduceOp,
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
        }
    }

    /// Parts of the input and of the output on a rank. None: it has no such side.
    pub(crate) fn parts(&self, rank: usize, ranks: usize) -> (usize, usize) {
        let at_root = |parts| if rank == self.root { parts } else { 0 };
        match self.operation {
            Operation::AllReduce | Operation::Broadcast => (1, 1),
            Operation::AllGather => (1, ranks),
            Operation::Reduce => (1, at_root(1)),
            Operation::ReduceScatter => (ranks, 1),
            Operation::Gather => (1, at_root(ranks)),
            Operation::Scatter => (at_root(ranks), 1),
            Operation::AllToAll => (ranks, ranks),
        }
    }

    /// Whether one buffer can be both.
    pub(crate) fn can_be_in_place(&self) -> bool {
        !matches!(self.operation, Operation::Gather | Operation::Scatter)
    }
}

/// The scalar of a rank in pre-multiplied sums.
pub(crate) fn scalar(rank: usize) -> f64 {
    0.75 + rank as f64 * 1.5
}

/// Random bits: every pattern of every dtype comes, NaN and subnormals too. As many parts as the rank gives, at least one.
pub(crate) fn input(case: &Case, rank: usize, ranks: usize) -> Vec<u8> {
    let bytes = case.count * case.dtype.size() * case.parts(rank, ranks).0.max(1);
    let mut state = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(rank as u64 + 1) ^ case.count as u64;
    let mut all = Vec::with_capacity(bytes + 8);
    while all.len() < bytes {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        all.extend((mixed ^ mixed >> 31).to_le_bytes());
    }
    all.truncate(bytes);
    all
}

/// What a rank has afterwards, if the call takes the form `taken`. Nothing where it gets nothing.
pub(crate) fn expected(case: &Case, inputs: &[Vec<u8>], taken: Option<Form>, rank: usize) -> Vec<u8> {
    let (ranks, bytes) = (inputs.len(), case.count * case.dtype.size());
    let part = |from: usize, to: usize| &inputs[from][to * bytes..][..bytes];
    let is_root = rank == case.root;
    match case.operation {
        Operation::Broadcast => inputs[case.root].clone(),
        Operation::AllGather => inputs.concat(),
        Operation::AllReduce if ranks > 1 && taken == Some(Form::Ring) => ring(case, inputs),
        Operation::AllReduce => reduce(case, &inputs.iter().map(Vec::as_slice).collect::<Vec<_>>()),
        Operation::Reduce if is_root => {
            let whole: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
            match taken {
                Some(Form::Ring) if ranks > 1 => passed_on(case, &whole, rank),
                _ => reduce(case, &whole),
            }
        }
        Operation::Gather if is_root => inputs.concat(),
        Operation::Reduce | Operation::Gather => Vec::new(),
        Operation::Scatter => part(case.root, rank).to_vec(),
        Operation::AllToAll => (0..ranks).flat_map(|from| part(from, rank).to_vec()).collect(),
        Operation::ReduceScatter => {
            let parts: Vec<&[u8]> = (0..ranks).map(|from| part(from, rank)).collect();
            match taken {
                Some(Form::Ring) if ranks > 1 => passed_on(case, &parts, rank),
                _ => reduce(case, &parts),
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
