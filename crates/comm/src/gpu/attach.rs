//! How the ranks of a world come to share arenas: as processes over the node plane, or as ranks of one process.

use std::sync::Arc;

use unisono_core::device::layout::MAX_RANKS;
use unisono_core::device::{ArenaLayout, Link};
use unisono_core::hello::DeviceIdentity;
use unisono_core::settings::{HandleKind, Require, Settings};
use unisono_cuda::{Device, SharedPages, Stream, Uuid};
use unisono_node::SharedMemory;
use unisono_sync::Deadline;

use super::arenas::{Arenas, obstacle};
use super::budget::Budget;
use super::kernels::has_bulk_copies;
use super::{Config, Extra, Gpu, Origin, peers};
use crate::call::Kind;
use crate::communicator::Communicator;
use crate::error::{Error, Result};

/// Under which arenas are handed over: no window gets so far.
const ARENA_ITEM: u32 = u32::MAX - 1;
const HOST_ARENA_ITEM: u32 = u32::MAX - 2;

/// What a rank can do, and so the most that all will.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Can {
    Nothing = 0,
    Host = 1,
    Device = 2,
    /// With copies that run on their own.
    Copies = 3,
}

/// Who takes part, and how: a communicator of processes, or of threads that all take part at once.
pub(crate) struct Attachment<'a> {
    pub(crate) communicator: &'a Communicator,
    pub(crate) origin: &'a Origin,
    pub(crate) deadline: Deadline,
    /// The least of what all ranks of the communicator say. Each of them asks [`ROUNDS`] times, whatever went wrong.
    pub(crate) least: &'a dyn Fn(u8) -> Result<u8>,
    pub(crate) is_aborted: &'a dyn Fn() -> bool,
}

/// How often [`Attachment::run`] asks what the least is.
pub(crate) const ROUNDS: usize = 3;

