//! NVRTC, the run-time compiler: looked for where CUDA and Python put it, opened when something must be compiled.
//!
//! It gives CUBINs, machine code for one architecture, so that the driver compiles nothing.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use libloading::Library;

use crate::error::{Error, Result};
use crate::places::{named, python_packages};

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
}

/// The compiler, once it was found.
pub struct Compiler {
    symbols: Symbols,
    version: (u32, u32),
    path: PathBuf,
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

impl Compiler {
    /// Finds the compiler: where `UNISONO_NVRTC` says (a file or a folder), where the system's loader looks, in toolkits, in
    /// Python's packages. What the first search answered stands.
    ///
    /// # Errors
    /// [`Error::NoCompiler`] if there is none, or the one that was named is of no use; [`Error::TooOld`].
    pub fn find() -> Result<&'static Self> {
        static FOUND: OnceLock<Result<Compiler>> = OnceLock::new();
        FOUND
            .get_or_init(|| Self::search(&|name| std::env::var_os(name).map(PathBuf::from)))
            .as_ref()
            .map_err(Clone::clone)
    }

    fn search(environment: &dyn Fn(&str) -> Option<PathBuf>) -> Result<Self> {
        let none = |reason: String| Err(Error::NoCompiler { reason });
        if let Some(named) = environment("UNISONO_NVRTC") {
            let places = if named.is_dir() { libraries_in(&named) } else { vec![named.clone()] };
            return match places.iter().map(|path| Self::open(path)).next() {
                Some(opened) => opened.or_else(|error| none(format!("UNISONO_NVRTC names it, but {error}"))),
                None => none(format!("UNISONO_NVRTC names {}, which holds none", named.display())),
            };
        }
        for name in ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"] {
            if let Ok(compiler) = Self::open(Path::new(name)) {
                return Ok(compiler);
            }
        }
        let folders = folders(environment);
        for path in folders.iter().flat_map(|folder| libraries_in(folder)) {
            if let Ok(compiler) = Self::open(&path) {
                return Ok(compiler);
            }
        }
        none(format!(
            "not with the system's loader, nor in {} folders of toolkits and Python packages",
            folders.len()
        ))
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
                // SAFETY: the documented signature of this function, unchanged since CUDA 11.
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
        };
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both answers are ours.
        unsafe { (symbols.version)(&raw mut major, &raw mut minor) };
        libraries.push(library);
        let version = (major.unsigned_abs(), minor.unsigned_abs());
        let compiler =
            Self { symbols, version, path: path.to_owned(), turn: Mutex::new(()), _libraries: libraries };
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

    /// Compiles `source` to a CUBIN.
    ///
    /// # Errors
    /// [`Error::Compile`] with what the compiler says.
    pub fn compile(&self, source: &Source, architecture: Architecture) -> Result<Vec<u8>> {
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

/// Where toolkits and Python's packages put it.
fn folders(environment: &dyn Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    let mut toolkit = |root: PathBuf| {
        folders.extend([root.join("lib64"), root.join("targets/x86_64-linux/lib"), root.join("lib")]);
    };
    ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(|name| environment(name)).for_each(&mut toolkit);
    let mut versions = named(Path::new("/usr/local"), "cuda");
    versions.sort();
    versions.into_iter().rev().for_each(&mut toolkit);
    for nvidia in python_packages(environment) {
        folders.extend([nvidia.join("cu13/lib"), nvidia.join("cuda_nvrtc/lib")]);
    }
    folders.retain(|folder| folder.is_dir());
    folders
}

/// The compilers in a folder, newest first.
fn libraries_in(folder: &Path) -> Vec<PathBuf> {
    let mut found = named(folder, "libnvrtc.so");
    found.sort();
    found.reverse();
    found
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

    #[test]
    fn a_compiler_that_was_named_and_is_not_there_is_an_error_that_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let environment = |name: &str| (name == "UNISONO_NVRTC").then(|| folder.path().to_owned());
        let error = Compiler::search(&environment).unwrap_err();
        assert!(
            matches!(&error, Error::NoCompiler { reason } if reason.ends_with("which holds none")),
            "{error}"
        );
        std::fs::write(folder.path().join("libnvrtc.so.13"), "no library").unwrap();
        let error = Compiler::search(&environment).unwrap_err();
        assert!(
            matches!(&error, Error::NoCompiler { reason } if reason.contains("names it, but")),
            "{error}"
        );
    }
}
