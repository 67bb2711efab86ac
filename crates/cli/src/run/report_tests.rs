//! Tests of the sentences about a job.

use super::super::policy::{Action, Rules};
use super::*;

const S: fn(u64) -> Duration = Duration::from_secs;

fn policy(world_size: usize, timeout: Option<Duration>, on_failure: OnFailure) -> Policy {
    Policy::new(Rules { world_size, grace: S(5), timeout, on_failure })
}

fn announcements(policy: &mut Policy, now: Duration) -> Vec<String> {
    let pids: Vec<i32> = (100..200).collect();
    let actions: Vec<Action> = std::iter::from_fn(|| policy.poll(now)).collect();
    let notes = actions.into_iter().filter_map(|action| match action {
        Action::Announce(note) => Some(note),
        Action::Send(_) => None,
    });
    notes.map(|note| announcement(note, policy, &pids)).collect()
}

#[test]
fn a_job_that_went_well_says_nothing() {
    let mut policy = policy(2, None, OnFailure::Stop);
    policy.on_exit(0, Ended::Code(0), S(1));
    policy.on_exit(1, Ended::Code(0), S(1));
    assert_eq!((summary(&policy), exit_code(&policy)), (vec![], 0));
}

#[test]
fn a_failure_names_the_first_rank_and_then_what_became_of_the_rest() {
    let mut policy = policy(6, None, OnFailure::Stop);
    policy.on_exit(5, Ended::Code(0), S(1));
    policy.on_exit(2, Ended::Signal(9), Duration::from_millis(12_340));
    assert_eq!(
        announcements(&mut policy, S(13)),
        [
            "rank 2 (pid 102) was killed by SIGKILL (out of memory?) after 12 s. Ranks 0, 1, 3, 4 have 5 s to end."
        ]
    );
    policy.on_exit(0, Ended::Code(1), S(13));
    policy.on_exit(1, Ended::Code(1), S(13));
    announcements(&mut policy, S(18));
    policy.on_exit(3, Ended::Signal(15), S(18));
    announcements(&mut policy, S(20));
    policy.on_exit(4, Ended::Signal(9), S(20));
    assert_eq!(
        summary(&policy),
        [
            "the job failed: rank 2 was killed by SIGKILL (out of memory?) first; ranks 0, 1 exited with code 1; rank \
          3 was ended by SIGTERM; rank 4 did not end within 2 s of SIGTERM and was killed; rank 5 succeeded. Exit \
          code 137."
        ]
    );
    assert_eq!(exit_code(&policy), 137);
}

#[test]
fn one_rank_alone_is_told_of_once() {
    let mut policy = policy(1, None, OnFailure::Stop);
    policy.on_exit(0, Ended::Code(3), Duration::from_millis(250));
    assert_eq!(announcements(&mut policy, S(1)), ["rank 0 (pid 100) exited with code 3 after 0.3 s."]);
    assert_eq!((summary(&policy), exit_code(&policy)), (vec![], 3));
}

#[test]
fn with_continue_the_sentence_says_so() {
    let mut policy = policy(2, None, OnFailure::Continue);
    policy.on_exit(0, Ended::Code(3), S(2));
    let expected = "rank 0 (pid 100) exited with code 3 after 2 s. Rank 1 goes on (--on-failure=continue).";
    assert_eq!(announcements(&mut policy, S(2)), [expected]);
    policy.on_exit(1, Ended::Code(0), S(9));
    let expected = "the job failed: rank 0 exited with code 3 first; rank 1 succeeded. Exit code 3.";
    assert_eq!(summary(&policy), [expected]);
}

#[test]
fn a_timeout_is_124_and_names_those_who_were_still_running() {
    let mut policy = policy(9, Some(S(60)), OnFailure::Stop);
    policy.on_exit(7, Ended::Code(0), S(1));
    assert_eq!(
        announcements(&mut policy, S(60)),
        ["the job is not done after --timeout 60 s; ending ranks 0–6, 8."]
    );
    for rank in [0, 1, 2, 3, 4, 5, 6, 8] {
        policy.on_exit(rank, Ended::Signal(15), S(60));
    }
    let expected = "the job timed out: ranks 0–6, 8 were ended by SIGTERM; rank 7 succeeded. Exit code 124.";
    assert_eq!((summary(&policy), exit_code(&policy)), (vec![expected.to_owned()], 124));
}

#[test]
fn a_signal_from_outside_is_told_with_the_way_to_end_at_once() {
    let mut policy = policy(3, None, OnFailure::Stop);
    policy.on_signal(libc::SIGINT, S(1));
    assert_eq!(announcements(&mut policy, S(1)), ["SIGINT handed on to ranks 0–2; once more ends the job."]);
    for rank in 0..3 {
        policy.on_exit(rank, Ended::Signal(2), S(1));
    }
    let expected = "the job ended after SIGINT: ranks 0–2 were killed by SIGINT. Exit code 130.";
    assert_eq!((summary(&policy), exit_code(&policy)), (vec![expected.to_owned()], 130));
}

#[test]
fn a_rank_that_the_kernel_does_not_let_go_is_named() {
    let mut policy = policy(2, Some(S(1)), OnFailure::Stop);
    policy.on_exit(0, Ended::Code(0), S(0));
    for now in [1, 3, 13] {
        announcements(&mut policy, S(now));
    }
    assert!(policy.is_over());
    let expected = "the job timed out: rank 0 succeeded; rank 1 did not end even after SIGKILL (stuck in the kernel?). \
                    Exit code 124.";
    assert_eq!(summary(&policy), [expected]);
}

#[test]
fn times_are_as_exact_as_a_reader_needs() {
    let text = |millis| seconds(Duration::from_millis(millis));
    let expected = [
        (0, "0 ms"),
        (49, "49 ms"),
        (50, "0.1 s"),
        (1_000, "1 s"),
        (1_250, "1.3 s"),
        (1_960, "2 s"),
        (9_940, "9.9 s"),
    ];
    for (millis, expected) in
        expected.into_iter().chain([(9_960, "10 s"), (12_340, "12 s"), (12_600, "13 s")])
    {
        assert_eq!(text(millis), expected, "{millis} ms");
    }
}
