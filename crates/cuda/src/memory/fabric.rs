//! Fabric handles: 64 bytes that name pages of a device on every host of its fabric.
//!
//! Drivers give them only where an administrator has opened an IMEX channel to this user; elsewhere pages are made without,
//! and whoever asks for the handle is told why there is none.

use cudarc::driver::sys;

use super::{Location, Pages, SharedPages};
use crate::device::Device;
use crate::driver::check;
use crate::error::{Error, Result};

/// What names pages on all hosts of a fabric. It keeps nothing alive, and says nothing without a driver.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FabricHandle(pub [u8; 64]);

impl std::fmt::Debug for FabricHandle {
    /// Not its content: whoever has that can map the pages.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FabricHandle(..)")
    }
}

/// Ok, or why pages there get no fabric handle, without asking the driver.
pub(super) fn is_offered(device: &Device, location: Location) -> Result<(), String> {
    match location {
        Location::HostNuma(_) => Err("memory of the host has none".to_owned()),
        Location::Device if device.facts().exports_fabric => Ok(()),
        Location::Device => Err("the device does not offer them".to_owned()),
    }
}

impl SharedPages {
    /// What another process, also of another host of the fabric, can map while these pages live.
    ///
    /// # Errors
    /// [`Error::NoFabric`] if the driver gave these pages no such handle, as without an IMEX channel.
    pub fn export_fabric(&self) -> Result<FabricHandle> {
        let ordinal = self.device.ordinal();
        if let Some(reason) = &self.no_fabric {
            return Err(Error::NoFabric { ordinal, reason: reason.clone() });
        }
        let mut handle = sys::CUmemFabricHandle_st { data: [0; 64] };
        let kind = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_FABRIC;
        // SAFETY: the handle lives; one of that kind is 64 bytes, which are ours.
        let result =
            unsafe { sys::cuMemExportToShareableHandle((&raw mut handle).cast(), self.pages.raw(), kind, 0) };
        check("cuMemExportToShareableHandle", ordinal, result)
            .map_err(|error| Error::NoFabric { ordinal, reason: error.to_string() })?;
        Ok(FabricHandle(handle.data))
    }

    /// Maps pages of a device that a peer exported, `bytes` of them as it says.
    ///
    /// # Errors
    /// [`Error::NoFabric`] if the driver does not take the handle: it is damaged, the pages are gone, or this user has no IMEX
    /// channel to them; what the driver refuses.
    pub fn import_fabric(device: &Device, handle: &FabricHandle, bytes: usize) -> Result<Self> {
        let _current = device.enter()?;
        let mut ours = sys::CUmemFabricHandle_st { data: handle.0 };
        let mut imported = 0;
        let kind = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_FABRIC;
        // SAFETY: 64 bytes, which the driver reads and checks; the answer is ours.
        let result =
            unsafe { sys::cuMemImportFromShareableHandle(&raw mut imported, (&raw mut ours).cast(), kind) };
        let ordinal = device.ordinal();
        check("cuMemImportFromShareableHandle", ordinal, result)
            .map_err(|error| Error::NoFabric { ordinal, reason: error.to_string() })?;
        let no_fabric = Some("they were made by another process".to_owned());
        Self::map(device, Pages::from_raw(imported), (bytes, Location::Device), no_fabric)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_is_not_printed() {
        assert_eq!(format!("{:?}", FabricHandle([7; 64])), "FabricHandle(..)");
    }
}
