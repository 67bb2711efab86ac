//! `unisono topo`: who reaches whom, and how.
//!
//! Started by a launcher (`unisono run -n 4 -- unisono topo`), the ranks meet, tell where they may run, and rank 0 prints
//! the matrix of the job. Without a job it is about this machine: its processors, or N ranks as `unisono run --bind`
//! would place them. Where there are GPUs, a second matrix tells how those of this host reach each other. `--svg` draws all
//! of it.

use std::io::Write as _;

use anstyle::Style;
use clap::Args;
use serde::Serialize;
use unisono::cuda::{Device, Uuid, driver, nvml};
use unisono::launch::Launch;
use unisono::{Communicator, Error, Operations};

use crate::hardware::{self, Hardware, format_set};
use crate::output::{Target, bytes, heading, wrap};
use crate::{Common, Failure};
use gpus::Gpus;
use matrix::{Matrix, Place};

mod gpus;
mod matrix;
mod picture;

/// More processors than this are shown by NUMA node.
const MOST_PROCESSORS: usize = 20;
/// Words in which a rank tells where it may run: its process, the identity of its device, and a bit per processor.
const WORDS: usize = 1 + DEVICE_WORDS + 1024 / 64;
const DEVICE_WORDS: usize = 2;

/// Exit code of arguments that exclude each other.
const EXIT_ARGUMENTS: u8 = 2;

/// The arguments of `unisono topo`.
#[derive(Debug, Args)]
#[command(
    after_help = "self: the rank itself. SHM: shared memory of one NUMA node.\nNUMA: shared memory across NUMA nodes, \
                  where a cache line takes longer.\nBetween GPUs, NV18: 18 NVLinks. PIX, PXB: PCIe switches. PHB: \
                  the host bridge. NODE: between bridges\nof a NUMA node. SYS: between NUMA nodes. In a job, each rank is \
                  shown at the device of its local rank.\n\nThe topology of a running world: unisono run -n 4 -- unisono topo \
                  (or torchrun, mpirun, srun)."
)]
pub(crate) struct Arguments {
    /// Show N ranks on this machine, as unisono run --bind would place them
    #[arg(short = 'n', long = "ranks", value_name = "N", value_parser = crate::run::rank_count)]
    ranks: Option<usize>,
    /// Draw the topology as SVG into FILE, or to standard output
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true, default_missing_value = "-")]
    svg: Option<Target>,
}

/// What is shown, and written as JSON.
#[derive(Serialize)]
struct Document {
    version: &'static str,
    host: String,
    hardware: Hardware,
    interfaces: Vec<hardware::Interface>,
    /// Those of this host, if there are any.
    gpus: Option<Gpus>,
    #[serde(flatten)]
    matrix: Matrix,
}

/// Shows the topology and answers the exit code.
pub(crate) fn execute(arguments: &Arguments, common: &Common) -> Result<u8, Failure> {
    let is_stdout = |target: &Option<Target>| *target == Some(Target::Stdout);
    if is_stdout(&common.json) && is_stdout(&arguments.svg) {
        let message =
            "--json and --svg cannot both go to standard output; give one of them a file".to_owned();
        return Err(Failure { message, exit_code: EXIT_ARGUMENTS });
    }
    let hardware = Hardware::here();
    // Where NVML is missing there is no GPU to be shown.
    let links = || nvml::topology().inspect_err(|error| tracing::debug!("{error}")).unwrap_or_default();
    let (matrix, links, devices) = match (arguments.ranks, Launch::from_env()) {
        (Some(ranks), _) => {
            let links = links();
            let devices = (0..ranks).map(|rank| Some(links.get(rank % links.len().max(1))?.uuid.clone()));
            let devices = devices.collect();
            (planned(ranks, &hardware), links, devices)
        }
        (None, Ok(_)) => match of_job(&hardware).map_err(|error| Failure::new(error.to_string()))? {
            Some((matrix, devices)) => (matrix, links(), devices),
            None => return Ok(0),
        },
        (None, Err(Error::LaunchNothing)) => (of_machine(&hardware), links(), Vec::new()),
        (None, Err(error)) => return Err(Failure::new(error.to_string())),
    };
    let document = Document {
        version: env!("CARGO_PKG_VERSION"),
        host: unisono::host::host().name,
        interfaces: hardware::interfaces(),
        hardware,
        gpus: (!links.is_empty()).then(|| Gpus::new(&links, &devices)),
        matrix,
    };
    if !common.quiet && !is_stdout(&common.json) && !is_stdout(&arguments.svg) {
        for line in document.lines() {
            // Whoever closed our output does not want the rest.
            let _ = writeln!(anstream::stdout(), "{line}");
        }
    }
    common.json.as_ref().map_or(Ok(()), |target| target.write(&document))?;
    if let Some(target) = &arguments.svg {
        target.write_text(&picture::svg(&document.host, &document.matrix, document.gpus.as_ref()))?;
    }
    Ok(0)
}

/// The processors of this machine, or its NUMA nodes where there are many.
fn of_machine(hardware: &Hardware) -> Matrix {
    let places = if hardware.processors.len() <= MOST_PROCESSORS {
        let processors = hardware.processors.iter();
        processors.map(|cpu| Place::new(format!("cpu {}", cpu.id), vec![cpu.id])).collect()
    } else {
        let nodes = hardware.nodes.iter();
        nodes.map(|node| Place::new(format!("node {}", node.id), node.processors.clone())).collect()
    };
    Matrix::new("this machine", places, hardware, &|_, _| true)
}

