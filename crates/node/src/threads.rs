//! The ranks of one process: what the node plane is for processes, for threads. Memory is handed over as the mapping
//! itself, so all threads share one.

use std::any::Any;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::mailbox::{Mailbox, Tag};

/// A message from another thread.
#[derive(Clone, Debug, Default)]
pub struct ThreadMessage {
    /// Its content.
    pub body: Vec<u8>,
    /// The memory that came with it, of whatever kind.
    pub memory: Option<Arc<dyn Any + Send + Sync>>,
}

/// Where the threads of one world send each other messages.
#[derive(Debug)]
pub struct ThreadHub {
    mailboxes: Vec<Mailbox<ThreadMessage>>,
}

impl ThreadHub {
    /// The hub of `ranks` threads.
    pub fn new(ranks: usize) -> Self {
        Self { mailboxes: (0..ranks).map(|_| Mailbox::default()).collect() }
    }

    /// Sends `message` of rank `from` to rank `to`.
    pub fn send(&self, from: usize, to: usize, tag: Tag, message: ThreadMessage) -> Result<()> {
        if self.mailbox(to).put(from, tag, message) {
            return Ok(());
        }
        Err(Error::Socket { action: "send", message: format!("rank {to} does not read") })
    }

    /// What was sent to `rank`.
    ///
    /// # Panics
    /// If there is no such rank.
    pub fn mailbox(&self, rank: usize) -> &Mailbox<ThreadMessage> {
        &self.mailboxes[rank]
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use unisono_sync::Deadline;

    use super::*;
    use crate::memory::SharedMemory;

    #[test]
    fn threads_get_the_same_mapping_and_only_once() {
        let hub = Arc::new(ThreadHub::new(3));
        let tag = Tag { group: 0, generation: 0, item: 5 };
        let memory = Arc::new(SharedMemory::create(1).unwrap());
        let takers: Vec<_> = (1..3)
            .map(|rank| {
                let hub = hub.clone();
                let deadline = Deadline::after(Duration::from_secs(10));
                std::thread::spawn(move || hub.mailbox(rank).receive(0, tag, "memory", deadline, &|| false))
            })
            .collect();
        for to in 1..3 {
            let message = ThreadMessage { body: Vec::new(), memory: Some(memory.clone()) };
            hub.send(0, to, tag, message).unwrap();
        }
        for taker in takers {
            let taken = taker.join().unwrap().unwrap().memory.unwrap().downcast().unwrap();
            assert!(Arc::<SharedMemory>::ptr_eq(&taken, &memory));
        }
        let late = hub.mailbox(1).receive(0, tag, "x", Deadline::after(Duration::ZERO), &|| false);
        assert!(matches!(late.unwrap_err(), Error::Timeout { rank: 0, .. }));
        let aborted = hub.mailbox(1).receive(0, tag, "x", Deadline::NEVER, &|| true);
        assert_eq!(aborted.unwrap_err(), Error::Aborted);
    }
}
