//! Who is on the other end of a Unix socket, as the kernel noted it when it was connected.

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

use crate::error::{Error, Result};

/// A process, as we see it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Credentials {
    /// Its process id; `None` if it lies in a process namespace that we do not see.
    pub(crate) pid: Option<u32>,
    /// Its user, in our own user namespace.
    pub(crate) uid: u32,
}

/// The process that connected `socket`, or listened where it is connected to.
pub(crate) fn of_peer(socket: impl AsFd) -> Result<Credentials> {
    let mut credentials = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the descriptor is open as long as it is borrowed; the kernel writes at most `length` bytes of a structure for
    // which any bits are right.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        let errno = Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL);
        return Err(Error::socket("peer credentials")(errno));
    }
    let pid = u32::try_from(credentials.pid).ok().filter(|pid| *pid != 0);
    Ok(Credentials { pid, uid: credentials.uid })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_other_end_of_our_own_socket_is_ourselves() {
        let (left, _right) = UnixStream::pair().unwrap();
        let expected = Credentials { pid: Some(std::process::id()), uid: rustix::process::getuid().as_raw() };
        assert_eq!(of_peer(&left).unwrap(), expected);
        assert!(of_peer(std::fs::File::open("/dev/null").unwrap()).is_err());
    }
}
