//! What kernels of a buffer touch, kept together: as long as the buffer, an output or a graph needs it.

use std::sync::Arc;

use unisono_cuda::capture::Kept;
use unisono_cuda::{Device, DeviceBuffer, RegisteredHost};
use unisono_node::SharedMemory;

use super::kernels::Loaded;
use super::pool::Pool;
use crate::control::Control;

#[derive(Debug)]
pub(crate) struct Core {
    pub(super) device: Device,
    pub(super) pool: Pool,
    /// Epoch and counts of blocks.
    pub(super) state: DeviceBuffer,
    /// Experts: of each its rank and number; then all by rank, and where those of each rank begin.
    pub(super) _tables: DeviceBuffer,
    /// Registered before it is unmapped.
    pub(super) page: Arc<RegisteredHost>,
    pub(super) page_memory: Arc<SharedMemory>,
    pub(super) kernels: Arc<Loaded>,
    /// The memories of all ranks.
    pub(super) _memories: Kept,
    /// The word that ends waits.
    pub(super) _control_pages: Arc<RegisteredHost>,
    pub(crate) control: Arc<Control>,
}

impl Core {
    /// The device, by its number in this process.
    pub(crate) fn ordinal(&self) -> u32 {
        self.device.ordinal()
    }

    /// Our rank.
    pub(crate) fn rank(&self) -> usize {
        self.control.member().0
    }
}
