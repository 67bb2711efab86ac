//! Arguments that do not fit are told to the rank that gave them, before anything is sent or written; the communicator
//! goes on.

use unisono::{Communicator, DType, Error, Kind, Operations, Place, RawBuffer, ReduceOp, Result, Stream};
use unisono_core::Error as CoreError;

use crate::support::doors::submit_raw;
use crate::support::region::Region;
use crate::support::threads::on_threads;

/// One rank of three makes `wrong`, which must be refused with `expected`; then all make a call that works.
fn is_refused(expected: &'static str, wrong: impl Fn(&Communicator) -> Result<()> + Send + Sync + 'static) {
    on_threads(3, move |communicator| {
        if communicator.rank() == 1 {
            let error = wrong(&communicator).unwrap_err();
            assert_eq!(error.to_string(), expected);
            communicator.check().unwrap();
            assert_eq!(communicator.observer().state().failure, None);
        }
        let mut sum = [communicator.rank() as u32 + 1, 10];
        communicator.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
        assert_eq!(sum, [6, 30]);
        communicator.destroy().unwrap();
    });
}

#[test]
fn counts_of_input_and_output_must_fit() {
    is_refused(
        "all_reduce on rank 1: count of the output should be 3, got 4. Nothing was written.",
        |communicator| {
            let mut output = [7i32; 4];
            let result = communicator.all_reduce_into(&[1, 2, 3], &mut output, ReduceOp::Sum);
            assert_eq!(output, [7; 4]);
            result
        },
    );
    is_refused(
        "broadcast on rank 1: count of the output should be 2, got 0. Nothing was written.",
        |communicator| communicator.broadcast_into(&[1.5f64, 2.5], &mut Vec::new(), 1),
    );
    is_refused(
        "all_gather on rank 1: count of the output should be 6, got 5. Nothing was written.",
        |communicator| communicator.all_gather_into(&[1u8, 2], &mut [0; 5]),
    );
    is_refused(
        "all_gather on rank 1: count should be a multiple of 3, got 7. Nothing was written.",
        |communicator| communicator.all_gather(&mut [0u16; 7]),
    );
}

#[test]
fn buffers_on_streams_of_their_own_need_a_stream_each() {
    is_refused(
        "all_reduce_multi on rank 1: number of streams should be 2, one for each buffer, got 1. Nothing was written.",
        |communicator| {
            let (mut a, mut b) = ([1i32], [2]);
            let local = vec![(&mut a).into(), (&mut b).into()];
            let result = communicator.on_each(&[Stream::host()]).all_reduce_multi(local, ReduceOp::Sum);
            assert_eq!((a, b), ([1], [2]));
            result
        },
    );
    is_refused(
        "all_gather on rank 1: operation should be one on several buffers (all_reduce_multi, broadcast_multi), got \
         all_gather. Nothing was written.",
        |communicator| communicator.on_each(&[Stream::host()]).all_gather(&mut [0u8; 3]),
    );
    on_threads(2, |communicator| {
        let streams = [Stream::host(), Stream::host()];
        let (mut a, mut b) = ([1i32, 2], [10, 20]);
        let local = vec![(&mut a).into(), (&mut b).into()];
        communicator.on_each(&streams).all_reduce_multi(local, ReduceOp::Sum).unwrap();
        assert_eq!((a, b), ([22, 44], [22, 44]));
        b = [communicator.rank() as i32; 2];
        let local = vec![(&mut a).into(), (&mut b).into()];
        communicator.on_each(&streams).broadcast_multi(local, 1, 1).unwrap();
        assert_eq!((a, b), ([1, 1], [1, 1]));
        communicator.destroy().unwrap();
    });
}

#[test]
fn a_root_must_be_a_rank() {
    is_refused("broadcast on rank 1: root should be below 3, got 3. Nothing was written.", |communicator| {
        communicator.broadcast(&mut [0u8], 3)
    });
    is_refused(
        "broadcast on rank 1: root should be below 3, got 4294967295. Nothing was written.",
        |communicator| communicator.broadcast(&mut [0u8], usize::MAX),
    );
}

#[test]
fn a_reduction_must_exist_for_the_dtype() {
    is_refused("sum is not defined for bool; bool has: min, max, bit_and, bit_or, bit_xor", |communicator| {
        communicator.all_reduce(&mut [unisono::Bool8(1)], ReduceOp::Sum)
    });
    for dtype in DType::ALL {
        for op in ReduceOp::ALL {
            if unisono::reduce_op::is_supported(dtype, op) {
                continue;
            }
            on_threads(1, move |communicator| {
                let region = Region::plain(dtype.size(), 0);
                let buffer = region.raw(0, 1, dtype);
                let error = submit_raw(&communicator, Kind::AllReduce { op }, &[buffer]).unwrap_err();
                assert!(
                    matches!(&error, Error::Core(CoreError::Unsupported { dtype: got, .. }) if *got == dtype),
                    "{dtype} {op}: {error}"
                );
                communicator.barrier().unwrap();
            });
        }
    }
}

#[test]
fn buffers_must_be_the_same_or_disjoint() {
    let refused =
        "should be the input itself or disjoint from it, got a partial overlap. Nothing was written.";
    let all_reduce = "all_reduce on rank 1: memory of the output ";
    let all_gather = "all_gather on rank 1: memory of the output ";
    for (start, expected) in [(4, all_reduce), (12, all_reduce)] {
        let expected: &'static str = format!("{expected}{refused}").leak();
        is_refused(expected, move |communicator| {
            let region = Region::plain(64, 0);
            let (input, output) = (region.raw(start, 4, DType::F32), region.raw(8, 4, DType::F32));
            submit_raw(communicator, Kind::AllReduce { op: ReduceOp::Sum }, &[input, output])
        });
    }
    let expected: &'static str = format!("{all_gather}{refused}").leak();
    is_refused(expected, |communicator| {
        // The place of rank 0, not ours.
        let region = Region::plain(48, 0);
        let buffers = [region.raw(0, 4, DType::F32), region.raw(0, 12, DType::F32)];
        submit_raw(communicator, Kind::AllGather, &buffers)
    });
}

