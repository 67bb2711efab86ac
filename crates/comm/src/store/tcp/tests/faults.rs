//! Limits that are reached, clients that stall, servers that die, are late or come back.

use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use unisono_core::auth::Session;
use unisono_core::wire::decode_body;
use unisono_sync::Deadline;

use super::super::link::{Failure, Link};
use super::super::protocol::{Reply, Request};
use super::super::{StoreServer, StoreServerConfig, TcpStore};
use super::{QUICK, ask, client, impostor, link, secret, soon, still_serves, wait_for_close};
use crate::error::Error;
use crate::store::Store;

#[test]
fn limits_of_the_server_come_back_as_typed_errors_and_store_nothing() {
    let config = StoreServerConfig::new(secret()).max_keys(3).max_total_bytes(100);
    let server = StoreServer::start_with(config).unwrap();
    let store = client(&server);
    let limit = |what, got, cap| Err(Error::StoreLimit { store: store.describe(), what, got, cap });
    assert_eq!(store.set("big", &[0; 98], soon()), limit("total size", 101, 100));
    for key in ["a", "b", "c"] {
        store.set(key, b"1", soon()).unwrap();
    }
    assert_eq!(store.set("d", b"1", soon()), limit("number of keys", 4, 3));
    assert_eq!(store.append("a", &[0; 95], soon()), limit("total size", 101, 100));
    assert_eq!(store.num_keys(soon()).unwrap(), 3);
    let error = store.add("a", i64::MAX, soon()).unwrap_err();
    assert!(matches!(&error, Error::StoreValue { key, .. } if key == "a"), "{error}");
    assert_eq!(store.get("a", soon()).unwrap(), b"1");
}

#[test]
fn values_above_one_reply_come_back_in_order() {
    let server = StoreServer::start(secret()).unwrap();
    let store = client(&server);
    let keys: Vec<String> = (0..5).map(|index| format!("key {index}")).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    for (index, key) in keys.iter().enumerate() {
        store.set(key, &vec![index as u8; 5 << 20], soon()).unwrap();
    }
    let values = store.multi_get(&keys, soon()).unwrap();
    for (index, value) in values.iter().enumerate() {
        assert!(value.len() == 5 << 20 && value.iter().all(|byte| usize::from(*byte) == index));
    }
    assert_eq!(values.len(), 5);
}

#[test]
fn a_client_that_does_not_read_is_dropped_and_holds_up_nobody() {
    let config = StoreServerConfig::new(secret()).stall_timeout(Duration::from_millis(300));
    let server = StoreServer::start_with(config).unwrap();
    let store = client(&server);
    store.set("large", &vec![7; 8 << 20], soon()).unwrap();
    let mut slow = link(server.address());
    let asked = 4;
    for _ in 0..asked {
        ask(&mut slow, &Request::Values { keys: vec!["large"] });
    }
    // Its own wait is dropped with it; others are served meanwhile and afterwards.
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(1500) {
        assert_eq!(store.get("large", soon()).unwrap().len(), 8 << 20);
    }
    let received = (0..asked).take_while(|_| slow.receive(soon()).is_ok()).count();
    assert!(received < asked, "it was not dropped");
    still_serves(&server);
}

#[test]
fn five_hundred_waiters_are_released_by_one_set() {
    raise_descriptor_limit();
    let server = StoreServer::start(secret()).unwrap();
    let mut waiters: Vec<(Link, u64)> = (0..500)
        .map(|index| {
            let mut link = link(server.address());
            let own = format!("own {index}");
            let number = ask(&mut link, &Request::Wait { keys: vec!["go", &own, "go"] });
            (link, number)
        })
        .collect();
    let store = client(&server);
    for index in 0..500 {
        store.set(&format!("own {index}"), b"", soon()).unwrap();
    }
    store.set("go", b"", soon()).unwrap();
    for (link, number) in &mut waiters {
        let (buffer, body) = link.receive(soon()).unwrap();
        let (answered, reply) = decode_body::<(u64, Reply<'_>)>(&buffer[body]).unwrap();
        assert!(answered == *number && matches!(reply, Reply::Done), "{reply:?}");
    }
}

/// A thousand sockets are more than some systems allow at first.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < 4096) {
        let current = Some(limit.maximum.map_or(4096, |maximum| maximum.min(4096)));
        setrlimit(Resource::Nofile, Rlimit { current, maximum: limit.maximum }).unwrap();
    }
}

