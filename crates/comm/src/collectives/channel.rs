//! The ring of bytes between two ranks: room, what is unread, copies around the end, and who is told.
//!
//! `head` counts bytes written, `tail` bytes read, for ever; their difference is what lies in the ring. Each side trusts
//! its own count only: what the other side says is compared with the ring's length before it is used.

use super::copy::copy;
use super::engine::Engine;
use super::messages::HEADER_BYTES;
use crate::control::Channel;

impl Engine {
    pub(super) fn channel_to(&self, to: usize) -> Channel<'_> {
        self.control.channel(self.rank, to)
    }

    pub(super) fn channel_from(&self, from: usize) -> Channel<'_> {
        self.control.channel(from, self.rank)
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
        if can_lie_in(&channel, ahead) { (ahead as usize).min(channel.bytes) } else { 0 }
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
