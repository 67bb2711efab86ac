//! Graphs: work that was captured from a stream and is launched as one.

use cudarc::driver::sys;

use crate::device::Device;
use crate::driver::check;
use crate::error::Result;
use crate::stream::Stream;

/// Captured work, ready to be launched as often as one likes.
#[derive(Debug)]
pub struct Graph {
    device: Device,
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
}

// SAFETY: graphs of the driver belong to no thread; launching takes `&self`, which the driver orders itself.
unsafe impl Send for Graph {}

impl Graph {
    /// Takes over `graph`, and brings it to the device: otherwise its first launch would, which may wait for all devices of
    /// this process, and so for kernels that wait for that launch.
    pub(crate) fn new(device: &Device, graph: sys::CUgraph, stream: sys::CUstream) -> Result<Self> {
        let mut executable = std::ptr::null_mut();
        // SAFETY: the graph is ours, the answer too.
        let result = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0) };
        let made = Self { device: device.clone(), graph, executable };
        check("cuGraphInstantiate", device.ordinal(), result)?;
        // SAFETY: graph and stream live.
        let result = unsafe { sys::cuGraphUpload(executable, stream) };
        check("cuGraphUpload", device.ordinal(), result)?;
        Ok(made)
    }

    /// Puts its work into `stream`.
    ///
    /// # Errors
    /// What the driver refuses.
    #[inline]
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both live.
        let result = unsafe { sys::cuGraphLaunch(self.executable, stream.raw().cast()) };
        check("cuGraphLaunch", self.device.ordinal(), result)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let Ok(_current) = self.device.enter() else { return };
        // SAFETY: both are ours; the driver keeps what still runs. Errors have nobody to go to.
        unsafe {
            if !self.executable.is_null() {
                let _ = sys::cuGraphExecDestroy(self.executable);
            }
            let _ = sys::cuGraphDestroy(self.graph);
        }
    }
}
