//! Bytes of clients and of servers of torch's wire, which nobody has authenticated.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use unisono_sync::Deadline;

use super::connection::{Connection, Failure};
use super::state::State;
use super::wire::{Decoded, Encoder, MAGIC, MAX_REQUEST_BYTES, Opcode, decode};

/// What a socket takes at once.
const MAX_REPLY_BYTES: usize = 64 * 1024;

/// What a client sends to a server, all at once.
///
/// # Panics
/// If a request is longer than what came, or one that is not complete asks for no more or for too much.
pub fn torch_requests(bytes: &[u8]) {
    let mut state = State::new("torch://fuzz".to_owned());
    let mut rest = bytes;
    for turn in 0.. {
        let mut reply = Vec::new();
        match decode(rest) {
            Ok(Decoded::Whole(request, length)) => {
                assert!((1..=rest.len()).contains(&length), "{length} of {} bytes", rest.len());
                if state.serve(turn % 3, request, &mut reply).is_err() {
                    break;
                }
                assert!(state.take_released().iter().all(|connection| *connection < 3));
                rest = &rest[length..];
            }
            Ok(Decoded::Partial { at_least }) => {
                assert!(at_least > rest.len() && at_least <= MAX_REQUEST_BYTES, "{at_least}");
                break;
            }
            Err(_) => break,
        }
    }
    (0..3).for_each(|connection| state.forget(connection));
    assert!(state.take_released().is_empty());
}

/// What a server answers, read through a socket. Each byte that is read alone says how what follows is read.
///
/// # Panics
/// If the client waits for more than there is.
pub fn torch_replies(bytes: &[u8]) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&bytes[..bytes.len().min(MAX_REPLY_BYTES)]).unwrap();
    theirs.shutdown(Shutdown::Write).unwrap();
    // The calls that the client makes are those of any stream socket.
    let mut connection = Connection::of(TcpStream::from(OwnedFd::from(ours)));
    let deadline = Deadline::after(Duration::from_secs(10));
    let failure = loop {
        let result = connection.receive_u8(deadline).and_then(|how| match how % 3 {
            0 => connection.receive_value(deadline).map(drop),
            1 => connection.receive_i64(deadline).map(drop),
            _ => connection.confirm(Encoder::default(), deadline),
        });
        if let Err(failure) = result {
            break failure;
        }
    };
    assert!(!matches!(failure, Failure::Late), "the client waits for more");
}

/// All requests, in a few conversations.
pub fn torch_request_seeds() -> Vec<Vec<u8>> {
    let keys = ["a", "bc"];
    let conversations = [
        Encoder::new(Opcode::Validate)
            .u32(MAGIC)
            .opcode(Opcode::Ping)
            .u32(7)
            .opcode(Opcode::Set)
            .key("a")
            .value(b"one")
            .opcode(Opcode::Get)
            .key("a"),
        Encoder::new(Opcode::Wait)
            .keys(&keys)
            .opcode(Opcode::Append)
            .key("a")
            .value(b"1")
            .opcode(Opcode::Add)
            .key("bc")
            .i64(-5)
            .opcode(Opcode::MultiGet)
            .keys(&keys),
        Encoder::new(Opcode::CompareSet)
            .key("a")
            .value(b"")
            .value(b"new")
            .opcode(Opcode::Check)
            .keys(&keys)
            .opcode(Opcode::Delete)
            .key("a")
            .opcode(Opcode::NumKeys)
            .opcode(Opcode::ListKeys),
        Encoder::new(Opcode::QueuePush)
            .key("q")
            .value(b"entry")
            .opcode(Opcode::QueueLength)
            .key("q")
            .opcode(Opcode::QueuePop)
            .key("q"),
        Encoder::new(Opcode::Barrier)
            .key("b")
            .i64(2)
            .opcode(Opcode::Barrier)
            .key("b")
            .i64(2)
            .opcode(Opcode::Wait)
            .keys(&["x"])
            .opcode(Opcode::NumKeys)
            .opcode(Opcode::NumKeys)
            .opcode(Opcode::CancelWait),
    ];
    conversations.iter().map(|conversation| conversation.bytes().to_vec()).collect()
}

/// A value, a number and the answer to a ping; a value that is not all there.
pub fn torch_reply_seeds() -> Vec<Vec<u8>> {
    let whole =
        [&[0][..], &5u64.to_le_bytes(), b"value", &[1], &9i64.to_le_bytes(), &[2, 1, 0, 0, 0]].concat();
    let cut = [&[0][..], &70_000u64.to_le_bytes(), &[5; 300]].concat();
    vec![whole, cut]
}
