//! Collectives on GPUs against the scalar reference: every form, dtype, reduction, kind of size and alignment, with as many
//! ranks as one likes, whatever number of devices there is. Without a device every test says so and passes.
#![cfg(feature = "cuda")]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "seeds, and what is skipped, are said")]

#[path = "gpu/all_to_all_v.rs"]
mod all_to_all_v;
#[path = "support/gpu_case.rs"]
mod case;
#[path = "gpu/counted.rs"]
mod counted;
#[path = "gpu/derive.rs"]
mod derive;
#[path = "gpu/engine.rs"]
mod engine;
#[path = "ep/cases.rs"]
mod ep;
#[path = "gpu/expert_cases.rs"]
mod expert_cases;
#[path = "gpu/expert_life.rs"]
mod expert_life;
#[path = "gpu/expert_parallel.rs"]
mod expert_parallel;
#[path = "gpu/expert_tools.rs"]
mod expert_tools;
#[path = "gpu/fused.rs"]
mod fused;
#[path = "gpu/group.rs"]
mod group;
#[path = "gpu/life.rs"]
mod life;
#[path = "gpu/lines.rs"]
mod lines;
#[path = "gpu/low_latency.rs"]
mod low_latency;
#[path = "gpu/message_ends.rs"]
mod message_ends;
#[path = "gpu/messages.rs"]
mod messages;
#[path = "gpu/pinned.rs"]
mod pinned;
#[path = "gpu/places.rs"]
mod places;
#[path = "gpu/quantised.rs"]
mod quantised;
#[path = "gpu/random.rs"]
mod random;
#[path = "gpu/random_more.rs"]
mod random_more;
#[path = "gpu/recorder.rs"]
mod recorder;
#[path = "gpu/registration.rs"]
mod registration;
#[path = "gpu/seats.rs"]
mod seats;
#[path = "gpu/seats_random.rs"]
mod seats_random;
mod support;
#[path = "gpu/symmetric.rs"]
mod symmetric;
#[path = "gpu/tuning.rs"]
mod tuning;
#[path = "gpu/windows.rs"]
mod windows;
#[path = "gpu/world.rs"]
mod world;

use support::{quantised as quantised_sums, random as numbers, rows, scale};

use numbers::Random;
use unisono::{Builder, DType, ReduceOp};
use unisono_core::device::Form;
use world::{Case, Operation, World, devices};

/// World sizes: all of them with one device as well, where ranks share it; and always one with a rank on each device.
const SIZES: [usize; 4] = [1, 2, 3, 5];

/// All operations; those whose parts may have any size come last.
pub(crate) const OPERATIONS: [Operation; 10] = [
    Operation::AllReduce,
    Operation::Broadcast,
    Operation::AllGather,
    Operation::Reduce,
    Operation::ReduceScatter,
    Operation::Gather,
    Operation::Scatter,
    Operation::AllToAll,
    Operation::AllGatherV,
    Operation::ReduceScatterV,
];

/// Operations with parts of their own for each rank, or with one rank that gets all.
const OTHERS: &[Operation] = OPERATIONS.split_at(3).1;

fn for_worlds(test: impl Fn(usize, &[u32])) {
    let devices = devices();
    for ranks in SIZES.into_iter().chain((!SIZES.contains(&devices.len())).then_some(devices.len())) {
        if !devices.is_empty() {
            test(ranks, &devices);
        }
    }
}

