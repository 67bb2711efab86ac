//! `unisono bench`: spawns its own ranks, lets them meet, measures and verifies, and prints a table.
//!
//! The parent starts itself again as every rank (`bench --as-rank`), with the variables and the secret that
//! `unisono run` gives; rank 0 writes a line per size, which the parent prints. A rank that fails ends the run.
//! On the host `rank.rs` measures, on GPUs `gpu.rs`, with NCCL beside it if that is asked for.

use std::io::{BufRead as _, BufReader};
use std::time::Duration;

use clap::{Args, ValueEnum};
use unisono::{DType, Kind, ReduceOp, settings};

use crate::ranks::{self, Ranks};
use crate::{Common, Failure};
use record::Line;
use report::Report;
use workload::Workload;
pub(crate) use workload::place;

mod gpu;
mod gpu_record;
mod gpu_table;
mod moe;
mod nccl;
pub(crate) mod pattern;
mod rank;
mod record;
mod report;
mod rows;
mod table;
mod tolerance;
mod workload;

/// Exit code when a result was wrong or a rank failed.
const EXIT_WRONG: u8 = 1;

/// An operation that can be measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum Operation {
    AllReduce,
    Broadcast,
    AllGather,
    ReduceScatter,
    AllToAll,
    Reduce,
    Gather,
    Scatter,
    SendRecv,
    /// Of f16, bf16 or f32, of which 8 bits for each element travel; on GPUs beside the plain all-reduce
    AllReduceQuantised,
    /// On GPUs, and alone: by numbers of tokens
    AllReduceRmsNorm,
    /// Expert parallelism: dispatch and combine, alone, by numbers of tokens
    Moe,
    Barrier,
}

impl Operation {
    /// What is measured when nothing is named: the operations that training and inference call most.
    const DEFAULT: [Self; 4] = [Self::AllReduce, Self::Broadcast, Self::AllGather, Self::Barrier];

    const fn reduces(self) -> bool {
        matches!(self, Self::AllReduce | Self::ReduceScatter | Self::Reduce)
    }

    /// Parts of the input and of the output. Sides that only the root has are there on every rank: the others leave them.
    pub(crate) const fn parts(self, ranks: usize) -> (usize, usize) {
        match self {
            Self::AllReduce
            | Self::AllReduceQuantised
            | Self::AllReduceRmsNorm
            | Self::Broadcast
            | Self::Reduce
            | Self::SendRecv
            | Self::Moe
            | Self::Barrier => (1, 1),
            Self::AllGather | Self::Gather => (1, ranks),
            Self::ReduceScatter | Self::Scatter => (ranks, 1),
            Self::AllToAll => (ranks, ranks),
        }
    }

    /// The call; `None` for a barrier, for messages, and for rows, which have more buffers. The root is rank 0.
    pub(crate) const fn kind(self, op: ReduceOp) -> Option<Kind> {
        Some(match self {
            Self::Barrier | Self::SendRecv | Self::AllReduceRmsNorm | Self::Moe => return None,
            Self::AllReduce => Kind::AllReduce { op },
            Self::AllReduceQuantised => Kind::AllReduceQuantised,
            Self::Broadcast => Kind::Broadcast { root: 0 },
            Self::AllGather => Kind::AllGather,
            Self::ReduceScatter => Kind::ReduceScatter { op },
            Self::AllToAll => Kind::AllToAll,
            Self::Reduce => Kind::Reduce { op, root: 0 },
            Self::Gather => Kind::Gather { root: 0 },
            Self::Scatter => Kind::Scatter { root: 0 },
        })
    }

    /// GB/s as nccl-tests counts: of the operation, and over the bus, in elements as they are before they are quantised. A message is sent there and back on the host; on GPUs ([`gpu`])
    /// each rank sends one on.
    pub(crate) fn bandwidth(self, ranks: usize, bytes: usize, us: f64) -> (f64, f64) {
        let ranks = ranks as f64;
        let per_rank = bytes as f64 / us / 1e3;
        match self {
            Self::Barrier | Self::Moe => (0.0, 0.0),
            Self::SendRecv => (2.0 * per_rank, 2.0 * per_rank),
            Self::AllReduce | Self::AllReduceQuantised => (per_rank, per_rank * 2.0 * (ranks - 1.0) / ranks),
            Self::Broadcast | Self::Reduce => (per_rank, per_rank),
            _ => (per_rank * ranks, per_rank * (ranks - 1.0)),
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::Broadcast => "broadcast",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllToAll => "all_to_all",
            Self::Reduce => "reduce",
            Self::Gather => "gather",
            Self::Scatter => "scatter",
            Self::SendRecv => "send_recv",
            Self::AllReduceQuantised => "all_reduce_quantised",
            Self::AllReduceRmsNorm => "all_reduce_rms_norm",
            Self::Moe => "moe",
            Self::Barrier => "barrier",
        }
    }
}

/// Where the buffers lie and the operations run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Place {
    /// On GPUs
    Cuda,
    /// On the host
    Host,
}

/// Another library that is measured beside ours.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Rival {
    Nccl,
}

