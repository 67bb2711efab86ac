//! Expert parallelism on GPUs against the host: every rank makes each call on a buffer of GPUs and on one of host memory, with the same random
//! input, and every byte that has a meaning must be the same. Each rank is a thread, because a dispatch waits for its peers.

use unisono::cuda::{Device, DeviceBuffer, Stream as CudaStream};
use unisono::ep::{
    Buffer, CachedDispatch, Combine, Combined, Dispatch, Dispatched, Input, Layout, RowScales, Settings,
    Tensor, Tokens,
};
use unisono::half::{bf16, f16};
use unisono::{Buf, Builder, Communicator, DType, Error, Operations, Stream, f8e4m3};

use crate::numbers::{self, Random};
use crate::world::{PATIENCE, devices, on_threads};

/// Elements of a rank's tokens in most cases.
const MOST_ELEMENTS: usize = 400_000;

/// What a rank works with: a communicator of the host's, its device and stream.
struct Tools {
    host: Option<Communicator>,
    device: Device,
    stream: Stream,
    raw: CudaStream,
}

impl Tools {
    fn new(host: Communicator, ordinal: u32) -> Self {
        let device = Device::new(ordinal).unwrap();
        let raw = CudaStream::new(&device).unwrap();
        Self { host: Some(host), device, stream: Stream::from(raw.clone()), raw }
    }
}

fn run(
    ranks: usize,
    configure: impl Fn(Builder) -> Builder,
    work: impl Fn(&Communicator, &Communicator, &Tools) + Sync,
) {
    if devices().is_empty() {
        return;
    }
    let hosts = std::cell::RefCell::new(Communicator::threads(ranks).unwrap());
    let tools = |_: usize, ordinal: u32| Tools::new(hosts.borrow_mut().remove(0), ordinal);
    on_threads(
        ranks,
        |builder| configure(builder.timeout(PATIENCE)),
        tools,
        |gpu, tools| {
            let host = tools.host.take().unwrap();
            work(&gpu, &host, tools);
            gpu.destroy().unwrap();
            host.destroy().unwrap();
        },
    );
}

/// Elements on the host, and the same on the device.
struct Both {
    host: Elements,
    device: DeviceBuffer,
    count: usize,
    dtype: DType,
}

enum Elements {
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    F32(Vec<f32>),
    F8(Vec<f8e4m3>),
}

impl Both {
    fn new(tools: &Tools, dtype: DType, bytes: &[u8]) -> Self {
        let host = match dtype {
            DType::BF16 => {
                Elements::Bf16(bytes.as_chunks().0.iter().map(|x| bf16::from_le_bytes(*x)).collect())
            }
            DType::F16 => Elements::F16(bytes.as_chunks().0.iter().map(|x| f16::from_le_bytes(*x)).collect()),
            DType::F32 => Elements::F32(bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect()),
            _ => Elements::F8(bytes.iter().map(|x| f8e4m3(*x)).collect()),
        };
        Self { host, device: upload(tools, bytes), count: bytes.len() / dtype.size(), dtype }
    }

    fn on_host(&self) -> Input<'_> {
        match &self.host {
            Elements::Bf16(x) => x.into(),
            Elements::F16(x) => x.into(),
            Elements::F32(x) => x.into(),
            Elements::F8(x) => x.into(),
        }
    }

    fn on_device(&self) -> Input<'static> {
        let (at, ordinal) = (self.device.address(), self.device.device().ordinal());
        // SAFETY: tests wait for their streams before they let go of a buffer.
        unsafe {
            match self.dtype {
                DType::BF16 => Buf::<bf16>::cuda(at, self.count, ordinal).into(),
                DType::F16 => Buf::<f16>::cuda(at, self.count, ordinal).into(),
                DType::F32 => Buf::<f32>::cuda(at, self.count, ordinal).into(),
                _ => Buf::<f8e4m3>::cuda(at, self.count, ordinal).into(),
            }
        }
    }
}

