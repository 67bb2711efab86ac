//! The quantised all-reduce on GPUs: one kernel, or several where packets have no room for all. See `kernels/quantised.cuh`.

use unisono_cuda::Stream;

use super::Gpu;
use crate::collectives::Plan;
use crate::error::Result;

impl Gpu {
    /// Puts a quantised all-reduce into `stream`.
    pub(super) fn launch_quantised(&mut self, plan: &Plan, stream: &Stream) -> Result<()> {
        let size = plan.dtype.size();
        // Peers compare the whole call each time.
        let words = plan.header.to_words();
        let mut parts = plan.in_parts(self.rules.most_quantised(size) / size);
        parts.try_for_each(|part| self.launch(&part, &words, stream))
    }
}
