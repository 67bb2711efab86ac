//! The driver library, opened once, when a device is first asked for.
//!
//! The library that is found stays open for the life of the process. What the first look answered stands: a process that
//! was started without a driver has none later.

use std::ffi::CStr;
use std::sync::OnceLock;

use cudarc::driver::sys;

use crate::error::{Error, Result};

/// Opens the driver and counts the devices that this process may use; at least one.
///
/// # Errors
/// [`Error::NoDevice`] if there is no driver, it is of no use, or no device is visible.
pub fn device_count() -> Result<u32> {
    static COUNT: OnceLock<Result<u32>> = OnceLock::new();
    COUNT.get_or_init(open).clone()
}

fn open() -> Result<u32> {
    let none = |reason: String| Err(Error::NoDevice { reason });
    // SAFETY: looks for the library by name, and closes it again.
    if !unsafe { sys::is_culib_present() } {
        return none("there is no libcuda.so on this machine".to_owned());
    }
    // SAFETY: the library is there; this is its first call.
    let result = unsafe { sys::cuInit(0) };
    if result != sys::CUresult::CUDA_SUCCESS {
        let (name, message) = describe(result);
        return none(format!("the driver answers {name} ({message})"));
    }
    let mut count = 0;
    // SAFETY: the driver is initialised, and the count is ours.
    let result = unsafe { sys::cuDeviceGetCount(&raw mut count) };
    match (result, u32::try_from(count)) {
        (sys::CUresult::CUDA_SUCCESS, Ok(count)) if count > 0 => Ok(count),
        (sys::CUresult::CUDA_SUCCESS, _) => none("the driver shows no device".to_owned()),
        _ => none(format!("the driver answers {}", describe(result).0)),
    }
}

/// The version of CUDA that the driver speaks, as (13, 0).
///
/// # Errors
/// Those of [`device_count`].
pub fn version() -> Result<(u32, u32)> {
    device_count()?;
    let mut version = 0;
    // SAFETY: the driver is open, and the number is ours.
    check("cuDriverGetVersion", 0, unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
    Ok((version as u32 / 1000, version as u32 % 1000 / 10))
}

/// The result of `call` on device `ordinal`.
#[inline]
pub(crate) fn check(call: &'static str, ordinal: u32, result: sys::CUresult) -> Result<()> {
    if result == sys::CUresult::CUDA_SUCCESS { Ok(()) } else { Err(refused(call, ordinal, result)) }
}

#[cold]
fn refused(call: &'static str, ordinal: u32, result: sys::CUresult) -> Error {
    let (name, message) = describe(result);
    Error::Driver { call, ordinal, name, message }
}

fn describe(result: sys::CUresult) -> (String, String) {
    let text = |ask: unsafe fn(sys::CUresult, *mut *const std::ffi::c_char) -> sys::CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: the driver is open; it answers with a text of its own that stays, or with none.
        match unsafe { ask(result, &raw mut text) } {
            sys::CUresult::CUDA_SUCCESS if !text.is_null() => {
                // SAFETY: a terminated text of the driver's, as above.
                unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
            }
            _ => format!("error {}", result as u32),
        }
    };
    (text(sys::cuGetErrorName), text(sys::cuGetErrorString))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_device_says_why_and_goes_on_saying_it() {
        match (device_count(), device_count()) {
            (Ok(first), Ok(second)) => assert!(first > 0 && first == second),
            (Err(first @ Error::NoDevice { .. }), Err(second)) => {
                assert_eq!(first, second);
                assert!(version().is_err());
            }
            other => panic!("{other:?}"),
        }
    }
}
