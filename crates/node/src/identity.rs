//! Which machine and process this is.

use unisono_core::hello::HostIdentity;

/// The identity of this machine: boot id and network namespace decide, the name is for people.
///
/// Where `/proc` does not tell, the parts that are missing are replaced by the machine's name, so that ranks there can
/// still find each other.
pub fn host() -> HostIdentity {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_or_else(|_| format!("name{name}"), |id| id.trim().to_owned());
    let network_namespace = rustix::fs::stat("/proc/self/ns/net").map_or(0, |stat| stat.st_ino);
    HostIdentity { name, boot_id, network_namespace }
}

/// Processors of this machine that are online, whether we are bound to some of them or not.
pub fn processors() -> usize {
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        Some((last + 1).saturating_sub(first))
    };
    match online.trim().split(',').filter_map(range).sum() {
        0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        processors => processors,
    }
}

/// Our process id.
pub fn pid() -> u32 {
    std::process::id()
}

/// What the system says of a process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProcessStatus {
    /// Its state, as `ps` shows it: `R` runs, `S` sleeps, `T` stopped, `Z` ended and not collected.
    pub state: char,
    /// When it started, in clock ticks after the start of the machine: with its pid, this names one process for ever.
    pub started: u64,
}

impl ProcessStatus {
    /// The status of process `pid`; `None` if there is none, or the system does not tell.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command name before the state is in parentheses and may itself contain any character.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?.chars().next()?;
        // The state is the third field, the time of the start the 22nd.
        let started = fields.nth(18)?.parse().ok()?;
        Some(Self { state, started })
    }

    /// Stopped by a signal or a debugger.
    pub const fn is_stopped(self) -> bool {
        matches!(self.state, 'T' | 't')
    }

    /// Ended, though its parent has not collected its status yet.
    pub const fn has_ended(self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }
}

/// Whether process `pid` is stopped by a signal or a debugger; `None` if that cannot be told.
pub fn is_stopped(pid: u32) -> Option<bool> {
    // A /proc of another process namespace knows other numbers.
    let ourselves = std::fs::read_link("/proc/self").ok()?;
    if ourselves.to_str()? != std::process::id().to_string() {
        return None;
    }
    Some(ProcessStatus::of(pid)?.is_stopped())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_runs_on_a_named_machine() {
        let host = host();
        assert!(!host.name.is_empty() && !host.boot_id.is_empty());
        assert!(host.is_same_host(&super::host()));
        assert!(processors() >= std::thread::available_parallelism().unwrap().get());
        assert_eq!(is_stopped(pid()), Some(false));
        assert_eq!(is_stopped(u32::MAX), None);
        let status = ProcessStatus::of(pid()).unwrap();
        assert!(matches!(status.state, 'R' | 'S') && status.started > 0 && !status.has_ended());
        assert_eq!(ProcessStatus::of(pid()).unwrap().started, status.started);
    }
}
