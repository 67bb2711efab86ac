//! What a case of a collective on GPUs is given, and what it must give: the same for ranks of one process and for processes.

use unisono::{DType, Kind, ReduceOp};
use unisono_core::device::Form;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Operation {
    AllReduce,
    Broadcast,
    AllGather,
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
        match (self.operation, self.op) {
            (Operation::AllReduce, ReduceOp::PreMulSum(_)) => {
                Kind::AllReduce { op: ReduceOp::PreMulSum(scalar(rank)) }
            }
            (Operation::AllReduce, op) => Kind::AllReduce { op },
            (Operation::Broadcast, _) => Kind::Broadcast { root: self.root as u32 },
            (Operation::AllGather, _) => Kind::AllGather,
        }
    }
}

/// The scalar of a rank in pre-multiplied sums.
fn scalar(rank: usize) -> f64 {
    0.75 + rank as f64 * 1.5
}

/// Random bits: every pattern of every dtype comes, NaN and subnormals too.
pub(crate) fn input(case: &Case, rank: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(rank as u64 + 1) ^ case.count as u64;
    let mut bytes = Vec::with_capacity(case.count * case.dtype.size() + 8);
    while bytes.len() < case.count * case.dtype.size() {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bytes.extend((mixed ^ mixed >> 31).to_le_bytes());
    }
    bytes.truncate(case.count * case.dtype.size());
    bytes
}

/// What every rank has afterwards, if all-reduces take the form `taken`.
pub(crate) fn expected(case: &Case, inputs: &[Vec<u8>], taken: Option<Form>) -> Vec<u8> {
    match case.operation {
        Operation::Broadcast => inputs[case.root].clone(),
        Operation::AllGather => inputs.concat(),
        Operation::AllReduce if inputs.len() > 1 && taken == Some(Form::Ring) => ring(case, inputs),
        Operation::AllReduce => reduce(case, &inputs.iter().map(Vec::as_slice).collect::<Vec<_>>()),
    }
}

fn reduce(case: &Case, inputs: &[&[u8]]) -> Vec<u8> {
    reduce_scaled(case, case.op, inputs, &(0..inputs.len()).map(scalar).collect::<Vec<_>>())
}

fn reduce_scaled(case: &Case, op: ReduceOp, inputs: &[&[u8]], scalars: &[f64]) -> Vec<u8> {
    let mut output = vec![0; inputs[0].len()];
    unisono::reduce_op::reference(case.dtype, op, inputs, scalars, &mut output).unwrap();
    output
}

/// Shard p starts at rank p + 1, and each rank adds its own to what it got, rounded at each hop. Only the last one divides an
/// average.
fn ring(case: &Case, inputs: &[Vec<u8>]) -> Vec<u8> {
    let (ranks, bytes) = (inputs.len(), inputs[0].len());
    let shard = bytes.div_ceil(ranks).next_multiple_of(128);
    let on_the_way = if case.op == ReduceOp::Avg { ReduceOp::Sum } else { case.op };
    let mut output = Vec::with_capacity(bytes);
    for owner in 0..ranks {
        let (begin, end) = ((owner * shard).min(bytes), ((owner + 1) * shard).min(bytes));
        let of = |hop: usize| ((owner + hop) % ranks, &inputs[(owner + hop) % ranks][begin..end]);
        let (first, input) = of(1);
        let mut partial = reduce_scaled(case, on_the_way, &[input], &[scalar(first)]);
        for hop in 2..ranks {
            let (rank, input) = of(hop);
            partial = reduce_scaled(case, on_the_way, &[&partial, input], &[1.0, scalar(rank)]);
        }
        let (last, input) = of(ranks);
        // The reference divides by the number of inputs, so there must be as many as ranks: the others are −0, which changes nothing.
        let nothing = nothing(case.dtype, end - begin);
        let mut all = vec![&nothing[..]; ranks];
        (all[0], all[1]) = (&partial, input);
        let mut scalars = vec![1.0; ranks];
        scalars[1] = scalar(last);
        let used = if case.op == ReduceOp::Avg { ranks } else { 2 };
        output.extend(reduce_scaled(case, case.op, &all[..used], &scalars[..used]));
    }
    output
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
