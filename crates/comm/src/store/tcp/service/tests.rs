//! Requests in, replies out: no sockets needed.

use super::*;

fn service() -> Service {
    Service::new("tcp://test".into(), Limits::default(), 4096)
}

fn ask(service: &mut Service, connection: usize, number: u64, request: Request<'_>) -> Option<String> {
    let body = encode_body(&(number, request)).unwrap();
    service.request(connection, &body).unwrap().map(|body| shown(&body))
}

fn shown(body: &[u8]) -> String {
    let (number, reply) = decode_body::<(u64, Reply<'_>)>(body).unwrap();
    format!("{number}: {reply:?}")
}

fn ready(service: &mut Service) -> Vec<(usize, String)> {
    std::iter::from_fn(|| service.next_ready()).map(|(connection, body)| (connection, shown(&body))).collect()
}

fn set(service: &mut Service, key: &str) {
    assert_eq!(ask(service, 9, 0, Request::Set { key, value: Bytes(b"v") }).unwrap(), "0: Done");
}

#[test]
fn waiting_requests_are_released_in_order_once_all_their_keys_are_there() {
    let mut service = service();
    assert_eq!(ask(&mut service, 1, 5, Request::Wait { keys: vec!["a", "b"] }), None);
    assert_eq!(ask(&mut service, 2, 6, Request::Values { keys: vec!["b", "a"] }), None);
    set(&mut service, "b");
    assert_eq!(ready(&mut service), []);
    set(&mut service, "a");
    let expected = [(1, "5: Done".into()), (2, "6: Values([Bytes([118]), Bytes([118])])".into())];
    assert_eq!(ready(&mut service), expected);
    assert!(service.has_no_waiters(), "{service:?}");
}

#[test]
fn a_key_deleted_before_the_reply_is_waited_for_again() {
    let mut service = service();
    ask(&mut service, 1, 5, Request::Values { keys: vec!["a", "b"] });
    set(&mut service, "a");
    ask(&mut service, 9, 1, Request::Delete { key: "a" });
    set(&mut service, "b");
    assert_eq!(ready(&mut service), []);
    set(&mut service, "a");
    // Ready now, but deleted before the reply is built.
    ask(&mut service, 9, 1, Request::Delete { key: "b" });
    assert_eq!(ready(&mut service), []);
    set(&mut service, "b");
    assert_eq!(ready(&mut service).len(), 1);
    assert!(service.has_no_waiters(), "{service:?}");
}

#[test]
fn a_cancelled_request_names_the_missing_key_and_leaves_nothing() {
    let mut service = service();
    set(&mut service, "a");
    ask(&mut service, 1, 5, Request::Wait { keys: vec!["a", "b"] });
    assert_eq!(ask(&mut service, 2, 5, Request::Cancel), None, "numbers belong to a connection");
    assert_eq!(ask(&mut service, 1, 5, Request::Cancel).unwrap(), "5: Cancelled { missing: \"b\" }");
    assert_eq!(ask(&mut service, 1, 5, Request::Cancel), None);
    set(&mut service, "b");
    assert_eq!(ready(&mut service), []);
    assert!(service.has_no_waiters(), "{service:?}");
}

#[test]
fn a_request_whose_reply_is_queued_is_not_cancelled() {
    let mut service = service();
    set(&mut service, "a");
    ask(&mut service, 1, 5, Request::Values { keys: vec!["a"] });
    assert_eq!(ask(&mut service, 1, 5, Request::Cancel), None);
    assert_eq!(ready(&mut service).len(), 1);
}

#[test]
fn a_connection_that_is_gone_leaves_nothing() {
    let mut service = service();
    for number in 0..5 {
        ask(&mut service, 1, number, Request::Wait { keys: vec!["a"] });
    }
    service.forget(1);
    assert!(service.has_no_waiters(), "{service:?}");
    set(&mut service, "a");
    assert_eq!(ready(&mut service), []);
}

#[test]
fn waiting_requests_have_a_budget_and_numbers_are_used_once() {
    let mut service = service();
    let mut refused = None;
    for number in 0..100 {
        refused = refused.or(ask(&mut service, 1, number, Request::Wait { keys: vec!["key"] }));
    }
    assert!(refused.unwrap().contains("size of all waiting requests"));
    assert!(service.waiting_bytes <= 4096);
    assert!(ask(&mut service, 1, 0, Request::Wait { keys: vec![] }).unwrap().contains("already waits"));
}

#[test]
fn refusals_come_back_as_the_same_errors() {
    let mut service = service();
    assert_eq!(ask(&mut service, 1, 1, Request::Delete { key: "" }).unwrap(), "1: Refused(EmptyKey)");
    let long = "k".repeat(crate::store::MAX_KEY_BYTES + 1);
    let body = encode_body(&(1u64, Request::Check { keys: vec![&long] })).unwrap();
    let body = service.request(1, &body).unwrap().unwrap();
    let (_, Reply::Refused(refusal)) = decode_body::<(u64, Reply<'_>)>(&body).unwrap() else {
        panic!("it was refused")
    };
    let (got, cap) = (8193, 8192);
    let expected = Error::StoreLimit { store: "tcp://client".into(), what: "key length", got, cap };
    assert_eq!(refusal.into_error("tcp://client".into()), expected);
}

#[test]
fn values_come_in_pieces_that_fit_into_a_reply() {
    let mut service = service();
    let half = vec![1; VALUES_BYTES / 2 + 1];
    for key in ["a", "b", "c"] {
        ask(&mut service, 1, 0, Request::Set { key, value: Bytes(&half) });
    }
    ask(&mut service, 1, 1, Request::Values { keys: vec!["a", "b", "c"] });
    let (_, body) = service.next_ready().unwrap();
    let (_, Reply::Values(values)) = decode_body::<(u64, Reply<'_>)>(&body).unwrap() else {
        panic!("values were asked for")
    };
    assert_eq!(values.len(), 2);
    assert!(body.len() <= super::super::protocol::MAX_BODY_BYTES);
}

#[test]
fn any_bytes_are_a_request_or_an_error() {
    use proptest::prelude::*;
    proptest!(|(bytes in prop::collection::vec(any::<u8>(), 0..60))| {
        let mut service = service();
        let _ = service.request(1, &bytes);
        prop_assert!(service.waiting_bytes <= 4096);
        service.forget(1);
        prop_assert!(service.has_no_waiters());
    });
}
