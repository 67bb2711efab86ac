//! The receiving side of a dispatch: what ranks count, and their rows on the way to where they stay.

use unisono_core::DType;

use super::arena::{Arena, Gathered, Round};
use super::handle::HostRoutes;
use super::tensor::{Tensor, bytes_of_mut};
use super::words::CallWords;
use crate::error::Result;

/// What has come so far.
pub(super) struct Incoming {
    pub(super) x: Tensor,
    pub(super) scales: Option<Tensor>,
    pub(super) indices: Option<Tensor>,
    pub(super) weights: Option<Tensor>,
    pub(super) source_tokens: Vec<i32>,
    /// Where the rows of each source begin, and behind the last.
    pub(super) starts: Vec<usize>,
    /// The next row of each source.
    pub(super) next: Vec<usize>,
}

/// Copies the rows for us that `source` staged: `count` tokens from `first` on.
pub(super) fn receive(
    arena: &Arena,
    round: Round,
    incoming: &mut Incoming,
    (source, first, count, rank): (usize, usize, usize, usize),
    words: &CallWords,
    during: &str,
) -> Result<()> {
    let (layout, fields) = (arena.layout(), &arena.layout().data[round.half]);
    let (top_k, scale_bytes) = (words.top_k, words.scales.0 * 4);
    let mut destinations = vec![0u64; count];
    arena.read(source, fields.destinations.offset, bytes_of_mut(&mut destinations));
    for at in (0..count).filter(|at| destinations[*at] >> rank & 1 == 1) {
        let row = incoming.next[source];
        if row == incoming.starts[source + 1] {
            return Err(arena.damaged(source, "it sends more tokens than it counted", during));
        }
        incoming.next[source] += 1;
        let take = |tensor: &mut Tensor, field: usize| {
            let bytes = tensor.row_bytes();
            let target = &mut tensor.bytes_mut()[row * bytes..][..bytes];
            arena.read(source, field, target);
        };
        take(&mut incoming.x, fields.rows.offset + at * layout.row_stride);
        if let Some(scales) = &mut incoming.scales {
            take(scales, fields.scales.offset + at * scale_bytes);
        }
        if let Some(indices) = &mut incoming.indices {
            take(indices, fields.indices.offset + at * top_k * 8);
        }
        if let Some(weights) = &mut incoming.weights {
            take(weights, fields.weights.offset + at * top_k * 4);
        }
        incoming.source_tokens[row] = (first + at) as i32;
    }
    Ok(())
}

/// What ranks told in the first round.
#[derive(Default)]
pub(super) struct Told {
    /// Tokens from each rank to each; none of ranks that are masked.
    pub(super) counts: Vec<Vec<u32>>,
    /// Selections of each expert, by source.
    pub(super) experts: Vec<Vec<u32>>,
    pub(super) most_tokens: usize,
    pub(super) tokens_per_expert: Vec<usize>,
}

pub(super) fn read_counts(
    arena: &Arena,
    round: Round,
    gathered: &Gathered,
    experts: usize,
    during: &str,
) -> Result<Told> {
    let (ranks, fields) = (gathered.calls.len(), &arena.layout().data[round.half]);
    let mut told = Told::default();
    for source in 0..ranks {
        let mut counts = vec![0u32; ranks + experts];
        let tokens = gathered.calls[source].tokens;
        if gathered.present >> source & 1 == 1 {
            arena.read(source, fields.counts.offset, bytes_of_mut(&mut counts));
            let is_possible = |count: &u32| *count as usize <= tokens;
            if tokens > unisono_core::ep::MAX_TOKENS || !counts[..ranks].iter().all(is_possible) {
                return Err(arena.damaged(source, "its counts of tokens cannot be", during));
            }
            told.most_tokens = told.most_tokens.max(tokens);
        }
        told.experts.push(counts.split_off(ranks));
        told.counts.push(counts);
    }
    Ok(told)
}

impl Told {
    /// Takes out the rows of sources that did not take part to the end. Of a cached dispatch, whose layout is known, they become zeros.
    pub(super) fn keep(&mut self, present: u64, incoming: &mut Incoming, is_cached: bool, words: &CallWords) {
        let ranks = incoming.next.len();
        for source in (0..ranks).rev().filter(|source| present >> source & 1 == 0) {
            let (start, end) = (incoming.starts[source], incoming.starts[source + 1]);
            if is_cached {
                let row = incoming.x.row_bytes();
                incoming.x.bytes_mut()[start * row..end * row].fill(0);
                if let Some(scales) = &mut incoming.scales {
                    let row = words.scales.0 * 4;
                    scales.bytes_mut()[start * row..end * row].fill(0);
                }
                continue;
            }
            self.counts[source].fill(0);
            self.experts[source].fill(0);
            let tensors = [
                Some(&mut incoming.x),
                incoming.scales.as_mut(),
                incoming.indices.as_mut(),
                incoming.weights.as_mut(),
            ];
            tensors.into_iter().flatten().for_each(|tensor| tensor.remove_rows(start, end));
            incoming.source_tokens.drain(start..end);
            incoming.starts[source + 1..].iter_mut().for_each(|at| *at -= end - start);
        }
    }

    /// Selections of the experts `mine`.
    pub(super) fn count_experts(&mut self, mine: &[usize]) {
        let sum = |expert: &usize| self.experts.iter().map(|of| of[*expert] as usize).sum();
        self.tokens_per_expert = mine.iter().map(sum).collect();
    }
}

impl Incoming {
    pub(super) fn new(
        words: &CallWords,
        row_bytes: usize,
        (rank, told, known): (usize, &Told, Option<&HostRoutes>),
    ) -> Self {
        let starts = match known {
            Some(known) => known.starts.clone(),
            None => {
                let mut starts = vec![0];
                for counts in &told.counts {
                    starts.push(starts[starts.len() - 1] + counts[rank] as usize);
                }
                starts
            }
        };
        let rows = known.map_or(starts[starts.len() - 1], |known| known.source_tokens.len());
        let tensor = |dtype, columns: usize| Tensor::zeros(dtype, &[rows, columns]);
        Self {
            x: tensor(words.dtype, row_bytes / words.dtype.size()),
            scales: (words.scales.0 > 0).then(|| tensor(words.scales.1, words.scales.0)),
            indices: (words.top_k > 0).then(|| tensor(DType::I64, words.top_k)),
            weights: words.has_weights.then(|| tensor(DType::F32, words.top_k)),
            source_tokens: vec![0; rows],
            next: starts[..starts.len() - 1].to_vec(),
            starts,
        }
    }

    /// Appends rows that nobody sent, until there are `rows`.
    pub(super) fn extend(&mut self, rows: usize) -> Result<()> {
        let came = self.source_tokens.len();
        let tensors = [Some(&mut self.x), self.scales.as_mut(), self.indices.as_mut(), self.weights.as_mut()];
        tensors.into_iter().flatten().for_each(|tensor| tensor.extend_rows(rows));
        if let Some(indices) = &mut self.indices {
            let top_k = indices.shape()[1];
            indices.as_mut_slice::<i64>()?[came * top_k..].fill(-1);
        }
        self.source_tokens.resize(rows, -1);
        Ok(())
    }
}
