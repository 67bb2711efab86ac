//! NVRTC, the run-time compiler: looked for where CUDA and Python put it, opened when something must be compiled.
//!
//! It gives CUBINs, machine code for one architecture, so that the driver compiles nothing.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use libloading::Library;

use crate::error::{Error, Result};
use crate::places::named;

mod search;

/// A kind of GPU, as machine code is made for it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Architecture {
    /// Before the point of the compute capability.
    pub major: u32,
    /// Behind it.
    pub minor: u32,
}

impl std::fmt::Display for Architecture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sm_{}{}", self.major, self.minor)
    }
}

impl std::str::FromStr for Architecture {
    type Err = String;

    /// Reads `sm_90` or `90`.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let digits = text.strip_prefix("sm_").unwrap_or(text);
        match digits.parse::<u32>() {
            Ok(number) if (50..1000).contains(&number) => Ok(Self { major: number / 10, minor: number % 10 }),
            _ => Err(format!("expected an architecture such as sm_90, got `{text}`")),
        }
    }
}

/// What is compiled: a file, what it includes, and what is defined for it.
#[derive(Clone, Debug)]
pub struct Source {
    /// The name of the file.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
    /// Names and texts of the files that can be included.
    pub headers: Vec<(&'static str, String)>,
    /// Names and values of macros.
    pub definitions: Vec<(&'static str, String)>,
}

type Handle = *mut std::ffi::c_void;

/// The functions of the library that we use.
struct Symbols {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    create: unsafe extern "C" fn(
        *mut Handle,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> c_int,
    log_size: unsafe extern "C" fn(Handle, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Handle, *mut c_char) -> c_int,
    cubin_size: unsafe extern "C" fn(Handle, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Handle, *mut c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Handle) -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
    count_architectures: unsafe extern "C" fn(*mut c_int) -> c_int,
    architectures: unsafe extern "C" fn(*mut c_int) -> c_int,
}

/// The compiler, once it was found.
pub struct Compiler {
    symbols: Symbols,
    version: (u32, u32),
    path: PathBuf,
    /// Ascending.
    architectures: Vec<Architecture>,
    /// Versions before 12 compile one thing at a time.
    turn: Mutex<()>,
    _libraries: Vec<Library>,
}

impl std::fmt::Debug for Compiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NVRTC {}.{} at {}", self.version.0, self.version.1, self.path.display())
    }
}

/// A program that is being compiled, destroyed in the end.
struct Program<'c> {
    compiler: &'c Compiler,
    handle: Handle,
}

impl Symbols {
    /// What the library compiles for, ascending; empty if it does not tell.
    fn all_architectures(&self) -> Vec<Architecture> {
        let mut count = 0;
        // SAFETY: the answer is ours.
        let told = unsafe { (self.count_architectures)(&raw mut count) };
        // No library knows a thousand.
        let Some(count) = usize::try_from(count).ok().filter(|count| told == 0 && *count < 1000) else {
            return Vec::new();
        };
        let mut numbers = vec![0; count];
        // SAFETY: the list is as long as the library said.
        if unsafe { (self.architectures)(numbers.as_mut_ptr()) } != 0 {
            return Vec::new();
        }
        let numbers = numbers.into_iter().filter_map(|number| u32::try_from(number).ok());
        let mut all: Vec<_> =
            numbers.map(|number| Architecture { major: number / 10, minor: number % 10 }).collect();
        all.sort_unstable();
        all
    }
}

