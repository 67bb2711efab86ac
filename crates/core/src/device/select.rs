//! Which form a call takes on the GPU, and with which grid: a pure function of values that are equal on all ranks.
//!
//! Over 500 lines because the decisions for all operations, rows and messages share their limits.

use std::fmt;
use std::str::FromStr;

use super::engine::{MOST_LANES, slot_bytes};
use super::layout::{
    ArenaLayout, Link, MAX_BLOCKS, MAX_TEAMS, MESSAGE_CHANNELS, PACKET_DATA, RING_SLOTS, UNIT_DATA,
    UNIT_LANES,
};
use super::table::{Table, WIDE_BLOCKS};
use crate::call::Kind;
use crate::fused::UNIT;
use crate::quantised::{GROUP, GROUP_BYTES};
use crate::reduce_op::ReduceOp;
use crate::settings::Order;

/// How a collective is carried out by kernels.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Form {
    /// Everybody pushes all of its input to all, as packets.
    OneShot,
    /// Everybody pushes shards to their owners, who push results to all, as packets.
    TwoShot,
    /// As two-shot, in tiles through scratch.
    Bulk,
    /// Inputs and outputs are reached where they lie.
    Direct,
    /// From neighbour to neighbour, through scratch.
    Ring,
    /// From neighbour to neighbour, by copy engines.
    Engine,
    /// As one-shot, in lines of 128 bytes instead of packets.
    OneShotLines,
    /// As two-shot, in lines.
    TwoShotLines,
}

impl Form {
    /// Every form, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::OneShot,
        Self::TwoShot,
        Self::Bulk,
        Self::Direct,
        Self::Ring,
        Self::Engine,
        Self::OneShotLines,
        Self::TwoShotLines,
    ];

    /// Whether data travels in lines: those need devices that move them whole.
    pub const fn is_lines(self) -> bool {
        matches!(self, Self::OneShotLines | Self::TwoShotLines)
    }

    /// Whether there are kernels of this form for an operation.
    pub const fn serves(self, kind: Kind) -> bool {
        match self {
            Self::OneShot => true,
            // What is larger than packets have room for goes as several calls.
            Self::Bulk | Self::OneShotLines => !matches!(kind, Kind::AllReduceQuantised),
            Self::TwoShot => {
                matches!(kind, Kind::AllReduce { .. } | Kind::Broadcast { .. } | Kind::AllReduceQuantised)
            }
            Self::TwoShotLines => {
                matches!(kind, Kind::AllReduce { .. } | Kind::Broadcast { .. } | Kind::Reduce { .. })
            }
            Self::Direct => {
                matches!(kind, Kind::AllReduce { .. } | Kind::Broadcast { .. } | Kind::AllGather)
            }
            Self::Ring => matches!(
                kind,
                Kind::AllReduce { .. }
                    | Kind::Broadcast { .. }
                    | Kind::AllGather
                    | Kind::AllGatherV
                    | Kind::Reduce { .. }
                    | Kind::ReduceScatter { .. }
                    | Kind::ReduceScatterV { .. }
            ),
            Self::Engine => matches!(kind, Kind::Broadcast { .. } | Kind::AllGather),
        }
    }

    /// The name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::OneShot => "one-shot",
            Self::TwoShot => "two-shot",
            Self::Bulk => "bulk",
            Self::Direct => "direct",
            Self::Ring => "ring",
            Self::Engine => "engine",
            Self::OneShotLines => "one-shot-lines",
            Self::TwoShotLines => "two-shot-lines",
        }
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A form that somebody asks for, with blocks and the vectors of a tile; 0 of either is as usual. As text, `bulk`, `bulk:24` or
/// `bulk:24:512`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Wish {
    /// The form, taken where it can serve the call.
    pub form: Form,
    /// Blocks that move data; of copy engines, copies that are under way at once. With more than [`WIDE_BLOCKS`] threads move the
    /// data, unless a tile is asked for as well: then bulk copies do, and two blocks share a multiprocessor.
    pub blocks: u32,
    /// Vectors of 16 bytes in a tile, of forms that have tiles; of copy engines, in a chunk.
    pub tile: u32,
}

/// Not a [`Wish`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotAWish;

impl FromStr for Wish {
    type Err = NotAWish;

    fn from_str(text: &str) -> Result<Self, NotAWish> {
        let mut parts = text.splitn(3, ':');
        let name = parts.next().unwrap_or("");
        let form = Form::ALL.into_iter().find(|form| form.name() == name).ok_or(NotAWish)?;
        let mut number = || parts.next().map_or(Ok(0), |part| part.parse().map_err(|_| NotAWish));
        Ok(Self { form, blocks: number()?, tile: number()? })
    }
}

impl fmt::Display for Wish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.form, self.blocks, self.tile)
    }
}

/// Blocks of all ranks together that surely run at once on a device.
const CROWDED_BLOCKS: usize = 96;

