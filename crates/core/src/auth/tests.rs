//! Two endpoints in memory; everything that can be done to the bytes between them.

use proptest::prelude::*;

use super::*;

const CONTEXT: &[u8] = b"test, generation 3, ranks 1 and 2";

fn secret(byte: u8) -> Secret {
    Secret::new([byte; 32])
}

fn pair() -> (Handshake, Handshake) {
    (
        Handshake::new(Role::Initiator, &secret(1), CONTEXT, [10; 32]),
        Handshake::new(Role::Responder, &secret(1), CONTEXT, [20; 32]),
    )
}

/// Delivers messages until both are quiet; `change` may alter message number n. Gives what each side's last input said.
fn run(a: &mut Handshake, b: &mut Handshake, mut change: impl FnMut(usize, &mut Vec<u8>)) -> [Result<()>; 2] {
    let mut results = [Ok(()), Ok(())];
    for number in 0..4 {
        let (from, to, side) = if number % 2 == 0 { (&mut *a, &mut *b, 1) } else { (&mut *b, &mut *a, 0) };
        let Some(mut message) = from.poll_output() else { break };
        change(number, &mut message);
        if to.wants() == 0 {
            break;
        }
        results[side] = to.on_input(&message);
    }
    results
}

fn sessions() -> (Session, Session) {
    let (mut a, mut b) = pair();
    assert_eq!(run(&mut a, &mut b, |_, _| ()), [Ok(()), Ok(())]);
    (a.finish().unwrap(), b.finish().unwrap())
}

fn sealed(sealer: &mut Sealer, kind: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    sealer.seal(kind, body, &mut bytes).unwrap();
    bytes
}

fn is_auth(result: &Result<()>) -> bool {
    matches!(result, Err(Error::Auth { .. }))
}

#[test]
fn both_sides_with_the_secret_can_talk_in_both_directions() {
    let (mut a, mut b) = sessions();
    for (number, body) in [&b"first"[..], b"", &[7; 5000]].into_iter().enumerate() {
        for (from, to) in [(&mut a.sealer, &mut b.opener), (&mut b.sealer, &mut a.opener)] {
            let bytes = sealed(from, number as u16, body);
            let Opened::Frame { kind, body: range, consumed } = to.open(&bytes).unwrap() else {
                panic!("a whole frame is there")
            };
            assert_eq!((kind, &bytes[range], consumed), (number as u16, body, bytes.len()));
        }
    }
}

#[test]
fn the_messages_have_the_documented_sizes_and_none_shows_the_secret() {
    let (mut a, mut b) = pair();
    let mut sizes = Vec::new();
    assert_eq!((a.wants(), b.wants()), (72, 40));
    let results = run(&mut a, &mut b, |_, message| {
        sizes.push(message.len());
        assert!(!message.windows(8).any(|window| window == [1; 8]));
    });
    assert_eq!((results, sizes), ([Ok(()), Ok(())], vec![40, 72, 32]));
    assert_eq!((a.wants(), b.wants()), (0, 0));
    let shown = format!("{a:?} {b:?} {:?}", a.finish().unwrap());
    assert!(!shown.contains("1, 1, 1"), "{shown}");
}

#[test]
fn a_session_is_given_once_after_everything_was_sent_and_not_before() {
    let (mut a, mut b) = pair();
    assert!(a.finish().is_none() && b.finish().is_none());
    b.on_input(&a.poll_output().unwrap()).unwrap();
    assert!(b.finish().is_none(), "the responder has seen no proof yet");
    a.on_input(&b.poll_output().unwrap()).unwrap();
    assert!(a.finish().is_none(), "the initiator has not sent its proof yet");
    b.on_input(&a.poll_output().unwrap()).unwrap();
    assert!(a.finish().is_some() && b.finish().is_some());
    assert!(a.finish().is_none() && b.finish().is_none());
}

#[test]
fn a_wrong_secret_or_context_is_an_auth_error_on_both_sides() {
    for (other_secret, context) in [(secret(2), CONTEXT), (secret(1), &b"something else"[..])] {
        let (mut a, _) = pair();
        let mut b = Handshake::new(Role::Responder, &other_secret, context, [20; 32]);
        let results = run(&mut a, &mut b, |_, _| ());
        assert!(results.iter().all(is_auth), "{results:?}");
        assert!(a.finish().is_none() && b.finish().is_none());
        assert!(results[1].clone().unwrap_err().to_string().contains("did not believe us"));
        assert!(is_auth(&a.on_input(&[])), "a failed handshake stays failed");
    }
}

