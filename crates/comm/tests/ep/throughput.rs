//! One rank of a random throughput case: dispatch, the same by its handle, and combine, each compared with the naive reference.

use unisono::ep::{Buffer, CachedDispatch, Combine, Dispatch, Dispatched, RowScales, Tokens};
use unisono::half::{bf16, f16};
use unisono::{Bool8, Communicator, DType, Result, f8e4m3};

use super::case::{Case, Of, narrow, sum, widen};

/// Calls `$call` with `$x`, bytes of some dtype, as a slice of the elements that they are.
macro_rules! typed {
    ($dtype:expr, $bytes:expr, |$x:ident| $call:expr) => {{
        match $dtype {
            DType::BF16 => {
                let $x: Vec<bf16> = $bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b)).collect();
                $call
            }
            DType::F16 => {
                let $x: Vec<f16> = $bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b)).collect();
                $call
            }
            DType::F32 => {
                let $x: Vec<f32> = $bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                $call
            }
            _ => {
                let $x: Vec<f8e4m3> = $bytes.iter().map(|b| f8e4m3(*b)).collect();
                $call
            }
        }
    }};
}
pub(crate) use typed;

/// The bytes of a tensor.
pub(crate) fn bytes(tensor: &unisono::ep::Tensor) -> Vec<u8> {
    match tensor.dtype() {
        DType::BF16 => flat(tensor.as_slice::<bf16>().unwrap(), |x| x.to_le_bytes().to_vec()),
        DType::F16 => flat(tensor.as_slice::<f16>().unwrap(), |x| x.to_le_bytes().to_vec()),
        DType::F32 => flat(tensor.as_slice::<f32>().unwrap(), |x| x.to_le_bytes().to_vec()),
        DType::F8E4M3 => flat(tensor.as_slice::<f8e4m3>().unwrap(), |x| vec![x.0]),
        DType::I32 => flat(tensor.as_slice::<i32>().unwrap(), |x| x.to_le_bytes().to_vec()),
        other => panic!("{other}"),
    }
}

fn flat<T: Copy>(elements: &[T], bytes: impl Fn(T) -> Vec<u8>) -> Vec<u8> {
    elements.iter().flat_map(|element| bytes(*element)).collect()
}

/// Runs the case on `buffer`, and compares.
pub(crate) fn run(buffer: &mut Buffer, communicator: &Communicator, case: &Case) -> Result<()> {
    let (rank, mut random) = (communicator.rank(), case.random(2));
    let selections = case.selections(rank);
    let (with_top_k, with_weights) = (!random.once_in(4), random.once_in(2));
    let with_layout = !with_top_k || random.once_in(3);
    let worst = random.once_in(3).then(|| case.tokens.iter().sum::<usize>() + random.below(5));
    let alignment = random.pick(&[1, 1, 8, 128]);
    let (by_columns, cached) = (random.once_in(2), random.once_in(2));
    let x: Vec<u8> =
        (0..case.tokens[rank]).flat_map(|t| case.row(Of::Token, (rank, t, 0), case.dtype)).collect();
    let scales = scales(case, rank, by_columns);
    let weights = case.weights(rank);
    let layout = with_layout.then(|| buffer.layout(selections, case.top_k)).transpose()?;
    let sent = typed!(case.dtype, x, |x| {
        let scales = &scales;
        let tokens = tokens(case, &x, scales, (rank, by_columns));
        let mut dispatch = Dispatch::new(tokens).expert_alignment(alignment);
        if with_top_k {
            dispatch = dispatch.top_k(selections, case.top_k);
            if with_weights {
                dispatch = dispatch.weights(weights);
            }
        }
        if let Some(layout) = &layout {
            dispatch = dispatch.layout(layout);
        }
        if let Some(rows) = worst {
            dispatch = dispatch.worst_tokens(rows);
        }
        buffer.dispatch(&dispatch)?
    });
    let options = Options { with_top_k, with_weights, worst, alignment };
    check_dispatched(case, rank, &sent, &options);
    if cached {
        // Other tokens: those of the next rank of the drawing.
        let other = case.ranks() + 1;
        let row = |t| case.row(Of::Token, (rank * 1000 + other, t, 0), case.dtype);
        let x: Vec<u8> = (0..case.tokens[rank]).flat_map(row).collect();
        let (again, no_scales) =
            typed!(case.dtype, x, |x| buffer.dispatch_cached(&CachedDispatch::new(&x, &sent.handle))?);
        assert!(no_scales.is_none());
        let expected: Vec<u8> = origins(case, rank)
            .into_iter()
            .flat_map(|(s, t)| case.row(Of::Token, (s * 1000 + other, t, 0), case.dtype))
            .collect();
        assert_eq!(again.shape(), sent.x.shape());
        assert!(bytes(&again)[..expected.len()] == expected, "{case:?}, cached");
    }
    combine(buffer, case, rank, &sent, &mut random)
}

/// What of a dispatch is the case's own.
struct Options {
    with_top_k: bool,
    with_weights: bool,
    worst: Option<usize>,
    alignment: usize,
}

