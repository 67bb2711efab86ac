//! The store over TCP: one server, any number of clients, all of whom know the job's secret.
//!
//! A connection starts with the mutual handshake of [`unisono_core::auth`]; then sealed frames go both ways, each a
//! [`protocol::Request`] or [`protocol::Reply`] with the client's number for it. The server is one thread; requests that
//! wait for keys are answered when the keys appear. A client has one connection for each thread that is in a
//! call, kept for the next call; a small request costs one round trip. Everything travels in clear, with tags.

mod client;
mod connection;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod link;
mod progress;
mod protocol;
mod server;
mod service;

pub use self::client::TcpStore;
pub use self::server::{StoreServer, StoreServerConfig};

#[cfg(test)]
mod tests;
