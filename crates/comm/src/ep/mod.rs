//! Expert parallelism: tokens go to the ranks that own their experts, and results come back.
//!
//! A [`Buffer`] is made over a communicator, [exchanged](Buffer::exchange) once by all ranks, and then used in either of two modes.
//!
//! *Throughput* (prefill, training): [`Buffer::dispatch`] sends each token once to every rank that has one of its experts; rows arrive ordered by
//! source rank, then by token. [`Buffer::combine`] adds up what came of each token. [`Buffer::dispatch_cached`] repeats a dispatch by its handle;
//! so the backward pass of a dispatch is a combine, and that of a combine a cached dispatch.
//!
//! *Low latency* (decode): [`Buffer::low_latency_dispatch`] gives a block of rows for each local expert, cast to 8 bits on the way if asked for, and
//! [`Buffer::low_latency_combine`] the weighted sum. Both can be split into a sending and a receiving half.
//!
//! ```
//! use unisono::ep::{Buffer, Combine, Dispatch, Settings};
//! use unisono::{Communicator, half::bf16};
//! # let ranks = Communicator::threads(2)?;
//! # let ranks: Vec<_> = ranks.into_iter().map(|rank| std::thread::spawn(move || {
//! // Two ranks, 64 elements in a token, four experts: rank 0 has experts 0 and 1.
//! let mut buffer = Buffer::new(&rank, Settings::new(64, 4))?;
//! buffer.exchange(&rank)?;
//! // One token, for experts 1 and 3.
//! let x = vec![bf16::from_f32(1.5); 64];
//! let sent = buffer.dispatch(&Dispatch::new(&x).top_k(&[1, 3], 2))?;
//! // One from each rank. Every expert doubles its token.
//! assert_eq!(sent.x.shape(), [2, 64]);
//! let results: Vec<bf16> = sent.x.as_slice::<bf16>()?.iter().map(|x| *x * bf16::from_f32(2.0)).collect();
//! let combined = buffer.combine(&Combine::new(&results, &sent.handle))?;
//! assert_eq!(combined.x.as_slice::<bf16>()?, [bf16::from_f32(6.0); 64]);
//! buffer.close(&rank)?;
//! # rank.destroy() })).collect();
//! # for rank in ranks { rank.join().unwrap()?; }
//! # Ok::<(), unisono::Error>(())
//! ```
//!
//! # Which ranks call
//! All ranks make the same calls in the same order, with the same dtype, top-k, numbers of scales and options; numbers of tokens are each
//! rank's own, zero included. Ranks that differ get [`Error::Mismatch`], which names both calls. What does not fit locally is
//! [`Error::Argument`] before anything is sent, and the buffer still works; but the others wait for this rank then, up to the deadline.
//!
//! # Numbers
//! Sums are made in f32, in the order of ranks, and rounded once. Equal input gives equal bits on every backend ([`mod@reference`] holds the
//! arithmetic).
//!
//! # Failures
//! A rank that died, or is silent for longer than [`Settings::deadline`], fails the communicator, and the error names it. With
//! [`Settings::masking`] it is left out instead: all survivors leave it out from the same round on, the call completes without its tokens, and
//! [`Buffer::masked`] names it. That is no failure of the buffer; the communicator itself has failed by a death all the same, for its
//! other operations.
//!
//! This release works on host memory. On a communicator with GPUs [`Buffer::new`] answers [`Error::Device`], and memory or streams of GPUs
//! get [`Error::Place`].

mod arena;
mod arguments;
mod incoming;
mod low_latency;
mod low_latency_combine;
mod settings;
mod tensor;
mod throughput;
mod throughput_combine;
mod words;

use std::sync::Arc;

/// The arithmetic and the order of expert parallelism, as pure functions: what every backend is compared with.
pub use unisono_core::ep as reference;
pub use unisono_core::ep::cast::ScaleKind;
use unisono_core::ep::{ArenaLayout, Placement, Routing};

use crate::buffer::Buf;
use crate::communicator::Communicator;
use crate::control::Control;
use crate::error::{Error, Result};
use crate::operations::Operations;
use arena::Arena;
pub use arguments::{RowScales, Tokens};
pub use low_latency::{LowLatencyDispatch, LowLatencyDispatched, LowLatencyHandle, SentDispatch};
pub use low_latency_combine::{LowLatencyCombine, LowLatencyCombined, SentCombine};
pub use settings::Settings;
pub use tensor::{Input, Tensor};
pub use throughput::{CachedDispatch, Dispatch, Dispatched, Handle};
pub use throughput_combine::{Combine, Combined};

