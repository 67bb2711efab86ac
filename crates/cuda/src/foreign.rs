//! Memory of a GPU that somebody else allocated: what the driver knows of it, and how other devices of this process and other
//! processes come to reach it.
//!
//! An address may lie in the middle of an allocation, and is used again once that is gone; so the driver is asked for the
//! allocation, and allocations are told apart by the numbers that the driver gives them. There are two ways out of a process.
//! Memory of `cuMemCreate` goes as file descriptors, one for each mapping that the range touches (torch's expandable
//! segments consist of many). Memory of `cudaMalloc` goes as a handle of CUDA IPC, which names the whole allocation. Memory
//! of stream-ordered pools and managed memory have no way that serves here, and are refused.

use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys;

use crate::device::Device;
use crate::driver::check;
use crate::error::{Error, Result};
use crate::memory::Location;
use crate::memory::pages::{self, Pages};

mod imported;
mod leases;

pub use imported::Imported;

/// The most mappings that a range may touch.
pub const MAX_PIECES: usize = 512;
/// Bytes of a handle of CUDA IPC.
pub const IPC_HANDLE_BYTES: usize = 64;

/// How memory leaves its process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// By a handle of CUDA IPC: memory of `cudaMalloc`.
    Ipc,
    /// As file descriptors: memory of `cuMemCreate`.
    Descriptors,
    /// Not at all: `cudaMalloc` where the system has no CUDA IPC.
    Nowhere,
}

/// An allocation, or one mapping of `cuMemMap`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Its first byte.
    pub base: u64,
    /// Its length.
    pub bytes: usize,
    /// The driver's number of the memory behind it, which no other memory of this process ever has; 0 if it tells none.
    pub id: u64,
}

/// A range of memory that somebody else allocated, and that lies inside one allocation (or mappings that follow each other).
/// It says what was found; it keeps nothing alive.
#[derive(Clone, Debug)]
pub struct Foreign {
    device: Device,
    address: u64,
    bytes: usize,
    way: Way,
    pieces: Vec<Piece>,
}

impl Foreign {
    /// What the driver knows of `bytes` at `address`, which should be memory of `device`.
    ///
    /// # Errors
    /// [`Error::Memory`] if it is memory of another kind or device, or does not lie inside one allocation; what the driver
    /// refuses.
    pub fn find(device: &Device, address: u64, bytes: usize) -> Result<Self> {
        let _current = device.enter()?;
        let attributes = Attributes::of(device, address)?;
        attributes.check(device.ordinal())?;
        let handle = (!attributes.has_ipc).then(|| Pages::at(address)).flatten();
        let way = match (attributes.has_ipc, &handle) {
            (true, _) => Way::Ipc,
            (false, Some(_)) => Way::Descriptors,
            (false, None) => Way::Nowhere,
        };
        let mut pieces = cover((address, bytes), way == Way::Descriptors, &|at| range(device, at))?;
        for piece in &mut pieces {
            let attributes = Attributes::of(device, piece.base)?;
            attributes.check(device.ordinal())?;
            piece.id = match way {
                Way::Descriptors => block(piece.base),
                Way::Ipc | Way::Nowhere => attributes.buffer,
            };
        }
        Ok(Self { device: device.clone(), address, bytes, way, pieces })
    }

    /// The first byte.
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// How far it lies behind the first byte of the first piece.
    pub fn offset(&self) -> u64 {
        self.pieces.first().map_or(0, |piece| self.address - piece.base)
    }

    /// How it leaves this process.
    pub const fn way(&self) -> Way {
        self.way
    }

