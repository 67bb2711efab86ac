//! The links of all documents, and the table of contents of the book, as findings of `cargo xtask tidy`.
//!
//! A link inside of the repository must lead to a file that is there, and to a heading of it where it names one. Pages of the book are
//! also read as web pages, where only the book is around them: they link to other files of the repository by its address, and
//! that is looked up here as well. Every page stands in the table of contents once.

use std::fs;
use std::path::{Component, Path, PathBuf};

/// Where the pages of the book are.
const PAGES: &str = "docs/src";
/// The address under which files of the repository are shown.
const ADDRESS: &str = "https://github.com/unisono-comm/unisono/blob/main/";

/// What is wrong in the document `path`, relative to `root`: line and message of each.
pub(crate) fn check(root: &Path, path: &str, text: &str) -> Vec<(usize, String)> {
    let mut findings: Vec<_> = links(text)
        .into_iter()
        .filter_map(|(line, target)| Some((line, check_link(root, path, &target)?)))
        .collect();
    if path == format!("{PAGES}/SUMMARY.md") {
        findings.extend(check_summary(root, text).into_iter().map(|message| (1, message)));
    }
    findings
}

/// What is wrong with a link of the document `path`, if anything is.
fn check_link(root: &Path, path: &str, link: &str) -> Option<String> {
    let (target, heading) =
        link.split_once('#').map_or((link, None), |(target, heading)| (target, Some(heading)));
    let of_page = path.starts_with(PAGES);
    let file = if let Some(inside) = target.strip_prefix(ADDRESS) {
        PathBuf::from(inside)
    } else if target.contains("://") || target.starts_with("mailto:") {
        return None;
    } else if target.is_empty() {
        PathBuf::from(path)
    } else {
        let file = resolve(&Path::new(path).parent().unwrap_or(Path::new("")).join(target));
        if of_page && !file.starts_with(PAGES) {
            return Some(format!("`{link}` leads out of the book; write {ADDRESS}{}", file.display()));
        }
        file
    };
    if !root.join(&file).exists() {
        return Some(format!("`{link}` leads to {}, which is not there", file.display()));
    }
    let heading = heading.filter(|_| file.extension().is_some_and(|ending| ending == "md"))?;
    let text = fs::read_to_string(root.join(&file)).unwrap_or_default();
    let is_there = headings(&text).iter().any(|known| known == heading);
    (!is_there).then(|| format!("`{link}`: {} has no such heading", file.display()))
}

/// The pages that `summary` leaves out or names twice.
fn check_summary(root: &Path, summary: &str) -> Vec<String> {
    let entries = match fs::read_dir(root.join(PAGES)) {
        Ok(entries) => entries,
        Err(error) => return vec![format!("{PAGES}: cannot be read: {error}")],
    };
    let named = links(summary);
    let mut pages: Vec<_> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    pages.sort();
    pages
        .iter()
        .filter(|page| page.ends_with(".md") && *page != "SUMMARY.md")
        .map(|page| (page, named.iter().filter(|(_, target)| target == page).count()))
        .filter(|(_, times)| *times != 1)
        .map(|(page, times)| format!("names {page} {times} times instead of once"))
        .collect()
}

/// `path` without `.` and `..`.
fn resolve(path: &Path) -> PathBuf {
    let mut resolved = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir if resolved.pop() => {}
            Component::CurDir => {}
            _ => resolved.push(part),
        }
    }
    resolved
}

/// The targets of inline links, with their lines.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in prose(text) {
        // A link may have code as its text, so only what stands between backticks goes.
        let line: String = line.split('`').step_by(2).collect();
        let mut rest = line.as_str();
        while let Some((_, after)) = rest.split_once("](") {
            let (target, behind) = after.split_once(')').unwrap_or((after, ""));
            found.push((number, target.to_owned()));
            rest = behind;
        }
    }
    found
}

/// What headings are called in links: in lower case, with hyphens for blanks, and without punctuation.
fn headings(text: &str) -> Vec<String> {
    let name = |line: &str| {
        let letters = line.trim_start_matches('#').trim().chars().filter_map(|letter| match letter {
            ' ' => Some('-'),
            '-' | '_' => Some(letter),
            _ => letter.is_alphanumeric().then_some(letter),
        });
        letters.flat_map(char::to_lowercase).collect()
    };
    prose(text).filter(|(_, line)| line.starts_with('#')).map(|(_, line)| name(line)).collect()
}

/// The lines of `text` that lie in no fenced block, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut in_block = false;
    text.lines().enumerate().filter_map(move |(index, line)| {
        let is_fence = line.trim_start().starts_with("```");
        in_block ^= is_fence;
        (!in_block && !is_fence).then_some((index + 1, line))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_found_outside_of_code() {
        let text =
            "see [a](x.md) and [`b`](y/z.rs#L3)\n```text\n[no](no.md)\n```\n`[no](no.md)` [c\nd](#e-f)";
        let expected =
            [(1, "x.md"), (1, "y/z.rs#L3"), (6, "#e-f")].map(|(line, link)| (line, link.to_owned()));
        assert_eq!(links(text), expected);
    }

    #[test]
    fn headings_are_named_as_web_pages_name_them() {
        let text = "# The `unisono` command\n```sh\n# no heading\n```\n## What's left: NCCL, ep\n";
        assert_eq!(headings(text), ["the-unisono-command", "whats-left-nccl-ep"]);
    }

    #[test]
    fn a_link_that_leads_nowhere_is_named() {
        let root = crate::root();
        let wrong = |path: &str, link: &str| check_link(&root, path, link);
        assert_eq!(wrong("README.md", "docs/src/settings.md#settings"), None);
        assert_eq!(wrong("docs/src/tour.md", "settings.md"), None);
        assert_eq!(wrong("docs/src/tour.md", &format!("{ADDRESS}ARCHITECTURE.md#decisions")), None);
        assert_eq!(wrong("docs/src/tour.md", "https://example.com/nowhere"), None);
        let is_not_there = "`no.md` leads to docs/src/no.md, which is not there";
        assert_eq!(wrong("docs/src/tour.md", "no.md").as_deref(), Some(is_not_there));
        let no_heading = "`settings.md#no`: docs/src/settings.md has no such heading";
        assert_eq!(wrong("docs/src/tour.md", "settings.md#no").as_deref(), Some(no_heading));
        assert!(
            wrong("docs/src/tour.md", "../../README.md")
                .unwrap()
                .starts_with("`../../README.md` leads out of")
        );
        assert!(
            wrong("docs/src/tour.md", &format!("{ADDRESS}no.md")).unwrap().ends_with("which is not there")
        );
    }

    #[test]
    fn a_page_that_the_contents_leave_out_is_named() {
        let root = crate::root();
        let summary = fs::read_to_string(root.join(PAGES).join("SUMMARY.md")).unwrap();
        assert_eq!(check_summary(&root, &summary), Vec::<String>::new());
        let without = summary.replace("(tour.md)", "(settings.md)");
        let expected = ["names settings.md 2 times instead of once", "names tour.md 0 times instead of once"];
        assert_eq!(check_summary(&root, &without), expected);
    }
}
