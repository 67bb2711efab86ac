//! Operations that are posted together: on one communicator or on several that one thread drives; and windows, registrations,
//! communicators and their ends for such a thread.

use std::cell::RefCell;

use crate::call::Call;
use crate::collectives::Prepared;
use crate::communicator::Communicator;
use crate::error::Result;
use crate::operations::Operations;
use crate::stream::Stream;
#[cfg(feature = "cuda")]
use crate::stream::are_of_gpus;
#[cfg(feature = "cuda")]
use launches::Launches;

#[cfg(feature = "cuda")]
mod launches;
mod requests;

pub use requests::Promised;
use requests::Task;

/// Collects the operations of [`group`].
#[derive(Debug)]
pub struct Group<'b> {
    calls: RefCell<Vec<(&'b Communicator, Prepared)>>,
    /// Those on GPUs.
    #[cfg(feature = "cuda")]
    launches: RefCell<Launches<'b>>,
    /// What is done after the calls, on each communicator.
    tasks: RefCell<Vec<Task<'b>>>,
}

/// One communicator within a group. Made by [`Group::on`].
#[derive(Debug)]
pub struct Grouped<'g, 'b> {
    group: &'g Group<'b>,
    communicator: &'b Communicator,
    #[cfg(feature = "cuda")]
    stream: &'b Stream,
}

/// One communicator within a group, with several buffers. Made by [`Group::on_each`].
#[derive(Debug)]
pub struct GroupedEach<'g, 'b> {
    group: &'g Group<'b>,
    communicator: &'b Communicator,
    streams: &'b [Stream],
}

impl<'b> Group<'b> {
    /// The operations on several buffers of `communicator`, as [`Communicator::on_each`] has them, as part of this group.
    ///
    /// ```
    /// # use unisono::{Communicator, Operations, ReduceOp, Stream, group};
    /// // Two buffers of each of two ranks, all on one thread.
    /// let ranks = Communicator::threads(2)?;
    /// let (streams, mut numbers) = ([Stream::host(), Stream::host()], [[[1u32], [2]], [[3], [4]]]);
    /// group(|group| {
    ///     for (rank, [a, b]) in ranks.iter().zip(&mut numbers) {
    ///         group.on_each(rank, &streams).all_reduce_multi(vec![a.into(), b.into()], ReduceOp::Sum)?;
    ///     }
    ///     Ok(())
    /// })?;
    /// assert_eq!(numbers, [[[10]; 2]; 2]);
    /// # Ok::<(), unisono::Error>(())
    /// ```
    ///
    /// # Errors
    /// Of its operations: as [`Communicator::on_each`], but what the driver refuses is told by [`group`].
    pub const fn on_each(
        &self,
        communicator: &'b Communicator,
        streams: &'b [Stream],
    ) -> GroupedEach<'_, 'b> {
        GroupedEach { group: self, communicator, streams }
    }

    /// Checks an operation of the host and notes it.
    fn note(&self, communicator: &'b Communicator, call: &Call<'b>) -> Result<()> {
        let mut engine = communicator.engine();
        engine.check()?;
        let prepared = engine.prepare(call)?;
        self.calls.borrow_mut().push((communicator, prepared));
        Ok(())
    }

    /// The operations of `communicator`, in the order of `stream`, as part of this group.
    pub fn on(&self, communicator: &'b Communicator, stream: &'b Stream) -> Grouped<'_, 'b> {
        // The host has only one.
        #[cfg(not(feature = "cuda"))]
        let _ = stream;
        Grouped {
            group: self,
            communicator,
            #[cfg(feature = "cuda")]
            stream,
        }
    }
}

impl<'b> Operations<'b> for Grouped<'_, 'b> {
    type Done = ();

    /// Checks the operation and notes it; it is posted when the group ends.
    fn submit(&self, call: Call<'b>) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(stream) = self.stream.as_cuda() {
            return self.group.launches.borrow_mut().add(self.communicator, &call, stream);
        }
        self.group.note(self.communicator, &call)
    }
}

impl<'b> Operations<'b> for GroupedEach<'_, 'b> {
    type Done = ();

    /// Checks the operation and notes it; it is posted when the group ends.
    fn submit(&self, call: Call<'b>) -> Result<()> {
        self.communicator.check_each(&call, self.streams)?;
        #[cfg(feature = "cuda")]
        if are_of_gpus(self.streams) {
            return self.group.launches.borrow_mut().add_each(self.communicator, &call, self.streams);
        }
        self.group.note(self.communicator, &call)
    }
}

