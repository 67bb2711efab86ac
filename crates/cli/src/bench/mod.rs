//! `unisono bench`: spawns its own ranks, lets them meet, measures and verifies, and prints a table.
//!
//! The parent starts itself again as every rank (`bench --as-rank`), with the variables and the secret that
//! `unisono run` gives; rank 0 writes a line per size, which the parent prints. A rank that fails ends the run.

use std::io::{BufRead as _, BufReader, IsTerminal as _, Write as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use unisono::{DType, ReduceOp, settings};

use crate::ranks::{self, Ranks};
use crate::{Common, Failure};
use record::{Line, Machine, Measured, Run};

mod pattern;
mod rank;
mod record;
mod table;

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
    Barrier,
}

impl Operation {
    /// What is measured when nothing is named: the operations that training and inference call most.
    const DEFAULT: [Self; 4] = [Self::AllReduce, Self::Broadcast, Self::AllGather, Self::Barrier];

    const fn reduces(self) -> bool {
        matches!(self, Self::AllReduce | Self::ReduceScatter | Self::Reduce)
    }

    const fn name(self) -> &'static str {
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
            Self::Barrier => "barrier",
        }
    }
}

/// The arguments of `unisono bench`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Bytes are those of one part: what each rank contributes, or gets where it contributes a part to every rank. Times are those of back-to-back calls (batches of 1000 \
                  below 4 KiB): percentiles over batches of the slowest rank. algbw and busbw count as nccl-tests does. send_recv is a round trip between ranks 0 and 1, 2 and 3, and so on."
)]
pub(crate) struct Arguments {
    /// Operations to measure; all_reduce, broadcast, all_gather and barrier if none is named
    #[arg(value_name = "OPERATION")]
    operations: Vec<Operation>,
    /// Number of ranks, as processes of this host
    #[arg(short = 'n', long = "ranks", value_name = "N", default_value_t = 2)]
    ranks: usize,
    /// Element type
    #[arg(long, default_value = "f32", value_parser = dtype)]
    dtype: DType,
    /// Reduction: sum, prod, min, max, avg, premul_sum:2.5, bit_and, bit_or, bit_xor
    #[arg(long, default_value = "sum", value_parser = reduction)]
    op: ReduceOp,
    /// Sizes in bytes per rank, separated by commas [for example 8,4KiB,64MiB]
    #[arg(long, value_delimiter = ',', value_name = "SIZES", value_parser = size)]
    sizes: Vec<usize>,
    /// Put the buffers into windows, which peers read in place
    #[arg(long)]
    windows: bool,
    /// Let the result replace the input
    #[arg(long)]
    in_place: bool,
    /// Put a barrier before every call, and time single calls
    #[arg(long)]
    synchronised: bool,
    /// How long to measure each size
    #[arg(long, value_name = "DURATION", default_value = "250ms", value_parser = duration)]
    time: Duration,
    /// Leave it to the system on which processors the ranks run; otherwise each is bound to its own, if there are enough
    #[arg(long)]
    no_bind: bool,
    /// Be a rank of a benchmark: how the command calls itself
    #[arg(long, hide = true)]
    as_rank: bool,
}

/// Sizes that are measured when none are named.
const DEFAULT_SIZES: [usize; 11] =
    [8, 64, 512, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 512 << 10, 4 << 20, 16 << 20, 64 << 20];

fn dtype(text: &str) -> Result<DType, String> {
    text.parse::<DType>().map_err(|error| error.to_string())
}

fn reduction(text: &str) -> Result<ReduceOp, String> {
    text.parse::<ReduceOp>().map_err(|error| error.to_string())
}

fn size(text: &str) -> Result<usize, String> {
    settings::parse_size(text)
        .and_then(|size| usize::try_from(size).ok())
        .ok_or_else(|| "expected a size such as 8, 4KiB or 64MiB".to_owned())
}

fn duration(text: &str) -> Result<Duration, String> {
    settings::parse_duration(text).ok_or_else(|| "expected a duration such as 250ms or 2s".to_owned())
}

/// What every rank does.
#[derive(Debug)]
struct Workload {
    operations: Vec<Operation>,
    sizes: Vec<usize>,
    dtype: DType,
    op: ReduceOp,
    windows: bool,
    in_place: bool,
    synchronised: bool,
    time_per_size: Duration,
    least_batches: usize,
}

impl Workload {
    fn new(arguments: &Arguments) -> Result<Self, Failure> {
        let operations = match arguments.operations.as_slice() {
            [] => Operation::DEFAULT.to_vec(),
            named => named.to_vec(),
        };
        let sizes = match arguments.sizes.as_slice() {
            [] => DEFAULT_SIZES.to_vec(),
            named => named.to_vec(),
        };
        let element = arguments.dtype.size();
        if let Some(size) = sizes.iter().find(|size| !size.is_multiple_of(element)) {
            return Err(Failure::new(format!(
                "{size} bytes are no whole number of {} ({element} bytes each)",
                arguments.dtype
            )));
        }
        let two_sided = |operation: &&Operation| matches!(operation, Operation::Gather | Operation::Scatter);
        if let (true, Some(operation)) = (arguments.in_place, operations.iter().find(two_sided)) {
            return Err(Failure::new(format!("{} has no form in place", operation.name())));
        }
        if operations.iter().any(|operation| operation.reduces()) {
            unisono::reduce_op::check(arguments.dtype, arguments.op)
                .map_err(|error| Failure::new(error.to_string()))?;
        }
        Ok(Self {
            operations,
            sizes,
            dtype: arguments.dtype,
            op: arguments.op,
            windows: arguments.windows,
            in_place: arguments.in_place,
            synchronised: arguments.synchronised,
            time_per_size: arguments.time,
            least_batches: 10,
        })
    }
}

