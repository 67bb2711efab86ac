//! Combine: what came of each token returns to its source and is added up there, in the order of ranks.
//!
//! A round is about as many tokens of every source, not as many rows of every rank: so all rows of a token come in the same round, and can be added in
//! order. Each rank stages its rows by source; the sources copy and add.

use std::ops::Range;

use unisono_core::DType;
use unisono_core::ep::{RowSum, is_summed};

use super::Buffer;
use super::arena::{Arena, Gathered, Lane, Round};
use super::arguments::{Rows, Tokens};
use super::handle::{Handle, HostRoutes};
use super::tensor::{Input, Tensor};
use super::words::{CallWords, Operation};
use crate::buffer::Buf;
use crate::error::Result;
use crate::stream::Stream;

/// Results to be combined.
#[derive(Clone, Debug)]
pub struct Combine<'b> {
    x: Input<'b>,
    handle: &'b Handle,
    per_token: usize,
    weights: Option<Input<'b>>,
    bias: [Option<Input<'b>>; 2],
    multiprocessors: Option<u32>,
    stream: Option<&'b Stream>,
}

impl<'b> Combine<'b> {
    /// `x` is `[N, hidden]`, bf16, f16 or f32: a row for each that the dispatch of `handle` brought, in that order.
    pub fn new(x: impl Into<Input<'b>>, handle: &'b Handle) -> Self {
        Self {
            x: x.into(),
            handle,
            per_token: 1,
            weights: None,
            bias: [None; 2],
            multiprocessors: None,
            stream: None,
        }
    }

    /// `x` is `[N, count, hidden]`: the rows of one token are added here, in f32 and in their order, rounded to their type, and travel as one.
    pub const fn per_token(mut self, count: usize) -> Self {
        self.per_token = count;
        self
    }

    /// f32 `[N, top_k]`: they return to the sources, too, and are added in the order of ranks.
    pub fn weights(mut self, topk_weights: impl Into<Buf<'b, f32>>) -> Self {
        self.weights = Some(topk_weights.into().into());
        self
    }

    /// Added to the sum, in f32: `[tokens, hidden]`, of the type of `x`.
    pub fn bias(mut self, bias: impl Into<Input<'b>>) -> Self {
        self.bias[0] = Some(bias.into());
        self
    }

    /// Added behind the first one.
    pub fn second_bias(mut self, bias: impl Into<Input<'b>>) -> Self {
        self.bias[1] = Some(bias.into());
        self
    }

    /// Takes so many multiprocessors of the GPU at most, instead of [`Settings::multiprocessors`](super::Settings::multiprocessors). Nothing on the host.
    pub const fn multiprocessors(mut self, count: u32) -> Self {
        self.multiprocessors = Some(count);
        self
    }

    /// In the order of `stream`: the host's, or a stream of our GPU, which is to be named there.
    pub const fn on(mut self, stream: &'b Stream) -> Self {
        self.stream = Some(stream);
        self
    }
}

/// What came of this rank's tokens.
#[derive(Clone, Debug)]
pub struct Combined {
    /// `[tokens, hidden]`, of the type that was combined. A token that went nowhere is 0, plus its bias.
    pub x: Tensor,
    /// f32 `[tokens, top_k]`, if weights were given.
    pub topk_weights: Option<Tensor>,
}

/// What is combined, checked.
struct Results<'a> {
    rows: Rows<'a>,
    per_token: usize,
    weights: Option<&'a [u8]>,
    bias: [Option<&'a [u8]>; 2],
    top_k: usize,
    routes: &'a HostRoutes,
}

impl Buffer {
    /// Brings results back to the sources of their tokens and adds them: the unweighted sum over the ranks that a token went to, in the order of
    /// ranks, then the bias, all in f32 and rounded once. Every rank calls it, with a handle of the same dispatch. Ranks that are masked add
    /// nothing.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if shapes or dtypes do not fit, before anything is sent; the others as [`Buffer::dispatch`].
    pub fn combine(&mut self, combine: &Combine<'_>) -> Result<Combined> {
        let call = "combine";
        self.ready(call, combine.stream)?;
        let (handle, per_token) = (combine.handle, combine.per_token);
        let rows = self.rows(call, &Tokens::new(combine.x))?;
        if !is_summed(rows.dtype) {
            return Err(self.refuse(call, "dtype", "bf16, f16 or f32".to_owned(), rows.dtype));
        }
        if per_token == 0 {
            return Err(self.refuse(call, "per_token", "at least 1".to_owned(), 0));
        }
        self.check_handle(call, handle, handle.rows().saturating_mul(per_token), ("rows", rows.count))?;
        let top_k = handle.0.top_k;
        let weights = match &combine.weights {
            Some(_) if top_k == 0 => {
                let expected = "none for a handle without top-k".to_owned();
                return Err(self.refuse(call, "topk_weights", expected, "some"));
            }
            Some(weights) => {
                let count = (DType::F32, handle.rows() * top_k);
                Some(self.exactly((call, "topk_weights"), weights, count)?)
            }
            None => None,
        };
        let count = (rows.dtype, handle.tokens() * self.settings.hidden);
        let mut bias = [None; 2];
        for (bias, input) in bias.iter_mut().zip(&combine.bias) {
            *bias = match input {
                Some(input) => Some(self.exactly((call, "bias"), input, count)?),
                None => None,
            };
        }
        let mut words = CallWords::new(Operation::Combine, self.calls + 1, rows.dtype);
        (words.handle, words.per_token, words.tokens) = (handle.0.call, per_token, handle.tokens());
        (words.has_weights, words.top_k) = (weights.is_some(), top_k);
        #[cfg(feature = "cuda")]
        if let (Some(routes), Some(stream)) = (handle.0.on_device(), combine.stream.and_then(Stream::as_cuda))
        {
            let results = super::gpu::Results {
                x: rows.lent.address,
                row_bytes: rows.row_bytes,
                per_token,
                weights: weights.map(|lent| lent.address),
                bias: bias.map(|bias| bias.map(|lent| lent.address)),
                multiprocessors: combine.multiprocessors,
            };
            let gpu = self.available_on_gpu(call)?;
            let combined = gpu.combine(&words, &results, routes, stream);
            let has_sent = gpu.has_sent();
            self.calls += u64::from(has_sent);
            let (x, topk_weights) = self.remember_failures(combined)?;
            return Ok(Combined { x, topk_weights });
        }
        let (weights, bias) = (weights.map(|lent| lent.bytes), bias.map(|bias| bias.map(|lent| lent.bytes)));
        let routes = self.host_routes(call, handle)?;
        let results = Results { rows, per_token, weights, bias, top_k, routes };
        self.calls += 1;
        let combined = self.return_and_add(&words, &results);
        self.remember(combined)
    }

