//! The ring of bytes between two ranks: room, what is unread, copies around the end, and who is told.
//!
//! `head` counts bytes written, `tail` bytes read, for ever; their difference is what lies in the ring. Each side trusts
//! its own count only: what the other side says is compared with the ring's length before it is used.

use unisono_core::layout::LATEST_WORDS;

use super::copy::{copy, to_words};
use super::engine::Engine;
use super::messages::{HEADER_BYTES, Header};
use crate::control::Channel;

/// Bytes of data that find room beside the head.
const LATEST_BYTES: usize = 8 * (LATEST_WORDS - 3);

/// Bytes of the ring that a message of `bytes` takes.
const fn padded(bytes: usize) -> u64 {
    (HEADER_BYTES + bytes).next_multiple_of(HEADER_BYTES) as u64
}

impl Engine {
    #[inline(always)]
    pub(super) fn channel_to(&self, to: usize) -> &Channel<'_> {
        self.control.channel_to(to)
    }

    #[inline(always)]
    pub(super) fn channel_from(&self, from: usize) -> &Channel<'_> {
        self.control.channel_from(from)
    }

    /// Free bytes of the ring to `to`; the padding of the last message may reach beyond them.
    pub(super) fn room(&self, to: usize) -> usize {
        let channel = self.channel_to(to);
        let ahead = self.messages.written[to].wrapping_sub(channel.tail.current());
        channel.bytes.saturating_sub(usize::try_from(ahead).unwrap_or(usize::MAX))
    }

    /// Unread bytes of the ring from `from`, never more than it holds; none if the count makes no sense.
    pub(super) fn unread(&self, from: usize) -> usize {
        let channel = self.channel_from(from);
        let ahead = channel.head.current().wrapping_sub(self.messages.read[from]);
        if can_lie_in(channel, ahead) { (ahead as usize).min(channel.bytes) } else { 0 }
    }

    /// Sends a message whole, if the ring has room for it: into the ring, and its header and first bytes beside the head, where
    /// the receiver finds them with the head itself if it reads in time. Whether it did.
    ///
    /// # Safety
    /// `source` is valid for `bytes`.
    pub(super) unsafe fn write_whole(
        &mut self,
        to: usize,
        header: Header,
        source: *const u8,
        bytes: usize,
    ) -> bool {
        let channel = self.control.channel_to(to);
        let (written, length) = (self.messages.written[to], padded(bytes));
        if written + length - self.messages.freed[to] > channel.bytes as u64 {
            // Not looked at before it must be: it lies on a line of the receiver's.
            let tail = channel.tail.current();
            if length > channel.bytes as u64 || written.wrapping_sub(tail) > channel.bytes as u64 - length {
                return false;
            }
            self.messages.freed[to] = tail;
        }
        let words = header.to_words();
        let mut latest = [0; LATEST_WORDS];
        (latest[1], latest[2]) = (words[0], words[1]);
        let ring = |at: u64| (written + at) as usize & (channel.bytes - 1);
        // SAFETY: as the caller vouches; the ring has room. Its length is a multiple of a header's, and so is where messages
        // begin: neither a header wraps nor the first bytes behind it.
        unsafe {
            to_words(source, bytes.min(LATEST_BYTES), &mut latest[3..]);
            channel.ring.add(ring(0)).cast::<[u64; 4]>().write(words);
            if (1..=LATEST_BYTES).contains(&bytes) {
                let first = latest.as_ptr().add(3).cast::<[u64; 4]>();
                channel.ring.add(ring(HEADER_BYTES as u64)).cast::<[u64; 4]>().write(*first);
            }
            self.messages.written[to] += HEADER_BYTES as u64;
            if bytes > LATEST_BYTES {
                self.write_ring(to, source, bytes);
            }
        }
        let head = written + length;
        self.messages.written[to] = head;
        self.channel_to(to).latest.write(head, &latest);
        self.announce_written(to, true);
        true
    }

    /// Receives a message whole, if it is all that is unread, is just this one, and its header still stands beside the head.
    /// Whether it was.
    ///
    /// # Safety
    /// `target` is valid for `bytes`.
    pub(super) unsafe fn read_whole(
        &mut self,
        from: usize,
        header: Header,
        target: *mut u8,
        bytes: usize,
    ) -> bool {
        let channel = self.channel_from(from);
        let head = channel.head.current();
        if head.wrapping_sub(self.messages.read[from]) != padded(bytes) {
            return false;
        }
        let Some([_, first, second, data @ ..]) = channel.latest.read(head) else { return false };
        if Header::from_words([first, second, 0, 0]) != header {
            return false;
        }
        self.messages.read[from] += HEADER_BYTES as u64;
        // SAFETY: as the caller vouches; the words are our own copy, and all of a message that is longer is unread.
        unsafe {
            match bytes {
                0..=LATEST_BYTES => std::ptr::copy_nonoverlapping(data.as_ptr().cast(), target, bytes),
                _ => self.read_ring(from, target, bytes),
            }
        }
        self.messages.read[from] = head;
        self.free_ring(from, true);
        true
    }

    /// Copies `bytes` into the ring to `to`, around its end, without telling the receiver.
    ///
    /// # Safety
    /// `source` is valid for `bytes`, and the ring has room for them.
    pub(super) unsafe fn write_ring(&mut self, to: usize, source: *const u8, bytes: usize) {
        let channel = self.channel_to(to);
        let at = self.messages.written[to] as usize & (channel.bytes - 1);
        let first = bytes.min(channel.bytes - at);
        // SAFETY: both parts lie inside the ring, whose free part is ours to write.
        unsafe {
            copy(source, channel.ring.add(at), first);
            copy(source.add(first), channel.ring, bytes - first);
        }
        self.messages.written[to] += bytes as u64;
    }

    /// Copies `bytes` out of the ring from `from`, without telling the sender.
    ///
    /// # Safety
    /// `target` is valid for `bytes`, and so many are unread.
    pub(super) unsafe fn read_ring(&mut self, from: usize, target: *mut u8, bytes: usize) {
        let channel = self.channel_from(from);
        let at = self.messages.read[from] as usize & (channel.bytes - 1);
        let first = bytes.min(channel.bytes - at);
        // SAFETY: both parts lie inside the ring, whose unread part its sender does not write.
        unsafe {
            copy(channel.ring.add(at), target, first);
            copy(channel.ring, target.add(first), bytes - first);
        }
        self.messages.read[from] += bytes as u64;
    }

    /// Tells the receiver how far we have written; at the end of a message, with its padding.
    pub(super) fn announce_written(&mut self, to: usize, is_end: bool) {
        let written = &mut self.messages.written[to];
        if is_end {
            *written = written.next_multiple_of(HEADER_BYTES as u64);
        }
        let head = *written;
        let channel = self.channel_to(to);
        // SYNC: ring content (release) — everything up to `head`.
        channel.head.publish(head);
        self.control.rank(self.rank).sleepers.wake(channel.head.word());
    }

    /// Tells the sender how far we have read; at the end of a message, past its padding.
    pub(super) fn free_ring(&mut self, from: usize, is_end: bool) {
        let read = &mut self.messages.read[from];
        if is_end {
            *read = read.next_multiple_of(HEADER_BYTES as u64);
        }
        let tail = *read;
        let channel = self.channel_from(from);
        // SYNC: ring space (release) — everything before `tail` was copied.
        channel.tail.publish(tail);
        self.control.rank(self.rank).sleepers.wake(channel.tail.word());
    }
}

/// Whether the counts of the two sides can differ by so much: the padding of a message may reach beyond the ring.
pub(super) const fn can_lie_in(channel: &Channel<'_>, ahead: u64) -> bool {
    ahead <= (channel.bytes + HEADER_BYTES) as u64
}
