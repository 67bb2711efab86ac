//! Expert parallelism on GPUs against the host: every rank makes each call on a buffer of GPUs and on one of host memory, with the same random
//! input, and every byte that has a meaning must be the same. Each rank is a thread, because a dispatch waits for its peers.

use unisono::cuda::{Device, DeviceBuffer, Stream as CudaStream};
use unisono::ep::{
    Buffer, CachedDispatch, Combine, Dispatch, Dispatched, Input, RowScales, Settings, Tensor, Tokens,
};
use unisono::half::{bf16, f16};
use unisono::{Buf, Builder, Communicator, DType, Stream, f8e4m3};

use crate::numbers::{self, Random};
use crate::world::{PATIENCE, devices, on_threads};

/// Elements of a rank's tokens in most cases.
const MOST_ELEMENTS: usize = 400_000;

/// What a rank works with: a communicator of the host's, its device and stream.
pub(crate) struct Tools {
    host: Option<Communicator>,
    pub(crate) device: Device,
    pub(crate) stream: Stream,
    pub(crate) raw: CudaStream,
}

pub(crate) fn run(
    ranks: usize,
    configure: impl Fn(Builder) -> Builder,
    work: impl Fn(&Communicator, &Communicator, &Tools) + Sync,
) {
    if devices().is_empty() {
        return;
    }
    let hosts = std::cell::RefCell::new(Communicator::threads(ranks).unwrap());
    let tools = |_: usize, ordinal: u32| {
        let device = Device::new(ordinal).unwrap();
        let raw = CudaStream::new(&device).unwrap();
        let host = Some(hosts.borrow_mut().remove(0));
        Tools { host, device, stream: Stream::from(raw.clone()), raw }
    };
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
pub(crate) struct Both {
    host: Elements,
    pub(crate) device: DeviceBuffer,
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
    pub(crate) fn new(tools: &Tools, dtype: DType, bytes: &[u8]) -> Self {
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

    pub(crate) fn on_device(&self) -> Input<'static> {
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

pub(crate) fn upload(tools: &Tools, bytes: &[u8]) -> DeviceBuffer {
    let mut buffer = DeviceBuffer::new(&tools.device, bytes.len()).unwrap();
    buffer.write(0, bytes).unwrap();
    buffer
}

/// i64 or f32 on the device.
pub(crate) fn uploaded<T: unisono::Element>(tools: &Tools, bytes: &[u8]) -> (DeviceBuffer, Buf<'static, T>) {
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
        pool_bytes: random.pick(&[None, None, Some(256 << 20), Some(1 << 20)]),
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

/// Rows that came, of those that there is room for.
fn came(host: &Dispatched, ranks: usize, rank: usize) -> usize {
    host.handle.rank_prefix().as_slice::<i32>().unwrap()[(ranks - 1) * ranks + rank] as usize
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

fn check_case(
    gpu: &mut Buffer,
    host: &mut Buffer,
    tools: &Tools,
    case: &Case,
    (rank, ranks): (usize, usize),
) {
    let (what, stream) = (case.what(rank), &tools.stream);
    let (tokens, row) = (case.tokens[rank], case.settings.hidden * case.dtype.size());
    let x = Both::new(tools, case.dtype, &case.bits(3, rank, tokens * row));
    let scales = Both::new(tools, DType::F32, &case.bits(4, rank, tokens * case.scales * 4));
    let selections = case.selections(rank);
    let (selections_memory, on_device) = uploaded::<i64>(tools, &le(&selections, i64::to_le_bytes));
    let weights_bytes = case.numbers(5, rank, tokens * case.top_k, DType::F32);
    let weights: Vec<f32> = weights_bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
    let (weights_memory, weights_on_device) = uploaded::<f32>(tools, &weights_bytes);
    let layouts = case.with_layout.then(|| {
        let host = host.layout(&selections, case.top_k).unwrap();
        let gpu = gpu.layout_on(on_device, case.top_k, stream).unwrap();
        same(
            &gpu.tokens_per_rank(),
            &host.tokens_per_rank(),
            None,
            stream,
            &format!("{what}: tokens per rank"),
        );
        same(
            &gpu.tokens_per_expert(),
            &host.tokens_per_expert(),
            None,
            stream,
            &format!("{what}: per expert"),
        );
        same(&gpu.is_token_in_rank(), &host.is_token_in_rank(), None, stream, &format!("{what}: in rank"));
        (gpu, host)
    });
    let mut on_gpu = Dispatch::new(scaled(x.on_device(), scales.on_device(), case, rank))
        .expert_alignment(case.alignment)
        .multiprocessors(case.multiprocessors)
        .on(stream);
    let mut on_host =
        Dispatch::new(scaled(x.on_host(), scales.on_host(), case, rank)).expert_alignment(case.alignment);
    if case.with_top_k {
        (on_gpu, on_host) = (on_gpu.top_k(on_device, case.top_k), on_host.top_k(&selections, case.top_k));
    }
    if case.with_weights {
        (on_gpu, on_host) = (on_gpu.weights(weights_on_device), on_host.weights(&weights));
    }
    if let Some((of_gpu, of_host)) = &layouts {
        (on_gpu, on_host) = (on_gpu.layout(of_gpu), on_host.layout(of_host));
    }
    if let Some(rows) = case.worst {
        (on_gpu, on_host) = (on_gpu.worst_tokens(rows), on_host.worst_tokens(rows));
    }
    let got = gpu.dispatch(&on_gpu).unwrap_or_else(|error| panic!("{what}: {error}"));
    let expected = host.dispatch(&on_host).unwrap();
    let came = came(&expected, ranks, rank);
    let named = |name: &str| format!("{what}: {name}");
    same(&got.handle.rank_prefix(), &expected.handle.rank_prefix(), None, stream, &named("prefix"));
    same(
        &got.handle.source_tokens(),
        &expected.handle.source_tokens(),
        None,
        stream,
        &named("source tokens"),
    );
    same(&got.x, &expected.x, Some(came), stream, &named("x"));
    same_or_none(got.scales.as_ref(), expected.scales.as_ref(), Some(came), stream, &named("scales"));
    same_or_none(got.topk_idx.as_ref(), expected.topk_idx.as_ref(), None, stream, &named("indices"));
    same_or_none(got.topk_weights.as_ref(), expected.topk_weights.as_ref(), None, stream, &named("weights"));
    assert_eq!(got.tokens_per_expert, expected.tokens_per_expert, "{what}");
    let is_in_rank = (got.handle.is_token_in_rank(), expected.handle.is_token_in_rank());
    same(&is_in_rank.0, &is_in_rank.1, None, stream, &named("is in rank"));
    // Other tokens, of another size of element where there is one.
    let other = Both::new(tools, case.dtype, &case.bits(6, rank, tokens * row));
    let (again, none) =
        gpu.dispatch_cached(&CachedDispatch::new(other.on_device(), &got.handle).on(stream)).unwrap();
    let (same_again, _) =
        host.dispatch_cached(&CachedDispatch::new(other.on_host(), &expected.handle)).unwrap();
    assert!(none.is_none());
    same(&again, &same_again, Some(came), stream, &named("cached"));
    check_combine((gpu, host), tools, case, (&got, &expected), rank);
    gpu.check().unwrap_or_else(|error| panic!("{what}: {error}"));
    drop((selections_memory, weights_memory));
}

fn check_combine(
    (gpu, host): (&mut Buffer, &mut Buffer),
    tools: &Tools,
    case: &Case,
    (got, expected): (&Dispatched, &Dispatched),
    rank: usize,
) {
    let stream = &tools.stream;
    let dtype = if case.dtype == DType::F8E4M3 { case.settings.dtype } else { case.dtype };
    let (rows, hidden) = (expected.handle.rows(), case.settings.hidden);
    let count = rows * case.per_token * hidden;
    let x = Both::new(tools, dtype, &case.numbers(7, rank, count, dtype));
    let bias: Vec<Both> = (0..case.biases as u64)
        .map(|which| {
            Both::new(tools, dtype, &case.numbers(8 + which, rank, case.tokens[rank] * hidden, dtype))
        })
        .collect();
    let weights_bytes = case.numbers(10, rank, rows * case.top_k, DType::F32);
    let weights: Vec<f32> = weights_bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
    let (weights_memory, weights_on_device) = uploaded::<f32>(tools, &weights_bytes);
    // Over what was dispatched, where that has the same size: then peers read it in place.
    let in_place = case.in_place && case.per_token == 1 && dtype == case.dtype && count > 0;
    if in_place {
        let bytes = count * dtype.size();
        // SAFETY: both are as long, and live until the stream was waited for.
        unsafe { tools.raw.copy(got.x.raw().ptr, x.device.address(), bytes) }.unwrap();
    }
    let results = if in_place { Input::from(&got.x) } else { x.on_device() };
    let mut on_gpu = Combine::new(results, &got.handle)
        .per_token(case.per_token)
        .multiprocessors(case.multiprocessors)
        .on(stream);
    let mut on_host = Combine::new(x.on_host(), &expected.handle).per_token(case.per_token);
    if let Some(bias) = bias.first() {
        (on_gpu, on_host) = (on_gpu.bias(bias.on_device()), on_host.bias(bias.on_host()));
    }
    if let Some(bias) = bias.get(1) {
        (on_gpu, on_host) = (on_gpu.second_bias(bias.on_device()), on_host.second_bias(bias.on_host()));
    }
    if case.with_weights {
        (on_gpu, on_host) = (on_gpu.weights(weights_on_device), on_host.weights(&weights));
    }
    let what = case.what(rank);
    let combined = gpu.combine(&on_gpu).unwrap_or_else(|error| panic!("{what}: {error}"));
    let reference = host.combine(&on_host).unwrap();
    same(&combined.x, &reference.x, None, stream, &format!("{what}: combined, in place {in_place}"));
    let weights = (combined.topk_weights.as_ref(), reference.topk_weights.as_ref());
    same_or_none(weights.0, weights.1, None, stream, &format!("{what}: combined weights"));
    drop(weights_memory);
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
                    check_case(&mut on_gpu, &mut on_host, tools, &case, (rank, ranks));
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
