//! Dispatch: every token goes once to each rank that has one of its experts.
//!
//! In the first round each rank says how many tokens it has for whom, and in every round it stages as many as there is room for. Receivers copy
//! their rows from all sources, in order of source and token, straight to where they stay. A token is staged once, whoever takes it.

use std::sync::Arc;

use unisono_core::DType;
use unisono_core::ep::{Routing, source_prefix};

use super::arena::{Arena, Lane, Round};
use super::arguments::{Rows, Tokens, indices};
use super::handle::{Handle, HostRoutes, Routes, Ways};
use super::incoming::{Incoming, Told, read_counts, receive};
use super::tensor::{Input, Tensor, bytes_of};
use super::words::{CallWords, Operation};
use super::{Buffer, Layout, Routed};
use crate::buffer::Buf;
#[cfg(feature = "cuda")]
use crate::buffer::Place;
#[cfg(feature = "cuda")]
use crate::error::Error;
use crate::error::Result;
use crate::stream::Stream;

/// Tokens to be dispatched, and where they go: by top-k indices, by a [`Layout`], or by both.
#[derive(Clone, Debug)]
pub struct Dispatch<'b> {
    tokens: Tokens<'b>,
    selections: Option<(Input<'b>, usize)>,
    weights: Option<Input<'b>>,
    layout: Option<&'b Layout>,
    alignment: usize,
    worst_tokens: Option<usize>,
    multiprocessors: Option<u32>,
    stream: Option<&'b Stream>,
}

impl<'b> Dispatch<'b> {
    /// `x` is tokens × hidden, bf16, f16, f32 or f8e4m3 (no wider than [`Settings::dtype`](super::Settings::dtype)), with scales if it is a [`Tokens::scaled`].
    pub fn new(x: impl Into<Tokens<'b>>) -> Self {
        Self {
            tokens: x.into(),
            selections: None,
            weights: None,
            layout: None,
            alignment: 1,
            worst_tokens: None,
            multiprocessors: None,
            stream: None,
        }
    }

    /// The experts of each token: i64, tokens × `top_k`; −1 selects nothing.
    pub fn top_k(mut self, topk_idx: impl Into<Buf<'b, i64>>, top_k: usize) -> Self {
        self.selections = Some((topk_idx.into().into(), top_k));
        self
    }

    /// The weight of each selection: f32, tokens × top-k.
    pub fn weights(mut self, topk_weights: impl Into<Buf<'b, f32>>) -> Self {
        self.weights = Some(topk_weights.into().into());
        self
    }

    /// Where tokens go, if that is known already: it is not computed again.
    pub const fn layout(mut self, layout: &'b Layout) -> Self {
        self.layout = Some(layout);
        self
    }

    /// Rounds [`Dispatched::tokens_per_expert`] up to multiples of `alignment`.
    pub const fn expert_alignment(mut self, alignment: usize) -> Self {
        self.alignment = alignment;
        self
    }

    /// Outputs have `rows` rows, however many come, and so have those of everything that the handle is used for: nobody has to wait until the
    /// number is known. [`Dispatched::tokens_per_expert`] is empty, and rows behind the last have index −1, weight 0 and unspecified elements.
    pub const fn worst_tokens(mut self, rows: usize) -> Self {
        self.worst_tokens = Some(rows);
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

/// Other tokens that go the way of an earlier dispatch.
#[derive(Clone, Debug)]
pub struct CachedDispatch<'b> {
    tokens: Tokens<'b>,
    handle: &'b Handle,
    multiprocessors: Option<u32>,
    stream: Option<&'b Stream>,
}

impl<'b> CachedDispatch<'b> {
    /// `x` as in [`Dispatch::new`], as many tokens as the dispatch of `handle` had.
    pub fn new(x: impl Into<Tokens<'b>>, handle: &'b Handle) -> Self {
        Self { tokens: x.into(), handle, multiprocessors: None, stream: None }
    }

    /// As [`Dispatch::multiprocessors`].
    pub const fn multiprocessors(mut self, count: u32) -> Self {
        self.multiprocessors = Some(count);
        self
    }

