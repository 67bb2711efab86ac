//! One rank of random low-latency cases: dispatch and combine, whole and in halves, compared with the naive reference.

use unisono::ep::{Buffer, LowLatencyCombine, LowLatencyDispatch, LowLatencyDispatched, ScaleKind, Tensor};
use unisono::half::{bf16, f16};
use unisono::{Communicator, DType, Result, f8e4m3};

use super::case::{Case, Of, narrow, sum, widen};
use super::throughput::{bytes, typed};

/// How rows travel in a case.
pub(crate) fn cast(case: &Case) -> Option<ScaleKind> {
    let kinds = [None, Some(ScaleKind::F32), Some(ScaleKind::PowerOfTwo), Some(ScaleKind::Ue8m0)];
    let kind = case.random(3).pick(&kinds);
    if case.settings.hidden.is_multiple_of(512) {
        kind
    } else {
        kind.filter(|kind| *kind != ScaleKind::Ue8m0)
    }
}

pub(crate) fn is_quantised(case: &Case) -> bool {
    case.random(4).once_in(4)
}

/// Runs two cases on `buffer`, one behind the other or with their halves overlapping, and compares.
pub(crate) fn run(buffer: &mut Buffer, communicator: &Communicator, cases: [&Case; 2]) -> Result<()> {
    let rank = communicator.rank();
    if cases[0].random(5).once_in(2) {
        for case in cases {
            let dispatched = {
                let sent = dispatch(buffer, case, rank)?;
                buffer.receive_dispatch(sent)?
            };
            check_dispatched(case, rank, &Seen::of(&dispatched), true);
            let sent = combine(buffer, case, rank, &dispatched)?;
            check_combined(case, rank, &buffer.receive_combine(sent)?.x);
        }
        return Ok(());
    }
    // Two batches: while one is on its way, the other is computed.
    let [a, b] = cases;
    let (sent_a, sent_b) = (dispatch(buffer, a, rank)?, dispatch(buffer, b, rank)?);
    let of_a = buffer.receive_dispatch(sent_a)?;
    check_dispatched(a, rank, &Seen::of(&of_a), true);
    let sent_a = combine(buffer, a, rank, &of_a)?;
    let of_b = buffer.receive_dispatch(sent_b)?;
    check_dispatched(b, rank, &Seen::of(&of_b), true);
    let sent_b = combine(buffer, b, rank, &of_b)?;
    check_combined(a, rank, &buffer.receive_combine(sent_a)?.x);
    check_combined(b, rank, &buffer.receive_combine(sent_b)?.x);
    Ok(())
}

/// What a dispatch gave, on the host.
pub(crate) struct Seen {
    pub(crate) x: Tensor,
    pub(crate) scales: Option<Tensor>,
    pub(crate) counts: Tensor,
    pub(crate) source_tokens: Tensor,
    pub(crate) ranges: Tensor,
    pub(crate) waited: Tensor,
}

impl Seen {
    fn of(dispatched: &LowLatencyDispatched) -> Self {
        let LowLatencyDispatched { x, scales, counts, waited, handle } = dispatched.clone();
        let (source_tokens, ranges) = (handle.source_tokens(), handle.layout_range());
        Self { x, scales, counts, source_tokens, ranges, waited }
    }
}

/// The tokens of `rank`.
pub(crate) fn tokens(case: &Case, rank: usize) -> Vec<u8> {
    (0..case.tokens[rank]).flat_map(|t| case.row(Of::Token, (rank, t, 0), case.dtype)).collect()
}

fn dispatch(buffer: &mut Buffer, case: &Case, rank: usize) -> Result<unisono::ep::SentDispatch> {
    let x = tokens(case, rank);
    let selections = case.selections(rank);
    typed!(case.dtype, x, |x| {
        let mut call = LowLatencyDispatch::new(&x, selections, case.top_k);
        if let Some(kind) = cast(case) {
            call = call.cast(kind);
        }
        buffer.low_latency_dispatch_send(&call)
    })
}

