//! What a torch store server knows, without its sockets: the map, the queues, and who waits for what.
//!
//! A connection is a number here. A request writes its reply into a buffer at once, or its connection is put among
//! those that wait and appears in [`State::take_released`] when its wait is over. A waiter is listed at one missing
//! key at a time, so that the arrival of a key costs as much as there are waiters for just that key.

use std::collections::{HashMap, VecDeque};

use super::wire::{ALL_THERE, MAGIC, NOT_ALL_THERE, Request, WAIT_CANCELLED, WAIT_OVER};
use crate::error::Error;
use crate::store::table::{Limits, Table};

/// The longest reply; `MULTI_GET` and `LIST_KEYS` can ask for more.
const MAX_REPLY_BYTES: usize = 256 * 1024 * 1024;
/// The most entries of all queues together.
const MAX_QUEUED_ENTRIES: usize = 131_072;
/// The most bytes of all queues together.
const MAX_QUEUED_BYTES: usize = 1024 * 1024 * 1024;

/// The whole content of a server.
#[derive(Debug)]
pub(super) struct State {
    table: Table,
    queues: HashMap<String, VecDeque<Vec<u8>>>,
    queued_entries: usize,
    queued_bytes: usize,
    waits: HashMap<usize, Wait>,
    waiting_for_key: HashMap<String, Vec<usize>>,
    waiting_at_barrier: HashMap<String, Vec<usize>>,
    released: Vec<usize>,
}

#[derive(Debug)]
enum Wait {
    /// For all `keys`; listed at `keys[next]`.
    Keys {
        keys: Vec<String>,
        next: usize,
    },
    Barrier {
        key: String,
    },
}

impl State {
    pub(super) fn new(name: String) -> Self {
        Self {
            table: Table::new(Limits::default(), name),
            queues: HashMap::new(),
            queued_entries: 0,
            queued_bytes: 0,
            waits: HashMap::new(),
            waiting_for_key: HashMap::new(),
            waiting_at_barrier: HashMap::new(),
            released: Vec::new(),
        }
    }

    /// Serves one request of `connection`. The protocol has no error replies: an error says why the connection must
    /// be closed.
    pub(super) fn serve(
        &mut self,
        connection: usize,
        request: Request<'_>,
        reply: &mut Vec<u8>,
    ) -> Result<(), String> {
        let refused = |error: Error| error.to_string();
        match request {
            Request::Validate { magic: MAGIC } => {}
            Request::Validate { magic } => return Err(format!("magic {magic:#x}, expected {MAGIC:#x}")),
            Request::Ping { nonce } => reply.extend_from_slice(&nonce.to_le_bytes()),
            Request::Set { key, value } => {
                self.table.set(key, value).map_err(refused)?;
                self.appeared(key);
            }
            Request::MultiSet { entries } => {
                for (key, value) in entries {
                    self.table.set(key, value).map_err(refused)?;
                    self.appeared(key);
                }
            }
            Request::Append { key, value } => {
                self.table.append(key, value).map_err(refused)?;
                self.appeared(key);
            }
            Request::CompareSet { key, expected, desired } => {
                let value = self.table.compare_set(key, expected, desired).map_err(refused)?;
                put_value(reply, &value);
                self.appeared(key);
            }
            Request::Add { key, amount } => {
                put_i64(reply, self.table.add(key, amount).map_err(refused)?);
                self.appeared(key);
            }
            Request::Delete { key } => put_i64(reply, i64::from(self.table.delete(key))),
            Request::Get { key } => put_value(reply, self.table.value(key).unwrap_or_default()),
            Request::MultiGet { keys } => self.multi_get(&keys, reply)?,
            Request::NumKeys => put_i64(reply, count(self.table.len())),
            Request::ListKeys => self.list_keys(reply)?,
            Request::Check { keys } => {
                let there = keys.iter().all(|key| self.is_there(key));
                reply.push(if there { ALL_THERE } else { NOT_ALL_THERE });
            }
            Request::Wait { keys } => self.wait(connection, &keys, reply)?,
            Request::CancelWait => {
                self.forget(connection);
                reply.push(WAIT_CANCELLED);
            }
            Request::QueuePush { key, value } => self.queue_push(key, value)?,
            Request::QueuePop { key } => self.queue_pop(key, reply),
            Request::QueueLength { key } => {
                put_i64(reply, count(self.queues.get(key).map_or(0, VecDeque::len)));
            }
            Request::Barrier { key, world_size } => self.barrier(connection, key, world_size, reply)?,
        }
        Ok(())
    }

    /// Drops what `connection` waits for: it cancelled, or is gone.
    pub(super) fn forget(&mut self, connection: usize) {
        match self.waits.remove(&connection) {
            Some(Wait::Keys { keys, next }) => unlist(&mut self.waiting_for_key, &keys[next], connection),
            Some(Wait::Barrier { key }) => unlist(&mut self.waiting_at_barrier, &key, connection),
            None => {}
        }
    }

