//! How the processes of one host find each other and prove who they are.
//!
//! Every rank binds an abstract socket with a random name and tells the name in its hello. It then connects to every
//! lower rank and accepts every higher one, all at once: one loop over all pending connections, so that a silent
//! stranger delays nobody. A connection is taken when its user is ours, both sides proved the job's secret, and each
//! handed the other a descriptor of its own process. Whether a higher rank that has not dialled yet is still there is
//! looked at every quarter of a second, by connecting to its socket and hanging up.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::SocketFlags;
use rustix::process::{PidfdFlags, getpid, getuid, pidfd_open};
use unisono_core::Secret;
use unisono_core::auth::{Handshake, Opened, Role, Session};
use unisono_sync::Deadline;

use crate::credentials::{self, Credentials};
use crate::error::{Error, Lost, Result};
use crate::socket::{self, MAX_MESSAGE_BYTES, Received, Sent};

/// First bytes of an introduction: who connects, to whom.
const MAGIC: [u8; 4] = *b"uni1";
const INTRODUCTION_BYTES: usize = 12;
/// Frame kind of the message that carries the sender's process descriptor.
const WELCOME: u16 = 1;
/// How long a connection may take to prove itself.
const PROOF_TIME: Duration = Duration::from_secs(2);
/// How often the ranks that are waited for are looked at. Two looks in a row must find one gone.
const LOOK: Duration = Duration::from_millis(250);
/// Pending connections at once; a further one replaces the oldest stranger.
const MAX_PENDING: usize = 256;
/// Accepted before those that came earlier are heard: fewer than may be pending, so that nobody is replaced unheard.
const ACCEPTS_PER_TURN: usize = 64;
/// How long whoever said its name is not replaced.
const GRACE: Duration = Duration::from_millis(250);

/// Where a rank listens for the others of its host. While they connect it stands for the rank's life: keep it until all
/// of them are known to have connected.
#[derive(Debug)]
pub struct Endpoint {
    listener: OwnedFd,
    name: [u8; 16],
}

impl Endpoint {
    /// Binds a socket with a random abstract name.
    pub fn bind() -> Result<Self> {
        let mut name = [0; 16];
        fill_random(&mut name)?;
        let listener = socket::new_socket()?;
        rustix::net::bind(&listener, &socket::address(name)?).map_err(Error::socket("bind"))?;
        rustix::net::listen(&listener, 1024).map_err(Error::socket("listen"))?;
        Ok(Self { listener, name })
    }

    /// The random part of its name, for the hello.
    pub const fn name(&self) -> [u8; 16] {
        self.name
    }
}

fn fill_random(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes)
        .map_err(|error| Error::Socket { action: "random bytes", message: error.to_string() })
}

/// Another rank of this host.
#[derive(Clone, Debug)]
pub struct PeerAddress {
    /// Its rank in the world.
    pub rank: usize,
    /// Its process, as it says.
    pub pid: u32,
    /// The random part of its endpoint's name.
    pub endpoint: [u8; 16],
}

/// What a rank needs to meet the others of its host.
#[derive(Clone, Debug)]
pub struct PlaneConfig {
    /// Binds the handshakes to this job and generation.
    pub context: String,
    /// Our rank in the world.
    pub rank: usize,
    /// The others.
    pub peers: Vec<PeerAddress>,
    /// The job's secret.
    pub secret: Secret,
    /// After this long without a heartbeat a peer is suspected; `None`: never.
    pub liveness: Option<Duration>,
}

/// An authenticated connection to one peer.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) rank: usize,
    /// Its process, as it says, or as we see it, which is another number where process namespaces differ.
    pub(crate) pid: u32,
    /// The same, if we see it.
    pub(crate) seen_pid: Option<u32>,
    pub(crate) socket: OwnedFd,
    pub(crate) pidfd: Option<OwnedFd>,
    pub(crate) session: Session,
}

