//! A client of the TCP store.
//!
//! Each call takes an idle connection, or makes one, and gives it back: threads never wait for each other, and as many
//! connections exist as calls were under way at once (a few are kept). A wait whose deadline passes is cancelled and
//! its answer awaited, so that a later reply is never taken for another's.

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use unisono_core::wire::{Bytes, decode_body, encode_body};
use unisono_core::{Secret, UniqueId};
use unisono_sync::Deadline;

use super::link::{Failure, Link, Patience};
use super::protocol::{Reply, Request, name};
use crate::error::{Error, Result};
use crate::store::{Store, admit_key, admit_keys, admit_value};

/// What a call may take beyond its deadline: one round trip to a server that answers at once.
const GRACE: Duration = Duration::from_millis(250);
/// Idle connections that are kept.
const MAX_IDLE: usize = 8;
/// The most keys, and about the most bytes of keys, of one request; longer lists take several.
const KEYS_PER_REQUEST: usize = 16 * 1024;
const KEY_BYTES_PER_REQUEST: usize = 4 * 1024 * 1024;

/// A client of a [`super::StoreServer`]. Share it between threads as you like: a long wait of one does not hold up the
/// others. After a `fork` the child makes connections of its own.
///
/// A call may end up to 250 ms after its deadline, if the server does not answer. `wait` and `check` of more than 16,384
/// keys look at them piece by piece.
#[derive(Debug)]
pub struct TcpStore {
    address: SocketAddr,
    secret: Secret,
    pool: Mutex<Pool>,
}

#[derive(Debug)]
struct Pool {
    /// The process that made the connections: a forked child must not use them.
    process: u32,
    idle: Vec<Link>,
}

/// What a call is, besides its request.
#[derive(Clone, Copy)]
struct Call<'a> {
    action: &'static str,
    /// For requests that wait: the first key.
    waits_for: Option<&'a str>,
}

impl TcpStore {
    /// Connects to the server at `address`, which may come up later than this but before the deadline.
    ///
    /// # Errors
    /// [`Error::Core`] with `Auth` or `Version` at once if the server has another secret or version, or is something
    /// else; [`Error::StoreIo`] if nobody was there before the deadline.
    pub fn connect(address: SocketAddr, secret: &Secret, deadline: Deadline) -> Result<Self> {
        let link = Link::connect(address, secret, deadline, Patience::UntilDeadline)?;
        let pool = Mutex::new(Pool { process: std::process::id(), idle: vec![link] });
        Ok(Self { address, secret: secret.clone(), pool })
    }

