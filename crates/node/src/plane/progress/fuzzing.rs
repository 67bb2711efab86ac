//! The plane of a rank whose peer knows the secret and misbehaves: any frames, genuine or not, with any number of
//! descriptors. Nothing it sends may stay open, pile up without bound, or go on after it is lost.

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use unisono_core::Secret;
use unisono_core::auth::{Handshake, Role, Session};

use super::super::Peer;
use super::*;
use crate::socket::{MAX_FDS, Sent};

/// Sends each part as one message. Its first byte says how: the low four bits how many descriptors come with it, the
/// next whether it is sealed; then the second byte is the kind of its frame.
///
/// # Panics
/// If a descriptor is leaked, or more messages are kept than the cap.
pub fn plane_messages(parts: &[&[u8]]) {
    let free = lowest_free();
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let (ours_session, mut theirs_session) = sessions();
    let shared = Arc::new(Shared {
        peers: vec![Peer {
            rank: 1,
            pid: 1,
            seen_pid: Some(1),
            socket: ours,
            pidfd: None,
            sealer: ours_session.sealer.into(),
        }],
        mailbox: crate::mailbox::Mailbox::default(),
        watchers: std::sync::Mutex::default(),
        watches: unisono_sync::Counter::new(0),
        process: crate::fork::Process::this(),
        wake: rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap(),
        stopping: unisono_sync::Flag::new(),
        liveness: None,
    });
    let mut thread = PlaneThread::new(shared.clone(), vec![ours_session.opener], Duration::from_secs(1));
    let mut buffer = vec![0; MAX_MESSAGE_BYTES];
    for part in parts {
        let [how, rest @ ..] = part else { continue };
        let mut message = Vec::new();
        match rest {
            [kind, body @ ..] if how & 16 != 0 => {
                theirs_session.sealer.seal(u16::from(*kind), body, &mut message).unwrap();
            }
            rest => message.extend_from_slice(rest),
        }
        let fds = vec![shared.wake.as_fd(); usize::from(how & 15).min(MAX_FDS)];
        if socket::try_send(&theirs, &message, &fds).ok() != Some(Sent::Whole) {
            break;
        }
        thread.read(0, &mut buffer);
        let (kept, counted) = shared.mailbox.counts();
        assert_eq!(counted, kept);
        assert!(kept <= MAX_UNREAD, "{kept} messages are kept");
        if shared.mailbox.lost(1).is_some() {
            break;
        }
    }
    drop((thread, shared, theirs));
    assert_eq!(lowest_free(), free, "a descriptor was left open");
}

fn lowest_free() -> i32 {
    use std::os::fd::AsRawFd;
    rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap().as_raw_fd()
}

/// Both ends of an authenticated connection.
fn sessions() -> (Session, Session) {
    let secret = Secret::new([7; 32]);
    let mut initiator = Handshake::new(Role::Initiator, &secret, b"fuzz", [1; 32]);
    let mut responder = Handshake::new(Role::Responder, &secret, b"fuzz", [2; 32]);
    responder.on_input(&initiator.poll_output().unwrap()).unwrap();
    initiator.on_input(&responder.poll_output().unwrap()).unwrap();
    responder.on_input(&initiator.poll_output().unwrap()).unwrap();
    (initiator.finish().unwrap(), responder.finish().unwrap())
}

/// Messages with and without descriptors, a farewell, and one that is not sealed.
pub fn plane_seeds() -> Vec<Vec<Vec<u8>>> {
    let message = |fds: u8, item: u32, body: &[u8]| {
        let tag = Tag { group: 0, generation: 0, item }.to_bytes();
        [&[16 | fds, MESSAGE as u8][..], &tag, body].concat()
    };
    vec![
        vec![message(0, 1, b"hello"), message(2, 1, b"memory"), message(8, 2, b"")],
        vec![message(1, 3, &[7; 300]), vec![16, FAREWELL as u8]],
        vec![vec![3, 1, 2, 3, 4], message(0, 0, b"late")],
    ]
}
