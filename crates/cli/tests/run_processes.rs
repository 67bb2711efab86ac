//! `unisono run` with real processes: what ranks are told, what comes out, who ends when, and what is left.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::IpAddr;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, waitid};
use unisono::launch::{Launch, Launcher, StoreAddress, read_secret};
use unisono::store::{Store, TcpStore};
use unisono::{Deadline, Secret};

/// No test hangs: a job that does not end by itself ends with code 124, which no test expects by accident.
const GUARD: &str = "--timeout=60s";

fn job(ranks: usize, options: &[&str], program: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_unisono"));
    command.args(["run", "-n", &ranks.to_string()]);
    if !options.iter().any(|option| option.starts_with("--timeout")) {
        command.arg(GUARD);
    }
    command.args(options).arg("--").args(program);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs a shell script as `ranks` ranks to its end.
fn run(ranks: usize, options: &[&str], script: &str) -> Output {
    job(ranks, options, &["/bin/sh", "-c", script]).output().unwrap()
}

fn start(ranks: usize, options: &[&str], script: &str) -> (Child, BufReader<ChildStdout>) {
    let mut child = job(ranks, options, &["/bin/sh", "-c", script]).spawn().unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    (child, stdout)
}

/// The next `count` lines, sorted.
fn lines(reader: &mut impl BufRead, count: usize) -> Vec<String> {
    let mut lines: Vec<String> = reader.lines().take(count).map(Result::unwrap).collect();
    lines.sort();
    lines
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn send(child: &Child, signal: Signal) {
    rustix::process::kill_process(Pid::from_child(child), signal).unwrap();
}

/// The last word of each line, as pids.
fn pids(lines: &[String]) -> Vec<Pid> {
    let number = |line: &String| line.rsplit(' ').next().unwrap().parse().unwrap();
    lines.iter().map(|line| Pid::from_raw(number(line)).unwrap()).collect()
}

/// True if the process has ended, or does within ten seconds.
fn ends(pid: Pid) -> bool {
    match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Err(Errno::SRCH) => true,
        Err(errno) => panic!("pidfd_open({pid:?}): {errno}"),
        Ok(pidfd) => {
            let mut polled = [PollFd::new(&pidfd, PollFlags::IN)];
            poll(&mut polled, Some(&Timespec { tv_sec: 10, tv_nsec: 0 })).unwrap() == 1
        }
    }
}

#[test]
fn every_rank_gets_its_variables_and_none_of_other_launchers() {
    let output = job(3, &[], &["/usr/bin/env"])
        .env("OMPI_COMM_WORLD_RANK", "7")
        .env("PMI_RANK", "7")
        .env("SLURM_PROCID", "7")
        .env("TORCHELASTIC_RUN_ID", "x")
        .env("UNISONO_GENERATION", "9")
        .env("KEPT", "yes")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let mut ranks: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for line in text(&output.stdout).lines() {
        let (rank, variable) = line.split_once("] ").unwrap();
        let (name, value) = variable.split_once('=').unwrap();
        ranks.entry(rank.trim_start_matches('[').to_owned()).or_default().insert(name.into(), value.into());
    }
    assert_eq!(ranks.keys().collect::<Vec<_>>(), ["0", "1", "2"]);
    for (rank, variables) in &ranks {
        let value = |name: &str| variables.get(name).map(String::as_str);
        assert_eq!((value("RANK"), value("LOCAL_RANK")), (Some(rank.as_str()), Some(rank.as_str())));
        assert_eq!((value("WORLD_SIZE"), value("LOCAL_WORLD_SIZE")), (Some("3"), Some("3")));
        assert_eq!((value("MASTER_ADDR"), value("KEPT")), (Some("127.0.0.1"), Some("yes")));
        assert!(value("MASTER_PORT").unwrap().parse::<u16>().unwrap() > 0);
        assert!(value("UNISONO_STORE").unwrap().starts_with("tcp://127.0.0.1:"));
        assert!(!value("UNISONO_STORE").unwrap().ends_with(value("MASTER_PORT").unwrap()));
        for name in ["UNISONO_JOB", "UNISONO_STORE", "MASTER_PORT"] {
            assert_eq!(
                value(name),
                ranks["0"].get(name).map(String::as_str),
                "{name} is the same on all ranks"
            );
        }
        for name in
            ["OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "TORCHELASTIC_RUN_ID", "UNISONO_GENERATION"]
        {
            assert_eq!(value(name), None, "{name}");
        }
    }
}

/// Runs itself as the ranks: what they detect and read is what `run` meant.
#[test]
fn ranks_detect_the_launch_and_meet_in_the_store_with_the_same_secret() {
    let lookup = |name: &str| std::env::var(name).ok();
    if lookup("TEST_IS_RANK").is_some() {
        let launch = Launch::from_env().unwrap();
        assert_eq!(launch.launcher, Launcher::UnisonoRun);
        assert!(!launch.serves_store());
        let StoreAddress::Tcp { host, port } = &launch.store else { panic!("{}", launch.store) };
        let secret = read_secret(&lookup).unwrap().unwrap();
        assert_eq!(read_secret(&lookup).unwrap().unwrap().expose(), secret.expose());
        let deadline = Deadline::after(Duration::from_secs(30));
        let address = (host.parse::<IpAddr>().unwrap(), *port).into();
        let store = TcpStore::connect(address, &secret, deadline).unwrap();
        let (rank, world_size) = (launch.member.rank(), launch.member.world_size());
        let name = |rank: u32| format!("rank {rank}");
        store.set(&name(rank), &[rank as u8], deadline).unwrap();
        for peer in 0..world_size {
            assert_eq!(store.get(&name(peer), deadline).unwrap(), [peer as u8]);
        }
        let stranger = TcpStore::connect(address, &Secret::new([0; 32]), deadline).unwrap_err();
        assert!(matches!(stranger, unisono::Error::Core(_)), "{stranger}");
        writeln!(std::io::stdout(), "rank-{rank}-of-{world_size} {:?}", secret.expose()).unwrap();
        return;
    }
    let myself = std::env::current_exe().unwrap();
    let name = "ranks_detect_the_launch_and_meet_in_the_store_with_the_same_secret";
    let program = [myself.to_str().unwrap(), "--exact", name, "--nocapture"];
    let output = job(4, &[], &program).env("TEST_IS_RANK", "1").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}{}", text(&output.stdout), text(&output.stderr));
    let stdout = text(&output.stdout);
    let said: BTreeMap<&str, &str> =
        stdout.lines().filter_map(|line| line[line.find("rank-")?..].split_once(' ')).collect();
    let ranks: Vec<&str> = said.keys().copied().collect();
    assert_eq!(ranks, ["rank-0-of-4", "rank-1-of-4", "rank-2-of-4", "rank-3-of-4"]);
    assert!(said.values().all(|secret| *secret == said["rank-0-of-4"]));
}

#[test]
fn the_secret_is_readable_by_ranks_and_nowhere_in_environment_or_arguments() {
    let script = "echo secret $(od -An -v -tx1 /proc/self/fd/$UNISONO_SECRET_FD | tr -d ' \\n')
        cat /proc/self/environ /proc/self/cmdline /proc/$PPID/environ /proc/$PPID/cmdline | od -An -v -tx1 | tr -d ' \\n'
        echo";
    let output = run(2, &[], script);
    let stdout = text(&output.stdout);
    let secrets: Vec<&str> =
        stdout.lines().filter_map(|line| line.split_once(" secret ")).map(|pair| pair.1).collect();
    assert_eq!((secrets.len(), secrets[0].len()), (2, 64), "{stdout}");
    assert_eq!(secrets[0], secrets[1]);
    let dumps: Vec<&str> = stdout.lines().filter(|line| !line.contains("secret")).collect();
    assert_eq!(dumps.len(), 2);
    let as_text: String = secrets[0].bytes().map(|byte| format!("{byte:02x}")).collect();
    for dump in dumps {
        assert!(dump.len() > 500, "the environment was read");
        assert!(!dump.contains(secrets[0]), "raw");
        assert!(!dump.contains(&as_text), "as hex digits");
    }
}

#[test]
fn ten_thousand_lines_of_four_ranks_come_out_whole_and_in_order() {
    // Each line is written in two pieces, so that a pipe may deliver half of one.
    let script = "i=0; while [ $i -lt 10000 ]; do printf \"line $i \"; echo of rank $RANK; i=$((i+1)); done; \
                  echo problem $RANK >&2; printf 'no end'";
    let output = run(4, &[], script);
    assert_eq!(output.status.code(), Some(0));
    let mut seen = [0_usize; 4];
    let stdout = text(&output.stdout);
    for line in stdout.lines() {
        let rank: usize = line[1..2].parse().unwrap();
        let expected = match seen[rank] {
            10_000 => format!("[{rank}] no end"),
            number => format!("[{rank}] line {number} of rank {rank}"),
        };
        assert_eq!(line, expected);
        seen[rank] += 1;
    }
    assert_eq!(seen, [10_001; 4]);
    assert!(stdout.ends_with('\n'));
    assert_eq!(
        lines(&mut output.stderr.as_slice(), 9),
        [0, 1, 2, 3].map(|rank| format!("[{rank}] problem {rank}"))
    );
}

#[test]
fn bytes_that_are_no_text_pass_through() {
    let output = run(1, &[], "printf '\\377\\000\\033[31m\\n'");
    assert_eq!(output.stdout, b"[0] \xff\0\x1b[31m\n");
}

#[test]
fn rank_zero_reads_the_input() {
    let mut child = job(3, &[], &["/bin/cat"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"one\ntwo\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("[0] one\n[0] two\n", Some(0)));
}

#[test]
fn the_first_failure_decides_and_the_survivors_are_ended() {
    let script = "echo pid $$; [ $RANK = 2 ] || exec sleep 1000; exit 3";
    let output = run(4, &["--grace=100ms"], script);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    let told: Vec<&str> = stderr.lines().collect();
    assert_eq!(told.len(), 2, "{stderr}");
    assert!(told[0].starts_with("unisono: rank 2 (pid ") && told[0].contains(") exited with code 3 after "));
    assert!(told[0].ends_with(". Ranks 0, 1, 3 have 0.1 s to end."), "{stderr}");
    assert_eq!(
        told[1],
        "unisono: the job failed: rank 2 exited with code 3 first; ranks 0, 1, 3 were ended by SIGTERM. Exit code 3."
    );
    let pids = pids(&lines(&mut output.stdout.as_slice(), 4));
    assert!(pids.into_iter().all(ends));
}

#[test]
fn survivors_that_end_by_themselves_are_heard() {
    let script = "[ $RANK = 1 ] && kill -9 $$; cat; echo my peer died >&2; exit 5";
    let mut child =
        job(2, &["--grace=30s"], &["/bin/sh", "-c", script]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let told = lines(&mut stderr, 1);
    assert!(told[0].contains(") was killed by SIGKILL (out of memory?) after "), "{told:?}");
    assert!(told[0].ends_with(". Rank 0 has 30 s to end."), "{told:?}");
    drop(child.stdin.take());
    let expected = "unisono: the job failed: rank 1 was killed by SIGKILL (out of memory?) first; rank 0 exited with \
                    code 5. Exit code 137.";
    assert_eq!(lines(&mut stderr, 3), ["[0] my peer died", expected]);
    assert_eq!(child.wait().unwrap().code(), Some(137));
}

#[test]
fn what_a_failed_rank_started_is_ended_with_it() {
    let (mut child, mut stdout) = start(1, &[], "sleep 1000 & echo helper $!; exit 4");
    let helper = pids(&lines(&mut stdout, 1));
    assert_eq!(child.wait().unwrap().code(), Some(4));
    assert!(ends(helper[0]));
}

#[test]
fn a_rank_that_ignores_sigterm_is_killed() {
    let script = "trap '' TERM; echo pid $$; [ $RANK = 0 ] && { cat; exit 1; }; while :; do sleep 0.05; done";
    let mut child =
        job(2, &["--grace=0s"], &["/bin/sh", "-c", script]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let ranks = pids(&lines(&mut stdout, 2));
    drop(child.stdin.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let stderr = text(&output.stderr);
    assert!(stderr.lines().next().unwrap().ends_with(". Ending rank 1."), "{stderr}");
    assert!(stderr.contains("rank 1 did not end within 2 s of SIGTERM and was killed"), "{stderr}");
    assert!(ranks.into_iter().all(ends));
}

#[test]
fn with_continue_the_survivors_finish_their_work() {
    // Rank 1 ends only when rank 0 is gone for sure: `run` says so, and the test then lets rank 1 go.
    let script = "[ $RANK = 1 ] && exit 6; cat >/dev/null; echo finished";
    let mut child =
        job(2, &["--on-failure=continue"], &["/bin/sh", "-c", script]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let told = lines(&mut stderr, 1);
    assert!(told[0].ends_with("Rank 0 goes on (--on-failure=continue)."), "{told:?}");
    drop(child.stdin.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("[0] finished\n", Some(6)));
    let expected = "unisono: the job failed: rank 1 exited with code 6 first; rank 0 succeeded. Exit code 6.";
    assert_eq!(lines(&mut stderr, 2), [expected]);
}

#[test]
fn the_timeout_ends_the_job_with_124() {
    let output = run(2, &["--timeout=200ms"], "echo pid $$; exec sleep 1000");
    assert_eq!(output.status.code(), Some(124));
    let expected = "unisono: the job is not done after --timeout 0.2 s; ending ranks 0, 1.\n\
                    unisono: the job timed out: ranks 0, 1 were ended by SIGTERM. Exit code 124.\n";
    assert_eq!(text(&output.stderr), expected);
    assert!(pids(&lines(&mut output.stdout.as_slice(), 2)).into_iter().all(ends));
}

#[test]
fn the_timeout_holds_even_if_nobody_reads_the_output() {
    let (mut child, mut stdout) = start(1, &["--timeout=300ms"], "exec yes");
    assert!(ends(Pid::from_child(&child)), "our pipe is full and stays so");
    assert_eq!(child.wait().unwrap().code(), Some(124));
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert!(rest.starts_with("[0] y\n[0] y\n"));
}

#[test]
fn signals_reach_every_rank_once_and_their_exit_codes_count() {
    let script =
        "trap 'echo USR1' USR1; trap 'echo TERM; exit 7' TERM; echo ready; while :; do sleep 0.02; done";
    let (mut child, mut stdout) = start(3, &[], script);
    assert_eq!(lines(&mut stdout, 3), ["[0] ready", "[1] ready", "[2] ready"]);
    send(&child, Signal::USR1);
    assert_eq!(lines(&mut stdout, 3), ["[0] USR1", "[1] USR1", "[2] USR1"]);
    send(&child, Signal::TERM);
    assert_eq!(lines(&mut stdout, 4), ["[0] TERM", "[1] TERM", "[2] TERM"]);
    assert_eq!(child.wait().unwrap().code(), Some(7));
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    let expected = "unisono: SIGTERM handed on to ranks 0–2; once more ends the job.\n\
                    unisono: the job ended after SIGTERM: ranks 0–2 exited with code 7. Exit code 7.\n";
    let told: String =
        stderr.lines().filter(|line| line.starts_with("unisono")).map(|line| format!("{line}\n")).collect();
    assert_eq!(told, expected);
}

#[test]
fn the_second_interrupt_ends_ranks_that_ignore_the_first() {
    let (mut child, mut stdout) = start(2, &[], "trap '' INT; echo ready; exec sleep 1000");
    lines(&mut stdout, 2);
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    send(&child, Signal::INT);
    assert_eq!(lines(&mut stderr, 1), ["unisono: SIGINT handed on to ranks 0, 1; once more ends the job."]);
    send(&child, Signal::INT);
    assert_eq!(child.wait().unwrap().code(), Some(143));
    let expected = "unisono: the job ended after SIGINT: ranks 0, 1 were ended by SIGTERM. Exit code 143.";
    assert_eq!(lines(&mut stderr, 2), [expected]);
}

#[test]
fn an_ignored_hangup_stays_ignored() {
    let script = format!(
        "trap '' HUP; exec {} run -n 1 {GUARD} -- sh -c 'kill -HUP $PPID; echo alive'",
        env!("CARGO_BIN_EXE_unisono")
    );
    let output = Command::new("/bin/sh").args(["-c", &script]).output().unwrap();
    assert_eq!((text(&output.stdout).as_str(), text(&output.stderr).as_str()), ("[0] alive\n", ""));
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_stopped_job_stops_its_ranks_and_goes_on_with_them() {
    // The shell waits without forking: one that is stopped between fork and exec would not look stopped.
    let script = "trap 'echo on; kill $!; exit 0' CONT; sleep 1000 & echo pid $$; wait";
    let (mut child, mut stdout) = start(1, &[], script);
    let rank = pids(&lines(&mut stdout, 1))[0];
    send(&child, Signal::TSTP);
    let run = WaitId::Pid(Pid::from_child(&child));
    assert!(waitid(run, WaitIdOptions::STOPPED).unwrap().unwrap().stopped());
    let state = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", rank.as_raw_pid())).unwrap();
        stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
    };
    // The rank got its signal before; when it acts on it is for the scheduler to say, and nothing announces it.
    let deadline = Instant::now() + Duration::from_secs(10);
    while state() != 'T' && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    let stopped = state();
    send(&child, Signal::CONT);
    assert_eq!(lines(&mut stdout, 2), ["[0] on"]);
    assert_eq!((stopped, child.wait().unwrap().code()), ('T', Some(0)));
}

#[test]
fn killing_run_leaves_no_rank() {
    let (mut child, mut stdout) = start(4, &[], "echo pid $$; exec sleep 1000");
    let ranks = pids(&lines(&mut stdout, 4));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(ranks.into_iter().all(ends));
}

#[test]
fn ranks_that_write_to_nobody_end_like_in_any_pipeline() {
    let (mut child, mut stdout) = start(2, &["--grace=100ms"], "exec yes");
    assert_eq!(lines(&mut stdout, 1).len(), 1);
    drop(stdout);
    assert_eq!(child.wait().unwrap().code(), Some(128 + 13));
}

#[test]
fn a_helper_that_outlives_its_rank_does_not_hold_up_the_job() {
    let (mut child, mut stdout) = start(1, &[], "sleep 1000 & echo helper $!");
    let helper = pids(&lines(&mut stdout, 1))[0];
    assert_eq!(child.wait().unwrap().code(), Some(0));
    rustix::process::kill_process(helper, Signal::KILL).unwrap();
}

#[test]
fn programs_that_cannot_be_started_are_named() {
    for (program, code, sentence) in [
        ("no-such-program", 127, "cannot start `no-such-program`: there is no such program in PATH"),
        ("./no/such", 127, "cannot start `./no/such`: there is no such file (or not its interpreter)"),
        (
            "/proc/self/status",
            126,
            "cannot start `/proc/self/status`: it is not executable (chmod +x, or name its interpreter)",
        ),
    ] {
        let output = job(2, &[], &[program]).output().unwrap();
        assert_eq!(output.status.code(), Some(code));
        assert_eq!(text(&output.stderr), format!("unisono: {sentence}\n"));
    }
}

#[test]
fn wrong_arguments_are_answered_with_an_example() {
    let answer = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_unisono")).arg("run").args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        text(&output.stderr)
    };
    let many: &[&[&str]] =
        &[&["-n", "0", "true"], &["-n", "99999", "true"], &["-n", "x", "true"], &["true"], &["-n", "2"]];
    for arguments in many {
        let answer = answer(arguments);
        assert!(answer.contains("for example: unisono run -n 4 -- python train.py"), "{answer}");
    }
    assert!(answer(&["-n", "1", "--timeout=soon", "true"]).contains("expected a duration such as 30s"));
}

#[test]
fn the_report_for_programs_names_every_rank() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("report.json");
    let option = format!("--json={}", path.display());
    let output = run(3, &["--grace=100ms", &option], "[ $RANK = 1 ] && exit 9; exec sleep 1000");
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(9), &b""[..]));
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(
        (&report["exit_code"], &report["first_failure"], &report["world_size"]),
        (&9.into(), &1.into(), &3.into())
    );
    assert_eq!((&report["ranks"][1]["exit_code"], &report["ranks"][1]["signal"]), (&9.into(), &().into()));
    for rank in [0, 2] {
        assert_eq!(report["ranks"][rank]["signal"], "SIGTERM");
        assert_eq!(report["ranks"][rank]["ended_by"], "SIGTERM");
    }
}

#[test]
fn an_unknown_setting_is_warned_of_with_the_name_that_was_meant() {
    let output = job(1, &[], &["true"]).env("UNISONO_TIMOUT", "3").output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let expected = "WARN UNISONO_TIMOUT is no setting of unisono; UNISONO_TIMEOUT is";
    assert_eq!(text(&output.stderr).trim(), expected);
    let output = Command::new(env!("CARGO_BIN_EXE_unisono"))
        .args(["-q", "run", "-n", "1", "true"])
        .env("UNISONO_TIMOUT", "3")
        .output()
        .unwrap();
    assert_eq!(text(&output.stderr), "");
}
