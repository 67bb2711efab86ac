//! The arrays of a call of a buffer: where they lie, what shape they have, and in which stream they are used.

use pyo3::intern;
use pyo3::prelude::*;
use unisono::ep::{Input, RowScales, Tokens};
use unisono::{Buf, DType, Element, Error, Place, RawBuffer, Stream};

use super::buffer::Buffer;
use crate::array::{Array, Site, StreamOf, is_torch_tensor};
use crate::call::{Way, is_refusal};
use crate::kept::{self, Held};
use crate::stream;

/// The arrays of one call, one after the other as they are taken.
pub(super) struct Inputs<'a, 'py> {
    buffer: &'a Buffer,
    py: Python<'py>,
    call: &'static str,
    /// The stream that was given.
    stream: Option<u64>,
    lender: Lender,
    on_device: Option<(u32, StreamOf)>,
    /// Streams in which arrays are still being made.
    made_in: Vec<u64>,
    held: Vec<Held>,
}

/// An array that was taken.
#[derive(Clone, Copy)]
pub(super) struct Given {
    at: usize,
}

/// Scales of tokens that were taken.
#[derive(Clone, Copy)]
pub(super) struct GivenScales {
    values: Given,
    per_token: usize,
    strides: (usize, usize),
}

/// Lends the memory of what was taken, during the call.
#[derive(Default)]
pub(super) struct Lender(Vec<RawBuffer>);

impl Lender {
    pub(super) fn input(&self, given: Given) -> Input<'_> {
        // SAFETY: who holds the array keeps it until the call is over, and until the stream of the call has passed it; while this is borrowed
        // the call is not over.
        unsafe { Input::from_raw(self.0[given.at]) }
    }

    /// An array whose type was checked when it was taken.
    pub(super) fn buf<T: Element>(&self, given: Given) -> Buf<'_, T> {
        // SAFETY: as above.
        let buf = unsafe { Buf::from_raw(self.0[given.at]) };
        buf.unwrap_or_else(|| unreachable!("an array was taken as another type"))
    }

    pub(super) fn tokens(&self, x: Given, scales: Option<GivenScales>) -> Tokens<'_> {
        match scales {
            None => Tokens::new(self.input(x)),
            Some(GivenScales { values, per_token, strides }) => {
                Tokens::scaled(self.input(x), RowScales::strided(self.input(values), per_token, strides))
            }
        }
    }
}

