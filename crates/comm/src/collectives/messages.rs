//! Point to point: messages from one rank to another, in order, through a ring of bytes for each ordered pair.
//!
//! The sender writes a header (tag, type, count) and the data as far as the ring has room, and moves `head`; the
//! receiver copies what is there and moves `tail`. So a message of any size streams through the ring, and a small one
//! is complete for its sender before anybody asks for it. Messages of one pair are matched by tag: one that came too
//! early is put aside. No epoch, no chain: collectives and messages do not know of each other.
//!
//! Messages are posted and then carried out a piece at a time, whenever the engine makes progress: those to one rank leave in
//! the order in which they were posted; what arrives goes to the first that was posted for it.
//!
//! What a peer wrote is copied, then compared: the type and count that we expect bound every copy, and a message that is
//! put aside grows only as its bytes arrive.

use std::collections::VecDeque;

use smallvec::SmallVec;
use unisono_core::DType;
use unisono_core::call::Kind;

use super::engine::Engine;
use super::flight::Ticket;
#[cfg(feature = "cuda")]
use super::plan::{FindWindow, WindowPlace, check_place};
use super::waiting::{Blocked, On};
use crate::buffer::{Place, RawBuffer};
use crate::call::Call;
use crate::error::{Error, Result};

/// Length of a header, and what messages are aligned to.
pub(super) const HEADER_BYTES: usize = 32;

/// What a message says of itself.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Header {
    pub(super) tag: u32,
    pub(super) dtype: Option<DType>,
    pub(super) count: u64,
}

impl Header {
    pub(super) fn to_words(self) -> [u64; 4] {
        let dtype = self.dtype.map_or(u8::MAX, DType::code);
        [u64::from(self.tag) | u64::from(dtype) << 32, self.count, 0, 0]
    }

    pub(super) fn from_words(words: [u64; 4]) -> Self {
        Self { tag: words[0] as u32, dtype: DType::from_code((words[0] >> 32) as u8), count: words[1] }
    }

    /// `f32, 4, tag 7`.
    pub(super) fn describe(&self) -> String {
        let dtype = self.dtype.map_or("unknown type", DType::name);
        format!("{dtype}, {}, tag {}", self.count, self.tag)
    }
}

/// One end of a message: its direction, the other rank, and the tag.
#[derive(Clone, Copy, Debug)]
struct End {
    is_sent: bool,
    rank: u32,
    tag: u32,
}

/// A message that passed all local checks, on a GPU.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct OnDevice {
    pub(crate) is_sent: bool,
    pub(crate) peer: usize,
    pub(crate) tag: u32,
    pub(crate) buffer: RawBuffer,
    pub(crate) window: Option<WindowPlace>,
}

/// A message that passed all local checks, to be posted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Message {
    /// Ours, to a rank.
    Out(Outgoing),
    /// From a rank, or from any.
    In(Incoming),
}

/// A message on its way out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outgoing {
    pub(super) ticket: Ticket,
    pub(super) kind: Kind,
    pub(super) to: usize,
    pub(super) header: Option<Header>,
    pub(super) source: *const u8,
    pub(super) left: usize,
}

/// A message on its way in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Incoming {
    pub(super) ticket: Ticket,
    pub(super) kind: Kind,
    /// `None` takes it from anybody.
    pub(super) from: Option<usize>,
    pub(super) header: Header,
    pub(super) target: *mut u8,
    pub(super) left: usize,
}

impl Incoming {
    pub(super) fn is_from(&self, peer: usize) -> bool {
        self.from.is_none_or(|from| from == peer)
    }
}

/// A message that came before anybody asked for it.
#[derive(Debug)]
pub(super) struct Early {
    pub(super) header: Header,
    pub(super) data: Vec<u8>,
}

/// What is being read from a channel.
#[derive(Debug)]
pub(super) enum Arriving {
    /// The header of the next message comes next.
    Nothing,
    /// One that was asked for.
    Ours(Incoming),
    /// One that is put aside: what is there, and how much is missing.
    Aside(Early, usize),
}

