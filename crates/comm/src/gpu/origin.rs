//! What the GPU's side of a communicator is made from: the devices of all ranks, and what holds for them. It is kept, because
//! communicators that come from this one (by `split`, `duplicate` or `shrink`) are made from the same, for other ranks.

use std::sync::Arc;

use unisono_core::device::Link;
use unisono_core::device::select::Rules;
use unisono_core::settings::{GpuLaunch, HandleKind, PinnedWay, Settings};
use unisono_cuda::{Device, Launching, Uuid};

use super::kernels::Purpose;
use super::one_sided;
use super::seats::Seats;
use crate::tuning::{self, Selection};

/// What a builder may say about GPUs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Extra {
    pub(crate) prepare: Vec<Purpose>,
    pub(crate) epoch: u32,
    /// Of the ranks of one process, where they differ.
    pub(crate) pinned_ways: Vec<PinnedWay>,
    /// Rank 0 of communicators of so many ranks cannot have what it needs.
    pub(crate) refused_size: Option<usize>,
}

/// Which device it is, and its number in the process of its rank.
pub(crate) type Place = (Uuid, u32);

/// A world of GPUs that is to be made.
#[derive(Debug)]
pub(crate) struct World {
    /// The device of each seat.
    pub(crate) uuids: Vec<Uuid>,
    pub(crate) seats: Arc<Seats>,
    /// Our devices.
    pub(crate) devices: Vec<Device>,
    /// Whether this is the world of all devices, and not that of the ranks.
    pub(crate) is_of_devices: bool,
}

/// What a rank knows of its world's GPUs.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    /// Ours, at least one.
    pub(crate) devices: Vec<Device>,
    /// Those of the other ranks of this process, of the world in which all began: what this thread loads may wait for them.
    pub(crate) siblings: Vec<Device>,
    pub(crate) settings: Settings,
    /// The devices of each rank.
    all: Vec<Vec<Place>>,
    prepare: Vec<Purpose>,
    /// The first epoch is the one after this.
    epoch: u32,
    /// Whether a device is shared in the world in which all began.
    is_crowded: bool,
    /// Whether a rank of that world has several devices. All communicators that come from it agree twice then, whoever is in them.
    pub(crate) has_several: bool,
    refused_size: Option<usize>,
}

impl Origin {
    /// Of a rank of a world that is being made, with our devices and those of each rank.
    pub(crate) fn new(
        devices: Vec<Device>,
        all: Vec<Vec<Place>>,
        settings: &Settings,
        extra: &Extra,
    ) -> Self {
        let uuids: Vec<Uuid> = all.iter().flatten().map(|(uuid, _)| *uuid).collect();
        Self {
            devices,
            siblings: Vec::new(),
            settings: settings.clone(),
            is_crowded: crowd(&uuids) > 1,
            has_several: all.iter().any(|devices| devices.len() > 1),
            all,
            prepare: extra.prepare.clone(),
            epoch: extra.epoch,
            refused_size: extra.refused_size,
        }
    }

    /// The same for a communicator of some of the ranks: `members[r]` is the number here of what becomes rank r.
    pub(crate) fn of(&self, members: &[usize]) -> Self {
        let all = members.iter().map(|member| self.all[*member].clone()).collect();
        Self { all, epoch: 0, ..self.clone() }
    }

    /// The world of the ranks, each on its first device.
    pub(crate) fn of_ranks(&self) -> World {
        self.world(&|devices| &devices[..1], false)
    }

    /// The world of all devices, if a rank has several.
    pub(crate) fn of_devices(&self) -> Option<World> {
        let has_several = self.all.iter().any(|devices| devices.len() > 1);
        has_several.then(|| self.world(&|devices| devices, true))
    }

    fn world(&self, part: &dyn Fn(&[Place]) -> &[Place], is_of_devices: bool) -> World {
        let of_rank = |devices: &Vec<Place>| part(devices).iter().map(|(_, ordinal)| *ordinal).collect();
        let ordinals: Vec<Vec<u32>> = self.all.iter().map(of_rank).collect();
        let uuids = self.all.iter().flat_map(|devices| part(devices)).map(|(uuid, _)| *uuid).collect();
        let ours = if is_of_devices { self.devices.len() } else { 1 };
        World {
            uuids,
            seats: Arc::new(Seats::new(ordinals.iter().map(Vec::as_slice))),
            devices: self.devices[..ours].to_vec(),
            is_of_devices,
        }
    }

    /// Whether a test has this rank fail.
    pub(crate) fn refuses(&self, rank: usize) -> bool {
        rank == 0 && self.refused_size == Some(self.all.len())
    }

    /// Behind which the first epoch is.
    pub(crate) const fn epoch(&self) -> u32 {
        self.epoch
    }
}

/// What a communicator on a GPU is made with, once its ranks have agreed.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) rules: Rules,
    /// Where the table of the rules comes from.
    pub(crate) table_from: tuning::Origin,
    pub(crate) patience_ns: u64,
    pub(crate) epoch: u32,
    pub(crate) prepare: Vec<Purpose>,
    pub(crate) pinned_way: PinnedWay,
    pub(crate) handles: HandleKind,
    pub(crate) launching: Launching,
    pub(crate) gpu_launch: GpuLaunch,
    pub(crate) is_crowded: bool,
    pub(crate) drives_peers: bool,
}

impl Config {
    pub(crate) fn new(
        origin: &Origin,
        (world, selection): (&World, &Selection),
        (link, bulk_copies, most_blocks): (Link, bool, u32),
    ) -> Self {
        let settings = &origin.settings;
        let (table, table_from) = selection.table(world.uuids.len());
        let mut prepare = Purpose::USUAL.to_vec();
        prepare.extend(origin.prepare.iter().copied().filter(|purpose| !Purpose::USUAL.contains(purpose)));
        if world.is_of_devices {
            // Its calls are all-reduces and broadcasts; the latter are there in any case.
            prepare.retain(|purpose| matches!(purpose, Purpose::Reduce(..)));
        }
        Self {
            rules: Rules {
                ranks: world.uuids.len(),
                link,
                crowd: crowd(&world.uuids),
                order: settings.order,
                bulk_copies,
                most_blocks,
                engines: origin.siblings.is_empty() && !world.is_of_devices,
                forced: settings.gpu_algorithm,
                table,
            },
            table_from,
            patience_ns: one_sided::nanoseconds(settings.timeout),
            epoch: origin.epoch,
            prepare,
            pinned_way: settings.pinned,
            handles: settings.handles,
            launching: Launching { is_remote: settings.gpu_launch.is_remote() },
            gpu_launch: settings.gpu_launch,
            is_crowded: origin.is_crowded,
            drives_peers: !origin.siblings.is_empty() || world.is_of_devices,
        }
    }
}

/// How many seats share the device that most of them share.
fn crowd(devices: &[Uuid]) -> usize {
    let share = |device: &Uuid| devices.iter().filter(|other| *other == device).count();
    devices.iter().map(share).max().unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seats_that_share_a_device_are_counted() {
        let [a, b] = [1, 2].map(|byte| Uuid([byte; 16]));
        assert_eq!((crowd(&[]), crowd(&[a, b])), (1, 1));
        assert_eq!((crowd(&[a, b, a]), crowd(&[b, a, b, b])), (2, 3));
    }
}
