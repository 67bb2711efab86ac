//! The memory of a communicator, as `unisono top`, `why` and `dump` read it from outside: whoever holds it may have
//! written anything.

use std::cell::RefCell;
use std::collections::HashMap;
use std::num::NonZeroU64;

use unisono_core::Error;
use unisono_core::call::{CallHeader, Kind};
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
    let (label, record) = (bytes(&label.to_words()), bytes(&record));
    let (first, second) = (bytes(&rank(7).to_words()), bytes(&rank(8).to_words()));
    vec![
        vec![label.clone(), first.clone(), record.clone(), second.clone(), Vec::new()],
        vec![label, first, Vec::new(), second, record, bytes(&[2]), vec![1; 40]],
    ]
}