/// Where this rank is in its channels.
#[derive(Debug)]
pub(super) struct Messages {
    /// Bytes written to each rank.
    pub(super) written: Vec<u64>,
    /// Bytes that each rank had read when whoever writes whole messages last looked.
    pub(super) freed: Vec<u64>,
    /// Bytes read from each rank.
    pub(super) read: Vec<u64>,
    /// Messages put aside, by sender.
    pub(super) early: Vec<VecDeque<Early>>,
    /// What each sender's channel is in the middle of.
    pub(super) arriving: Vec<Arriving>,
    /// How many of those are ours.
    pub(super) ours: usize,
    /// Posted, in order; the first one to each rank is on its way.
    pub(super) outgoing: Vec<Outgoing>,
    /// Posted, in order; those whose header was not met.
    pub(super) incoming: Vec<Incoming>,
    /// Where the next message from anybody is looked for first.
    pub(super) next: usize,
    /// Who sent the last message that was taken from anybody.
    pub(super) last_sender: usize,
}

impl Messages {
    pub(super) fn new(world_size: usize) -> Self {
        Self {
            written: vec![0; world_size],
            freed: vec![0; world_size],
            read: vec![0; world_size],
            early: (0..world_size).map(|_| VecDeque::new()).collect(),
            arriving: (0..world_size).map(|_| Arriving::Nothing).collect(),
            ours: 0,
            outgoing: Vec::new(),
            incoming: Vec::new(),
            next: 0,
            last_sender: 0,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.outgoing.is_empty() && self.incoming.is_empty() && self.ours == 0
    }

    pub(super) fn is_posted(&self, ticket: Ticket) -> bool {
        self.any(|posted| posted == ticket)
    }

    pub(super) fn is_posted_after(&self, ticket: Ticket) -> bool {
        self.any(|posted| posted > ticket)
    }

    fn any(&self, is_it: impl Fn(Ticket) -> bool) -> bool {
        self.outgoing.iter().any(|message| is_it(message.ticket))
            || self.incoming.iter().any(|message| is_it(message.ticket))
            || self.ours > 0
                && self
                    .arriving
                    .iter()
                    .any(|arriving| matches!(arriving, Arriving::Ours(message) if is_it(message.ticket)))
    }

    /// Forgets what was posted: the communicator has failed.
    pub(super) fn abandon(&mut self) {
        self.outgoing.clear();
        self.incoming.clear();
        self.ours = 0;
        self.arriving.iter_mut().for_each(|arriving| *arriving = Arriving::Nothing);
    }
}

impl Engine {
    /// Checks a send, a receive, or both.
    pub(super) fn messages_of(&self, call: &Call<'_>) -> Result<SmallVec<[Message; 2]>> {
        let check = |(end, buffer): (End, &RawBuffer)| match end.is_sent {
            true => self.outgoing(call.kind, buffer, end.rank, end.tag),
            false => self.incoming(call.kind, buffer, Some(end.rank), end.tag),
        };
        self.ends_of(call)?.into_iter().map(check).collect()
    }

