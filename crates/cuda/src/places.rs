//! Where libraries of NVIDIA lie that no loader knows: the folder `nvidia` among the packages of each Python that is found.
//!
//! Folders are looked at, and no Python is started.

use std::path::{Path, PathBuf};

/// The folders `nvidia` in the packages of active environments, of the first `python3` on the path, of the user and of the
/// system, in this order. `environment` answers for variables; folders that are not there may be among them.
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
    for python in roots.iter().flat_map(|root| named(&root.join("lib"), "python3")) {
        folders
            .extend(["site-packages", "dist-packages"].map(|packages| python.join(packages).join("nvidia")));
    }
    folders
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
}
