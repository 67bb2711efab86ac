//! Whole agreements in one thread, from one seed: ranks die between any two steps (half-way through telling the others,
//! too), fall asleep, are given up and wake up again, while messages and news of losses come late and in any order.
//!
//! `UNISONO_TEST_SCALE=10` simulates 10⁵ seeds instead of 20,000; `UNISONO_TEST_SEED` only one.

#![allow(clippy::print_stdout, reason = "a campaign tells what it came to")]

use std::collections::BTreeSet;

use super::*;

/// Random numbers from a seed (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

/// Something that is to happen to `rank`, some time.
#[derive(Clone, Debug)]
enum Event {
    Start {
        rank: usize,
    },
    /// It carries out its next action.
    Act {
        rank: usize,
    },
    Deliver {
        rank: usize,
        from: usize,
        message: Message,
    },
    /// It learns that `lost` is.
    Loss {
        rank: usize,
        lost: usize,
    },
    Die {
        rank: usize,
    },
    /// It gives up `other`, which may be well.
    GiveUp {
        rank: usize,
        other: usize,
    },
}

impl Event {
    const fn rank(&self) -> usize {
        match self {
            Self::Start { rank }
            | Self::Act { rank }
            | Self::Deliver { rank, .. }
            | Self::Loss { rank, .. }
            | Self::Die { rank }
            | Self::GiveUp { rank, .. } => *rank,
        }
    }
}

struct World {
    random: Random,
    ranks: Vec<Option<Agreement>>,
    /// Whether its next action is among the pending events.
    is_busy: Vec<bool>,
    is_dead: Vec<bool>,
    is_asleep: Vec<bool>,
    /// Who settled the fate of each rank.
    fates: Vec<Option<usize>>,
    /// Ranks that somebody had a reason to exclude.
    suspects: BTreeSet<usize>,
    pending: Vec<Event>,
    /// What happens to sleepers, when they wake up.
    parked: Vec<Event>,
    /// Whether giving up settles fates, as it must.
    settles: bool,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let size = 1 + random.below(8);
        let mut pending: Vec<Event> = (0..size).map(|rank| Event::Start { rank }).collect();
        for _ in 0..random.below(size + 1) {
            pending.push(Event::Die { rank: random.below(size) });
        }
        for _ in 0..random.below(3) {
            let (rank, other) = (random.below(size), random.below(size));
            if rank != other {
                pending.push(Event::GiveUp { rank, other });
            }
        }
        Self {
            random,
            ranks: (0..size).map(|_| None).collect(),
            is_busy: vec![false; size],
            is_dead: vec![false; size],
            is_asleep: vec![false; size],
            fates: vec![None; size],
            suspects: BTreeSet::new(),
            pending,
            parked: Vec::new(),
            settles: true,
        }
    }

    /// Lets everything happen, one after the other, in an order of the seed's.
    fn run(&mut self) {
        for _ in 0..1_000_000 {
            if self.pending.is_empty() {
                self.pending.append(&mut self.parked);
                self.is_asleep.fill(false);
            }
            if self.pending.is_empty() {
                return;
            }
            let at = self.random.below(self.pending.len());
            let event = self.pending.swap_remove(at);
            if self.is_dead[event.rank()] {
                continue;
            }
            if self.is_asleep[event.rank()] {
                self.parked.push(event);
            } else {
                self.happen(event);
            }
        }
        panic!("it goes on for ever");
    }

    fn happen(&mut self, event: Event) {
        let rank = event.rank();
        let is_input = matches!(event, Event::Deliver { .. } | Event::Loss { .. } | Event::GiveUp { .. });
        if is_input && self.ranks[rank].is_none() {
            self.pending.push(event);
            return;
        }
        match event {
            Event::Start { rank } => self.ranks[rank] = Some(Agreement::new(rank, self.ranks.len())),
            Event::Act { rank } => {
                self.is_busy[rank] = false;
                self.act(rank);
            }
            Event::Deliver { rank, from, message } => self.rank(rank).on_message(from, message).unwrap(),
            Event::Loss { rank, lost } => self.rank(rank).on_lost(lost),
            Event::Die { rank } => {
                self.is_dead[rank] = true;
                self.lose(rank);
                return;
            }
            Event::GiveUp { rank, other } => {
                // Only who still takes part gives others up.
                if self.rank(rank).outcome().is_none() {
                    self.give_up(rank, other);
                }
            }
        }
        if !self.is_busy[rank] && self.ranks[rank].as_ref().is_some_and(|one| !one.actions.is_empty()) {
            self.is_busy[rank] = true;
            self.pending.push(Event::Act { rank });
        }
    }

    fn rank(&mut self, rank: usize) -> &mut Agreement {
        self.ranks[rank].as_mut().unwrap()
    }

    fn act(&mut self, rank: usize) {
        match self.rank(rank).poll_action() {
            Some(Action::Send { to, message }) => {
                self.pending.push(Event::Deliver { rank: to, from: rank, message });
            }
            Some(Action::Settle) => {
                let by = *self.fates[rank].get_or_insert(rank);
                self.rank(rank).on_settled(by == rank);
            }
            None => {}
        }
    }

    fn give_up(&mut self, rank: usize, other: usize) {
        self.suspects.insert(other);
        self.is_asleep[other] |= self.random.below(2) == 0;
        if self.settles && self.fates[other].is_none() {
            self.fates[other] = Some(rank);
            self.lose(other);
        }
        self.rank(rank).on_lost(other);
    }

    /// All will learn it, each in its time.
    fn lose(&mut self, lost: usize) {
        self.suspects.insert(lost);
        let others = (0..self.ranks.len()).filter(|rank| *rank != lost);
        self.pending.extend(others.map(|rank| Event::Loss { rank, lost }));
    }

    /// What must hold at the end; the number of rounds that the decision took, if there is one.
    fn judge(&self) -> Result<Option<Proposal>, String> {
        let mut decision: Option<&Proposal> = None;
        for (rank, agreement) in self.ranks.iter().enumerate() {
            let outcome = agreement.as_ref().and_then(Agreement::outcome);
            if let Some(Outcome::Decided(proposal)) = outcome {
                if decision.is_some_and(|other| other != proposal) {
                    return Err(format!("rank {rank} decided {proposal:?}, others {decision:?}"));
                }
                if !proposal.members.contains(rank) {
                    return Err(format!("rank {rank} decided {proposal:?} without itself"));
                }
                decision = Some(proposal);
            }
            let is_given_up = self.fates[rank].is_some_and(|by| by != rank);
            let is_right = match outcome {
                None => self.is_dead[rank],
                Some(Outcome::Out) => is_given_up,
                Some(Outcome::Decided(_)) => !is_given_up,
            };
            if !is_right {
                return Err(format!("rank {rank} came to {outcome:?}"));
            }
        }
        let members = decision.map(|proposal| proposal.members.clone());
        let excluded = |members: &RankSet| (0..self.ranks.len()).find(|rank| !members.contains(*rank));
        if let Some(rank) = members.as_ref().and_then(excluded).filter(|rank| !self.suspects.contains(rank)) {
            return Err(format!("rank {rank} was left out for no reason: {decision:?}"));
        }
        Ok(decision.cloned())
    }
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn all_that_decide_decide_the_same_whatever_happens() {
    let scale = setting("UNISONO_TEST_SCALE").unwrap_or(1);
    let count = if scale > 1 { 10_000 * scale } else { 20_000 };
    let seeds = setting("UNISONO_TEST_SEED").map_or(0..count, |seed| seed..seed + 1);
    let (mut takeovers, mut later_rounds, mut losses, mut undecided) = (0, 0, 0, 0);
    for seed in seeds.clone() {
        let mut world = World::new(seed);
        world.run();
        match world.judge() {
            Ok(Some(proposal)) => {
                takeovers += u64::from(proposal.coordinator > 0);
                later_rounds += u64::from(proposal.round > 1);
                losses += u64::from(!proposal.members.contains_all(&RankSet::all(world.ranks.len())));
            }
            Ok(None) => undecided += 1,
            Err(problem) => panic!("UNISONO_TEST_SEED={seed}: {problem}"),
        }
    }
    println!(
        "{} agreements: {takeovers} decided by a later coordinator, {later_rounds} in a later round, {losses} \
         without some ranks, {undecided} by nobody that is left",
        seeds.end - seeds.start
    );
    // The simulation reaches what it is for.
    if seeds.end - seeds.start > 1 {
        assert!(takeovers > count / 20 && later_rounds > count / 20 && losses > count / 4);
        assert!(undecided < count / 2, "{undecided}");
    }
}

