//! Calls in flight: posted, carried out a piece at a time whenever somebody looks, in any number.
//!
//! Collectives go one after the other, in the order in which they were posted, as every rank must. Messages go beside
//! them and beside each other; those to one rank leave in order. While anything is in flight, a blocking call is posted
//! behind it and all are driven together, so what a peer waits for is never held up by what we wait for.

use std::collections::VecDeque;

use smallvec::SmallVec;

use super::engine::{Engine, State};
use super::messages::Message;
use super::plan::Plan;
use super::waiting::{Blocked, Halt, Vigil};
use crate::call::Call;
use crate::cause::Cause;
use crate::error::Result;

/// Names a posted call.
pub(crate) type Ticket = u64;

/// A call that passed all local checks.
#[derive(Debug)]
pub(crate) enum Prepared {
    /// A collective.
    Collective(Box<Plan>),
    /// A message, or one each way.
    Message(SmallVec<[Message; 2]>),
}

/// A collective on its way.
#[derive(Debug)]
struct Posted {
    ticket: Ticket,
    plan: Box<Plan>,
    at: State,
}

/// What is in flight; messages are kept by [`Messages`](super::messages::Messages).
#[derive(Debug, Default)]
pub(super) struct Flight {
    last: Ticket,
    collectives: VecDeque<Posted>,
    /// What the calls in flight wait for, after the last look.
    pub(super) blocked: SmallVec<[Blocked; 4]>,
    /// Since when nothing has moved.
    vigil: Option<Vigil>,
}

impl Engine {
    /// Checks a call. Nothing was sent or written when this fails.
    pub(crate) fn prepare(&self, call: &Call<'_>) -> Result<Prepared> {
        if call.kind.is_message() {
            return Ok(Prepared::Message(self.messages_of(call)?));
        }
        Ok(Prepared::Collective(Box::new(self.plan(call)?)))
    }

    /// Puts a call into flight.
    pub(crate) fn post(&mut self, prepared: Prepared) -> Result<Ticket> {
        self.check()?;
        self.flight.last += 1;
        let ticket = self.flight.last;
        match prepared {
            Prepared::Collective(plan) => {
                self.flight.collectives.push_back(Posted { ticket, plan, at: State::default() });
            }
            Prepared::Message(messages) => {
                self.record_message(&messages, ticket);
                for message in messages {
                    let posted = self.post_message(message, ticket);
                    self.remember(posted)?;
                }
            }
        }
        Ok(ticket)
    }

    /// Takes everything in flight as far as it goes without waiting; whether that was anywhere.
    ///
    /// Not a look at the abort word: what peers announced before it counts all the same, and who then still waits fails.
    pub(crate) fn progress(&mut self) -> Result<bool> {
        self.check_own()?;
        self.flight.blocked.clear();
        self.polling = true;
        let result = self.progress_collectives().and_then(|moved| Ok(self.progress_messages()? || moved));
        self.polling = false;
        let moved = self.remember(result)?;
        self.record_progress(moved);
        if moved {
            self.flight.vigil = None;
        }
        Ok(moved)
    }

    fn progress_collectives(&mut self) -> Result<bool> {
        let mut moved = false;
        while let Some(mut posted) = self.flight.collectives.pop_front() {
            let before = (posted.at.turn, posted.at.phase);
            match self.advance(&posted.plan, &mut posted.at) {
                Ok(()) => moved = true,
                Err(Halt::Failed(error)) => return Err(error),
                Err(Halt::Pending(blocked)) => {
                    moved |= before != (posted.at.turn, posted.at.phase);
                    self.flight.blocked.push(blocked);
                    self.flight.collectives.push_front(posted);
                    break;
                }
            }
        }
        Ok(moved)
    }

    /// As [`Engine::progress`], for who asks again and again: fails where a wait would.
    pub(crate) fn poll(&mut self) -> Result<bool> {
        let moved = self.progress()?;
        let Some(blocked) = self.flight.blocked.first().copied() else { return Ok(moved) };
        let mut vigil = self.flight.vigil.take();
        let result = self.look(&mut vigil, blocked);
        self.flight.vigil = vigil;
        self.remember(result)?;
        Ok(moved)
    }

    /// Drives everything in flight until `is_enough`.
    pub(crate) fn drive(&mut self, is_enough: impl Fn(&Self) -> bool) -> Result<()> {
        loop {
            if is_enough(self) {
                return Ok(());
            }
            self.progress()?;
            if is_enough(self) {
                return Ok(());
            }
            self.rest(&|| false)?;
        }
    }

    /// After [`Engine::progress`]: waits a while for what is blocked, or until `is_over`.
    pub(crate) fn rest(&mut self, is_over: &dyn Fn() -> bool) -> Result<()> {
        let Some(first) = self.flight.blocked.first().copied() else { return Ok(()) };
        let mut vigil = self.flight.vigil.take();
        let result = self.wait_a_while(&mut vigil, first, &|| self.is_any_ready() || is_over());
        self.flight.vigil = vigil;
        self.remember(result)
    }

    /// Whether anything that was blocked at the last look can go on, or has failed.
    pub(crate) fn is_any_ready(&self) -> bool {
        self.flight.blocked.iter().any(|blocked| self.is_ready(*blocked))
    }

    /// Whether the call is complete; also after a failure, when nothing is in flight any more.
    pub(crate) fn is_done(&self, ticket: Ticket) -> bool {
        !self.flight.collectives.iter().any(|posted| posted.ticket == ticket)
            && !self.messages.is_posted(ticket)
    }

    /// Whether nothing is in flight.
    pub(crate) fn is_idle(&self) -> bool {
        self.flight.collectives.is_empty() && self.messages.is_idle()
    }

    /// The last ticket that was given out.
    pub(crate) fn last_ticket(&self) -> Ticket {
        self.flight.last
    }

    /// Whether all calls posted after `ticket` are complete.
    pub(crate) fn is_done_after(&self, ticket: Ticket) -> bool {
        !self.flight.collectives.iter().any(|posted| posted.ticket > ticket)
            && !self.messages.is_posted_after(ticket)
    }

    /// Forgets everything in flight: nothing touches its buffers any more.
    pub(super) fn abandon(&mut self) {
        self.flight.collectives.clear();
        self.flight.blocked.clear();
        self.flight.vigil = None;
        self.messages.abandon();
    }

    /// Fails the communicator because its caller unwinds while calls are in flight.
    pub(crate) fn give_up(&mut self, reason: &str) {
        let error = self.abort_with(Cause::Aborted { rank: self.rank as u32, reason: reason.to_owned() });
        let _: Result<()> = self.remember(Err(error));
    }
}
