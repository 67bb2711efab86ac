//! The memory of a communicator, as `unisono top`, `why` and `dump` read it from outside: whoever holds it may have
//! written anything.

use std::cell::RefCell;
use std::collections::HashMap;
use std::num::NonZeroU64;

use unisono_core::Error;
use unisono_core::call::{CallHeader, Kind};
use unisono_core::device::layout::{
    RECORD_WORDS, RECORDER_KEPT, RECORDS as GPU_RECORDS, REPORT_RECORDER, REPORT_WAITING, STATE_BYTES,
};
use unisono_core::layout::{ControlLayout, Field, RECORDS};
use unisono_core::recorder::{
    Clock, Clocks, JobLabel, Presence, RankLabel, Record, Snapshot, TickSource, why,
};
use unisono_core::select::Algorithm;

const CLOCK: Clock = Clock { now: 10_000, rate: NonZeroU64::new(1000).unwrap() };

/// The words of all fields, in the order in which they are read first; each field takes what one part holds.
pub(super) fn snapshot(parts: &[&[u8]]) {
    let taken = RefCell::new(HashMap::new());
    let fetch = |field: Field| {
        let mut taken = taken.borrow_mut();
        let next = taken.len();
        let part = parts.get(*taken.entry(field.offset).or_insert(next)).copied().unwrap_or_default();
        let mut words = vec![0; field.bytes / 8];
        for (word, bytes) in words.iter_mut().zip(part.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        Ok::<_, Error>(words)
    };
    let clocks = Clocks { counter: CLOCK, monotonic: CLOCK };
    let explain = |_: &[_], rank: usize, words: &[u64]| format!("{rank} {}", words.len());
    match Snapshot::read(ControlLayout::new(2).total_bytes(), &clocks, fetch, explain) {
        Ok(snapshot) => {
            assert!((1..=2).contains(&snapshot.ranks.len()));
            for rank in &snapshot.ranks {
                assert!(rank.records.len() <= RECORDS);
                let _ = rank.standing();
                drop(snapshot.waits_for(rank.rank));
                rank.records
                    .iter()
                    .for_each(|record| drop((record.call(), record.arguments(), record.bytes())));
                let calls = rank.gpu.as_ref().map_or(&[][..], |gpu| &gpu.calls);
                assert!(calls.len() <= GPU_RECORDS);
                calls.iter().for_each(|call| drop((call.to_string(), call.took(), call.bytes())));
            }
            drop((snapshot.is_live(), why(&snapshot)));
        }
        Err(error) => drop(error.to_string()),
    }
}

pub(super) fn snapshot_seeds() -> Vec<Vec<Vec<u8>>> {
    let bytes = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let label = JobLabel { ranks: 2, generation: 1, created: 7, job: "job".to_owned(), host: "a".to_owned() };
    let rank = |pid| RankLabel {
        presence: Presence::Here,
        pid,
        started: 9,
        ticks: TickSource::Counter,
        is_recording: true,
    };
    let header = CallHeader { count: 1024, ..CallHeader::bare(Kind::AllGather) }.to_words();
    let mut record = Record::begin_collective(&header, Algorithm::OneShot, 5, 100);
    record[0] = RECORDS as u64;
    // A GPU that waits in call 1 for rank 0.
    let mut page = [0; REPORT_RECORDER + 8];
    (page[REPORT_WAITING], page[REPORT_RECORDER]) = (1 << 32 | 1, RECORDER_KEPT);
    let mut copy = [0; STATE_BYTES / 8 + 4 * RECORD_WORDS];
    (copy[0], copy[2]) = (1, 8 << 32);
    copy[STATE_BYTES / 8 + RECORD_WORDS..][..6].copy_from_slice(&[
        1 << 32,
        7,
        header[0],
        header[1],
        1 << 32,
        0,
    ]);
    let (page, copy) = (bytes(&page), bytes(&copy));
    let (label, record) = (bytes(&label.to_words()), bytes(&record));
    let (first, second) = (bytes(&rank(7).to_words()), bytes(&rank(8).to_words()));
    // The fields of each rank: identity, records, page of its GPU and, if that has a recorder, the copy of it. Then the abort
    // word, and the cause.
    vec![
        vec![label.clone(), first.clone(), record.clone(), Vec::new(), second.clone()],
        vec![
            label.clone(),
            first.clone(),
            Vec::new(),
            Vec::new(),
            second.clone(),
            record.clone(),
            Vec::new(),
            bytes(&[2]),
            vec![1; 40],
        ],
        vec![label, first, record, page.clone(), copy.clone(), second, Vec::new(), page, copy],
    ]
}
