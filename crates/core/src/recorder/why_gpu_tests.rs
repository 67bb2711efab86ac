//! Tests of what is said of GPUs: a snapshot for each way in which their calls do not go on.

use super::super::gpu::GpuWait;
use super::super::gpu_message::{GpuMessage, GpuWork, MessageHeader};
use super::super::why::tests::{S, SUM, behind, snapshot, with};
use super::super::why::why;
use super::*;
use crate::call::{CallHeader, Kind};
use crate::device::Form;
use crate::dtype::DType;

/// An all-reduce of 4,096 floats that began so many seconds ago, and ended one second later or goes on.
fn call(number: u32, begun: u64, is_done: bool) -> GpuCall {
    GpuCall {
        number,
        header: CallHeader { dtype: Some(DType::F32), count: 4096, ..CallHeader::bare(SUM) },
        form: Some(Form::OneShot),
        blocks: 8,
        begun: S(begun),
        met: is_done.then(|| S(begun - 1)),
        ended: is_done.then(|| S(begun - 1)),
    }
}

/// Ranks that have done a barrier on the host, and these calls on their GPUs; `None`: what their GPUs do is not known.
fn on_gpus(latest: &[Option<GpuCall>]) -> Snapshot {
    let mut all = snapshot(latest.iter().map(|_| behind()).collect());
    for (rank, call) in all.ranks.iter_mut().zip(latest) {
        let reading = if call.is_some() { Reading::Now } else { Reading::Earlier };
        rank.gpu = Some(GpuView {
            reading,
            made: None,
            calls: call.iter().copied().collect(),
            messages: Vec::new(),
        });
    }
    all
}

fn told(snapshot: &Snapshot) -> String {
    let (sentences, _) = gpus(snapshot);
    sentences.join(" ")
}

#[test]
fn a_gpu_that_waits_is_told_of_with_the_rank_that_it_waits_for() {
    let all = snapshot(vec![behind(), behind()]);
    let text = why(&with(all, 0, |rank| rank.gpu_waits = Some(GpuWait { work: GpuWork::Call(7), peer: 1 })));
    let expected = "The GPU of rank 0 waits in its call #7 for that of rank 1, which has not made it.";
    assert!(text.contains(expected) && !text.contains("No rank waits"), "{text}");
}

#[test]
fn devices_of_ranks_that_have_several_are_told_of_by_rank_and_number() {
    let header = CallHeader { parts: 2, ..call(5, 4, false).header };
    let header = CallHeader { kind: Kind::AllReduceMulti { op: crate::reduce_op::ReduceOp::Sum }, ..header };
    let (inside, before) = (GpuCall { header, ..call(5, 4, false) }, call(4, 9, true));
    let mut all = on_gpus(&[Some(call(1, 30, true)), Some(call(1, 30, true))]);
    for (rank, calls) in [[inside, inside], [inside, before]].into_iter().enumerate() {
        let device = |(at, call): (usize, GpuCall)| SeatView {
            seat: 2 * rank + at,
            ordinal: at as u32 + 6,
            waits: call.is_open().then_some(GpuWait { work: GpuWork::Call(5), peer: 3 }),
            gpu: Some(GpuView { reading: Reading::Now, made: None, calls: vec![call], messages: Vec::new() }),
        };
        all.ranks[rank].devices = calls.into_iter().enumerate().map(device).collect();
    }
    let (sentences, does_wait) = gpus(&all);
    assert!(does_wait);
    assert_eq!(
        sentences.join(" "),
        "Devices cuda:6 of rank 0, cuda:7 of rank 0 and cuda:6 of rank 1 have been in all_reduce_multi #5 (f32, 4096, sum, \
         2 buffers) for 4 s. Device cuda:7 of rank 1 has not begun it: its last call was all_reduce #4 (f32, 4096, sum), \
         done 8 s ago."
    );
    // Of what was not read, only for whom it waits is known.
    for device in all.ranks.iter_mut().flat_map(|rank| &mut rank.devices) {
        device.gpu = None;
    }
    all.ranks[0].devices[1].waits = None;
    all.ranks[1].devices[0].waits = None;
    assert_eq!(
        told(&all),
        "Device cuda:6 of rank 0 waits in its call #5 for cuda:7 of rank 1, which has not made it."
    );
}

