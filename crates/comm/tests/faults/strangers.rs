//! Processes that do not belong to the job, while it meets: a port scan, and floods (rows 18, 19).
//!
//! The last rank comes late, so that the others wait in the store and then on their sockets while strangers call at both.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use unisono::UniqueId;
use unisono_sync::{Counter, Flag};

use super::random::{self, Random};
use super::traces::Traces;
use super::world::{Setup, World};
use super::{scale, server};

/// Ranks of a world; the last one comes late.
const RANKS: usize = 3;
/// Connections of a flood, to the store and to each waiting rank.
const FLOOD: usize = 1000;
/// What a flood may cost in memory, in KiB.
const MOST_KB: usize = 16 * 1024;

/// A world whose last rank has not been started, and the names of the others' sockets.
pub(crate) fn waiting_world(setup: &Setup) -> (World, Vec<String>) {
    let mut world = World::start((0..RANKS - 1).map(|rank| setup.command(rank)), setup.job.clone());
    let pids: Vec<u32> = world.ranks.iter().map(|rank| rank.pid).collect();
    let names = || Traces::of(&pids, &setup.job).names();
    world.wait_until("their sockets", |_| names().len() == RANKS - 1);
    (world, names())
}

/// Starts the last rank; how long it then takes until all have met.
pub(crate) fn complete(world: &mut World, setup: &Setup) -> Duration {
    let begun = Instant::now();
    world.add(setup.command(RANKS - 1));
    world.wait_until_all_said("ready");
    begun.elapsed()
}

/// What a stranger says first.
fn gibberish(random: &mut Random) -> Vec<u8> {
    let mut bytes = match random.below(6) {
        0 => Vec::new(),
        1 => b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        // The magic numbers of both protocols, with ranks that are expected, and what follows cut off or wrong.
        2 => b"uniA\x01\x00\x00\x00".to_vec(),
        3 => [&b"uni1"[..], &[(random.below(4)) as u8, 0, 0, 0, random.below(3) as u8, 0, 0, 0]].concat(),
        // Lengths that would be enormous.
        4 => vec![0xff; 40],
        _ => Vec::new(),
    };
    for _ in 0..random.below(120) {
        bytes.push(random.next() as u8);
    }
    bytes
}

/// Connects to the socket of a rank; `None` if its queue is full, or it is gone.
pub(crate) fn call_rank(name: &str) -> Option<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    rustix::net::connect(&socket, &abstract_name(name)).is_ok().then_some(socket)
}

/// The address that the system's table shows as `@name`.
pub(crate) fn abstract_name(name: &str) -> SocketAddrUnix {
    SocketAddrUnix::new_abstract_name(name.trim_start_matches('@').as_bytes()).unwrap()
}

