//! The doors to the library: descriptions of raw memory, and slices of the dtype's own type. Both lead into whatever
//! takes operations: a communicator, a stream, a scope, a group.

use unisono::half::{bf16, f16};
use unisono::{
    Bool8, BufMut, Call, Communicator, Complex, DType, Element, Kind, Operations, RawBuffer, Reducible,
    Result, f8e4m3, f8e5m2,
};

use super::prepared::{Buffer, Door, Form, Prepared};

/// Calls a function with the type of a dtype as its first type argument.
macro_rules! by_dtype {
    ($dtype:expr, $function:ident($($argument:expr),*)) => {
        match $dtype {
            DType::Bool => $function::<Bool8, _>($($argument),*),
            DType::I8 => $function::<i8, _>($($argument),*),
            DType::U8 => $function::<u8, _>($($argument),*),
            DType::I16 => $function::<i16, _>($($argument),*),
            DType::U16 => $function::<u16, _>($($argument),*),
            DType::I32 => $function::<i32, _>($($argument),*),
            DType::U32 => $function::<u32, _>($($argument),*),
            DType::I64 => $function::<i64, _>($($argument),*),
            DType::U64 => $function::<u64, _>($($argument),*),
            DType::F16 => $function::<f16, _>($($argument),*),
            DType::BF16 => $function::<bf16, _>($($argument),*),
            DType::F32 => $function::<f32, _>($($argument),*),
            DType::F64 => $function::<f64, _>($($argument),*),
            DType::F8E4M3 => $function::<f8e4m3, _>($($argument),*),
            DType::F8E5M2 => $function::<f8e5m2, _>($($argument),*),
            DType::Complex64 => $function::<Complex<f32>, _>($($argument),*),
            DType::Complex128 => $function::<Complex<f64>, _>($($argument),*),
        }
    };
}

/// Submits through the door for other languages, and waits.
pub(crate) fn submit_raw(communicator: &Communicator, kind: Kind, buffers: &[RawBuffer]) -> Result<()> {
    // SAFETY: the buffers were made by `Region::raw`, of regions that nobody touches during this blocking call.
    communicator.submit(unsafe { Call::from_raw(kind, buffers, &[]) })
}

/// Submits one call of a case.
pub(crate) fn submit<'b, O: Operations<'b>>(on: &O, ready: &'b Prepared, kind: Kind) -> Result<O::Done> {
    if ready.door == Door::Raw {
        let counts = match kind {
            Kind::AllGatherV | Kind::GatherV { .. } => vec![ready.into.view()],
            Kind::ReduceScatterV { .. } | Kind::ScatterV { .. } => vec![ready.out.view()],
            Kind::AllToAllV => vec![ready.out.view(), ready.into.view()],
            _ => Vec::new(),
        };
        // SAFETY: the buffers belong to `ready`, which outlives the call; nobody touches them before it is complete.
        return on.submit(unsafe { Call::from_raw(kind, &ready.raw(kind), &counts) });
    }
    by_dtype!(ready.case.dtype, slices(on, ready, kind))
}

/// Receives from anybody until every other rank was heard; who they were.
pub(crate) fn take_from_anybody(communicator: &Communicator, ready: &Prepared) -> Result<()> {
    by_dtype!(ready.case.dtype, receive(communicator, ready))
}

fn receive<T: Element, C: std::borrow::Borrow<Communicator>>(
    communicator: &C,
    ready: &Prepared,
) -> Result<()> {
    let buffer = ready.output();
    for part in &buffer.parts {
        let slice = buffer.region.slice_mut::<T>(part.at, part.bytes / size_of::<T>());
        let from = communicator.borrow().recv_any(slice, ready.case.tag())?;
        ready.senders.borrow_mut().push(from);
    }
    Ok(())
}

/// Submits through the method of the operation. Buffers are aligned for `T`.
fn slices<'b, T: Reducible, O: Operations<'b>>(on: &O, ready: &'b Prepared, kind: Kind) -> Result<O::Done> {
    let whole = |buffer: &'b Buffer| buffer.region.len() / size_of::<T>();
    let output = ready.output();
    if kind.is_multi() {
        let buffer = |part: &super::prepared::Part| {
            BufMut::from(output.region.slice_mut::<T>(part.at, part.bytes / size_of::<T>()))
        };
        let all: Vec<BufMut<'b, T>> = output.parts.iter().map(buffer).collect();
        return match kind {
            Kind::BroadcastMulti { root, buffer } => on.broadcast_multi(all, root as usize, buffer as usize),
            Kind::AllReduceMulti { op } => on.all_reduce_multi(all, op),
            _ => unreachable!("{kind:?}"),
        };
    }
    if let Kind::Send { to, tag } = kind {
        return on.send(ready.first.region.slice::<T>(0, whole(&ready.first)), to as usize, tag);
    }
    let target = output.region.slice_mut::<T>(0, whole(output));
    if ready.form == Form::InPlace {
        return match kind {
            Kind::AllReduce { op } => on.all_reduce(target, op),
            Kind::Broadcast { root } => on.broadcast(target, root as usize),
            Kind::AllGather => on.all_gather(target),
            Kind::Reduce { op, root } => on.reduce(target, op, root as usize),
            Kind::ReduceScatter { op } => on.reduce_scatter(target, op),
            Kind::AllToAll => on.all_to_all(target),
            _ => unreachable!("{kind:?} in place"),
        };
    }
    let source = ready.first.region.slice::<T>(0, whole(&ready.first));
    let (out, into) = (ready.out.view(), ready.into.view());
    match kind {
        Kind::Barrier => on.barrier(),
        Kind::AllReduce { op } => on.all_reduce_into(source, target, op),
        Kind::Broadcast { root } => on.broadcast_into(source, target, root as usize),
        Kind::AllGather => on.all_gather_into(source, target),
        Kind::Reduce { op, root } => on.reduce_into(source, target, op, root as usize),
        Kind::ReduceScatter { op } => on.reduce_scatter_into(source, target, op),
        Kind::Gather { root } => on.gather(source, target, root as usize),
        Kind::Scatter { root } => on.scatter(source, target, root as usize),
        Kind::AllToAll => on.all_to_all_into(source, target),
        Kind::AllGatherV => on.all_gather_v(source, target, into),
        Kind::ReduceScatterV { op } => on.reduce_scatter_v(source, target, out, op),
        Kind::GatherV { root } => on.gather_v(source, target, into, root as usize),
        Kind::ScatterV { root } => on.scatter_v(source, target, out, root as usize),
        Kind::AllToAllV => on.all_to_all_v(source, out, target, into),
        Kind::Recv { from, tag } => on.recv(target, from as usize, tag),
        Kind::SendRecv { to, from, tag } => on.send_recv(source, to as usize, target, from as usize, tag),
        _ => unreachable!("{kind:?} is no operation"),
    }
}
