//! The connections of one client: a call takes an idle one or opens a new one, up to a cap.
//!
//! Taking and giving back cost a lock each. Long waits may hold most of the connections but not all, so calls that
//! are answered at once always find one soon.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use unisono_sync::Deadline;

use super::connection::{Connection, Failure};

/// The most connections of one client.
const MAX_CONNECTIONS: usize = 64;
/// How many of them long waits may hold.
const MAX_WAITING: usize = 56;
/// How often a call without a deadline that found none looks again, whatever happens.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// Connections to one server.
#[derive(Debug)]
pub(super) struct Pool {
    address: SocketAddr,
    counts: Mutex<Counts>,
    freed: Condvar,
}

#[derive(Debug)]
struct Counts {
    idle: Vec<Connection>,
    /// How many there are, idle or in use.
    open: usize,
    /// How many wait slots are taken.
    waiting: usize,
    /// The process that opened them.
    process: u32,
}

impl Pool {
    /// A pool that begins with `connection` to `address`.
    pub(super) fn new(connection: Connection, address: SocketAddr) -> Self {
        let counts = Counts { idle: vec![connection], open: 1, waiting: 0, process: std::process::id() };
        Self { address, counts: Mutex::new(counts), freed: Condvar::new() }
    }

    /// A connection for one call: an idle one, a new one, or the next that comes back.
    pub(super) fn lease(&self, deadline: Deadline) -> Result<Lease<'_>, Failure> {
        let mut counts = self.counts();
        loop {
            if let Some(connection) = counts.idle.pop() {
                return Ok(Lease { pool: self, connection: Some(connection) });
            }
            if counts.open < MAX_CONNECTIONS {
                counts.open += 1;
                drop(counts);
                // From here on the lease gives the place back, also when there will be no connection.
                let mut lease = Lease { pool: self, connection: None };
                lease.connection = Some(Connection::open(self.address, deadline)?);
                return Ok(lease);
            }
            if deadline.is_over() {
                return Err(Failure::Late);
            }
            let sleep = deadline.remaining_up_to(LONGEST_SLEEP);
            counts = self.freed.wait_timeout(counts, sleep).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The right to keep a connection for a long wait; `None` if too many have it.
    pub(super) fn wait_slot(&self) -> Option<WaitSlot<'_>> {
        let mut counts = self.counts();
        if counts.waiting == MAX_WAITING {
            return None;
        }
        counts.waiting += 1;
        Some(WaitSlot { pool: self })
    }

    // Counts and connections are put right in single steps, so a poisoned lock is still good.
    fn counts(&self) -> MutexGuard<'_, Counts> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let process = std::process::id();
        if counts.process != process {
            // After a fork the connections, and the threads that use them, are the parent's. The child begins anew.
            *counts = Counts { idle: Vec::new(), open: 0, waiting: 0, process };
        }
        counts
    }
}

/// A connection while one call uses it. It goes back into the pool after success and is closed after a failure.
#[derive(Debug)]
pub(super) struct Lease<'a> {
    pool: &'a Pool,
    connection: Option<Connection>,
}

impl Lease<'_> {
    /// Makes one call; after a failure there will be no further one.
    pub(super) fn call<T>(
        &mut self,
        call: impl FnOnce(&mut Connection) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let Some(mut connection) = self.connection.take() else {
            return Err(Failure::Broken(ErrorKind::NotConnected.into()));
        };
        let result = call(&mut connection);
        match &result {
            Ok(_) => self.connection = Some(connection),
            // What broke one connection, a server that is gone, has most likely broken the idle ones too.
            Err(Failure::Broken(_)) => {
                let mut counts = self.pool.counts();
                counts.open = counts.open.saturating_sub(counts.idle.len());
                counts.idle.clear();
            }
            Err(_) => {}
        }
        result
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let mut counts = self.pool.counts();
        match self.connection.take() {
            Some(connection) => counts.idle.push(connection),
            None => counts.open = counts.open.saturating_sub(1),
        }
        drop(counts);
        self.pool.freed.notify_one();
    }
}

/// The right to keep a connection for a long wait.
#[derive(Debug)]
pub(super) struct WaitSlot<'a> {
    pool: &'a Pool,
}

impl Drop for WaitSlot<'_> {
    fn drop(&mut self) {
        let mut counts = self.pool.counts();
        counts.waiting = counts.waiting.saturating_sub(1);
    }
}
