//! Point to point: messages from one rank to another, in order, through a ring of bytes for each ordered pair.
//!
//! The sender writes a header (tag, type, count) and the data as far as the ring has room, and moves `head`; the
//! receiver copies what is there and moves `tail`. So a message of any size streams through the ring, and a small one
//! is complete for its sender before anybody asks for it. Messages of one pair are matched by tag: one that came too
//! early is put aside. No epoch, no chain: collectives and messages do not know of each other.
//!
//! What a peer wrote is copied, then compared: the type and count that we expect bound every copy, and a message that is
//! put aside grows only as its bytes arrive.

use std::collections::VecDeque;

use unisono_core::DType;
use unisono_core::call::Kind;

use super::copy::copy;
use super::engine::Engine;
use crate::buffer::{Place, RawBuffer};
use crate::call::Call;
use crate::cause::Cause;
use crate::error::{Error, Result};

/// Length of a header, and what messages are aligned to.
pub(super) const HEADER_BYTES: usize = 32;
/// Bytes after which the other side is told, so that it works while we do.
const PIECE_BYTES: usize = 16 * 1024;

/// What a message says of itself.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Header {
    tag: u32,
    dtype: Option<DType>,
    count: u64,
}

impl Header {
    fn to_words(self) -> [u64; 4] {
        let dtype = self.dtype.map_or(u8::MAX, DType::code);
        [u64::from(self.tag) | u64::from(dtype) << 32, self.count, 0, 0]
    }

    fn from_words(words: [u64; 4]) -> Self {
        Self { tag: words[0] as u32, dtype: DType::from_code((words[0] >> 32) as u8), count: words[1] }
    }

    /// `f32, 4, tag 7`.
    fn describe(&self) -> String {
        let dtype = self.dtype.map_or("unknown type", DType::name);
        format!("{dtype}, {}, tag {}", self.count, self.tag)
    }
}

/// A message that came before anybody asked for it.
#[derive(Debug)]
struct Early {
    header: Header,
    data: Vec<u8>,
}

/// Where this rank is in its channels.
#[derive(Debug, Default)]
pub(super) struct Messages {
    /// Bytes written to each rank.
    pub(super) written: Vec<u64>,
    /// Bytes read from each rank.
    pub(super) read: Vec<u64>,
    /// Messages put aside, by sender.
    early: Vec<VecDeque<Early>>,
    /// Where the next message from anybody is looked for first.
    next: usize,
}

impl Messages {
    pub(super) fn new(world_size: usize) -> Self {
        Self {
            written: vec![0; world_size],
            read: vec![0; world_size],
            early: (0..world_size).map(|_| VecDeque::new()).collect(),
            next: 0,
        }
    }
}

/// A message on its way out.
struct Outgoing {
    to: usize,
    header: Option<Header>,
    source: *const u8,
    left: usize,
}

/// A message on its way in.
struct Incoming {
    from: usize,
    header: Header,
    target: *mut u8,
    left: usize,
    stage: Stage,
}

enum Stage {
    /// Waiting for the header of the next message.
    Next,
    /// Receiving ours.
    Ours,
    /// Putting aside one with another tag: what is there, and how much is missing.
    Aside(Early, usize),
}

impl Engine {
    /// Carries out a send, a receive, or both.
    pub(super) fn submit_message(&mut self, call: &Call<'_>) -> Result<()> {
        self.begin_message(call.kind);
        let result = match (call.kind, call.buffers()) {
            (Kind::Send { to, tag }, [source]) => {
                let mut outgoing = self.outgoing(source, to, tag)?;
                self.send(&mut outgoing)
            }
            (Kind::Recv { from, tag }, [target]) => {
                let mut incoming = self.incoming(target, from, tag)?;
                self.receive(&mut incoming)
            }
            (Kind::SendRecv { to, from, tag }, [source, target]) => {
                let mut outgoing = self.outgoing(source, to, tag)?;
                let mut incoming = self.incoming(target, from, tag)?;
                self.send_and_receive(&mut outgoing, &mut incoming)
            }
            (kind, buffers) => {
                let expected = if matches!(kind, Kind::SendRecv { .. }) { 2 } else { 1 };
                return Err(self.message_argument("number of buffers", expected, buffers.len()));
            }
        };
        self.remember(result)
    }

