//! A client of torch's `TCPStore` servers.
//!
//! Threads that call at the same time each use a connection of their own, up to 64, so a long wait of one does not
//! hold up another. A call costs one round trip, a `get` two (`WAIT`, then `GET`). `SET` and `APPEND` have no reply in
//! this protocol; a ping behind them on the same connection shows that they were served, so when `set` returns, every
//! later call of any client sees the value.

use std::net::{SocketAddr, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use unisono_sync::Deadline;

use super::connection::{Connection, Failure};
use super::pool::Pool;
use super::wire::{ALL_THERE, Encoder, NOT_ALL_THERE, Opcode, WAIT_CANCELLED, WAIT_OVER};
use crate::error::{Error, Result};
use crate::store::{MAX_KEY_BYTES, Store, admit_key, admit_keys, admit_value};

/// How long a reply may take that must come at once, when the caller's deadline is over.
const GRACE: Duration = Duration::from_millis(200);
const SHORTEST_SLEEP: Duration = Duration::from_millis(5);
const LONGEST_SLEEP: Duration = Duration::from_millis(250);

/// A client of a torch `TCPStore` server, torch's or a [`super::TorchStoreServer`].
///
/// Keys are one byte shorter than elsewhere ([`MAX_KEY_BYTES`]` - 1`), because torch's client, whose keys these are,
/// puts a `/` in front of each. The protocol cannot report errors: a server that refuses a request (`add` on a value
/// that is no integer, too many keys) closes the connection, which is [`Error::StoreIo`].
///
/// ```
/// use std::time::Duration;
/// use unisono::{Deadline, store::{Store, TorchStore, TorchStoreServer}};
///
/// let server = TorchStoreServer::on_loopback()?;
/// let deadline = Deadline::after(Duration::from_secs(5));
/// let store = TorchStore::connect(server.address().to_string(), deadline)?;
/// store.set("answer", b"42", deadline)?;
/// assert_eq!(store.add("answer", -2, deadline)?, 40);
/// # Ok::<(), unisono::Error>(())
/// ```
#[derive(Debug)]
pub struct TorchStore {
    name: String,
    pool: Pool,
}

impl TorchStore {
    /// Connects to the server at `address`, a `host:port`, trying again until the deadline, because ranks often
    /// start before their server. Looking up the name takes as long as the system's resolver does.
    ///
    /// # Errors
    ///
    /// [`Error::StoreIo`] when the address has no port or nobody could be reached before the deadline,
    /// [`Error::StoreProtocol`] when something else than a torch store answers.
    pub fn connect(address: impl Into<String>, deadline: Deadline) -> Result<Self> {
        let address = address.into();
        let name = format!("torch://{address}");
        let failed = |message: String| Error::StoreIo { store: name.clone(), action: "connect", message };
        let port = address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
        if port.is_none() {
            return Err(failed(format!("expected HOST:PORT, got `{address}`")));
        }
        let mut sleep = SHORTEST_SLEEP;
        loop {
            let reason = match open_any(&address, deadline) {
                Ok((connection, address)) => return Ok(Self { name, pool: Pool::new(connection, address) }),
                Err(Failure::Protocol(message)) => {
                    return Err(Error::StoreProtocol { store: name.clone(), message });
                }
                Err(Failure::Late) => "no answer".to_owned(),
                Err(Failure::Broken(error)) => error.to_string(),
            };
            if deadline.is_over() {
                return Err(failed(format!("nobody answered before the deadline; the last try: {reason}")));
            }
            thread::sleep(deadline.remaining_up_to(sleep));
            sleep = (sleep * 2).min(LONGEST_SLEEP);
        }
    }

    /// Requests and their replies, on a connection that nobody else uses meanwhile.
    fn call<T>(
        &self,
        action: &'static str,
        deadline: Deadline,
        call: impl FnOnce(&mut Connection) -> Result<T, Failure>,
    ) -> Result<T> {
        self.pool.lease(deadline).and_then(|mut lease| lease.call(call)).map_err(|failure| {
            let message = match failure {
                Failure::Protocol(message) => {
                    return Error::StoreProtocol { store: self.name.clone(), message };
                }
                Failure::Late => "no answer before the deadline".to_owned(),
                Failure::Broken(error) => error.to_string(),
            };
            Error::StoreIo { store: self.name.clone(), action, message }
        })
    }

    /// A request without a reply, confirmed.
    fn confirmed(&self, action: &'static str, request: Encoder, deadline: Deadline) -> Result<()> {
        self.call(action, deadline, |connection| connection.confirm(request, deadline))
    }

    /// A request that is answered by a number.
    fn number(&self, action: &'static str, request: Encoder, deadline: Deadline) -> Result<i64> {
        self.call(action, deadline, |connection| {
            connection.send(request, deadline)?;
            connection.receive_i64(deadline)
        })
    }

    /// Waits for all `keys`, then asks for what `read` reads.
    fn when_there<T>(
        &self,
        action: &'static str,
        keys: &[&str],
        deadline: Deadline,
        read: impl FnOnce(&mut Connection, Deadline) -> Result<T, Failure>,
    ) -> Result<T> {
        self.wait_for(action, keys, deadline)?;
        let deadline = with_grace(deadline);
        self.call(action, deadline, |connection| read(connection, deadline))
    }

    fn wait_for(&self, action: &'static str, keys: &[&str], deadline: Deadline) -> Result<()> {
        self.admit_keys(keys)?;
        if keys.is_empty() {
            return Ok(());
        }
        let begin = Instant::now();
        let missing = match self.pool.wait_slot() {
            Some(_slot) => {
                self.call(action, with_grace(deadline), |connection| wait_on(connection, keys, deadline))?
            }
            None => self.poll_for(action, keys, deadline)?,
        };
        match missing {
            None => Ok(()),
            Some(index) => Err(Error::StoreTimeout {
                store: self.name.clone(),
                key: keys[index].to_owned(),
                waited: begin.elapsed(),
            }),
        }
    }

    /// Waits without keeping a connection, for when too many threads wait already. The index of a missing key.
    fn poll_for(&self, action: &'static str, keys: &[&str], deadline: Deadline) -> Result<Option<usize>> {
        let mut sleep = SHORTEST_SLEEP;
        loop {
            let by = with_grace(deadline);
            let missing = self.call(action, by, |connection| first_missing(connection, keys, by))?;
            if missing.is_none() || deadline.is_over() {
                return Ok(missing);
            }
            thread::sleep(deadline.remaining_up_to(sleep));
            sleep = (sleep * 2).min(LONGEST_SLEEP);
        }
    }

    fn admit_key(&self, key: &str) -> Result<()> {
        admit_key(&self.name, key)?;
        if key.len() == MAX_KEY_BYTES {
            return Err(Error::StoreLimit {
                store: self.name.clone(),
                what: "key length",
                got: MAX_KEY_BYTES as u64,
                cap: MAX_KEY_BYTES as u64 - 1,
            });
        }
        Ok(())
    }

    fn admit_keys(&self, keys: &[&str]) -> Result<()> {
        admit_keys(&self.name, keys)?;
        keys.iter().try_for_each(|key| self.admit_key(key))
    }
}

impl Store for TorchStore {
    fn set(&self, key: &str, value: &[u8], deadline: Deadline) -> Result<()> {
        self.admit_key(key)?;
        admit_value(&self.name, value)?;
        self.confirmed("set", Encoder::new(Opcode::Set).key(key).value(value), deadline)
    }

    /// Waits for `key` and reads it. When another client removes the key in between, the value is empty.
    fn get(&self, key: &str, deadline: Deadline) -> Result<Vec<u8>> {
        self.when_there("get", &[key], deadline, |connection, deadline| {
            connection.send(Encoder::new(Opcode::Get).key(key), deadline)?;
            connection.receive_value(deadline)
        })
    }

    fn wait(&self, keys: &[&str], deadline: Deadline) -> Result<()> {
        self.wait_for("wait", keys, deadline)
    }

    fn check(&self, keys: &[&str], deadline: Deadline) -> Result<bool> {
        self.admit_keys(keys)?;
        if keys.is_empty() {
            return Ok(true);
        }
        self.call("check", deadline, |connection| check_on(connection, keys, deadline))
    }

    fn add(&self, key: &str, amount: i64, deadline: Deadline) -> Result<i64> {
        self.admit_key(key)?;
        self.number("add", Encoder::new(Opcode::Add).key(key).i64(amount), deadline)
    }

    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8], deadline: Deadline) -> Result<Vec<u8>> {
        self.admit_key(key)?;
        admit_value(&self.name, expected)?;
        admit_value(&self.name, desired)?;
        self.call("compare_set", deadline, |connection| {
            let request = Encoder::new(Opcode::CompareSet).key(key).value(expected).value(desired);
            connection.send(request, deadline)?;
            connection.receive_value(deadline)
        })
    }

    fn delete(&self, key: &str, deadline: Deadline) -> Result<bool> {
        self.admit_key(key)?;
        Ok(self.number("delete", Encoder::new(Opcode::Delete).key(key), deadline)? > 0)
    }

    /// Waits for `keys` and reads them. The value of a key that another client removes in between is empty.
    fn multi_get(&self, keys: &[&str], deadline: Deadline) -> Result<Vec<Vec<u8>>> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        self.when_there("multi_get", keys, deadline, |connection, deadline| {
            connection.send(Encoder::new(Opcode::MultiGet).keys(keys), deadline)?;
            keys.iter().map(|_| connection.receive_value(deadline)).collect()
        })
    }

    fn append(&self, key: &str, value: &[u8], deadline: Deadline) -> Result<()> {
        self.admit_key(key)?;
        admit_value(&self.name, value)?;
        self.confirmed("append", Encoder::new(Opcode::Append).key(key).value(value), deadline)
    }

    /// The number of all keys on the server, those of other users included.
    fn num_keys(&self, deadline: Deadline) -> Result<u64> {
        let count = self.number("num_keys", Encoder::new(Opcode::NumKeys), deadline)?;
        u64::try_from(count).map_err(|_| Error::StoreProtocol {
            store: self.name.clone(),
            message: format!("{count} keys were reported, expected no negative number"),
        })
    }

    fn describe(&self) -> String {
        self.name.clone()
    }
}

