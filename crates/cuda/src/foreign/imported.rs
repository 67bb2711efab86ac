//! Memory of another process, mapped for a device of this one.
//!
//! A handle of CUDA IPC may be open only once in a process, so whoever asks for the same allocation again gets the same
//! mapping, by the number that the owner's driver gave the allocation: addresses would not do, because they are used again.

use std::time::{Duration, Instant};

use cudarc::driver::sys;

use super::IPC_HANDLE_BYTES;
use super::leases::{Lease, Leases};
use crate::capture::drop_released;
use crate::device::Device;
use crate::driver::check;
use crate::error::{Error, Result};
use crate::memory::Location;
use crate::memory::pages::{self, Pages};

/// How long the driver may take to tell that a graph is gone.
const TELLS_WITHIN: Duration = Duration::from_secs(2);

/// Mappings that several may use.
static MAPPINGS: Leases<Key, Mapping> = Leases::new();

/// What tells memory of other processes apart, mapped for our devices.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Key {
    /// A number of the process whose memory it is, which no other process ever has.
    owner: [u8; 16],
    /// Our device.
    ordinal: u32,
    is_ipc: bool,
    /// The numbers that the owner's driver gave the memory.
    ids: Vec<u64>,
}

/// Memory of another process, mapped until the last who uses it is gone.
#[derive(Debug)]
pub struct Imported {
    address: u64,
    bytes: usize,
    _held: Held,
}

#[derive(Debug)]
#[expect(dead_code, reason = "held, not read")]
enum Held {
    Shared(Lease<Key, Mapping>),
    /// Of memory that has no number.
    Alone(Mapping),
}

impl Imported {
    /// Opens a handle of CUDA IPC that process `owner` made of its allocation number `id`, `bytes` long as it says. May drop what graphs that are
    /// gone have kept, so to be called where no kernel waits for this thread.
    ///
    /// # Errors
    /// What the driver refuses: the handle was made by this very process, or the allocation is gone. [`Error::Memory`] if it
    /// is shorter.
    pub fn open(
        device: &Device,
        owner: [u8; 16],
        (id, bytes): (u64, usize),
        handle: &[u8; IPC_HANDLE_BYTES],
    ) -> Result<Self> {
        let key = Key { owner, ordinal: device.ordinal(), is_ipc: true, ids: vec![id] };
        let key = (id != 0).then_some(key);
        let start = Instant::now();
        loop {
            let opened = Self::obtain(key.clone(), bytes, || Mapping::open(device, bytes, handle));
            // Memory that lay at this address of the owner before is still mapped here: a graph kept it that is gone, and the driver tells that
            // from a thread of its own, in its own time.
            let is_kept =
                matches!(&opened, Err(Error::Driver { name, .. }) if name == "CUDA_ERROR_ALREADY_MAPPED");
            if !is_kept || start.elapsed() > TELLS_WITHIN {
                return opened;
            }
            drop_released();
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Maps memory of process `owner` one after the other, each with its number there and its length.
    ///
    /// # Errors
    /// What the driver refuses: there is less memory than that.
    pub fn map(device: &Device, owner: [u8; 16], pieces: &[(Pages, u64, usize)]) -> Result<Self> {
        let ids: Vec<u64> = pieces.iter().map(|(_, id, _)| *id).collect();
        let bytes = pieces.iter().try_fold(0usize, |sum, (_, _, bytes)| sum.checked_add(*bytes));
        let Some(bytes) = bytes.filter(|bytes| *bytes > 0) else {
            return Err(shorter(usize::MAX, 0));
        };
        let is_known = !ids.contains(&0);
        let key = Key { owner, ordinal: device.ordinal(), is_ipc: false, ids };
        Self::obtain(is_known.then_some(key), bytes, || Mapping::map(device, bytes, pieces))
    }

    fn obtain(key: Option<Key>, bytes: usize, make: impl FnOnce() -> Result<Mapping>) -> Result<Self> {
        let ((address, mapped), held) = match key {
            Some(key) => {
                let (lease, told) = MAPPINGS.take(key, make, |mapping| (mapping.address, mapping.bytes))?;
                (told, Held::Shared(lease))
            }
            None => {
                let mapping = make()?;
                ((mapping.address, mapping.bytes), Held::Alone(mapping))
            }
        };
        // The same number with another length: its owner does not tell the truth.
        if mapped < bytes {
            return Err(shorter(bytes, mapped));
        }
        Ok(Self { address, bytes, _held: held })
    }

    /// The first byte, as kernels of our device call it.
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }
}

fn shorter(bytes: usize, got: usize) -> Error {
    Error::Memory { expected: format!("an allocation of {bytes} bytes"), got: format!("one of {got} bytes") }
}

/// A mapping that ends when it is dropped.
#[derive(Debug)]
struct Mapping {
    device: Device,
    address: u64,
    bytes: usize,
    /// Lengths of what is mapped, one after the other; none for CUDA IPC.
    mapped: Option<Vec<usize>>,
}

impl Mapping {
    fn open(device: &Device, bytes: usize, handle: &[u8; IPC_HANDLE_BYTES]) -> Result<Self> {
        let _current = device.enter()?;
        let handle = sys::CUipcMemHandle { reserved: handle.map(|byte| byte as std::ffi::c_char) };
        let lazily = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut address = 0;
        // SAFETY: the driver checks the handle, and the answer is ours.
        let result = unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut address, handle, lazily) };
        check("cuIpcOpenMemHandle", device.ordinal(), result)?;
        let opened = Self { device: device.clone(), address, bytes, mapped: None };
        // How long it is, only the driver knows for sure.
        if let Some((base, length)) = super::range(device, address)? {
            let there = (base + length as u64).saturating_sub(address) as usize;
            if there < bytes {
                return Err(shorter(bytes, there));
            }
        }
        Ok(opened)
    }

    fn map(device: &Device, bytes: usize, pieces: &[(Pages, u64, usize)]) -> Result<Self> {
        let _current = device.enter()?;
        let address = pages::reserve(device, bytes)?;
        let mut mapping = Self { device: device.clone(), address, bytes, mapped: Some(Vec::new()) };
        let mut at = address;
        for (pages, _, length) in pieces {
            // SAFETY: the range is ours and empty from here on.
            unsafe { pages.map(device, (at, *length)) }?;
            mapping.mapped.get_or_insert_default().push(*length);
            at += *length as u64;
        }
        // SAFETY: the range is mapped from end to end.
        unsafe { pages::allow(device, (address, bytes), pages::place(device, Location::Device)) }?;
        Ok(mapping)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let Ok(_current) = self.device.enter() else { return };
        // SAFETY: the mapping is ours; who still has kernels on it must not have dropped it. Errors have nobody to go to.
        unsafe {
            match &self.mapped {
                None => {
                    let _ = sys::cuIpcCloseMemHandle(self.address);
                }
                Some(lengths) => {
                    let mut at = self.address;
                    for length in lengths {
                        let _ = sys::cuMemUnmap(at, *length);
                        at += *length as u64;
                    }
                    let _ = sys::cuMemAddressFree(self.address, self.bytes);
                }
            }
        }
    }
}
