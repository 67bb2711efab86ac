//! The communicator: one rank's end of a world, from meeting to farewell.
//!
//! Over 500 lines because every public method says who calls it and what it answers.

use std::cell::{RefCell, RefMut};
use std::sync::Arc;
use std::time::Duration;

use unisono_core::call::CallHeader;
use unisono_core::layout::{ControlLayout, WindowLayout};
use unisono_core::recorder::Presence;
use unisono_core::settings::{Settings, Spin};
use unisono_core::topology::Topology;
use unisono_core::{Element, ReduceOp};
use unisono_node::{SharedMemory, ThreadHub};
use unisono_sync::{Deadline, WaitPolicy};

use crate::buffer::RawBuffer;
use crate::builder::Builder;
use crate::call::{Call, Kind};
use crate::cause::Cause;
use crate::collectives::{Engine, EngineConfig};
use crate::control::{About, Control, LEFT};
use crate::error::{Error, Result};
use crate::neighbours::{Host, Neighbours, Watch};
use crate::observer::Observer;
use crate::operations::Operations;
use crate::stream::{OnStream, Stream};
use crate::tuning::{AskedBy, Selection};
use crate::window::{Limits, Memory, Window};

/// Under which the control memory is handed over; windows use their ids, which start at 1.
const CONTROL_ITEM: u32 = 0;
/// Under which ranks agree on the next generation. No window gets so far.
pub(crate) const AGREEMENT_ITEM: u32 = u32::MAX;
/// The longest that the collective end may take, whatever the patience.
const DESTROY_PATIENCE: Duration = Duration::from_secs(30);

/// One rank of a world. It may move between threads, but one thread operates it at a time (`Send`, not `Sync`); other
/// threads use an [`Observer`].
///
/// Dropping it without [`Communicator::destroy`] tells the others that this rank left; their next wait for it is an
/// error. Dropping never blocks and never panics.
#[derive(Debug)]
pub struct Communicator {
    /// Before the control memory, which it keeps.
    #[cfg(feature = "cuda")]
    pub(crate) gpu: Option<RefCell<crate::gpu::Gpu>>,
    /// What that was made from, for communicators that come from this one.
    #[cfg(feature = "cuda")]
    pub(crate) origin: Option<Arc<crate::gpu::Origin>>,
    engine: RefCell<Engine>,
    pub(crate) control: Arc<Control>,
    /// Declared before the neighbours, so that it ends before the connections may.
    pub(crate) watch: Option<Watch>,
    pub(crate) neighbours: Neighbours,
    /// Where each rank runs, for messages.
    pub(crate) places: Arc<[String]>,
    pub(crate) topology: Arc<Topology>,
    pub(crate) selection: Arc<Selection>,
    rank: usize,
    pub(crate) patience: Option<Duration>,
    pub(crate) destroyed: bool,
}

/// What a communicator is assembled from.
pub(crate) struct Parts {
    /// Where each rank runs, as `host gpu07, pid 4121`.
    pub(crate) places: Arc<[String]>,
    pub(crate) topology: Arc<Topology>,
    pub(crate) neighbours: Neighbours,
    pub(crate) memory: Arc<SharedMemory>,
    /// How algorithms are chosen.
    pub(crate) selection: Arc<Selection>,
    /// What the memory tells readers of other processes.
    pub(crate) about: About,
}

impl Communicator {
    /// Joins the world that the launcher of this process describes: `unisono run`, `torchrun`, `mpirun` (Open MPI,
    /// MPICH), `srun`, or plain `RANK` / `WORLD_SIZE` / `MASTER_ADDR` / `MASTER_PORT`. Every rank calls it.
    ///
    /// # Errors
    /// No launcher was found, or it said only half; and those of [`Builder::build`].
    pub fn from_env() -> Result<Self> {
        Builder::from_env()?.build()
    }

    /// A communicator from a store or a unique id.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// A world whose ranks are threads of this process: one communicator per rank, to be moved to its thread. They
    /// share one mapping.
    ///
    /// # Errors
    /// A world size of 0 or above 1,024; memory that cannot be had; `UNISONO_*` settings that cannot be read.
    pub fn threads(world_size: usize) -> Result<Vec<Self>> {
        Self::threads_with(world_size, &crate::builder::environment_settings()?)
    }

