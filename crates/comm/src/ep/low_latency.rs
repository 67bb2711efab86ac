//! Low-latency dispatch: a block of rows for each local expert, in the order of source rank and token.
//!
//! One round. Each rank stages its tokens once, cast if asked for, with their top-k indices; receivers copy a row for each selection of theirs.

use std::sync::Arc;

use unisono_core::DType;
use unisono_core::ep::cast::{BLOCK, PACKED, ScaleKind, blocks, cast_row, pack};
use unisono_core::ep::is_summed;

use super::Buffer;
use super::arena::{Arena, Lane, Round};
use super::arguments::{Rows, Tokens, indices};
#[cfg(feature = "cuda")]
use super::gpu::{Inputs, OnGpu, Phases, SentOnGpu};
use super::low_latency_handle::{HostOrigins, LowLatencyHandle, Origins, Places};
use super::tensor::{Input, Tensor, bytes_of, bytes_of_mut};
use super::words::{CallWords, Operation};
use crate::buffer::Buf;
#[cfg(feature = "cuda")]
use crate::buffer::Place;
use crate::error::Result;
use crate::stream::Stream;

/// Calls that may be sent and not received at once.
pub(super) const MOST_OPEN: usize = 2;

/// Tokens to be dispatched in low-latency mode.
#[derive(Clone, Debug)]
pub struct LowLatencyDispatch<'b> {
    x: Input<'b>,
    topk_idx: Input<'b>,
    top_k: usize,
    cast: Option<ScaleKind>,
    stream: Option<&'b Stream>,
}

impl<'b> LowLatencyDispatch<'b> {
    /// `x` is tokens × hidden, bf16, f16 or f32, of at most [`Settings::capacity`](super::Settings::capacity) tokens; `topk_idx` is i64, tokens ×
    /// `top_k`, each an expert (once for a token) or −1, which selects nothing.
    pub fn new(x: impl Into<Input<'b>>, topk_idx: impl Into<Buf<'b, i64>>, top_k: usize) -> Self {
        Self { x: x.into(), topk_idx: topk_idx.into().into(), top_k, cast: None, stream: None }
    }

    /// Casts rows to f8e4m3 on their way, with a scale for each 128 elements ([`reference::cast`](super::reference::cast) says how). [`ScaleKind::Ue8m0`] needs a
    /// hidden size that is a multiple of 512.
    pub const fn cast(mut self, scales: ScaleKind) -> Self {
        self.cast = Some(scales);
        self
    }

    /// In the order of `stream`, which a buffer on GPUs needs.
    pub const fn on(mut self, stream: &'b Stream) -> Self {
        self.stream = Some(stream);
        self
    }
}

/// What a low-latency dispatch brought. L is the number of experts of this rank, M = ranks × capacity.
#[derive(Clone, Debug)]
pub struct LowLatencyDispatched {
    /// `[L, M, hidden]`: of each expert first the rows that came, by source rank and token; behind them zeros (on GPUs anything). f8e4m3 if cast.
    pub x: Tensor,
    /// The scales, if cast: f32 `[L, blocks, M]`, or with [`ScaleKind::Ue8m0`] i32 `[L, blocks / 4, M]`. The tokens are the last dimension.
    pub scales: Option<Tensor>,
    /// i32 `[L]`: rows that came for each expert of this rank.
    pub counts: Tensor,
    /// i64 `[ranks]`: how long each rank was waited for, in nanoseconds. On GPUs it is how long after the beginning of the kernel something
    /// of the rank came last that was waited for.
    pub waited: Tensor,
    /// For combine.
    pub handle: LowLatencyHandle,
}

/// A low-latency dispatch that was sent and not yet received: [`Buffer::receive_dispatch`] takes it.
#[derive(Debug)]
#[must_use = "until it is received, the buffer takes at most one more"]
pub struct SentDispatch {
    sent: Sent,
    words: CallWords,
    cast: Option<ScaleKind>,
}

/// How a call was sent.
#[derive(Debug)]
pub(super) enum Sent {
    Host(Round),
    #[cfg(feature = "cuda")]
    Device(SentOnGpu),
}

