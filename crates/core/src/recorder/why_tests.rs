//! Tests of the paragraph: one snapshot for each way in which a job does not go on.

use super::super::record::{End, Record, Waits, WaitsOn};
use super::super::words::time_phrase;
use super::*;
use crate::call::{CallHeader, Kind};
use crate::dtype::DType;
use crate::reduce_op::ReduceOp;
use crate::select::Algorithm;

pub(in super::super) const S: fn(u64) -> Duration = Duration::from_secs;

/// `all_reduce`, unless told otherwise; done `ended` seconds ago, or open.
pub(in super::super) fn call(kind: Kind, number: u64, begun: u64, end: End) -> Record {
    let mut header = CallHeader::bare(kind);
    if kind != Kind::Barrier {
        header = CallHeader { dtype: Some(DType::F32), count: 4096, ..header };
    }
    let number = (!kind.is_message()).then_some(number);
    let algorithm = number.map(|_| Algorithm::OneShot);
    Record { serial: number.unwrap_or(900), number, header, algorithm, begun: S(begun), end, waits: None }
}

pub(in super::super) const SUM: Kind = Kind::AllReduce { op: ReduceOp::Sum };

fn on(record: Record, peer: usize, on: WaitsOn) -> Record {
    Record { waits: Some(Waits { peer, on }), ..record }
}

/// Waits in all_reduce #812 for `peer`, since 12 s.
fn waits(peer: usize) -> Vec<Record> {
    vec![on(call(SUM, 812, 12, End::Open), peer, WaitsOn::Arrival)]
}

/// Has done barrier #811.
pub(in super::super) fn behind() -> Vec<Record> {
    vec![call(Kind::Barrier, 811, 12, End::AtOnce)]
}

pub(in super::super) fn snapshot(ranks: Vec<Vec<Record>>) -> Snapshot {
    let view = |(rank, records)| RankView {
        rank,
        pid: 4119 + rank as u32,
        started: 1,
        presence: Presence::Here,
        process: Process::Running,
        is_recording: true,
        records,
        gpu_waits: None,
        devices: Vec::new(),
        gpu: None,
    };
    Snapshot {
        job: "run-1".into(),
        generation: 0,
        host: "gpu07".into(),
        age: S(100),
        failure: None,
        ranks: ranks.into_iter().enumerate().map(view).collect(),
    }
}

pub(in super::super) fn with(
    mut snapshot: Snapshot,
    rank: usize,
    change: impl Fn(&mut RankView),
) -> Snapshot {
    change(&mut snapshot.ranks[rank]);
    snapshot
}

pub(in super::super) fn check(snapshot: &Snapshot, expected: &str) {
    assert_eq!(why(snapshot), expected);
}

#[test]
fn a_stopped_rank_is_named_with_what_continues_it() {
    let all = snapshot(vec![waits(2), waits(2), behind(), waits(2)]);
    check(
        &with(all, 2, |rank| rank.process = Process::Stopped),
        "Ranks 0, 1 and 3 have waited in all_reduce #812 (f32, 4096, sum) for 12 s. Rank 2 (pid 4121) has not begun it: its \
         last call was barrier #811, done 12 s ago; its process is stopped (SIGSTOP). Continue it with kill -CONT 4121.",
    );
}

#[test]
fn a_rank_stopped_inside_the_call_is_told_from_one_before_it() {
    let all = snapshot(vec![waits(1), vec![call(SUM, 812, 12, End::Open)]]);
    check(
        &with(all, 1, |rank| rank.process = Process::Stopped),
        "Rank 0 has waited in all_reduce #812 (f32, 4096, sum) for 12 s. Rank 1 (pid 4120) has begun it 12 s ago; its process is \
         stopped (SIGSTOP). Continue it with kill -CONT 4120.",
    );
}

#[test]
fn a_rank_that_computes_is_named_with_what_shows_it() {
    check(
        &snapshot(vec![waits(2), waits(2), behind()]),
        "Ranks 0 and 1 have waited in all_reduce #812 (f32, 4096, sum) for 12 s. Rank 2 (pid 4121) has not begun it: its last \
         call was barrier #811, done 12 s ago. A debugger shows what it does instead: gdb -p 4121.",
    );
}

#[test]
fn a_rank_that_died_or_left_or_never_came_is_told() {
    let all = snapshot(vec![waits(1), behind(), vec![], vec![]]);
    let all = with(all, 1, |rank| rank.process = Process::Ended);
    let all = with(all, 2, |rank| rank.presence = Presence::Absent);
    check(
        &all,
        "Rank 0 has waited in all_reduce #812 (f32, 4096, sum) for 12 s. Rank 1 (pid 4120) has not begun it: its last call was \
         barrier #811, done 12 s ago; its process has ended. Rank 2 (pid 4121) has not begun it, nor any call before; it has \
         not mapped the shared memory yet. Rank 3 (pid 4122) has not begun it, nor any call before.",
    );
    let left = |presence| with(snapshot(vec![waits(1), behind()]), 1, |rank| rank.presence = presence);
    assert!(why(&left(Presence::Dropped)).ends_with("done 12 s ago; it has dropped its communicator."));
    assert!(why(&left(Presence::Destroyed)).ends_with("done 12 s ago; it has left with destroy()."));
}

