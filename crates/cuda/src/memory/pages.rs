//! Pages that the driver hands out: taken, imported, exported, mapped, and opened to devices.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use cudarc::driver::sys::{self, CUmemAllocationHandleType as HandleTypes};

use super::Location;
use crate::device::Device;
use crate::driver::check;
use crate::error::Result;

/// What goes between the processes of a host.
const DESCRIPTOR: HandleTypes = HandleTypes::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

/// Memory of `cuMemCreate`, of whichever process, held and not mapped by this. It lives until the last hold, mapping and
/// descriptor of it is gone.
#[derive(Debug)]
pub struct Pages(sys::CUmemGenericAllocationHandle);

impl Pages {
    /// Takes `bytes`, a multiple of what the driver hands out.
    pub(crate) fn create(
        device: &Device,
        bytes: usize,
        properties: &sys::CUmemAllocationProp,
    ) -> Result<Self> {
        let mut handle = 0;
        // SAFETY: the properties are complete, and the answer is ours.
        let result = unsafe { sys::cuMemCreate(&raw mut handle, bytes, properties, 0) };
        check("cuMemCreate", device.ordinal(), result)?;
        Ok(Self(handle))
    }

    /// Takes what `descriptor` stands for, and closes it.
    ///
    /// # Errors
    /// What the driver refuses: it is a descriptor of something else.
    pub fn import(device: &Device, descriptor: OwnedFd) -> Result<Self> {
        let _current = device.enter()?;
        let mut handle = 0;
        let number = std::ptr::without_provenance_mut(descriptor.as_raw_fd() as usize);
        // SAFETY: the descriptor is open; the driver takes the number by value and checks what it is.
        let result = unsafe { sys::cuMemImportFromShareableHandle(&raw mut handle, number, DESCRIPTOR) };
        check("cuMemImportFromShareableHandle", device.ordinal(), result)?;
        Ok(Self(handle))
    }

    /// Takes over a hold.
    pub(super) const fn from_raw(handle: sys::CUmemGenericAllocationHandle) -> Self {
        Self(handle)
    }

    /// Holds what is mapped at an address; none if it is other memory.
    pub(crate) fn at(address: u64) -> Option<Self> {
        let mut handle = 0;
        let at = std::ptr::without_provenance_mut(address as usize);
        // SAFETY: the answer is ours. Any address may be asked for.
        let result = unsafe { sys::cuMemRetainAllocationHandle(&raw mut handle, at) };
        (result == sys::CUresult::CUDA_SUCCESS).then_some(Self(handle))
    }

    pub(super) const fn raw(&self) -> sys::CUmemGenericAllocationHandle {
        self.0
    }

    /// A descriptor that another process of this host can import.
    pub(crate) fn export(&self, device: &Device) -> Result<OwnedFd> {
        let mut descriptor: std::ffi::c_int = -1;
        // SAFETY: the pages are held; a descriptor of that kind is an int, which is ours.
        let result =
            unsafe { sys::cuMemExportToShareableHandle((&raw mut descriptor).cast(), self.0, DESCRIPTOR, 0) };
        check("cuMemExportToShareableHandle", device.ordinal(), result)?;
        // SAFETY: the driver opened it for us.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }

    /// Whether they were made to be exported as a descriptor.
    pub(crate) fn can_be_exported(&self) -> bool {
        let mut properties = std::mem::MaybeUninit::<sys::CUmemAllocationProp>::zeroed();
        // SAFETY: the pages are held, and the answer is ours.
        let result = unsafe { sys::cuMemGetAllocationPropertiesFromHandle(properties.as_mut_ptr(), self.0) };
        if result != sys::CUresult::CUDA_SUCCESS {
            return true;
        }
        // SAFETY: the driver filled it.
        let types = unsafe { properties.assume_init() }.requestedHandleTypes.0;
        types & DESCRIPTOR.0 != 0
    }

    /// Maps `bytes` of them at `address`, for nobody so far. The mapping holds them, too.
    ///
    /// # Safety
    /// The range is reserved, and nothing is mapped in it.
    pub(crate) unsafe fn map(&self, device: &Device, (address, bytes): (u64, usize)) -> Result<()> {
        // SAFETY: as the caller promises; the driver refuses to map more than there is.
        let result = unsafe { sys::cuMemMap(address, bytes, 0, self.0, 0) };
        check("cuMemMap", device.ordinal(), result)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the hold is ours; mappings stay. An error has nobody to go to.
        let _ = unsafe { sys::cuMemRelease(self.0) };
    }
}

/// A range of addresses of the driver's choice, in which nothing is mapped.
pub(crate) fn reserve(device: &Device, bytes: usize) -> Result<u64> {
    let mut address = 0;
    // SAFETY: the answer is ours.
    let result = unsafe { sys::cuMemAddressReserve(&raw mut address, bytes, 0, 0, 0) };
    check("cuMemAddressReserve", device.ordinal(), result)?;
    Ok(address)
}

/// Lets `location`, a device or a processor, read and write a range.
///
/// # Safety
/// The range is mapped from end to end.
pub(crate) unsafe fn allow(
    device: &Device,
    (address, bytes): (u64, usize),
    location: sys::CUmemLocation,
) -> Result<()> {
    let flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    let access = sys::CUmemAccessDesc { location, flags };
    // SAFETY: as the caller promises, and the description is complete.
    let result = unsafe { sys::cuMemSetAccess(address, bytes, &raw const access, 1) };
    check("cuMemSetAccess", device.ordinal(), result)
}

/// Where pages lie, or who accesses them, as the driver is told.
pub(crate) fn place(device: &Device, location: Location) -> sys::CUmemLocation {
    let (type_, id) = match location {
        Location::Device => (sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, device.raw()),
        Location::HostNuma(node) => (sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_HOST_NUMA, node as i32),
    };
    sys::CUmemLocation { type_, id }
}

/// What pages are asked for.
pub(crate) fn properties(
    device: &Device,
    location: Location,
    exported_as: HandleTypes,
) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: exported_as,
        location: place(device, location),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}
