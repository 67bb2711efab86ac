//! The copies of a window in host memory, as this process reaches them: where each begins, what keeps it there, and the signals
//! of the ranks beside.
//!
//! Plain windows are one mapping with all of that in it. A pinned one, on GPUs, has memory of its own for each rank.

use std::sync::Arc;

use unisono_core::layout::WindowLayout;
use unisono_node::SharedMemory;

use crate::error::Result;
#[cfg(feature = "cuda")]
use crate::gpu::pinned::Pinned;

/// All copies of a window. Clones are the same memory.
#[derive(Clone, Debug)]
pub(crate) struct Copies {
    /// Where the copy of each rank begins, in this process.
    starts: Arc<[usize]>,
    /// Of each copy, as they were asked for.
    bytes: usize,
    /// The signals of all ranks; of a plain window, the copies too.
    signals: Arc<SharedMemory>,
    layout: WindowLayout,
    #[cfg(feature = "cuda")]
    pinned: Option<Arc<Pinned>>,
}

impl Copies {
    /// Those of `ranks` in one mapping.
    pub(crate) fn in_one(memory: Arc<SharedMemory>, layout: WindowLayout, ranks: usize) -> Self {
        let base = memory.as_ptr().expose_provenance();
        Self {
            starts: (0..ranks).map(|rank| base + layout.copy(rank).offset).collect(),
            bytes: layout.bytes(),
            signals: memory,
            layout,
            #[cfg(feature = "cuda")]
            pinned: None,
        }
    }

    /// Copies of `bytes` in pinned memory, with signals in a mapping without any.
    #[cfg(feature = "cuda")]
    pub(crate) fn pinned(
        pinned: Pinned,
        bytes: usize,
        signals: Arc<SharedMemory>,
        layout: WindowLayout,
    ) -> Self {
        Self { starts: pinned.starts().collect(), bytes, signals, layout, pinned: Some(Arc::new(pinned)) }
    }

    /// Where the copy of `rank` begins. All of its pages may be accessed while these copies are held.
    #[inline]
    pub(crate) fn start(&self, rank: usize) -> usize {
        self.starts[rank]
    }

    /// Bytes of each copy, as they were asked for.
    #[inline]
    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// The memory that holds the signals of all ranks, and where.
    pub(crate) fn signals(&self) -> (&SharedMemory, &WindowLayout) {
        (&self.signals, &self.layout)
    }

    /// What pins them, if they are.
    #[cfg(feature = "cuda")]
    pub(crate) const fn as_pinned(&self) -> Option<&Arc<Pinned>> {
        self.pinned.as_ref()
    }

    /// Whether GPUs may be at work on them.
    #[inline]
    pub(crate) const fn are_pinned(&self) -> bool {
        #[cfg(feature = "cuda")]
        return self.pinned.is_some();
        #[cfg(not(feature = "cuda"))]
        return false;
    }

    /// Waits until our GPU is done with the calls on them that it was given.
    pub(crate) fn settle(&self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(pinned) = &self.pinned {
            return pinned.settle();
        }
        Ok(())
    }

    /// Keeps them for the rest of our life: somebody who was given up may still write there.
    pub(crate) fn quarantine(self) {
        unisono_node::memory::quarantine(self.signals);
        #[cfg(feature = "cuda")]
        if let Some(pinned) = self.pinned {
            let _ = std::mem::ManuallyDrop::new(pinned);
        }
    }
}
