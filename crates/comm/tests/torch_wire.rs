//! The client of torch's store against a scripted server that checks every byte.
//!
//! The expected requests are written down by hand, not built with the library's encoder, and each script ends with
//! the client's own result.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use unisono::store::{Store, TorchStore};
use unisono::{Deadline, Error};

const PING: u8 = 13;

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

/// The server's side of one connection.
struct Script {
    stream: TcpStream,
}

impl Script {
    fn expect(&mut self, expected: &[u8]) {
        let mut got = vec![0; expected.len()];
        self.stream.read_exact(&mut got).unwrap();
        assert_eq!(got, expected);
    }

    fn reply(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Expects a ping and echoes its nonce.
    fn answer_ping(&mut self) {
        self.expect(&[PING]);
        let mut nonce = [0; 4];
        self.stream.read_exact(&mut nonce).unwrap();
        self.reply(&nonce);
    }

    fn answer_handshake(&mut self) {
        self.expect(b"\x00\xce\xf7\x85\x3c");
        self.answer_ping();
    }
}

/// Runs `client` with a store that is connected to a server which runs `server`.
fn act<T>(server: impl FnOnce(&mut Script) + Send, client: impl FnOnce(&TorchStore) -> T) -> T {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::scope(|scope| {
        let server = scope.spawn(move || {
            let mut script = Script { stream: listener.accept().unwrap().0 };
            script.stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            script.answer_handshake();
            server(&mut script);
            script
        });
        let store = TorchStore::connect(address, soon()).unwrap();
        let result = client(&store);
        let mut script = server.join().unwrap();
        drop(store);
        let mut rest = Vec::new();
        script.stream.read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty(), "unexpected bytes {rest:?}");
        result
    })
}

#[test]
fn set_and_append_are_followed_by_a_ping() {
    act(
        |script| {
            script.expect(b"\x01\x02\0\0\0\0\0\0\0/a\x03\0\0\0\0\0\0\0xyz");
            script.answer_ping();
            script.expect(b"\x09\x02\0\0\0\0\0\0\0/a\x01\0\0\0\0\0\0\0!");
            script.answer_ping();
        },
        |store| {
            store.set("a", b"xyz", soon()).unwrap();
            store.append("a", b"!", soon()).unwrap();
        },
    );
}

#[test]
fn a_get_waits_and_then_gets() {
    let value = act(
        |script| {
            script.expect(b"\x06\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0/a");
            script.reply(&[0]);
            script.expect(b"\x03\x02\0\0\0\0\0\0\0/a");
            script.reply(b"\x05\0\0\0\0\0\0\0hello");
        },
        |store| store.get("a", soon()).unwrap(),
    );
    assert_eq!(value, b"hello");
}

#[test]
fn multi_get_waits_for_all_and_then_gets_all() {
    let values = act(
        |script| {
            script.expect(b"\x06\x02\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0/a\x03\0\0\0\0\0\0\0/bc");
            script.reply(&[0]);
            script.expect(b"\x0a\x02\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0/a\x03\0\0\0\0\0\0\0/bc");
            script.reply(b"\x01\0\0\0\0\0\0\x001\0\0\0\0\0\0\0\0");
        },
        |store| store.multi_get(&["a", "bc"], soon()).unwrap(),
    );
    assert_eq!(values, [&b"1"[..], b""]);
}

#[test]
fn numbers_are_eight_bytes_with_a_sign() {
    act(
        |script| {
            script.expect(b"\x04\x02\0\0\0\0\0\0\0/n\xfd\xff\xff\xff\xff\xff\xff\xff");
            script.reply(b"\xfe\xff\xff\xff\xff\xff\xff\xff");
            script.expect(b"\x08\x02\0\0\0\0\0\0\0/n");
            script.reply(b"\x01\0\0\0\0\0\0\0");
            script.expect(b"\x08\x02\0\0\0\0\0\0\0/n");
            script.reply(b"\0\0\0\0\0\0\0\0");
            script.expect(b"\x07");
            script.reply(b"\x05\x01\0\0\0\0\0\0");
        },
        |store| {
            assert_eq!(store.add("n", -3, soon()).unwrap(), -2);
            assert!(store.delete("n", soon()).unwrap());
            assert!(!store.delete("n", soon()).unwrap());
            assert_eq!(store.num_keys(soon()).unwrap(), 261);
        },
    );
}

