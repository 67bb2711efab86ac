//! Faults of whole processes: ranks that are killed, stopped, late, of another start or of another opinion.
//!
//! The test starts its own program again for every rank; the environment tells it which part to play. Each test says
//! which promise of `docs/src/reliability.md` it holds up. The default run takes seconds; `UNISONO_TEST_SCALE=20` repeats
//! the repeatable ones twenty times as often (`cargo xtask faults --scale 20`).
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "ranks report to the test through their output"
)]

mod faults;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    if let Some(part) = faults::parts::Part::from_environment() {
        return part.play();
    }
    let mut arguments = Arguments::from_args();
    // Most of these measure time, and all of them load the machine.
    arguments.test_threads = Some(1);
    libtest_mimic::run(&arguments, trials()).exit_code()
}

type Test = (&'static str, fn());

fn trials() -> Vec<Trial> {
    let tests: [Test; 44] = [
        ("kill::every_survivor_names_the_killed_rank", faults::kills::every_survivor_names_the_killed_rank),
        ("kill::a_forked_child_does_not_hide_it", faults::kills::a_forked_child_does_not_hide_it),
        (
            "kill::the_store_is_not_missed_after_the_start",
            faults::kills::the_store_is_not_missed_after_the_start,
        ),
        ("stop::a_stopped_rank_is_named_in_time", faults::stops::a_stopped_rank_is_named_in_time),
        ("stop::three_seconds_by_default", faults::stops::three_seconds_by_default),
        ("stop::a_late_rank_is_waited_for", faults::stops::a_late_rank_is_waited_for),
        ("stop::a_timeout_names_who_did_not_come", faults::stops::a_timeout_names_who_did_not_come),
        ("stop::many_ranks_raise_no_alarm", faults::stops::many_ranks_raise_no_alarm),
        (
            "stop::a_job_that_is_stopped_as_a_whole_goes_on",
            faults::stops::a_job_that_is_stopped_as_a_whole_goes_on,
        ),
        (
            "start::a_death_at_each_step_of_meeting_is_named",
            faults::start::a_death_at_each_step_of_meeting_is_named,
        ),
        (
            "start::a_death_while_connecting_is_named_at_once",
            faults::start::a_death_while_connecting_is_named_at_once,
        ),
        (
            "start::a_rank_that_stops_while_connecting_is_named",
            faults::start::a_rank_that_stops_while_connecting_is_named,
        ),
        ("start::a_rank_that_never_comes_is_named", faults::start::a_rank_that_never_comes_is_named),
        ("start::an_older_generation_is_refused", faults::start::an_older_generation_is_refused),
        (
            "start::offenders_are_refused_and_the_job_goes_on",
            faults::start::offenders_are_refused_and_the_job_goes_on,
        ),
        (
            "start::a_tampered_store_connection_never_lies",
            faults::start::a_tampered_store_connection_never_lies,
        ),
        (
            "mismatch::both_calls_are_named_on_every_rank",
            faults::mismatches::both_calls_are_named_on_every_rank,
        ),
        (
            "shortages::too_few_descriptors_are_an_error_on_all_ranks",
            faults::shortages::too_few_descriptors_are_an_error_on_all_ranks,
        ),
        (
            "shortages::too_little_memory_is_an_error_on_all_ranks",
            faults::shortages::too_little_memory_is_an_error_on_all_ranks,
        ),
        (
            "shortages::a_system_call_that_fails_is_an_error_on_all_ranks",
            faults::shortages::a_system_call_that_fails_is_an_error_on_all_ranks,
        ),
        (
            "forks::a_forked_child_is_refused_and_its_parent_goes_on",
            faults::forks::a_forked_child_is_refused_and_its_parent_goes_on,
        ),
        (
            "experts::lost_ranks_are_masked_and_the_others_go_on",
            faults::experts::lost_ranks_are_masked_and_the_others_go_on,
        ),
        (
            "experts::a_killed_rank_is_named_without_masking",
            faults::experts::a_killed_rank_is_named_without_masking,
        ),
        ("forks::a_storm_of_signals_does_no_harm", faults::forks::a_storm_of_signals_does_no_harm),
        (
            "strangers::a_port_scan_does_not_keep_the_ranks_from_meeting",
            faults::strangers::a_port_scan_does_not_keep_the_ranks_from_meeting,
        ),
        (
            "strangers::a_flood_of_half_open_connections_delays_nobody",
            faults::strangers::a_flood_of_half_open_connections_delays_nobody,
        ),
        ("load::small_calls_without_end_grow_nothing", faults::load::small_calls_without_end_grow_nothing),
        (
            "load::a_crowd_of_ranks_reduces_rightly_and_in_time",
            faults::load::a_crowd_of_ranks_reduces_rightly_and_in_time,
        ),
        (
            "namespaces::ranks_in_other_namespaces_share_memory",
            faults::namespaces::ranks_in_other_namespaces_share_memory,
        ),
        (
            "namespaces::ranks_in_other_networks_are_told_so",
            faults::namespaces::ranks_in_other_networks_are_told_so,
        ),
        (
            "intruders::descriptors_of_another_user_are_not_kept",
            faults::intruders::descriptors_of_another_user_are_not_kept,
        ),
        (
            "intruders::a_name_that_another_user_took_is_refused",
            faults::intruders::a_name_that_another_user_took_is_refused,
        ),
        (
            "scribbles::nothing_written_to_the_shared_memory_does_harm",
            faults::scribbles::nothing_written_to_the_shared_memory_does_harm,
        ),
        (
            "scribbles::a_peer_that_scribbles_is_an_error_in_time",
            faults::scribbles::a_peer_that_scribbles_is_an_error_in_time,
        ),
        (
            "shrink::survivors_go_on_after_kills_at_any_moment",
            faults::shrinks::survivors_go_on_after_kills_at_any_moment,
        ),
        (
            "shrink::sixteen_ranks_are_back_within_two_seconds",
            faults::shrinks::sixteen_ranks_are_back_within_two_seconds,
        ),
        (
            "shrink::a_stopped_rank_is_left_out_and_harms_nobody_when_it_wakes_up",
            faults::shrinks::a_stopped_rank_is_left_out_and_harms_nobody_when_it_wakes_up,
        ),
        (
            "shrink::a_death_while_another_rank_is_given_up_is_left_out_too",
            faults::shrinks::a_death_while_another_rank_is_given_up_is_left_out_too,
        ),
        ("leftovers::children_give_everything_back", faults::leftovers::children_give_everything_back),
        (
            "leftovers::earlier_generations_give_everything_back",
            faults::leftovers::earlier_generations_give_everything_back,
        ),
        ("leftovers::threads_give_everything_back", faults::leftovers::threads_give_everything_back),
        ("leftovers::processes_give_everything_back", faults::leftovers::processes_give_everything_back),
        (
            "leftovers::a_tiny_shared_memory_file_system_is_enough",
            faults::leftovers::a_tiny_shared_memory_file_system_is_enough,
        ),
        (
            "leftovers::the_check_for_leftovers_finds_some",
            faults::leftovers::the_check_for_leftovers_finds_some,
        ),
    ];
    let trial = |(name, test): Test| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
    };
    tests_on_gpus().into_iter().chain(tests).map(trial).collect()
}

