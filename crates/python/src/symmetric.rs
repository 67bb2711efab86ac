//! `SymmetricMemory`: one-sided memory, whatever its type, behind one class.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use pyo3::prelude::*;
use pyo3::types::{PyString, PyTuple};
use unisono::{DType, Error, Memory, Place, RawBuffer, Stream, Symmetric};

use crate::call::{Manner, Side};
use crate::communicator::Communicator;
use crate::view::View;
use crate::{dtype, errors, interrupt, options, stream};

/// The same array on every rank, zeroed, which all ranks may read and write at any time: through views, by addresses (in kernels of
/// your own, of Triton for example), and with signals that bring order. Made by ``Communicator.symmetric_memory``.
///
/// On the host all copies are mapped into every process. On GPUs the copies lie in the memory of each rank's device, and kernels of one
/// device reach all of them by ``address(rank)``. Each rank has 64 signal slots, which start at 0.
///
/// >>> import numpy as np, unisono
/// >>> def main(rank):
/// ...     memory = rank.symmetric_memory(4, "float32")
/// ...     other = 1 - rank.rank
/// ...     memory.view(other).numpy()[:] = rank.rank + 1
/// ...     memory.signal(other, 0, 1)
/// ...     memory.wait_signal(0, 1)
/// ...     mine = memory.local.numpy().tolist()
/// ...     memory.close()
/// ...     return mine
/// >>> unisono.on_threads(2, main)
/// [[2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]]
#[pyclass(frozen, module = "unisono")]
pub(crate) struct SymmetricMemory {
    communicator: Py<Communicator>,
    /// `None` once it is closed.
    memory: RwLock<Option<Box<dyn OneSided>>>,
    dtype: DType,
    dimensions: Vec<usize>,
    place: Place,
}

/// [`Symmetric`] of any type.
trait OneSided: Send + Sync {
    fn address(&self, peer: usize) -> Result<u64, Error>;
    fn signal_on(&self, stream: &Stream, peer: usize, slot: usize, value: u32) -> Result<(), Error>;
    fn signal_value(&self, slot: usize) -> Result<u32, Error>;
    fn wait_signal(&self, slot: usize, at_least: u32, timeout: Duration) -> Result<(), Error>;
    fn check(&self) -> Result<(), Error>;
    fn mapping(&self) -> Option<Arc<dyn Any + Send + Sync>>;
    fn close(self: Box<Self>, communicator: &unisono::Communicator) -> Result<(), Error>;
}

impl<T: unisono::Element> OneSided for Symmetric<T> {
    fn address(&self, peer: usize) -> Result<u64, Error> {
        self.address(peer)
    }

    fn signal_on(&self, stream: &Stream, peer: usize, slot: usize, value: u32) -> Result<(), Error> {
        self.signal_on(stream, peer, slot, value)
    }

    fn signal_value(&self, slot: usize) -> Result<u32, Error> {
        self.signal_value(slot)
    }

    fn wait_signal(&self, slot: usize, at_least: u32, timeout: Duration) -> Result<(), Error> {
        self.wait_signal(slot, at_least, timeout)
    }

    fn check(&self) -> Result<(), Error> {
        self.check()
    }

    fn mapping(&self) -> Option<Arc<dyn Any + Send + Sync>> {
        self.mapping()
    }

    fn close(self: Box<Self>, communicator: &unisono::Communicator) -> Result<(), Error> {
        (*self).close(communicator)
    }
}

/// Memory of `count` elements of a type that is known at run time. Collective.
fn make(
    communicator: &unisono::Communicator,
    dtype: DType,
    count: usize,
    memory: Memory,
) -> Result<Box<dyn OneSided>, Error> {
    macro_rules! of {
        ($($dtype:ident => $type:ty),* $(,)?) => {
            match dtype {
                $(DType::$dtype => {
                    Ok(Box::new(communicator.window::<$type>(count, memory)?.into_symmetric(communicator)?))
                })*
            }
        };
    }
    of! {
        Bool => unisono::Bool8, I8 => i8, U8 => u8, I16 => i16, U16 => u16, I32 => i32, U32 => u32, I64 => i64, U64 => u64,
        F16 => unisono::half::f16, BF16 => unisono::half::bf16, F32 => f32, F64 => f64,
        F8E4M3 => unisono::f8e4m3, F8E5M2 => unisono::f8e5m2,
        Complex64 => unisono::Complex<f32>, Complex128 => unisono::Complex<f64>,
    }
}

