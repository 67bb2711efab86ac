//! Collectives on GPUs: how a communicator comes to its device, and how a call becomes a kernel.
//!
//! Everything that kernels need is made when the communicator is: arenas that all ranks reach, words of our own in device
//! memory, a page of host memory for reports, the abort word of the control memory, seen from the device. A call is then
//! checked, chosen a form for, and launched: no allocation, no lock, no waiting. What kernels find (another call, a peer that
//! does not come) they write into that page, where the next call, `check()` or `destroy()` reads it. Over 500 lines because all launches
//! share what comes before and behind them.

use std::sync::Arc;

use unisono_core::call::{self, Kind};
pub use unisono_core::device::layout::MAX_RANKS;
use unisono_core::device::layout::{DEVICE_BYTES, HAS_CAPTURED, HAS_GPU, HEADER_OFFSETS};
use unisono_core::device::select::{Question, Rules};
pub use unisono_core::device::{ArenaLayout, Link};
use unisono_core::device::{Form, Launch};

use unisono_core::settings::{HandleKind, PinnedWay};
use unisono_cuda::{Device, DeviceBuffer, Event, Grid, RegisteredHost, Stream};

use crate::call::Call;
use crate::collectives::{Engine, Part, Plan, WindowPlace};
use crate::control::Control;
use crate::error::{Error, Result};
use crate::explanation::OnGpus;
use crate::tuning;
use arenas::Arenas;
use args::{Args, HEADER_LAUNCH, Report, UnevenArgs};
pub(crate) use attach::{check_devices, check_ranks, identity, without_device, without_gpu};
use budget::Budget;
use copy_engines::Engines;
pub use device_header::device_header;
use ending::{End, Memory};
use kernels::Kernels;
use messages::Lanes;
pub(crate) use messages::Prepared;
pub use one_sided::DeviceView;
pub(crate) use origin::{Config, Extra, Origin};
use pinned::Enqueued;
use recorder::Copier;
pub(crate) use seats::PreparedEach;
use seats::Seat;
use watch::Watch;
pub(crate) use watch::lost_context;
use windows::Windows;

mod all_to_all_v;
pub(crate) mod arenas;
pub(crate) mod args;
pub(crate) mod attach;
pub(crate) mod budget;
mod copy_engines;
mod derive;
mod device_header;
mod ending;
pub(crate) mod foreign;
mod fused;
pub mod kernels;
mod loading;
mod messages;
pub(crate) mod one_sided;
mod origin;
pub(crate) mod peers;
pub(crate) mod pinned;
mod quantised;
mod recorder;
pub(crate) mod seats;
mod watch;
pub(crate) mod windows;

/// One rank's side of all collectives on its GPU.
#[derive(Debug)]
pub(crate) struct Gpu {
    device: Device,
    control: Arc<Control>,
    seat: Seat,
    /// As [`REPORT_MADE`](unisono_core::device::layout::REPORT_MADE) tells it.
    made: u64,
    /// In the world of the ranks, our sides of that of all devices, where there is one.
    seats: Vec<Self>,
    rules: Rules,
    table_from: tuning::Origin,
    kernels: Kernels,
    args: Args,
    lanes: Box<Lanes>,
    /// Shared memory for each block of the forms with tiles.
    room_bytes: u32,
    /// Where copy engines may serve calls.
    engines: Option<Engines>,
    /// The stream of the latest call, and an event behind it once there were two: from the start where ranks share a device, or
    /// did in the world that this comes from, because the first change of streams waits for all of it.
    latest: usize,
    order: Option<Event>,
    /// The other devices of this process that we know of: what one loads, all load, because loading may wait for all devices.
    siblings: Vec<Device>,
    /// Whether some are those of other ranks, which this very thread may drive.
    drives_peers: bool,
    windows: Windows,
    pinned_way: PinnedWay,
    handles: HandleKind,
    /// Once there was a pinned window.
    enqueued: Option<Arc<Enqueued>>,
    failed: Option<Error>,
    memory: Option<Memory>,
    /// The most threads of a kernel that is brought onto the device while the one before still runs.
    early_threads: u32,
    /// Until it is dropped.
    budget: Option<Budget>,
    watch: Option<Watch>,
    /// What becomes of the memory when this is dropped.
    end: End,
}

