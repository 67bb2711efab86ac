//! Pinned windows: host memory that the CPUs of all ranks and all GPUs of the host reach.
//!
//! Each rank makes its own copy, in one of two ways. *numa*: the driver takes memory on the NUMA node of the rank's GPU and
//! exports a descriptor of it. *memfd*: sealed memory, as other windows have it, that each process registers with the driver.
//! Ranks may differ. Who receives a descriptor asks the kernel what it is of, and nobody agrees on anything.
//!
//! The CPU must not touch a copy while a kernel works on it. So behind each call on a pinned window stands an event, and the
//! host waits for it before it lends the window or begins a collective on it.

use std::sync::Arc;

use unisono_core::settings::PinnedWay;
use unisono_cuda::{Device, Event, Location, RegisteredHost, SharedPages, Stream};
use unisono_node::{SharedMemory, descriptor};
use unisono_sync::local::Flag;

use super::peers::{self, Exported, Kind, unusable};
use super::seats::Seat;
use super::watch::trouble;
use crate::control::Control;
use crate::error::{Error, Result};

/// The copies of all ranks.
#[derive(Debug)]
pub(crate) struct Pinned {
    parts: Vec<Arc<Part>>,
    enqueued: Arc<Enqueued>,
}

impl Pinned {
    pub(super) const fn new(parts: Vec<Arc<Part>>, enqueued: Arc<Enqueued>) -> Self {
        Self { parts, enqueued }
    }

    /// Where each rank's copy begins, as the CPU of this process calls it.
    pub(crate) fn starts(&self) -> impl Iterator<Item = usize> {
        self.parts.iter().map(|part| part.start())
    }

    /// That of `rank`.
    pub(super) fn start(&self, rank: usize) -> usize {
        self.parts[rank].start()
    }

    /// Where each rank's copy begins, as our kernels call it.
    pub(super) fn addresses(&self) -> impl Iterator<Item = u64> {
        self.parts.iter().map(|part| part.address())
    }

    pub(super) const fn enqueued(&self) -> &Arc<Enqueued> {
        &self.enqueued
    }

    /// Waits until our GPU is done with the calls on pinned windows that it was given.
    pub(crate) fn settle(&self) -> Result<()> {
        self.enqueued.settle()
    }
}

/// The copy of one rank, as this process reaches it. Threads share it.
#[derive(Debug)]
pub(crate) enum Part {
    /// Sealed memory, registered with the driver for as long as it is mapped: the registration goes first.
    Memfd { registered: Arc<RegisteredHost>, memory: Arc<SharedMemory> },
    /// Memory of the driver.
    Numa(SharedPages),
}

impl Part {
    fn start(&self) -> usize {
        match self {
            Self::Memfd { memory, .. } => memory.as_ptr().expose_provenance(),
            Self::Numa(pages) => pages.address() as usize,
        }
    }

    fn address(&self) -> u64 {
        match self {
            Self::Memfd { registered, .. } => registered.address(),
            Self::Numa(pages) => pages.address(),
        }
    }
}

/// What a communicator has put into streams that touches pinned windows.
#[derive(Debug)]
pub(crate) struct Enqueued {
    control: Arc<Control>,
    device: Device,
    /// Behind the latest call. Calls of a communicator run one after the other, on whichever stream.
    latest: Event,
    /// Whether such a call is in a graph: nobody tells us when that is launched.
    is_captured: Flag,
}

impl Enqueued {
    pub(super) fn new(control: Arc<Control>, device: &Device) -> Result<Self> {
        let rank = control.member().0;
        let latest = Event::new(device, false).map_err(|error| Error::Cuda { rank, error })?;
        Ok(Self { control, device: device.clone(), latest, is_captured: Flag::new() })
    }

    /// A call was put into `stream`, or into the graph that this is captured into.
    pub(super) fn note(&self, stream: &Stream, is_captured: bool) -> Result<()> {
        if is_captured {
            self.is_captured.raise();
            return Ok(());
        }
        self.latest.record(stream).map_err(|error| self.failed(error))
    }

    /// Waits for all calls so far; for everything on the device, if some may be in graphs. Kernels that wait for others leave in
    /// time. Those that gave up leave as if they were done, so the first cause is what tells.
    fn settle(&self) -> Result<()> {
        let done =
            if self.is_captured.is_raised() { self.device.synchronize() } else { self.latest.synchronize() };
        if let Some(cause) = trouble(&Seat::of_rank(self.control.clone()), || done.as_ref().err().cloned()) {
            // Somebody else may have been first; then all tell the same.
            self.control.fail(&cause);
        }
        match self.control.cause() {
            Some(cause) => Err(cause.into_error("a call on its GPU", self.control.member())),
            None => done.map_err(|error| self.failed(error)),
        }
    }

