//! What is measured, as the arguments say and this machine can: the same in the parent and on every rank.

use std::time::Duration;

use unisono::{DType, ReduceOp, cuda, quantised};

use super::moe::Moe;
use super::rows::Output;
use super::{Arguments, Operation, Place, Rival};
use crate::Failure;

/// Sizes that are measured when none are named.
const DEFAULT_SIZES: [usize; 11] =
    [8, 64, 512, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 512 << 10, 4 << 20, 16 << 20, 64 << 20];

/// The same on GPUs.
const DEFAULT_GPU_SIZES: [usize; 11] =
    [8, 1 << 10, 8 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20, 1 << 30];

/// Rows that are normalised when none are named.
const DEFAULT_ROWS: [usize; 11] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096];

/// What every rank does.
#[derive(Debug)]
pub(super) struct Workload {
    pub(super) place: Place,
    /// Devices of this host; none where the host itself is measured.
    pub(super) devices: usize,
    pub(super) against: Option<Rival>,
    pub(super) ranks: usize,
    pub(super) operations: Vec<Operation>,
    pub(super) sizes: Vec<usize>,
    /// Of `all_reduce_rms_norm`.
    pub(super) rows: Rows,
    pub(super) moe: Moe,
    pub(super) dtype: DType,
    pub(super) op: ReduceOp,
    pub(super) windows: bool,
    pub(super) in_place: bool,
    pub(super) synchronised: bool,
    pub(super) time_per_size: Duration,
    pub(super) least_batches: usize,
}

/// Which rows are normalised.
#[derive(Debug)]
pub(super) struct Rows {
    pub(super) tokens: Vec<usize>,
    pub(super) hidden: usize,
    pub(super) output: Output,
}

impl Workload {
    pub(super) fn new(arguments: &Arguments) -> Result<Self, Failure> {
        let operations = match arguments.operations.as_slice() {
            [] => Operation::DEFAULT.to_vec(),
            named => named.to_vec(),
        };
        let (place, devices) = place(arguments.device)?;
        let sizes = match (arguments.sizes.as_slice(), place) {
            ([], Place::Host) => DEFAULT_SIZES.to_vec(),
            ([], Place::Cuda) => DEFAULT_GPU_SIZES.to_vec(),
            (named, _) => named.to_vec(),
        };
        let is_moe = operations.contains(&Operation::Moe);
        let usual = if place == Place::Cuda || is_moe { DType::BF16 } else { DType::F32 };
        let ranks = arguments.ranks.unwrap_or(if place == Place::Cuda { devices } else { 2 });
        let tokens = match arguments.tokens.as_slice() {
            [] => DEFAULT_ROWS.to_vec(),
            named => named.to_vec(),
        };
        let usual_time = Duration::from_millis(if is_moe { 50 } else { 250 });
        let workload = Self {
            place,
            devices,
            against: arguments.against,
            ranks,
            operations,
            sizes,
            rows: Rows { tokens, hidden: arguments.hidden.unwrap_or(8192), output: arguments.output },
            moe: Moe::new(arguments, ranks),
            dtype: arguments.dtype.unwrap_or(usual),
            op: arguments.op,
            windows: arguments.windows,
            in_place: arguments.in_place,
            synchronised: arguments.synchronised,
            time_per_size: arguments.time.unwrap_or(usual_time),
            least_batches: if place == Place::Cuda { 5 } else { 10 },
        };
        workload.check()?;
        Ok(workload)
    }

