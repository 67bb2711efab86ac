//! The house rules over all files of the repository, and the links of its documents, printed as `file:line: message`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::rules::{check_rust, check_text};
use crate::{arrows, book};

/// Endings of the files that are read, besides those that have none.
const TEXTS: [&str; 12] = ["rs", "toml", "md", "py", "pyi", "sh", "cu", "cuh", "yml", "yaml", "json", "html"];
/// Directories that are not ours, not committed, or hold what programs made.
const SKIPPED: [&str; 5] = ["target", "gpu-bundle", "node_modules", "__pycache__", "corpus"];
/// Hidden directories that are read all the same.
const HIDDEN: [&str; 4] = [".cargo", ".ci", ".config", ".github"];

/// Prints what breaks a rule; true if nothing does.
pub(crate) fn run(root: &Path) -> bool {
    let mut findings = Vec::new();
    let mut files = Vec::new();
    if let Err(error) = collect(root, &mut files) {
        findings.push(error);
    }
    files.sort();
    for file in &files {
        check(root, file, &mut findings);
    }
    match arrows::check(root) {
        Ok(found) => findings.extend(found.into_iter().map(|message| format!("Cargo.toml: {message}"))),
        Err(error) => findings.push(error),
    }
    for finding in &findings {
        println!("{finding}");
    }
    println!("tidy: {} files, {} findings", files.len(), findings.len());
    findings.is_empty()
}

fn check(root: &Path, file: &Path, findings: &mut Vec<String>) {
    let path = file.strip_prefix(root).unwrap_or(file).to_string_lossy().into_owned();
    // What is not UTF-8 is no text.
    let text = match fs::read(file).map(String::from_utf8) {
        Ok(Ok(text)) => text,
        Ok(Err(_)) => return,
        Err(error) => return findings.push(format!("{path}: cannot be read: {error}")),
    };
    if path.ends_with(".md") {
        let found = book::check(root, &path, &text);
        findings.extend(found.into_iter().map(|(line, message)| format!("{path}:{line}: {message}")));
    }
    let mut found = check_text(&path, &text);
    if path.ends_with(".rs") {
        found.extend(check_rust(&path, &text));
    }
    findings.extend(found.into_iter().map(|finding| format!("{path}:{}: {}", finding.line, finding.message)));
}

/// Puts the texts below `folder` into `files`.
fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{}: cannot be read: {error}", folder.display());
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let kind = entry.file_type().map_err(failed)?;
        if kind.is_dir() && is_ours(&name) {
            collect(&entry.path(), files)?;
        } else if kind.is_file() && is_text(&name) {
            files.push(entry.path());
        }
    }
    Ok(())
}

fn is_ours(folder: &str) -> bool {
    !SKIPPED.contains(&folder) && (!folder.starts_with('.') || HIDDEN.contains(&folder))
}

fn is_text(name: &str) -> bool {
    match name.rsplit_once('.') {
        None => true,
        Some(("", _)) => false,
        Some((_, ending)) => TEXTS.contains(&ending),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_read_and_others_are_not() {
        assert!(is_text("lib.rs") && is_text("run") && is_text("LICENSE-MIT"));
        assert!(!is_text("Cargo.lock") && !is_text(".git") && !is_text("plot.png"));
        assert!(is_ours("crates") && is_ours(".ci"));
        assert!(!is_ours(".git") && !is_ours("target"));
    }

    #[test]
    fn this_file_is_among_those_of_the_repository() {
        let mut files = Vec::new();
        collect(&crate::root(), &mut files).unwrap();
        assert!(files.contains(&crate::root().join("xtask/src/tidy.rs")));
    }
}
