//! `unisono doctor`, `topo` and `tune` as people run them: what they print, the JSON, the exit codes.

use std::collections::BTreeMap;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use unisono::tuning::{DIRECT_FORMS, Thresholds, Tuning, machine};

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

#[test]
fn the_topology_is_drawn_where_it_was_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("topo.svg");
    let drawn = unisono(&["topo", "-n", "3", "--svg"]).output().unwrap();
    let svg = text(&drawn.stdout);
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"), "{svg}");
    assert_eq!(svg.matches(">rank ").count(), 3, "{svg}");
    let beside = unisono(&["topo", "-n", "3", &format!("--svg={}", file.display())]).output().unwrap();
    assert!(text(&beside.stdout).contains("3 ranks, "), "{beside:?}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), svg);
    let both = unisono(&["topo", "--svg", "--json"]).output().unwrap();
    assert_eq!(both.status.code(), Some(2), "{both:?}");
}

/// Writes a tuning file of this machine, and answers its identity: with two ranks one-shot at every size, direct never.
fn tuned(path: &std::path::Path) -> String {
    let never = usize::MAX;
    let thresholds = Thresholds { all_reduce_one_shot_to: never, direct_from: [never; DIRECT_FORMS.len()] };
    let tuning = Tuning::new(&machine(), BTreeMap::from([(2, thresholds)]));
    std::fs::write(path, tuning.to_text(&["made by a test".to_owned()])).unwrap();
    tuning.identity()
}

#[test]
fn a_tuning_file_decides_where_algorithms_change() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a.tune");
    tuned(&file);
    let algorithms = |windows: &[&str]| {
        let options = ["bench", "all_reduce", "--device=host", "--sizes=8,1MiB", "--time=1ms", "--json"];
        let output = unisono(&[&options, windows].concat()).env("UNISONO_TUNE_FILE", &file).output().unwrap();
        let results = json(&output)["results"].clone();
        results
            .as_array()
            .unwrap()
            .iter()
            .map(|row| row["algorithm"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(algorithms(&[]), ["inline", "one-shot"]);
    assert_eq!(algorithms(&["--windows"]), ["inline", "one-shot"]);
    let listed = unisono(&["doctor", "--env"]).env("UNISONO_TUNE_FILE", &file).output().unwrap();
    assert_eq!(listed.status.code(), Some(0), "{listed:?}");
}

#[test]
fn a_tuning_file_that_is_damaged_missing_or_foreign_stops_the_job_and_is_found_by_the_doctor() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.tune");
    let foreign = Tuning::new("Abacus, 1 processors", BTreeMap::new()).to_text(&[]);
    tuned(&path);
    let damaged = std::fs::read_to_string(&path).unwrap().replace("ranks=2", "ranks=3");
    for (content, expected) in [
        (Some(damaged.as_str()), "line 5: expected the checksum "),
        (Some(foreign.as_str()), "it was measured on Abacus, 1 processors; this machine is "),
        (None, "No such file or directory"),
    ] {
        match content {
            Some(content) => std::fs::write(&path, content).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        let sentence = format!("the tuning file {} cannot be used: {expected}", path.display());
        let bench = ["bench", "barrier", "--device=host", "--time=1ms"];
        let output = unisono(&bench).env("UNISONO_TUNE_FILE", &path).output().unwrap();
        assert!(
            !output.status.success() && text(&output.stderr).contains(&sentence),
            "{sentence}\n{output:?}"
        );
        let doctor = unisono(&["doctor", "--json"]).env("UNISONO_TUNE_FILE", &path).output().unwrap();
        assert_eq!(doctor.status.code(), Some(1));
        let found = findings(&json(&doctor), "settings")[0]["found"].as_str().unwrap().to_owned();
        assert!(found.starts_with(&sentence), "{found}");
    }
}

#[test]
fn ranks_with_different_tuning_files_are_refused_and_both_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a.tune");
    let identity = tuned(&file);
    let script = format!(
        "if [ $RANK = 1 ]; then export UNISONO_TUNE_FILE={}; fi; exec {} topo",
        file.display(),
        env!("CARGO_BIN_EXE_unisono")
    );
    let output =
        unisono(&["run", "-n", "2", "--timeout=60s", "--", "/bin/sh", "-c", &script]).output().unwrap();
    let text = text(&output.stderr);
    assert!(!output.status.success(), "{text}");
    // Whoever comes second says so: the other waits for a rank that fits.
    assert!(text.contains("an option that changes results differs: rank "), "{text}");
    assert!(text.contains(" says algorithm=auto order=fixed tuning=none"), "{text}");
    assert!(text.contains(&format!(" says algorithm=auto order=fixed tuning={identity}")), "{text}");
}

#[test]
fn tuning_on_gpus_is_refused_politely_where_there_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("made.tune");
    let tune = |arguments: &[&str]| {
        let output = unisono(&[&["tune", file.to_str().unwrap()], arguments].concat())
            .env("CUDA_VISIBLE_DEVICES", "")
            .output()
            .unwrap();
        (output.status.code(), text(&output.stderr))
    };
    for arguments in [&["--device=cuda"][..], &["--forms=ring,bulk:24:512", "--sizes=1MiB"]] {
        let (code, said) = tune(arguments);
        assert_eq!(code, Some(125), "{said}");
        assert!(said.contains("--device cuda: no CUDA device: "), "{said}");
    }
    for (arguments, expected) in [
        (
            &["--forms=bulb"][..],
            "expected one of one-shot, two-shot, bulk, direct, ring, engine, one-shot-lines, two-shot-lines, and after colons",
        ),
        (&["--operations=barrier"], "expected one of all_reduce, broadcast, all_gather, reduce, "),
        (&["--forms=ring", "--sizes=3"], "expected a whole number of bf16 elements, of 2 bytes"),
        (&["--sizes=4KiB"], "--forms <FORMS>"),
    ] {
        let (code, said) = tune(arguments);
        assert!(code == Some(2) && said.contains(expected), "{said}");
    }
    assert!(!file.exists());
}

#[test]
fn tuning_measures_here_and_writes_a_file_that_jobs_can_use() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("made.tune");
    let path = file.to_str().unwrap();
    // What is wrong in the environment does not disturb the measurement.
    let output = unisono(&["tune", path, "-n", "2", "--time=2ms"])
        .env("UNISONO_TUNE_FILE", "/nowhere")
        .output()
        .unwrap();
    let text = text(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(text.contains("all_reduce: two-shot from"), "{text}");
    assert!(text.contains("export UNISONO_TUNE_FILE="), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 120 || line.contains("export")), "{text}");
    let tuning = unisono::tuning::load(path).unwrap();
    assert_eq!(tuning.worlds().keys().copied().collect::<Vec<_>>(), [2]);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "nothing else is left there");
    let bench = ["bench", "all_reduce", "--device=host", "--sizes=4KiB", "--time=1ms"];
    assert!(unisono(&bench).env("UNISONO_TUNE_FILE", path).output().unwrap().status.success());
}