#[test]
fn fates_are_what_keeps_a_rank_that_was_given_up_from_deciding() {
    let is_wrong = |seed| {
        let mut world = World { settles: false, ..World::new(seed) };
        world.run();
        world.judge().is_err()
    };
    assert!((0..2000).any(is_wrong), "without fates, too, all agreed");
}

#[test]
fn without_losses_one_round_of_the_lowest_rank_decides_for_all() {
    for size in [1, 2, 5, 64, 100] {
        let mut world = World::new(1);
        world.ranks = (0..size).map(|_| None).collect();
        world.is_busy = vec![false; size];
        world.is_dead = vec![false; size];
        world.is_asleep = vec![false; size];
        world.fates = vec![None; size];
        world.pending = (0..size).map(|rank| Event::Start { rank }).collect();
        world.run();
        let expected = Proposal { members: RankSet::all(size), coordinator: 0, round: 1 };
        assert_eq!(world.judge(), Ok(Some(expected)));
    }
}

#[test]
fn what_no_rank_of_this_world_sends_is_refused() {
    let mut agreement = Agreement::new(0, 3);
    let proposal = |size, coordinator| Proposal { members: RankSet::all(size), coordinator, round: 1 };
    let join = |size| Message::Join { lost: RankSet::empty(size), accepted: None };
    assert!(agreement.on_message(3, join(3)).is_err());
    assert!(agreement.on_message(0, join(3)).is_err());
    assert!(agreement.on_message(1, join(65)).is_err());
    assert!(agreement.on_message(1, Message::Decided { proposal: proposal(3, 3) }).is_err());
    let error = agreement
        .on_message(
            1,
            Message::Decided { proposal: Proposal { members: RankSet::empty(3), ..proposal(3, 1) } },
        )
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "malformed message of an agreement: expected one of 3 ranks, got a proposal of rank 1, which is no member of it"
    );
    assert_eq!(agreement.waits_for(), [1, 2]);
    agreement.on_message(1, join(3)).unwrap();
    assert_eq!(agreement.waits_for(), [2]);
}
