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