#[test]
fn the_call_that_gpus_hang_in_is_named_and_who_has_not_begun_it() {
    let inside = Some(call(812, 12, false));
    let mut all = on_gpus(&[inside, inside, Some(call(811, 14, true)), inside]);
    all.ranks[0].gpu_waits = Some(GpuWait { work: GpuWork::Call(812), peer: 2 });
    assert_eq!(
        why(&all),
        "Ranks 0–3 are outside of unisono, computing perhaps: their last call was barrier #811, done 12 s ago. The GPUs of \
         ranks 0, 1 and 3 have been in all_reduce #812 (f32, 4096, sum) for 12 s. The GPU of rank 2 has not begun it: its last \
         call was all_reduce #811 (f32, 4096, sum), done 13 s ago."
    );
    for (made, tells) in [
        (811, "done 13 s ago; its process has not called it."),
        (812, "done 13 s ago; its process has called it, and it waits in a stream behind other work."),
    ] {
        all.ranks[2].gpu.as_mut().unwrap().made = Some(made);
        assert!(told(&all).ends_with(tells), "{}", told(&all));
    }
    let all = on_gpus(&[inside, Some(call(811, 14, false))]);
    assert!(told(&all).ends_with(
        "The GPU of rank 1 has not begun it: it has been in all_reduce #811 (f32, 4096, sum) for 14 s."
    ));
    let mut all = on_gpus(&[inside, inside]);
    all.ranks[1].gpu.as_mut().unwrap().calls.clear();
    assert!(
        told(&all).ends_with("The GPU of rank 1 has not begun it, nor any call before."),
        "{}",
        told(&all)
    );
}

#[test]
fn calls_of_gpus_that_differ_or_that_all_are_in_are_told() {
    let inside = call(812, 12, false);
    let other = GpuCall { header: CallHeader::bare(Kind::Barrier), begun: S(3), ..inside };
    let text = told(&on_gpus(&[Some(inside), Some(inside), Some(other)]));
    assert_eq!(
        text,
        "The GPUs of ranks 0 and 1 have been in all_reduce #812 (f32, 4096, sum) for 12 s. The GPU of rank 2 has called barrier \
         #812 instead, 3 s ago; all ranks must make the same calls in the same order."
    );
    let met = Some(GpuCall { met: Some(S(11)), ..inside });
    let text = told(&on_gpus(&[met, met, Some(call(812, 12, true)), Some(call(813, 1, false))]));
    assert_eq!(
        text,
        "The GPU of rank 3 has been in all_reduce #813 (f32, 4096, sum) for 1 s. The GPUs of ranks 0 and 1 have not begun it: \
         they have been in all_reduce #812 (f32, 4096, sum) for 12 s. The GPU of rank 2 has not begun it: its last call was \
         all_reduce #812 (f32, 4096, sum), done 11 s ago."
    );
    let text = told(&on_gpus(&[met, met, Some(call(812, 12, true))]));
    assert_eq!(
        text,
        "The GPUs of ranks 0 and 1 have been in all_reduce #812 (f32, 4096, sum) for 12 s, which all ranks have begun. The GPU of \
         rank 2 has done its part of it, 11 s ago."
    );
}

#[test]
fn epochs_that_wrap_keep_their_order() {
    let text = told(&on_gpus(&[Some(call(0, 12, false)), Some(call(u32::MAX, 14, true))]));
    assert!(
        text.starts_with("The GPU of rank 0 has been in all_reduce #0 (f32, 4096, sum) for 12 s."),
        "{text}"
    );
}

