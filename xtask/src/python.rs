//! The Python package: its tests, in a virtual environment of their own in `target/python`, with the package built and installed into it as
//! wheels; and the wheels that are released (`cargo xtask wheel`).
//!
//! The environment is made once, and anew when `python/tests/requirements.txt` changes; it needs Python and its package index. The wheel that is
//! tested is built without optimisation, so that it shares what the other tests compiled. `cargo xtask torch` has one more
//! environment for each version of torch, below `target/torch`: 6 GB, which is why the other tests do without.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::gpu_bundle;
use crate::kernels::{self, empty, succeed};

/// What runs on machines with GPUs, beside the package.
const GPU_PROGRAMS: [&str; 12] = [
    "python/tests/jobs/gpu.py",
    "python/tests/jobs/torch_collectives.py",
    "python/tests/jobs/torch_death.py",
    "python/tests/jobs/torch_gpu.py",
    "python/tests/jobs/deep_ep.py",
    "python/tests/jobs/deep_ep_mask.py",
    "python/tests/jobs/prebuilt.py",
    "examples/moe_training.py",
    "examples/triton_symmetric.py",
    "examples/train_ddp.py",
    "benches/python_call_cost.py",
    "benches/torch_call_cost.py",
];
/// What the tests need, one name on each line.
const REQUIREMENTS: &str = "python/tests/requirements.txt";
/// What brings the name `deep_ep`.
const DEEP_EP: &str = "python/deep_ep";
/// The kernels that a wheel carries: for these GPUs and sizes of a world. Others are compiled where they are needed.
const KERNELS: [&str; 4] = ["--arch", "sm_80,sm_90,sm_100", "--ranks", "2,4,8"];
/// Where the package has them; they are there only while a wheel is built.
const KERNELS_FOLDER: &str = "python/unisono/kernels";
/// The linker that makes programs for the C library of 2014.
const ZIG: &str = "ziglang>=0.13,<0.16";
/// What is tried where nothing is installed but the wheel.
const ALONE: &str = "import array, unisono; \
    print(unisono.__version__, unisono.on_threads(2, lambda rank: rank.all_reduce(array.array('f', [rank.rank + 1]))[0])); \
    assert unisono._native.Buffer and unisono.ep.Buffer";

/// Makes the environment and installs the package, if that is needed; then pytest, ready to be run.
pub(crate) fn prepare(root: &Path) -> Result<Command, String> {
    let python = environment(&root.join("target/python"), &requirements(root)?)?;
    tests(root, &python, &wheels(root, &python)?)
}

/// The same with this version of torch, for the tests that need it.
pub(crate) fn prepare_torch(root: &Path, version: &str) -> Result<Command, String> {
    let maker = environment(&root.join("target/python"), &requirements(root)?)?;
    let place = root.join("target/torch").join(version);
    let mut wanted = requirements(root)?;
    wanted.extend(format!("expecttest\ntorch=={version}\n").bytes());
    let python = environment(&place, &wanted)?;
    let mut tests = tests(root, &python, &wheels(root, &maker)?)?;
    let files = fs::read_dir(root.join("python/tests")).map_err(|error| error.to_string())?;
    let is_of_torch = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let starts = ["test_torch", "test_deep_ep", "test_examples", "test_book", "test_documentation"];
        starts.iter().any(|start| name.starts_with(start)) && name.ends_with(".py")
    };
    tests.args(files.flatten().map(|entry| entry.path()).filter(is_of_torch));
    Ok(tests)
}

/// The wheels that are tested.
fn wheels(root: &Path, python: &Path) -> Result<[PathBuf; 2], String> {
    Ok([build(root, python, "dev", &["--profile", "dev"])?, build_deep_ep(root, python)?])
}

/// Installs the package, and runs pytest.
fn tests(root: &Path, python: &Path, wheels: &[PathBuf]) -> Result<Command, String> {
    let install = ["-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", "--no-index"];
    succeed(Command::new(python).args(install).args(wheels))?;
    let made = gpu_bundle::build(root, &["build", "-p", "unisono", "--example", "torchrun"])?;
    let mut tests = Command::new(python);
    tests.envs(made.into_iter().map(|(_, program)| ("UNISONO_TEST_TORCHRUN", program)));
    tests.current_dir(root).args(["-m", "pytest", "-q", "-p", "no:cacheprovider"]);
    Ok(tests)
}