impl Compiler {
    /// Finds the compiler: where `UNISONO_NVRTC` says (a file or a folder), where the system's loader looks, in toolkits, in
    /// Python's packages. What the first search answered stands.
    ///
    /// # Errors
    /// [`Error::NoCompiler`] if there is none, or the one that was named is of no use; [`Error::TooOld`] if there are none but
    /// such.
    pub fn find() -> Result<&'static Self> {
        static FOUND: OnceLock<Result<Compiler>> = OnceLock::new();
        FOUND
            .get_or_init(|| search::first(&|name| std::env::var_os(name).map(PathBuf::from), &Self::open))
            .as_ref()
            .map_err(Clone::clone)
    }

    fn open(path: &Path) -> Result<Self> {
        let failed = |error: libloading::Error| Error::NoCompiler { reason: error.to_string() };
        let mut libraries = Vec::new();
        // The compiler asks for this one by its bare name; it must be there already where no loader would find it.
        if let Some(folder) = path.parent().filter(|folder| folder.is_absolute()) {
            for builtins in named(folder, "libnvrtc-builtins.so") {
                // SAFETY: a library of the same vendor beside the one that was asked for.
                libraries.extend(unsafe { Library::new(builtins) }.ok());
            }
        }
        // SAFETY: NVRTC's initialisers do nothing but set up the library.
        let library = unsafe { Library::new(path) }.map_err(failed)?;
        macro_rules! symbol {
            ($name:literal) => {
                // SAFETY: the documented signature of this function, unchanged since CUDA 11.2.
                *unsafe { library.get(concat!($name, "\0").as_bytes()) }
                    .map_err(|_| Error::TooOld { library: "NVRTC", symbol: $name.to_owned() })?
            };
        }
        let symbols = Symbols {
            version: symbol!("nvrtcVersion"),
            create: symbol!("nvrtcCreateProgram"),
            compile: symbol!("nvrtcCompileProgram"),
            log_size: symbol!("nvrtcGetProgramLogSize"),
            log: symbol!("nvrtcGetProgramLog"),
            cubin_size: symbol!("nvrtcGetCUBINSize"),
            cubin: symbol!("nvrtcGetCUBIN"),
            destroy: symbol!("nvrtcDestroyProgram"),
            error: symbol!("nvrtcGetErrorString"),
            count_architectures: symbol!("nvrtcGetNumSupportedArchs"),
            architectures: symbol!("nvrtcGetSupportedArchs"),
        };
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both answers are ours.
        unsafe { (symbols.version)(&raw mut major, &raw mut minor) };
        libraries.push(library);
        let version = (major.unsigned_abs(), minor.unsigned_abs());
        let compiler = Self {
            architectures: symbols.all_architectures(),
            symbols,
            version,
            path: path.to_owned(),
            turn: Mutex::new(()),
            _libraries: libraries,
        };
        tracing::debug!("{compiler:?}");
        Ok(compiler)
    }

    /// Its version, as (13, 0).
    pub const fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Where it lies, as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it compiles for, ascending; empty if it does not tell.
    pub fn architectures(&self) -> &[Architecture] {
        &self.architectures
    }

    /// Whether it compiles for `architecture`; true, too, if it does not tell.
    pub fn supports(&self, architecture: Architecture) -> bool {
        self.architectures.is_empty() || self.architectures.contains(&architecture)
    }

    /// Compiles `source` to a CUBIN.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the compiler does not know the architecture; [`Error::Compile`] with what it says.
    pub fn compile(&self, source: &Source, architecture: Architecture) -> Result<Vec<u8>> {
        if !self.supports(architecture) {
            let known: Vec<String> = self.architectures.iter().map(ToString::to_string).collect();
            let (major, minor) = self.version;
            return Err(Error::Unsupported {
                architecture: architecture.to_string(),
                version: format!("{major}.{minor}"),
                supported: known.join(", "),
            });
        }
        let _turn = (self.version.0 < 12).then(|| self.turn.lock().unwrap_or_else(PoisonError::into_inner));
        let failed = |log: String| Error::Compile {
            what: source.name.to_owned(),
            architecture: architecture.to_string(),
            log,
        };
        let terminated =
            |text: &str| CString::new(text).map_err(|_| failed("a zero byte in the source".to_owned()));
        let (text, name) = (terminated(source.text)?, terminated(source.name)?);
        let headers: Vec<CString> =
            source.headers.iter().map(|(_, text)| terminated(text)).collect::<Result<_>>()?;
        let names: Vec<CString> =
            source.headers.iter().map(|(name, _)| terminated(name)).collect::<Result<_>>()?;
        let options: Vec<CString> =
            options(source, architecture).iter().map(|option| terminated(option)).collect::<Result<_>>()?;
        let pointers = |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
        let (headers_raw, names_raw, options_raw) =
            (pointers(&headers), pointers(&names), pointers(&options));
        let mut program = Program { compiler: self, handle: std::ptr::null_mut() };
        // SAFETY: all texts are terminated and live over the calls; the lists are as long as they say.
        let result = unsafe {
            (self.symbols.create)(
                &raw mut program.handle,
                text.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                headers_raw.as_ptr(),
                names_raw.as_ptr(),
            )
        };
        if result != 0 {
            return Err(failed(self.describe(result)));
        }
        // SAFETY: as above.
        let result =
            unsafe { (self.symbols.compile)(program.handle, options.len() as c_int, options_raw.as_ptr()) };
        if result != 0 {
            return Err(failed(program.log().unwrap_or_else(|| self.describe(result))));
        }
        program
            .read(self.symbols.cubin_size, self.symbols.cubin)
            .ok_or_else(|| failed("it gave no CUBIN".to_owned()))
    }

    fn describe(&self, result: c_int) -> String {
        // SAFETY: it answers with a static text for any number.
        let text = unsafe { (self.symbols.error)(result) };
        if text.is_null() {
            return format!("NVRTC error {result}");
        }
        // SAFETY: a terminated text, as above.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}

impl Program<'_> {
    fn log(&self) -> Option<String> {
        let bytes = self.read(self.compiler.symbols.log_size, self.compiler.symbols.log)?;
        let text = String::from_utf8_lossy(&bytes);
        let text = text.trim_end_matches('\0').trim();
        (!text.is_empty()).then(|| text.to_owned())
    }

    fn read(
        &self,
        size: unsafe extern "C" fn(Handle, *mut usize) -> c_int,
        content: unsafe extern "C" fn(Handle, *mut c_char) -> c_int,
    ) -> Option<Vec<u8>> {
        let mut bytes = 0;
        // SAFETY: the program lives, and the answer is ours.
        if unsafe { size(self.handle, &raw mut bytes) } != 0 || bytes == 0 {
            return None;
        }
        let mut buffer = vec![0u8; bytes];
        // SAFETY: the buffer is as long as the library said.
        (unsafe { content(self.handle, buffer.as_mut_ptr().cast()) } == 0).then_some(buffer)
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: it is ours. An error has nobody to go to.
            let _ = unsafe { (self.compiler.symbols.destroy)(&raw mut self.handle) };
        }
    }
}

/// What the compiler is told, the macros last. Results must be those of the scalar reference: nothing is fused, nothing
/// flushed to zero.
pub(crate) fn options(source: &Source, architecture: Architecture) -> Vec<String> {
    let mut options = vec![format!("--gpu-architecture={architecture}")];
    options.extend(
        ["-std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "-default-device", "-w"]
            .map(str::to_owned),
    );
    options.extend(source.definitions.iter().map(|(name, value)| format!("-D{name}={value}")));
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architectures_read_and_print() {
        assert_eq!("sm_90".parse(), Ok(Architecture { major: 9, minor: 0 }));
        assert_eq!("100".parse(), Ok(Architecture { major: 10, minor: 0 }));
        assert_eq!(Architecture { major: 12, minor: 1 }.to_string(), "sm_121");
        assert!("sm_ninety".parse::<Architecture>().unwrap_err().contains("sm_ninety"));
    }
}