#[test]
fn every_form_moves_and_reduces_every_kind_of_size() {
    for_worlds(|ranks, devices| {
        let mut forms: Vec<Option<(Form, u32)>> =
            Form::ALL.into_iter().filter(|form| *form != Form::Direct).map(|form| Some((form, 0))).collect();
        // Few blocks move tiles by bulk copies where there are any, many by threads; 4 are fewer channels than there are ranks.
        let with_blocks = [(Form::Ring, 5), (Form::Ring, 90), (Form::Bulk, 4), (Form::Bulk, 90)];
        forms.extend(with_blocks.map(Some));
        forms.push(None);
        for (turn, form) in forms.into_iter().enumerate() {
            let world = World::new(ranks, devices, |builder| match form {
                Some((form, blocks)) => builder.gpu_algorithm(form, blocks),
                None => builder,
            });
            let form = form.map(|(form, _)| form);
            for count in [0, 1, 5, 6, 7, 1000, 4096, 100_003, 1 << 20] {
                for (way, (is_in_place, offset)) in
                    [(false, 0), (true, 0), (false, 2)].into_iter().enumerate()
                {
                    // What takes long to compare is compared in one of these ways, in each form in another.
                    if count > 100_000 && (turn + ranks) % 3 != way {
                        continue;
                    }
                    let case = Case {
                        dtype: DType::BF16,
                        op: ReduceOp::Sum,
                        count,
                        is_in_place,
                        offset,
                        ..Case::default()
                    };
                    world.check(&case, form);
                    world.check(&Case { operation: Operation::Broadcast, root: ranks / 2, ..case }, form);
                    world.check(&Case { operation: Operation::AllGather, ..case }, form);
                    for operation in OTHERS.iter().copied() {
                        world.check(&Case { operation, root: ranks / 2, ..case }, form);
                    }
                }
            }
            world.barrier();
            world.end();
        }
    });
}

fn pairs() -> impl Iterator<Item = (DType, ReduceOp)> {
    let all = DType::ALL.into_iter().flat_map(|dtype| ReduceOp::ALL.map(|op| (dtype, op)));
    all.filter(|(dtype, op)| unisono::reduce_op::check(*dtype, *op).is_ok())
}

#[test]
fn every_dtype_and_reduction_has_the_bits_of_the_reference() {
    for_worlds(|ranks, devices| {
        if ranks != 3 {
            return;
        }
        for form in [Form::OneShot, Form::TwoShot, Form::Bulk, Form::OneShotLines, Form::TwoShotLines] {
            let all = |builder: Builder| {
                pairs().fold(builder.gpu_algorithm(form, 0), |builder, (dtype, op)| {
                    builder.prepare(dtype, op).unwrap()
                })
            };
            let world = World::new(ranks, devices, all);
            for (dtype, op) in pairs() {
                for operation in [
                    Operation::AllReduce,
                    Operation::Reduce,
                    Operation::ReduceScatter,
                    Operation::ReduceScatterV,
                ] {
                    world.check(&Case { operation, dtype, op, count: 777, ..Case::default() }, Some(form));
                }
            }
            world.end();
        }
    });
}

#[test]
fn epochs_that_wrap_clear_the_arenas_and_go_on() {
    for_worlds(|ranks, devices| {
        for epoch in [0x7fff_fffa, 0xffff_fffa] {
            for form in [Form::OneShot, Form::Bulk, Form::Ring, Form::OneShotLines, Form::TwoShotLines] {
                let world =
                    World::new(ranks, devices, |builder| builder.gpu_algorithm(form, 0).first_epoch(epoch));
                for count in 0..12 {
                    let case = Case { dtype: DType::I32, count: 100 * count, ..Case::default() };
                    world.check(&case, Some(form));
                }
                world.end();
            }
        }
    });
}

#[test]
fn pinned_host_memory_serves_where_gpus_do_not_reach_each_other() {
    for_worlds(|ranks, devices| {
        for form in [Form::OneShot, Form::TwoShot, Form::Bulk, Form::Ring] {
            let world =
                World::new(ranks, devices, |builder| builder.gpu_algorithm(form, 0).peer_access(false));
            for count in [1, 1000, 50_001, 300_000] {
                let case = Case { dtype: DType::F32, count, ..Case::default() };
                world.check(&case, Some(form));
                world.check(&Case { operation: Operation::AllGather, ..case }, Some(form));
                world.check(&Case { operation: Operation::Broadcast, root: ranks - 1, ..case }, Some(form));
                for operation in OTHERS.iter().copied() {
                    world.check(&Case { operation, ..case }, Some(form));
                }
            }
            world.end();
        }
    });
}