    fn failed(&self, error: unisono_cuda::Error) -> Error {
        Error::Cuda { rank: self.control.member().0, error }
    }
}

/// Copies of `bytes`, made in this way.
pub(super) struct OnHost<'a> {
    pub(super) rank: usize,
    pub(super) device: &'a Device,
    pub(super) bytes: usize,
    pub(super) way: PinnedWay,
}

impl Kind for OnHost<'_> {
    type Memory = Part;

    fn make(&self) -> Result<Part> {
        match self.way {
            PinnedWay::Memfd => self.make_memfd(),
            PinnedWay::Numa => self.make_numa(),
            PinnedWay::Auto => self.make_numa().or_else(|error| {
                tracing::debug!("rank {}: a pinned window is a registered memfd, because {error}", self.rank);
                self.make_memfd()
            }),
        }
    }

    fn export(&self, ours: &Part) -> Result<Exported> {
        let (descriptor, bytes) = match ours {
            Part::Memfd { memory, .. } => {
                let descriptor = std::os::fd::AsFd::as_fd(&**memory).try_clone_to_owned();
                let failed =
                    |error: std::io::Error| self.refused(format!("its memory is not handed over: {error}"));
                (descriptor.map_err(failed)?, memory.bytes())
            }
            Part::Numa(pages) => (pages.export().map_err(|error| self.failed(error))?, pages.bytes()),
        };
        Ok(Exported { descriptor: Some(descriptor), words: (bytes as u64).to_le_bytes().to_vec() })
    }

    fn import(&self, peer: usize, exported: Exported) -> Result<Part> {
        let (Some(theirs), Some((mapped, _))) =
            (exported.descriptor, peers::length(&exported.words, self.bytes))
        else {
            return Err(unusable(self.rank, peer));
        };
        match descriptor::kind(&theirs) {
            descriptor::Kind::Memory { .. } => self.register(SharedMemory::from_fd(theirs, self.bytes)?),
            descriptor::Kind::Other => {
                // For which node's CPUs the driver lets us in does not matter: they share our page tables.
                let here = Location::HostNuma(self.device.facts().numa_node.unwrap_or(0));
                let pages = SharedPages::import(self.device, theirs, mapped, here);
                pages.map(Part::Numa).map_err(|error| self.failed(error))
            }
        }
    }

    fn allow(&self, theirs: &Part) -> Result<()> {
        match theirs {
            // Registered for all devices of this process.
            Part::Memfd { .. } => Ok(()),
            Part::Numa(pages) => pages.allow(self.device).map_err(|error| self.failed(error)),
        }
    }
}

impl OnHost<'_> {
    fn make_memfd(&self) -> Result<Part> {
        self.register(SharedMemory::create(self.bytes)?)
    }

    fn register(&self, memory: SharedMemory) -> Result<Part> {
        let memory = Arc::new(memory);
        // SAFETY: a `Part` keeps the memory, and drops the registration before it.
        let registered = unsafe { RegisteredHost::shared(self.device, memory.as_ptr(), memory.bytes()) };
        Ok(Part::Memfd { registered: registered.map_err(|error| self.failed(error))?, memory })
    }

    /// On the NUMA node of our GPU, zeroed.
    fn make_numa(&self) -> Result<Part> {
        let facts = self.device.facts();
        let (Some(node), true) = (facts.numa_node, facts.takes_host_numa) else {
            let ordinal = self.device.ordinal();
            return Err(self.refused(format!(
                "cuda:{ordinal} takes no memory of a NUMA node of the host; UNISONO_PINNED=auto does without"
            )));
        };
        // The driver would take what there is not, and the system end some process for it.
        let available = unisono_node::memory::available_bytes();
        if self.bytes > available {
            let message = format!("only {available} are available");
            let bytes = self.bytes;
            return Err(Error::Node(unisono_node::Error::Memory { bytes, action: "the system", message }));
        }
        let pages = SharedPages::create(self.device, self.bytes, Location::HostNuma(node));
        let pages = pages.and_then(|pages| pages.fill(0).map(|()| pages));
        pages.map(Part::Numa).map_err(|error| self.failed(error))
    }

    fn failed(&self, error: unisono_cuda::Error) -> Error {
        Error::Cuda { rank: self.rank, error }
    }

    fn refused(&self, reason: String) -> Error {
        Error::Device { rank: self.rank, reason }
    }
}
