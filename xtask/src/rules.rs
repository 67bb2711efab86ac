//! The house rules that a text can be checked against, as a pure function of a file's path and content.

use crate::lex::{code_only, is_word, words};

/// The longest file that needs no reason.
const MAX_LINES: usize = 500;
/// What the opening of a longer file must say.
const REASON: &str = "Over 500 lines because";
/// The only crates whose files may be on [`UNSAFE_FILES`].
const UNSAFE_CRATES: [&str; 7] = [
    "crates/sync/",
    "crates/cuda/",
    "crates/node/",
    "crates/comm/",
    "crates/cli/",
    "crates/fuzz/",
    "crates/python/",
];
/// The files that may hold `unsafe`, sorted.
const UNSAFE_FILES: &[&str] = &[
    // Describes its own buffers to the library, as a binding does; opens NCCL, and calls it.
    "crates/cli/src/bench/gpu.rs",
    "crates/cli/src/bench/gpu/rows.rs",
    "crates/cli/src/bench/moe/gpu.rs",
    "crates/cli/src/bench/nccl.rs",
    "crates/cli/src/bench/rank.rs",
    // Signals as a descriptor.
    "crates/cli/src/run/signals.rs",
    // What a child does between fork and exec.
    "crates/cli/src/run/spawn.rs",
    // Describes device buffers to the library, and fills and reads them.
    "crates/cli/src/tune/gpu.rs",
    // Launches a kernel of its own.
    "crates/comm/examples/device_header.rs",
    // Describes device buffers to the library.
    "crates/comm/examples/gpu_call_cost.rs",
    // Calls in flight whose buffers the caller keeps.
    "crates/comm/src/binding.rs",
    // Device buffers, whose life the caller promises.
    "crates/comm/src/buffer.rs",
    // The door for bindings to other languages.
    "crates/comm/src/call.rs",
    // Copies between users' buffers, windows and staging.
    "crates/comm/src/collectives/all_gather.rs",
    "crates/comm/src/collectives/all_reduce.rs",
    "crates/comm/src/collectives/all_to_all.rs",
    "crates/comm/src/collectives/broadcast.rs",
    "crates/comm/src/collectives/channel.rs",
    "crates/comm/src/collectives/copy.rs",
    "crates/comm/src/collectives/counted.rs",
    "crates/comm/src/collectives/engine.rs",
    "crates/comm/src/collectives/exchange.rs",
    "crates/comm/src/collectives/fused.rs",
    "crates/comm/src/collectives/quantised.rs",
    "crates/comm/src/collectives/gather.rs",
    "crates/comm/src/collectives/multi.rs",
    "crates/comm/src/collectives/reduce_scatter.rs",
    "crates/comm/src/collectives/transfer.rs",
    // The base of our own part of a window.
    "crates/comm/src/communicator.rs",
    // Turns the layout into references.
    "crates/comm/src/control.rs",
    // Words in a window, and elements as bytes.
    "crates/comm/src/ep/arena.rs",
    // Kernels of a buffer are launched with addresses that were checked; its page of reports is registered.
    "crates/comm/src/ep/gpu/combine.rs",
    "crates/comm/src/ep/gpu/layout.rs",
    "crates/comm/src/ep/gpu/low_latency.rs",
    "crates/comm/src/ep/gpu/making.rs",
    "crates/comm/src/ep/gpu/mod.rs",
    "crates/comm/src/ep/gpu/throughput.rs",
    // The word of a renewal, in a window.
    "crates/comm/src/ep/renewal.rs",
    "crates/comm/src/ep/tensor.rs",
    // Registers memory with the driver, and launches kernels.
    "crates/comm/src/gpu/all_to_all_v.rs",
    "crates/comm/src/gpu/arenas.rs",
    "crates/comm/src/gpu/args.rs",
    "crates/comm/src/gpu/copy_engines.rs",
    "crates/comm/src/gpu/fused.rs",
    "crates/comm/src/gpu/mod.rs",
    "crates/comm/src/gpu/messages.rs",
    "crates/comm/src/gpu/one_sided.rs",
    "crates/comm/src/gpu/pinned.rs",
    // Copies the recorder of a GPU, and has it tell the time.
    "crates/comm/src/gpu/recorder.rs",
    // Lends communicators to the threads of a group that waits for them.
    "crates/comm/src/group/requests.rs",
    // Takes over the descriptor that the launcher told about.
    "crates/comm/src/launch/secret.rs",
    // Reductions over plain pointers, for memory that other ranks share.
    "crates/comm/src/reduce/kernel.rs",
    "crates/comm/src/reduce/mod.rs",
    "crates/comm/src/reduce/number.rs",
    "crates/comm/src/reduce/storage.rs",
    "crates/comm/src/reduce/tests.rs",
    // Memory that somebody else allocated, whose life the caller promises.
    "crates/comm/src/registration.rs",
    // A stream that somebody else made.
    "crates/comm/src/stream.rs",
    // Words in windows, and elements as bytes.
    "crates/comm/src/symmetric.rs",
    // Lends a window as a slice.
    "crates/comm/src/window.rs",
    // Submits calls as data, or without a scope.
    "crates/comm/tests/collectives_threads/binding.rs",
    "crates/comm/tests/collectives_threads/quantised.rs",
    "crates/comm/tests/collectives_threads/rows.rs",
    // Gives a closed window to a collective.
    "crates/comm/tests/collectives_threads/windows.rs",
    // Describes memory of a device that is not there.
    "crates/comm/tests/ep/refusals.rs",
    // Forks, and handles signals.
    "crates/comm/tests/faults/forks.rs",
    // Device buffers, and a kernel that goes where it must not.
    "crates/comm/tests/faults/gpu.rs",
    "crates/comm/tests/faults/gpu_experts.rs",
    "crates/comm/tests/faults/gpu_hangs.rs",
    "crates/comm/tests/faults/gpu_matrix.rs",
    "crates/comm/tests/faults/gpu_seats.rs",
    // Forks a child that inherits sockets, as a data loader does.
    "crates/comm/tests/faults/kills.rs",
    // Launches the kernel of an example.
    "crates/comm/tests/faults/one_sided.rs",
    // Device buffers and pinned windows that processes share.
    "crates/comm/tests/faults/pinned.rs",
    "crates/comm/tests/faults/registrations.rs",
    // Hands a window over as any element.
    "crates/comm/tests/golden.rs",
    // Device buffers of tests.
    "crates/comm/tests/gpu/counted.rs",
    "crates/comm/tests/gpu/derive.rs",
    "crates/comm/tests/gpu/engine.rs",
    "crates/comm/tests/gpu/quantised.rs",
    "crates/comm/tests/gpu/expert_life.rs",
    "crates/comm/tests/gpu/expert_parallel.rs",
    "crates/comm/tests/gpu/expert_tools.rs",
    "crates/comm/tests/gpu/fused.rs",
    "crates/comm/tests/gpu/group.rs",
    "crates/comm/tests/gpu/life.rs",
    "crates/comm/tests/gpu/lines.rs",
    "crates/comm/tests/gpu/low_latency.rs",
    "crates/comm/tests/gpu/message_ends.rs",
    "crates/comm/tests/gpu/messages.rs",
    "crates/comm/tests/gpu/pinned.rs",
    "crates/comm/tests/gpu/places.rs",
    "crates/comm/tests/gpu/random.rs",
    "crates/comm/tests/gpu/random_more.rs",
    "crates/comm/tests/gpu/recorder.rs",
    "crates/comm/tests/gpu/registration.rs",
    "crates/comm/tests/gpu/seats.rs",
    "crates/comm/tests/gpu/seats_random.rs",
    "crates/comm/tests/gpu/symmetric.rs",
    "crates/comm/tests/gpu/windows.rs",
    "crates/comm/tests/gpu/world.rs",
    // Submits calls as data; unaligned and guarded buffers.
    "crates/comm/tests/support/doors.rs",
    "crates/comm/tests/support/region.rs",
    // Gives a window that is none any more to a collective.
    "crates/comm/tests/symmetric.rs",
    // Calls of the CUDA driver, which is a C library.
    "crates/cuda/src/capture.rs",
    "crates/cuda/src/device.rs",
    "crates/cuda/src/driver.rs",
    "crates/cuda/src/foreign.rs",
    "crates/cuda/src/foreign/imported.rs",
    "crates/cuda/src/foreign/tests.rs",
    "crates/cuda/src/graph.rs",
    "crates/cuda/src/memory.rs",
    "crates/cuda/src/memory/fabric.rs",
    "crates/cuda/src/memory/pages.rs",
    "crates/cuda/src/module.rs",
    // One call of NVML, past a wrapper that loses its answer.
    "crates/cuda/src/nvml.rs",
    // Opens the run-time compiler, and calls it.
    "crates/cuda/src/nvrtc.rs",
    // Calls of the driver, as above.
    "crates/cuda/src/stream.rs",
    // Counts what the allocator gives.
    "crates/fuzz/src/allocations.rs",
    // A structure that the kernel fills.
    "crates/node/src/credentials.rs",
    // Maps a page that is wiped on fork.
    "crates/node/src/fork.rs",
    // Writes to a mapping of its own, in a test.
    "crates/node/src/inspect.rs",
    // Maps memory.
    "crates/node/src/memory.rs",
    // The buffer protocol and DLPack, which are C.
    "crates/python/src/buffer.rs",
    "crates/python/src/dlpack.rs",
    // Submits calls on memory of Python's arrays, in streams that somebody else made.
    "crates/python/src/call.rs",
    "crates/python/src/communicator.rs",
    "crates/python/src/ep/inputs.rs",
    "crates/python/src/group.rs",
    // Registers the memory of arrays, which it keeps.
    "crates/python/src/window.rs",
    // Words in shared memory, and the half of one that the kernel compares.
    "crates/sync/src/memory.rs",
    // Reads the time stamp counter.
    "crates/sync/src/ticks.rs",
    "crates/sync/src/wait.rs",
    // Loom's cells.
    "crates/sync/tests/loom.rs",
];
/// The crate that may name raw atomics and spin.
const SYNC_CRATE: &str = "crates/sync/";
/// Marks of unfinished work. Put together so that this file does not hold them.
const UNFINISHED: [&str; 3] = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
/// Macros of unfinished work.
const UNFINISHED_MACROS: [&str; 3] = ["dbg!", "todo!", "unimplemented!"];
/// Paths of somebody's machine.
const FORBIDDEN: [&str; 2] = [concat!("/wo", "rk/"), concat!("/ro", "ot/")];