    /// What it touches, in order; at least one.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Lets kernels of another device of this process reach it; for as long as the memory exists.
    ///
    /// # Errors
    /// What the driver refuses: that device cannot.
    pub fn allow(&self, device: &Device) -> Result<()> {
        // The driver refuses two changes of one range at once.
        static CHANGES: Mutex<()> = Mutex::new(());
        if device == &self.device {
            return Ok(());
        }
        let _alone = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
        let _current = device.enter()?;
        if self.way != Way::Descriptors {
            // SAFETY: both contexts are kept for the life of the process.
            return match unsafe { sys::cuCtxEnablePeerAccess(self.device.context(), 0) } {
                sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
                result => check("cuCtxEnablePeerAccess", device.ordinal(), result),
            };
        }
        for piece in &self.pieces {
            let (range, place) = ((piece.base, piece.bytes), pages::place(device, Location::Device));
            // SAFETY: the piece is mapped, as the driver said, and stays so while its owner takes part in this.
            unsafe { pages::allow(device, range, place) }?;
        }
        Ok(())
    }

    /// The handle of CUDA IPC of the allocation. Whoever opens it reaches all of that.
    ///
    /// # Errors
    /// [`Error::Memory`] if it has another way; what the driver refuses.
    pub fn ipc_handle(&self) -> Result<[u8; IPC_HANDLE_BYTES]> {
        let (Way::Ipc, [piece]) = (self.way, &self.pieces[..]) else {
            return Err(no_way("memory of cudaMalloc, on a system with CUDA IPC", self.way));
        };
        let _current = self.device.enter()?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; IPC_HANDLE_BYTES] };
        // SAFETY: the allocation lives, and the answer is ours.
        let result = unsafe { sys::cuIpcGetMemHandle(&raw mut handle, piece.base) };
        check("cuIpcGetMemHandle", self.device.ordinal(), result)?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }

    /// A descriptor of the memory behind piece number `piece`.
    ///
    /// # Errors
    /// [`Error::Memory`] if it was made without the right to be exported, or is gone; what the driver refuses.
    pub fn descriptor(&self, piece: usize) -> Result<OwnedFd> {
        let _current = self.device.enter()?;
        let base = self.pieces.get(piece).map_or(0, |piece| piece.base);
        let Some(pages) = Pages::at(base) else {
            return Err(no_way("memory of cuMemCreate", self.way));
        };
        let exported = pages.export(&self.device);
        if exported.is_err() && !pages.can_be_exported() {
            let expected = "memory of cuMemCreate that may be exported as a file descriptor".to_owned();
            let got = "memory that was made without CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR".to_owned();
            return Err(Error::Memory { expected, got });
        }
        exported
    }
}

fn no_way(expected: &str, way: Way) -> Error {
    let got = match way {
        Way::Ipc => "memory of cudaMalloc",
        Way::Descriptors => "memory of cuMemCreate",
        Way::Nowhere => "memory that CUDA IPC cannot hand to other processes on this system",
    };
    Error::Memory { expected: expected.to_owned(), got: got.to_owned() }
}

/// What the driver says of an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Attributes {
    /// 0 if the driver does not know the address.
    memory_type: u64,
    buffer: u64,
    ordinal: i32,
    is_managed: bool,
    has_ipc: bool,
    pool: u64,
}

impl Attributes {
    fn of(device: &Device, address: u64) -> Result<Self> {
        use sys::CUpointer_attribute as Which;
        let mut which = [
            Which::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
            Which::CU_POINTER_ATTRIBUTE_BUFFER_ID,
            Which::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
            Which::CU_POINTER_ATTRIBUTE_IS_MANAGED,
            Which::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE,
            Which::CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE,
        ];
        // Each answer has at most 8 bytes, and those it has not stay zero.
        let mut answers = [0u64; 6];
        let mut places = answers.each_mut().map(|answer| (&raw mut *answer).cast());
        // SAFETY: as many attributes as places, each with room for its answer. Any address may be asked for.
        let result = unsafe {
            sys::cuPointerGetAttributes(which.len() as u32, which.as_mut_ptr(), places.as_mut_ptr(), address)
        };
        check("cuPointerGetAttributes", device.ordinal(), result)?;
        let [memory_type, buffer, ordinal, is_managed, has_ipc, pool] = answers;
        let (is_managed, has_ipc) = (is_managed != 0, has_ipc != 0);
        Ok(Self { memory_type, buffer, ordinal: ordinal as i32, is_managed, has_ipc, pool })
    }

