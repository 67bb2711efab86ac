//! Random cases of expert-parallel calls, and a naive reference: every rank draws every rank's input from (seed, case, rank), and computes
//! one element at a time what has to come.

use std::time::Duration;

use unisono::ep::Settings;
use unisono::half::{bf16, f16};
use unisono::{DType, f8e4m3};

use super::support::data::{self, Style};
use super::support::random::Random;
use super::support::scale::scale;

/// What `row` is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Of {
    Token = 1,
    Scales = 2,
    Result = 3,
    Bias = 4,
}

/// A case, equal on all ranks.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) seed: u64,
    pub(crate) number: u64,
    /// What `random` draws from beside the seed: equal for cases of one shape.
    pub(crate) shape: u64,
    pub(crate) settings: Settings,
    pub(crate) owners: Vec<usize>,
    pub(crate) top_k: usize,
    pub(crate) dtype: DType,
    /// Scales of a token; 0: none.
    pub(crate) scales: usize,
    /// Tokens of each rank.
    pub(crate) tokens: Vec<usize>,
    pub(crate) drawn: Drawn,
}

/// What each rank's tokens select, and by which weight.
#[derive(Clone, Default)]
pub(crate) struct Drawn {
    pub(crate) selections: Vec<Vec<i64>>,
    pub(crate) weights: Vec<Vec<f32>>,
}

impl std::fmt::Debug for Drawn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("as drawn")
    }
}

/// A buffer's settings, equal on all ranks.
pub(crate) fn settings(seed: u64, number: u64, ranks: usize) -> (Settings, Vec<usize>) {
    let mut random = Random::of(&[seed, number, 77]);
    let widest = if random.once_in(4) { 1024 } else { 64 };
    let hidden = 8 * random.count(widest);
    let per_rank = random.count(if ranks > 16 { 2 } else { 12 });
    let is_even = random.once_in(2);
    let experts = if is_even { per_rank * ranks } else { random.count(per_rank * ranks) };
    let owners: Vec<usize> =
        (0..experts).map(|expert| if is_even { expert / per_rank } else { random.below(ranks) }).collect();
    let most = if random.once_in(3) { 8 } else { 64 };
    let settings = Settings {
        placement: (!is_even).then(|| owners.clone()),
        capacity: random.count(most),
        top_k: if random.once_in(2) { 32 } else { random.count(32) },
        dtype: random.pick(&[DType::BF16, DType::F16, DType::F32]),
        low_latency: random.once_in(2),
        masking: random.once_in(2),
        // Comparing takes its time, and ranks take turns on few processors.
        deadline: Duration::from_secs(60),
        ..Settings::new(hidden, experts)
    };
    (settings, owners)
}

impl Case {
    pub(crate) fn draw(seed: u64, number: u64, ranks: usize, with: &(Settings, Vec<usize>)) -> Self {
        let (settings, owners) = with.clone();
        let mut random = Random::of(&[seed, number, 78]);
        let dtypes = [DType::BF16, DType::F16, DType::F32, DType::F8E4M3];
        let fits: Vec<DType> =
            dtypes.into_iter().filter(|dtype| dtype.size() <= settings.dtype.size()).collect();
        // Most are small, so that there are many; campaigns meet large ones, too.
        let elements = if scale() > 1 && random.once_in(16) { 2_000_000 } else { 40_000 };
        let most = (elements / settings.hidden / ranks).clamp(3, 8192);
        let tokens = (0..ranks).map(|_| if random.once_in(4) { 0 } else { random.count(most) }).collect();
        let most_scales = settings.hidden / 8;
        let case = Self {
            seed,
            number,
            shape: number,
            top_k: random.count(settings.top_k),
            dtype: random.pick(&fits),
            scales: if random.once_in(2) { random.count(most_scales) } else { 0 },
            tokens,
            owners,
            settings,
            drawn: Drawn::default(),
        };
        case.with_tokens(true)
    }

    pub(crate) fn with_tokens(mut self, may_repeat: bool) -> Self {
        self.drawn = Drawn {
            selections: (0..self.ranks()).map(|rank| self.draw_selections(rank, may_repeat)).collect(),
            weights: (0..self.ranks()).map(|rank| self.draw_weights(rank)).collect(),
        };
        self
    }

    /// The same in low-latency mode: no more tokens than the capacity, and a dtype that can be cast.
    pub(crate) fn low_latency(mut self) -> Self {
        let capacity = self.settings.capacity;
        self.tokens.iter_mut().for_each(|tokens| *tokens = (*tokens).min(capacity));
        if self.dtype == DType::F8E4M3 {
            self.dtype = self.settings.dtype;
        }
        self.with_tokens(false)
    }

