//! Tests of asking and answering without a GPU: a thread writes into the shared memory what copy engines would.

use std::sync::Arc;

use unisono_core::call::{CallHeader, Kind};
use unisono_core::device::layout::{
    RECORDER_KEPT, RECORDER_SERVES, REPORT_ANSWER, REPORT_CLOCKS, REPORT_RECORDER, REPORT_REQUEST,
    REPORT_WAITING, STATE_BYTES, STATE_EXPECTED_AT,
};
use unisono_core::layout::ControlLayout;
use unisono_sync::{Flag, Ticks, Word};

use super::*;
use crate::communicator::Communicator;
use crate::control::{Control, words_in};
use crate::gpu::seats::{Seat, Seats};

/// Answers for rank 0 until it `is_over`: its GPU has been in barrier #1 since it was first asked.
fn answer(control: &Control, is_over: &Flag) {
    let fields = ControlLayout::new(2).rank(0);
    let (page, copy) = (control.words_of(fields.gpu), control.words_of(fields.gpu_records));
    let header = CallHeader::bare(Kind::Barrier).to_words();
    let start = std::time::Instant::now();
    while !is_over.is_raised() && start.elapsed() < Duration::from_secs(30) {
        let request = page[REPORT_REQUEST].load_acquire();
        if request != page[REPORT_ANSWER].load_relaxed() {
            // It has entered call 1, and one block of that is to leave.
            copy[0].store_relaxed(1);
            copy[STATE_EXPECTED_AT / 8].store_relaxed(1 << (STATE_EXPECTED_AT % 8 * 8));
            let record = [1 << 32, 1000, header[0], header[1], 1 << 32, 0, 0, 0];
            let at = STATE_BYTES / 8 + record.len();
            copy[at..].iter().zip(record).for_each(|(word, value)| word.store_relaxed(value));
            page[REPORT_ANSWER].store_release(request);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn what_a_device_of_several_does_is_read_from_memory_of_its_own() {
    let ranks = Communicator::threads(2).unwrap();
    let seats = Arc::new(Seats::new([&[0, 6][..], &[7]]));
    let made: Vec<Seat> = [0, 1]
        .map(|seat| Seat::of_device(ranks[0].control.clone(), seats.clone(), seat).unwrap())
        .into_iter()
        .chain([Seat::of_device(ranks[1].control.clone(), seats.clone(), 2).unwrap()])
        .collect();
    // The second one is in its first call, and waits for the third, which has made none.
    let header =
        CallHeader { parts: 2, ..CallHeader::bare(Kind::AllReduceMulti { op: crate::ReduceOp::Sum }) };
    let header = CallHeader { dtype: Some(crate::DType::F32), count: 5, ..header }.to_words();
    for seat in &made {
        let page = seat.page();
        page[REPORT_CLOCKS[0]].store_relaxed(1000);
        page[REPORT_CLOCKS[1]].store_relaxed(Ticks::here().now());
        page[REPORT_RECORDER].store_release(RECORDER_KEPT);
    }
    let copy = words_in(&made[1].memory, made[1].records.unwrap());
    copy[0].store_relaxed(1);
    copy[STATE_EXPECTED_AT / 8].store_relaxed(1 << (STATE_EXPECTED_AT % 8 * 8));
    let record = [1 << 32, 1000, header[0], header[1], 1 << 32, header[4], 0, 0];
    copy[STATE_BYTES / 8 + record.len()..]
        .iter()
        .zip(record)
        .for_each(|(word, value)| word.store_relaxed(value));
    made[1].page()[REPORT_WAITING].store_relaxed(1 << 32 | 3);
    std::thread::sleep(Duration::from_millis(600));
    let found = find(Some(&[std::process::id()])).unwrap();
    let snapshots: Vec<Snapshot> =
        found.recordings.iter().map(|recording| recording.snapshot().unwrap()).collect();
    let is_ours = |snapshot: &&Snapshot| snapshot.ranks.iter().any(|rank| !rank.devices.is_empty());
    let ours: Vec<&Snapshot> = snapshots.iter().filter(is_ours).collect();
    assert_eq!(ours.len(), 1);
    let devices = |rank: usize| -> Vec<(usize, u32, usize)> {
        let views = ours[0].ranks[rank].devices.iter();
        views.map(|view| (view.seat, view.ordinal, view.gpu.as_ref().unwrap().calls.len())).collect()
    };
    assert_eq!((devices(0), devices(1)), (vec![(0, 0, 0), (1, 6, 1)], vec![(2, 7, 0)]));
    assert_eq!(ours[0].ranks[0].devices[1].waits, Some(GpuWait { work: GpuWork::Call(1), peer: 2 }));
    let text = why(ours[0]);
    assert!(
        text.contains(
            "Device cuda:6 of rank 0 has been in all_reduce_multi #1 (f32, 5, sum, 2 buffers) for "
        ),
        "{text}"
    );
    let others = "Devices cuda:0 of rank 0 and cuda:7 of rank 1 have not begun it, nor any call before.";
    assert!(text.contains(others), "{text}");
}

#[test]
fn readers_in_and_outside_of_the_process_are_answered_and_told_who_is_silent() {
    let ranks = Communicator::threads(2).unwrap();
    let control: Arc<Control> = ranks[0].control.clone();
    let observer = ranks[1].observer();
    let without = observer.gpu_calls(0).unwrap_err().to_string();
    assert!(without.ends_with("this communicator was made without one (Builder::device)"), "{without}");
    for rank in 0..2 {
        let page = control.words_of(ControlLayout::new(2).rank(rank).gpu);
        page[REPORT_CLOCKS[0]].store_relaxed(1000);
        page[REPORT_CLOCKS[1]].store_relaxed(Ticks::here().now());
        page[REPORT_RECORDER].store_release(RECORDER_SERVES);
    }
    let is_over = Flag::new();
    std::thread::sleep(Duration::from_millis(600));
    std::thread::scope(|scope| {
        scope.spawn(|| answer(&control, &is_over));
        let calls = observer.gpu_calls(0);
        let silent = observer.gpu_calls(1);
        let found = find(Some(&[std::process::id()])).unwrap();
        let snapshots: Vec<Snapshot> =
            found.recordings.iter().map(|recording| recording.snapshot().unwrap()).collect();
        is_over.raise();
        let calls = calls.unwrap();
        assert_eq!((calls.len(), calls[0].to_string(), calls[0].is_open()), (1, "barrier #1".into(), true));
        assert!(calls[0].begun >= Duration::from_millis(600), "{:?}", calls[0].begun);
        let silent = silent.unwrap_err().to_string();
        assert_eq!(silent, "rank 1 cannot work on its GPU: it did not tell its last calls within a second");
        // Other tests of this program have communicators as well.
        let ours =
            snapshots.iter().find(|snapshot| snapshot.ranks.iter().any(|rank| rank.gpu.is_some())).unwrap();
        let views: Vec<&GpuView> = ours.ranks.iter().filter_map(|rank| rank.gpu.as_ref()).collect();
        assert_eq!((views[0].reading, views[1].reading), (Reading::Now, Reading::Earlier));
        let text = why(ours);
        assert!(text.contains("The GPU of rank 0 has been in barrier #1 for "), "{text}");
        assert!(text.ends_with("The GPU of rank 1 was not read: its process did not answer."), "{text}");
    });
    // What is over is told without asking.
    let page = control.words_of(ControlLayout::new(2).rank(0).gpu);
    page[REPORT_RECORDER].store_release(RECORDER_KEPT);
    assert_eq!(observer.gpu_calls(0).unwrap().len(), 1);
}
