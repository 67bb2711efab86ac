//! Low-latency combine: the weighted sum of what the experts made of each token.
//!
//! Two rounds. Sources send their weights ahead; each rank adds what its experts made of a token, in f32 and in the order of the token's
//! selections, and stages one row for it, rounded to the dtype or cast to 8 bits; the sources add those rows in the order of ranks.

use unisono_core::DType;
use unisono_core::ep::cast::{ScaleKind, blocks, cast_row, uncast_row};
use unisono_core::ep::{Placement, RowSum, is_summed};

use super::Buffer;
use super::arena::{Arena, Gathered, Lane, Round};
#[cfg(feature = "cuda")]
use super::gpu::{DeviceOrigins, Inputs, Phases, SentOnGpu};
use super::low_latency::Sent;
use super::low_latency_handle::{HostOrigins, LowLatencyHandle};
use super::tensor::{Input, Lent, Tensor, bytes_of, bytes_of_mut};
use super::words::{CallWords, Operation};
use crate::buffer::Buf;
#[cfg(feature = "cuda")]
use crate::buffer::Place;
use crate::cause::Cause;
use crate::error::Result;
use crate::stream::Stream;

/// Results to be combined in low-latency mode.
#[derive(Clone, Debug)]
pub struct LowLatencyCombine<'b> {
    x: Option<Input<'b>>,
    topk_idx: Input<'b>,
    topk_weights: Input<'b>,
    handle: &'b LowLatencyHandle,
    quantised: bool,
    stream: Option<&'b Stream>,
}

impl<'b> LowLatencyCombine<'b> {
    /// `x` is `[L, M, hidden]`, bf16, f16 or f32: the results in the places of the rows that the dispatch of `handle` brought. `topk_idx` is what was
    /// dispatched, `topk_weights` f32 of the same shape.
    pub fn new(
        x: impl Into<Input<'b>>,
        topk_idx: impl Into<Buf<'b, i64>>,
        topk_weights: impl Into<Buf<'b, f32>>,
        handle: &'b LowLatencyHandle,
    ) -> Self {
        let (topk_idx, topk_weights) = (topk_idx.into().into(), topk_weights.into().into());
        Self { x: Some(x.into()), topk_idx, topk_weights, handle, quantised: false, stream: None }
    }

    /// The results lie in [`Buffer::combine_buffer`] already.
    pub fn of_buffer(
        topk_idx: impl Into<Buf<'b, i64>>,
        topk_weights: impl Into<Buf<'b, f32>>,
        handle: &'b LowLatencyHandle,
    ) -> Self {
        let (topk_idx, topk_weights) = (topk_idx.into().into(), topk_weights.into().into());
        Self { x: None, topk_idx, topk_weights, handle, quantised: false, stream: None }
    }

    /// Rows travel as f8e4m3 with an f32 scale for each 128 elements: half the bytes of bf16, and four bits of precision.
    pub const fn quantised(mut self) -> Self {
        self.quantised = true;
        self
    }

    /// In the order of `stream`, which a buffer on GPUs needs.
    pub const fn on(mut self, stream: &'b Stream) -> Self {
        self.stream = Some(stream);
        self
    }
}

/// What came of this rank's tokens.
#[derive(Clone, Debug)]
pub struct LowLatencyCombined {
    /// `[tokens, hidden]`, of the type that was combined.
    pub x: Tensor,
    /// i64 `[ranks]`: how long each rank was waited for, in nanoseconds.
    pub waited: Tensor,
}

/// A low-latency combine that was sent and not yet received: [`Buffer::receive_combine`] takes it.
#[derive(Debug)]
#[must_use = "until it is received, the buffer takes at most one more"]
pub struct SentCombine {
    sent: Sent,
    words: CallWords,
    /// The ranks of each token; none on GPUs.
    destinations: Vec<u64>,
}

/// What a combine sends, checked.
struct Results<'a> {
    bytes: &'a [u8],
    selections: &'a [i64],
    weights: &'a [u8],
    origins: &'a HostOrigins,
}

