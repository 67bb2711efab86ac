//! What bindings use: operations without a scope, timeouts of single calls, and waits that a user ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use unisono::{BufMut, Call, Communicator, Error, Kind, Memory, Operations, RawBuffer, ReduceOp, Stream};

use crate::support::threads::on_threads;

fn sum(x: &mut [f32]) -> Call<'_> {
    let kind = Kind::AllReduce { op: ReduceOp::Sum };
    // SAFETY: the tests keep the slice until the call is complete.
    unsafe { Call::from_raw(kind, &[BufMut::from(x).raw()], &[]) }
}

#[test]
fn an_operation_that_was_started_is_complete_when_it_says_so() {
    on_threads(2, |rank: Communicator| {
        let (mut first, mut second) = (vec![1.0f32; 100_000], vec![2.0f32; 10]);
        let calls = [sum(&mut first), sum(&mut second)];
        // SAFETY: both live to the end of this function, behind their end.
        let started = calls.map(|call| unsafe { rank.start(&call) }.unwrap());
        rank.complete(started[0]).unwrap();
        while !rank.test(started[1]).unwrap() {}
        assert!(started.iter().all(|started| rank.is_over(*started)));
        rank.destroy().unwrap();
        assert_eq!((first[99_999], second[9]), (2.0, 4.0));
    });
}

#[test]
fn a_message_from_anybody_comes_into_a_buffer_that_is_described() {
    on_threads(3, |rank: Communicator| {
        if rank.rank() > 0 {
            rank.send(&[rank.rank() as u32], 0, 5).unwrap();
            return rank.destroy().unwrap();
        }
        for _ in 1..3 {
            let mut got = [0u32];
            let target: RawBuffer = BufMut::from(&mut got).raw();
            // SAFETY: the array outlives the call.
            let from = unsafe { rank.recv_any_raw(&target, 5, &Stream::host()) }.unwrap();
            assert_eq!(got, [from as u32]);
        }
        rank.destroy().unwrap();
    });
}

#[test]
fn a_timeout_of_its_own_holds_for_one_call() {
    let ranks = Communicator::threads(2).unwrap();
    let begun = Instant::now();
    let result = ranks[0].with_timeout(Some(Duration::from_millis(50)), |rank| rank.barrier());
    let Err(Error::Timeout { rank: 0, waited_ms, .. }) = result else { panic!("{result:?}") };
    assert!((50..10_000).contains(&waited_ms) && begun.elapsed() < Duration::from_secs(20));

    on_threads(2, |rank: Communicator| {
        rank.with_timeout(Some(Duration::from_secs(60)), |rank| rank.barrier()).unwrap();
        if rank.rank() == 1 {
            std::thread::sleep(Duration::from_millis(100));
        }
        rank.barrier().unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn an_interrupted_wait_aborts_on_all_ranks_with_the_reason() {
    let mut ranks = Communicator::threads(2).unwrap();
    let other = ranks.pop().unwrap();
    let asked = Arc::new(std::sync::Mutex::new(0));
    let count = asked.clone();
    ranks[0].interrupt_by(Arc::new(move || {
        *count.lock().unwrap() += 1;
        (*count.lock().unwrap() == 3).then(|| "somebody had enough".to_owned())
    }));
    for result in [ranks[0].barrier(), other.barrier()] {
        let Err(Error::Aborted { rank: 0, reason, .. }) = result else { panic!("{result:?}") };
        assert_eq!(reason, "somebody had enough");
    }
    assert_eq!(*asked.lock().unwrap(), 3);
}

#[test]
fn the_mapping_of_one_sided_memory_outlives_it() {
    on_threads(2, |rank: Communicator| {
        let shared = rank.window::<u32>(8, Memory::Host).unwrap().into_symmetric(&rank).unwrap();
        let (mapping, address) = (shared.mapping().unwrap(), shared.address(rank.rank()).unwrap());
        shared.write(rank.rank(), 0, &[7; 8]).unwrap();
        shared.close(&rank).unwrap();
        let first: *const u32 = std::ptr::with_exposed_provenance(address as usize);
        // SAFETY: the mapping is held, and nobody writes any more.
        assert_eq!(unsafe { first.add(7).read() }, 7);
        drop(mapping);
        rank.destroy().unwrap();
    });
}
