//! Doors for bindings to other languages: there buffers have no lifetimes, each call may have a timeout of its own, and a user
//! at the terminal may end a wait.

use std::sync::Arc;
use std::time::Duration;

use crate::buffer::RawBuffer;
use crate::call::Call;
use crate::collectives::Ticket;
use crate::communicator::Communicator;
use crate::error::Result;
use crate::stream::Stream;

/// An operation that was started by [`Communicator::start`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Started(Ticket);

impl Communicator {
    /// Starts an operation on host memory: what it can do without waiting is done when this returns. It goes on inside other calls
    /// of this communicator, as those of a [`scope`](Communicator::scope) do.
    ///
    /// # Errors
    /// Those of the arguments; the first cause of a failure.
    ///
    /// # Safety
    /// The buffers are valid, and touched by nobody else, until [`Communicator::is_over`] or the end of this communicator.
    pub unsafe fn start(&self, call: &Call<'_>) -> Result<Started> {
        self.begin(call)
    }

    /// As [`Communicator::start`], for who keeps the buffers.
    pub(crate) fn begin(&self, call: &Call<'_>) -> Result<Started> {
        let mut engine = self.engine();
        engine.check()?;
        let prepared = engine.prepare(call)?;
        let ticket = engine.post(prepared)?;
        engine.progress()?;
        Ok(Started(ticket))
    }

    /// Whether the operation is complete. Waits for nobody, and takes all that were started as far as they go.
    ///
    /// # Errors
    /// The first cause of a failure, among them those that a wait would end with.
    pub fn test(&self, started: Started) -> Result<bool> {
        let mut engine = self.engine();
        engine.poll()?;
        Ok(engine.is_done(started.0))
    }

    /// Takes all operations that were started as far as they go, and waits for nobody. Whether any went on.
    ///
    /// # Errors
    /// As those of [`Communicator::test`].
    pub fn advance(&self) -> Result<bool> {
        self.engine().poll()
    }

    /// Waits until the operation is complete.
    ///
    /// # Errors
    /// The first cause of a failure.
    pub fn complete(&self, started: Started) -> Result<()> {
        let mut engine = self.engine();
        engine.check()?;
        engine.drive(|engine| engine.is_done(started.0))
    }

    /// Whether nothing touches the buffers of the operation any more: it is complete, or has failed.
    pub fn is_over(&self, started: Started) -> bool {
        self.engine().is_done(started.0)
    }

    /// As [`OnStream::recv_any`](crate::OnStream::recv_any), into a buffer that is described.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// As [`Call::from_raw`].
    pub unsafe fn recv_any_raw(&self, target: &RawBuffer, tag: u32, stream: &Stream) -> Result<usize> {
        self.recv_any_on(target, tag, stream)
    }

    /// Does `f`, in which calls wait for ranks that live for at most `timeout`; `None` for ever. On GPUs that holds for calls that `f`
    /// enqueues.
    pub fn with_timeout<R>(&self, timeout: Option<Duration>, f: impl FnOnce(&Self) -> R) -> R {
        let change = |patience| {
            #[cfg(feature = "cuda")]
            if let Some(gpu) = &self.gpu {
                gpu.borrow_mut().change_patience(patience);
            }
            self.engine().change_patience(patience)
        };
        let usual = change(timeout);
        let result = f(self);
        change(usual);
        result
    }

    /// From now on waits of this communicator on host memory ask `interrupt` once in 20 ms, on the thread that waits. An answer is a
    /// reason: the communicator is then aborted with it on all ranks, and the call fails with [`crate::Error::Aborted`].
    pub fn interrupt_by(&self, interrupt: Arc<dyn Fn() -> Option<String> + Send + Sync>) {
        self.engine().interrupt_by(interrupt);
    }
}