impl Attachment<'_> {
    /// Makes the GPU's side of the communicator. Collective. Whether all ranks have theirs is still to be asked
    /// ([`all_or_none`]).
    pub(crate) fn run(&self) -> Result<Gpu> {
        // What is known before anything is shared: who reaches whom.
        let obstacle = self.obstacle();
        let can = self.agree(match &obstacle {
            Ok(None) => Can::Device,
            Ok(Some(_)) => Can::Host,
            Err(_) => Can::Nothing,
        })?;
        let pages = (can == Can::Device).then(|| self.share_pages());
        let can = self.agree(match &pages {
            None => can,
            Some(Ok(_)) if has_bulk_copies(&self.origin.device, Link::Device) => Can::Copies,
            Some(Ok(_)) => Can::Device,
            Some(Err(error)) if self.is_final(error) => Can::Nothing,
            Some(Err(_)) => Can::Host,
        })?;
        let budget = Budget::take(&self.origin.device, self.origin.settings.multiprocessors);
        let most_blocks = (self.least)(budget.blocks() as u8)?;
        let arenas = self.arenas(can, obstacle?, pages)?;
        let rank = self.communicator.rank();
        if self.origin.refuses(rank) {
            return Err(Error::Device { rank, reason: "a test wants it so".to_owned() });
        }
        let link = if can >= Can::Device { Link::Device } else { Link::Host };
        let selection = &self.communicator.selection;
        let config = Config::new(self.origin, selection, (link, can == Can::Copies, most_blocks.into()));
        let control = self.communicator.control.clone();
        Gpu::new(&self.origin.device, control, arenas, (&config, budget), self.origin.siblings.clone())
    }

    /// Why our device does not reach that of some rank, if it does not.
    fn obstacle(&self) -> Result<Option<String>> {
        if !self.origin.settings.peer_access {
            return Ok(Some("UNISONO_PEER_ACCESS=off".to_owned()));
        }
        let mut obstacles = None;
        for peer in self.origin.devices() {
            let found = obstacle(&self.origin.device, *peer, self.communicator.rank())?;
            obstacles = found.or(obstacles);
        }
        Ok(obstacles)
    }

    /// The arenas of all ranks, where they agreed to have them.
    fn arenas(
        &self,
        can: Can,
        obstacle: Option<String>,
        pages: Option<Result<Vec<Arc<SharedPages>>>>,
    ) -> Result<Arenas> {
        let rank = self.communicator.rank();
        let refused = match (can, pages) {
            (Can::Device | Can::Copies, Some(pages)) => return pages.map(Arenas::Device),
            (Can::Nothing, Some(Err(error))) if self.is_final(&error) => return Err(error),
            (Can::Nothing, _) => return Err(elsewhere(rank)),
            (_, Some(Err(error))) => Some(error.to_string()),
            _ => None,
        };
        let reason =
            obstacle.or(refused).unwrap_or_else(|| "another rank cannot reach the others".to_owned());
        if self.origin.settings.require == Require::Nvlink {
            return Err(Error::NoPeerAccess { rank, reason });
        }
        tracing::warn!("rank {rank}: the GPUs meet in pinned host memory, because {reason}");
        self.share_host()
    }

    /// Whether host memory would be no way around `error`: it says nothing of how the GPUs reach each other, or something else was
    /// asked for.
    fn is_final(&self, error: &Error) -> bool {
        let is_shortage = matches!(error, Error::Cuda { error, .. } if error.is_shortage());
        is_shortage || self.handles() == HandleKind::Fabric
    }

    /// The least that all ranks can.
    fn agree(&self, ours: Can) -> Result<Can> {
        let least = (self.least)(ours as u8)?;
        Ok([Can::Nothing, Can::Host, Can::Device, Can::Copies][usize::from(least).min(3)])
    }

    /// Threads of one process hand over the memory itself.
    const fn handles(&self) -> HandleKind {
        match self.communicator.neighbours.is_one_process() {
            true => HandleKind::Auto,
            false => self.origin.settings.handles,
        }
    }

    /// Makes our arena and maps those of all others.
    fn share_pages(&self) -> Result<Vec<Arc<SharedPages>>> {
        let (device, handles) = (&self.origin.device, self.handles());
        let layout = ArenaLayout::new(self.origin.devices().len(), Link::Device);
        let bytes = layout.total_bytes();
        let kind = peers::OnDevices {
            rank: self.communicator.rank(),
            device,
            bytes,
            handles,
            make: || Arenas::create(device, &layout, self.origin.epoch(), handles),
        };
        let neighbours = &self.communicator.neighbours;
        peers::share(neighbours, &kind, (ARENA_ITEM, bytes), self.deadline, self.is_aborted)
    }

    fn share_host(&self) -> Result<Arenas> {
        let (rank, ranks) = (self.communicator.rank(), self.origin.devices().len());
        let layout = ArenaLayout::new(ranks, Link::Host);
        let bytes = layout.total_bytes() * ranks;
        let neighbours = &self.communicator.neighbours;
        let memory = neighbours.share(HOST_ARENA_ITEM, bytes, self.deadline, self.is_aborted)?;
        Arenas::host(&self.origin.device, memory, layout).map_err(|error| Error::Cuda { rank, error })
    }
}

/// What rank `rank` has made on its GPU, if all ranks have made theirs; else an error on all of them, which then have given
/// back what they made, by `undo`. `least` tells the least of what all say; if it fails, nothing is agreed.
pub(crate) fn all_or_none<T>(
    made: Result<T>,
    rank: usize,
    undo: impl FnOnce(T),
    least: &dyn Fn(u8) -> Result<u8>,
) -> Result<Result<T>> {
    if least(u8::from(made.is_ok()))? != 0 {
        return Ok(made);
    }
    let error = match made {
        Ok(made) => {
            undo(made);
            elsewhere(rank)
        }
        Err(error) => error,
    };
    least(1)?;
    Ok(Err(error))
}

fn elsewhere(rank: usize) -> Error {
    Error::Device { rank, reason: "another rank cannot work on its GPU; it says why".to_owned() }
}