    pub(crate) fn ranks(&self) -> usize {
        self.tokens.len()
    }

    pub(crate) fn random(&self, key: u64) -> Random {
        Random::of(&[self.seed, self.shape, 79, key])
    }

    /// `hidden` elements of what `of` says, of `dtype`: by rank and two more numbers.
    pub(crate) fn row(&self, of: Of, (rank, a, b): (usize, usize, usize), dtype: DType) -> Vec<u8> {
        let count = if of == Of::Scales { self.scales } else { self.settings.hidden };
        let mut row = vec![0; count * dtype.size()];
        let style = if of == Of::Result { Style::Moderate } else { Style::Wild };
        let style = if self.number.is_multiple_of(2) { Style::Tame } else { style };
        data::fill(
            (self.seed, self.number << 3 | of as u64),
            (rank, a << 20 | b),
            0,
            (dtype, style),
            &mut row,
        );
        row
    }

    /// The top-k indices of `rank`.
    pub(crate) fn selections(&self, rank: usize) -> &[i64] {
        &self.drawn.selections[rank]
    }

    pub(crate) fn weights(&self, rank: usize) -> &[f32] {
        &self.drawn.weights[rank]
    }

    fn draw_selections(&self, rank: usize, may_repeat: bool) -> Vec<i64> {
        let mut random = Random::of(&[self.seed, self.number, 80, rank as u64]);
        let (experts, manner) = (self.owners.len(), self.random(1).below(4));
        let mut all = Vec::new();
        for _ in 0..self.tokens[rank] {
            let is_empty = random.once_in(6);
            let start = all.len();
            for _ in 0..self.top_k {
                let expert = match manner {
                    0 => 0,
                    1 => random.below(experts) * random.below(experts) / experts,
                    _ => random.below(experts),
                } as i64;
                let is_again = all[start..].contains(&expert) && !may_repeat;
                all.push(if is_empty || is_again || random.once_in(9) { -1 } else { expert });
            }
        }
        all
    }

    fn draw_weights(&self, rank: usize) -> Vec<f32> {
        let mut random = Random::of(&[self.seed, self.number, 81, rank as u64]);
        let next = |_| (random.next() >> 40) as f32 / (1 << 23) as f32 - 1.0;
        (0..self.tokens[rank] * self.top_k).map(next).collect()
    }

    /// Whether a token whose selections these are goes to `rank`.
    pub(crate) fn goes_to(&self, selections: &[i64], rank: usize) -> bool {
        selections.iter().any(|expert| *expert >= 0 && self.owners[*expert as usize] == rank)
    }

    /// The number of `expert` on its rank.
    pub(crate) fn local(&self, expert: usize) -> usize {
        self.owners[..expert].iter().filter(|owner| **owner == self.owners[expert]).count()
    }

    /// The experts of `rank`.
    pub(crate) fn experts_of(&self, rank: usize) -> Vec<usize> {
        (0..self.owners.len()).filter(|expert| self.owners[*expert] == rank).collect()
    }
}

/// One element as f32.
pub(crate) fn widen(dtype: DType, row: &[u8], at: usize) -> f32 {
    match dtype {
        DType::F32 => f32::from_le_bytes(row[at * 4..][..4].try_into().unwrap()),
        DType::F16 => f16::from_le_bytes(row[at * 2..][..2].try_into().unwrap()).to_f32(),
        DType::BF16 => bf16::from_le_bytes(row[at * 2..][..2].try_into().unwrap()).to_f32(),
        _ => f8e4m3(row[at]).to_f32(),
    }
}

/// `value` as bytes of `dtype`.
pub(crate) fn narrow(dtype: DType, value: f32) -> Vec<u8> {
    match (dtype, value.is_nan()) {
        (DType::F32, false) => value.to_le_bytes().to_vec(),
        (DType::F32, true) => 0x7fc0_0000u32.to_le_bytes().to_vec(),
        (DType::F16, false) => f16::from_f32(value).to_le_bytes().to_vec(),
        (DType::F16, true) => 0x7e00u16.to_le_bytes().to_vec(),
        (_, false) => bf16::from_f32(value).to_le_bytes().to_vec(),
        (_, true) => 0x7fc0u16.to_le_bytes().to_vec(),
    }
}

/// The sum of `terms` in order, from the first one on.
pub(crate) fn sum(terms: impl IntoIterator<Item = f32>) -> f32 {
    terms.into_iter().reduce(|sum, term| sum + term).unwrap_or(0.0)
}
