//! What a graph under capture needs, kept for as long as the graph exists, whoever made it.
//!
//! The driver calls back when the last graph (or launch) that holds something is gone, from a thread of its own that must not
//! call the driver. So what is let go of is put aside there, and dropped by whoever calls [`drop_released`]: at a moment of
//! its choice, because giving memory back may wait for the device.

use std::any::Any;
use std::ffi::c_void;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys;

use crate::device::Device;
use crate::driver::{check, version};
use crate::error::{Error, Result};
use crate::stream::Stream;

/// What is kept; dropped where it suits.
pub type Kept = Arc<dyn Any + Send + Sync>;

/// What graphs that are gone have let go of.
static RELEASED: Mutex<Vec<Kept>> = Mutex::new(Vec::new());

/// Behind what the next work of a stream under capture comes: what forks and joins branches of the graph without other streams, which
/// would belong to the capture until it ends.
#[derive(Clone, Debug, Default)]
pub struct Front {
    nodes: Vec<sys::CUgraphNode>,
}

/// The capture that a stream is part of.
#[derive(Debug)]
pub struct Capture<'s> {
    id: u64,
    graph: sys::CUgraph,
    device: Device,
    stream: PhantomData<&'s Stream>,
}

impl Stream {
    /// The capture that this stream's work goes into, if there is one.
    ///
    /// # Errors
    /// [`Error::TooOld`] for drivers before 12.3; what the driver refuses.
    pub fn capture(&self) -> Result<Option<Capture<'_>>> {
        if version()? < (12, 3) {
            let symbol = "cuStreamGetCaptureInfo_v3".to_owned();
            return Err(Error::TooOld { library: "the CUDA driver", symbol });
        }
        let _current = self.device().enter()?;
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        let (mut id, mut graph) = (0, std::ptr::null_mut());
        // SAFETY: the stream lives, the answers are ours, and those that are null are not asked for.
        let result = unsafe {
            sys::cuStreamGetCaptureInfo_v3(
                self.raw().cast(),
                &raw mut status,
                &raw mut id,
                &raw mut graph,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
            )
        };
        check("cuStreamGetCaptureInfo", self.device().ordinal(), result)?;
        let is_active = status == sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE;
        let device = self.device().clone();
        Ok((is_active && !graph.is_null()).then_some(Capture { id, graph, device, stream: PhantomData }))
    }
}

impl Stream {
    /// Behind what the next work comes. Empty where nothing was captured before it.
    ///
    /// # Errors
    /// [`Error::TooOld`] for drivers before 12.3; what the driver refuses, as if nothing is captured.
    pub fn front(&self) -> Result<Front> {
        Self::has_fronts("cuStreamGetCaptureInfo_v3")?;
        let _current = self.device().enter()?;
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        let (mut nodes, mut count) = (std::ptr::null(), 0);
        // SAFETY: the stream lives, the answers are ours, and those that are null are not asked for.
        let result = unsafe {
            sys::cuStreamGetCaptureInfo_v3(
                self.raw().cast(),
                &raw mut status,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                &raw mut nodes,
                std::ptr::null_mut(),
                &raw mut count,
            )
        };
        check("cuStreamGetCaptureInfo", self.device().ordinal(), result)?;
        let is_active = status == sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE;
        if !is_active || nodes.is_null() {
            return Ok(Front::default());
        }
        // SAFETY: the driver says that so many are there, until the next call on this stream.
        Ok(Front { nodes: unsafe { std::slice::from_raw_parts(nodes, count) }.to_vec() })
    }

    /// From now on work comes behind `front` only, which is of the same capture.
    ///
    /// # Errors
    /// As [`Stream::front`].
    pub fn set_front(&self, front: &Front) -> Result<()> {
        let how = sys::CUstreamUpdateCaptureDependencies_flags_enum::CU_STREAM_SET_CAPTURE_DEPENDENCIES;
        self.update_front(front, how)
    }

    /// From now on work comes behind `front`, which is of the same capture, too.
    ///
    /// # Errors
    /// As [`Stream::front`].
    pub fn add_to_front(&self, front: &Front) -> Result<()> {
        let how = sys::CUstreamUpdateCaptureDependencies_flags_enum::CU_STREAM_ADD_CAPTURE_DEPENDENCIES;
        self.update_front(front, how)
    }

