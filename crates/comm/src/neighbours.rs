//! The other ranks of this host, as threads or processes: how memory is handed from one to all.

use std::os::fd::AsFd;
use std::sync::Arc;

use unisono_node::{NodePlane, SharedMemory, ThreadHub};
use unisono_sync::Deadline;

use crate::error::{Error, Result};

/// How this rank reaches the others of its host.
#[derive(Debug)]
pub(crate) enum Neighbours {
    /// Threads of one process.
    Threads(Arc<ThreadHub>),
    /// Processes.
    Processes(NodePlane),
}

impl Neighbours {
    /// Gives every rank the same `bytes` of zeros, allocated by rank 0. Collective; `tag` names the memory.
    ///
    /// If rank 0 cannot allocate, every rank gets its error.
    pub(crate) fn share(
        &self,
        (rank, world_size): (usize, usize),
        tag: u64,
        bytes: usize,
        deadline: Deadline,
        is_aborted: &dyn Fn() -> bool,
    ) -> Result<Arc<SharedMemory>> {
        if rank == 0 {
            let memory = SharedMemory::create(bytes).map(Arc::new);
            self.offer(world_size, tag, &memory, deadline)?;
            return Ok(memory?);
        }
        match self {
            Self::Threads(hub) => Ok(hub.take(tag, 0, deadline, is_aborted)?),
            Self::Processes(plane) => {
                let message = plane.receive(0, tag, "its shared memory", deadline, is_aborted)?;
                match message.fds.into_iter().next() {
                    Some(fd) => Ok(Arc::new(SharedMemory::from_fd(fd, bytes)?)),
                    None => Err(Error::Node(unisono_node::Error::Memory {
                        bytes,
                        action: "rank 0",
                        message: String::from_utf8_lossy(&message.body).into_owned(),
                    })),
                }
            }
        }
    }

    fn offer(
        &self,
        world_size: usize,
        tag: u64,
        memory: &unisono_node::Result<Arc<SharedMemory>>,
        deadline: Deadline,
    ) -> Result<()> {
        match (self, memory) {
            (Self::Threads(hub), memory) => hub.offer(tag, memory.clone(), world_size - 1),
            (Self::Processes(plane), Ok(memory)) => {
                for peer in 1..world_size {
                    plane.send(peer, tag, b"", &[memory.as_fd()], deadline)?;
                }
            }
            (Self::Processes(plane), Err(error)) => {
                for peer in 1..world_size {
                    plane.send(peer, tag, error.to_string().as_bytes(), &[], deadline)?;
                }
            }
        }
        Ok(())
    }
}