    /// The connections whose wait ended since the last call. Each must be sent [`WAIT_OVER`].
    pub(super) fn take_released(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.released)
    }

    /// A queue that is not empty counts as a key that is there, so that a client can wait before it pops.
    fn is_there(&self, key: &str) -> bool {
        self.table.value(key).is_some() || self.queues.contains_key(key)
    }

    fn multi_get(&self, keys: &[&str], reply: &mut Vec<u8>) -> Result<(), String> {
        let value = |key: &&str| self.table.value(key).unwrap_or_default();
        admit_reply(keys.iter().map(|key| 8 + value(key).len()).sum())?;
        keys.iter().for_each(|key| put_value(reply, value(key)));
        Ok(())
    }

    fn list_keys(&self, reply: &mut Vec<u8>) -> Result<(), String> {
        admit_reply(self.table.keys().map(|key| 8 + key.len()).sum())?;
        put_i64(reply, count(self.table.len()));
        self.table.keys().for_each(|key| put_value(reply, key.as_bytes()));
        Ok(())
    }

    fn wait(&mut self, connection: usize, keys: &[&str], reply: &mut Vec<u8>) -> Result<(), String> {
        if self.waits.contains_key(&connection) {
            return Err("a WAIT during a WAIT".to_owned());
        }
        match keys.iter().position(|key| !self.is_there(key)) {
            None => reply.push(WAIT_OVER),
            Some(next) => {
                self.waiting_for_key.entry(keys[next].to_owned()).or_default().push(connection);
                let keys = keys.iter().map(|key| (*key).to_owned()).collect();
                self.waits.insert(connection, Wait::Keys { keys, next });
            }
        }
        Ok(())
    }

    /// Looks after all who are listed at `key`, which is there now.
    fn appeared(&mut self, key: &str) {
        for connection in self.waiting_for_key.remove(key).unwrap_or_default() {
            self.advance(connection);
        }
    }

    /// Lists a waiter at its next missing key, or releases it.
    fn advance(&mut self, connection: usize) {
        let Some(Wait::Keys { keys, mut next }) = self.waits.remove(&connection) else {
            return;
        };
        let missing = |from: usize| (from..keys.len()).find(|index| !self.is_there(&keys[*index]));
        // Keys before `next` were there once; whether they still are is asked when the end is reached.
        match missing(next).or_else(|| missing(0)) {
            None => self.released.push(connection),
            Some(index) => {
                next = index;
                self.waiting_for_key.entry(keys[next].clone()).or_default().push(connection);
                self.waits.insert(connection, Wait::Keys { keys, next });
            }
        }
    }

    fn queue_push(&mut self, key: &str, value: &[u8]) -> Result<(), String> {
        if self.queued_entries == MAX_QUEUED_ENTRIES || self.queued_bytes + value.len() > MAX_QUEUED_BYTES {
            return Err(format!("the queues hold {} entries and are full", self.queued_entries));
        }
        self.queued_entries += 1;
        self.queued_bytes += value.len();
        self.queues.entry(key.to_owned()).or_default().push_back(value.to_vec());
        // One entry is one waiter's; the others wait on for the next.
        if let Some(waiters) = self.waiting_for_key.get_mut(key) {
            let connection = waiters.remove(0);
            if waiters.is_empty() {
                self.waiting_for_key.remove(key);
            }
            self.advance(connection);
        }
        Ok(())
    }

    /// The length before the pop, then the first entry if there was one.
    fn queue_pop(&mut self, key: &str, reply: &mut Vec<u8>) {
        let Some(queue) = self.queues.get_mut(key) else {
            return put_i64(reply, 0);
        };
        put_i64(reply, count(queue.len()));
        if let Some(value) = queue.pop_front() {
            self.queued_entries -= 1;
            self.queued_bytes -= value.len();
            put_value(reply, &value);
        }
        if queue.is_empty() {
            self.queues.remove(key);
        }
    }

    /// Counts under `key` how many came; the last of `world_size` releases all.
    fn barrier(
        &mut self,
        connection: usize,
        key: &str,
        world_size: i64,
        reply: &mut Vec<u8>,
    ) -> Result<(), String> {
        if self.waits.contains_key(&connection) {
            return Err("a BARRIER during a WAIT".to_owned());
        }
        let came = self.table.add(key, 1).map_err(|error| error.to_string())?;
        self.appeared(key);
        if came < world_size {
            self.waiting_at_barrier.entry(key.to_owned()).or_default().push(connection);
            self.waits.insert(connection, Wait::Barrier { key: key.to_owned() });
            return Ok(());
        }
        for waiter in self.waiting_at_barrier.remove(key).unwrap_or_default() {
            self.waits.remove(&waiter);
            self.released.push(waiter);
        }
        reply.push(WAIT_OVER);
        Ok(())
    }
}

