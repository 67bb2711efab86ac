//! The windows that a communicator has open: where a buffer lies in one, and where a peer's copy lies.

use std::sync::Arc;

use unisono_core::layout::WindowLayout;
use unisono_node::SharedMemory;

use super::engine::Engine;
use super::plan::WindowPlace;
use crate::cause::Cause;
use crate::error::Result;

/// A window that peers map too.
#[derive(Clone, Debug)]
struct OpenWindow {
    id: u64,
    memory: Arc<SharedMemory>,
    layout: WindowLayout,
}

/// All open windows.
#[derive(Debug)]
pub(super) struct Windows {
    open: Vec<OpenWindow>,
    /// Windows with lower ids belong to earlier generations.
    pub(super) first: u64,
    next: u64,
}

impl Default for Windows {
    fn default() -> Self {
        Self { open: Vec::new(), first: 1, next: 1 }
    }
}

impl Windows {
    /// The place of `bytes` at `ptr` in our copy of window `id`, if they lie there.
    pub(super) fn find(&self, rank: usize, id: u64, ptr: u64, bytes: usize) -> Option<WindowPlace> {
        let window = self.open.iter().find(|window| window.id == id)?;
        let base = window.memory.as_ptr().expose_provenance() + window.layout.copy(rank).offset;
        let offset = (ptr as usize).checked_sub(base)?;
        (offset.checked_add(bytes)? <= window.layout.bytes()).then_some(WindowPlace { id, offset })
    }
}

impl Engine {
    /// The id that the next window gets, equal on all ranks because windows are made in the same order.
    pub(crate) const fn next_window_id(&mut self) -> u64 {
        self.windows.next += 1;
        self.windows.next - 1
    }

    /// The memory of all open windows, and the id that the next one would get.
    pub(crate) fn windows(&self) -> (Vec<Arc<SharedMemory>>, u64) {
        (self.windows.open.iter().map(|window| window.memory.clone()).collect(), self.windows.next)
    }

    /// Windows with lower ids belong to earlier generations.
    pub(crate) const fn begin_windows_at(&mut self, id: u64) {
        self.windows.first = id;
        self.windows.next = id;
    }

    /// From now on, buffers in `memory` are known to lie in window `id`.
    pub(crate) fn open_window(&mut self, id: u64, memory: Arc<SharedMemory>, layout: WindowLayout) {
        self.windows.open.push(OpenWindow { id, memory, layout });
    }

    /// Forgets window `id`.
    pub(crate) fn close_window(&mut self, id: u64) {
        self.windows.open.retain(|window| window.id != id);
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
        let window = self.windows.open.iter().find(|window| window.id == id);
        let fits =
            |window: &&OpenWindow| offset.checked_add(bytes).is_some_and(|end| end <= window.layout.bytes());
        match window.filter(fits) {
            Some(window) => {
                let start = window.layout.copy(peer).offset + offset;
                // SAFETY: the range lies within the peer's copy in the mapping, as was just checked.
                Ok(unsafe { window.memory.as_ptr().add(start) })
            }
            None => Err(self.abort_with(Cause::Mismatch {
                left: self.call_name(),
                right: format!("an offset of {offset} outside window {id} on {}", self.control.name(peer)),
            })),
        }
    }
}
