//! Windows and registrations: memory on which collectives work where it lies. Arrays over it are found by their address.

use parking_lot::{Mutex, RwLock};
use pyo3::prelude::*;
use unisono::{Kind, Place, RawBuffer};

use crate::array::Array;
use crate::communicator::Communicator;
use crate::errors;
use crate::kept::Held;
use crate::symmetric::{Asked, DtypeName, dtype_name};
use crate::view::View;

/// Memory of which all ranks have a copy, and on which collectives work where it lies: nothing is copied to staging, which makes large ones
/// faster. Made by ``Communicator.window``. It is a ``View`` of this rank's copy, so ``window.numpy()`` or ``torch.from_dlpack(window)`` gives
/// arrays over it; calls on these, on parts of them and on the window itself are calls on the window.
///
/// A call is on a window on all ranks or on none. Peers touch the memory only while this rank is inside a call on it. All ranks close it
/// together, by ``window.close()`` or the end of a ``with``; arrays over memory of the host stay then, those of GPUs must not be used.
///
/// >>> import unisono
/// >>> def main(rank):
/// ...     with rank.window(100_000, "int64") as window:
/// ...         x = window.lend().numpy()
/// ...         x[:] = rank.rank
/// ...         rank.all_reduce(x)
/// ...         return int(x[-1])
/// >>> unisono.on_threads(3, main)
/// [3, 3, 3]
#[pyclass(frozen, extends = View, module = "unisono")]
pub(crate) struct Window {
    communicator: Py<Communicator>,
    /// `None` once it is closed.
    window: Mutex<Option<unisono::Window<u8>>>,
    #[pyo3(get)]
    /// Its number, equal on all ranks.
    id: u64,
}

/// Memory of this rank's GPU that a framework allocated, and as much on every other rank, on which collectives work where it lies. Made by
/// ``Communicator.register``. It keeps the array alive. All ranks close it together, by ``close()`` or the end of a ``with``.
#[pyclass(frozen, module = "unisono")]
pub(crate) struct Registration {
    communicator: Py<Communicator>,
    /// `None` once it is closed.
    registration: Mutex<Option<unisono::Registration>>,
    #[pyo3(get)]
    /// Its number, equal on all ranks; windows have others.
    id: u64,
    #[pyo3(get)]
    /// Its length, equal on all ranks.
    bytes: usize,
}

/// The windows and the registrations of a communicator that are open.
#[derive(Default)]
pub(crate) struct AllKnown(RwLock<Vec<Known>>);

impl Drop for AllKnown {
    /// Ranks may map what was registered and not closed, so it is never freed.
    fn drop(&mut self) {
        self.0.get_mut().drain(..).for_each(|known| std::mem::forget(known.held));
    }
}

/// Memory that collectives reach where it lies.
struct Known {
    id: u64,
    place: Place,
    start: u64,
    bytes: u64,
    /// The array whose memory it is.
    held: Option<Held>,
}

impl Communicator {
    /// The same memory, as a part of the window or the registration that it lies in.
    #[inline]
    pub(crate) fn locate(&self, memory: RawBuffer) -> RawBuffer {
        let known = self.known.0.read();
        if known.is_empty() || memory.count == 0 {
            return memory;
        }
        let holds = |known: &&Known| {
            let offset = memory.ptr.checked_sub(known.start);
            let end = offset.and_then(|offset| offset.checked_add(memory.bytes() as u64));
            known.place == memory.place && end.is_some_and(|end| end <= known.bytes)
        };
        match known.iter().find(holds) {
            Some(known) => RawBuffer { place: Place::Window { id: known.id }, ..memory },
            None => memory,
        }
    }

    fn forget(&self, id: u64) -> Option<Held> {
        let mut known = self.known.0.write();
        let at = known.iter().position(|known| known.id == id)?;
        known.swap_remove(at).held
    }
}