impl<'a, 'py> Inputs<'a, 'py> {
    pub(super) fn new(
        buffer: &'a Buffer,
        call: &'static str,
        py: Python<'py>,
        stream: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Self> {
        let site = buffer.communicator().site(call, "stream");
        let stream = stream.map(|stream| stream::handle(stream, site)).transpose()?;
        let (lender, on_device, made_in, held) = (Lender::default(), None, Vec::new(), Vec::new());
        Ok(Self { buffer, py, call, stream, lender, on_device, made_in, held })
    }

    fn site(&self, what: &'static str) -> Site {
        self.buffer.communicator().site(self.call, what)
    }

    /// The sizes of an array's dimensions.
    pub(super) fn shape(&self, what: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Vec<usize>> {
        let shape = object.getattr_opt(intern!(self.py, "shape"))?;
        let sizes = shape.as_ref().and_then(|shape| shape.extract().ok());
        sizes.ok_or_else(|| {
            let name =
                object.get_type().name().map_or_else(|_| "something else".into(), |name| name.to_string());
            self.site(what).refuse(self.py, "an array with a shape", name)
        })
    }

    /// An array of any type, with these sizes; `None` stands for any. The sizes that it has.
    pub(super) fn take(
        &mut self,
        what: &'static str,
        object: &Bound<'py, PyAny>,
        sizes: &[Option<usize>],
    ) -> PyResult<(Given, Vec<usize>)> {
        let shape = self.shape(what, object)?;
        let fits = |(got, size): (&usize, &Option<usize>)| size.is_none_or(|size| size == *got);
        if shape.len() != sizes.len() || !shape.iter().zip(sizes).all(fits) {
            let size = |size: &Option<usize>| size.map_or_else(|| "any".to_owned(), |size| size.to_string());
            let sizes: Vec<String> = sizes.iter().map(size).collect();
            let expected = format!("of shape [{}]", sizes.join(", "));
            return Err(self.site(what).refuse(self.py, expected, format!("{shape:?}")));
        }
        Ok((self.keep(what, object)?, shape))
    }

    /// The same of one type.
    pub(super) fn take_of(
        &mut self,
        dtype: DType,
        what: &'static str,
        object: &Bound<'py, PyAny>,
        sizes: &[Option<usize>],
    ) -> PyResult<(Given, Vec<usize>)> {
        let (given, shape) = self.take(what, object, sizes)?;
        let got = self.lender.0[given.at].dtype;
        if got != dtype {
            return Err(self.site(what).refuse(self.py, dtype.to_string(), got.to_string()));
        }
        Ok((given, shape))
    }

    /// Rows of tokens. Unsigned integers of 16 and of 8 bits are taken for bf16 and f8e4m3, which not every framework has.
    pub(super) fn rows(
        &mut self,
        what: &'static str,
        object: &Bound<'py, PyAny>,
        sizes: &[Option<usize>],
    ) -> PyResult<(Given, Vec<usize>)> {
        let (given, shape) = self.take(what, object, sizes)?;
        let memory = &mut self.lender.0[given.at];
        memory.dtype = match memory.dtype {
            DType::U16 => DType::BF16,
            DType::U8 => DType::F8E4M3,
            dtype => dtype,
        };
        Ok((given, shape))
    }

    /// Scales of `tokens`, at any strides.
    pub(super) fn scales(&mut self, object: &Bound<'py, PyAny>, tokens: usize) -> PyResult<GivenScales> {
        let (py, what) = (self.py, "scales");
        let shape = self.shape(what, object)?;
        let [rows, per_token] = shape[..] else {
            return Err(self.site(what).refuse(py, "of two dimensions", format!("{shape:?}")));
        };
        if rows != tokens {
            return Err(self.site(what).refuse(py, format!("those of {tokens} tokens"), rows.to_string()));
        }
        let packed = (per_token, 1);
        let strides = if rows * per_token == 0 { packed } else { strides(object)?.unwrap_or(packed) };
        let flat = if strides == packed { object.clone() } else { spread(object, &shape, strides)? };
        let values = self.keep(what, &flat)?;
        Ok(GivenScales { values, per_token, strides })
    }

    fn keep(&mut self, what: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Given> {
        let array = Array::new(object, self.site(what), self.stream)?;
        if let Place::Cuda { ordinal } = array.memory.place {
            self.on_device.get_or_insert((ordinal, array.stream));
        }
        if let StreamOf::Named(stream) = array.stream {
            self.made_in.push(stream);
        }
        self.lender.0.push(array.memory);
        self.held.push(Held(object.clone().unbind(), array.guard));
        Ok(Given { at: self.lender.0.len() - 1 })
    }

    /// Does `f` with the buffer, in the order of the stream of these arrays, without the interpreter.
    pub(super) fn run<R: Send>(
        self,
        f: impl FnOnce(&mut unisono::ep::Buffer, &Lender, Option<&Stream>) -> Result<R, Error> + Send,
    ) -> PyResult<R> {
        let Self { buffer, py, call, lender, mut made_in, held, .. } = self;
        let communicator = buffer.communicator();
        let way = communicator.way(py, call, self.on_device, self.stream)?;
        if let Way::Stream(handle, _) = way {
            made_in.retain(|stream| *stream != handle);
        }
        let done = py.detach(|| {
            let stream = match way {
                Way::Host => None,
                Way::Stream(handle, ordinal) => {
                    Some(communicator.lock()?.stream_after(handle, ordinal, &made_in)?)
                }
            };
            let mut state = buffer.lock()?;
            let result = f(&mut state.buffer, &lender, stream.as_deref())?;
            let event = match &stream {
                Some(stream) => communicator.event_behind(stream)?,
                None => None,
            };
            Ok((result, event))
        });
        match done {
            Ok((result, event)) => {
                if let Some(event) = event {
                    kept::keep_until(event, held);
                }
                Ok(result)
            }
            Err(failure) => {
                // A part of the call may be at work on them, and nothing tells when that ends.
                if matches!(way, Way::Stream(..)) && !is_refusal(&failure) {
                    std::mem::forget(held);
                }
                Err(buffer.raised(py, failure, call))
            }
        }
    }
}

/// The strides of an array of two dimensions, in elements; `None` if it does not tell, or goes backwards.
fn strides(object: &Bound<'_, PyAny>) -> PyResult<Option<(usize, usize)>> {
    let py = object.py();
    if is_torch_tensor(object)? {
        return Ok(object.call_method0(intern!(py, "stride"))?.extract().ok());
    }
    let Some(strides) = object.getattr_opt(intern!(py, "strides"))? else { return Ok(None) };
    let Ok((row, column)) = strides.extract::<(usize, usize)>() else { return Ok(None) };
    let item: usize = object.getattr(intern!(py, "itemsize"))?.extract()?;
    Ok(Some((row / item, column / item)))
}

/// The memory from the first element of an array to the last, as an array of one dimension.
fn spread<'py>(
    object: &Bound<'py, PyAny>,
    shape: &[usize],
    strides: (usize, usize),
) -> PyResult<Bound<'py, PyAny>> {
    let py = object.py();
    let elements = 1 + (shape[0] - 1) * strides.0 + (shape[1] - 1) * strides.1;
    if is_torch_tensor(object)? {
        return object.call_method1(intern!(py, "as_strided"), ((elements,), (1,)));
    }
    // numpy, or cupy, which has the same.
    let module: String = object.get_type().getattr(intern!(py, "__module__"))?.extract()?;
    let module = module.split('.').next().unwrap_or("numpy").to_owned();
    let tricks = py.import(format!("{module}.lib.stride_tricks"))?;
    let item = object.getattr(intern!(py, "itemsize"))?;
    tricks.call_method1(intern!(py, "as_strided"), (object, (elements,), (item,)))
}