#[test]
fn calls_that_differ_are_both_named() {
    let root = on(call(Kind::Broadcast { root: 0 }, 812, 11, End::Open), 0, WaitsOn::Arrival);
    check(
        &snapshot(vec![waits(2), waits(2), vec![root]]),
        "Ranks 0 and 1 have waited in all_reduce #812 (f32, 4096, sum) for 12 s. Rank 2 has called broadcast #812 (f32, 4096, \
         root 0) instead and waited for 11 s; all ranks must make the same calls in the same order. Rank 0 waits for rank 2 and \
         rank 2 for rank 0: none of them can go on.",
    );
}

fn message(kind: Kind, begun: u64, end: End) -> Record {
    let mut record = call(kind, 0, begun, end);
    record.header.count = 4;
    record
}

#[test]
fn messages_that_miss_each_other_are_a_deadlock() {
    let waits =
        |from, tag| on(message(Kind::Recv { from, tag }, 12, End::Open), from as usize, WaitsOn::Message);
    let sent = |to, tag| message(Kind::Send { to, tag }, 13, End::Done(S(13)));
    check(
        &snapshot(vec![vec![sent(1, 5), waits(1, 5)], vec![sent(0, 6), waits(0, 7)]]),
        "Rank 0 has waited in recv from rank 1 (f32, 4, tag 5) for 12 s; what rank 1 sent it last has tag 6, sent 13 s ago. \
         Rank 1 has waited in recv from rank 0 (f32, 4, tag 7) for 12 s; what rank 0 sent it last has tag 5, sent 13 s ago. \
         Rank 0 waits for rank 1 and rank 1 for rank 0: none of them can go on.",
    );
    check(
        &snapshot(vec![vec![waits(1, 5)], vec![call(Kind::Barrier, 3, 7, End::AtOnce)]]),
        "Rank 0 has waited in recv from rank 1 (f32, 4, tag 5) for 12 s; rank 1 has sent it nothing. Rank 1 (pid 4120) is \
         outside of unisono, computing perhaps: its last call was barrier #3, done 7 s ago. A debugger shows what it does \
         instead: gdb -p 4120.",
    );
}

#[test]
fn a_receive_from_anybody_waits_for_all_and_circles_are_found_at_any_length() {
    let any = on(message(Kind::Recv { from: u32::MAX, tag: 5 }, 12, End::Open), 1, WaitsOn::Message);
    let all = snapshot(vec![vec![any], behind(), behind()]);
    assert_eq!(all.waits_for(0), [1, 2]);
    assert!(
        why(&all).starts_with("Rank 0 has waited in recv from any rank (f32, 4, tag 5) for 12 s. Ranks 1")
    );
    let send = |to| on(message(Kind::Send { to, tag: 0 }, 12, End::Open), to as usize, WaitsOn::Room);
    let all = snapshot(vec![vec![send(1)], vec![send(2)], vec![send(0)], vec![send(0)]]);
    assert!(why(&all).ends_with(
        "Rank 0 waits for rank 1, rank 1 for rank 2 and rank 2 for rank 0: none of them can go on."
    ));
}

#[test]
fn a_chain_of_waits_is_followed_to_its_end() {
    let recv = on(message(Kind::Recv { from: 2, tag: 9 }, 30, End::Open), 2, WaitsOn::Message);
    check(
        &snapshot(vec![waits(1), vec![recv], behind()]),
        "Rank 0 has waited in all_reduce #812 (f32, 4096, sum) for 12 s. Rank 1 has not begun it: it has waited in recv from \
         rank 2 (f32, 4, tag 9) for 30 s; rank 2 has sent it nothing. Rank 2 (pid 4121) has not begun it: its last call was \
         barrier #811, done 12 s ago. A debugger shows what it does instead: gdb -p 4121.",
    );
}

#[test]
fn only_the_root_is_waited_for_where_only_the_root_sends() {
    let kind = Kind::Broadcast { root: 2 };
    let waiting = on(call(kind, 812, 12, End::Open), 2, WaitsOn::Arrival);
    let all = snapshot(vec![vec![waiting], behind(), behind()]);
    assert_eq!(all.waits_for(0), [2]);
    let all = snapshot(vec![waits(1), behind(), behind()]);
    assert_eq!(all.waits_for(0), [1, 2]);
    let credit = on(call(kind, 812, 12, End::Open), 1, WaitsOn::Credit);
    assert_eq!(snapshot(vec![vec![credit], behind(), behind()]).waits_for(0), [1]);
    assert_eq!(snapshot(vec![waits(77), waits(0)]).waits_for(0), [0_usize; 0], "a peer from nowhere");
}