impl Gpu {
    pub(crate) fn new(
        device: &Device,
        seat: Seat,
        arenas: Arenas,
        (config, budget): (&Config, Budget),
        siblings: Vec<Device>,
    ) -> Result<Self> {
        let (control, rank) = (seat.control.clone(), seat.rank());
        let failed = |error| Error::Cuda { rank, error };
        let rules = config.rules;
        let layout = ArenaLayout::new(seat.all, rules.link);
        let kernels =
            Kernels::new(device, (layout, config.launching), seat.all, &config.prepare).map_err(failed)?;
        let mut state = DeviceBuffer::new(device, DEVICE_BYTES).map_err(failed)?;
        state.write(0, &layout.device_words(config.epoch)).map_err(failed)?;
        let memory = control.memory();
        // SAFETY: `Memory` keeps the control memory mapped for longer than the registration.
        let pages =
            unsafe { RegisteredHost::shared(device, memory.as_ptr(), memory.bytes()) }.map_err(failed)?;
        let reports = &seat.memory;
        // SAFETY: `Memory` keeps the seat, and so this memory, as well.
        let report_pages =
            unsafe { RegisteredHost::shared(device, reports.as_ptr(), reports.bytes()) }.map_err(failed)?;
        let mut args = Args {
            state: state.address(),
            abort: pages.address(),
            report: report_pages.address() + seat.page.offset as u64,
            patience_ns: config.patience_ns,
            rank: seat.number as u32,
            ..Args::default()
        };
        for peer in 0..seat.all {
            args.arenas[peer] = arenas.address(peer);
        }
        if let Some(clock) = kernels.copies().clock() {
            recorder::compare_clocks(device, clock, &mut args, seat.page()).map_err(failed)?;
        }
        let records = seat.records.map_or(0, |records| report_pages.address() + records.offset as u64);
        let copier = || Copier::new(state.address(), records);
        let engines = rules.lanes().map(|lanes| Engines::new(device, lanes)).transpose().map_err(failed)?;
        let order = config.is_crowded.then(|| Event::new(device, false)).transpose().map_err(failed)?;
        let watch = Watch::start(device.clone(), seat.clone(), copier());
        let made = HAS_GPU | u64::from(config.epoch);
        seat.tell_made(made);
        let memory = Memory {
            device: device.clone(),
            copier: copier(),
            _state: state,
            _arenas: arenas,
            control_pages: pages,
            _report_pages: report_pages,
            seat: seat.clone(),
            windows: Windows::default(),
        };
        Ok(Self {
            device: device.clone(),
            control,
            seat,
            made,
            seats: Vec::new(),
            rules,
            table_from: config.table_from.clone(),
            kernels,
            args,
            lanes: Box::new(Lanes::new()),
            room_bytes: kernels::room_bytes(device, rules.link),
            engines,
            latest: 0,
            order,
            siblings,
            drives_peers: config.drives_peers,
            windows: Windows::default(),
            pinned_way: config.pinned_way,
            handles: config.handles,
            enqueued: None,
            failed: None,
            memory: Some(memory),
            early_threads: config.gpu_launch.early_threads(budget.early_threads()),
            budget: Some(budget),
            watch: Some(watch),
            end: End::WhenQuiet,
        })
    }

    /// Its number in this process.
    pub(crate) fn ordinal(&self) -> u32 {
        self.device.ordinal()
    }

    /// The device itself.
    pub(crate) const fn device(&self) -> &Device {
        &self.device
    }

    /// The control memory as kernels reach it, the word that ends all waits first.
    pub(crate) fn control_pages(&self) -> Option<Arc<RegisteredHost>> {
        self.memory.as_ref().map(|memory| memory.control_pages.clone())
    }

    /// How the GPUs reach each other, and the rules that follow.
    pub(crate) const fn rules(&self) -> &Rules {
        &self.rules
    }

    /// From now on calls take the form that `rules` ask for, and the grids of their table. All ranks change between the same two
    /// calls.
    pub(crate) fn change_rules(&mut self, rules: &Rules) -> Result<()> {
        let rules = Rules { forced: rules.forced, table: rules.table, ..self.rules };
        let have = self.engines.as_ref().map_or(0, Engines::lanes);
        if let Some(lanes) = rules.lanes().filter(|lanes| *lanes > have) {
            self.engines = Some(Engines::new(&self.device, lanes).map_err(|error| self.refused(error))?);
        }
        self.rules = rules;
        Ok(())
    }

