//! What the server knows: the table, and the requests that wait for keys. No sockets, no clock.
//!
//! A waiting request is parked under one key that is missing; when that key appears it moves on to the next missing
//! one, so a `set` looks only at the requests it may release. Released requests queue up and their replies are built
//! one at a time, when the caller has room for them.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use unisono_core::wire::{Bytes, decode_body, encode_body};

use super::protocol::{Refusal, Reply, Request, VALUES_BYTES, WAITING_BYTES};
use crate::error::{Error, Result};
use crate::store::table::{Limits, Table};
use crate::store::{admit_key, admit_keys};

/// What a waiting request and each of its keys cost besides the bytes of the keys, about.
const WAITER_BYTES: usize = 256;
const WAITER_KEY_BYTES: usize = 32;

/// The table and who waits for what.
#[derive(Debug)]
pub(super) struct Service {
    name: String,
    table: Table,
    waiters: HashMap<u64, Waiter>,
    /// Missing key → the waiters parked under it, oldest first.
    parked: HashMap<String, BTreeSet<u64>>,
    /// Connection → its requests that wait: the client's number → ours.
    of_connection: HashMap<usize, BTreeMap<u64, u64>>,
    /// Waiters whose keys were all there when last looked at.
    ready: VecDeque<u64>,
    next_waiter: u64,
    waiting_bytes: usize,
    max_waiting_bytes: usize,
}

#[derive(Debug)]
struct Waiter {
    connection: usize,
    request: u64,
    keys: Vec<String>,
    /// The key it is parked under, or looked at next.
    at: usize,
    wants_values: bool,
    bytes: usize,
}

impl Service {
    /// An empty store. Waiting requests may take `max_waiting_bytes` in all.
    pub(super) fn new(name: String, limits: Limits, max_waiting_bytes: usize) -> Self {
        Self {
            table: Table::new(limits, name.clone()),
            name,
            waiters: HashMap::new(),
            parked: HashMap::new(),
            of_connection: HashMap::new(),
            ready: VecDeque::new(),
            next_waiter: 0,
            waiting_bytes: 0,
            max_waiting_bytes,
        }
    }

    /// Executes one request of `connection`; gives the body of the reply, if it can be answered now. Ask
    /// [`next_ready`](Self::next_ready) afterwards.
    ///
    /// # Errors
    /// Bytes that are no request; the connection should be closed.
    pub(super) fn request(&mut self, connection: usize, body: &[u8]) -> Result<Option<Vec<u8>>> {
        let (number, request) = decode_body::<(u64, Request<'_>)>(body)?;
        let result = match request {
            Request::Wait { keys } => self.wait(connection, number, &keys, false),
            Request::Values { keys } => self.wait(connection, number, &keys, true),
            Request::Cancel => return self.cancel(connection, number),
            Request::Check { keys } => {
                admit_keys(&self.name, &keys).map(|()| Some(Reply::Truth(self.table.has_all(&keys))))
            }
            Request::Count => Ok(Some(Reply::Count(self.table.len() as u64))),
            change => return self.change(number, change).map(Some),
        };
        match result {
            Ok(None) => Ok(None),
            Ok(Some(reply)) => Ok(Some(encode_body(&(number, reply))?)),
            Err(error) => Ok(Some(encode_body(&(number, Reply::Refused(Refusal::of(&error))))?)),
        }
    }

    /// The next reply to a request that waited: its connection and the body.
    pub(super) fn next_ready(&mut self) -> Option<(usize, Vec<u8>)> {
        while let Some(id) = self.ready.pop_front() {
            let Some(waiter) = self.waiters.get(&id) else { continue };
            let (connection, number) = (waiter.connection, waiter.request);
            let body = if !waiter.wants_values {
                encode_body(&(number, Reply::Done))
            } else if let Some(values) = values_that_fit(&self.table, &waiter.keys) {
                encode_body(&(number, Reply::Values(values)))
            } else {
                // A key was deleted since: wait on.
                self.advance(id);
                continue;
            };
            self.remove(id);
            match body {
                Ok(body) => return Some((connection, body)),
                Err(error) => tracing::error!(%error, "a reply of the store could not be encoded"),
            }
        }
        None
    }

    /// Drops what waits for a connection that is gone.
    pub(super) fn forget(&mut self, connection: usize) {
        for id in self.of_connection.remove(&connection).unwrap_or_default().into_values() {
            self.remove(id);
        }
    }

    /// A request that changes one key.
    fn change(&mut self, number: u64, request: Request<'_>) -> Result<Vec<u8>> {
        let mut old = Vec::new();
        let (key, result) = match request {
            Request::Set { key, value } => {
                (key, self.admit(key, |table| table.set(key, value.0)).map(|()| Reply::Done))
            }
            Request::Append { key, value } => {
                (key, self.admit(key, |table| table.append(key, value.0)).map(|()| Reply::Done))
            }
            Request::Add { key, amount } => {
                (key, self.admit(key, |table| table.add(key, amount)).map(Reply::Integer))
            }
            Request::CompareSet { key, expected, desired } => {
                let result = self.admit(key, |table| table.compare_set(key, expected.0, desired.0));
                (
                    key,
                    result.map(|value| {
                        old = value;
                        Reply::Value(Bytes(&old))
                    }),
                )
            }
            Request::Delete { key } => {
                (key, self.admit(key, |table| Ok(table.delete(key))).map(Reply::Truth))
            }
            other => {
                let error = Error::StoreProtocol { store: self.name.clone(), message: format!("{other:?}") };
                return Ok(encode_body(&(number, Reply::Refused(Refusal::of(&error))))?);
            }
        };
        let body = match &result {
            Ok(reply) => encode_body(&(number, reply))?,
            Err(error) => encode_body(&(number, Reply::Refused(Refusal::of(error))))?,
        };
        if self.table.value(key).is_some() {
            for id in self.parked.remove(key).unwrap_or_default() {
                self.advance(id);
            }
        }
        Ok(body)
    }

    fn admit<T>(&mut self, key: &str, change: impl FnOnce(&mut Table) -> Result<T>) -> Result<T> {
        admit_key(&self.name, key)?;
        change(&mut self.table)
    }

    fn wait(
        &mut self,
        connection: usize,
        request: u64,
        keys: &[&str],
        wants_values: bool,
    ) -> Result<Option<Reply<'static>>> {
        admit_keys(&self.name, keys)?;
        if self.of_connection.get(&connection).is_some_and(|requests| requests.contains_key(&request)) {
            let message = format!("request {request} of this connection already waits");
            return Err(Error::StoreProtocol { store: self.name.clone(), message });
        }
        let bytes = WAITER_BYTES + keys.iter().map(|key| key.len() + WAITER_KEY_BYTES).sum::<usize>();
        let total = self.waiting_bytes + bytes;
        if total > self.max_waiting_bytes {
            let (got, cap) = (total as u64, self.max_waiting_bytes as u64);
            return Err(Error::StoreLimit { store: self.name.clone(), what: WAITING_BYTES, got, cap });
        }
        self.waiting_bytes = total;
        let id = self.next_waiter;
        self.next_waiter += 1;
        let keys = keys.iter().map(|key| (*key).to_owned()).collect();
        self.waiters.insert(id, Waiter { connection, request, keys, at: 0, wants_values, bytes });
        self.of_connection.entry(connection).or_default().insert(request, id);
        self.advance(id);
        Ok(None)
    }

