//! Streams: operations in an order of their own. The host's stream runs them at once, so that code written for
//! streams runs unchanged without a GPU.

use unisono_core::Element;

use crate::buffer::BufMut;
use crate::call::Call;
use crate::communicator::Communicator;
#[cfg(not(feature = "cuda"))]
use crate::error::Result;
#[cfg(feature = "cuda")]
use crate::error::{Error, Result};
use crate::operations::Operations;

/// An ordered queue of work: of the host, or of a GPU.
#[derive(Debug)]
pub struct Stream {
    #[cfg(feature = "cuda")]
    cuda: Option<unisono_cuda::Stream>,
}

impl Stream {
    /// The host's stream: in order, complete on return.
    pub const fn host() -> Self {
        Self {
            #[cfg(feature = "cuda")]
            cuda: None,
        }
    }

    /// A stream of device `ordinal` that somebody else made: operations on it are enqueued and return.
    ///
    /// # Errors
    /// [`Error::Cuda`] if there is no such device.
    ///
    /// # Safety
    /// `raw` is a live `CUstream` of the primary context of that device (null is its default stream), and outlives this.
    #[cfg(feature = "cuda")]
    pub unsafe fn cuda(raw: *mut std::ffi::c_void, ordinal: u32) -> Result<Self> {
        let device = unisono_cuda::Device::new(ordinal).map_err(|error| Error::Cuda { rank: 0, error })?;
        // SAFETY: as the caller promises.
        Ok(Self { cuda: Some(unsafe { unisono_cuda::Stream::from_raw(&device, raw) }) })
    }

    /// The stream of a GPU, if it is one.
    #[cfg(feature = "cuda")]
    pub(crate) const fn as_cuda(&self) -> Option<&unisono_cuda::Stream> {
        self.cuda.as_ref()
    }
}

#[cfg(feature = "cuda")]
impl From<unisono_cuda::Stream> for Stream {
    fn from(stream: unisono_cuda::Stream) -> Self {
        Self { cuda: Some(stream) }
    }
}

/// The operations of a communicator on a stream. Made by [`Communicator::on`].
#[derive(Debug)]
pub struct OnStream<'c> {
    communicator: &'c Communicator,
    stream: &'c Stream,
}

impl<'c> OnStream<'c> {
    pub(crate) const fn new(communicator: &'c Communicator, stream: &'c Stream) -> Self {
        Self { communicator, stream }
    }

    /// Receives the next message with `tag` from whichever rank sends one, and returns that rank. Ranks are served in turn.
    ///
    /// On a stream of a GPU this waits, as does the calling thread, for everything that is in the stream before and until some rank's
    /// next message to us has this tag; the data then comes in the order of the stream. What other ranks sent us with another tag has to be
    /// received before it is looked behind.
    ///
    /// # Errors
    /// As [`Operations::recv`]; [`crate::Error::Argument`] in a world of one rank, and on a stream that is captured.
    pub fn recv_any<'b, T: Element>(&self, dst: impl Into<BufMut<'b, T>>, tag: u32) -> Result<usize> {
        self.communicator.recv_any_on(&dst.into().raw(), tag, self.stream)
    }
}

impl<'b> Operations<'b> for OnStream<'_> {
    type Done = ();

    #[inline]
    fn submit(&self, call: Call<'b>) -> Result<()> {
        self.communicator.submit_on(&call, self.stream)
    }
}

/// The operations on several buffers of a rank, each on a stream of its own. Made by [`Communicator::on_each`].
#[derive(Debug)]
pub struct OnEach<'c> {
    communicator: &'c Communicator,
    streams: &'c [Stream],
}

impl<'c> OnEach<'c> {
    pub(crate) const fn new(communicator: &'c Communicator, streams: &'c [Stream]) -> Self {
        Self { communicator, streams }
    }
}

impl<'b> Operations<'b> for OnEach<'_> {
    type Done = ();

    fn submit(&self, call: Call<'b>) -> Result<()> {
        self.communicator.submit_each(&call, self.streams)
    }
}
