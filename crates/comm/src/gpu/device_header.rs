//! The header for users' kernels over one-sided memory: one text, put together from `kernels/device.cuh`, the PTX that our own
//! kernels are made of, and what both sides must agree on.

use unisono_core::device::layout::MAX_RANKS;
use unisono_core::layout::{SIGNAL_SLOTS, SIGNAL_STRIDE};

use super::one_sided::{DeviceView, MISSED_PACKET_AT, MISSED_SIGNAL_AT};

const HEADER: &str = include_str!("../../kernels/device.cuh");
const PTX: &str = include_str!("../../kernels/ptx.cuh");

/// Name and text of the header `unisono/device.cuh`, for kernels of one's own over one-sided memory of devices: what
/// [`Symmetric::device_view`](crate::Symmetric::device_view) gives is a `unisono::Symmetric` there. The text says how it is used.
/// It includes nothing. For NVRTC it goes to the headers of a [`Source`](unisono_cuda::Source); for nvcc, `unisono kernels header
/// DIR` writes it to a folder. Header and library must be of the same version.
///
/// ```
/// use unisono::cuda::Source;
///
/// const KERNEL: &str = r#"
/// #include <unisono/device.cuh>
///
/// // One block: tells the next rank, and waits until the rank before has told us.
/// extern "C" __global__ void pass(unisono::Symmetric shared) {
///   shared.signal_block((shared.rank + 1) % shared.ranks, 0, 1);
///   if (!shared.wait_signal_block(0, 1)) return;
/// }
/// "#;
/// let headers = vec![unisono::device_header()];
/// let source = Source { name: "pass.cu", text: KERNEL, headers, definitions: Vec::new() };
/// # assert!(source.headers[0].1.contains("wait_signal_block"));
/// // Compiled with `unisono::cuda::Cache::of_user().cubin(…)`, loaded with `Module::load`, launched with `Function::launch`.
/// ```
pub fn device_header() -> (&'static str, String) {
    let mut text = String::new();
    for line in HEADER.lines() {
        match line {
            "#include \"device_layout.cuh\"" => text += &definitions(),
            "#include \"ptx.cuh\"" => PTX.lines().filter(|line| *line != "#pragma once").for_each(|line| {
                text.push_str(line);
                text.push('\n');
            }),
            line => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    ("unisono/device.cuh", text)
}

fn definitions() -> String {
    let all = [
        ("MAX_RANKS", MAX_RANKS),
        ("SIGNAL_SLOTS", SIGNAL_SLOTS),
        ("SIGNAL_STRIDE", SIGNAL_STRIDE),
        ("MISSED_SIGNAL", MISSED_SIGNAL_AT / 4),
        ("MISSED_PACKET", MISSED_PACKET_AT / 4),
        ("SYMMETRIC_BYTES", size_of::<DeviceView>()),
    ];
    all.map(|(name, value)| format!("#define UNISONO_{name} {value}\n")).concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_one_text_that_includes_nothing() {
        let (name, text) = device_header();
        assert_eq!(name, "unisono/device.cuh");
        let directive =
            |which: &str| text.lines().filter(|line| line.trim_start().starts_with(which)).count();
        assert_eq!((directive("#include"), directive("#pragma once")), (0, 1));
        assert!(text.contains("#define UNISONO_MAX_RANKS 16\n#define UNISONO_SIGNAL_SLOTS 64\n"), "{text}");
        assert!(text.contains("void store_line(") && text.contains("struct Symmetric {"), "{text}");
    }
}
