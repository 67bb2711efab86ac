//! The errors of CUDA: what is missing, and what the driver or the compiler refused.

#[cfg(test)]
mod sentences;

/// Result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with GPUs.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no driver, or no GPU that this process may use.
    #[error("no CUDA device: {reason}. Host memory works without one.")]
    NoDevice {
        /// What was looked for, and what happened.
        reason: String,
    },
    /// A device that does not exist was asked for.
    #[error("there is no cuda:{ordinal}; this process sees {count} devices")]
    NoSuchDevice {
        /// The ordinal that was asked for.
        ordinal: u32,
        /// How many there are.
        count: u32,
    },
    /// The driver refused a call.
    #[error("{call} failed on cuda:{ordinal}: {name} ({message})")]
    Driver {
        /// The function of the driver.
        call: &'static str,
        /// The device of the current context.
        ordinal: u32,
        /// The driver's name of the error, as `CUDA_ERROR_OUT_OF_MEMORY`.
        name: String,
        /// What it means.
        message: String,
    },
    /// Memory has no fabric handle, or the driver does not take one.
    #[error(
        "cuda:{ordinal} hands no memory over by fabric handles: {reason}. They need an IMEX channel (nvidia-imex); UNISONO_HANDLES=descriptor does without."
    )]
    NoFabric {
        /// The device.
        ordinal: u32,
        /// Why.
        reason: String,
    },
    /// Memory that somebody else allocated is not what it should be.
    #[error("expected {expected}, got {got}")]
    Memory {
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// The run-time compiler cannot be found.
    #[error(
        "NVRTC, the run-time compiler of CUDA, was not found: {reason}. Install it with pip install nvidia-cuda-nvrtc, or name it with UNISONO_NVRTC."
    )]
    NoCompiler {
        /// Where it was looked for.
        reason: String,
    },
    /// A kernel does not compile.
    #[error("{what} does not compile for {architecture}: {log}")]
    Compile {
        /// The source file.
        what: String,
        /// As `sm_90`.
        architecture: String,
        /// What the compiler says.
        log: String,
    },
    /// The compiler does not know the architecture: it is too new for it, or was given up.
    #[error(
        "NVRTC {version} does not compile for {architecture}, but for {supported}. Name one of another version with UNISONO_NVRTC."
    )]
    Unsupported {
        /// As `sm_90`.
        architecture: String,
        /// The version of the compiler, as `13.0`.
        version: String,
        /// What it compiles for, as `sm_80, sm_90`.
        supported: String,
    },
    /// Bytes that should be machine code for a GPU are not.
    #[error("this is no whole CUBIN: {reason}")]
    NoCubin {
        /// What is wrong with them.
        reason: String,
    },
    /// A library has not the function that is needed.
    #[error("{library} is too old: it has no {symbol}")]
    TooOld {
        /// The library.
        library: &'static str,
        /// The function.
        symbol: String,
    },
    /// A file of the kernel cache cannot be used.
    #[error("the kernel cache at {path} cannot be used: {message}")]
    Cache {
        /// The file or folder.
        path: String,
        /// What went wrong.
        message: String,
    },
}

/// What the driver calls errors after which nothing works in the context any more.
const FATAL: [&str; 13] = [
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    "CUDA_ERROR_DEVICE_UNAVAILABLE",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_NVLINK_UNCORRECTABLE",
];

impl Error {
    /// Whether the context of the device is lost: a kernel went where it must not, or the device failed.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::Driver { name, .. } if FATAL.contains(&name.as_str()))
    }

    /// Whether the driver has no memory left for what was asked of it.
    pub fn is_shortage(&self) -> bool {
        matches!(self, Self::Driver { name, .. } if name == "CUDA_ERROR_OUT_OF_MEMORY")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_context_is_told_from_a_call_that_was_refused() {
        let error =
            |name: &str| Error::Driver { call: "cuX", ordinal: 0, name: name.into(), message: "".into() };
        assert!(error("CUDA_ERROR_ILLEGAL_ADDRESS").is_fatal());
        assert!(!error("CUDA_ERROR_ILLEGAL_ADDRESS").is_shortage());
        assert!(!error("CUDA_ERROR_OUT_OF_MEMORY").is_fatal());
        assert!(error("CUDA_ERROR_OUT_OF_MEMORY").is_shortage());
        assert!(FATAL.is_sorted());
    }
}
