//! Messages of peers until somebody asks for them: in order for each sender and tag. The node plane has one for its
//! process, the hub of threads one for each rank.

use std::collections::{HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use unisono_sync::Deadline;

use crate::error::{Error, Lost, Result};

/// Messages of one peer that nobody received yet; more than this no rank sends.
pub(crate) const MAX_UNREAD: usize = 4096;
/// The longest single sleep: how late an abort is noticed.
const MAX_SLEEP: Duration = Duration::from_millis(20);

/// What a message is about.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Tag {
    /// The group of ranks that it belongs to: no two groups in which one rank is have the same number.
    pub group: u64,
    /// The generation of that group.
    pub generation: u32,
    /// Which of the group's messages.
    pub item: u32,
}

impl Tag {
    /// Bytes of a tag in front of a message.
    pub(crate) const BYTES: usize = 16;

    pub(crate) fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.group.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.generation.to_le_bytes());
        bytes[12..].copy_from_slice(&self.item.to_le_bytes());
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let half = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Self { group: u64::from(half(0)) | u64::from(half(4)) << 32, generation: half(8), item: half(12) }
    }
}

/// Messages of type `M` by sender and tag, and which peers are lost.
#[derive(Debug)]
pub struct Mailbox<M> {
    state: Mutex<State<M>>,
    arrived: Condvar,
}

#[derive(Debug)]
struct State<M> {
    messages: HashMap<(usize, Tag), VecDeque<M>>,
    unread: HashMap<usize, usize>,
    /// The oldest generation of a group whose messages are still kept.
    closed: HashMap<u64, u32>,
    /// Lost peers, with their process.
    lost: HashMap<usize, (u32, Lost)>,
}

impl<M> Default for Mailbox<M> {
    fn default() -> Self {
        let state = State {
            messages: HashMap::new(),
            unread: HashMap::new(),
            closed: HashMap::new(),
            lost: HashMap::new(),
        };
        Self { state: Mutex::new(state), arrived: Condvar::new() }
    }
}

impl<M> Mailbox<M> {
    /// Keeps a message of `from`; false if it has too many there already. One that nobody will ask for is dropped.
    pub(crate) fn put(&self, from: usize, tag: Tag, message: M) -> bool {
        let mut state = self.state();
        if state.closed.get(&tag.group).is_some_and(|oldest| tag.generation < *oldest) {
            return true;
        }
        let unread = state.unread.entry(from).or_default();
        if *unread >= MAX_UNREAD {
            return false;
        }
        *unread += 1;
        state.messages.entry((from, tag)).or_default().push_back(message);
        drop(state);
        self.arrived.notify_all();
        true
    }

    /// Notes that a peer is lost; true if that is new.
    pub(crate) fn lose(&self, rank: usize, pid: u32, lost: Lost) -> bool {
        let is_new = {
            let mut state = self.state();
            let is_new = !state.lost.contains_key(&rank);
            state.lost.entry(rank).or_insert((pid, lost));
            is_new
        };
        self.arrived.notify_all();
        is_new
    }

