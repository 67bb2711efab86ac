//! The part of `unisono tune` that is about GPUs: on how many, what is measured, and what is printed and kept of it.

use anstyle::Style;
use serde::Serialize;
use unisono::tuning::DIRECT_FORMS;
use unisono::tuning::device::Table;

use super::{Arguments, Named, forms, gpu};
use crate::Failure;
use crate::bench::{self, Operation, Place};
use crate::output::progress_bar;

/// What was found for one number of ranks on GPUs.
#[derive(Serialize)]
pub(super) struct World {
    pub(super) gpus: usize,
    operations: Vec<Measured>,
    #[serde(skip)]
    pub(super) table: Table,
}

#[derive(Serialize)]
struct Measured {
    operation: &'static str,
    measured: Vec<forms::Measured>,
    borders: Vec<Named>,
    /// The line of the tuning file.
    row: String,
}

/// How many GPUs to measure on, and their name; `None` where that was not asked for and cannot be.
pub(super) fn find(arguments: &Arguments) -> Result<Option<(usize, String)>, Failure> {
    let asked = if arguments.forms.is_empty() { arguments.device } else { Some(Place::Cuda) };
    let (_, devices) = bench::place(asked)?;
    let devices = devices.min(unisono::gpu::MAX_RANKS);
    let is_asked = asked == Some(Place::Cuda);
    if devices == 0 && !is_asked {
        return Ok(None);
    }
    let most = arguments.ranks.iter().find(|ranks| is_asked && **ranks > devices);
    let found = match (devices, most) {
        (0 | 1, _) => Err("a single GPU has nothing to choose: tables are for two GPUs or more".to_owned()),
        (_, Some(ranks)) => {
            Err(format!("each rank takes a GPU of its own, and these are {ranks} ranks on {devices} GPUs"))
        }
        _ => gpu::name_of(devices).map_err(|error| error.to_string()),
    };
    match found {
        Ok(name) => Ok(Some((devices, name))),
        Err(reason) if is_asked => Err(Failure::new(reason)),
        Err(reason) => {
            tracing::warn!("GPUs are not measured: {reason}");
            Ok(None)
        }
    }
}

/// Those that were named, or all.
fn operations(arguments: &Arguments) -> Vec<Operation> {
    if !arguments.operations.is_empty() {
        return arguments.operations.clone();
    }
    DIRECT_FORMS.iter().filter_map(|kind| super::operation(kind.name()).ok()).collect()
}

/// Prints the times of the forms that were named, on the most GPUs that were.
pub(super) fn sweep(arguments: &Arguments, ranks: &[usize], print: &dyn Fn(&str)) -> Result<u8, Failure> {
    let sizes = match arguments.sizes.as_slice() {
        [] => gpu::sizes().collect(),
        named => named.to_vec(),
    };
    let operations = operations(arguments);
    for ranks in ranks.iter().rev().take(if arguments.ranks.is_empty() { 1 } else { usize::MAX }) {
        gpu::sweep(*ranks, &operations, &sizes, &arguments.forms, print)
            .map_err(|error| Failure::new(format!("the measurement on {ranks} GPUs failed: {error}")))?;
    }
    Ok(0)
}

/// Measures all operations on so many GPUs, and prints the borders of each when it is done.
pub(super) fn measure(
    arguments: &Arguments,
    ranks: usize,
    quiet: bool,
    print: &dyn Fn(&str),
) -> Result<World, Box<dyn std::error::Error>> {
    let operations = operations(arguments);
    let sizes = |operation: &Operation| gpu::table_sizes(*operation, ranks).count() as u64;
    let bar = progress_bar(operations.iter().map(sizes).sum(), quiet);
    let mut world = gpu::World::new(ranks, gpu::table_room())?;
    let mut table = Table::built_in(ranks);
    let mut found = Vec::new();
    let bold = Style::new().bold();
    bar.suspend(|| {
        let names: Vec<&str> = operations.iter().map(|operation| operation.name()).collect();
        print(&format!("{bold}{ranks} GPUs{bold:#} · bf16 in CUDA graphs · {}", names.join(", ")));
        print(&format!("{:<42}{:>10} {:>10}   why", "", "chosen", "default"));
    });
    for operation in operations {
        let times = gpu::measure(&mut world, operation, &|| bar.inc(1))?;
        let (row, borders) = times.row();
        let Some(kind) = operation.kind(unisono::ReduceOp::Sum) else { continue };
        *table.row_mut(kind) = row;
        bar.suspend(|| borders.iter().for_each(|named| print(&named.line())));
        let line = |text: &String| text.contains(&format!(" {} ", operation.name()));
        let row = table.to_text(ranks).lines().map(str::to_owned).find(line).unwrap_or_default();
        found.push(Measured { operation: operation.name(), measured: times.measured(), borders, row });
    }
    bar.finish_and_clear();
    world.end()?;
    print("");
    Ok(World { gpus: ranks, operations: found, table })
}