    pub(crate) fn threads_with(world_size: usize, settings: &Settings) -> Result<Vec<Self>> {
        unisono_core::Member::new(0, world_size)?;
        ControlLayout::check(world_size)?;
        let tuning = crate::tuning::of_settings(settings)?;
        let selection = Arc::new(Selection::new(settings, tuning, AskedBy::Setting, world_size));
        let host = unisono_node::identity::host();
        let topology = Arc::new(Topology::one_host(&host.name, world_size));
        let memory = Arc::new(SharedMemory::create(Control::bytes(world_size))?);
        let hub = Arc::new(ThreadHub::new(world_size));
        let place = format!("thread of pid {}", std::process::id());
        let places: Arc<[String]> = vec![place; world_size].into();
        let parts = |rank| Parts {
            places: places.clone(),
            topology: topology.clone(),
            neighbours: Neighbours::world(Host::Threads(hub.clone()), rank, world_size, 0),
            memory: memory.clone(),
            selection: selection.clone(),
            about: About {
                job: "threads".to_owned(),
                generation: 0,
                host: host.name.clone(),
                is_recording: settings.recorder,
            },
        };
        let policy = wait_policy(settings, world_size);
        let ranks: Vec<_> = (0..world_size).map(|rank| Self::assemble(parts(rank), policy)).collect();
        ranks.iter().for_each(|rank| rank.engine().have_met());
        Ok(ranks)
    }

    pub(crate) fn assemble(parts: Parts, policy: WaitPolicy) -> Self {
        let Parts { places, topology, neighbours, memory, selection, about } = parts;
        let rank = neighbours.me();
        let name = |(rank, place): (usize, &String)| format!("rank {rank} ({place})");
        let names = places.iter().enumerate().map(name).collect();
        let control = Arc::new(Control::new(memory, rank, names, about));
        let watch = neighbours.watch(control.clone());
        let engine = Engine::new(EngineConfig {
            control: control.clone(),
            rank,
            policy,
            rules: selection.rules,
            generation: neighbours.generation(),
        });
        Self {
            #[cfg(feature = "cuda")]
            gpu: None,
            #[cfg(feature = "cuda")]
            origin: None,
            engine: RefCell::new(engine),
            control,
            watch,
            neighbours,
            places,
            topology,
            rank,
            selection,
            patience: policy.patience,
            destroyed: false,
        }
    }

