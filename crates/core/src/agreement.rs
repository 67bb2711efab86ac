//! Which ranks go on together after a failure: agreement on the membership of the next generation.
//!
//! The problem is uniform consensus among ranks that may die at any step, also half-way through telling the others. The
//! algorithm is a coordinator's: the lowest rank that is not lost proposes, as hierarchical consensus does with a
//! perfect failure detector, and takes over from a lost coordinator by asking all others first, as Paxos does.
//!
//! ```text
//! every rank            Join { lost, accepted }      to all; again whenever it learns of another lost rank
//! coordinator           Propose { round, … }         once every rank that is not lost has joined it
//! every rank            Accept { round }             to the coordinator; from now on this is what it accepted
//! coordinator           (settles) Decided { … }      once every rank that is not lost has accepted the round
//! every rank            (settles) Decided { … }      passed on to all, once, so that all get it if any does
//! ```
//! Messages carry the set of ranks that their sender knows to be lost; receivers add it to their own, and hear nothing
//! more from those ranks but decisions. So a rank that joined a coordinator never accepts from an earlier one again. If
//! all that join it have accepted the same proposal, that may have been decided: the new coordinator keeps it. Else it
//! was not, and the coordinator proposes all ranks that are not lost. When it learns of another loss before it decides,
//! it begins another round: whoever accepts a round knows of all losses that the coordinator knew of.
//!
//! A rank is *lost* when it is proven that it will never decide: it died, or it left, or it was *given up*. The last is
//! for ranks that only seem dead. Every rank has a word, its fate, that is settled once, atomically: by itself just
//! before it decides ([`Action::Settle`]), or by another that gives it up. Whoever finds its fate settled by another is
//! out ([`Outcome::Out`]) and never decides. If it was the rank itself that was first, it has decided, and counts as
//! one that died right after. The fates belong to whoever drives this machine (on one host they lie in shared memory),
//! and so does telling every rank of every loss, in the end.
//!
//! Then all ranks that decide, decide the same proposal, dead ones included; nobody outside of it decides; and when
//! nobody is lost any more, all that are left decide, after three message delays. There is no clock in here.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::rank_set::RankSet;

/// What is agreed on. Two proposals are the same only if one rank made them, in one round.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Proposal {
    /// The ranks that go on, numbered as in the present generation.
    pub members: RankSet,
    /// The rank that proposed it first.
    pub coordinator: u32,
    /// The round in which it did.
    pub round: u32,
}

/// What ranks tell each other. Those who decode it check nothing: [`Agreement::on_message`] does.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Message {
    /// The sender takes part, and hears only ranks outside of `lost` from now on.
    Join {
        /// The ranks it knows to be lost.
        lost: RankSet,
        /// What it accepted last.
        accepted: Option<Proposal>,
    },
    /// The coordinator asks to accept.
    Propose {
        /// The ranks it knows to be lost.
        lost: RankSet,
        /// Its round: counts up.
        round: u32,
        /// Its own of this or an earlier round, or that of an earlier coordinator.
        proposal: Proposal,
    },
    /// The sender accepted a round of the coordinator.
    Accept {
        /// The ranks it knows to be lost.
        lost: RankSet,
        /// The round.
        round: u32,
    },
    /// This is decided.
    Decided {
        /// What.
        proposal: Proposal,
    },
}

/// What the driver is to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Send a message. Messages of one pair may overtake each other.
    Send {
        /// To this rank.
        to: usize,
        /// This message.
        message: Message,
    },
    /// Settle this rank's own fate and call [`Agreement::on_settled`] with whether it was the first to.
    Settle,
}

/// How it ended for this rank.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// All that decide, decide this; this rank is a member.
    Decided(Proposal),
    /// The others go on without this rank.
    Out,
}

/// One rank's side of one agreement. Feed it what happens, and do what [`Agreement::poll_action`] says, until there is an
/// [`Agreement::outcome`] and no action left.
#[derive(Debug)]
pub struct Agreement {
    me: usize,
    world_size: usize,
    lost: RankSet,
    /// The latest word of every rank that joined.
    joins: Vec<Option<Joined>>,
    accepted: Option<Proposal>,
    /// The coordinator and round that were accepted last.
    heard: Option<(usize, u32)>,
    stage: Stage,
    actions: VecDeque<Action>,
}

#[derive(Debug)]
struct Joined {
    lost: RankSet,
    accepted: Option<Proposal>,
}

#[derive(Debug)]
enum Stage {
    /// Not the coordinator, or not all have joined yet.
    Gathering,
    /// The coordinator, waiting for all to accept. `is_free`: no earlier coordinator can have decided.
    Leading {
        round: u32,
        is_free: bool,
        proposal: Proposal,
        accepts: RankSet,
    },
    /// About to decide.
    Settling(Proposal),
    Ended(Outcome),
}