impl Buffer {
    /// Sends tokens to their experts and returns when those for this rank's experts are there. Every rank calls it.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if shapes or dtypes do not fit, there are more tokens than the capacity, or the settings have no
    /// [`Settings::low_latency`](super::Settings::low_latency), before anything is sent; the others as [`Buffer::dispatch`].
    pub fn low_latency_dispatch(
        &mut self,
        dispatch: &LowLatencyDispatch<'_>,
    ) -> Result<LowLatencyDispatched> {
        #[cfg(feature = "cuda")]
        if self.place() != Place::Host {
            let (words, inputs) = self.dispatch_inputs(dispatch)?;
            self.ready_for_whole(words.operation.name())?;
            let (_, dispatched) = self.put_dispatch(&words, &inputs, (Phases::Both, dispatch.stream))?;
            return Ok(dispatched.unwrap_or_else(|| unreachable!("both halves receive")));
        }
        let sent = self.low_latency_dispatch_send(dispatch)?;
        self.receive_dispatch(sent)
    }

    /// The first half of a low-latency dispatch: sends, and waits for nobody but those that have not yet received what was sent two calls
    /// ago. Between the halves anything else can be done. At most two calls are sent and not received at once.
    ///
    /// # Errors
    /// As [`Buffer::low_latency_dispatch`].
    pub fn low_latency_dispatch_send(&mut self, dispatch: &LowLatencyDispatch<'_>) -> Result<SentDispatch> {
        let (call, cast) = ("low_latency_dispatch", dispatch.cast);
        #[cfg(feature = "cuda")]
        if self.place() != Place::Host {
            let (words, inputs) = self.dispatch_inputs(dispatch)?;
            let (sent, _) = self.put_dispatch(&words, &inputs, (Phases::Send, dispatch.stream))?;
            return Ok(SentDispatch { sent: Sent::Device(sent), words, cast });
        }
        let (words, rows) = self.check_dispatch(call, dispatch)?;
        let selections = self.selections(call, (&dispatch.topk_idx, dispatch.top_k), rows.count)?;
        self.calls += 1;
        let sent = self.send_tokens(&words, cast, &rows, &selections);
        let round = self.remember(sent)?;
        Ok(SentDispatch { sent: Sent::Host(round), words, cast })
    }

