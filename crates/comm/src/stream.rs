//! Streams: operations in an order of their own. The host's stream runs them at once, so that code written for
//! streams runs unchanged without a GPU.

#[cfg(feature = "cuda")]
use smallvec::SmallVec;
use unisono_core::Element;

use crate::buffer::BufMut;
use crate::call::Call;
use crate::communicator::Communicator;
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
    /// `raw` is a live `CUstream` of the primary context of that device (null is its default stream), and outlives this, and
    /// tensors that calls on it give ([`ep::Tensor`](crate::ep::Tensor)).
    #[cfg(feature = "cuda")]
    pub unsafe fn cuda(raw: *mut std::ffi::c_void, ordinal: u32) -> Result<Self> {
        let device = unisono_cuda::Device::new(ordinal).map_err(|error| Error::Cuda { rank: 0, error })?;
        // SAFETY: as the caller promises.
        Ok(Self { cuda: Some(unsafe { unisono_cuda::Stream::from_raw(&device, raw) }) })
    }

    /// The stream of a GPU, if it is one.
    #[cfg(feature = "cuda")]
    pub const fn as_cuda(&self) -> Option<&unisono_cuda::Stream> {
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

impl Communicator {
    /// The operations on several buffers ([`Operations::all_reduce_multi`] and [`Operations::broadcast_multi`]), for a rank with
    /// several GPUs ([`Builder::devices`](crate::Builder::devices)): buffer j lies on device j of this rank, and its part of the call runs in the order of
    /// `streams[j]`, which is a stream of that device. All other operations are refused.
    ///
    /// One call is a kernel in each stream, and these wait for each other: nothing has to be ordered between the streams, but nothing
    /// may order them one behind the other either. A graph captures a call as one branch for each stream, which are forked and
    /// joined by events as usual; as it is launched into one stream, what comes later in the others has to wait for that. Buffers are addresses of devices; windows are not taken. Sums are by rank and then by buffer, as
    /// on the host. Streams of the host ([`Stream::host`]) serve the same code without GPUs, one for each buffer.
    ///
    /// ```no_run
    /// # use unisono::{BufMut, Builder, Operations, ReduceOp, Stream, cuda};
    /// let ordinals = [0, 1];
    /// let rank = Builder::from_env()?.devices(&ordinals).build()?;
    /// let (mut streams, mut memory) = (Vec::new(), Vec::new());
    /// for ordinal in ordinals {
    ///     let device = cuda::Device::new(ordinal)?;
    ///     streams.push(Stream::from(cuda::Stream::new(&device)?));
    ///     memory.push(cuda::DeviceBuffer::new(&device, 4096)?);
    /// }
    /// // SAFETY: the memory is used by nobody else and outlives the work of the streams.
    /// let local = unsafe { [0, 1].map(|j| BufMut::<f32>::cuda(memory[j].address(), 1024, ordinals[j])) };
    /// rank.on_each(&streams).all_reduce_multi(local.into(), ReduceOp::Sum)?;
    /// # std::mem::forget((streams, memory));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Of its operations: [`Error::Argument`] if there is not one stream and one buffer for each device, in its order, if some streams are
    /// captured and some are not, or if the ranks of an all-reduce have different numbers of devices; [`Error::Place`] if a buffer
    /// lies elsewhere; else as on one stream. If the driver refuses a part of a call whose other parts have begun, the
    /// communicator fails.
    pub const fn on_each<'c>(&'c self, streams: &'c [Stream]) -> OnEach<'c> {
        OnEach::new(self, streams)
    }

    /// Submits a call on several buffers, each in the order of a stream of its own.
    fn submit_each(&self, call: &Call<'_>, streams: &[Stream]) -> Result<()> {
        self.check_each(call, streams)?;
        #[cfg(feature = "cuda")]
        if are_of_gpus(streams) {
            let prepared = self.prepare_each(call, streams)?;
            return self.enqueue_each(&prepared, streams);
        }
        self.engine().submit(call)
    }

    /// Whether `streams` serve a call on several buffers: all of GPUs, which look closer, or one of the host for each buffer.
    pub(crate) fn check_each(&self, call: &Call<'_>, streams: &[Stream]) -> Result<()> {
        let refuse = |what, expected: &str, got: String| {
            let (call, expected) = (call.kind.name(), expected.to_owned());
            Err(Error::Argument { call, rank: self.rank(), what, expected, got })
        };
        if !call.kind.is_multi() {
            let got = call.kind.name().to_owned();
            return refuse("operation", "one on several buffers (all_reduce_multi, broadcast_multi)", got);
        }
        #[cfg(feature = "cuda")]
        {
            let of_gpus = of_gpus(streams);
            match of_gpus.first() {
                None => {}
                Some(_) if of_gpus.len() < streams.len() => {
                    let got = format!("{} of {} of GPUs", of_gpus.len(), streams.len());
                    return refuse("streams", "all of GPUs, or all of the host", got);
                }
                Some(first) if self.gpu.is_none() => {
                    return Err(crate::gpu::without_device(call.kind, self.rank(), first));
                }
                Some(_) => return Ok(()),
            }
        }
        let buffers = call.buffers().len();
        if streams.len() != buffers {
            let expected = format!("{buffers}, one for each buffer");
            return refuse("number of streams", &expected, streams.len().to_string());
        }
        Ok(())
    }

    /// Checks a call that is to be enqueued in streams of GPUs later, which passed [`Communicator::check_each`].
    #[cfg(feature = "cuda")]
    pub(crate) fn prepare_each(
        &self,
        call: &Call<'_>,
        streams: &[Stream],
    ) -> Result<crate::gpu::PreparedEach> {
        let Some(gpu) = &self.gpu else { unreachable!("it was checked on GPUs") };
        gpu.borrow_mut().prepare_each(&mut self.engine(), call, &of_gpus(streams))
    }

    /// Enqueues what was checked.
    #[cfg(feature = "cuda")]
    pub(crate) fn enqueue_each(&self, prepared: &crate::gpu::PreparedEach, streams: &[Stream]) -> Result<()> {
        let Some(gpu) = &self.gpu else { unreachable!("it was checked on GPUs") };
        gpu.borrow_mut().enqueue_each(prepared, &of_gpus(streams))
    }
}

/// Whether any is of a GPU. All are then, in a call that passed [`Communicator::check_each`].
#[cfg(feature = "cuda")]
pub(crate) fn are_of_gpus(streams: &[Stream]) -> bool {
    streams.iter().any(|stream| stream.as_cuda().is_some())
}

/// Those of GPUs.
#[cfg(feature = "cuda")]
fn of_gpus(streams: &[Stream]) -> SmallVec<[&unisono_cuda::Stream; 8]> {
    streams.iter().filter_map(Stream::as_cuda).collect()
}

impl<'b> Operations<'b> for OnEach<'_> {
    type Done = ();

    fn submit(&self, call: Call<'b>) -> Result<()> {
        self.communicator.submit_each(&call, self.streams)
    }
}