#[test]
fn dropping_the_server_wakes_its_clients_with_an_error() {
    let server = StoreServer::start(secret()).unwrap();
    let store = client(&server);
    let begin = Instant::now();
    let mut waiting: Vec<Link> = (0..20).map(|_| link(server.address())).collect();
    for link in &mut waiting {
        ask(link, &Request::Wait { keys: vec!["never"] });
    }
    thread::scope(|scope| {
        let waiter = scope.spawn(|| store.get("never", soon()).unwrap_err());
        client(&server).set("key", b"", soon()).unwrap();
        drop(server);
        let error = waiter.join().unwrap();
        assert!(matches!(error, Error::StoreIo { .. }), "{error}");
    });
    for link in &mut waiting {
        assert!(matches!(link.receive(soon()), Err(Failure::Io(_))));
    }
    let error = store.set("key", b"", soon()).unwrap_err();
    assert!(matches!(error, Error::StoreIo { action: "connect", .. }), "{error}");
    assert!(begin.elapsed() < QUICK);
}

#[test]
fn an_idle_connection_that_broke_is_replaced() {
    let server = StoreServer::start(secret()).unwrap();
    let (address, store) = (server.address(), client(&server));
    store.set("old", b"1", soon()).unwrap();
    drop(server);
    let _server = StoreServer::start_with(StoreServerConfig::new(secret()).address(address)).unwrap();
    store.set("new", b"2", soon()).unwrap();
    assert!(!store.check(&["old"], soon()).unwrap() && store.check(&["new"], soon()).unwrap());
}

#[test]
fn the_server_may_come_up_later() {
    let placeholder = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = placeholder.local_addr().unwrap();
    thread::scope(|scope| {
        let connecting = scope.spawn(|| TcpStore::connect(address, &secret(), soon()).unwrap());
        // Something that hangs up on the client listens there first, then nobody, then the server.
        drop(placeholder.accept().unwrap());
        drop(placeholder);
        let _server = StoreServer::start_with(StoreServerConfig::new(secret()).address(address)).unwrap();
        connecting.join().unwrap().set("key", b"", soon()).unwrap();
    });
}

#[test]
fn a_server_that_says_nothing_is_given_up_at_the_deadline() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let begin = Instant::now();
    let patience = Duration::from_millis(100);
    let error =
        TcpStore::connect(silent.local_addr().unwrap(), &secret(), Deadline::after(patience)).unwrap_err();
    assert!(matches!(error, Error::StoreIo { action: "connect", .. }), "{error}");

    let hold = |stream: TcpStream, _: Session| wait_for_close(&stream);
    let store = TcpStore::connect(impostor(secret(), hold), &secret(), soon()).unwrap();
    let error = store.set("key", b"", Deadline::after(patience)).unwrap_err();
    assert!(matches!(error, Error::StoreIo { action: "set", .. }), "{error}");
    let store = TcpStore::connect(impostor(secret(), hold), &secret(), soon()).unwrap();
    let error = store.get("key", Deadline::after(patience)).unwrap_err();
    assert!(matches!(&error, Error::StoreTimeout { key, .. } if key == "key"), "{error}");
    assert!(begin.elapsed() >= 3 * patience && begin.elapsed() < QUICK);
}

#[test]
fn the_unspecified_address_is_refused_with_a_reason() {
    for address in ["0.0.0.0:0", "[::]:29500"] {
        let config = StoreServerConfig::new(secret()).address(address.parse().unwrap());
        let error = StoreServer::start_with(config).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "a store cannot listen on {address}: it would listen on every network of this host; \
                 name the address of one interface, or 127.0.0.1"
            )
        );
    }
}

#[test]
fn a_forked_copy_neither_uses_nor_stops_what_is_its_parents() {
    let server = StoreServer::start(secret()).unwrap();
    let store = client(&server);
    let address = server.address();
    // What the child has: the same objects, under another process id.
    store.pretend_forked();
    store.set("key", b"from the child", soon()).unwrap();
    server.pretend_forked_and_drop();
    assert_eq!(store.get("key", soon()).unwrap(), b"from the child");
    TcpStore::connect(address, &secret(), soon()).unwrap();
}
