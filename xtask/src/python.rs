//! The tests of the Python package: a virtual environment of its own in `target/python`, the package built and installed into it as a
//! wheel, and pytest.
//!
//! The environment is made once, and anew when `python/tests/requirements.txt` changes; it needs Python and its package index. The wheel is
//! built without optimisation, so that it shares what the other tests compiled. `cargo xtask torch` has one more for each version of
//! torch, below `target/torch`: 6 GB, which is why the other tests do without.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::kernels::{empty, succeed};

/// The tests that do more where torch is, or need it.
const TORCH_TESTS: [&str; 3] =
    ["python/tests/test_torch.py", "python/tests/test_examples.py", "python/tests/test_book.py"];
/// What runs on machines with GPUs, beside the package.
const GPU_PROGRAMS: [&str; 7] = [
    "python/tests/jobs/gpu.py",
    "python/tests/jobs/torch_collectives.py",
    "python/tests/jobs/torch_death.py",
    "python/tests/jobs/torch_gpu.py",
    "examples/train_ddp.py",
    "benches/python_call_cost.py",
    "benches/torch_call_cost.py",
];
/// What the tests need, one name on each line.
const REQUIREMENTS: &str = "python/tests/requirements.txt";

/// Makes the environment and installs the package, if that is needed; then pytest, ready to be run.
pub(crate) fn prepare(root: &Path) -> Result<Command, String> {
    let (python, wheel) = build(root, "dev")?;
    pytest(root, &python, &wheel)
}

/// The same with this version of torch, for the tests that need it.
pub(crate) fn prepare_torch(root: &Path, version: &str) -> Result<Command, String> {
    let (_, wheel) = build(root, "dev")?;
    let place = root.join("target/torch").join(version);
    let mut wanted = requirements(root)?;
    wanted.extend(format!("expecttest\ntorch=={version}\n").bytes());
    let python = environment(&place, &wanted)?;
    let mut tests = pytest(root, &python, &wheel)?;
    tests.args(TORCH_TESTS);
    Ok(tests)
}

/// Installs the package, and runs pytest.
fn pytest(root: &Path, python: &Path, wheel: &Path) -> Result<Command, String> {
    let install = ["-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", "--no-index"];
    succeed(Command::new(python).args(install).arg(wheel))?;
    let mut tests = Command::new(python);
    tests.current_dir(root).args(["-m", "pytest", "-q", "-p", "no:cacheprovider"]);
    Ok(tests)
}

/// Puts the package, built in release and unpacked, into `folder`, with what is run on machines that have GPUs.
pub(crate) fn unpack(root: &Path, folder: &Path) -> Result<(), String> {
    let (python, wheel) = build(root, "release")?;
    succeed(Command::new(&python).args(["-m", "zipfile", "-e"]).arg(&wheel).arg(folder))?;
    for program in GPU_PROGRAMS {
        let from = root.join(program);
        let to = from.file_name().map(|name| folder.join(name)).unwrap_or_default();
        fs::copy(&from, to).map_err(|error| format!("{program}: {error}"))?;
    }
    Ok(())
}

/// The interpreter of the environment, and a wheel of the package of `profile`.
fn build(root: &Path, profile: &str) -> Result<(PathBuf, PathBuf), String> {
    let place = root.join("target/python");
    let python = environment(&place, &requirements(root)?)?;
    let wheels = place.join("wheels").join(profile);
    // Of an older version, perhaps.
    empty(&wheels)?;
    let build = ["-m", "maturin", "build", "--profile", profile, "--out"];
    succeed(Command::new(&python).current_dir(root).args(build).arg(&wheels))?;
    let entries = fs::read_dir(&wheels).map_err(|error| format!("{}: {error}", wheels.display()))?;
    let wheel = entries.flatten().map(|entry| entry.path()).next().ok_or("maturin left no wheel")?;
    Ok((python, wheel))
}

fn requirements(root: &Path) -> Result<Vec<u8>, String> {
    fs::read(root.join(REQUIREMENTS)).map_err(|error| format!("{REQUIREMENTS}: {error}"))
}

/// The interpreter of the environment below `place`, which is made if it is not there, or is of other requirements than `wanted`.
fn environment(place: &Path, wanted: &[u8]) -> Result<PathBuf, String> {
    let (folder, mark) = (place.join("environment"), place.join("made-of"));
    // An absolute path: commands run in other folders.
    let python = std::path::absolute(folder.join("bin/python")).map_err(|error| error.to_string())?;
    if fs::read(&mark).is_ok_and(|made| made == wanted) && python.exists() {
        return Ok(python);
    }
    empty(&folder)?;
    fs::create_dir_all(place).map_err(|error| format!("{}: {error}", place.display()))?;
    let make = || succeed(Command::new("python3").args(["-m", "venv"]).arg(&folder));
    if make().is_err() {
        // Debian keeps it in a package of its own; lists that are old or cannot be renewed may do.
        let _ = succeed(Command::new("apt-get").arg("update"));
        succeed(Command::new("apt-get").args(["install", "-y", "python3", "python3-venv"]))?;
        make()?;
    }
    let list = place.join("requirements.txt");
    fs::write(&list, wanted).map_err(|error| format!("{}: {error}", list.display()))?;
    let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"];
    succeed(Command::new(&python).args(install).arg(&list))?;
    fs::rename(&list, &mark).map_err(|error| format!("{}: {error}", mark.display()))?;
    Ok(python)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_environment_of_these_requirements_is_used_again() {
        let root = std::env::temp_dir().join(format!("unisono-xtask-python-{}", std::process::id()));
        let place = root.join("target/python");
        empty(&root).unwrap();
        fs::create_dir_all(place.join("environment/bin")).unwrap();
        fs::create_dir_all(root.join("python/tests")).unwrap();
        assert!(requirements(&root).unwrap_err().starts_with(REQUIREMENTS));
        fs::write(root.join(REQUIREMENTS), "pytest\n").unwrap();
        let wanted = requirements(&root).unwrap();
        fs::write(place.join("made-of"), "pytest\n").unwrap();
        fs::write(place.join("environment/bin/python"), "").unwrap();
        assert_eq!(environment(&place, &wanted), Ok(place.join("environment/bin/python")));
        empty(&root).unwrap();
    }
}