/// Looks up `address` and connects to the first of its addresses that answers.
fn open_any(address: &str, deadline: Deadline) -> Result<(Connection, SocketAddr), Failure> {
    let mut failure = Failure::Late;
    for address in address.to_socket_addrs().map_err(Failure::Broken)? {
        match Connection::open(address, deadline) {
            Ok(connection) => return Ok((connection, address)),
            Err(other) => failure = other,
        }
    }
    Err(failure)
}

/// Waits on the server for all `keys`. The index of a key that was missing at the deadline.
fn wait_on(connection: &mut Connection, keys: &[&str], deadline: Deadline) -> Result<Option<usize>, Failure> {
    connection.send(Encoder::new(Opcode::Wait).keys(keys), with_grace(deadline))?;
    match connection.receive_u8(deadline) {
        Ok(WAIT_OVER) => return Ok(None),
        Ok(other) => return Err(unexpected("WAIT", other)),
        Err(Failure::Late) => {}
        Err(failure) => return Err(failure),
    }
    let grace = with_grace(deadline);
    connection.send(Encoder::new(Opcode::CancelWait), grace)?;
    match connection.receive_u8(grace)? {
        WAIT_CANCELLED => first_missing(connection, keys, grace),
        // The end of the wait and its cancellation met on the way; the reply to the latter is still to come.
        WAIT_OVER => match connection.receive_u8(grace)? {
            WAIT_CANCELLED => Ok(None),
            other => Err(unexpected("CANCEL_WAIT", other)),
        },
        other => Err(unexpected("CANCEL_WAIT", other)),
    }
}

