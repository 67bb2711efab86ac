//! Whether we are still the process that made something, or a child that was forked from it.
//!
//! A page that the kernel wipes on fork holds a number; whoever wants to know later remembers it. So the question costs a
//! load, not a system call, and is answered rightly however the fork came about.

use std::sync::OnceLock;

use rustix::mm::{Advice, MapFlags, ProtFlags};
use unisono_sync::memory::words64;
use unisono_sync::{Counter, Word};

/// Names a process: the one in which [`Process::this`] was called.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Process {
    /// Where the page lies; 0 if there is none.
    page: usize,
    mark: u64,
    pid: u32,
}

/// Where the page lies; 0 if the system has none that is wiped (before Linux 4.14).
static PAGE: OnceLock<usize> = OnceLock::new();
/// Marks given out by this process and those that it was forked from: copied on fork, so no two in a line are equal.
static MARKS: Counter = Counter::new(1);

impl Process {
    /// This process.
    pub fn this() -> Self {
        let pid = std::process::id();
        let page = *PAGE.get_or_init(page);
        let Some(word) = word(page) else { return Self { page, mark: 0, pid } };
        if word.load_acquire() == 0 {
            // Another thread may be first: then its mark stands.
            let _ = Word::compare_exchange(word, 0, MARKS.add(1));
        }
        Self { page, mark: word.load_acquire(), pid }
    }

    /// Whether this code runs in that process, and not in a child that was forked from it.
    #[inline(always)]
    pub fn is_this(&self) -> bool {
        match word(self.page) {
            Some(word) => word.load_relaxed() == self.mark,
            None => std::process::id() == self.pid,
        }
    }

    /// Its process id.
    pub const fn pid(&self) -> u32 {
        self.pid
    }
}

#[inline(always)]
fn word(page: usize) -> Option<&'static impl Word<u64>> {
    // SAFETY: the page was mapped below, is never unmapped, and is only accessed as this atomic word.
    (page != 0).then(|| unsafe { &words64(std::ptr::with_exposed_provenance_mut(page), 1)[0] })
}

#[cold]
fn page() -> usize {
    let bytes = rustix::param::page_size();
    // SAFETY: a fresh private mapping at an address of the kernel's choice; nothing else knows it.
    let mapped = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            bytes,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        )
    };
    let Ok(page) = mapped else { return 0 };
    // SAFETY: the page that was just mapped; it holds nothing that a child would miss.
    if unsafe { rustix::mm::madvise(page, bytes, Advice::LinuxWipeOnFork) }.is_err() {
        // SAFETY: our own mapping, which nobody knows yet.
        let _ = unsafe { rustix::mm::munmap(page, bytes) };
        return 0;
    }
    page.expose_provenance()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_knows_itself_and_a_mark_of_another_is_not_its_own() {
        let this = Process::this();
        assert_eq!((this, this.pid()), (Process::this(), std::process::id()));
        assert!(this.is_this() && std::thread::spawn(move || this.is_this()).join().unwrap());
        assert!(!Process { mark: this.mark + 1, pid: this.pid + 1, ..this }.is_this());
    }
}
