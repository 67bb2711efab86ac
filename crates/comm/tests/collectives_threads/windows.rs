//! Windows: memory that all ranks map. Typed ranges as inputs and outputs, what is refused, what happens at the end.

use unisono::{Call, Communicator, Error, Kind, Memory, Operations, ReduceOp, Window};

use crate::support::threads::{on_built, on_threads};

/// What the CPU works on. Without GPUs, both are the same.
const KINDS: [Memory; 2] = [Memory::Host, Memory::Pinned];

#[test]
fn a_window_starts_with_zeros_and_is_lent_between_collectives() {
    on_threads(3, |communicator| {
        KINDS.into_iter().for_each(|memory| starts_with_zeros(&communicator, memory));
        communicator.destroy().unwrap();
    });
}

fn starts_with_zeros(communicator: &Communicator, memory: Memory) {
    let rank = communicator.rank();
    let mut window = communicator.window::<f64>(5000, memory).unwrap();
    assert_eq!((window.len(), window.is_empty()), (5000, false));
    assert!(window.lend().unwrap().iter().all(|value| *value == 0.0));
    for turn in 0..20 {
        window.lend().unwrap().fill(f64::from(turn) + rank as f64);
        communicator.all_reduce(&mut window, ReduceOp::Avg).unwrap();
        assert!(window.lend().unwrap().iter().all(|value| *value == f64::from(turn) + 1.0));
    }
    window.close(communicator).unwrap();
}

#[test]
fn ranges_of_windows_are_inputs_and_outputs() {
    on_threads(3, |communicator| {
        let rank = communicator.rank();
        let mut from = communicator.window::<u32>(30_000, Memory::Pinned).unwrap();
        let mut to = communicator.window::<u32>(30_000, Memory::Host).unwrap();
        assert_ne!(from.id(), to.id());
        from.lend().unwrap().fill(rank as u32 + 1);
        to.lend().unwrap().fill(99);
        communicator.all_reduce_into(from.range(7..20_007), to.range_mut(1..20_001), ReduceOp::Sum).unwrap();
        let result = to.lend().unwrap();
        assert_eq!((result[0], result[20_001]), (99, 99));
        assert!(result[1..20_001].iter().all(|value| *value == 6));
        communicator.all_gather_into(from.range(0..10_000), &mut to).unwrap();
        let result = to.lend().unwrap();
        assert!(
            (0..3)
                .all(|part| result[part * 10_000..(part + 1) * 10_000].iter().all(|v| *v == part as u32 + 1))
        );
        communicator.broadcast_into(&from, &mut to, 2).unwrap();
        assert!(to.lend().unwrap().iter().all(|value| *value == 3));
        assert!(from.lend().unwrap().iter().all(|value| *value == rank as u32 + 1), "an input was written");
        communicator.destroy().unwrap();
    });
}

#[test]
fn an_empty_window_is_one() {
    on_threads(2, |communicator| {
        let mut window = communicator.window::<u8>(0, Memory::Host).unwrap();
        assert!(window.is_empty() && window.lend().unwrap().is_empty());
        communicator.all_reduce(&mut window, ReduceOp::Max).unwrap();
        communicator.all_gather(&mut window).unwrap();
        window.close(&communicator).unwrap();
        communicator.destroy().unwrap();
    });
}

#[test]
fn a_window_that_is_too_large_is_refused_on_all_ranks_and_they_go_on() {
    for count in [usize::MAX, usize::MAX / 8, isize::MAX as usize / 8] {
        on_threads(2, move |communicator| {
            let error = communicator.window::<f64>(count, Memory::Host).unwrap_err();
            assert!(matches!(error, Error::Core(_) | Error::Node(_)), "{error}");
            let mut sum = [1u8];
            communicator.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
            assert_eq!(sum, [2]);
            let mut window = communicator.window::<f64>(1000, Memory::Host).unwrap();
            assert_eq!(window.lend().unwrap().len(), 1000);
            communicator.destroy().unwrap();
        });
    }
}

#[test]
fn a_failed_communicator_poisons_its_windows() {
    on_threads(2, |communicator| {
        let mut window = communicator.window::<f32>(10, Memory::Host).unwrap();
        communicator.barrier().unwrap();
        if communicator.rank() == 1 {
            communicator.observer().abort("on purpose");
        }
        communicator.all_reduce(&mut window, ReduceOp::Sum).unwrap_err();
        let Err(Error::Poisoned { id, cause }) = window.lend() else { panic!("lent after a failure") };
        assert_eq!(id, window.id());
        assert!(cause.contains("on purpose"), "{cause}");
        window.close(&communicator).unwrap_err();
    });
}

#[test]
fn windows_of_different_counts_are_a_mismatch() {
    let errors = on_threads(2, |communicator| {
        communicator.barrier().unwrap();
        communicator.window::<u16>(10 + communicator.rank(), Memory::Host).unwrap_err()
    });
    for error in errors {
        let Error::Mismatch { left, right } = &error else { panic!("{error}") };
        let both = format!("{left} {right}");
        assert!(both.contains("window #2 on rank 0 (u16, 10)"), "{both}");
        assert!(both.contains("window #2 on rank 1 (u16, 11)"), "{both}");
    }
}

