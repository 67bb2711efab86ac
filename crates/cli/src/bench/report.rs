//! What the parent shows and keeps: the table on standard output, the progress bar on standard error, the JSON in the end.

use std::io::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use indicatif::ProgressBar;

use super::gpu_record::{Gpus, OnGpu};
use super::moe::OnMoe;
use super::record::{Machine, Measured, Results, Run};
use super::rows::OnRows;
use super::workload::Workload;
use super::{EXIT_WRONG, Place, gpu_table, moe, rows, table};
use crate::output::progress_bar;
use crate::{Common, Failure};

/// The table, the bar, and what was measured.
pub(super) struct Report<'a> {
    workload: &'a Workload,
    quiet: bool,
    is_bound: bool,
    bar: ProgressBar,
    gpus: Option<Gpus>,
    results: Vec<Measured>,
    gpu_results: Vec<OnGpu>,
    row_results: Vec<OnRows>,
    moe_results: Vec<OnMoe>,
}

impl<'a> Report<'a> {
    pub(super) fn new(workload: &'a Workload, common: &Common, is_bound: bool) -> Self {
        // With JSON on standard output, the table would spoil it.
        let quiet = common.quiet || matches!(common.json, Some(crate::output::Target::Stdout));
        Self {
            workload,
            quiet,
            is_bound,
            bar: ProgressBar::hidden(),
            gpus: None,
            results: Vec::new(),
            gpu_results: Vec::new(),
            row_results: Vec::new(),
            moe_results: Vec::new(),
        }
    }

    pub(super) fn begin(&mut self, sizes: u64) {
        self.bar = progress_bar(sizes, self.quiet);
    }

    /// What the GPUs are, before the first size.
    pub(super) fn set_gpus(&mut self, gpus: Gpus) {
        self.print(&format!("{}\n", gpu_table::opening(&gpus)));
        self.gpus = Some(gpus);
    }

    pub(super) fn add(&mut self, measured: Measured) {
        if self.results.last().is_none_or(|last| last.operation != measured.operation) {
            let blank = if self.results.is_empty() { "" } else { "\n" };
            self.print(&format!("{blank}{}", table::heading(&self.title(&measured.operation))));
        }
        self.print(&table::row(&measured));
        self.bar.inc(1);
        self.results.push(measured);
    }

    pub(super) fn add_gpu(&mut self, measured: OnGpu) {
        let against = self.workload.against.map(|_| "NCCL");
        let rival = if measured.plain.is_some() { Some("plain") } else { against };
        if self.gpu_results.last().is_none_or(|last| last.operation != measured.operation) {
            let blank = if self.gpu_results.is_empty() { "" } else { "\n" };
            let heading = gpu_table::heading(&self.title(&measured.operation), rival);
            self.print(&format!("{blank}{heading}"));
            if let Some(reason) = &measured.nccl_lacks {
                self.print(reason);
            }
        }
        self.print(&gpu_table::row(&measured, rival.is_some()));
        self.bar.inc(1);
        self.gpu_results.push(measured);
    }

    pub(super) fn add_rows(&mut self, measured: OnRows) {
        if self.row_results.is_empty() {
            let title = self.title("all_reduce_rms_norm");
            let title = format!("{title} · rows of {} to {}", measured.hidden, measured.output);
            self.print(&rows::heading(&title));
        }
        self.print(&rows::row(&measured));
        self.bar.inc(1);
        self.row_results.push(measured);
    }

    pub(super) fn add_moe(&mut self, measured: OnMoe) {
        if self.moe_results.is_empty() {
            let title = format!("{} · {}", self.title("moe"), self.workload.moe.title());
            self.print(&moe::heading(&title));
        }
        self.print(&moe::row(&measured));
        self.bar.inc(1);
        self.moe_results.push(measured);
    }

    /// `all_reduce f32 sum · 2 processes · shared memory`.
    fn title(&self, operation: &str) -> String {
        let (dtype, op, ranks) = (self.workload.dtype, self.workload.op, self.workload.ranks);
        let what = match operation {
            "all_reduce" | "reduce_scatter" | "reduce" => format!("{operation} {dtype} {op}"),
            "barrier" => operation.to_owned(),
            _ => format!("{operation} {dtype}"),
        };
        let noun = if ranks == 1 { "process" } else { "processes" };
        let memory = match self.workload.place {
            Place::Cuda => "GPUs",
            Place::Host if self.workload.windows => "shared memory, windows",
            Place::Host => "shared memory",
        };
        let mut title = format!("{what} · {ranks} {noun} · {memory}");
        if self.is_bound && ranks > 1 {
            title += ", a core each";
        }
        if self.workload.in_place {
            title += " · in place";
        }
        if self.workload.synchronised {
            title += " · a barrier before each call";
        }
        title
    }

    pub(super) fn print(&self, line: &str) {
        if !self.quiet {
            self.bar.suspend(|| {
                // Whoever closed our output does not want the rest.
                let _ = writeln!(anstream::stdout(), "{line}");
            });
        }
    }

    /// The exit code, and the last line if all is done.
    pub(super) fn conclude(&self, is_complete: bool) -> u8 {
        self.bar.finish_and_clear();
        let wrong = match self.workload.place {
            Place::Host => self.results.iter().filter(|measured| measured.wrong > 0).count(),
            Place::Cuda => {
                let sizes = self.gpu_results.iter().filter(|measured| measured.is_wrong()).count();
                sizes + self.row_results.iter().filter(|measured| measured.wrong > 0).count()
            }
        };
        let wrong = wrong + self.moe_results.iter().filter(|measured| measured.wrong > 0).count();
        if is_complete {
            let of_hosts = self.results.len() + self.moe_results.len();
            let sizes = of_hosts + self.gpu_results.len() + self.row_results.len();
            self.print(&format!("\n{}", table::footer(sizes, wrong)));
        }
        if wrong > 0 { EXIT_WRONG } else { 0 }
    }

    pub(super) fn write_json(self, common: &Common) -> Result<(), Failure> {
        let Some(target) = &common.json else { return Ok(()) };
        let place = match self.workload.place {
            Place::Cuda => "cuda",
            Place::Host if self.workload.windows => "windows",
            Place::Host => "plain",
        };
        let results = match self.workload.place {
            _ if !self.moe_results.is_empty() => Results::Moe(self.moe_results),
            Place::Host => Results::Host(self.results),
            Place::Cuda if !self.row_results.is_empty() => Results::Rows(self.row_results),
            Place::Cuda => Results::Gpu(self.gpu_results),
        };
        let run = Run {
            command: std::env::args().collect::<Vec<_>>().join(" "),
            version: env!("CARGO_PKG_VERSION"),
            unix_time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            machine: Machine::here(),
            gpus: self.gpus,
            ranks: self.workload.ranks,
            place: place.to_owned(),
            dtype: self.workload.dtype.to_string(),
            op: self.workload.op.to_string(),
            bound: self.is_bound,
            in_place: self.workload.in_place,
            synchronised: self.workload.synchronised,
            results,
        };
        target.write(&run)
    }
}
