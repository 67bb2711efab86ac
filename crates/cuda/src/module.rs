//! Compiled kernels on a device, and how they are launched.

use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::sys;

use crate::device::Device;
use crate::driver::check;
use crate::error::Result;
use crate::stream::Stream;

/// Kernels that are loaded into a device, until the last of them is dropped.
#[derive(Clone, Debug)]
pub struct Module {
    inner: Arc<RawModule>,
}

#[derive(Debug)]
struct RawModule {
    device: Device,
    raw: sys::CUmodule,
    launching: Launching,
    /// Whether the device brings kernels onto it early.
    has_early: bool,
}

/// How the kernels of a module are launched.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Launching {
    /// In the memory synchronisation domain for remote memory.
    pub is_remote: bool,
}

// SAFETY: modules of the driver belong to no thread.
unsafe impl Send for RawModule {}
// SAFETY: as above.
unsafe impl Sync for RawModule {}

/// A kernel.
#[derive(Clone, Debug)]
pub struct Function {
    module: Arc<RawModule>,
    raw: sys::CUfunction,
}

// SAFETY: functions of the driver belong to no thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// How many threads run a kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Grid {
    /// Blocks.
    pub blocks: u32,
    /// Threads of each.
    pub threads: u32,
    /// Bytes of shared memory of each, beside what the kernel declares.
    pub shared_bytes: u32,
    /// Where the device offers it (sm_90 and later), blocks may be brought onto it before the kernel in front of them in the stream has
    /// ended. Each must wait for that (`griddepcontrol.wait`) before it touches memory.
    pub is_early: bool,
}

impl Module {
    /// Loads a CUBIN that was compiled for this device.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn load(device: &Device, cubin: &[u8]) -> Result<Self> {
        Self::load_for(device, cubin, Launching::default())
    }

    /// As [`Module::load`], of kernels that are launched in this way where the device offers it (sm_90 and later), else plainly.
    ///
    /// # Errors
    /// As [`Module::load`].
    pub fn load_for(device: &Device, cubin: &[u8], launching: Launching) -> Result<Self> {
        let has_early = device.facts().capability >= (9, 0);
        let launching = if has_early { launching } else { Launching::default() };
        let _current = device.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the context is current; the driver checks the image, whose length stands in it, and copies what it needs.
        let result = unsafe { sys::cuModuleLoadData(&raw mut raw, cubin.as_ptr().cast()) };
        check("cuModuleLoadData", device.ordinal(), result)?;
        Ok(Self { inner: Arc::new(RawModule { device: device.clone(), raw, launching, has_early }) })
    }

    /// The kernel of this name.
    ///
    /// # Errors
    /// What the driver refuses: there is none.
    pub fn function(&self, name: &str) -> Result<Function> {
        let _current = self.inner.device.enter()?;
        let name = CString::new(name).unwrap_or_default();
        let mut raw = std::ptr::null_mut();
        // SAFETY: the module lives, the name is terminated and the answer is ours.
        let result = unsafe { sys::cuModuleGetFunction(&raw mut raw, self.inner.raw, name.as_ptr()) };
        check("cuModuleGetFunction", self.inner.device.ordinal(), result)?;
        // Loaded now, not at its first launch, which may be under capture.
        // SAFETY: the function lives as long as its module.
        let result = unsafe { sys::cuFuncLoad(raw) };
        check("cuFuncLoad", self.inner.device.ordinal(), result)?;
        Ok(Function { module: self.inner.clone(), raw })
    }
}

impl Function {
    /// Lets its blocks have so many bytes of dynamic shared memory.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn allow_shared(&self, bytes: u32) -> Result<()> {
        let _current = self.module.device.enter()?;
        let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function lives.
        let result = unsafe { sys::cuFuncSetAttribute(self.raw, which, bytes as i32) };
        check("cuFuncSetAttribute", self.module.device.ordinal(), result)
    }

    /// Puts a run of it with one argument, passed by value, into `stream`.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Safety
    /// `arguments` points to what the kernel takes, and everything that it names is valid until the stream has passed this.
    #[inline]
    pub unsafe fn launch(&self, stream: &Stream, grid: Grid, arguments: *mut c_void) -> Result<()> {
        let _current = self.module.device.enter()?;
        let mut parameters = [arguments];
        let (mut attributes, number) =
            self.module.launching.attributes(grid.is_early && self.module.has_early);
        let config = sys::CUlaunchConfig {
            gridDimX: grid.blocks,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared_bytes,
            hStream: stream.raw().cast(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: number,
        };
        // SAFETY: as the caller promises; the driver copies configuration and arguments before it returns.
        let result = unsafe {
            sys::cuLaunchKernelEx(&raw const config, self.raw, parameters.as_mut_ptr(), std::ptr::null_mut())
        };
        check("cuLaunchKernelEx", self.module.device.ordinal(), result)
    }
}

impl Launching {
    /// As the driver takes them, and how many.
    #[inline]
    fn attributes(self, is_early: bool) -> ([sys::CUlaunchAttribute; 2], u32) {
        use sys::CUlaunchAttributeID as Id;
        // SAFETY: it is made of numbers, and the id is one that there is: zero is the attribute that is ignored.
        let mut attributes: [sys::CUlaunchAttribute; 2] = unsafe { std::mem::zeroed() };
        let mut number = 0;
        if is_early {
            attributes[number].id = Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[number].value.programmaticStreamSerializationAllowed = 1;
            number += 1;
        }
        if self.is_remote {
            attributes[number].id = Id::CU_LAUNCH_ATTRIBUTE_MEM_SYNC_DOMAIN;
            attributes[number].value.memSyncDomain =
                sys::CUlaunchMemSyncDomain::CU_LAUNCH_MEM_SYNC_DOMAIN_REMOTE;
            number += 1;
        }
        (attributes, number as u32)
    }
}

impl Drop for RawModule {
    fn drop(&mut self) {
        if let Ok(_current) = self.device.enter() {
            // SAFETY: it is ours, and no function of it is left. An error has nobody to go to.
            let _ = unsafe { sys::cuModuleUnload(self.raw) };
        }
    }
}
