//! Memory that GPUs reach: allocations that can be exported to other processes, plain ones, and host memory that the driver
//! knows.
//!
//! Exportable memory is taken through the driver's virtual memory management: pages, an address range, and who may access
//! them. The pages live until the last mapping and the last descriptor of them, in whichever process, is gone; so freeing
//! ours never takes memory away from under a peer.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cudarc::driver::sys::{self, CUmemAllocationHandleType as HandleTypes};

use crate::device::Device;
use crate::driver::check;
use crate::error::{Error, Result};

mod fabric;
pub(crate) mod pages;

pub use fabric::FabricHandle;
pub use pages::Pages;

/// Where pages lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Location {
    /// In the device's own memory.
    Device,
    /// In host memory, on the NUMA node of this number. The CPU accesses it as well.
    HostNuma(u32),
}

/// Pages that devices of this process map at one address, ours or those of a peer.
#[derive(Debug)]
pub struct SharedPages {
    device: Device,
    pages: Pages,
    address: u64,
    bytes: usize,
    location: Location,
    /// Why they have no fabric handle, if they have none.
    no_fabric: Option<String>,
    /// The other devices that were let in.
    allowed: Mutex<Vec<sys::CUdevice>>,
}

impl SharedPages {
    /// Takes at least `bytes` (rounded up to what the driver hands out, 2 MiB as a rule), accessible to `device`, not
    /// cleared. They can be exported as a descriptor.
    ///
    /// # Errors
    /// What the driver refuses; nothing stays allocated.
    pub fn create(device: &Device, bytes: usize, location: Location) -> Result<Self> {
        let _current = device.enter()?;
        let descriptor = HandleTypes::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        let (pages, bytes) = Self::take(device, bytes, location, descriptor)?;
        Self::map(device, pages, (bytes, location), Some("nobody asked for one".to_owned()))
    }

    /// As [`SharedPages::create`]; they can also be exported as a fabric handle, if the driver gives any.
    ///
    /// # Errors
    /// As [`SharedPages::create`].
    pub fn create_with_fabric(device: &Device, bytes: usize, location: Location) -> Result<Self> {
        let _current = device.enter()?;
        let descriptor = HandleTypes::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        let with_fabric = fabric::is_offered(device, location).and_then(|()| {
            let both = descriptor | HandleTypes::CU_MEM_HANDLE_TYPE_FABRIC;
            Self::take(device, bytes, location, both).map_err(|error| error.to_string())
        });
        let ((pages, bytes), no_fabric) = match with_fabric {
            Ok(taken) => (taken, None),
            Err(reason) => (Self::take(device, bytes, location, descriptor)?, Some(reason)),
        };
        Self::map(device, pages, (bytes, location), no_fabric)
    }

    /// Pages that are mapped nowhere, and how many bytes they are.
    fn take(
        device: &Device,
        bytes: usize,
        location: Location,
        exported_as: HandleTypes,
    ) -> Result<(Pages, usize)> {
        let properties = pages::properties(device, location, exported_as);
        let mut granularity = 0;
        // SAFETY: the properties are complete, and the answer is ours.
        let result = unsafe {
            sys::cuMemGetAllocationGranularity(
                &raw mut granularity,
                &raw const properties,
                sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM,
            )
        };
        check("cuMemGetAllocationGranularity", device.ordinal(), result)?;
        let Some(bytes) = bytes.max(1).checked_next_multiple_of(granularity.max(1)) else {
            return Err(too_large(device, bytes));
        };
        Ok((Pages::create(device, bytes, &properties)?, bytes))
    }

    /// Maps pages that a peer exported, `bytes` of them as it says.
    ///
    /// # Errors
    /// What the driver refuses: the descriptor is of something else, or of fewer pages. It is closed in any case.
    pub fn import(device: &Device, descriptor: OwnedFd, bytes: usize, location: Location) -> Result<Self> {
        let _current = device.enter()?;
        let no_fabric = Some("they were made by another process".to_owned());
        Self::map(device, Pages::import(device, descriptor)?, (bytes, location), no_fabric)
    }

