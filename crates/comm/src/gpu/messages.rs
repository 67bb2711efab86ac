//! Messages between GPUs, and collectives whose parts only two ranks know of: how they become one kernel.
//!
//! A kernel carries out any number of messages at once: all to one peer, or all from one, are a *lane* and keep their order; lanes
//! do not wait for each other. So the messages of a group make one launch, and their order does not matter.

use smallvec::SmallVec;
use unisono_core::call::{self, Kind};
use unisono_core::device::Form;
use unisono_core::device::layout::MAX_MESSAGES;
use unisono_cuda::{Grid, Stream};
use unisono_sync::Word;

use super::args::{Args, FOUND, HEADER_LAUNCH, Message, Messages};
use super::{Gpu, kernels};
use crate::buffer::RawBuffer;
use crate::call::Call;
use crate::collectives::{Engine, OnDevice, Plan, WindowPlace};
use crate::error::{Error, Result};

/// A call that passed all local checks.
#[derive(Debug)]
pub(crate) enum Prepared {
    Collective(Box<Plan>),
    Messages(Vec<OnDevice>),
}

/// Whether a collective is a message for each pair of ranks that has a part to move.
pub(super) const fn is_of_messages(kind: Kind) -> bool {
    matches!(kind, Kind::GatherV { .. } | Kind::ScatterV { .. } | Kind::AllToAllV)
}

/// What lanes are made of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Made {
    Messages,
    /// Those of a collective.
    Parts,
    /// Those of an all-to-all that overwrites what it sends.
    InPlace,
}

/// What one kernel carries out, lane after lane.
#[derive(Debug)]
pub(super) struct Lanes {
    messages: Messages,
    number: usize,
    lanes: usize,
    /// Bytes of the largest one, and of what stays here.
    most_bytes: usize,
    /// The rank that is looked at first for a message from any.
    next: usize,
}

impl Lanes {
    pub(super) fn new() -> Self {
        let messages = Messages {
            call: Args::default(),
            list: [Message::default(); MAX_MESSAGES],
            begins: [0; _],
            blocks: 1,
            first: 0,
        };
        Self { messages, number: 0, lanes: 0, most_bytes: 0, next: 0 }
    }

    /// Takes `list`, of which those of one lane need not follow each other. What stays on `rank` is sent and received by it. In place, both
    /// directions of a pair are one lane.
    fn fill(&mut self, list: &mut [Message], (rank, ranks): (usize, usize), is_in_place: bool) {
        let distance = |message: &Message| (usize::from(message.peer) + ranks - rank) % ranks;
        // Every rank begins with another peer. The sort keeps the order of what is equal.
        let lane = |message: &Message| match distance(message) {
            0 => (0, 0),
            distance if is_in_place => (distance, 0),
            distance => (distance, message.is_sent),
        };
        list.sort_by_key(lane);
        (self.number, self.lanes, self.most_bytes) = (list.len(), 0, 0);
        for (at, message) in list.iter().enumerate() {
            if at == 0 || lane(message) != lane(&list[at - 1]) {
                self.messages.begins[self.lanes] = at as u16;
                self.lanes += 1;
            }
            self.messages.list[at] = *message;
            self.most_bytes = self.most_bytes.max(message.bytes as usize);
        }
        self.messages.begins[self.lanes] = list.len() as u16;
    }
}

impl Gpu {
    /// Checks a call that is to be enqueued in `stream` later. Nothing was done when this fails.
    pub(crate) fn prepare(
        &mut self,
        engine: &mut Engine,
        call: &Call<'_>,
        stream: &Stream,
    ) -> Result<Prepared> {
        engine.check()?;
        self.check()?;
        self.check_stream(call.kind, stream)?;
        let find = |id, ptr, bytes| self.windows.find(id, (ptr, bytes));
        let device = (self.device.ordinal(), &find as _);
        if call.kind.is_message() {
            return Ok(Prepared::Messages(engine.messages_on(call, device)?.into_vec()));
        }
        let plan = engine.plan_on(call, Some(device))?;
        self.check_plan(&plan)?;
        Ok(Prepared::Collective(Box::new(plan)))
    }

    /// Puts a call that was checked into `stream`.
    pub(crate) fn enqueue(&mut self, prepared: &Prepared, stream: &Stream) -> Result<()> {
        match prepared {
            Prepared::Collective(plan) => self.carry_out(plan, stream),
            Prepared::Messages(messages) => self.launch_messages(messages, stream),
        }
    }