#[test]
fn windows_in_different_memory_are_a_mismatch() {
    for kinds in [[Memory::Host, Memory::Pinned], [Memory::Pinned, Memory::Device]] {
        let errors = on_threads(2, move |communicator| {
            communicator.barrier().unwrap();
            communicator.window::<u16>(10, kinds[communicator.rank()]).unwrap_err()
        });
        for error in errors {
            let Error::Mismatch { left, right } = &error else { panic!("{error}") };
            let both = format!("{left} {right}");
            for (rank, memory) in kinds.into_iter().enumerate() {
                let place = match memory {
                    Memory::Pinned => ", pinned",
                    Memory::Device => ", on GPUs",
                    _ => "",
                };
                assert!(both.contains(&format!("window #2 on rank {rank} (u16, 10{place})")), "{both}");
            }
        }
    }
}

#[test]
fn a_closed_window_holds_no_buffers_any_more() {
    on_threads(2, |communicator| {
        for memory in KINDS {
            let mut window = communicator.window::<i32>(100, memory).unwrap();
            let raw_buffer = window.range_mut(0..100).raw();
            window.close(&communicator).unwrap();
            // SAFETY: the call is refused before anything is touched.
            let call = unsafe { Call::from_raw(Kind::AllReduce { op: ReduceOp::Sum }, &[raw_buffer], &[]) };
            let error = communicator.submit(call).unwrap_err();
            assert!(matches!(error, Error::Argument { what: "window", .. }), "{error}");
        }
        communicator.destroy().unwrap();
    });
}

#[test]
fn messages_leave_and_reach_windows() {
    on_threads(2, |communicator| {
        let rank = communicator.rank();
        let mut window = communicator.window::<u32>(1000, Memory::Pinned).unwrap();
        if rank == 0 {
            window.lend().unwrap().fill(7);
            communicator.send(window.range(10..510), 1, 3).unwrap();
        } else {
            communicator.recv(window.range_mut(500..1000), 0, 3).unwrap();
            assert!(window.lend().unwrap().iter().skip(500).all(|value| *value == 7));
        }
        communicator.destroy().unwrap();
    });
}

#[test]
fn a_window_is_of_no_use_to_another_communicator() {
    let foreign: Vec<Window<u32>> = on_threads(2, |communicator| {
        let window = communicator.window(100, Memory::Host).unwrap();
        communicator.destroy().unwrap();
        window
    });
    let foreign: Vec<_> = foreign.into_iter().map(|one| std::sync::Mutex::new(Some(one))).collect();
    on_threads(2, move |communicator| {
        let mut own = communicator.window::<u32>(100, Memory::Host).unwrap();
        let mut foreign = foreign[communicator.rank()].lock().unwrap().take().unwrap();
        assert_eq!(foreign.id(), own.id(), "windows are numbered by each communicator");
        let error = communicator.all_reduce(&mut foreign, ReduceOp::Sum).unwrap_err();
        assert!(matches!(error, Error::Argument { call: "all_reduce", what: "window", .. }), "{error}");
        assert_eq!(
            foreign.close(&communicator).unwrap_err().to_string(),
            format!(
                "close window on rank {}: window should be a window of this communicator, got window 1 of another one. Nothing was written.",
                communicator.rank()
            )
        );
        own.lend().unwrap().fill(2);
        communicator.all_reduce(&mut own, ReduceOp::Prod).unwrap();
        assert_eq!(own.lend().unwrap()[99], 4);
        own.close(&communicator).unwrap();
        communicator.destroy().unwrap();
    });
}

#[test]
fn one_rank_in_a_window_and_one_in_plain_memory_are_a_mismatch() {
    let errors = on_threads(2, |communicator| {
        let mut window = communicator.window::<u8>(100, Memory::Host).unwrap();
        if communicator.rank() == 0 {
            communicator.all_reduce(&mut window, ReduceOp::Max).unwrap_err()
        } else {
            communicator.all_reduce(&mut [0u8; 100], ReduceOp::Max).unwrap_err()
        }
    });
    for error in errors {
        let Error::Mismatch { left, right } = &error else { panic!("{error}") };
        let both = format!("{left} {right}");
        assert!(both.contains("on rank 0 (u8, 100, max, window 1)"), "{both}");
        assert!(both.contains("on rank 1 (u8, 100, max)"), "{both}");
    }
}

#[test]
fn many_windows_come_and_go_between_ranks_that_meet_as_processes_do() {
    on_built(
        3,
        |builder| builder,
        |communicator| {
            let mut kept = Vec::new();
            for turn in 0..30usize {
                let mut window = communicator.window::<u64>(turn * 100, KINDS[turn / 3 % 2]).unwrap();
                window.lend().unwrap().fill(turn as u64);
                communicator.all_reduce(&mut window, ReduceOp::Sum).unwrap();
                assert!(window.lend().unwrap().iter().all(|value| *value == 3 * turn as u64));
                match turn % 3 {
                    0 => window.close(&communicator).unwrap(),
                    1 => kept.push(window),
                    _ => {}
                }
            }
            communicator.destroy().unwrap();
            // The memory of a window lives as long as the window.
            for window in &mut kept {
                let count = window.len();
                let content = window.lend();
                assert!(content.is_ok_and(|content| content.len() == count));
            }
        },
    );
}
