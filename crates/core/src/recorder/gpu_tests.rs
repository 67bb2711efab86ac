//! Tests of what is made of a device's words and ring: in order, over wraps, and whatever they hold.

use std::num::NonZeroU64;

use proptest::prelude::*;

use super::*;
use crate::call::Kind;
use crate::dtype::DType;
use crate::reduce_op::ReduceOp;

/// A tick is a nanosecond; it is 10 s.
const CLOCK: Clock = Clock { now: 10_000_000_000, rate: NonZeroU64::new(1_000_000_000).unwrap() };
/// At 1 s of the host it was 500 ns on the device.
const MOMENT: Moment = Moment { device_ns: 500, ticks: 1_000_000_000 };
const WORDS: usize = STATE_BYTES / 8 + RECORDS * RECORD_WORDS;

/// What a device holds that has done nothing since its communicator began, behind `epoch`.
fn device(epoch: u32) -> Vec<u64> {
    let mut words = vec![0; WORDS];
    words[0] = u64::from(epoch);
    words
}

/// The words of an all-reduce of `count` floats that begins at `begun`, as the kernel stores them.
fn record(epoch: u32, count: u64, begun: u64) -> [u64; RECORD_WORDS] {
    let kind = Kind::AllReduce { op: ReduceOp::Sum };
    let header = CallHeader { dtype: Some(DType::F32), count, target_window: 3, ..CallHeader::bare(kind) };
    let header = header.to_words();
    let (tag, launch) = (u64::from(epoch) << 32, 2 | 7 << 8 | 512 << 20);
    [tag | launch, begun, header[0], header[1], tag, header[2] << 32 | header[3], 0, 0]
}

fn put(words: &mut [u64], record: [u64; RECORD_WORDS]) {
    let at = STATE_BYTES / 8 + (record[0] >> 32) as usize % RECORDS * RECORD_WORDS;
    // The last two words are stored apart.
    words[at..][..6].copy_from_slice(&record[..6]);
    for late in 6..8 {
        words[at + late] = words[at + late].max(record[late]);
    }
}

/// Enters call `epoch`: all its blocks have read the epoch, and 8 of them are to leave.
fn enter(words: &mut [u64], epoch: u32) {
    words[0] = u64::from(epoch);
    words[STATE_EXPECTED_AT / 8] += 8 << (STATE_EXPECTED_AT % 8 * 8);
}

fn leave(words: &mut [u64]) {
    words[STATE_LEFT_AT / 8] += 8;
}

fn seconds(seconds: u64) -> u64 {
    500 + (seconds - 1) * 1_000_000_000
}

fn read(words: &[u64]) -> Vec<GpuCall> {
    GpuCall::of_copy(words, MOMENT, &CLOCK)
}

#[test]
fn calls_are_told_in_order_with_times_and_the_last_one_as_long_as_it_goes_on() {
    let mut words = device(0);
    assert!(read(&words).is_empty());
    enter(&mut words, 1);
    put(&mut words, [&record(1, 7, seconds(2))[..6], &[seconds(3), 0]].concat().try_into().unwrap());
    leave(&mut words);
    let done = read(&words)[0];
    assert_eq!(done.to_string(), "all_reduce #1 (f32, 7, sum, into window 3)");
    assert_eq!((done.way(), done.blocks, done.bytes()), ("bulk", 7, 28));
    assert_eq!((done.begun, done.met), (Duration::from_secs(8), Some(Duration::from_secs(7))));
    assert_eq!((done.ended, done.took()), (Some(Duration::from_secs(7)), Some(Duration::from_secs(1))));
    enter(&mut words, 2);
    put(&mut words, record(2, 8, seconds(4)));
    let calls = read(&words);
    assert_eq!((calls.len(), calls[0]), (2, done));
    assert!(calls[1].is_open() && calls[1].met.is_none() && calls[1].begun == Duration::from_secs(6));
    // All ranks were heard, and the data still moves; then a block is through.
    put(&mut words, [&record(2, 8, seconds(4))[..6], &[seconds(5), seconds(6)]].concat().try_into().unwrap());
    assert!(read(&words)[1].is_open() && read(&words)[1].met == Some(Duration::from_secs(5)));
    leave(&mut words);
    assert_eq!(read(&words)[1].ended, Some(Duration::from_secs(4)));
    // A call that the counts do not know yet goes on; the one before it is done.
    put(&mut words, record(3, 8, seconds(7)));
    let open: Vec<bool> = read(&words).iter().map(GpuCall::is_open).collect();
    assert_eq!(open, [false, false, true]);
}

