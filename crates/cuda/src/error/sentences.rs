//! The sentence of every error, as people read it.

use super::Error;

/// One line per example: the variant, an error of it, its sentence. A variant without a line does not compile.
macro_rules! sentences {
    ($($variant:ident: $error:expr => $sentence:expr;)*) => {
        #[test]
        fn every_error_says_what_happened_and_what_to_do() {
            $(
                let error: Error = $error;
                assert!(matches!(error, Error::$variant { .. }), "{error:?}");
                assert_eq!(error.to_string(), $sentence);
            )*
        }

        #[expect(dead_code, reason = "it is there to compile")]
        fn has_a_sentence(error: &Error) {
            match error {
                $(Error::$variant { .. } => {})*
            }
        }
    };
}

sentences! {
    NoDevice: Error::NoDevice { reason: "there is no libcuda.so on this machine".into() }
        => "no CUDA device: there is no libcuda.so on this machine. Host memory works without one.";
    NoSuchDevice: Error::NoSuchDevice { ordinal: 8, count: 2 }
        => "there is no cuda:8; this process sees 2 devices";
    Driver: Error::Driver {
        call: "cuMemCreate",
        ordinal: 1,
        name: "CUDA_ERROR_OUT_OF_MEMORY".into(),
        message: "out of memory".into(),
    } => "cuMemCreate failed on cuda:1: CUDA_ERROR_OUT_OF_MEMORY (out of memory)";
    NoFabric: Error::NoFabric { ordinal: 2, reason: "the device does not offer them".into() }
        => "cuda:2 hands no memory over by fabric handles: the device does not offer them. They need an IMEX channel \
            (nvidia-imex); UNISONO_HANDLES=descriptor does without.";
    Memory: Error::Memory { expected: "memory of cuda:0".into(), got: "memory of cuda:1".into() }
        => "expected memory of cuda:0, got memory of cuda:1";
    NoCompiler: Error::NoCompiler { reason: "UNISONO_NVRTC names /opt/cuda, which holds none".into() }
        => "NVRTC, the run-time compiler of CUDA, was not found: UNISONO_NVRTC names /opt/cuda, which holds none. Install it \
            with pip install nvidia-cuda-nvrtc, or name it with UNISONO_NVRTC.";
    Compile: Error::Compile {
        what: "collectives.cu".into(),
        architecture: "sm_90".into(),
        log: "ring.cuh(12): error: identifier \"x\" is undefined".into(),
    } => "collectives.cu does not compile for sm_90: ring.cuh(12): error: identifier \"x\" is undefined";
    Unsupported: Error::Unsupported {
        architecture: "sm_70".into(),
        version: "13.0".into(),
        supported: "sm_75, sm_80, sm_90".into(),
    } => "NVRTC 13.0 does not compile for sm_70, but for sm_75, sm_80, sm_90. Name one of another version with \
          UNISONO_NVRTC.";
    NoCubin: Error::NoCubin { reason: "it does not begin as one".into() }
        => "this is no whole CUBIN: it does not begin as one";
    TooOld: Error::TooOld { library: "NVRTC", symbol: "nvrtcGetCUBIN".into() }
        => "NVRTC is too old: it has no nvrtcGetCUBIN";
    Cache: Error::Cache { path: "/var/cache/unisono".into(), message: "Permission denied (os error 13)".into() }
        => "the kernel cache at /var/cache/unisono cannot be used: Permission denied (os error 13)";
}
