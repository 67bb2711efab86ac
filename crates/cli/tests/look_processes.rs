//! `unisono why`, `top` and `dump` over jobs that hang on purpose, and what `unisono run` says of them at the end.
//!
//! The ranks are this program itself, which then does what the example `hang` does.

#[path = "../../comm/examples/hang.rs"]
#[allow(dead_code)] // its `main` reads the command line, which is the harness's here
mod hang;

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Set for a rank: the way to hang.
const WAY: &str = "TEST_HANG_WAY";
/// A hanging job ends by itself, whatever the test does.
const GUARD: &str = "--timeout=60s";
const PATIENCE: Duration = Duration::from_secs(40);

/// Not a test but a rank, when the variable is set.
#[test]
fn hang_as_a_rank() {
    if let Ok(way) = std::env::var(WAY) {
        hang::run(&way).unwrap();
    }
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_unisono"));
    command.args(arguments).stdin(Stdio::null());
    command
}

/// A job whose ranks hang; ended with the guard.
struct Job(Child);

impl Job {
    fn start(way: &str, ranks: usize, options: &[&str]) -> Self {
        let mut run = command(&["run", "-n", &ranks.to_string(), "--grace=20s"]);
        let this = std::env::current_exe().unwrap();
        run.args(options).arg("--").arg(this).args(["--exact", "hang_as_a_rank", "--nocapture"]);
        run.env(WAY, way).stdout(Stdio::null()).stderr(Stdio::piped());
        Self(run.spawn().unwrap())
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }

