//! One suite for all stores: each property of the trait `Store` is a function that gets a maker of clients and is run
//! against every implementation, as one named test for each pair.
//!
//! Every test has a store of its own. Each call of the maker yields another client of it, as another rank would have.

use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Trial};
use unisono::store::{
    FileStore, MAX_KEY_BYTES, MAX_VALUE_BYTES, MemoryStore, PrefixStore, Store, StoreServer, TcpStore,
    TorchStore, TorchStoreServer,
};
use unisono::{Deadline, Error, Secret};

/// Yields clients of one store.
type Make<'a> = &'a dyn Fn() -> Arc<dyn Store>;
/// One property of all stores.
type Property = fn(Make<'_>);
/// Calls the property with a maker of clients, and keeps alive meanwhile what the clients need.
type Implementation = fn(Property);

/// One line for each implementation.
const IMPLEMENTATIONS: [(&str, Implementation); 5] = [
    ("memory", in_memory),
    ("file", in_a_file),
    ("prefix", with_a_prefix),
    ("tcp", over_tcp),
    ("torch", over_torch),
];

fn in_memory(property: Property) {
    let store = MemoryStore::new();
    property(&|| Arc::new(store.clone()));
}

fn in_a_file(property: Property) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    property(&|| Arc::new(FileStore::open(&path, soon()).unwrap()));
}

fn with_a_prefix(property: Property) {
    let store = MemoryStore::new();
    property(&|| Arc::new(PrefixStore::new("job/7", Arc::new(store.clone()))));
}

fn over_tcp(property: Property) {
    let server = StoreServer::start(Secret::new([7; 32])).unwrap();
    property(&|| Arc::new(TcpStore::from_unique_id(&server.unique_id(), soon()).unwrap()));
}

fn over_torch(property: Property) {
    let server = TorchStoreServer::on_loopback().unwrap();
    let address = server.address().to_string();
    property(&|| Arc::new(TorchStore::connect(address.clone(), soon()).unwrap()));
}

const PROPERTIES: [(&str, Property); 21] = [
    ("what_one_client_sets_another_reads", what_one_client_sets_another_reads),
    ("a_later_set_replaces_the_value", a_later_set_replaces_the_value),
    ("a_get_waits_for_a_later_set", a_get_waits_for_a_later_set),
    ("wait_waits_for_many_keys", wait_waits_for_many_keys),
    ("a_timeout_comes_in_time_and_names_store_and_key", a_timeout_comes_in_time_and_names_store_and_key),
    ("after_a_timeout_the_client_goes_on", after_a_timeout_the_client_goes_on),
    ("what_is_there_is_read_after_the_deadline_too", what_is_there_is_read_after_the_deadline_too),
    ("check_tells_without_waiting", check_tells_without_waiting),
    ("add_counts_exactly_under_contention", add_counts_exactly_under_contention),
    ("add_keeps_ascii_decimal", add_keeps_ascii_decimal),
    ("compare_set_follows_its_rules", compare_set_follows_its_rules),
    ("compare_set_lets_one_of_many_win", compare_set_lets_one_of_many_win),
    ("append_is_atomic", append_is_atomic),
    ("delete_removes_once", delete_removes_once),
    ("multi_get_keeps_the_order_and_waits", multi_get_keeps_the_order_and_waits),
    ("no_keys_are_all_there", no_keys_are_all_there),
    ("num_keys_counts", num_keys_counts),
    ("any_bytes_are_a_value", any_bytes_are_a_value),
    ("what_is_too_large_is_refused_and_not_stored", what_is_too_large_is_refused_and_not_stored),
    ("a_long_wait_does_not_hold_up_other_threads", a_long_wait_does_not_hold_up_other_threads),
    ("many_threads_wait_at_once", many_threads_wait_at_once),
];

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for (store, implementation) in IMPLEMENTATIONS {
        for (name, property) in PROPERTIES {
            trials.push(Trial::test(format!("{store}::{name}"), move || {
                implementation(property);
                Ok(())
            }));
        }
    }
    trials.push(Trial::test("add_on_text_says_so_where_the_protocol_can", || {
        add_on_text_says_so_where_the_protocol_can();
        Ok(())
    }));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Far longer than anything here takes, even on a busy machine.
fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

fn what_one_client_sets_another_reads(make: Make<'_>) {
    let (writer, reader) = (make(), make());
    writer.set("key", b"value", soon()).unwrap();
    assert_eq!(reader.get("key", soon()).unwrap(), b"value");
    assert_eq!(writer.get("key", soon()).unwrap(), b"value");
    reader.wait(&["key"], soon()).unwrap();
}

