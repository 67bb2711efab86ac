//! Dispatch as kernels: the exchange of counts, and rows.

use std::sync::Arc;
use std::time::Duration;

use unisono_core::DType;
use unisono_core::ep::DEVICE_LINE;
use unisono_cuda::{Grid, Stream};
use unisono_sync::memory::{words32, words64};
use unisono_sync::{AbortWord, Sleepers, WaitPolicy, Watch, Word, wait};

use super::args::{CountsArgs, DispatchArgs, WaysArgs};
use super::kernels::{COUNTS_THREADS, DISPATCH_THREADS};
use super::layout::DeviceRouting;
use super::pool::{For, Slab};
use super::report::{ABORT, OVERFLOW, SLEEPERS, TOLD_AT};
use super::{Fields, OnGpu};
use crate::ep::tensor::Tensor;
use crate::ep::words::{CallWords, ToldWords};
use crate::error::{Error, Result};

/// The most bytes of a row that move at once.
const MOST_PIECE: usize = 16 << 10;
/// How long the host waits before it looks at what else may have happened.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The layout of a dispatch on all ranks, in memory of our device.
#[derive(Debug)]
pub(in crate::ep) struct DeviceRoutes {
    pub(in crate::ep) routing: Arc<DeviceRouting>,
    slab: Arc<Slab>,
    prefix: usize,
    bases: usize,
    starts: usize,
    /// The index of each row's token at its source, in the memory of the rows.
    source_tokens: (Arc<Slab>, usize),
    pub(in crate::ep) rows: usize,
}

impl DeviceRoutes {
    pub(in crate::ep) fn prefix(&self) -> Tensor {
        let ranks = self.routing.ranks;
        Tensor::on_device(&self.slab, self.prefix, DType::I32, &[ranks, ranks])
    }

    pub(in crate::ep) fn source_tokens(&self) -> Tensor {
        let (slab, at) = &self.source_tokens;
        Tensor::on_device(slab, *at, DType::I32, &[self.rows])
    }

    pub(super) fn ways(&self) -> WaysArgs {
        self.counted().ways(&self.routing)
    }

    fn counted(&self) -> CountedFields {
        CountedFields {
            address: self.slab.address(),
            prefix: self.prefix,
            bases: self.bases,
            starts: self.starts,
        }
    }
}

/// What the exchange of counts gives.
#[derive(Clone, Copy)]
struct CountedFields {
    address: u64,
    prefix: usize,
    bases: usize,
    starts: usize,
}

impl CountedFields {
    const fn at(&self, field: usize) -> u64 {
        self.address + field as u64
    }

    fn ways(&self, routing: &DeviceRouting) -> WaysArgs {
        WaysArgs {
            places: routing.slab.address() + routing.places as u64,
            bases: self.at(self.bases),
            portion: routing.portion,
            tokens: routing.tokens as u32,
        }
    }
}

/// Scales that travel with rows: where they lie, how many each row has, and their strides in elements.
#[derive(Clone, Copy, Debug)]
pub(in crate::ep) struct OutgoingScales {
    pub(in crate::ep) address: u64,
    pub(in crate::ep) count: usize,
    pub(in crate::ep) strides: (usize, usize),
    pub(in crate::ep) dtype: DType,
}

/// What is sent, checked: addresses of our device.
#[derive(Clone, Copy, Debug)]
pub(in crate::ep) struct Outgoing {
    pub(in crate::ep) x: u64,
    pub(in crate::ep) dtype: DType,
    pub(in crate::ep) row_bytes: usize,
    pub(in crate::ep) scales: Option<OutgoingScales>,
    pub(in crate::ep) selections: Option<u64>,
    pub(in crate::ep) weights: Option<u64>,
    pub(in crate::ep) top_k: usize,
}

/// What a dispatch is asked to give.
#[derive(Clone, Copy, Debug)]
pub(in crate::ep) struct Wanted {
    pub(in crate::ep) worst_tokens: Option<usize>,
    pub(in crate::ep) multiprocessors: Option<u32>,
}

/// What came, and where.
pub(in crate::ep) struct Came {
    pub(in crate::ep) x: Tensor,
    pub(in crate::ep) scales: Option<Tensor>,
    pub(in crate::ep) indices: Option<Tensor>,
    pub(in crate::ep) weights: Option<Tensor>,
    source_tokens: (Arc<Slab>, usize),
}

/// The arrays of `rows` rows, from the start of their memory.
struct RowFields {
    rows: usize,
    x: usize,
    scales: usize,
    indices: usize,
    weights: usize,
    tokens: usize,
    bytes: usize,
}