/// Sends bytes, and perhaps a descriptor that nobody asked for.
fn say(socket: &OwnedFd, bytes: &[u8], with_descriptor: bool) {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let gift = [socket.as_fd()];
    assert!(!with_descriptor || ancillary.push(SendAncillaryMessage::ScmRights(&gift)));
    // They may have hung up already.
    let _ =
        rustix::net::sendmsg(socket, &[std::io::IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL);
}

/// Row 18: thousands of connections with garbage, at the store and at the ranks, until all have met.
pub(crate) fn a_port_scan_does_not_keep_the_ranks_from_meeting() {
    let seed = random::seed();
    println!("seed {seed}");
    let called = (0..scale() as u64).map(|world| scanned_world(seed.wrapping_add(world << 8))).sum::<u64>();
    println!("{called} connections");
}

/// The number of connections.
fn scanned_world(seed: u64) -> u64 {
    let server = server();
    let setup = Setup::new("collectives", RANKS, server.unique_id());
    let (mut world, names) = waiting_world(&setup);
    let (over, called) = (Arc::new(Flag::new()), Arc::new(Counter::default()));
    let scanners: Vec<_> = (0..2)
        .map(|scanner| {
            let (over, called, names, address) =
                (over.clone(), called.clone(), names.clone(), server.address());
            std::thread::spawn(move || {
                scan(&mut Random::new(seed + scanner), address, &names, &over, &called)
            })
        })
        .collect();
    world.wait_until("the scan", |_| called.value() >= 3000);
    complete(&mut world, &setup);
    over.raise();
    scanners.into_iter().for_each(|scanner| scanner.join().unwrap());
    for rank in &world.ranks {
        let warnings = rank.errors.iter().filter(|line| line.contains("refused")).count();
        assert!(warnings < 40, "the log is full of it\n{}", world.transcript());
    }
    world.expect_good_end();
    called.value()
}

fn scan(random: &mut Random, store: SocketAddr, names: &[String], over: &Flag, called: &Counter) {
    // The last ones stay open, so that some are always waiting.
    let (mut streams, mut sockets) = (Vec::new(), Vec::new());
    while !over.is_raised() {
        let bytes = gibberish(random);
        if random.below(2) == 0 {
            let Ok(mut stream) = TcpStream::connect(store) else { continue };
            // The store may have closed it.
            let _ = stream.write_all(&bytes);
            streams.push(stream);
        } else {
            // Until all wait in line, nobody takes these: then the store gets more.
            let Some(socket) = call_rank(&names[random.below(names.len() as u64) as usize]) else { continue };
            say(&socket, &bytes, random.below(4) == 0);
            sockets.push(socket);
        }
        called.add(1);
        if streams.len() > 100 {
            streams.clear();
        }
        if sockets.len() > 100 {
            sockets.clear();
        }
    }
}

/// Row 19: connections that say nothing, or half of something, and stay.
pub(crate) fn a_flood_of_half_open_connections_delays_nobody() {
    let own = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: own.maximum, ..own }).unwrap();
    let usual = flooded(0);
    let flooded = flooded(FLOOD);
    setrlimit(Resource::Nofile, own).unwrap();
    println!("met in {:.0?}, flooded in {:.0?}", usual.took, flooded.took);
    assert!(flooded.took <= usual.took * 2 + Duration::from_secs(1), "{:?} {:?}", flooded.took, usual.took);
    for (usual, flooded) in usual.memory_kb.iter().zip(&flooded.memory_kb) {
        println!("{usual} KiB of memory, flooded {flooded} KiB");
        assert!(*flooded <= usual + MOST_KB, "{flooded} KiB, not {usual}");
    }
}

/// How a start went.
struct Start {
    took: Duration,
    /// Of the store and of each rank that waited.
    memory_kb: Vec<usize>,
}

/// Meets while so many connections to the store and to every waiting rank stand open. Ranks and store have the usual 1,024
/// descriptors.
fn flooded(connections: usize) -> Start {
    let placeholder = server();
    let mut stores =
        Setup::new("store", 1, placeholder.unique_id()).with("FAULTS_SOFT_DESCRIPTORS", 1024).start();
    stores.wait_until("the store", |world| world.ranks[0].value("store").is_some());
    let id = UniqueId::from_text(stores.ranks[0].value("store").unwrap()).unwrap();
    let setup = Setup::new("collectives", RANKS, id.clone()).with("FAULTS_SOFT_DESCRIPTORS", 1024);
    let (mut world, names) = waiting_world(&setup);
    let mut streams = Vec::new();
    let mut sockets = Vec::new();
    for at in 0..connections {
        let mut stream = TcpStream::connect(id.address()).unwrap();
        stream.write_all(&b"uniA\x01\x00\x00\x00more"[..at % 13]).unwrap();
        streams.push(stream);
        for name in &names {
            let socket = call_rank(name).unwrap();
            // A third says nothing, a third is cut off, a third is the last rank, as it says.
            match at % 3 {
                1 => say(&socket, b"uni1", false),
                2 => say(&socket, b"uni1\x02\x00\x00\x00\x00\x00\x00\x00", true),
                _ => {}
            }
            sockets.push(socket);
        }
    }
    let took = complete(&mut world, &setup);
    let waiting = world.ranks[..RANKS - 1].iter().map(|rank| rank.pid);
    let memory_kb = std::iter::once(stores.ranks[0].pid).chain(waiting).map(memory_kb).collect();
    drop((streams, sockets));
    world.expect_good_end();
    stores.expect_good_end();
    Start { took, memory_kb }
}

/// Private memory of a process, in KiB.
fn memory_kb(pid: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