/// A rule that a file breaks.
#[derive(Debug, PartialEq)]
pub(crate) struct Finding {
    pub(crate) line: usize,
    pub(crate) message: String,
}

/// Checks any text of the repository; `path` is relative to its root.
pub(crate) fn check_text(path: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (index, line) in text.lines().enumerate() {
        for word in FORBIDDEN.iter().filter(|word| line.contains(**word)) {
            push(&mut findings, index, format!("`{word}` is a path of one machine"));
        }
        // A licence is quoted as it is.
        if !path.starts_with("LICENSE") {
            for mark in UNFINISHED.iter().filter(|mark| words(line).any(|word| word == **mark)) {
                push(&mut findings, index, format!("`{mark}`: finish it or leave it out"));
            }
        }
    }
    findings
}

/// Checks a Rust file; `path` is relative to the root.
pub(crate) fn check_rust(path: &str, text: &str) -> Vec<Finding> {
    let mut findings = check_opening(text);
    for (index, line) in code_only(text).lines().enumerate() {
        check_line(path, index, line, &mut findings);
    }
    findings
}

fn check_opening(text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !text.starts_with("//!") {
        push(&mut findings, 0, "a file opens with `//!` and says what it is".to_owned());
    }
    let lines = text.lines().count();
    let explained = text.lines().take_while(|line| line.starts_with("//!")).any(|line| line.contains(REASON));
    if lines > MAX_LINES && !explained {
        push(&mut findings, 0, format!("{lines} lines: split it, or say `{REASON} …` in its opening"));
    }
    findings
}

