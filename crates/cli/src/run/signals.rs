//! Signals as a descriptor: blocked for every thread, read in the loop that also watches the ranks.
//!
//! No handler is installed, so nothing runs at an arbitrary point. Ranks get back the mask that we were started with.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

/// What is handed on to the ranks.
const FORWARDED: [i32; 7] =
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2, libc::SIGTSTP];

/// The signals that wait to be handed on.
pub(super) struct Signals {
    descriptor: OwnedFd,
    before: SignalMask,
}

/// A set of blocked signals.
#[derive(Clone, Copy)]
pub(crate) struct SignalMask(libc::sigset_t);

impl SignalMask {
    /// Makes this the mask of the calling thread. Async-signal-safe.
    pub(super) fn restore(&self) -> io::Result<()> {
        // SAFETY: `self.0` was filled by pthread_sigmask in `Signals::block`; a null pointer asks for no old mask.
        match unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) } {
            0 => Ok(()),
            code => Err(io::Error::from_raw_os_error(code)),
        }
    }
}

impl Signals {
    /// Blocks the signals in this thread and those it starts from now on. What is ignored (nohup) stays ignored.
    pub(super) fn block() -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset fills the set that it is given, and cannot fail for a valid pointer.
        let mut set: libc::sigset_t = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            set.assume_init()
        };
        for signal in FORWARDED.into_iter().filter(|signal| !is_ignored(*signal)) {
            // SAFETY: `set` is initialised above and the number is that of an existing signal.
            unsafe { libc::sigaddset(&raw mut set, signal) };
        }
        let mut before = MaybeUninit::uninit();
        // SAFETY: `set` is initialised; the old mask is written to `before`, which is read only on success.
        let before =
            match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, before.as_mut_ptr()) } {
                // SAFETY: pthread_sigmask succeeded and has filled it.
                0 => SignalMask(unsafe { before.assume_init() }),
                code => return Err(io::Error::from_raw_os_error(code)),
            };
        // SAFETY: `set` is initialised; −1 asks for a new descriptor.
        let number = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd just made this descriptor and nobody else knows its number.
        let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
        Ok(Self { descriptor, before })
    }

    /// The next signal that came, or `None`.
    pub(super) fn next(&self) -> io::Result<Option<i32>> {
        let mut bytes = [0_u8; size_of::<libc::signalfd_siginfo>()];
        loop {
            match rustix::io::read(&self.descriptor, &mut bytes) {
                // The number of the signal is the first field, a native 32-bit integer.
                Ok(_) => return Ok(Some(i32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// The mask from before, for the ranks.
    pub(super) const fn mask_before(&self) -> SignalMask {
        self.before
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// True if the signal is ignored. A blocked signal would be queued all the same.
fn is_ignored(signal: i32) -> bool {
    let mut now = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: a null new action only asks; the answer is written to `now`, which is read only on success.
    let failed = unsafe { libc::sigaction(signal, std::ptr::null(), now.as_mut_ptr()) } != 0;
    // SAFETY: sigaction succeeded and has filled it.
    !failed && unsafe { now.assume_init() }.sa_sigaction == libc::SIG_IGN
}

/// `SIGTERM`, `SIGKILL`, …, or `signal 42`.
pub(super) fn name(signal: i32) -> String {
    let name = match signal {
        libc::SIGHUP => "SIGHUP",
        libc::SIGINT => "SIGINT",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGILL => "SIGILL",
        libc::SIGTRAP => "SIGTRAP",
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGKILL => "SIGKILL",
        libc::SIGUSR1 => "SIGUSR1",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGUSR2 => "SIGUSR2",
        libc::SIGPIPE => "SIGPIPE",
        libc::SIGALRM => "SIGALRM",
        libc::SIGTERM => "SIGTERM",
        libc::SIGXCPU => "SIGXCPU",
        libc::SIGXFSZ => "SIGXFSZ",
        libc::SIGSYS => "SIGSYS",
        other => return format!("signal {other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_people_know() {
        assert_eq!((name(9), name(15), name(40)), ("SIGKILL".into(), "SIGTERM".into(), "signal 40".into()));
    }

    #[test]
    fn a_blocked_signal_is_read_instead_of_ending_the_process() {
        // In a thread of its own, because the mask belongs to the thread; the signal is sent to this thread alone.
        std::thread::spawn(|| {
            let signals = Signals::block().unwrap();
            assert_eq!(signals.next().unwrap(), None);
            // SAFETY: raise sends to the calling thread, which has blocked the signal.
            assert_eq!(unsafe { libc::raise(libc::SIGUSR1) }, 0);
            assert_eq!(signals.next().unwrap(), Some(libc::SIGUSR1));
            assert_eq!(signals.next().unwrap(), None);
            signals.mask_before().restore().unwrap();
        })
        .join()
        .unwrap();
    }
}