/// The (source, token) of each row of `expert`.
fn origins(case: &Case, expert: usize) -> Vec<(usize, usize)> {
    let mut rows = Vec::new();
    for source in 0..case.ranks() {
        for (token, row) in case.selections(source).chunks(case.top_k).enumerate() {
            if row.contains(&(expert as i64)) {
                rows.push((source, token));
            }
        }
    }
    rows
}

/// A block of 128 elements or less, cast one element at a time.
fn cast_naively(values: &[f32], kind: ScaleKind) -> (Vec<u8>, f32) {
    let amax = values.iter().filter(|x| x.is_finite()).fold(1e-4f32, |most, x| most.max(x.abs()));
    let (scale, inverse) = if kind == ScaleKind::F32 {
        (amax / 448.0, 448.0 / amax)
    } else {
        let mut scale = 1f32;
        while scale < amax / 448.0 {
            scale *= 2.0;
        }
        while scale / 2.0 >= amax / 448.0 {
            scale /= 2.0;
        }
        (scale, 1.0 / scale)
    };
    let code = |x: &f32| f8e4m3::from_f32(if x.is_finite() { x * inverse } else { f32::NAN }).0;
    (values.iter().map(code).collect(), scale)
}

/// Compares all of a dispatch; what lies behind the rows that came only if that `is_zeroed`.
pub(crate) fn check_dispatched(case: &Case, rank: usize, got: &Seen, is_zeroed: bool) {
    let (ranks, hidden) = (case.ranks(), case.settings.hidden);
    let (experts, block) = (case.experts_of(rank), ranks * case.settings.capacity);
    assert_eq!(got.x.shape(), [experts.len(), block, hidden], "{case:?}");
    let kind = cast(case);
    assert_eq!(got.x.dtype(), if kind.is_some() { DType::F8E4M3 } else { case.dtype });
    let (x, row_bytes) = (bytes(&got.x), hidden * got.x.dtype().size());
    let (source_tokens, ranges) = (&got.source_tokens, &got.ranges);
    for (local, expert) in experts.iter().enumerate() {
        let rows = origins(case, *expert);
        assert_eq!(got.counts.as_slice::<i32>().unwrap()[local] as usize, rows.len(), "{case:?}");
        for (source, range) in ranges.as_slice::<i64>().unwrap()[local * ranks..][..ranks].iter().enumerate()
        {
            let first = rows.iter().filter(|(of, _)| *of < source).count() as i64;
            let count = rows.iter().filter(|(of, _)| *of == source).count() as i64;
            assert_eq!(*range, first << 32 | count);
        }
        for (at, (source, token)) in rows.iter().enumerate() {
            let sent = case.row(Of::Token, (*source, *token, 0), case.dtype);
            let got_row = &x[(local * block + at) * row_bytes..][..row_bytes];
            assert_eq!(source_tokens.as_slice::<i32>().unwrap()[local * block + at], *token as i32);
            let Some(kind) = kind else {
                assert!(got_row == sent, "{case:?}: row {at} of expert {expert}");
                continue;
            };
            let values: Vec<f32> = (0..hidden).map(|at| widen(case.dtype, &sent, at)).collect();
            for (column, values) in values.chunks(128).enumerate() {
                let (codes, scale) = cast_naively(values, kind);
                assert!(
                    got_row[column * 128..][..codes.len()] == codes,
                    "{case:?}: {kind:?}, block {column}"
                );
                check_scale(got, kind, (local, column, at, block), scale);
            }
        }
        let behind = &x[(local * block + rows.len()) * row_bytes..(local + 1) * block * row_bytes];
        assert!(!is_zeroed || behind.iter().all(|x| *x == 0));
    }
    assert_eq!(got.waited.shape(), [ranks]);
}

fn check_scale(
    got: &Seen,
    kind: ScaleKind,
    (expert, column, row, block): (usize, usize, usize, usize),
    scale: f32,
) {
    let scales = got.scales.as_ref().unwrap();
    if kind == ScaleKind::Ue8m0 {
        let word = scales.as_slice::<i32>().unwrap()[(expert * scales.shape()[1] + column / 4) * block + row];
        assert_eq!(f32::from_bits(u32::from(word.to_le_bytes()[column % 4]) << 23), scale);
    } else {
        assert_eq!(
            scales.as_slice::<f32>().unwrap()[(expert * scales.shape()[1] + column) * block + row],
            scale
        );
    }
}

