//! What decides forms and grids from outside: a tuning file, and a cap on multiprocessors.

use std::collections::BTreeMap;

use unisono::tuning::device::Table;
use unisono::tuning::{DIRECT_FORMS, Origin, Tuning, machine};
use unisono::{Communicator, Error, Form, Kind, ReduceOp};

use crate::world::{Case, Operation, World, devices};

const SUM: Kind = Kind::AllReduce { op: ReduceOp::Sum };

/// Writes a tuning file for two ranks on devices of this name.
fn write(path: &std::path::Path, name: &str, table: Table) {
    let tuning = Tuning::new(&machine(), BTreeMap::new()).with_gpus(name, BTreeMap::from([(2, table)]));
    std::fs::write(path, tuning.to_text(&[])).unwrap();
}

#[test]
fn a_tuning_file_decides_forms_and_grids_and_is_told_of() {
    let devices = devices();
    let Some(first) = devices.first() else { return };
    let name = unisono::cuda::Device::new(*first).unwrap().facts().name.clone();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("gpus.tune");
    let mut table = Table::built_in(2);
    let row = table.row_mut(SUM);
    (row.one_shot_to, row.two_shot_to, row.packet_blocks) = (1000, 5000, 3);
    (row.lines_from, row.ring_from, row.narrow_ring_from) = (usize::MAX, usize::MAX, usize::MAX);
    (row.bulk_blocks, row.thread_blocks) = (9, 9);
    write(&path, &name, table);
    let file = path.to_str();
    let tuned = |ranks| World::new(ranks, &devices, |builder| builder.tune_file(file));
    let world = tuned(2);
    for (bytes, form, blocks) in
        [(1000, Form::OneShot, 2), (5000, Form::TwoShot, 3), (6000, Form::Bulk, 3), (8 << 20, Form::Bulk, 9)]
    {
        let launch = world.ranks[1].gpu_choice(SUM, bytes, 4).unwrap();
        assert_eq!((launch.form, launch.blocks), (form, blocks), "{bytes}");
        world.check(&Case { count: bytes / 4, ..Case::default() }, None);
    }
    world.check(&Case { operation: Operation::AllGather, count: 3001, ..Case::default() }, None);
    let explained = world.ranks[0].observer().explain();
    let gpus = explained.gpus.clone().unwrap();
    assert_eq!((gpus.table, gpus.origin), (table, Origin::TuningFile(path.display().to_string())));
    assert!(
        explained.to_string().contains("all_reduce: one-shot up to 1000 B, two-shot up to "),
        "{explained}"
    );
    world.end();
    // Worlds of another size have the defaults, and say so.
    let three = tuned(3);
    let gpus = three.ranks[0].observer().explain().gpus.unwrap();
    assert_eq!(
        (gpus.table, gpus.origin),
        (Table::built_in(3), Origin::NotInFile(path.display().to_string()))
    );
    three.end();
    // Devices of another kind have nothing to do with it.
    write(&path, "Abacus", table);
    let refused = Communicator::builder().tune_file(file).local(&[*first]).unwrap_err();
    let Error::TuneFile { message, .. } = &refused else { panic!("{refused}") };
    assert_eq!(*message, format!("it was measured on Abacus; this machine is {name}"));
}

#[test]
fn a_cap_on_multiprocessors_holds_for_every_call_and_is_told_of() {
    let devices = devices();
    for cap in [9, 16, 40] {
        if devices.is_empty() {
            return;
        }
        let world = World::new(2, &devices, |builder| builder.multiprocessors(cap));
        let gpus = world.ranks[0].observer().explain().gpus.unwrap();
        assert!(gpus.multiprocessors <= cap, "{gpus}");
        for kind in DIRECT_FORMS {
            for shift in 3..=30 {
                let launch = world.ranks[0].gpu_choice(kind, 1 << shift, 2).unwrap();
                assert!(launch.multiprocessors() <= cap, "{kind:?} of 2^{shift}: {launch:?}");
            }
        }
        for count in [1, 70_000, 3_000_000] {
            world.check(&Case { count, ..Case::default() }, None);
            world.check(&Case { operation: Operation::AllToAll, count, ..Case::default() }, None);
        }
        world.end();
    }
}

#[test]
fn a_cap_that_leaves_too_little_is_refused_before_a_device_is_opened() {
    let refused = Communicator::builder().multiprocessors(8).local(&[0, 1]).unwrap_err();
    assert_eq!(
        refused,
        Error::Argument {
            call: "Builder::multiprocessors",
            rank: 0,
            what: "number of multiprocessors",
            expected: "9 or more".to_owned(),
            got: "8".to_owned(),
        }
    );
}