fn upload(tools: &Tools, bytes: &[u8]) -> DeviceBuffer {
    let mut buffer = DeviceBuffer::new(&tools.device, bytes.len()).unwrap();
    buffer.write(0, bytes).unwrap();
    buffer
}

/// i64 or f32 on the device.
fn uploaded<T: unisono::Element>(tools: &Tools, bytes: &[u8]) -> Uploaded<T> {
    let buffer = upload(tools, bytes);
    // SAFETY: as above.
    let buf = unsafe { Buf::cuda(buffer.address(), bytes.len() / size_of::<T>(), tools.device.ordinal()) };
    (buffer, buf)
}

/// The bytes of a tensor, wherever it lies.
fn bytes(tensor: &Tensor, stream: &Stream) -> Vec<u8> {
    let tensor = tensor.to_host(stream).unwrap();
    fn flat<T: unisono::Element, const N: usize>(tensor: &Tensor, bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
        tensor.as_slice::<T>().unwrap().iter().flat_map(|x| bytes(*x)).collect()
    }
    match tensor.dtype() {
        DType::BF16 => flat(&tensor, bf16::to_le_bytes),
        DType::F16 => flat(&tensor, f16::to_le_bytes),
        DType::F32 => flat(&tensor, f32::to_le_bytes),
        DType::I32 => flat(&tensor, i32::to_le_bytes),
        DType::I64 => flat(&tensor, i64::to_le_bytes),
        DType::Bool => flat(&tensor, |x: unisono::Bool8| [u8::from(bool::from(x))]),
        _ => flat(&tensor, |x: f8e4m3| [x.0]),
    }
}

/// Both have the same bytes, of the first `rows` rows where only those have a meaning.
fn same(device: &Tensor, host: &Tensor, rows: Option<usize>, stream: &Stream, what: &str) {
    assert_eq!((device.shape(), device.dtype()), (host.shape(), host.dtype()), "{what}");
    let (mut got, mut expected) = (bytes(device, stream), bytes(host, stream));
    if let Some(rows) = rows {
        let row = host.shape()[1..].iter().product::<usize>() * host.dtype().size();
        got.truncate(rows * row);
        expected.truncate(rows * row);
    }
    let wrong = got.iter().zip(&expected).position(|(got, expected)| got != expected);
    let at = wrong.map(|at| (at, got[at], expected[at]));
    assert_eq!(at, None, "{what}: byte of {}, got, expected", got.len());
}

fn same_or_none(
    device: Option<&Tensor>,
    host: Option<&Tensor>,
    rows: Option<usize>,
    stream: &Stream,
    what: &str,
) {
    assert_eq!(device.is_some(), host.is_some(), "{what}");
    if let (Some(device), Some(host)) = (device, host) {
        same(device, host, rows, stream, what);
    }
}

/// What all ranks draw alike.
struct Case {
    seed: u64,
    number: u64,
    settings: Settings,
    top_k: usize,
    dtype: DType,
    scales: usize,
    tokens: Vec<usize>,
    with_top_k: bool,
    with_layout: bool,
    with_weights: bool,
    by_columns: bool,
    worst: Option<usize>,
    alignment: usize,
    per_token: usize,
    biases: usize,
    in_place: bool,
    multiprocessors: u32,
}

fn settings(random: &mut Random, ranks: usize) -> Settings {
    let widest = random.pick(&[16, 128, 1024]);
    let hidden = match random.below(3) {
        0 => 128 * random.count(64),
        _ => 8 * random.count(widest),
    };
    let per_rank = random.count(40);
    let is_even = random.once_in(2);
    let experts = if is_even { per_rank * ranks } else { random.count(per_rank * ranks) };
    let placement = (!is_even).then(|| (0..experts).map(|_| random.below(ranks)).collect());
    Settings {
        placement,
        top_k: if random.once_in(2) { 32 } else { random.count(32) },
        dtype: random.pick(&[DType::BF16, DType::F16, DType::F32]),
        pool_bytes: random.pick(&[None, Some(96 << 20)]),
        masking: random.once_in(3),
        deadline: std::time::Duration::from_secs(60),
        ..Settings::new(hidden, experts)
    }
}

