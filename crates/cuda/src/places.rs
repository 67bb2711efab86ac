//! Where libraries of NVIDIA lie that no loader knows: the folder `nvidia` among the packages of each Python that is found.
//!
//! Folders are looked at, and no Python is started.

use std::path::{Path, PathBuf};

/// The folders `nvidia` in the packages of active environments, of the first `python3` on the path, of the user and of the
/// system, in this order, of newer versions of Python first. `environment` answers for variables; folders that are not there may be among them.
pub fn python_packages(environment: &dyn Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(|name| environment(name)).collect();
    let python = environment("PATH").and_then(|path| {
        let mut folders = std::env::split_paths(&path);
        folders.find_map(|folder| {
            let python = folder.join("python3");
            python.exists().then(|| folder.parent().map(Path::to_owned))?
        })
    });
    roots.extend(python);
    roots.extend(environment("HOME").map(|home| home.join(".local")));
    roots.extend(["/usr/local", "/usr"].map(PathBuf::from));
    let mut folders = Vec::new();
    for python in roots.iter().flat_map(|root| newest_first(&root.join("lib"), "python3")) {
        folders
            .extend(["site-packages", "dist-packages"].map(|packages| python.join(packages).join("nvidia")));
    }
    folders
}

/// What in a folder begins so, by the version behind the beginning.
pub(crate) fn newest_first(folder: &Path, beginning: &str) -> Vec<PathBuf> {
    let mut found = named(folder, beginning);
    found.sort_by_cached_key(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        std::cmp::Reverse((version(name.strip_prefix(beginning).unwrap_or_default()), name))
    });
    found
}

/// The numbers of a version: (12, 10) is after (12, 9).
fn version(text: &str) -> Vec<u64> {
    text.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

/// What in a folder begins so.
pub(crate) fn named(folder: &Path, beginning: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let entries = entries.flatten().map(|entry| entry.path());
    let is_meant =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(beginning));
    entries.filter(is_meant).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_of_an_active_environment_come_first() {
        let root = tempfile::tempdir().unwrap();
        let python = root.path().join("lib/python3.12");
        std::fs::create_dir_all(&python).unwrap();
        let environment = |name: &str| (name == "VIRTUAL_ENV").then(|| root.path().to_owned());
        assert_eq!(python_packages(&environment)[0], python.join("site-packages/nvidia"));
    }

    #[test]
    fn versions_compare_as_numbers() {
        assert!(version("-12.10") > version("-12.9"));
        assert!(version("-12.9") > version("-12") && version("-12") > version(""));
        assert!(version(".12") > version(".9"));
        assert_eq!(version(".so.13.0.48"), [13, 0, 48]);
    }
}
