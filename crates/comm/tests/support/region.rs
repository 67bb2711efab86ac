//! Memory for one buffer of a collective, at any byte address, with guards on both sides: plain or inside a window. Also
//! the two doors to the library: descriptions of raw memory, and slices of the dtype's own type.

use unisono::half::{bf16, f16};
use unisono::{
    Bool8, Call, Communicator, Complex, DType, Element, Kind, Operations, Place, RawBuffer, ReduceOp,
    Reducible, Result, Window, f8e4m3, f8e5m2,
};

/// Bytes on each side of a buffer that no collective may touch.
pub(crate) const GUARD: usize = 64;
/// Largest distance of a buffer from the alignment of every type.
pub(crate) const MAX_SHIFT: usize = 15;
const GUARD_BYTE: u8 = 0xc3;

/// Bytes that a region occupies of a window.
pub(crate) const fn footprint(bytes: usize) -> usize {
    (GUARD + MAX_SHIFT + bytes + GUARD).next_multiple_of(16)
}

/// A buffer and its guards.
pub(crate) struct Region {
    /// First byte of the buffer; guards lie before and behind.
    base: *mut u8,
    bytes: usize,
    place: Place,
    /// The memory, unless it is a window's.
    _memory: Vec<u128>,
}

impl Region {
    /// Plain memory, `shift` bytes behind an address that suits every type.
    pub(crate) fn plain(bytes: usize, shift: usize) -> Self {
        let mut memory = vec![0u128; footprint(bytes) / 16];
        let base = memory.as_mut_ptr().cast::<u8>().wrapping_add(GUARD + shift);
        Self::guarded(base, bytes, Place::Host, memory)
    }

    /// Memory at byte `at` of our copy of `window`, `shift` bytes further, which must outlive the region.
    pub(crate) fn in_window(window: &mut Window<u8>, at: usize, bytes: usize, shift: usize) -> Result<Self> {
        let place = Place::Window { id: window.id() };
        let all = &mut window.lend()?[at..at + footprint(bytes)];
        Ok(Self::guarded(all.as_mut_ptr().wrapping_add(GUARD + shift), bytes, place, Vec::new()))
    }

    fn guarded(base: *mut u8, bytes: usize, place: Place, memory: Vec<u128>) -> Self {
        let mut region = Self { base, bytes, place, _memory: memory };
        let all = region.with_guards();
        all[..GUARD].fill(GUARD_BYTE);
        all[GUARD + bytes..].fill(GUARD_BYTE);
        region
    }

    fn with_guards(&mut self) -> &mut [u8] {
        // SAFETY: the constructors left a guard before `base` and one behind the buffer; the memory is ours while no
        // collective runs on it, and `self` is borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.base.wrapping_sub(GUARD), self.bytes + 2 * GUARD) }
    }

    /// The buffer.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        let end = GUARD + self.bytes;
        &mut self.with_guards()[GUARD..end]
    }

    /// Whether nobody wrote outside the buffer.
    pub(crate) fn is_guarded(&mut self) -> bool {
        let end = GUARD + self.bytes;
        let all = self.with_guards();
        all[..GUARD].iter().chain(&all[end..]).all(|byte| *byte == GUARD_BYTE)
    }

    /// `count` elements from byte `at` of the buffer on, as the library is told about them.
    pub(crate) fn raw(&self, at: usize, count: usize, dtype: DType) -> RawBuffer {
        assert!(at + count * dtype.size() <= self.bytes);
        let ptr = (self.base.expose_provenance() + at) as u64;
        RawBuffer { ptr, count, dtype, place: self.place }
    }
}

/// Submits through the door for other languages.
pub(crate) fn submit_raw(communicator: &Communicator, kind: Kind, buffers: &[RawBuffer]) -> Result<()> {
    // SAFETY: the buffers were made by `Region::raw`, of regions that nobody touches during this blocking call.
    communicator.submit(unsafe { Call::from_raw(kind, buffers, &[]) })
}

