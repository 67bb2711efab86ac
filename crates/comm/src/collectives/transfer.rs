//! How messages move: into the rings as there is room, out of them as they come, and to who waits for them.

use smallvec::SmallVec;
use unisono_core::DType;
use unisono_core::call::Kind;

use super::copy::copy;
use super::engine::Engine;
use super::flight::{Prepared, Ticket};
use super::messages::{Arriving, Early, HEADER_BYTES, Header, Incoming, Message, Outgoing};
use super::waiting::{Blocked, On};
use crate::buffer::{Place, RawBuffer};
use crate::call::Call;
use crate::cause::Cause;
use crate::error::{Error, Result};

/// Bytes after which the other side is told, so that it works while we do.
const PIECE_BYTES: usize = 16 * 1024;
/// Pieces of one sender that are read before anything else is looked at.
const PIECES_PER_LOOK: usize = 64;

impl Engine {
    /// Checks a message, or one each way, and carries out on the spot what can be: messages of one piece, if nothing else is in
    /// flight and they neither wait for room nor long for their sender. What is left must be posted; `None` if nothing is.
    pub(super) fn begin_message(&mut self, call: &Call<'_>) -> Result<Option<Prepared>> {
        let (out, into, tag) = match (&call.kind, call.buffers()) {
            (Kind::Send { to, tag }, [source]) => (Some((*to, source)), None, *tag),
            (Kind::Recv { from, tag }, [target]) => (None, Some((*from, target)), *tag),
            (Kind::SendRecv { to, from, tag }, [source, target]) => {
                (Some((*to, source)), Some((*from, target)), *tag)
            }
            _ => return self.prepare(call).map(Some),
        };
        let may_be_at_once = |end: Option<(u32, &RawBuffer)>| {
            end.is_none_or(|(peer, buffer)| {
                let is_peer = peer as usize != self.rank && (peer as usize) < self.world_size;
                is_peer && !matches!(buffer.place, Place::Cuda { .. }) && buffer.bytes() <= PIECE_BYTES
            })
        };
        let is_sent = self.is_idle()
            && may_be_at_once(out)
            && may_be_at_once(into)
            && out.is_none_or(|(to, source)| self.send_at_once(to as usize, tag, source));
        if !is_sent {
            return self.prepare(call).map(Some);
        }
        if let Some((from, target)) = into
            && !self.receive_at_once(from as usize, tag, target)
        {
            let incoming = self.incoming(call.kind, target, Some(from), tag)?;
            return Ok(Some(Prepared::Message(SmallVec::from_iter([incoming]))));
        }
        if let [buffer, ..] = call.buffers() {
            self.record_message_at_once(call.kind, buffer.dtype, buffer.count as u64);
        }
        Ok(None)
    }

    fn send_at_once(&mut self, to: usize, tag: u32, source: &RawBuffer) -> bool {
        let header = Header { tag, dtype: Some(source.dtype), count: source.count as u64 };
        let data = std::ptr::with_exposed_provenance(source.ptr as usize);
        // SAFETY: whoever made the call vouches for its buffers.
        unsafe { self.write_whole(to, header, data, source.bytes()) }
    }

    fn receive_at_once(&mut self, from: usize, tag: u32, target: &RawBuffer) -> bool {
        let header = Header { tag, dtype: Some(target.dtype), count: target.count as u64 };
        let data = std::ptr::with_exposed_provenance_mut(target.ptr as usize);
        let is_next =
            self.messages.early[from].is_empty() && matches!(self.messages.arriving[from], Arriving::Nothing);
        // SAFETY: whoever made the call vouches for its buffers.
        is_next && self.spin_for_news(from) && unsafe { self.read_whole(from, header, data, target.bytes()) }
    }

    /// Puts a message behind those that were posted before. One that came early is complete at once.
    pub(super) fn post_message(&mut self, message: Message, ticket: Ticket) -> Result<()> {
        match message {
            Message::Out(outgoing) => self.messages.outgoing.push(Outgoing { ticket, ..outgoing }),
            Message::In(incoming) => {
                let incoming = Incoming { ticket, ..incoming };
                if !self.take_early(&incoming)? {
                    self.messages.incoming.push(incoming);
                }
            }
        }
        Ok(())
    }