/// A form and its grid.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Launch {
    /// The form.
    pub form: Form,
    /// Blocks that move data; where copy engines do, copies that are under way at once ([`lanes`](super::engine::Steps)).
    pub blocks: u32,
    /// Threads of each block.
    pub threads: u32,
    /// Vectors of 16 bytes that a block moves in one round, or that a copy engine does; 0 where there are no rounds.
    pub tile: u32,
    /// Whether bulk copies move the data, and threads only fold it. A block takes a multiprocessor then, or half of one if it has
    /// [`PAIRED_THREADS`].
    pub by_copies: bool,
}

impl Launch {
    /// Blocks that move data; none where copy engines do.
    pub const fn workers(&self) -> u32 {
        match self.form {
            Form::Engine => 0,
            _ => self.blocks,
        }
    }

    /// Shared memory of each block, of so much that a multiprocessor has for bulk copies.
    pub const fn shared_bytes(&self, room: u32) -> u32 {
        match (self.by_copies, self.threads) {
            (false, _) => 0,
            (true, PAIRED_THREADS) => room / 2,
            _ => room,
        }
    }
}

/// Threads of a block of bulk copies that has a multiprocessor for itself.
pub const WHOLE_THREADS: u32 = 1024;
/// Those of one that shares it with another.
pub const PAIRED_THREADS: u32 = WHOLE_THREADS / 2;

/// Blocks that share a row where rows are normalised, and threads of each. Two of them fit on a multiprocessor.
pub const TEAM_BLOCKS: u32 = 8;
/// See [`TEAM_BLOCKS`].
pub const TEAM_THREADS: u32 = 256;

/// The least threads of a block that moves packets or lines: a warp for the header of each peer, up to eight.
const fn least_threads(ranks: usize) -> usize {
    32 * if ranks < 8 { ranks } else { 8 }
}

/// Packets of a message for which another block is worth meeting it.
const MESSAGE_SHARE: usize = 171;
/// The most threads of a block that move packets of messages.
const PACKET_MOVERS: usize = 480;

/// Threads that quantise a group together.
const GROUP_THREADS: usize = 16;

/// What the choice depends on.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// The operation.
    pub kind: Kind,
    /// Bytes of one part; of the largest, where they differ.
    pub bytes: usize,
    /// Bytes of one element.
    pub size: usize,
    /// Whether all buffers lie where all ranks reach them.
    pub is_reachable: bool,
}

impl Question {
    /// Bytes of one part on their way.
    const fn travelling(&self) -> usize {
        match self.kind {
            Kind::AllReduceQuantised => self.groups(1) * GROUP_BYTES,
            _ => self.bytes,
        }
    }

    /// Groups of the largest of so many shards.
    const fn groups(&self, shards: usize) -> usize {
        self.bytes.div_ceil(GROUP * self.size).div_ceil(shards)
    }
}

/// What holds for all calls of a communicator; equal on all ranks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rules {
    /// Number of ranks.
    pub ranks: usize,
    /// How they are linked.
    pub link: Link,
    /// The most of these ranks that share one device: their blocks must all run at once.
    pub crowd: usize,
    /// The order of sums.
    pub order: Order,
    /// Whether the devices have bulk copies that run on their own: then few blocks nearly fill the links. Such devices (Hopper and
    /// later) also move lines whole, as far as was measured.
    pub bulk_copies: bool,
    /// Blocks that this communicator may have wait on a device at once, unless more are asked for. Few ([below 64](Self::is_narrow)) may
    /// take a multiprocessor each; of more, two share one, and those that need one take half as many.
    pub most_blocks: u32,
    /// Whether copy engines may serve calls that nobody asked it for. Not where one thread drives several ranks: their hundreds of
    /// copies could fill a queue, and that thread would wait for room instead of calling for the next rank.
    pub engines: bool,
    /// What was asked for.
    pub forced: Option<Wish>,
    /// Where forms change, and their grids.
    pub table: Table,
}

impl Rules {
    const fn layout(&self) -> ArenaLayout {
        ArenaLayout::new(self.ranks, self.link)
    }

    /// Whether the communicator shares its devices with others of this process, and may have few blocks there.
    pub const fn is_narrow(&self) -> bool {
        (self.most_blocks as usize) < WIDE_BLOCKS
    }

    /// Copies that are under way at once where copy engines move data; none if they never do.
    pub fn lanes(&self) -> Option<usize> {
        /// Two had the largest chunks and were the fastest on two and four GPUs; one waits for itself.
        const USUAL: usize = 2;
        let wish = self.forced.filter(|wish| wish.form == Form::Engine);
        let has_engines = self.ranks > 1 && self.link == Link::Device && self.crowd == 1;
        let are_usual = self.engines && !self.is_narrow() && self.table.has_engines();
        (has_engines && (wish.is_some() || are_usual)).then(|| match wish {
            Some(Wish { blocks: 1.., .. }) => (wish.map_or(0, |wish| wish.blocks) as usize).min(MOST_LANES),
            _ => USUAL,
        })
    }

    /// Whether data can travel in lines. Between ranks of one device it does for who asks for it: that was not measured.
    pub const fn have_lines(&self) -> bool {
        self.ranks > 1 && matches!(self.link, Link::Device) && self.bulk_copies
    }