fn check_line(path: &str, index: usize, line: &str, findings: &mut Vec<Finding>) {
    let pairs = words(line).zip(words(line).skip(1));
    for (_, name) in pairs.filter(|(first, second)| *first == "fn" && second.starts_with("get_")) {
        push(findings, index, format!("`{name}`: name it by what it gives, without `get_`"));
    }
    if !path.starts_with(SYNC_CRATE) {
        for word in words(line).filter(|word| is_for_sync(word)) {
            push(findings, index, format!("`{word}` belongs into `unisono-sync`, where loom checks it"));
        }
    }
    for name in UNFINISHED_MACROS.iter().filter(|name| has_macro(line, name)) {
        push(findings, index, format!("`{name}` must not stay"));
    }
    if line.contains("#[ignore") {
        push(findings, index, "a test that is ignored tests nothing".to_owned());
    }
    if words(line).any(|word| word == "unsafe") {
        let message = if !UNSAFE_CRATES.iter().any(|allowed| path.starts_with(allowed)) {
            format!("`unsafe` is for {} only", UNSAFE_CRATES.join(", "))
        } else if !UNSAFE_FILES.contains(&path) {
            "`unsafe` in a file that is not on the list; if it must be, add it to UNSAFE_FILES of \
             xtask/src/rules.rs"
                .to_owned()
        } else {
            return;
        };
        push(findings, index, message);
    }
}