#[test]
fn a_rank_that_does_not_answer_is_said_unless_its_process_says_why() {
    let all = on_gpus(&[Some(call(7, 5, false)), None, None, None]);
    let all = with(all, 2, |rank| rank.process = Process::Stopped);
    let mut all = with(all, 3, |rank| rank.process = Process::Ended);
    let expected = "The GPU of rank 0 has been in all_reduce #7 (f32, 4096, sum) for 5 s. The GPU of rank 1 was not read: its \
                    process did not answer.";
    assert_eq!(told(&all), expected);
    // What was known of it earlier is not told as what it does now; what its kernel says of its wait is.
    let stale = GpuView {
        reading: Reading::Earlier,
        made: None,
        calls: vec![call(6, 100, false)],
        messages: Vec::new(),
    };
    (all.ranks[1].gpu, all.ranks[1].gpu_waits) =
        (Some(stale), Some(GpuWait { work: GpuWork::Call(7), peer: 0 }));
    let waits = " The GPU of rank 1 waits in its call #7 for that of rank 0, which has not made it.";
    assert_eq!(told(&all), expected.to_owned() + waits);
}

#[test]
fn after_a_failure_it_is_told_what_gpus_were_in() {
    let mut all = on_gpus(&[Some(call(7, 5, false)), Some(call(7, 5, false)), Some(call(6, 9, true))]);
    all.ranks.iter_mut().for_each(|rank| rank.gpu.as_mut().unwrap().reading = Reading::Last);
    let sentence = "rank 2 (host vm, pid 4121) died during call #7 on its GPU: its socket closed".to_owned();
    all.failure = Some(super::super::snapshot::Failure { found_by: 0, sentence });
    let text = why(&all);
    assert!(
        text.ends_with(
            "The GPUs of ranks 0 and 1 were in all_reduce #7 (f32, 4096, sum), begun 5 s ago, when it failed."
        ),
        "{text}"
    );
}

#[test]
fn gpus_that_are_busy_do_not_wait() {
    let busy =
        |number| Some(GpuCall { begun: Duration::from_millis(3), ended: None, ..call(number, 1, false) });
    let all = on_gpus(&[busy(7), busy(7), Some(call(7, 100, true))]);
    let text = why(&all);
    assert!(text.starts_with("No rank waits."), "{text}");
    assert!(text.ends_with("The GPUs of ranks 0 and 1 make calls: the latest were all_reduce #7."), "{text}");
    assert_eq!(gpus(&on_gpus(&[Some(call(7, 100, true))])), (Vec::new(), false));
}

#[test]
fn a_message_that_hangs_is_told_with_what_the_other_side_has_done() {
    let message = |number, tag, is_sent, peer, begun, ended: Option<u64>| GpuMessage {
        is_sent,
        peer,
        number,
        header: MessageHeader { tag, dtype: Some(DType::F32), kind: 0, bytes: 4096 },
        begun: Duration::from_secs(begun),
        ended: ended.map(Duration::from_secs),
    };
    let view = |messages| Some(GpuView { reading: Reading::Now, made: None, calls: Vec::new(), messages });
    let mut all = snapshot(vec![behind(), behind()]);
    all.ranks[0].gpu = view(vec![message(5, 7, true, 1, 12, None)]);
    all.ranks[0].gpu_waits = Some(GpuWait { work: GpuWork::Send(7), peer: 1 });
    all.ranks[1].gpu = view(Vec::new());
    let waits = "The GPU of rank 0 has waited in send to rank 1 (tag 7) of f32, 1024, tag 7 for 12 s";
    assert_eq!(told(&all), format!("{waits}; rank 1 has received none."));
    all.ranks[1].gpu = view(vec![message(4, 6, false, 0, 14, Some(13))]);
    let last = "rank 1 has received 4, the last one (f32, 1024, tag 6) 13 s ago";
    assert_eq!(told(&all), format!("{waits}, which is their message 5; {last}."));
    all.ranks[1].gpu = view(vec![message(5, 7, false, 0, 1, None)]);
    assert_eq!(told(&all), format!("{waits}; rank 1 has begun its side."));
    all.ranks[0].gpu_waits = Some(GpuWait { work: GpuWork::Recv(3), peer: 2 });
    let any = "The GPU of rank 0 has waited in recv from any rank (tag 3); no rank's next message to it has that tag.";
    assert_eq!(told(&all), any);
}