/// `ranks` ranks on processors of their own, if there are enough.
fn planned(ranks: usize, hardware: &Hardware) -> Matrix {
    let allowed = hardware::allowed();
    let is_bound = allowed.len() >= ranks;
    let on = |rank: usize| if is_bound { vec![allowed[rank]] } else { allowed.clone() };
    let places = (0..ranks).map(|rank| Place::new(format!("rank {rank}"), on(rank))).collect();
    let how = if is_bound { "bound by unisono run --bind" } else { "more than processors, so not bound" };
    Matrix::new(&format!("{ranks} ranks, {how}"), places, hardware, &|_, _| true)
}

/// The job that this process is a rank of, and the identities of the ranks' devices; `None` on all ranks but 0, which says
/// it for all.
fn of_job(hardware: &Hardware) -> unisono::Result<Option<(Matrix, Vec<Option<String>>)>> {
    let communicator = Communicator::from_env()?;
    let mut mine = [0u64; WORDS];
    mine[0] = u64::from(std::process::id());
    if let Some(Uuid(uuid)) = device(communicator.local_rank()) {
        let number = u128::from_le_bytes(uuid);
        mine[1..=DEVICE_WORDS].copy_from_slice(&[number as u64, (number >> 64) as u64]);
    }
    for processor in hardware::allowed() {
        mine[1 + DEVICE_WORDS + processor / 64] |= 1 << (processor % 64);
    }
    let mut all = vec![0u64; WORDS * communicator.world_size()];
    communicator.all_gather_into(&mine, &mut all)?;
    let (rank, topology) = (communicator.rank(), communicator.topology().clone());
    communicator.destroy()?;
    if rank != 0 {
        return Ok(None);
    }
    let place = |(rank, words): (usize, &[u64])| {
        let on = &words[1 + DEVICE_WORDS..];
        let processors = (0..1024).filter(|at| on[at / 64] >> (at % 64) & 1 == 1).collect();
        Place { pid: Some(words[0]), ..Place::new(format!("rank {rank}"), processors) }
    };
    let device = |words: &[u64]| match u128::from(words[2]) << 64 | u128::from(words[1]) {
        0 => None,
        number => Some(Uuid(number.to_le_bytes()).to_string()),
    };
    let places = all.chunks(WORDS).enumerate().map(place).collect();
    let shares_memory = |a, b| topology.link(a, b) != unisono::Link::Network;
    let title = format!("{} ranks of this job", topology.local_ranks(0).len());
    let devices = all.chunks(WORDS).map(device).collect();
    Ok(Some((Matrix::new(&title, places, hardware, &shares_memory), devices)))
}

/// The identity of the device that a program takes which goes by its local rank; none if there is none.
fn device(local_rank: usize) -> Option<Uuid> {
    let count = driver::device_count().ok()?;
    let device = Device::new(local_rank as u32 % count);
    device.inspect_err(|error| tracing::warn!("{error}")).ok().map(|device| device.facts().uuid)
}

impl Document {
    fn lines(&self) -> Vec<String> {
        let mut lines = vec![heading()];
        let mut row = |name: &str, text: &str| {
            let beginnings = std::iter::once(name).chain(std::iter::repeat(""));
            lines.extend(beginnings.zip(wrap(text, 106)).map(|(name, line)| format!("{name:<12}{line}")));
        };
        row("processor", &self.hardware.summary());
        for node in &self.hardware.nodes {
            let memory =
                if node.memory_bytes > 0 { bytes(node.memory_bytes) } else { "memory unknown".to_owned() };
            row(
                &format!("node {}", node.id),
                &format!("processors {}, {memory}", format_set(&node.processors)),
            );
        }
        for cache in &self.hardware.caches {
            row(&cache.name, &format!("{}: {}", bytes(cache.bytes), groups(&cache.shared_by)));
        }
        let interfaces: Vec<String> = self.interfaces.iter().map(ToString::to_string).collect();
        row("interfaces", &interfaces.join(", "));
        for (name, text) in self.gpus.iter().flat_map(Gpus::rows) {
            row(&name, &text);
        }
        let bold = Style::new().bold();
        if let Some(gpus) = &self.gpus {
            let noun = if gpus.gpus.len() == 1 { "GPU" } else { "GPUs" };
            lines.push(format!("\n{bold}{} {noun} of this host{bold:#}", gpus.gpus.len()));
            lines.extend(gpus.lines());
        }
        lines.push(format!("\n{bold}{}{bold:#}", self.matrix.title));
        lines.extend(self.matrix.lines());
        lines
    }
}

/// `0,4 | 1,5 | 2,6 | 3,7`: who shares what; of many the first few.
fn groups(groups: &[Vec<usize>]) -> String {
    const MOST: usize = 8;
    let shown: Vec<String> = groups.iter().take(MOST).map(|group| format_set(group)).collect();
    let rest = groups.len().saturating_sub(MOST);
    let rest = if rest > 0 { format!(" | and {rest} more") } else { String::new() };
    let noun = if groups.len() == 1 { "one, of processors" } else { "of processors" };
    format!("{noun} {}{rest}", shown.join(" | "))
}