impl Buffer {
    /// Brings results back to the sources of their tokens, and adds up weight · result over the selections of each. Every rank calls it, with a
    /// handle of the same dispatch.
    ///
    /// Per rank the weighted rows are added in f32, in the order of the token's selections, and rounded to the dtype; these sums are added in f32, in
    /// the order of ranks, and rounded once more. A token without experts is 0; ranks that are masked add nothing.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if shapes or dtypes do not fit, before anything is sent; [`crate::Error::Mismatch`] if a rank gives other indices
    /// than it dispatched; the others as [`Buffer::dispatch`].
    pub fn low_latency_combine(&mut self, combine: &LowLatencyCombine<'_>) -> Result<LowLatencyCombined> {
        #[cfg(feature = "cuda")]
        if self.place() != Place::Host {
            let (_, _, combined) = self.combine_on_gpu(combine, Phases::Both)?;
            return Ok(combined.unwrap_or_else(|| unreachable!("both halves receive")));
        }
        let sent = self.low_latency_combine_send(combine)?;
        self.receive_combine(sent)
    }

    /// The first half of a low-latency combine: waits for the weights of the others, and sends.
    ///
    /// # Errors
    /// As [`Buffer::low_latency_combine`].
    pub fn low_latency_combine_send(&mut self, combine: &LowLatencyCombine<'_>) -> Result<SentCombine> {
        let call = "low_latency_combine";
        #[cfg(feature = "cuda")]
        if self.place() != Place::Host {
            let (words, sent, _) = self.combine_on_gpu(combine, Phases::Send)?;
            return Ok(SentCombine { sent: Sent::Device(sent), words, destinations: Vec::new() });
        }
        self.ready_to_send(call, combine.stream)?;
        let origins = &*combine.handle.0;
        let experts = self.placement.local_experts(self.rank);
        let block = self.world_size * self.settings.capacity;
        let is_ours = origins.on_host().is_some_and(|host| {
            host.rows == block
                && host.source_tokens.len() == experts * block
                && host.ranges.len() == experts * self.world_size
        });
        let Some(host) = origins.on_host().filter(|_| is_ours && origins.call <= self.calls) else {
            return Err(self.refuse(call, "handle", "one of this buffer".to_owned(), "another one's"));
        };
        let (tokens, top_k) = (origins.tokens, origins.top_k);
        let selections = self.selections(call, (&combine.topk_idx, top_k), tokens)?;
        let count = (DType::F32, tokens * top_k);
        let weights = self.exactly((call, "topk_weights"), &combine.topk_weights, count)?.bytes;
        let routing = self.route(call, &selections, top_k)?;
        self.with_results(call, combine, |buffer, words, lent| {
            buffer.calls += 1;
            let results = Results { bytes: lent.bytes, selections: &selections, weights, origins: host };
            let sent = buffer.send_results(words, &results);
            let round = buffer.remember(sent)?;
            let destinations = routing.destinations.clone();
            Ok(SentCombine { sent: Sent::Host(round), words: *words, destinations })
        })
    }

    /// Calls `send` with what the call is and where its results lie, if they fit.
    fn with_results<R>(
        &mut self,
        call: &'static str,
        combine: &LowLatencyCombine<'_>,
        send: impl FnOnce(&mut Self, &CallWords, Lent<'_>) -> Result<R>,
    ) -> Result<R> {
        let staged = self.staged.take();
        let x = match (&combine.x, &staged) {
            (Some(x), _) => Ok(*x),
            (None, Some(staged)) => Ok(Input::from(staged)),
            (None, None) => {
                let expected = "results in combine_buffer()".to_owned();
                Err(self.refuse(call, "x", expected, "none; it was not asked for"))
            }
        };
        let checked = x.and_then(|x| self.check_results(call, combine, &x));
        let sent = checked.and_then(|(words, lent)| send(self, &words, lent));
        // The caller may fill it again.
        self.staged = staged;
        sent
    }

    fn check_results<'b>(
        &self,
        call: &'static str,
        combine: &LowLatencyCombine<'_>,
        x: &Input<'b>,
    ) -> Result<(CallWords, Lent<'b>)> {
        let dtype = x.raw().dtype;
        self.check_summed(call, dtype)?;
        let experts = self.placement.local_experts(self.rank);
        let count = experts * self.world_size * self.settings.capacity * self.settings.hidden;
        let lent = self.exactly((call, "x"), x, (dtype, count))?;
        let origins = &combine.handle.0;
        let mut words = CallWords::new(Operation::LowLatencyCombine, self.calls + 1, dtype);
        (words.top_k, words.tokens, words.handle) = (origins.top_k, origins.tokens, origins.call);
        words.cast = u8::from(combine.quantised);
        Ok((words, lent))
    }

