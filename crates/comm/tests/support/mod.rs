//! What the conformance tests of the collectives share: cases drawn from a seed, memory with guards around it, a rank
//! that runs cases and verifies them alone, and worlds of threads and of processes.
//!
//! Every rank knows every rank's input from (seed, case, rank), so it needs nobody to tell what is right: reductions are
//! compared with the scalar reference, byte by byte, everything else with the inputs themselves.

#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod case;
pub(crate) mod data;
pub(crate) mod doors;
pub(crate) mod prepared;
pub(crate) mod processes;
pub(crate) mod quantised;
pub(crate) mod random;
pub(crate) mod rank;
pub(crate) mod region;
pub(crate) mod rows;
pub(crate) mod scale;
pub(crate) mod sides;
pub(crate) mod threads;
pub(crate) mod verify;
pub(crate) mod workload;
