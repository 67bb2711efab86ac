//! Faults and attacks on the TCP store. What every store must do is tested by the conformance suite of all stores.

mod attacks;
mod faults;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use unisono_core::Secret;
use unisono_core::auth::{Handshake, Role, Session};
use unisono_core::wire::encode_body;
use unisono_sync::Deadline;

use super::link::{Link, Patience};
use super::protocol::{CONTEXT, Request};
use super::{StoreServer, TcpStore};
use crate::store::Store;

/// Far shorter than [`soon`]: who gives up within this has not waited for the deadline.
const QUICK: Duration = Duration::from_secs(20);

fn secret() -> Secret {
    Secret::new([0x51; 32])
}

/// Far longer than anything here takes, even on a busy machine.
fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

fn client(server: &StoreServer) -> TcpStore {
    TcpStore::from_unique_id(&server.unique_id(), soon()).unwrap()
}

fn link(address: SocketAddr) -> Link {
    Link::connect(address, &secret(), soon(), Patience::None).unwrap()
}

fn ask(link: &mut Link, request: &Request<'_>) -> u64 {
    let number = link.next_number();
    link.send(&encode_body(&(number, request)).unwrap(), soon()).unwrap();
    number
}

/// Waits until the peer has closed `stream`, however much it sends before.
fn wait_for_close(mut stream: &TcpStream) {
    stream.set_read_timeout(Some(QUICK)).unwrap();
    let mut bytes = [0; 256];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
            Err(error) => panic!("not closed: {error}"),
        }
    }
}

fn still_serves(server: &StoreServer) {
    let store = client(server);
    store.set("still", b"here", soon()).unwrap();
    assert_eq!(store.get("still", soon()).unwrap(), b"here");
}

/// A server that proves the secret and then does as `then` says.
fn impostor(secret: Secret, then: impl FnOnce(TcpStream, Session) + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut handshake = Handshake::new(Role::Responder, &secret, CONTEXT, [9; 32]);
        let session = loop {
            if let Some(message) = handshake.poll_output() {
                stream.write_all(&message).unwrap();
            }
            if let Some(session) = handshake.finish() {
                break session;
            }
            let mut message = vec![0; handshake.wants()];
            if stream.read_exact(&mut message).is_err() || handshake.on_input(&message).is_err() {
                return;
            }
        };
        then(stream, session);
    });
    address
}
