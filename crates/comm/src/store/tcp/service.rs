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
mod tests {
    use super::*;

    fn service() -> Service {
        Service::new("tcp://test".into(), Limits::default(), 4096)
    }

    fn ask(service: &mut Service, connection: usize, number: u64, request: Request<'_>) -> Option<String> {
        let body = encode_body(&(number, request)).unwrap();
        service.request(connection, &body).unwrap().map(|body| shown(&body))
    }

    fn shown(body: &[u8]) -> String {
        let (number, reply) = decode_body::<(u64, Reply<'_>)>(body).unwrap();
        format!("{number}: {reply:?}")
    }

    fn ready(service: &mut Service) -> Vec<(usize, String)> {
        std::iter::from_fn(|| service.next_ready())
            .map(|(connection, body)| (connection, shown(&body)))
            .collect()
    }

    fn set(service: &mut Service, key: &str) {
        assert_eq!(ask(service, 9, 0, Request::Set { key, value: Bytes(b"v") }).unwrap(), "0: Done");
    }

    fn is_empty(service: &Service) -> bool {
        service.waiters.is_empty()
            && service.parked.is_empty()
            && service.of_connection.is_empty()
            && service.waiting_bytes == 0
    }

    #[test]
    fn waiting_requests_are_released_in_order_once_all_their_keys_are_there() {
        let mut service = service();
        assert_eq!(ask(&mut service, 1, 5, Request::Wait { keys: vec!["a", "b"] }), None);
        assert_eq!(ask(&mut service, 2, 6, Request::Values { keys: vec!["b", "a"] }), None);
        set(&mut service, "b");
        assert_eq!(ready(&mut service), []);
        set(&mut service, "a");
        let expected = [(1, "5: Done".into()), (2, "6: Values([Bytes([118]), Bytes([118])])".into())];
        assert_eq!(ready(&mut service), expected);
        assert!(is_empty(&service), "{service:?}");
    }

    #[test]
    fn a_key_deleted_before_the_reply_is_waited_for_again() {
        let mut service = service();
        ask(&mut service, 1, 5, Request::Values { keys: vec!["a", "b"] });
        set(&mut service, "a");
        ask(&mut service, 9, 1, Request::Delete { key: "a" });
        set(&mut service, "b");
        assert_eq!(ready(&mut service), []);
        set(&mut service, "a");
        // Ready now, but deleted before the reply is built.
        ask(&mut service, 9, 1, Request::Delete { key: "b" });
        assert_eq!(ready(&mut service), []);
        set(&mut service, "b");
        assert_eq!(ready(&mut service).len(), 1);
        assert!(is_empty(&service), "{service:?}");
    }

    #[test]
    fn a_cancelled_request_names_the_missing_key_and_leaves_nothing() {
        let mut service = service();
        set(&mut service, "a");
        ask(&mut service, 1, 5, Request::Wait { keys: vec!["a", "b"] });
        assert_eq!(ask(&mut service, 2, 5, Request::Cancel), None, "numbers belong to a connection");
        assert_eq!(ask(&mut service, 1, 5, Request::Cancel).unwrap(), "5: Cancelled { missing: \"b\" }");
        assert_eq!(ask(&mut service, 1, 5, Request::Cancel), None);
        set(&mut service, "b");
        assert_eq!(ready(&mut service), []);
        assert!(is_empty(&service), "{service:?}");
    }

    #[test]
    fn a_request_whose_reply_is_queued_is_not_cancelled() {
        let mut service = service();
        set(&mut service, "a");
        ask(&mut service, 1, 5, Request::Values { keys: vec!["a"] });
        assert_eq!(ask(&mut service, 1, 5, Request::Cancel), None);
        assert_eq!(ready(&mut service).len(), 1);
    }

    #[test]
    fn a_connection_that_is_gone_leaves_nothing() {
        let mut service = service();
        for number in 0..5 {
            ask(&mut service, 1, number, Request::Wait { keys: vec!["a"] });
        }
        service.forget(1);
        assert!(is_empty(&service), "{service:?}");
        set(&mut service, "a");
        assert_eq!(ready(&mut service), []);
    }

    #[test]
    fn waiting_requests_have_a_budget_and_numbers_are_used_once() {
        let mut service = service();
        let mut refused = None;
        for number in 0..100 {
            refused = refused.or(ask(&mut service, 1, number, Request::Wait { keys: vec!["key"] }));
        }
        assert!(refused.unwrap().contains("size of all waiting requests"));
        assert!(service.waiting_bytes <= 4096);
        assert!(ask(&mut service, 1, 0, Request::Wait { keys: vec![] }).unwrap().contains("already waits"));
    }

    #[test]
    fn refusals_come_back_as_the_same_errors() {
        let mut service = service();
        assert_eq!(ask(&mut service, 1, 1, Request::Delete { key: "" }).unwrap(), "1: Refused(EmptyKey)");
        let long = "k".repeat(crate::store::MAX_KEY_BYTES + 1);
        let body = encode_body(&(1u64, Request::Check { keys: vec![&long] })).unwrap();
        let body = service.request(1, &body).unwrap().unwrap();
        let (_, Reply::Refused(refusal)) = decode_body::<(u64, Reply<'_>)>(&body).unwrap() else {
            panic!("it was refused")
        };
        let (got, cap) = (8193, 8192);
        let expected = Error::StoreLimit { store: "tcp://client".into(), what: "key length", got, cap };
        assert_eq!(refusal.into_error("tcp://client".into()), expected);
    }

    #[test]
    fn values_come_in_pieces_that_fit_into_a_reply() {
        let mut service = service();
        let half = vec![1; VALUES_BYTES / 2 + 1];
        for key in ["a", "b", "c"] {
            ask(&mut service, 1, 0, Request::Set { key, value: Bytes(&half) });
        }
        ask(&mut service, 1, 1, Request::Values { keys: vec!["a", "b", "c"] });
        let (_, body) = service.next_ready().unwrap();
        let (_, Reply::Values(values)) = decode_body::<(u64, Reply<'_>)>(&body).unwrap() else {
            panic!("values were asked for")
        };
        assert_eq!(values.len(), 2);
        assert!(body.len() <= super::super::protocol::MAX_BODY_BYTES);
    }

    #[test]
    fn any_bytes_are_a_request_or_an_error() {
        use proptest::prelude::*;
        proptest!(|(bytes in prop::collection::vec(any::<u8>(), 0..60))| {
            let mut service = service();
            let _ = service.request(1, &bytes);
            prop_assert!(service.waiting_bytes <= 4096);
            service.forget(1);
            prop_assert!(is_empty(&service));
        });
    }
}
