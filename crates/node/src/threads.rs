//! The ranks of one process: what the node plane is for processes, for threads. Memory is handed over as the mapping
//! itself, so all threads share one.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use unisono_sync::Deadline;

use crate::error::{Error, Result};
use crate::memory::SharedMemory;

/// Where threads of one world hand memory to each other.
#[derive(Debug, Default)]
pub struct ThreadHub {
    offered: Mutex<HashMap<u64, Offer>>,
    changed: Condvar,
}

/// Memory, or why there is none, and how many ranks have still to take it.
#[derive(Debug)]
struct Offer {
    memory: Result<Arc<SharedMemory>>,
    takers: usize,
}

impl ThreadHub {
    /// Offers `memory`, or the reason why there is none, under `tag` to `takers` other ranks.
    pub fn offer(&self, tag: u64, memory: Result<Arc<SharedMemory>>, takers: usize) {
        if takers > 0 {
            self.offered.lock().unwrap_or_else(PoisonError::into_inner).insert(tag, Offer { memory, takers });
            self.changed.notify_all();
        }
    }

    /// Takes the memory offered under `tag` by rank `from`, waiting for it; `is_aborted` ends the wait.
    pub fn take(
        &self,
        tag: u64,
        from: usize,
        deadline: Deadline,
        is_aborted: &dyn Fn() -> bool,
    ) -> Result<Arc<SharedMemory>> {
        let start = std::time::Instant::now();
        let mut offered = self.offered.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(offer) = offered.get_mut(&tag) {
                let memory = offer.memory.clone();
                offer.takers -= 1;
                if offer.takers == 0 {
                    offered.remove(&tag);
                }
                return memory;
            }
            if is_aborted() {
                return Err(Error::Aborted);
            }
            if deadline.is_over() {
                return Err(Error::Timeout { rank: from, what: "its memory", waited: start.elapsed() });
            }
            let slice = deadline.remaining_up_to(Duration::from_millis(20));
            offered = self.changed.wait_timeout(offered, slice).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_takers_get_the_same_mapping_and_then_it_is_gone() {
        let hub = Arc::new(ThreadHub::default());
        let memory = Arc::new(SharedMemory::create(1).unwrap());
        let takers: Vec<_> = (0..2)
            .map(|_| {
                let hub = hub.clone();
                std::thread::spawn(move || {
                    hub.take(5, 0, Deadline::after(Duration::from_secs(10)), &|| false)
                })
            })
            .collect();
        hub.offer(5, Ok(memory.clone()), 2);
        for taker in takers {
            assert!(Arc::ptr_eq(&taker.join().unwrap().unwrap(), &memory));
        }
        let late = hub.take(5, 0, Deadline::after(Duration::ZERO), &|| false).unwrap_err();
        assert!(matches!(late, Error::Timeout { rank: 0, .. }));
        assert_eq!(hub.take(5, 0, Deadline::NEVER, &|| true).unwrap_err(), Error::Aborted);
    }
}