#[test]
fn the_ring_keeps_its_last_calls_over_the_wrap_of_epochs_and_times_of_older_ones_are_no_times() {
    for first in [0, 0x7fff_fe00, 0xffff_fe00_u32] {
        let mut words = device(first);
        for at in 1..=1500_u32 {
            let begun = seconds(1) + 1000 * u64::from(at);
            enter(&mut words, first.wrapping_add(at));
            let stamps = [begun + 10, begun + 20];
            let call = record(first.wrapping_add(at), u64::from(at), begun);
            put(&mut words, [&call[..6], &stamps].concat().try_into().unwrap());
            leave(&mut words);
        }
        enter(&mut words, first.wrapping_add(1501));
        put(&mut words, record(first.wrapping_add(1501), 1501, seconds(9)));
        let calls = read(&words);
        assert_eq!(calls.len(), RECORDS);
        let counts: Vec<u64> = calls.iter().map(|call| call.header.count).collect();
        assert_eq!(counts, (478..=1501).collect::<Vec<u64>>());
        assert!(calls[..1023].iter().all(|call| call.took() == Some(Duration::from_nanos(20))));
        let last = calls[1023];
        assert!(last.is_open() && last.met.is_none() && last.begun == Duration::from_secs(1));
        assert_eq!((calls[0].behind(&last), last.behind(&calls[0])), (1023, -1023));
    }
}

#[test]
fn without_a_moment_on_both_clocks_times_count_from_the_last_thing_recorded() {
    let mut words = device(0);
    for epoch in 1..3 {
        enter(&mut words, epoch);
        put(&mut words, record(epoch, 5, seconds(u64::from(epoch) * 2)));
    }
    let calls = GpuCall::of_copy(&words, Moment { device_ns: 77, ticks: 0 }, &CLOCK);
    let begun: Vec<Duration> = calls.iter().map(|call| call.begun).collect();
    assert_eq!(begun, [Duration::from_secs(2), Duration::ZERO]);
}

#[test]
fn halves_of_different_calls_are_no_call() {
    let mut words = device(0);
    for epoch in [1, 1025] {
        enter(&mut words, epoch);
        let mut torn = record(epoch, 5, seconds(2));
        if epoch == 1025 {
            torn[4..].copy_from_slice(&record(1, 5, seconds(2))[4..]);
        }
        put(&mut words, torn);
        assert_eq!(read(&words).len(), usize::from(epoch == 1));
    }
    // Nor one of another place, nor one that is far from what the device has reached.
    let mut words = device(5);
    let at = STATE_BYTES / 8;
    words[at..][..RECORD_WORDS].copy_from_slice(&record(3, 5, seconds(2)));
    put(&mut words, record(5 + 3 * RECORDS as u32, 5, seconds(2)));
    assert!(read(&words).is_empty());
    assert!(read(&words[..100]).is_empty() && read(&[]).is_empty());
    // A copy that ends early has what it has.
    put(&mut words, record(2, 5, seconds(2)));
    assert_eq!(read(&words[..at + 3 * RECORD_WORDS]).len(), 1);
}

proptest! {
    #[test]
    fn no_content_does_harm(
        noise: Vec<(u16, u64)>, calls: Vec<(u32, u64)>, epoch: u32, moment: (u64, u64), clock: (u64, u64),
    ) {
        let mut words = device(epoch);
        for (ahead, begun) in calls {
            put(&mut words, record(epoch.wrapping_sub(ahead % 3000).wrapping_add(1000), 1, begun));
        }
        for (at, value) in noise {
            words[usize::from(at) % WORDS] = value;
        }
        let clock = Clock { now: clock.0, rate: NonZeroU64::new(clock.1).unwrap_or(NonZeroU64::MIN) };
        let calls = GpuCall::of_copy(&words, Moment { device_ns: moment.0, ticks: moment.1 }, &clock);
        prop_assert!(calls.len() <= RECORDS);
        for pair in calls.windows(2) {
            prop_assert!(pair[0].behind(&pair[1]) > 0, "{:?}", pair);
            prop_assert!(!pair[0].is_open());
        }
        for call in &calls {
            let _ = (call.to_string(), call.took(), call.bytes(), call.way());
        }
    }
}
