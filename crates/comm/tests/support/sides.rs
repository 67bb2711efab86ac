//! What a rank puts in and gets in a case: the parts of its input and of its output, where they lie and what they hold.

use unisono::{Counts, Kind};

use super::case::{Action, Case, MAX_GAP};
use super::random::Random;

/// What a part holds.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Content {
    /// What lay there before, which is nobody's input.
    Poison,
    /// Part `part` of what `rank` puts in.
    Input { rank: usize, part: usize },
    /// The reduction of these parts of these ranks, in this order.
    Reduced(Vec<(usize, usize)>),
    /// What the sender of this message, of those that came, puts in.
    Received(usize),
}

/// Where the parts of a buffer lie: in order, or anywhere with gaps. Elements.
#[derive(Clone, PartialEq, Default, Debug)]
pub(crate) struct Spread {
    pub(crate) counts: Vec<usize>,
    pub(crate) starts: Vec<usize>,
    /// Whether the library is told the starts.
    is_told: bool,
    /// Of the whole buffer.
    pub(crate) room: usize,
}

impl Spread {
    /// One part behind the other.
    fn in_order(counts: Vec<usize>) -> Self {
        let mut room = 0;
        let starts = counts.iter().map(|count| (room, room += count).0).collect();
        Self { counts, starts, is_told: false, room }
    }

    /// In any order, with gaps.
    fn anywhere(counts: Vec<usize>, random: &mut Random) -> Self {
        let mut order: Vec<usize> = (0..counts.len()).collect();
        for at in (1..order.len()).rev() {
            order.swap(at, random.below(at + 1));
        }
        let (mut starts, mut room) = (vec![0; counts.len()], random.below(MAX_GAP));
        for part in order {
            starts[part] = room;
            room += counts[part] + random.below(MAX_GAP);
        }
        Self { counts, starts, is_told: true, room }
    }

    /// As the library is told.
    pub(crate) fn view(&self) -> Counts<'_> {
        Counts { counts: &self.counts, offsets: self.is_told.then_some(&self.starts) }
    }
}

/// One side of a case on one rank. Without contents the rank has no part in it.
#[derive(Clone, PartialEq, Default, Debug)]
pub(crate) struct Side {
    pub(crate) spread: Spread,
    pub(crate) contents: Vec<Content>,
}

impl Side {
    pub(crate) fn is_idle(&self) -> bool {
        self.contents.is_empty()
    }

    /// The same where `is_here`, else a side of these sizes in which the rank has no part.
    fn only(self, is_here: bool) -> Self {
        if is_here { self } else { Self { contents: Vec::new(), ..self } }
    }
}

/// Input and output of `rank`; where parts may lie anywhere, `own` says where.
pub(crate) fn sides(case: &Case, rank: usize, world_size: usize, own: &mut Random) -> (Side, Side) {
    let side = |parts: Vec<(usize, Content)>| {
        let (counts, contents) = parts.into_iter().unzip();
        Side { spread: Spread::in_order(counts), contents }
    };
    let sizes = case.sizes(world_size);
    let mine = |count| side(vec![(count, Content::Input { rank, part: 0 })]);
    let ours = |sizes: &[usize]| {
        side(sizes.iter().enumerate().map(|(part, count)| (*count, Content::Input { rank, part })).collect())
    };
    let from_all = |sizes: &[usize], part| {
        let content = |rank| Content::Input { rank, part };
        side(sizes.iter().enumerate().map(|(rank, count)| (*count, content(rank))).collect())
    };
    let from = |rank, part, count| side(vec![(count, Content::Input { rank, part })]);
    let sum_of = |part, count| {
        side(vec![(count, Content::Reduced((0..world_size).map(|rank| (rank, part)).collect()))])
    };
    let count = case.count;
    let is_at = |root: u32| root as usize == rank;
    let (mut source, mut target) = match case.action {
        Action::Message { from: sender, to } => {
            (mine(count).only(sender == rank), from(sender, 0, count).only(to == rank))
        }
        Action::Shift { by } => (mine(count), from((rank + world_size - by) % world_size, 0, count)),
        Action::ToAnybody { to } => {
            let received = (0..world_size - 1).map(|number| (count, Content::Received(number))).collect();
            (mine(count).only(to != rank), side(received).only(to == rank))
        }
        Action::Call(kind) => match kind {
            Kind::AllReduce { .. } => (mine(count), sum_of(0, count)),
            Kind::Reduce { root, .. } => (mine(count), sum_of(0, count).only(is_at(root))),
            Kind::ReduceScatter { .. } | Kind::ReduceScatterV { .. } => {
                (ours(&sizes), sum_of(rank, sizes[rank]))
            }
            Kind::Broadcast { root } => (mine(count), from(root as usize, 0, count)),
            Kind::AllGather | Kind::AllGatherV => (mine(sizes[rank]), from_all(&sizes, 0)),
            Kind::Gather { root } | Kind::GatherV { root } => {
                (mine(sizes[rank]), from_all(&sizes, 0).only(is_at(root)))
            }
            Kind::Scatter { root } | Kind::ScatterV { root } => {
                (ours(&sizes).only(is_at(root)), from(root as usize, rank, sizes[rank]))
            }
            Kind::AllToAll | Kind::AllToAllV => {
                let table = case.table(world_size);
                let column: Vec<usize> = table.iter().map(|row| row[rank]).collect();
                (ours(&table[rank]), from_all(&column, rank))
            }
            Kind::AllReduceMulti { .. } => {
                let buffers = case.buffers(rank);
                let all = (0..world_size).flat_map(|rank| (0..buffers).map(move |part| (rank, part)));
                let sum = Content::Reduced(all.collect());
                (ours(&vec![count; buffers]), side(vec![(count, sum); buffers]))
            }
            Kind::BroadcastMulti { root, buffer } => {
                let result = Content::Input { rank: root as usize, part: buffer as usize };
                let buffers = case.buffers(rank);
                (ours(&vec![count; buffers]), side(vec![(count, result); buffers]))
            }
            _ => (Side::default(), Side::default()),
        },
    };
    let is_free = case.action.is_uneven() || case.action.is_multi();
    for side in [&mut source, &mut target] {
        if is_free && (side.spread.counts.len() > 1 || case.action.is_multi()) && own.once_in(2) {
            side.spread = Spread::anywhere(std::mem::take(&mut side.spread.counts), own);
        }
    }
    (source, target)
}
