//! The windows that a communicator has open: where a buffer lies in one, and where a peer's copy lies.

use super::engine::Engine;
use super::plan::WindowPlace;
use crate::buffer::{Place, RawBuffer};
use crate::cause::Cause;
use crate::copies::Copies;
use crate::error::Result;

/// A window that peers reach too.
#[derive(Clone, Debug)]
struct OpenWindow {
    id: u64,
    copies: Copies,
}

/// All open windows.
#[derive(Debug)]
pub(super) struct Windows {
    open: Vec<OpenWindow>,
    /// Windows with lower ids belong to earlier generations.
    pub(super) first: u64,
    next: u64,
    /// Whether GPUs work on any of them.
    are_pinned: bool,
}

impl Default for Windows {
    fn default() -> Self {
        Self { open: Vec::new(), first: 1, next: 1, are_pinned: false }
    }
}

impl Windows {
    fn window(&self, id: u64) -> Option<&OpenWindow> {
        self.open.iter().find(|window| window.id == id)
    }

    /// The place of `bytes` at `ptr` in our copy of window `id`, if they lie there.
    pub(super) fn find(&self, rank: usize, id: u64, ptr: u64, bytes: usize) -> Option<WindowPlace> {
        let copies = &self.window(id)?.copies;
        let offset = (ptr as usize).checked_sub(copies.start(rank))?;
        (offset.checked_add(bytes)? <= copies.bytes()).then_some(WindowPlace { id, offset })
    }

    /// Waits for what our GPU was given to do in the windows that these buffers lie in, before the host touches them.
    #[inline]
    pub(super) fn settle(&self, buffers: &[RawBuffer]) -> Result<()> {
        if self.are_pinned { self.wait_for_gpu(buffers) } else { Ok(()) }
    }

    #[cold]
    fn wait_for_gpu(&self, buffers: &[RawBuffer]) -> Result<()> {
        for buffer in buffers {
            if let Place::Window { id } = buffer.place
                && let Some(window) = self.window(id)
            {
                window.copies.settle()?;
            }
        }
        Ok(())
    }
}

impl Engine {
    /// The id that the next window gets, equal on all ranks because windows are made in the same order.
    pub(crate) const fn next_window_id(&mut self) -> u64 {
        self.windows.next += 1;
        self.windows.next - 1
    }

    /// The memory of all open windows that the host reaches, and the id that the next one would get.
    pub(crate) fn windows(&self) -> (Vec<Copies>, u64) {
        (self.windows.open.iter().map(|window| window.copies.clone()).collect(), self.windows.next)
    }

    /// Windows with lower ids belong to earlier generations.
    pub(crate) const fn begin_windows_at(&mut self, id: u64) {
        self.windows.first = id;
        self.windows.next = id;
    }

    /// From now on, buffers in our copy are known to lie in window `id`.
    pub(crate) fn open_window(&mut self, id: u64, copies: Copies) {
        self.windows.are_pinned |= copies.are_pinned();
        self.windows.open.push(OpenWindow { id, copies });
    }

    /// Forgets window `id`.
    pub(crate) fn close_window(&mut self, id: u64) {
        self.windows.open.retain(|window| window.id != id);
        self.windows.are_pinned = self.windows.open.iter().any(|window| window.copies.are_pinned());
    }

    /// The address of `bytes` at `offset` of `peer`'s copy of window `id`; offsets that a peer wrote are checked here.
    pub(super) fn window_address(
        &self,
        peer: usize,
        id: u64,
        offset: usize,
        bytes: usize,
    ) -> Result<*mut u8> {
        // No window of ours: a side that is not everywhere.
        if id == 0 {
            return Ok(std::ptr::null_mut());
        }
        let fits =
            |window: &&OpenWindow| offset.checked_add(bytes).is_some_and(|end| end <= window.copies.bytes());
        match self.windows.window(id).filter(fits) {
            Some(window) => Ok(std::ptr::with_exposed_provenance_mut(window.copies.start(peer) + offset)),
            None => Err(self.abort_with(Cause::Mismatch {
                left: self.call_name(),
                right: format!("an offset of {offset} outside window {id} on {}", self.control.name(peer)),
            })),
        }
    }
}
