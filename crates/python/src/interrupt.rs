//! Ctrl-C: how a wait of the library learns that Python has a signal to handle, and how the wait ends by what the handler raises.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use pyo3::prelude::*;

/// How often somebody who waits looks for signals.
pub(crate) const LOOK: Duration = Duration::from_millis(20);

thread_local! {
    /// What a handler raised while this thread was in a wait of the library.
    static RAISED: RefCell<Option<PyErr>> = const { RefCell::new(None) };
    /// Whether this thread is in a handler, called from within a wait.
    static IS_HANDLING: Cell<bool> = const { Cell::new(false) };
}

/// What a communicator asks while it waits.
pub(crate) fn hook() -> Arc<dyn Fn() -> Option<String> + Send + Sync> {
    Arc::new(|| {
        let raised = look().err()?;
        let reason = Python::attach(|py| raised.get_type(py).name().map(|name| name.to_string()));
        RAISED.set(Some(raised));
        let name = reason.unwrap_or_else(|_| "an exception".to_owned());
        Some(format!("a signal ended its wait with {name}"))
    })
}

/// What a handler raised during the last wait of this thread, if that ended so.
pub(crate) fn take() -> Option<PyErr> {
    RAISED.take()
}

/// Whether this thread is in a handler that was called from within a wait: then it must not wait for what it holds itself.
pub(crate) fn is_handling() -> bool {
    IS_HANDLING.get()
}

/// Lets Python handle signals that came meanwhile. Python does so on the main thread alone; elsewhere the interpreter is not even asked
/// for. Called without it.
///
/// # Errors
/// What the handler raised.
pub(crate) fn look() -> PyResult<()> {
    if rustix::thread::gettid() != rustix::process::getpid() {
        return Ok(());
    }
    Python::attach(|py| {
        IS_HANDLING.set(true);
        let handled = py.check_signals();
        IS_HANDLING.set(false);
        handled
    })
}

/// Does `work` on a thread of its own, and handles signals meanwhile. If a handler raises, the thread is left to itself: it ends by its
/// own deadlines, and what it gives is dropped.
///
/// # Errors
/// What a handler raised.
pub(crate) fn on_a_thread<R: Send + 'static>(
    py: Python<'_>,
    work: impl FnOnce() -> R + Send + 'static,
) -> PyResult<R> {
    let (sender, receiver) = mpsc::sync_channel(1);
    // Who was interrupted does not listen any more.
    std::thread::spawn(move || drop(sender.send(work())));
    py.detach(move || {
        loop {
            match receiver.recv_timeout(LOOK) {
                Ok(result) => return Ok(result),
                Err(mpsc::RecvTimeoutError::Timeout) => look()?,
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(pyo3::exceptions::PyRuntimeError::new_err(
                        "a thread of unisono ended without a result: this is a bug",
                    ));
                }
            }
        }
    })
}
