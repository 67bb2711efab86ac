//! Which form a call takes on the GPU, and with which grid: a pure function of values that are equal on all ranks.

use std::fmt;
use std::str::FromStr;

use super::layout::{ArenaLayout, Link, MAX_BLOCKS, RING_SLOTS};
use crate::call::Kind;
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
}

impl Form {
    /// Every form.
    pub const ALL: [Self; 5] = [Self::OneShot, Self::TwoShot, Self::Bulk, Self::Direct, Self::Ring];

    /// Whether there are kernels of this form for an operation.
    pub const fn serves(self, kind: Kind) -> bool {
        match self {
            Self::OneShot | Self::Bulk => true,
            Self::TwoShot => matches!(kind, Kind::AllReduce { .. } | Kind::Broadcast { .. }),
            Self::Direct => {
                matches!(kind, Kind::AllReduce { .. } | Kind::Broadcast { .. } | Kind::AllGather)
            }
            Self::Ring => matches!(
                kind,
                Kind::AllReduce { .. }
                    | Kind::Broadcast { .. }
                    | Kind::AllGather
                    | Kind::Reduce { .. }
                    | Kind::ReduceScatter { .. }
            ),
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
    /// Blocks that move data.
    pub blocks: u32,
    /// Vectors of 16 bytes in a tile, of forms that have tiles.
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
/// The most blocks for which bulk copies move data, and what the pipeline takes where there is no need to save. Each takes a
/// multiprocessor, so these are half of an H200, as are twice as many that move data by their threads.
const WIDE_BLOCKS: usize = 64;

/// A form and its grid.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Launch {
    /// The form.
    pub form: Form,
    /// Blocks that move data.
    pub blocks: u32,
    /// Threads of each block.
    pub threads: u32,
    /// Vectors of 16 bytes that a block moves in one round; 0 where there are no rounds.
    pub tile: u32,
    /// Whether bulk copies move the data, and threads only fold it.
    pub by_copies: bool,
}

/// What the choice depends on.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// The operation.
    pub kind: Kind,
    /// Bytes of one part.
    pub bytes: usize,
    /// Bytes of one element.
    pub size: usize,
    /// Whether all buffers lie where all ranks reach them.
    pub is_reachable: bool,
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
    /// Whether the devices have bulk copies that run on their own: then few blocks nearly fill the links.
    pub bulk_copies: bool,
    /// Blocks that this communicator may have wait on a device at once, unless more are asked for. Few ([below 64](Self::is_narrow)) may
    /// take a multiprocessor each; of more, two share one, and those that need one take half as many.
    pub most_blocks: u32,
    /// What was asked for.
    pub forced: Option<Wish>,
}

/// Where forms change, in bytes of a part.
struct Borders {
    one_shot_to: usize,
    two_shot_to: usize,
    ring_from: usize,
}

impl Rules {
    const fn layout(&self) -> ArenaLayout {
        ArenaLayout::new(self.ranks, self.link)
    }

    /// Whether the communicator shares its devices with others of this process, and may have few blocks there.
    pub const fn is_narrow(&self) -> bool {
        (self.most_blocks as usize) < WIDE_BLOCKS
    }

