//! All kernels compile for all architectures, without a GPU, and spill nothing that matters. Needs NVRTC, which
//! `cargo xtask test` provides; without it (and without its order to have it) the test says so and passes.
#![cfg(feature = "cuda")]
#![expect(clippy::print_stderr, reason = "what is skipped is said")]

use unisono::cuda::{Architecture, Cache, Compiler};
use unisono::gpu::kernels::{Purpose, source};
use unisono::{DType, ReduceOp};
use unisono_core::device::{ArenaLayout, Link};

fn compiler() -> Option<&'static Compiler> {
    match Compiler::find() {
        Ok(compiler) => Some(compiler),
        Err(error) if std::env::var_os("UNISONO_TEST_REQUIRE_NVRTC").is_none() => {
            eprintln!("SKIPPED: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn kernels_compile_for_every_architecture_link_and_kind_of_element() {
    let Some(_) = compiler() else { return };
    let cache = Cache::of_user();
    for architecture in ["sm_80", "sm_90", "sm_100"] {
        let architecture: Architecture = architecture.parse().unwrap();
        for (ranks, link) in [(8, Link::Device), (2, Link::Host)] {
            let layout = ArenaLayout::new(ranks, link);
            for purpose in [
                Purpose::Copies,
                Purpose::reduce(DType::BF16, ReduceOp::Sum),
                Purpose::reduce(DType::F8E5M2, ReduceOp::Avg),
                Purpose::reduce(DType::Complex128, ReduceOp::PreMulSum(1.0)),
            ] {
                let cubin = cache.cubin(&source(&layout, purpose), architecture, Compiler::find).unwrap();
                assert!(cubin.len() > 10_000, "{architecture} {purpose:?}");
            }
        }
    }
}