impl Agreement {
    /// Begins for rank `me` of `world_size`, which is below it.
    pub fn new(me: usize, world_size: usize) -> Self {
        assert!(me < world_size, "rank {me} of {world_size}");
        let mut agreement = Self {
            me,
            world_size,
            lost: RankSet::empty(world_size),
            joins: (0..world_size).map(|_| None).collect(),
            accepted: None,
            heard: None,
            stage: Stage::Gathering,
            actions: VecDeque::new(),
        };
        agreement.join();
        agreement
    }

    /// What to do next, if anything.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// How it ended, once it has.
    pub const fn outcome(&self) -> Option<&Outcome> {
        match &self.stage {
            Stage::Ended(outcome) => Some(outcome),
            _ => None,
        }
    }

    /// The ranks that are known to be lost.
    pub const fn lost(&self) -> &RankSet {
        &self.lost
    }

    /// The ranks that this one has not heard of yet; once all have joined, those that its coordinator waits for, or the
    /// coordinator.
    pub fn waits_for(&self) -> Vec<usize> {
        let absent: Vec<usize> = self.others().filter(|rank| self.joins[*rank].is_none()).collect();
        match &self.stage {
            Stage::Gathering if absent.is_empty() && self.coordinator() != self.me => {
                vec![self.coordinator()]
            }
            Stage::Leading { accepts, .. } => self.others().filter(|rank| !accepts.contains(*rank)).collect(),
            _ => absent,
        }
    }

    /// `rank` will never decide: it died, it left, or its fate is settled. Twice is as good as once.
    pub fn on_lost(&mut self, rank: usize) {
        let mut lost = RankSet::empty(self.world_size);
        lost.insert(rank);
        self.learn(&lost);
    }

    /// A message of `from`.
    ///
    /// # Errors
    /// [`Error::Malformed`] for one that no rank of this world sends. Nothing has changed then.
    pub fn on_message(&mut self, from: usize, message: Message) -> Result<()> {
        let message = self.checked(from, message)?;
        // A decision is one whoever brings it.
        if let Message::Decided { proposal } = message {
            self.decide(proposal);
            return Ok(());
        }
        if self.lost.contains(from) {
            return Ok(());
        }
        match message {
            Message::Join { lost, accepted } => {
                let latest = &mut self.joins[from];
                if latest.as_ref().is_none_or(|latest| lost.contains_all(&latest.lost)) {
                    *latest = Some(Joined { lost: lost.clone(), accepted });
                }
                self.learn(&lost);
                self.lead();
            }
            Message::Propose { lost, round, proposal } => {
                self.learn(&lost);
                self.accept(from, round, proposal);
            }
            Message::Accept { lost, round } => {
                self.learn(&lost);
                self.count(from, round);
            }
            Message::Decided { .. } => {}
        }
        Ok(())
    }

    /// The answer to [`Action::Settle`]: whether this rank settled its fate itself.
    pub fn on_settled(&mut self, is_ours: bool) {
        let Stage::Settling(proposal) = &self.stage else { return };
        let proposal = proposal.clone();
        if !is_ours {
            self.stage = Stage::Ended(Outcome::Out);
            return;
        }
        for to in (0..self.world_size).filter(|to| *to != self.me) {
            let message = Message::Decided { proposal: proposal.clone() };
            self.actions.push_back(Action::Send { to, message });
        }
        self.stage = Stage::Ended(Outcome::Decided(proposal));
    }

    /// Refuses ranks outside this world, and proposals that cannot be.
    fn checked(&self, from: usize, message: Message) -> Result<Message> {
        let size = self.world_size;
        let refuse = |got: String| Error::Malformed {
            what: "message of an agreement",
            expected: format!("one of {size} ranks"),
            got,
        };
        if from >= size || from == self.me {
            return Err(refuse(format!("one of rank {from}")));
        }
        let proposed = |proposal: Proposal| {
            let Proposal { members, coordinator, round } = proposal;
            let members = members.checked(size)?;
            let is_possible = (coordinator as usize) < size && members.contains(coordinator as usize);
            if is_possible {
                Ok(Proposal { members, coordinator, round })
            } else {
                Err(refuse(format!("a proposal of rank {coordinator}, which is no member of it")))
            }
        };
        Ok(match message {
            Message::Join { lost, accepted } => {
                Message::Join { lost: lost.checked(size)?, accepted: accepted.map(proposed).transpose()? }
            }
            Message::Propose { lost, round, proposal } => {
                Message::Propose { lost: lost.checked(size)?, round, proposal: proposed(proposal)? }
            }
            Message::Accept { lost, round } => Message::Accept { lost: lost.checked(size)?, round },
            Message::Decided { proposal } => Message::Decided { proposal: proposed(proposal)? },
        })
    }

