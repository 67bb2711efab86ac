//! The plane between threads that play ranks.

use std::os::fd::AsFd;
use std::sync::mpsc;
use std::time::Instant;

use unisono_core::Secret;
use unisono_sync::Counter;

use super::*;
use crate::connect::PeerAddress;
use crate::memory::SharedMemory;

const SECRET: [u8; 32] = [7; 32];
const TAG: Tag = Tag { group: 5, generation: 0, item: 9 };

/// All ranks of a world of this size, under their own numbers.
fn all(ranks: usize) -> Arc<[usize]> {
    (0..ranks).collect()
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

fn configs(endpoints: &[Endpoint]) -> Vec<PlaneConfig> {
    let peer = |(rank, endpoint): (usize, &Endpoint)| PeerAddress { rank, pid: 1, endpoint: endpoint.name() };
    (0..endpoints.len())
        .map(|rank| PlaneConfig {
            context: "test 0".into(),
            rank,
            peers: endpoints.iter().enumerate().filter(|(other, _)| *other != rank).map(peer).collect(),
            secret: Secret::new(SECRET),
            liveness: Some(Duration::from_millis(400)),
        })
        .collect()
}

fn world(ranks: usize) -> Vec<NodePlane> {
    let endpoints: Vec<_> = (0..ranks).map(|_| Endpoint::bind().unwrap()).collect();
    let threads: Vec<_> = configs(&endpoints)
        .into_iter()
        .zip(endpoints)
        .map(|(config, endpoint)| {
            std::thread::spawn(move || NodePlane::connect(&endpoint, &config, soon()).unwrap())
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

struct Recorder {
    hearts: Vec<Counter>,
    lost: Mutex<mpsc::Sender<(usize, u32, Lost)>>,
}

impl PlaneEvents for Recorder {
    fn beat(&self) {}
    fn heartbeat_of(&self, rank: usize) -> u64 {
        self.hearts[rank].value()
    }
    fn on_lost(&self, rank: usize, pid: u32, lost: Lost) {
        self.lost.lock().unwrap().send((rank, pid, lost)).unwrap();
    }
}

fn recorder(ranks: usize) -> (Arc<Recorder>, mpsc::Receiver<(usize, u32, Lost)>) {
    let (sender, receiver) = mpsc::channel();
    let hearts = (0..ranks).map(|_| Counter::new(0)).collect();
    (Arc::new(Recorder { hearts, lost: Mutex::new(sender) }), receiver)
}

#[test]
fn five_ranks_meet_and_pass_memory_to_each_other() {
    let planes = world(5);
    let memory = SharedMemory::create(4096).unwrap();
    for to in [0, 1, 3, 4] {
        planes[2].send(to, TAG, b"window", &[memory.as_fd()], soon()).unwrap();
        let message = planes[to].mailbox().receive(2, TAG, "memory", soon(), &|| false).unwrap();
        assert_eq!(message.body, b"window");
        let fd = message.fds.into_iter().next().unwrap();
        assert!(SharedMemory::from_fd(fd, 4096).is_ok());
        assert_eq!(planes[to].pid_of(2), Some(std::process::id()));
    }
}

#[test]
fn a_farewell_is_no_death_but_ends_waits() {
    let mut planes = world(2);
    let (events, lost) = recorder(2);
    planes[0].watch(all(2), events);
    drop(planes.remove(1));
    let error = planes[0].mailbox().receive(1, TAG, "anything", soon(), &|| false).unwrap_err();
    assert!(matches!(error, Error::PeerLost { rank: 1, lost: Lost::Left, .. }), "{error:?}");
    assert!(matches!(lost.recv(), Ok((1, _, Lost::Left))));
    assert!(lost.try_recv().is_err());
}

#[test]
fn a_message_that_nobody_sends_ends_by_deadline_or_abort() {
    let planes = world(2);
    let short = Deadline::after(Duration::from_millis(30));
    let error = planes[0].mailbox().receive(1, TAG, "its memory", short, &|| false).unwrap_err();
    assert!(matches!(error, Error::Timeout { rank: 1, what: "its memory", .. }));
    assert_eq!(planes[0].mailbox().receive(1, TAG, "x", soon(), &|| true).unwrap_err(), Error::Aborted);
}

#[test]
fn a_heart_that_stands_still_is_reported_once_and_a_beating_one_never() {
    let planes = world(3);
    let (events, lost) = recorder(3);
    planes[0].watch(all(3), events.clone());
    let start = Instant::now();
    let found = loop {
        events.hearts[2].add(1);
        if let Ok(found) = lost.recv_timeout(Duration::from_millis(10)) {
            break found;
        }
        assert!(start.elapsed() < Duration::from_secs(20));
    };
    // Rank 1 is a thread of this running process: silent, but not stopped.
    assert!(matches!(found, (1, _, Lost::Silent { silent_ms }) if silent_ms >= 1200), "{found:?}");
    assert!(lost.try_recv().is_err());
}

#[test]
fn each_group_hears_of_the_losses_among_its_ranks_under_its_own_numbers() {
    let mut planes = world(4);
    let ((pair, pair_lost), (trio, trio_lost)) = (recorder(4), recorder(4));
    let watch = planes[0].watch(Arc::new([0, 1]), pair);
    planes[0].watch(Arc::new([3, 0, 2]), trio);
    drop(planes.pop());
    assert!(matches!(trio_lost.recv(), Ok((0, _, Lost::Left))));
    planes[0].unwatch(watch);
    drop(planes.pop());
    assert!(matches!(trio_lost.recv(), Ok((2, _, Lost::Left))));
    drop(planes.pop());
    while planes[0].mailbox().lost(1).is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(pair_lost.try_recv().is_err() && trio_lost.try_recv().is_err());
    // Who watches later is told what has happened already.
    let (late, late_lost) = recorder(4);
    planes[0].watch(Arc::new([2, 1]), late);
    let mut told = [late_lost.recv().unwrap().0, late_lost.recv().unwrap().0];
    told.sort_unstable();
    assert_eq!(told, [0, 1]);
}

#[test]
fn a_rank_that_died_before_it_dialled_is_found_long_before_the_deadline() {
    let endpoints: Vec<_> = (0..2).map(|_| Endpoint::bind().unwrap()).collect();
    let config = configs(&endpoints).swap_remove(0);
    let mut endpoints = endpoints.into_iter();
    let (left, right) = (endpoints.next().unwrap(), endpoints.next().unwrap());
    let start = Instant::now();
    let thread = std::thread::spawn(move || NodePlane::connect(&left, &config, soon()).unwrap_err());
    drop(right);
    let error = thread.join().unwrap();
    assert_eq!(error, Error::PeerLost { rank: 1, pid: 1, lost: Lost::SocketClosed });
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_rank_that_only_looks_is_no_stranger_and_does_not_disturb() {
    let endpoints: Vec<_> = (0..2).map(|_| Endpoint::bind().unwrap()).collect();
    let mut configs = configs(&endpoints).into_iter();
    let (first, second) = (configs.next().unwrap(), configs.next().unwrap());
    let mut endpoints = endpoints.into_iter();
    let (left, right) = (endpoints.next().unwrap(), endpoints.next().unwrap());
    let thread = std::thread::spawn(move || NodePlane::connect(&left, &first, soon()));
    // It is looked at while it takes its time, and its socket is there.
    std::thread::sleep(Duration::from_millis(700));
    let right = NodePlane::connect(&right, &second, soon()).unwrap();
    let left = thread.join().unwrap().unwrap();
    left.send(1, TAG, b"hello", &[], soon()).unwrap();
    assert_eq!(right.mailbox().receive(0, TAG, "hello", soon(), &|| false).unwrap().body, b"hello");
}

#[test]
fn a_stranger_is_turned_away_and_the_ranks_still_meet() {
    let endpoints: Vec<_> = (0..2).map(|_| Endpoint::bind().unwrap()).collect();
    let stranger = socket::new_socket().unwrap();
    rustix::net::connect(&stranger, &socket::address(endpoints[0].name()).unwrap()).unwrap();
    socket::try_send(&stranger, b"uni1\x01\0\0\0\0\0\0\0", &[]).unwrap();
    let liar = socket::new_socket().unwrap();
    rustix::net::connect(&liar, &socket::address(endpoints[0].name()).unwrap()).unwrap();
    socket::try_send(&liar, b"GET / HTTP/1.1", &[]).unwrap();
    let mut configs = configs(&endpoints).into_iter();
    let (first, second) = (configs.next().unwrap(), configs.next().unwrap());
    let mut endpoints = endpoints.into_iter();
    let (left, right) = (endpoints.next().unwrap(), endpoints.next().unwrap());
    let thread = std::thread::spawn(move || NodePlane::connect(&left, &first, soon()));
    let right = NodePlane::connect(&right, &second, soon()).unwrap();
    let left = thread.join().unwrap().unwrap();
    left.send(1, TAG, b"hello", &[], soon()).unwrap();
    assert_eq!(right.mailbox().receive(0, TAG, "hello", soon(), &|| false).unwrap().body, b"hello");
}

#[test]
fn a_rank_with_another_secret_is_refused_and_the_absent_are_listed() {
    let endpoints: Vec<_> = (0..3).map(|_| Endpoint::bind().unwrap()).collect();
    let mut configs = configs(&endpoints);
    configs[1].secret = Secret::new([8; 32]);
    let mut endpoints = endpoints.into_iter();
    let (left, right) = (endpoints.next().unwrap(), endpoints.next().unwrap());
    let (second, first) = (configs.remove(1), configs.remove(0));
    let short = Deadline::after(Duration::from_millis(300));
    let thread = std::thread::spawn(move || NodePlane::connect(&left, &first, short).unwrap_err());
    let refused = NodePlane::connect(&right, &second, short).unwrap_err();
    assert!(matches!(refused, Error::Core(unisono_core::Error::Auth { .. })), "{refused}");
    let missing = thread.join().unwrap();
    assert!(matches!(&missing, Error::Missing { rank: 0, missing, .. } if missing == &[1, 2]), "{missing}");
}
