//! One-sided memory: random writes and signals, rings and ping-pong, threads that share one rank's handle, what is refused, and
//! how waits end.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use unisono::{Communicator, Element, Error, Memory, Operations, ReduceOp, Stream, Symmetric};

const LONG: Duration = Duration::from_secs(60);

/// Runs `body` on every rank of a world of threads; what each returned, by rank.
fn on_threads<T: Send + 'static>(
    world_size: usize,
    body: impl Fn(Communicator) -> T + Send + Sync + 'static,
) -> Vec<T> {
    let body = Arc::new(body);
    let threads: Vec<_> = Communicator::threads(world_size)
        .unwrap()
        .into_iter()
        .map(|rank| {
            let body = body.clone();
            thread::spawn(move || body(rank))
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

fn symmetric<T: Element>(rank: &Communicator, count: usize) -> Symmetric<T> {
    // Without GPUs, it makes no difference.
    let memory = if count.is_multiple_of(2) { Memory::Host } else { Memory::Pinned };
    rank.window::<T>(count, memory).unwrap().into_symmetric(rank).unwrap()
}

/// Numbers that follow from a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// Every rank owns a stretch of every copy, of a length that ends inside a word. Each round all write all their stretches, tell
/// the owners of the copies, wait for all, and look at everything.
#[test]
fn what_was_written_before_a_signal_is_seen_after_it() {
    const STRETCH: usize = 1003;
    for world_size in [1, 2, 3, 5] {
        on_threads(world_size, move |rank| {
            let (me, shared) = (rank.rank(), symmetric::<u8>(&rank, world_size * STRETCH));
            let content = |from: usize, to: usize, round: u32| {
                let mut random = Random(u64::from(round) << 20 | (from as u64) << 8 | to as u64);
                (0..STRETCH).map(|_| random.next() as u8).collect::<Vec<_>>()
            };
            for round in 1..=200 {
                for to in (0..world_size).map(|offset| (me + offset) % world_size) {
                    let data = content(me, to, round);
                    // In pieces, which meet anywhere.
                    let cut = round as usize * 37 % STRETCH;
                    shared.write(to, me * STRETCH, &data[..cut]).unwrap();
                    shared.write(to, me * STRETCH + cut, &data[cut..]).unwrap();
                    shared.signal(to, me, round).unwrap();
                }
                let mut got = vec![0; STRETCH];
                for from in 0..world_size {
                    shared.wait_signal(from, round, LONG).unwrap();
                    shared.read(me, from * STRETCH, &mut got).unwrap();
                    assert!(got == content(from, me, round), "round {round}, from {from} to {me}");
                }
                rank.barrier().unwrap();
            }
            shared.close(&rank).unwrap();
            rank.destroy().unwrap();
        });
    }
}

#[test]
fn a_token_goes_around_a_ring_of_signals() {
    on_threads(4, |rank| {
        let (me, shared) = (rank.rank(), symmetric::<u64>(&rank, 1));
        let next = (me + 1) % 4;
        for turn in 1..=500u32 {
            let mut token = [u64::from(turn) * 1000];
            if me > 0 || turn > 1 {
                shared.wait_signal(7, if me == 0 { turn - 1 } else { turn }, LONG).unwrap();
                shared.read(me, 0, &mut token).unwrap();
                let sum =
                    if me == 0 { u64::from(turn - 1) * 1000 + 4 } else { u64::from(turn) * 1000 + me as u64 };
                assert_eq!(token[0], sum);
            }
            let passed = if me == 0 { u64::from(turn) * 1000 } else { token[0] } + 1;
            shared.write(next, 0, &[passed]).unwrap();
            shared.signal(next, 7, turn).unwrap();
        }
        rank.barrier().unwrap();
        shared.close(&rank).unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn random_ranges_of_every_size_of_element() {
    fn with<T: Element + PartialEq + std::fmt::Debug>(world_size: usize, of: fn(u64) -> T) {
        on_threads(world_size, move |rank| {
            let (me, shared) = (rank.rank(), symmetric::<T>(&rank, 3000));
            let mut random = Random(me as u64 + 5);
            // Everybody keeps a copy of what it wrote to its own half of its neighbour's memory.
            let (to, half) = ((me + 1) % world_size, me % 2 * 1500);
            let mut model: Vec<T> = (0..1500).map(|_| of(0)).collect();
            shared.write(to, half, &model).unwrap();
            for _ in 0..500 {
                let at = random.below(1500);
                let count = random.below(1501 - at);
                let data: Vec<T> = (0..count).map(|_| of(random.next())).collect();
                shared.write(to, half + at, &data).unwrap();
                model[at..at + count].copy_from_slice(&data);
                let at = random.below(1500);
                let mut got: Vec<T> = (0..random.below(1501 - at)).map(|_| of(0)).collect();
                shared.read(to, half + at, &mut got).unwrap();
                assert!(got == model[at..at + got.len()]);
            }
            rank.barrier().unwrap();
            shared.close(&rank).unwrap();
            rank.destroy().unwrap();
        });
    }
    with::<u8>(2, |bits| bits as u8);
    with::<i16>(2, |bits| bits as i16);
    with::<f32>(3, |bits| (bits >> 40) as f32);
    with::<u64>(1, |bits| bits);
}

#[test]
fn a_window_keeps_its_content_and_is_no_buffer_any_more() {
    on_threads(2, |rank| {
        let mut window = rank.window::<u32>(5, Memory::Host).unwrap();
        let raw = window.range_mut(0..5).raw();
        window.lend().unwrap().fill(rank.rank() as u32 + 1);
        rank.all_reduce(&mut window, ReduceOp::Sum).unwrap();
        let shared = window.into_symmetric(&rank).unwrap();
        let mut got = [0; 5];
        shared.read(1 - rank.rank(), 0, &mut got).unwrap();
        assert_eq!((got, shared.len()), ([3; 5], 5));
        // SAFETY: the memory is still mapped; the call is refused before it is touched.
        let call = unsafe { unisono::Call::from_raw(unisono::Kind::Broadcast { root: 0 }, &[raw], &[]) };
        assert!(matches!(rank.submit(call), Err(Error::Argument { what: "window", .. })));
        assert_ne!(shared.address(0).unwrap(), shared.address(1).unwrap());
        shared.close(&rank).unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn several_threads_of_a_rank_use_one_handle() {
    on_threads(2, |rank| {
        let (me, shared) = (rank.rank(), symmetric::<u32>(&rank, 64));
        thread::scope(|scope| {
            for slot in 0..8usize {
                let shared = &shared;
                scope.spawn(move || {
                    for round in 1..=100u32 {
                        shared.write(1 - me, slot, &[round]).unwrap();
                        shared.signal(1 - me, slot, round).unwrap();
                        shared.wait_signal(slot, round, LONG).unwrap();
                        let mut got = [0];
                        shared.read(me, slot, &mut got).unwrap();
                        assert!(got[0] >= round);
                    }
                });
            }
        });
        rank.barrier().unwrap();
        shared.close(&rank).unwrap();
        rank.destroy().unwrap();
    });
}

fn complaint<T>(result: unisono::Result<T>) -> (&'static str, &'static str, String, String) {
    match result {
        Err(Error::Argument { call, what, expected, got, .. }) => (call, what, expected, got),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("accepted"),
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    on_threads(2, |rank| {
        let shared = symmetric::<u16>(&rank, 10);
        let mut two = [7; 2];
        let (call, what, expected, got) = complaint(shared.read(2, 0, &mut two));
        assert_eq!((call, what, expected.as_str(), got.as_str()), ("read", "peer", "below 2", "2"));
        let (call, what, expected, got) = complaint(shared.read(0, 9, &mut two));
        assert_eq!(
            (call, what, expected.as_str(), got.as_str()),
            ("read", "range", "within 10 elements", "2 from 9")
        );
        assert_eq!(complaint(shared.write(1, usize::MAX, &two)).1, "range");
        assert_eq!(complaint(shared.signal(1, 64, 1)).1, "slot");
        assert_eq!(complaint(shared.wait_signal(64, 1, LONG)).1, "slot");
        assert_eq!(complaint(shared.address(5)).1, "peer");
        assert_eq!((two, shared.signal_value(63)), ([7; 2], Ok(0)));
        // The end of the range is inside, also where there is nothing.
        shared.read(0, 8, &mut two).unwrap();
        shared.read(0, 10, &mut []).unwrap();
        let other = Communicator::threads(1).unwrap().remove(0);
        assert_eq!(complaint(shared.close(&other)).1, "window");
        rank.barrier().unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn a_wait_ends_by_its_timeout_and_the_communicator_goes_on() {
    on_threads(2, |rank| {
        let shared = symmetric::<u8>(&rank, 1);
        shared.signal_on(&Stream::host(), rank.rank(), 1, 5).unwrap();
        let start = Instant::now();
        let error = shared.wait_signal(1, 6, Duration::from_millis(50)).unwrap_err();
        assert!(start.elapsed() >= Duration::from_millis(50));
        assert!(matches!(error, Error::Signal { slot: 1, expected: 6, got: 5, .. }), "{error}");
        shared.wait_signal(1, 5, Duration::ZERO).unwrap();
        rank.barrier().unwrap();
        shared.close(&rank).unwrap();
        rank.destroy().unwrap();
    });
}

#[test]
fn a_wait_ends_when_the_communicator_fails_or_a_peer_leaves() {
    let results = on_threads(3, |rank| {
        let shared = symmetric::<u8>(&rank, 1);
        rank.barrier().unwrap();
        match rank.rank() {
            0 => {
                thread::sleep(Duration::from_millis(30));
                rank.observer().abort("enough");
                String::new()
            }
            _ => {
                let error = shared.wait_signal(0, 1, LONG).unwrap_err().to_string();
                assert!(shared.write(0, 0, &[1]).is_err() && shared.signal(0, 0, 1).is_err());
                error
            }
        }
    });
    for error in &results[1..] {
        assert_eq!(*error, "rank 0 aborted the communicator during wait_signal on slot 0: enough");
    }
    let results = on_threads(2, |rank| {
        let shared = symmetric::<u8>(&rank, 1);
        if rank.rank() == 0 {
            // What it did before it left counts.
            shared.signal(1, 0, 1).unwrap();
            return String::new();
        }
        shared.wait_signal(0, 1, LONG).unwrap();
        shared.wait_signal(0, 2, LONG).unwrap_err().to_string()
    });
    assert!(results[1].starts_with("rank 0 left before wait_signal on slot 0"), "{results:?}");
}
