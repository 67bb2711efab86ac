//! Tasks of the repository: `cargo xtask test` runs everything that must pass, `cargo xtask tidy` the house rules.
//!
//! Plain programs over `cargo`, with no framework. They can be called from any directory below the root.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program that reports to the terminal")]

mod arrows;
mod book;
mod count;
mod faults;
mod fuzz;
mod gpu_bundle;
mod kernels;
mod lex;
mod python;
mod rules;
mod sabotage;
mod test;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

const USAGE: &str = "\
Usage: cargo xtask TASK

  test   tidy, the test suite, doc tests, the Python package, the build without features, loom models, documentation
  tidy   the house rules alone
  python builds the Python package into an environment below target/python, and runs its tests
  wheel  builds the wheels that are released into target/python/wheels/released, with kernels compiled ahead, and tries them alone: minutes
  torch [VERSION]
         the tests of the Python package that need torch, with that version (2.11.0) in an environment below target/torch
  nvrtc  fetches the compiler of kernels into target/nvrtc, as test does, unless UNISONO_NVRTC names one
  gpu-bundle
         builds what is tested and measured on GPUs into gpu-bundle, to be carried to a machine that has some
  faults [--scale N] [FILTER]
         a campaign of the fault tests, in release, N times (10) as long as in the suite
  fuzz [TARGET] [--time 60s | --executions N]
         libFuzzer on each decoder of bytes from outside, for so long; needs a C++ compiler
  sabotage [FILTER]
         breaks one line at a time and looks whether the test that should notice does";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let passed = match words.as_slice() {
        ["test"] => test::run(&root()),
        ["tidy"] => tidy::run(&root()),
        ["python"] => test::run_python(&root()),
        ["wheel"] => python::release(&root()),
        ["torch"] => test::run_torch(&root(), "2.11.0"),
        ["torch", version] if version.starts_with(|first: char| first.is_ascii_digit()) => {
            test::run_torch(&root(), version)
        }
        ["nvrtc"] => kernels::provide(&root()),
        ["gpu-bundle"] => gpu_bundle::run(&root()),
        ["faults", words @ ..] if let Some(campaign) = faults::Campaign::parse(words) => {
            campaign.run(&root())
        }
        ["fuzz", words @ ..] if let Some(campaign) = fuzz::Campaign::parse(words) => campaign.run(&root()),
        ["sabotage"] => sabotage::run(&root(), None),
        ["sabotage", filter] if !filter.starts_with('-') => sabotage::run(&root(), Some(filter)),
        ["help" | "-h" | "--help"] => {
            println!("{USAGE}");
            true
        }
        _ => {
            eprintln!("expected one task, got `{}`\n\n{USAGE}", words.join(" "));
            return ExitCode::from(2);
        }
    };
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The root of the repository.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}