impl Case {
    fn draw((seed, number): (u64, u64), settings: &Settings, ranks: usize) -> Self {
        let mut random = Random::of(&[seed, number, 90]);
        let all = [DType::BF16, DType::F16, DType::F32, DType::F8E4M3];
        let fits: Vec<DType> =
            all.into_iter().filter(|dtype| dtype.size() <= settings.dtype.size()).collect();
        let elements = if random.once_in(12) { 16 * MOST_ELEMENTS } else { MOST_ELEMENTS };
        let most = (elements / settings.hidden / ranks).clamp(3, 8192);
        let tokens: Vec<usize> =
            (0..ranks).map(|_| if random.once_in(5) { 0 } else { random.count(most) }).collect();
        let with_top_k = !random.once_in(4);
        let worst = random.once_in(3).then(|| tokens.iter().sum::<usize>() + random.below(5));
        Self {
            seed,
            number,
            top_k: random.count(settings.top_k),
            dtype: random.pick(&fits),
            scales: if random.once_in(2) { random.count(settings.hidden / 8) } else { 0 },
            with_top_k,
            with_layout: !with_top_k || random.once_in(3),
            with_weights: with_top_k && random.once_in(2),
            by_columns: random.once_in(2),
            worst,
            alignment: random.pick(&[1, 8, 128]),
            per_token: random.pick(&[1, 1, 1, 2, 5]),
            biases: random.below(3),
            in_place: random.once_in(2),
            multiprocessors: random.pick(&[2, 3, 12, 24]),
            tokens,
            settings: settings.clone(),
        }
    }

    fn random(&self, key: u64, rank: usize) -> Random {
        Random::of(&[self.seed, self.number, key, rank as u64])
    }

    fn selections(&self, rank: usize) -> Vec<i64> {
        let (mut random, experts) = (self.random(1, rank), self.settings.experts);
        let manner = self.random(2, 0).below(4);
        let mut all = Vec::new();
        for _ in 0..self.tokens[rank] {
            let is_empty = random.once_in(6);
            for _ in 0..self.top_k {
                let expert = match manner {
                    0 => 0,
                    1 => random.below(experts) * random.below(experts) / experts,
                    _ => random.below(experts),
                };
                all.push(if is_empty || random.once_in(9) { -1 } else { expert as i64 });
            }
        }
        all
    }

    /// Any bits.
    fn bits(&self, key: u64, rank: usize, bytes: usize) -> Vec<u8> {
        let mut random = self.random(key, rank);
        (0..bytes.div_ceil(8)).flat_map(|_| random.next().to_le_bytes()).take(bytes).collect()
    }

    /// Numbers of `dtype` that can be added, seldom one that is not finite.
    fn numbers(&self, key: u64, rank: usize, count: usize, dtype: DType) -> Vec<u8> {
        let mut random = self.random(key, rank);
        let mut bytes = Vec::with_capacity(count * dtype.size());
        for _ in 0..count {
            let bits = random.next();
            let value = match bits % 997 {
                0 => f32::NAN,
                1 => f32::INFINITY,
                2 => -0.0,
                _ => (bits >> 40) as f32 / (1 << (16 + bits % 8)) as f32 - 3.0,
            };
            match dtype {
                DType::F32 => bytes.extend(value.to_le_bytes()),
                DType::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
                _ => bytes.extend(bf16::from_f32(value).to_le_bytes()),
            }
        }
        bytes
    }