impl RowFields {
    fn new(rows: usize, outgoing: &Outgoing, is_cached: bool) -> Self {
        let mut fields = Fields::default();
        let mut add = |has: bool, row_bytes: usize| fields.add(if has { rows * row_bytes } else { 0 });
        let scale_count = outgoing.scales.map_or(0, |scales| scales.count);
        let x = add(true, outgoing.row_bytes);
        let scales = add(true, scale_count * 4);
        let indices = add(outgoing.selections.is_some(), outgoing.top_k * 8);
        let weights = add(outgoing.weights.is_some(), outgoing.top_k * 4);
        let tokens = add(!is_cached, 4);
        Self { rows, x, scales, indices, weights, tokens, bytes: fields.end }
    }

    /// What peers are told, where the memory begins at byte `offset`.
    fn told(&self, offset: usize) -> ToldWords {
        let line = |at: usize| ((offset + at) / DEVICE_LINE) as u32;
        ToldWords {
            rows: self.rows as u32,
            x: line(self.x),
            scales: line(self.scales),
            indices: line(self.indices),
            weights: line(self.weights),
            tokens: line(self.tokens),
        }
    }
}

/// Where rows arrive.
enum Arrival {
    /// Where they stay.
    Direct,
    /// In the staging of our memory, from where they are copied.
    Staged,
    /// Nowhere: so many bytes are too many.
    Refused(usize),
}

impl OnGpu {
    /// Sends tokens the way of `routing`, or of the layout of their selections. Gives what came, the layout of all ranks, and the selections of
    /// our experts if the host knows them.
    pub(in crate::ep) fn dispatch(
        &mut self,
        words: &CallWords,
        outgoing: &Outgoing,
        (routing, wanted): (Option<Arc<DeviceRouting>>, &Wanted),
        stream: &Stream,
    ) -> Result<(Came, DeviceRoutes, Vec<usize>)> {
        let call = words.operation.name();
        let is_captured = self.begin(call, stream)?;
        if is_captured && wanted.worst_tokens.is_none() {
            return Err(Error::Argument {
                call,
                rank: self.rank,
                what: "worst_tokens",
                expected: "a number of rows, as a graph is captured and the host cannot learn how many come"
                    .to_owned(),
                got: "none".to_owned(),
            });
        }
        let routing = match (routing, outgoing.selections) {
            (Some(routing), _) => {
                self.keep(&routing.slab, (stream, is_captured))?;
                routing
            }
            (None, Some(selections)) => {
                self.put_layout((selections, words.tokens, outgoing.top_k), (stream, is_captured))?
            }
            (None, None) => unreachable!("whoever calls has one of them"),
        };
        let (slab, counted) = self.put_counts(words, (&routing, wanted), (stream, is_captured))?;
        let (rows, selections) = match wanted.worst_tokens {
            Some(rows) => (rows, Vec::new()),
            None => self.wait_for_counts(&words.during(), stream)?,
        };
        let complaint = match wanted.worst_tokens {
            Some(_) => Ok(()),
            None => self.take_complaints(outgoing.top_k),
        };
        let send =
            Send { words, outgoing, ways: counted.ways(&routing), starts: counted.at(counted.starts), rows };
        let came = self.send_rows(&send, wanted.multiprocessors, (stream, is_captured));
        let came = self.conclude((stream, is_captured)).and(came)?;
        complaint?;
        let source_tokens = came.source_tokens.clone();
        let CountedFields { prefix, bases, starts, .. } = counted;
        let routes = DeviceRoutes { routing, slab, prefix, bases, starts, source_tokens, rows };
        Ok((came, routes, selections))
    }

    /// Sends other tokens the way of an earlier dispatch.
    pub(in crate::ep) fn dispatch_cached(
        &mut self,
        words: &CallWords,
        outgoing: &Outgoing,
        (routes, multiprocessors): (&DeviceRoutes, Option<u32>),
        stream: &Stream,
    ) -> Result<Came> {
        let is_captured = self.begin(words.operation.name(), stream)?;
        self.keep_routes(routes, (stream, is_captured))?;
        let counted = routes.counted();
        let send = Send {
            words,
            outgoing,
            ways: routes.ways(),
            starts: counted.at(counted.starts),
            rows: routes.rows,
        };
        let came = self.send_rows(&send, multiprocessors, (stream, is_captured));
        self.conclude((stream, is_captured)).and(came)
    }

    pub(super) fn keep_routes(&self, routes: &DeviceRoutes, stream: (&Stream, bool)) -> Result<()> {
        self.keep(&routes.slab, stream)?;
        self.keep(&routes.routing.slab, stream)
    }

