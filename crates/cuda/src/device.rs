//! A GPU: its primary context, kept for as long as anybody here uses it, and what it can do.

use std::cell::Cell;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use crate::driver::{check, device_count};
use crate::error::{Error, Result};

/// What tells a GPU from all others, whatever number it has in which process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Uuid(pub [u8; 16]);

impl std::fmt::Display for Uuid {
    /// As `GPU-01234567-89ab-…`, the way that `nvidia-smi` writes it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GPU")?;
        for (at, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02x}", if matches!(at, 0 | 4 | 6 | 8 | 10) { "-" } else { "" })?;
        }
        Ok(())
    }
}

/// A GPU that this process sees. Clones are the same device.
#[derive(Clone)]
pub struct Device {
    inner: Arc<Inner>,
}

struct Inner {
    ordinal: u32,
    device: sys::CUdevice,
    context: sys::CUcontext,
    facts: Facts,
}

/// What a device is and can do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    /// The name of the product.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// Where it is plugged in, as `0000:1b:00.0`.
    pub pci: String,
    /// Its compute capability, as (9, 0).
    pub capability: (u32, u32),
    /// Its streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of shared memory that a block can have.
    pub shared_bytes: u32,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// The NUMA node of its host, if that is known.
    pub numa_node: Option<u32>,
    /// Whether memory can be exported as a file descriptor.
    pub exports_descriptors: bool,
    /// Whether memory can be exported as a fabric handle.
    pub exports_fabric: bool,
    /// Whether memory of a host's NUMA node can be taken through the driver.
    pub takes_host_numa: bool,
}

// SAFETY: contexts of the driver belong to no thread; each thread makes them current for itself.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cuda:{} ({})", self.inner.ordinal, self.inner.facts.name)
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        self.inner.device == other.inner.device
    }
}

/// Makes a device current on this thread until it is dropped.
#[derive(Debug)]
pub struct Current<'d> {
    /// What was current before, if it was another one.
    before: Option<sys::CUcontext>,
    device: &'d Device,
}

impl Device {
    /// Device number `ordinal` of this process.
    ///
    /// # Errors
    /// [`Error::NoDevice`] without a driver; [`Error::NoSuchDevice`]; what the driver refuses.
    pub fn new(ordinal: u32) -> Result<Self> {
        static OPEN: Mutex<Vec<Device>> = Mutex::new(Vec::new());
        let count = device_count()?;
        if ordinal >= count {
            return Err(Error::NoSuchDevice { ordinal, count });
        }
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = open.iter().find(|device| device.ordinal() == ordinal) {
            return Ok(device.clone());
        }
        let (mut device, mut context) = (0, std::ptr::null_mut());
        // SAFETY: the driver is open and the ordinal exists; both answers are written to our own words. The primary context
        // is kept for the life of the process, as the runtime API keeps it.
        unsafe {
            check("cuDeviceGet", ordinal, sys::cuDeviceGet(&raw mut device, ordinal as i32))?;
            check(
                "cuDevicePrimaryCtxRetain",
                ordinal,
                sys::cuDevicePrimaryCtxRetain(&raw mut context, device),
            )?;
        }
        let facts = Facts::of(ordinal, device)?;
        let device = Self { inner: Arc::new(Inner { ordinal, device, context, facts }) };
        open.push(device.clone());
        Ok(device)
    }

    /// The device of this process with this identity, if it sees it.
    ///
    /// # Errors
    /// As [`Device::new`].
    pub fn by_uuid(uuid: Uuid) -> Result<Option<Self>> {
        for ordinal in 0..device_count()? {
            let device = Self::new(ordinal)?;
            if device.facts().uuid == uuid {
                return Ok(Some(device));
            }
        }
        Ok(None)
    }

    /// Its number in this process.
    pub fn ordinal(&self) -> u32 {
        self.inner.ordinal
    }

    /// What it is and can do.
    pub fn facts(&self) -> &Facts {
        &self.inner.facts
    }