    fn borders(&self, kind: Kind) -> Borders {
        // Measured on 2 and 4 × H200 (`gpu_sweep`), and thought on from there: with more ranks one-shot sends more, and a ring takes
        // more hops. Where there are few blocks, a ring is no faster than the pipeline.
        let one_shot_to = ((768 << 10) / self.ranks.saturating_sub(1).max(1)).min(512 << 10);
        let is_narrow = self.is_narrow();
        let ring_from = match (kind, self.ranks) {
            (_, 0..=2) => 2 << 20,
            (Kind::Broadcast { .. } | Kind::Reduce { .. }, 3..=4) => 2 << 20,
            (Kind::Broadcast { .. } | Kind::Reduce { .. }, _) => 4 << 20,
            (Kind::AllGather, _) => 8 << 20,
            (Kind::ReduceScatter { .. }, ranks) => (64 << 20) / ranks,
            _ if is_narrow => usize::MAX,
            (_, 3..=4) => 16 << 20,
            _ => 96 << 20,
        };
        match kind {
            Kind::AllGather => {
                // Every byte of a part goes to all in any case.
                let one_shot_to = if self.ranks <= 4 { 1 << 20 } else { 512 << 10 };
                Borders { one_shot_to, two_shot_to: 0, ring_from }
            }
            Kind::AllReduce { .. } | Kind::Broadcast { .. } => {
                Borders { one_shot_to, two_shot_to: 2 << 20, ring_from }
            }
            // All of it goes to one rank.
            Kind::Reduce { .. } => {
                let one_shot_to = if self.ranks <= 4 { 1 << 20 } else { 512 << 10 };
                Borders { one_shot_to, two_shot_to: 0, ring_from }
            }
            // A hop moves a part to each peer, or all to one.
            _ => Borders { one_shot_to: 256 << 10, two_shot_to: 0, ring_from },
        }
    }

    /// Whether `form` can serve the call.
    fn can(&self, form: Form, question: &Question) -> bool {
        if !form.serves(question.kind) {
            return false;
        }
        let layout = self.layout();
        match form {
            // Who is alone keeps everything where it is.
            Form::OneShot => self.ranks == 1 || question.bytes <= layout.one_shot_capacity(question.size),
            Form::TwoShot => self.ranks > 1 && question.bytes <= layout.two_shot_capacity(question.size),
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
        }
    }

    /// The form and grid of a call that moves data.
    pub fn decide(&self, question: &Question) -> Launch {
        if let Some(wish) = self.forced
            && self.can(wish.form, question)
        {
            return self.grid(wish, question);
        }
        let borders = self.borders(question.kind);
        let form = match question.bytes {
            bytes if bytes <= borders.one_shot_to && self.can(Form::OneShot, question) => Form::OneShot,
            bytes if bytes <= borders.two_shot_to && self.can(Form::TwoShot, question) => Form::TwoShot,
            _ if self.can(Form::Direct, question) => Form::Direct,
            bytes if bytes >= borders.ring_from && self.can(Form::Ring, question) => Form::Ring,
            _ if self.ranks == 1 => Form::OneShot,
            _ => Form::Bulk,
        };
        self.grid(Wish { form, blocks: 0, tile: 0 }, question)
    }

