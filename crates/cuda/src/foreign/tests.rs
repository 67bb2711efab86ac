//! What may be registered, without a GPU: pieces that are covered, and what the driver's answers mean.

use super::*;

/// Mappings of 2 MiB, one after the other, but for a hole.
fn mappings(at: u64) -> Result<Option<(u64, usize)>> {
    let base = at & !0x1f_ffff;
    Ok((base != 0x80_0000).then_some((base, 0x20_0000)))
}

fn bases(start: u64, bytes: usize, may_follow: bool) -> Result<Vec<u64>> {
    let pieces = cover((start, bytes), may_follow, &mappings)?;
    Ok(pieces.iter().map(|piece| piece.base).collect())
}

fn refused(result: Result<impl std::fmt::Debug>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn a_range_is_covered_by_the_mappings_that_it_touches() {
    assert_eq!(bases(0x20_0010, 1, false), Ok(vec![0x20_0000]));
    assert_eq!(bases(0x20_0010, 0x1f_fff0, true), Ok(vec![0x20_0000]));
    assert_eq!(bases(0x20_0010, 0x1f_fff1, true), Ok(vec![0x20_0000, 0x40_0000]));
    assert_eq!(bases(0x20_0010, 0x50_0000, true), Ok(vec![0x20_0000, 0x40_0000, 0x60_0000]));
}

#[test]
fn a_range_ends_where_its_allocation_ends() {
    assert_eq!(
        refused(bases(0x20_0010, 0x20_0000, false)),
        "expected 2097152 bytes inside one allocation, got only 2097136 bytes there"
    );
    assert_eq!(
        refused(bases(0x60_0000, 0x20_0001, true)),
        "expected 2097153 bytes inside one allocation, got only 2097152 bytes there"
    );
    assert_eq!(
        refused(bases(0x80_0000, 1, true)),
        "expected 1 bytes inside one allocation, got only 0 bytes there"
    );
    assert!(refused(bases(u64::MAX - 3, 8, true)).contains("only 0 bytes there"));
}

#[test]
fn answers_that_make_no_progress_are_no_pieces() {
    let elsewhere = |_| Ok(Some((0x20_0000, 16)));
    assert!(refused(cover((0x10_0000, 8), true, &elsewhere)).contains("only 0 bytes there"));
    // The next piece begins before the end of this one.
    let overlapping = |at| Ok(Some((0x20_0000, if at == 0x20_0000 { 16 } else { 64 })));
    assert!(refused(cover((0x20_0000, 32), true, &overlapping)).contains("only 16 bytes there"));
    let tiny = |at| Ok(Some((at, 1)));
    let error = refused(cover((0x20_0000, MAX_PIECES + 1), true, &tiny));
    assert_eq!(error, "expected memory in at most 512 mappings, got more, for 513 bytes");
    assert_eq!(cover((0x20_0000, MAX_PIECES), true, &tiny).unwrap().len(), MAX_PIECES);
}

#[test]
fn only_memory_of_the_device_that_others_can_map_is_taken() {
    let good = Attributes { memory_type: 2, buffer: 7, ordinal: 3, has_ipc: true, ..Attributes::default() };
    assert_eq!(good.check(3), Ok(()));
    let got = |attributes: Attributes| match attributes.check(3) {
        Err(Error::Memory { expected, got }) => {
            assert_eq!(expected, "memory of cuda:3 from cudaMalloc or cuMemCreate");
            got
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(got(Attributes::default()), "an address that the driver does not know");
    assert_eq!(got(Attributes { memory_type: 1, ..good }), "host memory");
    assert_eq!(got(Attributes { ordinal: 1, ..good }), "memory of cuda:1");
    assert_eq!(
        got(Attributes { is_managed: true, ..good }),
        "managed memory, which moves between host and GPU"
    );
    assert!(got(Attributes { pool: 1, ..good }).starts_with("memory of a stream-ordered pool"));
}

#[test]
fn memory_of_a_device_is_found_with_its_allocation() {
    use crate::{DeviceBuffer, Location, SharedPages};
    let Some(device) = device() else { return };
    let buffer = DeviceBuffer::new(&device, 5000).unwrap();
    let found = Foreign::find(&device, buffer.address() + 36, 4000).unwrap();
    assert_eq!((found.offset(), found.pieces().len()), (36, 1));
    assert!(found.pieces()[0].bytes >= 5000 && found.way() != Way::Descriptors, "{found:?}");
    assert!(found.descriptor(0).is_err());
    let again = Foreign::find(&device, buffer.address(), 1).unwrap();
    assert_eq!(again.pieces()[0], found.pieces()[0]);
    let beyond = found.pieces()[0].bytes + 1;
    assert!(matches!(Foreign::find(&device, buffer.address(), beyond), Err(Error::Memory { .. })));
    let pages = SharedPages::create(&device, 3 << 20, Location::Device).unwrap();
    let found = Foreign::find(&device, pages.address() + 4, pages.bytes() - 4).unwrap();
    assert_eq!((found.way(), found.offset()), (Way::Descriptors, 4));
    assert_eq!((found.pieces()[0].base, found.pieces()[0].bytes), (pages.address(), pages.bytes()));
    found.descriptor(0).unwrap();
    assert!(matches!(found.ipc_handle(), Err(Error::Memory { .. })));
    let host = [0u8; 64];
    assert!(matches!(Foreign::find(&device, host.as_ptr() as u64, 64), Err(Error::Memory { .. })));
}

/// A device, entered for calls of the driver that only tests make; none where there is no GPU, and said so.
#[expect(clippy::print_stderr, reason = "what is skipped is said")]
fn device() -> Option<Device> {
    let device = Device::new(0);
    device.inspect_err(|error| eprintln!("SKIPPED: {error}")).ok()
}

/// Two allocations of `cuMemCreate` that are mapped one behind the other, as torch's expandable segments are.
struct Segments {
    device: Device,
    address: u64,
    piece: usize,
}

impl Segments {
    fn new(device: &Device, piece: usize) -> Self {
        let _current = device.enter().unwrap();
        let descriptor = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        let properties = pages::properties(device, Location::Device, descriptor);
        let address = pages::reserve(device, piece * 2).unwrap();
        for at in [address, address + piece as u64] {
            let pages = Pages::create(device, piece, &properties).unwrap();
            // SAFETY: the range is ours and empty.
            unsafe { pages.map(device, (at, piece)) }.unwrap();
        }
        // SAFETY: the range is mapped from end to end.
        unsafe { pages::allow(device, (address, piece * 2), pages::place(device, Location::Device)) }
            .unwrap();
        Self { device: device.clone(), address, piece }
    }
}

impl Drop for Segments {
    fn drop(&mut self) {
        let _current = self.device.enter().unwrap();
        // SAFETY: all of it is ours.
        unsafe {
            let _ = sys::cuMemUnmap(self.address, self.piece * 2);
            let _ = sys::cuMemAddressFree(self.address, self.piece * 2);
        }
    }
}

#[test]
fn segments_that_follow_each_other_are_mapped_as_one_range_elsewhere() {
    let Some(device) = device() else { return };
    let segments = Segments::new(&device, 2 << 20);
    let start = segments.address + (1 << 20);
    let found = Foreign::find(&device, start, 2 << 20).unwrap();
    assert_eq!((found.way(), found.offset(), found.pieces().len()), (Way::Descriptors, 1 << 20, 2));
    found.allow(&device).unwrap();
    // Each mapping of the same memory has the same number, so two who import it share one mapping.
    let import = || {
        let pieces = found.pieces().iter().enumerate().map(|(at, piece)| {
            let pages = Pages::import(&device, found.descriptor(at).unwrap()).unwrap();
            (pages, piece.id, piece.bytes)
        });
        Imported::map(&device, [7; 16], &pieces.collect::<Vec<_>>()).unwrap()
    };
    let (first, second) = (import(), import());
    assert_eq!(first.bytes(), 4 << 20);
    if found.pieces().iter().all(|piece| piece.id != 0) {
        assert_eq!(first.address(), second.address());
        assert_ne!(found.pieces()[0].id, found.pieces()[1].id);
    }
    drop(first);
    let (across, mut got) = ([1u8, 2, 3, 4, 5, 6, 7, 8], [0u8; 8]);
    let _current = device.enter().unwrap();
    // SAFETY: both sides are as long as the data.
    unsafe {
        let to = segments.address + (2 << 20) - 4;
        check("", 0, sys::cuMemcpyHtoD_v2(to, across.as_ptr().cast(), 8)).unwrap();
        device.finish_copies().unwrap();
        let from = second.address() + (2 << 20) - 4;
        check("", 0, sys::cuMemcpyDtoH_v2(got.as_mut_ptr().cast(), from, 8)).unwrap();
    }
    assert_eq!(got, across);
}

#[test]
fn pools_and_managed_memory_are_refused_by_name() {
    let Some(device) = device() else { return };
    let _current = device.enter().unwrap();
    let (mut pooled, mut managed) = (0, 0);
    let global = sys::CUmemAttach_flags_enum::CU_MEM_ATTACH_GLOBAL as u32;
    let null = std::ptr::null_mut();
    // SAFETY: the context is current, and the answers are ours.
    unsafe {
        check("", 0, sys::cuMemAllocAsync(&raw mut pooled, 4096, null)).unwrap();
        check("", 0, sys::cuStreamSynchronize(null)).unwrap();
        check("", 0, sys::cuMemAllocManaged(&raw mut managed, 4096, global)).unwrap();
    }
    let got = |address| match Foreign::find(&device, address, 64) {
        Err(Error::Memory { got, .. }) => got,
        other => panic!("{other:?}"),
    };
    assert!(got(pooled).starts_with("memory of a stream-ordered pool"));
    assert!(got(managed).starts_with("managed memory"));
    // SAFETY: both are ours.
    unsafe {
        let _ = sys::cuMemFreeAsync(pooled, null);
        let _ = sys::cuMemFree_v2(managed);
    }
}

#[test]
fn a_graph_keeps_what_it_was_told_to_until_it_is_gone() {
    use std::sync::Arc;
    use std::time::Duration;

    let Some(device) = device() else { return };
    let stream = crate::Stream::new(&device).unwrap();
    assert!(stream.capture().unwrap().is_none());
    let kept = Arc::new(5u8);
    stream.begin_capture().unwrap();
    stream.capture().unwrap().expect("it captures").keep(kept.clone()).unwrap();
    let graph = stream.end_capture().unwrap();
    assert_eq!(Arc::strong_count(&kept), 2);
    graph.launch(&stream).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(Arc::strong_count(&kept), 2);
    drop(graph);
    let start = std::time::Instant::now();
    while Arc::strong_count(&kept) > 1 {
        crate::capture::drop_released();
        assert!(start.elapsed() < Duration::from_secs(10), "nothing was let go of");
        std::thread::sleep(Duration::from_millis(1));
    }
}
