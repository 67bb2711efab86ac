//! `unisono kernels build`: compiles sets of kernels on all processors, and keeps them.
//!
//! A set is what one communicator loads for one purpose: one architecture, link and world size. Threads take the sets in
//! turn; lines come out in the order of the sets, as soon as all before them are done. The first error ends the build.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use unisono::cuda::packs::Packer;
use unisono::cuda::{Architecture, Cache, Compiler, Device, Source, driver};
use unisono::ep::kernels;
use unisono::gpu::kernels::{Purpose, architecture, source};
use unisono::gpu::{ArenaLayout, Link, MAX_RANKS};

use super::table::{self, Row};
use crate::output::{Target, bytes};
use crate::{Common, Failure};

/// The arguments of `unisono kernels build`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Of what the kernels of a set take, the most is shown: registers and stack of each thread (a stack is \
                  where registers go that have no room), shared memory of each block, code."
)]
pub(super) struct Arguments {
    /// Architectures, separated by commas [default: those of the devices here]
    #[arg(long, value_name = "SM", value_delimiter = ',', value_parser = str::parse::<Architecture>)]
    arch: Vec<Architecture>,
    /// World sizes, separated by commas
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = ranks, default_value = "1,2,3,4,5,6,7,8")]
    ranks: Vec<usize>,
    /// How the GPUs reach each other: in device memory, or through pinned memory of the host
    #[arg(long, value_delimiter = ',', default_value = "device")]
    link: Vec<Way>,
    /// Every dtype and reduction, not only the usual: copies, and sums of f32, f16 and bf16
    #[arg(long)]
    all: bool,
    /// Also writes them into DIR, compressed together, in a file for each architecture, as packages carry them
    #[arg(long, value_name = "DIR")]
    pack: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, ValueEnum)]
enum Way {
    Device,
    Host,
}

fn ranks(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (1..=MAX_RANKS).contains(number));
    number.ok_or_else(|| format!("expected a number from 1 to {MAX_RANKS}"))
}

/// What one set is compiled for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Set {
    architecture: Architecture,
    way: Way,
    ranks: usize,
    of: Of,
}

/// What calls kernels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Of {
    Collectives(Purpose),
    /// A source of expert parallelism, by its number.
    Experts(usize),
}

#[derive(Serialize)]
struct Document<'a> {
    version: &'static str,
    compiler: String,
    compiler_path: String,
    folder: &'a str,
    sets: &'a [Row],
}

/// Builds, and answers the exit code.
pub(super) fn execute(arguments: &Arguments, common: &Common) -> Result<u8, Failure> {
    let failed = |error: unisono::cuda::Error| Failure::new(error.to_string());
    let sets = sets(arguments, || devices().map_err(failed))?;
    let compiler = Compiler::find().map_err(failed)?;
    let cache = Cache::of_user();
    let Some(folder) = cache.folder().map(|folder| folder.display().to_string()) else {
        return Err(Failure::new(
            "there is no home folder to keep kernels in; UNISONO_CACHE_DIR names a place",
        ));
    };
    let (major, minor) = compiler.version();
    let title = format!("NVRTC {major}.{minor} · {}", compiler.path().display());
    let (start, mut report) = (Instant::now(), Report::new(common, sets.len(), title));
    let packer = Mutex::new(Packer::default());
    let build = |set: &Set| {
        let (row, source, cubin) = build(set, compiler, &cache).map_err(failed)?;
        if arguments.pack.is_some() {
            let mut packer = packer.lock().unwrap_or_else(PoisonError::into_inner);
            packer.add(&source, set.architecture, compiler.version(), &cubin);
        }
        Ok(row)
    };
    in_order(&sets, &build, &mut |row| report.add(row))?;
    if let Some(folder) = &arguments.pack {
        let packer = packer.into_inner().unwrap_or_else(PoisonError::into_inner);
        let packed = packer.write(folder).map_err(failed)?;
        report.print(&format!("\npacked into {}: {}", folder.display(), bytes(packed)));
    }
    report.conclude(&table::footer(&report.rows, start.elapsed(), &folder));
    if let Some(target) = &common.json {
        target.write(&Document {
            version: env!("CARGO_PKG_VERSION"),
            compiler: format!("{major}.{minor}"),
            compiler_path: compiler.path().display().to_string(),
            folder: &folder,
            sets: &report.rows,
        })?;
    }
    Ok(0)
}

