//! A copy of the repository in which lines can be broken. Files that are equal are not written again, so that `cargo`
//! builds nothing twice.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Makes `tree` hold the files of `root` that git knows or would add, and no others.
pub(super) fn update_copy(root: &Path, tree: &Path) -> Result<(), String> {
    let wanted = files(root, &["."])?;
    for file in &wanted {
        let (from, to) = (root.join(file), tree.join(file));
        let failed = |error: std::io::Error| format!("{}: it cannot be copied: {error}", file.display());
        let content = fs::read(&from).map_err(failed)?;
        if fs::read(&to).is_ok_and(|there| there == content) {
            continue;
        }
        fs::create_dir_all(to.parent().unwrap_or(tree)).map_err(failed)?;
        fs::write(&to, content).map_err(failed)?;
    }
    remove_others(tree, tree, &wanted)
}

/// Files below `folders` of `root` that git knows or would add, relative to `root`.
pub(super) fn files(root: &Path, folders: &[&str]) -> Result<Vec<PathBuf>, String> {
    let output = Command::new("git")
        .current_dir(root)
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard", "--"])
        .args(folders)
        .output()
        .map_err(|error| format!("git could not be started: {error}"))?;
    if !output.status.success() {
        return Err(format!("git ls-files: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    let names = String::from_utf8_lossy(&output.stdout).into_owned();
    let files = names.split_terminator('\0').map(PathBuf::from);
    // One that was deleted and is still known has nothing to be copied.
    Ok(files.filter(|file| root.join(file).is_file()).collect())
}

/// Removes from `folder`, in `tree`, what is not `wanted`.
fn remove_others(tree: &Path, folder: &Path, wanted: &[PathBuf]) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_dir() {
            remove_others(tree, &path, wanted)?;
        } else if !path.strip_prefix(tree).is_ok_and(|file| wanted.iter().any(|other| other == file)) {
            fs::remove_file(&path).map_err(failed)?;
        }
    }
    Ok(())
}