#[test]
fn a_flipped_byte_anywhere_in_the_handshake_is_a_typed_error() {
    for (message, length) in [(0, OPENING_BYTES), (1, CHALLENGE_BYTES), (2, PROOF_BYTES)] {
        for at in 0..length {
            for flip in [1u8, 0x80, 0xff] {
                let (mut a, mut b) = pair();
                let results = run(&mut a, &mut b, |number, bytes| {
                    if number == message {
                        bytes[at] ^= flip;
                    }
                });
                let place = format!("message {message}, byte {at}: {results:?}");
                assert!(results.iter().any(Result::is_err), "{place}");
                for error in results.iter().filter_map(|result| result.as_ref().err()) {
                    assert!(matches!(error, Error::Auth { .. } | Error::Version { .. }), "{place}");
                }
                assert!(b.finish().is_none(), "{place}");
                // The last message is beyond what the initiator can see.
                assert_eq!(a.finish().is_some(), message == 2, "{place}");
            }
        }
    }
}

#[test]
fn another_version_is_named_on_both_sides() {
    let (mut a, mut b) = pair();
    let results = run(&mut a, &mut b, |number, bytes| {
        // The responder answers with its own version and nothing else; to us it is made to look like version 9.
        if number == 1 {
            assert_eq!((&bytes[4..6], &bytes[8..]), (&VERSION.to_le_bytes()[..], &[0; 64][..]));
        }
        bytes[4] = 9;
    });
    let error = Err(Error::Version { expected: 1, got: 9 });
    assert_eq!(results, [error.clone(), error]);
}

#[test]
fn another_number_of_bytes_is_refused() {
    for change in [-1isize, 1] {
        for message in 0..3 {
            let (mut a, mut b) = pair();
            let results = run(&mut a, &mut b, |number, bytes| {
                if number == message {
                    bytes.resize(bytes.len().wrapping_add_signed(change), 0);
                }
            });
            let side = if message == 1 { 0 } else { 1 };
            assert!(matches!(results[side], Err(Error::Malformed { what: "handshake message", .. })));
            assert!(b.finish().is_none());
        }
    }
}

#[test]
fn ones_own_messages_reflected_are_refused() {
    // The opening of another connection, sent back as if it were a challenge.
    let mut a = Handshake::new(Role::Initiator, &secret(1), CONTEXT, [10; 32]);
    let mut mirror = Handshake::new(Role::Initiator, &secret(1), CONTEXT, [11; 32]);
    let mut bytes = a.poll_output().unwrap();
    bytes.extend_from_slice(&mirror.poll_output().unwrap()[8..]);
    assert!(is_auth(&a.on_input(&bytes)));
    // A responder's own proof, sent back as the proof of the initiator.
    let (mut a, mut b) = pair();
    b.on_input(&a.poll_output().unwrap()).unwrap();
    let challenge = b.poll_output().unwrap();
    assert!(is_auth(&b.on_input(&challenge[OPENING_BYTES..])));
    // Sealed frames: the keys of the two directions differ.
    let (mut a, _) = sessions();
    let bytes = sealed(&mut a.sealer, 1, b"mine");
    assert_eq!(a.opener.open(&bytes), Err(Error::Tampered { sequence: 0 }));
}

#[test]
fn a_recorded_handshake_cannot_be_replayed() {
    let (mut a, mut b) = pair();
    let mut recorded = Vec::new();
    assert_eq!(run(&mut a, &mut b, |_, message| recorded.push(message.clone())), [Ok(()), Ok(())]);
    let mut again = Handshake::new(Role::Responder, &secret(1), CONTEXT, [21; 32]);
    again.on_input(&recorded[0]).unwrap();
    assert!(is_auth(&again.on_input(&recorded[2])));
    let mut again = Handshake::new(Role::Initiator, &secret(1), CONTEXT, [11; 32]);
    assert!(is_auth(&again.on_input(&recorded[1])));
}

