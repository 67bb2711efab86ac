//! The other ranks of a communicator on this host, as threads or processes: how messages and memory reach them beside
//! the shared memory, and who of them is lost.
//!
//! All communicators of a process that come from one another share the same connections. Each has a number of its own,
//! which no other communicator has that shares a rank with it, and so have its messages.

#[cfg(feature = "cuda")]
use std::any::Any;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use unisono_node::plane::Message;
use unisono_node::{Lost, NodePlane, PlaneEvents, SharedMemory, Tag, ThreadHub, ThreadMessage, WatchId};
use unisono_sync::{Counter, Deadline};

use crate::error::{Error, Result};

/// How the ranks of this host reach each other.
#[derive(Clone, Debug)]
pub(crate) enum Host {
    /// Threads of one process.
    Threads(Arc<ThreadHub>),
    /// Processes.
    Processes(Arc<NodePlane>),
}

/// The ranks of one communicator.
#[derive(Clone, Debug)]
pub(crate) struct Neighbours {
    host: Host,
    /// The rank in the world of each rank here.
    ranks: Arc<[usize]>,
    me: usize,
    group: u64,
    generation: u32,
    /// Communicators that this rank has proposed a number for.
    groups: Arc<Counter>,
}

/// A message, and the memory that came with it.
#[derive(Debug)]
pub(crate) struct Letter {
    pub(crate) body: Vec<u8>,
    memory: Option<Enclosed>,
}

#[derive(Debug)]
enum Enclosed {
    Mapped(Arc<SharedMemory>),
    Descriptor(OwnedFd),
}

/// Memory on its way to another rank.
#[cfg(feature = "cuda")]
#[derive(Debug)]
pub(crate) enum Given {
    /// There is none to give.
    Nothing,
    /// The mapping itself, within a process.
    Here(Arc<dyn Any + Send + Sync>),
    /// What another process can map; at most [`unisono_node::socket::MAX_FDS`].
    Descriptors(Vec<OwnedFd>),
}

/// What another rank gave, and what it says of it.
#[cfg(feature = "cuda")]
#[derive(Debug)]
pub(crate) struct Parcel {
    pub(crate) body: Vec<u8>,
    pub(crate) given: Given,
}

/// Ends a watch when it is dropped.
#[derive(Debug)]
pub(crate) struct Watch {
    plane: Arc<NodePlane>,
    id: WatchId,
}

impl Neighbours {
    /// All ranks of a world that was just made, seen by rank `me`.
    pub(crate) fn world(host: Host, me: usize, world_size: usize, generation: u32) -> Self {
        let ranks = (0..world_size).collect();
        Self { host, ranks, me, group: 0, generation, groups: Arc::new(Counter::new(1)) }
    }

    /// A number for a communicator whose rank 0 we become.
    pub(crate) fn new_group(&self) -> u64 {
        (self.ranks[self.me] as u64) << 32 | (self.groups.add(1) & 0xffff_ffff)
    }

    /// Some of these ranks, us included, as communicator `group`: `members[r]` becomes rank r.
    pub(crate) fn subset(&self, members: &[usize], group: u64) -> Self {
        self.some(members, group, self.generation)
    }

    /// The next generation of this communicator, of `members`.
    pub(crate) fn next_generation(&self, members: &[usize]) -> Self {
        self.some(members, self.group, self.generation + 1)
    }

    fn some(&self, members: &[usize], group: u64, generation: u32) -> Self {
        let me = members.iter().position(|member| *member == self.me);
        let me = me.expect("only members make a communicator of some ranks");
        let ranks = members.iter().map(|member| self.ranks[*member]).collect();
        Self { host: self.host.clone(), ranks, me, group, generation, groups: self.groups.clone() }
    }

    /// Our rank here.
    pub(crate) const fn me(&self) -> usize {
        self.me
    }

    /// The number of ranks here.
    pub(crate) fn world_size(&self) -> usize {
        self.ranks.len()
    }

    /// How often this communicator was shrunk, counted from the start of the job.
    pub(crate) const fn generation(&self) -> u32 {
        self.generation
    }

    /// From now on, `events` hears of losses among these ranks, and keeps their heartbeats.
    pub(crate) fn watch(&self, events: Arc<dyn PlaneEvents>) -> Option<Watch> {
        match &self.host {
            Host::Threads(_) => None,
            Host::Processes(plane) => {
                Some(Watch { plane: plane.clone(), id: plane.watch(self.ranks.clone(), events) })
            }
        }
    }

    /// How the process of `rank` was lost, if it was. Threads are not lost without their process.
    pub(crate) fn lost(&self, rank: usize) -> Option<Lost> {
        match &self.host {
            Host::Threads(_) => None,
            Host::Processes(plane) => plane.mailbox().lost(self.ranks[rank]),
        }
    }

    /// Sends a message about `item`.
    pub(crate) fn send(
        &self,
        to: usize,
        item: u32,
        body: &[u8],
        memory: Option<&Arc<SharedMemory>>,
        deadline: Deadline,
    ) -> Result<()> {
        let (to, tag) = (self.ranks[to], self.tag(item));
        match &self.host {
            Host::Threads(hub) => {
                let message =
                    ThreadMessage { body: body.to_vec(), memory: memory.cloned().map(|memory| memory as _) };
                hub.send(self.ranks[self.me], to, tag, message)?;
            }
            Host::Processes(plane) => match memory {
                Some(memory) => plane.send(to, tag, body, &[memory.as_fd()], deadline)?,
                None => plane.send(to, tag, body, &[], deadline)?,
            },
        }
        Ok(())
    }