/// What expert `expert` made of a token.
fn result(case: &Case, expert: usize, (source, token): (usize, usize)) -> Vec<u8> {
    case.row(Of::Result, (expert * 100 + source, token, 0), case.dtype)
}

/// What the experts of `rank` made of all rows that came, in their places.
pub(crate) fn results(case: &Case, rank: usize) -> Vec<u8> {
    let (experts, block) = (case.experts_of(rank), case.ranks() * case.settings.capacity);
    let row_bytes = case.settings.hidden * case.dtype.size();
    // What lies behind the rows that came must not matter.
    let mut x = vec![0x7f; experts.len() * block * row_bytes];
    for (local, expert) in experts.iter().enumerate() {
        for (at, origin) in origins(case, *expert).into_iter().enumerate() {
            x[(local * block + at) * row_bytes..][..row_bytes]
                .copy_from_slice(&result(case, *expert, origin));
        }
    }
    x
}

fn combine(
    buffer: &mut Buffer,
    case: &Case,
    rank: usize,
    dispatched: &LowLatencyDispatched,
) -> Result<unisono::ep::SentCombine> {
    let (selections, weights) = (case.selections(rank), case.weights(rank));
    let x = results(case, rank);
    let in_buffer = case.random(6).once_in(2);
    typed!(case.dtype, x, |x| {
        let handle = &dispatched.handle;
        let mut call = if in_buffer {
            buffer.combine_buffer(case.dtype)?.as_mut_slice()?.copy_from_slice(&x);
            LowLatencyCombine::of_buffer(selections, weights, handle)
        } else {
            LowLatencyCombine::new(&x, selections, weights, handle)
        };
        if is_quantised(case) {
            call = call.quantised();
        }
        buffer.low_latency_combine_send(&call)
    })
}

/// Compares the sums of a combine.
pub(crate) fn check_combined(case: &Case, rank: usize, got: &Tensor) {
    let (selections, weights, hidden) = (case.selections(rank), case.weights(rank), case.settings.hidden);
    let mut expected = Vec::new();
    for (token, row) in selections.chunks(case.top_k).enumerate() {
        let of_rank = |owner: usize| -> Option<Vec<f32>> {
            let terms: Vec<(f32, Vec<u8>)> = row
                .iter()
                .enumerate()
                .filter(|(_, expert)| **expert >= 0 && case.owners[**expert as usize] == owner)
                .map(|(k, expert)| {
                    (weights[token * case.top_k + k], result(case, *expert as usize, (rank, token)))
                })
                .collect();
            let element = |at| sum(terms.iter().map(|(weight, row)| weight * widen(case.dtype, row, at)));
            let sums: Vec<f32> = (0..hidden).map(element).collect();
            (!terms.is_empty()).then(|| travel(case, &sums))
        };
        let parts: Vec<Vec<f32>> = (0..case.ranks()).filter_map(of_rank).collect();
        for at in 0..hidden {
            expected.extend(narrow(case.dtype, sum(parts.iter().map(|part| part[at]))));
        }
    }
    assert_eq!(got.shape(), [case.tokens[rank], hidden]);
    assert!(bytes(got) == expected, "{case:?}: combined on rank {rank}");
}

/// What of the sums of one rank arrives.
fn travel(case: &Case, sums: &[f32]) -> Vec<f32> {
    if !is_quantised(case) {
        return sums.iter().map(|sum| widen(case.dtype, &narrow(case.dtype, *sum), 0)).collect();
    }
    let block = |values: &[f32]| {
        let (codes, scale) = cast_naively(values, ScaleKind::F32);
        codes.into_iter().map(|code| f8e4m3(code).to_f32() * scale).collect::<Vec<_>>()
    };
    sums.chunks(128).flat_map(block).collect()
}