/// Submits through the methods that take slices. The regions lie in plain memory, aligned for the dtype.
pub(crate) fn submit_slices<O>(
    operations: &O,
    kind: Kind,
    dtype: DType,
    source: Option<&Region>,
    target: &Region,
) -> Result<()>
where
    O: for<'b> Operations<'b, Done = ()>,
{
    match dtype {
        DType::Bool => slices::<Bool8, O>(operations, kind, source, target),
        DType::I8 => slices::<i8, O>(operations, kind, source, target),
        DType::U8 => slices::<u8, O>(operations, kind, source, target),
        DType::I16 => slices::<i16, O>(operations, kind, source, target),
        DType::U16 => slices::<u16, O>(operations, kind, source, target),
        DType::I32 => slices::<i32, O>(operations, kind, source, target),
        DType::U32 => slices::<u32, O>(operations, kind, source, target),
        DType::I64 => slices::<i64, O>(operations, kind, source, target),
        DType::U64 => slices::<u64, O>(operations, kind, source, target),
        DType::F16 => slices::<f16, O>(operations, kind, source, target),
        DType::BF16 => slices::<bf16, O>(operations, kind, source, target),
        DType::F32 => slices::<f32, O>(operations, kind, source, target),
        DType::F64 => slices::<f64, O>(operations, kind, source, target),
        DType::F8E4M3 => slices::<f8e4m3, O>(operations, kind, source, target),
        DType::F8E5M2 => slices::<f8e5m2, O>(operations, kind, source, target),
        DType::Complex64 => slices::<Complex<f32>, O>(operations, kind, source, target),
        DType::Complex128 => slices::<Complex<f64>, O>(operations, kind, source, target),
    }
}

fn slices<T: Reducible, O>(operations: &O, kind: Kind, source: Option<&Region>, target: &Region) -> Result<()>
where
    O: for<'b> Operations<'b, Done = ()>,
{
    let target = elements_mut::<T>(target);
    match (kind, source.map(elements::<T>)) {
        (Kind::AllReduce { op }, None) => operations.all_reduce(target, op),
        (Kind::AllReduce { op }, Some(source)) => operations.all_reduce_into(source, target, op),
        (Kind::Broadcast { root }, None) => operations.broadcast(target, root as usize),
        (Kind::Broadcast { root }, Some(source)) => operations.broadcast_into(source, target, root as usize),
        (Kind::AllGather, None) => operations.all_gather(target),
        (Kind::AllGather, Some(source)) => operations.all_gather_into(source, target),
        _ => operations.barrier(),
    }
}

fn elements<T: Element>(region: &Region) -> &[T] {
    check_alignment::<T>(region);
    // SAFETY: the memory is live, aligned as was just checked, and valid for every bit pattern; nobody writes it.
    unsafe { std::slice::from_raw_parts(region.base.cast(), region.bytes / size_of::<T>()) }
}

#[expect(clippy::mut_from_ref, reason = "the region is a cell whose one user is this call")]
fn elements_mut<T: Element>(region: &Region) -> &mut [T] {
    check_alignment::<T>(region);
    // SAFETY: as above; source and target are different regions, and the caller holds no slice of this one.
    unsafe { std::slice::from_raw_parts_mut(region.base.cast(), region.bytes / size_of::<T>()) }
}

fn check_alignment<T>(region: &Region) {
    assert!(region.base.cast::<T>().is_aligned() && region.bytes.is_multiple_of(size_of::<T>()));
}

/// The same reduction with this rank's own scalar.
pub(crate) fn with_scalar(kind: Kind, scalar: f64) -> Kind {
    match kind {
        Kind::AllReduce { op: ReduceOp::PreMulSum(_) } => Kind::AllReduce { op: ReduceOp::PreMulSum(scalar) },
        kind => kind,
    }
}
