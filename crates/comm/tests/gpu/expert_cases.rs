//! Random cases of expert parallelism on GPUs, which all ranks draw alike.

use unisono::DType;
use unisono::ep::Settings;
use unisono::half::{bf16, f16};

use crate::numbers::Random;

/// Elements of a rank's tokens in most cases.
pub(crate) const MOST_ELEMENTS: usize = 400_000;

/// What all ranks draw alike.
pub(crate) struct Case {
    pub(crate) seed: u64,
    pub(crate) number: u64,
    pub(crate) settings: Settings,
    pub(crate) top_k: usize,
    pub(crate) dtype: DType,
    pub(crate) scales: usize,
    pub(crate) tokens: Vec<usize>,
    pub(crate) with_top_k: bool,
    pub(crate) with_layout: bool,
    pub(crate) with_weights: bool,
    pub(crate) by_columns: bool,
    pub(crate) worst: Option<usize>,
    pub(crate) alignment: usize,
    pub(crate) per_token: usize,
    pub(crate) biases: usize,
    pub(crate) in_place: bool,
    pub(crate) multiprocessors: u32,
}

pub(crate) fn settings(random: &mut Random, ranks: usize) -> Settings {
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
    pub(crate) fn draw((seed, number): (u64, u64), settings: &Settings, ranks: usize) -> Self {
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

    pub(crate) fn random(&self, key: u64, rank: usize) -> Random {
        Random::of(&[self.seed, self.number, key, rank as u64])
    }

    pub(crate) fn selections(&self, rank: usize) -> Vec<i64> {
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

    /// Whether its calls are captured in a graph, where the host cannot learn how many rows come.
    pub(crate) fn is_captured(&self) -> bool {
        self.worst.is_some() && self.random(11, 0).once_in(2)
    }

    /// Any bits.
    pub(crate) fn bits(&self, key: u64, rank: usize, bytes: usize) -> Vec<u8> {
        let mut random = self.random(key, rank);
        (0..bytes.div_ceil(8)).flat_map(|_| random.next().to_le_bytes()).take(bytes).collect()
    }

    /// Numbers of `dtype` that can be added, seldom one that is not finite.
    pub(crate) fn numbers(&self, key: u64, rank: usize, count: usize, dtype: DType) -> Vec<u8> {
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
    pub(crate) fn combined_dtype(&self) -> DType {
        if self.dtype == DType::F8E4M3 { self.settings.dtype } else { self.dtype }
    }

    pub(crate) fn what(&self, rank: usize) -> String {
        let Self { seed, number, top_k, dtype, scales, worst, tokens, per_token, settings, .. } = self;
        format!(
            "case {number} of UNISONO_TEST_SEED={seed} on rank {rank}: {tokens:?} tokens of {} {dtype}, {scales} scales, top-{top_k} of {}, \
             worst {worst:?}, {per_token} per token, {settings:?}",
            settings.hidden, settings.experts
        )
    }
}
