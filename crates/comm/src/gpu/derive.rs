//! The GPU's side of communicators that are made of others: of groups by `split` and `duplicate`, and of those that are left by
//! `shrink`. Each has arenas, kernels, blocks and a recorder of its own, on the same device, and finds anew how its GPUs reach
//! each other.
//!
//! Ranks that make groups agree over the communicator that they split: all groups take the same steps at the same time, and
//! when it returns, nobody of any group allocates any more. A thread that drives GPUs of one process may then begin calls that
//! wait.

use std::sync::Arc;
use std::time::Duration;

use unisono_core::ReduceOp;
use unisono_sync::Deadline;

use super::attach::{Attachment, all_or_none, rounds};
use super::{Gpu, Origin};
use crate::buffer::BufMut;
use crate::call::{Call, Kind};
use crate::communicator::Communicator;
use crate::error::{Error, Result};

impl Communicator {
    /// Makes the GPU's side of `child`, whose rank r is our `members[r]`; there is no child for a rank without a color.
    /// Collective over this communicator: all groups have theirs or none has. Without GPUs nothing is to be done.
    pub(crate) fn attach_child(&self, child: Option<&mut Self>, members: &[usize]) -> Result<()> {
        let Some(origin) = &self.origin else { return Ok(()) };
        let patience = self.making_patience(origin);
        let least = |ours| self.least_of(members, ours, patience);
        let all = |ours| self.least_of_all(ours, patience);
        let Some(child) = child else {
            // The others ask, and hear everybody.
            for _ in 0..rounds(origin) {
                least(u8::MAX)?;
            }
            // Whoever has made something gives it back, and waits until all have.
            return if all(1)? == 0 { all(1).map(drop) } else { Ok(()) };
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
            all_or_none(attachment.run(), rank, Gpu::undo, &all)?
        };
        let gpu = gpu.map_err(|error| told_by(error, rank))?;
        child.attach(origin, gpu);
        Ok(())
    }

    /// Makes the GPU's side of this communicator. Collective: all ranks have theirs, or agree that none has (the inner error), or
    /// one of them was lost meanwhile (the outer error).
    pub(crate) fn attach_all(&mut self, origin: Arc<Origin>, deadline: Deadline) -> Result<Result<()>> {
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
            all_or_none(attachment.run(), self.rank(), Gpu::undo, &least)?
        };
        Ok(gpu.map(|gpu| self.attach(origin, gpu)))
    }

    /// The same in a new generation, if the one before had GPUs.
    pub(crate) fn attach_again(&mut self) -> Result<Result<()>> {
        let Some(origin) = self.origin.clone() else { return Ok(Ok(())) };
        let patience = self.making_patience(&origin);
        self.attach_all(origin, patience.map_or(Deadline::NEVER, Deadline::after))
    }

    /// From now on this rank works on a GPU.
    pub(crate) fn attach(&mut self, origin: Arc<Origin>, gpu: Gpu) {
        self.gpu = Some(std::cell::RefCell::new(gpu));
        self.origin = Some(origin);
    }

    /// What the making of arenas and kernels may take, where each world size has kernels of its own: at least what the ranks
    /// had to meet.
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
    pub(crate) fn least_of_all(&self, ours: u8, patience: Option<Duration>) -> Result<u8> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operations::Operations;

    /// Runs `rank` on every rank of a world of threads.
    fn on_threads(world_size: usize, rank: impl Fn(&Communicator) + Sync) {
        let ranks = Communicator::threads(world_size).unwrap();
        std::thread::scope(|scope| {
            for one in ranks {
                let rank = &rank;
                scope.spawn(move || {
                    rank(&one);
                    one.destroy().unwrap();
                });
            }
        });
    }

    #[test]
    fn groups_agree_side_by_side_and_ranks_without_one_only_listen() {
        on_threads(5, |communicator| {
            let rank = communicator.rank();
            let groups: [&[usize]; 3] = [&[2, 0], &[1, 3], &[]];
            let members = groups[[0, 1, 0, 1, 2][rank]];
            let said = [7, 5, 9, 6, u8::MAX][rank];
            let least = communicator.least_of(members, said, None).unwrap();
            assert_eq!(least, [7, 5, 7, 5, u8::MAX][rank]);
            assert_eq!(communicator.least_of_all(said, None).unwrap(), 5);
        });
    }

    #[test]
    fn who_failed_says_why_and_the_others_that_it_was_another() {
        on_threads(3, |communicator| {
            let rank = communicator.rank();
            let reason = if rank == 1 { "it has none" } else { "no device here" };
            let failure = || Error::Device { rank: 7, reason: reason.to_owned() };
            let all = |ours| communicator.least_of_all(ours, None);
            let agreed = all_or_none(Err(failure()), rank, Gpu::undo, &all);
            let error = agreed.unwrap().unwrap_err();
            assert_eq!(told_by(error, rank), Error::Device { rank, reason: reason.to_owned() });
            let cuda = unisono_cuda::Error::NoSuchDevice { ordinal: 3, count: 1 };
            let told = told_by(Error::Cuda { rank: 0, error: cuda.clone() }, rank);
            assert_eq!(told, Error::Cuda { rank, error: cuda });
            let other = Error::PeerLeft { rank: 0, during: "a test".to_owned() };
            assert_eq!(told_by(other.clone(), rank), other);
            // Who has made something gives it back if another has not, and only then.
            let undone = std::cell::Cell::new(None);
            let agree = |made| all_or_none(made, rank, |made| undone.set(Some(made)), &all).unwrap();
            let error = agree(if rank == 1 { Err(failure()) } else { Ok(rank) }).unwrap_err();
            assert_eq!(error.to_string().contains("another rank"), rank != 1, "{error}");
            assert_eq!(undone.take(), (rank != 1).then_some(rank));
            assert_eq!(agree(Ok(rank)), Ok(rank));
            assert_eq!(undone.take(), None);
        });
    }

    #[test]
    fn communicators_without_gpus_take_no_further_step() {
        on_threads(2, |communicator| {
            communicator.attach_child(None, &[]).unwrap();
            let child = communicator.duplicate().unwrap();
            assert!(child.origin.is_none() && child.gpu.is_none());
            // One for the meeting, and three of the duplicate.
            assert_eq!(communicator.observer().state().completed, 3);
            assert_eq!(child.observer().state().completed, 0);
            child.barrier().unwrap();
            child.destroy().unwrap();
        });
    }
}
