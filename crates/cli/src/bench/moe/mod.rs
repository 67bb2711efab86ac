//! `bench moe`: what is measured of expert parallelism, as data and as lines of the table. `rank.rs` measures.

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::table::{HEADING, WRONG, bandwidth, time};
use super::workload::Workload;
use super::{Arguments, Place};
use crate::Failure;

mod gpu;
mod gpu_low_latency;
mod rank;
mod tokens;

/// Runs the workload as the rank that the environment says.
pub(super) fn run(workload: &Workload) -> Result<(), String> {
    match workload.place {
        Place::Cuda => gpu::run(workload),
        Place::Host => rank::run(workload),
    }
}

/// Tokens that are measured when none are named.
const TOKENS: [usize; 2] = [128, 512];
/// The same for elements of one.
const HIDDEN: usize = 1024;

/// How tokens choose experts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum Distribution {
    /// All experts alike
    Uniform,
    /// Expert e about as often as 1 / (e + 1)
    Skewed,
    /// One expert by every token, the others alike
    OneHot,
}

/// The arguments of `bench moe`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// Experts of a token in moe
    #[arg(long, value_name = "K", default_value_t = 8)]
    top_k: usize,
    /// Experts of all ranks in moe; 32 for each rank if not given
    #[arg(long, value_name = "E")]
    experts: Option<usize>,
    /// How tokens choose experts in moe
    #[arg(long, value_name = "DISTRIBUTION", default_value = "uniform")]
    distribution: Distribution,
    /// Multiprocessors that a call of moe takes on a GPU
    #[arg(long, value_name = "N", default_value_t = 12)]
    multiprocessors: u32,
}

/// What every rank does.
#[derive(Clone, Debug)]
pub(crate) struct Moe {
    tokens: Vec<usize>,
    hidden: usize,
    top_k: usize,
    experts: usize,
    distribution: Distribution,
    multiprocessors: u32,
}

impl Moe {
    pub(super) fn new(arguments: &Arguments, ranks: usize) -> Self {
        let Options { top_k, experts, distribution, multiprocessors } = arguments.moe;
        let tokens = if arguments.tokens.is_empty() { TOKENS.to_vec() } else { arguments.tokens.clone() };
        let hidden = arguments.hidden.unwrap_or(HIDDEN);
        Self { tokens, hidden, top_k, experts: experts.unwrap_or(32 * ranks), distribution, multiprocessors }
    }

    /// Whether it can be measured: what a buffer refuses is refused before ranks are started.
    pub(super) fn check(&self, workload: &Workload) -> Result<(), Failure> {
        if workload.operations.len() > 1 || workload.against.is_some() {
            return Err(Failure::new("moe is measured by tokens: name no other operation and no --against"));
        }
        if self.top_k > self.experts {
            let (top_k, experts) = (self.top_k, self.experts);
            return Err(Failure::new(format!(
                "{experts} experts are too few for the best {top_k} of a token"
            )));
        }
        for tokens in &self.tokens {
            let settings = self.settings(*tokens, workload.dtype);
            settings.bytes(workload.ranks).map_err(|error| Failure::new(error.to_string()))?;
        }
        Ok(())
    }

    /// Lines of the table.
    pub(super) fn lines(&self) -> usize {
        self.tokens.iter().map(|tokens| if rank::has_low_latency(*tokens) { 6 } else { 4 }).sum()
    }

    /// `rows of 1024 · top-8 of 256 experts, uniform`.
    pub(super) fn title(&self) -> String {
        let Self { hidden, top_k, experts, .. } = self;
        let distribution = self.distribution();
        format!("rows of {hidden} · top-{top_k} of {experts} experts, {distribution}")
    }

    fn distribution(&self) -> String {
        self.distribution.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// One operation with one number of tokens.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct OnMoe {
    /// `dispatch`, `dispatch_fp8`, `dispatch_cached`, `combine`, `low_latency_dispatch_fp8`, `low_latency_combine`; on GPUs also `layout`,
    /// `dispatch_fp8_cached`, `dispatch_eager`, where the host waits for the number of rows, `combine_copied`, of results outside of the pool, and
    /// low-latency calls in halves: `…_send` and `…_receive`.
    pub(crate) operation: String,
    /// Of each rank.
    pub(crate) tokens: u64,
    pub(crate) hidden: u64,
    pub(crate) top_k: u64,
    pub(crate) experts: u64,
    pub(crate) distribution: String,
    /// Rows that come to a rank, those of its own tokens too: selections in low-latency mode. Mean over ranks.
    pub(crate) rows: f64,
    /// Bytes that a rank sends to others. Mean over ranks.
    pub(crate) wire_bytes: f64,
    pub(crate) calls: u64,
    /// Microseconds per call: percentiles over calls of the slowest rank.
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) min_us: f64,
    /// GB/s as others count: all rows that come to a rank, over p50.
    pub(crate) gbps: f64,
    /// Multiprocessors that it took; none on the host.
    pub(crate) multiprocessors: Option<u32>,
    /// Elements that were wrong, over all ranks.
    pub(crate) wrong: u64,
}

/// The title, and the names of the columns.
pub(super) fn heading(title: &str) -> String {
    format!(
        "{HEADING}{title}{HEADING:#}\n{:>8}  {:<24} {:>4} {:>9} {:>11} {:>11} {:>11} {:>9}  {}",
        "tokens", "operation", "SMs", "rows", "wire bytes", "p50", "p99", "GB/s", "ok"
    )
}

/// One line.
pub(super) fn row(measured: &OnMoe) -> String {
    let ok = match measured.wrong {
        0 => "ok".to_owned(),
        wrong => format!("{WRONG}{wrong} WRONG{WRONG:#}"),
    };
    format!(
        "{:>8}  {:<24} {:>4} {:>9.0} {:>11} {:>11} {:>11} {:>9}  {ok}",
        measured.tokens,
        measured.operation,
        measured.multiprocessors.map_or_else(|| "-".to_owned(), |count| count.to_string()),
        measured.rows,
        unisono::settings::format_size(measured.wire_bytes as u64),
        time(measured.p50_us),
        time(measured.p99_us),
        bandwidth(measured.gbps),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_below_their_names_and_what_is_wrong_is_said() {
        let measured = OnMoe {
            operation: "low_latency_dispatch_fp8".into(),
            tokens: 512,
            hidden: 1024,
            top_k: 8,
            experts: 256,
            distribution: "uniform".into(),
            rows: 2711.4,
            wire_bytes: 4_858_000.0,
            calls: 30,
            p50_us: 812.4,
            p99_us: 1234.5,
            min_us: 800.0,
            gbps: 6.83,
            multiprocessors: None,
            wrong: 0,
        };
        let plain = |text: &str| anstream::adapter::strip_str(text).to_string();
        let (heading, line) = (plain(&heading("x")), plain(&row(&measured)));
        let columns = heading.lines().nth(1).unwrap();
        assert_eq!(columns.chars().count(), line.chars().count(), "{columns}\n{line}");
        assert!(line.contains("2711") && line.contains("812.4 µs"), "{line}");
        assert!(plain(&row(&OnMoe { wrong: 3, ..measured })).ends_with("3 WRONG"));
    }
}
