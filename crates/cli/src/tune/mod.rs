//! `unisono tune`: measures here from which size on each algorithm is the faster one, and writes a tuning file.
//!
//! For each number of ranks the command starts itself as these ranks (`tune --as-rank`), which time every size with every
//! algorithm, taking turns ([`rank`]). From the times come the thresholds ([`border`]): the border that loses least
//! over all sizes, and the default where that loses hardly more. `UNISONO_TUNE_FILE` then names the file.
//!
//! On GPUs ([`on_gpus`]) this process drives all ranks itself ([`gpu`]), and times every form with several grids ([`forms`]).

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use anstyle::Style;
use clap::{Args, ValueEnum as _};
use serde::{Deserialize, Serialize};
use unisono::settings::format_size;
use unisono::tuning::device::Wish;
use unisono::tuning::{DIRECT_FORMS, Thresholds, Tuning, machine};
use unisono::{Form, Kind, host, settings};

use crate::bench::{self, Operation, Place};
use crate::output::Target;
use crate::ranks::{Ranks, own_arguments};
use crate::{Common, Failure};
use border::{Border, Point};

mod border;
mod forms;
mod gpu;
mod on_gpus;
mod rank;

/// The arguments of `unisono tune`.
#[derive(Debug, Args)]
#[command(
    after_help = "The file is used by jobs with UNISONO_TUNE_FILE=FILE, the same on all ranks, on machines of this kind.\nRun it \
                  on a machine that does nothing else."
)]
pub(crate) struct Arguments {
    /// Where to write what was measured
    #[arg(value_name = "FILE", default_value = "unisono.tune")]
    file: PathBuf,
    /// Where to measure; on the host, and on GPUs if there are several
    #[arg(long, value_name = "PLACE")]
    device: Option<Place>,
    /// Numbers of ranks to measure [for example 2,4,8]; otherwise powers of two up to the processors, or up to the GPUs
    #[arg(short = 'n', long = "ranks", value_delimiter = ',', value_name = "N", value_parser = rank_count)]
    ranks: Vec<usize>,
    /// On GPUs, operations to measure [for example all_reduce,gather]; otherwise all. Those left out have the defaults
    #[arg(long, value_delimiter = ',', value_name = "OPERATIONS", value_parser = operation)]
    operations: Vec<Operation>,
    /// On GPUs, write no file but print times of these forms, with blocks and vectors of a tile where they are given [for example
    /// two-shot,bulk:24:512]: bytes, form, grid, tile, µs per call, GB/s of the bus
    #[arg(long, value_delimiter = ',', value_name = "FORMS", value_parser = form)]
    forms: Vec<Wish>,
    /// The sizes for --forms, in bytes of a part
    #[arg(long, value_delimiter = ',', value_name = "SIZES", value_parser = size, requires = "forms")]
    sizes: Vec<usize>,
    /// How long to measure each size with each algorithm on the host
    #[arg(long, value_name = "DURATION", default_value = "40ms", value_parser = duration)]
    time: Duration,
    /// Only print; write no file
    #[arg(long)]
    dry_run: bool,
    /// Be a rank: how the command calls itself
    #[arg(long, hide = true)]
    as_rank: bool,
}

fn rank_count(text: &str) -> Result<usize, String> {
    let count = crate::run::rank_count(text)?;
    if count < 2 { Err("a rank that is alone has nothing to choose".to_owned()) } else { Ok(count) }
}

fn operation(text: &str) -> Result<Operation, String> {
    let names = || DIRECT_FORMS.map(|kind| kind.name()).join(", ");
    let known = Operation::from_str(text, false).ok();
    let known = known.filter(|operation| DIRECT_FORMS.iter().any(|kind| kind.name() == operation.name()));
    known.ok_or_else(|| format!("expected one of {}", names()))
}

fn form(text: &str) -> Result<Wish, String> {
    text.parse().map_err(|_| {
        let names = Form::ALL.map(Form::name).join(", ");
        format!("expected one of {names}, and after colons blocks and vectors of a tile")
    })
}

fn size(text: &str) -> Result<usize, String> {
    bench::size(text).and_then(|size| {
        let is_whole = size > 0 && size.is_multiple_of(forms::ELEMENT);
        if is_whole {
            Ok(size)
        } else {
            Err("expected a whole number of bf16 elements, of 2 bytes".to_owned())
        }
    })
}

fn duration(text: &str) -> Result<Duration, String> {
    settings::parse_duration(text)
        .filter(|time| !time.is_zero())
        .ok_or_else(|| "expected a duration such as 40ms or 1s".to_owned())
}