    /// As [`Dispatch::on`].
    pub const fn on(mut self, stream: &'b Stream) -> Self {
        self.stream = Some(stream);
        self
    }
}

/// What a dispatch brought: N rows.
#[derive(Clone, Debug)]
pub struct Dispatched {
    /// `[N, hidden]`, of the type that was sent: by source rank, then by the token's index there.
    pub x: Tensor,
    /// `[N, scales of a token]`, if scales were sent.
    pub scales: Option<Tensor>,
    /// i64 `[N, top_k]`: the expert's number on this rank, −1 where it lives elsewhere. `None` if no indices were sent.
    pub topk_idx: Option<Tensor>,
    /// f32 `[N, top_k]`: 0 where the expert lives elsewhere. `None` if no weights were sent.
    pub topk_weights: Option<Tensor>,
    /// Selections of each expert of this rank, rounded up to the alignment. Empty with [`Dispatch::worst_tokens`].
    pub tokens_per_expert: Vec<usize>,
    /// For combine, and for doing the same again.
    pub handle: Handle,
}

/// What is sent, checked.
struct Outgoing<'a> {
    rows: Rows<'a>,
    routing: &'a Routing,
    selections: Option<&'a [i64]>,
    weights: Option<&'a [u8]>,
}

impl Buffer {
    /// Sends tokens to the ranks of their experts, and returns when those for this rank are there. Every rank calls it, with any number of
    /// tokens of its own.
    ///
    /// Deterministic: rows are ordered by source rank, then by token. A token that names an expert twice counts twice for it. Tokens of a rank
    /// that is masked during the call count as none, on all ranks.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if shapes or dtypes do not fit, or neither indices nor a layout are given, before anything is sent; and if more
    /// rows came than [`Dispatch::worst_tokens`], after the others have been served: the buffer still works.
    /// [`crate::Error::BufferState`] before the exchange; [`crate::Error::Mismatch`], [`crate::Error::PeerDied`] and [`crate::Error::Timeout`] as
    /// in [`ep`](super); [`crate::Error::GivenUp`] if this rank was masked.
    pub fn dispatch(&mut self, dispatch: &Dispatch<'_>) -> Result<Dispatched> {
        let call = "dispatch";
        self.ready(call, dispatch.stream)?;
        let rows = self.rows(call, &dispatch.tokens)?;
        let top_k = dispatch.selections.map_or(0, |(_, top_k)| top_k);
        let selections = match &dispatch.selections {
            None => None,
            Some((input, top_k)) => {
                self.check_top_k(call, *top_k)?;
                let count = (DType::I64, rows.count * top_k);
                Some(self.exactly((call, "topk_idx"), input, count)?)
            }
        };
        let weights = match (&dispatch.weights, &selections) {
            (None, _) => None,
            (Some(weights), Some(_)) => {
                Some(self.exactly((call, "topk_weights"), weights, (DType::F32, rows.count * top_k))?)
            }
            (Some(_), None) => {
                return Err(self.refuse(call, "topk_weights", "none without topk_idx".to_owned(), "some"));
            }
        };
        if dispatch.layout.is_none() && selections.is_none() {
            return Err(self.refuse(call, "topk_idx", "indices or a layout".to_owned(), "neither"));
        }
        if dispatch.alignment == 0 {
            return Err(self.refuse(call, "expert_alignment", "at least 1".to_owned(), 0));
        }
        let mut words = CallWords::new(Operation::Dispatch, self.calls + 1, rows.dtype);
        (words.top_k, words.scales, words.tokens) = (top_k, rows.scales(), rows.count);
        words.has_weights = weights.is_some();
        #[cfg(feature = "cuda")]
        if self.place() != Place::Host {
            let lent = (selections.map(|lent| lent.address), weights.map(|lent| lent.address));
            return self.dispatch_on_gpu(dispatch, &words, &rows, lent);
        }
        let selections = selections.map(|lent| indices(lent.bytes));
        let routing = match (dispatch.layout.map(|layout| &layout.routing), &selections) {
            (Some(Routed::Host(routing)), _) => routing.clone(),
            (None, Some(selections)) => self.route(call, selections, top_k)?,
            _ => return Err(self.refuse(call, "layout", "one of this buffer".to_owned(), "one of a GPU")),
        };
        let fits = routing.tokens_per_rank.len() == self.world_size
            && routing.tokens_per_expert.len() == self.placement.experts();
        if routing.destinations.len() != rows.count || !fits {
            let expected = format!("{} tokens of this buffer", rows.count);
            return Err(self.refuse(call, "layout", expected, routing.destinations.len()));
        }
        let weights = weights.map(|lent| lent.bytes);
        let outgoing = Outgoing { rows, routing: &routing, selections: selections.as_deref(), weights };
        self.calls += 1;
        let moved = self.send_and_receive(&words, &outgoing, None);
        let (mut incoming, mut told) = self.remember(moved)?;
        if let Some(rows) = dispatch.worst_tokens {
            let came = incoming.source_tokens.len();
            if came > rows {
                let expected = format!("at least {came}, as many as came");
                return Err(self.refuse(call, "worst_tokens", expected, rows));
            }
            incoming.extend(rows)?;
            told.tokens_per_expert.clear();
        }
        let Incoming { x, scales, indices: topk_idx, weights: topk_weights, starts, source_tokens, .. } =
            incoming;
        let (prefix, most_tokens) = (source_prefix(&told.counts), told.most_tokens);
        let call = self.calls;
        let routes = HostRoutes { routing, starts, source_tokens, prefix, most_tokens };
        let routes = Routes { call, top_k, ranks: self.world_size, ways: Ways::Host(routes) };
        let handle = Handle(Arc::new(routes));
        let tokens_per_expert = aligned(told.tokens_per_expert, dispatch.alignment);
        Ok(Dispatched { x, scales, topk_idx, topk_weights, tokens_per_expert, handle })
    }

