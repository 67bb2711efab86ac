//! The handle of a dispatch: where the tokens of all ranks went, for combine and for doing the same again.

use std::sync::Arc;

use unisono_core::ep::Routing;

#[cfg(feature = "cuda")]
use super::gpu::DeviceRoutes;
use super::tensor::Tensor;

/// The layout of a dispatch on all ranks. Clones are the same. On GPUs it must not outlive the stream of its call by much: as tensors.
#[derive(Clone, Debug)]
pub struct Handle(pub(super) Arc<Routes>);

/// What a handle holds.
#[derive(Debug)]
pub(super) struct Routes {
    /// The call that made it.
    pub(super) call: u64,
    pub(super) top_k: usize,
    pub(super) ranks: usize,
    pub(super) ways: Ways,
}

/// Where it lies.
#[derive(Debug)]
pub(super) enum Ways {
    Host(HostRoutes),
    #[cfg(feature = "cuda")]
    Device(DeviceRoutes),
}

/// A layout on the host.
#[derive(Debug)]
pub(super) struct HostRoutes {
    /// Where our tokens go.
    pub(super) routing: Arc<Routing>,
    /// The row at which the rows of each source begin, and behind the last.
    pub(super) starts: Vec<usize>,
    /// The index of each row's token at its source, −1 behind the last.
    pub(super) source_tokens: Vec<i32>,
    pub(super) prefix: Vec<i32>,
    /// The most tokens that any rank sent.
    pub(super) most_tokens: usize,
}

impl Routes {
    /// That of a buffer on the host.
    pub(super) const fn on_host(&self) -> Option<&HostRoutes> {
        match &self.ways {
            Ways::Host(routes) => Some(routes),
            #[cfg(feature = "cuda")]
            Ways::Device(_) => None,
        }
    }

    /// That of a buffer on a GPU.
    #[cfg(feature = "cuda")]
    pub(super) const fn on_device(&self) -> Option<&DeviceRoutes> {
        match &self.ways {
            Ways::Host(_) => None,
            Ways::Device(routes) => Some(routes),
        }
    }
}

impl Handle {
    /// i32 `[ranks, ranks]`: at `[i][r]` the number of tokens that ranks 0 to i send to rank r.
    pub fn rank_prefix(&self) -> Tensor {
        match &self.0.ways {
            Ways::Host(routes) => Tensor::of(&routes.prefix, &[self.0.ranks, self.0.ranks]),
            #[cfg(feature = "cuda")]
            Ways::Device(routes) => routes.prefix(),
        }
    }

    /// i32 `[N]`: the index of each row's token at its source, −1 behind the last one.
    pub fn source_tokens(&self) -> Tensor {
        match &self.0.ways {
            Ways::Host(routes) => Tensor::of(&routes.source_tokens, &[routes.source_tokens.len()]),
            #[cfg(feature = "cuda")]
            Ways::Device(routes) => routes.source_tokens(),
        }
    }

    /// bool `[tokens, ranks]`: which of our tokens went to which rank.
    pub fn is_token_in_rank(&self) -> Tensor {
        match &self.0.ways {
            Ways::Host(routes) => super::is_token_in_rank(&routes.routing.destinations, self.0.ranks),
            #[cfg(feature = "cuda")]
            Ways::Device(routes) => routes.routing.is_in_rank(),
        }
    }

    /// Rows of what was dispatched: N, as many as came, or as [`Dispatch::worst_tokens`](super::Dispatch::worst_tokens) said.
    pub fn rows(&self) -> usize {
        match &self.0.ways {
            Ways::Host(routes) => routes.source_tokens.len(),
            #[cfg(feature = "cuda")]
            Ways::Device(routes) => routes.rows,
        }
    }

    /// Tokens that this rank sent.
    pub fn tokens(&self) -> usize {
        match &self.0.ways {
            Ways::Host(routes) => routes.routing.destinations.len(),
            #[cfg(feature = "cuda")]
            Ways::Device(routes) => routes.routing.tokens,
        }
    }
}
