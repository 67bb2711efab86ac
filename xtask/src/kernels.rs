//! NVRTC for the tests that compile kernels: where they find it, and how it comes into `target/nvrtc` if nobody named one.
//!
//! It is a wheel of the Python package index, 90 MB; Python is needed to fetch and unpack it, and no CUDA and no GPU. It is
//! unpacked beside and then renamed, so that what stands there is whole. `UNISONO_NVRTC` names another one, and then nothing
//! is fetched.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The version that the tests are made with.
const PACKAGE: &str = "nvidia-cuda-nvrtc==13.0.*";
/// Where the wheel keeps the library.
const LIBRARIES: &str = "nvidia/cu13/lib";
const LIBRARY: &str = "libnvrtc.so.13";

/// What the tests are told: where the compiler lies, that its absence is a failure, and where compiled kernels go.
pub(crate) fn environment(root: &Path) -> Vec<(&'static str, OsString)> {
    let compiler = named().unwrap_or_else(|| place(root).join(LIBRARIES).into());
    vec![
        ("UNISONO_NVRTC", compiler),
        ("UNISONO_TEST_REQUIRE_NVRTC", "1".into()),
        ("UNISONO_CACHE_DIR", root.join("target/kernel-cache").into()),
    ]
}

/// Whether [`provide`] has something to do.
pub(crate) fn is_missing(root: &Path) -> bool {
    named().is_none() && !is_whole(&place(root))
}

/// Fetches the compiler if it is missing; true if it is there then.
pub(crate) fn provide(root: &Path) -> bool {
    if !is_missing(root) {
        return true;
    }
    match fetch(&place(root)) {
        Ok(()) => true,
        Err(reason) => {
            println!(
                "NVRTC, which the tests compile kernels with, could not be fetched: {reason}.\n\
                 Install Python with pip, or name a folder that holds {LIBRARY} with UNISONO_NVRTC."
            );
            false
        }
    }
}

fn named() -> Option<OsString> {
    std::env::var_os("UNISONO_NVRTC").filter(|value| !value.is_empty())
}

fn place(root: &Path) -> PathBuf {
    root.join("target/nvrtc")
}

fn is_whole(place: &Path) -> bool {
    place.join(LIBRARIES).join(LIBRARY).is_file()
}

fn fetch(place: &Path) -> Result<(), String> {
    if !has_pip() {
        bring_pip()?;
    }
    let beside = place.with_extension("new");
    empty(&beside)?;
    fs::create_dir_all(&beside).map_err(|error| format!("{}: {error}", beside.display()))?;
    let download = ["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=off", "-d"];
    succeed(Command::new("python3").args(download).arg(&beside).arg(PACKAGE))?;
    let wheel = wheel_in(&beside).ok_or("pip left no wheel")?;
    succeed(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&wheel).arg(&beside))?;
    fs::remove_file(&wheel).map_err(|error| format!("{}: {error}", wheel.display()))?;
    if !is_whole(&beside) {
        return Err(format!("{} holds no {LIBRARIES}/{LIBRARY}", wheel.display()));
    }
    empty(place)?;
    fs::rename(&beside, place).map_err(|error| format!("{}: {error}", place.display()))
}

fn has_pip() -> bool {
    let mut command = Command::new("python3");
    command.args(["-m", "pip", "--version"]).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// From Python itself, else from the system's packages, as root of a container can.
fn bring_pip() -> Result<(), String> {
    println!("python3 -m pip is missing");
    if succeed(Command::new("python3").args(["-m", "ensurepip", "--user"])).is_ok() && has_pip() {
        return Ok(());
    }
    // Lists that are old or cannot be renewed may do.
    let _ = succeed(Command::new("apt-get").arg("update"));
    succeed(Command::new("apt-get").args(["install", "-y", "python3", "python3-pip"]))?;
    if has_pip() { Ok(()) } else { Err("python3 -m pip is missing".to_owned()) }
}

fn wheel_in(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    entries.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "whl"))
}

/// Removes a folder, if it is there.
pub(crate) fn empty(folder: &Path) -> Result<(), String> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("{}: {error}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// Runs a command that has nothing to read; why it failed.
pub(crate) fn succeed(command: &mut Command) -> Result<(), String> {
    println!("{command:?}");
    match command.stdin(Stdio::null()).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{:?} ended with {status}", command.get_program())),
        Err(error) => Err(format!("{:?} could not be started: {error}", command.get_program())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_folder_with_the_library_in_its_place_is_whole() {
        let folder = std::env::temp_dir().join(format!("unisono-xtask-nvrtc-{}", std::process::id()));
        empty(&folder).unwrap();
        assert!(!is_whole(&folder));
        fs::create_dir_all(folder.join(LIBRARIES)).unwrap();
        assert!(!is_whole(&folder));
        fs::write(folder.join("a-1.0-py3-none-any.whl"), "").unwrap();
        assert_eq!(wheel_in(&folder), Some(folder.join("a-1.0-py3-none-any.whl")));
        fs::write(folder.join(LIBRARIES).join(LIBRARY), "").unwrap();
        assert!(is_whole(&folder));
        empty(&folder).unwrap();
        empty(&folder).unwrap();
    }

    #[test]
    fn tests_are_told_where_the_compiler_and_the_cache_lie_and_that_it_must_be_there() {
        let told = environment(Path::new("/somewhere"));
        let value = |wanted: &str| told.iter().find(|(name, _)| *name == wanted).map(|(_, value)| value);
        let expected = named().unwrap_or_else(|| "/somewhere/target/nvrtc/nvidia/cu13/lib".into());
        assert_eq!(value("UNISONO_NVRTC"), Some(&expected));
        assert_eq!(value("UNISONO_TEST_REQUIRE_NVRTC"), Some(&"1".into()));
        assert_eq!(value("UNISONO_CACHE_DIR"), Some(&"/somewhere/target/kernel-cache".into()));
    }

    #[test]
    fn a_program_that_fails_or_is_missing_says_so() {
        assert_eq!(
            succeed(Command::new("sh").args(["-c", "exit 3"])),
            Err("\"sh\" ended with exit status: 3".to_owned())
        );
        let missing = succeed(&mut Command::new("no-such-program-here")).unwrap_err();
        assert!(missing.starts_with("\"no-such-program-here\" could not be started: "), "{missing}");
    }
}
