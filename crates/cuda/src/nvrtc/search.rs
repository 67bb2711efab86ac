//! Where NVRTC may lie, newest versions first, and the first library there that is of use.
//!
//! What the user named is tried alone; otherwise the system's loader is asked, then toolkits and Python's packages are looked
//! through. A library that is there and cannot be used is remembered: it says more than that there is none.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::places::{newest_first, python_packages};

/// What environment variables say.
type Environment<'e> = &'e dyn Fn(&str) -> Option<PathBuf>;

/// The first library that `open` opens.
///
/// # Errors
/// [`Error::TooOld`] if all that were found are; [`Error::NoCompiler`] otherwise.
pub(super) fn first<T>(environment: Environment<'_>, open: &dyn Fn(&Path) -> Result<T>) -> Result<T> {
    // A variable that is set to nothing is not set.
    let environment = |name: &str| environment(name).filter(|value| !value.as_os_str().is_empty());
    if let Some(named) = environment("UNISONO_NVRTC") {
        return first_named(&named, open);
    }
    let folders = folders(&environment);
    let by_loader = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"].map(PathBuf::from);
    let places = by_loader.into_iter().chain(folders.iter().flat_map(|folder| libraries_in(folder)));
    let of_no_use = match first_of(places, open) {
        Ok(opened) => return Ok(opened),
        Err(error) => error,
    };
    match of_no_use {
        Some(error @ Error::TooOld { .. }) => Err(error),
        _ => Err(Error::NoCompiler {
            reason: format!(
                "not with the system's loader, nor in {} folders of toolkits and Python packages",
                folders.len()
            ),
        }),
    }
}

/// The first of use of those that the user named.
fn first_named<T>(named: &Path, open: &dyn Fn(&Path) -> Result<T>) -> Result<T> {
    // What lies beside a library is looked for beside an absolute path. A bare name is left to the system's loader.
    let place = match std::path::absolute(named) {
        Ok(absolute) if absolute.exists() => absolute,
        _ => named.to_owned(),
    };
    let places = if place.is_dir() { libraries_in(&place) } else { vec![place.clone()] };
    let none = |reason: String| Error::NoCompiler { reason };
    first_of(places.into_iter(), open).map_err(|of_no_use| match of_no_use {
        None => none(format!("UNISONO_NVRTC names {}, which holds none", place.display())),
        Some(Error::NoCompiler { reason }) => {
            none(format!("UNISONO_NVRTC names {}, but {reason}", place.display()))
        }
        Some(other) => other,
    })
}

/// The first that opens, or why none does: because one is too old, else what was wrong with the first; nothing if there are
/// none.
fn first_of<T>(
    places: impl Iterator<Item = PathBuf>,
    open: &dyn Fn(&Path) -> Result<T>,
) -> Result<T, Option<Error>> {
    let mut reason = None;
    for path in places {
        match open(&path) {
            Ok(opened) => return Ok(opened),
            Err(error) => {
                tracing::trace!("{}: {error}", path.display());
                let is_better =
                    matches!(error, Error::TooOld { .. }) && !matches!(reason, Some(Error::TooOld { .. }));
                if reason.is_none() || is_better {
                    reason = Some(error);
                }
            }
        }
    }
    Err(reason)
}

/// Where toolkits and Python's packages put it.
fn folders(environment: Environment<'_>) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    let mut toolkit = |root: PathBuf| {
        folders.extend([root.join("lib64"), root.join("targets/x86_64-linux/lib"), root.join("lib")]);
    };
    ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(|name| environment(name)).for_each(&mut toolkit);
    newest_first(Path::new("/usr/local"), "cuda").into_iter().for_each(&mut toolkit);
    for nvidia in python_packages(environment) {
        folders.extend([nvidia.join("cu13/lib"), nvidia.join("cuda_nvrtc/lib")]);
    }
    folders.retain(|folder| folder.is_dir());
    folders
}

