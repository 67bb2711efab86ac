//! Holds the scalar reference of every reduction still: one hash per (dtype, op, world), in `tests/golden/reduce.txt`. Kernels and
//! collectives are held to the same hashes by tests of their own.
//!
//! A difference means that results change for users; if that is meant,
//! `UNISONO_BLESS=1 cargo test -p unisono-core --test golden_reduce` writes the file anew.

#[path = "../../../tests/golden/inputs.rs"]
mod inputs;

use inputs::{COUNT, PATH, WORLDS, line, reductions, scalar};
use unisono_core::reduce_op::reference;

const HEADER: &str = "# SHA-256 of the results over seeded inputs: dtype op world hash\n";

#[test]
fn the_reference_answers_what_it_always_answered() {
    let mut text = HEADER.to_owned();
    for (dtype, op) in reductions() {
        for world_size in WORLDS {
            let buffers = inputs::inputs(dtype, op, world_size);
            let inputs: Vec<_> = buffers.iter().map(Vec::as_slice).collect();
            let scalars: Vec<_> = (0..world_size).map(scalar).collect();
            let mut output = vec![0xee; COUNT * dtype.size()];
            reference(dtype, op, &inputs, &scalars, &mut output).unwrap();
            text += &(line(dtype, op, world_size, &output) + "\n");
        }
    }
    if std::env::var_os("UNISONO_BLESS").is_some_and(|value| value == "1") {
        std::fs::write(PATH, &text).unwrap();
    }
    let golden = std::fs::read_to_string(PATH).unwrap();
    for (ours, golden) in text.lines().zip(golden.lines()) {
        assert_eq!(ours, golden);
    }
    assert_eq!(text.lines().count(), golden.lines().count());
}
