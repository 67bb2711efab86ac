//! One thread that drives all ranks of its GPUs: windows, registrations and the end included.

use std::time::Duration;

use unisono::cuda::{Device, DeviceBuffer, Stream as CudaStream};
use unisono::{
    Communicator, DType, Error, Memory, Operations, Place, Promised, RawBuffer, ReduceOp, Registration,
    Result, Stream, Window, group,
};
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
        let values = (0..count as i32).flat_map(|at| (at * (rank as i32 + 1)).to_le_bytes());
        // SAFETY: the window is as long.
        unsafe { raw.write(windows[rank].address(), &values.collect::<Vec<u8>>()) }.unwrap();
        tools.push((raw, stream));
    }
    for ((rank, window), (_, stream)) in ranks.iter().zip(&mut windows).zip(&tools) {
        rank.on(stream).all_reduce(window, ReduceOp::Sum).unwrap();
    }
    for (window, (raw, _)) in windows.iter().zip(&tools) {
        let mut bytes = vec![0; count * 4];
        // SAFETY: as above.
        unsafe { raw.read(window.address(), &mut bytes) }.unwrap();
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

/// Registers the `count` elements of each buffer, all in one group.
fn register(ranks: &[Communicator], buffers: &[DeviceBuffer], count: &[usize]) -> Vec<Result<Registration>> {
    let (host, mut promised) = (Stream::host(), Vec::<Promised<Registration>>::new());
    let result = group(|group| {
        for ((rank, buffer), count) in ranks.iter().zip(buffers).zip(count) {
            let place = Place::Cuda { ordinal: rank.device().unwrap() };
            let buffer = RawBuffer { ptr: buffer.address(), count: *count, dtype: DType::I32, place };
            // SAFETY: tests close their registrations before their memory goes.
            promised.push(unsafe { group.on(rank, &host).register(buffer) }?);
        }
        Ok(())
    });
    let made: Vec<Result<Registration>> = promised.into_iter().map(Promised::take).collect();
    assert_eq!(result.is_ok(), made.iter().all(Result::is_ok), "{result:?}");
    made
}

#[test]
fn one_thread_registers_memory_of_all_ranks_and_reduces_it_into_windows_that_it_lends() {
    const COUNT: usize = 50_001;
    let devices = devices();
    if devices.is_empty() {
        return;
    }
    let chosen: Vec<u32> = (0..2).map(|rank| devices[rank % devices.len()]).collect();
    let builder =
        Communicator::builder().timeout(Some(Duration::from_secs(20))).gpu_algorithm(Form::Direct, 0);
    let ranks = builder.prepare(DType::I32, ReduceOp::Sum).unwrap().local(&chosen).unwrap();
    let host = Stream::host();
    let (mut buffers, mut streams) = (Vec::new(), Vec::new());
    for (rank, ordinal) in chosen.iter().enumerate() {
        let device = Device::new(*ordinal).unwrap();
        let mut buffer = DeviceBuffer::new(&device, COUNT * 4).unwrap();
        let values = (0..COUNT as i32).flat_map(|at| (at * (rank as i32 + 1)).to_le_bytes());
        buffer.write(0, &values.collect::<Vec<u8>>()).unwrap();
        buffers.push(buffer);
        streams.push(Stream::from(CudaStream::new(&device).unwrap()));
    }
    for round in 0..3 {
        let registered = register(&ranks, &buffers, &[COUNT; 2]);
        let registered: Vec<Registration> = registered.into_iter().map(Result::unwrap).collect();
        let promised: Vec<_> = group(|group| {
            let window = |rank| group.on(rank, &host).window::<i32>(COUNT, Memory::Pinned);
            ranks.iter().map(window).collect::<Result<_>>()
        })
        .unwrap();
        let mut windows: Vec<Window<i32>> =
            promised.into_iter().map(|promised| promised.take().unwrap()).collect();
        for (((rank, stream), registered), window) in
            ranks.iter().zip(&streams).zip(&registered).zip(&mut windows)
        {
            // SAFETY: nobody writes the memory before the windows were lent.
            let source = unsafe { registered.buf::<i32>(0..COUNT) };
            rank.on(stream).all_reduce_into(source, window, ReduceOp::Sum).unwrap();
        }
        for window in &mut windows {
            let sums = window.lend().unwrap().iter().copied();
            assert!(sums.eq((0..COUNT as i32).map(|at| at * 3)), "round {round}");
        }
        // Both kinds at once, on both ranks.
        group(|group| {
            for ((rank, registered), window) in ranks.iter().zip(registered).zip(windows) {
                let on = group.on(rank, &host);
                on.close(registered)?;
                on.close(window)?;
            }
            Ok(())
        })
        .unwrap();
    }
    ranks.iter().for_each(|rank| rank.check().unwrap());
    // What is wrong is told on all ranks, and the first of them ends the group.
    for result in register(&ranks, &buffers, &[COUNT, COUNT - 1]) {
        let error = result.unwrap_err();
        assert!(matches!(&error, Error::Mismatch { .. }), "{error}");
    }
}