    fn check_summed(&self, call: &'static str, dtype: DType) -> Result<()> {
        if is_summed(dtype) && dtype.size() <= self.settings.dtype.size() {
            return Ok(());
        }
        let expected = format!("bf16, f16 or f32, no wider than {}", self.settings.dtype);
        Err(self.refuse(call, "dtype", expected, dtype))
    }

    /// The second half: waits for the results of the others, and adds them. Calls are received in the order in which they were sent.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if an earlier one was not received; the others as [`Buffer::dispatch`].
    pub fn receive_combine(&mut self, sent: SentCombine) -> Result<LowLatencyCombined> {
        self.ready_to_receive("receive_combine", &sent.sent)?;
        match &sent.sent {
            Sent::Host(round) => {
                let combined = self.add_results(*round, &sent);
                self.remember(combined)
            }
            #[cfg(feature = "cuda")]
            Sent::Device(other_half) => {
                let stream = Stream::from(other_half.stream().clone());
                let how = (Phases::Receive, Some(&stream));
                let (_, combined) = self.put_combine(&sent.words, (&other_half.inputs, None), how)?;
                Ok(combined.unwrap_or_else(|| unreachable!("this half receives")))
            }
        }
    }

    /// As [`Buffer::combine_buffer_on`], in the order of the host.
    ///
    /// # Errors
    /// As [`Buffer::combine_buffer_on`].
    pub fn combine_buffer(&mut self, dtype: DType) -> Result<&mut Tensor> {
        self.combine_buffer_on(dtype, &Stream::host())
    }

    /// Memory of this buffer for the results of a combine ([`LowLatencyCombine::of_buffer`]): `[L, M, hidden]` of `dtype`, on the host zeroed when
    /// it is first asked for (on GPUs anything), and as it was left later. On GPUs it is there in the order of `stream`.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if the dtype is none of bf16, f16 and f32 or wider than the settings say, or these have no
    /// [`Settings::low_latency`](super::Settings::low_latency); [`crate::Error::Place`] if the stream is not where this buffer works;
    /// [`crate::Error::BufferState`] before the exchange.
    pub fn combine_buffer_on(&mut self, dtype: DType, stream: &Stream) -> Result<&mut Tensor> {
        let call = "combine_buffer";
        self.reachable(call, Some(stream))?;
        if !self.settings.low_latency {
            return Err(self.refuse(call, "settings", "low_latency".to_owned(), "none"));
        }
        self.check_summed(call, dtype)?;
        let experts = self.placement.local_experts(self.rank);
        let shape = [experts, self.world_size * self.settings.capacity, self.settings.hidden];
        let kept = self.staged.take().filter(|tensor| tensor.dtype() == dtype);
        let staged = match kept {
            Some(kept) => kept,
            None => self.room_for_results(dtype, &shape, stream)?,
        };
        Ok(self.staged.insert(staged))
    }

