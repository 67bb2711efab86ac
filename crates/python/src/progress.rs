//! A thread that takes operations in flight along while the program does something else, and says when they are over.
//!
//! It works for operations that `add_done_callback` gave it, and leaves the communicator to whoever calls it: it only ever tries for the lock. It looks
//! again at once after something went on, else after a pause that grows; a computation beside it is not to be slowed down by one that waits
//! for peers. While there is nothing to do it sleeps, and after a second it ends, so that nothing has to stop it.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use pyo3::prelude::*;

use crate::work::Work;

/// The first pause after nothing went on. A peer fills 512 KiB of staging in 30 to 60 µs.
const PAUSE: Duration = Duration::from_micros(20);
/// The longest.
const LONGEST_PAUSE: Duration = Duration::from_micros(160);
/// How long it sleeps with nothing to do before it ends.
const LINGER: Duration = Duration::from_secs(1);

/// What the thread of one communicator looks after.
#[derive(Default)]
pub(crate) struct Progress {
    waiting: Mutex<Waiting>,
    news: Condvar,
}

#[derive(Default)]
struct Waiting {
    is_running: bool,
    added: Vec<Entry>,
}

/// An operation, and what is called with it when it is over, if anything is.
struct Entry {
    work: Py<Work>,
    callback: Option<Py<PyAny>>,
}

impl Progress {
    /// Takes `work` along, and has `callback` called with it when it is over.
    pub(crate) fn add(self: &Arc<Self>, work: Py<Work>, callback: Option<Py<PyAny>>) {
        let mut waiting = self.waiting.lock();
        waiting.added.push(Entry { work, callback });
        if waiting.is_running {
            self.news.notify_one();
            return;
        }
        waiting.is_running = true;
        let this = self.clone();
        std::thread::spawn(move || this.run());
    }

    fn run(&self) {
        // Otherwise the kernel rounds sleeps up by 50 µs. If it refuses, they are that much longer.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        let mut entries: Vec<Entry> = Vec::new();
        let mut pause = PAUSE;
        loop {
            {
                let mut waiting = self.waiting.lock();
                if entries.is_empty() && waiting.added.is_empty() {
                    self.news.wait_for(&mut waiting, LINGER);
                    if waiting.added.is_empty() {
                        waiting.is_running = false;
                        return;
                    }
                }
                entries.append(&mut waiting.added);
            }
            let moved = entries.first().is_some_and(|entry| entry.work.get().advance());
            let over: Vec<Entry> = entries.extract_if(.., |entry| entry.work.get().is_over()).collect();
            pause = if moved || !over.is_empty() { PAUSE } else { LONGEST_PAUSE.min(pause * 2) };
            if over.is_empty() && !moved {
                std::thread::sleep(pause);
            }
            // The interpreter is asked for only where somebody is told. What nobody hears of goes when Python next drops something.
            let (told, _gone): (Vec<_>, Vec<_>) =
                over.into_iter().partition(|entry| entry.callback.is_some());
            if !told.is_empty()
                && Python::try_attach(|py| told.into_iter().for_each(|entry| entry.tell(py))).is_none()
            {
                // The interpreter has ended, and takes what is left with it.
                std::mem::forget(entries);
                return;
            }
        }
    }
}

impl Entry {
    fn tell(self, py: Python<'_>) {
        if let Some(callback) = &self.callback
            && let Err(error) = callback.call1(py, (&self.work,))
        {
            error.write_unraisable(py, Some(callback.bind(py)));
        }
    }
}
