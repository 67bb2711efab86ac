//! The collectives over shared memory, and the engine that carries them out.
//!
//! | algorithm | steps | staged per rank | read per rank | synchronisations |
//! | --- | --- | --- | --- | --- |
//! | one-shot | stage all of mine; read everybody's | S | (n − 1)·S | 1 |
//! | two-shot | stage what others own; reduce what I own; copy the rest | S·(n − 1)/n + S/n | 2·S·(n − 1)/n | 2 |
//! | direct | read peers' windows; reduce what I own; copy the rest | 0 | 2·S·(n − 1)/n | 3 |
//!
//! Every call has an *epoch*: each rank publishes a slot with the chain of all calls so far, the call's header and up
//! to 48 bytes of data. Whoever reads a rank's data compares chains first. Larger data is staged in chunks; every chunk
//! is a *step*, counted for ever and equally on all ranks. A rank may be ahead of its slowest peer by [`CALL_SLOTS`](unisono_core::layout::CALL_SLOTS)
//! calls and [`CHUNKS`](unisono_core::layout::CHUNKS) steps (its *credit*): hearing of epoch e from a peer proves that it is done with e − 1, and
//! where nothing is heard (a broadcast's root) the peers' trail and consumed counts are read.

mod all_gather;
mod all_reduce;
mod all_to_all;
mod blocks;
mod broadcast;
mod channel;
mod copy;
mod counted;
mod damage;
mod disagreement;
mod engine;
mod exchange;
mod flight;
mod fused;
mod gather;
mod messages;
mod multi;
mod parts;
mod plan;
mod quantised;
mod recorder;
mod reduce_scatter;
mod transfer;
mod waiting;
mod windows;

pub(crate) use engine::{Engine, EngineConfig, Interrupt};
pub(crate) use flight::{Prepared, Ticket};
#[cfg(feature = "cuda")]
pub(crate) use messages::OnDevice;
#[cfg(feature = "cuda")]
pub(crate) use parts::Part;
#[cfg(feature = "cuda")]
pub(crate) use plan::Plan;
pub(crate) use plan::WindowPlace;
