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
    let Ok(device) = Device::new(0) else { return };
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