    /// Takes all messages as far as they go without waiting; whether any moved.
    pub(super) fn progress_messages(&mut self) -> Result<bool> {
        let mut moved = false;
        let mut at = 0;
        while at < self.messages.outgoing.len() {
            let mut message = self.messages.outgoing[at];
            let is_first = !self.messages.outgoing[..at].iter().any(|other| other.to == message.to);
            let left = message.left;
            if is_first && self.push(&mut message) {
                self.messages.outgoing.remove(at);
                moved = true;
                continue;
            }
            if is_first {
                moved |= left != message.left;
                self.messages.outgoing[at] = message;
                self.flight.blocked.push(Blocked { peer: message.to, on: On::Room, value: 0 });
            }
            at += 1;
        }
        if self.messages.incoming.is_empty() && self.messages.ours == 0 {
            return Ok(moved);
        }
        let start = self.messages.next;
        for peer in (start..self.world_size).chain(0..start) {
            moved |= self.is_wanted(peer) && self.pull(peer)?;
        }
        Ok(moved)
    }

    /// Whether somebody waits for a message of `peer`.
    fn is_wanted(&self, peer: usize) -> bool {
        peer != self.rank
            && (matches!(self.messages.arriving[peer], Arriving::Ours(_))
                || self.messages.incoming.iter().any(|message| message.is_from(peer)))
    }

    /// Writes as much of the message as there is room for; whether all of it is written.
    fn push(&mut self, outgoing: &mut Outgoing) -> bool {
        let to = outgoing.to;
        if let Some(header) = outgoing.header {
            if self.room(to) < HEADER_BYTES {
                return false;
            }
            let words = header.to_words();
            // SAFETY: there is room for a header, and it does not wrap: messages start on multiples of its length.
            unsafe { self.write_ring(to, words.as_ptr().cast(), HEADER_BYTES) };
            outgoing.header = None;
        }
        loop {
            let now = outgoing.left.min(self.room(to)).min(PIECE_BYTES);
            // SAFETY: the data is valid for what is left, and the ring has room.
            unsafe {
                self.write_ring(to, outgoing.source, now);
                outgoing.source = outgoing.source.add(now);
            }
            outgoing.left -= now;
            self.announce_written(to, outgoing.left == 0);
            if outgoing.left == 0 {
                return true;
            }
            if now == 0 {
                return false;
            }
        }
    }

    /// The header of the next message of `from`, which has news, left where it is.
    fn peek(&self, from: usize) -> Header {
        let channel = self.channel_from(from);
        let at = self.messages.read[from] as usize & (channel.bytes - 1) & !(HEADER_BYTES - 1);
        // SAFETY: inside the ring, whose length is a multiple of a header's; any bits are a header.
        Header::from_words(unsafe { channel.ring.add(at).cast::<[u64; 4]>().read_unaligned() })
    }

    /// Reads what there is from `from`, as long as somebody waits for it; whether anything moved.
    fn pull(&mut self, from: usize) -> Result<bool> {
        let mut moved = false;
        for _ in 0..PIECES_PER_LOOK {
            if !self.is_wanted(from) {
                return Ok(moved);
            }
            let mut arriving = std::mem::replace(&mut self.messages.arriving[from], Arriving::Nothing);
            let (step, needed) = match &mut arriving {
                Arriving::Nothing if self.unread(from) >= HEADER_BYTES => {
                    arriving = self.meet_header(from)?;
                    (Some(false), HEADER_BYTES)
                }
                Arriving::Nothing => (None, HEADER_BYTES),
                Arriving::Ours(message) => {
                    // SAFETY: the target is valid for what is left.
                    let now = unsafe { self.read_piece(from, message.target, message.left, PIECE_BYTES) };
                    message.target = message.target.wrapping_add(now);
                    message.left -= now;
                    (progress(now, message.left), 1)
                }
                Arriving::Aside(early, left) => {
                    let start = early.data.len();
                    let room = (*left).min(self.unread(from)).min(PIECE_BYTES);
                    early.data.resize(start + room, 0);
                    let target = early.data[start..].as_mut_ptr();
                    // SAFETY: the buffer was just made longer by `room`.
                    let now = unsafe { self.read_piece(from, target, *left, room) };
                    early.data.truncate(start + now);
                    *left -= now;
                    (progress(now, *left), 1)
                }
            };
            match step {
                None => {
                    self.messages.arriving[from] = arriving;
                    self.flight.blocked.push(Blocked { peer: from, on: On::News, value: needed as u64 });
                    return Ok(moved);
                }
                Some(false) => self.messages.arriving[from] = arriving,
                Some(true) => self.arrived(from, arriving)?,
            }
            moved = true;
        }
        // There is more; but the others, an abort above all, must not wait for its end.
        self.flight.blocked.push(Blocked { peer: from, on: On::News, value: 0 });
        Ok(true)
    }