fn is_for_sync(word: &str) -> bool {
    let atomic = word.strip_prefix("Atomic").is_some_and(|kind| {
        kind == "Bool" || kind == "Ptr" || kind.starts_with('U') || kind.starts_with('I')
    });
    atomic || word == "spin_loop" || word == "yield_now"
}

/// Whether `line` calls the macro `name`, which ends with `!`; a longer name that ends so is another macro.
fn has_macro(line: &str, name: &str) -> bool {
    line.match_indices(name).any(|(at, _)| !line[..at].chars().next_back().is_some_and(is_word))
}

fn push(findings: &mut Vec<Finding>, index: usize, message: String) {
    findings.push(Finding { line: index + 1, message });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines and beginnings of what is found in a file of `path` that opens well and goes on with `code`.
    fn found(path: &str, code: &str) -> Vec<(usize, String)> {
        let text = format!("//! A file.\n{code}\n");
        check_rust(path, &text).into_iter().map(|finding| (finding.line, finding.message)).collect()
    }

    fn is_found(path: &str, code: &str, beginning: &str) {
        let findings = found(path, code);
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert_eq!(findings[0].0, 2);
        assert!(findings[0].1.starts_with(beginning), "{findings:?}");
    }

    const PLAIN: &str = "crates/core/src/a.rs";

    #[test]
    fn each_rule_about_code_finds_its_offender() {
        is_found(PLAIN, "pub fn get_rank() {}", "`get_rank`");
        is_found(PLAIN, "use core::sync::atomic::AtomicU32;", "`AtomicU32`");
        is_found(PLAIN, "std::hint::spin_loop();", "`spin_loop`");
        is_found(PLAIN, "dbg!(1);", "`dbg!`");
        is_found(PLAIN, "todo!()", "`todo!`");
        is_found(PLAIN, "#[ignore = \"slow\"]", "a test that is ignored");
        is_found(PLAIN, "unsafe { f() }", "`unsafe` is for crates/sync/");
        is_found("crates/node/src/unlisted.rs", "unsafe { f() }", "`unsafe` in a file that is not");
    }

    #[test]
    fn what_only_looks_like_an_offence_passes() {
        for code in [
            "// unsafe, spin_loop, get_x, dbg!(1)",
            "let a = \"unsafe fn get_rank todo!()\";",
            "#![forbid(unsafe_code)]",
            "fn widget_size() { budget_of(x); self.getrandom_u32() }",
            "struct Atomics; fn f(_: impl AtomicsLike) {}",
            "my_dbg!(1)",
        ] {
            assert_eq!(found(PLAIN, code), [], "{code}");
        }
        assert_eq!(found("crates/sync/src/a.rs", "AtomicU32::new(0); spin_loop();"), []);
    }

    #[test]
    fn a_file_says_what_it_is_and_why_it_is_long() {
        let long = "\n".repeat(MAX_LINES);
        assert_eq!(check_rust(PLAIN, "use a;\n")[0].message, "a file opens with `//!` and says what it is");
        assert!(check_rust(PLAIN, &format!("//! A file.\n{long}"))[0].message.starts_with("501 lines"));
        assert_eq!(check_rust(PLAIN, &format!("//! A file. {REASON} of a table.\n{long}")), []);
    }

    #[test]
    fn unfinished_work_and_local_paths_are_found_in_any_text() {
        let text =
            format!("fine\n- {}: later\nsee {}x\nAUTO{}S\n", UNFINISHED[0], FORBIDDEN[0], UNFINISHED[0]);
        let lines: Vec<usize> = check_text("README.md", &text).iter().map(|finding| finding.line).collect();
        assert_eq!(lines, [2, 3]);
    }
}
