//! One call from Python, from its arrays to its result: looked at, checked, submitted in one of four ways (at once, in flight, in a
//! stream, in a group), and what it needs kept alive.

use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use unisono::{Call, Counts, DType, Error, Kind, Operations, Place, RawBuffer};

use crate::array::{Array, Guard, Site, StreamOf};
use crate::communicator::{Communicator, Failure, Inner};
use crate::kept::{self, Held, Spare};
use crate::stream::{Behind, Given};
use crate::work::{Point, Work};
use crate::{errors, group, options, stream};

/// One side of an operation.
#[derive(Clone, Copy)]
pub(crate) struct Side<'a, 'py> {
    pub(crate) what: &'static str,
    /// `None` where this rank has nothing, as those that are no root.
    pub(crate) object: Option<&'a Bound<'py, PyAny>>,
    /// Whether it is written.
    pub(crate) is_target: bool,
}

/// The arguments that all operations have.
#[derive(Default)]
pub(crate) struct Manner<'a, 'py> {
    pub(crate) stream: Option<&'a Bound<'py, PyAny>>,
    pub(crate) is_async: bool,
    pub(crate) timeout: Option<&'a Bound<'py, PyAny>>,
}

/// Sizes of parts, and where they lie.
pub(crate) struct Parts {
    pub(crate) counts: Vec<usize>,
    pub(crate) offsets: Option<Vec<usize>>,
}

impl Parts {
    fn as_counts(&self) -> Counts<'_> {
        Counts { counts: &self.counts, offsets: self.offsets.as_deref() }
    }
}

/// Where a call goes: nowhere but to this thread, or into the stream with this handle on this device.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Way {
    Host,
    Stream(u64, u32),
}

/// A call with all that Python said; raw, and so without lifetimes.
pub(crate) struct Request {
    pub(crate) kind: Kind,
    pub(crate) buffers: Vec<RawBuffer>,
    pub(crate) parts: Vec<Parts>,
    pub(crate) way: Way,
    /// Streams that the call comes behind: those in which the arrays are still being made, besides its own, and one that was given.
    pub(crate) after: Vec<u64>,
    /// Whether one was given. Then who waits for the call joins its stream.
    pub(crate) is_beside: bool,
}

impl Request {
    /// The stream of the call, which waits for those in which its arrays are made.
    pub(crate) fn stream(&self, inner: &mut Inner) -> Result<Arc<unisono::Stream>, Error> {
        let Way::Stream(handle, ordinal) = self.way else { return Ok(Arc::new(unisono::Stream::host())) };
        inner.stream_after(handle, ordinal, &self.after)
    }

    /// The call itself.
    ///
    /// # Safety
    /// As [`Call::from_raw`].
    pub(crate) unsafe fn call(&self) -> Call<'_> {
        let counts: Vec<_> = self.parts.iter().map(Parts::as_counts).collect();
        // SAFETY: as the caller promises.
        unsafe { Call::from_raw(self.kind, &self.buffers, &counts) }
    }
}

impl Communicator {
    /// Where something of a call was given.
    pub(crate) const fn site(&self, call: &'static str, what: &'static str) -> Site {
        Site { call, rank: self.rank, what }
    }

