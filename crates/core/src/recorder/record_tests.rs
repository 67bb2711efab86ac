//! Tests of records: every call round-trips, and no words do harm.

use proptest::prelude::*;

use super::*;
use crate::fused::NormOutput;
use crate::reduce_op::ReduceOp;

pub(crate) const CLOCK: Clock = Clock { now: 1_000_000, rate: NonZeroU64::new(1000).unwrap() };

fn round_trip(words: [u64; RECORD_WORDS]) -> Record {
    let mut words = words;
    words[0] = 5;
    Record::from_words(&words, &CLOCK).unwrap()
}

#[test]
fn every_collective_round_trips() {
    let op = ReduceOp::Max;
    let kinds = [
        Kind::Barrier,
        Kind::AllReduce { op },
        Kind::Broadcast { root: 3 },
        Kind::AllGather,
        Kind::Reduce { op, root: 70_000 },
        Kind::ReduceScatter { op },
        Kind::Gather { root: 1 },
        Kind::Scatter { root: 1 },
        Kind::AllToAll,
        Kind::AllGatherV,
        Kind::ReduceScatterV { op },
        Kind::GatherV { root: 2 },
        Kind::ScatterV { root: 2 },
        Kind::AllToAllV,
        Kind::AllToAllCounted,
        Kind::AllReduceQuantised,
        Kind::AllReduceMulti { op },
        Kind::BroadcastMulti { root: 1, buffer: 2 },
        Kind::AllReduceRmsNorm { hidden: 8192, epsilon: 1e-5, output: NormOutput::Fp8, is_in_place: true },
        Kind::Destroy,
        Kind::Window,
        Kind::CloseWindow,
        Kind::Symmetric,
        Kind::Register,
    ];
    for kind in kinds {
        for (source_window, target_window) in [(0, 0), (7, 7), (1, 2), (0, 9)] {
            let has_parts = kind.is_uneven() || matches!(kind, Kind::AllReduceMulti { .. });
            let is_fused = matches!(kind, Kind::AllReduceRmsNorm { .. });
            let has_windows = !kind.is_uneven() && !kind.is_multi() && !is_fused;
            let window = |id| if has_windows { id } else { 0 };
            let header = CallHeader {
                kind,
                dtype: Some(DType::BF16),
                count: 1 << 40,
                parts: if has_parts { 0xdead_beef_0000_0001 } else { 0 },
                source_window: window(source_window),
                target_window: window(target_window),
            };
            let record =
                round_trip(Record::begin_collective(&header.to_words(), Algorithm::TwoShot, 813, 400_000));
            assert_eq!((record.header, record.number), (header, Some(812)));
            assert_eq!(record.algorithm, Some(Algorithm::TwoShot));
            assert_eq!((record.begun, record.end), (Duration::from_secs(600), End::Open));
        }
    }
}

#[test]
fn every_message_round_trips() {
    for kind in [
        Kind::Send { to: 3, tag: u32::MAX },
        Kind::Recv { from: u32::MAX, tag: 0 },
        Kind::SendRecv { to: 65_535, from: 2, tag: 9 },
    ] {
        let record = round_trip(Record::begin_message(kind, DType::Complex128, 4, 0));
        assert_eq!((record.header.kind, record.number, record.algorithm), (kind, None, None));
        assert_eq!((record.header.dtype, record.bytes()), (Some(DType::Complex128), 64));
    }
}

#[test]
fn ends_and_waits_are_told_apart() {
    let header = CallHeader::bare(Kind::Barrier).to_words();
    let with = |ended, waits| {
        let mut words = Record::begin_collective(&header, Algorithm::OneShot, 2, 900_000);
        words[ENDED] = ended;
        words[WAITS] = waits;
        round_trip(words)
    };
    assert_eq!(with(Record::AT_ONCE, 0).end, End::AtOnce);
    assert_eq!(with(Record::AT_ONCE, 0).ended(), Some(Duration::from_secs(100)));
    let done = with(Record::ended_word(950_001, false), 0);
    assert_eq!((done.end, done.took()), (End::Done(Duration::from_millis(49_998)), done.took()));
    assert!(matches!(with(Record::ended_word(0, true), 0).end, End::Failed(_)));
    assert!(matches!(with(Record::ended_word(u64::MAX, false), 0).end, End::Done(Duration::ZERO)));
    let waits = Waits { peer: 65_000, on: WaitsOn::Credit };
    assert_eq!(with(0, waits.to_word()).waits, Some(waits));
    assert_eq!(with(Record::AT_ONCE, waits.to_word()).waits, None, "what is over waits for nothing");
}

