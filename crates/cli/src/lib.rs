//! The `unisono` command as a library: [`main()`] takes the arguments and answers the exit code.
//!
//! Each subcommand is a module with its `Arguments` and an `execute`; this file holds the grammar that they share.
//! Exit codes: 0 all went well, 1 a result was wrong or there is nothing to look at, 2 wrong arguments, 125 the command itself failed; `run` otherwise hands on the code of
//! the program.

use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

mod bench;
mod doctor;
mod hardware;
mod kernels;
mod logging;
mod look;
mod output;
mod ranks;
mod run;
mod topo;
mod tune;

/// The command itself failed, not the program that it ran.
const EXIT_OWN_FAILURE: u8 = 125;

#[derive(Debug, Parser)]
#[command(name = "unisono", version, about = "Communication for the ranks of one job", max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

/// What every subcommand understands.
#[derive(Clone, Debug, Args)]
struct Common {
    /// Say nothing but errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Log more: -v what is done, -vv details, -vvv everything (UNISONO_LOG is finer)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Write the result as JSON to FILE, or to standard output
    #[arg(long, global = true, value_name = "FILE", num_args = 0..=1, require_equals = true, default_missing_value = "-")]
    json: Option<output::Target>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure and verify collectives on this host, with ranks of its own
    Bench(bench::Arguments),
    /// Check what this machine and its settings give to a job, and say what mends the rest
    Doctor(doctor::Arguments),
    /// Show the last calls of every rank of running jobs
    Dump(look::dump::Arguments),
    /// Compile the kernels of GPUs ahead of time, or list those that are kept
    Kernels(kernels::Arguments),
    /// Start a program several times on this host, as the ranks of one job
    Run(run::Arguments),
    /// Show what every rank of running jobs is doing
    Top(look::top::Arguments),
    /// Show who reaches whom, and how: the ranks of a job, or the processors of this machine
    Topo(topo::Arguments),
    /// Measure here where algorithms change, and write a tuning file
    Tune(tune::Arguments),
    /// Say in plain English why a job does not go on
    Why(look::why::Arguments),
}

/// Runs the command line `arguments`, the first of which is the name of the program, and answers its exit code.
///
/// Installs a `tracing` subscriber if there is none yet. Call it from the main thread, before others are started:
/// `run` blocks the signals that it forwards.
pub fn main(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    ExitCode::from(execute(arguments))
}

/// As [`main()`], for a program that contains this command: `program` is how it is started again for ranks of its own, `arguments` are
/// those behind its name. Once in a process. Answers the exit code.
pub fn main_within(program: Vec<OsString>, arguments: Vec<OsString>) -> u8 {
    ranks::be_contained(program, arguments.clone());
    execute(std::iter::once("unisono".into()).chain(arguments))
}

/// Lets the library log to standard error, as the command does: warnings, or what `UNISONO_LOG` says. Does nothing where the program
/// has a `tracing` subscriber.
pub fn log_to_stderr() {
    logging::install(None);
}

fn execute(arguments: impl Iterator<Item = OsString>) -> u8 {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Nobody is left to be told that the message could not be written.
            let _ = error.print();
            return if error.use_stderr() { 2 } else { 0 };
        }
    };
    logging::start(&cli.common);
    let done = match cli.command {
        Command::Bench(arguments) => bench::execute(&arguments, &cli.common),
        Command::Doctor(arguments) => doctor::execute(&arguments, &cli.common),
        Command::Dump(arguments) => look::dump::execute(&arguments, &cli.common),
        Command::Kernels(arguments) => kernels::execute(&arguments, &cli.common),
        Command::Run(arguments) => run::execute(arguments, &cli.common),
        Command::Top(arguments) => look::top::execute(&arguments, &cli.common),
        Command::Topo(arguments) => topo::execute(&arguments, &cli.common),
        Command::Tune(arguments) => tune::execute(&arguments, &cli.common),
        Command::Why(arguments) => look::why::execute(&arguments, &cli.common),
    };
    done.unwrap_or_else(|failure| {
        let _ = writeln!(anstream::stderr().lock(), "unisono: {failure}");
        failure.exit_code
    })
}

/// Why the command itself failed, as one sentence.
#[derive(Debug)]
struct Failure {
    message: String,
    exit_code: u8,
}

impl Failure {
    fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), exit_code: EXIT_OWN_FAILURE }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grammar_is_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn what_follows_the_program_belongs_to_the_program() {
        for separator in [&["--"][..], &[]] {
            let line = [&["unisono", "run", "-n", "2"][..], separator, &["prog", "-v", "--json", "-n", "9"]]
                .concat();
            let cli = Cli::try_parse_from(line).unwrap();
            let Command::Run(arguments) = cli.command else { panic!("{separator:?}") };
            assert_eq!(arguments.program, ["prog", "-v", "--json", "-n", "9"]);
            assert_eq!((cli.common.verbose, cli.common.json.is_none()), (0, true));
        }
    }

    #[test]
    fn json_goes_to_standard_output_or_to_a_file() {
        let target = |option: &str| {
            let line = ["unisono", "run", option, "-n", "2", "prog"];
            Cli::try_parse_from(line).unwrap().common.json
        };
        assert_eq!(target("--json"), Some(output::Target::Stdout));
        assert_eq!(target("--json=a.json"), Some(output::Target::File("a.json".into())));
    }
}