    /// Receives the next message with `tag` from whoever sends one; its sender.
    pub(crate) fn receive_any(&mut self, target: &RawBuffer, tag: u32) -> Result<usize> {
        self.check()?;
        self.begin_message(Kind::Recv { from: u32::MAX, tag });
        let Some(first) = self.peers().next() else {
            return Err(self.message_argument("world size", "at least 2", 1));
        };
        self.incoming(target, first as u32, tag)?;
        let result = loop {
            match self.look_for(tag) {
                Ok(Some(from)) => break Ok(from),
                Ok(None) => {}
                Err(error) => break Err(error),
            }
            let ready = || self.peers().any(|peer| self.has_news(peer));
            let head = self.control.channel(first, self.rank).head;
            if let Err(error) = self.wait_until(first, self.watch(self.control.rank(first), head), ready) {
                break Err(error);
            }
        };
        let from = self.remember(result)?;
        let mut incoming = self.incoming(target, from as u32, tag)?;
        let result = self.receive(&mut incoming);
        self.remember(result.map(|()| from))
    }

    /// A rank whose next message, or one put aside, has `tag`. Messages with other tags are put aside.
    fn look_for(&mut self, tag: u32) -> Result<Option<usize>> {
        let (rank, world_size) = (self.rank, self.world_size);
        let start = self.messages.next;
        for peer in (0..world_size).map(|offset| (start + offset) % world_size).filter(|peer| *peer != rank) {
            let put_aside =
                |engine: &Self| engine.messages.early[peer].iter().any(|early| early.header.tag == tag);
            while !put_aside(self) && self.has_news(peer) {
                if self.peek(peer).tag == tag {
                    self.messages.next = peer + 1;
                    return Ok(Some(peer));
                }
                self.put_next_aside(peer)?;
            }
            if put_aside(self) {
                self.messages.next = peer + 1;
                return Ok(Some(peer));
            }
        }
        Ok(None)
    }

    fn outgoing(&self, source: &RawBuffer, to: u32, tag: u32) -> Result<Outgoing> {
        let to = self.peer("receiver", to)?;
        self.check_place(source)?;
        Ok(Outgoing {
            to,
            header: Some(Header { tag, dtype: Some(source.dtype), count: source.count as u64 }),
            source: std::ptr::with_exposed_provenance(source.ptr as usize),
            left: source.bytes(),
        })
    }

    fn incoming(&self, target: &RawBuffer, from: u32, tag: u32) -> Result<Incoming> {
        let from = self.peer("sender", from)?;
        self.check_place(target)?;
        Ok(Incoming {
            from,
            header: Header { tag, dtype: Some(target.dtype), count: target.count as u64 },
            target: std::ptr::with_exposed_provenance_mut(target.ptr as usize),
            left: target.bytes(),
            stage: Stage::Next,
        })
    }

    /// The other end, which must be another rank: nobody would empty the ring of a message to oneself.
    fn peer(&self, what: &'static str, rank: u32) -> Result<usize> {
        let rank = rank as usize;
        if rank == self.rank || rank >= self.world_size {
            let expected = format!("another rank below {}", self.world_size);
            return Err(self.message_argument(what, expected, rank));
        }
        Ok(rank)
    }

    fn check_place(&self, buffer: &RawBuffer) -> Result<()> {
        match buffer.place {
            Place::Host | Place::Window { .. } => Ok(()),
            got @ Place::Cuda { .. } => Err(Error::Place {
                call: self.kind().name(),
                rank: self.rank,
                expected: "host memory and its windows".to_owned(),
                got: got.to_string(),
            }),
        }
    }

    fn message_argument(&self, what: &'static str, expected: impl ToString, got: impl ToString) -> Error {
        Error::Argument {
            call: self.kind().name(),
            rank: self.rank,
            what,
            expected: expected.to_string(),
            got: got.to_string(),
        }
    }

    fn send(&mut self, outgoing: &mut Outgoing) -> Result<()> {
        while !self.push(outgoing) {
            let tail = self.channel_to(outgoing.to).tail;
            let watch = self.watch(self.control.rank(outgoing.to), tail);
            self.wait_until(outgoing.to, watch, || self.has_room(outgoing.to))?;
        }
        Ok(())
    }

    fn receive(&mut self, incoming: &mut Incoming) -> Result<()> {
        while !self.pull(incoming)? {
            let head = self.channel_from(incoming.from).head;
            let watch = self.watch(self.control.rank(incoming.from), head);
            self.wait_until(incoming.from, watch, || self.has_news(incoming.from))?;
        }
        Ok(())
    }

    /// Both at once, so that two ranks that send to each other empty each other's rings.
    fn send_and_receive(&mut self, outgoing: &mut Outgoing, incoming: &mut Incoming) -> Result<()> {
        let (mut is_sent, mut is_received) = (false, false);
        loop {
            is_sent = is_sent || self.push(outgoing);
            is_received = is_received || self.pull(incoming)?;
            if is_sent && is_received {
                return Ok(());
            }
            let ready =
                || !is_sent && self.has_room(outgoing.to) || !is_received && self.has_news(incoming.from);
            // One word to sleep on: the other is looked at when the sleep ends.
            let (peer, flag) = match is_received {
                false => (incoming.from, self.channel_from(incoming.from).head),
                true => (outgoing.to, self.channel_to(outgoing.to).tail),
            };
            self.wait_until(peer, self.watch(self.control.rank(peer), flag), ready)?;
        }
    }

