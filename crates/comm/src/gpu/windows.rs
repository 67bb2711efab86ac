//! The windows and registrations that a communicator has open on its GPU, in memory of devices or in pinned memory of the host:
//! where the copy of each rank lies, as our kernels call it, and what keeps it there.

use std::any::Any;
use std::sync::Arc;

use unisono_core::device::Link;
use unisono_cuda::{SharedPages, Stream};
use unisono_sync::Deadline;

use super::pinned::{Enqueued, OnHost, Pinned};
use super::{Gpu, peers};
use crate::collectives::WindowPlace;
use crate::error::{Error, Result};
use crate::neighbours::Neighbours;

/// The copies of all ranks as our kernels call them, by rank, and what keeps them mapped.
#[derive(Debug)]
pub(crate) struct Mappings {
    addresses: Vec<u64>,
    /// Our own copy, as buffers call it.
    own: u64,
    /// For copies that the host touches as well.
    enqueued: Option<Arc<Enqueued>>,
    _held: Box<dyn Any + Send + Sync>,
}

impl Mappings {
    /// Memory of devices, where `rank` is ours.
    pub(crate) fn new(rank: usize, addresses: Vec<u64>, held: impl Any + Send + Sync) -> Self {
        Self { own: addresses[rank], addresses, enqueued: None, _held: Box::new(held) }
    }

    /// Windows on the devices of all ranks.
    pub(crate) fn on_devices(rank: usize, pages: Vec<Arc<SharedPages>>) -> Self {
        Self::new(rank, pages.iter().map(|pages| pages.address()).collect(), pages)
    }

    /// Where each rank's copy begins, as our kernels call it.
    pub(super) fn addresses(&self) -> &[u64] {
        &self.addresses
    }

    /// Pinned memory of the host. Buffers name it as the CPU does.
    pub(crate) fn pinned(rank: usize, pinned: &Arc<Pinned>) -> Self {
        Self {
            addresses: pinned.addresses().collect(),
            own: pinned.start(rank) as u64,
            enqueued: Some(pinned.enqueued().clone()),
            _held: Box::new(pinned.clone()),
        }
    }
}

#[derive(Debug)]
struct OpenWindow {
    id: u64,
    bytes: usize,
    mappings: Arc<Mappings>,
    /// The latest capture whose graph keeps the mappings.
    kept_by: Option<u64>,
}

/// All that are open.
#[derive(Debug, Default)]
pub(super) struct Windows {
    open: Vec<OpenWindow>,
    /// Those that no collective works on any more, by id: they stay until they are closed, whoever drops what.
    one_sided: Vec<(u64, Arc<Mappings>)>,
}

impl Windows {
    /// From now on, buffers in our copy are known to lie in window `id`, which has `bytes`.
    fn open(&mut self, id: u64, bytes: usize, mappings: Mappings) {
        self.open.push(OpenWindow { id, bytes, mappings: Arc::new(mappings), kept_by: None });
    }

    /// Forgets window `id`.
    fn close(&mut self, id: u64) {
        self.open.retain(|window| window.id != id);
        self.one_sided.retain(|(other, _)| *other != id);
    }

    /// Keeps the copies of window `id`, which is one-sided from now on, until it is closed.
    pub(super) fn keep(&mut self, id: u64, mappings: Arc<Mappings>) {
        self.one_sided.push((id, mappings));
    }

    /// The copies of window `id`, if collectives work on it.
    pub(super) fn mappings(&self, id: u64) -> Option<Arc<Mappings>> {
        self.window(id).map(|window| window.mappings.clone())
    }

    fn window(&self, id: u64) -> Option<&OpenWindow> {
        self.open.iter().find(|window| window.id == id)
    }

    /// Where `bytes` at `ptr` lie in our copy of window `id`, if they do.
    pub(super) fn find(&self, id: u64, (ptr, bytes): (u64, usize)) -> Option<WindowPlace> {
        let window = self.window(id)?;
        let offset = usize::try_from(ptr.checked_sub(window.mappings.own)?).ok()?;
        (offset.checked_add(bytes)? <= window.bytes).then_some(WindowPlace { id, offset })
    }

    /// Where one side of a call of `rank` lies, as kernels call it: at `ptr`, or in a window.
    #[inline]
    pub(super) fn address(&self, rank: usize, ptr: u64, at: Option<WindowPlace>) -> u64 {
        let found = at.and_then(|at| Some((self.window(at.id)?, at.offset)));
        found.map_or(ptr, |(window, offset)| window.mappings.addresses[rank] + offset as u64)
    }

    /// Writes where one side of a direct call lies: the copies of all ranks, and our own offset; answers their length.
    pub(super) fn place(&self, at: Option<WindowPlace>, (bases, offset): (&mut [u64], &mut u64)) -> u64 {
        let found = at.and_then(|at| Some((self.window(at.id)?, at.offset)));
        let Some((window, within)) = found else { unreachable!("only windows that were found are direct") };
        bases.iter_mut().zip(&window.mappings.addresses).for_each(|(base, address)| *base = *address);
        *offset = within as u64;
        window.bytes as u64
    }

    /// What waits for calls on one of `sides`, if the host touches it as well.
    #[inline]
    pub(super) fn touched(&self, sides: [Option<WindowPlace>; 2]) -> Option<&Arc<Enqueued>> {
        let mut sides = sides.into_iter().flatten();
        sides.find_map(|side| self.window(side.id)?.mappings.enqueued.as_ref())
    }

