//! Which form a call takes on the GPU, and with which grid: a pure function of values that are equal on all ranks.

use std::fmt;

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

/// Blocks of all ranks together that surely run at once on a device.
const CROWDED_BLOCKS: usize = 96;

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
    /// A form that was asked for, with blocks (0: as usual), taken where it can serve the call.
    pub forced: Option<(Form, u32)>,
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

    fn borders(&self, kind: Kind) -> Borders {
        // Measured on 2 × H200 (`gpu_sweep`); with more ranks one-shot sends more, and a ring takes more hops.
        let one_shot_to = (512 << 10) / self.ranks.saturating_sub(1).max(1);
        let ring_from = match self.ranks {
            0..=2 => 2 << 20,
            3 => 16 << 20,
            4 => 32 << 20,
            _ => 128 << 20,
        };
        match kind {
            Kind::AllGather => Borders { one_shot_to, two_shot_to: 0, ring_from },
            _ => Borders { one_shot_to, two_shot_to: 2 << 20, ring_from },
        }
    }

    /// Whether `form` can serve the call.
    fn can(&self, form: Form, question: &Question) -> bool {
        let layout = self.layout();
        match form {
            // Who is alone keeps everything where it is.
            Form::OneShot => self.ranks == 1 || question.bytes <= layout.one_shot_capacity(question.size),
            Form::TwoShot => {
                self.ranks > 1
                    && !matches!(question.kind, Kind::AllGather)
                    && question.bytes <= layout.two_shot_capacity(question.size)
            }
            Form::Bulk => self.ranks > 1,
            Form::Direct => self.ranks > 1 && question.is_reachable,
            Form::Ring => {
                // Of two ranks, either order gives the same bits; but a scaled input is rounded on its way.
                let is_scaled = matches!(question.kind.op(), Some(ReduceOp::PreMulSum(_)));
                let changes_order = (self.ranks > 2 || is_scaled)
                    && matches!(question.kind, Kind::AllReduce { .. })
                    && self.order == Order::Rank;
                self.ranks > 1 && !changes_order
            }
        }
    }

    /// The form and grid of a call that moves data.
    pub fn decide(&self, question: &Question) -> Launch {
        if let Some((form, blocks)) = self.forced
            && self.can(form, question)
        {
            return self.grid(form, blocks, question);
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
        self.grid(form, 0, question)
    }

    fn grid(&self, form: Form, blocks: u32, question: &Question) -> Launch {
        let layout = self.layout();
        let ranks = self.ranks;
        let shard = question.bytes.div_ceil(if matches!(question.kind, Kind::AllGather) { 1 } else { ranks });
        let most = if self.crowd > 1 { (CROWDED_BLOCKS / self.crowd).max(1) } else { MAX_BLOCKS };
        let as_asked = |usual: usize| match blocks {
            0 => usual.clamp(1, most) as u32,
            asked => asked.min(most as u32),
        };
        let threads = 512;
        let units = |bytes: usize| bytes.div_ceil(12);
        match form {
            Form::OneShot | Form::TwoShot => {
                let units = units(if form == Form::OneShot { question.bytes } else { shard });
                // One unit for each thread while that takes few blocks.
                let threads = units.next_multiple_of(32).clamp(256, 512);
                let usual = units.div_ceil(threads).min(if ranks == 1 { MAX_BLOCKS } else { 64 });
                let blocks = as_asked(usual);
                Launch { form, blocks, threads: threads as u32, tile: 0 }
            }
            Form::Direct => {
                let blocks = as_asked(shard.div_ceil(16 * threads).min(64));
                Launch { form, blocks, threads: threads as u32, tile: 0 }
            }
            Form::Bulk => {
                // Blocks that work on one channel together.
                let team = if matches!(question.kind, Kind::AllGather) { 2 } else { 3 };
                let channels = as_asked(team * shard.div_ceil(16 * threads).min(40)) as usize / team;
                let channels = channels.max(1);
                let blocks = (channels * team) as u32;
                let room = layout.area_bytes() / 16 / channels;
                let due = shard.div_ceil(16).div_ceil(channels);
                let tile = due.clamp(1, room);
                Launch { form, blocks, threads: threads as u32, tile: tile as u32 }
            }
            Form::Ring => {
                let blocks = as_asked(128);
                let room = layout.scratch_half_bytes() / RING_SLOTS / 16 / blocks as usize;
                let part =
                    if matches!(question.kind, Kind::AllReduce { .. }) { shard } else { question.bytes };
                let due = part.div_ceil(16).div_ceil(blocks as usize);
                let tile = due.clamp(1, room.min(4096));
                Launch { form, blocks, threads: threads as u32, tile: tile as u32 }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(ranks: usize) -> Rules {
        Rules { ranks, link: Link::Device, crowd: 1, order: Order::Fixed, forced: None }
    }

    fn question(bytes: usize) -> Question {
        Question { kind: Kind::AllReduce { op: ReduceOp::Sum }, bytes, size: 2, is_reachable: false }
    }

    #[test]
    fn forms_change_with_the_size_and_never_need_more_room_than_there_is() {
        for ranks in [1, 2, 3, 5, 8, 16] {
            for link in [Link::Device, Link::Host] {
                let rules = Rules { link, ..rules(ranks) };
                let layout = rules.layout();
                for shift in 0..36 {
                    for kind in
                        [Kind::AllReduce { op: ReduceOp::Sum }, Kind::Broadcast { root: 0 }, Kind::AllGather]
                    {
                        let question = Question { kind, ..question((1 << shift) + 1) };
                        let launch = rules.decide(&question);
                        assert!(rules.can(launch.form, &question), "{question:?}");
                        assert!((1..=MAX_BLOCKS as u32).contains(&launch.blocks));
                        let tiles = launch.blocks as usize * launch.tile as usize * 16;
                        let team = if kind == Kind::AllGather { 2 } else { 3 };
                        match launch.form {
                            Form::Bulk => {
                                assert!(launch.tile > 0 && tiles / team <= layout.area_bytes());
                            }
                            Form::Ring => {
                                assert!(launch.tile > 0);
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
        let asked = Rules { forced: Some((Form::TwoShot, 7)), ..rules(8) };
        let small = asked.decide(&question(4096));
        assert_eq!((small.form, small.blocks), (Form::TwoShot, 7));
        assert_eq!(asked.decide(&large).form, Form::Ring);
        assert_eq!(
            Rules { order: Order::Rank, forced: Some((Form::Ring, 0)), ..rules(8) }.decide(&large).form,
            Form::Bulk
        );
    }
}