    /// Checks all but the selections.
    fn check_dispatch<'b>(
        &mut self,
        call: &'static str,
        dispatch: &LowLatencyDispatch<'b>,
    ) -> Result<(CallWords, Rows<'b>)> {
        self.ready_to_send(call, dispatch.stream)?;
        let rows = self.low_latency_rows(call, &dispatch.x)?;
        let hidden = self.settings.hidden;
        if dispatch.cast == Some(ScaleKind::Ue8m0) && !hidden.is_multiple_of(BLOCK * PACKED) {
            let expected = format!("a multiple of {} for UE8M0 scales", BLOCK * PACKED);
            return Err(self.refuse(call, "hidden", expected, hidden));
        }
        let mut words = CallWords::new(Operation::LowLatencyDispatch, self.calls + 1, rows.dtype);
        (words.top_k, words.tokens) = (dispatch.top_k, rows.count);
        words.cast = dispatch.cast.map_or(0, |kind| kind as u8 + 1);
        Ok((words, rows))
    }

    /// The second half: waits for what the others sent. Calls are received in the order in which they were sent.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if an earlier one was not received; the others as [`Buffer::dispatch`].
    pub fn receive_dispatch(&mut self, sent: SentDispatch) -> Result<LowLatencyDispatched> {
        self.ready_to_receive("receive_dispatch", &sent.sent)?;
        match &sent.sent {
            Sent::Host(round) => {
                let received = self.receive_tokens(*round, &sent);
                self.remember(received)
            }
            #[cfg(feature = "cuda")]
            Sent::Device(other_half) => {
                let stream = Stream::from(other_half.stream().clone());
                let how = (Phases::Receive, Some(&stream));
                let (_, dispatched) = self.put_dispatch(&sent.words, &other_half.inputs, how)?;
                Ok(dispatched.unwrap_or_else(|| unreachable!("this half receives")))
            }
        }
    }

    pub(super) fn ready_to_send(&mut self, call: &'static str, stream: Option<&Stream>) -> Result<()> {
        self.reachable(call, stream)?;
        let open = self.open_calls();
        if !self.settings.low_latency {
            return Err(self.refuse(call, "settings", "low_latency".to_owned(), "none"));
        }
        if open >= MOST_OPEN {
            let expected = format!("fewer than {MOST_OPEN} that are sent and not received");
            return Err(self.refuse(call, "low-latency calls", expected, open));
        }
        Ok(())
    }

    /// Checks that calls can be made in the order of `stream`.
    pub(super) fn reachable(&mut self, call: &'static str, stream: Option<&Stream>) -> Result<()> {
        #[cfg(feature = "cuda")]
        if self.place() != Place::Host {
            self.available_on_gpu(call)?;
            return self.check_stream(call, stream);
        }
        self.check_stream(call, stream)?;
        self.available(call).map(drop)
    }

    /// Calls that are sent and not received.
    fn open_calls(&self) -> usize {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &self.gpu {
            return gpu.open_calls();
        }
        self.arena.as_ref().map_or(0, Arena::open_rounds)
    }

    pub(super) fn ready_to_receive(&mut self, call: &'static str, sent: &Sent) -> Result<()> {
        let is_next = match sent {
            Sent::Host(round) => self.available(call)?.is_next(*round),
            #[cfg(feature = "cuda")]
            Sent::Device(sent) => self.available_on_gpu(call)?.is_next(sent),
        };
        if is_next {
            return Ok(());
        }
        let expected = "the first of this buffer that is not received".to_owned();
        Err(self.refuse(call, "call", expected, "another one"))
    }

    fn low_latency_rows<'b>(&self, call: &'static str, x: &Input<'b>) -> Result<Rows<'b>> {
        let rows = self.rows(call, &Tokens::new(*x))?;
        if !is_summed(rows.dtype) {
            return Err(self.refuse(call, "dtype", "bf16, f16 or f32".to_owned(), rows.dtype));
        }
        if rows.count > self.settings.capacity {
            let expected = format!("at most {}, the capacity", self.settings.capacity);
            return Err(self.refuse(call, "tokens", expected, rows.count));
        }
        Ok(rows)
    }

    /// Checks the top-k indices of `tokens`.
    pub(super) fn selections(
        &self,
        call: &'static str,
        (topk_idx, top_k): (&Input<'_>, usize),
        tokens: usize,
    ) -> Result<Vec<i64>> {
        self.check_top_k(call, top_k)?;
        let bytes = self.exactly((call, "topk_idx"), topk_idx, (DType::I64, tokens * top_k))?.bytes;
        let selections = indices(bytes);
        self.route(call, &selections, top_k)?;
        for (token, row) in selections.chunks_exact(top_k).enumerate() {
            let is_again = |(at, expert): (usize, &i64)| *expert != -1 && row[..at].contains(expert);
            if row.iter().enumerate().any(is_again) {
                let expected = "each expert at most once for a token".to_owned();
                return Err(self.refuse(call, "topk_idx", expected, format!("{row:?} for token {token}")));
            }
        }
        Ok(selections)
    }

    fn send_tokens(
        &mut self,
        words: &CallWords,
        cast: Option<ScaleKind>,
        rows: &Rows<'_>,
        selections: &[i64],
    ) -> Result<Round> {
        let during = words.during();
        let hidden = self.settings.hidden;
        let arena = self.available(words.operation.name())?;
        let round = arena.begin(Lane::Data, &during)?;
        let (layout, fields) = (arena.layout(), &arena.layout().data[round.half]);
        arena.write(fields.indices.offset, bytes_of(selections));
        let (mut codes, mut scales) = (vec![0; hidden], vec![0f32; blocks(hidden)]);
        let is_sent = |token: &usize| {
            selections[token * words.top_k..][..words.top_k].iter().any(|selection| *selection >= 0)
        };
        for token in (0..rows.count).filter(is_sent) {
            let target = fields.rows.offset + token * layout.row_stride;
            match cast {
                None => arena.write(target, rows.row(token)),
                Some(kind) => {
                    cast_row(rows.dtype, rows.row(token), kind, &mut codes, &mut scales);
                    arena.write(target, &codes);
                    arena.write(fields.scales.offset + token * scales.len() * 4, bytes_of(&scales));
                }
            }
        }
        arena.publish(round, words, &during)?;
        Ok(round)
    }

    fn receive_tokens(&mut self, round: Round, sent: &SentDispatch) -> Result<LowLatencyDispatched> {
        let SentDispatch { words, cast, .. } = sent;
        let during = words.during();
        let (rank, ranks, hidden) = (self.rank, self.world_size, self.settings.hidden);
        let (placement, capacity) = (self.placement.clone(), self.settings.capacity);
        let experts = placement.local_experts(rank);
        let block = ranks * capacity;
        let mut received = Received::new(words.dtype, *cast, (experts, block, hidden));
        let mut ranges = vec![(0, 0); experts * ranks];
        let arena = self.available(words.operation.name())?;
        let gathered = arena.gather(round, words, &during)?;
        for source in 0..ranks {
            received.counts.iter().enumerate().for_each(|(expert, count)| {
                ranges[expert * ranks + source].0 = *count as u32;
            });
            if gathered.present >> source & 1 == 0 {
                continue;
            }
            let tokens = gathered.calls[source].tokens;
            if tokens > capacity {
                return Err(arena.damaged(source, "it sends more tokens than its capacity", &during));
            }
            let mut selections = vec![0i64; tokens * words.top_k];
            let fields = &arena.layout().data[round.half];
            arena.read(source, fields.indices.offset, bytes_of_mut(&mut selections));
            for (at, selection) in selections.iter().enumerate() {
                let Some((owner, expert)) = placement.find(*selection) else { continue };
                if owner != rank {
                    continue;
                }
                if received.counts[expert] == block {
                    return Err(arena.damaged(source, "it selects an expert too often", &during));
                }
                received.take(arena, round, (source, at / words.top_k, expert));
                ranges[expert * ranks + source].1 += 1;
            }
        }
        arena.finish(round, &during)?;
        let Received { x, scales, counts, source_tokens, .. } = received;
        let handle = LowLatencyHandle(Arc::new(Origins {
            call: words.number,
            top_k: words.top_k,
            tokens: words.tokens,
            places: Places::Host(HostOrigins { rows: block, source_tokens, ranges }),
        }));
        let counts: Vec<i32> = counts.iter().map(|count| *count as i32).collect();
        let counts = Tensor::of(&counts, &[experts]);
        Ok(LowLatencyDispatched { x, scales, counts, waited: gathered.waited(), handle })
    }
}

