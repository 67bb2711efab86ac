//! Message sockets between processes of one host (Unix, sequenced packets): one message per send, descriptors beside
//! it. Truncated messages are fatal, and whatever descriptors came with them are closed.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use unisono_sync::Deadline;

use crate::error::{Error, Result};

/// The largest message.
pub const MAX_MESSAGE_BYTES: usize = 64 * 1024;
/// The most descriptors that one message carries.
pub const MAX_FDS: usize = 8;

/// What `receive` found.
#[derive(Debug)]
pub enum Received {
    /// A message: its length in the buffer, and the descriptors that came with it.
    Message(usize, Vec<OwnedFd>),
    /// Nothing there yet.
    Nothing,
    /// The other end closed.
    EndOfFile,
}

/// What became of a message that was to be sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sent {
    /// It is on its way.
    Whole,
    /// There is no room: the peer does not read.
    NoRoom,
    /// The peer is gone.
    Closed,
}

/// A non-blocking socket of sequenced packets.
pub fn new_socket() -> Result<OwnedFd> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(Error::socket("socket"))
}

/// The address behind an endpoint's random part. Abstract: it is no file.
pub fn address(endpoint: [u8; 16]) -> Result<SocketAddrUnix> {
    let name = format!("unisono-{:032x}", u128::from_be_bytes(endpoint));
    SocketAddrUnix::new_abstract_name(name.as_bytes()).map_err(Error::socket("address"))
}

/// Sends `bytes` and `fds` as one message, without waiting for room.
pub fn try_send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Sent> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Error::Socket {
            action: "send",
            message: format!("{} descriptors, at most {MAX_FDS}", fds.len()),
        });
    }
    loop {
        let sent = rustix::net::sendmsg(
            socket.as_fd(),
            &[std::io::IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        );
        match sent {
            Ok(_) => return Ok(Sent::Whole),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(Sent::NoRoom),
            Err(Errno::PIPE | Errno::CONNRESET) => return Ok(Sent::Closed),
            Err(errno) => return Err(Error::socket("send")(errno)),
        }
    }
}

/// Sends, waiting for room until the deadline.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>], deadline: Deadline) -> Result<Sent> {
    loop {
        let sent = try_send(socket.as_fd(), bytes, fds)?;
        let slice = deadline.remaining_up_to(Duration::from_millis(100));
        if sent != Sent::NoRoom || slice.is_zero() {
            return Ok(sent);
        }
        let mut wait = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::OUT)];
        wait_for(&mut wait, slice)?;
    }
}

/// Receives one message into `buffer` ([`MAX_MESSAGE_BYTES`] long) without waiting.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        let received = rustix::net::recvmsg(
            socket.as_fd(),
            &mut [std::io::IoSliceMut::new(buffer)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
        );
        match received {
            Ok(message) => break message,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(Received::Nothing),
            Err(Errno::CONNRESET | Errno::PIPE) => return Ok(Received::EndOfFile),
            Err(errno) => return Err(Error::socket("receive")(errno)),
        }
    };
    let mut fds = Vec::new();
    for part in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    if message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(Error::Socket {
            action: "receive",
            message: "a message or its descriptors were truncated".into(),
        });
    }
    if message.bytes == 0 {
        return Ok(Received::EndOfFile);
    }
    Ok(Received::Message(message.bytes, fds))
}

/// Waits until one of `fds` is ready, at most `timeout`; the number that are.
pub fn wait_for(fds: &mut [PollFd<'_>], timeout: Duration) -> Result<usize> {
    let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
    match poll(fds, Some(&timeout)) {
        Ok(ready) => Ok(ready),
        Err(Errno::INTR) => Ok(0),
        Err(errno) => Err(Error::socket("poll")(errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .unwrap()
    }

    #[test]
    fn a_message_and_its_descriptors_arrive_together() {
        let (left, right) = pair();
        let mut buffer = vec![0; MAX_MESSAGE_BYTES];
        assert!(matches!(receive(&right, &mut buffer).unwrap(), Received::Nothing));
        assert_eq!(try_send(&left, b"hello", &[left.as_fd(), right.as_fd()]).unwrap(), Sent::Whole);
        let Received::Message(length, fds) = receive(&right, &mut buffer).unwrap() else { panic!() };
        assert_eq!((&buffer[..length], fds.len()), (&b"hello"[..], 2));
        drop(left);
        drop(fds);
        assert!(matches!(receive(&right, &mut buffer).unwrap(), Received::EndOfFile));
    }

    #[test]
    fn a_truncated_message_is_fatal_and_its_descriptors_are_closed() {
        let (left, right) = pair();
        let (probe, other_end) = pair();
        assert_eq!(try_send(&left, &[1; 100], &[probe.as_fd()]).unwrap(), Sent::Whole);
        assert!(receive(&right, &mut [0; 10]).is_err());
        drop(probe);
        let mut buffer = [0; 10];
        assert!(matches!(receive(&other_end, &mut buffer).unwrap(), Received::EndOfFile));
    }

    #[test]
    fn a_peer_that_does_not_read_or_is_gone_ends_the_send() {
        let (left, right) = pair();
        let send = || send(&left, &[7; 60_000], &[], Deadline::after(Duration::from_millis(20))).unwrap();
        assert_eq!((0..10_000).map(|_| send()).find(|sent| *sent != Sent::Whole), Some(Sent::NoRoom));
        drop(right);
        assert_eq!(send(), Sent::Closed);
    }
}
