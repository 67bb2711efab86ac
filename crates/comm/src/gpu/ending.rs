//! How the GPU's side of a communicator ends. Kernels of ours, and copies, may still touch its memory when the communicator is
//! dropped: a thread that waits for the device gives it back then, and nobody waits for that.
//!
//! A communicator that goes on in another generation is different. Its kernels were told to leave and have time to; then the
//! memory goes at once, before anybody calls anything in the new generation, because to free memory may wait for all kernels of
//! a device. What a rank that was given up may still write to is kept for the life of the process.

use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::{Duration, Instant};

use unisono_cuda::{Device, DeviceBuffer, Event, RegisteredHost};

use super::Gpu;
use super::arenas::Arenas;
use super::recorder::Copier;
use super::seats::Seat;
use super::watch::side_stream;
use super::windows::Windows;
use crate::error::Result;

/// How long kernels that were told to leave may take to: they look at the abort word some thousand times in that. Only those of
/// other communicators take longer, and nobody waits for them here.
const LEAVING: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_micros(200);

/// What kernels may still touch after the communicator is gone.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) device: Device,
    pub(super) _state: DeviceBuffer,
    pub(super) copier: Copier,
    pub(super) _arenas: Arenas,
    pub(super) control_pages: Arc<RegisteredHost>,
    /// As the pages of the control memory, or beside them.
    pub(super) _report_pages: Arc<RegisteredHost>,
    pub(super) seat: Seat,
    pub(super) windows: Windows,
}

/// What becomes of the memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum End {
    /// It goes when the device is quiet, whenever that is.
    WhenQuiet,
    /// It goes now: nothing of ours runs.
    Now,
    /// It stays.
    Never,
}

impl Memory {
    /// Nothing on the device uses it any more.
    fn free(self) {
        let _ = self.copier.keep(&self.device, self.seat.page());
        drop(self);
        unisono_cuda::capture::drop_released();
    }
}

impl Gpu {
    /// Gives the kernels of a failed communicator time to leave. What other communicators of this process do on the device does
    /// not keep us for long.
    ///
    /// # Errors
    /// [`Error::Cuda`](crate::Error::Cuda) if the context is lost: this rank cannot go on.
    pub(crate) fn leave(&mut self) -> Result<()> {
        self.seats.iter_mut().try_for_each(Self::leave)?;
        match self.wait_until_quiet() {
            Ok(true) => self.end = End::Now,
            Ok(false) => {
                let ordinal = self.device.ordinal();
                tracing::debug!("cuda:{ordinal} has not come to rest within {LEAVING:?}");
            }
            Err(error) if error.is_fatal() => return Err(self.refused(error)),
            // A driver that cannot tell.
            Err(_) => {}
        }
        Ok(())
    }

    /// Gives everything back at once: nothing was called yet.
    pub(crate) fn undo(mut self) {
        self.end_all(End::Now);
    }

    fn end_all(&mut self, end: End) {
        self.end = end;
        self.seats.iter_mut().for_each(|seat| seat.end_all(end));
    }

    /// All streams are asked at once, those that others capture too: which ones our kernels run in, graphs and users know, and streams
    /// of before may be gone.
    fn wait_until_quiet(&self) -> unisono_cuda::Result<bool> {
        let (start, event) = (Instant::now(), Event::new(&self.device, false)?);
        event.record_device()?;
        while !event.is_done()? {
            if start.elapsed() > LEAVING {
                return Ok(false);
            }
            std::thread::sleep(LOOK);
        }
        Ok(true)
    }

    /// Ends this side of a communicator that goes on in another generation. If a rank that is not proven dead was left behind,
    /// which `is_written` says, all that it reaches stays.
    pub(crate) fn retire(mut self, is_written: bool) {
        if is_written {
            self.end_all(End::Never);
        }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // It copies from memory that is about to go.
        drop(self.watch.take());
        // In a forked child the driver answers nothing, and the memory is its parent's.
        if self.control.check_process().is_err() {
            // Another thread may have held the lock of the budget when it was forked: then nobody would give that back.
            let rest = (self.budget.take(), self.engines.take());
            std::mem::forget((self.memory.take(), std::mem::take(&mut self.windows), rest));
            return;
        }
        let Some(mut memory) = self.memory.take() else { return };
        memory.windows = std::mem::take(&mut self.windows);
        match self.end {
            End::Never => {
                let _ = ManuallyDrop::new(memory);
            }
            // A copy of the recorder may be under way.
            End::Now if side_stream(&self.device).is_ok_and(|stream| stream.synchronize().is_ok()) => {
                memory.free();
            }
            End::Now | End::WhenQuiet => free_when_quiet(memory),
        }
    }
}

/// Kernels of ours may still run: they end in time, because the communicator ended or failed. Nobody waits for them here. If no
/// thread can be had, the memory stays.
fn free_when_quiet(memory: Memory) {
    let memory = ManuallyDrop::new(memory);
    let reap = move || {
        let _ = memory.device.synchronize();
        ManuallyDrop::into_inner(memory).free();
    };
    if let Err(error) = std::thread::Builder::new().name("unisono-reaper".to_owned()).spawn(reap) {
        tracing::warn!("memory of a GPU is not given back: {error}");
    }
}