    /// The same by kernels, of what was checked.
    #[cfg(feature = "cuda")]
    fn dispatch_on_gpu(
        &mut self,
        dispatch: &Dispatch<'_>,
        words: &CallWords,
        rows: &Rows<'_>,
        (selections, weights): (Option<u64>, Option<u64>),
    ) -> Result<Dispatched> {
        let call = words.operation.name();
        let (Some(gpu), Some(stream)) = (&self.gpu, dispatch.stream.and_then(Stream::as_cuda)) else {
            unreachable!("streams and buffers were checked")
        };
        let routing = match dispatch.layout.map(|layout| &layout.routing) {
            None => None,
            Some(Routed::Device(routing)) if routing.is_of(gpu) && routing.tokens == rows.count => {
                Some(routing.clone())
            }
            Some(_) => {
                let expected = format!("one of {} tokens of this buffer", rows.count);
                return Err(self.refuse(call, "layout", expected, "another one"));
            }
        };
        if let Some(worst) = dispatch.worst_tokens.filter(|worst| *worst > i32::MAX as usize) {
            return Err(self.refuse(call, "worst_tokens", "below 2³¹".to_owned(), worst));
        }
        self.check_address(call, rows)?;
        let outgoing = super::gpu::Outgoing { selections, weights, top_k: words.top_k, ..rows.outgoing() };
        let wanted = super::gpu::Wanted {
            worst_tokens: dispatch.worst_tokens,
            multiprocessors: dispatch.multiprocessors,
        };
        let gpu = self.available_on_gpu(call)?;
        let moved = gpu.dispatch(words, &outgoing, (routing, &wanted), stream);
        let has_sent = gpu.has_sent();
        self.calls += u64::from(has_sent);
        let (came, routes, selected) = self.remember_failures(moved)?;
        let routes = Routes {
            call: words.number,
            top_k: words.top_k,
            ranks: self.world_size,
            ways: Ways::Device(routes),
        };
        Ok(Dispatched {
            x: came.x,
            scales: came.scales,
            topk_idx: came.indices,
            topk_weights: came.weights,
            tokens_per_expert: aligned(selected, dispatch.alignment),
            handle: Handle(Arc::new(routes)),
        })
    }

    /// Rows on GPUs move in units of 8 bytes at least.
    #[cfg(feature = "cuda")]
    fn check_address(&self, call: &'static str, rows: &Rows<'_>) -> Result<()> {
        let address = rows.lent.address;
        if address.is_multiple_of(8) {
            return Ok(());
        }
        Err(self.refuse(call, "x", "on 8 bytes (faster on 16)".to_owned(), format!("{address:#x}")))
    }

    /// As [`Buffer::remember`], of calls that refuse what they find out late.
    #[cfg(feature = "cuda")]
    pub(super) fn remember_failures<T>(&mut self, result: Result<T>) -> Result<T> {
        match result {
            Err(error @ Error::Argument { .. }) => Err(error),
            result => self.remember(result),
        }
    }

