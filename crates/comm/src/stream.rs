//! Streams: operations in an order of their own. The host's stream runs them at once, so that code written for
//! streams runs unchanged without a GPU.

use std::marker::PhantomData;

use crate::call::Call;
use crate::communicator::Communicator;
use crate::error::Result;
use crate::operations::Operations;

/// An ordered queue of work.
#[derive(Debug)]
pub struct Stream {
    host: PhantomData<()>,
}

impl Stream {
    /// The host's stream: in order, complete on return.
    pub const fn host() -> Self {
        Self { host: PhantomData }
    }
}

/// The operations of a communicator on a stream. Made by [`Communicator::on`].
#[derive(Debug)]
pub struct OnStream<'c> {
    communicator: &'c Communicator,
    _stream: &'c Stream,
}

impl<'c> OnStream<'c> {
    pub(crate) const fn new(communicator: &'c Communicator, stream: &'c Stream) -> Self {
        Self { communicator, _stream: stream }
    }
}

impl<'b> Operations<'b> for OnStream<'_> {
    type Done = ();

    fn submit(&self, call: Call<'b>) -> Result<()> {
        self.communicator.submit(call)
    }
}