    fn map(
        device: &Device,
        pages: Pages,
        (bytes, location): (usize, Location),
        no_fabric: Option<String>,
    ) -> Result<Self> {
        let address = pages::reserve(device, bytes)?;
        // SAFETY: the range is ours and empty.
        if let Err(error) = unsafe { pages.map(device, (address, bytes)) } {
            // SAFETY: as above.
            let _ = unsafe { sys::cuMemAddressFree(address, bytes) };
            return Err(error);
        }
        let allowed = Mutex::new(Vec::new());
        let mapped = Self { device: device.clone(), pages, address, bytes, location, no_fabric, allowed };
        mapped.allow(device)?;
        if let Location::HostNuma(_) = location {
            mapped.let_in(pages::place(device, location))?;
        }
        Ok(mapped)
    }

    /// Lets another device of this process access the pages too.
    ///
    /// # Errors
    /// What the driver refuses: that device cannot reach them.
    pub fn allow(&self, device: &Device) -> Result<()> {
        // Held over the call: the driver refuses two at once.
        let mut allowed = self.allowed.lock().unwrap_or_else(PoisonError::into_inner);
        if allowed.contains(&device.raw()) {
            return Ok(());
        }
        self.let_in(pages::place(device, Location::Device))?;
        allowed.push(device.raw());
        Ok(())
    }

    fn let_in(&self, location: sys::CUmemLocation) -> Result<()> {
        let _current = self.device.enter()?;
        // SAFETY: the range is mapped.
        unsafe { pages::allow(&self.device, (self.address, self.bytes), location) }
    }

    /// A descriptor that another process of this host can map. The pages live at least as long as it.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn export(&self) -> Result<OwnedFd> {
        self.pages.export(&self.device)
    }

    /// The first byte, the same for all devices of this process (and its CPU, of host memory).
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// Length, as it was rounded up.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where they lie.
    pub const fn location(&self) -> Location {
        self.location
    }

    /// The device that they were mapped for.
    pub const fn device(&self) -> &Device {
        &self.device
    }

    /// Writes `data` at byte `at` and waits for it.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// If it does not fit.
    pub fn write(&self, at: usize, data: &[u8]) -> Result<()> {
        assert!(at + data.len() <= self.bytes, "{} bytes at {at} of {}", data.len(), self.bytes);
        let _current = self.device.enter()?;
        // SAFETY: both sides are as long as the data. Whoever shares the pages does not know them yet, or does not mind.
        let result =
            unsafe { sys::cuMemcpyHtoD_v2(self.address + at as u64, data.as_ptr().cast(), data.len()) };
        check("cuMemcpyHtoD", self.device.ordinal(), result)?;
        self.device.finish_copies()
    }

    /// Fills them and waits for it; host memory by the CPU.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn fill(&self, value: u8) -> Result<()> {
        if let Location::HostNuma(_) = self.location {
            let start = std::ptr::with_exposed_provenance_mut::<u8>(self.address as usize);
            // SAFETY: the CPU was given access to the whole range. Whoever shares it does not know it yet, or does not mind.
            unsafe { start.write_bytes(value, self.bytes) };
            return Ok(());
        }
        let _current = self.device.enter()?;
        // SAFETY: the range is mapped and accessible. Whoever shares it does not know it yet, or does not mind.
        let result = unsafe { sys::cuMemsetD8_v2(self.address, value, self.bytes) };
        check("cuMemsetD8", self.device.ordinal(), result)?;
        self.device.finish_copies()
    }
}

impl Drop for SharedPages {
    fn drop(&mut self) {
        let Ok(_current) = self.device.enter() else { return };
        // SAFETY: the range is ours; who still has kernels on it must not have dropped this. Errors have nobody to go to.
        unsafe {
            let _ = sys::cuMemUnmap(self.address, self.bytes);
            let _ = sys::cuMemAddressFree(self.address, self.bytes);
        }
    }
}

fn too_large(device: &Device, bytes: usize) -> Error {
    Error::Driver {
        call: "cuMemCreate",
        ordinal: device.ordinal(),
        name: "CUDA_ERROR_OUT_OF_MEMORY".to_owned(),
        message: format!("{bytes} bytes are more than any device has"),
    }
}

/// Plain memory of a device.
#[derive(Debug)]
pub struct DeviceBuffer {
    device: Device,
    address: u64,
    bytes: usize,
}

