//! `shrink`: who is left after a failure goes on, in a new generation and in fresh memory.
//!
//! The survivors agree on the members of the next generation with the state machine of [`unisono_core::agreement`]; here
//! its messages travel over the connections that there are, its fates lie in the control memory, and what the node plane
//! knows becomes its losses. The rank that proposes members allocates their control memory and sends it along, so who
//! accepts has it, and a decision needs nothing more. A first reduction in the new memory proves that all have arrived;
//! if another rank dies before that, the new generation is itself shrunk, until one holds.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use unisono_core::ReduceOp;
use unisono_core::agreement::{Action, Agreement, Message, Outcome, Proposal};
use unisono_core::recorder::Presence;
use unisono_core::wire;
use unisono_node::memory::quarantine;
use unisono_node::{Lost, SharedMemory};
use unisono_sync::Deadline;

use crate::buffer::BufMut;
use crate::call::{Call, Kind};
use crate::cause::Cause;
use crate::communicator::{AGREEMENT_ITEM, Communicator, Parts};
use crate::control::{About, Control, LEFT};
use crate::copies::Copies;
use crate::error::{Error, Result};
use crate::neighbours::Letter;

/// How long a survivor sleeps between looks at the fates.
const LOOK: Duration = Duration::from_millis(2);
/// How long a peer that lives may not read before it is given up.
const UNREAD: Duration = Duration::from_secs(1);
/// How long the proof of a death that another rank saw is waited for.
const PROOF: Duration = Duration::from_secs(1);
/// How long an early member sleeps between looks for the others.
const ARRIVAL: Duration = Duration::from_micros(200);
/// The longest that members may take from the decision to the first meeting.
const MEETING: Duration = Duration::from_secs(30);

