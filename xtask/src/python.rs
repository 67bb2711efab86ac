//! The tests of the Python package: a virtual environment of its own in `target/python`, the package built and installed into it as a
//! wheel, and pytest.
//!
//! The environment is made once, and anew when `python/tests/requirements.txt` changes; it needs Python and its package index. The wheel is
//! built without optimisation, so that it shares what the other tests compiled.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::kernels::{empty, succeed};

/// What the tests need, one name on each line.
const REQUIREMENTS: &str = "python/tests/requirements.txt";

/// Makes the environment and installs the package, if that is needed; then pytest, ready to be run.
pub(crate) fn prepare(root: &Path) -> Result<Command, String> {
    let (python, wheel) = build(root, "dev")?;
    let install = ["-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", "--no-index"];
    succeed(Command::new(&python).args(install).arg(&wheel))?;
    let mut tests = Command::new(&python);
    tests.current_dir(root).args(["-m", "pytest", "-q", "-p", "no:cacheprovider"]);
    Ok(tests)
}

/// Puts the package, built in release and unpacked, into `folder`, with what is run on machines that have GPUs.
pub(crate) fn unpack(root: &Path, folder: &Path) -> Result<(), String> {
    let (python, wheel) = build(root, "release")?;
    succeed(Command::new(&python).args(["-m", "zipfile", "-e"]).arg(&wheel).arg(folder))?;
    for program in ["python/tests/jobs/gpu.py", "benches/python_call_cost.py"] {
        let from = root.join(program);
        let to = from.file_name().map(|name| folder.join(name)).unwrap_or_default();
        fs::copy(&from, to).map_err(|error| format!("{program}: {error}"))?;
    }
    Ok(())
}

/// The interpreter of the environment, and a wheel of the package of `profile`.
fn build(root: &Path, profile: &str) -> Result<(PathBuf, PathBuf), String> {
    let place = root.join("target/python");
    let python = environment(root, &place)?;
    let wheels = place.join("wheels").join(profile);
    // Of an older version, perhaps.
    empty(&wheels)?;
    let build = ["-m", "maturin", "build", "--profile", profile, "--out"];
    succeed(Command::new(&python).current_dir(root).args(build).arg(&wheels))?;
    let entries = fs::read_dir(&wheels).map_err(|error| format!("{}: {error}", wheels.display()))?;
    let wheel = entries.flatten().map(|entry| entry.path()).next().ok_or("maturin left no wheel")?;
    Ok((python, wheel))
}

/// The interpreter of the environment below `place`, which is made if it is not there, or is of other requirements.
fn environment(root: &Path, place: &Path) -> Result<PathBuf, String> {
    let requirements = root.join(REQUIREMENTS);
    let wanted = fs::read(&requirements).map_err(|error| format!("{REQUIREMENTS}: {error}"))?;
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
    let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"];
    succeed(Command::new(&python).args(install).arg(&requirements))?;
    fs::write(&mark, wanted).map_err(|error| format!("{}: {error}", mark.display()))?;
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
        assert!(environment(&root, &place).unwrap_err().starts_with(REQUIREMENTS));
        fs::write(root.join(REQUIREMENTS), "pytest\n").unwrap();
        fs::write(place.join("made-of"), "pytest\n").unwrap();
        fs::write(place.join("environment/bin/python"), "").unwrap();
        assert_eq!(environment(&root, &place), Ok(place.join("environment/bin/python")));
        empty(&root).unwrap();
    }
}