impl DeviceBuffer {
    /// Takes `bytes` (at least one), not cleared.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn new(device: &Device, bytes: usize) -> Result<Self> {
        let _current = device.enter()?;
        let mut address = 0;
        // SAFETY: the context is current, and the answer is ours.
        check("cuMemAlloc", device.ordinal(), unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes.max(1)) })?;
        Ok(Self { device: device.clone(), address, bytes })
    }

    /// The first byte, on a line of 256 bytes.
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its device.
    pub const fn device(&self) -> &Device {
        &self.device
    }

    /// Writes `data` at byte `at` and waits for it. Not in the order of any stream.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// If it does not fit.
    pub fn write(&mut self, at: usize, data: &[u8]) -> Result<()> {
        assert!(at + data.len() <= self.bytes, "{} bytes at {at} of {}", data.len(), self.bytes);
        if data.is_empty() {
            return Ok(());
        }
        let _current = self.device.enter()?;
        let to = self.address + at as u64;
        // SAFETY: both sides are as long as the data.
        let result = unsafe { sys::cuMemcpyHtoD_v2(to, data.as_ptr().cast(), data.len()) };
        check("cuMemcpyHtoD", self.device.ordinal(), result)?;
        self.device.finish_copies()
    }

    /// Reads what lies from byte `at` on. Not in the order of any stream.
    ///
    /// # Errors
    /// What the driver refuses, or earlier work failed with.
    ///
    /// # Panics
    /// If there is not so much.
    pub fn read(&self, at: usize, data: &mut [u8]) -> Result<()> {
        assert!(at + data.len() <= self.bytes, "{} bytes at {at} of {}", data.len(), self.bytes);
        if data.is_empty() {
            return Ok(());
        }
        let _current = self.device.enter()?;
        let from = self.address + at as u64;
        // SAFETY: both sides are as long as the data.
        let result = unsafe { sys::cuMemcpyDtoH_v2(data.as_mut_ptr().cast(), from, data.len()) };
        check("cuMemcpyDtoH", self.device.ordinal(), result)
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if let Ok(_current) = self.device.enter() {
            // SAFETY: it is ours; the driver waits for work that uses it. An error has nobody to go to.
            let _ = unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}

/// Host memory that the driver pinned, so that kernels reach it.
#[derive(Debug)]
pub struct RegisteredHost {
    device: Device,
    host: *mut std::ffi::c_void,
    bytes: usize,
    address: u64,
}

// SAFETY: the registration belongs to the process; the pointer is only handed back to the driver.
unsafe impl Send for RegisteredHost {}
// SAFETY: as above.
unsafe impl Sync for RegisteredHost {}

impl RegisteredHost {
    /// Registers `bytes` at `host`, for all devices of this process.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Safety
    /// The range is mapped, and stays so until this is dropped.
    pub unsafe fn new(device: &Device, host: *mut u8, bytes: usize) -> Result<Self> {
        let _current = device.enter()?;
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: as the caller promises.
        let result = unsafe { sys::cuMemHostRegister_v2(host.cast(), bytes, flags) };
        check("cuMemHostRegister", device.ordinal(), result)?;
        let mut registered = Self { device: device.clone(), host: host.cast(), bytes, address: 0 };
        // SAFETY: it is registered, and the answer is ours.
        let result =
            unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut registered.address, host.cast(), 0) };
        check("cuMemHostGetDevicePointer", device.ordinal(), result)?;
        Ok(registered)
    }

    /// As [`RegisteredHost::new`]; whoever asks for the same range again while it is registered gets the same.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Safety
    /// As [`RegisteredHost::new`], for the last holder.
    pub unsafe fn shared(device: &Device, host: *mut u8, bytes: usize) -> Result<Arc<Self>> {
        static RANGES: Mutex<Vec<Weak<RegisteredHost>>> = Mutex::new(Vec::new());
        let mut ranges = RANGES.lock().unwrap_or_else(PoisonError::into_inner);
        ranges.retain(|range| range.strong_count() > 0);
        let mut known = ranges.iter().filter_map(Weak::upgrade);
        if let Some(range) = known.find(|range| range.host == host.cast() && range.bytes == bytes) {
            return Ok(range);
        }
        // SAFETY: as the caller promises.
        let range = Arc::new(unsafe { Self::new(device, host, bytes) }?);
        ranges.push(Arc::downgrade(&range));
        Ok(range)
    }

    /// Its first byte, as kernels call it.
    pub const fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for RegisteredHost {
    fn drop(&mut self) {
        if let Ok(_current) = self.device.enter() {
            // SAFETY: we registered it. An error has nobody to go to.
            let _ = unsafe { sys::cuMemHostUnregister(self.host) };
        }
    }
}
