//! A layout of what callers computed themselves.

use std::sync::Arc;

use unisono_core::ep::Routing;

use super::tensor::Input;
use super::{Buffer, Layout, Routed, settings};
use crate::Bool8;
use crate::buffer::{Buf, Place};
use crate::error::Result;

impl Buffer {
    /// The layout that says what is known already: `is_token_in_rank` is tokens × ranks, `tokens_per_expert` has the selections of each expert. Local,
    /// and on the host.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if they do not fit the ranks and experts of this buffer; [`crate::Error::Device`] on GPUs;
    /// [`crate::Error::BufferState`] before the exchange.
    pub fn layout_of_ranks<'b>(
        &mut self,
        is_token_in_rank: impl Into<Buf<'b, Bool8>>,
        tokens_per_expert: impl Into<Buf<'b, i32>>,
    ) -> Result<Layout> {
        let (call, ranks) = ("layout", Input::from(is_token_in_rank.into()));
        let experts = Input::from(tokens_per_expert.into());
        self.available(call)?;
        let lent = |input: &Input<'b>| input.lent((call, self.rank, Place::Host));
        let flags: Vec<bool> = lent(&ranks)?.bytes.iter().map(|flag| *flag != 0).collect();
        let counts = lent(&experts)?.bytes.as_chunks().0.iter();
        let counts: Vec<i32> = counts.map(|count| i32::from_ne_bytes(*count)).collect();
        let routing = Routing::of_ranks(&flags, &counts, &self.placement)
            .map_err(|error| settings::argument(call, self.rank, "is_token_in_rank", error))?;
        Ok(Layout { routing: Routed::Host(Arc::new(routing)), world_size: self.world_size })
    }
}
