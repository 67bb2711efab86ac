//! Loom models of the protocols: every interleaving (with a bound on preemptions set from outside) is explored.
//! Run with `RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=2 cargo test -p unisono-sync --test loom --release`.
#![cfg(loom)]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, AtomicU64};
use loom::thread;
use unisono_sync::{Atomics, Attendance, Barrier, EpochFlag, Journal, Loom, SignalPad, SlotRing, Word};

fn until(ready: impl Fn() -> bool) {
    while !ready() {
        Loom::pause();
    }
}

/// Plain memory beside the words: loom reports any access that the protocol does not order.
struct Chunk(loom::cell::UnsafeCell<u64>);

// SAFETY: loom's cell detects every unordered access; that is what these models are for.
unsafe impl Sync for Chunk {}
// SAFETY: as above.
unsafe impl Send for Chunk {}

impl Chunk {
    fn new() -> Self {
        Self(loom::cell::UnsafeCell::new(0))
    }

    fn write(&self, value: u64) {
        // SAFETY: loom checks that no other access overlaps this one.
        self.0.with_mut(|at| unsafe { *at = value });
    }

    fn read(&self) -> u64 {
        // SAFETY: loom checks that no write overlaps this read.
        self.0.with(|at| unsafe { *at })
    }
}

#[test]
fn an_epoch_flag_announces_what_was_written_before() {
    loom::model(|| {
        let shared = Arc::new((AtomicU64::new(0), Chunk::new()));
        let writer = shared.clone();
        let thread = thread::spawn(move || {
            writer.1.write(42);
            EpochFlag::<Loom>::new(&writer.0).publish(1);
        });
        until(|| EpochFlag::<Loom>::new(&shared.0).has_reached(1));
        assert_eq!(shared.1.read(), 42);
        thread.join().unwrap();
    });
}

#[test]
fn a_signal_announces_what_was_written_before() {
    loom::model(|| {
        let shared = Arc::new(([AtomicU64::new(0), AtomicU64::new(0)], Chunk::new()));
        let writer = shared.clone();
        let thread = thread::spawn(move || {
            writer.1.write(5);
            assert!(SignalPad::<Loom>::new(&writer.0, 1).signal(1, 1));
        });
        until(|| SignalPad::<Loom>::new(&shared.0, 1).has_reached(1, 1));
        assert_eq!(shared.1.read(), 5);
        thread.join().unwrap();
    });
}

#[test]
fn nobody_leaves_a_barrier_before_all_have_entered_it() {
    loom::model(|| {
        let shared = Arc::new(([AtomicU64::new(0), AtomicU64::new(0)], [Chunk::new(), Chunk::new()]));
        let run = |shared: Arc<([AtomicU64; 2], [Chunk; 2])>, rank: usize| {
            let flags = shared.0.iter().map(EpochFlag::<Loom>::new).collect();
            let mut barrier = Barrier::new(flags, rank);
            for value in 1..=2 {
                shared.1[rank].write(value);
                let round = barrier.arrive();
                until(|| barrier.missing(round).is_none());
                assert_eq!(shared.1[1 - rank].read(), value);
                let round = barrier.arrive();
                until(|| barrier.missing(round).is_none());
            }
        };
        let other = shared.clone();
        let thread = thread::spawn(move || run(other, 1));
        run(shared, 0);
        thread.join().unwrap();
    });
}

/// The all-reduce pattern: two slots each, a slot is reused because hearing epoch e from a peer proves that it is
/// done with e − 1. No credits, three rounds, so every slot is used again.
#[test]
fn slots_are_reused_safely_when_everyone_hears_from_everyone() {
    loom::model(|| {
        let new_ring = || [AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0)];
        let shared = Arc::new([new_ring(), new_ring()]);
        let run = |shared: Arc<[[AtomicU64; 4]; 2]>, rank: usize| {
            let mine = SlotRing::<Loom>::new(&shared[rank], 2);
            let theirs = SlotRing::<Loom>::new(&shared[1 - rank], 2);
            for epoch in 1..=3u64 {
                mine.write(epoch, 0, epoch * 10 + rank as u64);
                mine.publish(epoch);
                until(|| theirs.is_published(epoch));
                assert_eq!(theirs.read(epoch, 0), epoch * 10 + (1 - rank as u64));
            }
        };
        let other = shared.clone();
        let thread = thread::spawn(move || run(other, 1));
        run(shared, 0);
        thread.join().unwrap();
    });
}

