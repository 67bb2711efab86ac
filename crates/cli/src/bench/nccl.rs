//! NCCL, measured beside ours: opened at run time, from where `UNISONO_NCCL` says, the system's loader looks, or Python keeps it.
//!
//! Only its collectives are called. Which of its algorithms it takes is its own affair and the environment's.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};

use libloading::os::unix::{self, RTLD_LOCAL, RTLD_NOW};
use unisono::cuda::{Device, Stream, places};
use unisono::{DType, Kind, ReduceOp};

const NAME: &str = "libnccl.so.2";
/// Bytes of what ranks need to find each other.
pub(super) const ID_BYTES: usize = 128;

#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId {
    bytes: [u8; ID_BYTES],
}

type Handle = *mut c_void;
type Move = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Handle, *mut c_void) -> c_int;
type MoveOfPeer = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int;
type MoveOfRoot =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int;

/// The functions of the library that we use.
struct Symbols {
    version: unsafe extern "C" fn(*mut c_int) -> c_int,
    unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    init: unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int) -> c_int,
    all_reduce:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int,
    broadcast:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int,
    all_gather: Move,
    reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        c_int,
        Handle,
        *mut c_void,
    ) -> c_int,
    reduce_scatter:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int,
    /// Since 2.28, as the next two.
    all_to_all: Option<Move>,
    gather: Option<MoveOfRoot>,
    scatter: Option<MoveOfRoot>,
    /// The buffer is only read.
    send: MoveOfPeer,
    receive: MoveOfPeer,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    destroy: unsafe extern "C" fn(Handle) -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
}

/// The library, once it was found.
pub(super) struct Library {
    symbols: Symbols,
    version: String,
    path: PathBuf,
    /// Never closed: NCCL starts threads that run its code to the end of the process.
    _library: ManuallyDrop<unix::Library>,
}

impl Library {
    /// Finds it.
    ///
    /// # Errors
    /// Where it was looked for, if it is not there or of no use.
    pub(super) fn find() -> Result<Self, String> {
        Self::search(&|name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from))
    }

    fn search(environment: &dyn Fn(&str) -> Option<PathBuf>) -> Result<Self, String> {
        if let Some(named) = environment("UNISONO_NCCL") {
            let path = if named.is_dir() { named.join(NAME) } else { named };
            return Self::open(&path).map_err(|reason| format!("UNISONO_NCCL names an NCCL, but {reason}"));
        }
        if let Ok(library) = Self::open(Path::new(NAME)) {
            return Ok(library);
        }
        let places: Vec<PathBuf> = places::python_packages(environment)
            .into_iter()
            .map(|nvidia| nvidia.join("nccl/lib").join(NAME))
            .filter(|path| path.is_file())
            .collect();
        let mut last = "there is none in Python's packages".to_owned();
        for path in &places {
            match Self::open(path) {
                Ok(library) => return Ok(library),
                Err(reason) => last = reason,
            }
        }
        Err(format!(
            "--against nccl needs {NAME}, which the system's loader does not find, and {last}; UNISONO_NCCL names \
             the file or its folder"
        ))
    }

    fn open(path: &Path) -> Result<Self, String> {
        // SAFETY: NCCL's initialisers do nothing but set up the library.
        let library = unsafe { unix::Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }
            .map_err(|error| format!("{} cannot be opened: {error}", path.display()))?;
        macro_rules! symbol {
            ($name:literal) => {
                // SAFETY: the documented signature of this function, unchanged in all of NCCL 2.
                *unsafe { library.get(concat!($name, "\0").as_bytes()) }
                    .map_err(|_| format!("{} has no {}", path.display(), $name))?
            };
        }
        macro_rules! optional {
            ($name:literal) => {
                // SAFETY: as above, of NCCL 2.28 and later.
                unsafe { library.get(concat!($name, "\0").as_bytes()) }.ok().map(|symbol| *symbol)
            };
        }
        let symbols = Symbols {
            version: symbol!("ncclGetVersion"),
            unique_id: symbol!("ncclGetUniqueId"),
            init: symbol!("ncclCommInitRank"),
            all_reduce: symbol!("ncclAllReduce"),
            broadcast: symbol!("ncclBroadcast"),
            all_gather: symbol!("ncclAllGather"),
            reduce: symbol!("ncclReduce"),
            reduce_scatter: symbol!("ncclReduceScatter"),
            all_to_all: optional!("ncclAlltoAll"),
            gather: optional!("ncclGather"),
            scatter: optional!("ncclScatter"),
            send: symbol!("ncclSend"),
            receive: symbol!("ncclRecv"),
            group_start: symbol!("ncclGroupStart"),
            group_end: symbol!("ncclGroupEnd"),
            destroy: symbol!("ncclCommDestroy"),
            error: symbol!("ncclGetErrorString"),
        };
        let mut number = 0;
        // SAFETY: the answer is ours.
        symbols.check("ncclGetVersion", unsafe { (symbols.version)(&raw mut number) })?;
        Ok(Self {
            symbols,
            version: version(number),
            path: path.to_owned(),
            _library: ManuallyDrop::new(library),
        })
    }

    /// As `2.27.3`.
    pub(super) fn version(&self) -> &str {
        &self.version
    }

    /// Where it lies, as it was opened.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What one rank makes, and all give to [`Nccl::new`].
    pub(super) fn unique_id(&self) -> Result<[u8; ID_BYTES], String> {
        let mut id = UniqueId { bytes: [0; ID_BYTES] };
        // SAFETY: the answer is ours.
        self.symbols.check("ncclGetUniqueId", unsafe { (self.symbols.unique_id)(&raw mut id) })?;
        Ok(id.bytes)
    }
}

