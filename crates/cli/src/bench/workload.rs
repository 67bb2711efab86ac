//! What is measured, as the arguments say and this machine can: the same in the parent and on every rank.

use std::time::Duration;

use unisono::{DType, ReduceOp, cuda};

use super::{Arguments, Operation, Place, Rival};
use crate::Failure;

/// Sizes that are measured when none are named.
const DEFAULT_SIZES: [usize; 11] =
    [8, 64, 512, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 512 << 10, 4 << 20, 16 << 20, 64 << 20];

/// The same on GPUs.
const DEFAULT_GPU_SIZES: [usize; 11] =
    [8, 1 << 10, 8 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20, 1 << 30];

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
    pub(super) dtype: DType,
    pub(super) op: ReduceOp,
    pub(super) windows: bool,
    pub(super) in_place: bool,
    pub(super) synchronised: bool,
    pub(super) time_per_size: Duration,
    pub(super) least_batches: usize,
}

impl Workload {
    pub(super) fn new(arguments: &Arguments) -> Result<Self, Failure> {
        let (place, devices) = place(arguments.device)?;
        let operations = match arguments.operations.as_slice() {
            [] => Operation::DEFAULT.to_vec(),
            named => named.to_vec(),
        };
        let sizes = match (arguments.sizes.as_slice(), place) {
            ([], Place::Host) => DEFAULT_SIZES.to_vec(),
            ([], Place::Cuda) => DEFAULT_GPU_SIZES.to_vec(),
            (named, _) => named.to_vec(),
        };
        let usual = if place == Place::Cuda { DType::BF16 } else { DType::F32 };
        let workload = Self {
            place,
            devices,
            against: arguments.against,
            ranks: arguments.ranks.unwrap_or(if place == Place::Cuda { devices } else { 2 }),
            operations,
            sizes,
            dtype: arguments.dtype.unwrap_or(usual),
            op: arguments.op,
            windows: arguments.windows,
            in_place: arguments.in_place,
            synchronised: arguments.synchronised,
            time_per_size: arguments.time,
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
        match self.place {
            Place::Cuda => self.check_gpus(),
            Place::Host if self.against.is_some() => {
                Err(Failure::new("NCCL works on GPUs: --against nccl needs --device cuda"))
            }
            Place::Host => Ok(()),
        }
    }

    fn check_gpus(&self) -> Result<(), Failure> {
        let of_the_host = [
            (self.windows, "--windows"),
            (self.in_place, "--in-place"),
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

    /// Whether anything is reduced.
    pub(super) fn reduces(&self) -> bool {
        self.operations.iter().any(|operation| operation.reduces())
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