    fn check(&self) -> Result<(), Failure> {
        let element = self.dtype.size();
        if let Some(size) = self.sizes.iter().find(|size| !size.is_multiple_of(element)) {
            return Err(Failure::new(format!(
                "{size} bytes are no whole number of {} ({element} bytes each)",
                self.dtype
            )));
        }
        let two_sided = |operation: &&Operation| matches!(operation, Operation::Gather | Operation::Scatter);
        if let (true, Some(operation)) = (self.in_place, self.operations.iter().find(two_sided)) {
            return Err(Failure::new(format!("{} has no form in place", operation.name())));
        }
        if self.reduces() {
            unisono::reduce_op::check(self.dtype, self.op)
                .map_err(|error| Failure::new(error.to_string()))?;
        }
        if self.quantises() {
            self.check_quantised()?;
        }
        if self.has_rows() {
            self.check_rows()?;
        }
        if self.has_moe() {
            self.moe.check(self)?;
        }
        match self.place {
            Place::Cuda => self.check_gpus(),
            Place::Host if self.against.is_some() => {
                Err(Failure::new("NCCL works on GPUs: --against nccl needs --device cuda"))
            }
            Place::Host => Ok(()),
        }
    }

    /// Whether rows are normalised, and nothing else is measured.
    pub(super) fn has_rows(&self) -> bool {
        self.operations.contains(&Operation::AllReduceRmsNorm)
    }

    /// Whether a sum is quantised.
    pub(super) fn quantises(&self) -> bool {
        self.operations.contains(&Operation::AllReduceQuantised)
    }

    fn check_quantised(&self) -> Result<(), Failure> {
        let name = Operation::AllReduceQuantised.name();
        if !quantised::is_quantised(self.dtype) {
            return Err(Failure::new(format!("{name} takes f16, bf16 or f32, not {}", self.dtype)));
        }
        if self.op != ReduceOp::Sum {
            return Err(Failure::new(format!("{name} sums: --op {} is for other operations", self.op)));
        }
        Ok(())
    }

    /// Whether expert parallelism is measured, and nothing else.
    pub(super) fn has_moe(&self) -> bool {
        self.operations.contains(&Operation::Moe)
    }

    fn check_rows(&self) -> Result<(), Failure> {
        let name = Operation::AllReduceRmsNorm.name();
        if self.place == Place::Host {
            return Err(Failure::new(format!(
                "{name} is measured on GPUs, and there are none, or --device host was asked for"
            )));
        }
        if self.operations.len() > 1 || self.against.is_some() {
            return Err(Failure::new(format!(
                "{name} is measured by tokens and beside its own parts: name no other operation and no --against"
            )));
        }
        if !matches!(self.dtype, DType::F16 | DType::BF16) {
            return Err(Failure::new(format!("{name} takes f16 or bf16, not {}", self.dtype)));
        }
        let hidden = self.rows.hidden;
        if !hidden.is_multiple_of(8) || !(8..=24_576).contains(&hidden) {
            return Err(Failure::new(format!(
                "--hidden takes a multiple of 8 from 8 to 24576, not {hidden}"
            )));
        }
        Ok(())
    }

    fn check_gpus(&self) -> Result<(), Failure> {
        let of_the_host = [
            (self.windows, "--windows"),
            (self.in_place && !self.has_rows(), "--in-place"),
            (self.synchronised, "--synchronised"),
        ];
        if let Some((_, option)) = of_the_host.iter().find(|(is_asked, _)| *is_asked) {
            return Err(Failure::new(format!("{option} is for the host: add --device host")));
        }
        if self.against.is_some() && self.ranks > self.devices {
            return Err(Failure::new(format!(
                "NCCL takes one device for each rank, and these are {} ranks on {} devices",
                self.ranks, self.devices
            )));
        }
        Ok(())
    }

    /// Whether anything is reduced; beside a quantised sum the plain one is.
    pub(super) fn reduces(&self) -> bool {
        self.quantises() || self.operations.iter().any(|operation| operation.reduces())
    }
}

/// Where to measure, and how many devices there are.
pub(crate) fn place(asked: Option<Place>) -> Result<(Place, usize), Failure> {
    if asked == Some(Place::Host) {
        return Ok((Place::Host, 0));
    }
    match cuda::driver::device_count() {
        Ok(count) => Ok((Place::Cuda, count as usize)),
        Err(_) if asked.is_none() => Ok((Place::Host, 0)),
        Err(error) => Err(Failure::new(format!("--device cuda: {error}"))),
    }
}