/// Connects to all peers of `config`; links in no particular order.
pub(crate) fn connect_all(
    endpoint: &Endpoint,
    config: &PlaneConfig,
    deadline: Deadline,
) -> Result<Vec<Link>> {
    let start = Instant::now();
    let mut meeting =
        Meeting { config, links: Vec::new(), pending: Vec::new(), suspects: Vec::new(), refused: 0 };
    let mut next_look = start + LOOK;
    let mut to_dial: Vec<&PeerAddress> = config.peers.iter().filter(|peer| peer.rank < config.rank).collect();
    let mut buffer = vec![0; MAX_MESSAGE_BYTES];
    while meeting.links.len() < config.peers.len() {
        let mut still_to_dial = Vec::new();
        for peer in to_dial {
            match meeting.dial(peer)? {
                Some(pending) => meeting.pending.push(pending),
                None => still_to_dial.push(peer),
            }
        }
        to_dial = still_to_dial;
        let slice = if to_dial.is_empty() { Duration::from_millis(100) } else { Duration::from_millis(2) };
        meeting.wait(endpoint, deadline.remaining_up_to(slice))?;
        meeting.accept(endpoint)?;
        meeting.advance(&mut buffer)?;
        if Instant::now() >= next_look {
            meeting.look_for_the_dead()?;
            next_look = Instant::now() + LOOK;
        }
        if deadline.is_over() && meeting.links.len() < config.peers.len() {
            return Err(meeting.missing(start.elapsed()));
        }
    }
    Ok(meeting.links)
}

/// A connection on its way to being a [`Link`].
struct Pending {
    socket: OwnedFd,
    since: Instant,
    /// Its process, if it lies in a process namespace that we see.
    pid: Option<u32>,
    stage: Stage,
    /// The peer we dialled; a failure of such a connection is ours to report.
    dialled: bool,
}

enum Stage {
    /// Accepted, waiting for who it is.
    Introduction,
    /// Proving the secret.
    Proof { rank: usize, handshake: Box<Handshake> },
    /// Waiting for the peer's process descriptor.
    Welcome { rank: usize, session: Box<Session> },
}

struct Meeting<'a> {
    config: &'a PlaneConfig,
    links: Vec<Link>,
    pending: Vec<Pending>,
    /// Ranks whose socket was gone when last looked at.
    suspects: Vec<usize>,
    /// Connections that were turned away.
    refused: u64,
}