    /// What `unisono <arguments> <pid of the job>` prints once it says `wanted`.
    fn ask(&self, arguments: &[&str], wanted: &[&str]) -> String {
        let start = Instant::now();
        let pid = self.pid();
        loop {
            let output = command(&[arguments, &[&pid]].concat()).output().unwrap();
            let text = text(&output);
            if output.status.success() && wanted.iter().all(|wanted| text.contains(wanted)) {
                return text;
            }
            assert!(start.elapsed() < PATIENCE, "wanted {wanted:?}, but {arguments:?} says: {text}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // The ranks die with it.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn why_names_a_stopped_rank_and_what_continues_it_and_that_helps() {
    let job = Job::start("stop", 3, &[GUARD]);
    let said = job.ask(&["why"], &["is stopped (SIGSTOP)", "Ranks 0 and 1 have waited"]);
    assert!(said.contains("Ranks 0 and 1 have waited in all_reduce #7 (f32, 4096, sum) for"), "{said}");
    assert!(said.contains(") has not begun it: its last call was barrier #6, done "), "{said}");
    let advice = said.rsplit_once("Continue it with ").unwrap().1.trim_end().trim_end_matches('.');
    let mut words = advice.split(' ');
    assert_eq!((words.next(), words.next()), (Some("kill"), Some("-CONT")));
    let pid: i32 = words.next().unwrap().parse().unwrap();
    let top = job.ask(&["top", "--once"], &["stopped"]);
    assert!(top.contains(&pid.to_string()) && top.contains("waiting"), "{top}");
    let top: Value = serde_json::from_str(&job.ask(&["top", "--json"], &["\"stopped\""])).unwrap();
    assert_eq!(top[0]["ranks"][0]["waits_for"], serde_json::json!([2]));
    assert_eq!(top[0]["ranks"][2]["pid"], pid);
    let rank = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(rank, rustix::process::Signal::CONT).unwrap();
    // After it the last rank has left out a call: that is told, too.
    job.ask(
        &["why"],
        &["This communicator has failed: ", "all_reduce #7 on rank", "barrier #7 on rank 2", " met "],
    );
}

#[test]
fn why_explains_every_way_to_hang() {
    let ways: [(&str, &[&str]); 5] = [
        (
            "sleep",
            &[
                "Ranks 0 and 1 have waited in all_reduce #7 (f32, 4096, sum) for",
                ") has not begun it: its last call was barrier #6, done",
                "A debugger shows what it does instead: gdb -p ",
            ],
        ),
        (
            "skip",
            &[
                "Ranks 0 and 1 have waited in all_reduce #7 (f32, 4096, sum) for",
                "Rank 2 has not begun it: it has waited in recv from rank 0 (f32, 4096, tag 1) for",
                "rank 0 has sent it nothing.",
                "Rank 0 waits for rank 2 and rank 2 for rank 0: none of them can go on.",
            ],
        ),
        (
            "other",
            &[
                "This communicator has failed: ",
                "met ",
                "All ranks must make the same calls in the same order.",
            ],
        ),
        (
            "message",
            &[
                "has waited in recv from rank 2 (f32, 4, tag 5) for",
                "what rank 2 sent it last has tag 6, sent ",
                "Ranks 1 and 2 have waited in barrier #7 for",
                "Rank 0 waits for rank 2 and rank 2 for rank 0: none of them can go on.",
            ],
        ),
        (
            "circle",
            &["Rank 0 waits for rank 1, rank 1 for rank 2 and rank 2 for rank 0: none of them can go on."],
        ),
    ];
    for (way, wanted) in ways {
        Job::start(way, 3, &[GUARD]).ask(&["why"], wanted);
    }
}

#[test]
fn dump_lists_the_calls_of_every_rank_and_writes_a_trace() {
    let job = Job::start("sleep", 2, &[GUARD]);
    let dump = job.ask(&["dump"], &["all_reduce #7 (f32, 4096, sum) waits for rank 1"]);
    for call in ["the start of the job", "all_reduce #1 (f32, 4096, avg)", "barrier #6"] {
        assert_eq!(dump.matches(call).count(), 2, "{call}: {dump}");
    }
    assert!(dump.lines().all(|line| line.chars().count() <= 120), "{dump}");
    let folder = tempfile::tempdir().unwrap();
    let (trace, json) = (folder.path().join("trace.json"), folder.path().join("dump.json"));
    let (trace_option, json_option) =
        (format!("--trace={}", trace.display()), format!("--json={}", json.display()));
    assert_eq!(job.ask(&["dump", &trace_option, &json_option], &[]), "");
    let read = |path| serde_json::from_slice::<Value>(&std::fs::read(path).unwrap()).unwrap();
    let dump = read(json);
    let calls = dump[0]["ranks"][0]["calls"].as_array().unwrap();
    let last = calls.last().unwrap();
    assert_eq!((calls.len(), &last["state"], &last["number"]), (8, &"open".into(), &7.into()));
    assert_eq!((&last["bytes"], &last["dtype"], &last["op"]), (&16_384.into(), &"f32".into(), &"sum".into()));
    let trace = read(trace);
    let events = trace["traceEvents"].as_array().unwrap();
    let drawn: Vec<&Value> = events.iter().filter(|event| event["ph"] == "X").collect();
    assert_eq!(drawn.len(), 8 + 7);
    assert!(
        drawn.iter().all(|event| event["ts"].as_f64() >= Some(0.0) && event["dur"].as_f64() >= Some(0.0))
    );
}

#[test]
fn after_the_timeout_run_says_why_and_what_each_rank_did_last() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("report.json");
    let mut job = Job::start("sleep", 3, &["--timeout=10s", &format!("--json={}", path.display())]);
    let mut stderr = String::new();
    job.0.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!(job.0.wait().unwrap().code(), Some(124), "{stderr}");
    let said: Vec<&str> = stderr.lines().filter_map(|line| line.strip_prefix("unisono: ")).collect();
    assert_eq!(said.len(), 4, "{stderr}");
    assert!(said[0].starts_with("the job is not done after --timeout 10 s"), "{stderr}");
    assert!(
        said[1].starts_with("Ranks 0 and 1 have waited in all_reduce #7 (f32, 4096, sum) for"),
        "{stderr}"
    );
    assert_eq!(
        said[2],
        "last calls: ranks 0 and 1 were in all_reduce #7 (f32, 4096, sum); rank 2 had done barrier #6.",
        "{stderr}"
    );
    let report: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let last = |rank: usize| &report["ranks"][rank]["last_call"];
    assert_eq!(
        (&last(0)["text"], &last(0)["state"]),
        (&"all_reduce #7 (f32, 4096, sum)".into(), &"open".into())
    );
    assert_eq!((&last(2)["operation"], &last(2)["state"]), (&"barrier".into(), &"done".into()));
    assert_eq!(last(1)["waits_for"], serde_json::json!([2]));
}

#[test]
fn after_a_death_run_says_what_each_rank_did_last() {
    let mut job = Job::start("sleep", 3, &[GUARD]);
    let top: Value =
        serde_json::from_str(&job.ask(&["top", "--json"], &["\"computing\"", "\"waiting\""])).unwrap();
    let pid = top[0]["ranks"][2]["pid"].as_i64().unwrap() as i32;
    let rank = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(rank, rustix::process::Signal::KILL).unwrap();
    let mut stderr = BufReader::new(job.0.stderr.take().unwrap()).lines();
    let mut next =
        |wanted: &str| stderr.find_map(|line| line.ok().filter(|line| line.contains(wanted))).unwrap();
    next("died during all_reduce #7: its ");
    let why = job.ask(&["why"], &["This communicator has failed: rank 2", "its process has ended"]);
    assert!(why.contains("have failed in all_reduce #7 (f32, 4096, sum)"), "{why}");
    // The ranks stay to be looked at; the person who has seen enough ends them.
    let run = rustix::process::Pid::from_child(&job.0);
    rustix::process::kill_process(run, rustix::process::Signal::TERM).unwrap();
    let last = next("last calls: ");
    assert_eq!(
        last.trim_start_matches("unisono: "),
        "last calls: ranks 0 and 1 failed in all_reduce #7 (f32, 4096, sum); rank 2 had done barrier #6."
    );
    assert_eq!(job.0.wait().unwrap().code(), Some(137));
}

#[test]
fn where_there_is_nothing_to_look_at_that_is_said() {
    let ask = |arguments: &[&str]| {
        let output = command(arguments).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    // Not of this process, whose other tests may have started jobs.
    let mut stranger = Command::new("sleep").arg("60").spawn().unwrap();
    let (_, said) = ask(&["why", &stranger.id().to_string()]);
    let ended = stranger.kill().and_then(|()| stranger.wait());
    assert_eq!(said, format!("unisono: process {} has no communicator.\n", stranger.id()));
    assert!(ended.is_ok());
    assert_eq!(ask(&["top", "4294967295"]).1, "unisono: there is no process 4294967295.\n");
    let (code, said) = ask(&["dump", "no-such-job"]);
    assert_eq!(said, "unisono: nothing here is called no-such-job; `unisono top` lists all jobs.\n");
    assert_eq!(code, Some(1));
}