/// Moves tokens to experts and results back. One thread uses it at a time.
///
/// It works as long as its communicator is there; a communicator that was shrunk needs a new one ([`Error::Generation`]).
#[derive(Debug)]
pub struct Buffer {
    settings: Settings,
    placement: Arc<Placement>,
    layout: ArenaLayout,
    control: Arc<Control>,
    rank: usize,
    world_size: usize,
    arena: Option<Arena>,
    /// Calls begun.
    calls: u64,
    failed: Option<Error>,
    /// Where callers may put what they combine.
    staged: Option<Tensor>,
}

/// Where the tokens of this rank go. Made by [`Buffer::layout`].
#[derive(Clone, PartialEq, Debug)]
pub struct Layout {
    pub(crate) routing: Arc<Routing>,
    world_size: usize,
}

impl Layout {
    /// i32 `[ranks]`: tokens to each rank; one that several experts of a rank take counts once.
    pub fn tokens_per_rank(&self) -> Tensor {
        counts(&self.routing.tokens_per_rank)
    }

    /// i32 `[experts]`: selections of each expert.
    pub fn tokens_per_expert(&self) -> Tensor {
        counts(&self.routing.tokens_per_expert)
    }

    /// bool `[tokens, ranks]`: which token goes to which rank.
    pub fn is_token_in_rank(&self) -> Tensor {
        is_token_in_rank(&self.routing.destinations, self.world_size)
    }
}

fn counts(counts: &[u32]) -> Tensor {
    let counts: Vec<i32> = counts.iter().map(|count| *count as i32).collect();
    Tensor::of(&counts, &[counts.len()])
}

fn is_token_in_rank(destinations: &[u64], world_size: usize) -> Tensor {
    let mut tensor = Tensor::zeros(unisono_core::DType::Bool, &[destinations.len(), world_size]);
    for (row, ranks) in tensor.bytes_mut().chunks_exact_mut(world_size).zip(destinations) {
        row.iter_mut().enumerate().for_each(|(rank, is_sent)| *is_sent = (ranks >> rank & 1) as u8);
    }
    tensor
}

impl Buffer {
    /// A buffer of this rank for `communicator`. Tells nobody, and allocates nothing.
    ///
    /// # Errors
    /// [`Error::Argument`] if the settings do not fit together, or the world has more than 64 ranks; [`Error::Device`] if the communicator
    /// works on GPUs.
    pub fn new(communicator: &Communicator, settings: Settings) -> Result<Self> {
        let (rank, world_size) = (communicator.rank(), communicator.world_size());
        let (layout, placement) = settings.check("ep::Buffer::new", rank, world_size)?;
        #[cfg(feature = "cuda")]
        if communicator.device().is_some() {
            let reason =
                "an ep::Buffer works on host memory in this release, with communicators that have no GPU";
            return Err(Error::Device { rank, reason: reason.to_owned() });
        }
        Ok(Self {
            settings,
            placement: Arc::new(placement),
            layout,
            control: communicator.control.clone(),
            rank,
            world_size,
            arena: None,
            calls: 0,
            failed: None,
            staged: None,
        })
    }

    /// Makes the buffer available: compares settings and shares memory. Collective: every rank calls it, once.
    ///
    /// # Errors
    /// [`Error::BufferSettings`] on all ranks, naming one whose settings differ; [`Error::BufferState`] if this buffer has been exchanged;
    /// [`Error::Argument`] if `communicator` is not the one that it was made for; as [`Communicator::window`].
    pub fn exchange(&mut self, communicator: &Communicator) -> Result<()> {
        if self.arena.is_some() || self.failed.is_some() {
            return Err(self.wrong_state("exchange", "was not exchanged", "is available already"));
        }
        self.check_owner("exchange", communicator)?;
        let mine = self.settings.words(&self.placement);
        let mut all = vec![0u64; mine.len() * self.world_size];
        communicator.all_gather_into(&mine.map(|(_, value)| value), &mut all)?;
        let all: Vec<Vec<u64>> = all.chunks(mine.len()).map(<[u64]>::to_vec).collect();
        if let Some((what, rank, got, expected)) = settings::difference(&mine.map(|(name, _)| name), &all) {
            let (got, expected) = (settings::value(what, got), settings::value(what, expected));
            return Err(Error::BufferSettings { what, rank, got, expected });
        }
        let how = (self.settings.masking, self.settings.deadline);
        self.arena = Some(Arena::make(communicator, self.layout, how)?);
        Ok(())
    }

