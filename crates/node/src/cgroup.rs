//! What the control groups of this process allow: memory and processor time, in versions 1 and 2 of their file system.
//!
//! A limit of a parent binds its children, so all groups on the way to the root are asked and the least is taken. In a
//! container the root that is seen is often the container's own group; its files say what holds then.

use std::path::{Path, PathBuf};

/// Bytes that our groups let us allocate now; `None` if none of them limits memory. What is used but only caches files
/// counts as free, because it goes when it is needed.
pub fn memory_left() -> Option<usize> {
    Groups::here().memory_left()
}

/// Processors' worth of time that our groups let us use; `None` if none of them limits it.
pub fn processor_quota() -> Option<f64> {
    Groups::here().processor_quota()
}

struct Groups {
    /// Where control groups are mounted.
    root: PathBuf,
    /// What `/proc/self/cgroup` says: lines of `number:controllers:path`.
    membership: String,
}

impl Groups {
    fn here() -> Self {
        let membership = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Self { root: PathBuf::from("/sys/fs/cgroup"), membership }
    }

    /// The directories of our group of `controller` and of its parents.
    fn directories(&self, controller: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for line in self.membership.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
            let mount = match controllers {
                "" => self.root.clone(),
                listed if listed.split(',').any(|name| name == controller) => self.root.join(controller),
                _ => continue,
            };
            // The last of these is empty: the mount itself.
            let below = Path::new(path.trim_start_matches('/')).ancestors();
            found.extend(below.map(|part| mount.join(part)));
        }
        found
    }

    fn memory_left(&self) -> Option<usize> {
        let left = |directory: PathBuf| {
            let number = |name: &str| read(&directory, name)?.parse::<usize>().ok();
            let v2 = || Some((number("memory.max")?, number("memory.current")?));
            let v1 = || Some((number("memory.limit_in_bytes")?, number("memory.usage_in_bytes")?));
            let (limit, used) = v2().or_else(v1)?;
            let caches = ["total_inactive_file", "inactive_file"].into_iter().find_map(|name| {
                let stat = read(&directory, "memory.stat")?;
                let line = stat.lines().find(|line| line.split(' ').next() == Some(name))?;
                line.split(' ').nth(1)?.parse::<usize>().ok()
            });
            // Version 1 says "no limit" with the largest number of whole pages.
            let is_limit = limit < isize::MAX as usize & !0xffff;
            is_limit.then(|| limit.saturating_sub(used.saturating_sub(caches.unwrap_or(0))))
        };
        self.directories("memory").into_iter().filter_map(left).min()
    }

    fn processor_quota(&self) -> Option<f64> {
        let quota = |directory: PathBuf| {
            let both = read(&directory, "cpu.max").or_else(|| {
                let quota = read(&directory, "cpu.cfs_quota_us")?;
                Some(format!("{quota} {}", read(&directory, "cpu.cfs_period_us")?))
            })?;
            let (quota, period) = both.split_once(' ')?;
            // Without a limit the quota is `max` in version 2 and −1 in version 1.
            let (quota, period) = (quota.parse::<f64>().ok()?, period.parse::<f64>().ok()?);
            (quota > 0.0 && period > 0.0).then_some(quota / period)
        };
        self.directories("cpu").into_iter().filter_map(quota).min_by(f64::total_cmp)
    }
}

fn read(directory: &Path, name: &str) -> Option<String> {
    Some(std::fs::read_to_string(directory.join(name)).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file system of control groups: the files and what they hold.
    fn groups(membership: &str, files: &[(&str, &str)]) -> (tempfile::TempDir, Groups) {
        let directory = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = directory.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("{text}\n")).unwrap();
        }
        let root = directory.path().to_owned();
        (directory, Groups { root, membership: membership.to_owned() })
    }

    #[test]
    fn the_tightest_group_on_the_way_to_the_root_decides() {
        let (_kept, groups) = groups(
            "0::/jobs/one\n",
            &[
                ("jobs/one/memory.max", "max"),
                ("jobs/one/memory.current", "500"),
                ("jobs/memory.max", "1000"),
                ("jobs/memory.current", "600"),
                ("jobs/memory.stat", "anon 350\ninactive_file 250"),
                ("jobs/one/cpu.max", "150000 100000"),
                ("jobs/cpu.max", "max 100000"),
            ],
        );
        assert_eq!(groups.memory_left(), Some(650));
        assert_eq!(groups.processor_quota(), Some(1.5));
    }

    #[test]
    fn version_1_has_a_mount_for_each_controller() {
        let (_kept, groups) = groups(
            "5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n",
            &[
                ("memory/a/memory.limit_in_bytes", "4096"),
                ("memory/a/memory.usage_in_bytes", "1096"),
                ("memory/a/memory.stat", "inactive_file 1\ntotal_inactive_file 96"),
                ("memory/memory.limit_in_bytes", "9223372036854771712"),
                ("memory/memory.usage_in_bytes", "5"),
                ("cpu/a/cpu.cfs_quota_us", "50000"),
                ("cpu/a/cpu.cfs_period_us", "100000"),
                ("cpu/cpu.cfs_quota_us", "-1"),
                ("cpu/cpu.cfs_period_us", "100000"),
            ],
        );
        assert_eq!(groups.memory_left(), Some(3096));
        assert_eq!(groups.processor_quota(), Some(0.5));
    }

    #[test]
    fn without_a_limit_there_is_none() {
        let (_kept, groups) = groups("0::/\n", &[("cpu.max", "max 100000"), ("memory.max", "max")]);
        assert_eq!((groups.memory_left(), groups.processor_quota()), (None, None));
    }
}