    /// Whether `form` can serve the call.
    fn can(&self, form: Form, question: &Question) -> bool {
        if !form.serves(question.kind) {
            return false;
        }
        let layout = self.layout();
        let [one_shot, two_shot] = match question.kind {
            Kind::AllReduceQuantised => layout.quantised_capacity(question.size),
            _ => [layout.one_shot_capacity(question.size), layout.two_shot_capacity(question.size)],
        };
        let lines = layout.lines_capacity(question.size);
        match form {
            // Who is alone keeps everything where it is.
            Form::OneShot => self.ranks == 1 || question.bytes <= one_shot,
            Form::TwoShot => self.ranks > 1 && question.bytes <= two_shot,
            Form::Bulk => self.ranks > 1,
            Form::Direct => self.ranks > 1 && question.is_reachable,
            Form::Ring => {
                // Of two ranks, either order gives the same bits; but a scaled input is rounded on its way.
                let is_scaled = matches!(question.kind.op(), Some(ReduceOp::PreMulSum(_)));
                let changes_order = (self.ranks > 2 || is_scaled)
                    && question.kind.op().is_some()
                    && self.order == Order::Rank;
                self.ranks > 1 && !changes_order
            }
            Form::Engine => self.lanes().is_some(),
            Form::OneShotLines => self.have_lines() && question.bytes <= lines[0],
            Form::TwoShotLines => {
                let most = if matches!(question.kind, Kind::Reduce { .. }) { lines[2] } else { lines[1] };
                self.have_lines() && question.bytes <= most
            }
        }
    }

    /// The form and grid of a call that moves data; of a quantised all-reduce that takes several kernels, those of the first.
    pub fn decide(&self, question: &Question) -> Launch {
        let most = match question.kind {
            Kind::AllReduceQuantised => self.most_quantised(question.size),
            _ => usize::MAX,
        };
        let question = &Question { bytes: question.bytes.min(most), ..*question };
        if let Some(wish) = self.forced
            && self.can(wish.form, question)
        {
            return self.grid(wish, question);
        }
        let row = self.table.row(question.kind);
        let packets_to = row.one_shot_to.max(row.two_shot_to);
        let ring_from = if self.is_narrow() { row.narrow_ring_from } else { row.ring_from };
        let can = |form| self.can(form, question);
        let two_shot_to = match question.kind {
            // There is nothing else.
            Kind::AllReduceQuantised => usize::MAX,
            _ => row.two_shot_to,
        };
        let in_lines = |bytes: usize| bytes >= row.lines_from && self.crowd == 1;
        let form = match question.travelling() {
            bytes if bytes >= row.direct_from && can(Form::Direct) => Form::Direct,
            bytes if in_lines(bytes) && bytes <= row.one_shot_lines_to && can(Form::OneShotLines) => {
                Form::OneShotLines
            }
            bytes if in_lines(bytes) && bytes <= row.two_shot_lines_to && can(Form::TwoShotLines) => {
                Form::TwoShotLines
            }
            bytes if bytes <= row.one_shot_to && can(Form::OneShot) => Form::OneShot,
            bytes if bytes <= two_shot_to && can(Form::TwoShot) => Form::TwoShot,
            // Packets are the quickest, and have no room.
            bytes if bytes <= packets_to && row.direct_from != usize::MAX && can(Form::Direct) => {
                Form::Direct
            }
            bytes if bytes >= row.engine_from && can(Form::Engine) => Form::Engine,
            bytes if bytes >= ring_from && can(Form::Ring) => Form::Ring,
            _ if self.ranks == 1 => Form::OneShot,
            _ => Form::Bulk,
        };
        self.grid(Wish { form, blocks: 0, tile: 0 }, question)
    }

    /// The most bytes of elements of `size` that one kernel of a quantised all-reduce takes, in whole groups.
    pub const fn most_quantised(&self, size: usize) -> usize {
        match self.ranks {
            1 => usize::MAX - (usize::MAX % (GROUP * size)),
            _ => self.layout().quantised_capacity(size)[1],
        }
    }

    /// The form and grid of an all-reduce of rows of 16-bit elements with what follows it in one kernel; the grid is a multiple of
    /// [`TEAM_BLOCKS`]. `None` where packets have no room: an all-reduce then, and the rest in a kernel behind it.
    pub fn decide_rows(&self, rows: usize, hidden: usize) -> Option<Launch> {
        let sum = Question {
            kind: Kind::AllReduce { op: ReduceOp::Sum },
            // As much as packets carry: every row begins a new one.
            bytes: rows * hidden.div_ceil(UNIT) * UNIT * 2,
            size: 2,
            is_reachable: false,
        };
        let forced = self.forced.filter(|wish| self.can(wish.form, &sum));
        let form = match forced {
            Some(wish) => wish.form,
            None if sum.bytes <= self.table.row(sum.kind).one_shot_to && self.can(Form::OneShot, &sum) => {
                Form::OneShot
            }
            None if self.can(Form::TwoShot, &sum) => Form::TwoShot,
            None if self.ranks == 1 => Form::OneShot,
            None => return None,
        };
        matches!(form, Form::OneShot | Form::TwoShot)
            .then(|| self.rows_grid(form, rows, forced.map_or(0, |wish| wish.blocks)))
    }

