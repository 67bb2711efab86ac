//! The life of a buffer: constructed, exchanged once, available, closed; and settings on which ranks differ.

use std::time::Duration;

use unisono::ep::{Buffer, Dispatch, Settings};
use unisono::half::bf16;
use unisono::{Communicator, DType, Error, Operations, ReduceOp};

use super::support::threads::on_threads;

fn one_token(buffer: &mut Buffer) -> unisono::Result<usize> {
    let x = vec![bf16::ONE; buffer.settings().hidden];
    Ok(buffer.dispatch(&Dispatch::new(&x).top_k(&[0], 1))?.x.shape()[0])
}

#[test]
fn a_buffer_is_used_behind_its_one_exchange() {
    on_threads(2, |rank| {
        let mut buffer = Buffer::new(&rank, Settings::new(8, 2)).unwrap();
        assert!(!buffer.is_available());
        let error = one_token(&mut buffer).unwrap_err();
        assert!(matches!(error, Error::BufferState { call: "dispatch", .. }), "{error}");
        assert!(matches!(buffer.layout(&[0i64], 1), Err(Error::BufferState { call: "layout", .. })));
        buffer.exchange(&rank).unwrap();
        assert!(buffer.is_available());
        let error = buffer.exchange(&rank).unwrap_err();
        assert!(matches!(error, Error::BufferState { call: "exchange", .. }), "{error}");
        assert_eq!(one_token(&mut buffer).unwrap(), if rank.rank() == 0 { 2 } else { 0 });
        assert_eq!((buffer.local_experts(), buffer.masked()), (vec![rank.rank()], vec![]));
        buffer.close(&rank).unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn several_buffers_and_their_communicator_are_used_in_turn() {
    on_threads(3, |rank| {
        let make = |hidden| {
            let mut buffer = Buffer::new(&rank, Settings::new(hidden, 3)).unwrap();
            buffer.exchange(&rank).unwrap();
            buffer
        };
        let (mut first, mut second) = (make(8), make(4096));
        for _ in 0..20 {
            let came = if rank.rank() == 0 { 3 } else { 0 };
            assert_eq!(one_token(&mut first).unwrap(), came);
            let mut x = [1u32];
            rank.all_reduce(&mut x, ReduceOp::Sum).unwrap();
            assert_eq!((x, one_token(&mut second).unwrap()), ([3], came));
        }
        // A buffer that is dropped keeps nobody.
        drop(first);
        assert_eq!(one_token(&mut second).unwrap(), if rank.rank() == 0 { 3 } else { 0 });
        second.close(&rank).unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn a_rank_whose_settings_differ_is_named_on_all() {
    type Change = fn(&mut Settings);
    let changes: [(&str, Change, &str, &str); 8] = [
        ("hidden", |s| s.hidden = 16, "16", "8"),
        ("experts", |s| s.experts = 8, "8", "4"),
        ("capacity", |s| s.capacity = 1, "1", "128"),
        ("top_k", |s| s.top_k = 2, "2", "32"),
        ("dtype", |s| s.dtype = DType::F16, "f16", "bf16"),
        ("low_latency", |s| s.low_latency = true, "true", "false"),
        ("masking", |s| s.masking = true, "true", "false"),
        ("deadline", |s| s.deadline = Duration::from_millis(1500), "1.5s", "10s"),
    ];
    on_threads(4, move |rank| {
        for (name, change, got, expected) in changes {
            let mut settings = Settings::new(8, 4);
            if rank.rank() == 2 {
                change(&mut settings);
            }
            let mut buffer = Buffer::new(&rank, settings).unwrap();
            let (got, expected) = (got.to_owned(), expected.to_owned());
            let differs = Error::BufferSettings { what: name, rank: 2, got, expected };
            assert_eq!(buffer.exchange(&rank).unwrap_err(), differs);
            assert!(!buffer.is_available());
        }
        let table = |last| Settings { placement: Some(vec![0, 1, 2, last]), ..Settings::new(8, 4) };
        let mut buffer = Buffer::new(&rank, table(rank.rank().min(1))).unwrap();
        let error = buffer.exchange(&rank).unwrap_err();
        assert!(matches!(error, Error::BufferSettings { what: "placement", rank: 0, .. }), "{error}");
        // Nothing has failed.
        let mut buffer = Buffer::new(&rank, Settings::new(8, 4)).unwrap();
        buffer.exchange(&rank).unwrap();
        assert_eq!(one_token(&mut buffer).unwrap(), if rank.rank() == 0 { 4 } else { 0 });
        buffer.close(&rank).unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn a_buffer_belongs_to_one_communicator_and_one_generation() {
    on_threads(2, |rank| {
        let other = Communicator::threads(1).unwrap().remove(0);
        let mut buffer = Buffer::new(&rank, Settings::new(8, 2)).unwrap();
        let error = buffer.exchange(&other).unwrap_err();
        assert!(matches!(error, Error::Argument { what: "communicator", .. }), "{error}");
        buffer.exchange(&rank).unwrap();
        let error = buffer.renew(&other).unwrap_err();
        assert!(matches!(error, Error::Argument { call: "renew", what: "communicator", .. }), "{error}");
        let fresh = Buffer::new(&rank, Settings { masking: true, ..Settings::new(8, 2) }).unwrap();
        let error = fresh.renew(&rank).unwrap_err();
        assert!(matches!(error, Error::BufferState { call: "renew", .. }), "{error}");
        let rank = rank.shrink().unwrap();
        let error = one_token(&mut buffer).unwrap_err();
        assert!(matches!(error, Error::Generation { generation: 1, .. }), "{error}");
        rank.destroy().unwrap();
    });
}