/// The same on GPUs, where kernels find out what is wrong with selections.
#[cfg(feature = "cuda")]
impl Buffer {
    fn dispatch_inputs(&mut self, dispatch: &LowLatencyDispatch<'_>) -> Result<(CallWords, Inputs)> {
        let call = "low_latency_dispatch";
        let (words, rows) = self.check_dispatch(call, dispatch)?;
        self.check_top_k(call, words.top_k)?;
        let count = (DType::I64, words.tokens * words.top_k);
        let selections = self.exactly((call, "topk_idx"), &dispatch.topk_idx, count)?.address;
        Ok((words, Inputs { x: rows.lent.address, selections, weights: 0 }))
    }

    fn put_dispatch(
        &mut self,
        words: &CallWords,
        inputs: &Inputs,
        (phases, stream): (Phases, Option<&Stream>),
    ) -> Result<(SentOnGpu, Option<LowLatencyDispatched>)> {
        let (gpu, stream) = self.on_gpu(words.operation.name(), stream)?;
        let put = gpu.low_latency_dispatch(words, inputs, (phases, stream));
        let has_sent = gpu.has_sent();
        self.count_call(words, has_sent);
        let (sent, arrived) = self.remember_failures(put)?;
        let (call, top_k, tokens) = (words.number, words.top_k, words.tokens);
        let dispatched = arrived.map(|arrived| LowLatencyDispatched {
            x: arrived.x,
            scales: arrived.scales,
            counts: arrived.counts,
            waited: arrived.waited,
            handle: LowLatencyHandle(Arc::new(Origins {
                call,
                top_k,
                tokens,
                places: Places::Device(arrived.origins),
            })),
        });
        Ok((sent, dispatched))
    }

