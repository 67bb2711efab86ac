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
//! other operations. A rank that lives is taken in again by [`Buffer::renew`].
//!
//! # On GPUs
//! A buffer over a communicator with GPUs that reach each other's memory works on device memory: inputs are [`Buf::cuda`](crate::Buf::cuda), outputs tensors of its GPU, and
//! calls name a stream (`on`). They return when their kernels are enqueued; a dispatch also waits until it is known how many rows come,
//! unless it says so itself ([`Dispatch::worst_tokens`]), which CUDA graphs need. Results are undefined until a check finds no failure.
//!
//! A low-latency call is one kernel, or one for each half; between the halves nothing of it runs. It never waits on the host, so it can be
//! captured, and several buffers may be in one graph; each counts its calls on the device. Selections are looked at by kernels: one that is no
//! expert, or an expert that a token selects twice, is a failure of the communicator that names the rank and the token.
//!
//! Outputs come from a pool that peers write into ([`Settings::pool_bytes`]); what has no room there takes a way through staging and is copied,
//! and [`Buffer::explain`] says how often. Combine reads results where they lie if that is in the pool, so experts best write them over what
//! was dispatched.

mod arena;
mod arguments;
#[cfg(feature = "cuda")]
mod gpu;
mod handle;
mod incoming;
mod known_layout;
mod low_latency;
mod low_latency_combine;
mod low_latency_handle;
mod renewal;
mod settings;
mod tensor;
mod throughput;
mod throughput_combine;
mod words;

use std::sync::Arc;

/// The kernels: their sources, to be compiled ahead of time.
#[cfg(feature = "cuda")]
pub use gpu::kernels;
/// The arithmetic and the order of expert parallelism, as pure functions: what every backend is compared with.
pub use unisono_core::ep as reference;
pub use unisono_core::ep::cast::ScaleKind;
use unisono_core::ep::{ArenaLayout, Placement, Routing};

use crate::buffer::{Buf, Place};
use crate::communicator::Communicator;
use crate::control::Control;
use crate::error::{Error, Result};
use crate::operations::Operations;
use crate::stream::Stream;
use arena::Arena;
pub use arguments::{RowScales, Tokens};
pub use handle::Handle;
pub use low_latency::{LowLatencyDispatch, LowLatencyDispatched, SentDispatch};
pub use low_latency_combine::{LowLatencyCombine, LowLatencyCombined, SentCombine};
pub use low_latency_handle::LowLatencyHandle;
pub use settings::Settings;
pub use tensor::{Input, Tensor};
pub use throughput::{CachedDispatch, Dispatch, Dispatched};
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
    /// On the host, from the exchange on.
    arena: Option<Arena>,
    /// On GPUs.
    #[cfg(feature = "cuda")]
    gpu: Option<gpu::OnGpu>,
    /// Where it works.
    place: Place,
    /// Calls begun.
    calls: u64,
    failed: Option<Error>,
    /// Where callers may put what they combine.
    staged: Option<Tensor>,
}

/// Where the tokens of this rank go. Made by [`Buffer::layout`] or [`Buffer::layout_on`].
#[derive(Clone, PartialEq, Debug)]
pub struct Layout {
    routing: Routed,
    world_size: usize,
}

/// Where a layout lies.
#[derive(Clone, PartialEq, Debug)]
enum Routed {
    Host(Arc<Routing>),
    #[cfg(feature = "cuda")]
    Device(Arc<gpu::DeviceRouting>),
}

impl Layout {
    /// i32 `[ranks]`: tokens to each rank; one that several experts of a rank take counts once.
    pub fn tokens_per_rank(&self) -> Tensor {
        match &self.routing {
            Routed::Host(routing) => counts(&routing.tokens_per_rank),
            #[cfg(feature = "cuda")]
            Routed::Device(routing) => routing.rank_counts(),
        }
    }