/// The compilers in a folder, newest first; the one whose name has no version, which links to another, last.
fn libraries_in(folder: &Path) -> Vec<PathBuf> {
    newest_first(folder, "libnvrtc.so")
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// A folder with files of these names.
    fn folder(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        folder
    }

    fn too_old() -> Error {
        Error::TooOld { library: "NVRTC", symbol: "nvrtcGetCUBIN".to_owned() }
    }

    fn broken() -> Error {
        Error::NoCompiler { reason: "it is no library".to_owned() }
    }

    /// Looks in `named`, where opening answers what `open` says of each file name; what was tried, and what came out.
    fn look(named: &Path, open: &dyn Fn(&str) -> Result<()>) -> (Vec<String>, Result<()>) {
        let tried = RefCell::new(Vec::new());
        let environment = |name: &str| (name == "UNISONO_NVRTC").then(|| named.to_owned());
        let found = first(&environment, &|path: &Path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            assert_eq!(path.is_absolute(), path.exists(), "{path:?}");
            tried.borrow_mut().push(name.clone());
            open(&name)
        });
        (tried.into_inner(), found)
    }

    #[test]
    fn all_libraries_of_a_named_folder_are_tried_newest_first_by_number() {
        let names =
            ["libnvrtc.so", "libnvrtc.so.12.9.86", "libnvrtc.so.12.10.3", "libnvrtc.so.9", "libcudart.so.99"];
        let folder = folder(&names);
        let newest_first = ["libnvrtc.so.12.10.3", "libnvrtc.so.12.9.86", "libnvrtc.so.9", "libnvrtc.so"];
        let (tried, found) = look(folder.path(), &|_| Err(broken()));
        assert_eq!(tried, newest_first);
        assert!(
            matches!(&found, Err(Error::NoCompiler { reason }) if reason.ends_with(", but it is no library")),
            "{found:?}"
        );
        let works = |name: &str| if name.contains("12.9") { Ok(()) } else { Err(broken()) };
        assert_eq!(
            look(folder.path(), &works),
            (newest_first[..2].iter().map(|name| (*name).to_owned()).collect(), Ok(()))
        );
    }

    #[test]
    fn a_library_that_is_too_old_says_more_than_one_that_is_none_and_less_than_one_that_works() {
        let folder = folder(&["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11"]);
        let old = |name: &str| Err(if name.ends_with("12") { too_old() } else { broken() });
        assert_eq!(look(folder.path(), &old).1, Err(too_old()));
        let works = |name: &str| if name.ends_with("11") { Ok(()) } else { Err(too_old()) };
        assert_eq!(look(folder.path(), &works).1, Ok(()));
        let nothing_named = |_: &str| None;
        let everywhere = first::<()>(&nothing_named, &|_| Err(too_old()));
        assert_eq!(everywhere, Err(too_old()), "with the loader");
    }

    #[test]
    fn a_name_that_is_empty_is_none_and_one_that_is_not_there_is_left_to_the_loader() {
        let (tried, found) = look(Path::new(""), &|_| Ok(()));
        assert_eq!((tried, found), (vec!["libnvrtc.so.13".to_owned()], Ok(())));
        let (tried, found) = look(Path::new("libnvrtc.so.77"), &|_| Ok(()));
        assert_eq!((tried, found), (vec!["libnvrtc.so.77".to_owned()], Ok(())));
        let empty = folder(&[]);
        assert!(matches!(
            look(empty.path(), &|_| Ok(())).1,
            Err(Error::NoCompiler { reason }) if reason.ends_with("which holds none")
        ));
    }

    #[test]
    fn a_relative_name_is_made_absolute() {
        // The tests of a crate run in its folder.
        let (tried, found) = look(Path::new("Cargo.toml"), &|_| Ok(()));
        assert_eq!((tried, found), (vec!["Cargo.toml".to_owned()], Ok(())));
    }
}
