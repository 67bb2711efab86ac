//! What words in shared memory cannot say. Every rank of a communicator can write all of its memory, so a wait that lasts
//! looks whether the words it depends on are possible at all. A count that is not possible never ends a wait.
//!
//! What is possible follows from credit: nobody stages a step before all have consumed the one [`CHUNKS`] steps earlier, and
//! nobody begins a call before all have completed the one [`CALL_SLOTS`] calls earlier. A word that is wrong and possible
//! is not found here; it leads to wrong data, or to a wait that ends with the timeout.

use unisono_core::layout::{CALL_SLOTS, CHUNKS};

use super::channel::can_lie_in;
use super::engine::Engine;
use super::waiting::{Blocked, On};
use crate::cause::Cause;

/// Steps that a peer's count can be beyond what we wait for. Nobody is further than [`CHUNKS`] beyond what we have
/// consumed, and for credit we wait for what is as much behind it; the rest is for the phases within a step.
pub(super) const STEPS_AHEAD: u64 = 4 * CHUNKS as u64;

impl Engine {
    /// The first word of any peer that nobody can have written, as far as it concerns who waits so.
    #[cold]
    pub(super) fn damage(&self, blocked: Blocked) -> Option<Cause> {
        let slots = self.peers().find_map(|peer| Some((peer, self.damaged_slot(peer)?)));
        let found = slots.or_else(|| Some((blocked.peer, self.damaged_count(blocked)?)));
        found.map(|(peer, word)| Cause::Damaged {
            rank: self.rank as u32,
            who: self.control.name(peer).to_owned(),
            word,
        })
    }

    /// The slot of our call holds that call or one that is [`CALL_SLOTS`] calls apart, or was never used.
    fn damaged_slot(&self, peer: usize) -> Option<String> {
        let depth = CALL_SLOTS as u64;
        let standing = self.control.rank(peer).slots.standing(self.epoch);
        let apart = self.epoch.abs_diff(standing);
        let is_possible = standing == 0
            || apart.is_multiple_of(depth) && apart <= if standing > self.epoch { depth } else { 2 * depth };
        (!is_possible).then(|| format!("a call slot holds call {standing}, expected about {}", self.epoch))
    }

    /// The count that `blocked` waits for.
    fn damaged_count(&self, blocked: Blocked) -> Option<String> {
        let Blocked { peer, on, value } = blocked;
        let theirs = self.control.rank(peer);
        let (name, count) = match on {
            On::Produced => ("steps staged", theirs.produced.current()),
            On::Reduced => ("steps reduced", theirs.reduced.current()),
            On::Consumed => ("steps consumed", theirs.consumed.current()),
            On::Slot => ("current call", theirs.slots.standing(value)),
            On::Completed => return self.damaged_trail(peer),
            On::News => {
                let (channel, read) = (self.channel_from(peer), self.messages.read[peer]);
                let head = channel.head.current();
                let expected = format!("{read} to {}", read.wrapping_add(channel.bytes as u64));
                let is_possible = can_lie_in(channel, head.wrapping_sub(read));
                return (!is_possible).then(|| format!("it sent {head} bytes, expected {expected}"));
            }
            On::Room => {
                let (channel, written) = (self.channel_to(peer), self.messages.written[peer]);
                let tail = channel.tail.current();
                let expected = format!("{} to {written}", written.saturating_sub(channel.bytes as u64));
                let is_possible = can_lie_in(channel, written.wrapping_sub(tail));
                return (!is_possible).then(|| format!("it received {tail} bytes, expected {expected}"));
            }
        };
        // What it announced before it completed the call is visible to who sees that it did.
        let has_completed = self.completed(peer, theirs.trail.current()) >= self.epoch;
        let is_missing = has_completed && !self.is_ready(blocked);
        if on != On::Slot && count > value.saturating_add(STEPS_AHEAD) || is_missing {
            let most = if on == On::Slot { value } else { value + STEPS_AHEAD };
            return Some(format!("its {name}: {count}, expected {value} to {most}"));
        }
        self.damaged_trail(peer)
    }

    /// Nobody completes a call that needs us, before we have.
    fn damaged_trail(&self, peer: usize) -> Option<String> {
        let completed = self.completed(peer, self.control.rank(peer).trail.current());
        let most = self.epoch + CALL_SLOTS as u64;
        (completed > most).then(|| format!("its calls completed: {completed}, expected at most {most}"))
    }
}