#[test]
fn check_and_compare_set() {
    act(
        |script| {
            script.expect(b"\x05\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0/a");
            script.reply(&[1]);
            script.expect(b"\x02\x02\0\0\0\0\0\0\0/a\0\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0new");
            script.reply(b"\x03\0\0\0\0\0\0\0new");
            script.expect(b"\x05\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0/a");
            script.reply(&[0]);
        },
        |store| {
            assert!(!store.check(&["a"], soon()).unwrap());
            assert_eq!(store.compare_set("a", b"", b"new", soon()).unwrap(), b"new");
            assert!(store.check(&["a"], soon()).unwrap());
        },
    );
}

#[test]
fn a_wait_that_ends_too_late_is_cancelled_and_the_missing_key_is_asked_for() {
    let error = act(
        |script| {
            script.expect(b"\x06\x02\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0/a\x02\0\0\0\0\0\0\0/b");
            script.expect(&[12]);
            script.reply(&[1]);
            script.expect(b"\x05\x02\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0/a\x02\0\0\0\0\0\0\0/b");
            script.reply(&[1]);
            script.expect(b"\x05\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0/a");
            script.reply(&[0]);
        },
        |store| store.wait(&["a", "b"], Deadline::after(Duration::from_millis(30))).unwrap_err(),
    );
    assert!(matches!(&error, Error::StoreTimeout { key, .. } if key == "b"), "{error}");
}

#[test]
fn a_wait_whose_end_meets_its_cancellation_has_succeeded() {
    let value = act(
        |script| {
            script.expect(b"\x06\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0/a");
            script.expect(&[12]);
            script.reply(&[0, 1]);
            script.expect(b"\x03\x02\0\0\0\0\0\0\0/a");
            script.reply(b"\x01\0\0\0\0\0\0\x007");
        },
        |store| store.get("a", Deadline::after(Duration::from_millis(30))).unwrap(),
    );
    assert_eq!(value, b"7");
}

#[test]
fn a_server_that_hangs_up_is_an_io_error() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let name = format!("torch://{address}");
    thread::scope(|scope| {
        scope.spawn(move || Script { stream: listener.accept().unwrap().0 }.answer_handshake());
        let store = TorchStore::connect(address, soon()).unwrap();
        let error = store.add("n", 1, soon()).unwrap_err();
        assert!(matches!(&error, Error::StoreIo { store, action: "add", .. } if *store == name), "{error}");
    });
}

#[test]
fn replies_that_are_not_of_the_protocol_are_refused() {
    let error = act(
        |script| {
            script.expect(b"\x05\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0/a");
            script.reply(&[9]);
        },
        |store| store.check(&["a"], soon()).unwrap_err(),
    );
    assert!(error.to_string().ends_with("CHECK was answered by 9, expected 0 or 1"), "{error}");
    let error = act(
        |script| {
            script.expect(b"\x02\x02\0\0\0\0\0\0\0/a\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
            script.reply(&u64::MAX.to_le_bytes());
        },
        |store| store.compare_set("a", b"", b"", soon()).unwrap_err(),
    );
    assert!(error.to_string().contains("a value of 18446744073709551615 bytes was announced"), "{error}");
}

#[test]
fn connect_tells_what_it_met() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut script = Script { stream: listener.accept().unwrap().0 };
            script.expect(b"\x00\xce\xf7\x85\x3c\x0d");
            script.reply(b"HTTP");
            // Hanging up before the client has read would discard the reply.
            let mut rest = Vec::new();
            script.stream.read_to_end(&mut rest).unwrap();
        });
        let error = TorchStore::connect(address, soon()).unwrap_err();
        assert!(matches!(&error, Error::StoreProtocol { .. }), "{error}");
    });
    let error = TorchStore::connect("localhost", soon()).unwrap_err();
    assert!(error.to_string().contains("expected HOST:PORT, got `localhost`"), "{error}");
    // Nobody listens where a listener was just closed.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let error = TorchStore::connect(closed, Deadline::after(Duration::from_millis(50))).unwrap_err();
    assert!(error.to_string().contains("nobody answered before the deadline"), "{error}");
}