#[pymethods]
impl Communicator {
    /// One-sided memory of ``shape`` (a number or numbers) and ``dtype`` (a name, or a dtype of numpy or torch), zeroed, on every rank.
    /// Collective: every rank calls it, with the same arguments. ``memory``: "host", or "device" (of each rank's GPU; the default where
    /// the communicator has one). See ``SymmetricMemory``.
    ///
    /// Raises ``MismatchError`` if the ranks differ; ``NodeError``, ``CudaError`` or ``DeviceError`` on all if one cannot have it.
    ///
    /// >>> import unisono
    /// >>> with unisono.Communicator.threads(1)[0] as rank:
    /// ...     rank.symmetric_memory((2, 2), "bfloat16")
    /// <unisono.SymmetricMemory [2, 2] bfloat16 in host memory>
    #[pyo3(signature = (shape, dtype=DtypeName::from("float32"), *, memory=None),
           text_signature = "($self, shape, dtype='float32', *, memory=None)")]
    fn symmetric_memory<'py>(
        this: &Bound<'py, Self>,
        shape: &Bound<'py, PyAny>,
        #[pyo3(from_py_with = dtype_name)] dtype: DtypeName,
        memory: Option<&str>,
    ) -> PyResult<SymmetricMemory> {
        let (py, me, call) = (this.py(), this.get(), "symmetric_memory");
        let refuse =
            |what, expected: &str, got: String| errors::argument(py, call, me.rank, what, expected, got);
        let dimensions: Vec<usize> = shape.extract().map(|size| vec![size]).or_else(|_| shape.extract())?;
        let Some(dtype) = dtype::of_name(&dtype.0) else {
            let names = DType::ALL.map(dtype::common_name).join(", ");
            return Err(refuse("dtype", &format!("one of {names}"), dtype.0));
        };
        let sizes = dimensions.iter().try_fold(1usize, |count, size| count.checked_mul(*size));
        let Some(count) = sizes.filter(|count| count.checked_mul(dtype.size()).is_some()) else {
            return Err(refuse("shape", "one that an address can count", format!("{dimensions:?}")));
        };
        let (memory, place) = match (memory, me.devices.first()) {
            (Some("host"), _) | (None, None) => (Memory::Host, Place::Host),
            (Some("device") | None, Some(ordinal)) => (Memory::Device, Place::Cuda { ordinal: *ordinal }),
            (Some("device"), None) => {
                return Err(refuse(
                    "memory",
                    "\"host\", as this communicator has no device",
                    "\"device\"".to_owned(),
                ));
            }
            (Some(other), _) => {
                return Err(refuse("memory", "\"host\" or \"device\"", format!("\"{other}\"")));
            }
        };
        let made = me.interruptibly(py, call, |communicator| make(communicator, dtype, count, memory))?;
        let communicator = this.clone().unbind();
        Ok(SymmetricMemory { communicator, memory: RwLock::new(Some(made)), dtype, dimensions, place })
    }
}

/// A name, with what frameworks put around it taken off.
struct DtypeName(String);

impl From<&str> for DtypeName {
    fn from(name: &str) -> Self {
        Self(name.to_owned())
    }
}

fn dtype_name(object: &Bound<'_, PyAny>) -> PyResult<DtypeName> {
    if let Ok(name) = object.cast::<PyString>() {
        return Ok(name.to_str()?.into());
    }
    // numpy.float32 and ml_dtypes.bfloat16 are classes, numpy.dtype("float32") and torch.float32 print themselves.
    let text = match object.getattr_opt("__name__")? {
        Some(name) => name.str()?.to_string(),
        None => object.str()?.to_string(),
    };
    Ok(text.trim_start_matches("torch.").into())
}

impl SymmetricMemory {
    /// Does something with the memory, without the interpreter.
    fn with<R: Send>(
        &self,
        py: Python<'_>,
        call: &'static str,
        f: impl FnOnce(&dyn OneSided) -> Result<R, Error> + Send,
    ) -> PyResult<R> {
        let rank = self.communicator.get().rank;
        let done = py.detach(|| self.memory.read().as_deref().map(f));
        match done {
            None => Err(errors::closed(py, "symmetric memory", call, rank)),
            Some(done) => done.map_err(|error| errors::raised(py, &error)),
        }
    }
}

