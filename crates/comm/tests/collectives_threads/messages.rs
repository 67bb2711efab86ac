//! Messages from rank to rank: sizes, tags out of order, exchanges in circles, mismatches.

use std::thread;
use std::time::Duration;

use unisono::settings::parse_duration;
use unisono::{Builder, Communicator, Error, Operations};

use crate::support::random::{Random, seed};
use crate::support::threads::{on_built, on_threads};

/// The content of a message, from what both sides know of it.
fn content(key: u64, count: usize) -> Vec<u16> {
    let mut random = Random::of(&[key]);
    (0..count).map(|_| random.next() as u16).collect()
}

#[test]
fn messages_of_every_size_arrive_whole_and_in_order() {
    let sizes = [0, 1, 3, 15, 16, 17, 8_191, 8_192, 8_193, 32_752, 32_768, 32_769, 200_000, 3_000_001];
    on_threads(2, move |rank| {
        for (number, count) in sizes.into_iter().enumerate() {
            let expected = content(number as u64, count);
            if rank.rank() == 0 {
                rank.send(&expected, 1, 9).unwrap();
            } else {
                let mut got = vec![0xa5a5; count];
                rank.recv(&mut got, 0, 9).unwrap();
                assert!(got == expected, "{count} elements");
            }
        }
        rank.destroy().unwrap();
    });
}

#[test]
fn what_fits_into_the_channel_does_not_wait_for_its_receiver() {
    on_threads(2, |rank| {
        if rank.rank() == 0 {
            for tag in 0..10 {
                rank.send(&[u64::from(tag); 500], 1, tag).unwrap();
            }
            rank.barrier().unwrap();
        } else {
            rank.barrier().unwrap();
            let mut got = [0u64; 500];
            for tag in 0..10 {
                rank.recv(&mut got, 0, tag).unwrap();
                assert_eq!(got, [u64::from(tag); 500]);
            }
        }
        rank.destroy().unwrap();
    });
}

#[test]
fn messages_sent_whole_and_in_pieces_follow_each_other_at_any_pace() {
    let seed = seed();
    on_threads(2, move |rank| {
        let (me, peer) = (rank.rank(), 1 - rank.rank());
        // Both know the plan: how many messages who sends next, of which sizes, and when one side takes its time.
        let mut plan = Random::of(&[seed]);
        for round in 0..2_000u64 {
            let sender = plan.below(2);
            for number in 0..=plan.below(4) as u64 {
                let count = match plan.below(12) {
                    0 => plan.below(40_000),
                    1..=3 => plan.below(10_000),
                    _ => plan.below(20),
                };
                let (tag, pause) = (plan.below(3) as u32, plan.once_in(50).then(|| plan.below(2)));
                if pause == Some(me) {
                    thread::sleep(Duration::from_micros(100));
                }
                let expected = content(round << 3 | number, count);
                if me == sender {
                    rank.send(&expected, peer, tag).unwrap();
                } else {
                    let mut got = vec![0xa5a5; count];
                    rank.recv(&mut got, peer, tag).unwrap();
                    assert!(got == expected, "seed {seed:#x}, round {round}, message {number} of {count}");
                }
            }
        }
        rank.destroy().unwrap();
    });
}

#[test]
fn messages_are_matched_by_tag_whatever_the_order() {
    on_threads(2, |rank| {
        let tags = [5u32, 1, 5, 3, u32::MAX, 1, 0];
        if rank.rank() == 0 {
            for (number, tag) in tags.into_iter().enumerate() {
                rank.send(&content(number as u64, 30_000 * number), 1, tag).unwrap();
            }
        } else {
            // For each tag in its own order, but the tags in another.
            for (tag, numbers) in
                [(0, vec![6]), (u32::MAX, vec![4]), (1, vec![1, 5]), (3, vec![3]), (5, vec![0, 2])]
            {
                for number in numbers {
                    let mut got = vec![0u16; 30_000 * number];
                    rank.recv(&mut got, 0, tag).unwrap();
                    assert!(got == content(number as u64, 30_000 * number), "message {number}");
                }
            }
        }
        rank.destroy().unwrap();
    });
}

