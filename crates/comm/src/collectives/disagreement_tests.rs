//! A wait on the host that meets a wait on a peer's GPU, as the words of the shared memory tell it: there need be no GPU.

use std::time::Duration;

use unisono_core::ReduceOp;
use unisono_core::device::layout::{HAS_CAPTURED, HAS_GPU, REPORT_EACH, REPORT_MADE, REPORT_WAITING};
use unisono_core::settings::Settings;
use unisono_sync::Word;

use super::*;
use crate::communicator::Communicator;
use crate::operations::Operations;

/// What kernels say that wait in this call for rank 0.
const fn in_call(number: u64) -> u64 {
    number << 32 | 1
}

/// Rank 0 reduces on the host and rank 1 does not come: the errors of both. Before, rank 0 finds `made` in this word of its page, and
/// `waiting` in that of rank 1.
fn meet(made: (usize, u64), waiting: (usize, u64)) -> [Error; 2] {
    let settings = Settings { timeout: Some(Duration::from_millis(1200)), ..Settings::default() };
    let mut ranks = Communicator::threads_with(2, &settings).unwrap();
    let other = ranks.pop().unwrap();
    ranks[0].control.gpu()[made.0].store_relaxed(made.1);
    other.control.gpu()[waiting.0].store_relaxed(waiting.1);
    let error = ranks[0].all_reduce(&mut [1.0f32; 5], ReduceOp::Sum).unwrap_err();
    [error, other.barrier().unwrap_err()]
}

#[test]
fn a_call_on_the_host_that_meets_one_on_a_gpu_fails_everybody() {
    let left = "all_reduce #1 on rank 0 (f32, 5, sum) in host memory";
    let cases = [
        ((REPORT_MADE, HAS_GPU | 6), (REPORT_WAITING, in_call(7)), "call #7 on the GPU of rank 1"),
        ((REPORT_MADE, HAS_GPU | 0xffff_ffff), (REPORT_WAITING, in_call(0)), "call #0 on the GPU of rank 1"),
        ((REPORT_EACH[0], HAS_GPU | 1), (REPORT_EACH[1], in_call(4)), "call #4 on all GPUs of rank 1"),
    ];
    for (made, waiting, right) in cases {
        for error in meet(made, waiting) {
            let expected = Error::Mismatch { left: left.to_owned(), right: right.to_owned() };
            assert_eq!(error, expected);
        }
    }
}

#[test]
fn who_has_made_the_call_or_may_have_waits_on() {
    const A_RECEIPT: u64 = 2 << 16;
    let cases = [
        // It may lie in a stream behind other work.
        ((REPORT_MADE, HAS_GPU | 7), (REPORT_WAITING, in_call(7))),
        ((REPORT_MADE, HAS_GPU | 2), (REPORT_WAITING, in_call(0xffff_fff0))),
        ((REPORT_MADE, HAS_GPU | HAS_CAPTURED | 6), (REPORT_WAITING, in_call(7))),
        // Messages have no numbers.
        ((REPORT_MADE, HAS_GPU | 6), (REPORT_WAITING, in_call(7) | A_RECEIPT)),
        // Each world has numbers of its own.
        ((REPORT_MADE, HAS_GPU | 6), (REPORT_EACH[1], in_call(7))),
        ((REPORT_MADE, HAS_GPU | 6), (REPORT_WAITING, 0)),
    ];
    std::thread::scope(|scope| {
        for (made, waiting) in cases {
            scope.spawn(move || {
                for error in meet(made, waiting) {
                    assert!(
                        matches!(error, Error::Timeout { rank: 0, .. }),
                        "{made:x?} {waiting:x?}: {error}"
                    );
                }
            });
        }
    });
}
