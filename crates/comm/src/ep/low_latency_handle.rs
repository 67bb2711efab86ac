//! What a low-latency combine has to know of its dispatch.

use std::sync::Arc;

#[cfg(feature = "cuda")]
use super::gpu::DeviceOrigins;
use super::tensor::Tensor;

/// Where the rows of a low-latency dispatch came from. Clones are the same.
#[derive(Clone, Debug)]
pub struct LowLatencyHandle(pub(super) Arc<Origins>);

/// What a handle holds.
#[derive(Debug)]
pub(super) struct Origins {
    pub(super) call: u64,
    pub(super) top_k: usize,
    /// Tokens that this rank sent.
    pub(super) tokens: usize,
    pub(super) places: Places,
}

/// Where it holds the rows.
#[derive(Debug)]
pub(super) enum Places {
    Host(HostOrigins),
    #[cfg(feature = "cuda")]
    Device(DeviceOrigins),
}

/// Rows on the host.
#[derive(Debug)]
pub(super) struct HostOrigins {
    /// Rows of a block.
    pub(super) rows: usize,
    /// `[L, rows]`: the token's index at its source.
    pub(super) source_tokens: Vec<i32>,
    /// `[L, ranks]`: where the rows of a source begin, and how many they are.
    pub(super) ranges: Vec<(u32, u32)>,
}

impl Origins {
    /// Those of a buffer on the host.
    pub(super) const fn on_host(&self) -> Option<&HostOrigins> {
        match &self.places {
            Places::Host(origins) => Some(origins),
            #[cfg(feature = "cuda")]
            Places::Device(_) => None,
        }
    }

    /// Those of a buffer on a GPU.
    #[cfg(feature = "cuda")]
    pub(super) const fn on_device(&self) -> Option<&DeviceOrigins> {
        match &self.places {
            Places::Host(_) => None,
            Places::Device(origins) => Some(origins),
        }
    }
}

impl LowLatencyHandle {
    /// i32 `[L, M]`: the index of each row's token at its source; only those of rows that came have a meaning.
    pub fn source_tokens(&self) -> Tensor {
        match &self.0.places {
            Places::Host(HostOrigins { source_tokens, rows, .. }) => {
                Tensor::of(source_tokens, &[source_tokens.len() / rows, *rows])
            }
            #[cfg(feature = "cuda")]
            Places::Device(origins) => origins.source_tokens(),
        }
    }

    /// i64 `[L, ranks]`: the rows of each source within the block of an expert, as first << 32 | number.
    pub fn layout_range(&self) -> Tensor {
        match &self.0.places {
            Places::Host(HostOrigins { source_tokens, rows, ranges }) => {
                let experts = source_tokens.len() / rows;
                let pack = |range: &(u32, u32)| i64::from(range.0) << 32 | i64::from(range.1);
                let ranges: Vec<i64> = ranges.iter().map(pack).collect();
                Tensor::of(&ranges, &[experts, ranges.len() / experts.max(1)])
            }
            #[cfg(feature = "cuda")]
            Places::Device(origins) => origins.layout_range(),
        }
    }
}