    /// The messages of a call, each with its buffer.
    fn ends_of<'a>(&self, call: &'a Call<'_>) -> Result<SmallVec<[(End, &'a RawBuffer); 2]>> {
        let sent = |rank, tag| End { is_sent: true, rank, tag };
        let received = |rank, tag| End { is_sent: false, rank, tag };
        let ends = match (call.kind, call.buffers()) {
            (Kind::Send { to, tag }, [source]) => [Some((sent(to, tag), source)), None],
            (Kind::Recv { from, tag }, [target]) => [Some((received(from, tag), target)), None],
            (Kind::SendRecv { to, from, tag }, [source, target]) => {
                [Some((sent(to, tag), source)), Some((received(from, tag), target))]
            }
            (kind, buffers) => {
                let expected = if matches!(kind, Kind::SendRecv { .. }) { 2 } else { 1 };
                return Err(self.message_argument(kind, "number of buffers", expected, buffers.len()));
            }
        };
        Ok(ends.into_iter().flatten().collect())
    }

    /// Checks the messages of a call on a GPU, by its number, and finds their buffers in windows.
    #[cfg(feature = "cuda")]
    pub(crate) fn messages_on(
        &self,
        call: &Call<'_>,
        (device, find_window): (u32, FindWindow<'_>),
    ) -> Result<SmallVec<[OnDevice; 2]>> {
        let situation = self.situation(Some(device), find_window);
        let check = |(end, buffer): (End, &RawBuffer)| {
            let what = if end.is_sent { "receiver" } else { "sender" };
            let peer = self.peer(call.kind, what, end.rank)?;
            let window = check_place(call.kind, buffer, &situation)?;
            Ok(OnDevice { is_sent: end.is_sent, peer, tag: end.tag, buffer: *buffer, window })
        };
        self.ends_of(call)?.into_iter().map(check).collect()
    }

    /// Receives the next message with `tag` from whoever sends one; its sender.
    pub(crate) fn receive_any(&mut self, target: &RawBuffer, tag: u32) -> Result<usize> {
        self.check()?;
        let kind = Kind::Recv { from: u32::MAX, tag };
        if self.world_size < 2 {
            return Err(self.message_argument(kind, "world size", "at least 2", 1));
        }
        let message = self.incoming(kind, target, None, tag)?;
        let ticket = self.post(super::Prepared::Message(SmallVec::from_iter([message])))?;
        self.drive(|engine| engine.is_done(ticket))?;
        Ok(self.messages.last_sender)
    }

    fn outgoing(&self, kind: Kind, source: &RawBuffer, to: u32, tag: u32) -> Result<Message> {
        let to = self.peer(kind, "receiver", to)?;
        self.check_place(kind, source)?;
        Ok(Message::Out(Outgoing {
            ticket: 0,
            kind,
            to,
            header: Some(Header { tag, dtype: Some(source.dtype), count: source.count as u64 }),
            source: std::ptr::with_exposed_provenance(source.ptr as usize),
            left: source.bytes(),
        }))
    }

    pub(super) fn incoming(
        &self,
        kind: Kind,
        target: &RawBuffer,
        from: Option<u32>,
        tag: u32,
    ) -> Result<Message> {
        let from = from.map(|from| self.peer(kind, "sender", from)).transpose()?;
        self.check_place(kind, target)?;
        Ok(Message::In(Incoming {
            ticket: 0,
            kind,
            from,
            header: Header { tag, dtype: Some(target.dtype), count: target.count as u64 },
            target: std::ptr::with_exposed_provenance_mut(target.ptr as usize),
            left: target.bytes(),
        }))
    }

    /// The other end, which must be another rank: nobody would empty the ring of a message to oneself.
    fn peer(&self, kind: Kind, what: &'static str, rank: u32) -> Result<usize> {
        let rank = rank as usize;
        if rank == self.rank || rank >= self.world_size {
            let expected = format!("another rank below {}", self.world_size);
            return Err(self.message_argument(kind, what, expected, rank));
        }
        Ok(rank)
    }

    fn check_place(&self, kind: Kind, buffer: &RawBuffer) -> Result<()> {
        match buffer.place {
            Place::Host => Ok(()),
            Place::Window { .. } => self.windows.settle(&[*buffer]),
            got @ Place::Cuda { .. } => Err(Error::Place {
                call: kind.name(),
                rank: self.rank,
                expected: "host memory and its windows".to_owned(),
                got: got.to_string(),
            }),
        }
    }

    fn message_argument(
        &self,
        kind: Kind,
        what: &'static str,
        expected: impl ToString,
        got: impl ToString,
    ) -> Error {
        Error::Argument {
            call: kind.name(),
            rank: self.rank,
            what,
            expected: expected.to_string(),
            got: got.to_string(),
        }
    }

    /// What this rank does that waits so: `recv from rank 1 (tag 7)`.
    pub(super) fn message_during(&self, blocked: Blocked) -> String {
        let messages = &self.messages;
        let kind = match (blocked.on, &messages.arriving[blocked.peer]) {
            (On::Room, _) => messages.outgoing.iter().find(|out| out.to == blocked.peer).map(|out| out.kind),
            (_, Arriving::Ours(message)) => Some(message.kind),
            _ => messages
                .incoming
                .iter()
                .find(|message| message.is_from(blocked.peer))
                .map(|message| message.kind),
        };
        match kind {
            Some(Kind::Send { to, tag }) => format!("send to rank {to} (tag {tag})"),
            Some(Kind::Recv { from: u32::MAX, tag }) => format!("recv from any rank (tag {tag})"),
            Some(Kind::Recv { from, tag }) => format!("recv from rank {from} (tag {tag})"),
            Some(Kind::SendRecv { to, from, tag }) => {
                format!("send_recv to rank {to} and from rank {from} (tag {tag})")
            }
            _ => self.call_name(),
        }
    }
}