#[pymethods]
impl Communicator {
    /// A window of ``shape`` (a number or numbers) and ``dtype``, zeroed, on every rank. Collective: every rank calls it, with the same
    /// arguments. ``memory``: "host"; "device", of each rank's GPU (the default where the communicator has one); or "pinned", memory of the
    /// host that CPUs and GPUs reach, so that calls on both work on it (on a GPU by ``stream=``). See ``Window``.
    ///
    /// Raises ``MismatchError`` if the ranks differ; ``NodeError``, ``CudaError`` or ``DeviceError`` on all if one cannot have it.
    ///
    /// >>> import unisono
    /// >>> with unisono.Communicator.threads(1)[0] as rank, rank.window((2, 2), "bfloat16") as window:
    /// ...     window.shape, window.id
    /// ((2, 2), 1)
    #[pyo3(signature = (shape, dtype=DtypeName::from("float32"), *, memory=None),
           text_signature = "($self, shape, dtype='float32', *, memory=None)")]
    fn window<'py>(
        this: &Bound<'py, Self>,
        shape: &Bound<'py, PyAny>,
        #[pyo3(from_py_with = dtype_name)] dtype: DtypeName,
        memory: Option<&str>,
    ) -> PyResult<Bound<'py, Window>> {
        let (py, me, call) = (this.py(), this.get(), "window");
        let Asked { dtype, dimensions, count } = Asked::new(me, call, shape, dtype)?;
        let (memory, place) = me.memory_of(py, call, memory, &["host", "device", "pinned"])?;
        let bytes = count * dtype.size();
        let window = me.interruptibly(py, call, |communicator| communicator.window::<u8>(bytes, memory))?;
        let (id, start, mapping) = (window.id(), window.address(), window.mapping());
        me.known.0.write().push(Known { id, place, start, bytes: bytes as u64, held: None });
        let view = View { memory: RawBuffer { ptr: start, count, dtype, place }, dimensions, mapping };
        let window = Window { communicator: this.clone().unbind(), window: Mutex::new(Some(window)), id };
        Bound::new(py, PyClassInitializer::from(view).add_subclass(window))
    }

    /// Lets ``x``, an array in memory of this rank's GPU, and arrays of as many bytes on every other rank, join as if they were a window:
    /// collectives on them and on parts of them work where they lie. Collective: every rank calls it. Memory of ``cudaMalloc`` and
    /// ``cuMemCreate`` is taken, torch's expandable segments too, that of stream-ordered pools is not. See ``Registration``.
    ///
    /// Raises ``PlaceError`` for memory of the host or of another GPU, ``DeviceError`` where GPUs do not reach each other's memory,
    /// ``ArgumentError`` for nothing, on this rank alone; ``MismatchError`` if the ranks differ; ``RegistrationError``, which names the rank
    /// whose memory cannot be shared, on all others.
    ///
    /// >>> import numpy as np, unisono
    /// >>> unisono.Communicator.threads(1)[0].register(np.zeros(3))
    /// Traceback (most recent call last):
    /// unisono.errors.PlaceError: register on rank 0 got a buffer in host memory; this communicator works on memory of a GPU...
    fn register<'py>(this: &Bound<'py, Self>, x: &Bound<'py, PyAny>) -> PyResult<Registration> {
        let (py, me, call) = (this.py(), this.get(), Kind::Register.name());
        let array = Array::new(x, me.site(call, "x"), None)?;
        let memory = array.memory;
        // SAFETY: the array is kept until the registration is closed, or for ever where that fails.
        let made = me.interruptibly(py, call, |communicator| unsafe { communicator.register(memory) });
        let registration = made?;
        let (id, bytes) = (registration.id(), registration.bytes());
        let held = Some(Held(keeper(x)?.unbind(), array.guard));
        me.known.0.write().push(Known {
            id,
            place: memory.place,
            start: memory.ptr,
            bytes: bytes as u64,
            held,
        });
        let registration = Mutex::new(Some(registration));
        Ok(Registration { communicator: this.clone().unbind(), registration, id, bytes })
    }
}

/// What keeps the memory of an array, whatever becomes of the array: a tensor of torch may be given other memory.
fn keeper<'py>(x: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    if crate::array::is_torch_tensor(x)? { x.call_method0("detach") } else { Ok(x.clone()) }
}

#[pymethods]
impl Window {
    /// Waits until this rank's GPU is done with the calls on a window of memory of the host, and returns the window, whose memory may then be
    /// read and written until the next call on it.
    ///
    /// Raises ``PoisonedError`` once the communicator failed, as a peer may have been writing; ``PlaceError`` for memory of a GPU.
    fn lend<'py>(this: &Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        let (py, me, call) = (this.py(), this.get(), "lend");
        let communicator = me.communicator.get();
        let lent = py.detach(|| me.window.lock().as_mut().map(|window| window.lend().map(drop)));
        match lent {
            None => Err(errors::closed(py, "window", call, communicator.rank)),
            Some(lent) => lent.map(|()| this.clone()).map_err(|error| errors::raised(py, &error)),
        }
    }

    /// Ends the window on all ranks. Collective.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let communicator = self.communicator.get();
        let Some(window) = py.detach(|| self.window.lock().take()) else {
            return Err(errors::closed(py, "window", "close", communicator.rank));
        };
        communicator.forget(self.id);
        communicator.interruptibly(py, "close", |one| window.close(one))
    }

    fn __enter__(this: Py<Self>) -> Py<Self> {
        this
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        kind: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        // Who fails does not wait for the others.
        if kind.is_none() && py.detach(|| self.window.lock().is_some()) { self.close(py) } else { Ok(()) }
    }
}

#[pymethods]
impl Registration {
    /// Ends the registration on all ranks: when it returns, no rank reaches the memory any more, except for CUDA graphs that were captured
    /// with it. Collective. It waits for what this process gave to the device.
    ///
    /// >>> registered = rank.register(torch.ones(1000, device="cuda"))  # doctest: +SKIP
    /// >>> registered.close()  # doctest: +SKIP
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let communicator = self.communicator.get();
        let Some(registration) = py.detach(|| self.registration.lock().take()) else {
            return Err(errors::closed(py, "registration", "close", communicator.rank));
        };
        let held = communicator.forget(self.id);
        let closed = communicator.interruptibly(py, "close", |one| registration.close(one));
        if closed.is_err() {
            // A peer may still be at work on it.
            std::mem::forget(held);
        }
        closed
    }

    fn __enter__(this: Py<Self>) -> Py<Self> {
        this
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        kind: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let is_open = py.detach(|| self.registration.lock().is_some());
        if kind.is_none() && is_open { self.close(py) } else { Ok(()) }
    }
}