    /// Refuses what is no memory of device `ordinal` that others can reach.
    fn check(&self, ordinal: u32) -> Result<()> {
        let refuse = |got: String| {
            let expected = format!("memory of cuda:{ordinal} from cudaMalloc or cuMemCreate");
            Err(Error::Memory { expected, got })
        };
        if self.is_managed {
            return refuse("managed memory, which moves between host and GPU".to_owned());
        }
        match self.memory_type {
            0 => return refuse("an address that the driver does not know".to_owned()),
            kind if kind == sys::CUmemorytype_enum::CU_MEMORYTYPE_DEVICE as u64 => {}
            _ => return refuse("host memory".to_owned()),
        }
        if self.ordinal != ordinal as i32 {
            return refuse(format!("memory of cuda:{}", self.ordinal));
        }
        if self.pool != 0 {
            let hint = "in torch, PYTORCH_CUDA_ALLOC_CONF=backend:native";
            return refuse(format!("memory of a stream-ordered pool (cudaMallocAsync; {hint})"));
        }
        Ok(())
    }
}

/// The allocation or mapping around an address, if there is one.
fn range(device: &Device, at: u64) -> Result<Option<(u64, usize)>> {
    let (mut base, mut bytes) = (0, 0);
    // SAFETY: both answers are ours. Any address may be asked for.
    match unsafe { sys::cuMemGetAddressRange_v2(&raw mut base, &raw mut bytes, at) } {
        sys::CUresult::CUDA_ERROR_NOT_FOUND | sys::CUresult::CUDA_ERROR_INVALID_VALUE => Ok(None),
        result => {
            check("cuMemGetAddressRange", device.ordinal(), result)?;
            Ok(Some((base, bytes)))
        }
    }
}

/// The pieces that `bytes` at `address` touch, as `range_at` finds them; only one unless `may_follow` each other.
fn cover(
    (address, bytes): (u64, usize),
    may_follow: bool,
    range_at: &dyn Fn(u64) -> Result<Option<(u64, usize)>>,
) -> Result<Vec<Piece>> {
    let Some(end) = address.checked_add(bytes as u64) else {
        return Err(outside(bytes, 0));
    };
    let (mut at, mut pieces) = (address, Vec::new());
    loop {
        // What does not hold the address would be no progress.
        let found = range_at(at)?.filter(|(base, length)| (*base..base + *length as u64).contains(&at));
        let is_next = pieces.is_empty() || may_follow;
        let Some((base, length)) = found.filter(|(base, _)| is_next && (pieces.is_empty() || *base == at))
        else {
            return Err(outside(bytes, at - address));
        };
        pieces.push(Piece { base, bytes: length, id: 0 });
        at = base + length as u64;
        if at >= end {
            return Ok(pieces);
        }
        if pieces.len() == MAX_PIECES {
            let expected = format!("memory in at most {MAX_PIECES} mappings");
            return Err(Error::Memory { expected, got: format!("more, for {bytes} bytes") });
        }
    }
}

fn outside(bytes: usize, inside: u64) -> Error {
    Error::Memory {
        expected: format!("{bytes} bytes inside one allocation"),
        got: format!("only {inside} bytes there"),
    }
}

/// The driver's number of the memory that is mapped at an address; 0 if it is too old to tell. (The number of the *buffer*
/// may be that of the reserved addresses, behind which the memory changes.)
fn block(address: u64) -> u64 {
    let (mut id, which) = (0u64, sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID);
    // SAFETY: the answer is ours, and has 8 bytes.
    let result = unsafe { sys::cuPointerGetAttribute((&raw mut id).cast(), which, address) };
    if result == sys::CUresult::CUDA_SUCCESS { id } else { 0 }
}

#[cfg(test)]
mod tests;