    /// Messages that are kept, and how many the counts say.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn counts(&self) -> (usize, usize) {
        let state = self.state();
        (state.messages.values().map(VecDeque::len).sum(), state.unread.values().sum())
    }

    /// How `rank` was lost, if it was.
    pub fn lost(&self, rank: usize) -> Option<Lost> {
        self.state().lost.get(&rank).map(|(_, lost)| *lost)
    }

    /// All lost peers.
    pub(crate) fn all_lost(&self) -> Vec<(usize, u32, Lost)> {
        self.state().lost.iter().map(|(rank, (pid, lost))| (*rank, *pid, *lost)).collect()
    }

    /// The next message of `from` under `tag`, waiting for it. `is_aborted` ends the wait; `what` is for the error.
    pub fn receive(
        &self,
        from: usize,
        tag: Tag,
        what: &'static str,
        deadline: Deadline,
        is_aborted: &dyn Fn() -> bool,
    ) -> Result<M> {
        let start = Instant::now();
        let mut state = self.state();
        loop {
            if let Some(message) = state.take(from, tag) {
                return Ok(message);
            }
            if let Some((pid, lost)) = state.lost.get(&from) {
                return Err(Error::PeerLost { rank: from, pid: *pid, lost: *lost });
            }
            if is_aborted() {
                return Err(Error::Aborted);
            }
            if deadline.is_over() {
                return Err(Error::Timeout { rank: from, what, waited: start.elapsed() });
            }
            state = self.sleep(state, deadline.remaining_up_to(MAX_SLEEP));
        }
    }

    /// A message of any of `from` under `tag`, if there is one, or something happens within `wait` and then there is.
    pub fn receive_any(&self, from: &[usize], tag: Tag, wait: Duration) -> Option<(usize, M)> {
        let take = |state: &mut State<M>| {
            from.iter().find_map(|rank| state.take(*rank, tag).map(|message| (*rank, message)))
        };
        let mut state = self.state();
        take(&mut state).or_else(|| take(&mut self.sleep(state, wait)))
    }

    /// Drops what is there and what will come for generations of `group` up to `generation`.
    pub fn close(&self, group: u64, generation: u32) {
        let mut state = self.state();
        let State { messages, unread, closed, .. } = &mut *state;
        closed.insert(group, generation.saturating_add(1));
        messages.retain(|(from, tag), queue| {
            let stays = tag.group != group || tag.generation > generation;
            if !stays && let Some(unread) = unread.get_mut(from) {
                *unread -= queue.len();
            }
            stays
        });
    }

    fn sleep<'a>(&'a self, state: MutexGuard<'a, State<M>>, time: Duration) -> MutexGuard<'a, State<M>> {
        self.arrived.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0
    }

    fn state(&self) -> MutexGuard<'_, State<M>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M> State<M> {
    fn take(&mut self, from: usize, tag: Tag) -> Option<M> {
        let queue = self.messages.get_mut(&(from, tag))?;
        let message = queue.pop_front();
        if queue.is_empty() {
            self.messages.remove(&(from, tag));
        }
        if message.is_some() {
            *self.unread.entry(from).or_default() -= 1;
        }
        message
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tag(generation: u32) -> Tag {
        Tag { group: 3 << 32 | 9, generation, item: 7 }
    }

    #[test]
    fn tags_survive_the_wire() {
        let tag = Tag { group: 0x0102_0304_0506_0708, generation: 0x090a_0b0c, item: 0x0d0e_0f10 };
        assert_eq!(Tag::from_bytes(&tag.to_bytes()), tag);
    }

    #[test]
    fn messages_come_in_order_and_a_closed_generation_takes_none() {
        let mailbox = Mailbox::default();
        assert!(mailbox.put(1, tag(0), "a") && mailbox.put(1, tag(0), "b") && mailbox.put(2, tag(1), "c"));
        let receive =
            |from, generation| mailbox.receive_any(&[from], tag(generation), Duration::ZERO).map(|(_, m)| m);
        assert_eq!((receive(1, 0), receive(2, 0)), (Some("a"), None));
        mailbox.close(tag(0).group, 0);
        assert!(mailbox.put(1, tag(0), "late"));
        assert_eq!((receive(1, 0), receive(2, 1)), (None, Some("c")));
    }

    #[test]
    fn one_peer_cannot_fill_the_memory_and_closing_makes_room() {
        let mailbox = Mailbox::default();
        assert!((0..MAX_UNREAD).all(|_| mailbox.put(1, tag(0), ())));
        assert!(!mailbox.put(1, tag(1), ()) && mailbox.put(2, tag(1), ()));
        mailbox.close(tag(0).group, 0);
        assert!(mailbox.put(1, tag(1), ()));
    }
}
