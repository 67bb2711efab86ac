//! Tests of what is said of ranks whose calls are on GPUs, from snapshots that nobody took.

use unisono::recorder::{CallHeader, GpuWait, GpuWork};
use unisono::{DType, Kind, ReduceOp};

use super::super::trace::Trace;
use super::*;

fn call(number: u32, begun_ms: u64, ended_ms: Option<u64>) -> GpuCall {
    let kind = Kind::AllReduce { op: ReduceOp::Sum };
    GpuCall {
        number,
        header: CallHeader { dtype: Some(DType::BF16), count: 1 << 20, ..CallHeader::bare(kind) },
        form: Some(unisono::Form::Bulk),
        blocks: 8,
        begun: Duration::from_millis(begun_ms),
        met: ended_ms.map(Duration::from_millis),
        ended: ended_ms.map(Duration::from_millis),
    }
}

fn snapshot(reading: Reading, calls: Vec<GpuCall>, gpu_waits: Option<GpuWait>) -> Snapshot {
    let rank = RankView {
        rank: 0,
        pid: 4121,
        started: 1,
        presence: Presence::Here,
        process: Process::Running,
        is_recording: true,
        records: Vec::new(),
        gpu_waits,
        devices: Vec::new(),
        gpu: Some(GpuView { reading, made: None, calls, messages: Vec::new() }),
    };
    Snapshot {
        job: "run-1".into(),
        generation: 0,
        host: "gpu07".into(),
        age: Duration::from_secs(100),
        failure: None,
        ranks: vec![rank],
    }
}

fn state(snapshot: &Snapshot) -> RankState {
    RankState::all(snapshot).remove(0)
}

#[test]
fn calls_on_a_gpu_are_what_a_rank_does_where_its_host_does_nothing() {
    let done = vec![call(6, 300, Some(200)), call(7, 200, Some(100))];
    let busy = state(&snapshot(Reading::Now, done.clone(), None));
    let shown = busy.call.as_ref().unwrap();
    assert_eq!((busy.state, shown.device, shown.number), ("running", "gpu", Some(7)));
    assert_eq!(shown.text, "all_reduce #7 (bf16, 1048576, sum)");
    // Two calls of 2 MiB within 0.3 s.
    assert!((busy.calls_per_second - 2.0 / 0.3).abs() < 1e-9, "{}", busy.calls_per_second);
    assert!((busy.gigabytes_per_second - (4 << 20) as f64 / 0.3 / 1e9).abs() < 1e-9);
    let waits = Some(GpuWait { work: GpuWork::Call(8), peer: 3 });
    let waiting = state(&snapshot(Reading::Now, [done.clone(), vec![call(8, 9000, None)]].concat(), waits));
    assert_eq!((waiting.state, waiting.waits_for), ("waiting", vec![3]));
    assert_eq!(waiting.since_seconds, Some(9.0));
    // What is not of now tells nothing about now.
    let silent = state(&snapshot(Reading::Earlier, done, None));
    assert_eq!((silent.state, silent.call, silent.calls_per_second), ("computing", None, 0.0));
}

#[test]
fn traces_have_a_line_for_calls_on_gpus() {
    let snapshot = snapshot(Reading::Now, vec![call(6, 300, Some(200)), call(7, 150, None)], None);
    let trace = serde_json::to_value(Trace::new([(&snapshot, Duration::ZERO)].into_iter())).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let lines: Vec<_> = events.iter().filter(|event| event["name"] == "thread_name").collect();
    assert_eq!(lines[2]["args"]["name"], "calls on the GPU of run-1");
    let calls: Vec<_> = events.iter().filter(|event| event["ph"] == "X").collect();
    let places = calls.iter().map(|call| (call["name"].as_str().unwrap(), call["tid"].as_u64().unwrap()));
    assert_eq!(places.collect::<Vec<_>>(), [("all_reduce #6", 2), ("all_reduce #7", 2)]);
    let times = calls.iter().map(|call| (call["ts"].as_f64().unwrap(), call["dur"].as_f64().unwrap()));
    assert_eq!(
        times.map(|(ts, dur)| (ts.round(), dur.round())).collect::<Vec<_>>(),
        [(0.0, 1e5), (1.5e5, 1.5e5)]
    );
    assert_eq!(calls[0]["args"]["device"], "gpu");
}