/// The architectures of the devices here, each once.
fn devices() -> unisono::cuda::Result<Vec<Architecture>> {
    (0..driver::device_count()?).map(|ordinal| Ok(architecture(&Device::new(ordinal)?))).collect()
}

/// Every set that is asked for, once.
fn sets(
    arguments: &Arguments,
    devices: impl FnOnce() -> Result<Vec<Architecture>, Failure>,
) -> Result<Vec<Set>, Failure> {
    let mut architectures = match arguments.arch.as_slice() {
        [] => devices().map_err(|failure| {
            Failure::new(format!("{failure} Say what to compile for, as in --arch sm_90,sm_100."))
        })?,
        named => named.to_vec(),
    };
    architectures.sort_unstable();
    architectures.dedup();
    let (mut ways, mut ranks) = (arguments.link.clone(), arguments.ranks.clone());
    ways.sort_unstable();
    ways.dedup();
    ranks.sort_unstable();
    ranks.dedup();
    let purposes = if arguments.all { Purpose::all() } else { Purpose::USUAL.to_vec() };
    let mut sets = Vec::new();
    for architecture in architectures {
        for way in &ways {
            for ranks in &ranks {
                let set = |of| Set { architecture, way: *way, ranks: *ranks, of };
                sets.extend(purposes.iter().map(|purpose| set(Of::Collectives(*purpose))));
                // Buffers need GPUs that reach each other.
                let experts = if *way == Way::Device { kernels::sources(*ranks).len() } else { 0 };
                sets.extend((0..experts).map(|at| set(Of::Experts(at))));
            }
        }
    }
    Ok(sets)
}

/// One set: from the cache, else compiled and kept there. What it is, and what it is made from.
fn build(set: &Set, compiler: &Compiler, cache: &Cache) -> unisono::cuda::Result<(Row, Source, Vec<u8>)> {
    let (link, name) = match set.way {
        Way::Device => (Link::Device, "device"),
        Way::Host => (Link::Host, "host"),
    };
    let (source, purpose) = match set.of {
        Of::Collectives(purpose) => {
            (source(&ArenaLayout::new(set.ranks, link), purpose), purpose.to_string())
        }
        Of::Experts(at) => {
            let source = kernels::sources(set.ranks).swap_remove(at);
            let name = source.name.trim_end_matches(".cu").replace('_', " ");
            (source, name)
        }
    };
    let start = Instant::now();
    let (cubin, compiled_ms) = match cache.find(&source, set.architecture, Some(compiler.version())) {
        Some(cubin) => (cubin, None),
        None => {
            let cubin = compiler.compile(&source, set.architecture)?;
            cache.keep(&source, set.architecture, compiler.version(), &cubin)?;
            (cubin, Some(start.elapsed().as_millis() as u64))
        }
    };
    let mut row = Row {
        architecture: set.architecture.to_string(),
        link: name,
        ranks: set.ranks,
        purpose,
        kernels: 0,
        registers: 0,
        stack_bytes: 0,
        shared_bytes: 0,
        code_bytes: 0,
        cubin_bytes: cubin.len(),
        compiled_ms,
    };
    row.measure(&unisono::cuda::kernels(&cubin)?);
    Ok((row, source, cubin))
}