    /// Parks a waiter (parked nowhere now) under the next key that is missing, or makes it ready.
    fn advance(&mut self, id: u64) {
        let Some(waiter) = self.waiters.get_mut(&id) else { return };
        let missing = |key: &String| self.table.value(key).is_none();
        // First the keys not looked at yet; then all again, because one may have been deleted meanwhile.
        let ahead = waiter.keys[waiter.at..].iter().position(missing).map(|offset| waiter.at + offset);
        match ahead.or_else(|| waiter.keys.iter().position(missing)) {
            None => self.ready.push_back(id),
            Some(at) => {
                waiter.at = at;
                let key = &waiter.keys[at];
                match self.parked.get_mut(key) {
                    Some(parked) => {
                        parked.insert(id);
                    }
                    None => {
                        self.parked.insert(key.clone(), BTreeSet::from([id]));
                    }
                }
            }
        }
    }

    /// Answers a waiting request now; nothing if its reply is on its way or in the queue.
    fn cancel(&mut self, connection: usize, request: u64) -> Result<Option<Vec<u8>>> {
        let found = self.of_connection.get(&connection).and_then(|requests| requests.get(&request));
        let Some(&id) = found else { return Ok(None) };
        let Some(waiter) = self.waiters.get(&id) else { return Ok(None) };
        let Some(missing) = waiter.keys.iter().find(|key| self.table.value(key).is_none()) else {
            return Ok(None);
        };
        let body = encode_body(&(request, Reply::Cancelled { missing }))?;
        self.remove(id);
        Ok(Some(body))
    }

    /// Whether nothing is kept for any request that waited.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn has_no_waiters(&self) -> bool {
        self.waiters.is_empty()
            && self.parked.is_empty()
            && self.of_connection.is_empty()
            && self.waiting_bytes == 0
    }

    fn remove(&mut self, id: u64) {
        let Some(waiter) = self.waiters.remove(&id) else { return };
        self.waiting_bytes -= waiter.bytes;
        if let Some(key) = waiter.keys.get(waiter.at)
            && let Some(parked) = self.parked.get_mut(key)
        {
            parked.remove(&id);
            if parked.is_empty() {
                self.parked.remove(key);
            }
        }
        if let Some(requests) = self.of_connection.get_mut(&waiter.connection) {
            requests.remove(&waiter.request);
            if requests.is_empty() {
                self.of_connection.remove(&waiter.connection);
            }
        }
    }
}

/// The values of the first of `keys`, as many as one reply takes; `None` if any key is missing.
fn values_that_fit<'a>(table: &'a Table, keys: &[String]) -> Option<Vec<Bytes<'a>>> {
    let (mut values, mut bytes) = (Vec::new(), 0);
    for key in keys {
        let value = table.value(key)?;
        if bytes < VALUES_BYTES {
            bytes += value.len() + size_of::<u64>();
            values.push(Bytes(value));
        }
    }
    Some(values)
}

#[cfg(test)]
mod tests;