    fn put_counts(
        &mut self,
        words: &CallWords,
        (routing, wanted): (&DeviceRouting, &Wanted),
        (stream, is_captured): (&Stream, bool),
    ) -> Result<(Arc<Slab>, CountedFields)> {
        let ranks = self.world_size;
        let mut fields = Fields::default();
        let prefix = fields.add(ranks * ranks * 4);
        let bases = fields.add(routing.portions as usize * ranks * 4);
        let starts = fields.add((ranks + 1) * 4);
        let selections = fields.add(self.tables.local_experts * 4);
        let slab = self.take_own(fields.end, (stream, is_captured))?;
        let counted = CountedFields { address: slab.address(), prefix, bases, starts };
        self.ticket += 1;
        let of_layout = |field: usize| routing.slab.address() + field as u64;
        let args = CountsArgs {
            buffer: self.round(words, 0, &ToldWords::default()),
            portion_counts: of_layout(routing.portion_counts),
            rank_counts: of_layout(routing.rank_counts),
            expert_counts: of_layout(routing.expert_counts),
            order: self.tables.order,
            begins: self.tables.begins,
            prefix: counted.at(prefix),
            bases: counted.at(bases),
            starts: counted.at(starts),
            selections: counted.at(selections),
            told: if wanted.worst_tokens.is_none() { self.core.page.address() + TOLD_AT as u64 } else { 0 },
            ticket: self.ticket,
            portions: routing.portions,
            reserved: 0,
        };
        let grid = Grid { blocks: 1, threads: COUNTS_THREADS, shared_bytes: 0, is_early: false };
        // SAFETY: the kernel takes `CountsArgs`; both slabs are ours, and what it reaches of peers stays as long as `Core`.
        unsafe { self.launch(&self.core.kernels.counts, stream, grid, args) }?;
        self.has_sent = true;
        Ok((slab, counted))
    }

    /// Waits until the kernel has told how many rows come, and selections of each of our experts. Kernels end in time; so does this.
    fn wait_for_counts(&mut self, during: &str, stream: &Stream) -> Result<(usize, Vec<usize>)> {
        let core = self.core.clone();
        let page = core.page_memory.as_ptr();
        let (count, ticket) = (2 + self.tables.local_experts, self.ticket);
        // SAFETY: the page is as long as that, and both sides write whole words only.
        let told = unsafe { words64(page.add(TOLD_AT), count) };
        // SAFETY: as above; nobody wakes who sleeps here, as kernels do not know of it.
        let nobody = unsafe { &words32(page.add(SLEEPERS.offset), 1)[0] };
        // SAFETY: as above.
        let own_abort = AbortWord::new(unsafe { &words32(page.add(ABORT.offset), 1)[0] });
        let abort = if self.masking { own_abort } else { core.control.abort() };
        // SYNC: what a counts kernel tells the host is visible before its ticket.
        let is_ready = || told[0].load_acquire() == ticket;
        let mut policy = WaitPolicy { patience: Some(LOOK_EVERY), warn_after: None, ..self.policy };
        loop {
            let watch =
                Watch { abort, word: &told[0], sleepers: Sleepers::new(nobody), budget: &self.budget };
            if wait(&policy, watch, is_ready, || {}).is_ok() {
                break;
            }
            let is_idle = stream.is_idle().map_err(|error| self.refused(error))?;
            if is_ready() {
                break;
            }
            let result = self.check(during);
            if is_idle {
                // The kernel ended without its work, and its report says why.
                let unknown = || Error::Aborted {
                    rank: self.rank,
                    during: during.to_owned(),
                    reason: "its kernel ended without a word".to_owned(),
                };
                return Err(result.err().unwrap_or_else(unknown));
            }
            policy = WaitPolicy { spins: 0, yield_for: Duration::ZERO, ..policy };
        }
        let number = |word: &_| Word::<u64>::load_relaxed(word) as usize;
        Ok((number(&told[1]), told[2..].iter().map(number).collect()))
    }

