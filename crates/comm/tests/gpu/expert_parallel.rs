//! Expert parallelism on GPUs against the host: every rank makes each call on a buffer of GPUs and on one of host memory, with the same random
//! input, and every byte that has a meaning must be the same. Each rank is a thread, because a dispatch waits for its peers.

use unisono::ep::{
    Buffer, CachedDispatch, Combine, Combined, Dispatch, Dispatched, Handle, Input, Layout, RowScales,
    Tensor, Tokens,
};
use unisono::{DType, Operations, Stream};

use crate::expert_cases::{Case, settings};
use crate::expert_tools::{Both, Tools, Uploaded, le, run, same, same_or_none, uploaded};
use crate::numbers::{self, Random};
use crate::scale::scale;
use crate::world::devices;

/// Scales as a call takes them.
fn scaled<'b>(x: Input<'b>, scales: Input<'b>, case: &Case, rank: usize) -> Tokens<'b> {
    match case.scales {
        0 => Tokens::new(x),
        count if case.by_columns => {
            Tokens::scaled(x, RowScales::strided(scales, count, (1, case.tokens[rank].max(1))))
        }
        count => Tokens::scaled(x, RowScales::rows(scales, count)),
    }
}

/// What the host gives for a case, and the same input on the device. Memory is taken and freed where no kernel of any rank waits: that may
/// wait for all of them.
struct Prepared {
    x: Both,
    other: Both,
    scales: Both,
    on_device: (Uploaded<i64>, Uploaded<f32>),
    expected: Expected,
    results: Results,
}

/// What comes.
struct Expected {
    layout: Layout,
    sent: Dispatched,
    again: Tensor,
    came: usize,
    combined: Combined,
}

/// What is combined.
struct Results {
    x: Both,
    bias: Vec<Both>,
    weights: (Vec<f32>, Uploaded<f32>),
}

impl Prepared {
    fn new(host: &mut Buffer, tools: &Tools, case: &Case, (rank, ranks): (usize, usize)) -> Self {
        let (tokens, row) = (case.tokens[rank], case.settings.hidden * case.dtype.size());
        let of_tokens = |key| Both::new(tools, case.dtype, &case.bits(key, rank, tokens * row));
        let (x, other) = (of_tokens(3), of_tokens(6));
        let scales = Both::new(tools, DType::F32, &case.bits(4, rank, tokens * case.scales * 4));
        let selections = case.selections(rank);
        let weights_bytes = case.numbers(5, rank, tokens * case.top_k, DType::F32);
        let weights = floats(&weights_bytes);
        let on_device =
            (uploaded(tools, &le(&selections, i64::to_le_bytes)), uploaded(tools, &weights_bytes));
        let layout = host.layout(&selections, case.top_k).unwrap();
        let mut call =
            Dispatch::new(scaled(x.on_host(), scales.on_host(), case, rank)).expert_alignment(case.alignment);
        if case.with_top_k {
            call = call.top_k(&selections, case.top_k);
        }
        if case.with_weights {
            call = call.weights(&weights);
        }
        if case.with_layout {
            call = call.layout(&layout);
        }
        if let Some(rows) = case.worst {
            call = call.worst_tokens(rows);
        }
        let sent = host.dispatch(&call).unwrap();
        let prefix = sent.handle.rank_prefix();
        let came = prefix.as_slice::<i32>().unwrap()[(ranks - 1) * ranks + rank] as usize;
        let (again, _) = host.dispatch_cached(&CachedDispatch::new(other.on_host(), &sent.handle)).unwrap();
        let results = Results::new(tools, case, sent.handle.rows(), rank);
        let mut call = Combine::new(results.x.on_host(), &sent.handle).per_token(case.per_token);
        if let Some(bias) = results.bias.first() {
            call = call.bias(bias.on_host());
        }
        if let Some(bias) = results.bias.get(1) {
            call = call.second_bias(bias.on_host());
        }
        if case.with_weights {
            call = call.weights(&results.weights.0);
        }
        let combined = host.combine(&call).unwrap();
        let expected = Expected { layout, sent, again, came, combined };
        Self { x, other, scales, on_device, expected, results }
    }
}