impl Symbols {
    fn check(&self, call: &str, result: c_int) -> Result<(), String> {
        if result == 0 {
            return Ok(());
        }
        // SAFETY: it answers with a static text for any number.
        let text = unsafe { (self.error)(result) };
        if text.is_null() {
            return Err(format!("{call} answers {result}"));
        }
        // SAFETY: a terminated text, as above.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
        Err(format!("{call}: {text} (NCCL_DEBUG=WARN says more)"))
    }
}

/// One rank's communicator of NCCL.
pub(super) struct Nccl {
    library: Library,
    device: Device,
    handle: Handle,
}

impl Nccl {
    /// Joins the others. Collective.
    pub(super) fn new(
        library: Library,
        device: &Device,
        (rank, ranks): (usize, usize),
        id: [u8; ID_BYTES],
    ) -> Result<Self, String> {
        let _current = device.enter().map_err(|error| error.to_string())?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the id is passed as it was made, and the answer is ours.
        let result = unsafe {
            (library.symbols.init)(&raw mut handle, ranks as c_int, UniqueId { bytes: id }, rank as c_int)
        };
        library.symbols.check("ncclCommInitRank", result)?;
        Ok(Self { library, device: device.clone(), handle })
    }

    /// The library that it comes from.
    pub(super) const fn library(&self) -> &Library {
        &self.library
    }

