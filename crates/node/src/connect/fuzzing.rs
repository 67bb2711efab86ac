//! A connection whose other end says what a stranger likes, through a real socket. Without the secret it is never a link,
//! whether the stranger dialled or was dialled.

use rustix::net::{AddressFamily, SocketType, socketpair};

use super::*;

const SECRET: Secret = Secret::new([7; 32]);

/// Gives `messages` to a rank that accepted the connection, then to one that dialled.
///
/// # Panics
/// If the stranger is believed, or something is wrong with the sockets.
pub fn connection(messages: &[&[u8]]) {
    let config = PlaneConfig {
        context: "fuzz".to_owned(),
        rank: 0,
        peers: vec![PeerAddress { rank: 1, pid: 1, endpoint: [0; 16] }],
        secret: SECRET,
        liveness: None,
    };
    let meeting =
        Meeting { config: &config, links: Vec::new(), pending: Vec::new(), suspects: Vec::new(), refused: 0 };
    hold(&meeting, Stage::Introduction, messages);
    let handshake = Box::new(Handshake::new(Role::Initiator, &SECRET, b"fuzz", [1; 32]));
    hold(&meeting, Stage::Proof { rank: 1, handshake }, messages);
}

fn hold(meeting: &Meeting<'_>, stage: Stage, messages: &[&[u8]]) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let dialled = !matches!(stage, Stage::Introduction);
    let mut pending = Pending { socket: ours, since: Instant::now(), pid: Some(1), stage, dialled };
    pending.flush().unwrap();
    let mut buffer = vec![0; MAX_MESSAGE_BYTES];
    for message in messages {
        // What does not fit into a message cannot be sent.
        if socket::try_send(&theirs, message, &[]).ok() != Some(Sent::Whole) {
            return;
        }
        match meeting.advance_one(pending, &mut buffer) {
            Ok(Progress::Waiting(still)) => pending = still,
            Ok(Progress::HungUp) => return,
            Ok(Progress::Linked(link)) => panic!("rank {} was believed without the secret", link.rank),
            Err(error) => return drop(error.to_string()),
        }
    }
}

/// What a rank that has the secret says in both parts, as far as it can be said without an answer.
pub fn connection_seeds() -> Vec<Vec<Vec<u8>>> {
    let introduction = [&MAGIC[..], &1u32.to_le_bytes(), &0u32.to_le_bytes()].concat();
    let opening = Handshake::new(Role::Initiator, &SECRET, b"fuzz", [3; 32]).poll_output().unwrap();
    let mut responder = Handshake::new(Role::Responder, &SECRET, b"other", [2; 32]);
    responder.on_input(&opening).unwrap();
    let challenge = responder.poll_output().unwrap();
    vec![vec![introduction, opening, vec![0; 32]], vec![challenge, vec![0; 40]]]
}
