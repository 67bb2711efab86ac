//! The server of torch's store protocol against clients that misbehave: it must stay up for the others.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use unisono::Deadline;
use unisono::store::{Store, TorchStore, TorchStoreServer};

const HELLO: &[u8] = b"\x00\xce\xf7\x85\x3c";

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

fn raw(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// Whether the server closes the connection once `bytes` were sent.
fn is_closed_after(address: SocketAddr, bytes: &[u8]) -> bool {
    let mut stream = raw(address);
    stream.write_all(bytes).unwrap();
    match stream.read(&mut [0; 16]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

#[test]
fn strangers_and_nonsense_are_disconnected() {
    let server = TorchStoreServer::on_loopback().unwrap();
    let address = server.address();
    let store = TorchStore::connect(address.to_string(), soon()).unwrap();
    for (what, bytes) in [
        ("another protocol", &b"GET / HTTP/1.1\r\n"[..]),
        ("a request before the introduction", b"\x07"),
        ("a wrong magic number", b"\x00\x01\x02\x03\x04"),
        ("an unknown opcode", b"\x00\xce\xf7\x85\x3c\x63"),
        ("a key length of 2^63", b"\x00\xce\xf7\x85\x3c\x03\0\0\0\0\0\0\0\x80"),
        ("a key that is not UTF-8", b"\x00\xce\xf7\x85\x3c\x03\x01\0\0\0\0\0\0\0\xff"),
        ("2^40 keys", b"\x00\xce\xf7\x85\x3c\x06\0\0\0\0\0\x01\0\0"),
    ] {
        assert!(is_closed_after(address, bytes), "{what}");
        store.add("still there", 1, soon()).unwrap();
    }
}

#[test]
fn a_request_that_comes_byte_by_byte_is_served() {
    let server = TorchStoreServer::on_loopback().unwrap();
    let mut stream = raw(server.address());
    stream.set_nodelay(true).unwrap();
    for byte in [HELLO, b"\x04\x02\0\0\0\0\0\0\0/n\x05\0\0\0\0\0\0\0"].concat() {
        stream.write_all(&[byte]).unwrap();
    }
    let mut reply = [0; 8];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(i64::from_le_bytes(reply), 5);
}

#[test]
fn requests_in_one_packet_are_answered_in_order() {
    let server = TorchStoreServer::on_loopback().unwrap();
    let mut stream = raw(server.address());
    let one = b"\x04\x02\0\0\0\0\0\0\0/n\x01\0\0\0\0\0\0\0";
    stream.write_all(&[HELLO, &one.repeat(1000)].concat()).unwrap();
    for expected in 1..=1000 {
        let mut reply = [0; 8];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(i64::from_le_bytes(reply), expected);
    }
}

#[test]
fn who_does_not_read_its_replies_holds_up_nobody_and_gets_them_all() {
    let server = TorchStoreServer::on_loopback().unwrap();
    let store = TorchStore::connect(server.address().to_string(), soon()).unwrap();
    let value = vec![7; 1 << 20];
    store.set("big", &value, soon()).unwrap();
    let mut greedy = raw(server.address());
    let one = b"\x03\x04\0\0\0\0\0\0\0/big";
    greedy.write_all(&[HELLO, &one.repeat(40)].concat()).unwrap();
    for round in 1..=100 {
        assert_eq!(store.add("n", 1, soon()).unwrap(), round);
    }
    let mut reply = vec![0; 8 + value.len()];
    for _ in 0..40 {
        greedy.read_exact(&mut reply).unwrap();
        assert!(reply[8..] == value);
    }
}

#[test]
fn many_connections_that_say_nothing_hold_up_nobody() {
    let server = TorchStoreServer::on_loopback().unwrap();
    let silent: Vec<_> = (0..300).map(|_| raw(server.address())).collect();
    let store = TorchStore::connect(server.address().to_string(), soon()).unwrap();
    store.set("key", b"value", soon()).unwrap();
    assert_eq!(store.get("key", soon()).unwrap(), b"value");
    drop(silent);
    assert_eq!(store.get("key", soon()).unwrap(), b"value");
}

#[test]
fn dropping_the_server_ends_waits_and_frees_the_port() {
    let server = TorchStoreServer::on_loopback().unwrap();
    let address = server.address();
    let store = TorchStore::connect(address.to_string(), soon()).unwrap();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| store.get("never", soon()).unwrap_err());
        // Served on another connection, and most likely after the wait began; if not, the wait fails all the same.
        store.add("n", 1, soon()).unwrap();
        drop(server);
        let error = waiter.join().unwrap();
        assert!(error.to_string().contains("get failed"), "{error}");
    });
    let again = TorchStoreServer::bind(address).unwrap();
    assert_eq!(again.address(), address);
    let error = TorchStoreServer::bind(address).unwrap_err();
    assert!(error.to_string().contains("listen failed"), "{error}");
}
