//! What is measured, as data: the lines that rank 0 writes for the parent, and the JSON that people keep.

use std::io::Write as _;

use serde::{Deserialize, Serialize};

use super::gpu_record::{Gpus, OnGpu};
use super::moe::OnMoe;
use super::rows::OnRows;

/// One measured size of one operation.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// Operation, as `all_reduce`.
    pub(crate) operation: String,
    /// Bytes that each rank contributes.
    pub(crate) bytes: u64,
    /// Algorithm that ran, with `inline` where the data travels in the call slot.
    pub(crate) algorithm: String,
    /// Timed calls, and calls per timed batch.
    pub(crate) calls: u64,
    pub(crate) batch: u64,
    /// Microseconds per call: percentiles over batches of the slowest rank.
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) min_us: f64,
    /// GB/s: bytes of the operation over p50, and the same as if every byte crossed a bus once (as nccl-tests counts).
    pub(crate) algbw: f64,
    pub(crate) busbw: f64,
    /// Elements that were wrong, over all ranks.
    pub(crate) wrong: u64,
}

/// A line from rank 0.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Line {
    /// The ranks have met; so many sizes will follow.
    Ready { sizes: u64 },
    /// What the GPUs are.
    Gpus(Gpus),
    /// A size is done.
    Size(Measured),
    /// The same on GPUs.
    GpuSize(Box<OnGpu>),
    /// A number of rows on GPUs.
    Rows(OnRows),
    /// An operation of expert parallelism with a number of tokens.
    Moe(OnMoe),
}

impl Line {
    /// Writes it to standard output if `rank` is the one that the parent listens to.
    pub(crate) fn tell(&self, rank: usize) {
        if rank == 0
            && let Ok(text) = serde_json::to_string(self)
        {
            // If the parent is gone, so is the reason to go on; the next write of the runtime tells.
            let _ = writeln!(std::io::stdout(), "{text}");
        }
    }
}

/// All sizes of a run.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Results {
    Host(Vec<Measured>),
    Gpu(Vec<OnGpu>),
    Rows(Vec<OnRows>),
    Moe(Vec<OnMoe>),
}

/// The whole run.
#[derive(Debug, Serialize)]
pub(crate) struct Run {
    pub(crate) command: String,
    pub(crate) version: &'static str,
    pub(crate) unix_time: u64,
    pub(crate) machine: Machine,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gpus: Option<Gpus>,
    pub(crate) ranks: usize,
    pub(crate) place: String,
    pub(crate) dtype: String,
    pub(crate) op: String,
    pub(crate) bound: bool,
    pub(crate) in_place: bool,
    pub(crate) synchronised: bool,
    pub(crate) results: Results,
}

/// Where it was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    pub(crate) cores: usize,
    pub(crate) kernel: String,
}

impl Machine {
    pub(crate) fn here() -> Self {
        Self {
            processor: unisono::host::processor_model(),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        }
    }
}
