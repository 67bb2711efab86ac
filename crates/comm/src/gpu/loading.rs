//! Loading kernels that were not prepared: the driver may wait for the device in it, and so for kernels that wait for others.

use std::time::{Duration, Instant};

use unisono_cuda::{Event, Stream};

use super::budget::Budget;
use super::{Gpu, kernels};
use crate::collectives::Plan;
use crate::error::{Error, Result};

impl Gpu {
    #[cold]
    pub(super) fn load(&mut self, plan: &Plan, stream: &Stream) -> Result<()> {
        let (rank, kind) = (self.seat.rank(), plan.header.kind);
        let failed = |error| Error::Cuda { rank, error };
        if self.kernels.adopt(kind, plan.dtype) {
            return Ok(());
        }
        if stream.is_capturing().map_err(failed)? {
            let what = plan.header.to_string();
            return Err(Error::NotPrepared { call: kind.name(), rank, what, why: "a graph is captured" });
        }
        let is_alone = self.budget.as_ref().is_none_or(Budget::is_alone);
        if (!self.siblings.is_empty() || !is_alone) && !self.is_quiet()? {
            let what = plan.header.to_string();
            let why = "other calls of this process wait for their peers";
            return Err(Error::NotPrepared { call: kind.name(), rank, what, why });
        }
        let purpose = kernels::Purpose::of(kind, plan.dtype);
        for sibling in &self.siblings {
            self.kernels.load_into(sibling, purpose).map_err(failed)?;
        }
        self.kernels.load(kind, plan.dtype).map_err(failed)
    }

    /// Whether all devices of this process have nothing to do, or soon have: loading would wait for them, and they perhaps for
    /// this very thread.
    ///
    /// They do for sure if it drives several ranks. Else they wait for another process, which comes to it in time, unless that is
    /// itself about to load, and waits for another communicator's call that this thread would make next. Nobody can tell; so
    /// there is time for a rank that is late, and an answer before the kernels' own patience ends.
    fn is_quiet(&self) -> Result<bool> {
        const SOON: Duration = Duration::from_secs(1);
        /// Where kernels wait for ever.
        const AT_LAST: Duration = Duration::from_mins(5);
        let rank = self.seat.rank();
        let failed = |error| Error::Cuda { rank, error };
        let limit = match self.args.patience_ns {
            _ if self.drives_peers => SOON,
            0 => AT_LAST,
            patience_ns => Duration::from_nanos(patience_ns / 2),
        };
        let start = Instant::now();
        for device in self.siblings.iter().chain([&self.device]) {
            let event = Event::new(device, false).map_err(failed)?;
            match event.record_device() {
                // A driver that cannot tell: loading may wait as long as the kernels do.
                Err(unisono_cuda::Error::TooOld { .. }) if !self.drives_peers => return Ok(true),
                recorded => recorded.map_err(failed)?,
            }
            while !event.is_done().map_err(failed)? {
                if start.elapsed() > limit {
                    return Ok(false);
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(true)
    }
}