/// The scales of `rank`, row-major or column-major.
fn scales(case: &Case, rank: usize, by_columns: bool) -> Vec<f32> {
    let (tokens, columns) = (case.tokens[rank], case.scales);
    let mut scales = vec![0.0; tokens * columns];
    for token in 0..tokens {
        let row = case.row(Of::Scales, (rank, token, 0), DType::F32);
        for column in 0..columns {
            let at = if by_columns { column * tokens + token } else { token * columns + column };
            scales[at] = widen(DType::F32, &row, column);
        }
    }
    scales
}

fn tokens<'b, T: unisono::Element>(
    case: &Case,
    x: &'b [T],
    scales: &'b Vec<f32>,
    (rank, by_columns): (usize, bool),
) -> Tokens<'b> {
    match case.scales {
        0 => Tokens::new(x),
        columns if by_columns => {
            Tokens::scaled(x, RowScales::strided(scales, columns, (1, case.tokens[rank])))
        }
        columns => Tokens::scaled(x, RowScales::rows(scales, columns)),
    }
}

/// The (source, token) of each row that comes to `rank`.
pub(crate) fn origins(case: &Case, rank: usize) -> Vec<(usize, usize)> {
    let of = |source: usize| {
        let selections = case.selections(source);
        let goes = move |token: &usize| case.goes_to(&selections[token * case.top_k..][..case.top_k], rank);
        (0..case.tokens[source]).filter(goes).map(move |token| (source, token)).collect::<Vec<_>>()
    };
    (0..case.ranks()).flat_map(of).collect()
}

fn check_dispatched(case: &Case, rank: usize, sent: &Dispatched, options: &Options) {
    let rows = origins(case, rank);
    let height = options.worst.unwrap_or(rows.len());
    assert_eq!(sent.x.shape(), [height, case.settings.hidden], "{case:?}");
    let expected: Vec<u8> =
        rows.iter().flat_map(|(s, t)| case.row(Of::Token, (*s, *t, 0), case.dtype)).collect();
    assert!(bytes(&sent.x)[..expected.len()] == expected, "{case:?}: rows of rank {rank}");
    assert_eq!(sent.scales.is_some(), case.scales > 0);
    if let Some(scales) = &sent.scales {
        let expected: Vec<u8> =
            rows.iter().flat_map(|(s, t)| case.row(Of::Scales, (*s, *t, 0), DType::F32)).collect();
        assert_eq!(scales.shape(), [height, case.scales]);
        assert!(bytes(scales)[..expected.len()] == expected, "{case:?}: scales of rank {rank}");
    }
    let (mut indices, mut weights) = (Vec::new(), Vec::new());
    for (source, token) in &rows {
        let (of_source, of_weights) = (case.selections(*source), case.weights(*source));
        for at in token * case.top_k..(token + 1) * case.top_k {
            let expert = of_source[at];
            let is_ours = expert >= 0 && case.owners[expert as usize] == rank;
            indices.push(if is_ours { case.local(expert as usize) as i64 } else { -1 });
            weights.push(if is_ours { of_weights[at] } else { 0.0 });
        }
    }
    indices.resize(height * case.top_k, -1);
    weights.resize(height * case.top_k, 0.0);
    let got = sent.topk_idx.as_ref().map(|tensor| tensor.as_slice::<i64>().unwrap());
    assert_eq!(got, options.with_top_k.then_some(&indices[..]), "{case:?}");
    let got = sent.topk_weights.as_ref().map(|tensor| tensor.as_slice::<f32>().unwrap());
    assert_eq!(got, (options.with_top_k && options.with_weights).then_some(&weights[..]), "{case:?}");
    let selected = |expert: &usize| {
        let all = (0..case.ranks()).flat_map(|source| case.selections(source));
        all.filter(|selection| **selection == *expert as i64).count().next_multiple_of(options.alignment)
    };
    let counts: Vec<usize> = if options.worst.is_some() {
        Vec::new()
    } else {
        case.experts_of(rank).iter().map(selected).collect()
    };
    assert_eq!(sent.tokens_per_expert, counts, "{case:?}");
    check_handle(case, rank, sent, &rows);
}

fn check_handle(case: &Case, rank: usize, sent: &Dispatched, rows: &[(usize, usize)]) {
    let handle = &sent.handle;
    let mut tokens: Vec<i32> = rows.iter().map(|(_, token)| *token as i32).collect();
    tokens.resize(sent.x.shape()[0], -1);
    assert_eq!(handle.source_tokens().as_slice::<i32>().unwrap(), tokens);
    let ranks = case.ranks();
    let mut prefix = vec![0; ranks * ranks];
    for to in 0..ranks {
        let rows = origins(case, to);
        for from in 0..ranks {
            prefix[from * ranks + to] = rows.iter().filter(|(source, _)| *source <= from).count() as i32;
        }
    }
    assert_eq!(handle.rank_prefix().as_slice::<i32>().unwrap(), prefix);
    let selections = case.selections(rank);
    let sent_to = handle.is_token_in_rank();
    for (token, row) in sent_to.as_slice::<Bool8>().unwrap().chunks(ranks).enumerate() {
        for (to, is_sent) in row.iter().enumerate() {
            let expected = case.goes_to(&selections[token * case.top_k..][..case.top_k], to);
            assert_eq!(bool::from(*is_sent), expected);
        }
    }
    assert_eq!((handle.rows(), handle.tokens()), (tokens.len(), case.tokens[rank]));
}

