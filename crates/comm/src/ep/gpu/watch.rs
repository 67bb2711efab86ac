//! A look at what the kernels of a buffer report, whatever the operating thread does: the other ranks must know of it. Where ranks may be left
//! out, kernels are told which are lost.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use unisono_node::SharedMemory;
use unisono_sync::Word;

use super::report::{ABORT, REPORT, Report, SUSPECTS};
use crate::cause::Cause;
use crate::control::{Control, words_in};
use crate::neighbours::Neighbours;

const INTERVAL: Duration = Duration::from_millis(50);
/// Where kernels wait for word of a death.
const SOON: Duration = Duration::from_millis(5);

/// Ends when it is dropped.
#[derive(Debug)]
pub(super) struct Watch {
    has_ended: Arc<(Mutex<bool>, Condvar)>,
    control: Arc<Control>,
}

impl Watch {
    pub(super) fn start(
        control: &Arc<Control>,
        neighbours: Neighbours,
        page: Arc<SharedMemory>,
        is_masking: bool,
    ) -> Self {
        let has_ended = Arc::new((Mutex::new(false), Condvar::new()));
        let (watched, of_thread) = (has_ended.clone(), control.clone());
        let look = move || {
            let (ended, change) = &*watched;
            let mut is_over = ended.lock().unwrap_or_else(PoisonError::into_inner);
            while !*is_over {
                tell(&of_thread, &page);
                if is_masking {
                    suspect(&of_thread, &neighbours, &page);
                }
                let pause = if is_masking { SOON } else { INTERVAL };
                is_over = change.wait_timeout(is_over, pause).unwrap_or_else(PoisonError::into_inner).0;
            }
        };
        if let Err(error) = std::thread::Builder::new().name("unisono-ep".to_owned()).spawn(look) {
            tracing::warn!("nobody looks at an ep::Buffer between calls: {error}");
        }
        Self { has_ended, control: control.clone() }
    }
}

/// A failure that kernels found is that of all ranks.
fn tell(control: &Control, page: &SharedMemory) {
    let report = Report::read(words_in(page, REPORT));
    if let Some(cause) = report.and_then(|report| report.cause(control)) {
        control.fail(&cause);
    }
}

/// Tells kernels which ranks are lost. Deaths do not end their waits then; other failures do.
fn suspect(control: &Control, neighbours: &Neighbours, page: &SharedMemory) {
    let (me, ranks) = control.member();
    let is_lost = |rank: &usize| {
        *rank != me && (neighbours.lost(*rank).is_some() || control.fate(*rank).settled().is_some())
    };
    let lost = (0..ranks).filter(is_lost).fold(0u64, |lost, rank| lost | 1 << rank);
    let suspects = &words_in(page, SUSPECTS)[0];
    if lost & !suspects.load_relaxed() != 0 {
        suspects.store_relaxed(suspects.load_relaxed() | lost);
    }
    let is_failed = match control.cause() {
        None | Some(Cause::Dropped { .. }) => false,
        Some(Cause::Died { rank, .. }) => rank as usize == me,
        Some(_) => true,
    };
    if is_failed {
        words_in(page, ABORT)[0].store_relaxed(1);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // A forked child has no thread that would give the lock back.
        if self.control.check_process().is_err() {
            return;
        }
        let (ended, change) = &*self.has_ended;
        *ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
        change.notify_all();
    }
}