    /// Of results: what is 8 bits wide cannot be added.
    fn combined_dtype(&self) -> DType {
        if self.dtype == DType::F8E4M3 { self.settings.dtype } else { self.dtype }
    }

    fn what(&self, rank: usize) -> String {
        let Self { seed, number, top_k, dtype, scales, worst, tokens, per_token, settings, .. } = self;
        format!(
            "case {number} of UNISONO_TEST_SEED={seed} on rank {rank}: {tokens:?} tokens of {} {dtype}, {scales} scales, top-{top_k} of {}, \
             worst {worst:?}, {per_token} per token, {settings:?}",
            settings.hidden, settings.experts
        )
    }
}

fn le<T: unisono::Element, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|value| bytes(*value)).collect()
}

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

type Uploaded<T> = (DeviceBuffer, Buf<'static, T>);

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
    let Prepared { x, other, scales, on_device, expected, .. } = prepared;
    let ((_, selections), (_, weights)) = on_device;
    let named = |name: &str| format!("{what}: {name}");
    let layout = case.with_layout.then(|| {
        let (layout, expected) = (gpu.layout_on(*selections, case.top_k, stream).unwrap(), &expected.layout);
        same(&layout.tokens_per_rank(), &expected.tokens_per_rank(), None, stream, &named("tokens per rank"));
        same(&layout.tokens_per_expert(), &expected.tokens_per_expert(), None, stream, &named("per expert"));
        same(&layout.is_token_in_rank(), &expected.is_token_in_rank(), None, stream, &named("in rank"));
        layout
    });
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
    if let Some(layout) = &layout {
        call = call.layout(layout);
    }
    if let Some(rows) = case.worst {
        call = call.worst_tokens(rows);
    }
    let got = gpu.dispatch(&call).unwrap_or_else(|error| panic!("{what}: {error}"));
    check_dispatched(&got, expected, stream, &named);
    // Other tokens go the same way.
    let call = CachedDispatch::new(other.on_device(), &got.handle).on(stream);
    let (again, none) = gpu.dispatch_cached(&call).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(none.is_none());
    same(&again, &expected.again, Some(expected.came), stream, &named("cached"));
    check_combine(gpu, tools, case, prepared, (&got, rank));
    gpu.check().unwrap_or_else(|error| panic!("{what}: {error}"));
}

fn check_dispatched(got: &Dispatched, expected: &Expected, stream: &Stream, named: &dyn Fn(&str) -> String) {
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
    same(&got.x, &sent.x, Some(*came), stream, &named("x"));
    same_or_none(got.scales.as_ref(), sent.scales.as_ref(), Some(*came), stream, &named("scales"));
    same_or_none(got.topk_idx.as_ref(), sent.topk_idx.as_ref(), None, stream, &named("indices"));
    same_or_none(got.topk_weights.as_ref(), sent.topk_weights.as_ref(), None, stream, &named("weights"));
    assert_eq!(got.tokens_per_expert, sent.tokens_per_expert, "{}", named("tokens per expert"));
}

fn check_combine(
    gpu: &mut Buffer,
    tools: &Tools,
    case: &Case,
    prepared: &Prepared,
    (got, rank): (&Dispatched, usize),
) {
    let (what, stream) = (case.what(rank), &tools.stream);
    let Results { x, bias, weights } = &prepared.results;
    // Over what was dispatched, where that has the same size: then peers read it in place.
    let in_place = case.in_place && case.per_token == 1 && case.combined_dtype() == case.dtype && x.count > 0;
    if in_place {
        // SAFETY: both are as long, and live until the stream was waited for.
        unsafe { tools.raw.copy(got.x.raw().ptr, x.device.address(), x.count * case.dtype.size()) }.unwrap();
    }
    let results = if in_place { Input::from(&got.x) } else { x.on_device() };
    let mut call = Combine::new(results, &got.handle)
        .per_token(case.per_token)
        .multiprocessors(case.multiprocessors)
        .on(stream);
    if let Some(bias) = bias.first() {
        call = call.bias(bias.on_device());
    }
    if let Some(bias) = bias.get(1) {
        call = call.second_bias(bias.on_device());
    }
    if case.with_weights {
        call = call.weights(weights.1.1);
    }
    let combined = gpu.combine(&call).unwrap_or_else(|error| panic!("{what}: {error}"));
    let expected = &prepared.expected.combined;
    same(&combined.x, &expected.x, None, stream, &format!("{what}: combined, in place {in_place}"));
    let weights = (combined.topk_weights.as_ref(), expected.topk_weights.as_ref());
    same_or_none(weights.0, weights.1, None, stream, &format!("{what}: combined weights"));
}

