//! libFuzzer around one target, which `UNISONO_FUZZ_TARGET` names; the arguments are libFuzzer's own. Before it begins it
//! writes what is right, and the corpus, into the directory `UNISONO_FUZZ_CORPUS`. With `--list` as name it prints the names
//! of all targets instead. `cargo xtask fuzz` builds and runs it.
#![no_main]
#![allow(clippy::print_stdout, reason = "a program that reports to the terminal")]

use std::path::Path;
use std::sync::LazyLock;

use unisono_fuzz::{TARGETS, Target};

static TARGET: LazyLock<&Target> = LazyLock::new(|| {
    let name = std::env::var("UNISONO_FUZZ_TARGET").unwrap_or_default();
    if name == "--list" {
        TARGETS.iter().for_each(|target| println!("{}", target.name));
        std::process::exit(0);
    }
    let target = Target::find(&name).unwrap_or_else(|| panic!("UNISONO_FUZZ_TARGET={name} is no target"));
    if let Some(folder) = std::env::var_os("UNISONO_FUZZ_CORPUS") {
        write_inputs(target, Path::new(&folder)).expect("the corpus can be written");
    }
    target
});

fn write_inputs(target: &Target, folder: &Path) -> std::io::Result<()> {
    for (at, input) in target.inputs()?.iter().enumerate() {
        std::fs::write(folder.join(format!("input-{at}")), input)?;
    }
    Ok(())
}

libfuzzer_sys::fuzz_target!(
    init: {
        LazyLock::force(&TARGET);
    },
    |bytes: &[u8]| TARGET.execute(bytes)
);