    /// Carries out `kind` on `sides` (at most two), and gives `result` back, or a `Work`.
    #[inline]
    pub(crate) fn perform<'py>(
        this: &Bound<'py, Self>,
        kind: Kind,
        sides: &[Side<'_, 'py>],
        result: &Bound<'py, PyAny>,
        manner: &Manner<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        let me = this.get();
        // The commonest call: on memory of the host, at once, without anything to remember.
        if let [Side { what, object: Some(object), is_target }] = *sides
            && manner.stream.is_none()
            && manner.timeout.is_none()
            && !manner.is_async
            && !group::is_open()
        {
            let array = me.array(kind, (what, object, is_target), None)?;
            if array.memory.place == Place::Host {
                me.at_once(this.py(), kind, &[me.locate(array.memory)])?;
                return Ok(result.clone().unbind());
            }
            return Self::perform_on(this, kind, (sides, vec![array]), Vec::new(), result, (manner, None));
        }
        Self::perform_with(this, kind, sides, Vec::new(), result, manner)
    }

    /// The same with sizes of parts.
    pub(crate) fn perform_with<'py>(
        this: &Bound<'py, Self>,
        kind: Kind,
        sides: &[Side<'_, 'py>],
        parts: Vec<Parts>,
        result: &Bound<'py, PyAny>,
        manner: &Manner<'_, 'py>,
    ) -> PyResult<Py<PyAny>> {
        let me = this.get();
        let given =
            manner.stream.map(|given| stream::given(given, me.site(kind.name(), "stream"))).transpose()?;
        let arrays = me.arrays(this.py(), kind, sides, given.map(|given| given.handle))?;
        Self::perform_on(this, kind, (sides, arrays), parts, result, (manner, given))
    }

    /// The same with the memory of the sides, and the stream that was given.
    fn perform_on<'py>(
        this: &Bound<'py, Self>,
        kind: Kind,
        (sides, arrays): (&[Side<'_, 'py>], Vec<Array>),
        parts: Vec<Parts>,
        result: &Bound<'py, PyAny>,
        (manner, given): (&Manner<'_, 'py>, Option<Given>),
    ) -> PyResult<Py<PyAny>> {
        let (py, me) = (this.py(), this.get());
        let on_device = on_device(&arrays);
        let way = me.way(py, kind.name(), on_device, given.map(|given| given.handle))?;
        let patience =
            manner.timeout.map(|time| options::patience(time, kind.name(), me.rank)).transpose()?;
        let mut buffers: Vec<_> = arrays.iter().map(|array| me.locate(array.memory)).collect();
        if matches!(kind, Kind::AllToAllCounted) {
            // Its lists, which follow input and output, are this rank's own; frameworks have signed ones, of which none is negative.
            for (list, array) in buffers.iter_mut().zip(&arrays).skip(2) {
                list.place = array.memory.place;
                list.dtype = match list.dtype {
                    DType::I32 => DType::U32,
                    DType::I64 => DType::U64,
                    dtype => dtype,
                };
            }
        }
        let elsewhere = |array: &Array| match (array.stream, way) {
            (StreamOf::Named(stream), Way::Stream(handle, _)) if stream != handle => Some(stream),
            _ => None,
        };
        let mut after: Vec<u64> = arrays.iter().filter_map(elsewhere).collect();
        let behind = given.and_then(|given| given.behind);
        if let (Some(behind), Way::Stream(handle, ordinal)) = (behind, way) {
            let other = match (behind, on_device) {
                (Behind::Stream(other), _) => other,
                (Behind::Current, Some((_, of))) => stream::current(py, of, ordinal)?,
                (Behind::Current, None) => stream::current(py, StreamOf::Torch, ordinal)?,
            };
            if other != handle {
                after.push(other);
            }
        }
        let request = Request { kind, buffers, parts, way, after, is_beside: behind.is_some() };
        let objects = sides.iter().filter_map(|side| side.object).map(|object| object.clone().unbind());
        let guards =
            arrays.into_iter().map(|array| array.guard).chain(std::iter::repeat_with(|| Guard::None));
        let held: Vec<Held> = objects.zip(guards).map(|(object, guard)| Held(object, guard)).collect();
        if group::is_open() {
            let timeout = patience.map(|_| "timeout");
            me.check_manner_of_group(py, kind, if manner.is_async { Some("async_op") } else { timeout })?;
            group::add(this, request, Vec::new(), held);
            return Ok(result.clone().unbind());
        }
        me.submit(this, request, held, (manner.is_async, patience), result)
    }

    /// The memory of one side: its name, the array, and whether it is written.
    #[inline]
    fn array(
        &self,
        kind: Kind,
        (what, object, is_target): (&'static str, &Bound<'_, PyAny>, bool),
        stream: Option<u64>,
    ) -> PyResult<Array> {
        let site = self.site(kind.name(), what);
        let array = Array::new(object, site, stream)?;
        if is_target && array.is_readonly {
            return Err(site.refuse(object.py(), "writable", "a read-only array"));
        }
        Ok(array)
    }

    /// That of all sides; those that are nothing are empty, and otherwise like the others.
    fn arrays(
        &self,
        py: Python<'_>,
        kind: Kind,
        sides: &[Side<'_, '_>],
        stream: Option<u64>,
    ) -> PyResult<Vec<Array>> {
        let one = |side: &Side<'_, '_>| {
            side.object
                .map(|object| self.array(kind, (side.what, object, side.is_target), stream))
                .transpose()
        };
        let arrays: Vec<Option<Array>> = sides.iter().map(one).collect::<PyResult<_>>()?;
        let Some(like) = arrays.iter().flatten().next() else {
            return match sides {
                [] => Ok(Vec::new()),
                [side, ..] => Err(self.site(kind.name(), side.what).refuse(py, "an array", "None")),
            };
        };
        let memory = RawBuffer { count: 0, ..like.memory };
        let nothing = Array { memory, is_readonly: false, stream: like.stream, guard: Guard::None };
        let filled = arrays.into_iter().map(|array| match array {
            Some(array) => array,
            None => Array { guard: Guard::None, ..nothing },
        });
        Ok(filled.collect())
    }

    /// Where a call goes whose arrays lie on this device (`None`: on the host), with the stream that was given.
    pub(crate) fn way(
        &self,
        py: Python<'_>,
        call: &'static str,
        on_device: Option<(u32, StreamOf)>,
        given: Option<u64>,
    ) -> PyResult<Way> {
        match (on_device, given, self.devices.as_slice()) {
            (Some((ordinal, of)), given, _) => {
                self.check_device(py, call, ordinal)?;
                let handle = given.map_or_else(|| stream::current(py, of, ordinal), Ok)?;
                Ok(Way::Stream(handle, ordinal))
            }
            // Memory of the host in a stream of a GPU: the library refuses it, unless there is nothing to refuse.
            (None, Some(handle), [ordinal, ..]) => Ok(Way::Stream(handle, *ordinal)),
            (None, ..) => Ok(Way::Host),
        }
    }

    /// Refuses memory of a device that this communicator does not work on.
    fn check_device(&self, py: Python<'_>, call: &'static str, ordinal: u32) -> PyResult<()> {
        if self.devices.contains(&ordinal) {
            return Ok(());
        }
        let ours: Vec<String> = self.devices.iter().map(|ordinal| format!("cuda:{ordinal}")).collect();
        let expected = if ours.is_empty() { "host memory".to_owned() } else { ours.join(", ") };
        let got = Place::Cuda { ordinal }.to_string();
        Err(errors::raised(py, &Error::Place { call, rank: self.rank, expected, got }))
    }

    /// On memory of the host, waiting here.
    #[inline]
    fn at_once(&self, py: Python<'_>, kind: Kind, buffers: &[RawBuffer]) -> PyResult<()> {
        let done = py.detach(|| {
            let inner = self.lock()?;
            // SAFETY: the arrays are borrowed from Python's caller, and hold their memory until this returns.
            let call = unsafe { Call::from_raw(kind, buffers, &[]) };
            Ok(inner.communicator.submit(call)?)
        });
        done.map_err(|failure| self.raised(py, failure, kind.name()))
    }

    fn submit<'py>(
        &self,
        this: &Bound<'py, Self>,
        request: Request,
        held: Vec<Held>,
        (is_async, patience): (bool, Option<Option<Duration>>),
        result: &Bound<'py, PyAny>,
    ) -> PyResult<Py<PyAny>> {
        let (py, call) = (this.py(), request.kind.name());
        let failed = |failure| self.raised(py, failure, call);
        match request.way {
            Way::Host if is_async => {
                let before = self.in_flight.started();
                let begun = py.detach(|| {
                    let inner = self.lock()?;
                    // SAFETY: what holds the memory is kept below until the operation is over.
                    let started = unsafe { inner.communicator.start(&request.call()) }?;
                    let over = before.into_iter().filter(|one| inner.communicator.is_over(*one)).collect();
                    Ok((started, over))
                });
                let (started, over): (_, Vec<_>) = begun.map_err(failed)?;
                self.in_flight.keep(started, held);
                self.in_flight.let_go(&over);
                Work::on_host(this, started, patience, result)
            }
            Way::Host => {
                let done = py.detach(|| {
                    let inner = self.lock()?;
                    // SAFETY: `held` lives until this returns.
                    with_patience(&inner.communicator, patience, |one| one.submit(unsafe { request.call() }))
                });
                done.map_err(failed)?;
                Ok(result.clone().unbind())
            }
            Way::Stream(_, ordinal) => {
                let enqueued = py.detach(|| {
                    let mut inner = self.lock()?;
                    let stream = request.stream(&mut inner)?;
                    with_patience(&inner.communicator, patience, |one| {
                        // SAFETY: what holds the memory is kept until the stream has passed the call.
                        one.on(&stream).submit(unsafe { request.call() })
                    })?;
                    Ok(self.point_behind(stream, is_async && request.is_beside)?)
                });
                let point = match enqueued {
                    Ok(point) => point,
                    Err(failure) => {
                        // A part of the call may be at work on it, and nothing tells when that ends.
                        if !is_refusal(&failure) {
                            std::mem::forget(held);
                        }
                        return Err(failed(failure));
                    }
                };
                if let Point::Event(event) = &point {
                    kept::keep_until(event.clone(), held);
                }
                if is_async {
                    Work::on_device(this, (ordinal, point), result)
                } else {
                    Ok(result.clone().unbind())
                }
            }
        }
    }

    /// An event behind what `stream` of a GPU holds, if it is not captured.
    pub(crate) fn event_behind(&self, stream: &unisono::Stream) -> Result<Option<Arc<Spare>>, Error> {
        let Some(stream) = stream.as_cuda() else { return Ok(None) };
        kept::event_behind(stream).map_err(|error| Error::Cuda { rank: self.rank, error })
    }

    /// What lies behind a call in `stream`; if that is captured, so that others can join it, if that `is_joined`.
    fn point_behind(&self, stream: Arc<unisono::Stream>, is_joined: bool) -> Result<Point, Error> {
        if let Some(event) = self.event_behind(&stream)? {
            return Ok(Point::Event(event));
        }
        let captured = stream.as_cuda().filter(|_| is_joined).map(kept::captured_behind).transpose();
        let event = captured.map_err(|error| Error::Cuda { rank: self.rank, error })?;
        Ok(Point::Captured(event.map(|event| (stream, event))))
    }

    /// Receives from anybody; who it was.
    pub(crate) fn receive_any<'py>(
        this: &Bound<'py, Self>,
        object: &Bound<'py, PyAny>,
        tag: u32,
        manner: &Manner<'_, 'py>,
    ) -> PyResult<usize> {
        let (py, me, kind, what) = (this.py(), this.get(), Kind::Recv { from: u32::MAX, tag }, "x");
        let given =
            manner.stream.map(|given| stream::handle(given, me.site(kind.name(), "stream"))).transpose()?;
        let array = me.array(kind, (what, object, true), given)?;
        let way = me.way(py, kind.name(), on_device(std::slice::from_ref(&array)), given)?;
        let patience =
            manner.timeout.map(|time| options::patience(time, kind.name(), me.rank)).transpose()?;
        let memory = array.memory;
        let got = py.detach(|| {
            let mut inner = me.lock()?;
            let stream = match way {
                Way::Host => Arc::new(unisono::Stream::host()),
                Way::Stream(handle, ordinal) => inner.stream(handle, ordinal)?,
            };
            let from = with_patience(&inner.communicator, patience, |one| {
                // SAFETY: the array holds its memory until this returns, and is kept for the stream below.
                unsafe { one.recv_any_raw(&memory, tag, &stream) }
            })?;
            Ok((from, me.event_behind(&stream)?))
        });
        let (from, event) = got.map_err(|failure| me.raised(py, failure, "recv_any"))?;
        if let Some(event) = event {
            kept::keep_until(event, vec![Held(object.clone().unbind(), array.guard)]);
        }
        Ok(from)
    }

    /// Carries out `kind` on a buffer of each of this rank's devices, or on several of the host.
    pub(crate) fn perform_on_each<'py>(
        this: &Bound<'py, Self>,
        kind: Kind,
        local: &[Bound<'py, PyAny>],
        streams: Option<Vec<Bound<'py, PyAny>>>,
        timeout: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        let (py, me) = (this.py(), this.get());
        let one = |object| me.array(kind, ("an array of the list", object, true), None);
        let arrays: Vec<Array> = local.iter().map(one).collect::<PyResult<_>>()?;
        let site = me.site(kind.name(), "streams");
        let mut handles = Vec::new();
        for (at, array) in arrays.iter().enumerate() {
            let Place::Cuda { ordinal } = array.memory.place else { continue };
            me.check_device(py, kind.name(), ordinal)?;
            let handle = match streams.as_ref().map(|streams| streams.get(at)) {
                None => stream::current(py, array.stream, ordinal)?,
                Some(Some(given)) => stream::handle(given, site)?,
                Some(None) => return Err(site.refuse(py, "one for each array", "fewer")),
            };
            handles.push((handle, ordinal));
        }
        let patience = timeout.map(|time| options::patience(time, kind.name(), me.rank)).transpose()?;
        let buffers: Vec<_> = arrays.iter().map(|array| array.memory).collect();
        let hold = |(object, array): (&Bound<'py, PyAny>, Array)| Held(object.clone().unbind(), array.guard);
        if group::is_open() {
            me.check_manner_of_group(py, kind, patience.map(|_| "timeout"))?;
            let request = Request {
                kind,
                buffers,
                parts: Vec::new(),
                way: Way::Host,
                after: Vec::new(),
                is_beside: false,
            };
            group::add(this, request, handles, local.iter().zip(arrays).map(hold).collect());
            return Ok(());
        }
        let done = py.detach(|| {
            let inner = me.lock()?;
            // SAFETY: the arrays hold their memory until this returns, and are kept for their streams below.
            let call = unsafe { Call::from_raw(kind, &buffers, &[]) };
            if handles.is_empty() {
                return with_patience(&inner.communicator, patience, |one| one.submit(call))
                    .map(|()| Vec::new());
            }
            let streams = group::all_streams(&handles)?;
            with_patience(&inner.communicator, patience, |one| one.on_each(&streams).submit(call))?;
            Ok(streams.iter().map(|stream| me.event_behind(stream)).collect::<Result<Vec<_>, _>>()?)
        });
        let events = done.map_err(|failure| me.raised(py, failure, kind.name()))?;
        for (held, event) in local.iter().zip(arrays).map(hold).zip(events) {
            if let Some(event) = event {
                kept::keep_until(event, vec![held]);
            }
        }
        Ok(())
    }

    /// A call within a group has no manner of its own.
    fn check_manner_of_group(&self, py: Python<'_>, kind: Kind, got: Option<&str>) -> PyResult<()> {
        let Some(got) = got else { return Ok(()) };
        let (what, expected) = ("manner within a group", "that of the group");
        Err(errors::argument(py, kind.name(), self.rank, what, expected, got))
    }
}

/// The device of the first array that lies on one, and whose stream that array is in.
fn on_device(arrays: &[Array]) -> Option<(u32, StreamOf)> {
    arrays.iter().find_map(|array| match array.memory.place {
        Place::Cuda { ordinal } => Some((ordinal, array.stream)),
        _ => None,
    })
}

/// Whether nothing was begun.
pub(crate) const fn is_refusal(failure: &Failure) -> bool {
    use Error::{Argument, BufferState, Core, NotPrepared, Place};
    match failure {
        Failure::Library(error) => {
            matches!(
                error,
                Argument { .. } | BufferState { .. } | Core(_) | NotPrepared { .. } | Place { .. }
            )
        }
        Failure::Python(_) | Failure::Closed => true,
    }
}

/// Does `f` with a timeout of its own, if there is one.
pub(crate) fn with_patience<R>(
    communicator: &unisono::Communicator,
    patience: Option<Option<Duration>>,
    f: impl FnOnce(&unisono::Communicator) -> Result<R, Error>,
) -> Result<R, Failure> {
    let done = match patience {
        None => f(communicator),
        Some(patience) => communicator.with_timeout(patience, f),
    };
    done.map_err(Failure::Library)
}