    /// Sends other tokens the way of an earlier dispatch, whose handle every rank gives: `[N, hidden]` in the same order, and the scales if there
    /// are some. No counts are exchanged. Rows of ranks that were masked since then are zeros.
    ///
    /// # Errors
    /// As [`Buffer::dispatch`]; [`crate::Error::Argument`] if there are more or fewer tokens than the handle has.
    pub fn dispatch_cached(&mut self, dispatch: &CachedDispatch<'_>) -> Result<(Tensor, Option<Tensor>)> {
        let (call, handle) = ("dispatch_cached", dispatch.handle);
        self.ready(call, dispatch.stream)?;
        let rows = self.rows(call, &dispatch.tokens)?;
        self.check_handle(call, handle, handle.tokens(), ("tokens", rows.count))?;
        let mut words = CallWords::new(Operation::DispatchCached, self.calls + 1, rows.dtype);
        (words.scales, words.tokens, words.handle) = (rows.scales(), rows.count, handle.0.call);
        #[cfg(feature = "cuda")]
        if let (Some(routes), Some(stream)) =
            (handle.0.on_device(), dispatch.stream.and_then(Stream::as_cuda))
        {
            self.check_address(call, &rows)?;
            let gpu = self.available_on_gpu(call)?;
            let moved =
                gpu.dispatch_cached(&words, &rows.outgoing(), (routes, dispatch.multiprocessors), stream);
            let has_sent = gpu.has_sent();
            self.calls += u64::from(has_sent);
            let came = self.remember_failures(moved)?;
            return Ok((came.x, came.scales));
        }
        let routes = self.host_routes(call, handle)?;
        let outgoing = Outgoing { rows, routing: &routes.routing, selections: None, weights: None };
        self.calls += 1;
        let moved = self.send_and_receive(&words, &outgoing, Some(routes));
        let (incoming, _) = self.remember(moved)?;
        Ok((incoming.x, incoming.scales))
    }

    /// Whether a throughput call can begin.
    pub(super) fn ready(&mut self, call: &'static str, stream: Option<&Stream>) -> Result<()> {
        self.reachable(call, stream)?;
        // On GPUs they have memory of their own.
        let open = self.arena.as_ref().map_or(0, Arena::open_rounds);
        if open > 0 {
            let expected = "none that is sent and not received".to_owned();
            return Err(self.refuse(call, "low-latency calls", expected, open));
        }
        Ok(())
    }

