//! What the fuzz targets call. Only with the feature `fuzzing`, and no promise.

use crate::facts::sample::{attribute, cubin as sample};
use crate::facts::{FRAME_SIZE, MIN_STACK_SIZE, REGISTER_COUNT, kernels};

/// Reads a CUBIN. What is accepted has no two kernels of a name, and no more code than bytes for each.
///
/// # Panics
/// If that is not so.
pub fn cubin(bytes: &[u8]) {
    match kernels(bytes) {
        Ok(kernels) => {
            assert!(kernels.is_sorted_by(|first, second| first.name < second.name));
            assert!(kernels.iter().all(|kernel| kernel.code_bytes <= bytes.len() as u64));
        }
        Err(error) => drop(error.to_string()),
    }
}

/// CUBINs as older and newer compilers write them.
pub fn cubin_seeds() -> Vec<Vec<u8>> {
    let mut attributes = attribute(REGISTER_COUNT, 1, 40);
    attributes.extend(attribute(FRAME_SIZE, 1, 16));
    attributes.extend([3, 0x50, 1, 0]);
    attributes.extend(attribute(MIN_STACK_SIZE, 1, 288));
    vec![sample(&attributes, 0), sample(&[], 72)]
}