impl Meeting<'_> {
    fn missing(&self, waited: Duration) -> Error {
        let here = |rank| self.links.iter().any(|link| link.rank == rank);
        let missing = self.config.peers.iter().map(|peer| peer.rank).filter(|rank| !here(*rank)).collect();
        Error::Missing { rank: self.config.rank, missing, waited }
    }

    /// Connects to `peer` and introduces us; `None` if its queue is full just now.
    fn dial(&self, peer: &PeerAddress) -> Result<Option<Pending>> {
        let socket = socket::new_socket()?;
        match rustix::net::connect(&socket, &socket::address(peer.endpoint)?) {
            Ok(()) => {}
            Err(Errno::AGAIN | Errno::INTR | Errno::INPROGRESS) => return Ok(None),
            Err(Errno::CONNREFUSED) => return Err(peer.lost()),
            Err(errno) => return Err(Error::socket("connect")(errno)),
        }
        let pid = check_user(&socket)?;
        let mut introduction = [0; INTRODUCTION_BYTES];
        introduction[..4].copy_from_slice(&MAGIC);
        introduction[4..8].copy_from_slice(&(self.config.rank as u32).to_le_bytes());
        introduction[8..].copy_from_slice(&(peer.rank as u32).to_le_bytes());
        if socket::send(&socket, &introduction, &[], Deadline::after(PROOF_TIME))? == Sent::Closed {
            return Err(peer.lost());
        }
        let handshake = self.handshake(Role::Initiator, self.config.rank, peer.rank)?;
        let mut pending = Pending {
            socket,
            since: Instant::now(),
            pid,
            stage: Stage::Proof { rank: peer.rank, handshake: Box::new(handshake) },
            dialled: true,
        };
        pending.flush()?;
        Ok(Some(pending))
    }

    /// Fails if a rank that has yet to dial us closed its socket: it died, or its own start failed.
    fn look_for_the_dead(&mut self) -> Result<()> {
        let is_known = |rank: usize| {
            self.links.iter().any(|link| link.rank == rank)
                || self.pending.iter().any(|pending| pending.stage.rank() == Some(rank))
        };
        let mut suspects = Vec::new();
        for peer in
            self.config.peers.iter().filter(|peer| peer.rank > self.config.rank && !is_known(peer.rank))
        {
            let probe = socket::new_socket()?;
            if rustix::net::connect(&probe, &socket::address(peer.endpoint)?) == Err(Errno::CONNREFUSED) {
                // What it sent before it closed may not have been read yet.
                if self.suspects.contains(&peer.rank) {
                    return Err(peer.lost());
                }
                suspects.push(peer.rank);
            }
        }
        self.suspects = suspects;
        Ok(())
    }

    fn handshake(&self, role: Role, initiator: usize, responder: usize) -> Result<Handshake> {
        let mut nonce = [0; 32];
        fill_random(&mut nonce)?;
        let context = format!("unisono node plane {} {initiator} {responder}", self.config.context);
        Ok(Handshake::new(role, &self.config.secret, context.as_bytes(), nonce))
    }

    fn wait(&self, endpoint: &Endpoint, timeout: Duration) -> Result<()> {
        let mut fds = vec![PollFd::from_borrowed_fd(endpoint.listener.as_fd(), PollFlags::IN)];
        for pending in &self.pending {
            fds.push(PollFd::from_borrowed_fd(pending.socket.as_fd(), PollFlags::IN));
        }
        socket::wait_for(&mut fds, timeout).map(|_| ())
    }

    /// Takes what waits on the listener; strangers are turned away with a warning.
    fn accept(&mut self, endpoint: &Endpoint) -> Result<()> {
        for _ in 0..ACCEPTS_PER_TURN {
            if self.pending.len() >= MAX_PENDING && !self.replace_a_stranger() {
                break;
            }
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = match rustix::net::accept_with(&endpoint.listener, flags) {
                Ok(socket) => socket,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                // No descriptor is left: strangers must not take them from us.
                Err(Errno::MFILE | Errno::NFILE) if self.replace_a_stranger() => continue,
                Err(errno) => return Err(Error::socket("accept")(errno)),
            };
            match check_user(&socket) {
                Ok(pid) => self.pending.push(Pending {
                    socket,
                    since: Instant::now(),
                    pid,
                    stage: Stage::Introduction,
                    dialled: false,
                }),
                Err(error) => self.refuse(None, &error),
            }
        }
        Ok(())
    }

    /// Closes the connection that has waited longest without saying who it is, or at least without proving it; false if there
    /// is none.
    fn replace_a_stranger(&mut self) -> bool {
        let is_nameless = |pending: &Pending| matches!(pending.stage, Stage::Introduction);
        let is_slow = |pending: &Pending| !pending.dialled && pending.since.elapsed() > GRACE;
        let at = self.pending.iter().position(is_nameless).or_else(|| self.pending.iter().position(is_slow));
        let Some(at) = at else { return false };
        let stranger = self.pending.remove(at);
        let reason = "it did not prove itself while many others came";
        self.refuse(stranger.pid, &unisono_core::Error::Auth { reason }.into());
        true
    }

    /// Warns of a connection that is turned away. A flood must not fill the log: the 1st, 2nd, 4th, 8th … are told.
    fn refuse(&mut self, pid: Option<u32>, why: &Error) {
        self.refused += 1;
        if self.refused.is_power_of_two() {
            let (rank, refused) = (self.config.rank, self.refused);
            let who = pid.map_or("a process that we do not see".to_owned(), |pid| format!("process {pid}"));
            tracing::warn!(refused, "rank {rank}: {who} was refused: {why}");
        }
    }

    /// Moves every pending connection on as far as what arrived allows.
    fn advance(&mut self, buffer: &mut [u8]) -> Result<()> {
        let mut waiting = Vec::new();
        for pending in std::mem::take(&mut self.pending) {
            let (dialled, pid) = (pending.dialled, pending.pid);
            match self.advance_one(pending, buffer) {
                Ok(Progress::Waiting(pending)) => waiting.push(pending),
                Ok(Progress::Linked(link)) => self.links.push(*link),
                Ok(Progress::HungUp) => {}
                Err(error) if dialled => return Err(error),
                Err(error) => self.refuse(pid, &error),
            }
        }
        self.pending = waiting;
        Ok(())
    }

    fn advance_one(&self, mut pending: Pending, buffer: &mut [u8]) -> Result<Progress> {
        loop {
            let (length, fds) = match socket::receive(&pending.socket, buffer)? {
                Received::Nothing if !pending.dialled && pending.since.elapsed() > PROOF_TIME => {
                    return Err(
                        unisono_core::Error::Auth { reason: "it said nothing for two seconds" }.into()
                    );
                }
                Received::Nothing => return Ok(Progress::Waiting(pending)),
                Received::EndOfFile => return self.closed(&pending),
                Received::Message(length, fds) => (length, fds),
            };
            let message = &buffer[..length];
            pending.stage = match pending.stage {
                Stage::Introduction => self.introduced(message)?,
                Stage::Proof { rank, mut handshake } => {
                    let proved = handshake.on_input(message);
                    if proved.is_err()
                        && let Some(last) = handshake.poll_output()
                    {
                        // So that the peer learns why, too. If it does not read, it will see the connection close.
                        let _ = socket::try_send(&pending.socket, &last, &[]);
                    }
                    proved?;
                    Stage::Proof { rank, handshake }
                }
                Stage::Welcome { rank, mut session } => {
                    check_welcome(&mut session, message)?;
                    let (pid, seen_pid) = (self.pid_of(rank, pending.pid), pending.pid);
                    let (socket, pidfd, session) = (pending.socket, fds.into_iter().next(), *session);
                    let link = Link { rank, pid, seen_pid, socket, pidfd, session };
                    return Ok(Progress::Linked(Box::new(link)));
                }
            };
            pending.flush()?;
        }
    }

    fn closed(&self, pending: &Pending) -> Result<Progress> {
        match pending.stage.rank() {
            None => Ok(Progress::HungUp),
            Some(rank) => {
                let pid = self.pid_of(rank, pending.pid);
                Err(Error::PeerLost { rank, pid, lost: Lost::SocketClosed })
            }
        }
    }

    /// How messages call the process of `rank`: as we see it, else as it says itself.
    fn pid_of(&self, rank: usize, seen: Option<u32>) -> u32 {
        let told = self.config.peers.iter().find(|peer| peer.rank == rank).map(|peer| peer.pid);
        seen.or(told).unwrap_or(0)
    }

    fn introduced(&self, message: &[u8]) -> Result<Stage> {
        let number = |at: usize| {
            let bytes = message.get(at..at + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?) as usize)
        };
        let (Some(rank), Some(target)) = (number(4), number(8)) else {
            return Err(unisono_core::Error::Auth { reason: "its introduction is too short" }.into());
        };
        let known = rank > self.config.rank && self.config.peers.iter().any(|peer| peer.rank == rank);
        let linked = self.links.iter().any(|link| link.rank == rank);
        if !message.starts_with(&MAGIC) || target != self.config.rank || !known || linked {
            return Err(
                unisono_core::Error::Auth { reason: "it claims a rank that is not expected here" }.into()
            );
        }
        Ok(Stage::Proof { rank, handshake: Box::new(self.handshake(Role::Responder, rank, target)?) })
    }
}