impl Results {
    fn new(tools: &Tools, case: &Case, rows: usize, rank: usize) -> Self {
        let (dtype, hidden) = (case.combined_dtype(), case.settings.hidden);
        let of_rows =
            |key, rows: usize| Both::new(tools, dtype, &case.numbers(key, rank, rows * hidden, dtype));
        let bytes = case.numbers(10, rank, rows * case.top_k, DType::F32);
        Self {
            x: of_rows(7, rows * case.per_token),
            bias: (0..case.biases as u64).map(|which| of_rows(8 + which, case.tokens[rank])).collect(),
            weights: (floats(&bytes), uploaded(tools, &bytes)),
        }
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect()
}

fn check_case(gpu: &mut Buffer, tools: &Tools, case: &Case, prepared: &Prepared, rank: usize) {
    let (what, stream) = (case.what(rank), &tools.stream);
    let Prepared { other, on_device: ((_, selections), _), expected, .. } = prepared;
    let named = |name: &str| format!("{what}: {name}");
    let layout = case.with_layout.then(|| {
        let (layout, expected) = (gpu.layout_on(*selections, case.top_k, stream).unwrap(), &expected.layout);
        same(&layout.tokens_per_rank(), &expected.tokens_per_rank(), None, stream, &named("tokens per rank"));
        same(&layout.tokens_per_expert(), &expected.tokens_per_expert(), None, stream, &named("per expert"));
        same(&layout.is_token_in_rank(), &expected.is_token_in_rank(), None, stream, &named("in rank"));
        layout
    });
    // A graph of all three calls, launched twice, or each on its own.
    let is_captured = case.is_captured();
    if is_captured {
        tools.raw.begin_capture().unwrap();
    }
    let got = dispatched(gpu, case, (prepared, layout.as_ref()), (rank, stream));
    if !is_captured {
        check_dispatched(&got, expected, true, stream, &named);
    }
    // Other tokens go the same way.
    let call = CachedDispatch::new(other.on_device(), &got.handle).on(stream);
    let (again, none) = gpu.dispatch_cached(&call).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(none.is_none());
    let in_place = overwrite(tools, case, prepared, &got);
    let results = if in_place { Input::from(&got.x) } else { prepared.results.x.on_device() };
    let combined = combined(gpu, case, (prepared, results, &got.handle), (rank, stream));
    let graph = is_captured.then(|| {
        let graph = tools.raw.end_capture().unwrap();
        for _ in 0..2 {
            graph.launch(&tools.raw).unwrap();
        }
        check_dispatched(&got, expected, !in_place, stream, &named);
        graph
    });
    same(&again, &expected.again, Some(expected.came), stream, &named("cached"));
    same(&combined.x, &expected.combined.x, None, stream, &named(&format!("combined, in place {in_place}")));
    let weights = (combined.topk_weights.as_ref(), expected.combined.topk_weights.as_ref());
    same_or_none(weights.0, weights.1, None, stream, &named("combined weights"));
    gpu.check().unwrap_or_else(|error| panic!("{what}: {error}"));
    drop(graph);
}

fn dispatched(
    gpu: &mut Buffer,
    case: &Case,
    (prepared, layout): (&Prepared, Option<&Layout>),
    (rank, stream): (usize, &Stream),
) -> Dispatched {
    let Prepared { x, scales, on_device: ((_, selections), (_, weights)), .. } = prepared;
    let mut call = Dispatch::new(scaled(x.on_device(), scales.on_device(), case, rank))
        .expert_alignment(case.alignment)
        .multiprocessors(case.multiprocessors)
        .on(stream);
    if case.with_top_k {
        call = call.top_k(*selections, case.top_k);
    }
    if case.with_weights {
        call = call.weights(*weights);
    }
    if let Some(layout) = layout {
        call = call.layout(layout);
    }
    if let Some(rows) = case.worst {
        call = call.worst_tokens(rows);
    }
    gpu.dispatch(&call).unwrap_or_else(|error| panic!("{}: {error}", case.what(rank)))
}

/// Everything that came, or all but the rows.
fn check_dispatched(
    got: &Dispatched,
    expected: &Expected,
    with_rows: bool,
    stream: &Stream,
    named: &dyn Fn(&str) -> String,
) {
    let Expected { sent, came, .. } = expected;
    let handles = (&got.handle, &sent.handle);
    same(&handles.0.rank_prefix(), &handles.1.rank_prefix(), None, stream, &named("prefix"));
    same(&handles.0.source_tokens(), &handles.1.source_tokens(), None, stream, &named("source tokens"));
    same(&handles.0.is_token_in_rank(), &handles.1.is_token_in_rank(), None, stream, &named("is in rank"));
    assert_eq!(
        (handles.0.rows(), handles.0.tokens()),
        (handles.1.rows(), handles.1.tokens()),
        "{}",
        named("sizes")
    );
    if with_rows {
        same(&got.x, &sent.x, Some(*came), stream, &named("x"));
    }
    same_or_none(got.scales.as_ref(), sent.scales.as_ref(), Some(*came), stream, &named("scales"));
    same_or_none(got.topk_idx.as_ref(), sent.topk_idx.as_ref(), None, stream, &named("indices"));
    same_or_none(got.topk_weights.as_ref(), sent.topk_weights.as_ref(), None, stream, &named("weights"));
    assert_eq!(got.tokens_per_expert, sent.tokens_per_expert, "{}", named("tokens per expert"));
}

/// Writes the results over what was dispatched, where that has the same size and the case asks for it: then peers read them in place.
fn overwrite(tools: &Tools, case: &Case, prepared: &Prepared, got: &Dispatched) -> bool {
    let x = &prepared.results.x;
    let in_place = case.in_place && case.per_token == 1 && case.combined_dtype() == case.dtype && x.count > 0;
    if in_place {
        // SAFETY: both are as long, and live until the stream was waited for.
        unsafe { tools.raw.copy(got.x.raw().ptr, x.device.address(), x.count * case.dtype.size()) }.unwrap();
    }
    in_place
}

fn combined(
    gpu: &mut Buffer,
    case: &Case,
    (prepared, x, handle): (&Prepared, Input<'_>, &Handle),
    (rank, stream): (usize, &Stream),
) -> Combined {
    let Results { bias, weights, .. } = &prepared.results;
    let mut call =
        Combine::new(x, handle).per_token(case.per_token).multiprocessors(case.multiprocessors).on(stream);
    if let Some(bias) = bias.first() {
        call = call.bias(bias.on_device());
    }
    if let Some(bias) = bias.get(1) {
        call = call.second_bias(bias.on_device());
    }
    if case.with_weights {
        call = call.weights(weights.1.1);
    }
    gpu.combine(&call).unwrap_or_else(|error| panic!("{}: {error}", case.what(rank)))
}

fn random_cases(ranks: usize, buffers: u64, cases: u64) {
    let seed = numbers::seed();
    println!("{ranks} ranks, seed {seed}");
    run(
        ranks,
        |builder| builder,
        |gpu, host, tools| {
            let rank = gpu.rank();
            for number in 0..buffers * scale() as u64 {
                let settings = settings(&mut Random::of(&[seed, number, 89]), ranks);
                let mut on_gpu = Buffer::new(gpu, settings.clone()).unwrap();
                let mut on_host = Buffer::new(host, settings.clone()).unwrap();
                on_gpu.exchange(gpu).unwrap();
                on_host.exchange(host).unwrap();
                for at in 0..cases {
                    let case = Case::draw((seed, number << 8 | at), &settings, ranks);
                    let prepared = Prepared::new(&mut on_host, tools, &case, (rank, ranks));
                    host.barrier().unwrap();
                    check_case(&mut on_gpu, tools, &case, &prepared, rank);
                    host.barrier().unwrap();
                    drop(prepared);
                    host.barrier().unwrap();
                }
                assert!(on_gpu.masked().is_empty());
                if rank == 0 {
                    println!("{}", on_gpu.explain());
                }
                on_gpu.close(gpu).unwrap();
                on_host.close(host).unwrap();
            }
        },
    );
}

#[test]
fn random_cases_of_one_rank_have_the_bits_of_the_host() {
    random_cases(1, 3, 6);
}

#[test]
fn random_cases_of_two_ranks_have_the_bits_of_the_host() {
    random_cases(2, 6, 6);
}

#[test]
fn random_cases_of_three_ranks_have_the_bits_of_the_host() {
    random_cases(3, 4, 6);
}

/// A device has queues for some streams only, and kernels that share one may wait for each other.
#[test]
fn random_cases_of_many_ranks_have_the_bits_of_the_host() {
    random_cases(if devices().len() < 2 { 5 } else { 8 }, 3, 6);
}
