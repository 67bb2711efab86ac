//! `unisono kernels`: the cache of compiled kernels, filled ahead of time and looked into.
//!
//! A communicator on a GPU compiles what it needs when it is made, unless the cache has it. `build` fills the cache where
//! there is time for it, when an image is made for example, and no GPU; `list` says what it holds. `header` is for kernels of
//! users: it writes what those over one-sided memory include.

use clap::{Args, Subcommand};

use crate::{Common, Failure};

mod build;
mod header;
mod list;
mod table;

/// The arguments of `unisono kernels`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Compile kernels into the cache, and say what they take; no GPU is needed
    Build(build::Arguments),
    /// Show where the cache is and what it holds
    List,
    /// Write unisono/device.cuh, for kernels of one's own over one-sided memory that nvcc compiles
    Header(header::Arguments),
}

/// Builds, lists or writes, and answers the exit code.
pub(crate) fn execute(arguments: &Arguments, common: &Common) -> Result<u8, Failure> {
    match &arguments.command {
        Command::Build(arguments) => build::execute(arguments, common),
        Command::List => list::execute(common),
        Command::Header(arguments) => header::execute(arguments, common),
    }
}