/// What rank 0 writes: one size of one operation. Times are microseconds per call of the slowest rank: the
/// lower quartile over turns, because other work on the machine only ever adds.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
struct Measured {
    operation: String,
    bytes: usize,
    one_shot_us: f64,
    /// Where the operation has it.
    two_shot_us: Option<f64>,
    /// With buffers in windows.
    direct_us: f64,
    /// How much longer than that the median turn took, of the worst algorithm: 1 on a quiet machine.
    spread: f64,
}

/// What was found for one number of ranks.
#[derive(Serialize)]
struct World {
    ranks: usize,
    bound: bool,
    measured: Vec<Measured>,
    borders: Vec<Named>,
}

#[derive(Serialize)]
struct Named {
    name: String,
    #[serde(flatten)]
    border: Border,
}

#[derive(Serialize)]
struct Document {
    version: &'static str,
    machine: String,
    /// Where it was written, if it was.
    file: Option<PathBuf>,
    worlds: Vec<World>,
    /// The name of the GPUs, where they were measured.
    devices: Option<String>,
    gpus: Vec<on_gpus::World>,
}

/// Measures, writes the file and answers the exit code.
pub(crate) fn execute(arguments: &Arguments, common: &Common) -> Result<u8, Failure> {
    if arguments.as_rank {
        return rank::run(arguments.time).map(|()| 0).map_err(|error| Failure::new(error.to_string()));
    }
    let quiet = common.quiet || matches!(common.json, Some(Target::Stdout));
    let print = |line: &str| {
        if !quiet {
            // Whoever closed our output does not want the rest.
            let _ = writeln!(anstream::stdout(), "{line}");
        }
    };
    let (devices, name) = on_gpus::find(arguments)?.unzip();
    let ranks_on_gpus =
        devices.map_or_else(Vec::new, |devices| worlds_to_measure(&arguments.ranks, devices, devices));
    if !arguments.forms.is_empty() {
        return on_gpus::sweep(arguments, &ranks_on_gpus, &print);
    }
    let on_host = arguments.device != Some(Place::Cuda);
    let processors = host::processors().clamp(2, 1024);
    let mut worlds = Vec::new();
    let ranks_on_host =
        if on_host { worlds_to_measure(&arguments.ranks, processors, usize::MAX) } else { Vec::new() };
    for ranks in ranks_on_host {
        let world = measure(ranks)?;
        world.lines().iter().for_each(|line| print(line));
        if world.is_noisy() {
            tracing::warn!(
                "times with {ranks} ranks varied much: other work ran here, so measure again on a quiet machine"
            );
        }
        worlds.push(world);
    }
    let thresholds: BTreeMap<usize, Thresholds> =
        worlds.iter().map(|world| (world.ranks, world.thresholds())).collect();
    let mut tuning = Tuning::new(&machine(), thresholds);
    let mut gpu_worlds = Vec::new();
    for ranks in ranks_on_gpus {
        gpu_worlds.push(
            on_gpus::measure(arguments, ranks, quiet, &print)
                .map_err(|error| Failure::new(format!("the measurement on {ranks} GPUs failed: {error}")))?,
        );
    }
    let devices = name.filter(|_| !gpu_worlds.is_empty());
    if let Some(name) = &devices {
        tuning = tuning.with_gpus(name, gpu_worlds.iter().map(|world| (world.gpus, world.table)).collect());
    }
    if !arguments.dry_run {
        write(arguments, &tuning)?;
        let path = arguments.file.canonicalize().unwrap_or_else(|_| arguments.file.clone());
        print(&format!("written; use it with: export UNISONO_TUNE_FILE={}", path.display()));
    }
    let file = (!arguments.dry_run).then(|| arguments.file.clone());
    let version = env!("CARGO_PKG_VERSION");
    let document = Document { version, machine: machine(), file, worlds, devices, gpus: gpu_worlds };
    common.json.as_ref().map_or(Ok(()), |target| target.write(&document))?;
    Ok(0)
}

/// Those that were named, once each and up to `limit`; otherwise powers of two and `most`.
fn worlds_to_measure(named: &[usize], most: usize, limit: usize) -> Vec<usize> {
    let powers = std::iter::successors(Some(2), |ranks| Some(ranks * 2)).take_while(|ranks| *ranks <= most);
    let mut ranks: Vec<usize> = if named.is_empty() {
        powers.chain([most]).collect()
    } else {
        named.iter().copied().filter(|ranks| *ranks <= limit).collect()
    };
    ranks.sort_unstable();
    ranks.dedup();
    ranks
}