/// Puts the package, built in release and unpacked, into `folder`, with what is run on machines that have GPUs.
pub(crate) fn unpack(root: &Path, folder: &Path) -> Result<(), String> {
    let python = environment(&root.join("target/python"), &requirements(root)?)?;
    let wheel = build(root, &python, "release", &["--profile", "release"])?;
    succeed(Command::new(&python).args(["-m", "zipfile", "-e"]).arg(&wheel).arg(folder))?;
    for program in GPU_PROGRAMS {
        let from = root.join(program);
        let to = from.file_name().map(|name| folder.join(name)).unwrap_or_default();
        fs::copy(&from, to).map_err(|error| format!("{program}: {error}"))?;
    }
    Ok(())
}

/// Builds what is released, into `target/python/wheels/released`: in release, for any Linux since 2014, with kernels compiled ahead. It is tried in an
/// environment that has nothing else. True if all of that went well.
pub(crate) fn release(root: &Path) -> bool {
    match make_release(root) {
        Ok(()) => true,
        Err(reason) => {
            println!("the wheels were not built: {reason}");
            false
        }
    }
}

fn make_release(root: &Path) -> Result<(), String> {
    let place = root.join("target/python");
    let python = environment(&place, &requirements(root)?)?;
    succeed(Command::new(&python).args(["-m", "pip", "install", "--quiet", ZIG]))?;
    if !kernels::provide(root) {
        return Err("kernels cannot be compiled".to_owned());
    }
    let folder = root.join(KERNELS_FOLDER);
    empty(&folder)?;
    let start = Instant::now();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut kernels = Command::new(cargo);
    kernels.current_dir(root).args([
        "run",
        "--quiet",
        "-p",
        "unisono-cli",
        "--",
        "kernels",
        "build",
        "--quiet",
    ]);
    kernels.args(KERNELS).arg("--pack").arg(&folder).envs(kernels::environment(root));
    succeed(&mut kernels)?;
    println!("kernels ahead of time: {:.0} s", start.elapsed().as_secs_f64());
    let wheel =
        build(root, &python, "manylinux2014", &["--release", "--zig", "--compatibility", "manylinux2014"]);
    let packed = fs::read_dir(&folder).into_iter().flatten().flatten();
    let packed: Vec<String> = packed.map(|file| file.file_name().to_string_lossy().into_owned()).collect();
    empty(&folder)?;
    let (wheel, deep_ep) = (wheel?, build_deep_ep(root, &python)?);
    let released = place.join("wheels/released");
    empty(&released)?;
    fs::create_dir_all(&released).map_err(|error| format!("{}: {error}", released.display()))?;
    for wheel in [&wheel, &deep_ep] {
        let name = wheel.file_name().unwrap_or_default();
        let bytes =
            fs::copy(wheel, released.join(name)).map_err(|error| format!("{}: {error}", wheel.display()))?;
        println!("{bytes:>12} {}", released.join(name).display());
    }
    println!("kernels inside: {}", packed.join(", "));
    try_alone(&place, &wheel)
}

/// Installs `wheel` where nothing else is, and uses it.
fn try_alone(place: &Path, wheel: &Path) -> Result<(), String> {
    let folder = place.join("alone");
    empty(&folder)?;
    succeed(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
    let python = folder.join("bin/python");
    succeed(Command::new(&python).args(["-m", "pip", "install", "--quiet", "--no-index"]).arg(wheel))?;
    succeed(Command::new(&python).args(["-c", ALONE]))?;
    succeed(Command::new(folder.join("bin/unisono")).args(["kernels", "list"]))
}

/// A wheel of the package, as maturin builds it with these arguments.
fn build(root: &Path, python: &Path, folder: &str, arguments: &[&str]) -> Result<PathBuf, String> {
    let wheels = root.join("target/python/wheels").join(folder);
    let build = ["-m", "maturin", "build", "--out"];
    // It asks the first Python that it finds for zig.
    let mut path = python.parent().unwrap_or(root).as_os_str().to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let mut maturin = Command::new(python);
    maturin.current_dir(root).env("PATH", path).args(build).arg(&wheels).args(arguments);
    into(&wheels, &mut maturin)
}

/// The wheel that brings the name `deep_ep`.
fn build_deep_ep(root: &Path, python: &Path) -> Result<PathBuf, String> {
    let wheels = root.join("target/python/wheels/deep-ep");
    let build = ["-m", "flit_core.wheel", "--outdir"];
    into(&wheels, Command::new(python).current_dir(root.join(DEEP_EP)).args(build).arg(&wheels))
}

/// The one file that `command` leaves in `folder`, which is empty before.
fn into(folder: &Path, command: &mut Command) -> Result<PathBuf, String> {
    // Of an older version, perhaps.
    empty(folder)?;
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    fs::create_dir_all(folder).map_err(failed)?;
    succeed(command)?;
    let entries = fs::read_dir(folder).map_err(failed)?;
    entries.flatten().map(|entry| entry.path()).next().ok_or_else(|| format!("{command:?} left no wheel"))
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
