//! The store that `unisono run` serves for its ranks.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use unisono::Secret;

use crate::Failure;

/// A store on the loopback interface; it ends when this is dropped.
pub(super) struct RunningStore {
    address: SocketAddr,
    #[allow(dead_code, reason = "held, because dropping it ends the store")]
    server: TcpListener,
}

impl RunningStore {
    /// Starts the store; whoever connects must know `secret`.
    pub(super) fn start(_secret: &Secret) -> Result<Self, Failure> {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .map_err(|error| Failure::new(format!("the store cannot be started: {error}")))?;
        let address = server
            .local_addr()
            .map_err(|error| Failure::new(format!("the store cannot be started: {error}")))?;
        Ok(Self { address, server })
    }

    /// Where it listens.
    pub(super) const fn address(&self) -> SocketAddr {
        self.address
    }
}