    /// From now on kernels wait so long at most for ranks that live.
    pub(crate) fn change_patience(&mut self, patience: Option<std::time::Duration>) {
        self.args.patience_ns = one_sided::nanoseconds(patience);
        self.seats.iter_mut().for_each(|seat| seat.change_patience(patience));
    }

    /// The same for people.
    pub(crate) fn explain(&self) -> OnGpus {
        OnGpus::new(&self.rules, self.table_from.clone())
    }

    /// Puts a call into `stream`. After a failure every call returns the first cause.
    #[inline]
    pub(crate) fn submit(&mut self, engine: &mut Engine, call: &Call<'_>, stream: &Stream) -> Result<()> {
        engine.check()?;
        self.check()?;
        self.check_stream(call.kind, stream)?;
        let find = |id, ptr, bytes| self.windows.find(id, (ptr, bytes));
        let device = (self.device.ordinal(), &find as _);
        if call.kind.is_message() {
            let messages = engine.messages_on(call, device)?;
            return self.launch_messages(&messages, stream);
        }
        let plan = engine.plan_on(call, Some(device))?;
        self.check_plan(&plan)?;
        self.carry_out(&plan, stream)
    }

    /// Refuses streams of other devices.
    fn check_stream(&self, kind: Kind, stream: &Stream) -> Result<()> {
        if stream.device() == &self.device {
            return Ok(());
        }
        Err(Error::Argument {
            call: kind.name(),
            rank: self.seat.rank(),
            what: "stream",
            expected: format!("one of cuda:{}", self.device.ordinal()),
            got: format!("one of cuda:{}", stream.device().ordinal()),
        })
    }

    /// Puts a collective that was checked into `stream`.
    fn carry_out(&mut self, plan: &Plan, stream: &Stream) -> Result<()> {
        match plan.header.kind {
            kind if messages::is_of_messages(kind) => self.launch_parts(plan, stream),
            Kind::AllReduceRmsNorm { .. } if plan.count > 0 => self.launch_rows(plan, stream),
            Kind::AllReduceQuantised => self.launch_quantised(plan, stream),
            Kind::AllToAllCounted => self.launch_counted(plan, stream),
            _ => self.launch(plan, &plan.header.to_words(), stream),
        }
    }

    /// Brings a call into the order of calls, and loads its kernels.
    #[inline]
    fn begin(&mut self, plan: &Plan, stream: &Stream) -> Result<()> {
        self.order_after_latest(stream)?;
        self.find_kernels(plan, stream)
    }

    /// Loads the kernels of a call, unless they are loaded.
    #[inline]
    fn find_kernels(&mut self, plan: &Plan, stream: &Stream) -> Result<()> {
        let kind = plan.header.kind;
        if plan.bytes() > 0 && self.kernels.find(kind, plan.dtype).is_none() {
            self.load(plan, stream)?;
        }
        Ok(())
    }

