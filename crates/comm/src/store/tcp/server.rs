//! The guard that owns a TCP store server, and its settings.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use mio::Waker;
use unisono_core::{Secret, UniqueId};

use super::progress::Progress;
use super::protocol::name;
use crate::error::{Error, Result};
use crate::store::interface_address;
use crate::store::table::Limits;

/// Longer settings are cut to this, so that they can be added to any time.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// What a [`StoreServer`] is started with.
#[derive(Clone, Debug)]
pub struct StoreServerConfig {
    pub(super) address: SocketAddr,
    pub(super) secret: Secret,
    pub(super) job: Option<[u8; 16]>,
    pub(super) limits: Limits,
    pub(super) max_unproved: usize,
    pub(super) handshake_timeout: Duration,
    pub(super) stall_timeout: Duration,
    pub(super) max_waiting_bytes: usize,
    pub(super) max_pending_bytes: usize,
    pub(super) output_budget: usize,
}

impl StoreServerConfig {
    /// Loopback, any free port, a random job id, the limits of [`crate::store`].
    pub fn new(secret: Secret) -> Self {
        Self {
            address: (Ipv4Addr::LOCALHOST, 0).into(),
            secret,
            job: None,
            limits: Limits::default(),
            max_unproved: most_unproved(),
            handshake_timeout: Duration::from_secs(2),
            stall_timeout: Duration::from_secs(10),
            max_waiting_bytes: 256 * 1024 * 1024,
            max_pending_bytes: 64 * 1024 * 1024,
            output_budget: 256 * 1024 * 1024,
        }
    }

    /// Where to listen: the address of one interface, never the unspecified one; port 0 is any free port.
    #[must_use]
    pub fn address(mut self, address: SocketAddr) -> Self {
        self.address = address;
        self
    }

    /// Listens on the interface with this name, such as `eth0`, at the port of the address.
    ///
    /// # Errors
    /// [`Error::Interface`] if there is none.
    pub fn interface(mut self, name: &str) -> Result<Self> {
        self.address.set_ip(interface_address(name)?);
        Ok(self)
    }

    /// The id of the job, told in the unique id.
    #[must_use]
    pub fn job(mut self, job: [u8; 16]) -> Self {
        self.job = Some(job);
        self
    }

    /// The most keys (at most and by default [`crate::store::MAX_KEYS`]).
    #[must_use]
    pub fn max_keys(mut self, keys: usize) -> Self {
        self.limits.keys = keys.min(crate::store::MAX_KEYS);
        self
    }

    /// The most bytes of all keys and values together; 1 GiB by default.
    #[must_use]
    pub fn max_total_bytes(mut self, bytes: usize) -> Self {
        self.limits.total_bytes = bytes;
        self
    }

    /// The most connections that have not proved yet that they know the secret; a further one replaces the oldest. By
    /// default 1,024, about 1 KiB each, but at most half of the descriptors that this process may open.
    #[must_use]
    pub fn max_unproved(mut self, connections: usize) -> Self {
        self.max_unproved = connections.max(1);
        self
    }

    /// How long a connection has to prove that it knows the secret; 2 s by default.
    #[must_use]
    pub fn handshake_timeout(mut self, timeout: Duration) -> Self {
        self.handshake_timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }

    /// A client that takes nothing of its reply for this long is dropped; 10 s by default.
    #[must_use]
    pub fn stall_timeout(mut self, timeout: Duration) -> Self {
        self.stall_timeout = timeout.min(LONGEST_TIMEOUT);
        self
    }
}

/// Strangers must not take the descriptors that the process needs for itself.
fn most_unproved() -> usize {
    let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let half = descriptors.and_then(|descriptors| usize::try_from(descriptors / 2).ok());
    half.unwrap_or(1024).clamp(1, 1024)
}

/// Owns a TCP store: one thread, which ends and closes every connection when this is dropped.
///
/// ```
/// use std::time::Duration;
/// use unisono::store::{Store, StoreServer, TcpStore};
/// use unisono::{Deadline, Secret};
///
/// let server = StoreServer::start(Secret::new([7; 32]))?; // the secret must be random
/// let deadline = Deadline::after(Duration::from_secs(5));
/// let store = TcpStore::from_unique_id(&server.unique_id(), deadline)?;
/// store.set("answer", b"42", deadline)?;
/// assert_eq!(store.get("answer", deadline)?, b"42");
/// # Ok::<(), unisono::Error>(())
/// ```
#[derive(Debug)]
pub struct StoreServer {
    unique_id: UniqueId,
    waker: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
    process: u32,
}

impl StoreServer {
    /// Listens on loopback, on any free port.
    ///
    /// # Errors
    /// As [`start_with`](Self::start_with).
    pub fn start(secret: Secret) -> Result<Self> {
        Self::start_with(StoreServerConfig::new(secret))
    }

    /// Listens as `config` says. When this returns, clients can connect.
    ///
    /// # Errors
    /// [`Error::StoreAddress`] for the unspecified address, [`Error::StoreIo`] if the system refuses.
    pub fn start_with(config: StoreServerConfig) -> Result<Self> {
        let asked = config.address;
        if asked.ip().to_canonical().is_unspecified() {
            return Err(Error::StoreAddress {
                address: asked,
                reason: "it would listen on every network of this host; name the address of one interface, or 127.0.0.1",
            });
        }
        let failed =
            |action: &'static str, message: String| Error::StoreIo { store: name(asked), action, message };
        let job = match config.job {
            Some(job) => job,
            None => random().map_err(|message| failed("draw a job id", message))?,
        };
        let secret = config.secret.clone();
        let (progress, address, waker) =
            Progress::listen(config).map_err(|error| failed("listen", error.to_string()))?;
        let unique_id = UniqueId::new(address, job, secret)?;
        let thread = thread::Builder::new()
            .name("unisono-store".into())
            .spawn(move || progress.run())
            .map_err(|error| failed("start a thread", error.to_string()))?;
        Ok(Self { unique_id, waker: Arc::new(waker), thread: Some(thread), process: std::process::id() })
    }

    #[cfg(test)]
    pub(super) fn pretend_forked_and_drop(mut self) {
        self.process = 0;
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.unique_id.address()
    }

    /// What a client needs to connect: address, job id and secret.
    pub fn unique_id(&self) -> UniqueId {
        self.unique_id.clone()
    }

    /// The secret that clients must know.
    pub fn secret(&self) -> &Secret {
        self.unique_id.secret()
    }
}

impl Drop for StoreServer {
    fn drop(&mut self) {
        // In a forked child the thread does not exist, and waking it would stop the parent's.
        if self.process != std::process::id() {
            std::mem::forget(self.thread.take());
            return;
        }
        if let Err(error) = self.waker.wake() {
            tracing::error!(%error, "the store server could not be told to stop; its thread goes on");
            return;
        }
        // The thread never blocks but in its poll, so it ends within one turn.
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!(address = %self.address(), "the thread of the store server had panicked");
        }
    }
}

/// Fresh random bytes from the system.
pub(super) fn random<const N: usize>() -> Result<[u8; N], String> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| error.to_string())?;
    Ok(bytes)
}
