//! What is measured on GPUs, as data: beside `record.rs`, which is about the host.

use serde::{Deserialize, Serialize};

/// The GPUs of a run, and what makes them work.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct Gpus {
    /// The names of all devices that are used, by number.
    pub(crate) devices: Vec<String>,
    pub(crate) ranks: usize,
    /// How they reach each other, as `device memory`.
    pub(crate) link: String,
    /// Where forms and grids come from, as `default (measured on …)`.
    pub(crate) forms_from: String,
    /// The most multiprocessors that a kernel of ours fills.
    pub(crate) multiprocessors: u32,
    /// The version of CUDA that the driver speaks, as `13.0`.
    pub(crate) driver_cuda: String,
    /// SHA-256 of the sources of our kernels.
    pub(crate) kernels: String,
    pub(crate) nccl: Option<NcclFacts>,
}

/// The NCCL of a run.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct NcclFacts {
    /// As `2.27.3`.
    pub(crate) version: String,
    /// What was opened.
    pub(crate) path: String,
    /// False if the environment forbids NCCL to use NVLink's switches for reductions (`NCCL_NVLS_ENABLE=0`).
    pub(crate) may_use_nvls: bool,
}

/// One measured size of one operation.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct OnGpu {
    /// Operation, as `all_reduce`.
    pub(crate) operation: String,
    /// Bytes that each rank contributes.
    pub(crate) bytes: u64,
    /// The form that our call took, and its grid.
    pub(crate) form: String,
    pub(crate) blocks: u32,
    pub(crate) threads: u32,
    pub(crate) tile: u32,
    /// Multiprocessors that these blocks fill, with the one that exchanges headers.
    pub(crate) multiprocessors: u32,
    /// Timed rounds, and calls per round and kind.
    pub(crate) rounds: u64,
    pub(crate) batch: u64,
    pub(crate) ours: Side,
    /// The plain all-reduce, beside a quantised one.
    pub(crate) plain: Option<Side>,
    pub(crate) nccl: Option<Side>,
    /// Why there are no figures of NCCL though they were asked for.
    pub(crate) nccl_lacks: Option<String>,
}

/// The figures of one library. Times are microseconds per call: medians over rounds of the slowest rank.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct Side {
    /// Submitted call by call, timed by events.
    pub(crate) eager_us: f64,
    /// Captured in a CUDA graph, timed by events.
    pub(crate) graph_us: f64,
    /// The host's time to submit a call; only of small sizes, where nothing else is waited for.
    pub(crate) submit_us: Option<f64>,
    /// GB/s of the graph: bytes of the operation, and as if every byte crossed a bus once (as nccl-tests counts).
    pub(crate) algbw: f64,
    pub(crate) busbw: f64,
    /// Whether it was compared bit for bit; otherwise within the rounding errors of another order.
    pub(crate) is_exact: bool,
    /// Elements that were wrong, over all ranks.
    pub(crate) wrong: u64,
}

impl OnGpu {
    /// Whether any element was wrong.
    pub(crate) fn is_wrong(&self) -> bool {
        self.ours.wrong > 0 || self.rival().is_some_and(|rival| rival.wrong > 0)
    }

    /// What was measured in turns with ours.
    pub(crate) fn rival(&self) -> Option<&Side> {
        self.plain.as_ref().or(self.nccl.as_ref())
    }

    /// How much longer the graph of that takes than ours.
    pub(crate) fn ratio(&self) -> Option<f64> {
        self.rival().map(|rival| rival.graph_us / self.ours.graph_us)
    }
}