    /// i32 `[experts]`: selections of each expert.
    pub fn tokens_per_expert(&self) -> Tensor {
        match &self.routing {
            Routed::Host(routing) => counts(&routing.tokens_per_expert),
            #[cfg(feature = "cuda")]
            Routed::Device(routing) => routing.expert_counts(),
        }
    }

    /// bool `[tokens, ranks]`: which token goes to which rank.
    pub fn is_token_in_rank(&self) -> Tensor {
        match &self.routing {
            Routed::Host(routing) => is_token_in_rank(&routing.destinations, self.world_size),
            #[cfg(feature = "cuda")]
            Routed::Device(routing) => routing.is_in_rank(),
        }
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

/// The capability of our GPU, as ranks compare it: 0 without one.
fn capability(communicator: &Communicator) -> u64 {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = &communicator.gpu {
        let (major, minor) = gpu.borrow().device().facts().capability;
        return u64::from(major) << 8 | u64::from(minor);
    }
    let _ = communicator;
    0
}

/// Which GPU it is.
fn identity(communicator: &Communicator) -> [u64; 2] {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = &communicator.gpu {
        let number = u128::from_le_bytes(gpu.borrow().device().facts().uuid.0);
        return [number as u64, (number >> 64) as u64];
    }
    let _ = communicator;
    [0; 2]
}

impl Buffer {
    /// A buffer of this rank for `communicator`. Tells nobody, and allocates nothing.
    ///
    /// # Errors
    /// [`Error::Argument`] if the settings do not fit together, or the world has more than 64 ranks; [`Error::Device`] if the communicator
    /// has GPUs that do not reach each other's memory.
    pub fn new(communicator: &Communicator, settings: Settings) -> Result<Self> {
        let (rank, world_size) = (communicator.rank(), communicator.world_size());
        let (layout, placement) = settings.check("ep::Buffer::new", rank, world_size)?;
        #[cfg(not(feature = "cuda"))]
        let place = Place::Host;
        #[cfg(feature = "cuda")]
        let place = match communicator.device() {
            None => Place::Host,
            Some(ordinal) => {
                gpu::check_link(communicator)?;
                settings.device_layout(("ep::Buffer::new", rank), &placement)?;
                Place::Cuda { ordinal }
            }
        };
        Ok(Self {
            settings,
            placement: Arc::new(placement),
            layout,
            control: communicator.control.clone(),
            rank,
            world_size,
            arena: None,
            #[cfg(feature = "cuda")]
            gpu: None,
            place,
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
        if self.is_exchanged() || self.failed.is_some() {
            return Err(self.wrong_state("exchange", "was not exchanged", "is available already"));
        }
        self.check_owner("exchange", communicator)?;
        let mine = self.settings.words(&self.placement, capability(communicator));
        // Which device it is comes last: it is told, not compared.
        let mut told: Vec<u64> = mine.iter().map(|(_, value)| *value).collect();
        told.extend(identity(communicator));
        let mut all = vec![0u64; told.len() * self.world_size];
        communicator.all_gather_into(&told, &mut all)?;
        let all: Vec<Vec<u64>> = all.chunks(told.len()).map(<[u64]>::to_vec).collect();
        if let Some((what, rank, got, expected)) = settings::difference(&mine.map(|(name, _)| name), &all) {
            let (got, expected) = (settings::value(what, got), settings::value(what, expected));
            return Err(Error::BufferSettings { what, rank, got, expected });
        }
        #[cfg(feature = "cuda")]
        if self.place != Place::Host {
            let ours = &all[self.rank][mine.len()..];
            let crowd = all.iter().filter(|theirs| &theirs[mine.len()..] == ours).count();
            let settings = &self.settings;
            let shape = gpu::Shape {
                arena: settings.shape(self.world_size),
                layout: settings.device_layout(("exchange", self.rank), &self.placement)?,
                placement: &self.placement,
                masking: settings.masking,
                deadline: settings.deadline,
                multiprocessors: settings.multiprocessors,
                crowd,
            };
            self.gpu = Some(gpu::OnGpu::make(communicator, &shape)?);
            return Ok(());
        }
        let how = (self.settings.masking, self.settings.deadline);
        self.arena = Some(Arena::make(communicator, self.layout, how)?);
        Ok(())
    }

    const fn is_exchanged(&self) -> bool {
        #[cfg(feature = "cuda")]
        if self.gpu.is_some() {
            return true;
        }
        self.arena.is_some()
    }

    /// Where it works.
    pub(super) const fn place(&self) -> Place {
        self.place
    }

    /// Ends the buffer on all ranks and frees its memory. Collective. Dropping it instead keeps the memory until the communicator is gone, on
    /// the others too.
    ///
    /// # Errors
    /// [`Error::Argument`] if `communicator` is not its own; those of a failed communicator, and then it has ended on this rank all the same.
    pub fn close(mut self, communicator: &Communicator) -> Result<()> {
        self.end(communicator)
    }

    /// As [`Buffer::close`], in its errors too, for who still lends what the buffer holds itself ([`Buffer::combine_buffer`]). Calls are refused then.
    pub fn end(&mut self, communicator: &Communicator) -> Result<()> {
        self.check_owner("close", communicator)?;
        let closed = self.wrong_state("a call", "is open", "is closed");
        #[cfg(feature = "cuda")]
        if let Some(gpu) = self.gpu.take() {
            self.failed.get_or_insert(closed);
            return gpu.close(communicator);
        }
        let Some(arena) = self.arena.take() else { return Ok(()) };
        self.failed.get_or_insert(closed);
        arena.close(communicator)
    }

    /// Whether it was exchanged and can be used.
    pub const fn is_available(&self) -> bool {
        self.is_exchanged() && self.failed.is_none()
    }

    /// The settings that it was made with.
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Experts of this rank, by their numbers in the world, in the order of their local numbers.
    pub fn local_experts(&self) -> Vec<usize> {
        self.placement.experts_of(self.rank).collect()
    }

    /// Ranks that are left out, ascending; this one too, on a GPU once a call of its own has met it. After a call of all survivors they all say the
    /// same. Empty without masking.
    pub fn masked(&self) -> Vec<usize> {
        let masked = self.arena.as_ref().map_or(0, Arena::masked);
        #[cfg(feature = "cuda")]
        let masked = self.gpu.as_ref().map_or(masked, gpu::OnGpu::masked);
        (0..self.world_size).filter(|rank| masked >> rank & 1 == 1).collect()
    }

    /// Leaves `rank` out from the next round that it has not sent, on all ranks: for who knows of a failure otherwise. One rank has to call it; a
    /// call that any of them begins when it has returned is without the rank. The rank itself gets [`Error::GivenUp`] at its next call.
    /// It cannot be undone in this buffer; [`Buffer::renew`] takes everybody in again.
    ///
    /// # Errors
    /// [`Error::Argument`] without masking, if it is no other rank of the world; [`Error::BufferState`] before the exchange; [`Error::Cuda`] if the
    /// driver refuses the kernel that does it.
    pub fn mask_rank(&mut self, rank: usize) -> Result<()> {
        let call = "mask_rank";
        if !self.settings.masking {
            return Err(self.refuse(call, "settings", "masking".to_owned(), "none"));
        }
        if rank >= self.world_size || rank == self.rank {
            return Err(self.refuse(call, "rank", format!("another one below {}", self.world_size), rank));
        }
        #[cfg(feature = "cuda")]
        if self.place != Place::Host {
            return self.available_on_gpu(call)?.mask(rank);
        }
        self.available(call)?.mask(rank);
        Ok(())
    }

    /// Ok, or the first cause why this buffer failed, on the host or in kernels that ran so far. Waits for nobody. On GPUs it also tells, once,
    /// of selections that are no expert (which selected nothing), and of rows that came beyond [`Dispatch::worst_tokens`] (which were left
    /// out); the buffer works on after these.
    ///
    /// # Errors
    /// The first cause; [`Error::Argument`] as said; [`Error::BufferState`] before the exchange.
    pub fn check(&mut self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if self.place != Place::Host {
            let top_k = self.settings.top_k;
            return self.available_on_gpu("check")?.take_complaints(top_k);
        }
        self.available("check").map(drop)
    }

    /// How calls of this buffer went: for people.
    pub fn explain(&self) -> String {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &self.gpu {
            return gpu.explain();
        }
        let (half, rows) =
            (unisono_core::settings::format_size(self.layout.total_bytes() as u64), self.layout.rows);
        format!("through shared memory of the host, {half} of each rank, {rows} rows at once; receivers copy")
    }

    /// As [`Buffer::layout_on`], in the order of the host.
    ///
    /// # Errors
    /// As [`Buffer::layout_on`].
    pub fn layout<'b>(&mut self, topk_idx: impl Into<Buf<'b, i64>>, top_k: usize) -> Result<Layout> {
        self.layout_on(topk_idx, top_k, &Stream::host())
    }

    /// Where tokens go: `topk_idx` is tokens × `top_k`, each an expert or −1, which selects nothing; in the order of `stream`. Local: nobody is
    /// told.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is another index (on GPUs the dispatch that uses it tells, or [`Buffer::check`]) or the rows do not fit;
    /// [`Error::Place`] if indices or stream are not where this buffer works; [`Error::BufferState`] before the exchange.
    pub fn layout_on<'b>(
        &mut self,
        topk_idx: impl Into<Buf<'b, i64>>,
        top_k: usize,
        stream: &Stream,
    ) -> Result<Layout> {
        let (call, input) = ("layout", Input::from(topk_idx.into()));
        self.ready(call, Some(stream))?;
        self.check_top_k(call, top_k)?;
        let raw = input.raw();
        let lent = self.exactly((call, "topk_idx"), &input, (unisono_core::DType::I64, raw.count))?;
        #[cfg(feature = "cuda")]
        if let (true, Some(stream)) = (self.gpu.is_some(), stream.as_cuda()) {
            if !raw.count.is_multiple_of(top_k) || raw.count / top_k > unisono_core::ep::MAX_TOKENS {
                let expected = format!("rows of {top_k}, at most {}", unisono_core::ep::MAX_TOKENS);
                return Err(self.refuse(call, "topk_idx", expected, raw.count));
            }
            let routing =
                self.available_on_gpu(call)?.layout((lent.address, raw.count / top_k, top_k), stream)?;
            return Ok(Layout { routing: Routed::Device(routing), world_size: self.world_size });
        }
        let routing = self.route(call, &arguments::indices(lent.bytes), top_k)?;
        Ok(Layout { routing: Routed::Host(routing), world_size: self.world_size })
    }

    fn route(&self, call: &'static str, selections: &[i64], top_k: usize) -> Result<Arc<Routing>> {
        let routing = Routing::of(selections, top_k, &self.placement)
            .map_err(|error| settings::argument(call, self.rank, "topk_idx", error))?;
        Ok(Arc::new(routing))
    }

    /// The GPU's side, if a call can be made on it.
    #[cfg(feature = "cuda")]
    fn available_on_gpu(&mut self, call: &'static str) -> Result<&mut gpu::OnGpu> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let state = self.wrong_state(call, "all ranks have exchanged", "is only constructed");
        let Some(gpu) = &mut self.gpu else { return Err(state) };
        if let Err(error) = gpu.check(&format!("{call} of an ep::Buffer")) {
            self.failed = Some(error.clone());
            return Err(error);
        }
        Ok(gpu)
    }

    /// The arena, if a call can be made on it. Not on GPUs.
    fn available(&mut self, call: &'static str) -> Result<&mut Arena> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        #[cfg(feature = "cuda")]
        if self.place != Place::Host {
            let reason = format!("{call} of an ep::Buffer on GPUs was given a call of one on the host");
            return Err(Error::Device { rank: self.rank, reason });
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
        let expected = "the one that the buffer was made for".to_owned();
        Err(self.refuse(call, "communicator", expected, "another one"))
    }
}