/// Makes something of each item on all processors, and hands on what came out in the order of the items.
fn in_order<I: Sync, O: Send, E: Send>(
    items: &[I],
    make: &(dyn Fn(&I) -> Result<O, E> + Sync),
    hand_on: &mut dyn FnMut(O),
) -> Result<(), E> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(items.len());
    let queue = Mutex::new(items.iter().enumerate());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..workers {
            let sender = sender.clone();
            scope.spawn(move || {
                while let Some((at, item)) = next() {
                    // Nobody listens any more once one of them failed.
                    if sender.send((at, make(item))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let (mut early, mut expected) = (BTreeMap::new(), 0);
        for (at, made) in receiver {
            early.insert(at, made?);
            while let Some(made) = early.remove(&expected) {
                hand_on(made);
                expected += 1;
            }
        }
        Ok(())
    })
}

/// The table on standard output, the progress bar on standard error.
struct Report {
    quiet: bool,
    bar: ProgressBar,
    title: String,
    rows: Vec<Row>,
}

impl Report {
    fn new(common: &Common, sets: usize, title: String) -> Self {
        // With JSON on standard output, the table would spoil it.
        let quiet = common.quiet || common.json == Some(Target::Stdout);
        let mut bar = ProgressBar::hidden();
        if std::io::stderr().is_terminal() && !quiet {
            bar = ProgressBar::new(sets as u64);
            if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} sets · {elapsed}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        Self { quiet, bar, title, rows: Vec::new() }
    }

    fn add(&mut self, row: Row) {
        if self.rows.is_empty() {
            self.print(&table::heading(&self.title));
        }
        self.print(&row.line());
        self.bar.inc(1);
        self.rows.push(row);
    }

    fn print(&self, line: &str) {
        if !self.quiet {
            self.bar.suspend(|| {
                // Whoever closed our output does not want the rest.
                let _ = writeln!(anstream::stdout(), "{line}");
            });
        }
    }

    fn conclude(&self, footer: &str) {
        self.bar.finish_and_clear();
        self.print(&format!("\n{footer}"));
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn parse(line: &str) -> Result<Arguments, clap::Error> {
        Line::try_parse_from(line.split_whitespace()).map(|line| line.arguments)
    }

    fn count(line: &str) -> usize {
        sets(&parse(line).unwrap(), || Ok(vec!["sm_90".parse().unwrap(); 8])).map_or(0, |sets| sets.len())
    }

    #[test]
    fn every_set_is_built_once() {
        let (usual, experts) = (Purpose::USUAL.len(), kernels::sources(1).len());
        assert_eq!(count("build"), 8 * (usual + experts));
        let both = count("build --arch sm_90,sm_80,90 --ranks 2,4,2 --link host,device");
        assert_eq!(both, 2 * 2 * (2 * usual + experts));
        assert_eq!(count("build --all --ranks 16"), Purpose::all().len() + experts);
        for wrong in ["build --ranks 17", "build --ranks 0", "build --arch sm_x", "build --link net"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn without_a_device_the_error_says_how_to_name_an_architecture() {
        let none = || Err(Failure::new("no CUDA device: none."));
        let failure = sets(&parse("build").unwrap(), none).unwrap_err();
        assert_eq!(
            failure.to_string(),
            "no CUDA device: none. Say what to compile for, as in --arch sm_90,sm_100."
        );
    }

    #[test]
    fn what_is_made_out_of_order_is_handed_on_in_order_until_one_fails() {
        let items: Vec<u64> = (0..50).collect();
        let mut made = Vec::new();
        let slow = |item: &u64| {
            std::thread::sleep(Duration::from_micros(item * 7919 % 500));
            if *item == 40 { Err("forty") } else { Ok(item * 2) }
        };
        assert_eq!(in_order(&items[..40], &slow, &mut |item| made.push(item)), Ok(()));
        assert_eq!(made, (0..40).map(|item| item * 2).collect::<Vec<_>>());
        made.clear();
        assert_eq!(in_order(&items, &slow, &mut |item| made.push(item)), Err("forty"));
        assert!(made.len() <= 40, "{made:?}");
        assert_eq!(in_order::<u64, u64, &str>(&[], &|_| Err("never"), &mut |_| {}), Ok(()));
    }
}
