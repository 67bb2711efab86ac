//! `unisono kernels` as people run it: the table, the JSON, the cache that it leaves. What compiles needs NVRTC; without it the
//! test says that it did nothing, or fails if `UNISONO_TEST_REQUIRE_NVRTC` is set, as `cargo xtask test` does.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// `unisono kernels`, with this cache.
fn kernels(cache: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_unisono"));
    command.arg("kernels").args(arguments).env("UNISONO_CACHE_DIR", cache).stdin(Stdio::null());
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn kernels_are_built_once_and_listed() {
    if std::env::var_os("UNISONO_TEST_REQUIRE_NVRTC").is_none() && unisono::cuda::Compiler::find().is_err() {
        #[expect(clippy::print_stderr, reason = "for whoever reads the output of tests")]
        {
            eprintln!("SKIPPED: there is no NVRTC");
        }
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let build = |json: &str| kernels(folder.path(), &["build", "--arch=sm_90", "--ranks=2", json]);
    let first = build(&format!("--json={}", folder.path().join("report.json").display()));
    assert!(first.status.success(), "{first:?}");
    let table = text(&first.stdout);
    assert_eq!(
        table.lines().filter(|line| line.starts_with("sm_90    device     2  ")).count(),
        12,
        "{table}"
    );
    assert!(table.contains("\n12 sets: 12 compiled in "), "{table}");
    let second: Value = serde_json::from_slice(&build("--json").stdout).unwrap();
    let sets = second["sets"].as_array().unwrap();
    let purposes: Vec<&str> = sets.iter().map(|set| set["purpose"].as_str().unwrap()).collect();
    assert_eq!(
        purposes,
        [
            "copies",
            "parts",
            "messages",
            "all-to-all",
            "f32 sum",
            "f16 sum",
            "bf16 sum",
            "f32 sum, parts",
            "f16 sum, parts",
            "bf16 sum, parts",
            "expert parallel",
            "low latency"
        ]
    );
    let packs = folder.path().join("packs");
    let pack = ["build", "--arch=sm_90", "--ranks=2", "--quiet", "--pack", packs.to_str().unwrap()];
    assert!(kernels(folder.path(), &pack).status.success());
    let packed: Vec<_> = std::fs::read_dir(&packs).unwrap().flatten().collect();
    let name = packed[0].file_name().into_string().unwrap();
    assert!(packed.len() == 1 && name.starts_with("sm_90-") && name.ends_with(".xz"), "{name}");
    let cubins: u64 = sets.iter().map(|set| set["cubin_bytes"].as_u64().unwrap()).sum();
    let bytes = packed[0].metadata().unwrap().len();
    assert!(bytes * 6 < cubins, "{bytes} bytes of {cubins}");
    for set in sets {
        assert!(set["compiled_ms"].is_null(), "{set}");
        assert!((16..=255).contains(&set["registers"].as_u64().unwrap()), "{set}");
    }
    let listed: Value = serde_json::from_slice(&kernels(folder.path(), &["list", "--json"]).stdout).unwrap();
    assert_eq!(
        (listed["entries"].as_u64(), listed["compilers"][0]["entries"].as_u64()),
        (Some(12), Some(12))
    );
}

#[test]
fn what_cannot_be_built_is_a_sentence_and_an_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let empty = text(&kernels(folder.path(), &["list"]).stdout);
    assert!(empty.ends_with("holds no kernels yet; unisono kernels build puts some there.\n"), "{empty}");
    let wrong = kernels(folder.path(), &["build", "--arch=hopper"]);
    assert_eq!(wrong.status.code(), Some(2), "{wrong:?}");
    assert!(
        text(&wrong.stderr).contains("expected an architecture such as sm_90, got `hopper`"),
        "{wrong:?}"
    );
    let mut command = Command::new(env!("CARGO_BIN_EXE_unisono"));
    command.args(["kernels", "build", "--arch=sm_90"]).env("UNISONO_NVRTC", folder.path());
    let missing = command.output().unwrap();
    assert_eq!(missing.status.code(), Some(125), "{missing:?}");
    assert!(text(&missing.stderr).contains("which holds none"), "{missing:?}");
}

#[test]
fn the_header_for_kernels_of_users_is_written_into_a_folder_of_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("include");
    let written = kernels(folder.path(), &["header", target.to_str().unwrap()]);
    assert!(written.status.success(), "{written:?}");
    let path = target.join("unisono/device.cuh");
    assert_eq!(text(&written.stdout), format!("{}\n", path.display()));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), unisono::device_header().1);
    // Where a file stands, there is no folder.
    let refused = kernels(folder.path(), &["header", path.to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(125), "{refused:?}");
    assert!(text(&refused.stderr).contains("device.cuh"), "{refused:?}");
}