    fn room_for_results(&mut self, dtype: DType, shape: &[usize], stream: &Stream) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if self.place() != Place::Host {
            let (gpu, stream) = self.on_gpu("combine_buffer", Some(stream))?;
            return gpu.room_for_results(dtype, shape, stream);
        }
        let _ = stream;
        Ok(Tensor::zeros(dtype, shape))
    }

    fn send_results(&mut self, words: &CallWords, results: &Results<'_>) -> Result<Round> {
        let during = words.during();
        let (rank, hidden, capacity) = (self.rank, self.settings.hidden, self.settings.capacity);
        let placement = self.placement.clone();
        let arena = self.available(words.operation.name())?;
        let ahead = CallWords { operation: Operation::LowLatencyWeights, ..*words };
        let weights = arena.begin(Lane::Weights, &during)?;
        let fields = arena.layout().weights[weights.half];
        arena.write(fields.indices.offset, bytes_of(results.selections));
        arena.write(fields.weights.offset, results.weights);
        arena.publish(weights, &ahead, &during)?;
        let gathered = arena.gather(weights, &ahead, &during)?;
        let mut told = Vec::new();
        for source in 0..gathered.calls.len() {
            told.push(read_weights(arena, weights, &gathered, (source, capacity), &during)?);
        }
        arena.finish(weights, &during)?;
        let round = arena.begin(Lane::Data, &during)?;
        let mut adder = Adder::new(results, words, (rank, hidden), &placement);
        for (source, (selections, weights)) in told.iter().enumerate() {
            let staged = adder.stage(arena, round, (source, capacity), selections, weights);
            if let Err((token, expert)) = staged {
                let left = format!(
                    "{} (where expert {expert} has no row for token {token} of rank {source})",
                    words.describe(rank)
                );
                let right = format!("{} (which says it has)", words.describe(source));
                return Err(arena.fail(Cause::Mismatch { left, right }, &during));
            }
        }
        arena.publish(round, words, &during)?;
        Ok(round)
    }

    fn add_results(&mut self, round: Round, sent: &SentCombine) -> Result<LowLatencyCombined> {
        let SentCombine { words, destinations, .. } = sent;
        let during = words.during();
        let (rank, hidden, capacity) = (self.rank, self.settings.hidden, self.settings.capacity);
        let mut x = Tensor::zeros(words.dtype, &[words.tokens, hidden]);
        let arena = self.available(words.operation.name())?;
        let gathered = arena.gather(round, words, &during)?;
        let (layout, fields) = (arena.layout(), &arena.layout().data[round.half]);
        let (mut sum, row_bytes) = (RowSum::new(hidden), x.row_bytes());
        let (mut row, mut values) = (vec![0; row_bytes], vec![0f32; hidden]);
        let (mut codes, mut scales) = (vec![0; hidden], vec![0f32; blocks(hidden)]);
        for (token, ranks) in destinations.iter().enumerate() {
            sum.clear();
            let at = rank * capacity + token;
            let ranks = ranks & gathered.present;
            for peer in (0..gathered.calls.len()).filter(|peer| ranks >> peer & 1 == 1) {
                let from = fields.rows.offset + at * layout.row_stride;
                if words.cast == 0 {
                    arena.read(peer, from, &mut row);
                    sum.add(words.dtype, &row);
                } else {
                    arena.read(peer, from, &mut codes);
                    arena.read(peer, fields.scales.offset + at * scales.len() * 4, bytes_of_mut(&mut scales));
                    uncast_row(&codes, &scales, &mut values);
                    sum.add_values(&values);
                }
            }
            sum.write(words.dtype, &mut x.bytes_mut()[token * row_bytes..][..row_bytes]);
        }
        arena.finish(round, &during)?;
        Ok(LowLatencyCombined { x, waited: gathered.waited() })
    }
}

/// The same on GPUs.
#[cfg(feature = "cuda")]
impl Buffer {
    fn combine_on_gpu(
        &mut self,
        combine: &LowLatencyCombine<'_>,
        phases: Phases,
    ) -> Result<(CallWords, SentOnGpu, Option<LowLatencyCombined>)> {
        let call = "low_latency_combine";
        self.ready_to_send(call, combine.stream)?;
        if phases == Phases::Both {
            self.ready_for_whole(call)?;
        }
        let of_device = combine.handle.0.on_device();
        let is_ours = |origins: &&DeviceOrigins| self.gpu.as_ref().is_some_and(|gpu| origins.is_of(gpu));
        let Some(origins) = of_device.filter(is_ours) else {
            return Err(self.refuse(call, "handle", "one of this buffer".to_owned(), "another one's"));
        };
        let count = combine.handle.0.tokens * combine.handle.0.top_k;
        let selections = self.exactly((call, "topk_idx"), &combine.topk_idx, (DType::I64, count))?.address;
        let weights =
            self.exactly((call, "topk_weights"), &combine.topk_weights, (DType::F32, count))?.address;
        self.with_results(call, combine, |buffer, words, lent| {
            let inputs = Inputs { x: lent.address, selections, weights };
            let how = (phases, combine.stream);
            let (sent, combined) = buffer.put_combine(words, (&inputs, Some(origins)), how)?;
            Ok((*words, sent, combined))
        })
    }