    /// Ends the buffer on all ranks and frees its memory. Collective. Dropping it instead keeps the memory until the communicator is gone, on
    /// the others too.
    ///
    /// # Errors
    /// [`Error::Argument`] if `communicator` is not the one that it was made for; those of a failed communicator, after which this rank's hold on
    /// the memory has ended all the same.
    pub fn close(mut self, communicator: &Communicator) -> Result<()> {
        self.check_owner("close", communicator)?;
        self.arena.take().map_or(Ok(()), |arena| arena.close(communicator))
    }

    /// Whether it was exchanged and can be used.
    pub const fn is_available(&self) -> bool {
        self.arena.is_some() && self.failed.is_none()
    }

    /// The settings that it was made with.
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Experts of this rank, by their numbers in the world, in the order of their local numbers.
    pub fn local_experts(&self) -> Vec<usize> {
        self.placement.experts_of(self.rank).collect()
    }

    /// Ranks that are left out, ascending. After a call that all survivors made, they all say the same. Empty without masking.
    pub fn masked(&self) -> Vec<usize> {
        let masked = self.arena.as_ref().map_or(0, Arena::masked);
        (0..self.world_size).filter(|rank| masked >> rank & 1 == 1).collect()
    }

    /// Leaves `rank` out from the next round that it has not sent on all ranks: for who knows of a failure otherwise. One rank has to call it. The
    /// rank itself gets [`Error::GivenUp`] at its next call. It cannot be undone; a new buffer on a new communicator takes everybody in.
    ///
    /// # Errors
    /// [`Error::Argument`] without masking, if it is no other rank of the world; [`Error::BufferState`] before the exchange.
    pub fn mask_rank(&mut self, rank: usize) -> Result<()> {
        let call = "mask_rank";
        if !self.settings.masking {
            return Err(self.refuse(call, "settings", "masking".to_owned(), "none"));
        }
        if rank >= self.world_size || rank == self.rank {
            return Err(self.refuse(call, "rank", format!("another one below {}", self.world_size), rank));
        }
        self.available(call)?.mask(rank);
        Ok(())
    }

    /// Where tokens go: `topk_idx` is tokens × `top_k`, each an expert or −1, which selects nothing. Local: nobody is told.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is another index or the rows do not fit; [`Error::BufferState`] before the exchange.
    pub fn layout<'b>(&mut self, topk_idx: impl Into<Buf<'b, i64>>, top_k: usize) -> Result<Layout> {
        let (call, input) = ("layout", Input::from(topk_idx.into()));
        self.available(call)?;
        self.check_top_k(call, top_k)?;
        let raw = input.raw();
        let bytes = self.exactly((call, "topk_idx"), &input, (unisono_core::DType::I64, raw.count))?;
        self.route(call, &arguments::indices(bytes), top_k)
    }

    fn route(&self, call: &'static str, selections: &[i64], top_k: usize) -> Result<Layout> {
        let routing = Routing::of(selections, top_k, &self.placement)
            .map_err(|error| settings::argument(call, self.rank, "topk_idx", error))?;
        Ok(Layout { routing: Arc::new(routing), world_size: self.world_size })
    }

    /// The arena, if a call can be made on it.
    fn available(&mut self, call: &'static str) -> Result<&mut Arena> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let needs = ("all ranks have exchanged", "is only constructed");
        let state = self.wrong_state(call, needs.0, needs.1);
        let Some(arena) = &mut self.arena else { return Err(state) };
        if let Err(error) = arena.check(call) {
            self.failed = Some(error.clone());
            return Err(error);
        }
        Ok(arena)
    }

    /// A failure of a call that had begun is final.
    fn remember<T>(&mut self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.failed = Some(error.clone());
        }
        result
    }

    fn wrong_state(&self, call: &'static str, expected: &'static str, got: &'static str) -> Error {
        Error::BufferState { call, rank: self.rank, expected, got }
    }

    fn check_owner(&self, call: &'static str, communicator: &Communicator) -> Result<()> {
        if Arc::ptr_eq(&self.control, &communicator.control) {
            return Ok(());
        }
        Err(self.refuse(
            call,
            "communicator",
            "the one that the buffer was made for".to_owned(),
            "another one",
        ))
    }
}