#[test]
fn buffers_must_have_one_dtype_and_come_in_the_right_number() {
    is_refused(
        "all_reduce on rank 1: dtype of the output should be f32, got i32. Nothing was written.",
        |communicator| {
            let (source, target) = (Region::plain(16, 0), Region::plain(16, 0));
            let buffers = [source.raw(0, 4, DType::F32), target.raw(0, 4, DType::I32)];
            submit_raw(communicator, Kind::AllReduce { op: ReduceOp::Sum }, &buffers)
        },
    );
    is_refused(
        "broadcast on rank 1: number of buffers should be 1 or 2, got 0. Nothing was written.",
        |communicator| submit_raw(communicator, Kind::Broadcast { root: 0 }, &[]),
    );
    is_refused(
        "all_gather on rank 1: number of buffers should be 1 or 2, got 3. Nothing was written.",
        |communicator| {
            let region = Region::plain(16, 0);
            submit_raw(communicator, Kind::AllGather, &[region.raw(0, 4, DType::F32); 3])
        },
    );
}

#[test]
fn a_barrier_takes_no_buffers() {
    on_threads(1, |communicator| {
        let region = Region::plain(16, 0);
        let error = submit_raw(&communicator, Kind::Barrier, &[region.raw(0, 4, DType::F32)]).unwrap_err();
        assert!(matches!(error, Error::Argument { call: "barrier", rank: 0, .. }), "{error}");
        communicator.barrier().unwrap();
    });
}

#[test]
fn memory_of_a_gpu_is_out_of_reach() {
    is_refused(
        "all_gather on rank 1 got a buffer in cuda:3; this communicator works on host memory and its windows, except through on() with a \
         stream of its GPU. Nothing was written.",
        |communicator| {
            let place = Place::Cuda { ordinal: 3 };
            let buffer = RawBuffer { ptr: 1 << 40, count: 3, dtype: DType::BF16, place };
            submit_raw(communicator, Kind::AllGather, &[buffer])
        },
    );
}

#[test]
fn kinds_that_are_not_operations_are_refused() {
    for kind in [Kind::Destroy, Kind::Window, Kind::CloseWindow] {
        on_threads(1, move |communicator| {
            let result = submit_raw(&communicator, kind, &[]);
            assert!(matches!(result, Err(Error::Argument { .. })), "{kind:?}: {result:?}");
            communicator.barrier().unwrap();
        });
    }
}

#[test]
fn parts_must_fit_the_ranks_and_what_is_refused_writes_nothing() {
    on_threads(3, |rank| {
        let me = rank.rank();
        let refused = |result: Result<(), Error>, expected: &str| {
            let error = result.unwrap_err();
            assert!(matches!(&error, Error::Argument { rank, .. } if *rank == me), "{error:?}");
            assert!(error.to_string().contains(expected), "{error}");
        };
        let mut four = [7u32; 4];
        refused(rank.all_to_all(&mut four), "count should be a multiple of 3, got 4");
        refused(rank.reduce_scatter(&mut four, ReduceOp::Sum), "count should be a multiple of 3, got 4");
        refused(rank.reduce(&mut four, ReduceOp::Sum, 3), "root should be below 3, got 3");
        refused(rank.scatter(&[0u32; 12], &mut four, usize::MAX), "root should be below 3");
        refused(rank.all_to_all_into(&[0u32; 3], &mut four), "count of the output should be 3, got 4");
        refused(
            rank.reduce_scatter_into(&[0u32; 11], &mut four, ReduceOp::Sum),
            "count of the input should be 12, got 11",
        );
        if me == 1 {
            refused(rank.gather(&[0u32; 4], &mut [0u32; 11], 1), "count of the output should be 12, got 11");
            refused(rank.scatter(&[0u32; 11], &mut four, 1), "count of the input should be 12, got 11");
        }
        let mut region = Region::plain(40, 0);
        region.bytes().fill(0xa5);
        let one = [region.raw(0, 3, DType::F32)];
        refused(submit_raw(&rank, Kind::Gather { root: 0 }, &one), "number of buffers should be 2, got 1");
        let overlapping = [region.raw(0, 9, DType::F32), region.raw(4, 9, DType::F32)];
        refused(submit_raw(&rank, Kind::AllToAll, &overlapping), "a partial overlap");
        let misplaced = [region.raw(0, 9, DType::F32), region.raw(((me + 1) % 3) * 12, 3, DType::F32)];
        refused(
            submit_raw(&rank, Kind::ReduceScatter { op: ReduceOp::Sum }, &misplaced),
            "a partial overlap",
        );
        let floats = rank.reduce(&mut [0f32; 4], ReduceOp::BitAnd, 0);
        assert!(matches!(floats, Err(Error::Core(unisono_core::Error::Unsupported { .. }))), "{floats:?}");
        assert_eq!(four, [7; 4]);
        assert!(region.bytes().iter().all(|byte| *byte == 0xa5));
        rank.all_reduce(&mut four, ReduceOp::Sum).unwrap();
        assert_eq!(four, [21; 4]);
        rank.destroy().unwrap();
    });
}