    /// Puts messages into `stream`, all at once: those to one rank, and those from one, keep their order.
    pub(super) fn launch_messages(&mut self, messages: &[OnDevice], stream: &Stream) -> Result<()> {
        let (rank, ranks) = (self.args.rank as usize, self.rules.ranks);
        if messages.len() > MAX_MESSAGES {
            return Err(Error::Argument {
                call: "group",
                rank,
                what: "number of messages on one communicator",
                expected: format!("at most {MAX_MESSAGES} on its GPU"),
                got: messages.len().to_string(),
            });
        }
        let entry = |message: &OnDevice| Message {
            at: self.windows.address(rank, message.buffer.ptr, message.window),
            bytes: message.buffer.bytes() as u64,
            tag: message.tag,
            dtype: message.buffer.dtype.code(),
            kind: 0,
            peer: message.peer as u8,
            is_sent: u8::from(message.is_sent),
        };
        let mut list: SmallVec<[Message; 2]> = messages.iter().map(entry).collect();
        self.lanes.fill(&mut list, (rank, ranks), false);
        self.launch_lanes(messages.iter().filter_map(|message| message.window), Made::Messages, stream)
    }

    /// Refuses collectives that have no kernels, or not for these parts.
    pub(super) fn check_plan(&self, plan: &Plan) -> Result<()> {
        let (rank, kind) = (self.args.rank as usize, plan.header.kind);
        let argument = |what, expected: &str, got: &str| {
            let (expected, got) = (expected.to_owned(), got.to_owned());
            Err(Error::Argument { call: kind.name(), rank, what, expected, got })
        };
        if kind.is_multi() {
            return argument("streams", "one of each device, through on_each()", "one");
        }
        if !kernels::has_kernels(kind) {
            return argument("operation on a GPU", "one that GPUs have kernels for", kind.name());
        }
        if !is_of_messages(kind) {
            return Ok(());
        }
        if let (Some(sent), Some(received)) = plan.between(rank, rank)
            && sent.count != received.count
        {
            let expected = format!("{} elements, as it is sent", sent.count);
            return argument("part that stays on this rank", &expected, &received.count.to_string());
        }
        Ok(())
    }

    /// Puts a collective that is a message for each pair of ranks into `stream`. It has an epoch, and headers are compared as in others.
    pub(super) fn launch_parts(&mut self, plan: &Plan, stream: &Stream) -> Result<()> {
        let (rank, ranks) = (self.args.rank as usize, self.rules.ranks);
        let kind = plan.header.kind;
        let source = self.windows.address(rank, plan.source as u64, plan.source_window);
        let target = self.windows.address(rank, plan.target as u64, plan.target_window);
        let words = plan.header.to_words();
        let mut list = Vec::with_capacity(2 * ranks);
        for peer in 0..ranks {
            let (sent, received) = plan.between(rank, peer);
            for (base, part, is_sent) in [(source, sent, 1), (target, received, 0)] {
                list.extend(part.map(|part| Message {
                    at: base + part.at as u64,
                    bytes: (part.count * plan.dtype.size()) as u64,
                    tag: 0,
                    dtype: plan.dtype.code(),
                    kind: words[0] as u8,
                    peer: peer as u8,
                    is_sent,
                }));
            }
        }
        // What comes takes the place of what goes.
        let is_swapped =
            |peer| matches!(plan.between(rank, peer), (Some(sent), Some(received)) if sent == received);
        let is_in_place = plan.source == plan.target.cast_const() && (0..ranks).all(is_swapped);
        self.lanes.fill(&mut list, (rank, ranks), is_in_place);
        let args = &mut self.args;
        args.header[..call::HEADER_WORDS].copy_from_slice(&words);
        // Grids are each rank's own.
        args.header[HEADER_LAUNCH] = Form::Bulk as u64;
        args.bytes = self.lanes.most_bytes as u64;
        args.root = kind.root().unwrap_or(0);
        let windows = [plan.source_window, plan.target_window];
        let made = if is_in_place { Made::InPlace } else { Made::Parts };
        self.launch_lanes(windows.into_iter().flatten(), made, stream)
    }

    /// Launches what the lanes hold, whose buffers lie in `windows` or not.
    fn launch_lanes(
        &mut self,
        windows: impl Iterator<Item = WindowPlace>,
        made: Made,
        stream: &Stream,
    ) -> Result<()> {
        self.order_after_latest(stream)?;
        let mut sides: SmallVec<[[Option<WindowPlace>; 2]; 2]> =
            windows.map(|window| [Some(window), None]).collect();
        if sides.is_empty() {
            sides.push([None; 2]);
        }
        let mut is_captured = false;
        for sides in &sides {
            is_captured |= self.keep_if_captured(*sides, stream)?;
        }
        let launch = self.rules.messages(self.lanes.lanes, self.lanes.most_bytes);
        self.lanes.messages.call = self.args;
        self.lanes.messages.blocks = launch.blocks as u16;
        let is_collective = made != Made::Messages;
        let function = match made {
            Made::InPlace => self.kernels.all_to_all_v().in_place(launch.form),
            Made::Messages | Made::Parts => self.kernels.messages().of(launch.form, is_collective),
        };
        let blocks = launch.blocks * self.lanes.lanes as u32 + u32::from(is_collective);
        let shared_bytes = launch.shared_bytes(self.room_bytes);
        // The block that exchanges headers has a warp for each of some peers.
        let threads = if is_collective { launch.threads.max(256) } else { launch.threads };
        let grid = self.grid((blocks, threads), shared_bytes);
        let messages = &raw mut self.lanes.messages;
        // SAFETY: the kernel takes `Messages`; what they name lives as long as this communicator, which waits for its kernels before it
        // lets go, and the buffers are valid until the stream has passed, as whoever made the call promised.
        let launched = unsafe { function.launch(stream, grid, messages.cast()) };
        launched.map_err(|error| self.refused(error))?;
        if is_collective {
            self.count_call(is_captured);
        }
        sides.into_iter().try_for_each(|sides| self.conclude(sides, stream, is_captured))
    }