/// The index of the first of `keys` that is missing, by halving.
fn first_missing(
    connection: &mut Connection,
    keys: &[&str],
    deadline: Deadline,
) -> Result<Option<usize>, Failure> {
    if check_on(connection, keys, deadline)? {
        return Ok(None);
    }
    // One of keys[low..high] is missing, and none before `low`.
    let (mut low, mut high) = (0, keys.len());
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if check_on(connection, &keys[low..middle], deadline)? {
            low = middle;
        } else {
            high = middle;
        }
    }
    Ok(Some(low))
}

fn check_on(connection: &mut Connection, keys: &[&str], deadline: Deadline) -> Result<bool, Failure> {
    connection.send(Encoder::new(Opcode::Check).keys(keys), deadline)?;
    match connection.receive_u8(deadline)? {
        ALL_THERE => Ok(true),
        NOT_ALL_THERE => Ok(false),
        other => Err(unexpected("CHECK", other)),
    }
}

fn unexpected(request: &str, reply: u8) -> Failure {
    Failure::Protocol(format!("{request} was answered by {reply}, expected 0 or 1"))
}

/// `deadline`, but late enough for a reply that comes at once.
fn with_grace(deadline: Deadline) -> Deadline {
    match deadline.remaining() {
        Some(left) if left < GRACE => Deadline::after(GRACE),
        _ => deadline,
    }
}
