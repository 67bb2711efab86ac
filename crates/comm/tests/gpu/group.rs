//! One thread that drives all ranks of its GPUs, windows and the end included.

use std::time::Duration;

use unisono::cuda::{Device, DeviceBuffer, Stream as CudaStream};
use unisono::{Communicator, DType, Memory, Operations, ReduceOp, Result, Stream, Window, group};
use unisono_core::device::Form;

use crate::world::devices;

#[test]
fn one_thread_reduces_in_windows_on_its_devices_and_ends_everything() {
    let devices = devices();
    if devices.is_empty() {
        return;
    }
    let count = 100_000;
    let chosen: Vec<u32> = (0..2).map(|rank| devices[rank % devices.len()]).collect();
    let builder =
        Communicator::builder().timeout(Some(Duration::from_secs(20))).gpu_algorithm(Form::Direct, 0);
    let ranks = builder.prepare(DType::I32, ReduceOp::Sum).unwrap().local(&chosen).unwrap();
    let host = Stream::host();
    let promised = group(|group| {
        let window = |rank| group.on(rank, &host).window::<i32>(count, Memory::Device);
        ranks.iter().map(window).collect::<Result<Vec<_>>>()
    })
    .unwrap();
    let mut windows: Vec<Window<i32>> =
        promised.into_iter().map(|promised| promised.take().unwrap()).collect();
    let mut tools = Vec::new();
    for (rank, ordinal) in chosen.iter().enumerate() {
        let device = Device::new(*ordinal).unwrap();
        let raw = CudaStream::new(&device).unwrap();
        // SAFETY: the raw stream lies beside this one and lives as long.
        let stream = unsafe { Stream::cuda(raw.raw(), *ordinal) }.unwrap();
        let mut staging = DeviceBuffer::new(&device, count * 4).unwrap();
        let values = (0..count as i32).flat_map(|at| (at * (rank as i32 + 1)).to_le_bytes());
        staging.write(0, &values.collect::<Vec<u8>>()).unwrap();
        // SAFETY: both are as long, and stay until the stream was waited for.
        unsafe { raw.copy(windows[rank].address(), staging.address(), count * 4) }.unwrap();
        tools.push((raw, stream, staging));
    }
    for ((rank, window), (_, stream, _)) in ranks.iter().zip(&mut windows).zip(&tools) {
        rank.on(stream).all_reduce(window, ReduceOp::Sum).unwrap();
    }
    for (window, (raw, _, staging)) in windows.iter().zip(&tools) {
        // SAFETY: as above.
        unsafe { raw.copy(staging.address(), window.address(), count * 4) }.unwrap();
        raw.synchronize().unwrap();
        let mut bytes = vec![0; count * 4];
        staging.read(0, &mut bytes).unwrap();
        let values = bytes.as_chunks().0.iter().map(|value| i32::from_le_bytes(*value));
        assert!(values.eq((0..count as i32).map(|at| at * 3)));
    }
    // What is to be freed may not be in use by any device of the thread.
    group(|group| {
        ranks.iter().zip(windows).try_for_each(|(rank, window)| group.on(rank, &host).close(window))
    })
    .unwrap();
    ranks.iter().for_each(|rank| rank.check().unwrap());
    group(|group| {
        ranks.into_iter().for_each(|rank| group.destroy(rank));
        Ok(())
    })
    .unwrap();
}