    /// Copies what there is of a message of which `left` bytes are missing, at most `most`, to `target`, and frees the ring;
    /// the number of bytes.
    ///
    /// # Safety
    /// `target` is valid for the lesser of `left` and `most`.
    unsafe fn read_piece(&mut self, from: usize, target: *mut u8, left: usize, most: usize) -> usize {
        let now = left.min(self.unread(from)).min(most);
        // SAFETY: valid as the caller vouches, and so many bytes are unread.
        unsafe { self.read_ring(from, target, now) };
        self.free_ring(from, now == left);
        now
    }

    /// The next message of `from` begins: it is for the first who was posted for it, or put aside.
    fn meet_header(&mut self, from: usize) -> Result<Arriving> {
        let header = self.peek(from);
        self.messages.read[from] += HEADER_BYTES as u64;
        match self.take_posted(from, header) {
            Some(message) => {
                self.check_header(&message, from, header)?;
                self.messages.ours += 1;
                Ok(Arriving::Ours(message))
            }
            None => {
                let count = usize::try_from(header.count).ok();
                let bytes = header
                    .dtype
                    .map(DType::size)
                    .zip(count)
                    .and_then(|(size, count)| size.checked_mul(count));
                let unknown = || {
                    self.abort_with(Cause::Mismatch {
                        left: format!("recv on rank {}", self.rank),
                        right: format!("a message that no rank sends ({})", header.describe()),
                    })
                };
                let bytes = bytes.ok_or_else(unknown)?;
                Ok(Arriving::Aside(Early { header, data: Vec::new() }, bytes))
            }
        }
    }

    /// The first message that was posted for one like this, which is no longer posted then.
    fn take_posted(&mut self, from: usize, header: Header) -> Option<Incoming> {
        let is_it = |message: &Incoming| message.is_from(from) && message.header.tag == header.tag;
        let at = self.messages.incoming.iter().position(is_it)?;
        let message = self.messages.incoming.remove(at);
        self.taken(&message, from);
        Some(message)
    }

    /// A message from anybody has its sender; the next one is looked for behind it.
    fn taken(&mut self, message: &Incoming, from: usize) {
        if message.from.is_none() {
            self.messages.last_sender = from;
            self.messages.next = (from + 1) % self.world_size;
        }
    }

    /// A message is complete.
    fn arrived(&mut self, from: usize, arriving: Arriving) -> Result<()> {
        match arriving {
            Arriving::Nothing => {}
            Arriving::Ours(_) => self.messages.ours -= 1,
            // Somebody may have asked for it meanwhile.
            Arriving::Aside(early, _) => match self.take_posted(from, early.header) {
                Some(message) => self.hand_over(&message, from, &early)?,
                None => self.messages.early[from].push_back(early),
            },
        }
        Ok(())
    }

    /// Looks for a message that came early; whether there was one.
    fn take_early(&mut self, incoming: &Incoming) -> Result<bool> {
        let start = self.messages.next;
        for from in (start..self.world_size).chain(0..start).filter(|from| incoming.is_from(*from)) {
            let early = &mut self.messages.early[from];
            let Some(at) = early.iter().position(|early| early.header.tag == incoming.header.tag) else {
                continue;
            };
            if let Some(early) = early.remove(at) {
                self.taken(incoming, from);
                self.hand_over(incoming, from, &early)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn hand_over(&self, message: &Incoming, from: usize, early: &Early) -> Result<()> {
        self.check_header(message, from, early.header)?;
        // SAFETY: the target is valid for the count that was just compared.
        unsafe { copy(early.data.as_ptr(), message.target, early.data.len().min(message.left)) };
        Ok(())
    }

    /// The message with our tag must have our type and count.
    fn check_header(&self, message: &Incoming, from: usize, header: Header) -> Result<(), Error> {
        if header == message.header {
            return Ok(());
        }
        let (name, described) = (message.kind.name(), message.header.describe());
        Err(self.abort_with(Cause::Mismatch {
            left: format!("{name} from {from} on rank {} ({described})", self.rank),
            right: format!("send to {} on rank {from} ({})", self.rank, header.describe()),
        }))
    }
}

/// Whether a message is complete: `None` if nothing moved.
fn progress(now: usize, left: usize) -> Option<bool> {
    if left > 0 && now == 0 { None } else { Some(left == 0) }
}