/// The broadcast pattern: the root runs ahead as far as credits allow; the payload lies in plain memory beside.
#[test]
fn credits_keep_a_producer_from_overwriting_what_is_being_read() {
    loom::model(|| {
        struct Shared {
            ring: [AtomicU64; 2],
            chunks: [Chunk; 2],
            consumed: AtomicU64,
        }
        let shared = Arc::new(Shared {
            ring: [AtomicU64::new(0), AtomicU64::new(0)],
            chunks: [Chunk::new(), Chunk::new()],
            consumed: AtomicU64::new(0),
        });
        let consumer = shared.clone();
        let thread = thread::spawn(move || {
            for epoch in 1..=3u64 {
                let ring = SlotRing::<Loom>::new(&consumer.ring, 1);
                until(|| ring.is_published(epoch));
                assert_eq!(consumer.chunks[epoch as usize % 2].read(), epoch);
                EpochFlag::<Loom>::new(&consumer.consumed).publish(epoch);
            }
        });
        for epoch in 1..=3u64 {
            until(|| EpochFlag::<Loom>::new(&shared.consumed).has_reached(epoch.saturating_sub(2)));
            shared.chunks[epoch as usize % 2].write(epoch);
            SlotRing::<Loom>::new(&shared.ring, 1).publish(epoch);
        }
        thread.join().unwrap();
    });
}

/// The first cause wins: of two who raise the abort word, exactly one is named, and its cause is readable.
#[test]
fn the_abort_word_names_one_cause_that_is_complete() {
    loom::model(|| {
        let shared = Arc::new((AtomicU32::new(0), [Chunk::new(), Chunk::new()]));
        let raise = |shared: &(AtomicU32, [Chunk; 2]), rank: u32| {
            shared.1[rank as usize].write(u64::from(rank) + 100);
            Word::compare_exchange(&shared.0, 0, rank + 1).is_ok()
        };
        let other = shared.clone();
        let thread = thread::spawn(move || raise(&other, 1));
        let mine = raise(&shared, 0);
        let word = shared.0.load_acquire();
        assert!(word == 1 || word == 2);
        assert_eq!(shared.1[word as usize - 1].read(), u64::from(word) + 99);
        let theirs = thread.join().unwrap();
        assert!(mine ^ theirs);
    });
}

#[test]
fn a_record_of_a_journal_is_whole_or_not_there() {
    loom::model(|| {
        let words: Vec<AtomicU64> = (0..3).map(|_| AtomicU64::new(0)).collect();
        let shared = Arc::new(words);
        let writer = shared.clone();
        let thread = thread::spawn(move || {
            let journal = Journal::<3, Loom>::new(&writer);
            journal.write(1, &[0, 10, 100]);
            journal.write(2, &[0, 20, 200]);
        });
        let journal = Journal::<3, Loom>::new(&shared);
        for number in [1, 2] {
            if let Some(record) = journal.read(number) {
                assert_eq!(record, [number, number * 10, number * 100]);
            }
        }
        thread.join().unwrap();
        assert_eq!(journal.read(2), Some([2, 20, 200]));
    });
}

#[test]
fn an_attendance_and_its_end_are_seen_alike_by_all() {
    loom::model(|| {
        let shared = Arc::new((AtomicU64::new(0), Chunk::new()));
        let owner = shared.clone();
        let thread = thread::spawn(move || {
            owner.1.write(42);
            Attendance::<Loom>::new(&owner.0).attend(1)
        });
        let attendance = Attendance::<Loom>::new(&shared.0);
        let closed = attendance.close();
        if closed.rounds == 1 {
            assert_eq!(shared.1.read(), 42);
        }
        assert!(closed.is_closed);
        // Whether it took part is settled: it knows the same.
        assert_eq!(thread.join().unwrap(), closed.rounds == 1);
        assert_eq!(attendance.standing(), closed);
    });
}

#[test]
fn a_member_that_reads_what_was_overwritten_finds_itself_given_up() {
    loom::model(|| {
        let shared = Arc::new((AtomicU64::new(1), AtomicU64::new(7)));
        let survivor = shared.clone();
        let thread = thread::spawn(move || {
            Attendance::<Loom>::new(&survivor.0).close();
            unisono_sync::attendance::before_overwriting();
            survivor.1.store_relaxed(8);
        });
        let read = shared.1.load_relaxed();
        let was_open = Attendance::<Loom>::new(&shared.0).was_open();
        assert!(read == 7 || !was_open);
        thread.join().unwrap();
    });
}
