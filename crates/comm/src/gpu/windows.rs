//! The windows and registrations that a communicator has open on its GPU: where the copy of each rank lies, as our kernels
//! call it, and what keeps it there.

use std::any::Any;
use std::sync::Arc;

use unisono_cuda::{SharedPages, Stream};

use crate::collectives::WindowPlace;

/// The copies of all ranks, by rank, and what keeps them mapped.
#[derive(Debug)]
pub(crate) struct Copies {
    addresses: Vec<u64>,
    _held: Box<dyn Any + Send + Sync>,
}

impl Copies {
    pub(crate) fn new(addresses: Vec<u64>, held: impl Any + Send + Sync) -> Self {
        Self { addresses, _held: Box::new(held) }
    }

    /// The first byte of a rank's copy.
    pub(crate) fn address(&self, rank: usize) -> u64 {
        self.addresses[rank]
    }
}

impl From<Vec<Arc<SharedPages>>> for Copies {
    fn from(pages: Vec<Arc<SharedPages>>) -> Self {
        Self::new(pages.iter().map(|pages| pages.address()).collect(), pages)
    }
}

#[derive(Debug)]
struct OpenWindow {
    id: u64,
    bytes: usize,
    copies: Arc<Copies>,
    /// The latest capture whose graph keeps the copies.
    kept_by: Option<u64>,
}

/// All that are open.
#[derive(Debug, Default)]
pub(crate) struct Windows {
    open: Vec<OpenWindow>,
}

impl Windows {
    /// From now on, buffers in our copy are known to lie in window `id`, which has `bytes`.
    pub(crate) fn open(&mut self, id: u64, bytes: usize, copies: Copies) {
        self.open.push(OpenWindow { id, bytes, copies: Arc::new(copies), kept_by: None });
    }

    /// Forgets window `id`.
    pub(crate) fn close(&mut self, id: u64) {
        self.open.retain(|window| window.id != id);
    }

    /// Where `bytes` at `ptr` lie in the copy of `rank` of window `id`, if they do.
    pub(crate) fn find(&self, rank: usize, id: u64, (ptr, bytes): (u64, usize)) -> Option<WindowPlace> {
        let window = self.open.iter().find(|window| window.id == id)?;
        let offset = usize::try_from(ptr.checked_sub(window.copies.address(rank))?).ok()?;
        (offset.checked_add(bytes)? <= window.bytes).then_some(WindowPlace { id, offset })
    }

    /// Writes where one side of a direct call lies: the copies of all ranks, and our own offset; answers their length.
    pub(crate) fn place(&self, at: Option<WindowPlace>, (bases, offset): (&mut [u64], &mut u64)) -> u64 {
        let found = at.and_then(|at| Some((self.open.iter().find(|window| window.id == at.id)?, at.offset)));
        let Some((window, within)) = found else { unreachable!("only windows that were found are direct") };
        bases.iter_mut().zip(&window.copies.addresses).for_each(|(base, address)| *base = *address);
        *offset = within as u64;
        window.bytes as u64
    }

    /// Lets the graph that `stream` is captured into, if it is, keep the copies of `sides` for as long as it exists.
    #[cold]
    pub(crate) fn keep_in_graph(
        &mut self,
        sides: [Option<WindowPlace>; 2],
        stream: &Stream,
    ) -> unisono_cuda::Result<()> {
        let Some(capture) = stream.capture()? else { return Ok(()) };
        for window in self.not_kept(sides, capture.id()) {
            capture.keep(window.copies.clone())?;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn windows() -> Windows {
        let mut windows = Windows::default();
        windows.open(3, 64, Copies::new(vec![0x1000, 0x2004, 0x3000], ()));
        windows.open(5, 16, Copies::new(vec![0x2000, 0x2044, 0x3040], ()));
        windows
    }

    #[test]
    fn a_buffer_is_found_in_our_copy_from_end_to_end_and_not_beyond() {
        let windows = windows();
        let find = |id, ptr, bytes| windows.find(1, id, (ptr, bytes)).map(|place| (place.id, place.offset));
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
        let place = windows.find(1, 3, (0x2010, 8));
        assert_eq!(windows.place(place, (&mut bases, &mut offset)), 64);
        assert_eq!((bases, offset), ([0x1000, 0x2004, 0x3000, 9], 12));
    }

    #[test]
    fn a_window_that_was_closed_is_not_found_and_lets_go_of_its_copies() {
        let mut windows = windows();
        let copies = Arc::downgrade(&windows.open[0].copies);
        windows.close(3);
        assert_eq!(windows.find(1, 3, (0x2004, 1)), None);
        assert!(windows.find(1, 5, (0x2044, 1)).is_some());
        assert_eq!(copies.strong_count(), 0);
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
