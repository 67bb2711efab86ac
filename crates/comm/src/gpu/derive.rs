//! The GPU's side of communicators that are made of others: of groups by `split` and `duplicate`, and of those that are left by
//! `shrink`. Each has arenas, kernels, blocks and a recorder of its own, on the same device, and finds anew how its GPUs reach each
//! other.
//!
//! Ranks that make groups agree over the communicator that they split: all groups take the same steps at the same time, and
//! when it returns, nobody of any group allocates any more. A thread that drives GPUs of one process may then begin calls that wait.

use std::sync::Arc;
use std::time::Duration;

use unisono_core::ReduceOp;
use unisono_sync::Deadline;

use super::attach::{Attachment, ROUNDS, all_or_none};
use super::{Gpu, Origin};
use crate::buffer::BufMut;
use crate::call::{Call, Kind};
use crate::communicator::Communicator;
use crate::error::{Error, Result};

impl Communicator {
    /// Makes the GPU's side of `child`, whose rank r is our `members[r]`; there is no child for a rank without a color. Collective over
    /// this communicator: all groups have theirs or none has. Without GPUs nothing is to be done.
    pub(crate) fn attach_child(&self, child: Option<&mut Self>, members: &[usize]) -> Result<()> {
        let Some(origin) = &self.origin else { return Ok(()) };
        let patience = self.making_patience(origin);
        let least = |ours| self.least_of(members, ours, patience);
        let all = |ours| self.least_of_all(ours, patience);
        let Some(child) = child else {
            // The others ask, and hear everybody.
            for _ in 0..ROUNDS {
                least(u8::MAX)?;
            }
            return all(1).map(drop);
        };
        let rank = self.rank();
        let origin = Arc::new(origin.of(members));
        let is_aborted = || self.control.abort().raised().is_some();
        let gpu = {
            let attachment = Attachment {
                communicator: child,
                origin: &origin,
                deadline: patience.map_or(Deadline::NEVER, Deadline::after),
                least: &least,
                is_aborted: &is_aborted,
            };
            all_or_none(attachment.run(), rank, all)
        };
        let gpu = gpu.map_err(|error| told_by(error, rank))?;
        child.attach(origin, gpu);
        Ok(())
    }

    /// Makes the GPU's side of this communicator from what it had in another life, or is made from now. Collective: it fails
    /// on all ranks or on none.
    pub(crate) fn attach_all(&mut self, origin: Arc<Origin>, deadline: Deadline) -> Result<()> {
        let patience = self.making_patience(&origin);
        let gpu = {
            let least = |ours| self.least_of_all(ours, patience);
            let is_aborted = || self.control.abort().raised().is_some();
            let attachment = Attachment {
                communicator: self,
                origin: &origin,
                deadline,
                least: &least,
                is_aborted: &is_aborted,
            };
            all_or_none(attachment.run(), self.rank(), least)?
        };
        self.attach(origin, gpu);
        Ok(())
    }

    /// The same in a new generation, if the one before had GPUs.
    pub(crate) fn attach_again(&mut self) -> Result<()> {
        let Some(origin) = self.origin.clone() else { return Ok(()) };
        let patience = self.making_patience(&origin);
        self.attach_all(origin, patience.map_or(Deadline::NEVER, Deadline::after))
    }

    /// From now on this rank works on a GPU.
    pub(crate) fn attach(&mut self, origin: Arc<Origin>, gpu: Gpu) {
        self.gpu = Some(std::cell::RefCell::new(gpu));
        self.origin = Some(origin);
    }

    /// What the making of arenas and kernels may take, where each world size has kernels of its own: at least what the ranks had to meet.
    fn making_patience(&self, origin: &Origin) -> Option<Duration> {
        self.patience.map(|patience| patience.max(origin.settings.init_timeout))
    }

    /// The least of what `members` say. Collective over all ranks.
    fn least_of(&self, members: &[usize], ours: u8, patience: Option<Duration>) -> Result<u8> {
        let mut said = vec![0; self.world_size()];
        said[self.rank()] = ours;
        let call = Call::new(Kind::AllGather, [BufMut::from(&mut said).raw()]);
        self.engine().with_patience(patience, |engine| engine.submit(&call))?;
        Ok(members.iter().map(|member| said[*member]).min().unwrap_or(ours))
    }

    /// The least of what all ranks say. Collective.
    fn least_of_all(&self, ours: u8, patience: Option<Duration>) -> Result<u8> {
        let mut all = [ours];
        let call = Call::new(Kind::AllReduce { op: ReduceOp::Min }, [BufMut::from(&mut all).raw()]);
        self.engine().with_patience(patience, |engine| engine.submit(&call))?;
        Ok(all[0])
    }
}

/// What went wrong in a group, as a rank of the communicator that was split tells it.
fn told_by(error: Error, rank: usize) -> Error {
    match error {
        Error::Cuda { error, .. } => Error::Cuda { rank, error },
        Error::Device { reason, .. } => Error::Device { rank, reason },
        Error::NoPeerAccess { reason, .. } => Error::NoPeerAccess { rank, reason },
        other => other,
    }
}