    /// Writes as much of the message as there is room for; whether all of it is written.
    fn push(&mut self, outgoing: &mut Outgoing) -> bool {
        let to = outgoing.to;
        if let Some(header) = outgoing.header {
            if !self.has_room(to) {
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

    /// Reads what there is; whether our message is complete.
    fn pull(&mut self, incoming: &mut Incoming) -> Result<bool> {
        let from = incoming.from;
        loop {
            match &mut incoming.stage {
                Stage::Next => {
                    if let Some(early) = self.take_early(from, incoming.header.tag) {
                        self.check_header(incoming, early.header)?;
                        // SAFETY: the target is valid for the count that was just compared.
                        unsafe {
                            copy(early.data.as_ptr(), incoming.target, early.data.len().min(incoming.left))
                        };
                        return Ok(true);
                    }
                    if self.unread(from) < HEADER_BYTES {
                        return Ok(false);
                    }
                    let header = self.peek(from);
                    self.messages.read[from] += HEADER_BYTES as u64;
                    incoming.stage = if header.tag == incoming.header.tag {
                        self.check_header(incoming, header)?;
                        Stage::Ours
                    } else {
                        self.aside(header)?
                    };
                }
                Stage::Ours => {
                    let now = incoming.left.min(self.unread(from)).min(PIECE_BYTES);
                    // SAFETY: the target is valid for what is left, and so many bytes are unread.
                    unsafe {
                        self.read_ring(from, incoming.target, now);
                        incoming.target = incoming.target.add(now);
                    }
                    incoming.left -= now;
                    self.free_ring(from, incoming.left == 0);
                    if incoming.left == 0 {
                        return Ok(true);
                    }
                    if now == 0 {
                        return Ok(false);
                    }
                }
                Stage::Aside(..) => {
                    if !self.pull_aside(&mut incoming.stage, from) {
                        return Ok(false);
                    }
                }
            }
        }
    }

    /// Puts the next message of `from`, which has begun to arrive, aside.
    fn put_next_aside(&mut self, from: usize) -> Result<()> {
        let header = self.peek(from);
        self.messages.read[from] += HEADER_BYTES as u64;
        let mut stage = self.aside(header)?;
        while !self.pull_aside(&mut stage, from) {
            let head = self.channel_from(from).head;
            self.wait_until(from, self.watch(self.control.rank(from), head), || self.has_news(from))?;
        }
        Ok(())
    }

    /// Puts aside what there is of a message; true once it is complete, and `stage` the next one's.
    fn pull_aside(&mut self, stage: &mut Stage, from: usize) -> bool {
        let Stage::Aside(early, left) = stage else { return true };
        loop {
            let now = (*left).min(self.unread(from)).min(PIECE_BYTES);
            let start = early.data.len();
            early.data.resize(start + now, 0);
            // SAFETY: the buffer was just made longer by `now`, and so many bytes are unread.
            unsafe { self.read_ring(from, early.data.as_mut_ptr().add(start), now) };
            *left -= now;
            self.free_ring(from, *left == 0);
            if *left == 0 {
                break;
            }
            if now == 0 {
                return false;
            }
        }
        if let Stage::Aside(early, _) = std::mem::replace(stage, Stage::Next) {
            self.messages.early[from].push_back(early);
        }
        true
    }

    fn take_early(&mut self, from: usize, tag: u32) -> Option<Early> {
        let at = self.messages.early[from].iter().position(|early| early.header.tag == tag)?;
        self.messages.early[from].remove(at)
    }

    /// The stage of putting aside a message with this header.
    fn aside(&self, header: Header) -> Result<Stage> {
        let bytes =
            header.dtype.and_then(|dtype| usize::try_from(header.count).ok()?.checked_mul(dtype.size()));
        match bytes {
            Some(bytes) => Ok(Stage::Aside(Early { header, data: Vec::new() }, bytes)),
            None => Err(self.abort_with(Cause::Mismatch {
                left: format!("{} on rank {}", self.kind().name(), self.rank),
                right: format!("a message that no rank sends ({})", header.describe()),
            })),
        }
    }

    /// The message with our tag must have our type and count.
    fn check_header(&self, incoming: &Incoming, header: Header) -> Result<()> {
        if header == incoming.header {
            return Ok(());
        }
        Err(self.abort_with(Cause::Mismatch {
            left: format!(
                "{} from {} on rank {} ({})",
                self.kind().name(),
                incoming.from,
                self.rank,
                incoming.header.describe()
            ),
            right: format!("send to {} on rank {} ({})", self.rank, incoming.from, header.describe()),
        }))
    }
}