    pub(super) fn check_handle(
        &self,
        call: &'static str,
        handle: &Handle,
        expected: usize,
        (what, got): (&'static str, usize),
    ) -> Result<()> {
        #[cfg(feature = "cuda")]
        let is_ours = match (handle.0.on_device(), &self.gpu) {
            (Some(routes), Some(gpu)) => routes.routing.is_of(gpu),
            (routes, gpu) => routes.is_none() && gpu.is_none(),
        };
        #[cfg(not(feature = "cuda"))]
        let is_ours = true;
        if handle.0.ranks != self.world_size || handle.0.call > self.calls || !is_ours {
            return Err(self.refuse(call, "handle", "one of this buffer".to_owned(), "another one's"));
        }
        if got == expected {
            return Ok(());
        }
        Err(self.refuse(call, what, format!("{expected}, as the handle has"), got))
    }

    /// What a handle holds on the host.
    pub(super) fn host_routes<'h>(&self, call: &'static str, handle: &'h Handle) -> Result<&'h HostRoutes> {
        let refused = || self.refuse(call, "handle", "one of the host".to_owned(), "one of a GPU");
        handle.0.on_host().ok_or_else(refused)
    }

    /// All rounds of a dispatch; with `known`, the layout of an earlier one.
    fn send_and_receive(
        &mut self,
        words: &CallWords,
        outgoing: &Outgoing<'_>,
        known: Option<&HostRoutes>,
    ) -> Result<(Incoming, Told)> {
        let during = words.during();
        let (experts, rank) = (self.placement.experts(), self.rank);
        let mine: Vec<usize> = self.placement.experts_of(rank).collect();
        let arena = self.available(words.operation.name())?;
        let chunk = arena.layout().rows;
        let mut told = Told { most_tokens: outgoing.rows.count, ..Told::default() };
        let mut incoming: Option<Incoming> = None;
        let mut turn = 0;
        loop {
            let round = arena.begin(Lane::Data, &during)?;
            let first = turn * chunk;
            stage(arena, round, words, outgoing, first);
            arena.publish(round, words, &during)?;
            let gathered = arena.gather(round, words, &during)?;
            let incoming = match &mut incoming {
                Some(incoming) => incoming,
                none => {
                    told = match known {
                        None => read_counts(arena, round, &gathered, experts, &during)?,
                        Some(known) => Told { most_tokens: known.most_tokens, ..told },
                    };
                    none.insert(Incoming::new(words, outgoing.rows.row_bytes, (rank, &told, known)))
                }
            };
            for source in (0..gathered.calls.len()).filter(|source| gathered.present >> source & 1 == 1) {
                let tokens = gathered.calls[source].tokens;
                let count = tokens.saturating_sub(first).min(chunk);
                receive(arena, round, incoming, (source, first, count, rank), words, &during)?;
            }
            arena.finish(round, &during)?;
            turn += 1;
            if turn * chunk >= told.most_tokens {
                let is_short = |source: &usize| {
                    gathered.present >> source & 1 == 1
                        && incoming.next[*source] < incoming.starts[source + 1]
                };
                if let Some(source) = (0..incoming.next.len()).find(is_short) {
                    return Err(arena.damaged(source, "it sends fewer tokens than it counted", &during));
                }
                told.keep(gathered.present, incoming, known.is_some(), words);
                break;
            }
        }
        let Some(mut incoming) = incoming else { unreachable!("there is at least one round") };
        told.count_experts(&mine);
        self.rebase(&mut incoming)?;
        Ok((incoming, told))
    }

    /// Turns the numbers of experts into those on this rank.
    fn rebase(&self, incoming: &mut Incoming) -> Result<()> {
        let Some(indices) = &mut incoming.indices else { return Ok(()) };
        let mut weights = incoming.weights.as_mut().map(Tensor::as_mut_slice::<f32>).transpose()?;
        for (at, index) in indices.as_mut_slice::<i64>()?.iter_mut().enumerate() {
            match self.placement.find(*index) {
                Some((owner, local)) if owner == self.rank => *index = local as i64,
                _ => {
                    *index = -1;
                    if let Some(weights) = &mut weights {
                        weights[at] = 0.0;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Counts of selections, rounded up.
fn aligned(counts: Vec<usize>, alignment: usize) -> Vec<usize> {
    counts.into_iter().map(|count| count.next_multiple_of(alignment)).collect()
}

/// Writes our tokens from `first` on into our half of the round.
fn stage(arena: &Arena, round: Round, words: &CallWords, outgoing: &Outgoing<'_>, first: usize) {
    let (layout, fields) = (arena.layout(), &arena.layout().data[round.half]);
    let Outgoing { rows, routing, selections, weights } = outgoing;
    if first == 0 {
        arena.write(fields.counts.offset, bytes_of(&routing.tokens_per_rank));
        let behind = fields.counts.offset + routing.tokens_per_rank.len() * 4;
        arena.write(behind, bytes_of(&routing.tokens_per_expert));
    }
    let end = rows.count.min(first + layout.rows);
    if first >= end {
        return;
    }
    let (top_k, scale_bytes) = (words.top_k, words.scales.0 * 4);
    arena.write(fields.destinations.offset, bytes_of(&routing.destinations[first..end]));
    let mut scales = vec![0; scale_bytes];
    for (at, token) in (first..end).enumerate().filter(|(_, token)| routing.destinations[*token] != 0) {
        arena.write(fields.rows.offset + at * layout.row_stride, rows.row(token));
        if scale_bytes > 0 {
            rows.copy_scales(token, &mut scales);
            arena.write(fields.scales.offset + at * scale_bytes, &scales);
        }
        if let Some(selections) = selections {
            let row = bytes_of(&selections[token * top_k..][..top_k]);
            arena.write(fields.indices.offset + at * top_k * 8, row);
        }
        if let Some(weights) = weights {
            let row = &weights[token * top_k * 4..][..top_k * 4];
            arena.write(fields.weights.offset + at * top_k * 4, row);
        }
    }
}
