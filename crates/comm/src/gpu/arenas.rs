//! The arenas of a world's GPUs: memory that every rank's kernels write into, and how each rank comes to reach all of them.
//!
//! Over NVLink (or on one device) an arena lies in its rank's device memory; its descriptor goes to the other processes over
//! the node plane. GPUs that do not reach each other meet in one piece of pinned host memory. All ranks take the same way:
//! after each step they agree whether it went well everywhere.

use std::sync::Arc;

use unisono_core::device::ArenaLayout;
use unisono_core::settings::HandleKind;
use unisono_cuda::{Device, RegisteredHost, SharedPages};
use unisono_node::SharedMemory;

use super::peers;
use crate::error::{Error, Result};

/// All arenas, as one rank reaches them.
#[derive(Debug)]
pub(crate) enum Arenas {
    /// In the memory of the devices, by rank.
    Device(Vec<Arc<SharedPages>>),
    /// In host memory, one after the other.
    Host { registered: Arc<RegisteredHost>, layout: ArenaLayout, _memory: Arc<SharedMemory> },
}

impl Arenas {
    /// Where the arena of `rank` lies, as our kernels call it.
    pub(crate) fn address(&self, rank: usize) -> u64 {
        match self {
            Self::Device(pages) => pages[rank].address(),
            Self::Host { registered, layout, .. } => {
                registered.address() + (rank * layout.total_bytes()) as u64
            }
        }
    }

    /// An arena in the memory of `device`, clear, for epochs that begin behind `epoch`.
    pub(crate) fn create(
        device: &Device,
        layout: &ArenaLayout,
        epoch: u32,
        handles: HandleKind,
    ) -> unisono_cuda::Result<SharedPages> {
        let pages = peers::on_device(device, layout.total_bytes(), handles)?;
        pages.fill(0)?;
        if epoch != 0 {
            let (packets, rounds) = layout.message_start(epoch);
            for (field, word) in [
                (layout.flags(), u64::from(epoch) << 32),
                (layout.message_flags(), ArenaLayout::flag_of(rounds)),
                (layout.credits(), packets),
            ] {
                pages.write(field.offset, &word.to_le_bytes().repeat(field.bytes / 8))?;
            }
        }
        Ok(pages)
    }

    /// Arenas in `memory`, which has room for all ranks.
    pub(crate) fn host(
        device: &Device,
        memory: Arc<SharedMemory>,
        layout: ArenaLayout,
    ) -> unisono_cuda::Result<Self> {
        // SAFETY: the memory stays mapped as long as these arenas, which keep it, and drop the registration first.
        let registered = unsafe { RegisteredHost::shared(device, memory.as_ptr(), memory.bytes()) }?;
        Ok(Self::Host { registered, layout, _memory: memory })
    }
}

/// Why `device` does not reach what has this identity, if it does not. A device that this process does not see may be
/// reached all the same: trying tells.
pub(crate) fn obstacle(device: &Device, peer: unisono_cuda::Uuid, rank: usize) -> Result<Option<String>> {
    let failed = |error| Error::Cuda { rank, error };
    let Some(other) = Device::by_uuid(peer).map_err(failed)? else { return Ok(None) };
    match device.reaches(&other).map_err(failed)? {
        true => Ok(None),
        false => Ok(Some(format!("cuda:{} does not reach cuda:{}", device.ordinal(), other.ordinal()))),
    }
}