    /// Whether kernels of this device can load and store memory of `other`, another device of this process.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn reaches(&self, other: &Self) -> Result<bool> {
        if self == other {
            return Ok(true);
        }
        let mut can = 0;
        // SAFETY: both devices exist, and the answer is our word.
        let result =
            unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, self.inner.device, other.inner.device) };
        check("cuDeviceCanAccessPeer", self.ordinal(), result)?;
        Ok(can != 0)
    }

    /// Makes this device current on this thread, until the guard is dropped.
    ///
    /// # Errors
    /// What the driver refuses.
    #[inline]
    pub fn enter(&self) -> Result<Current<'_>> {
        let mut before = std::ptr::null_mut();
        // SAFETY: the driver is open, and the answer is our word.
        check("cuCtxGetCurrent", self.ordinal(), unsafe { sys::cuCtxGetCurrent(&raw mut before) })?;
        if before == self.inner.context {
            return Ok(Current { before: None, device: self });
        }
        // SAFETY: the context is retained for the life of the process.
        check("cuCtxSetCurrent", self.ordinal(), unsafe { sys::cuCtxSetCurrent(self.inner.context) })?;
        Ok(Current { before: Some(before), device: self })
    }

    /// Waits until everything that was given to this device by this process is done.
    ///
    /// # Errors
    /// What earlier work failed with.
    pub fn synchronize(&self) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: the context is current.
        check("cuCtxSynchronize", self.ordinal(), unsafe { sys::cuCtxSynchronize() })
    }

    /// Waits for copies and fills that went around all streams; not for kernels on streams of their own, which may wait for
    /// this very thread.
    pub(crate) fn finish_copies(&self) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: the null stream of the context exists.
        check("cuStreamSynchronize", self.ordinal(), unsafe {
            sys::cuStreamSynchronize(std::ptr::null_mut())
        })
    }

    /// Bytes of its memory that are free and that there are.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let _current = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current, and both answers are ours.
        let result = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
        check("cuMemGetInfo", self.ordinal(), result)?;
        Ok((free as u64, total as u64))
    }

    /// Its primary context.
    pub(crate) fn context(&self) -> sys::CUcontext {
        self.inner.context
    }

    /// For calls that name it.
    pub(crate) fn raw(&self) -> sys::CUdevice {
        self.inner.device
    }
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            // SAFETY: it was current on this thread a moment ago. An error here would come from a context that somebody
            // destroyed meanwhile, and could not be answered.
            let _ = unsafe { sys::cuCtxSetCurrent(before) };
        }
        let _ = self.device;
    }
}

impl Facts {
    fn of(ordinal: u32, device: sys::CUdevice) -> Result<Self> {
        let attribute = |which: Attribute| {
            let mut value = 0;
            // SAFETY: the device exists and the answer is our word.
            let result = unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) };
            // An attribute that this driver does not know is one that the device has not.
            if result == sys::CUresult::CUDA_SUCCESS { value } else { 0 }
        };
        let text = |call, bytes: &[Cell<i8>], result| {
            check(call, ordinal, result)?;
            let bytes = bytes.iter().map(|byte| byte.get() as u8).take_while(|byte| *byte != 0);
            Ok::<_, Error>(String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).into_owned())
        };
        let buffer = [const { Cell::new(0i8) }; 128];
        let start = buffer.as_ptr().cast_mut().cast();
        // SAFETY: the buffer is ours and as long as it says; its cells may be written through shared references.
        let name = text("cuDeviceGetName", &buffer, unsafe { sys::cuDeviceGetName(start, 128, device) })?;
        // SAFETY: as above.
        let pci =
            text("cuDeviceGetPCIBusId", &buffer, unsafe { sys::cuDeviceGetPCIBusId(start, 128, device) })?;
        let (mut uuid, mut memory_bytes) = (sys::CUuuid { bytes: [0; 16] }, 0);
        // SAFETY: both answers are ours.
        unsafe {
            check("cuDeviceGetUuid", ordinal, sys::cuDeviceGetUuid_v2(&raw mut uuid, device))?;
            check("cuDeviceTotalMem", ordinal, sys::cuDeviceTotalMem_v2(&raw mut memory_bytes, device))?;
        }
        let known = |value: i32| u32::try_from(value).unwrap_or(0);
        Ok(Self {
            name,
            uuid: Uuid(uuid.bytes.map(|byte| byte as u8)),
            pci: pci.to_lowercase(),
            capability: (
                known(attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)),
                known(attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)),
            ),
            multiprocessors: known(attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)),
            shared_bytes: known(attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)),
            memory_bytes: memory_bytes as u64,
            numa_node: u32::try_from(attribute(Attribute::CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID)).ok(),
            exports_descriptors: attribute(
                Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
            ) != 0,
            exports_fabric: attribute(Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED) != 0,
            takes_host_numa: attribute(
                Attribute::CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
            ) != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_reads_as_nvidia_smi_writes_it() {
        let bytes = [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, 0, 1, 2, 3, 4, 5, 6, 0xff];
        assert_eq!(Uuid(bytes).to_string(), "GPU-01234567-89ab-cdef-0001-0203040506ff");
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error_that_counts_those_that_are() {
        match Device::new(4096) {
            Err(Error::NoDevice { .. }) => assert!(device_count().is_err()),
            Err(Error::NoSuchDevice { ordinal, count }) => {
                assert_eq!((ordinal, Ok(count)), (4096, device_count()));
            }
            other => panic!("{other:?}"),
        }
    }
}