    /// Puts a call into `stream`: `count` elements of `dtype` from `source` to `target`, addresses in device memory.
    ///
    /// # Errors
    /// What NCCL refuses, and calls that [`lacks`] names.
    ///
    /// # Safety
    /// Both are valid for the call until the stream has passed it.
    pub(super) unsafe fn submit(
        &self,
        kind: Kind,
        dtype: DType,
        count: usize,
        (source, target): (u64, u64),
        stream: &Stream,
    ) -> Result<(), String> {
        let _current = self.device.enter().map_err(|error| error.to_string())?;
        let (source, target) = (source as *const c_void, target as *mut c_void);
        let (symbols, stream) = (&self.library.symbols, stream.raw());
        let bytes = count * dtype.size();
        match (kind, dtype_code(dtype), kind.op().and_then(op_code)) {
            (Kind::AllReduce { .. }, Some(dtype), Some(op)) => {
                // SAFETY: as the caller promises; communicator and stream live.
                let result =
                    unsafe { (symbols.all_reduce)(source, target, count, dtype, op, self.handle, stream) };
                symbols.check("ncclAllReduce", result)
            }
            (Kind::Broadcast { root }, ..) => {
                // SAFETY: as above.
                let result = unsafe {
                    (symbols.broadcast)(source, target, bytes, BYTES, root as c_int, self.handle, stream)
                };
                symbols.check("ncclBroadcast", result)
            }
            (Kind::AllGather, ..) => {
                // SAFETY: as above.
                let result =
                    unsafe { (symbols.all_gather)(source, target, bytes, BYTES, self.handle, stream) };
                symbols.check("ncclAllGather", result)
            }
            (Kind::Reduce { root, .. }, Some(dtype), Some(op)) => {
                let root = root as c_int;
                // SAFETY: as above.
                let result =
                    unsafe { (symbols.reduce)(source, target, count, dtype, op, root, self.handle, stream) };
                symbols.check("ncclReduce", result)
            }
            (Kind::ReduceScatter { .. }, Some(dtype), Some(op)) => {
                // SAFETY: as above.
                let result = unsafe {
                    (symbols.reduce_scatter)(source, target, count, dtype, op, self.handle, stream)
                };
                symbols.check("ncclReduceScatter", result)
            }
            (Kind::SendRecv { to, from, .. }, ..) => {
                let (to, from) = (to as c_int, from as c_int);
                // SAFETY: a group of this thread, which the next lines end.
                symbols.check("ncclGroupStart", unsafe { (symbols.group_start)() })?;
                // SAFETY: as above; a send only reads.
                let results = unsafe {
                    [
                        (symbols.send)(source.cast_mut(), bytes, BYTES, to, self.handle, stream),
                        (symbols.receive)(target, bytes, BYTES, from, self.handle, stream),
                    ]
                };
                // SAFETY: the group was begun.
                let ended = unsafe { (symbols.group_end)() };
                symbols.check("ncclSend", results[0])?;
                symbols.check("ncclRecv", results[1])?;
                symbols.check("ncclGroupEnd", ended)
            }
            _ => self.submit_late(kind, bytes, (source, target), stream),
        }
    }

    /// What older libraries do not have.
    fn submit_late(
        &self,
        kind: Kind,
        bytes: usize,
        (source, target): (*const c_void, *mut c_void),
        stream: *mut c_void,
    ) -> Result<(), String> {
        let symbols = &self.library.symbols;
        let result = match (kind, symbols.all_to_all, symbols.gather, symbols.scatter) {
            (Kind::AllToAll, Some(all_to_all), ..) => {
                // SAFETY: as the caller's caller promises; communicator and stream live.
                unsafe { all_to_all(source, target, bytes, BYTES, self.handle, stream) }
            }
            (Kind::Gather { root }, _, Some(gather), _) => {
                // SAFETY: as above.
                unsafe { gather(source, target, bytes, BYTES, root as c_int, self.handle, stream) }
            }
            (Kind::Scatter { root }, _, _, Some(scatter)) => {
                // SAFETY: as above.
                unsafe { scatter(source, target, bytes, BYTES, root as c_int, self.handle, stream) }
            }
            _ => return Err(format!("NCCL has no {}", kind.name())),
        };
        symbols.check(kind.name(), result)
    }

    /// What this NCCL has nothing for, as a sentence; `None` if it has the call. `kind` is none for a barrier.
    pub(super) fn lacks(&self, kind: Option<Kind>, dtype: DType) -> Option<String> {
        let symbols = &self.library.symbols;
        let is_missing = match kind {
            Some(Kind::AllToAll) => symbols.all_to_all.is_none(),
            Some(Kind::Gather { .. }) => symbols.gather.is_none(),
            Some(Kind::Scatter { .. }) => symbols.scatter.is_none(),
            _ => false,
        };
        match kind {
            Some(kind) if is_missing => Some(format!("NCCL {} has no {}", self.library.version, kind.name())),
            _ => lacks(kind, dtype),
        }
    }