impl Communicator {
    /// Goes on without the ranks that are lost: died, stopped and given up, or gone because they dropped their communicator.
    /// Collective over those that are left: each calls it, usually because a call failed with [`Error::PeerDied`], and gets a
    /// communicator of the next generation. The ranks keep their order.
    ///
    /// It waits for every rank that is not lost, up to the timeout; ranks that die meanwhile are left out, too. What was in
    /// flight is given up, and windows answer [`Error::Generation`] from now on. A rank that was stopped, and is left out,
    /// learns so when it runs again; the memory that it may still write to is kept and not used any more. When no rank
    /// is lost, all go on.
    ///
    /// On GPUs kernels of this generation leave, and the next has memory and kernels of its own on the same devices; what
    /// streams hold besides goes on. Registrations answer [`Error::Generation`], too, and the memory that was registered may be
    /// freed once all ranks are back and their devices quiet, unless a rank was stopped that may still write to it. Graphs that were captured with calls of this generation
    /// must not be launched any more. Ranks of one process call it on threads of their own.
    ///
    /// ```
    /// # use unisono::{Communicator, Operations, ReduceOp};
    /// # let mut ranks = Communicator::threads(3)?;
    /// # drop(ranks.remove(1));
    /// # let ranks: Vec<_> = ranks.into_iter().map(|rank| std::thread::spawn(move || {
    /// let mut x = [1.0f32];
    /// let rank = match rank.all_reduce(&mut x, ReduceOp::Sum) {
    ///     Ok(()) => rank,
    ///     Err(_) => rank.shrink()?,
    /// };
    /// assert_eq!((rank.world_size(), rank.generation()), (2, 1));
    /// # rank.destroy() })).collect();
    /// # for rank in ranks { rank.join().unwrap()?; }
    /// # Ok::<(), unisono::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::GivenUp`] if the others go on without this rank; [`Error::Timeout`] naming the ranks that live but do not call
    /// it; [`Error::Node`] if memory cannot be had (the others go on); [`Error::Forked`] in a forked child. With GPUs,
    /// `Error::Cuda` if the context of this rank is lost (the others go on), and as [`Communicator::split`], on all ranks, if
    /// one cannot have what it needs on its device.
    pub fn shrink(self) -> Result<Self> {
        self.control.check_process()?;
        if let Some(cause @ Cause::Died { .. }) = self.control.cause()
            && let error @ Error::GivenUp { .. } = cause.into_error("an earlier call", self.control.member())
        {
            return Err(error);
        }
        // Whoever waits for us here learns that it is over; what others can still complete without us, they do.
        self.control.fail(&Cause::Dropped { rank: self.rank() as u32 });
        // So do the kernels that wait for us, and our own. A rank whose context is lost leaves, and the others go on without it.
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &self.gpu {
            gpu.borrow_mut().leave()?;
        }
        let mut current = self;
        loop {
            let decision = Regrouping::new(&current).run()?;
            let members: Vec<usize> = decision.proposal.members.iter().collect();
            let old = current.control.clone();
            #[cfg_attr(not(feature = "cuda"), expect(unused_mut, reason = "only a device is attached"))]
            let mut next = decision.carry_over(current, &members);
            let arrived = next.arrive(&old, &members);
            #[cfg(feature = "cuda")]
            let arrived = match arrived.and_then(|()| next.attach_again()) {
                // All members say so; who leaves first is not lost to the others.
                Ok(Err(error)) => return Err(error),
                arrived => arrived.map(drop),
            };
            match arrived {
                Ok(()) => return Ok(next),
                // Somebody else was lost meanwhile.
                Err(_)
                    if matches!(next.control.cause(), Some(Cause::Died { .. } | Cause::Dropped { .. })) =>
                {
                    current = next;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The first meeting of a new generation, in which windows begin behind those of all earlier ones. `members` are its
    /// ranks as the old one numbered them.
    fn arrive(&self, old: &Control, members: &[usize]) -> Result<()> {
        let mut first_window = [self.engine().windows().1];
        let patience = self.patience.map_or(MEETING, |patience| patience.min(MEETING));
        let call = Call::new(Kind::AllReduce { op: ReduceOp::Max }, [BufMut::from(&mut first_window).raw()]);
        let mut engine = self.engine();
        let prepared = engine.prepare(&call)?;
        let ticket = engine.post(prepared)?;
        engine.with_patience(Some(patience), |engine| -> Result<()> {
            loop {
                engine.poll()?;
                if engine.is_done(ticket) {
                    return Ok(());
                }
                for (rank, member) in members.iter().enumerate() {
                    // It accepted, but then it left, or was given up, before it could decide: it will not come.
                    let fate = old.fate(*member).settled();
                    if fate.is_some_and(|by| by != *member as u32) {
                        self.control.fate(rank).settle(self.rank() as u32);
                        self.control.fail(&Cause::Dropped { rank: rank as u32 });
                    }
                }
                std::thread::sleep(ARRIVAL);
            }
        })?;
        engine.begin_windows_at(first_window[0]);
        Ok(())
    }
}

/// One agreement on the next generation of a communicator.
struct Regrouping<'c> {
    old: &'c Communicator,
    agreement: Agreement,
    /// The control memory of each proposal, by who made it and in which round.
    memories: HashMap<(u32, u32), Arc<SharedMemory>>,
    since: Instant,
    has_warned: bool,
}

/// What survivors agreed on.
struct Decision {
    proposal: Proposal,
    memory: Arc<SharedMemory>,
    /// Whether a rank that may still write to the old memory was left behind.
    must_quarantine: bool,
}

impl<'c> Regrouping<'c> {
    fn new(old: &'c Communicator) -> Self {
        Self {
            old,
            agreement: Agreement::new(old.rank(), old.world_size()),
            memories: HashMap::new(),
            since: Instant::now(),
            has_warned: false,
        }
    }

    fn run(mut self) -> Result<Decision> {
        let mut looked: Option<Instant> = None;
        loop {
            if looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
                self.look_for_losses();
                looked = Some(Instant::now());
            }
            self.act()?;
            match self.agreement.outcome() {
                Some(Outcome::Decided(proposal)) => {
                    let proposal = proposal.clone();
                    return self.conclude(proposal);
                }
                Some(Outcome::Out) => {
                    let (during, how) = ("shrink".to_owned(), "they agreed to go on without it".to_owned());
                    return Err(Error::GivenUp { rank: self.old.rank(), during, how });
                }
                None => {}
            }
            if let Some((from, letter)) = self.old.neighbours.receive_any(AGREEMENT_ITEM, LOOK) {
                self.hear(from, letter)?;
            }
            self.keep_patience()?;
        }
    }

    /// Turns what is known of processes and fates into losses.
    fn look_for_losses(&mut self) {
        let me = self.old.rank();
        for rank in 0..self.old.world_size() {
            if self.agreement.lost().contains(rank) {
                continue;
            }
            let fate = self.old.control.fate(rank);
            let is_lost = match fate.settled() {
                Some(by) if by == rank as u32 => self.is_suspected(rank) || self.is_gone(rank),
                Some(_) => true,
                None if rank == me => false,
                None if self.is_suspected(rank) => {
                    fate.settle(me as u32);
                    true
                }
                None => self.is_gone(rank),
            };
            if is_lost {
                self.agreement.on_lost(rank);
            }
        }
    }

    /// Proven: its process ended, or has no communicator any more.
    fn is_gone(&self, rank: usize) -> bool {
        matches!(self.old.neighbours.lost(rank), Some(Lost::SocketClosed | Lost::ProcessEnded | Lost::Left))
    }

    /// Lost, but not proven to be gone: it may run again.
    fn is_suspected(&self, rank: usize) -> bool {
        self.old.neighbours.lost(rank).is_some() && !self.is_gone(rank)
    }

    fn act(&mut self) -> Result<()> {
        while let Some(action) = self.agreement.poll_action() {
            match action {
                Action::Settle => {
                    let me = self.old.rank() as u32;
                    let is_ours = self.old.control.fate(self.old.rank()).settle(me) == me;
                    self.agreement.on_settled(is_ours);
                }
                Action::Send { to, message } => self.send(to, &message)?,
            }
        }
        Ok(())
    }

    fn send(&mut self, to: usize, message: &Message) -> Result<()> {
        let memory = match message {
            Message::Propose { proposal, .. } if proposal.coordinator as usize == self.old.rank() => {
                Some(self.memory_for(proposal)?)
            }
            _ => None,
        };
        let body = wire::encode_body(message)?;
        let deadline = Deadline::after(UNREAD);
        match self.old.neighbours.send(to, AGREEMENT_ITEM, &body, memory.as_ref(), deadline) {
            Ok(()) => {}
            // It is gone, and the next look tells so.
            Err(Error::Node(unisono_node::Error::PeerLost { .. })) => {}
            Err(_) => {
                self.old.control.fate(to).settle(self.old.rank() as u32);
                self.agreement.on_lost(to);
            }
        }
        Ok(())
    }

    /// The control memory for the members of our own proposal.
    fn memory_for(&mut self, proposal: &Proposal) -> Result<Arc<SharedMemory>> {
        let key = (proposal.coordinator, proposal.round);
        if let Some(memory) = self.memories.get(&key) {
            return Ok(memory.clone());
        }
        let memory = Arc::new(SharedMemory::create(bytes_for(proposal))?);
        self.memories.insert(key, memory.clone());
        Ok(memory)
    }

    fn hear(&mut self, from: usize, letter: Letter) -> Result<()> {
        let message: Message = wire::decode_body(&letter.body)?;
        let proposal = match &message {
            Message::Propose { proposal, .. } if proposal.coordinator as usize == from => {
                Some(proposal.clone())
            }
            _ => None,
        };
        self.agreement.on_message(from, message)?;
        // Whatever was accepted just now is not told before we have the memory.
        if let Some(proposal) = proposal {
            let memory = letter.map(bytes_for(&proposal))?;
            self.memories.insert((proposal.coordinator, proposal.round), memory);
        }
        Ok(())
    }

    /// Warns once, and gives up in time.
    fn keep_patience(&mut self) -> Result<()> {
        let waited = self.since.elapsed();
        let policy = self.old.engine().policy();
        let missing = || {
            let names = self.agreement.waits_for().into_iter();
            names.map(|rank| self.old.control.name(rank).to_owned()).collect::<Vec<_>>()
        };
        if policy.patience.is_some_and(|patience| waited >= patience) {
            return Err(Error::Timeout {
                rank: self.old.rank(),
                call: "shrink".to_owned(),
                waited_ms: waited.as_millis() as u64,
                missing: missing(),
            });
        }
        if !self.has_warned && policy.warn_after.is_some_and(|after| waited >= after) {
            self.has_warned = true;
            let (rank, missing) = (self.old.rank(), missing().join(", "));
            tracing::warn!("rank {rank} has waited {waited:.1?} in shrink for {missing}");
        }
        Ok(())
    }

    fn conclude(mut self, proposal: Proposal) -> Result<Decision> {
        // Nobody sent us what we proposed to ourselves alone.
        let memory = match self.memories.remove(&(proposal.coordinator, proposal.round)) {
            Some(memory) => memory,
            None => self.memory_for(&proposal)?,
        };
        let is_lost = |rank: &usize| self.agreement.lost().contains(*rank);
        let must_quarantine = (0..self.old.world_size())
            .filter(|rank| is_lost(rank) || !proposal.members.contains(*rank))
            .any(|rank| !self.will_be_proven(rank));
        Ok(Decision { proposal, memory, must_quarantine })
    }

    /// Whether `rank`, which is lost, is proven to write nothing any more. Another rank may have seen its death before us.
    fn will_be_proven(&self, rank: usize) -> bool {
        let deadline = Deadline::after(PROOF);
        loop {
            let fate = self.old.control.fate(rank).settled();
            if self.is_gone(rank) || fate == Some(LEFT) {
                return true;
            }
            let was_given_up = fate.is_some_and(|by| by != rank as u32);
            if was_given_up || self.is_suspected(rank) || deadline.is_over() {
                return false;
            }
            std::thread::sleep(LOOK);
        }
    }
}

impl Decision {
    /// The next generation of `old`, which ends here. `members` as `old` numbers them.
    fn carry_over(self, mut old: Communicator, members: &[usize]) -> Communicator {
        let neighbours = old.neighbours.next_generation(members);
        let (windows, first_window) = old.engine().windows();
        let policy = old.engine().policy();
        old.control.supersede(neighbours.generation());
        // What its kernels reach goes first: the registration of the memory that follows.
        #[cfg(feature = "cuda")]
        if let Some(gpu) = old.gpu.take() {
            gpu.into_inner().retire(self.must_quarantine);
        }
        if self.must_quarantine {
            quarantine(old.control.memory().clone());
            windows.into_iter().for_each(Copies::quarantine);
        }
        let places = members.iter().map(|member| old.places[*member].clone()).collect();
        let topology = Arc::new(old.topology.of(members));
        let about = About { generation: neighbours.generation(), ..old.control.about().clone() };
        let selection = Arc::new(old.selection.of_world(members.len()));
        let parts = Parts { places, topology, neighbours, memory: self.memory, selection, about };
        #[cfg_attr(not(feature = "cuda"), expect(unused_mut, reason = "only a device is handed on"))]
        let mut next = Communicator::assemble(parts, policy);
        next.engine().begin_windows_at(first_window);
        #[cfg(feature = "cuda")]
        {
            next.origin = old.origin.take().map(|origin| Arc::new(origin.of(members)));
        }
        // From here on, this rank answers in the new memory only.
        old.control.leave(Presence::Destroyed);
        old.destroyed = true;
        old.watch = None;
        old.neighbours.close();
        next
    }
}

fn bytes_for(proposal: &Proposal) -> usize {
    Control::bytes(proposal.members.iter().count())
}

#[cfg(test)]
mod tests;