fn unlist(lists: &mut HashMap<String, Vec<usize>>, key: &str, connection: usize) {
    if let Some(list) = lists.get_mut(key) {
        list.retain(|listed| *listed != connection);
        if list.is_empty() {
            lists.remove(key);
        }
    }
}

fn admit_reply(bytes: usize) -> Result<(), String> {
    if bytes > MAX_REPLY_BYTES {
        return Err(format!("a reply of {bytes} bytes was asked for, at most {MAX_REPLY_BYTES} are sent"));
    }
    Ok(())
}

fn put_i64(reply: &mut Vec<u8>, number: i64) {
    reply.extend_from_slice(&number.to_le_bytes());
}

fn put_value(reply: &mut Vec<u8>, value: &[u8]) {
    reply.extend_from_slice(&(value.len() as u64).to_le_bytes());
    reply.extend_from_slice(value);
}

/// Counts here are far below 2⁶³.
fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve(state: &mut State, connection: usize, request: Request<'_>) -> Vec<u8> {
        let mut reply = Vec::new();
        state.serve(connection, request, &mut reply).unwrap();
        reply
    }

    #[test]
    fn a_waiter_is_released_when_its_last_key_comes() {
        let mut state = State::new("test://".to_owned());
        assert_eq!(serve(&mut state, 1, Request::Wait { keys: vec!["a", "b", "c"] }), b"");
        for key in ["b", "a"] {
            serve(&mut state, 2, Request::Set { key, value: b"" });
            assert!(state.take_released().is_empty());
        }
        serve(&mut state, 2, Request::Add { key: "c", amount: 1 });
        assert_eq!(state.take_released(), [1]);
        assert!(state.waiting_for_key.is_empty() && state.waits.is_empty());
    }

    #[test]
    fn a_key_that_went_away_again_is_waited_for_again() {
        let mut state = State::new("test://".to_owned());
        serve(&mut state, 1, Request::Wait { keys: vec!["a", "b"] });
        serve(&mut state, 2, Request::Set { key: "a", value: b"" });
        serve(&mut state, 2, Request::Delete { key: "a" });
        serve(&mut state, 2, Request::Set { key: "b", value: b"" });
        assert!(state.take_released().is_empty());
        serve(&mut state, 2, Request::Set { key: "a", value: b"" });
        assert_eq!(state.take_released(), [1]);
    }

    #[test]
    fn who_cancelled_or_left_is_never_released() {
        let mut state = State::new("test://".to_owned());
        serve(&mut state, 1, Request::Wait { keys: vec!["a"] });
        serve(&mut state, 2, Request::Wait { keys: vec!["a"] });
        assert_eq!(serve(&mut state, 1, Request::CancelWait), [WAIT_CANCELLED]);
        state.forget(2);
        serve(&mut state, 3, Request::Set { key: "a", value: b"" });
        assert!(state.take_released().is_empty());
    }

    #[test]
    fn one_queue_entry_releases_one_waiter() {
        let mut state = State::new("test://".to_owned());
        serve(&mut state, 1, Request::Wait { keys: vec!["q"] });
        serve(&mut state, 2, Request::Wait { keys: vec!["q"] });
        serve(&mut state, 3, Request::QueuePush { key: "q", value: b"x" });
        assert_eq!(state.take_released(), [1]);
        let popped = [&1i64.to_le_bytes()[..], &1u64.to_le_bytes(), b"x"].concat();
        assert_eq!(serve(&mut state, 1, Request::QueuePop { key: "q" }), popped);
        assert_eq!(serve(&mut state, 1, Request::QueuePop { key: "q" }), 0i64.to_le_bytes());
        assert_eq!(serve(&mut state, 1, Request::QueueLength { key: "q" }), 0i64.to_le_bytes());
        serve(&mut state, 3, Request::QueuePush { key: "q", value: b"y" });
        assert_eq!(state.take_released(), [2]);
    }

    #[test]
    fn the_last_one_at_a_barrier_releases_the_others() {
        let mut state = State::new("test://".to_owned());
        for connection in [1, 2] {
            assert_eq!(serve(&mut state, connection, Request::Barrier { key: "b", world_size: 3 }), b"");
        }
        assert_eq!(serve(&mut state, 3, Request::Barrier { key: "b", world_size: 3 }), [WAIT_OVER]);
        assert_eq!(state.take_released(), [1, 2]);
    }

    #[test]
    fn what_cannot_be_answered_says_why_the_connection_is_closed() {
        let mut state = State::new("test://".to_owned());
        let mut reply = Vec::new();
        serve(&mut state, 1, Request::Set { key: "a", value: b"x" });
        assert!(
            state
                .serve(1, Request::Add { key: "a", amount: 1 }, &mut reply)
                .unwrap_err()
                .contains("added to")
        );
        let wrong = state.serve(1, Request::Validate { magic: 1 }, &mut reply).unwrap_err();
        assert_eq!(wrong, "magic 0x1, expected 0x3c85f7ce");
        assert!(reply.is_empty());
    }
}
