//! Peers that do not know the secret, flood, tamper or lie.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use unisono_core::auth::{Handshake, Opened, Role};
use unisono_core::wire::{Bytes, encode_body};
use unisono_core::{Error as CoreError, Secret};
use unisono_sync::Deadline;

use super::super::connection::{Connection, PROVING_BYTES};
use super::super::protocol::{CONTEXT, MAX_BODY_BYTES, REPLY, Reply};
use super::super::{StoreServer, StoreServerConfig, TcpStore};
use super::{QUICK, client, impostor, link, secret, soon, still_serves, wait_for_close};
use crate::error::{Error, Result};
use crate::store::Store;

#[test]
fn a_wrong_secret_on_either_side_is_an_auth_error_at_once() {
    let server = StoreServer::start(secret()).unwrap();
    let begin = Instant::now();
    let wrong = Secret::new([0x52; 32]);
    let address = impostor(secret(), |_, _| ());
    for result in
        [TcpStore::connect(server.address(), &wrong, soon()), TcpStore::connect(address, &wrong, soon())]
    {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Core(CoreError::Auth { .. })), "{error}");
    }
    assert!(begin.elapsed() < QUICK);
    still_serves(&server);
}

#[test]
fn another_version_is_an_error_that_names_both() {
    let server = StoreServer::start(secret()).unwrap();
    let mut stream = TcpStream::connect(server.address()).unwrap();
    let mut opening = Handshake::new(Role::Initiator, &secret(), CONTEXT, [1; 32]).poll_output().unwrap();
    opening[4] = 99;
    stream.write_all(&opening).unwrap();
    let mut answer = [0; 72];
    stream.read_exact(&mut answer).unwrap();
    let mut newer = Handshake::new(Role::Initiator, &secret(), CONTEXT, [1; 32]);
    // The answer of version 1 arrives at a peer that is made to expect another one.
    answer[4] = 98;
    assert_eq!(newer.on_input(&answer), Err(CoreError::Version { expected: 1, got: 98 }));
    wait_for_close(&stream);
}

#[test]
fn garbage_before_the_proof_closes_that_connection_only() {
    let server = StoreServer::start(secret()).unwrap();
    let store = client(&server);
    for garbage in
        [&b"GET / HTTP/1.1\r\nHost: store\r\nAccept: everything\r\n\r\n"[..], &[0; 4096], &[0xff; 40]]
    {
        let mut stream = TcpStream::connect(server.address()).unwrap();
        stream.write_all(garbage).unwrap();
        wait_for_close(&stream);
        store.set("key", garbage, soon()).unwrap();
    }
    // The right preamble and nonce, then a proof that is none.
    let mut stream = TcpStream::connect(server.address()).unwrap();
    let opening = Handshake::new(Role::Initiator, &secret(), CONTEXT, [1; 32]).poll_output().unwrap();
    stream.write_all(&opening).unwrap();
    stream.write_all(&[7; 32]).unwrap();
    wait_for_close(&stream);
    still_serves(&server);
}

#[test]
fn half_open_connections_are_dropped_in_time_and_hold_up_nobody() {
    let config = StoreServerConfig::new(secret()).handshake_timeout(Duration::from_millis(300));
    let server = StoreServer::start_with(config).unwrap();
    let begin = Instant::now();
    let half_open: Vec<TcpStream> = (0..200)
        .map(|index| {
            let mut stream = TcpStream::connect(server.address()).unwrap();
            // Some send a part of the first message.
            stream.write_all(&b"uniA\x01\x00\x00\x00more"[..index % 13]).unwrap();
            stream
        })
        .collect();
    still_serves(&server);
    half_open.iter().for_each(wait_for_close);
    assert!(begin.elapsed() >= Duration::from_millis(300));
    still_serves(&server);
}

#[test]
fn a_flood_replaces_the_oldest_unproved_connection_and_no_proved_one() {
    let config =
        StoreServerConfig::new(secret()).max_unproved(8).handshake_timeout(Duration::from_secs(3600));
    let server = StoreServer::start_with(config).unwrap();
    let store = client(&server);
    let flood: Vec<TcpStream> = (0..40).map(|_| TcpStream::connect(server.address()).unwrap()).collect();
    flood[..32].iter().for_each(wait_for_close);
    store.set("key", b"value", soon()).unwrap();
    // Eight half-open ones are left, and one more is let in.
    still_serves(&server);
    wait_for_close(&flood[32]);
    flood[39].set_nonblocking(true).unwrap();
    let error = (&flood[39]).read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock, "the youngest are still there");
}

