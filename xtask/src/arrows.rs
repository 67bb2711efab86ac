//! The floors of the house: which of our crates may depend on which. Arrows point down only.
//!
//! Read from `cargo metadata`, over all kinds of dependencies, those of tests and build scripts included.

use std::path::Path;

use cargo_metadata::MetadataCommand;

/// Each of our crates and those of ours that it may depend on.
const ARROWS: [(&str, &[&str]); 11] = [
    ("unisono-core", &[]),
    ("unisono-sync", &[]),
    ("unisono-cuda", &[]),
    ("unisono-node", &["unisono-core", "unisono-sync", "unisono-cuda"]),
    ("unisono-transport", &["unisono-core", "unisono-sync"]),
    ("unisono", &["unisono-core", "unisono-sync", "unisono-node", "unisono-transport", "unisono-cuda"]),
    ("unisono-cli", &["unisono"]),
    ("unisono-python", &["unisono", "unisono-cli"]),
    ("unisono-nccl", &["unisono"]),
    ("unisono-fuzz", &["unisono-core", "unisono-cuda", "unisono-node", "unisono"]),
    ("xtask", &[]),
];

/// The arrows of the workspace at `root` that are not allowed, as sentences.
pub(crate) fn check(root: &Path) -> Result<Vec<String>, String> {
    let metadata = MetadataCommand::new()
        .manifest_path(root.join("Cargo.toml"))
        .no_deps()
        .other_options(["--offline".to_owned()])
        .exec()
        .map_err(|error| format!("cargo metadata failed: {error}"))?;
    let mut found = Vec::new();
    for package in &metadata.packages {
        let ours = package.dependencies.iter().filter(|dependency| dependency.path.is_some());
        found.extend(check_crate(&package.name, ours.map(|dependency| dependency.name.as_str())));
    }
    Ok(found)
}

fn check_crate<'a>(from: &str, to: impl Iterator<Item = &'a str>) -> Vec<String> {
    let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == from) else {
        return vec![format!("crate `{from}` has no floor; give it one in ARROWS of xtask/src/arrows.rs")];
    };
    to.filter(|name| !allowed.contains(name))
        .map(|name| format!("`{from}` must not depend on `{name}`; it may use {allowed:?}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crates_of_this_workspace_depend_downwards_only() {
        assert_eq!(check(&crate::root()), Ok(Vec::new()));
    }

    #[test]
    fn an_arrow_that_points_up_or_sideways_is_found() {
        let found = check_crate("unisono-node", ["unisono-sync", "unisono"].into_iter());
        assert_eq!(
            found,
            ["`unisono-node` must not depend on `unisono`; it may use \
                 [\"unisono-core\", \"unisono-sync\", \"unisono-cuda\"]"]
        );
        assert_eq!(check_crate("unisono-sync", ["unisono-core"].into_iter()).len(), 1);
        assert_eq!(check_crate("newcomer", std::iter::empty()).len(), 1);
    }

    #[test]
    fn no_two_floors_depend_on_each_other() {
        for (from, allowed) in ARROWS {
            for to in allowed {
                let (_, back) = ARROWS.iter().find(|(name, _)| name == to).unwrap();
                assert!(!back.contains(&from), "{from} and {to}");
            }
        }
    }
}