enum Progress {
    Waiting(Pending),
    Linked(Box<Link>),
    /// It left without a word: a rank that looked whether we are here.
    HungUp,
}

impl Pending {
    /// Sends what the handshake has to say; once it is done, sends our process descriptor.
    fn flush(&mut self) -> Result<()> {
        let Stage::Proof { rank, handshake } = &mut self.stage else { return Ok(()) };
        // Whether the peer closed is found out, and reported, by whoever reads.
        while let Some(bytes) = handshake.poll_output() {
            socket::send(&self.socket, &bytes, &[], Deadline::after(PROOF_TIME))?;
        }
        if let Some(mut session) = handshake.finish() {
            let mut frame = Vec::new();
            session.sealer.seal(WELCOME, &[], &mut frame)?;
            // Without a descriptor (an old kernel, or a filter) end-of-file alone tells of our death.
            let pidfd = pidfd_open(getpid(), PidfdFlags::empty()).ok();
            let fds: Vec<BorrowedFd<'_>> = pidfd.iter().map(AsFd::as_fd).collect();
            socket::send(&self.socket, &frame, &fds, Deadline::after(PROOF_TIME))?;
            self.stage = Stage::Welcome { rank: *rank, session: Box::new(session) };
        }
        Ok(())
    }
}

impl Stage {
    /// Who it is, once it said so.
    const fn rank(&self) -> Option<usize> {
        match self {
            Self::Introduction => None,
            Self::Proof { rank, .. } | Self::Welcome { rank, .. } => Some(*rank),
        }
    }
}

impl PeerAddress {
    fn lost(&self) -> Error {
        Error::PeerLost { rank: self.rank, pid: self.pid, lost: Lost::SocketClosed }
    }
}

fn check_welcome(session: &mut Session, message: &[u8]) -> Result<()> {
    match session.opener.open(message)? {
        Opened::Frame { kind: WELCOME, consumed, .. } if consumed == message.len() => Ok(()),
        _ => Err(unisono_core::Error::Auth { reason: "its first sealed message is no welcome" }.into()),
    }
}

/// Refuses processes of other users; the pid of the other end, if we see it.
fn check_user(socket: &OwnedFd) -> Result<Option<u32>> {
    let (expected, Credentials { pid, uid: got }) = (getuid().as_raw(), credentials::of_peer(socket)?);
    if expected == got { Ok(pid) } else { Err(Error::ForeignUser { expected, got }) }
}
