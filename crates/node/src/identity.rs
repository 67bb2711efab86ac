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

/// Our process id.
pub fn pid() -> u32 {
    std::process::id()
}

/// Whether process `pid` is stopped by a signal or a debugger; `None` if that cannot be told.
pub fn is_stopped(pid: u32) -> Option<bool> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name before the state is in parentheses and may itself contain any character.
    let state = stat.rsplit_once(')')?.1.trim_start().chars().next()?;
    Some(matches!(state, 'T' | 't'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_runs_on_a_named_machine() {
        let host = host();
        assert!(!host.name.is_empty() && !host.boot_id.is_empty());
        assert!(host.is_same_host(&super::host()));
        assert_eq!(is_stopped(pid()), Some(false));
        assert_eq!(is_stopped(u32::MAX), None);
    }
}
