//! Lock-free protocols over borrowed shared memory, and the one wait primitive of the house.
//!
//! What is in here: the words that ranks poll ([`EpochFlag`], [`SignalPad`], [`Barrier`], [`SlotRing`], [`Journal`]), generic over
//! an [`Atomics`] family so that loom can check them; [`Flag`] and [`Counter`] for use inside one process;
//! [`wait::wait`], which spins, yields and sleeps under an abort word and a deadline.
//!
//! What never will be: a rank, a socket, an allocation, or knowledge of what the words mean. This is the only crate
//! that names raw atomics; the others say what they want in the words above.

#![allow(clippy::disallowed_types, clippy::disallowed_methods)] // the one crate that may name them

pub mod atomics;
pub mod attendance;
pub mod barrier;
pub mod deadline;
pub mod epoch_flag;
pub mod fate;
pub mod journal;
pub mod local;
pub mod memory;
pub mod shared_bytes;
pub mod signal_pad;
pub mod slot_ring;
pub mod ticks;
pub mod wait;

#[cfg(loom)]
pub use atomics::Loom;
pub use atomics::{Atomics, Native, Word};
pub use attendance::{Attendance, Standing};
pub use barrier::Barrier;
pub use deadline::Deadline;
pub use epoch_flag::EpochFlag;
pub use fate::Fate;
pub use journal::Journal;
pub use local::{Counter, Flag};
pub use shared_bytes::SharedBytes;
pub use signal_pad::SignalPad;
pub use slot_ring::SlotRing;
pub use ticks::Ticks;
pub use wait::{AbortWord, Sleepers, SpinBudget, Stopped, WaitPolicy, Watch, wait};