fn measure(ranks: usize) -> Result<World, Failure> {
    let mut started = Ranks::start(ranks, own_arguments()?, true)?;
    let bound = started.is_bound();
    let mut measured = Vec::new();
    for line in BufReader::new(started.take_output()?).lines() {
        let line = line.map_err(|error| Failure::new(format!("rank 0 cannot be read: {error}")))?;
        // What is not ours was printed by a library.
        measured.extend(serde_json::from_str::<Measured>(&line).ok());
    }
    if let Some(failed) = started.wait() {
        return Err(Failure::new(format!("the measurement failed {failed}")));
    }
    let borders = borders(ranks, &measured);
    Ok(World { ranks, bound, measured, borders })
}

/// The borders of all operations, in the order of [`World::thresholds`].
fn borders(ranks: usize, measured: &[Measured]) -> Vec<Named> {
    let default = Thresholds::for_world(ranks);
    let of = |kind: Kind| measured.iter().filter(move |measured| measured.operation == kind.name());
    let one_or_two: Vec<Point> = of(DIRECT_FORMS[0])
        .filter_map(|at| Some(Point { bytes: at.bytes, small_us: at.one_shot_us, large_us: at.two_shot_us? }))
        .collect();
    // `one_shot_to` belongs to the smaller side: the border stands behind it.
    let one_shot = border::best(&one_or_two, default.all_reduce_one_shot_to.saturating_add(1));
    let staged_us = |at: &Measured| match at.two_shot_us {
        Some(two) if at.bytes >= one_shot.chosen => two,
        _ => at.one_shot_us,
    };
    let mut borders = vec![Named { name: "all_reduce: two-shot from".to_owned(), border: one_shot }];
    for (kind, default) in DIRECT_FORMS.into_iter().zip(default.direct_from) {
        let point =
            |at: &Measured| Point { bytes: at.bytes, small_us: staged_us(at), large_us: at.direct_us };
        borders.push(Named {
            name: format!("{} in windows: direct from", kind.name()),
            border: border::best(&of(kind).map(point).collect::<Vec<_>>(), default),
        });
    }
    borders
}

fn write(arguments: &Arguments, tuning: &Tuning) -> Result<(), Failure> {
    let notes = [
        format!(
            "Made by unisono tune {}, {:?} per size and algorithm.",
            env!("CARGO_PKG_VERSION"),
            arguments.time
        ),
        "Bytes per rank at which one algorithm becomes faster than another.".to_owned(),
    ];
    let failed = |error: std::io::Error| {
        Failure::new(format!("the tuning file cannot be written to {}: {error}", arguments.file.display()))
    };
    // Whoever reads it meanwhile sees the old file or the new one.
    let mut beside = arguments.file.clone().into_os_string();
    beside.push(format!(".{}", std::process::id()));
    std::fs::write(&beside, tuning.to_text(&notes)).map_err(failed)?;
    std::fs::rename(&beside, &arguments.file).map_err(|error| {
        // What could not be moved must not stay either; the first error tells.
        let _ = std::fs::remove_file(&beside);
        failed(error)
    })
}

impl Named {
    fn line(&self) -> String {
        let Border { chosen, default, .. } = self.border;
        format!(
            "{:<42}{:>10} {:>10}   {}",
            self.name,
            border_size(chosen),
            border_size(default),
            self.border.why()
        )
    }
}

impl World {
    fn thresholds(&self) -> Thresholds {
        let mut chosen = self.borders.iter().map(|named| named.border.chosen);
        let default = Thresholds::for_world(self.ranks);
        let all_reduce_one_shot_to = match chosen.next() {
            None => default.all_reduce_one_shot_to,
            Some(usize::MAX) => usize::MAX,
            Some(from) => from.saturating_sub(1),
        };
        let direct_from = default.direct_from.map(|default| chosen.next().unwrap_or(default));
        Thresholds { all_reduce_one_shot_to, direct_from }
    }

    /// Whether most sizes took much longer in half of their turns than in the quickest quarter.
    fn is_noisy(&self) -> bool {
        const MUCH: f64 = 1.3;
        let noisy = self.measured.iter().filter(|at| at.spread > MUCH).count();
        2 * noisy > self.measured.len()
    }

    fn lines(&self) -> Vec<String> {
        let bold = Style::new().bold();
        let bound = if self.bound { "a core each" } else { "more than processors" };
        let mut lines =
            vec![format!("{bold}{} ranks, {bound}{bold:#} · µs per call, the fastest marked", self.ranks)];
        for kinds in DIRECT_FORMS.chunks(3) {
            lines.extend(self.table(kinds));
            lines.push(String::new());
        }
        lines.push(format!("{:<42}{:>10} {:>10}   why", "", "chosen", "default"));
        lines.extend(self.borders.iter().map(Named::line));
        lines.push(String::new());
        lines
    }
}