    fn update_front(
        &self,
        front: &Front,
        how: sys::CUstreamUpdateCaptureDependencies_flags_enum,
    ) -> Result<()> {
        Self::has_fronts("cuStreamUpdateCaptureDependencies_v2")?;
        let _current = self.device().enter()?;
        let mut nodes = front.nodes.clone();
        // SAFETY: the stream lives, the driver copies the nodes, and checks that they are of this capture; no data of edges are ours.
        let result = unsafe {
            sys::cuStreamUpdateCaptureDependencies_v2(
                self.raw().cast(),
                nodes.as_mut_ptr(),
                std::ptr::null(),
                nodes.len(),
                how as u32,
            )
        };
        check("cuStreamUpdateCaptureDependencies", self.device().ordinal(), result)
    }

    /// Whether the driver has these.
    fn has_fronts(symbol: &str) -> Result<()> {
        match version()? < (12, 3) {
            true => Err(Error::TooOld { library: "the CUDA driver", symbol: symbol.to_owned() }),
            false => Ok(()),
        }
    }
}

impl Capture<'_> {
    /// Its number, which no other capture of this process has.
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// Keeps `kept` until the graph, all copies and all executable graphs made of it are gone.
    ///
    /// # Errors
    /// What the driver refuses; then nothing is kept.
    pub fn keep(&self, kept: Kept) -> Result<()> {
        let mut object = std::ptr::null_mut();
        let held: *mut Kept = Box::into_raw(Box::new(kept));
        let flags = sys::CUuserObject_flags_enum::CU_USER_OBJECT_NO_DESTRUCTOR_SYNC as u32;
        // SAFETY: the driver hands `held` to `release` once, when nobody holds the object any more.
        let result =
            unsafe { sys::cuUserObjectCreate(&raw mut object, held.cast(), Some(release), 1, flags) };
        if let Err(error) = check("cuUserObjectCreate", self.device.ordinal(), result) {
            // SAFETY: the driver did not take it.
            drop(unsafe { Box::from_raw(held) });
            return Err(error);
        }
        let flags = sys::CUuserObjectRetain_flags_enum::CU_GRAPH_USER_OBJECT_MOVE as u32;
        // SAFETY: the stream is borrowed, so the capture goes on; the object is ours, and goes over to the graph.
        let result = unsafe { sys::cuGraphRetainUserObject(self.graph, object, 1, flags) };
        check("cuGraphRetainUserObject", self.device.ordinal(), result).inspect_err(|_| {
            // SAFETY: it is still ours.
            let _ = unsafe { sys::cuUserObjectRelease(object, 1) };
        })
    }
}

/// Called by the driver: puts aside what was kept.
unsafe extern "C" fn release(held: *mut c_void) {
    // SAFETY: made by `keep` from a box, and handed to us once.
    let kept = unsafe { Box::from_raw(held.cast::<Kept>()) };
    RELEASED.lock().unwrap_or_else(PoisonError::into_inner).push(*kept);
}

/// Drops what graphs that are gone have let go of. It may wait for devices: to be called where no kernel waits for this
/// thread.
pub fn drop_released() {
    let released = std::mem::take(&mut *RELEASED.lock().unwrap_or_else(PoisonError::into_inner));
    drop(released);
}

/// The same of what is a `T`: where that takes nothing from the driver, it may be done at any time.
pub fn drop_released_of<T: Any>() {
    let mut released = RELEASED.lock().unwrap_or_else(PoisonError::into_inner);
    if released.is_empty() {
        return;
    }
    let (ours, others): (Vec<Kept>, _) =
        std::mem::take(&mut *released).into_iter().partition(|kept| (**kept).is::<T>());
    *released = others;
    drop(released);
    drop(ours);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_driver_lets_go_of_is_dropped_later() {
        let kept: Kept = Arc::new(7u32);
        let held: *mut Kept = Box::into_raw(Box::new(kept.clone()));
        // SAFETY: made as `keep` makes it, and handed over once.
        unsafe { release(held.cast()) };
        // Other tests may drop it just now.
        while Arc::strong_count(&kept) > 1 {
            drop_released();
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        // One type goes without the others.
        let (word, byte): (Kept, Kept) = (Arc::new(7u16), Arc::new(7u8));
        for kept in [&word, &byte] {
            let held: *mut Kept = Box::into_raw(Box::new(kept.clone()));
            // SAFETY: as above.
            unsafe { release(held.cast()) };
        }
        drop_released_of::<u16>();
        assert_eq!(Arc::strong_count(&word), 1);
        drop_released_of::<u8>();
        assert_eq!(Arc::strong_count(&byte), 1);
    }
}