fn a_later_set_replaces_the_value(make: Make<'_>) {
    let (writer, reader) = (make(), make());
    for round in 0..20 {
        let value = format!("{round}").repeat(round);
        writer.set("key", value.as_bytes(), soon()).unwrap();
        assert_eq!(reader.get("key", soon()).unwrap(), value.as_bytes());
    }
    assert_eq!(reader.num_keys(soon()).unwrap(), 1);
}

fn a_get_waits_for_a_later_set(make: Make<'_>) {
    let (writer, reader) = (make(), make());
    thread::scope(|scope| {
        let waiter = scope.spawn(|| reader.get("late", soon()).unwrap());
        // The reader most likely waits by now; if not, the test holds all the same.
        thread::sleep(Duration::from_millis(20));
        assert!(!waiter.is_finished());
        writer.set("late", b"here", soon()).unwrap();
        assert_eq!(waiter.join().unwrap(), b"here");
    });
}

fn wait_waits_for_many_keys(make: Make<'_>) {
    let (writer, reader) = (make(), make());
    let keys: Vec<String> = (0..50).map(|index| format!("rank/{index}")).collect();
    let all: Vec<&str> = keys.iter().map(String::as_str).collect();
    thread::scope(|scope| {
        let waiter = scope.spawn(|| reader.wait(&all, soon()).unwrap());
        // Out of order, the first one last.
        for key in all.iter().rev() {
            assert!(!waiter.is_finished(), "over before {key} was set");
            writer.set(key, b"", soon()).unwrap();
        }
        waiter.join().unwrap();
    });
    assert!(reader.check(&all, soon()).unwrap());
}

fn a_timeout_comes_in_time_and_names_store_and_key(make: Make<'_>) {
    let store = make();
    store.set("there", b"1", soon()).unwrap();
    let patience = Duration::from_millis(100);
    let calls: [&dyn Fn(Deadline) -> Result<(), Error>; 3] = [
        &|deadline| store.get("missing", deadline).map(drop),
        &|deadline| store.wait(&["there", "missing"], deadline),
        &|deadline| store.multi_get(&["there", "missing", "there"], deadline).map(drop),
    ];
    for call in calls {
        let begin = Instant::now();
        let error = call(Deadline::after(patience)).unwrap_err();
        let took = begin.elapsed();
        let Error::StoreTimeout { store: name, key, waited } = &error else { panic!("{error}") };
        assert!(key.ends_with("missing"), "{error}");
        assert!(store.describe().starts_with(name.as_str()), "{name} is not {}", store.describe());
        // The deadline is older than the wait when the machine is busy.
        assert!(took >= patience && !waited.is_zero() && *waited <= took, "{error}, after {took:?}");
        assert!(took < patience + Duration::from_secs(2), "{error}, after {took:?}");
    }
}

fn after_a_timeout_the_client_goes_on(make: Make<'_>) {
    let (store, other) = (make(), make());
    for round in 0..5 {
        let key = format!("key {round}");
        assert!(store.get(&key, Deadline::after(Duration::from_millis(5))).is_err());
        other.set(&key, key.as_bytes(), soon()).unwrap();
        assert_eq!(store.get(&key, soon()).unwrap(), key.as_bytes());
    }
}

fn what_is_there_is_read_after_the_deadline_too(make: Make<'_>) {
    let store = make();
    store.set("key", b"value", soon()).unwrap();
    let over = Deadline::after(Duration::ZERO);
    assert_eq!(store.get("key", over).unwrap(), b"value");
    store.wait(&["key"], over).unwrap();
    assert_eq!(store.multi_get(&["key"], over).unwrap(), [b"value"]);
}

fn check_tells_without_waiting(make: Make<'_>) {
    let (writer, reader) = (make(), make());
    assert!(!reader.check(&["a"], soon()).unwrap());
    writer.set("a", b"", soon()).unwrap();
    assert!(reader.check(&["a"], soon()).unwrap());
    assert!(!reader.check(&["a", "b"], soon()).unwrap());
    writer.add("b", 1, soon()).unwrap();
    assert!(reader.check(&["b", "a", "b"], soon()).unwrap());
}

