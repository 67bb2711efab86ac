//! What a descriptor is of, as the kernel tells it: memory comes from peers in several kinds, and none of them needs to be
//! told beside it.

use std::os::fd::AsFd;

/// What a descriptor is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A file in memory, such as a memfd, of so many bytes. Whether it is sealed is seen where it is mapped.
    Memory {
        /// Its size.
        bytes: u64,
    },
    /// Something else: an object of a driver, a pipe, a device.
    Other,
}

/// Looks at a descriptor. Only files in memory have seals to ask for, and a size.
pub fn kind(descriptor: impl AsFd) -> Kind {
    let descriptor = descriptor.as_fd();
    match (rustix::fs::fcntl_get_seals(descriptor), rustix::fs::fstat(descriptor)) {
        (Ok(_), Ok(stat)) => Kind::Memory { bytes: u64::try_from(stat.st_size).unwrap_or(0) },
        _ => Kind::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::SharedMemory;

    #[test]
    fn memory_is_told_from_all_else() {
        let memory = SharedMemory::create(5000).unwrap();
        assert_eq!(kind(&memory), Kind::Memory { bytes: 8192 });
        let plain = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert_eq!(kind(&plain), Kind::Memory { bytes: 0 });
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        assert_eq!((kind(&reader), kind(&writer)), (Kind::Other, Kind::Other));
        assert_eq!(kind(std::fs::File::open("/dev/null").unwrap()), Kind::Other);
        assert_eq!(kind(std::fs::File::open("/proc/self/status").unwrap()), Kind::Other);
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(kind(&ours), Kind::Other);
    }
}
