//! How the ranks of a world come to share arenas: as processes over the node plane, or as ranks of one process.

use std::sync::Arc;

use unisono_core::ReduceOp;
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
use super::{Config, Extra, Gpu, peers};
use crate::buffer::BufMut;
use crate::call::{Call, Kind};
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

/// Who takes part, and how.
pub(crate) struct Attachment<'a> {
    pub(crate) communicator: &'a Communicator,
    pub(crate) device: &'a Device,
    /// The device of each rank.
    pub(crate) devices: Vec<Uuid>,
    pub(crate) settings: &'a Settings,
    pub(crate) extra: &'a Extra,
    pub(crate) deadline: Deadline,
}

impl Attachment<'_> {
    /// Makes the GPU's side of a communicator of processes. Collective: it fails on all ranks or on none.
    pub(crate) fn run(&self) -> Result<Gpu> {
        let rank = self.communicator.rank();
        // What is known before anything is shared: who reaches whom.
        let mut obstacles = None;
        if !self.settings.peer_access {
            obstacles = Some("UNISONO_PEER_ACCESS=off".to_owned());
        }
        for peer in self.devices.iter().filter(|_| self.settings.peer_access) {
            if let Some(found) = obstacle(self.device, *peer, rank)? {
                obstacles = Some(found);
            }
        }
        let mut can = self.agree(if obstacles.is_some() { Can::Host } else { Can::Device })?;
        let mut arenas = None;
        if can == Can::Device {
            let shared = self.share_pages();
            let is_forced = self.settings.handles == HandleKind::Fabric;
            can = self.agree(match &shared {
                Ok(_) if has_bulk_copies(self.device, Link::Device) => Can::Copies,
                Ok(_) => Can::Device,
                Err(_) if is_forced => Can::Nothing,
                Err(_) => Can::Host,
            })?;
            match shared {
                Err(error) if is_forced => return Err(error),
                _ if can == Can::Nothing => return Err(elsewhere(rank)),
                Ok(pages) if can >= Can::Device => arenas = Some(Arenas::Device(pages)),
                Ok(_) => {}
                Err(error) => obstacles = Some(error.to_string()),
            }
        }
        let link = if can >= Can::Device { Link::Device } else { Link::Host };
        if link == Link::Host {
            let reason = obstacles.unwrap_or_else(|| "another rank cannot reach the others".to_owned());
            if self.settings.require == Require::Nvlink {
                return Err(Error::NoPeerAccess { rank, reason });
            }
            tracing::warn!("rank {rank}: the GPUs meet in pinned host memory, because {reason}");
        }
        let gpu = match arenas {
            Some(arenas) => Ok(arenas),
            None => self.share_host(),
        };
        let budget = Budget::take(self.device);
        let most_blocks = self.least(budget.blocks() as u8)?;
        let gpu = gpu.and_then(|arenas| {
            let link = (link, can == Can::Copies, most_blocks.into());
            let config = Config::new(self.settings, &self.devices, link, self.extra);
            let control = self.communicator.control.clone();
            Gpu::new(self.device, control, arenas, (&config, budget), Vec::new())
        });
        let all_can = self.agree(if gpu.is_ok() { Can::Device } else { Can::Nothing })?;
        let gpu = gpu?;
        if all_can == Can::Nothing {
            return Err(elsewhere(rank));
        }
        Ok(gpu)
    }

    /// The least that all ranks can.
    fn agree(&self, ours: Can) -> Result<Can> {
        let least = self.least(ours as u8)?;
        Ok([Can::Nothing, Can::Host, Can::Device, Can::Copies][usize::from(least).min(3)])
    }

    /// The least of what all ranks say.
    fn least(&self, ours: u8) -> Result<u8> {
        let mut all = [ours];
        let buffer = BufMut::from(&mut all).raw();
        self.communicator.engine().submit(&Call::new(Kind::AllReduce { op: ReduceOp::Min }, [buffer]))?;
        Ok(all[0])
    }

    /// Makes our arena and maps those of all others.
    fn share_pages(&self) -> Result<Vec<Arc<SharedPages>>> {
        let layout = ArenaLayout::new(self.devices.len(), Link::Device);
        let is_aborted = || self.communicator.control.abort().raised().is_some();
        let bytes = layout.total_bytes();
        let kind = peers::OnDevices {
            rank: self.communicator.rank(),
            device: self.device,
            bytes,
            handles: self.settings.handles,
            make: || Arenas::create(self.device, &layout, self.extra.epoch, self.settings.handles),
        };
        let neighbours = &self.communicator.neighbours;
        peers::share(neighbours, &kind, (ARENA_ITEM, bytes), self.deadline, &is_aborted)
    }

    fn share_host(&self) -> Result<Arenas> {
        let rank = self.communicator.rank();
        let layout = ArenaLayout::new(self.devices.len(), Link::Host);
        let bytes = layout.total_bytes() * self.devices.len();
        let is_aborted = || self.communicator.control.abort().raised().is_some();
        let memory =
            self.communicator.neighbours.share(HOST_ARENA_ITEM, bytes, self.deadline, &is_aborted)?;
        Arenas::host(self.device, memory, layout).map_err(|error| Error::Cuda { rank, error })
    }
}

fn elsewhere(rank: usize) -> Error {
    Error::Device { rank, reason: "another rank cannot work on its GPU; it says why".to_owned() }
}

/// The GPU's sides of the ranks of one process, by rank.
pub(crate) fn attach_local(
    communicators: &[Communicator],
    devices: &[Device],
    settings: &Settings,
    extra: &Extra,
) -> Result<Vec<Gpu>> {
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
    let budgets: Vec<Budget> = devices.iter().map(Budget::take).collect();
    let most_blocks = budgets.iter().map(Budget::blocks).min().unwrap_or(1);
    let config = Config::new(settings, &uuids, (link, bulk_copies, most_blocks), extra);
    let make = |((rank, device), budget): ((usize, &Device), Budget)| {
        let arenas = match &memory {
            None => Arenas::Device(pages.clone()),
            Some(memory) => Arenas::host(device, memory.clone(), layout).map_err(failed(rank))?,
        };
        let pinned_way = extra.pinned_ways.get(rank).copied().unwrap_or(config.pinned_way);
        let config = Config { pinned_way, ..config.clone() };
        let others = (0..ranks).filter(|other| *other != rank).map(|other| devices[other].clone()).collect();
        Gpu::new(device, communicators[rank].control.clone(), arenas, (&config, budget), others)
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