impl World {
    /// The times of some operations, beside each other.
    fn table(&self, kinds: &[Kind]) -> Vec<String> {
        let of = |kind: Kind, bytes| {
            self.measured.iter().find(|at| at.operation == kind.name() && at.bytes == bytes)
        };
        let reduces = |kind: &Kind| matches!(kind, Kind::AllReduce { .. });
        let heads = kinds.iter().map(|kind| {
            let width = if reduces(kind) { 33 } else { 22 };
            format!("│ {:<width$}", kind.name())
        });
        let columns = kinds.iter().map(|kind| {
            let two = if reduces(kind) { format!("{:>9}  ", "two-shot") } else { String::new() };
            format!("│ {:>9}  {two}{:>9} ", "one-shot", "direct")
        });
        let line = |first: &str, cells: String| format!("{first:>10} {cells}").trim_end().to_owned();
        let mut lines = vec![line("", heads.collect()), line("bytes", columns.collect())];
        for bytes in rank::sizes() {
            let cells: Option<String> = kinds
                .iter()
                .map(|kind| {
                    let at = of(*kind, bytes)?;
                    let staged = [Some(at.one_shot_us), at.two_shot_us];
                    let staged = &staged[..if reduces(kind) { 2 } else { 1 }];
                    Some(format!("│ {}", times(&[staged, &[Some(at.direct_us)]].concat())))
                })
                .collect();
            lines.extend(cells.map(|cells| line(&format_size(bytes as u64), cells)));
        }
        lines
    }
}

/// A border for people. Measured ones are powers of two; others stand behind the size up to which the first serves.
fn border_size(bytes: usize) -> String {
    match bytes {
        0 => "always".to_owned(),
        usize::MAX => "never".to_owned(),
        size if size.is_power_of_two() => format_size(size as u64),
        behind => format!("> {}", format_size(behind as u64 - 1)),
    }
}

/// Times beside each other, a star at the least.
fn times(times: &[Option<f64>]) -> String {
    let least = times.iter().flatten().copied().min_by(f64::total_cmp);
    let text = |time: &Option<f64>| match time {
        Some(us) => format!("{us:>9.2}{} ", if Some(*us) == least { "*" } else { " " }),
        None => format!("{:>9}  ", "–"),
    };
    times.iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worlds_are_those_that_were_named_or_powers_of_two_and_all() {
        assert_eq!(worlds_to_measure(&[], 8, 8), [2, 4, 8]);
        assert_eq!(worlds_to_measure(&[], 6, 6), [2, 4, 6]);
        assert_eq!(worlds_to_measure(&[8, 2, 2], 4, 4), [2]);
        assert_eq!(worlds_to_measure(&[8, 2, 2], 4, usize::MAX), [2, 8]);
    }

    fn measured(kind: Kind, bytes: usize, times: (f64, Option<f64>, f64)) -> Measured {
        Measured {
            operation: kind.name().to_owned(),
            bytes,
            one_shot_us: times.0,
            two_shot_us: times.1,
            direct_us: times.2,
            spread: 1.1,
        }
    }

    #[test]
    fn thresholds_come_from_the_times() {
        let mut all = Vec::new();
        for (at, bytes) in [1024, 2048, 4096, 8192, 16_384, 32_768].into_iter().enumerate() {
            let at = at as f64;
            // Two-shot wins from 4 KiB on, direct wins against the better of both from 16 KiB on.
            let (one, two) = (1.0 + at, 2.5 + at / 4.0);
            for kind in DIRECT_FORMS {
                all.push(match kind {
                    Kind::AllReduce { .. } => measured(kind, bytes, (one, Some(two), 4.2 - at / 4.0)),
                    Kind::AllGather => measured(kind, bytes, (one, None, 0.1)),
                    _ => measured(kind, bytes, (one, None, 99.0)),
                });
            }
        }
        let borders = borders(2, &all);
        let world = World { ranks: 2, bound: true, measured: all, borders };
        let mut direct_from = [usize::MAX; DIRECT_FORMS.len()];
        (direct_from[0], direct_from[2]) = (16_384, 0);
        assert_eq!(world.thresholds(), Thresholds { all_reduce_one_shot_to: 4095, direct_from });
        assert!(!world.is_noisy());
        let lines: Vec<String> =
            world.lines().iter().map(|line| anstream::adapter::strip_str(line).to_string()).collect();
        assert_eq!(
            lines[3],
            "     1 KiB │      1.00*      2.50       4.20  │      1.00*     99.00  │      1.00       0.10*"
        );
        assert!(lines.iter().all(|line| line.chars().count() <= 120), "{lines:#?}");
    }
}
