//! `unisono doctor`, `topo` and `tune` as people run them: what they print, the JSON, the exit codes.

use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// The command, without the settings of whoever runs the tests.
fn unisono(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_unisono"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("UNISONO_") {
            command.env_remove(name);
        }
    }
    command.args(arguments).stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// The findings of one check.
fn findings<'d>(document: &'d Value, check: &str) -> Vec<&'d Value> {
    document["findings"].as_array().unwrap().iter().filter(|finding| finding["check"] == check).collect()
}

#[test]
fn the_doctor_finds_a_machine_on_which_two_ranks_work() {
    let output = unisono(&["doctor", "--json"]).output().unwrap();
    let document = json(&output);
    assert_eq!(output.status.code(), Some(0), "{document:#}");
    let two = findings(&document, "two ranks")[0];
    assert_eq!(two["verdict"], "ok", "{document:#}");
    assert!(two["found"].as_str().unwrap().ends_with("4 all-reduces, all right"), "{two}");
    assert_eq!(findings(&document, "shared memory")[0]["verdict"], "ok");
}

#[test]
fn a_value_that_cannot_be_read_fails_and_says_what_mends_it() {
    let output = unisono(&["doctor"]).env("UNISONO_SPIN", "fast").output().unwrap();
    let text = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("FAIL  settings          UNISONO_SPIN=fast cannot be read: expected"), "{text}");
    assert!(text.contains("→ unset UNISONO_SPIN"), "{text}");
    assert!(text.contains("FAIL  two ranks"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 120), "{text}");
}

#[test]
fn too_few_open_files_are_said_even_when_quiet() {
    let script = "ulimit -n 50; exec \"$0\" doctor -q";
    let output =
        Command::new("/bin/sh").args(["-c", script, env!("CARGO_BIN_EXE_unisono")]).output().unwrap();
    let text = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.starts_with("FAIL  open files        50 per process are too few for two ranks"), "{text}");
}

#[test]
fn the_settings_are_listed_with_their_values_here() {
    let output = unisono(&["doctor", "--env", "--json"]).env("UNISONO_TIMEOUT", "7s").output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let rows = json(&output);
    let row = rows.as_array().unwrap().iter().find(|row| row["name"] == "UNISONO_TIMEOUT").unwrap();
    assert_eq!((row["value"].as_str(), row["default"].as_str()), (Some("7s"), Some("600s")));
    assert!(rows.as_array().unwrap().iter().all(|row| row["name"] != "UNISONO_SECRET_FD"));
}

#[test]
fn the_topology_of_a_job_names_where_its_ranks_run() {
    let unisono_itself = env!("CARGO_BIN_EXE_unisono");
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("topo.json");
    let option = format!("--json={}", file.display());
    let output = unisono(&["run", "-n", "3", "--timeout=60s", "--", unisono_itself, "topo", &option])
        .output()
        .unwrap();
    let text = text(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(text.contains("3 ranks of this job"), "{text}");
    assert!(text.contains("rank 1     SHM self  SHM   pid "), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 124), "{text}");
    let document: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let pids: Vec<u64> =
        document["places"].as_array().unwrap().iter().map(|place| place["pid"].as_u64().unwrap()).collect();
    assert!(pids.len() == 3 && pids[0] != pids[1] && pids[1] != pids[2], "{pids:?}");
    assert_eq!(document["links"][0][0], "self");
}

#[test]
fn the_topology_of_ranks_that_are_not_there_is_planned() {
    let output = unisono(&["topo", "-n", "1000", "--json"]).output().unwrap();
    let document = json(&output);
    assert_eq!(document["places"].as_array().unwrap().len(), 1000);
    assert_eq!(document["links"][999].as_array().unwrap().len(), 1000);
    let half = unisono(&["topo"]).env("RANK", "0").output().unwrap();
    assert_eq!(half.status.code(), Some(125));
    assert!(text(&half.stderr).contains("RANK=0 is set but WORLD_SIZE is not"), "{half:?}");
}
