//! Row 21: a process of another user calls at the sockets of the ranks, with descriptors in hand, or takes the name of one that
//! is gone. Needs root, to become somebody else; says so where it is skipped.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::time::Duration;

use rustix::net::{AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketType};
use rustix::process::Signal;
use unisono::Result;

use super::parts::setting;
use super::server;
use super::strangers::{abstract_name, call_rank, complete, waiting_world};
use super::world::{Setup, World};

/// The user that we become: nobody.
const NOBODY: u32 = 65_534;

/// A process of another user that plays `part` with the sockets `names`; `None`, said aloud, where we may not.
fn intruder(part: &'static str, names: &[String]) -> Option<World> {
    let setup = Setup::new(part, 1, server().unique_id()).with("FAULTS_NAMES", names.join(" "));
    let mut command = setup.command(0);
    command.uid(NOBODY).gid(NOBODY).current_dir("/");
    let mut probe = setup.command(0);
    probe.uid(NOBODY).gid(NOBODY).current_dir("/").env("FAULTS_PART", "nothing");
    if !rustix::process::getuid().is_root() || !probe.output().is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: only root can become another user, who must be able to start this program");
        return None;
    }
    Some(World::start([command], setup.job.clone()))
}

fn names() -> Vec<String> {
    setting::<String>("FAULTS_NAMES").unwrap_or_default().split(' ').map(str::to_owned).collect()
}

/// The part `sprayer`: sends descriptors to all of these sockets for as long as it lives.
pub(crate) fn spray() -> Result<()> {
    let names = names();
    let mut calls = 0u64;
    loop {
        for name in &names {
            let Some(socket) = call_rank(name) else { continue };
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            let gifts: [BorrowedFd<'_>; 8] = [socket.as_fd(); 8];
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&gifts)));
            let claim = [&b"uni1"[..], &[2, 0, 0, 0, (calls % 2) as u8, 0, 0, 0]].concat();
            // Refused already, or still in line.
            let _ = rustix::net::sendmsg(
                &socket,
                &[std::io::IoSlice::new(&claim)],
                &mut ancillary,
                SendFlags::NOSIGNAL,
            );
            calls += 1;
            if calls == 500 {
                println!("sprayed");
            }
        }
        // A full line is waited for.
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// The part `squatter`: listens under the first of these names.
pub(crate) fn squat() -> Result<()> {
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    rustix::net::bind(&socket, &abstract_name(&names()[0])).unwrap();
    rustix::net::listen(&socket, 16).unwrap();
    println!("bound");
    std::thread::sleep(Duration::from_secs(60));
    Ok(())
}

fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// The ranks meet, and none keeps any of the descriptors that it was sent.
pub(crate) fn descriptors_of_another_user_are_not_kept() {
    let server = server();
    let kept = |with_intruder: bool| -> Option<Vec<usize>> {
        let setup = Setup::new("collectives", 3, server.unique_id());
        let (mut world, names) = waiting_world(&setup);
        let mut sprayer = None;
        if with_intruder {
            let mut intruder = intruder("sprayer", &names)?;
            intruder.wait_until("its calls", |intruder| intruder.ranks[0].said("sprayed"));
            sprayer = Some(intruder);
        }
        complete(&mut world, &setup);
        drop(sprayer);
        let kept = world.ranks.iter().map(|rank| descriptors(rank.pid)).collect();
        if with_intruder {
            let told = format!("a process of user {NOBODY} connected as a rank of this job");
            assert!(world.ranks.iter().any(|rank| rank.errors.iter().any(|line| line.contains(&told))));
        }
        world.expect_good_end();
        Some(kept)
    };
    let usual = kept(false).unwrap();
    if let Some(sprayed) = kept(true) {
        assert_eq!(sprayed, usual, "descriptors of each rank");
    }
}

/// A rank dies between meeting and connecting, and another user takes its name: whoever dials it refuses.
pub(crate) fn a_name_that_another_user_took_is_refused() {
    let server = server();
    let setup = Setup::new("start", 2, server.unique_id()).with("FAULTS_HOW", "stop");
    let commands = (0..2).map(|rank| setup.clone().with("FAULTS_VICTIM", rank).command(rank));
    let mut world = World::start(commands, setup.job.clone());
    let is_stopped = |pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
    };
    world.wait_until("both have met", |world| world.ranks.iter().all(|rank| is_stopped(rank.pid)));
    let name = super::traces::Traces::of(&[world.ranks[0].pid], &setup.job).names();
    world.kill(0);
    world.wait_until("the death", |world| world.ranks[0].status.is_some());
    let Some(mut squatter) = intruder("squatter", &name) else { return };
    squatter.wait_until("its name", |squatter| squatter.ranks[0].said("bound"));
    world.signal(1, Signal::CONT);
    world.wait_for_end();
    let failure = world.ranks[1].failure().unwrap_or_else(|| panic!("{}", world.transcript()));
    assert_eq!(failure.variant, "Node", "{}", failure.sentence);
    assert!(failure.sentence.contains(&format!("a process of user {NOBODY}")), "{}", failure.sentence);
    println!("{}", failure.sentence);
}