    fn put_combine(
        &mut self,
        words: &CallWords,
        (inputs, origins): (&Inputs, Option<&DeviceOrigins>),
        (phases, stream): (Phases, Option<&Stream>),
    ) -> Result<(SentOnGpu, Option<LowLatencyCombined>)> {
        let (gpu, stream) = self.on_gpu(words.operation.name(), stream)?;
        let put = gpu.low_latency_combine(words, (inputs, origins), (phases, stream));
        let has_sent = gpu.has_sent();
        self.count_call(words, has_sent);
        let (sent, combined) = self.remember_failures(put)?;
        Ok((sent, combined.map(|(x, waited)| LowLatencyCombined { x, waited })))
    }
}

/// The selections and weights of `source`; none if it did not send them.
fn read_weights(
    arena: &Arena,
    round: Round,
    gathered: &Gathered,
    (source, capacity): (usize, usize),
    during: &str,
) -> Result<(Vec<i64>, Vec<f32>)> {
    if gathered.present >> source & 1 == 0 {
        return Ok((Vec::new(), Vec::new()));
    }
    let call = &gathered.calls[source];
    if call.tokens > capacity {
        return Err(arena.damaged(source, "it sends more tokens than its capacity", during));
    }
    let count = call.tokens * call.top_k;
    let (mut selections, mut weights) = (vec![0i64; count], vec![0f32; count]);
    let fields = arena.layout().weights[round.half];
    arena.read(source, fields.indices.offset, bytes_of_mut(&mut selections));
    arena.read(source, fields.weights.offset, bytes_of_mut(&mut weights));
    Ok((selections, weights))
}

/// Adds what the experts of this rank made of each token.
struct Adder<'a> {
    results: &'a Results<'a>,
    words: &'a CallWords,
    rank: usize,
    placement: &'a Placement,
    sum: RowSum,
    row: Vec<u8>,
    codes: Vec<u8>,
    scales: Vec<f32>,
}

impl<'a> Adder<'a> {
    fn new(
        results: &'a Results<'a>,
        words: &'a CallWords,
        (rank, hidden): (usize, usize),
        placement: &'a Placement,
    ) -> Self {
        Self {
            results,
            words,
            rank,
            placement,
            sum: RowSum::new(hidden),
            row: vec![0; hidden * words.dtype.size()],
            codes: vec![0; hidden],
            scales: vec![0.0; blocks(hidden)],
        }
    }

    /// Stages the sums for the tokens of `source`; the token and the local expert for which there is no row, if the selections are not those of the
    /// dispatch.
    fn stage(
        &mut self,
        arena: &Arena,
        round: Round,
        (source, capacity): (usize, usize),
        selections: &[i64],
        weights: &[f32],
    ) -> std::result::Result<(), (usize, usize)> {
        let (origins, top_k) = (self.results.origins, self.words.top_k);
        let ranks = origins.ranges.len() / self.placement.local_experts(self.rank).max(1);
        // Rows of this source that each expert has given.
        let mut given = vec![0u32; self.placement.local_experts(self.rank)];
        for token in 0..selections.len() / top_k {
            self.sum.clear();
            let mut is_ours = false;
            for at in token * top_k..(token + 1) * top_k {
                let Some((owner, expert)) = self.placement.find(selections[at]) else { continue };
                if owner != self.rank {
                    continue;
                }
                let (first, count) = origins.ranges[expert * ranks + source];
                let row = expert * origins.rows + (first + given[expert]) as usize;
                if given[expert] == count || origins.source_tokens[row] as usize != token {
                    return Err((token, expert));
                }
                given[expert] += 1;
                is_ours = true;
                let bytes = &self.results.bytes[row * self.row.len()..][..self.row.len()];
                self.sum.add_weighted(self.words.dtype, bytes, weights[at]);
            }
            if is_ours {
                self.write(arena, round, source * capacity + token);
            }
        }
        Ok(())
    }

    fn write(&mut self, arena: &Arena, round: Round, at: usize) {
        let (layout, fields) = (arena.layout(), &arena.layout().data[round.half]);
        let target = fields.rows.offset + at * layout.row_stride;
        if self.words.cast == 0 {
            self.sum.write(self.words.dtype, &mut self.row);
            return arena.write(target, &self.row);
        }
        let sums = bytes_of(self.sum.values());
        cast_row(DType::F32, sums, ScaleKind::F32, &mut self.codes, &mut self.scales);
        arena.write(target, &self.codes);
        arena.write(fields.scales.offset + at * self.scales.len() * 4, bytes_of(&self.scales));
    }
}
