//! Stores that are shared by processes, which the threads of the conformance suite cannot stand for.
//!
//! The test starts its own program again, with the path of the store in the environment.

use std::env;
use std::process::{Command, ExitCode};
use std::time::Duration;

use libtest_mimic::{Arguments, Trial};
use unisono::Deadline;
use unisono::store::{FileStore, Store};

/// Set for the process that [`a_second_process_shares_the_file`] starts: the path of the store.
const SECOND_PROCESS: &str = "UNISONO_TEST_SECOND_PROCESS";

fn main() -> ExitCode {
    if let Some(path) = env::var_os(SECOND_PROCESS) {
        second_process(&FileStore::open(path, soon()).unwrap());
        return ExitCode::SUCCESS;
    }
    let trial = Trial::test("file::a_second_process_shares_the_file", || {
        a_second_process_shares_the_file();
        Ok(())
    });
    libtest_mimic::run(&Arguments::from_args(), vec![trial]).exit_code()
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

fn a_second_process_shares_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let store = FileStore::open(&path, soon()).unwrap();
    let mut child = Command::new(env::current_exe().unwrap()).env(SECOND_PROCESS, &path).spawn().unwrap();
    assert_eq!(store.get("from the second", soon()).unwrap(), b"hello");
    for _ in 0..200 {
        store.add("counter", 1, soon()).unwrap();
    }
    store.set("from the first", b"go on", soon()).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(store.get("counter", soon()).unwrap(), b"400");
    assert_eq!(store.get("heard", soon()).unwrap(), b"go on");
}

/// What the other process does, at the same time.
fn second_process(store: &FileStore) {
    store.set("from the second", b"hello", soon()).unwrap();
    for _ in 0..200 {
        store.add("counter", 1, soon()).unwrap();
    }
    let heard = store.get("from the first", soon()).unwrap();
    store.set("heard", &heard, soon()).unwrap();
}
