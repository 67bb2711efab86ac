//! `cargo xtask gpu-bundle`: what is tested and measured on GPUs, as programs that run where there is no Rust.
//!
//! Built in release, stripped, and put into `gpu-bundle/` with `gpu_run.sh`, which says how to call it. A machine needs the
//! driver, NVRTC and the same libc, and torch for the Python package; the kernels are compiled there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cargo_metadata::Message;

use crate::python;

const FOLDER: &str = "gpu-bundle";
/// What runs them, and measures PyTorch beside them.
const SCRIPTS: [&str; 2] = ["xtask/src/gpu_run.sh", "benches/peers/torch_symmetric.py"];
/// What can be carried to such a machine, with room for the rest of the tree.
const MAX_BYTES: u64 = 48 << 20;
/// Arguments of cargo, and the programs that come of them: as cargo calls them, and as the bundle does.
type Build = (&'static [&'static str], &'static [(&'static str, &'static str)]);
const BUILDS: [Build; 4] = [
    (&["build", "--release", "-p", "unisono-cli", "--bin", "unisono"], &[("unisono", "unisono")]),
    (
        &["build", "--release", "-p", "unisono", "--example", "gpu_call_cost", "--example", "device_header"],
        &[("gpu_call_cost", "gpu_call_cost"), ("device_header", "device_header")],
    ),
    (&["test", "--release", "-p", "unisono", "--lib", "--no-run"], &[("unisono", "library")]),
    (
        &[
            "test",
            "--release",
            "-p",
            "unisono",
            "--test",
            "gpu",
            "--test",
            "kernels",
            "--test",
            "faults_processes",
            "--no-run",
        ],
        &[("gpu", "gpu"), ("kernels", "kernels"), ("faults_processes", "faults_processes")],
    ),
];

/// Makes the bundle; true if it is whole and small enough.
pub(crate) fn run(root: &Path) -> bool {
    match make(root) {
        Ok(bytes) if bytes <= MAX_BYTES => {
            println!("{FOLDER}: {bytes} bytes; {FOLDER}/gpu_run.sh says how to call it");
            true
        }
        Ok(bytes) => {
            println!("{FOLDER}: {bytes} bytes, and at most {MAX_BYTES} can be carried");
            false
        }
        Err(reason) => {
            println!("{FOLDER}: {reason}");
            false
        }
    }
}

/// The bytes of what was made.
fn make(root: &Path) -> Result<u64, String> {
    let folder = root.join(FOLDER);
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => fs::create_dir_all(&folder).map_err(failed)?,
    }
    for (arguments, names) in BUILDS {
        let made = build(root, arguments)?;
        for (name, called) in names {
            let (_, from) = made
                .iter()
                .find(|(made, _)| made == name)
                .ok_or_else(|| format!("cargo {} made no {name}", arguments.join(" ")))?;
            let status = Command::new("strip").arg("-o").arg(folder.join(called)).arg(from).status();
            match status {
                Ok(status) if status.success() => {}
                Ok(status) => return Err(format!("strip of {name} ended with {status}")),
                Err(error) => return Err(format!("strip could not be started: {error}")),
            }
        }
    }
    for script in SCRIPTS {
        let from = root.join(script);
        let name = from.file_name().unwrap_or_default();
        fs::copy(&from, folder.join(name)).map_err(failed)?;
    }
    python::unpack(root, &folder.join("python"))?;
    let mut bytes = 0;
    for entry in fs::read_dir(&folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let length = length(&entry.path()).map_err(failed)?;
        println!("{length:>12} {}", entry.file_name().to_string_lossy());
        bytes += length;
    }
    Ok(bytes)
}

/// The bytes of a file, or of all files in a folder.
fn length(path: &Path) -> std::io::Result<u64> {
    if !path.is_dir() {
        return Ok(fs::metadata(path)?.len());
    }
    fs::read_dir(path)?.map(|entry| length(&entry?.path())).sum()
}

/// Names and places of the programs that cargo made.
fn build(root: &Path, arguments: &[&str]) -> Result<Vec<(String, PathBuf)>, String> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(program)
        .current_dir(root)
        .args(arguments)
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cargo could not be started: {error}"))?;
    if !output.status.success() {
        return Err(format!("cargo {} ended with {}", arguments.join(" "), output.status));
    }
    programs(&output.stdout)
}

/// The programs in what cargo says.
fn programs(said: &[u8]) -> Result<Vec<(String, PathBuf)>, String> {
    let mut programs = Vec::new();
    for message in Message::parse_stream(said) {
        let message = message.map_err(|error| format!("cargo's messages cannot be read: {error}"))?;
        if let Message::CompilerArtifact(artifact) = message
            && let Some(path) = artifact.executable
        {
            programs.push((artifact.target.name, path.into_std_path_buf()));
        }
    }
    Ok(programs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_among_libraries() {
        let artifact = |name: &str, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","package_id":"p","manifest_path":"/p/Cargo.toml","target":{{"kind":["test"],"crate_types":["bin"],"name":"{name}","src_path":"/p/t.rs","edition":"2024","doc":false,"doctest":false,"test":true}},"profile":{{"opt_level":"3","debuginfo":1,"debug_assertions":false,"overflow_checks":false,"test":true}},"features":[],"filenames":[],"executable":{executable},"fresh":true}}"#
            )
        };
        let said = [artifact("library", "null"), artifact("gpu", "\"/t/gpu-1\"")].join("\n");
        assert_eq!(programs(said.as_bytes()), Ok(vec![("gpu".to_owned(), PathBuf::from("/t/gpu-1"))]));
    }

    #[test]
    fn the_script_is_one_that_bash_understands() {
        let root = crate::root();
        let status = Command::new("bash").arg("-n").arg(root.join(SCRIPTS[0])).status().unwrap();
        assert!(status.success());
    }
}