#[test]
fn calls_are_named_in_the_words_of_their_caller() {
    let header = CallHeader {
        dtype: Some(DType::F32),
        count: 4096,
        ..CallHeader::bare(Kind::AllReduce { op: ReduceOp::Sum })
    };
    let collective = |epoch| {
        let words = Record::begin_collective(&header.to_words(), Algorithm::OneShot, epoch, 0);
        round_trip(words).to_string()
    };
    assert_eq!(collective(813), "all_reduce #812 (f32, 4096, sum)");
    assert_eq!(collective(1), "the start of the job (f32, 4096, sum)");
    let message = |kind| round_trip(Record::begin_message(kind, DType::F32, 4, 0)).to_string();
    assert_eq!(message(Kind::Recv { from: 1, tag: 5 }), "recv from rank 1 (f32, 4, tag 5)");
    assert_eq!(message(Kind::Recv { from: u32::MAX, tag: 5 }), "recv from any rank (f32, 4, tag 5)");
    assert_eq!(
        message(Kind::SendRecv { to: 1, from: 2, tag: 5 }),
        "send_recv to rank 1 and from rank 2 (f32, 4, tag 5)"
    );
}

#[test]
fn the_ring_gives_its_latest_records_in_order_and_no_torn_one() {
    let header = CallHeader::bare(Kind::Barrier).to_words();
    let mut ring = vec![0; RECORDS * RECORD_WORDS];
    let write = |ring: &mut Vec<u64>, serial: u64| {
        let mut words = Record::begin_collective(&header, Algorithm::OneShot, serial, serial);
        words[0] = serial;
        let at = serial as usize % RECORDS * RECORD_WORDS;
        ring[at..at + RECORD_WORDS].copy_from_slice(&words);
    };
    (1..=1500).for_each(|serial| write(&mut ring, serial));
    let before = ring.clone();
    write(&mut ring, 1501);
    let at = 1490 % RECORDS * RECORD_WORDS;
    ring[at + ENDED] = Record::AT_ONCE;
    let records = Record::of_ring(&before, &ring, &CLOCK);
    let serials: Vec<u64> = records.iter().map(|record| record.serial).collect();
    // 1501 was being written, over 477.
    assert_eq!(serials, (478..=1500).collect::<Vec<_>>());
    assert!(!records.iter().find(|record| record.serial == 1490).unwrap().is_open());
    ring[3] = 9999;
    ring[at] = u64::MAX;
    assert!(Record::of_ring(&ring, &ring, &CLOCK).len() < RECORDS, "a number that belongs elsewhere");
    assert_eq!(Record::of_ring(&ring[..5], &ring, &CLOCK), []);
}

proptest! {
    #[test]
    fn no_words_do_harm(words: [u64; RECORD_WORDS], now: u64, rate: u64, codes: [u8; 4]) {
        let clock = Clock { now, rate: NonZeroU64::new(rate).unwrap_or(NonZeroU64::MIN) };
        let mut likely = words;
        likely[1] = likely[1] & !0xffff_ffff | u64::from(u32::from_le_bytes(codes.map(|code| code % 24)));
        for words in [words, likely] {
            if let Some(record) = Record::from_words(&words, &clock) {
                prop_assert!(!record.to_string().is_empty() && !record.way(4).is_empty());
                let _: u64 = record.bytes();
                prop_assert!(record.took().unwrap_or_default() <= record.begun);
            }
        }
    }
}
