//! Rows on GPUs: an all-reduce with residual and norm in one kernel, or with one kernel for all that follows it. See
//! `kernels/fused.cuh`.

use smallvec::SmallVec;
use unisono_core::ReduceOp;
use unisono_core::call::{self, Kind};
use unisono_core::device::select::Question;
use unisono_core::device::{Form, Launch};
use unisono_core::fused::NormOutput;
use unisono_cuda::{Function, Grid, Stream};

use super::args::{FusedArgs, HEADER_LAUNCH, Rows};
use super::{Gpu, launch_word};
use crate::collectives::Plan;
use crate::error::Result;

/// The most blocks of the kernel behind an all-reduce: none waits, so these are as many as a device has at once.
const BEHIND_BLOCKS: u32 = 1056;
const THREADS: u32 = 256;

impl Gpu {
    /// Puts a call on rows, of which there are some, into `stream`.
    pub(super) fn launch_rows(&mut self, plan: &Plan, stream: &Stream) -> Result<()> {
        let Kind::AllReduceRmsNorm { hidden, epsilon, output, is_in_place } = plan.header.kind else {
            unreachable!("{} has no rows", plan.header.kind.name())
        };
        self.begin(plan, stream)?;
        let windows: SmallVec<[_; 6]> = plan.buffers().filter_map(|(_, window)| window).collect();
        let mut is_captured = self.keep_if_captured([None; 2], stream)?;
        for window in &windows {
            is_captured |= self.keep_if_captured([Some(*window), None], stream)?;
        }
        // As our kernels call them, wherever they lie.
        let rank = self.args.rank as usize;
        let mut at = [0; 6];
        for (at, (ptr, window)) in at.iter_mut().zip(plan.buffers()) {
            *at = self.windows.address(rank, ptr as u64, window);
        }
        let [input, residual, residual_out, weight, to, scale] = at;
        let count = plan.count / hidden as usize;
        let kind = u32::from(output.code());
        let rows = Rows {
            residual,
            residual_out,
            weight,
            output: to,
            scale,
            rows: count as u32,
            hidden,
            epsilon,
            kind,
        };
        match self.rules.decide_rows(count, hidden as usize) {
            Some(launch) => self.launch_packets(plan, (input, rows), (launch, is_captured), stream)?,
            // The sum needs a place that is as large, and written anyhow.
            None if output == NormOutput::Same => {
                self.launch_behind(plan, (input, rows), rows.output, stream)?
            }
            None if !is_in_place => self.launch_behind(plan, (input, rows), rows.residual_out, stream)?,
            None => {
                let (most, launch) = self.rules.two_shot_rows(hidden as usize);
                for first in (0..count).step_by(most) {
                    let (input, part) = part(input, rows, (first, most.min(count - first)), output);
                    self.launch_packets(plan, (input, part), (launch, is_captured), stream)?;
                }
            }
        }
        // What waits for one that the host touches waits for all of them.
        let hosted = windows.into_iter().find(|window| self.windows.touched([Some(*window), None]).is_some());
        self.conclude([hosted, None], stream, is_captured)
    }

    /// What a call on `bytes` of rows takes, or begins with: everything in one kernel, or the all-reduce.
    pub(super) fn decide_rows(&self, (bytes, size): (usize, usize), hidden: usize) -> Launch {
        let sum = Question { kind: Kind::AllReduce { op: ReduceOp::Sum }, bytes, size, is_reachable: false };
        let rows = bytes / (hidden * size).max(1);
        self.rules.decide_rows(rows, hidden.max(1)).unwrap_or_else(|| self.rules.decide(&sum))
    }

    /// All in one kernel.
    fn launch_packets(
        &mut self,
        plan: &Plan,
        (input, rows): (u64, Rows),
        (launch, is_captured): (Launch, bool),
        stream: &Stream,
    ) -> Result<()> {
        let rank = self.args.rank as usize;
        let args = &mut self.args;
        args.header[..call::HEADER_WORDS].copy_from_slice(&plan.header.to_words());
        args.header[HEADER_LAUNCH] = launch_word(launch);
        args.bytes = u64::from(rows.rows) * u64::from(rows.hidden) * plan.dtype.size() as u64;
        (args.tile, args.root, args.is_same) = (0, 0, 0);
        (args.sources[rank], args.targets[rank]) = (input, rows.residual_out);
        let grid = self.grid((launch.blocks + 1, launch.threads), 0);
        let Some(kernels) = self.kernels.find(plan.header.kind, plan.dtype).and_then(|loaded| loaded.rows())
        else {
            unreachable!("kernels of rows are loaded before")
        };
        let kernel = if launch.form == Form::OneShot { &kernels.one_shot } else { &kernels.two_shot };
        let launched = run(kernel, FusedArgs { args: self.args, rows }, grid, stream);
        launched.map_err(|error| self.refused(error))?;
        self.count_call(is_captured);
        Ok(())
    }

    /// The sum by a kernel of its own, to `sums`, and a second kernel for all else.
    fn launch_behind(
        &mut self,
        plan: &Plan,
        (input, rows): (u64, Rows),
        sums: u64,
        stream: &Stream,
    ) -> Result<()> {
        let at = |address: u64| std::ptr::with_exposed_provenance_mut(address as usize);
        let sum = plan.sum_of_rows(at(input), at(sums));
        // Peers compare the whole call.
        self.launch(&sum, &plan.header.to_words(), stream)?;
        let mut args = self.args;
        args.sources[args.rank as usize] = sums;
        let grid = self.grid((rows.rows.min(BEHIND_BLOCKS), THREADS), 0);
        let Some(kernels) = self.kernels.find(plan.header.kind, plan.dtype).and_then(|loaded| loaded.rows())
        else {
            unreachable!("kernels of rows are loaded before")
        };
        let launched = run(&kernels.behind, FusedArgs { args, rows }, grid, stream);
        launched.map_err(|error| self.refused(error))
    }
}

/// `number` rows from row `first` on.
fn part(input: u64, rows: Rows, (first, number): (usize, usize), output: NormOutput) -> (u64, Rows) {
    let elements = (first * rows.hidden as usize) as u64;
    let output_size = if output == NormOutput::Same { 2 } else { 1 };
    let scale = if output == NormOutput::Fp8PerToken { 4 * first as u64 } else { 0 };
    let part = Rows {
        residual: rows.residual + 2 * elements,
        residual_out: rows.residual_out + 2 * elements,
        output: rows.output + output_size * elements,
        scale: rows.scale + scale,
        rows: number as u32,
        ..rows
    };
    (input + 2 * elements, part)
}

fn run(kernel: &Function, mut arguments: FusedArgs, grid: Grid, stream: &Stream) -> unisono_cuda::Result<()> {
    // SAFETY: kernels of rows take `FusedArgs`; what it names lives as long as the communicator, which waits for its kernels before
    // it lets go, and the buffers are valid until the stream has passed, as whoever made the call promised.
    unsafe { kernel.launch(stream, grid, (&raw mut arguments).cast()) }
}
