//! Streams and events, and copies in their order.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys;

use crate::device::Device;
use crate::driver::{check, version};
use crate::error::{Error, Result};
use crate::graph::Graph;

/// An ordered queue of work of one device. Clones are the same stream; one that is ours lives as long as they do.
#[derive(Clone, Debug)]
pub struct Stream {
    device: Device,
    raw: sys::CUstream,
    _owned: Option<Arc<Owned>>,
}

/// Destroys a stream of ours with its last clone.
#[derive(Debug)]
struct Owned {
    device: Device,
    raw: sys::CUstream,
}

// SAFETY: as of a stream.
unsafe impl Send for Owned {}
// SAFETY: as above.
unsafe impl Sync for Owned {}

// SAFETY: streams of the driver belong to no thread, and its calls on them are safe from any.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// A new stream that waits for no other.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn new(device: &Device) -> Result<Self> {
        let _current = device.enter()?;
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current, and the answer is ours.
        check("cuStreamCreate", device.ordinal(), unsafe { sys::cuStreamCreate(&raw mut raw, flags) })?;
        Ok(Self {
            device: device.clone(),
            raw,
            _owned: Some(Arc::new(Owned { device: device.clone(), raw })),
        })
    }

    /// A stream that somebody else made and keeps.
    ///
    /// # Safety
    /// `raw` is a live `CUstream` (or null, the default stream) of the primary context of `device`, and outlives this and its clones.
    pub unsafe fn from_raw(device: &Device, raw: *mut c_void) -> Self {
        Self { device: device.clone(), raw: raw.cast(), _owned: None }
    }

    /// Its device.
    pub const fn device(&self) -> &Device {
        &self.device
    }

    /// The `CUstream`.
    pub const fn raw(&self) -> *mut c_void {
        self.raw.cast()
    }

    /// Waits until all its work is done.
    ///
    /// # Errors
    /// What that work failed with.
    pub fn synchronize(&self) -> Result<()> {
        let _current = self.device.enter()?;
        // SAFETY: the stream lives.
        check("cuStreamSynchronize", self.device.ordinal(), unsafe { sys::cuStreamSynchronize(self.raw) })
    }

    /// Whether all its work is done.
    ///
    /// # Errors
    /// What that work failed with.
    pub fn is_idle(&self) -> Result<bool> {
        let _current = self.device.enter()?;
        // SAFETY: the stream lives.
        match unsafe { sys::cuStreamQuery(self.raw) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("cuStreamQuery", self.device.ordinal(), result).map(|()| true),
        }
    }

    /// Whether its work goes into a graph instead of being done.
    ///
    /// # Errors
    /// What the driver refuses.
    #[inline]
    pub fn is_capturing(&self) -> Result<bool> {
        let _current = self.device.enter()?;
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the stream lives, and the answer is ours.
        let result = unsafe { sys::cuStreamIsCapturing(self.raw, &raw mut status) };
        check("cuStreamIsCapturing", self.device.ordinal(), result)?;
        Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Lets this thread ask what it likes while another thread captures: for threads that only watch.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn relax_capture(&self) -> Result<()> {
        exchange_capture_mode(&self.device, sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)?;
        Ok(())
    }

    /// Does `f`, in which this thread may ask the driver for what is done without ending a capture of another one.
    pub fn beside_captures<R>(f: impl FnOnce() -> R) -> R {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the mode is ours, and belongs to this thread. It fails only where nothing else works either.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
        let result = f();
        // SAFETY: as above; `mode` is what was there before.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
        result
    }

    /// From now on, work goes into a graph.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn begin_capture(&self) -> Result<()> {
        let _current = self.device.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        let result = unsafe { sys::cuStreamBeginCapture_v2(self.raw, mode) };
        check("cuStreamBeginCapture", self.device.ordinal(), result)
    }

    /// The graph of the work since [`Stream::begin_capture`].
    ///
    /// # Errors
    /// What the driver refuses; what was captured is lost then.
    pub fn end_capture(&self) -> Result<Graph> {
        let _current = self.device.enter()?;
        let mut graph = std::ptr::null_mut();
        // SAFETY: the stream lives, and the answer is ours.
        let result = unsafe { sys::cuStreamEndCapture(self.raw, &raw mut graph) };
        check("cuStreamEndCapture", self.device.ordinal(), result)?;
        // This thread may be capturing other streams, which forbids what makes a graph ready.
        let relaxed = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        let before = exchange_capture_mode(&self.device, relaxed)?;
        let graph = Graph::new(&self.device, graph, self.raw);
        exchange_capture_mode(&self.device, before)?;
        graph
    }

    /// Work that comes later waits for `event`.
    ///
    /// # Errors
    /// What the driver refuses.
    #[inline]
    pub fn wait(&self, event: &Event) -> Result<()> {
        let _current = self.device.enter()?;
        // SAFETY: stream and event live.
        let result = unsafe { sys::cuStreamWaitEvent(self.raw, event.inner.raw, 0) };
        check("cuStreamWaitEvent", self.device.ordinal(), result)
    }

    /// Copies `bytes` from `from` to `to`, addresses of any memory that the driver knows.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Safety
    /// Both are valid for `bytes` until the stream has passed this.
    pub unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let _current = self.device.enter()?;
        // SAFETY: as the caller promises.
        let result = unsafe { sys::cuMemcpyAsync(to, from, bytes, self.raw) };
        check("cuMemcpyAsync", self.device.ordinal(), result)
    }

    /// Waits for all work of this stream, and copies `data` to `to`.
    ///
    /// (Memory that is not pinned makes the driver wait for the stream within the copy, and nobody else can use the context
    /// meanwhile: perhaps the very rank that the work waits for.)
    ///
    /// # Errors
    /// What the driver refuses, or that work failed with.
    ///
    /// # Safety
    /// `to` is memory of a device, valid for as many bytes.
    pub unsafe fn write(&self, to: u64, data: &[u8]) -> Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        self.synchronize()?;
        let _current = self.device.enter()?;
        // SAFETY: as the caller promises; the data lives until the stream was waited for.
        let result = unsafe { sys::cuMemcpyHtoDAsync_v2(to, data.as_ptr().cast(), data.len(), self.raw) };
        check("cuMemcpyHtoDAsync", self.device.ordinal(), result)?;
        self.synchronize()
    }

    /// Waits for all work of this stream, and copies what lies at `from` to `data`.
    ///
    /// # Errors
    /// As [`Stream::write`].
    ///
    /// # Safety
    /// As [`Stream::write`].
    pub unsafe fn read(&self, from: u64, data: &mut [u8]) -> Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        self.synchronize()?;
        let _current = self.device.enter()?;
        // SAFETY: as the caller promises; nobody else has the data until the stream was waited for.
        let result =
            unsafe { sys::cuMemcpyDtoHAsync_v2(data.as_mut_ptr().cast(), from, data.len(), self.raw) };
        check("cuMemcpyDtoHAsync", self.device.ordinal(), result)?;
        self.synchronize()
    }

    /// Writes `value` to the 4 bytes at `to`, after everything that the work before wrote, to whichever memory.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Safety
    /// `to` is memory of a device, on 4 bytes, and valid until the stream has passed this.
    pub unsafe fn write_word(&self, to: u64, value: u32) -> Result<()> {
        let _current = self.device.enter()?;
        let flags = sys::CUstreamWriteValue_flags_enum::CU_STREAM_WRITE_VALUE_DEFAULT as u32;
        // SAFETY: as the caller promises.
        let result = unsafe { sys::cuStreamWriteValue32_v2(self.raw, to, value, flags) };
        check("cuStreamWriteValue32", self.device.ordinal(), result)
    }

    /// Writes `value` to each of `bytes` at `to`.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Safety
    /// As [`Stream::copy`].
    pub unsafe fn fill(&self, to: u64, value: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let _current = self.device.enter()?;
        // SAFETY: as the caller promises.
        let result = unsafe { sys::cuMemsetD8Async(to, value, bytes, self.raw) };
        check("cuMemsetD8Async", self.device.ordinal(), result)
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if let Ok(_current) = self.device.enter() {
            // SAFETY: it is ours; the driver frees it when its work is done. An error has nobody to go to.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
        }
    }
}

