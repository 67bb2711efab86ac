//! Limits of this process and its control groups: open files, processes, memory, file size.

use rustix::process::{Resource, getrlimit};
use unisono::host;

use super::Finding;
use crate::output::bytes;

/// Descriptors that a rank holds for itself, and for each other rank of its host (a socket, a process).
const OWN_FILES: u64 = 64;
const FILES_PER_PEER: u64 = 2;
/// Below this a limit of open files is tight for a program that also reads data.
const FEW_FILES: u64 = 1024;

pub(super) fn check() -> Vec<Finding> {
    let processors = host::processors();
    vec![
        open_files(getrlimit(Resource::Nofile).current, getrlimit(Resource::Nofile).maximum),
        processes(getrlimit(Resource::Nproc).current, processors),
        file_size(getrlimit(Resource::Fsize).current, host::communicator_bytes(processors.min(1024)) as u64),
        locked(getrlimit(Resource::Memlock).current),
        memory(host::available_bytes() as u64, host::memory_left(), processors),
        shm_mount(rustix::fs::statvfs("/dev/shm").ok().map(|stat| stat.f_blocks * stat.f_frsize)),
    ]
}

fn open_files(soft: Option<u64>, hard: Option<u64>) -> Finding {
    const CHECK: &str = "open files";
    let Some(soft) = soft else { return Finding::ok(CHECK, "no limit") };
    let ranks = soft.saturating_sub(OWN_FILES) / FILES_PER_PEER + 1;
    let found = format!("{soft} per process: enough for {} ranks", ranks.min(1024));
    let mend = match hard {
        Some(hard) if hard <= soft => format!(
            "raise the hard limit of {hard}: nofile in /etc/security/limits.conf, or docker run --ulimit nofile=65536"
        ),
        _ => format!("ulimit -n {}", hard.unwrap_or(65_536).min(65_536)),
    };
    if soft <= OWN_FILES {
        Finding::fail(CHECK, format!("{soft} per process are too few for two ranks"), mend)
    } else if soft < FEW_FILES {
        Finding::warn(CHECK, found, mend)
    } else {
        Finding::ok(CHECK, found)
    }
}

fn processes(limit: Option<u64>, processors: usize) -> Finding {
    const CHECK: &str = "processes";
    /// Threads count, too: a rank has a few, and its program more.
    const PER_RANK: u64 = 16;
    let Some(limit) = limit else { return Finding::ok(CHECK, "no limit") };
    let wanted = PER_RANK * processors as u64;
    let found = format!("{limit} processes and threads of this user");
    if limit < wanted {
        Finding::warn(CHECK, format!("{found}: tight for {processors} ranks"), format!("ulimit -u {wanted}"))
    } else {
        Finding::ok(CHECK, found)
    }
}

fn file_size(limit: Option<u64>, wanted: u64) -> Finding {
    const CHECK: &str = "file size";
    match limit {
        None => Finding::ok(CHECK, "no limit"),
        Some(limit) if limit < wanted => Finding::fail(
            CHECK,
            format!(
                "at most {}; the shared memory of a job on all processors needs {}",
                bytes(limit),
                bytes(wanted)
            ),
            "ulimit -f unlimited",
        ),
        Some(limit) => {
            Finding::ok(CHECK, format!("at most {}; shared memory counts as a file", bytes(limit)))
        }
    }
}

fn locked(limit: Option<u64>) -> Finding {
    let limit = limit.map_or_else(|| "no limit".to_owned(), |limit| format!("at most {}", bytes(limit)));
    Finding::ok("locked memory", format!("{limit}; host memory is shared without locking it"))
}

fn memory(available: u64, group: Option<usize>, processors: usize) -> Finding {
    const CHECK: &str = "memory";
    let (two, all) =
        (host::communicator_bytes(2) as u64, host::communicator_bytes(processors.clamp(2, 1024)) as u64);
    let limited = group.map_or_else(String::new, |left| match left as u64 <= available {
        true => ", limited by the control group".to_owned(),
        false => format!(" (the control group would allow {})", bytes(left as u64)),
    });
    let found = format!("{} available{limited}", bytes(available));
    let needs =
        |ranks: usize, size| format!("{found}; a communicator of {ranks} ranks takes {}", bytes(size));
    let mend = if limited.starts_with(',') {
        "raise the limit: docker run --memory=…, or MemoryMax= of the service"
    } else {
        "end what uses the memory, or add swap"
    };
    if available < two {
        Finding::fail(CHECK, needs(2, two), mend)
    } else if available < 4 * all {
        Finding::warn(CHECK, needs(processors, all), mend)
    } else {
        Finding::ok(CHECK, needs(processors.max(2), all))
    }
}

fn shm_mount(size: Option<u64>) -> Finding {
    const CHECK: &str = "/dev/shm";
    /// What Docker gives a container that asks for nothing.
    const SMALL: u64 = 64 << 20;
    match size {
        None => Finding::warn(
            CHECK,
            "not mounted; unisono does not use it, but data loaders do",
            "mount -t tmpfs tmpfs /dev/shm",
        ),
        Some(size) if size <= SMALL => Finding::warn(
            CHECK,
            format!("{}; unisono does not use it (its memory has no name), but data loaders do", bytes(size)),
            "docker run --shm-size=1g, or: mount -o remount,size=1g /dev/shm",
        ),
        Some(size) => {
            Finding::ok(CHECK, format!("{}; unisono does not use it (its memory has no name)", bytes(size)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict::{Fail, Ok, Warn};
    use super::*;

    #[test]
    fn limits_are_judged_by_what_ranks_need() {
        let files = |soft| open_files(Some(soft), Some(4096)).verdict;
        assert_eq!([files(64), files(256), files(1024)], [Fail, Warn, Ok]);
        assert_eq!(open_files(None, None).verdict, Ok);
        assert_eq!(open_files(Some(256), Some(4096)).mend.unwrap(), "ulimit -n 4096");
        assert!(open_files(Some(256), Some(256)).mend.unwrap().starts_with("raise the hard limit of 256"));
        assert_eq!([processes(Some(10), 2).verdict, processes(Some(100), 2).verdict], [Warn, Ok]);
        assert_eq!([file_size(Some(10), 100).verdict, file_size(Some(100), 100).verdict], [Fail, Ok]);
        assert_eq!([1 << 10, 64 << 20, 1 << 30].map(|size| shm_mount(Some(size)).verdict), [Warn, Warn, Ok]);
        assert_eq!(shm_mount(None).verdict, Warn);
    }

    #[test]
    fn memory_names_what_limits_it() {
        let tight = memory(1 << 20, Some(1 << 20), 2);
        assert_eq!(tight.verdict, Fail);
        assert!(
            tight.found.starts_with("1 MiB available, limited by the control group; a communicator of 2"),
            "{tight:?}"
        );
        assert_eq!(memory(8 << 20, None, 4).verdict, Warn);
        assert_eq!(memory(8 << 30, Some(9 << 30), 4).verdict, Ok);
    }
}