/// The GPU's sides of the ranks of one process, by rank, and what they are made from. One thread makes them all.
pub(crate) fn attach_local(
    communicators: &[Communicator],
    devices: &[Device],
    settings: &Settings,
    extra: &Extra,
) -> Result<Vec<(Origin, Gpu)>> {
    let failed = |rank: usize| move |error| Error::Cuda { rank, error };
    let mut obstacle = (!settings.peer_access).then(|| "UNISONO_PEER_ACCESS=off".to_owned());
    for (rank, device) in devices.iter().enumerate() {
        for peer in devices {
            if obstacle.is_none() && !device.reaches(peer).map_err(failed(rank))? {
                obstacle = Some(format!("cuda:{} does not reach cuda:{}", device.ordinal(), peer.ordinal()));
            }
        }
    }
    let ranks = devices.len();
    let link = if obstacle.is_none() { Link::Device } else { Link::Host };
    if let (Some(reason), Require::Nvlink) = (&obstacle, settings.require) {
        return Err(Error::NoPeerAccess { rank: 0, reason: reason.clone() });
    }
    if let Some(reason) = obstacle {
        tracing::warn!("the GPUs meet in pinned host memory, because {reason}");
    }
    let layout = ArenaLayout::new(ranks, link);
    let mut pages = Vec::new();
    let mut memory = None;
    match link {
        Link::Device => {
            for (rank, device) in devices.iter().enumerate() {
                let arena = Arc::new(
                    Arenas::create(device, &layout, extra.epoch, HandleKind::Auto).map_err(failed(rank))?,
                );
                for peer in devices.iter().filter(|peer| *peer != device) {
                    arena.allow(peer).map_err(failed(rank))?;
                }
                pages.push(arena);
            }
        }
        Link::Host => memory = Some(Arc::new(SharedMemory::create(layout.total_bytes() * ranks)?)),
    }
    let uuids: Vec<Uuid> = devices.iter().map(|device| device.facts().uuid).collect();
    let bulk_copies = devices.iter().all(|device| has_bulk_copies(device, link));
    let budgets: Vec<Budget> =
        devices.iter().map(|device| Budget::take(device, settings.multiprocessors)).collect();
    let most_blocks = budgets.iter().map(Budget::blocks).min().unwrap_or(1);
    let make = |((rank, device), budget): ((usize, &Device), Budget)| {
        let arenas = match &memory {
            None => Arenas::Device(pages.clone()),
            Some(memory) => Arenas::host(device, memory.clone(), layout).map_err(failed(rank))?,
        };
        let pinned = extra.pinned_ways.get(rank).copied().unwrap_or(settings.pinned);
        let settings = Settings { pinned, ..settings.clone() };
        let mut origin = Origin::new(device, uuids.clone(), &settings, extra);
        let others = (0..ranks).filter(|other| *other != rank);
        origin.siblings = others.map(|other| devices[other].clone()).collect();
        let selection = &communicators[rank].selection;
        let config = Config::new(&origin, selection, (link, bulk_copies, most_blocks));
        let control = communicators[rank].control.clone();
        let gpu = Gpu::new(device, control, arenas, (&config, budget), origin.siblings.clone())?;
        Ok((origin, gpu))
    };
    devices.iter().enumerate().zip(budgets).map(make).collect()
}

/// What tells `device` from all others, for the table of ranks.
pub(crate) fn identity(device: &Device) -> DeviceIdentity {
    let facts = device.facts();
    DeviceIdentity { uuid: facts.uuid.0, name: facts.name.clone(), pci: facts.pci.clone() }
}

/// Refuses worlds for whose ranks an arena has no room.
pub(crate) fn check_ranks(world_size: usize, rank: usize) -> Result<()> {
    if world_size <= MAX_RANKS {
        return Ok(());
    }
    let reason = format!("at most {MAX_RANKS} ranks share GPUs of one host, and these are {world_size}");
    Err(Error::Device { rank, reason })
}

/// That a communicator has no GPU for what is asked of it.
pub(crate) fn without_gpu(rank: usize) -> Error {
    Error::Device { rank, reason: "this communicator was made without one (Builder::device)".to_owned() }
}

#[cold]
pub(crate) fn without_device(kind: Kind, rank: usize, stream: &Stream) -> Error {
    Error::Argument {
        call: kind.name(),
        rank,
        what: "stream",
        expected: "the host's, because this communicator was made without a GPU (Builder::device)".to_owned(),
        got: format!("one of cuda:{}", stream.device().ordinal()),
    }
}