    /// The lowest rank that is not lost.
    fn coordinator(&self) -> usize {
        lowest_outside(&self.lost, self.world_size)
    }

    /// All that are not lost, but us.
    fn others(&self) -> impl Iterator<Item = usize> + use<'_> {
        (0..self.world_size).filter(|rank| *rank != self.me && !self.lost.contains(*rank))
    }

    fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Settling(_) | Stage::Ended(_))
    }

    /// Sends to all that are not lost.
    fn tell(&mut self, message: &Message) {
        let to: Vec<usize> = self.others().collect();
        self.actions.extend(to.into_iter().map(|to| Action::Send { to, message: message.clone() }));
    }

    fn join(&mut self) {
        let (lost, accepted) = (self.lost.clone(), self.accepted.clone());
        self.tell(&Message::Join { lost, accepted });
        self.lead();
    }

    /// Adds lost ranks to those we know.
    fn learn(&mut self, lost: &RankSet) {
        if self.is_over() {
            return;
        }
        if lost.contains(self.me) {
            self.actions.clear();
            self.stage = Stage::Ended(Outcome::Out);
            return;
        }
        if self.lost.merge(lost) {
            self.join();
            if let Stage::Leading { round, is_free, proposal, .. } = &self.stage {
                let (round, is_free, proposal) = (*round, *is_free, proposal.clone());
                self.propose(round + 1, is_free, proposal);
            }
        }
    }

    /// Begins to coordinate, if that is our part and all have joined.
    fn lead(&mut self) {
        if !matches!(self.stage, Stage::Gathering) || self.coordinator() != self.me {
            return;
        }
        let has_joined = |rank: usize| {
            self.joins[rank]
                .as_ref()
                .is_some_and(|joined| lowest_outside(&joined.lost, self.world_size) == self.me)
        };
        if !self.others().all(has_joined) {
            return;
        }
        let theirs = |rank: usize| self.joins[rank].as_ref().and_then(|joined| joined.accepted.as_ref());
        match &self.accepted {
            Some(accepted) if self.others().all(|rank| theirs(rank) == Some(accepted)) => {
                self.propose(1, false, accepted.clone());
            }
            _ => self.propose(1, true, self.proposal(1)),
        }
    }

    /// All that are not lost.
    fn proposal(&self, round: u32) -> Proposal {
        let mut members = RankSet::empty(self.world_size);
        for rank in self.others().chain([self.me]) {
            members.insert(rank);
        }
        Proposal { members, coordinator: self.me as u32, round }
    }

    /// Begins a round, with `proposal` unless another one is free to be made.
    fn propose(&mut self, round: u32, is_free: bool, proposal: Proposal) {
        let proposal = if is_free { self.proposal(round) } else { proposal };
        let (lost, mut accepts) = (self.lost.clone(), RankSet::empty(self.world_size));
        accepts.insert(self.me);
        self.tell(&Message::Propose { lost, round, proposal: proposal.clone() });
        self.accepted = Some(proposal.clone());
        self.stage = Stage::Leading { round, is_free, proposal, accepts };
        self.count(self.me, round);
    }

    fn accept(&mut self, from: usize, round: u32, proposal: Proposal) {
        let is_new = self.heard.is_none_or(|heard| heard < (from, round));
        if self.is_over() || self.coordinator() != from || !is_new || !proposal.members.contains(self.me) {
            return;
        }
        self.heard = Some((from, round));
        self.accepted = Some(proposal);
        let message = Message::Accept { lost: self.lost.clone(), round };
        self.actions.push_back(Action::Send { to: from, message });
    }

    /// Counts who accepted our round, and decides when all have.
    fn count(&mut self, from: usize, accepted: u32) {
        let Stage::Leading { round, accepts, .. } = &mut self.stage else { return };
        if *round == accepted {
            accepts.insert(from);
        }
        if let Stage::Leading { proposal, accepts, .. } = &self.stage
            && self.others().all(|rank| accepts.contains(rank))
        {
            self.decide(proposal.clone());
        }
    }

    fn decide(&mut self, proposal: Proposal) {
        if self.is_over() {
            return;
        }
        if proposal.members.contains(self.me) {
            self.stage = Stage::Settling(proposal);
            self.actions.push_back(Action::Settle);
        } else {
            self.stage = Stage::Ended(Outcome::Out);
        }
    }
}

fn lowest_outside(set: &RankSet, world_size: usize) -> usize {
    (0..world_size).find(|rank| !set.contains(*rank)).unwrap_or(world_size)
}

#[cfg(test)]
mod simulation;