    /// Connects to the server of which the unique id tells.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub fn from_unique_id(id: &UniqueId, deadline: Deadline) -> Result<Self> {
        Self::connect(id.address(), id.secret(), deadline)
    }

    #[cfg(test)]
    pub(super) fn pretend_forked(&self) {
        self.pool.lock().unwrap().process = 0;
    }

    /// A connection that is idle and alive.
    fn idle(&self) -> Option<Link> {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        if pool.process != std::process::id() {
            // Closes our copies of the descriptors; the parent's connections stay.
            pool.idle.clear();
            pool.process = std::process::id();
        }
        std::iter::from_fn(|| pool.idle.pop()).find(Link::is_alive)
    }

    fn give_back(&self, link: Link) {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        if pool.idle.len() < MAX_IDLE {
            pool.idle.push(link);
        }
    }

    /// Sends the request on an idle connection; on a new one if there is none, or if that one breaks before it took all.
    fn send(&self, action: &'static str, request: &Request<'_>, deadline: Deadline) -> Result<(Link, u64)> {
        let try_send = |mut link: Link| -> Result<Result<(Link, u64), Failure>> {
            let number = link.next_number();
            let body = encode_body(&(number, request))?;
            Ok(link.send(&body, deadline).map(|()| (link, number)))
        };
        if let Some(link) = self.idle() {
            match try_send(link)? {
                Ok(sent) => return Ok(sent),
                Err(Failure::Late) => return Err(self.io(action, "it took too long to send")),
                Err(failure) => tracing::debug!(%failure, "an idle connection to the store was broken"),
            }
        }
        let link = Link::connect(self.address, &self.secret, deadline, Patience::None)?;
        try_send(link)?.map_err(|failure| self.failed(action, failure))
    }

    /// One request and its reply.
    fn call<T>(
        &self,
        call: Call<'_>,
        request: &Request<'_>,
        deadline: Deadline,
        read: impl FnOnce(Reply<'_>) -> Option<T>,
    ) -> Result<T> {
        let begin = Instant::now();
        let Call { action, waits_for } = call;
        let patient = at_least_grace(deadline);
        let (mut link, number) = self.send(action, request, patient)?;
        let timed_out = |key: &str| Error::StoreTimeout {
            store: self.describe(),
            key: key.to_owned(),
            waited: begin.elapsed(),
        };
        let first = link.receive(if waits_for.is_some() { deadline } else { patient });
        let (buffer, body) = match (first, waits_for) {
            (Ok(reply), _) => reply,
            (Err(Failure::Late), None) => {
                return Err(self.io(action, &format!("no answer within {:?}", begin.elapsed())));
            }
            (Err(Failure::Late), Some(key)) => {
                let cancel = encode_body(&(number, Request::Cancel))?;
                let grace = Deadline::after(GRACE);
                match link.send(&cancel, grace).and_then(|()| link.receive(grace)) {
                    Ok(reply) => reply,
                    Err(Failure::Late) => return Err(timed_out(key)),
                    Err(failure) => return Err(self.failed(action, failure)),
                }
            }
            (Err(failure), _) => return Err(self.failed(action, failure)),
        };
        let (answered, reply) = decode_body::<(u64, Reply<'_>)>(&buffer[body])?;
        if answered != number {
            return Err(self.protocol(format!("reply {answered} came for request {number}")));
        }
        let result = match reply {
            Reply::Cancelled { missing } => Err(timed_out(missing)),
            Reply::Refused(refusal) => Err(refusal.into_error(self.describe())),
            reply => match read(reply) {
                Some(value) => Ok(value),
                None => return Err(self.protocol(format!("the reply to {action} is one to something else"))),
            },
        };
        self.give_back(link);
        result
    }

    fn failed(&self, action: &'static str, failure: Failure) -> Error {
        match failure {
            Failure::Core(error) => error.into(),
            Failure::Kind(_) => self.protocol(failure.to_string()),
            Failure::Io(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                self.io(action, "the server closed the connection")
            }
            Failure::Late | Failure::Io(_) => self.io(action, &failure.to_string()),
        }
    }

    fn io(&self, action: &'static str, message: &str) -> Error {
        Error::StoreIo { store: self.describe(), action, message: message.to_owned() }
    }

    fn protocol(&self, message: String) -> Error {
        Error::StoreProtocol { store: self.describe(), message }
    }

    /// A call on one key that does not wait.
    fn change<T>(
        &self,
        action: &'static str,
        request: &Request<'_>,
        deadline: Deadline,
        read: impl FnOnce(Reply<'_>) -> Option<T>,
    ) -> Result<T> {
        self.call(Call { action, waits_for: None }, request, deadline, read)
    }
}

impl Store for TcpStore {
    fn set(&self, key: &str, value: &[u8], deadline: Deadline) -> Result<()> {
        admit_key(&self.describe(), key)?;
        admit_value(&self.describe(), value)?;
        self.change("set", &Request::Set { key, value: Bytes(value) }, deadline, done)
    }

    fn get(&self, key: &str, deadline: Deadline) -> Result<Vec<u8>> {
        admit_key(&self.describe(), key)?;
        let call = Call { action: "get", waits_for: Some(key) };
        self.call(call, &Request::Values { keys: vec![key] }, deadline, |reply| match reply {
            Reply::Values(values) if values.len() == 1 => Some(values[0].0.to_vec()),
            _ => None,
        })
    }

    fn wait(&self, keys: &[&str], deadline: Deadline) -> Result<()> {
        admit_keys(&self.describe(), keys)?;
        let mut rest = keys;
        while let Some(first) = rest.first() {
            let (piece, after) = rest.split_at(piece(rest));
            let call = Call { action: "wait", waits_for: Some(first) };
            self.call(call, &Request::Wait { keys: piece.to_vec() }, deadline, done)?;
            rest = after;
        }
        Ok(())
    }

    fn check(&self, keys: &[&str], deadline: Deadline) -> Result<bool> {
        admit_keys(&self.describe(), keys)?;
        let mut rest = keys;
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(piece(rest));
            if !self.change("check", &Request::Check { keys: piece.to_vec() }, deadline, truth)? {
                return Ok(false);
            }
            rest = after;
        }
        Ok(true)
    }

    fn add(&self, key: &str, amount: i64, deadline: Deadline) -> Result<i64> {
        admit_key(&self.describe(), key)?;
        self.change("add", &Request::Add { key, amount }, deadline, |reply| match reply {
            Reply::Integer(sum) => Some(sum),
            _ => None,
        })
    }

    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8], deadline: Deadline) -> Result<Vec<u8>> {
        admit_key(&self.describe(), key)?;
        admit_value(&self.describe(), expected)?;
        admit_value(&self.describe(), desired)?;
        let request = Request::CompareSet { key, expected: Bytes(expected), desired: Bytes(desired) };
        self.change("compare_set", &request, deadline, |reply| match reply {
            Reply::Value(value) => Some(value.0.to_vec()),
            _ => None,
        })
    }

    fn delete(&self, key: &str, deadline: Deadline) -> Result<bool> {
        admit_key(&self.describe(), key)?;
        self.change("delete", &Request::Delete { key }, deadline, truth)
    }

    fn multi_get(&self, keys: &[&str], deadline: Deadline) -> Result<Vec<Vec<u8>>> {
        admit_keys(&self.describe(), keys)?;
        let mut values = Vec::with_capacity(keys.len());
        while let Some(first) = keys.get(values.len()) {
            let rest = &keys[values.len()..];
            let piece = &rest[..piece(rest)];
            let call = Call { action: "multi_get", waits_for: Some(first) };
            let request = Request::Values { keys: piece.to_vec() };
            let some = self.call(call, &request, deadline, |reply| match reply {
                // At least one, so that this ends.
                Reply::Values(some) if (1..=piece.len()).contains(&some.len()) => {
                    Some(some.iter().map(|value| value.0.to_vec()).collect::<Vec<_>>())
                }
                _ => None,
            })?;
            values.extend(some);
        }
        Ok(values)
    }

    fn append(&self, key: &str, value: &[u8], deadline: Deadline) -> Result<()> {
        admit_key(&self.describe(), key)?;
        admit_value(&self.describe(), value)?;
        self.change("append", &Request::Append { key, value: Bytes(value) }, deadline, done)
    }

    fn num_keys(&self, deadline: Deadline) -> Result<u64> {
        self.change("num_keys", &Request::Count, deadline, |reply| match reply {
            Reply::Count(count) => Some(count),
            _ => None,
        })
    }

    fn describe(&self) -> String {
        name(self.address)
    }
}

fn done(reply: Reply<'_>) -> Option<()> {
    matches!(reply, Reply::Done).then_some(())
}

fn truth(reply: Reply<'_>) -> Option<bool> {
    match reply {
        Reply::Truth(truth) => Some(truth),
        _ => None,
    }
}

/// The deadline, but never less than one round trip: what is there is found even when time is up.
fn at_least_grace(deadline: Deadline) -> Deadline {
    match deadline.remaining() {
        Some(left) if left < GRACE => Deadline::after(GRACE),
        _ => deadline,
    }
}

/// How many of `keys`, which are not empty, go into the next request.
fn piece(keys: &[&str]) -> usize {
    let mut bytes = 0;
    let fits = |key: &&&str| {
        bytes += key.len();
        bytes <= KEY_BYTES_PER_REQUEST
    };
    keys.iter().take(KEYS_PER_REQUEST).take_while(fits).count().max(1)
}
