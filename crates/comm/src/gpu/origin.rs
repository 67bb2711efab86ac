//! What the GPU's side of a communicator is made from: the devices of all ranks, and what holds for them. It is kept, because
//! communicators that come from this one (by `split`, `duplicate` or `shrink`) are made from the same, for other ranks.

use unisono_core::device::Link;
use unisono_core::device::select::Rules;
use unisono_core::settings::{HandleKind, PinnedWay, Settings};
use unisono_cuda::{Device, Uuid};

use super::kernels::Purpose;
use super::one_sided;
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

/// What a rank knows of its world's GPUs.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    /// Ours.
    pub(crate) device: Device,
    /// Those of the other ranks of this process, of the world in which all began: what this thread loads may wait for them.
    pub(crate) siblings: Vec<Device>,
    pub(crate) settings: Settings,
    /// The device of each rank.
    devices: Vec<Uuid>,
    prepare: Vec<Purpose>,
    /// The first epoch is the one after this.
    epoch: u32,
    /// Whether ranks of the world in which all began share a device.
    is_crowded: bool,
    refused_size: Option<usize>,
}

impl Origin {
    /// Of a rank of a world that is being made, with the device of each rank.
    pub(crate) fn new(device: &Device, devices: Vec<Uuid>, settings: &Settings, extra: &Extra) -> Self {
        Self {
            device: device.clone(),
            siblings: Vec::new(),
            settings: settings.clone(),
            is_crowded: crowd(&devices) > 1,
            devices,
            prepare: extra.prepare.clone(),
            epoch: extra.epoch,
            refused_size: extra.refused_size,
        }
    }

    /// The same for a communicator of some of the ranks: `members[r]` is the number here of what becomes rank r.
    pub(crate) fn of(&self, members: &[usize]) -> Self {
        let devices = members.iter().map(|member| self.devices[*member]).collect();
        Self { devices, epoch: 0, ..self.clone() }
    }

    /// The device of each rank.
    pub(crate) fn devices(&self) -> &[Uuid] {
        &self.devices
    }

    /// Whether a test has this rank fail.
    pub(crate) fn refuses(&self, rank: usize) -> bool {
        rank == 0 && self.refused_size == Some(self.devices.len())
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
    pub(crate) is_crowded: bool,
}

impl Config {
    pub(crate) fn new(
        origin: &Origin,
        selection: &Selection,
        (link, bulk_copies, most_blocks): (Link, bool, u32),
    ) -> Self {
        let settings = &origin.settings;
        let (table, table_from) = selection.table(origin.devices.len());
        let mut prepare = Purpose::USUAL.to_vec();
        prepare.extend(origin.prepare.iter().copied().filter(|purpose| !Purpose::USUAL.contains(purpose)));
        Self {
            rules: Rules {
                ranks: origin.devices.len(),
                link,
                crowd: crowd(&origin.devices),
                order: settings.order,
                bulk_copies,
                most_blocks,
                engines: origin.siblings.is_empty(),
                forced: settings.gpu_algorithm,
                table,
            },
            table_from,
            patience_ns: one_sided::nanoseconds(settings.timeout),
            epoch: origin.epoch,
            prepare,
            pinned_way: settings.pinned,
            handles: settings.handles,
            is_crowded: origin.is_crowded,
        }
    }
}

/// How many ranks share the device that most of them share.
fn crowd(devices: &[Uuid]) -> usize {
    let share = |device: &Uuid| devices.iter().filter(|other| *other == device).count();
    devices.iter().map(share).max().unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_share_a_device_are_counted() {
        let [a, b] = [1, 2].map(|byte| Uuid([byte; 16]));
        assert_eq!((crowd(&[]), crowd(&[a, b])), (1, 1));
        assert_eq!((crowd(&[a, b, a]), crowd(&[b, a, b, b])), (2, 3));
    }
}