fn random_cases(ranks: usize, buffers: u64, cases: u64) {
    let seed = numbers::seed();
    println!("{ranks} ranks, seed {seed}");
    run(
        ranks,
        |builder| builder,
        |gpu, host, tools| {
            let rank = gpu.rank();
            for number in 0..buffers {
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

#[test]
fn random_cases_of_eight_ranks_have_the_bits_of_the_host() {
    random_cases(8, 3, 6);
}

/// A small buffer, exchanged.
fn exchanged(gpu: &Communicator, settings: Settings) -> Buffer {
    let mut buffer = Buffer::new(gpu, settings).unwrap();
    buffer.exchange(gpu).unwrap();
    buffer
}

/// `count` tokens of 64 elements, all with the value `value`.
fn tokens_of(tools: &Tools, count: usize, value: f32) -> Both {
    Both::new(tools, DType::BF16, &bf16::from_f32(value).to_le_bytes().repeat(count * 64))
}

#[test]
fn graphs_dispatch_and_combine_as_often_as_they_are_launched() {
    run(
        2,
        |builder| builder,
        |gpu, host, tools| {
            let (rank, stream) = (gpu.rank(), &tools.stream);
            let mut buffer = exchanged(gpu, Settings::new(64, 4));
            // Token t goes to expert t mod 4, and every third one to expert 3 as well.
            let count = 50;
            let selections: Vec<i64> =
                (0..count).flat_map(|t: i64| [t % 4, if t % 3 == 0 { 3 } else { -1 }]).collect();
            let (_memory, topk_idx) = uploaded::<i64>(tools, &le(&selections, i64::to_le_bytes));
            let x = tokens_of(tools, count as usize, 1.0 + rank as f32);
            let call = |buffer: &mut Buffer| {
                let call = Dispatch::new(x.on_device()).top_k(topk_idx, 2).worst_tokens(120).on(stream);
                let sent = buffer.dispatch(&call).unwrap();
                let combined = buffer.combine(&Combine::new(&sent.x, &sent.handle).on(stream)).unwrap();
                (sent, combined)
            };
            // Without a number of rows the host would have to wait.
            host.barrier().unwrap();
            let (eager, _) = call(&mut buffer);
            tools.raw.synchronize().unwrap();
            host.barrier().unwrap();
            tools.raw.begin_capture().unwrap();
            let refused = buffer.dispatch(&Dispatch::new(x.on_device()).top_k(topk_idx, 2).on(stream));
            assert!(matches!(refused, Err(Error::Argument { what: "worst_tokens", .. })), "{refused:?}");
            let (sent, combined) = call(&mut buffer);
            let graph = tools.raw.end_capture().unwrap();
            for round in 0..10 {
                graph.launch(&tools.raw).unwrap();
                if round % 3 == 0 {
                    let (again, _) = call(&mut buffer);
                    same(
                        &again.handle.rank_prefix(),
                        &eager.handle.rank_prefix(),
                        None,
                        stream,
                        "eager between",
                    );
                }
                same(
                    &sent.handle.source_tokens(),
                    &eager.handle.source_tokens(),
                    None,
                    stream,
                    "source tokens",
                );
                same_or_none(sent.topk_idx.as_ref(), eager.topk_idx.as_ref(), None, stream, "indices");
                let got = bytes(&combined.x, stream);
                for token in 0..count as usize {
                    let ranks = if token % 3 == 0 && token % 4 < 2 { 2.0 } else { 1.0 };
                    let expected = bf16::from_f32(ranks * (1.0 + rank as f32)).to_le_bytes();
                    assert_eq!(
                        got[token * 128..][..2],
                        expected,
                        "token {token} of rank {rank} in round {round}"
                    );
                }
            }
            buffer.check().unwrap();
            host.barrier().unwrap();
            drop((eager, sent, combined, graph));
            buffer.close(gpu).unwrap();
            host.barrier().unwrap();
        },
    );
}

#[test]
fn outputs_of_different_calls_never_alias_and_go_back_in_the_order_of_streams() {
    run(
        2,
        |builder| builder,
        |gpu, host, tools| {
            let (rank, stream) = (gpu.rank(), &tools.stream);
            let second = Stream::from(CudaStream::new(&tools.device).unwrap());
            // Room for four outputs.
            let settings = Settings { pool_bytes: Some(64 << 10), ..Settings::new(64, 2) };
            let mut buffer = exchanged(gpu, settings);
            let count = 64;
            let (_memory, topk_idx) =
                uploaded::<i64>(tools, &le(&vec![1 - rank as i64; count], i64::to_le_bytes));
            let inputs: Vec<Both> =
                (0..12).map(|at| tokens_of(tools, count, at as f32 + 20.0 * rank as f32)).collect();
            host.barrier().unwrap();
            let mut held = Vec::new();
            for (at, x) in inputs.iter().enumerate() {
                let stream = if at % 2 == 0 { stream } else { &second };
                let sent =
                    buffer.dispatch(&Dispatch::new(x.on_device()).top_k(topk_idx, 1).on(stream)).unwrap();
                assert_eq!(sent.tokens_per_expert, [count]);
                held.push((at, sent));
                // Some are kept beyond what the pool has room for, others go back at once.
                if at % 4 == 3 {
                    held.retain(|(at, _)| at % 4 != 3);
                }
            }
            for (at, sent) in &held {
                let value = bf16::from_f32(*at as f32 + 20.0 * (1 - rank) as f32).to_le_bytes();
                let stream = if at % 2 == 0 { stream } else { &second };
                assert!(
                    bytes(&sent.x, stream).as_chunks().0.iter().all(|x| *x == value),
                    "call {at} on rank {rank}"
                );
            }
            let text = buffer.explain();
            assert!(text.contains("through staging, because the pool was full"), "{text}");
            buffer.check().unwrap();
            host.barrier().unwrap();
            drop(held);
            buffer.close(gpu).unwrap();
            host.barrier().unwrap();
        },
    );
}

#[test]
fn what_does_not_fit_is_refused_and_the_buffer_works_on() {
    run(
        2,
        |builder| builder,
        |gpu, host, tools| {
            let (rank, stream) = (gpu.rank(), &tools.stream);
            let mut buffer = exchanged(gpu, Settings { pool_bytes: Some(32 << 10), ..Settings::new(64, 4) });
            assert!(matches!(buffer.exchange(gpu), Err(Error::BufferState { .. })));
            let (_memory, topk_idx) = uploaded::<i64>(tools, &le(&[0i64, 3, 9, 2], i64::to_le_bytes));
            let (_many, of_many) =
                uploaded::<i64>(tools, &le(&vec![2 - 2 * rank as i64; 1000], i64::to_le_bytes));
            let (x, many) = (tokens_of(tools, 4, 1.0), tokens_of(tools, 1000, 1.0));
            host.barrier().unwrap();
            // Refused before anything is sent.
            let on_host = buffer.dispatch(&Dispatch::new(x.on_host()).top_k(&[0, 1, 2, 3], 1).on(stream));
            assert!(matches!(on_host, Err(Error::Place { .. })), "{on_host:?}");
            let no_stream = buffer.dispatch(&Dispatch::new(x.on_device()).top_k(topk_idx, 1));
            assert!(matches!(no_stream, Err(Error::Place { .. })), "{no_stream:?}");
            assert!(matches!(buffer.layout(topk_idx, 1), Err(Error::Place { .. })));
            // An index that is no expert's selects nothing, and is told.
            let told = buffer.dispatch(&Dispatch::new(x.on_device()).top_k(topk_idx, 1).on(stream));
            let text = told.unwrap_err().to_string();
            assert!(text.contains("below 4 experts, got 9 for token 2"), "{text}");
            // More rows than there is room for: told later, as nobody waits for their number.
            let few = Dispatch::new(x.on_device()).top_k(topk_idx, 1).worst_tokens(1).on(stream);
            let sent = buffer.dispatch(&few).unwrap();
            tools.raw.synchronize().unwrap();
            let text = buffer.check().unwrap_err().to_string();
            assert!(text.contains("worst_tokens") && text.contains("as many as came"), "{text}");
            assert_eq!(sent.x.shape(), [1, 64]);
            let _ = buffer.check();
            // Rows for which neither the pool nor the staging has room.
            let large = buffer.dispatch(&Dispatch::new(many.on_device()).top_k(of_many, 1).on(stream));
            let text = large.unwrap_err().to_string();
            assert!(text.contains("pool_bytes") && text.contains("room for"), "{text}");
            // Everybody refused the same, and goes on.
            let sent = buffer
                .dispatch(&Dispatch::new(x.on_device()).top_k(first_four(of_many), 1).on(stream))
                .unwrap();
            assert_eq!(sent.x.shape(), [4, 64]);
            buffer.check().unwrap();
            host.barrier().unwrap();
            drop(sent);
            buffer.close(gpu).unwrap();
            host.barrier().unwrap();
        },
    );
}

/// The first four elements.
fn first_four(all: Buf<'static, i64>) -> Buf<'static, i64> {
    let raw = all.raw();
    let unisono::Place::Cuda { ordinal } = raw.place else { unreachable!("{raw:?}") };
    // SAFETY: a part of what is valid.
    unsafe { Buf::cuda(raw.ptr, 4, ordinal) }
}

#[test]
fn calls_that_differ_and_ranks_that_do_not_come_are_named() {
    run_failing(2, |gpu, host, tools| {
        let (rank, stream) = (gpu.rank(), &tools.stream);
        let mut buffer = exchanged(gpu, Settings::new(64, 4));
        let (_memory, topk_idx) = uploaded::<i64>(tools, &le(&[0i64, 3, 1, 2], i64::to_le_bytes));
        let x = tokens_of(tools, 4, 1.0);
        host.barrier().unwrap();
        // One gives two experts for each of two tokens.
        let top_k = 1 + rank;
        let part = if rank == 0 { x.on_device() } else { tokens_part(&x) };
        let error = buffer.dispatch(&Dispatch::new(part).top_k(topk_idx, top_k).on(stream)).unwrap_err();
        let text = error.to_string();
        assert!(
            matches!(error, Error::Mismatch { .. }) && text.contains("top-1") && text.contains("top-2"),
            "{text}"
        );
        assert!(!buffer.is_available());
        host.barrier().unwrap();
    });
    run_failing(2, |gpu, host, tools| {
        let (rank, stream) = (gpu.rank(), &tools.stream);
        let deadline = std::time::Duration::from_millis(30);
        let mut buffer = exchanged(gpu, Settings { deadline, ..Settings::new(64, 4) });
        let (_memory, topk_idx) = uploaded::<i64>(tools, &le(&[0i64, 3, 1, 2], i64::to_le_bytes));
        let x = tokens_of(tools, 4, 1.0);
        host.barrier().unwrap();
        if rank == 0 {
            let error =
                buffer.dispatch(&Dispatch::new(x.on_device()).top_k(topk_idx, 1).on(stream)).unwrap_err();
            let Error::Timeout { rank: 0, call, missing, .. } = &error else { panic!("{error}") };
            assert!(
                call.contains("dispatch") && missing.len() == 1 && missing[0].contains("rank 1"),
                "{error}"
            );
            // The context is whole.
            tools.raw.synchronize().unwrap();
        }
        host.barrier().unwrap();
    });
}

/// The first half of the tokens.
fn tokens_part(x: &Both) -> Input<'static> {
    // SAFETY: a part of what is valid.
    unsafe { Buf::<bf16>::cuda(x.device.address(), x.count / 2, x.device.device().ordinal()) }.into()
}

/// As `run`, where the communicators of the GPUs fail.
fn run_failing(ranks: usize, work: impl Fn(&Communicator, &Communicator, &Tools) + Sync) {
    if devices().is_empty() {
        return;
    }
    let hosts = std::cell::RefCell::new(Communicator::threads(ranks).unwrap());
    let tools = |_: usize, ordinal: u32| Tools::new(hosts.borrow_mut().remove(0), ordinal);
    on_threads(
        ranks,
        |builder| builder.timeout(PATIENCE),
        tools,
        |gpu, tools| {
            let host = tools.host.take().unwrap();
            work(&gpu, &host, tools);
            drop(gpu);
            host.destroy().unwrap();
        },
    );
}

#[test]
fn a_silent_rank_is_left_out_and_the_others_complete_the_call() {
    run_failing(3, |gpu, host, tools| {
        let (rank, stream) = (gpu.rank(), &tools.stream);
        let deadline = std::time::Duration::from_millis(500);
        let mut buffer = exchanged(gpu, Settings { deadline, masking: true, ..Settings::new(64, 3) });
        let (_memory, topk_idx) = uploaded::<i64>(tools, &le(&[0i64, 1, 2, 0, 1, 2], i64::to_le_bytes));
        let x = tokens_of(tools, 2, 1.0 + rank as f32);
        host.barrier().unwrap();
        // Rank 2 takes part in the first call only. The others do without it from the second on.
        for turn in 0..3 {
            if rank == 2 && turn > 0 {
                break;
            }
            let sent = buffer.dispatch(&Dispatch::new(x.on_device()).top_k(topk_idx, 3).on(stream)).unwrap();
            let came: &[f32] =
                if turn == 0 { &[1.0, 1.0, 2.0, 2.0, 3.0, 3.0] } else { &[1.0, 1.0, 2.0, 2.0] };
            let got = bytes(&sent.x, stream);
            let firsts: Vec<f32> =
                got.chunks(128).map(|row| bf16::from_le_bytes([row[0], row[1]]).to_f32()).collect();
            assert_eq!(firsts, came, "turn {turn} on rank {rank}");
            let combined = buffer.combine(&Combine::new(&sent.x, &sent.handle).on(stream)).unwrap();
            let times = if turn == 0 { 3.0 } else { 2.0 };
            let expected = bf16::from_f32(times * (1.0 + rank as f32)).to_le_bytes();
            assert!(
                bytes(&combined.x, stream).as_chunks().0.iter().all(|x| *x == expected),
                "turn {turn} on {rank}"
            );
            buffer.check().unwrap();
            let masked = if turn == 0 { Vec::new() } else { vec![2] };
            assert_eq!(buffer.masked(), masked);
        }
        host.barrier().unwrap();
        if rank == 2 {
            let late = buffer.dispatch(&Dispatch::new(x.on_device()).top_k(topk_idx, 3).on(stream));
            assert!(matches!(late, Err(Error::GivenUp { rank: 2, .. })), "{late:?}");
        }
        host.barrier().unwrap();
    });
}
