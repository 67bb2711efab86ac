//! The `unisono` command. Everything is in the library, so that Python can call it too.

use std::process::ExitCode;

fn main() -> ExitCode {
    unisono_cli::main(std::env::args_os())
}