fn combine(
    buffer: &mut Buffer,
    case: &Case,
    rank: usize,
    sent: &Dispatched,
    random: &mut super::support::random::Random,
) -> Result<()> {
    let dtype = if case.dtype == DType::F8E4M3 { case.settings.dtype } else { case.dtype };
    let (per_token, biases) = (random.pick(&[1, 1, 2, 3]), random.below(3usize));
    let with_weights = sent.topk_idx.is_some() && random.once_in(2);
    let result =
        |r: usize, s: usize, t: usize, part: usize| case.row(Of::Result, (r * 100 + s, t, part), dtype);
    let mut x: Vec<u8> = origins(case, rank)
        .into_iter()
        .flat_map(|(s, t)| (0..per_token).flat_map(move |part| result(rank, s, t, part)).collect::<Vec<_>>())
        .collect();
    // What lies behind the rows that came must not matter.
    x.resize(sent.handle.rows() * per_token * case.settings.hidden * dtype.size(), 0x7f);
    let bias: [Vec<u8>; 2] = [0, 1].map(|which| {
        (0..case.tokens[rank]).flat_map(|t| case.row(Of::Bias, (rank, t, which), DType::BF16)).collect()
    });
    let tame = |bytes: &[u8]| -> Vec<u8> {
        (0..bytes.len() / 2).flat_map(|at| narrow(dtype, widen(DType::BF16, bytes, at))).collect()
    };
    let bias = bias.map(|bytes| tame(&bytes));
    // The weights that a rank got return from it, negated by odd ranks.
    let sign = |r: usize| if r % 2 == 1 { -1.0 } else { 1.0 };
    let of_row = |r: usize, s: usize, t: usize| -> Vec<f32> {
        let weights = case.weights(s);
        (0..case.top_k).map(|k| sign(r) * weights[t * case.top_k + k]).collect()
    };
    let mut weights: Vec<f32> =
        origins(case, rank).into_iter().flat_map(|(s, t)| of_row(rank, s, t)).collect();
    weights.resize(sent.handle.rows() * case.top_k, f32::NAN);
    let combined = typed!(dtype, x, |x| typed!(dtype, bias[0], |first| typed!(dtype, bias[1], |second| {
        let mut combine = Combine::new(&x, &sent.handle).per_token(per_token);
        if biases > 0 {
            combine = combine.bias(&first);
        }
        if biases > 1 {
            combine = combine.second_bias(&second);
        }
        if with_weights {
            combine = combine.weights(&weights);
        }
        buffer.combine(&combine)?
    })));
    let (selections, hidden) = (case.selections(rank), case.settings.hidden);
    let (mut expected, mut expected_weights) = (Vec::new(), Vec::new());
    for token in 0..case.tokens[rank] {
        let row = &selections[token * case.top_k..][..case.top_k];
        let ranks: Vec<usize> = (0..case.ranks()).filter(|to| case.goes_to(row, *to)).collect();
        let parts: Vec<Vec<Vec<u8>>> = ranks
            .iter()
            .map(|r| (0..per_token).map(|part| result(*r, rank, token, part)).collect())
            .collect();
        for at in 0..hidden {
            let of_rank = |parts: &Vec<Vec<u8>>| {
                let sum = sum(parts.iter().map(|row| widen(dtype, row, at)));
                if per_token > 1 { widen(dtype, &narrow(dtype, sum), 0) } else { sum }
            };
            let biases = bias.iter().take(biases).map(|bias| widen(dtype, bias, token * hidden + at));
            expected.extend(narrow(dtype, sum(parts.iter().map(of_rank).chain(biases))));
        }
        for k in 0..case.top_k {
            expected_weights.push(sum(ranks.iter().map(|r| of_row(*r, rank, token)[k])));
        }
    }
    assert_eq!(combined.x.shape(), [case.tokens[rank], hidden]);
    let got = bytes(&combined.x);
    let wrong = got.iter().zip(&expected).position(|(got, expected)| got != expected);
    let at = wrong.map(|at| (at, &got[at & !1..][..2], &expected[at & !1..][..2]));
    assert!(
        wrong.is_none(),
        "{case:?}: combined on rank {rank}: {at:?}, {per_token} per token, {biases} biases"
    );
    let got = combined.topk_weights.as_ref().map(|tensor| tensor.as_slice::<f32>().unwrap());
    assert_eq!(got, with_weights.then_some(&expected_weights[..]), "{case:?}");
    Ok(())
}