/// Posts all operations that `f` submits together, and returns when all are complete; then does what else `f` asked for.
///
/// Within a group the order of messages does not matter: no send waits for a receive that comes after it. One thread can drive
/// several communicators, even several ranks of one world; collectives of one communicator keep their order.
///
/// On streams of GPUs operations are enqueued when the group ends, on every communicator the collectives first, and then its
/// messages: one kernel carries out all of them (at most 128, on one stream), with all peers and in both directions at once. Operations
/// on several buffers have a stream for each device, and so a door of their own: [`Group::on_each`].
///
/// Windows ([`Grouped::window`], [`Grouped::close`]; with GPUs `Grouped::register` too), communicators made of others
/// ([`Grouped::split`], [`Grouped::duplicate`]) and the end ([`Group::destroy`]) are collective as well, and block: here all
/// communicators do them at once, each its own in order. They come after the operations, on every rank; what they give is
/// [`Promised`].
///
/// ```
/// # use unisono::{Communicator, Operations, Stream, group};
/// // Three ranks on one thread pass a number on, all at once.
/// let ranks = Communicator::threads(3)?;
/// let (stream, numbers, mut got) = (Stream::host(), [[10u32], [11], [12]], [[0u32]; 3]);
/// group(|group| {
///     for (rank, (number, got)) in ranks.iter().zip(numbers.iter().zip(&mut got)) {
///         let (me, on) = (rank.rank(), group.on(rank, &stream));
///         on.send(number, (me + 1) % 3, 0)?;
///         on.recv(got, (me + 2) % 3, 0)?;
///     }
///     Ok(())
/// })?;
/// assert_eq!(got, [[12], [10], [11]]);
/// # Ok::<(), unisono::Error>(())
/// ```
///
/// # Errors
/// Those of `f`, and of arguments: then nothing was posted. Else the first cause of a failure of any of the communicators; what was
/// posted on the others is carried out all the same.
pub fn group<'b, R>(f: impl FnOnce(&Group<'b>) -> Result<R>) -> Result<R> {
    let group = Group {
        calls: RefCell::default(),
        #[cfg(feature = "cuda")]
        launches: RefCell::default(),
        tasks: RefCell::default(),
    };
    let value = f(&group)?;
    #[cfg(feature = "cuda")]
    let launches = group.launches.into_inner();
    let (calls, tasks) = (group.calls.into_inner(), group.tasks.into_inner());
    let mut communicators: Vec<&Communicator> = Vec::new();
    for (communicator, _) in &calls {
        if !communicators.iter().any(|known| std::ptr::eq(*known, *communicator)) {
            communicators.push(communicator);
        }
    }
    for communicator in communicators.iter().copied().chain(tasks.iter().filter_map(Task::lent)) {
        communicator.engine().check()?;
    }
    #[cfg(not(feature = "cuda"))]
    let mut result = Ok(());
    #[cfg(feature = "cuda")]
    let mut result = launches.enqueue();
    for (communicator, prepared) in calls {
        let posted = communicator.engine().post(prepared);
        result = result.and(posted.map(drop));
    }
    let result = result.and(drive(&communicators));
    result.and(requests::carry_out(tasks)).map(|()| value)
}

/// Drives all communicators until nothing is in flight on any; the first failure.
fn drive(communicators: &[&Communicator]) -> Result<()> {
    let mut result = Ok(());
    let mut turn = 0;
    loop {
        for communicator in communicators {
            let mut engine = communicator.engine();
            if !engine.is_idle() {
                let progress = engine.progress();
                result = result.and(progress.map(drop));
            }
        }
        let busy: Vec<_> =
            communicators.iter().filter(|communicator| !communicator.engine().is_idle()).collect();
        let Some(one) = busy.get(turn % busy.len().max(1)) else { return result };
        turn += 1;
        // Sleeps on a word of one, and looks at those of all; the next time it is another's turn to keep its patience.
        let others = busy.iter().filter(|other| !std::ptr::eq(**other, *one));
        let others: Vec<_> = others.map(|other| other.engine()).collect();
        let rested = one.engine().rest(&|| others.iter().any(|other| other.is_any_ready()));
        result = result.and(rested);
    }
}