#[test]
fn a_flipped_byte_anywhere_in_a_frame_is_never_data() {
    let length = sealed(&mut sessions().0.sealer, 1, b"twenty bytes of body").len();
    for at in 0..length {
        for flip in [1u8, 0x80, 0xff] {
            let (mut a, mut b) = sessions();
            b.opener.set_cap(300);
            let mut bytes = sealed(&mut a.sealer, 1, b"twenty bytes of body");
            bytes[at] ^= flip;
            // Enough genuine bytes behind it for any altered length within the cap.
            for _ in 0..20 {
                a.sealer.seal(1, b"twenty bytes of body", &mut bytes).unwrap();
            }
            let result = b.opener.open(&bytes);
            let too_large = matches!(result, Err(Error::TooLarge { .. })) && (8..12).contains(&at);
            assert!(too_large || result == Err(Error::Tampered { sequence: 0 }), "byte {at}: {result:?}");
            assert_eq!(b.opener.open(&bytes), result, "a failed opener stays failed");
        }
    }
}

#[test]
fn replayed_swapped_and_dropped_frames_are_tampered() {
    let (mut a, mut b) = sessions();
    let [one, two] = [b"one", b"two"].map(|body| sealed(&mut a.sealer, 1, body));
    assert!(matches!(b.opener.open(&one), Ok(Opened::Frame { .. })));
    assert_eq!(b.opener.open(&one), Err(Error::Tampered { sequence: 1 }), "replayed");
    let (_, mut b) = sessions();
    assert_eq!(b.opener.open(&two), Err(Error::Tampered { sequence: 0 }), "first one dropped, or swapped");
    // A frame of another connection of the same secret, at the same place.
    let mut other = Handshake::new(Role::Responder, &secret(1), CONTEXT, [21; 32]);
    let (mut a, _) = pair();
    assert_eq!(run(&mut a, &mut other, |_, _| ()), [Ok(()), Ok(())]);
    assert_eq!(other.finish().unwrap().opener.open(&one), Err(Error::Tampered { sequence: 0 }));
}

#[test]
fn a_truncated_frame_says_how_much_is_needed_and_a_capped_length_is_refused_at_once() {
    let (mut a, mut b) = sessions();
    let bytes = sealed(&mut a.sealer, 1, &[5; 100]);
    for cut in 0..bytes.len() {
        let needed = if cut < 24 { 24 } else { 24 + 100 + 16 };
        assert_eq!(b.opener.open(&bytes[..cut]), Ok(Opened::NeedMore(needed)));
    }
    assert!(matches!(b.opener.open(&bytes), Ok(Opened::Frame { .. })));
    b.opener.set_cap(99);
    let bytes = sealed(&mut a.sealer, 1, &[5; 100]);
    let too_large = Error::TooLarge { what: "frame body", got: 100, cap: 99 };
    assert_eq!(b.opener.open(&bytes[..24]), Err(too_large));
}

#[test]
fn a_body_above_the_largest_is_not_sealed() {
    let (mut a, mut b) = sessions();
    let mut out = Vec::new();
    let result = a.sealer.seal(1, &vec![0; crate::wire::MAX_BODY_BYTES + 1], &mut out);
    assert!(matches!(result, Err(Error::TooLarge { .. })));
    assert_eq!(out.len(), 0);
    let bytes = sealed(&mut a.sealer, 1, b"next");
    assert!(matches!(b.opener.open(&bytes), Ok(Opened::Frame { .. })), "no number was used up");
}

proptest! {
    #[test]
    fn random_bytes_never_open_and_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let (_, mut b) = sessions();
        let opened = matches!(b.opener.open(&bytes), Ok(Opened::Frame { .. }));
        prop_assert!(!opened);
        let (mut a, mut b) = pair();
        let _ = a.poll_output();
        prop_assert!(a.on_input(&bytes).is_err());
        prop_assert!(b.on_input(&bytes).is_err());
        prop_assert!(a.finish().is_none() && b.finish().is_none());
    }

    #[test]
    fn any_bodies_arrive_whole_however_they_are_cut(
        bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..400), 1..6),
        cut in 1usize..64,
    ) {
        let (mut a, mut b) = sessions();
        let mut wire = Vec::new();
        for body in &bodies {
            a.sealer.seal(3, body, &mut wire).unwrap();
        }
        let (mut buffer, mut arrived) = (Vec::new(), Vec::new());
        for piece in wire.chunks(cut) {
            buffer.extend_from_slice(piece);
            while let Opened::Frame { kind, body, consumed } = b.opener.open(&buffer).unwrap() {
                prop_assert_eq!(kind, 3);
                arrived.push(buffer[body].to_vec());
                buffer.drain(..consumed);
            }
        }
        prop_assert_eq!(arrived, bodies);
        prop_assert_eq!(buffer.len(), 0);
    }
}