#[test]
fn everybody_computing_or_calling_is_no_hang() {
    check(
        &snapshot(vec![behind(), behind()]),
        "No rank waits. Ranks 0 and 1 are outside of unisono, computing perhaps: their last call was barrier #811, done 12 s \
         ago.",
    );
    let busy = || vec![call(SUM, 7, 0, End::AtOnce)];
    check(
        &snapshot(vec![busy(), busy()]),
        "No rank waits. Ranks 0 and 1 make calls: the latest was all_reduce #7 (f32, 4096, sum), done less than 0.1 s ago.",
    );
    check(&snapshot(vec![vec![], vec![]]), "No rank waits. Ranks 0 and 1 have not made any call yet.");
    let inside = || vec![call(SUM, 7, 3, End::Open)];
    check(
        &snapshot(vec![inside(), inside()]),
        "No rank waits. Ranks 0 and 1 have been in all_reduce #7 (f32, 4096, sum) for 3 s.",
    );
}

#[test]
fn a_failure_comes_first_with_its_cause() {
    let failed = || vec![call(SUM, 812, 12, End::Failed(S(2)))];
    let mut all = snapshot(vec![failed(), failed(), behind()]);
    all.ranks[2].process = Process::Ended;
    let sentence = "rank 2 (host vm, pid 4121) died during all_reduce #812: its socket closed.".to_owned();
    all.failure = Some(super::super::snapshot::Failure { found_by: 0, sentence });
    check(
        &all,
        "This communicator has failed: rank 2 (host vm, pid 4121) died during all_reduce #812: its socket closed. Ranks 0 and 1 \
         have failed in all_reduce #812 (f32, 4096, sum) 2 s ago. Rank 2 (pid 4121) is outside of unisono: its last call was \
         barrier #811, done 12 s ago; its process has ended.",
    );
}

#[test]
fn the_dead_wait_no_more() {
    let mut all = snapshot(vec![vec![call(SUM, 812, 12, End::Failed(S(2)))], waits(0)]);
    all.ranks[1].process = Process::Ended;
    let sentence = "rank 1 (host vm, pid 4120) died during all_reduce #812: its socket closed.".to_owned();
    all.failure = Some(super::super::snapshot::Failure { found_by: 0, sentence });
    check(
        &all,
        "This communicator has failed: rank 1 (host vm, pid 4120) died during all_reduce #812: its socket closed. Rank 0 has \
         failed in all_reduce #812 (f32, 4096, sum) 2 s ago. Rank 1 (pid 4120) was in all_reduce #812 (f32, 4096, sum), begun \
         12 s ago; its process has ended.",
    );
}

#[test]
fn the_end_and_a_recorder_that_is_off_are_said() {
    let mut all = snapshot(vec![behind(), behind()]);
    all.ranks.iter_mut().for_each(|rank| rank.presence = Presence::Destroyed);
    check(&all, "All ranks have ended it together with destroy().");
    let mut off = snapshot(vec![vec![], vec![]]);
    off.ranks.iter_mut().for_each(|rank| rank.is_recording = false);
    off.ranks[1].process = Process::Stopped;
    let text = why(&off);
    assert!(text.starts_with("No rank records its calls (UNISONO_RECORDER=off)."), "{text}");
    assert!(text.contains("Rank 1 (pid 4120) is not recorded: its process is stopped (SIGSTOP)."), "{text}");
}

#[test]
fn a_thousand_ranks_are_told_in_a_few_sentences() {
    let mut ranks: Vec<_> = (0..1000).map(|_| waits(77)).collect();
    ranks[77] = behind();
    let text = why(&snapshot(ranks));
    assert!(text.starts_with("Ranks 0–76 and 78–999 have waited in"), "{text}");
    assert!(text.len() < 400, "{text}");
    let many = (0..40).map(|rank| vec![call(Kind::Barrier, rank, 12, End::AtOnce)]).collect();
    let text = why(&snapshot(many));
    assert!(text.contains("As much can be said of 32 more groups of ranks."), "{text}");
}

#[test]
fn ranks_and_times_read_well() {
    let list = |ranks: &[usize]| ranks_phrase(ranks);
    assert_eq!(list(&[3]), "rank 3");
    assert_eq!(list(&[0, 1, 3]), "ranks 0, 1 and 3");
    assert_eq!(list(&[0, 1, 2, 3, 9, 10]), "ranks 0–3, 9 and 10");
    let times: Vec<_> = [0, 30, 400, 2000, 2_940, 2_960, 12_300, 119_600, 200_000, 7_300_000]
        .map(|ms| time_phrase(Duration::from_millis(ms)))
        .to_vec();
    let expected =
        ["less than 1 ms", "30 ms", "0.4 s", "2 s", "2.9 s", "3 s", "12 s", "120 s", "3 min", "2 h"];
    assert_eq!(times, expected);
}
