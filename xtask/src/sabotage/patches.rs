//! The lines that are broken, one at a time, and the test that must notice each. In the order of the crates, so that
//! few of them are built again between one patch and the next.

use super::Target::{Integration, Lib, Loom};
use super::{Patch, Test};

const fn sync(target: super::Target, name: &'static str) -> Test {
    Test { package: "unisono-sync", target, name }
}

const fn core(name: &'static str) -> Test {
    Test { package: "unisono-core", target: Lib, name }
}

const fn node(name: &'static str) -> Test {
    Test { package: "unisono-node", target: Lib, name }
}

const fn comm(target: super::Target, name: &'static str) -> Test {
    Test { package: "unisono", target, name }
}

const THREADS: super::Target = Integration("collectives_threads");
const EP: super::Target = Integration("ep");
const FAULTS: super::Target = Integration("faults_processes");

pub(super) const PATCHES: &[Patch] = &[
    // unisono-sync
    Patch {
        name: "a flag is published without release",
        file: "crates/sync/src/epoch_flag.rs",
        line: "self.word.store_release(epoch);",
        instead: "self.word.store_relaxed(epoch);",
        test: sync(Loom, "an_epoch_flag_announces_what_was_written_before"),
    },
    Patch {
        name: "a rank that was given up believes what it read",
        file: "crates/sync/src/attendance.rs",
        line: "self.word.load_relaxed() & CLOSED == 0",
        instead: "self.word.load_relaxed() | CLOSED != 0",
        test: sync(Loom, "a_member_that_reads_what_was_overwritten_finds_itself_given_up"),
    },
    Patch {
        name: "a slot is read without acquire",
        file: "crates/sync/src/slot_ring.rs",
        line: "self.slot(epoch).0.load_acquire() == epoch",
        instead: "self.slot(epoch).0.load_relaxed() == epoch",
        test: sync(Loom, "credits_keep_a_producer_from_overwriting_what_is_being_read"),
    },
    Patch {
        name: "a signal is sent without release",
        file: "crates/sync/src/signal_pad.rs",
        line: "self.word(slot).map(|word| word.store_release(u64::from(value))).is_some()",
        instead: "self.word(slot).map(|word| word.store_relaxed(u64::from(value))).is_some()",
        test: sync(Loom, "a_signal_announces_what_was_written_before"),
    },
    Patch {
        name: "a barrier forgets the last rank",
        file: "crates/sync/src/barrier.rs",
        line: "self.flags.iter().position(|flag| !flag.has_reached(round))",
        instead: "self.flags[1..].iter().position(|flag| !flag.has_reached(round)).map(|at| at + 1)",
        test: sync(Loom, "nobody_leaves_a_barrier_before_all_have_entered_it"),
    },
    Patch {
        name: "waits do not watch the abort word",
        file: "crates/sync/src/wait.rs",
        line: "self.0.load(Ordering::Acquire).checked_sub(1)",
        instead: "self.0.load(Ordering::Acquire).checked_sub(u32::MAX)",
        test: sync(Lib, "wait::tests::an_abort_ends_a_wait_but_not_one_that_is_already_satisfied"),
    },
    Patch {
        name: "waits ignore their deadline",
        file: "crates/sync/src/wait.rs",
        line: "if policy.patience.is_some_and(|patience| waited >= patience) {",
        instead: "if policy.patience.is_some_and(|_| waited >= std::time::Duration::MAX) {",
        test: sync(Lib, "wait::tests::patience_ends_a_wait_after_one_warning"),
    },
    // unisono-core
    Patch {
        name: "copy engines stage over what is still pulled",
        file: "crates/core/src/device/engine.rs",
        line: "2 * lanes",
        instead: "2 * lanes - 1",
        test: core(
            "device::engine::tests::every_rank_gets_every_chunk_once_in_whatever_order_the_devices_work",
        ),
    },
    Patch {
        name: "the tag of a frame is not compared",
        file: "crates/core/src/auth/seal.rs",
        line: "if !bool::from(expected[..].ct_eq(&buffer[body.end..consumed])) {",
        instead: "if bool::from(expected[..].ct_eq(&[])) {",
        test: core("auth::tests::a_flipped_byte_anywhere_in_a_frame_is_never_data"),
    },
    Patch {
        name: "frames may be repeated or left out",
        file: "crates/core/src/auth/seal.rs",
        line: "Ok(header) if header.sequence == self.sequence => header,",
        instead: "Ok(header) => header,",
        test: core("auth::tests::replayed_swapped_and_dropped_frames_are_tampered"),
    },
    Patch {
        name: "the proof of who connects is not compared",
        file: "crates/core/src/auth.rs",
        line: "if transcript.proof(Role::Initiator).verify_slice(bytes).is_ok() {",
        instead: "if transcript.proof(Role::Initiator).verify_slice(bytes).is_ok() || bytes != REFUSAL {",
        test: core("auth::tests::a_recorded_handshake_cannot_be_replayed"),
    },
    Patch {
        name: "the proof of who accepts is not compared",
        file: "crates/core/src/auth.rs",
        line: "if transcript.proof(Role::Responder).verify_slice(proof).is_err() {",
        instead: "if transcript.proof(Role::Responder).verify_slice(proof).is_err() && proof.is_empty() {",
        test: core("auth::tests::a_wrong_secret_or_context_is_an_auth_error_on_both_sides"),
    },
    Patch {
        name: "the length of a frame has no cap",
        file: "crates/core/src/wire.rs",
        line: "if got > cap {",
        instead: "if got > cap.max(got) {",
        test: core(
            "auth::tests::a_truncated_frame_says_how_much_is_needed_and_a_capped_length_is_refused_at_once",
        ),
    },
    Patch {
        name: "hellos of two generations fit together",
        file: "crates/core/src/hello.rs",
        line: "if self.generation != other.generation {",
        instead: "if self.generation > other.generation {",
        test: core("hello::tests::what_does_not_fit_names_both_sides"),
    },
    Patch {
        name: "the chain forgets earlier calls",
        file: "crates/core/src/call.rs",
        line: "mix(before.rotate_left(7) ^ fingerprint)",
        instead: "mix(before.rotate_left(7) & 0 ^ fingerprint)",
        test: core("call::tests::the_chain_remembers_every_call_and_its_place"),
    },
    Patch {
        name: "the reference sums backwards",
        file: "crates/core/src/reduce_op/reference.rs",
        line: "accumulator = accumulator.combine(op, contribution(rank, element));",
        instead: "accumulator = accumulator.combine(op, contribution(inputs.len() - rank, element));",
        test: core("reduce_op::reference::tests::sums_fold_in_rank_order_from_rank_0"),
    },
    Patch {
        name: "more ranks do not move the border to two-shot",
        file: "crates/core/src/select.rs",
        line: "several => ONE_SHOT_BYTES / (several - 1),",
        instead: "several => ONE_SHOT_BYTES / several,",
        test: core("select::tests::borders_belong_to_the_smaller_side_and_move_with_the_world"),
    },
    // unisono-node
    Patch {
        name: "shared memory needs no seals",
        file: "crates/node/src/memory.rs",
        line: "if size != bytes as i64 || !seals.contains(SEALS) {",
        instead: "if size != bytes as i64 {",
        test: node("memory::tests::memory_of_another_size_or_without_seals_is_refused"),
    },
    Patch {
        name: "truncated messages are taken",
        file: "crates/node/src/socket.rs",
        line: "if message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {",
        instead: "if message.flags.contains(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {",
        test: node("socket::tests::a_truncated_message_is_fatal_and_its_descriptors_are_closed"),
    },
    Patch {
        name: "a farewell counts as a death",
        file: "crates/node/src/plane/progress.rs",
        line: "self.shared.lose(peer, Lost::Left);",
        instead: "self.shared.lose(peer, Lost::SocketClosed);",
        test: node("plane::tests::a_farewell_is_no_death_but_ends_waits"),
    },
    Patch {
        name: "hearts that stand still are fine",
        file: "crates/node/src/plane/progress.rs",
        line: "if slept || heart.count != count {",
        instead: "if slept || heart.count <= count {",
        test: node("plane::tests::a_heart_that_stands_still_is_reported_once_and_a_beating_one_never"),
    },
    // unisono: stores and the meeting
    Patch {
        name: "an older generation may join",
        file: "crates/comm/src/rendezvous.rs",
        line: "Some(number) if number > self.hello.generation => {",
        instead: "Some(number) if number > self.hello.generation.max(number) => {",
        test: comm(Lib, "rendezvous::tests::offenders_are_refused_by_name_and_the_others_still_meet"),
    },
    Patch {
        name: "compare_set does not compare",
        file: "crates/comm/src/store/table.rs",
        line: "Some(value) if value != expected => return Ok(value.clone()),",
        instead: "Some(value) if value.is_empty() && !expected.is_empty() => return Ok(value.clone()),",
        test: comm(Lib, "store::table::tests::compare_set_follows_the_documented_rule_for_missing_keys"),
    },
    Patch {
        name: "half a record stays in a store's file",
        file: "crates/comm/src/store/file/log.rs",
        line: "let written = if length == self.offset { Ok(()) } else { self.file.set_len(self.offset) }",
        instead: "let written = if length >= self.offset { Ok(()) } else { self.file.set_len(self.offset) }",
        test: comm(Lib, "store::file::tests::half_a_record_of_a_killed_writer_is_ignored_and_cut_off"),
    },
    Patch {
        name: "lengths of torch's wire have no cap",
        file: "crates/comm/src/store/torch/wire.rs",
        line: ".filter(|got| *got <= cap)",
        instead: ".filter(|got| *got <= cap.max(*got))",
        test: comm(
            Lib,
            "store::torch::wire::tests::lengths_above_the_caps_are_refused_before_the_bytes_come",
        ),
    },
    Patch {
        name: "a reply to another request is taken",
        file: "crates/comm/src/store/tcp/client.rs",
        line: "if answered != number {",
        instead: "if answered == u64::MAX {",
        test: comm(Lib, "store::tcp::tests::attacks::a_reply_to_another_request_is_refused"),
    },
    // unisono: reductions and collectives
    Patch {
        name: "kernels reduce backwards",
        file: "crates/comm/src/reduce/kernel.rs",
        line: "let numbers = load(rank);",
        instead: "let numbers = load(sources.len() - rank);",
        test: comm(Lib, "reduce::tests::every_kernel_agrees_with_the_reference_to_the_bit"),
    },
    Patch {
        name: "a death is not passed on",
        file: "crates/comm/src/control.rs",
        line: "self.fail(&Cause::died(rank, self.names[rank].clone(), lost));",
        instead: "let _ = Cause::died(rank, self.names[rank].clone(), lost);",
        test: comm(FAULTS, "kill::every_survivor_names_the_killed_rank"),
    },
    Patch {
        name: "results of experts are added backwards",
        file: "crates/comm/src/ep/throughput_combine.rs",
        line: "for (peer, at) in at.iter_mut().enumerate().filter(|(peer, _)| ranks >> peer & 1 == 1) {",
        instead: "for (peer, at) in at.iter_mut().enumerate().rev().filter(|(peer, _)| ranks >> peer & 1 == 1) {",
        test: comm(EP, "order::results_are_added_from_the_first_rank_to_the_last"),
    },
    Patch {
        name: "tokens are staged where others still read",
        file: "crates/comm/src/ep/arena.rs",
        line: "let free = before.max(self.round.saturating_sub(CALLS as u64));",
        instead: "let free = before.saturating_sub(CALLS as u64);",
        test: comm(EP, "overtaking::nobody_overwrites_what_others_still_read"),
    },
    Patch {
        name: "silent ranks are waited for",
        file: "crates/comm/src/ep/arena.rs",
        line: "let is_late = waited >= limit;",
        instead: "let is_late = waited > limit * 1000;",
        test: comm(EP, "departures::a_silent_rank_is_masked_and_told_so"),
    },
    Patch {
        name: "each rank settles a renewal for itself",
        file: "crates/comm/src/ep/renewal.rs",
        line: "let is_taken = fate.settle(u32::from(outcome == Outcome::Taken)) == 1;",
        instead: "let is_taken = fate.settle(u32::from(outcome == Outcome::Taken)) == 1 || outcome == Outcome::Taken;",
        test: comm(Lib, "ep::renewal::tests::all_ranks_are_told_what_the_first_one_settled"),
    },
    Patch {
        name: "staged data is reduced backwards",
        file: "crates/comm/src/collectives/all_reduce.rs",
        line: "self.sources.push(if rank == self.rank { source } else { self.staged(rank, chunk) });",
        instead: "self.sources.insert(0, if rank == self.rank { source } else { self.staged(rank, chunk) });",
        test: comm(THREADS, "five_threads_run_every_operation"),
    },
    Patch {
        name: "the epoch stands still",
        file: "crates/comm/src/collectives/engine.rs",
        line: "self.epoch += 1;",
        instead: "self.epoch += u64::from(self.epoch < 2);",
        test: comm(THREADS, "two_threads_run_every_operation"),
    },
    Patch {
        name: "steps are used again",
        file: "crates/comm/src/collectives/engine.rs",
        line: "self.step += steps;",
        instead: "self.step += steps.min(1);",
        test: comm(THREADS, "two_threads_run_every_operation"),
    },
    Patch {
        name: "calls take no credit",
        file: "crates/comm/src/collectives/engine.rs",
        line: "if self.epoch > self.credit.epoch + CALL_SLOTS as u64 {",
        instead: "if self.epoch > u64::MAX - CALL_SLOTS as u64 {",
        test: comm(THREADS, "mismatches::two_roots_that_only_send_are_found_when_their_credit_ends"),
    },
    Patch {
        name: "staging takes no credit",
        file: "crates/comm/src/collectives/engine.rs",
        line: "if step > self.credit.step + CHUNKS as u64 {",
        instead: "if step > u64::MAX - CHUNKS as u64 {",
        test: comm(THREADS, "five_threads_run_every_operation"),
    },
    Patch {
        name: "chains are not compared when data is read",
        file: "crates/comm/src/collectives/engine.rs",
        line: "if self.control.rank(peer).slots.read(self.epoch, SLOT_CHAIN) != self.chain {",
        instead: "if self.control.rank(peer).slots.read(self.epoch, SLOT_CHAIN) == u64::MAX {",
        test: comm(THREADS, "mismatches::every_pair_of_different_calls_is_named_on_both_sides"),
    },
    Patch {
        name: "messages that came early are not matched by tag",
        file: "crates/comm/src/collectives/transfer.rs",
        line: "let Some(at) = early.iter().position(|early| early.header.tag == incoming.header.tag) else {",
        instead: "let Some(at) = early.iter().position(|early| early.header.tag <= u32::MAX) else {",
        test: comm(THREADS, "messages::messages_are_matched_by_tag_whatever_the_order"),
    },
    Patch {
        name: "whole messages take no credit",
        file: "crates/comm/src/collectives/channel.rs",
        line: "if written + length - self.messages.freed[to] > channel.bytes as u64 {",
        instead: "if written + length - self.messages.freed[to] > (channel.bytes as u64) << 40 {",
        test: comm(THREADS, "messages::messages_sent_whole_and_in_pieces_follow_each_other_at_any_pace"),
    },
    Patch {
        name: "a whole message is taken whatever it says of itself",
        file: "crates/comm/src/collectives/channel.rs",
        line: "if Header::from_words([first, second, 0, 0]) != header {",
        instead: "if Header::from_words([first, second, 0, 0]).count > header.count {",
        test: comm(THREADS, "messages::a_message_of_another_type_or_count_is_named_on_both_ranks"),
    },
    Patch {
        name: "patience is without end",
        file: "crates/comm/src/collectives/waiting.rs",
        line: "if self.policy.patience.is_some_and(|patience| waited >= patience) {",
        instead: "if self.policy.patience.is_some_and(|_| waited >= Duration::MAX) {",
        test: comm(THREADS, "departures::a_timeout_names_the_ranks_that_did_not_come"),
    },
];