/// Runs the benchmark and answers the exit code.
pub(crate) fn execute(arguments: &Arguments, common: &Common) -> Result<u8, Failure> {
    let workload = Workload::new(arguments)?;
    if arguments.as_rank {
        return rank::run(&workload).map(|()| 0).map_err(Failure::new);
    }
    let mut started = Ranks::start(arguments.ranks, ranks::own_arguments()?, !arguments.no_bind)?;
    let mut report = Report::new(arguments, common, started.is_bound());
    for line in BufReader::new(started.take_output()?).lines() {
        let line = line.map_err(|error| Failure::new(format!("rank 0 cannot be read: {error}")))?;
        match serde_json::from_str(&line) {
            Ok(Line::Ready { sizes }) => report.begin(sizes),
            Ok(Line::Size(measured)) => report.add(measured),
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
    report.write_json(arguments, common)?;
    Ok(code)
}

/// The table on standard output, the progress bar on standard error, and what was measured.
struct Report<'a> {
    arguments: &'a Arguments,
    quiet: bool,
    is_bound: bool,
    bar: ProgressBar,
    results: Vec<Measured>,
}

impl<'a> Report<'a> {
    fn new(arguments: &'a Arguments, common: &Common, is_bound: bool) -> Self {
        // With JSON on standard output, the table would spoil it.
        let quiet = common.quiet || matches!(common.json, Some(crate::output::Target::Stdout));
        Self { arguments, quiet, is_bound, bar: ProgressBar::hidden(), results: Vec::new() }
    }

    fn begin(&mut self, sizes: u64) {
        if std::io::stderr().is_terminal() && !self.quiet {
            self.bar = ProgressBar::new(sizes);
            if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} sizes · {elapsed}") {
                self.bar.set_style(style);
            }
            self.bar.enable_steady_tick(Duration::from_millis(200));
        }
    }

    fn add(&mut self, measured: Measured) {
        if self.results.last().is_none_or(|last| last.operation != measured.operation) {
            let blank = if self.results.is_empty() { "" } else { "\n" };
            self.print(&format!("{blank}{}", table::heading(&self.title(&measured.operation))));
        }
        self.print(&table::row(&measured));
        self.bar.inc(1);
        self.results.push(measured);
    }

    /// `all_reduce f32 sum · 2 processes · shared memory`.
    fn title(&self, operation: &str) -> String {
        let (dtype, op) = (self.arguments.dtype, self.arguments.op);
        let what = match operation {
            "all_reduce" | "reduce_scatter" | "reduce" => format!("{operation} {dtype} {op}"),
            "barrier" => operation.to_owned(),
            _ => format!("{operation} {dtype}"),
        };
        let noun = if self.arguments.ranks == 1 { "process" } else { "processes" };
        let memory = if self.arguments.windows { "shared memory, windows" } else { "shared memory" };
        let mut title = format!("{what} · {} {noun} · {memory}", self.arguments.ranks);
        if self.is_bound && self.arguments.ranks > 1 {
            title += ", a core each";
        }
        if self.arguments.in_place {
            title += " · in place";
        }
        if self.arguments.synchronised {
            title += " · a barrier before each call";
        }
        title
    }

    fn print(&self, line: &str) {
        if !self.quiet {
            self.bar.suspend(|| {
                // Whoever closed our output does not want the rest.
                let _ = writeln!(anstream::stdout(), "{line}");
            });
        }
    }

    fn conclude(&self, complete: bool) -> u8 {
        self.bar.finish_and_clear();
        if complete {
            self.print(&format!("\n{}", table::footer(&self.results)));
        }
        if self.results.iter().any(|measured| measured.wrong > 0) { EXIT_WRONG } else { 0 }
    }

    fn write_json(&self, arguments: &Arguments, common: &Common) -> Result<(), Failure> {
        let Some(target) = &common.json else { return Ok(()) };
        let run = Run {
            command: std::env::args().collect::<Vec<_>>().join(" "),
            version: env!("CARGO_PKG_VERSION"),
            unix_time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            machine: Machine::here(),
            ranks: arguments.ranks,
            place: if arguments.windows { "windows" } else { "plain" }.to_owned(),
            dtype: arguments.dtype.to_string(),
            op: arguments.op.to_string(),
            bound: self.is_bound,
            in_place: arguments.in_place,
            synchronised: arguments.synchronised,
            results: self.results.clone(),
        };
        target.write(&run)
    }
}
