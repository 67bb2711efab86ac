//! Memory that the ranks of a host share: anonymous (memfd), fully allocated before it is touched, sealed against
//! resizing. It has no name, and goes when the last mapping and descriptor do.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use crate::error::{Error, Result};

/// The seals that shared memory carries: it can neither shrink (a later access would be a SIGBUS) nor grow, and nobody
/// can lift that.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// A shared mapping, readable and writable, until the last `Arc` of it is dropped.
#[derive(Debug)]
pub struct SharedMemory {
    fd: OwnedFd,
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to the whole process; who accesses it through `as_ptr` must order accesses by itself.
unsafe impl Send for SharedMemory {}
// SAFETY: as above; `&self` gives out an address only.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Allocates at least `bytes` (rounded up to whole pages) of zeros.
    ///
    /// All pages are allocated here: where memory is short this is an [`Error::Memory`], never a SIGBUS later.
    pub fn create(bytes: usize) -> Result<Self> {
        let page = rustix::param::page_size();
        let available = available_bytes();
        let Some(bytes) = bytes.max(1).checked_next_multiple_of(page).filter(|bytes| *bytes <= available)
        else {
            let message = format!("only {available} are available");
            return Err(Error::Memory { bytes, action: "the system", message });
        };
        let failed = |action| {
            move |errno: rustix::io::Errno| Error::Memory { bytes, action, message: errno.to_string() }
        };
        let fd = rustix::fs::memfd_create("unisono", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(failed("memfd_create"))?;
        rustix::fs::ftruncate(&fd, bytes as u64).map_err(failed("ftruncate"))?;
        loop {
            match rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, bytes as u64) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other.map_err(failed("fallocate"))?,
            }
        }
        rustix::fs::fcntl_add_seals(&fd, SEALS).map_err(failed("sealing"))?;
        Self::map(fd, bytes)
    }

    /// Maps memory that a peer created. It must have the agreed size and all seals; otherwise it is not mapped and the
    /// descriptor is closed.
    pub fn from_fd(fd: OwnedFd, bytes: usize) -> Result<Self> {
        let bytes = bytes.max(1).next_multiple_of(rustix::param::page_size());
        let size = rustix::fs::fstat(&fd).map_or(-1, |stat| stat.st_size);
        let seals = rustix::fs::fcntl_get_seals(&fd).unwrap_or(SealFlags::empty());
        if size != bytes as i64 || !seals.contains(SEALS) {
            return Err(Error::ForeignMemory {
                expected: format!("{bytes} bytes with seals {SEALS:?}"),
                got: format!("{size} bytes with seals {seals:?}"),
            });
        }
        Self::map(fd, bytes)
    }

    fn map(fd: OwnedFd, bytes: usize) -> Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice; the size is that of the file and sealed.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::POPULATE,
                &fd,
                0,
            )
        };
        let base =
            base.map_err(|errno| Error::Memory { bytes, action: "mmap", message: errno.to_string() })?;
        let base = NonNull::new(base.cast()).ok_or_else(|| Error::Memory {
            bytes,
            action: "mmap",
            message: "address 0".to_owned(),
        })?;
        Ok(Self { fd, base, bytes })
    }

    /// The first byte, page-aligned.
    pub const fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Length in bytes, whole pages.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }
}

/// What a process that is not proven dead may still write to.
static QUARANTINE: Mutex<Vec<Arc<SharedMemory>>> = Mutex::new(Vec::new());

/// Keeps `memory`, its mapping and its descriptor, for the rest of our life. Nobody reads it any more; a peer that was given
/// up, but lives, can write there without harm.
pub fn quarantine(memory: Arc<SharedMemory>) {
    QUARANTINE.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
}

/// Bytes of memory in quarantine.
pub fn quarantined_bytes() -> usize {
    let memories = QUARANTINE.lock().unwrap_or_else(PoisonError::into_inner);
    memories.iter().map(|memory| memory.bytes()).sum()
}

/// Bytes that could be allocated now, by the machine's own account and that of our control group. Anonymous memory has no
/// quota of its own: asking for more would not fail but bring the machine's out-of-memory killer.
pub fn available_bytes() -> usize {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = meminfo.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<usize>().ok().map(|kilobytes| kilobytes << 10)
    };
    let machine = field("MemAvailable:").map_or(usize::MAX, |free| free + field("SwapFree:").unwrap_or(0));
    machine.min(crate::cgroup::memory_left().unwrap_or(usize::MAX))
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: `base` and `bytes` are those of our own mapping, and nobody can name it once we are dropped. An
        // error is impossible for such a range, and could not be answered here.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_of_one_descriptor_are_one_memory() {
        let ours = SharedMemory::create(10_000).unwrap();
        assert_eq!(ours.bytes(), 12_288);
        let fd = ours.as_fd().try_clone_to_owned().unwrap();
        let theirs = SharedMemory::from_fd(fd, 10_000).unwrap();
        // SAFETY: both mappings are 12,288 bytes long and no other thread knows them.
        unsafe {
            assert_eq!(theirs.as_ptr().add(9_999).read(), 0);
            ours.as_ptr().add(9_999).write(42);
            assert_eq!(theirs.as_ptr().add(9_999).read(), 42);
        }
    }

    #[test]
    fn memory_of_another_size_or_without_seals_is_refused() {
        let ours = SharedMemory::create(4096).unwrap();
        let fd = ours.as_fd().try_clone_to_owned().unwrap();
        assert!(matches!(SharedMemory::from_fd(fd, 8192), Err(Error::ForeignMemory { .. })));
        let plain = rustix::fs::memfd_create("x", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&plain, 4096).unwrap();
        let error = SharedMemory::from_fd(plain, 4096).unwrap_err();
        assert!(error.to_string().contains("4096 bytes with seals"), "{error}");
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(SharedMemory::from_fd(null.into(), 4096), Err(Error::ForeignMemory { .. })));
    }

    #[test]
    fn memory_in_quarantine_stays_mapped() {
        let before = quarantined_bytes();
        let memory = Arc::new(SharedMemory::create(4096).unwrap());
        let base = memory.as_ptr();
        quarantine(memory);
        // SAFETY: the mapping is one page long and stays for ever.
        unsafe { base.write(42) };
        assert_eq!(quarantined_bytes(), before + 4096);
    }

    #[test]
    fn sealed_memory_cannot_be_resized() {
        let ours = SharedMemory::create(4096).unwrap();
        assert!(rustix::fs::ftruncate(&ours.fd, 0).is_err());
        assert!(rustix::fs::ftruncate(&ours.fd, 8192).is_err());
    }

    #[test]
    fn more_memory_than_there_is_is_an_error_and_nothing_stays() {
        for bytes in [1 << 60, usize::MAX] {
            let error = SharedMemory::create(bytes).unwrap_err();
            assert!(matches!(error, Error::Memory { bytes: got, .. } if got == bytes), "{error}");
        }
    }
}
