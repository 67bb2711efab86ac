//! Requests of clients that have the secret, and replies of a server that has it.

use unisono_core::wire::{Bytes, decode_body, encode_body};

use super::protocol::{LIMITS, Refusal, Reply, Request};
use super::service::Service;
use crate::store::table::Limits;

/// What all waiting requests together may take here.
const WAITING_BYTES: usize = 4096;

/// Bodies of requests, from two connections in turn.
///
/// # Panics
/// If a reply cannot be read, or something is left when both connections are gone.
pub fn tcp_requests(bodies: &[&[u8]]) {
    let limits = Limits { keys: 16, total_bytes: 64 * 1024, ..Limits::default() };
    let mut service = Service::new("tcp://fuzz".to_owned(), limits, WAITING_BYTES);
    for (at, body) in bodies.iter().enumerate() {
        if let Ok((number, request)) = decode_body::<(u64, Request<'_>)>(body) {
            assert_stable(&encode_body(&(number, &request)).unwrap(), |bytes| {
                let (number, request) = decode_body::<(u64, Request<'_>)>(bytes).unwrap();
                encode_body(&(number, &request)).unwrap()
            });
        }
        match service.request(at % 2, body) {
            Ok(reply) => reply.iter().for_each(|reply| tcp_replies(reply)),
            Err(error) => drop(error.to_string()),
        }
        while let Some((connection, reply)) = service.next_ready() {
            assert!(connection < 2);
            assert!(decode_body::<(u64, Reply<'_>)>(&reply).is_ok());
        }
    }
    service.forget(0);
    service.forget(1);
    assert!(service.has_no_waiters(), "{service:?}");
}

/// The body of a reply, as the client reads it.
///
/// # Panics
/// If it is not the same once written and read again.
pub fn tcp_replies(body: &[u8]) {
    let Ok((number, reply)) = decode_body::<(u64, Reply<'_>)>(body) else { return };
    assert_stable(&encode_body(&(number, &reply)).unwrap(), |bytes| {
        let (number, reply) = decode_body::<(u64, Reply<'_>)>(bytes).unwrap();
        encode_body(&(number, &reply)).unwrap()
    });
    if let Reply::Refused(refusal) = reply {
        drop(refusal.into_error("tcp://fuzz".to_owned()).to_string());
    }
}

fn assert_stable(bytes: &[u8], again: impl FnOnce(&[u8]) -> Vec<u8>) {
    assert_eq!(again(bytes), bytes);
}

/// One request of each kind, and waits that are released and cancelled.
pub fn tcp_request_seeds() -> Vec<Vec<Vec<u8>>> {
    let encode = |request: Request<'_>| encode_body(&(5u64, request)).unwrap();
    let keys = || vec!["a", "b"];
    let value = Bytes(b"value");
    vec![
        vec![
            encode(Request::Wait { keys: keys() }),
            encode(Request::Values { keys: keys() }),
            encode(Request::Set { key: "a", value }),
            encode(Request::Append { key: "b", value }),
        ],
        vec![
            encode(Request::Add { key: "n", amount: -300 }),
            encode(Request::CompareSet { key: "n", expected: Bytes(b"-300"), desired: value }),
            encode(Request::Check { keys: keys() }),
            encode(Request::Delete { key: "n" }),
            encode(Request::Count),
        ],
        vec![encode(Request::Wait { keys: keys() }), encode(Request::Count), encode(Request::Cancel)],
    ]
}

/// One reply of each kind.
pub fn tcp_reply_seeds() -> Vec<Vec<u8>> {
    let replies = [
        Reply::Done,
        Reply::Truth(true),
        Reply::Integer(i64::MIN),
        Reply::Count(u64::MAX),
        Reply::Value(Bytes(b"value")),
        Reply::Values(vec![Bytes(b"one"), Bytes(b""), Bytes(&[0xff; 20])]),
        Reply::Cancelled { missing: "key" },
        Reply::Refused(Refusal::EmptyKey),
        Reply::Refused(Refusal::Limit { what: LIMITS[1], got: 9, cap: 8 }),
        Reply::Refused(Refusal::Value { key: "key", message: "no integer" }),
        Reply::Refused(Refusal::Other { message: "why".to_owned() }),
    ];
    replies.iter().map(|reply| encode_body(&(7u64, reply)).unwrap()).collect()
}
