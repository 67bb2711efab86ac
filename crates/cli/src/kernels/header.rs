//! `unisono kernels header DIR`: the header for users' kernels, as a file for nvcc.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use crate::output::Target;
use crate::{Common, Failure};

/// The arguments of `unisono kernels header`.
#[derive(Clone, Debug, Args)]
#[command(
    after_help = "The file is DIR/unisono/device.cuh, so `nvcc -I DIR` finds it as <unisono/device.cuh>. It needs CUDA 12.4 or \
                  later and belongs to this version of unisono."
)]
pub(super) struct Arguments {
    /// The folder, which is made if it is not there
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

#[derive(Serialize)]
struct Document {
    version: &'static str,
    file: String,
}

/// Writes the file, says where it is, and answers the exit code.
pub(super) fn execute(arguments: &Arguments, common: &Common) -> Result<u8, Failure> {
    let (name, text) = unisono::device_header();
    let path = arguments.folder.join(name);
    write(&path, &text)
        .map_err(|error| Failure::new(format!("{} cannot be written: {error}", path.display())))?;
    if !common.quiet && common.json != Some(Target::Stdout) {
        // Whoever closed our output does not want the rest.
        let _ = writeln!(anstream::stdout(), "{}", path.display());
    }
    let document = Document { version: env!("CARGO_PKG_VERSION"), file: path.display().to_string() };
    common.json.as_ref().map_or(Ok(()), |target| target.write(&document))?;
    Ok(0)
}

fn write(path: &Path, text: &str) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, text)
}