#[pymethods]
impl SymmetricMemory {
    /// As ``communicator.symmetric_memory(shape, dtype, memory=memory)``.
    #[staticmethod]
    #[pyo3(signature = (communicator, shape, dtype=DtypeName::from("float32"), *, memory=None),
           text_signature = "(communicator, shape, dtype='float32', *, memory=None)")]
    fn empty<'py>(
        communicator: &Bound<'py, Communicator>,
        shape: &Bound<'py, PyAny>,
        #[pyo3(from_py_with = dtype_name)] dtype: DtypeName,
        memory: Option<&str>,
    ) -> PyResult<Self> {
        Communicator::symmetric_memory(communicator, shape, dtype, memory)
    }

    /// The sizes of its dimensions.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.dimensions)
    }

    /// The name of its elements' type.
    #[getter]
    fn dtype(&self) -> &'static str {
        dtype::common_name(self.dtype)
    }

    /// This rank's copy.
    #[getter]
    fn local(&self, py: Python<'_>) -> PyResult<View> {
        self.view(py, self.communicator.get().rank)
    }

    /// The copy of rank ``peer``, as memory for arrays: see ``View``.
    fn view(&self, py: Python<'_>, peer: usize) -> PyResult<View> {
        let (ptr, mapping) = self.with(py, "view", |memory| Ok((memory.address(peer)?, memory.mapping())))?;
        let count = self.dimensions.iter().product();
        let memory = RawBuffer { ptr, count, dtype: self.dtype, place: self.place };
        Ok(View { memory, dimensions: self.dimensions.clone(), mapping })
    }

    /// The address of the copy of rank ``peer``: in this process, or, of memory of GPUs, on this rank's device.
    fn address(&self, py: Python<'_>, peer: usize) -> PyResult<u64> {
        self.with(py, "address", |memory| memory.address(peer))
    }

    /// The addresses of all ranks' copies, by rank.
    #[getter]
    fn addresses(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        let ranks = self.communicator.get().world_size;
        self.with(py, "addresses", |memory| (0..ranks).map(|peer| memory.address(peer)).collect())
    }

    /// Sets signal ``slot`` of rank ``peer`` to ``value``; what this rank wrote before, to whomever, is seen by whoever has seen it. A slot
    /// has one writer at a time, and its values grow. With ``stream``, of memory of GPUs, in the order of that.
    #[pyo3(signature = (peer, slot, value, *, stream=None))]
    fn signal(
        &self,
        py: Python<'_>,
        peer: usize,
        slot: usize,
        value: u32,
        stream: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let communicator = self.communicator.get();
        let handle =
            stream.map(|given| stream::handle(given, communicator.site("signal", "stream"))).transpose()?;
        let stream = match (handle, self.place) {
            (Some(handle), Place::Cuda { ordinal }) => {
                let found = py
                    .detach(|| communicator.lock().and_then(|mut inner| Ok(inner.stream(handle, ordinal)?)));
                found.map_err(|failure| communicator.raised(py, failure, "signal"))?
            }
            _ => Arc::new(Stream::host()),
        };
        self.with(py, "signal", |memory| memory.signal_on(&stream, peer, slot, value))
    }

    /// What signal ``slot`` of this rank holds.
    fn signal_value(&self, py: Python<'_>, slot: usize) -> PyResult<u32> {
        self.with(py, "signal_value", |memory| memory.signal_value(slot))
    }

    /// Waits until signal ``slot`` of this rank holds at least ``at_least``, for at most ``timeout`` (default 600 s).
    ///
    /// Raises ``SignalError`` (a ``TimeoutError``) after that, with the communicator still working; the first cause of a failure.
    #[pyo3(signature = (slot, at_least, *, timeout=None))]
    fn wait_signal(
        &self,
        py: Python<'_>,
        slot: usize,
        at_least: u32,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let rank = self.communicator.get().rank;
        let patience = timeout.map(|time| options::patience(time, "wait_signal", rank)).transpose()?;
        let patience = patience.unwrap_or(Some(Duration::from_secs(600)));
        let begun = Instant::now();
        loop {
            let left = patience.map(|patience| patience.saturating_sub(begun.elapsed()));
            let slice = left.map_or(interrupt::LOOK, |left| left.min(interrupt::LOOK));
            let waited =
                self.with(py, "wait_signal", |memory| match memory.wait_signal(slot, at_least, slice) {
                    Err(Error::Signal { .. }) if left != Some(slice) => Ok(false),
                    Err(Error::Signal { rank, slot, expected, got, .. }) => {
                        Err(Error::Signal { rank, slot, expected, got, waited: begun.elapsed() })
                    }
                    done => done.map(|()| true),
                })?;
            if waited {
                return Ok(());
            }
            py.check_signals()?;
        }
    }

    /// Returns when every rank has entered it; of memory of GPUs it is enqueued in ``stream`` (default: the current one of torch). What
    /// was written before is then seen by all.
    #[pyo3(signature = (stream=None))]
    fn barrier<'py>(&self, py: Python<'py>, stream: Option<&Bound<'py, PyAny>>) -> PyResult<()> {
        let communicator = self.communicator.bind(py);
        let current = match (stream, self.place) {
            (None, Place::Cuda { ordinal }) => {
                let handle = stream::current(py, crate::array::StreamOf::Torch, ordinal)?;
                Some(handle.into_pyobject(py)?.into_any())
            }
            _ => None,
        };
        let manner = Manner { stream: stream.or(current.as_ref()), ..Manner::default() };
        let sides: [Side<'_, 'py>; 0] = [];
        let none = py.None().into_bound(py);
        Communicator::perform(communicator, unisono::Kind::Barrier, &sides, &none, &manner).map(drop)
    }

    /// Raises why waits of kernels of this rank ended without what they waited for: the first cause of a failed communicator, or a signal
    /// that did not come in time.
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, "check", |memory| memory.check())
    }

    /// Ends this memory on all ranks. Collective: every rank calls it. Views of the host stay readable; those of GPUs must not be used.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let communicator = self.communicator.get();
        let Some(memory) = py.detach(|| self.memory.write().take()) else {
            return Err(errors::closed(py, "symmetric memory", "close", communicator.rank));
        };
        communicator.interruptibly(py, "close", |one| memory.close(one))
    }

    fn __repr__(&self) -> String {
        format!("<unisono.SymmetricMemory {:?} {} in {}>", self.dimensions, self.dtype(), self.place)
    }
}