    fn grid(&self, wish: Wish, question: &Question) -> Launch {
        let form = wish.form;
        let layout = self.layout();
        let ranks = self.ranks;
        // Blocks of the pipeline that work on one channel together, and into how many shards they divide what a call has.
        let (team, shards) = match question.kind {
            Kind::AllReduce { .. } | Kind::Broadcast { .. } | Kind::Reduce { .. } => (3, ranks),
            _ => (2, 1),
        };
        let shard = question.bytes.div_ceil(shards);
        let room = if self.crowd > 1 { (CROWDED_BLOCKS / self.crowd).max(1) } else { MAX_BLOCKS };
        let most = (self.most_blocks as usize).min(room);
        // Of those that take a multiprocessor each.
        let whole = if self.is_narrow() { most } else { most.div_ceil(2) };
        let blocks = |usual: usize, most: usize| match wish.blocks {
            0 => usual.clamp(1, most),
            asked => (asked as usize).min(room),
        };
        let by_copies = |blocks: usize| self.bulk_copies && blocks <= WIDE_BLOCKS;
        // Tiles of at most so many vectors as there is room for, in whole lines of 128 bytes.
        let tiled = |blocks: usize, tile: usize, room: usize| {
            let tile = if wish.tile == 0 { tile } else { wish.tile as usize };
            let tile = tile.next_multiple_of(8).min(room - room % 8).max(8) as u32;
            let by_copies = by_copies(blocks);
            let threads = if by_copies { 1024 } else { 512 };
            Launch { form, blocks: blocks as u32, threads, tile, by_copies }
        };
        let plain = |blocks: usize, threads: usize| {
            let (blocks, threads) = (blocks as u32, threads as u32);
            Launch { form, blocks, threads, tile: 0, by_copies: false }
        };
        let threads = 512;
        match form {
            Form::OneShot | Form::TwoShot => {
                let units = if form == Form::OneShot { question.bytes } else { shard }.div_ceil(12);
                // One unit for each thread while that takes few blocks.
                let threads = units.next_multiple_of(32).clamp(256, 512);
                // Who is alone waits for nobody.
                let most = if ranks == 1 { MAX_BLOCKS } else { whole.min(WIDE_BLOCKS) };
                plain(blocks(units.div_ceil(threads), most), threads)
            }
            Form::Direct => plain(blocks(shard.div_ceil(16 * threads), whole.min(WIDE_BLOCKS)), threads),
            Form::Bulk => {
                let usual = if self.bulk_copies { WIDE_BLOCKS } else { 120 };
                let usual = usual.min(team * shard.div_ceil(16 * threads));
                let most = if self.bulk_copies { whole } else { most };
                let channels = (blocks(usual, most) / team).max(1);
                let blocks = channels * team;
                let due = shard.div_ceil(16).div_ceil(channels);
                // By copies, some rounds at least, so that the steps overlap.
                let tile = match by_copies(blocks) {
                    false => due,
                    true if blocks <= WIDE_BLOCKS / 2 => due.div_ceil(2).min(1600),
                    true => due.div_ceil(2).min(800),
                };
                tiled(blocks, tile, layout.area_bytes() / 16 / channels)
            }
            Form::Ring => {
                let blocks = blocks(128, most);
                let part =
                    if matches!(question.kind, Kind::AllReduce { .. }) { shard } else { question.bytes };
                let due = part.div_ceil(16).div_ceil(blocks);
                let usual = if by_copies(blocks) { 2400 } else { 4096 };
                tiled(blocks, due.min(usual), layout.scratch_half_bytes() / RING_SLOTS / 16 / blocks)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(ranks: usize) -> Rules {
        Rules {
            ranks,
            link: Link::Device,
            crowd: 1,
            order: Order::Fixed,
            bulk_copies: true,
            most_blocks: MAX_BLOCKS as u32,
            forced: None,
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
                    for kind in Kind::EQUAL_PARTS {
                        let question = Question { kind, ..question((1 << shift) + 1) };
                        let launch = rules.decide(&question);
                        assert!(rules.can(launch.form, &question), "{question:?}");
                        let most_blocks = if ranks == 1 { MAX_BLOCKS as u32 } else { most_blocks };
                        assert!((1..=most_blocks).contains(&launch.blocks), "{question:?} {launch:?}");
                        // What takes a multiprocessor each takes no more than half of them.
                        assert!(
                            ranks == 1 || launch.form == Form::Ring || !bulk_copies || launch.blocks <= 64
                        );
                        assert!(bulk_copies || !launch.by_copies);
                        let tiles = launch.blocks as usize * launch.tile as usize * 16;
                        let team = match kind {
                            Kind::AllReduce { .. } | Kind::Broadcast { .. } | Kind::Reduce { .. } => 3,
                            _ => 2,
                        };
                        match launch.form {
                            Form::Bulk => {
                                assert!(launch.tile.is_multiple_of(8) && launch.tile > 0);
                                assert!(tiles / team <= layout.area_bytes());
                            }
                            Form::Ring => {
                                assert!(launch.tile.is_multiple_of(8) && launch.tile > 0);
                                assert!(tiles * RING_SLOTS <= layout.scratch_half_bytes());
                            }
                            _ => assert_eq!(launch.tile, 0),
                        }
                    }
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