    /// Waits until some rank has sent us a message with `tag` that is the next from it, and puts its receipt into `stream`. The rank.
    pub(crate) fn receive_any(
        &mut self,
        engine: &mut Engine,
        (target, tag): (RawBuffer, u32),
        stream: &Stream,
    ) -> Result<usize> {
        let (rank, ranks) = (self.args.rank as usize, self.rules.ranks);
        let kind = Kind::Recv { from: u32::MAX, tag };
        let argument = |what, expected: &str, got: &str| Error::Argument {
            call: kind.name(),
            rank,
            what,
            expected: expected.to_owned(),
            got: got.to_owned(),
        };
        if ranks < 2 {
            return Err(argument("world size", "at least 2", "1"));
        }
        // Whoever it comes from, the rest is checked as if from the next rank.
        let from = |source: usize| Call::new(Kind::Recv { from: source as u32, tag }, [target]);
        self.prepare(engine, &from((rank + 1) % ranks), stream)?;
        if stream.is_capturing().map_err(|error| self.refused(error))? {
            let expected = "one that is not captured, because the host waits for the name of the sender";
            return Err(argument("stream", expected, "one that is captured"));
        }
        self.order_after_latest(stream)?;
        self.control.gpu()[FOUND].store_relaxed(0);
        let messages = &mut self.lanes.messages;
        messages.call = self.args;
        messages.first = self.lanes.next as u32;
        messages.list[0] = Message { tag, ..Message::default() };
        let grid = Grid { blocks: 1, threads: 1, shared_bytes: 0, is_early: false };
        // SAFETY: the kernel takes `Messages`; what they name lives as long as this communicator, which waits for it here.
        let launched =
            unsafe { self.kernels.messages().find.launch(stream, grid, (&raw mut *messages).cast()) };
        launched.and_then(|()| stream.synchronize()).map_err(|error| self.refused(error))?;
        engine.check()?;
        self.check()?;
        let found = self.control.gpu()[FOUND].load_acquire() as usize;
        let Some(source) = found.checked_sub(1).filter(|source| *source < ranks) else {
            // Without a report, a kernel leaves for the abort of another rank only.
            return Err(self.control.cause().map_or_else(
                || argument("sender", "a rank of the communicator", "none, though the kernel ended"),
                |cause| cause.into_error("recv from any rank", (rank, ranks)),
            ));
        };
        self.lanes.next = (source + 1) % ranks;
        let prepared = self.prepare(engine, &from(source), stream)?;
        self.enqueue(&prepared, stream)?;
        Ok(source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(peer: u8, is_sent: u8, bytes: u64) -> Message {
        Message { peer, is_sent, bytes, ..Message::default() }
    }

    #[test]
    fn messages_of_a_pair_keep_their_order_in_one_lane_and_what_stays_is_a_lane_of_its_own() {
        let mut lanes = Lanes::new();
        let mut list = [
            message(0, 1, 5),
            message(3, 0, 1),
            message(2, 1, 7),
            message(2, 0, 7),
            message(0, 1, 4),
            message(3, 1, 90),
            message(0, 1, 6),
        ];
        lanes.fill(&mut list, (2, 4), false);
        let got: Vec<_> = list.iter().map(|message| (message.peer, message.is_sent, message.bytes)).collect();
        let expected = [(2, 1, 7), (2, 0, 7), (3, 0, 1), (3, 1, 90), (0, 1, 5), (0, 1, 4), (0, 1, 6)];
        assert_eq!(got, expected);
        assert_eq!((lanes.number, lanes.lanes, lanes.most_bytes), (7, 4, 90));
        assert_eq!(lanes.messages.begins[..5], [0, 2, 3, 4, 7]);
        // In place, what goes stands before what comes.
        let parts = |peer| [message(peer, 1, 5), message(peer, 0, 5)];
        let mut list: Vec<_> = (0..3).flat_map(parts).collect();
        lanes.fill(&mut list, (1, 3), true);
        let got: Vec<_> = list.iter().map(|message| (message.peer, message.is_sent)).collect();
        assert_eq!(got, [(1, 1), (1, 0), (2, 1), (2, 0), (0, 1), (0, 0)]);
        assert_eq!((lanes.lanes, &lanes.messages.begins[..4]), (3, &[0, 2, 4, 6][..]));
    }

    #[test]
    fn arguments_fit_into_a_launch() {
        assert!(size_of::<Messages>() <= 4096, "{}", size_of::<Messages>());
    }
}
