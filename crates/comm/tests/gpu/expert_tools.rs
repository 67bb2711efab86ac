//! What tests of expert parallelism work with: ranks that are threads, each with a communicator of the host's beside that of its GPU, and
//! elements in both memories.

use unisono::cuda::{Device, DeviceBuffer, Stream as CudaStream};
use unisono::ep::{Input, Tensor};
use unisono::half::{bf16, f16};
use unisono::{Buf, Builder, Communicator, DType, Stream, f8e4m3};

use crate::world::{PATIENCE, devices, on_threads};

/// What a rank works with: a communicator of the host's, its device and stream.
pub(crate) struct Tools {
    pub(crate) host: Option<Communicator>,
    pub(crate) device: Device,
    pub(crate) stream: Stream,
    pub(crate) raw: CudaStream,
}

impl Tools {
    pub(crate) fn new(host: Communicator, ordinal: u32) -> Self {
        let device = Device::new(ordinal).unwrap();
        let raw = CudaStream::new(&device).unwrap();
        Self { host: Some(host), device, stream: Stream::from(raw.clone()), raw }
    }
}

pub(crate) fn run(
    ranks: usize,
    configure: impl Fn(Builder) -> Builder,
    work: impl Fn(&Communicator, &Communicator, &Tools) + Sync,
) {
    if devices().is_empty() {
        return;
    }
    let hosts = std::cell::RefCell::new(Communicator::threads(ranks).unwrap());
    let tools = |_: usize, ordinal: u32| Tools::new(hosts.borrow_mut().remove(0), ordinal);
    on_threads(
        ranks,
        |builder| configure(builder.timeout(PATIENCE)),
        tools,
        |gpu, tools| {
            let host = tools.host.take().unwrap();
            work(&gpu, &host, tools);
            gpu.destroy().unwrap();
            host.destroy().unwrap();
        },
    );
}

/// Elements on the host, and the same on the device.
pub(crate) struct Both {
    pub(crate) host: Elements,
    pub(crate) device: DeviceBuffer,
    pub(crate) count: usize,
    pub(crate) dtype: DType,
}

pub(crate) enum Elements {
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    F32(Vec<f32>),
    F8(Vec<f8e4m3>),
}

impl Both {
    pub(crate) fn new(tools: &Tools, dtype: DType, bytes: &[u8]) -> Self {
        let host = match dtype {
            DType::BF16 => {
                Elements::Bf16(bytes.as_chunks().0.iter().map(|x| bf16::from_le_bytes(*x)).collect())
            }
            DType::F16 => Elements::F16(bytes.as_chunks().0.iter().map(|x| f16::from_le_bytes(*x)).collect()),
            DType::F32 => Elements::F32(bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect()),
            _ => Elements::F8(bytes.iter().map(|x| f8e4m3(*x)).collect()),
        };
        Self { host, device: upload(tools, bytes), count: bytes.len() / dtype.size(), dtype }
    }

    pub(crate) fn on_host(&self) -> Input<'_> {
        match &self.host {
            Elements::Bf16(x) => x.into(),
            Elements::F16(x) => x.into(),
            Elements::F32(x) => x.into(),
            Elements::F8(x) => x.into(),
        }
    }

    pub(crate) fn on_device(&self) -> Input<'static> {
        let (at, ordinal) = (place_of(&self.device, self.count), self.device.device().ordinal());
        // SAFETY: tests wait for their streams before they let go of a buffer.
        unsafe {
            match self.dtype {
                DType::BF16 => Buf::<bf16>::cuda(at, self.count, ordinal).into(),
                DType::F16 => Buf::<f16>::cuda(at, self.count, ordinal).into(),
                DType::F32 => Buf::<f32>::cuda(at, self.count, ordinal).into(),
                _ => Buf::<f8e4m3>::cuda(at, self.count, ordinal).into(),
            }
        }
    }
}

/// Where so many elements lie: nowhere, if there are none, as in tensors of torch.
fn place_of(buffer: &DeviceBuffer, count: usize) -> u64 {
    if count == 0 { 0 } else { buffer.address() }
}

