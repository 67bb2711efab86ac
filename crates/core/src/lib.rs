//! Pure logic of the unisono communication library.
//!
//! What is in here: the words that every other crate shares (data types, reductions, calls, identities, hellos,
//! topology), the wire formats with their bounded decoders, the authentication handshake, and the agreement of
//! survivors. Everything is a
//! function of its arguments: time and randomness are arguments, bytes are slices.
//!
//! What never will be: a socket, a clock, a thread, an environment variable, or `unsafe`.
#![forbid(unsafe_code)]

#[cfg(not(target_os = "linux"))]
compile_error!("unisono runs on Linux (WSL2 and containers too); other systems are not supported");

pub mod agreement;
pub mod auth;
pub mod call;
pub mod device;
pub mod dtype;
pub mod element;
pub mod ep;
pub mod error;
pub mod fp8;
pub mod fused;
pub mod hello;
pub mod layout;
pub mod member;
pub mod quantised;
pub mod rank_set;
pub mod recorder;
pub mod reduce_op;
pub mod select;
pub mod settings;
pub mod topology;
pub mod tuning;
pub mod unique_id;
pub mod wire;

pub use dtype::DType;
pub use element::{Element, Reducible};
pub use error::{Error, Result};
pub use half;
pub use member::Member;
pub use num_complex::Complex;
pub use rank_set::RankSet;
pub use reduce_op::ReduceOp;
pub use unique_id::{Secret, UniqueId};