    /// One communicator for each of `devices`, GPUs of this process: rank r works on `devices[r]`. One thread may drive them
    /// all (each call only enqueues), or each is moved to a thread of its own. Operations on host memory block until all
    /// ranks make them, so a single thread submits those in a [`group`](crate::group()), as it does with windows, `split`,
    /// `duplicate` and the end.
    ///
    /// ```no_run
    /// # use unisono::{BufMut, Communicator, Operations, ReduceOp, Stream, cuda};
    /// let ranks = Communicator::local(&[0, 1])?;
    /// for rank in &ranks {
    ///     let device = cuda::Device::new(rank.rank() as u32)?;
    ///     let (stream, memory) = (Stream::from(cuda::Stream::new(&device)?), cuda::DeviceBuffer::new(&device, 4096)?);
    ///     // SAFETY: the memory is used by nobody else and outlives the stream's work.
    ///     let x = unsafe { BufMut::<f32>::cuda(memory.address(), 1024, device.ordinal()) };
    ///     rank.on(&stream).all_reduce(x, ReduceOp::Sum)?;
    /// #   std::mem::forget((stream, memory));
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Cuda`] without a driver or such a device; as [`Communicator::threads`].
    #[cfg(feature = "cuda")]
    pub fn local(devices: &[u32]) -> Result<Vec<Self>> {
        Builder::new().local(devices)
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn local_with(
        devices: &[u32],
        settings: &Settings,
        extra: &crate::gpu::Extra,
    ) -> Result<Vec<Self>> {
        let open = |(rank, ordinal): (usize, &u32)| {
            unisono_cuda::Device::new(*ordinal).map_err(|error| Error::Cuda { rank, error })
        };
        let opened: Vec<_> = devices.iter().enumerate().map(open).collect::<Result<_>>()?;
        crate::gpu::check_ranks(devices.len(), 0)?;
        let mut ranks = Self::threads_with(devices.len(), settings)?;
        ranks.iter().zip(&opened).try_for_each(|(rank, device)| rank.selection.check_device(device))?;
        let gpus = crate::gpu::attach::attach_local(&ranks, &opened, settings, extra)?;
        for (rank, (origin, gpu)) in ranks.iter_mut().zip(gpus) {
            rank.attach(Arc::new(origin), gpu);
        }
        Ok(ranks)
    }

    /// The device that this rank works on, by its number in this process.
    #[cfg(feature = "cuda")]
    pub fn device(&self) -> Option<u32> {
        self.gpu.as_ref().map(|gpu| gpu.borrow().ordinal())
    }

    /// The devices that this rank works on, by their numbers in this process; none without GPUs.
    #[cfg(feature = "cuda")]
    pub fn devices(&self) -> Vec<u32> {
        let devices = self.origin.iter().flat_map(|origin| &origin.devices);
        devices.map(unisono_cuda::Device::ordinal).collect()
    }

    /// What a call on the GPU takes: of `kind`, with `bytes` per rank of elements of `size` bytes. `None` without a GPU. Rows to be
    /// normalised that take several kernels begin with an all-reduce, and this is its form.
    #[cfg(feature = "cuda")]
    pub fn gpu_choice(&self, kind: Kind, bytes: usize, size: usize) -> Option<unisono_core::device::Launch> {
        self.gpu.as_ref().map(|gpu| gpu.borrow().choice(kind, bytes, size))
    }

    /// By what calls on the GPU choose their forms; `None` without a GPU.
    #[doc(hidden)]
    #[cfg(feature = "cuda")]
    pub fn gpu_rules(&self) -> Option<unisono_core::device::select::Rules> {
        self.gpu.as_ref().map(|gpu| *gpu.borrow().rules())
    }

    /// From now on calls on the GPU take the form that `rules` ask for, and the grids of their table: for tuning, which so measures
    /// several in one communicator. All ranks change between the same two calls.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if there is no stream for copy engines that these rules ask for; then nothing has changed.
    #[doc(hidden)]
    #[cfg(feature = "cuda")]
    pub fn change_gpu_rules(&mut self, rules: &unisono_core::device::select::Rules) -> Result<()> {
        self.gpu.as_ref().map_or(Ok(()), |gpu| gpu.borrow_mut().change_rules(rules))
    }

    /// How the GPUs of this world reach each other; `None` without GPUs.
    #[cfg(feature = "cuda")]
    pub fn gpu_link(&self) -> Option<unisono_core::device::Link> {
        self.gpu.as_ref().map(|gpu| gpu.borrow().rules().link)
    }

    /// Submits a call in the order of `stream`.
    #[inline]
    pub(crate) fn submit_on(&self, call: &Call<'_>, stream: &Stream) -> Result<()> {
        let mut engine = self.engine.borrow_mut();
        #[cfg(feature = "cuda")]
        if let Some(stream) = stream.as_cuda() {
            let Some(gpu) = &self.gpu else {
                return Err(crate::gpu::without_device(call.kind, self.rank, stream));
            };
            return gpu.borrow_mut().submit(&mut engine, call, stream);
        }
        let _ = stream;
        engine.submit(call)
    }

    /// Checks a call that is to be enqueued in `stream` later.
    #[cfg(feature = "cuda")]
    pub(crate) fn prepare_on(
        &self,
        call: &Call<'_>,
        stream: &unisono_cuda::Stream,
    ) -> Result<crate::gpu::Prepared> {
        let Some(gpu) = &self.gpu else {
            return Err(crate::gpu::without_device(call.kind, self.rank, stream));
        };
        gpu.borrow_mut().prepare(&mut self.engine.borrow_mut(), call, stream)
    }

    /// Enqueues what was checked.
    #[cfg(feature = "cuda")]
    pub(crate) fn enqueue_on(
        &self,
        prepared: &crate::gpu::Prepared,
        stream: &unisono_cuda::Stream,
    ) -> Result<()> {
        let Some(gpu) = &self.gpu else { unreachable!("it was checked on a GPU") };
        gpu.borrow_mut().enqueue(prepared, stream)
    }

    /// Receives a message from any rank in the order of `stream`.
    pub(crate) fn recv_any_on(&self, target: &RawBuffer, tag: u32, stream: &Stream) -> Result<usize> {
        let mut engine = self.engine.borrow_mut();
        #[cfg(feature = "cuda")]
        if let Some(stream) = stream.as_cuda() {
            let Some(gpu) = &self.gpu else {
                let kind = Kind::Recv { from: u32::MAX, tag };
                return Err(crate::gpu::without_device(kind, self.rank, stream));
            };
            return gpu.borrow_mut().receive_any(&mut engine, (*target, tag), stream);
        }
        let _ = stream;
        engine.receive_any(target, tag)
    }

    /// The control memory of `neighbours`. Collective.
    pub(crate) fn share_control(
        neighbours: &Neighbours,
        deadline: Deadline,
        is_aborted: &dyn Fn() -> bool,
    ) -> Result<Arc<SharedMemory>> {
        neighbours.share(CONTROL_ITEM, Control::bytes(neighbours.world_size()), deadline, is_aborted)
    }

    /// The first meeting in shared memory: when it returns, every rank has arrived.
    pub(crate) fn meet(&self, patience: Duration) -> Result<()> {
        self.engine.borrow_mut().meet(CallHeader::bare(Kind::Barrier), Some(patience))
    }

    /// The engine, for one step: nothing that is called meanwhile asks for it again.
    pub(crate) fn engine(&self) -> RefMut<'_, Engine> {
        self.engine.borrow_mut()
    }

    /// This rank, from 0.
    pub const fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.control.world_size()
    }

    /// The generation of this communicator: what [`Builder::generation`] said (0 by default) and one more for each time that it
    /// was shrunk. Communicators split off begin with the generation of the one that they come from.
    pub const fn generation(&self) -> u32 {
        self.neighbours.generation()
    }

    /// This rank's number among the ranks of its host.
    pub fn local_rank(&self) -> usize {
        self.topology.local_rank(self.rank)
    }

    /// Who reaches whom, and how.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// A handle for other threads: it can abort and inspect this communicator at any time.
    pub fn observer(&self) -> Observer {
        #[cfg(feature = "cuda")]
        let gpus = self.gpu.as_ref().map(|gpu| gpu.borrow().explain());
        #[cfg(not(feature = "cuda"))]
        let gpus = None;
        Observer::new(self.control.clone(), self.topology.clone(), (self.rank, gpus), self.selection.clone())
    }

    /// The same operations in the order of `stream`. On [`Stream::host`] they are complete on return.
    pub fn on<'c>(&'c self, stream: &'c Stream) -> OnStream<'c> {
        OnStream::new(self, stream)
    }

    /// Receives the next message with `tag` from whichever rank sends one, and returns that rank. Ranks are served in turn. Into
    /// memory of a GPU: [`OnStream::recv_any`].
    ///
    /// # Errors
    /// As [`Operations::recv`]; [`Error::Argument`] in a world of one rank.
    pub fn recv_any<'b, T: Element>(&self, dst: impl Into<crate::BufMut<'b, T>>, tag: u32) -> Result<usize> {
        self.recv_any_on(&dst.into().raw(), tag, &Stream::host())
    }

    /// Ok, or the first cause why this communicator failed, on the host or in kernels that ran so far. Waits for nobody.
    ///
    /// # Errors
    /// The first cause.
    pub fn check(&self) -> Result<()> {
        // What its kernels found is closer to the cause than what others tell of it.
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &self.gpu {
            gpu.borrow_mut().check()?;
        }
        self.engine.borrow_mut().check()
    }

    /// Memory of `count` elements on every rank, zeroed, that all ranks map: collectives on it need no staging.
    /// Collective: every rank calls it, with the same type, count and kind of memory.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the counts differ. If a rank cannot have the memory, all get an error, and the communicator still
    /// works: that rank why ([`Error::Node`]; of a GPU [`Error::Device`], [`Error::Cuda`] or [`Error::Argument`];
    /// [`Error::Builder`] in a build without GPUs), the others [`Error::Node`].
    pub fn window<T: Element>(&self, count: usize, memory: Memory) -> Result<Window<T>> {
        let mut engine = self.engine.borrow_mut();
        let header = CallHeader {
            dtype: Some(T::DTYPE),
            count: count as u64,
            parts: memory as u64,
            ..CallHeader::bare(Kind::Window)
        };
        engine.meet(header, self.patience)?;
        let id = engine.next_window_id();
        let layout = WindowLayout::new(self.world_size(), count, size_of::<T>())?;
        let deadline = self.patience.map_or(Deadline::NEVER, Deadline::after);
        let is_aborted = || self.control.abort().raised().is_some();
        let limits = Limits { deadline, is_aborted: &is_aborted };
        let made = self.make_window(memory, id, layout, limits);
        // Either all have it or none: a rank that could not map it says so, and everybody lets go of it.
        let mut all_have_it = [u8::from(made.is_ok())];
        engine.submit(&Call::new(
            Kind::AllReduce { op: ReduceOp::Min },
            [crate::BufMut::from(&mut all_have_it).raw()],
        ))?;
        let made = made?;
        if all_have_it[0] == 0 {
            let (bytes, message) =
                (layout.total_bytes(), "another rank of this host could not map it".to_owned());
            return Err(Error::Node(unisono_node::Error::Memory { bytes, action: "window", message }));
        }
        let held = self.open_window(&mut engine, id, made);
        Ok(Window::new(self.control.clone(), held, id, count))
    }

    /// Ends window `id`, made by the communicator of `owner`, for collectives: because it is closed or becomes one-sided, as
    /// `kind` says. Collective.
    ///
    /// # Errors
    /// [`Error::Argument`] if that is another communicator; those of a failed one.
    pub(crate) fn end_window(&self, kind: Kind, id: u64, owner: &Arc<Control>) -> Result<()> {
        crate::window::check_owner(kind, id, owner, self)?;
        let mut engine = self.engine.borrow_mut();
        let header = CallHeader { target_window: id, ..CallHeader::bare(kind) };
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &self.gpu {
            gpu.borrow_mut().drain()?;
        }
        engine.meet(header, self.patience)?;
        engine.close_window(id);
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &self.gpu {
            gpu.borrow_mut().close_window(id);
        }
        Ok(())
    }

    /// Ends this communicator together with all other ranks: returns when every rank has called it, at the latest after
    /// 30 s (or the timeout, if that is shorter).
    ///
    /// # Errors
    /// The first cause of a failure, or [`Error::Timeout`] naming the ranks that did not come.
    pub fn destroy(mut self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &self.gpu {
            let mut gpu = gpu.borrow_mut();
            gpu.drain()?;
            gpu.check()?;
        }
        let patience = self.patience.map_or(DESTROY_PATIENCE, |patience| patience.min(DESTROY_PATIENCE));
        let result = self.engine.borrow_mut().meet(CallHeader::bare(Kind::Destroy), Some(patience));
        self.control.leave(if result.is_ok() { Presence::Destroyed } else { Presence::Dropped });
        self.destroyed = result.is_ok();
        result
    }
}

impl<'b> Operations<'b> for Communicator {
    type Done = ();

    #[inline]
    fn submit(&self, call: Call<'b>) -> Result<()> {
        self.engine.borrow_mut().submit(&call)
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // A forked child has no part in this, and must not wait for locks that were held when it was made.
        if self.control.check_process().is_err() || self.control.world_size() == 1 {
            return;
        }
        if !self.destroyed {
            self.control.fail(&Cause::Dropped { rank: self.rank as u32 });
            self.control.leave(Presence::Dropped);
            self.neighbours.close();
        }
        // Those who agree on who goes on need not wait for us; who shrank has settled it already.
        self.control.fate(self.rank).settle(LEFT);
    }
}

/// How this world waits. A peer on another core answers within a microsecond, so a few are spun; from then on every
/// poll offers the core to others, because the scheduler may have put the peer on ours. Where ranks outnumber cores,
/// spinning keeps the peer from running.
pub(crate) fn wait_policy(settings: &Settings, local_ranks: usize) -> WaitPolicy {
    /// A pause and a poll, roughly; the exact figure does not matter.
    const SPIN_NS: u128 = 12;
    // Not those that this rank is bound to: its peers are bound to others.
    let cores = unisono_node::identity::processors();
    let spin_for = match settings.spin {
        Spin::For(time) => time,
        Spin::Auto if local_ranks <= cores => Duration::from_micros(5),
        Spin::Auto => Duration::ZERO,
    };
    WaitPolicy {
        spins: u32::try_from(spin_for.as_nanos() / SPIN_NS).unwrap_or(u32::MAX / 2),
        yield_for: Duration::from_millis(2),
        patience: settings.timeout,
        warn_after: settings.warn_after,
    }
}
