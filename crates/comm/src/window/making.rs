//! How the memory of a window is made on all ranks, and how it goes.

use std::sync::Arc;

#[cfg(feature = "cuda")]
use unisono_core::call::CallHeader;
use unisono_core::layout::WindowLayout;
use unisono_sync::Deadline;

use super::{Held, Memory};
use crate::call::Kind;
use crate::collectives::Engine;
use crate::communicator::Communicator;
use crate::control::Control;
use crate::copies::Copies;
#[cfg(not(feature = "cuda"))]
use crate::error::Error;
use crate::error::Result;
#[cfg(feature = "cuda")]
use crate::gpu::windows::Mappings;

/// A window that this rank has made.
pub(crate) enum Made {
    Host(Copies),
    #[cfg(feature = "cuda")]
    Device {
        pages: Vec<Arc<unisono_cuda::SharedPages>>,
        bytes: usize,
    },
}

/// Memory of all ranks that is to be closed: a [`Window`](super::Window), one-sided memory
/// ([`Symmetric`](crate::Symmetric)) or, where there are GPUs, a registration.
#[derive(Debug)]
pub struct Closing {
    control: Arc<Control>,
    id: u64,
    held: Option<Held>,
}

impl Closing {
    /// Window or registration `id` of the communicator of `control`; `held` is this rank's hold on its memory, if it has one
    /// beside that of the communicator.
    pub(crate) const fn new(control: Arc<Control>, id: u64, held: Option<Held>) -> Self {
        Self { control, id, held }
    }

    /// Whether `communicator` made it.
    pub(crate) fn check_owner(&self, communicator: &Communicator) -> Result<()> {
        super::check_owner(Kind::CloseWindow, self.id, &self.control, communicator)
    }
}

/// Until when, and unless what.
#[derive(Clone, Copy)]
pub(crate) struct Limits<'a> {
    pub(crate) deadline: Deadline,
    pub(crate) is_aborted: &'a dyn Fn() -> bool,
}

impl Communicator {
    /// Makes window `id` in `memory` and exchanges it. Collective.
    pub(crate) fn make_window(
        &self,
        memory: Memory,
        id: u64,
        layout: WindowLayout,
        limits: Limits<'_>,
    ) -> Result<Made> {
        match memory {
            Memory::Host => self.make_on_host(id, layout, limits).map(Made::Host),
            Memory::Device => self.make_on_device(id, layout, limits),
            Memory::Pinned => self.make_pinned(id, layout, limits).map(Made::Host),
        }
    }

    fn make_on_host(&self, id: u64, layout: WindowLayout, limits: Limits<'_>) -> Result<Copies> {
        let Limits { deadline, is_aborted } = limits;
        let memory = self.neighbours.share(id as u32, layout.total_bytes(), deadline, is_aborted)?;
        Ok(Copies::in_one(memory, layout, self.world_size()))
    }

    /// Without GPUs, any host memory will do.
    #[cfg(feature = "cuda")]
    fn make_pinned(&self, id: u64, layout: WindowLayout, limits: Limits<'_>) -> Result<Copies> {
        let Some(gpu) = &self.gpu else { return self.make_on_host(id, layout, limits) };
        let Limits { deadline, is_aborted } = limits;
        let (bytes, signals) = (layout.bytes(), WindowLayout::new(self.world_size(), 0, 1)?);
        // Whoever fails here still takes part in what follows: the others wait for it.
        let memory = self.neighbours.share(id as u32, signals.total_bytes(), deadline, is_aborted);
        let pinned = gpu.borrow_mut().share_pinned(&self.neighbours, (id, bytes), deadline, is_aborted);
        Ok(Copies::pinned(pinned?, bytes, memory?, signals))
    }

    #[cfg(not(feature = "cuda"))]
    fn make_pinned(&self, id: u64, layout: WindowLayout, limits: Limits<'_>) -> Result<Copies> {
        self.make_on_host(id, layout, limits)
    }

    #[cfg(feature = "cuda")]
    fn make_on_device(&self, id: u64, layout: WindowLayout, limits: Limits<'_>) -> Result<Made> {
        let Some(gpu) = &self.gpu else {
            return Err(crate::gpu::without_gpu(self.rank()));
        };
        let Limits { deadline, is_aborted } = limits;
        // With room for signals, in case it becomes one-sided.
        let size = (id, layout.device_bytes());
        let pages = gpu.borrow().share_window(&self.neighbours, size, deadline, is_aborted)?;
        Ok(Made::Device { pages, bytes: layout.bytes() })
    }

    #[cfg(not(feature = "cuda"))]
    fn make_on_device(&self, _: u64, _: WindowLayout, _: Limits<'_>) -> Result<Made> {
        Err(Error::Builder { problem: "this build has no GPUs: it was made without the feature cuda" })
    }

    /// From now on, collectives find window `id`.
    pub(crate) fn open_window(&self, engine: &mut Engine, id: u64, made: Made) -> Held {
        #[cfg(feature = "cuda")]
        let mut gpu = self.gpu.as_ref().map(|gpu| gpu.borrow_mut());
        match made {
            Made::Host(copies) => {
                #[cfg(feature = "cuda")]
                if let (Some(gpu), Some(pinned)) = (&mut gpu, copies.as_pinned()) {
                    gpu.open_window(id, copies.bytes(), Mappings::pinned(self.rank(), pinned));
                }
                engine.open_window(id, copies.clone());
                Held::Host(copies)
            }
            #[cfg(feature = "cuda")]
            Made::Device { pages, bytes } => {
                let held = pages[self.rank()].clone();
                if let Some(gpu) = &mut gpu {
                    gpu.open_window(id, bytes, Mappings::on_devices(self.rank(), pages));
                }
                Held::Device(held)
            }
        }
    }

    /// Ends what `closing` names, and frees our hold on its memory and what the table of our GPU keeps. Collective.
    ///
    /// # Errors
    /// As [`Communicator::end_window`]. Our hold ends in any case.
    pub(crate) fn close_window(&self, closing: Closing) -> Result<()> {
        let Closing { control, id, held } = closing;
        self.end_window(Kind::CloseWindow, id, &control)?;
        drop(held);
        // Freeing what the driver knows may wait for all devices of this process, and so for a kernel that waits for us; and
        // whoever owns memory frees it only when nobody maps it. So nobody goes on before all are done.
        #[cfg(feature = "cuda")]
        if self.gpu.is_some() {
            let header = CallHeader { target_window: id, ..CallHeader::bare(Kind::CloseWindow) };
            return self.engine().meet(header, self.patience);
        }
        Ok(())
    }
}