    /// The next message of anybody about `item`, if one comes within `wait`. Returns early when something else happens.
    pub(crate) fn receive_any(&self, item: u32, wait: Duration) -> Option<(usize, Letter)> {
        let tag = self.tag(item);
        let (from, letter) = match &self.host {
            Host::Threads(hub) => {
                let mailbox = hub.mailbox(self.ranks[self.me]);
                mailbox.receive_any(&self.ranks, tag, wait).map(|(from, message)| (from, message.into()))?
            }
            Host::Processes(plane) => {
                let mailbox = plane.mailbox();
                mailbox.receive_any(&self.ranks, tag, wait).map(|(from, message)| (from, message.into()))?
            }
        };
        let from = self.ranks.iter().position(|rank| *rank == from)?;
        Some((from, letter))
    }

    /// Drops all messages of this generation and earlier ones, those included that are still to come.
    pub(crate) fn close(&self) {
        match &self.host {
            Host::Threads(hub) => hub.mailbox(self.ranks[self.me]).close(self.group, self.generation),
            Host::Processes(plane) => plane.mailbox().close(self.group, self.generation),
        }
    }

    /// Gives every rank the same `bytes` of zeros, allocated by rank 0. Collective; `item` names the memory.
    ///
    /// If rank 0 cannot allocate, every rank gets its error.
    pub(crate) fn share(
        &self,
        item: u32,
        bytes: usize,
        deadline: Deadline,
        is_aborted: &dyn Fn() -> bool,
    ) -> Result<Arc<SharedMemory>> {
        if self.me == 0 {
            let memory = SharedMemory::create(bytes).map(Arc::new);
            let problem = memory.as_ref().err().map_or_else(String::new, ToString::to_string);
            for to in 1..self.world_size() {
                self.send(to, item, problem.as_bytes(), memory.as_ref().ok(), deadline)?;
            }
            return Ok(memory?);
        }
        let (from, tag, what) = (self.ranks[0], self.tag(item), "its shared memory");
        let letter: Letter = match &self.host {
            Host::Threads(hub) => {
                let mailbox = hub.mailbox(self.ranks[self.me]);
                mailbox.receive(from, tag, what, deadline, is_aborted)?.into()
            }
            Host::Processes(plane) => plane.mailbox().receive(from, tag, what, deadline, is_aborted)?.into(),
        };
        letter.map(bytes)
    }

    /// Whether the ranks are threads of one process.
    #[cfg(feature = "cuda")]
    pub(crate) const fn is_one_process(&self) -> bool {
        matches!(self.host, Host::Threads(_))
    }

    /// Gives every rank what every other has: ours goes to all with `body`, and theirs come back by rank; nothing in our own
    /// place. Between processes it is a descriptor, between threads the thing itself. Collective; `item` names what it is of.
    #[cfg(feature = "cuda")]
    pub(crate) fn exchange(
        &self,
        item: u32,
        body: &[u8],
        ours: &Given,
        deadline: Deadline,
        is_aborted: &dyn Fn() -> bool,
    ) -> Result<Vec<Option<Parcel>>> {
        let (tag, what, mine) = (self.tag(item), "its memory", self.ranks[self.me]);
        let others = || self.ranks.iter().filter(|rank| **rank != mine);
        for to in others() {
            match (&self.host, ours) {
                (Host::Threads(hub), Given::Here(memory)) => {
                    let message = ThreadMessage { body: body.to_vec(), memory: Some(memory.clone()) };
                    hub.send(mine, *to, tag, message)?;
                }
                (Host::Threads(hub), _) => {
                    hub.send(mine, *to, tag, ThreadMessage { body: body.to_vec(), memory: None })?;
                }
                (Host::Processes(plane), Given::Descriptors(descriptors)) => {
                    let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
                    plane.send(*to, tag, body, &descriptors, deadline)?;
                }
                (Host::Processes(plane), _) => plane.send(*to, tag, body, &[], deadline)?,
            }
        }
        let receive = |from: &usize| {
            if *from == mine {
                return Ok(None);
            }
            Ok(Some(match &self.host {
                Host::Threads(hub) => {
                    let message = hub.mailbox(mine).receive(*from, tag, what, deadline, is_aborted)?;
                    Parcel { body: message.body, given: message.memory.map_or(Given::Nothing, Given::Here) }
                }
                Host::Processes(plane) => {
                    let message = plane.mailbox().receive(*from, tag, what, deadline, is_aborted)?;
                    let is_empty = message.fds.is_empty();
                    let given = if is_empty { Given::Nothing } else { Given::Descriptors(message.fds) };
                    Parcel { body: message.body, given }
                }
            }))
        };
        self.ranks.iter().map(receive).collect()
    }

    const fn tag(&self, item: u32) -> Tag {
        Tag { group: self.group, generation: self.generation, item }
    }
}

impl Letter {
    /// The memory that came with it, which must have `bytes`; without any, the reason that its sender gives.
    pub(crate) fn map(self, bytes: usize) -> Result<Arc<SharedMemory>> {
        match self.memory {
            Some(Enclosed::Mapped(memory)) => Ok(memory),
            Some(Enclosed::Descriptor(fd)) => Ok(Arc::new(SharedMemory::from_fd(fd, bytes)?)),
            None => Err(Error::Node(unisono_node::Error::Memory {
                bytes,
                action: "rank 0",
                message: String::from_utf8_lossy(&self.body).into_owned(),
            })),
        }
    }
}

impl From<ThreadMessage> for Letter {
    fn from(message: ThreadMessage) -> Self {
        let memory = message.memory.and_then(|memory| memory.downcast().ok());
        Self { body: message.body, memory: memory.map(Enclosed::Mapped) }
    }
}

impl From<Message> for Letter {
    fn from(message: Message) -> Self {
        Self { body: message.body, memory: message.fds.into_iter().next().map(Enclosed::Descriptor) }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.plane.unwatch(self.id);
    }
}