pub(crate) fn upload(tools: &Tools, bytes: &[u8]) -> DeviceBuffer {
    let mut buffer = DeviceBuffer::new(&tools.device, bytes.len()).unwrap();
    buffer.write(0, bytes).unwrap();
    buffer
}

/// i64 or f32 on the device.
pub(crate) fn uploaded<T: unisono::Element>(tools: &Tools, bytes: &[u8]) -> Uploaded<T> {
    let (buffer, count) = (upload(tools, bytes), bytes.len() / size_of::<T>());
    // SAFETY: as above.
    let buf = unsafe { Buf::cuda(place_of(&buffer, count), count, tools.device.ordinal()) };
    (buffer, buf)
}

/// The bytes of a tensor, wherever it lies.
pub(crate) fn bytes(tensor: &Tensor, stream: &Stream) -> Vec<u8> {
    let tensor = tensor.to_host(stream).unwrap();
    pub(crate) fn flat<T: unisono::Element, const N: usize>(
        tensor: &Tensor,
        bytes: impl Fn(T) -> [u8; N],
    ) -> Vec<u8> {
        tensor.as_slice::<T>().unwrap().iter().flat_map(|x| bytes(*x)).collect()
    }
    match tensor.dtype() {
        DType::BF16 => flat(&tensor, bf16::to_le_bytes),
        DType::F16 => flat(&tensor, f16::to_le_bytes),
        DType::F32 => flat(&tensor, f32::to_le_bytes),
        DType::I32 => flat(&tensor, i32::to_le_bytes),
        DType::I64 => flat(&tensor, i64::to_le_bytes),
        DType::Bool => flat(&tensor, |x: unisono::Bool8| [u8::from(bool::from(x))]),
        _ => flat(&tensor, |x: f8e4m3| [x.0]),
    }
}

/// Both have the same bytes, of the first `rows` rows where only those have a meaning.
pub(crate) fn same(device: &Tensor, host: &Tensor, rows: Option<usize>, stream: &Stream, what: &str) {
    assert_eq!((device.shape(), device.dtype()), (host.shape(), host.dtype()), "{what}");
    let (mut got, mut expected) = (bytes(device, stream), bytes(host, stream));
    if let Some(rows) = rows {
        let row = host.shape()[1..].iter().product::<usize>() * host.dtype().size();
        got.truncate(rows * row);
        expected.truncate(rows * row);
    }
    let wrong = got.iter().zip(&expected).position(|(got, expected)| got != expected);
    let at = wrong.map(|at| (at, got[at], expected[at]));
    assert_eq!(at, None, "{what}: byte of {}, got, expected", got.len());
}

pub(crate) fn same_or_none(
    device: Option<&Tensor>,
    host: Option<&Tensor>,
    rows: Option<usize>,
    stream: &Stream,
    what: &str,
) {
    assert_eq!(device.is_some(), host.is_some(), "{what}");
    if let (Some(device), Some(host)) = (device, host) {
        same(device, host, rows, stream, what);
    }
}

pub(crate) type Uploaded<T> = (DeviceBuffer, Buf<'static, T>);

pub(crate) fn le<T: unisono::Element, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|value| bytes(*value)).collect()
}

/// As `run`, where the communicators of the GPUs fail.
pub(crate) fn run_failing(ranks: usize, work: impl Fn(&Communicator, &Communicator, &Tools) + Sync) {
    if devices().is_empty() {
        return;
    }
    let hosts = std::cell::RefCell::new(Communicator::threads(ranks).unwrap());
    let tools = |_: usize, ordinal: u32| Tools::new(hosts.borrow_mut().remove(0), ordinal);
    on_threads(
        ranks,
        |builder| builder.timeout(PATIENCE),
        tools,
        |gpu, tools| {
            let host = tools.host.take().unwrap();
            work(&gpu, &host, tools);
            drop(gpu);
            host.destroy().unwrap();
        },
    );
}
