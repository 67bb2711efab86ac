//! Processors, clock and network interfaces.

use std::fmt::Write as _;
use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Instant;

use unisono::host;

use super::Finding;
use crate::hardware::{self, Hardware, format_set};

pub(super) fn check() -> Vec<Finding> {
    let hardware = Hardware::here();
    vec![
        processors(&hardware, &hardware::allowed(), host::processor_quota()),
        clock(&sysfs("current_clocksource"), &sysfs("available_clocksource")),
        interfaces(),
    ]
}

fn processors(hardware: &Hardware, allowed: &[usize], quota: Option<f64>) -> Finding {
    const CHECK: &str = "processors";
    let mut found = hardware.summary();
    let (online, cores) = (hardware.processors.len(), hardware.cores());
    if cores < online {
        let _ = write!(found, " ({} hyper-threads per core)", online.div_ceil(cores.max(1)));
    }
    if allowed.len() < online {
        let _ = write!(found, "; this process may run on {}: {}", allowed.len(), format_set(allowed));
    }
    match quota {
        Some(quota) if quota < allowed.len() as f64 => Finding::warn(
            CHECK,
            format!(
                "{found}; the control group gives the time of {quota:.1} of them, so ranks are halted while others wait for them"
            ),
            format!(
                "docker run --cpus={} (or no limit), or start at most {} ranks",
                allowed.len(),
                quota.max(1.0) as usize
            ),
        ),
        _ if allowed.len() == 1 && online > 1 => Finding::warn(
            CHECK,
            format!("{found}; all ranks would share one processor"),
            format!(
                "taskset -c {} unisono …",
                format_set(&hardware.processors.iter().map(|cpu| cpu.id).collect::<Vec<_>>())
            ),
        ),
        _ => Finding::ok(CHECK, found),
    }
}

fn sysfs(name: &str) -> String {
    let path = format!("/sys/devices/system/clocksource/clocksource0/{name}");
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn clock(current: &str, available: &str) -> Finding {
    const CHECK: &str = "clock";
    let cost = reading_cost_ns();
    match current {
        // Those that are read without a system call.
        "tsc" | "kvm-clock" | "hyperv_clocksource_tsc_page" | "arch_sys_counter" => {
            Finding::ok(CHECK, format!("{current}, {cost:.0} ns per reading"))
        }
        "" => Finding::ok(CHECK, format!("the kernel does not tell its source; {cost:.0} ns per reading")),
        slow => {
            let found = format!("{slow}, {cost:.0} ns per reading: each one is a system call");
            let better = available.split_whitespace().find(|name| matches!(*name, "tsc" | "kvm-clock"));
            Finding::warn(CHECK, found, better.map_or_else(
                || "boot with clocksource=tsc tsc=reliable, if the machine's counters run evenly".to_owned(),
                |better| format!("echo {better} | sudo tee /sys/devices/system/clocksource/clocksource0/current_clocksource"),
            ))
        }
    }
}

/// Nanoseconds per reading of the clock.
fn reading_cost_ns() -> f64 {
    const READINGS: u32 = 10_000;
    let start = Instant::now();
    for _ in 0..READINGS {
        std::hint::black_box(Instant::now());
    }
    start.elapsed().as_secs_f64() * 1e9 / f64::from(READINGS)
}

fn interfaces() -> Finding {
    const CHECK: &str = "interfaces";
    let loopback = || -> io::Result<()> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        TcpStream::connect(listener.local_addr()?)?;
        listener.accept().map(|_| ())
    };
    if let Err(error) = loopback() {
        return Finding::fail(CHECK, format!("127.0.0.1 does not work: {error}"), "ip link set lo up");
    }
    let there_are = hardware::interfaces().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    match std::env::var("UNISONO_INTERFACE").ok().filter(|name| !name.trim().is_empty()) {
        Some(name) => match unisono::store::interface_address(name.trim()) {
            Ok(address) => Finding::ok(CHECK, format!("{there_are}; UNISONO_INTERFACE={name} is {address}")),
            Err(error) => Finding::fail(
                CHECK,
                format!("UNISONO_INTERFACE={name}: {error}"),
                "unset UNISONO_INTERFACE, or name one of them",
            ),
        },
        None => Finding::ok(CHECK, there_are),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict::{Ok, Warn};
    use super::*;

    #[test]
    fn a_quota_below_the_processors_is_warned_about() {
        let hardware = hardware::tests::two_sockets();
        let all: Vec<usize> = (0..8).collect();
        let well = processors(&hardware, &all, Some(8.0));
        assert_eq!(
            (well.verdict, well.found.as_str()),
            (Ok, "Model, 2 sockets, 4 cores, 8 processors, 2 NUMA nodes (2 hyper-threads per core)",)
        );
        let tight = processors(&hardware, &all[..4], Some(1.5));
        assert_eq!(tight.verdict, Warn);
        assert!(
            tight.found.contains("may run on 4: 0-3; the control group gives the time of 1.5"),
            "{tight:?}"
        );
        assert_eq!(processors(&hardware, &all[..1], None).mend.unwrap(), "taskset -c 0-7 unisono …");
    }

    #[test]
    fn a_slow_clock_names_the_better_one() {
        assert_eq!(clock("tsc", "tsc").verdict, Ok);
        let slow = clock("hpet", "tsc hpet acpi_pm");
        assert_eq!(slow.verdict, Warn);
        assert!(slow.mend.unwrap().starts_with("echo tsc | sudo tee"));
    }

    #[test]
    fn the_loopback_interface_works_and_is_listed() {
        let finding = interfaces();
        assert!(finding.verdict == Ok && finding.found.contains("127.0.0.1"), "{finding:?}");
    }
}
