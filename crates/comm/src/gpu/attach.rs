//! How the ranks of a world come to share arenas: as processes over the node plane, or as ranks of one process.

use std::sync::Arc;

use unisono_core::device::layout::MAX_RANKS;
use unisono_core::device::{ArenaLayout, Link};
use unisono_core::hello::{DeviceIdentity, Hello};
use unisono_core::settings::{HandleKind, Require, Settings};
use unisono_cuda::{Device, SharedPages, Stream};
use unisono_node::SharedMemory;
use unisono_sync::Deadline;

use super::arenas::{Arenas, obstacle};
use super::budget::Budget;
use super::kernels::has_bulk_copies;
use super::origin::World;
use super::seats::Seat;
use super::{Config, Extra, Gpu, Origin, peers};
use crate::call::Kind;
use crate::communicator::Communicator;
use crate::error::{Error, Result};

/// Under which arenas are handed over: no window gets so far.
const ARENA_ITEM: u32 = u32::MAX - 1;
const HOST_ARENA_ITEM: u32 = u32::MAX - 2;
const SEAT_ARENA_ITEM: u32 = u32::MAX - 3;
const SEAT_HOST_ARENA_ITEM: u32 = u32::MAX - 4;

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
    /// The least of what all ranks of the communicator say. Each of them asks [`rounds`] times, whatever went wrong.
    pub(crate) least: &'a dyn Fn(u8) -> Result<u8>,
    pub(crate) is_aborted: &'a dyn Fn() -> bool,
}

/// How often the making of one world of GPUs asks what the least is.
const ROUNDS: usize = 3;

/// How often [`Attachment::run`] asks what the least is, for communicators that come from this one.
pub(crate) const fn rounds(origin: &Origin) -> usize {
    if origin.has_several { 2 * ROUNDS } else { ROUNDS }
}

