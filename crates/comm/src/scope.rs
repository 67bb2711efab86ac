//! Non-blocking operations: started in a scope, complete at the latest when it ends.

use std::marker::PhantomData;

use crate::binding::Started;
use crate::call::Call;
use crate::communicator::Communicator;
use crate::error::Result;
use crate::operations::Operations;

/// Starts operations without waiting for them. Made by [`Communicator::scope`].
#[derive(Debug)]
pub struct Scope<'s, 'env: 's> {
    communicator: &'env Communicator,
    /// Invariant in both: a handle must not outlive the scope, nor a buffer be shorter than it.
    life: PhantomData<(&'s mut &'s (), &'env mut &'env ())>,
}

/// An operation that was started. Dropping or forgetting it is harmless: the end of the scope waits for it.
#[derive(Debug)]
#[must_use = "the buffers can be used after the scope; to wait for this one alone, call wait()"]
pub struct Pending<'s> {
    communicator: &'s Communicator,
    started: Started,
}

impl Pending<'_> {
    /// Whether the operation is complete. Waits for nobody, and takes all operations of the communicator that were started as
    /// far as they go.
    ///
    /// # Errors
    /// The first cause of a failure, among them those that a wait would end with: [`crate::Error::Timeout`] after the
    /// timeout without any progress, [`crate::Error::Mismatch`].
    pub fn test(&mut self) -> Result<bool> {
        self.communicator.test(self.started)
    }

    /// Waits until the operation is complete.
    ///
    /// # Errors
    /// The first cause of a failure.
    pub fn wait(self) -> Result<()> {
        self.communicator.complete(self.started)
    }
}

impl<'s, 'env> Operations<'env> for Scope<'s, 'env> {
    type Done = Pending<'s>;

    /// Starts an operation: what it can do without waiting is done when this returns.
    fn submit(&self, call: Call<'env>) -> Result<Pending<'s>> {
        Ok(Pending { communicator: self.communicator, started: self.communicator.begin(&call)? })
    }
}

impl Communicator {
    /// Starts operations and does other work while peers get ready. `f` gets a [`Scope`], whose operations return at once, with
    /// a [`Pending`] to test or to wait for.
    ///
    /// Operations make progress inside `test`, `wait`, the start of others, any other call on this communicator, and the end of
    /// the scope; not in between. Collectives are carried out in the order in which they were started, messages beside
    /// them. Buffers are borrowed until the scope has returned. It returns, also by `?`, when all its operations are complete or
    /// the communicator has failed; a panic in `f` aborts the communicator on all ranks. After that nothing touches the buffers.
    ///
    /// ```
    /// # use unisono::{Communicator, Operations, ReduceOp};
    /// # let ranks = Communicator::threads(2)?;
    /// # let ranks: Vec<_> = ranks.into_iter().map(|rank| std::thread::spawn(move || {
    /// let (mut gradients, mut loss) = (vec![1.0f32; 1000], [2.0f64]);
    /// rank.scope(|scope| {
    ///     let first = scope.all_reduce(&mut gradients, ReduceOp::Sum)?;
    ///     let _second = scope.all_reduce(&mut loss, ReduceOp::Avg)?;
    ///     // … work that needs neither …
    ///     first.wait()
    /// })?;
    /// assert_eq!((gradients[999], loss[0]), (2.0, 2.0));
    /// # rank.destroy() })).collect();
    /// # for rank in ranks { rank.join().unwrap()?; }
    /// # Ok::<(), unisono::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of `f`; else the first cause of a failure of an operation that was not waited for.
    pub fn scope<'env, R>(&'env self, f: impl for<'s> FnOnce(&'s Scope<'s, 'env>) -> Result<R>) -> Result<R> {
        let end = End { communicator: self, after: self.engine().last_ticket() };
        let result = f(&Scope { communicator: self, life: PhantomData });
        let ended = end.wait();
        let value = result?;
        ended?;
        Ok(value)
    }
}

/// The end of a scope, however it is reached.
struct End<'c> {
    communicator: &'c Communicator,
    /// Operations with later tickets belong to the scope.
    after: crate::collectives::Ticket,
}

impl End<'_> {
    fn wait(self) -> Result<()> {
        let mut engine = self.communicator.engine();
        engine.drive(|engine| engine.is_done_after(self.after))
    }
}

impl Drop for End<'_> {
    /// Reached with operations in flight by a panic only: nothing may touch the buffers after it, and nobody may wait long.
    fn drop(&mut self) {
        let mut engine = self.communicator.engine();
        if !engine.is_done_after(self.after) {
            let rank = self.communicator.rank();
            engine.give_up(&format!("a scope with operations in flight ended by a panic on rank {rank}"));
        }
    }
}