    /// Puts one kernel into `stream` that carries out `plan`; peers compare `words`.
    fn launch(&mut self, plan: &Plan, words: &[u64; call::HEADER_WORDS], stream: &Stream) -> Result<()> {
        self.begin(plan, stream)?;
        let (rank, kind) = (self.args.rank as usize, plan.header.kind);
        let is_bare = plan.bytes() == 0;
        let launch = if is_bare {
            Launch { form: Form::OneShot, blocks: 0, threads: 512, tile: 0, by_copies: false }
        } else {
            let (bytes, size) = (plan.bytes(), plan.dtype.size());
            let is_reachable = plan.header.is_in_windows();
            self.rules.decide(&Question { kind, bytes, size, is_reachable })
        };
        let sides = [plan.source_window, plan.target_window];
        let is_captured = self.keep_if_captured(sides, stream)?;
        let function = match is_bare {
            true => self.kernels.copies().barrier(),
            false => {
                self.kernels.find(kind, plan.dtype).and_then(|loaded| loaded.function(kind, launch.form))
            }
        };
        let Some(function) = function else { unreachable!("{kind:?} has no kernel for {launch:?}") };
        let args = &mut self.args;
        args.header[..call::HEADER_WORDS].copy_from_slice(words);
        args.header[HEADER_LAUNCH] = launch_word(launch);
        (args.bytes, args.tile) = (plan.bytes() as u64, launch.tile);
        args.root = kind.root().unwrap_or(0);
        let source = self.windows.address(rank, plan.source as u64, plan.source_window);
        let target = self.windows.address(rank, plan.target as u64, plan.target_window);
        (args.sources[rank], args.targets[rank]) = (source, target);
        let own = |has_parts: bool| if has_parts { rank as u64 * args.bytes } else { 0 };
        let (has_parts_in, has_parts_out) = kernels::parts(kind);
        args.is_same = u32::from(source + own(has_parts_in) == target + own(has_parts_out));
        let mut uneven = plan.parts().map(|parts| uneven_args(args, parts, plan));
        if launch.form == Form::Direct {
            let [source, target] = sides;
            args.source_bytes =
                self.windows.place(source, (&mut args.sources, &mut args.header[HEADER_OFFSETS]));
            args.target_bytes =
                self.windows.place(target, (&mut args.targets, &mut args.header[HEADER_OFFSETS + 1]));
        }
        let shared_bytes = launch.shared_bytes(self.room_bytes);
        let grid = self.grid((launch.workers() + 1, launch.threads), shared_bytes);
        let args = match &mut uneven {
            Some(uneven) => (&raw mut *uneven).cast(),
            None => (&raw mut self.args).cast(),
        };
        // SAFETY: the kernel takes `Args`, or `UnevenArgs` where it has parts of any size; what they name lives as long as this
        // communicator, which waits for its kernels before it lets go, and the buffers are valid until the stream has passed, as
        // whoever made the call promised.
        let launched = unsafe { function.launch(stream, grid, args) };
        if let Err(error) = launched {
            return Err(self.refused(error));
        }
        self.count_call(is_captured);
        if launch.form == Form::Engine {
            self.launch_copies(plan, launch, stream)?;
        }
        self.conclude(sides, stream, is_captured)
    }

    /// So many blocks of so many threads.
    #[inline]
    fn grid(&self, (blocks, threads): (u32, u32), shared_bytes: u32) -> Grid {
        Grid { blocks, threads, shared_bytes, is_early: blocks.saturating_mul(threads) <= self.early_threads }
    }

    /// After the launch of a kernel that has an epoch: tells the other ranks that this one made the call.
    #[inline]
    fn count_call(&mut self, is_captured: bool) {
        self.made = match is_captured {
            true => self.made | HAS_CAPTURED,
            false => self.made & (HAS_GPU | HAS_CAPTURED) | u64::from((self.made as u32).wrapping_add(1)),
        };
        self.seat.tell_made(self.made);
    }

    /// What follows a launch: others may wait for it.
    #[inline]
    fn conclude(&self, sides: [Option<WindowPlace>; 2], stream: &Stream, is_captured: bool) -> Result<()> {
        if let Some(order) = &self.order
            && !is_captured
        {
            let rank = self.seat.rank();
            order.record(stream).map_err(|error| Error::Cuda { rank, error })?;
        }
        match self.windows.touched(sides) {
            Some(enqueued) => enqueued.note(stream, is_captured),
            None => Ok(()),
        }
    }

    /// Whether a call in `stream` goes into a graph, as far as that matters: the first time it always does. What its kernels reach then
    /// stays for as long as the graph does, whoever made that.
    #[inline]
    fn keep_if_captured(&mut self, sides: [Option<WindowPlace>; 2], stream: &Stream) -> Result<bool> {
        let is_in_window = sides.iter().any(Option::is_some);
        if !is_in_window && self.order.is_none() && self.made & HAS_CAPTURED != 0 {
            return Ok(false);
        }
        let is_captured = stream.is_capturing().map_err(|error| self.refused(error))?;
        if is_in_window && is_captured {
            self.windows.keep_in_graph(sides, stream).map_err(|error| self.refused(error))?;
        }
        Ok(is_captured)
    }

    /// Calls on different streams run one after the other. Within a graph its own dependencies order them.
    #[inline]
    fn order_after_latest(&mut self, stream: &Stream) -> Result<()> {
        let this = stream.raw() as usize | 1;
        if self.latest == this {
            return Ok(());
        }
        self.change_stream(this, stream)
    }

