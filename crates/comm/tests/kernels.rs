//! All kernels compile for all architectures, without a GPU, and spill nothing that matters. Needs NVRTC, which
//! `cargo xtask test` provides; without it (and without its order to have it) the test says so and passes.
#![cfg(feature = "cuda")]
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tells what kernels take, and what is skipped"
)]

use unisono::cuda::{Architecture, Cache, Compiler, Source};
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

/// Compiles each kernel set and says what its kernels take.
fn compile(architecture: &str, ranks: usize, link: Link, purposes: &[Purpose]) {
    let Some(_) = compiler() else { return };
    let target: Architecture = architecture.parse().unwrap();
    let layout = ArenaLayout::new(ranks, link);
    for purpose in purposes {
        let cubin = Cache::of_user().cubin(&source(&layout, *purpose), target, Compiler::find).unwrap();
        let facts = unisono::cuda::kernels(&cubin).unwrap();
        assert!(facts.len() >= 2, "{architecture} {purpose:?} {facts:?}");
        for kernel in &facts {
            println!(
                "{architecture} {ranks} ranks, {link:?}, {purpose:?}: {} {} registers, {} bytes of stack, {} of code",
                kernel.name, kernel.registers, kernel.stack_bytes, kernel.code_bytes
            );
            // The threads of a block share 65,536 registers. Those of tiles have 1,024 where there are bulk copies.
            let has_tiles = kernel.name.ends_with("_bulk") || kernel.name.ends_with("_ring");
            let of_messages = ["messages", "in_place", "counted"];
            let has_tiles = has_tiles || of_messages.iter().any(|name| kernel.name.starts_with(name));
            let is_large = has_tiles && link == Link::Device && architecture != "sm_80";
            let most = if is_large { 64 } else { 128 };
            assert!(kernel.registers <= most, "{architecture} {purpose:?} {kernel:?}");
            assert!(kernel.stack_bytes <= 1024, "{architecture} {purpose:?} {kernel:?}");
        }
    }
}

/// One reduction of each dtype, all reductions among them.
fn one_of_each_dtype() -> Vec<Purpose> {
    let one = |(at, dtype): (usize, DType)| {
        let ops = ReduceOp::ALL.into_iter().cycle().skip(at);
        let op = ops.take(9).find(|op| unisono::reduce_op::check(dtype, *op).is_ok());
        Purpose::reduce(dtype, op.unwrap())
    };
    DType::ALL.into_iter().enumerate().map(one).collect()
}

const SOME: [Purpose; 12] = [
    Purpose::Copies,
    Purpose::Fused(DType::BF16),
    Purpose::Fused(DType::F16),
    Purpose::Quantised(DType::BF16),
    Purpose::Quantised(DType::F16),
    Purpose::Quantised(DType::F32),
    Purpose::Parts,
    Purpose::Messages,
    Purpose::AllToAllV,
    Purpose::reduce_parts(DType::BF16, ReduceOp::Sum),
    Purpose::reduce(DType::BF16, ReduceOp::Sum),
    Purpose::reduce(DType::Complex128, ReduceOp::PreMulSum(1.0)),
];

#[test]
fn kernels_compile_for_ampere() {
    compile("sm_80", 8, Link::Device, &SOME);
}

#[test]
fn kernels_compile_for_hopper_over_nvlink() {
    compile("sm_90", 8, Link::Device, &SOME);
}

#[test]
fn kernels_compile_for_hopper_over_host_memory() {
    compile("sm_90", 2, Link::Host, &SOME[..11]);
}

#[test]
fn kernels_compile_for_blackwell() {
    compile("sm_100", 8, Link::Device, &SOME);
}

#[test]
fn kernels_compile_for_every_dtype() {
    compile("sm_90", 2, Link::Device, &one_of_each_dtype());
}

/// The kernel of a test that looks for lines which are not whole, over the headers of our own.
#[test]
fn the_kernel_that_hammers_on_lines_compiles() {
    let Some(_) = compiler() else { return };
    for ranks in [2, 4, 8] {
        let layout = ArenaLayout::new(ranks, Link::Device);
        let text = include_str!("gpu/lines.cu");
        let source = Source { name: "lines.cu", text, ..source(&layout, Purpose::Copies) };
        let cubin = Cache::of_user().cubin(&source, "sm_90".parse().unwrap(), Compiler::find).unwrap();
        let facts = unisono::cuda::kernels(&cubin).unwrap();
        assert!(facts.len() == 1 && facts[0].registers <= 128 && facts[0].stack_bytes <= 256, "{facts:?}");
    }
}

/// Those of expert parallelism, for few ranks, for as many as a box has, and for the most that there may be.
#[test]
fn kernels_of_expert_parallelism_compile() {
    let Some(_) = compiler() else { return };
    for (architecture, ranks) in [("sm_80", 8), ("sm_90", 8), ("sm_90", 1), ("sm_90", 16), ("sm_100", 8)] {
        for source in unisono::ep::kernels::sources(ranks) {
            let target = architecture.parse().unwrap();
            let cubin = Cache::of_user().cubin(&source, target, Compiler::find).unwrap();
            let facts = unisono::cuda::kernels(&cubin).unwrap();
            assert!(!facts.is_empty(), "{architecture} {}", source.name);
            for kernel in facts {
                println!("{architecture} {ranks} ranks, {}: {kernel:?}", source.name);
                // Whoever has a row for each rank has fewer threads where there are more than eight.
                let most = match &*kernel.name {
                    "ep_dispatch" => 64,
                    name if name.starts_with("ep_combine") && ranks <= 8 => 80,
                    _ => 168,
                };
                assert!(kernel.registers <= most, "{architecture} {ranks} {kernel:?}");
                assert!(kernel.stack_bytes <= 256, "{architecture} {ranks} {kernel:?}");
            }
        }
    }
}

/// Kernels of users, over the header for one-sided memory: of the example, of the tests, and of the README.
fn users() -> [(&'static str, &'static str); 3] {
    let readme = include_str!("../../../README.md");
    let (_, kernel) = readme.split_once("```cuda\n").unwrap();
    [
        ("device_header.cu", include_str!("../examples/device_header.cu")),
        ("symmetric.cu", include_str!("gpu/symmetric.cu")),
        ("README.md", kernel.split_once("```").unwrap().0),
    ]
}

#[test]
fn kernels_of_users_compile_with_the_device_header() {
    let Some(_) = compiler() else { return };
    for (name, text) in users() {
        for architecture in ["sm_80", "sm_90", "sm_100"] {
            let headers = vec![unisono::device_header()];
            let source = Source { name, text, headers, definitions: Vec::new() };
            let target = architecture.parse().unwrap();
            let cubin = Cache::of_user().cubin(&source, target, Compiler::find).unwrap();
            for kernel in unisono::cuda::kernels(&cubin).unwrap() {
                println!("{architecture} {name}: {kernel:?}");
                assert!(kernel.registers <= 64 && kernel.stack_bytes <= 256, "{architecture} {kernel:?}");
            }
        }
    }
}