impl Attachment<'_> {
    /// Makes the GPU's side of the communicator. Collective. Whether all ranks have theirs is still to be asked
    /// ([`all_or_none`]).
    pub(crate) fn run(&self) -> Result<Gpu> {
        // That of all devices comes first, and so gets more blocks: who has several devices works with them.
        let seats = match self.origin.of_devices() {
            Some(world) => self.make(&world),
            None => {
                // Other groups may have one.
                for _ in ROUNDS..rounds(self.origin) {
                    (self.least)(u8::MAX)?;
                }
                Ok(Vec::new())
            }
        };
        let gpu = self.make(&self.origin.of_ranks());
        match (gpu, seats) {
            (Ok(mut gpu), Ok(seats)) => {
                gpu[0].seats = seats;
                Ok(gpu.swap_remove(0))
            }
            (Ok(made), Err(error)) | (Err(error), Ok(made)) => {
                made.into_iter().for_each(Gpu::undo);
                Err(error)
            }
            (Err(error), Err(_)) => Err(error),
        }
    }

    /// Our GPUs in `world`. Collective.
    fn make(&self, world: &World) -> Result<Vec<Gpu>> {
        // What is known before anything is shared: who reaches whom.
        let obstacle = self.obstacle(world);
        let can = self.agree(match &obstacle {
            Ok(None) => Can::Device,
            Ok(Some(_)) => Can::Host,
            Err(_) => Can::Nothing,
        })?;
        let pages = (can == Can::Device).then(|| self.share_pages(world));
        let has_copies = world.devices.iter().all(|device| has_bulk_copies(device, Link::Device));
        let can = self.agree(match &pages {
            None => can,
            Some(Ok(_)) if has_copies => Can::Copies,
            Some(Ok(_)) => Can::Device,
            Some(Err(error)) if self.is_final(error) => Can::Nothing,
            Some(Err(_)) => Can::Host,
        })?;
        let budgets: Vec<Budget> = world
            .devices
            .iter()
            .map(|device| Budget::take(device, self.origin.settings.multiprocessors))
            .collect();
        let blocks = budgets.iter().map(Budget::blocks).min().unwrap_or(1);
        let most_blocks = (self.least)(blocks as u8)?;
        let all_arenas = self.arenas(can, obstacle?, (pages, world))?;
        let rank = self.communicator.rank();
        if self.origin.refuses(rank) {
            return Err(Error::Device { rank, reason: "a test wants it so".to_owned() });
        }
        let link = if can >= Can::Device { Link::Device } else { Link::Host };
        let selection = &self.communicator.selection;
        let config =
            Config::new(self.origin, (world, selection), (link, can == Can::Copies, most_blocks.into()));
        let control = &self.communicator.control;
        let seats = world.seats.of(rank);
        let made = world.devices.iter().zip(seats).zip(budgets).zip(all_arenas);
        made.map(|(((device, number), budget), arenas)| {
            let seat = match world.is_of_devices {
                true => Seat::of_device(control.clone(), world.seats.clone(), number)?,
                false => Seat::of_rank(control.clone()),
            };
            let ours = self.origin.devices.iter().filter(|other| *other != device);
            let siblings = self.origin.siblings.iter().chain(ours).cloned().collect();
            Gpu::new(device, seat, arenas, (&config, budget), siblings)
        })
        .collect()
    }

    /// Why a device of ours does not reach that of some seat, if one does not.
    fn obstacle(&self, world: &World) -> Result<Option<String>> {
        if !self.origin.settings.peer_access {
            return Ok(Some("UNISONO_PEER_ACCESS=off".to_owned()));
        }
        let mut obstacles = None;
        for device in &world.devices {
            for peer in &world.uuids {
                let found = obstacle(device, *peer, self.communicator.rank())?;
                obstacles = found.or(obstacles);
            }
        }
        Ok(obstacles)
    }

    /// The arenas of all seats, as each of our devices reaches them, where the ranks agreed to have them.
    fn arenas(
        &self,
        can: Can,
        obstacle: Option<String>,
        (pages, world): (Option<Result<Vec<Arc<SharedPages>>>>, &World),
    ) -> Result<Vec<Arenas>> {
        let rank = self.communicator.rank();
        let refused = match (can, pages) {
            (Can::Device | Can::Copies, Some(pages)) => {
                let pages = pages?;
                return Ok(world.devices.iter().map(|_| Arenas::Device(pages.clone())).collect());
            }
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
        self.share_host(world)
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

    /// Makes our arenas and maps those of all others, by seat: a seat of each rank at a time. Who cannot goes on all the same,
    /// because the others wait for what it says.
    fn share_pages(&self, world: &World) -> Result<Vec<Arc<SharedPages>>> {
        let handles = self.handles();
        let layout = ArenaLayout::new(world.uuids.len(), Link::Device);
        let bytes = layout.total_bytes();
        let neighbours = &self.communicator.neighbours;
        let turn = |turn: usize| {
            let device = world.devices.get(turn).unwrap_or(&world.devices[0]);
            let of_one = peers::OnDevices {
                rank: self.communicator.rank(),
                device,
                bytes,
                handles,
                make: || Arenas::create(device, &layout, self.origin.epoch(), handles),
            };
            let kind = Turn { of_one, world, turn };
            let item = if world.is_of_devices { SEAT_ARENA_ITEM } else { ARENA_ITEM };
            peers::share(neighbours, &kind, (item, bytes), self.deadline, self.is_aborted)
        };
        let turns: Vec<_> = (0..world.seats.most()).map(turn).collect();
        let turns: Vec<_> = turns.into_iter().collect::<Result<_>>()?;
        let of_rank = |rank: usize| turns.iter().filter_map(move |turn| (*turn[rank]).clone());
        Ok((0..self.communicator.world_size()).flat_map(of_rank).collect())
    }

    fn share_host(&self, world: &World) -> Result<Vec<Arenas>> {
        let (rank, seats) = (self.communicator.rank(), world.uuids.len());
        let layout = ArenaLayout::new(seats, Link::Host);
        let bytes = layout.total_bytes() * seats;
        let neighbours = &self.communicator.neighbours;
        let item = if world.is_of_devices { SEAT_HOST_ARENA_ITEM } else { HOST_ARENA_ITEM };
        let memory = neighbours.share(item, bytes, self.deadline, self.is_aborted)?;
        let of_device = |device| Arenas::host(device, memory.clone(), layout);
        let all = world.devices.iter().map(of_device).collect::<Result<_, _>>();
        all.map_err(|error| Error::Cuda { rank, error })
    }
}

/// The arena of the seat of each rank whose turn it is; of ranks that have fewer, nothing. All our devices are let in.
struct Turn<'a, F> {
    of_one: peers::OnDevices<'a, F>,
    world: &'a World,
    turn: usize,
}