#[test]
fn ranks_that_exchange_in_a_circle_do_not_wait_for_each_other() {
    on_threads(5, |rank| {
        let (me, ranks) = (rank.rank(), rank.world_size());
        for count in [1, 40_000, 1_000_000] {
            let mine = content(me as u64, count);
            let mut theirs = vec![0u16; count];
            let (to, from) = ((me + 1) % ranks, (me + ranks - 1) % ranks);
            rank.send_recv(&mine, to, &mut theirs, from, 4).unwrap();
            assert!(theirs == content(from as u64, count), "{count} elements from {from}");
        }
        rank.destroy().unwrap();
    });
}

#[test]
fn a_message_from_anybody_tells_its_sender_and_all_are_served() {
    on_threads(4, |rank| {
        if rank.rank() == 0 {
            let mut seen = [0usize; 4];
            for _ in 0..90 {
                let mut got = vec![0u16; 5_000];
                let from = rank.recv_any(&mut got, 8).unwrap();
                assert!(got == content((from * 1000 + seen[from]) as u64, 5_000));
                seen[from] += 1;
            }
            assert_eq!(seen, [0, 30, 30, 30]);
            for from in 1..4 {
                let mut late = [0u8; 3];
                rank.recv(&mut late, from, 2).unwrap();
                assert_eq!(late, [from as u8; 3]);
            }
        } else {
            rank.send(&[rank.rank() as u8; 3], 0, 2).unwrap();
            for number in 0..30 {
                rank.send(&content((rank.rank() * 1000 + number) as u64, 5_000), 0, 8).unwrap();
            }
        }
        rank.destroy().unwrap();
    });
}

#[test]
fn a_message_of_another_type_or_count_is_named_on_both_ranks() {
    let errors = on_threads(2, |rank| {
        if rank.rank() == 0 {
            rank.send(&[1.0f32; 4], 1, 7).unwrap();
            rank.barrier().unwrap_err().to_string()
        } else {
            rank.recv(&mut [0u32; 8], 0, 7).unwrap_err().to_string()
        }
    });
    let expected = "recv from 0 on rank 1 (u32, 8, tag 7) met send to 1 on rank 0 (f32, 4, tag 7). All ranks must make the \
                    same calls in the same order.";
    assert_eq!(errors, [expected, expected]);
}

#[test]
fn the_other_end_must_be_another_rank_and_nothing_is_sent_otherwise() {
    on_threads(2, |rank| {
        let me = rank.rank();
        let refused = |result: Result<(), Error>| {
            assert!(matches!(&result, Err(Error::Argument { rank, .. }) if *rank == me), "{result:?}");
        };
        refused(rank.send(&[1u8], me, 0));
        refused(rank.send(&[1u8], 2, 0));
        refused(rank.recv(&mut [1u8], me, 0));
        refused(rank.send_recv(&[1u8], 1 - me, &mut [0u8], usize::MAX, 0));
        rank.barrier().unwrap();
        rank.destroy().unwrap();
    });
    let alone = Communicator::threads(1).unwrap().remove(0);
    assert!(matches!(alone.recv_any(&mut [0u8], 0), Err(Error::Argument { .. })));
}

#[test]
fn a_message_that_nobody_sends_or_receives_ends_by_the_timeout_and_is_named() {
    let impatient = |builder: Builder| builder.timeout(parse_duration("300ms"));
    let errors = on_built(2, impatient, |rank| match rank.rank() {
        0 => rank.recv(&mut [0u8; 3], 1, 5).unwrap_err(),
        _ => {
            thread::sleep(Duration::from_millis(500));
            rank.send(&vec![0u8; 1 << 20], 0, 6).unwrap_err()
        }
    });
    for error in errors {
        assert!(
            matches!(&error, Error::Timeout { rank: 0, call, missing, .. }
                if call == "recv from rank 1 (tag 5)" && missing[0].starts_with("rank 1")),
            "{error:?}"
        );
    }
}