    /// The most rows that fit into packets, and the grid for them.
    pub fn two_shot_rows(&self, hidden: usize) -> (usize, Launch) {
        let rows = self.layout().two_shot_capacity(2) / (hidden.div_ceil(UNIT) * UNIT * 2);
        (rows, self.rows_grid(Form::TwoShot, rows, 0))
    }

    /// The most blocks that one kernel of a rank may have, whatever is asked for.
    fn room(&self) -> usize {
        if self.crowd > 1 { (CROWDED_BLOCKS / self.crowd).max(1) } else { MAX_BLOCKS }
    }

    fn rows_grid(&self, form: Form, rows: usize, asked: u32) -> Launch {
        let most = if asked == 0 { self.most_blocks } else { asked } as usize;
        let most_teams = (most.min(self.room()) / TEAM_BLOCKS as usize).clamp(1, MAX_TEAMS);
        let teams = rows.clamp(1, most_teams) as u32;
        Launch { form, blocks: teams * TEAM_BLOCKS, threads: TEAM_THREADS, tile: 0, by_copies: false }
    }

    /// The grid of messages in so many lanes (a peer and a direction each), the largest of `bytes`; `blocks` are those of a lane. Each
    /// rank's own: ranks need not have the same.
    pub fn messages(&self, lanes: usize, bytes: usize) -> Launch {
        let room = self.room();
        let most = (self.most_blocks as usize).min(room);
        if bytes <= self.layout().message_packets_to() {
            // A packet for each thread, while there are blocks; and a warp for the header.
            let packets = bytes.div_ceil(PACKET_DATA).max(1);
            let (all, due) = match self.forced {
                Some(wish) if wish.blocks > 0 => ((wish.blocks as usize).min(room), usize::MAX),
                _ => (most, packets.div_ceil(MESSAGE_SHARE)),
            };
            let blocks = due.min(all / lanes.max(1)).clamp(1, MESSAGE_CHANNELS);
            let threads = packets.div_ceil(blocks).min(PACKET_MOVERS).next_multiple_of(32) as u32 + 32;
            return Launch { form: Form::OneShot, blocks: blocks as u32, threads, tile: 0, by_copies: false };
        }
        let (all, is_paired) = match self.forced {
            Some(wish) if wish.blocks > 0 => ((wish.blocks as usize).min(room), wish.tile > 0),
            _ if self.bulk_copies && !self.is_narrow() => (most.div_ceil(2).min(WIDE_BLOCKS), false),
            _ => (most, false),
        };
        let blocks = (all / lanes.max(1)).min(MESSAGE_CHANNELS);
        let by_copies = self.bulk_copies && (all <= WIDE_BLOCKS || is_paired) && blocks > 0;
        // Chunks of half the size are the faster ones, where there are enough blocks.
        let is_whole = all <= WIDE_BLOCKS / 2;
        let threads = match blocks {
            // Four of them fit where one is counted.
            0 => 256,
            _ if by_copies && is_whole => WHOLE_THREADS,
            _ if by_copies => PAIRED_THREADS,
            _ => 512,
        };
        Launch { form: Form::Bulk, blocks: blocks.max(1) as u32, threads, tile: 0, by_copies }
    }