fn add_counts_exactly_under_contention(make: Make<'_>) {
    let clients: Vec<_> = (0..8).map(|_| make()).collect();
    let mut sums: Vec<i64> = thread::scope(|scope| {
        let count = |client: &Arc<dyn Store>| -> Vec<i64> {
            (0..100).map(|_| client.add("counter", 1, soon()).unwrap()).collect()
        };
        let threads: Vec<_> = clients.iter().map(|client| scope.spawn(move || count(client))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    sums.sort_unstable();
    assert_eq!(sums, (1..=800).collect::<Vec<_>>());
    assert_eq!(clients[0].get("counter", soon()).unwrap(), b"800");
}

fn add_keeps_ascii_decimal(make: Make<'_>) {
    let store = make();
    assert_eq!(store.add("n", 5, soon()).unwrap(), 5);
    assert_eq!(store.get("n", soon()).unwrap(), b"5");
    assert_eq!(store.add("n", -12, soon()).unwrap(), -7);
    assert_eq!(store.get("n", soon()).unwrap(), b"-7");
    store.set("n", b"40", soon()).unwrap();
    assert_eq!(store.add("n", 0, soon()).unwrap(), 40);
    assert_eq!(store.add("n", i64::MAX - 40, soon()).unwrap(), i64::MAX);
}

fn compare_set_follows_its_rules(make: Make<'_>) {
    let store = make();
    let compare_set =
        |expected: &[u8], desired: &[u8]| store.compare_set("key", expected, desired, soon()).unwrap();
    assert_eq!(compare_set(b"old", b"new"), b"old", "a missing key with an expectation");
    assert!(!store.check(&["key"], soon()).unwrap(), "nothing was stored");
    assert_eq!(compare_set(b"", b"first"), b"first", "a missing key without");
    assert_eq!(compare_set(b"", b"second"), b"first", "an empty expectation and a value that is there");
    assert_eq!(compare_set(b"other", b"second"), b"first", "another value than expected");
    assert_eq!(compare_set(b"first", b"second"), b"second", "the expected value");
    assert_eq!(store.get("key", soon()).unwrap(), b"second");
    store.set("key", b"", soon()).unwrap();
    assert_eq!(compare_set(b"", b"third"), b"third", "an empty value is equal to an empty expectation");
}

fn compare_set_lets_one_of_many_win(make: Make<'_>) {
    let clients: Vec<_> = (0..8).map(|_| make()).collect();
    let results: Vec<Vec<u8>> = thread::scope(|scope| {
        let elect = |(index, client): (usize, &Arc<dyn Store>)| {
            client.compare_set("leader", b"", format!("rank {index}").as_bytes(), soon()).unwrap()
        };
        let threads: Vec<_> =
            clients.iter().enumerate().map(|candidate| scope.spawn(move || elect(candidate))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let leader = clients[0].get("leader", soon()).unwrap();
    assert!(leader.starts_with(b"rank "));
    assert!(results.iter().all(|seen| *seen == leader), "{results:?}");
}

fn append_is_atomic(make: Make<'_>) {
    let clients: Vec<_> = (0..4).map(|_| make()).collect();
    thread::scope(|scope| {
        for (index, client) in clients.iter().enumerate() {
            scope.spawn(move || {
                let piece = [b'a' + index as u8; 10];
                (0..25).for_each(|_| client.append("log", &piece, soon()).unwrap());
            });
        }
    });
    let log = clients[0].get("log", soon()).unwrap();
    assert_eq!(log.len(), 4 * 25 * 10);
    for piece in log.chunks(10) {
        assert!(piece.iter().all(|byte| *byte == piece[0]), "a torn piece: {piece:?}");
    }
    for letter in b'a'..=b'd' {
        assert_eq!(log.iter().filter(|byte| **byte == letter).count(), 250);
    }
}

fn delete_removes_once(make: Make<'_>) {
    let (store, other) = (make(), make());
    assert!(!store.delete("key", soon()).unwrap());
    store.set("key", b"1", soon()).unwrap();
    assert!(other.delete("key", soon()).unwrap());
    assert!(!store.delete("key", soon()).unwrap());
    assert!(!store.check(&["key"], soon()).unwrap());
    assert_eq!(store.add("key", 3, soon()).unwrap(), 3, "a removed key begins at 0 again");
}

fn multi_get_keeps_the_order_and_waits(make: Make<'_>) {
    let (writer, reader) = (make(), make());
    writer.set("a", b"1", soon()).unwrap();
    writer.set("b", b"", soon()).unwrap();
    thread::scope(|scope| {
        let waiter = scope.spawn(|| reader.multi_get(&["c", "a", "b", "a"], soon()).unwrap());
        writer.set("c", b"333", soon()).unwrap();
        assert_eq!(waiter.join().unwrap(), [&b"333"[..], b"1", b"", b"1"]);
    });
}

fn no_keys_are_all_there(make: Make<'_>) {
    let store = make();
    assert!(store.check(&[], soon()).unwrap());
    store.wait(&[], soon()).unwrap();
    assert_eq!(store.multi_get(&[], soon()).unwrap(), Vec::<Vec<u8>>::new());
}

fn num_keys_counts(make: Make<'_>) {
    let (store, other) = (make(), make());
    assert_eq!(store.num_keys(soon()).unwrap(), 0);
    for index in 0..30 {
        other.set(&format!("key {}", index % 20), b"", soon()).unwrap();
    }
    assert_eq!(store.num_keys(soon()).unwrap(), 20);
    other.delete("key 7", soon()).unwrap();
    assert_eq!(store.num_keys(soon()).unwrap(), 19);
}

fn any_bytes_are_a_value(make: Make<'_>) {
    let (writer, reader) = (make(), make());
    let every_byte: Vec<u8> = (0..=255).collect();
    let long: Vec<u8> = (0..300_000u32).flat_map(|index| index.to_le_bytes()).collect();
    for (key, value) in
        [("empty", &[][..]), ("every byte", &every_byte), ("long", &long), ("zero\0/ü", b"\0")]
    {
        writer.set(key, value, soon()).unwrap();
        assert!(reader.get(key, soon()).unwrap() == value, "{key}");
    }
}

fn what_is_too_large_is_refused_and_not_stored(make: Make<'_>) {
    let store = make();
    let long_key = "k".repeat(MAX_KEY_BYTES + 1);
    let long_value = vec![0; MAX_VALUE_BYTES + 1];
    let refused = |result: Result<(), Error>, expected: &str| match result.unwrap_err() {
        Error::StoreLimit { what, got, cap, .. } => {
            assert_eq!(what, expected);
            assert!(got > cap, "{got} > {cap}");
        }
        error => panic!("{error}"),
    };
    refused(store.set(&long_key, b"", soon()), "key length");
    refused(store.get(&long_key, soon()).map(drop), "key length");
    refused(store.wait(&["a", &long_key], soon()), "key length");
    refused(store.add(&long_key, 1, soon()).map(drop), "key length");
    refused(store.set("key", &long_value, soon()), "value length");
    refused(store.append("key", &long_value, soon()), "value length");
    refused(store.compare_set("key", b"", &long_value, soon()).map(drop), "value length");
    assert!(matches!(store.set("", b"", soon()), Err(Error::StoreKey { .. })));
    assert_eq!(store.num_keys(soon()).unwrap(), 0, "nothing was stored");
    // A prefix of the store or of the protocol needs some bytes of the key.
    let longest_key = "k".repeat(MAX_KEY_BYTES - 64);
    store.set(&longest_key, &long_value[1..], soon()).unwrap();
    assert_eq!(make().get(&longest_key, soon()).unwrap().len(), MAX_VALUE_BYTES);
}

fn a_long_wait_does_not_hold_up_other_threads(make: Make<'_>) {
    let store = make();
    thread::scope(|scope| {
        let waiter = scope.spawn(|| store.get("late", soon()).unwrap());
        let begin = Instant::now();
        for round in 0..20 {
            store.set("other", format!("{round}").as_bytes(), soon()).unwrap();
        }
        assert_eq!(store.get("other", soon()).unwrap(), b"19");
        assert!(!waiter.is_finished());
        assert!(begin.elapsed() < Duration::from_secs(10), "took {:?}", begin.elapsed());
        store.set("late", b"now", soon()).unwrap();
        assert_eq!(waiter.join().unwrap(), b"now");
    });
}

fn many_threads_wait_at_once(make: Make<'_>) {
    let store = make();
    let wait = |index: usize| store.get(&format!("slot/{index}"), soon()).unwrap();
    let wait = &wait;
    thread::scope(|scope| {
        let waiters: Vec<_> = (0..64).map(|index| scope.spawn(move || wait(index))).collect();
        for index in (0..64).rev() {
            store.set(&format!("slot/{index}"), format!("{index}").as_bytes(), soon()).unwrap();
        }
        for (index, waiter) in waiters.into_iter().enumerate() {
            assert_eq!(waiter.join().unwrap(), format!("{index}").as_bytes());
        }
    });
}

/// Torch's protocol has no error replies: there the server hangs up, and the client goes on with a new connection.
fn add_on_text_says_so_where_the_protocol_can() {
    let property: Property = |make| {
        let store = make();
        store.set("text", b"12x", soon()).unwrap();
        let error = store.add("text", 1, soon()).unwrap_err();
        match (store.describe().starts_with("torch://"), &error) {
            (false, Error::StoreValue { key, .. }) => assert!(key.ends_with("text"), "{error}"),
            (true, Error::StoreIo { action: "add", .. }) => {}
            _ => panic!("{error}"),
        }
        assert_eq!(store.get("text", soon()).unwrap(), b"12x");
    };
    for (_, implementation) in IMPLEMENTATIONS {
        implementation(property);
    }
}
