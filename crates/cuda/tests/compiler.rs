//! The run-time compiler and the cache of what it made, with a small kernel. No GPU is needed, but NVRTC: without it the tests
//! say that they did nothing, or fail if `UNISONO_TEST_REQUIRE_NVRTC` is set, as `cargo xtask test` does.

use std::path::PathBuf;
use std::sync::Barrier;

use unisono_cuda::{Architecture, Cache, Compiler, Error, KernelFacts, Source, kernels};

/// Copies, in the ways that our kernels do: a load that sees other devices' stores and, since `sm_90`, a bulk copy.
const COPY: &str = r#"
extern "C" __global__ void copy_some(uint4* to, const uint4* from, unsigned bytes) {
    __shared__ alignas(16) uint4 part[BLOCK];
    uint4 value;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from + threadIdx.x) : "memory");
    part[threadIdx.x] = value;
    __syncthreads();
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                     :: "l"(to), "r"((unsigned)__cvta_generic_to_shared(part)), "r"(bytes) : "memory");
        asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
    }
#else
    to[threadIdx.x] = part[BLOCK - 1 - threadIdx.x];
#endif
}
extern "C" __global__ void nothing() {}
"#;
const BLOCK: u32 = 128;
const SM_80: Architecture = Architecture { major: 8, minor: 0 };
const SM_90: Architecture = Architecture { major: 9, minor: 0 };
const SM_100: Architecture = Architecture { major: 10, minor: 0 };

fn compiler() -> Option<&'static Compiler> {
    match Compiler::find() {
        Ok(compiler) => Some(compiler),
        Err(error) if std::env::var_os("UNISONO_TEST_REQUIRE_NVRTC").is_some() => panic!("{error}"),
        Err(error) => {
            #[expect(clippy::print_stderr, reason = "for whoever reads the output of tests")]
            {
                eprintln!("SKIPPED: {error}");
            }
            None
        }
    }
}

fn source(text: &'static str) -> Source {
    let definitions = vec![("BLOCK", BLOCK.to_string())];
    Source { name: "copy.cu", text, headers: Vec::new(), definitions }
}

fn no_compiler() -> Result<&'static Compiler, Error> {
    Err(Error::NoCompiler { reason: "it must not be asked for".to_owned() })
}

/// What lies in a folder.
fn files(folder: &std::path::Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn a_kernel_compiles_for_each_generation_and_tells_what_it_takes() {
    let Some(compiler) = compiler() else { return };
    let declared = BLOCK * 16;
    for architecture in [SM_80, SM_90, SM_100] {
        let cubin = compiler.compile(&source(COPY), architecture).unwrap();
        let kernels = kernels(&cubin).unwrap();
        let names: Vec<&str> = kernels.iter().map(|kernel| kernel.name.as_str()).collect();
        assert_eq!(names, ["copy_some", "nothing"], "{architecture}");
        let KernelFacts { registers, stack_bytes, shared_bytes, code_bytes, .. } = kernels[0];
        assert!((4..=64).contains(&registers), "{architecture}: {registers} registers");
        assert_eq!(stack_bytes, 0, "{architecture}");
        let reserved = shared_bytes - declared;
        assert!(
            reserved == 0 || (architecture >= SM_90 && reserved <= 1024),
            "{architecture}: {shared_bytes}"
        );
        assert!(code_bytes > kernels[1].code_bytes && code_bytes.is_multiple_of(16), "{kernels:?}");
    }
}

#[test]
fn a_shortened_cubin_is_an_error() {
    let Some(compiler) = compiler() else { return };
    let cubin = compiler.compile(&source(COPY), SM_90).unwrap();
    // The program headers stand behind all that is read, so the last few hundred bytes are not missed.
    for length in (0..cubin.len() - 1024).step_by(7) {
        let facts = kernels(&cubin[..length]);
        assert!(matches!(facts, Err(Error::NoCubin { .. })), "{length} of {}: {facts:?}", cubin.len());
    }
}

#[test]
fn a_source_that_does_not_compile_is_an_error_that_names_the_line() {
    let Some(compiler) = compiler() else { return };
    let broken = "extern \"C\" __global__ void f(int* x) {\n    *x = 1;\n    *x = not_declared;\n}\n";
    match compiler.compile(&source(broken), SM_90) {
        Err(Error::Compile { what, architecture, log }) => {
            assert_eq!((what.as_str(), architecture.as_str()), ("copy.cu", "sm_90"));
            assert!(log.contains("copy.cu(3)") && log.contains("not_declared"), "{log}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_architecture_that_the_compiler_does_not_know_is_an_error_that_lists_those_that_it_knows() {
    let Some(compiler) = compiler() else { return };
    let known = compiler.architectures();
    assert!(known.is_sorted() && known.contains(&SM_80) && known.contains(&SM_90), "{known:?}");
    let (first, unknown) = (known[0], Architecture { major: 5, minor: 1 });
    assert!(compiler.supports(first) && !compiler.supports(unknown));
    match compiler.compile(&source(COPY), unknown) {
        Err(Error::Unsupported { architecture, version, supported }) => {
            let (major, minor) = compiler.version();
            assert_eq!((architecture.as_str(), version), ("sm_51", format!("{major}.{minor}")));
            assert!(supported.starts_with(&format!("{first}, ")), "{supported}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_damaged_entry_is_compiled_again_and_replaced() {
    let Some(compiler) = compiler() else { return };
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path().to_owned());
    let cubin = cache.cubin(&source(COPY), SM_80, || Ok(compiler)).unwrap();
    let [entry] = &files(folder.path())[..] else { panic!("{:?}", files(folder.path())) };
    let whole = std::fs::read(entry).unwrap();
    let mut damaged = whole.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0x10;
    for damaged in [damaged, whole[..whole.len() - 1].to_vec(), Vec::new()] {
        std::fs::write(entry, damaged).unwrap();
        assert!(matches!(cache.cubin(&source(COPY), SM_80, no_compiler), Err(Error::NoCompiler { .. })));
        assert_eq!(cache.cubin(&source(COPY), SM_80, || Ok(compiler)), Ok(cubin.clone()));
        assert_eq!(std::fs::read(entry).unwrap(), whole);
    }
    assert_eq!(files(folder.path()), std::slice::from_ref(entry));
}

#[test]
fn eight_threads_that_ask_at_once_leave_one_whole_entry() {
    let Some(compiler) = compiler() else { return };
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path().join("kernels"));
    let start = Barrier::new(8);
    let cubins: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let ask = || {
            start.wait();
            cache.cubin(&source(COPY), SM_90, || Ok(compiler)).unwrap()
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(cubins.iter().all(|cubin| *cubin == cubins[0]));
    assert_eq!(cache.cubin(&source(COPY), SM_90, no_compiler), Ok(cubins[0].clone()));
    let left = files(cache.folder().unwrap());
    assert_eq!(left.len(), 1, "{left:?}");
}