impl<F> Turn<'_, F> {
    fn let_in(&self, pages: &SharedPages) -> Result<()> {
        let mut devices = self.world.devices.iter();
        devices
            .try_for_each(|device| pages.allow(device))
            .map_err(|error| Error::Cuda { rank: self.of_one.rank, error })
    }
}

impl<F: Fn() -> unisono_cuda::Result<SharedPages>> peers::Kind for Turn<'_, F> {
    type Memory = Option<Arc<SharedPages>>;

    fn make(&self) -> Result<Self::Memory> {
        if self.turn >= self.world.devices.len() {
            return Ok(None);
        }
        let pages = self.of_one.make()?;
        self.let_in(&pages)?;
        Ok(Some(Arc::new(pages)))
    }

    fn export(&self, ours: &Self::Memory) -> Result<peers::Exported> {
        match ours {
            Some(pages) => self.of_one.export(pages),
            // Without a word it would be a failure.
            None => Ok(peers::Exported { descriptor: None, words: vec![0] }),
        }
    }

    fn import(&self, peer: usize, exported: peers::Exported) -> Result<Self::Memory> {
        if self.turn >= self.world.seats.of(peer).len() {
            return Ok(None);
        }
        let pages = self.of_one.import(peer, exported)?;
        self.let_in(&pages)?;
        Ok(Some(Arc::new(pages)))
    }

    fn allow(&self, theirs: &Self::Memory) -> Result<()> {
        theirs.as_ref().map_or(Ok(()), |pages| self.let_in(pages))
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
    let places: Vec<_> = devices.iter().map(|device| vec![(device.facts().uuid, device.ordinal())]).collect();
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
        let mut origin = Origin::new(vec![device.clone()], places.clone(), &settings, extra);
        let others = (0..ranks).filter(|other| *other != rank);
        origin.siblings = others.map(|other| devices[other].clone()).collect();
        let selection = &communicators[rank].selection;
        let config = Config::new(&origin, (&origin.of_ranks(), selection), (link, bulk_copies, most_blocks));
        let seat = Seat::of_rank(communicators[rank].control.clone());
        let gpu = Gpu::new(device, seat, arenas, (&config, budget), origin.siblings.clone())?;
        Ok((origin, gpu))
    };
    devices.iter().enumerate().zip(budgets).map(make).collect()
}

/// What tells `device` from all others, for the table of ranks.
pub(crate) fn identity(device: &Device) -> DeviceIdentity {
    let facts = device.facts();
    DeviceIdentity {
        uuid: facts.uuid.0,
        name: facts.name.clone(),
        pci: facts.pci.clone(),
        ordinal: device.ordinal(),
    }
}

/// Refuses worlds for whose ranks an arena has no room.
pub(crate) fn check_ranks(world_size: usize, rank: usize) -> Result<()> {
    if world_size <= MAX_RANKS {
        return Ok(());
    }
    let reason = format!("at most {MAX_RANKS} ranks share GPUs of one host, and these are {world_size}");
    Err(Error::Device { rank, reason })
}

/// Refuses worlds whose ranks have more devices than an arena has room for.
pub(crate) fn check_devices(hellos: &[Hello], rank: usize) -> Result<()> {
    let devices: usize = hellos.iter().map(|hello| hello.devices.len()).sum();
    if devices <= MAX_RANKS {
        return Ok(());
    }
    let reason = format!("at most {MAX_RANKS} devices of all ranks work together, and these are {devices}");
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