/// A point in the work of a stream. Clones are the same event.
#[derive(Clone, Debug)]
pub struct Event {
    inner: Arc<RawEvent>,
}

#[derive(Debug)]
struct RawEvent {
    device: Device,
    raw: sys::CUevent,
}

// SAFETY: events of the driver belong to no thread.
unsafe impl Send for RawEvent {}
// SAFETY: as above.
unsafe impl Sync for RawEvent {}

impl Event {
    /// A new event; one that `is_timed` tells times, and costs a little more.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn new(device: &Device, is_timed: bool) -> Result<Self> {
        let _current = device.enter()?;
        let mut raw = std::ptr::null_mut();
        let flags = if is_timed {
            sys::CUevent_flags_enum::CU_EVENT_DEFAULT
        } else {
            sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING
        };
        // SAFETY: the context is current, and the answer is ours.
        check("cuEventCreate", device.ordinal(), unsafe { sys::cuEventCreate(&raw mut raw, flags as u32) })?;
        Ok(Self { inner: Arc::new(RawEvent { device: device.clone(), raw }) })
    }

    /// Puts the event behind the work that `stream` has now.
    ///
    /// # Errors
    /// What the driver refuses.
    #[inline]
    pub fn record(&self, stream: &Stream) -> Result<()> {
        let _current = stream.device.enter()?;
        // SAFETY: both live.
        let result = unsafe { sys::cuEventRecord(self.inner.raw, stream.raw) };
        check("cuEventRecord", self.inner.device.ordinal(), result)
    }

    /// Puts the event behind all work that the device has now from this process, on whichever stream.
    ///
    /// # Errors
    /// [`Error::TooOld`] for drivers before 12.5; what the driver refuses.
    pub fn record_device(&self) -> Result<()> {
        if version()? < (12, 5) {
            return Err(Error::TooOld { library: "the CUDA driver", symbol: "cuCtxRecordEvent".to_owned() });
        }
        let device = &self.inner.device;
        // SAFETY: both live, and belong to one context.
        let result = unsafe { sys::cuCtxRecordEvent(device.context(), self.inner.raw) };
        check("cuCtxRecordEvent", device.ordinal(), result)
    }

    /// Whether the work before it is done.
    ///
    /// # Errors
    /// What that work failed with.
    pub fn is_done(&self) -> Result<bool> {
        // SAFETY: it lives.
        match unsafe { sys::cuEventQuery(self.inner.raw) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("cuEventQuery", self.inner.device.ordinal(), result).map(|()| true),
        }
    }

    /// Waits until the work before it is done.
    ///
    /// # Errors
    /// What that work failed with.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: it lives.
        let result = unsafe { sys::cuEventSynchronize(self.inner.raw) };
        check("cuEventSynchronize", self.inner.device.ordinal(), result)
    }

    /// Microseconds from `start` to this event, both timed and done.
    ///
    /// # Errors
    /// If they are not.
    pub fn us_since(&self, start: &Self) -> Result<f64> {
        let mut milliseconds = 0.0;
        // SAFETY: both live, and the answer is ours.
        let result =
            unsafe { sys::cuEventElapsedTime_v2(&raw mut milliseconds, start.inner.raw, self.inner.raw) };
        check("cuEventElapsedTime", self.inner.device.ordinal(), result)?;
        Ok(f64::from(milliseconds) * 1e3)
    }
}

impl Drop for RawEvent {
    fn drop(&mut self) {
        if let Ok(_current) = self.device.enter() {
            // SAFETY: it is ours. An error has nobody to go to.
            let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
        }
    }
}

/// Sets what captures forbid this thread, and gives what they forbade before.
fn exchange_capture_mode(
    device: &Device,
    mut mode: sys::CUstreamCaptureMode,
) -> Result<sys::CUstreamCaptureMode> {
    // SAFETY: the mode is ours, and belongs to this thread.
    let result = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
    check("cuThreadExchangeStreamCaptureMode", device.ordinal(), result)?;
    Ok(mode)
}