    /// Leaves. Its work must be done. Who fails before lets the process end instead: nothing here waits for ranks that died.
    pub(super) fn end(self) -> Result<(), String> {
        let _current = self.device.enter().map_err(|error| error.to_string())?;
        // SAFETY: the communicator is ours, and used no more.
        let result = unsafe { (self.library.symbols.destroy)(self.handle) };
        self.library.symbols.check("ncclCommDestroy", result)
    }
}

/// What NCCL has nothing for, as a sentence; `None` if it has the call. `kind` is none for a barrier.
fn lacks(kind: Option<Kind>, dtype: DType) -> Option<String> {
    let Some(kind) = kind else { return Some("NCCL has no barrier".to_owned()) };
    if matches!(kind, Kind::AllReduceQuantised) {
        return Some("NCCL has no quantised all-reduce".to_owned());
    }
    match kind.op() {
        Some(op) if dtype_code(dtype).is_none() || op_code(op).is_none() => {
            Some(format!("NCCL has no {} of {dtype} by {op}", kind.name()))
        }
        _ => None,
    }
}

/// How NCCL calls bytes.
const BYTES: c_int = 1;

const fn dtype_code(dtype: DType) -> Option<c_int> {
    Some(match dtype {
        DType::I8 => 0,
        DType::U8 => 1,
        DType::I32 => 2,
        DType::U32 => 3,
        DType::I64 => 4,
        DType::U64 => 5,
        DType::F16 => 6,
        DType::F32 => 7,
        DType::F64 => 8,
        DType::BF16 => 9,
        _ => return None,
    })
}

const fn op_code(op: ReduceOp) -> Option<c_int> {
    Some(match op {
        ReduceOp::Sum => 0,
        ReduceOp::Prod => 1,
        ReduceOp::Max => 2,
        ReduceOp::Min => 3,
        ReduceOp::Avg => 4,
        _ => return None,
    })
}

fn version(number: c_int) -> String {
    // Since 2.9 the minor version has a digit more.
    let (major, rest) = if number < 10_000 { (1000, number % 1000) } else { (10_000, number % 10_000) };
    format!("{}.{}.{}", number / major, rest / 100, rest % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_as_they_are_written() {
        assert_eq!(version(22_703), "2.27.3");
        assert_eq!(version(2708), "2.7.8");
    }

    #[test]
    fn what_nccl_lacks_is_said() {
        let sum = Kind::AllReduce { op: ReduceOp::Sum };
        assert_eq!(lacks(Some(sum), DType::BF16), None);
        assert_eq!(lacks(Some(Kind::AllGather), DType::Bool), None);
        assert_eq!(lacks(None, DType::BF16), Some("NCCL has no barrier".to_owned()));
        let missing = Some("NCCL has no all_reduce of complex64 by sum".to_owned());
        assert_eq!(lacks(Some(sum), DType::Complex64), missing);
        let bits = Kind::AllReduce { op: ReduceOp::BitXor };
        assert_eq!(lacks(Some(bits), DType::U8), Some("NCCL has no all_reduce of u8 by bit_xor".to_owned()));
    }

    #[test]
    fn a_library_that_is_named_and_is_none_is_an_error_that_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let environment = |name: &str| (name == "UNISONO_NCCL").then(|| folder.path().to_owned());
        std::fs::write(folder.path().join(NAME), "no library").unwrap();
        let error = Library::search(&environment).err().unwrap();
        assert!(error.starts_with("UNISONO_NCCL names an NCCL, but "), "{error}");
        assert!(error.contains(NAME), "{error}");
    }
}