#[test]
fn an_unproved_connection_is_small() {
    // 1,024 of them, with their entries in the maps, stay below 2 MiB.
    let bytes = size_of::<Connection>() + PROVING_BYTES;
    assert!(bytes <= 1024, "{bytes}");
}

#[test]
fn bodies_that_are_no_request_or_too_large_close_that_connection_only() {
    let server = StoreServer::start(secret()).unwrap();
    for body in [vec![0xff; 20], vec![], vec![0; MAX_BODY_BYTES + 1]] {
        let mut link = link(server.address());
        // The server may close before it has read all of a large one.
        let _ = link.send(&body, soon());
        assert!(link.receive(soon()).is_err());
    }
    still_serves(&server);
}

#[test]
fn a_reply_to_another_request_is_refused() {
    let address = impostor(secret(), |mut stream, mut session| {
        let (mut input, mut chunk) = (Vec::new(), [0; 256]);
        while !matches!(session.opener.open(&input), Ok(Opened::Frame { .. })) {
            let got = stream.read(&mut chunk).unwrap();
            input.extend_from_slice(&chunk[..got]);
        }
        let mut frame = Vec::new();
        let body = encode_body(&(77u64, Reply::Values(vec![Bytes(b"of another")]))).unwrap();
        session.sealer.seal(REPLY, &body, &mut frame).unwrap();
        stream.write_all(&frame).unwrap();
        wait_for_close(&stream);
    });
    let error = TcpStore::connect(address, &secret(), soon()).unwrap().get("key", soon()).unwrap_err();
    assert!(matches!(error, Error::StoreProtocol { .. }), "{error}");
}

#[test]
fn a_byte_flipped_on_the_way_is_an_error_and_never_other_data() {
    let server = StoreServer::start(secret()).unwrap();
    let direct = client(&server);
    let value = [0x33; 16];
    let talk = |address: SocketAddr, key: &str| -> Result<Vec<u8>> {
        let store = TcpStore::connect(address, &secret(), Deadline::after(Duration::from_millis(400)))?;
        store.set(key, &value, Deadline::after(Duration::from_millis(400)))?;
        store.get(key, Deadline::after(Duration::from_millis(400)))
    };
    // Bytes that go each way without a proxy's interference: handshake, then two frames. Eight at a time.
    let noticed = |direction: usize, at: usize| {
        let key = format!("{direction} {at}");
        let result = talk(tampering_proxy(server.address(), direction, at), &key);
        assert!(result.as_ref().map_or(true, |got| *got == value), "byte {at}: {result:?}");
        if direct.check(&[&key], soon()).unwrap() {
            assert_eq!(direct.get(&key, soon()).unwrap(), value, "byte {at}");
        }
        usize::from(result.is_err())
    };
    for (direction, bytes) in [(0, 40 + 32 + 2 * 40 + 30), (1, 72 + 2 * 40 + 20)] {
        let failures: usize = thread::scope(|scope| {
            let part =
                |first: usize| (first..bytes).step_by(8).map(|at| noticed(direction, at)).sum::<usize>();
            let threads: Vec<_> = (0..8).map(|first| scope.spawn(move || part(first))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        // Only the last bytes may lie behind everything that was said.
        assert!(failures + 20 >= bytes, "{failures} of {bytes} were noticed");
    }
}

/// Forwards one connection at a time, both ways; flips byte `at` of what the first one sends in direction `flipped`.
fn tampering_proxy(target: SocketAddr, flipped: usize, at: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (client, _) = listener.accept().unwrap();
        // Whoever tries again finds nobody.
        drop(listener);
        let server = TcpStream::connect(target).unwrap();
        let forward = |mut from: &TcpStream, mut to: &TcpStream, flip: Option<usize>| {
            let (mut bytes, mut passed) = ([0; 1024], 0);
            while let Ok(got @ 1..) = from.read(&mut bytes) {
                if let Some(at) = flip
                    && (passed..passed + got).contains(&at)
                {
                    bytes[at - passed] ^= 0x10;
                }
                passed += got;
                if to.write_all(&bytes[..got]).is_err() {
                    break;
                }
            }
            let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
        };
        thread::scope(|scope| {
            scope.spawn(|| forward(&client, &server, (flipped == 0).then_some(at)));
            forward(&server, &client, (flipped == 1).then_some(at));
        });
    });
    address
}