    fn grid(&self, wish: Wish, question: &Question) -> Launch {
        let form = wish.form;
        let row = self.table.row(question.kind);
        let layout = self.layout();
        let ranks = self.ranks;
        // Blocks of the pipeline that work on one channel together, and into how many shards they divide what a call has.
        let (team, shards) = match question.kind {
            Kind::AllReduce { .. } | Kind::Broadcast { .. } | Kind::Reduce { .. } => (3, ranks),
            Kind::AllReduceQuantised => (1, ranks),
            _ => (2, 1),
        };
        let shard = question.bytes.div_ceil(shards);
        let room = self.room();
        let most = (self.most_blocks as usize).min(room);
        // Of those that take a multiprocessor each.
        let whole = if self.is_narrow() { most } else { most.div_ceil(2) };
        let blocks = |usual: usize, most: usize| match wish.blocks {
            0 => usual.clamp(1, most),
            asked => (asked as usize).min(room),
        };
        // More of them share a multiprocessor, two by two.
        let by_copies =
            |blocks: usize, is_paired: bool| self.bulk_copies && (blocks <= WIDE_BLOCKS || is_paired);
        // The most of a form with tiles that goes by threads, unless that leaves so few that it goes by copies.
        let fits = |usual: usize| match by_copies(usual.min(most), false) && !self.is_narrow() {
            true => most.min(self.most_blocks.div_ceil(2) as usize),
            false => most,
        };
        // Tiles of at most so many vectors as there is room for, in whole lines of 128 bytes.
        let tiled = |(blocks, by_copies): (usize, bool), tile: usize, room: usize| {
            let tile = if wish.tile == 0 { tile } else { wish.tile as usize };
            let tile = tile.next_multiple_of(8).min(room - room % 8).max(8) as u32;
            let threads = match by_copies {
                true if blocks <= WIDE_BLOCKS && (wish.blocks > 0 || blocks <= whole) => WHOLE_THREADS,
                true => PAIRED_THREADS,
                false => 512,
            };
            Launch { form, blocks: blocks as u32, threads, tile, by_copies }
        };
        let plain = |blocks: usize, threads: usize| {
            let (blocks, threads) = (blocks as u32, threads as u32);
            Launch { form, blocks, threads, tile: 0, by_copies: false }
        };
        let threads = 512;
        match form {
            Form::OneShot | Form::TwoShot | Form::OneShotLines | Form::TwoShotLines => {
                let units = match (question.kind, form) {
                    (Kind::AllReduceQuantised, Form::OneShot) => question.groups(1) * GROUP_THREADS,
                    (Kind::AllReduceQuantised, _) => question.groups(ranks) * GROUP_THREADS,
                    (_, Form::OneShot) => question.bytes.div_ceil(PACKET_DATA),
                    (_, Form::OneShotLines) => question.bytes.div_ceil(UNIT_DATA) * UNIT_LANES,
                    (_, Form::TwoShotLines) => shard.div_ceil(UNIT_DATA) * UNIT_LANES,
                    _ => shard.div_ceil(PACKET_DATA),
                };
                // Who is alone waits for nobody.
                let most = if ranks == 1 { MAX_BLOCKS } else { whole.min(row.packet_blocks) };
                // One multiprocessor stores no more than some 45 GB/s to peers: as many blocks as there may be, of a few warps at least.
                let least = least_threads(ranks);
                let blocks = blocks(units.div_ceil(least), most);
                let threads = units.div_ceil(blocks).next_multiple_of(32).clamp(least, 512);
                plain(blocks, threads)
            }
            Form::Direct => {
                plain(blocks(shard.div_ceil(16 * threads), whole.min(row.direct_blocks)), threads)
            }
            Form::Bulk => {
                let goes_by_copies = self.bulk_copies && question.bytes > row.threads_to;
                let usual = if goes_by_copies { row.bulk_blocks } else { row.thread_blocks };
                // Channels of a scatter and of an all-to-all serve one peer each.
                let lanes =
                    if matches!(question.kind, Kind::Scatter { .. } | Kind::AllToAll) { ranks } else { 1 };
                let usual = usual.min(team * lanes * shard.div_ceil(16 * threads));
                let most = match goes_by_copies {
                    true if usual <= WIDE_BLOCKS => whole,
                    true => most,
                    false => fits(usual),
                };
                let channels = (blocks(usual, most) / team).max(1);
                let blocks = channels * team;
                let is_paired = if wish.blocks > 0 { wish.tile > 0 } else { goes_by_copies };
                let by_copies = by_copies(blocks, is_paired);
                let due = shard.div_ceil(16).div_ceil((channels / lanes).max(1));
                // By copies, some rounds at least, so that the steps overlap.
                let tile = match by_copies {
                    false => due,
                    true if blocks <= WIDE_BLOCKS / 2 => due.div_ceil(2).min(2 * row.bulk_tile),
                    true => due.div_ceil(2).min(row.bulk_tile),
                };
                // Those of one peer have the room of all.
                let sources = if channels < lanes { 1 } else { lanes };
                tiled((blocks, by_copies), tile, sources * layout.area_bytes() / 16 / channels)
            }
            Form::Ring => {
                let blocks = blocks(row.ring_blocks, fits(row.ring_blocks));
                let part =
                    if matches!(question.kind, Kind::AllReduce { .. }) { shard } else { question.bytes };
                let due = part.div_ceil(16).div_ceil(blocks);
                let by_copies = by_copies(blocks, wish.tile > 0);
                let usual = if by_copies { 2400 } else { 4096 };
                let room = layout.scratch_half_bytes() / RING_SLOTS / 16 / blocks;
                tiled((blocks, by_copies), due.min(usual), room)
            }
            Form::Engine => {
                let lanes = self.lanes().unwrap_or(1);
                // As large as there is room for: each costs the same.
                let asked = if wish.tile == 0 { usize::MAX } else { wish.tile as usize };
                let most = asked.min(slot_bytes(&layout, lanes) / 16);
                let vectors = question.bytes.div_ceil(16);
                // As many in each lane, of one size, in whole lines of 128 bytes.
                let chunks = vectors.div_ceil(most).next_multiple_of(lanes).max(1);
                let chunk = vectors.div_ceil(chunks).next_multiple_of(8).max(8);
                Launch { tile: chunk as u32, ..plain(lanes, threads) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::layout::MAX_RANKS;

    fn rules(ranks: usize) -> Rules {
        Rules {
            ranks,
            link: Link::Device,
            crowd: 1,
            order: Order::Fixed,
            bulk_copies: true,
            most_blocks: MAX_BLOCKS as u32,
            engines: true,
            forced: None,
            table: Table::built_in(ranks),
        }
    }

    fn question(bytes: usize) -> Question {
        Question { kind: Kind::AllReduce { op: ReduceOp::Sum }, bytes, size: 2, is_reachable: false }
    }

    #[test]
    fn forms_change_with_the_size_and_never_need_more_room_than_there_is() {
        for ranks in [1, 2, 3, 5, 8, 16] {
            for (link, bulk_copies, most_blocks) in [
                (Link::Device, true, MAX_BLOCKS as u32),
                (Link::Device, true, 24),
                (Link::Device, false, MAX_BLOCKS as u32),
                (Link::Device, false, 8),
                (Link::Host, false, MAX_BLOCKS as u32),
            ] {
                let rules = Rules { link, bulk_copies, most_blocks, ..rules(ranks) };
                let layout = rules.layout();
                for shift in 0..36 {
                    let more = [Kind::AllGatherV, Kind::ReduceScatterV { op: ReduceOp::Sum }];
                    for kind in Kind::EQUAL_PARTS.into_iter().chain(more) {
                        let question = Question { kind, ..question((1 << shift) + 1) };
                        let launch = rules.decide(&question);
                        assert!(rules.can(launch.form, &question), "{question:?}");
                        let most_blocks = if ranks == 1 { MAX_BLOCKS as u32 } else { most_blocks };
                        assert!((1..=most_blocks).contains(&launch.blocks), "{question:?} {launch:?}");
                        // What copies in bulk takes no more than half of the multiprocessors.
                        assert!(!launch.by_copies || launch.multiprocessors() <= 65, "{launch:?}");
                        assert!(bulk_copies || !launch.by_copies);
                        let tiles = launch.blocks as usize * launch.tile as usize * 16;
                        let team = match kind {
                            Kind::AllReduce { .. } | Kind::Broadcast { .. } | Kind::Reduce { .. } => 3,
                            _ => 2,
                        };
                        match launch.form {
                            Form::Bulk => {
                                assert!(launch.tile.is_multiple_of(8) && launch.tile > 0);
                                let serves_one = matches!(kind, Kind::Scatter { .. } | Kind::AllToAll)
                                    && launch.blocks as usize / team >= ranks;
                                let sources = if serves_one { ranks } else { 1 };
                                assert!(tiles / team <= sources * layout.area_bytes());
                            }
                            Form::Ring => {
                                assert!(launch.tile.is_multiple_of(8) && launch.tile > 0);
                                assert!(tiles * RING_SLOTS <= layout.scratch_half_bytes());
                            }
                            Form::Engine => {
                                assert!(launch.tile.is_multiple_of(8) && launch.tile > 0);
                                assert!(
                                    launch.tile as usize * 16 <= slot_bytes(&layout, launch.blocks as usize)
                                );
                            }
                            _ => assert_eq!(launch.tile, 0),
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_lane_of_messages_has_a_block_and_all_of_them_fit() {
        for (most_blocks, crowd) in [(130, 1), (24, 1), (8, 1), (130, 16), (130, 2)] {
            let rules = Rules { most_blocks, crowd, ..rules(16) };
            for lanes in 1..=31 {
                let packets_to = rules.layout().message_packets_to();
                for bytes in [0, 1, packets_to, packets_to + 1, 1 << 33] {
                    let launch = rules.messages(lanes, bytes);
                    assert!((1..=MESSAGE_CHANNELS as u32).contains(&launch.blocks), "{launch:?}");
                    let whole = (most_blocks as usize).min(CROWDED_BLOCKS / crowd).max(1);
                    let all = lanes * launch.blocks as usize;
                    // As many threads as one block of a multiprocessor may have, for each that is counted.
                    let least = if bytes <= packets_to { 512 } else { 256 };
                    assert!(all * launch.threads as usize <= (whole * 1024).max(lanes * least), "{launch:?}");
                    assert!(!launch.by_copies || (all <= WIDE_BLOCKS && launch.threads >= PAIRED_THREADS));
                }
            }
        }
        let ring = rules(8).messages(2, 1 << 30);
        assert_eq!((ring.blocks, ring.by_copies), (32, true));
        let small = |bytes: usize| (rules(8).messages(2, bytes).blocks, rules(8).messages(2, bytes).threads);
        assert_eq!([0, 8192, 64 << 10, 1 << 20].map(small), [(1, 64), (4, 224), (32, 224), (32, 512)]);
    }

    #[test]
    fn lines_serve_where_they_are_whole_and_have_room() {
        let sum = |bytes| question(bytes);
        let of = |kind, bytes| Question { kind, ..question(bytes) };
        let form = |rules: &Rules, question: &Question| rules.decide(question).form;
        let rules = |ranks| Rules { most_blocks: 130, ..rules(ranks) };
        assert_eq!(form(&rules(8), &sum(8 << 20)), Form::TwoShotLines);
        assert_eq!(form(&rules(4), &sum(256 << 10)), Form::OneShotLines);
        assert_eq!(form(&rules(4), &of(Kind::AllGather, 2 << 20)), Form::OneShotLines);
        assert_eq!(form(&rules(8), &of(Kind::AllToAll, 256 << 10)), Form::OneShotLines);
        for barred in [
            Rules { bulk_copies: false, ..rules(4) },
            Rules { link: Link::Host, bulk_copies: false, ..rules(4) },
            Rules { ranks: 1, ..rules(4) },
        ] {
            assert!(!barred.have_lines());
            for wish in [None, "one-shot-lines".parse().ok(), "two-shot-lines".parse().ok()] {
                for bytes in [8, 512 << 10, 4 << 20] {
                    assert!(!form(&Rules { forced: wish, ..barred }, &sum(bytes)).is_lines());
                }
            }
        }
        // Between ranks of one device, for who asks.
        let crowded = Rules { crowd: 2, ..rules(4) };
        assert_eq!(form(&crowded, &sum(512 << 10)), Form::TwoShot);
        for (text, form) in [("one-shot-lines", Form::OneShotLines), ("two-shot-lines", Form::TwoShotLines)] {
            let asked = Rules { forced: text.parse().ok(), ..crowded };
            assert_eq!(asked.decide(&sum(1)).form, form);
            // A half-warp moves 240 bytes.
            let asked = Rules { forced: text.parse().ok(), ..rules(2) };
            let launch = asked.decide(&sum(480 * 1024));
            let units = if form == Form::OneShotLines { 2048 } else { 1024 };
            assert_eq!((launch.form, launch.blocks * launch.threads), (form, units * 16), "{launch:?}");
            assert!(!form.serves(Kind::AllReduceQuantised) && asked.decide_rows(1, 64).is_none());
        }
        for ranks in 2..=MAX_RANKS {
            for size in [1, 8, 16] {
                let [one, two, of_reduce] = rules(ranks).layout().lines_capacity(size);
                let reduce = Kind::Reduce { op: ReduceOp::Sum, root: 0 };
                for (kind, form, bytes) in [
                    (sum(0).kind, Form::OneShotLines, one),
                    (sum(0).kind, Form::TwoShotLines, two),
                    (reduce, Form::TwoShotLines, of_reduce),
                ] {
                    let asked = Rules { forced: form.name().parse().ok(), ..rules(ranks) };
                    assert_eq!(asked.decide(&Question { size, kind, ..sum(bytes) }).form, form);
                    assert_ne!(asked.decide(&Question { size, kind, ..sum(bytes + 1) }).form, form);
                }
            }
        }
    }

    #[test]
    fn strict_rank_order_takes_no_ring_and_what_was_asked_for_is_taken_where_it_can_serve() {
        let large = question(1 << 30);
        assert_eq!(rules(8).decide(&large).form, Form::Ring);
        assert_eq!(Rules { order: Order::Rank, ..rules(8) }.decide(&large).form, Form::Bulk);
        let wish = |text: &str| Some(text.parse().unwrap());
        let asked = Rules { forced: wish("two-shot:7"), ..rules(8) };
        let small = asked.decide(&question(4096));
        assert_eq!((small.form, small.blocks), (Form::TwoShot, 7));
        assert_eq!(asked.decide(&large).form, Form::Ring);
        assert_eq!(
            Rules { order: Order::Rank, forced: wish("ring"), ..rules(8) }.decide(&large).form,
            Form::Bulk
        );
    }

    #[test]
    fn copy_engines_serve_large_calls_of_devices_that_each_rank_has_for_itself() {
        let form = |rules: Rules, kind, bytes| {
            rules.decide(&Question { kind, bytes, size: 2, is_reachable: false }).form
        };
        let (all, root) = (Kind::AllGather, Kind::Broadcast { root: 1 });
        // Nobody has measured them to win anywhere yet; a table may say so.
        assert_eq!((form(rules(4), all, 4 << 30), rules(4).lanes()), (Form::Ring, None));
        let told = |rules: Rules| {
            let mut rules = rules;
            for kind in [all, root] {
                rules.table.row_mut(kind).engine_from = 64 << 20;
            }
            rules
        };
        for kind in [all, root] {
            assert_eq!(form(told(rules(4)), kind, 64 << 20), Form::Engine, "{kind:?}");
            assert_eq!(form(told(rules(4)), kind, (64 << 20) - 1), Form::Ring, "{kind:?}");
        }
        assert_eq!(told(rules(4)).lanes(), Some(2));
        let forced = "engine".parse().ok();
        for barred in [
            Rules { crowd: 2, ..rules(4) },
            Rules { link: Link::Host, ..rules(4) },
            Rules { ranks: 1, ..rules(4) },
        ] {
            assert_ne!(form(told(barred), all, 1 << 30), Form::Engine);
            assert_ne!(form(Rules { forced, ..barred }, all, 1 << 30), Form::Engine);
            assert_eq!(Rules { forced, ..barred }.lanes(), None);
        }
        // Where a thread drives several ranks, or communicators share a device, they serve whom asks for them.
        for shy in [Rules { engines: false, ..rules(4) }, Rules { most_blocks: 24, ..rules(4) }] {
            assert_eq!((form(told(shy), all, 1 << 30), told(shy).lanes()), (Form::Ring, None));
            assert_eq!(form(Rules { forced, ..shy }, all, 1), Form::Engine);
        }
        for (text, lanes, chunk) in
            [("engine", 2, 12 << 20), ("engine:2:64", 2, 1024), ("engine:99", 8, 3 << 20)]
        {
            let asked = Rules { forced: text.parse().ok(), ..rules(4) };
            let launch = asked.decide(&Question { kind: all, bytes: 96 << 20, size: 2, is_reachable: false });
            assert_eq!((launch.blocks, launch.tile * 16), (lanes, chunk), "{text}");
        }
    }

    #[test]
    fn rows_go_in_packets_as_long_as_these_have_room() {
        let form = |rules: &Rules, rows, hidden| rules.decide_rows(rows, hidden).map(|launch| launch.form);
        for rows in 1..=128 {
            let launch = rules(8).decide_rows(rows, 8192).unwrap();
            assert_eq!(launch.form, if rows <= 6 { Form::OneShot } else { Form::TwoShot });
            assert_eq!(launch.blocks as usize, 8 * rows.min(16));
        }
        assert_eq!(form(&rules(8), 1000, 8192), None);
        assert_eq!(form(&rules(1), 100_000, 8192), Some(Form::OneShot));
        assert_eq!(rules(1).decide_rows(100_000, 8).unwrap().blocks, 128);
        let asked = |text: &str| Rules { forced: text.parse().ok(), ..rules(4) };
        assert_eq!(form(&asked("two-shot"), 1, 8), Some(Form::TwoShot));
        assert_eq!(form(&asked("bulk"), 1, 8), None);
        assert_eq!(asked("one-shot:17").decide_rows(5, 1024).unwrap().blocks, 16);
        for ranks in 2..=MAX_RANKS {
            for link in [Link::Device, Link::Host] {
                let rules = Rules { link, most_blocks: 3, ..rules(ranks) };
                for hidden in [8, 7168, crate::fused::MAX_HIDDEN] {
                    let (rows, launch) = rules.two_shot_rows(hidden);
                    assert!(rows > 0 && launch.blocks == 8);
                    let units = (rows * hidden.div_ceil(UNIT)).div_ceil(ranks) * ranks;
                    let half = rules.layout().two_shot_capacity(2) / ranks / 12 * ranks;
                    assert!(units <= half, "{units} {half}");
                }
            }
        }
    }

    #[test]
    fn quantised_sums_travel_in_packets_whatever_their_size() {
        for ranks in [1, 2, 3, 5, 8, MAX_RANKS] {
            for link in [Link::Device, Link::Host] {
                let rules = Rules { link, ..rules(ranks) };
                let packet = rules.layout().packet_bytes();
                let half = rules.layout().definitions();
                let half = half.split("#define HALF_BYTES ").nth(1).unwrap().split("ull").next().unwrap();
                let half: usize = half.parse().unwrap();
                for bytes in (0..40).map(|shift| (1usize << shift) + 4) {
                    let question = Question { kind: Kind::AllReduceQuantised, size: 4, ..question(bytes) };
                    let launch = rules.decide(&question);
                    let part = bytes.min(rules.most_quantised(4));
                    let groups = part.div_ceil(4 * GROUP);
                    // What the kernels of these forms write.
                    let written = match launch.form {
                        _ if ranks == 1 => 0,
                        Form::OneShot => ranks * groups * 11 * packet,
                        Form::TwoShot => 2 * ranks * groups.div_ceil(ranks) * 11 * packet,
                        other => panic!("{other} has no kernel"),
                    };
                    assert!(written <= half, "{question:?} {launch:?}: {written} of {half}");
                    let room = (launch.blocks * launch.threads) as usize;
                    assert!(launch.blocks >= 1 && launch.threads.is_multiple_of(32) && room >= 32);
                }
                assert!(rules.most_quantised(2).is_multiple_of(2 * GROUP) && rules.most_quantised(2) > 0);
            }
        }
        let form = |rules: &Rules, bytes| {
            rules.decide(&Question { kind: Kind::AllReduceQuantised, ..question(bytes) }).form
        };
        // 132 bytes travel for 256.
        assert_eq!((form(&rules(8), 200 << 10), form(&rules(8), 300 << 10)), (Form::OneShot, Form::TwoShot));
        let asked = Rules { forced: "two-shot".parse().ok(), ..rules(4) };
        assert_eq!((form(&asked, 8), form(&rules(4), 8)), (Form::TwoShot, Form::OneShot));
    }

    #[test]
    fn a_wish_reads_as_it_is_written() {
        for (text, wish) in [
            ("ring", Wish { form: Form::Ring, blocks: 0, tile: 0 }),
            ("bulk:24", Wish { form: Form::Bulk, blocks: 24, tile: 0 }),
            ("one-shot:3:0", Wish { form: Form::OneShot, blocks: 3, tile: 0 }),
            ("bulk:24:512", Wish { form: Form::Bulk, blocks: 24, tile: 512 }),
        ] {
            assert_eq!(text.parse(), Ok(wish));
            assert_eq!(wish.to_string().parse(), Ok(wish));
        }
        for text in ["", "bulb", "bulk:", "bulk:x", "bulk:1:2:3", "bulk:-1"] {
            assert_eq!(text.parse::<Wish>(), Err(NotAWish), "{text}");
        }
        let launch = Rules { forced: "bulk:25:100".parse().ok(), ..rules(8) }.decide(&question(64 << 20));
        assert_eq!((launch.form, launch.blocks, launch.tile), (Form::Bulk, 24, 104));
    }
}