#[cfg(not(feature = "cuda"))]
const fn tests_on_gpus() -> [Test; 0] {
    []
}

#[cfg(feature = "cuda")]
fn tests_on_gpus() -> [Test; 17] {
    [
        (
            "gpu_experts::lost_ranks_are_masked_and_the_others_go_on",
            faults::gpu_experts::lost_ranks_are_masked_and_the_others_go_on,
        ),
        (
            "gpu_experts::a_killed_rank_is_named_without_masking",
            faults::gpu_experts::a_killed_rank_is_named_without_masking,
        ),
        (
            "gpu_kill::survivors_leave_their_kernels_and_go_on",
            faults::gpu::survivors_leave_their_kernels_and_go_on,
        ),
        (
            "gpu_kill::survivors_shrink_and_sum_on_their_gpus",
            faults::gpu::survivors_shrink_and_sum_on_their_gpus,
        ),
        (
            "gpu_kill::a_stopped_rank_is_left_out_and_its_memory_is_kept",
            faults::gpu::a_stopped_rank_is_left_out_and_its_memory_is_kept,
        ),
        (
            "gpu_kill::a_rank_that_loses_its_context_is_named",
            faults::gpu::a_rank_that_loses_its_context_is_named,
        ),
        ("pinned::the_same_code_runs_without_gpus", faults::pinned::the_same_code_runs_without_gpus),
        (
            "pinned::processes_work_on_windows_of_either_kind",
            faults::pinned::processes_work_on_windows_of_either_kind,
        ),
        (
            "pinned::fabric_handles_serve_or_are_a_typed_error",
            faults::pinned::fabric_handles_serve_or_are_a_typed_error,
        ),
        (
            "gpu_registration::processes_reach_each_others_memory",
            faults::registrations::processes_reach_each_others_memory,
        ),
        (
            "gpu_one_sided::processes_exchange_packets_and_signals",
            faults::one_sided::processes_exchange_packets_and_signals,
        ),
        (
            "gpu_one_sided::a_killed_rank_ends_the_waits_of_kernels_and_is_named",
            faults::one_sided::a_killed_rank_ends_the_waits_of_kernels_and_is_named,
        ),
        (
            "gpu_matrix::processes_have_the_bits_of_the_reference",
            faults::gpu_matrix::processes_have_the_bits_of_the_reference,
        ),
        (
            "gpu_seats::ranks_with_two_devices_are_killed_and_the_others_go_on",
            faults::gpu_seats::ranks_with_two_devices_are_killed_and_the_others_go_on,
        ),
        (
            "gpu_hang::a_call_that_hangs_is_explained_from_outside",
            faults::gpu_hangs::a_call_that_hangs_is_explained_from_outside,
        ),
        (
            "gpu_hang::opposite_orders_are_well_unless_kernels_must_be_loaded",
            faults::gpu_hangs::opposite_orders_are_well_unless_kernels_must_be_loaded,
        ),
        (
            "gpu_hang::calls_on_host_and_gpu_are_told_both",
            faults::gpu_hangs::calls_on_host_and_gpu_are_told_both,
        ),
    ]
}