    /// Counts a call that peers know of, or will: with its first half.
    pub(super) fn count_call(&mut self, words: &CallWords, has_sent: bool) {
        self.calls += u64::from(has_sent && words.number > self.calls);
    }

    /// Refuses to receive at once what is sent, while other calls were sent and not received.
    pub(super) fn ready_for_whole(&self, call: &'static str) -> Result<()> {
        match self.open_calls() {
            0 => Ok(()),
            open => {
                let expected = "none that is sent and not received".to_owned();
                Err(self.refuse(call, "low-latency calls", expected, open))
            }
        }
    }

    /// The GPU's side, and the stream of a call that was checked.
    pub(super) fn on_gpu<'s>(
        &mut self,
        call: &'static str,
        stream: Option<&'s Stream>,
    ) -> Result<(&mut OnGpu, &'s unisono_cuda::Stream)> {
        let Some(stream) = stream.and_then(Stream::as_cuda) else {
            return Err(self.refuse(call, "stream", "one of its GPU".to_owned(), "none"));
        };
        Ok((self.available_on_gpu(call)?, stream))
    }
}

/// The blocks of the local experts, as they fill.
struct Received {
    x: Tensor,
    scales: Option<Tensor>,
    counts: Vec<usize>,
    source_tokens: Vec<i32>,
    block: usize,
    cast: Option<ScaleKind>,
    row_scales: Vec<f32>,
}

impl Received {
    fn new(dtype: DType, cast: Option<ScaleKind>, (experts, block, hidden): (usize, usize, usize)) -> Self {
        let dtype = if cast.is_some() { DType::F8E4M3 } else { dtype };
        let row_scales = vec![0f32; cast.map_or(0, |_| blocks(hidden))];
        let scales = cast.map(|kind| match kind {
            ScaleKind::Ue8m0 => Tensor::zeros(DType::I32, &[experts, row_scales.len() / PACKED, block]),
            _ => Tensor::zeros(DType::F32, &[experts, row_scales.len(), block]),
        });
        Self {
            x: Tensor::zeros(dtype, &[experts, block, hidden]),
            scales,
            counts: vec![0; experts],
            source_tokens: vec![0; experts * block],
            block,
            cast,
            row_scales,
        }
    }

    /// Copies `token` of `source` to the next row of `expert`.
    fn take(&mut self, arena: &Arena, round: Round, (source, token, expert): (usize, usize, usize)) {
        let (layout, fields) = (arena.layout(), &arena.layout().data[round.half]);
        let place = self.counts[expert];
        self.counts[expert] += 1;
        let row = expert * self.block + place;
        self.source_tokens[row] = token as i32;
        let bytes = self.x.row_bytes() / self.block;
        let target = &mut self.x.bytes_mut()[row * bytes..][..bytes];
        arena.read(source, fields.rows.offset + token * layout.row_stride, target);
        let Some(scales) = &mut self.scales else { return };
        let from = fields.scales.offset + token * self.row_scales.len() * 4;
        arena.read(source, from, bytes_of_mut(&mut self.row_scales));
        let mut put = |columns: usize, column: usize, word: [u8; 4]| {
            let at = (expert * columns + column) * self.block + place;
            scales.bytes_mut()[at * 4..][..4].copy_from_slice(&word);
        };
        if self.cast == Some(ScaleKind::Ue8m0) {
            let columns = self.row_scales.len() / PACKED;
            for (column, four) in self.row_scales.chunks_exact(PACKED).enumerate() {
                put(columns, column, pack(four).to_ne_bytes());
            }
        } else {
            let columns = self.row_scales.len();
            for (column, scale) in self.row_scales.iter().enumerate() {
                put(columns, column, scale.to_ne_bytes());
            }
        }
    }
}
