//! Row 17: ranks of one machine in different namespaces, as in containers. They share memory, or are told why not.

use std::process::Command;

use super::server;
use super::world::{Setup, World};

/// Namespaces that one of the ranks has for itself, and in which it works all the same.
const HARMLESS: [&[&str]; 8] = [
    &["--pid", "--fork", "--kill-child"],
    &["--pid", "--fork", "--kill-child", "--mount-proc"],
    &["--ipc"],
    &["--mount"],
    &["--uts", "--cgroup"],
    &["--user"],
    &["--user", "--map-root-user"],
    &[
        "--user",
        "--map-root-user",
        "--pid",
        "--fork",
        "--kill-child",
        "--ipc",
        "--mount",
        "--uts",
        "--cgroup",
    ],
];

fn unshare(namespaces: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    command.args(namespaces).arg("--");
    command
}

/// Whether this machine lets us; says so if not.
fn may(namespaces: &[&str]) -> bool {
    let may = unshare(namespaces).arg("true").output().is_ok_and(|output| output.status.success());
    if !may {
        eprintln!("SKIPPED: no right to `unshare {}`", namespaces.join(" "));
    }
    may
}

/// A world of three whose rank `inside` has namespaces of its own.
fn world(setup: &Setup, inside: usize, namespaces: &[&str]) -> World {
    let command = |rank| {
        if rank != inside {
            return setup.command(rank);
        }
        let mut command = unshare(namespaces);
        setup.tell(&mut command, rank);
        command.arg(std::env::current_exe().unwrap());
        command
    };
    World::start((0..3).map(command), setup.job.clone())
}

/// Process, mount, user and other namespaces: shared memory all the same, and a death is noticed.
pub(crate) fn ranks_in_other_namespaces_share_memory() {
    let server = server();
    for namespaces in HARMLESS.into_iter().filter(|namespaces| may(namespaces)) {
        // On the rank that creates the memory, and on one that receives it.
        let worlds: Vec<(usize, Setup, World)> = [0, 2]
            .into_iter()
            .map(|inside| {
                let setup = Setup::new("collectives", 3, server.unique_id());
                let world = world(&setup, inside, namespaces);
                (inside, setup, world)
            })
            .collect();
        for (inside, _setup, mut world) in worlds {
            world.wait_until_all_said("ready");
            if inside == 0 {
                world.expect_good_end();
                continue;
            }
            // It is killed with its parent, or is what we started.
            world.kill(inside);
            world.wait_for_end();
            for rank in [0, 1] {
                let failure = world.ranks[rank].failure().unwrap_or_else(|| panic!("{}", world.transcript()));
                let expected = ("PeerDied", vec![inside]);
                assert_eq!(
                    (failure.variant.as_str(), failure.names.clone()),
                    expected,
                    "{}",
                    failure.sentence
                );
                assert!(!failure.sentence.contains("pid 0"), "{}", failure.sentence);
            }
        }
    }
}

/// Another network namespace: the sockets are out of reach, and every rank is told so.
pub(crate) fn ranks_in_other_networks_are_told_so() {
    if !may(&["--net"]) {
        return;
    }
    let server = server();
    let folder = tempfile::tempdir().unwrap();
    let setup = Setup::new("collectives", 3, server.unique_id())
        .with("FAULTS_STORE_FILE", folder.path().join("store").display());
    let mut world = world(&setup, 1, &["--net"]);
    world.wait_for_end();
    for rank in &world.ranks {
        let failure = rank.failure().unwrap_or_else(|| panic!("{}", world.transcript()));
        assert_eq!(failure.variant, "SeveralHosts", "{}", failure.sentence);
        assert!(failure.sentence.contains("the 3 ranks lie on 2 hosts ("), "{}", failure.sentence);
        assert_eq!(failure.sentence.matches(" in network namespace ").count(), 2, "{}", failure.sentence);
    }
}
