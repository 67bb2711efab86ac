//! torch's `TCPStore`: a client for its servers, and a server for its clients.
//!
//! With the client, ranks that `torchrun` started meet where torch meets; with the server, torch's own client can
//! join a job of ours. The wire (torch 2.11 and later, libuv and legacy servers) is little-endian without framing:
//! an opcode, then fields; strings and bytes are a `u64` length and the data. It has no authentication, so
//! the server listens on loopback unless told otherwise. Keys of the client carry a leading `/`, as torch's do.

mod client;
mod connection;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod pool;
mod server;
mod state;
mod wire;

pub use self::client::TorchStore;
pub use self::server::TorchStoreServer;