    fn return_and_add(&mut self, words: &CallWords, results: &Results<'_>) -> Result<Combined> {
        let (during, routes) = (words.during(), results.routes);
        let (hidden, rank, ranks) = (self.settings.hidden, self.rank, self.world_size);
        let tokens = routes.routing.destinations.len();
        let mut combined = Combined {
            x: Tensor::zeros(words.dtype, &[tokens, hidden]),
            topk_weights: words.has_weights.then(|| Tensor::zeros(DType::F32, &[tokens, words.top_k])),
        };
        let arena = self.available(words.operation.name())?;
        let chunk = arena.layout().rows / ranks;
        // The next row of each source.
        let mut next = routes.starts[..ranks].to_vec();
        let mut turn = 0;
        loop {
            let window = turn * chunk..(turn + 1) * chunk;
            let round = arena.begin(Lane::Data, &during)?;
            stage(arena, round, (results, hidden), window.end, (&mut next, chunk));
            arena.publish(round, words, &during)?;
            let gathered = arena.gather(round, words, &during)?;
            let tokens = window.start.min(tokens)..window.end.min(tokens);
            add(arena, round, &gathered, (rank, chunk, tokens), results, &mut combined);
            arena.finish(round, &during)?;
            turn += 1;
            if turn * chunk >= routes.most_tokens {
                return Ok(combined);
            }
        }
    }
}

/// Writes our rows of tokens below `end` into our half: those of source s from row s · `chunk` on.
fn stage(
    arena: &Arena,
    round: Round,
    (results, hidden): (&Results<'_>, usize),
    end: usize,
    (next, chunk): (&mut [usize], usize),
) {
    let (layout, fields) = (arena.layout(), &arena.layout().data[round.half]);
    let Results { rows, per_token, weights, routes, top_k, .. } = results;
    let mut sum = RowSum::new(hidden);
    let mut added = vec![0; rows.row_bytes];
    let weight_bytes = top_k * 4;
    for (source, next) in next.iter_mut().enumerate() {
        for at in source * chunk.. {
            let row = *next;
            if row == routes.starts[source + 1] || routes.source_tokens[row] as usize >= end {
                break;
            }
            *next += 1;
            let bytes = if *per_token == 1 {
                rows.row(row)
            } else {
                sum.clear();
                (0..*per_token).for_each(|part| sum.add(rows.dtype, rows.row(row * per_token + part)));
                sum.write(rows.dtype, &mut added);
                &added
            };
            arena.write(fields.rows.offset + at * layout.row_stride, bytes);
            if let Some(weights) = weights {
                let bytes = &weights[row * weight_bytes..][..weight_bytes];
                arena.write(fields.weights.offset + at * weight_bytes, bytes);
            }
        }
    }
}

/// Adds what all ranks staged for our `tokens`.
fn add(
    arena: &Arena,
    round: Round,
    gathered: &Gathered,
    (rank, chunk, tokens): (usize, usize, Range<usize>),
    results: &Results<'_>,
    combined: &mut Combined,
) {
    let (layout, fields) = (arena.layout(), &arena.layout().data[round.half]);
    let Results { rows, weights, bias, routes, top_k, .. } = results;
    let (dtype, row_bytes, top_k) = (rows.dtype, rows.row_bytes, *top_k);
    let mut at = vec![rank * chunk; gathered.calls.len()];
    let (mut sum, mut row) = (RowSum::new(row_bytes / dtype.size()), vec![0; row_bytes]);
    let (mut weight_sum, mut weight_row) = (RowSum::new(top_k), vec![0; top_k * 4]);
    for token in tokens {
        sum.clear();
        weight_sum.clear();
        let ranks = routes.routing.destinations[token];
        for (peer, at) in at.iter_mut().enumerate().filter(|(peer, _)| ranks >> peer & 1 == 1) {
            if gathered.present >> peer & 1 == 1 {
                arena.read(peer, fields.rows.offset + *at * layout.row_stride, &mut row);
                sum.add(dtype, &row);
                if weights.is_some() {
                    arena.read(peer, fields.weights.offset + *at * top_k * 4, &mut weight_row);
                    weight_sum.add(DType::F32, &weight_row);
                }
            }
            *at += 1;
        }
        let mine = token * row_bytes..(token + 1) * row_bytes;
        bias.iter().flatten().for_each(|bias| sum.add(dtype, &bias[mine.clone()]));
        sum.write(dtype, &mut combined.x.bytes_mut()[mine]);
        if let Some(weights) = &mut combined.topk_weights {
            weight_sum.write(DType::F32, &mut weights.bytes_mut()[token * top_k * 4..][..top_k * 4]);
        }
    }
}
