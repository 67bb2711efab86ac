//! Windows as kernels reach them: on the devices of all ranks, or in pinned memory of the host.

use std::any::Any;
use std::sync::Arc;

use unisono_core::device::Link;
use unisono_cuda::{Location, SharedPages};
use unisono_sync::Deadline;

use super::pinned::{Enqueued, OnHost, Pinned};
use super::{Gpu, peers};
use crate::collectives::WindowPlace;
use crate::error::{Error, Result};
use crate::neighbours::Neighbours;

/// A window that kernels reach.
#[derive(Debug)]
pub(super) struct OpenWindow {
    id: u64,
    bytes: usize,
    /// Our own copy, as buffers call it.
    own: u64,
    /// The copies of all ranks, as kernels call them.
    bases: Vec<u64>,
    /// For windows that the host touches as well.
    enqueued: Option<Arc<Enqueued>>,
    _kept: Arc<dyn Any + Send + Sync>,
}

/// Where one side of a call lies, as kernels call it: at `ptr`, or in a window of ours.
#[inline]
pub(super) fn address(windows: &[OpenWindow], rank: usize, ptr: u64, at: Option<WindowPlace>) -> u64 {
    let found = at.and_then(|at| Some((windows.iter().find(|window| window.id == at.id)?, at.offset)));
    found.map_or(ptr, |(window, offset)| window.bases[rank] + offset as u64)
}

/// Writes where one side of a direct call lies: the windows of all ranks, and our own offset; answers their length.
pub(super) fn place(
    windows: &[OpenWindow],
    at: Option<WindowPlace>,
    (bases, offset): (&mut [u64], &mut u64),
) -> u64 {
    let found = at.and_then(|at| Some((windows.iter().find(|window| window.id == at.id)?, at.offset)));
    let Some((window, within)) = found else { unreachable!("only windows that were found are direct") };
    bases[..window.bases.len()].copy_from_slice(&window.bases);
    *offset = within as u64;
    window.bytes as u64
}

/// What waits for calls on one of these windows, if the host touches it as well.
#[inline]
pub(super) fn touched(windows: &[OpenWindow], sides: [Option<WindowPlace>; 2]) -> Option<&Arc<Enqueued>> {
    let mut ids = sides.into_iter().flatten().map(|at| at.id);
    ids.find_map(|id| windows.iter().find(|window| window.id == id)?.enqueued.as_ref())
}

impl Gpu {
    /// Where `bytes` at `ptr` lie in our copy of window `id`, if they do.
    pub(super) fn find_window(&self, id: u64, ptr: u64, bytes: usize) -> Option<WindowPlace> {
        let window = self.windows.iter().find(|window| window.id == id)?;
        let offset = usize::try_from(ptr.checked_sub(window.own)?).ok()?;
        (offset.checked_add(bytes)? <= window.bytes).then_some(WindowPlace { id, offset })
    }

    /// Makes a window on the devices of all ranks, zeroed, of `bytes` each. Collective.
    pub(crate) fn share_window(
        &self,
        neighbours: &Neighbours,
        (id, bytes): (u64, usize),
        deadline: Deadline,
        is_aborted: &dyn Fn() -> bool,
    ) -> Result<Vec<Arc<SharedPages>>> {
        let rank = self.args.rank as usize;
        if self.rules.link == Link::Host {
            let reason =
                "the devices do not reach each other's memory, so they can share no window".to_owned();
            return Err(Error::Device { rank, reason });
        }
        let make = || {
            let pages = SharedPages::create(&self.device, bytes, Location::Device)?;
            pages.fill(0).map(|()| pages)
        };
        let kind = peers::OnDevices { rank, device: &self.device, bytes, handles: self.handles, make };
        peers::share(neighbours, &kind, (id as u32, bytes), deadline, is_aborted)
    }

    /// Makes a window in pinned memory of the host, zeroed, of `bytes` for each rank, whether or not the devices reach each
    /// other. Collective.
    pub(crate) fn share_pinned(
        &mut self,
        neighbours: &Neighbours,
        (id, bytes): (u64, usize),
        deadline: Deadline,
        is_aborted: &dyn Fn() -> bool,
    ) -> Result<Pinned> {
        let rank = self.args.rank as usize;
        let kind = OnHost { rank, device: &self.device, bytes, way: self.pinned_way };
        let parts = peers::share(neighbours, &kind, (id as u32, bytes), deadline, is_aborted)?;
        let enqueued = match &self.enqueued {
            Some(enqueued) => enqueued.clone(),
            None => {
                self.enqueued.insert(Arc::new(Enqueued::new(self.control.clone(), &self.device)?)).clone()
            }
        };
        Ok(Pinned::new(parts, enqueued))
    }

    /// From now on, buffers in these pages are known to lie in window `id`.
    pub(crate) fn open_window(&mut self, id: u64, bytes: usize, pages: Vec<Arc<SharedPages>>) {
        let bases: Vec<u64> = pages.iter().map(|pages| pages.address()).collect();
        let own = bases[self.args.rank as usize];
        let kept = Arc::new(pages);
        self.windows.push(OpenWindow { id, bytes, own, bases, enqueued: None, _kept: kept });
    }

    /// The same for pinned memory, of `bytes` for each rank.
    pub(crate) fn open_pinned(&mut self, id: u64, bytes: usize, pinned: &Arc<Pinned>) {
        self.windows.push(OpenWindow {
            id,
            bytes,
            own: pinned.starts().nth(self.args.rank as usize).unwrap_or_default() as u64,
            bases: pinned.addresses().collect(),
            enqueued: Some(pinned.enqueued().clone()),
            _kept: pinned.clone(),
        });
    }

    /// Forgets window `id`. Whoever calls it has waited for the calls that use it.
    pub(crate) fn close_window(&mut self, id: u64) {
        self.windows.retain(|window| window.id != id);
    }
}
