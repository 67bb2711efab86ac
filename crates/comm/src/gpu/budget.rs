//! Who may have how many blocks wait on a device.
//!
//! Kernels of collectives wait for those of other ranks, so all blocks of a kernel must run at once, and if two communicators
//! are under way in another order on another rank, those of both. The first communicator of a process on a device gets half of
//! its multiprocessors: a block for bulk copies takes one, of others two fit on one. Later ones get some of the other half, as long
//! as there is any. So whatever is begun first, there is room for all. Whoever comes then gets few, and says so: more communicators
//! at once than fit wait for each other where ranks begin them in different orders.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use unisono_core::device::layout::MAX_BLOCKS;
use unisono_core::device::multiprocessors::{LEAST_MULTIPROCESSORS, blocks_on};
use unisono_cuda::Device;

/// Blocks of a communicator that is not the first, and the one that exchanges headers.
const SHARE: u32 = 25;

/// What is taken of each device, by its ordinal.
static TAKEN: Mutex<Option<HashMap<u32, Taken>>> = Mutex::new(None);

#[derive(Clone, Copy, Default, Debug)]
struct Taken {
    communicators: u32,
    has_first: bool,
    by_others: u32,
}

impl Taken {
    /// A share of `multiprocessors`, of `most` at most.
    fn take(&mut self, multiprocessors: u32, most: u32) -> Share {
        let half = multiprocessors.div_ceil(2);
        self.communicators += 1;
        if !std::mem::replace(&mut self.has_first, true) {
            // One more exchanges headers, and one multiprocessor may be left with a single block.
            let blocks = (2 * half - 2).clamp(1, MAX_BLOCKS as u32).min(blocks_on(most));
            return Share { is_first: true, taken: 0, blocks };
        }
        let left = (multiprocessors - half).saturating_sub(self.by_others);
        let taken = if left < LEAST_MULTIPROCESSORS { 0 } else { left.min(SHARE).min(most) };
        self.by_others += taken;
        Share { is_first: false, taken, blocks: taken.max(LEAST_MULTIPROCESSORS) - 1 }
    }

    fn give_back(&mut self, share: Share) {
        self.communicators -= 1;
        if share.is_first {
            self.has_first = false;
        }
        self.by_others -= share.taken;
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Share {
    is_first: bool,
    taken: u32,
    blocks: u32,
}

/// A communicator's part of a device, until it is dropped.
#[derive(Debug)]
pub(crate) struct Budget {
    ordinal: u32,
    multiprocessors: u32,
    share: Share,
}

impl Budget {
    /// What is left for one more communicator on `device`, of `most` multiprocessors at most.
    pub(crate) fn take(device: &Device, most: Option<u32>) -> Self {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let of_device = taken.get_or_insert_default().entry(device.ordinal()).or_default();
        let multiprocessors = device.facts().multiprocessors.max(2);
        let share = of_device.take(multiprocessors, most.unwrap_or(u32::MAX));
        if !share.is_first && share.taken == 0 {
            tracing::warn!(
                "so many communicators share {device:?} that not all of them can wait there at once: ranks must begin their calls in the same order"
            );
        }
        Self { ordinal: device.ordinal(), multiprocessors, share }
    }

    /// Whether no other communicator of this process works on the device.
    pub(crate) fn is_alone(&self) -> bool {
        let taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let of_device = taken.as_ref().and_then(|taken| taken.get(&self.ordinal));
        of_device.is_none_or(|of_device| of_device.communicators < 2)
    }

    /// Multiprocessors that are neither the first communicator's nor taken by any other than this: for kernels that take what there is, and
    /// do not keep it. A communicator that comes later may take some of them.
    pub(crate) fn spare(&self) -> u32 {
        let taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let others =
            taken.as_ref().and_then(|taken| taken.get(&self.ordinal)).map_or(0, |taken| taken.by_others);
        (self.multiprocessors / 2 + self.share.taken).saturating_sub(others)
    }

    /// Blocks that may wait at once, beside the one that exchanges headers.
    pub(crate) const fn blocks(&self) -> u32 {
        self.share.blocks
    }
}

impl Drop for Budget {
    fn drop(&mut self) {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of_device) = taken.get_or_insert_default().get_mut(&self.ordinal) {
            of_device.give_back(self.share);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_gets_half_and_later_ones_share_the_other() {
        let mut taken = Taken::default();
        let shares: Vec<Share> = (0..6).map(|_| taken.take(132, u32::MAX)).collect();
        let blocks: Vec<u32> = shares.iter().map(|share| share.blocks).collect();
        assert_eq!(blocks, [130, 24, 24, 15, 8, 8]);
        assert_eq!((taken.by_others, taken.communicators), (66, 6));
        // What is given back is there for the next.
        taken.give_back(shares[1]);
        assert_eq!(taken.take(132, u32::MAX), shares[1]);
        taken.give_back(shares[0]);
        assert_eq!(taken.take(132, u32::MAX), shares[0]);
        for share in &shares {
            taken.give_back(*share);
        }
        assert!(!taken.has_first && taken.by_others == 0 && taken.communicators == 0);
    }

    #[test]
    fn a_cap_leaves_more_to_those_that_come_later() {
        let mut taken = Taken::default();
        let blocks: Vec<u32> = [16, 10, u32::MAX, u32::MAX, u32::MAX]
            .into_iter()
            .map(|most| taken.take(132, most).blocks)
            .collect();
        // The half of the first one is kept for whoever is first next.
        assert_eq!(blocks, [15, 9, 24, 24, 8]);
        assert_eq!(taken.by_others, 60);
        assert_eq!(Taken::default().take(132, 40).blocks, 78);
        assert_eq!(Taken::default().take(132, 100).blocks, 130);
    }
}