    /// Lets the graph that `stream` is captured into, if it is, keep `sides` for as long as it exists.
    #[cold]
    pub(super) fn keep_in_graph(
        &mut self,
        sides: [Option<WindowPlace>; 2],
        stream: &Stream,
    ) -> unisono_cuda::Result<()> {
        let Some(capture) = stream.capture()? else { return Ok(()) };
        for window in self.not_kept(sides, capture.id()) {
            capture.keep(window.mappings.clone())?;
            window.kept_by = Some(capture.id());
        }
        Ok(())
    }

    /// Those of `sides` that the graph of `capture` does not keep yet.
    fn not_kept(
        &mut self,
        sides: [Option<WindowPlace>; 2],
        capture: u64,
    ) -> impl Iterator<Item = &mut OpenWindow> {
        let is_meant = move |id| sides.iter().flatten().any(|side| side.id == id);
        self.open.iter_mut().filter(move |window| is_meant(window.id) && window.kept_by != Some(capture))
    }
}

impl Gpu {
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
            let pages = peers::on_device(&self.device, bytes, self.handles)?;
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

    /// From now on, buffers in our copy are known to lie in window `id`, which has `bytes`.
    pub(crate) fn open_window(&mut self, id: u64, bytes: usize, mappings: Mappings) {
        self.windows.open(id, bytes, mappings);
    }

    /// Forgets window `id`. Whoever calls it has waited for the calls that use it.
    pub(crate) fn close_window(&mut self, id: u64) {
        self.windows.close(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of rank 1. Window 7 is where the CPU has another name for it.
    fn windows() -> Windows {
        let mut windows = Windows::default();
        windows.open(3, 64, Mappings::new(1, vec![0x1000, 0x2004, 0x3000], ()));
        windows.open(5, 16, Mappings::new(1, vec![0x2000, 0x2044, 0x3040], ()));
        let renamed = Mappings { own: 0x9000, ..Mappings::new(1, vec![0x4000, 0x5000, 0x6000], ()) };
        windows.open(7, 32, renamed);
        windows
    }

    #[test]
    fn a_buffer_is_found_in_our_copy_from_end_to_end_and_not_beyond() {
        let windows = windows();
        let find = |id, ptr, bytes| windows.find(id, (ptr, bytes)).map(|place| (place.id, place.offset));
        assert_eq!(find(3, 0x2004, 64), Some((3, 0)));
        assert_eq!(find(3, 0x2044, 0), Some((3, 64)));
        assert_eq!(find(5, 0x2044, 16), Some((5, 0)));
        for (id, ptr, bytes) in
            [(3, 0x2003, 1), (3, 0x2004, 65), (3, 0x2045, 0), (3, 0x1000, 1), (4, 0x2004, 1)]
        {
            assert_eq!(find(id, ptr, bytes), None, "{id} {ptr:#x} {bytes}");
        }
        assert_eq!(find(3, 0x2004, usize::MAX), None);
        assert_eq!(find(3, u64::MAX, 1), None);
    }

    #[test]
    fn kernels_are_told_the_copies_of_all_ranks_and_our_own_offset() {
        let (windows, mut bases, mut offset) = (windows(), [9; 4], 9);
        let place = windows.find(3, (0x2010, 8));
        assert_eq!(windows.place(place, (&mut bases, &mut offset)), 64);
        assert_eq!((bases, offset), ([0x1000, 0x2004, 0x3000, 9], 12));
    }

    #[test]
    fn buffers_name_our_copy_as_the_cpu_does_and_kernels_as_the_device_does() {
        let windows = windows();
        assert_eq!(windows.find(7, (0x5004, 4)), None);
        let place = windows.find(7, (0x9004, 28));
        assert_eq!(place.map(|place| place.offset), Some(4));
        assert_eq!(windows.address(1, 0x9004, place), 0x5004);
        assert_eq!(windows.address(1, 0x9004, None), 0x9004, "a plain buffer stays where it is");
    }

    #[test]
    fn a_window_that_was_closed_is_not_found_and_lets_go_of_its_copies() {
        let mut windows = windows();
        let mappings = Arc::downgrade(&windows.open[0].mappings);
        windows.close(3);
        assert_eq!(windows.find(3, (0x2004, 1)), None);
        assert!(windows.find(5, (0x2044, 1)).is_some());
        assert_eq!(mappings.strong_count(), 0);
    }

    #[test]
    fn one_sided_memory_is_no_buffer_and_stays_until_it_is_closed() {
        let mut windows = windows();
        let mappings = windows.mappings(3).unwrap();
        windows.close(3);
        windows.keep(3, mappings.clone());
        assert_eq!(windows.find(3, (0x2004, 1)), None);
        assert_eq!((Arc::strong_count(&mappings), mappings.addresses()[2]), (2, 0x3000));
        windows.close(3);
        assert_eq!(Arc::strong_count(&mappings), 1);
    }

    #[test]
    fn a_graph_keeps_each_window_once() {
        let mut windows = windows();
        let side = |id| Some(WindowPlace { id, offset: 0 });
        let ids = |windows: &mut Windows, sides, capture| {
            let mut ids = Vec::new();
            for window in windows.not_kept(sides, capture) {
                window.kept_by = Some(capture);
                ids.push(window.id);
            }
            ids
        };
        assert_eq!(ids(&mut windows, [side(3), side(3)], 1), [3]);
        assert_eq!(ids(&mut windows, [side(3), side(5)], 1), [5]);
        assert_eq!(ids(&mut windows, [side(5), None], 1), []);
        assert_eq!(ids(&mut windows, [side(3), side(5)], 2), [3, 5]);
    }
}