    #[cold]
    fn change_stream(&mut self, this: usize, stream: &Stream) -> Result<()> {
        let rank = self.seat.rank();
        let failed = |error| Error::Cuda { rank, error };
        if stream.is_capturing().map_err(failed)? {
            return Ok(());
        }
        if self.latest != 0 {
            match &self.order {
                Some(order) => stream.wait(order).map_err(failed)?,
                // From now on an event follows every call. The first time there is none yet, and the other stream may be gone.
                None => {
                    let order = Event::new(&self.device, false).map_err(failed)?;
                    order.record_device().map_err(failed)?;
                    stream.wait(&order).map_err(failed)?;
                    self.order = Some(order);
                }
            }
        }
        self.latest = this;
        Ok(())
    }

    /// Ok, or why kernels of this rank gave up. One load if they did not.
    #[inline]
    pub(crate) fn check(&mut self) -> Result<()> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        match Report::read(self.seat.page()) {
            None => self.seats.iter_mut().try_for_each(Self::check),
            Some(report) => Err(self.fail(report)),
        }
    }

    #[cold]
    fn fail(&mut self, report: Report) -> Error {
        let (rank, world_size) = self.control.member();
        let cause = watch::cause_of(report, &self.seat);
        // Somebody else may have been first; then all tell the same.
        self.control.fail(&cause);
        let error = match report {
            Report::Concurrent => Error::ConcurrentUse { rank },
            _ => self.control.cause().unwrap_or(cause).into_error("a call on its GPU", (rank, world_size)),
        };
        self.failed = Some(error.clone());
        error
    }

    /// What the driver refused, told to all ranks if it is the loss of the context.
    #[cold]
    fn refused(&mut self, error: unisono_cuda::Error) -> Error {
        let rank = self.seat.rank();
        if let Some(cause) = lost_context(&error, &self.control) {
            self.control.fail(&cause);
            self.failed = Some(Error::Cuda { rank, error: error.clone() });
        }
        Error::Cuda { rank, error }
    }

    /// Waits until everything is done that this process gave to the device: kernels that wait for others leave in time. What
    /// graphs that are gone kept goes, too: nobody waits for us yet.
    pub(crate) fn drain(&mut self) -> Result<()> {
        self.control.check_process()?;
        self.device.synchronize().map_err(|error| self.refused(error))?;
        self.seats.iter_mut().try_for_each(Self::drain)?;
        unisono_cuda::capture::drop_released();
        Ok(())
    }

    /// Form and grid of a call, as `explain` tells them.
    fn decide(&self, kind: Kind, bytes: usize, size: usize) -> Launch {
        if kind.is_message() {
            let lanes = if matches!(kind, Kind::SendRecv { .. }) { 2 } else { 1 };
            let launch = self.rules.messages(lanes, bytes);
            return Launch { blocks: launch.blocks * lanes as u32, ..launch };
        }
        if let Kind::AllReduceRmsNorm { hidden, .. } = kind {
            return self.decide_rows((bytes, size), hidden as usize);
        }
        self.rules.decide(&Question { kind, bytes, size, is_reachable: false })
    }
}

/// The arguments of a call with these parts of sizes of their own, whose sides begin where `args` says.
#[cold]
fn uneven_args(args: &Args, parts: &[Part], plan: &Plan) -> UnevenArgs {
    let mut uneven = UnevenArgs { args: *args, part_bytes: [0; MAX_RANKS] };
    let (args, rank) = (&mut uneven.args, args.rank as usize);
    let (has_parts_in, _) = kernels::parts(plan.header.kind);
    let side = if has_parts_in { &mut args.sources } else { &mut args.targets };
    let base = side[rank];
    for ((at, bytes), part) in side.iter_mut().zip(&mut uneven.part_bytes).zip(parts) {
        (*at, *bytes) = (base + part.at as u64, (part.count * plan.dtype.size()) as u64);
    }
    args.is_same = u32::from(args.sources[rank] == args.targets[rank]);
    uneven
}

/// Form and grid as the header carries them; the recorder keeps the lower half.
const fn launch_word(launch: Launch) -> u64 {
    launch.form as u64
        | (launch.blocks as u64) << 8
        | (launch.threads as u64) << 20
        | (launch.tile as u64) << 32
}

const _: () = assert!(HEADER_LAUNCH < call::HEADER_WORDS);