/// The arguments of `unisono bench`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Bytes are those of one part: what each rank contributes, or gets where it contributes a part to every rank. Times are those of back-to-back calls (batches of 1000 \
                  below 4 KiB): percentiles over batches of the slowest rank. algbw and busbw count as nccl-tests does. send_recv is a round trip between ranks 0 and 1, 2 and 3, and so on; on GPUs every rank sends to the next \
                  and receives from the previous one. \
                  On GPUs calls are timed by events: eager, as they are submitted, and graph, captured in a CUDA graph; medians of the slowest rank. all_reduce_rms_norm is timed in graphs, beside the all-reduce alone and beside an all-reduce with \
                  a kernel of the rest behind it; with --in-place the new residual replaces the old one. all_reduce_quantised takes turns with the plain all-reduce of the same elements, and both are verified. \
                  moe is timed call by call: GB/s count all rows that come to a rank, wire bytes what it sends to others; up to 128 tokens low-latency calls are measured, too."
)]
pub(crate) struct Arguments {
    /// Operations to measure; all_reduce, broadcast, all_gather and barrier if none is named
    #[arg(value_name = "OPERATION")]
    operations: Vec<Operation>,
    /// Where to measure; on GPUs if there are any
    #[arg(long, value_name = "PLACE")]
    device: Option<Place>,
    /// Measure another library too, in turns with ours, on the same buffers; on GPUs only
    #[arg(long, value_name = "LIBRARY")]
    against: Option<Rival>,
    /// Number of ranks, as processes of this host; as many as there are GPUs (which more ranks share in turn), 2 on the host
    #[arg(short = 'n', long = "ranks", value_name = "N")]
    ranks: Option<usize>,
    /// Element type; f32 on the host, bf16 on GPUs, if none is named
    #[arg(long, value_parser = dtype)]
    dtype: Option<DType>,
    /// Reduction: sum, prod, min, max, avg, premul_sum:2.5, bit_and, bit_or, bit_xor
    #[arg(long, default_value = "sum", value_parser = reduction)]
    op: ReduceOp,
    /// Sizes in bytes per rank, separated by commas [for example 8,4KiB,64MiB]
    #[arg(long, value_delimiter = ',', value_name = "SIZES", value_parser = size)]
    sizes: Vec<usize>,
    /// Rows of all_reduce_rms_norm (1 to 4096 if none are named) or tokens of each rank in moe (128 and 512), separated by commas
    #[arg(long, value_delimiter = ',', value_name = "ROWS")]
    tokens: Vec<usize>,
    /// Elements of a row of all_reduce_rms_norm (8192 if not given) or of a token in moe (1024)
    #[arg(long, value_name = "ELEMENTS")]
    hidden: Option<usize>,
    /// What all_reduce_rms_norm writes
    #[arg(long, value_name = "OUTPUT", default_value = "same")]
    output: rows::Output,
    #[command(flatten)]
    moe: moe::Options,
    /// Put the buffers into windows, which peers read in place
    #[arg(long)]
    windows: bool,
    /// Let the result replace the input
    #[arg(long)]
    in_place: bool,
    /// Put a barrier before every call, and time single calls
    #[arg(long)]
    synchronised: bool,
    /// How long to measure each size; 250ms if not given, 50ms in moe
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    time: Option<Duration>,
    /// Leave it to the system on which processors the ranks run; otherwise each is bound to its own, if there are enough
    #[arg(long)]
    no_bind: bool,
    /// Be a rank of a benchmark: how the command calls itself
    #[arg(long, hide = true)]
    as_rank: bool,
}

fn dtype(text: &str) -> Result<DType, String> {
    text.parse::<DType>().map_err(|error| error.to_string())
}

fn reduction(text: &str) -> Result<ReduceOp, String> {
    text.parse::<ReduceOp>().map_err(|error| error.to_string())
}

pub(crate) fn size(text: &str) -> Result<usize, String> {
    settings::parse_size(text)
        .and_then(|size| usize::try_from(size).ok())
        .ok_or_else(|| "expected a size such as 8, 4KiB or 64MiB".to_owned())
}

fn duration(text: &str) -> Result<Duration, String> {
    settings::parse_duration(text).ok_or_else(|| "expected a duration such as 250ms or 2s".to_owned())
}

/// Runs the benchmark and answers the exit code.
pub(crate) fn execute(arguments: &Arguments, common: &Common) -> Result<u8, Failure> {
    let workload = Workload::new(arguments)?;
    if arguments.as_rank {
        let run = match workload.place {
            _ if workload.has_moe() => moe::run,
            Place::Cuda => gpu::run,
            Place::Host => rank::run,
        };
        return run(&workload).map(|()| 0).map_err(Failure::new);
    }
    if workload.against.is_some() {
        // Whether it is there is known before anything is measured.
        nccl::Library::find().map_err(Failure::new)?;
    }
    // On GPUs a rank's own threads need processors too, those of NCCL among them.
    let bind = !arguments.no_bind && workload.place == Place::Host;
    let mut started = Ranks::start(workload.ranks, ranks::own_arguments()?, bind)?;
    let mut report = Report::new(&workload, common, started.is_bound());
    for line in BufReader::new(started.take_output()?).lines() {
        let line = line.map_err(|error| Failure::new(format!("rank 0 cannot be read: {error}")))?;
        match serde_json::from_str(&line) {
            Ok(Line::Ready { sizes }) => report.begin(sizes),
            Ok(Line::Gpus(gpus)) => report.set_gpus(gpus),
            Ok(Line::Size(measured)) => report.add(measured),
            Ok(Line::GpuSize(measured)) => report.add_gpu(*measured),
            Ok(Line::Rows(measured)) => report.add_rows(measured),
            Ok(Line::Moe(measured)) => report.add_moe(measured),
            // Not ours: whatever a library of the rank printed.
            Err(_) => report.print(&line),
        }
    }
    let failed = started.wait();
    let code = report.conclude(failed.is_none());
    if let Some(failure) = failed {
        let message = format!("the benchmark failed {failure}");
        return Err(Failure { message, exit_code: EXIT_WRONG });
    }
    report.write_json(common)?;
    Ok(code)
}