    fn send_rows(
        &mut self,
        send: &Send<'_>,
        multiprocessors: Option<u32>,
        (stream, is_captured): (&Stream, bool),
    ) -> Result<Came> {
        let Send { words, outgoing, ways, starts, rows } = *send;
        let is_cached = words.handle != 0;
        let fields = RowFields::new(rows, outgoing, is_cached);
        let (slab, arrival) = match self.take(fields.bytes, (stream, is_captured), For::Peers)? {
            Some(slab) => (slab, Arrival::Direct),
            None if fields.bytes <= self.layout.staging.bytes => {
                (self.take_own(fields.bytes, (stream, is_captured))?, Arrival::Staged)
            }
            None => (self.take_own(0, (stream, is_captured))?, Arrival::Refused(fields.bytes)),
        };
        let told = match (&arrival, slab.offset()) {
            (Arrival::Direct, Some(offset)) => fields.told(offset),
            (Arrival::Staged, _) => fields.told(self.layout.staging.offset),
            _ => ToldWords::default(),
        };
        let (grid, piece_bytes) = self.grid_of_rows(outgoing, words.tokens, multiprocessors);
        let scales = outgoing.scales;
        // What is empty may lie nowhere; to kernels that says that there is none.
        let given = |at: u64| if words.tokens == 0 { self.core.state.address() } else { at };
        let args = DispatchArgs {
            buffer: self.round(words, 1, &told),
            ways,
            x: outgoing.x,
            scales: scales.map_or(0, |scales| scales.address),
            selections: outgoing.selections.map_or(0, given),
            weights: outgoing.weights.map_or(0, given),
            experts: self.tables.experts,
            starts,
            overflow: match arrival {
                Arrival::Refused(_) => 0,
                _ => self.page_at(OVERFLOW),
            },
            scale_strides: scales.map_or([0; 2], |scales| [scales.strides.0 as u64, scales.strides.1 as u64]),
            scale_count: scales.map_or(0, |scales| scales.count as u32),
            top_k: outgoing.top_k as u32,
            row_bytes: outgoing.row_bytes as u32,
            piece_bytes,
            is_cached: u32::from(is_cached),
            number: self.tables.number as u32,
        };
        // SAFETY: the kernel takes `DispatchArgs`; slabs are ours, what it reaches of peers stays as long as `Core`, and inputs are valid
        // until the stream has passed, as whoever made the call promised.
        unsafe { self.launch(&self.core.kernels.dispatch, stream, grid, args) }?;
        self.has_sent = true;
        match arrival {
            Arrival::Direct => self.taken.direct_dispatches += 1,
            Arrival::Staged => {
                let from = self.args.call.arenas[self.rank] + self.layout.staging.offset as u64;
                // SAFETY: both are as long, and ours until the stream has passed: the next kernel that fills the staging comes behind this.
                unsafe { stream.copy(slab.address(), from, fields.bytes) }
                    .map_err(|error| self.refused(error))?;
                self.taken.staged_dispatches += 1;
            }
            Arrival::Refused(bytes) => return Err(self.no_room(words.operation.name(), bytes)),
        }
        let tensor = |at, dtype, columns: usize| Tensor::on_device(&slab, at, dtype, &[rows, columns]);
        let hidden = outgoing.row_bytes / outgoing.dtype.size();
        Ok(Came {
            x: tensor(fields.x, outgoing.dtype, hidden),
            scales: scales.map(|scales| tensor(fields.scales, scales.dtype, scales.count)),
            indices: outgoing.selections.map(|_| tensor(fields.indices, DType::I64, outgoing.top_k)),
            weights: outgoing.weights.map(|_| tensor(fields.weights, DType::F32, outgoing.top_k)),
            source_tokens: (slab.clone(), fields.tokens),
        })
    }

    /// Neither the pool nor the staging has room for `bytes`.
    pub(super) fn no_room(&self, call: &'static str, bytes: usize) -> Error {
        let (free, _) = self.core.pool.standing();
        Error::Argument {
            call,
            rank: self.rank,
            what: "Settings::pool_bytes",
            expected: format!(
                "room for {bytes} bytes beside the outputs that are held, or {} of them",
                2 * bytes
            ),
            got: format!("{}, of which {free} are free", self.layout.pool.bytes),
        }
    }

    /// Blocks, and the bytes of a row that each warp moves at once.
    fn grid_of_rows(&self, outgoing: &Outgoing, tokens: usize, multiprocessors: Option<u32>) -> (Grid, u32) {
        let pieces = outgoing.row_bytes.div_ceil(MOST_PIECE);
        let piece = match pieces {
            1 => outgoing.row_bytes,
            _ => outgoing.row_bytes.div_ceil(pieces).next_multiple_of(DEVICE_LINE),
        };
        let room = self.core.kernels.room_bytes as usize;
        let by_copies =
            room >= piece && outgoing.x.is_multiple_of(16) && outgoing.row_bytes.is_multiple_of(16);
        let most_warps = DISPATCH_THREADS as usize / 32;
        let warps = if by_copies { (room / piece).min(most_warps) } else { most_warps };
        let items = tokens * outgoing.row_bytes.div_ceil(piece);
        let workers = items.div_ceil(warps).clamp(1, self.workers(multiprocessors));
        let shared_bytes = if by_copies { (warps * piece) as u32 } else { 0 };
        let (blocks, threads) = (workers as u32 + 1, DISPATCH_THREADS);
        (Grid { blocks, threads, shared_bytes, is_early: false }, piece as u32)
    }

    /// Blocks that may move rows, beside the one that greets.
    pub(super) fn workers(&self, multiprocessors: Option<u32>) -> usize {
        let blocks = multiprocessors.unwrap_or(self.multiprocessors).clamp(2, self.blocks);
        blocks as usize - 1
    }
}

/// Rows on their way.
#[derive(Clone, Copy)]
struct Send<'a> {
    words: &'a CallWords,
    outgoing: &'a Outgoing,
    ways: WaysArgs,
    /// Where the rows of each source begin here.
    starts: u64,
    rows: usize,
}
