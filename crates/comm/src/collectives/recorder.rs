//! The engine's side of the flight recorder: what each call leaves in shared memory for readers of other processes.
//!
//! A call writes one line when it begins and one word when it ends; a wait that has lasted for 20 ms writes a word, too. No
//! lock, no system call, nothing that a peer could hold up. Time is the dearest part of it, ten nanoseconds a stamp: a small
//! call that never had to do more than spin is stamped at its beginning only, and said to be done at once.

use std::cell::Cell;

use smallvec::SmallVec;
use unisono_core::DType;
use unisono_core::call::Kind;
use unisono_core::recorder::{ENDED, Record, WAITS, Waits, WaitsOn};
use unisono_sync::Ticks;

use super::engine::Engine;
use super::flight::Ticket;
use super::messages::Message;
use super::plan::Plan;
use super::waiting::{Blocked, On};

/// Up to so many bytes a stamp at the end is dear, compared with the call.
const SMALL_BYTES: usize = 4096;

/// A message that is under way.
#[derive(Clone, Copy, Debug)]
struct OpenMessage {
    ticket: Ticket,
    serial: u64,
    kind: Kind,
    /// Whether it was left waiting once.
    has_waited: bool,
}

/// What the recorder remembers of calls that go on.
#[derive(Debug)]
pub(super) struct Recorder {
    is_on: bool,
    ticks: Ticks,
    /// Records begun.
    last: u64,
    /// The collective that goes on; 0 for none.
    collective: u64,
    /// Whether it may go without a stamp at its end, and how many waits had been slow when it began.
    is_small: bool,
    slow_waits: u32,
    messages: SmallVec<[OpenMessage; 4]>,
    /// The record that says that it waits; 0 for none.
    waiting: Cell<u64>,
}

impl Recorder {
    pub(super) fn new(is_on: bool) -> Self {
        Self {
            is_on,
            ticks: Ticks::here(),
            last: 0,
            collective: 0,
            is_small: false,
            slow_waits: 0,
            messages: SmallVec::new(),
            waiting: Cell::new(0),
        }
    }
}

impl Engine {
    /// A collective has its number.
    #[inline(always)]
    pub(super) fn record_collective(&mut self, plan: &Plan) {
        let recorder = &mut self.recorder;
        if !recorder.is_on {
            return;
        }
        recorder.last += 1;
        recorder.collective = recorder.last;
        recorder.is_small = !self.polling && plan.bytes() <= SMALL_BYTES;
        recorder.slow_waits = self.budget.slow_waits();
        let words = Record::begin_collective(&self.current, plan.algorithm, self.epoch, recorder.ticks.now());
        self.control.rank(self.rank).records.write(recorder.last, &words);
    }

    /// The collective is done.
    #[inline(always)]
    pub(super) fn record_done(&mut self) {
        let recorder = &mut self.recorder;
        let serial = std::mem::take(&mut recorder.collective);
        if serial == 0 {
            return;
        }
        let has_only_spun = recorder.slow_waits == self.budget.slow_waits();
        let ended = match recorder.is_small && has_only_spun && !self.polling {
            true => Record::AT_ONCE,
            false => Record::ended_word(recorder.ticks.now(), false),
        };
        self.control.rank(self.rank).records.set(serial, ENDED, ended);
    }

    /// A message, or one each way, is posted.
    pub(super) fn record_message(&mut self, messages: &[Message], ticket: Ticket) {
        let recorder = &mut self.recorder;
        let Some(first) = messages.first().filter(|_| recorder.is_on) else { return };
        let (kind, header) = match first {
            Message::Out(message) => (message.kind, message.header),
            Message::In(message) => (message.kind, Some(message.header)),
        };
        let (dtype, count) = header.map_or((None, 0), |header| (header.dtype, header.count));
        recorder.last += 1;
        let serial = recorder.last;
        let begun = recorder.ticks.now();
        let words = Record::begin_message(kind, dtype.unwrap_or(DType::U8), count, begun);
        self.control.rank(self.rank).records.write(serial, &words);
        recorder.messages.push(OpenMessage { ticket, serial, kind, has_waited: false });
    }

    /// A message that was carried out on the spot is done.
    pub(super) fn record_message_at_once(&mut self, kind: Kind, dtype: DType, count: u64) {
        let recorder = &mut self.recorder;
        if !recorder.is_on {
            return;
        }
        recorder.last += 1;
        let mut words = Record::begin_message(kind, dtype, count, recorder.ticks.now());
        words[ENDED] = Record::AT_ONCE;
        self.control.rank(self.rank).records.write(recorder.last, &words);
    }

    /// Everything in flight was taken as far as it goes.
    #[inline]
    pub(super) fn record_progress(&mut self, moved: bool) {
        if moved {
            self.record_wait_over();
        }
        if !self.recorder.messages.is_empty() {
            self.record_messages();
        }
    }

    /// Messages that are complete are done; at once, if that was so at the first look.
    fn record_messages(&mut self) {
        let mut at = 0;
        while at < self.recorder.messages.len() {
            let message = self.recorder.messages[at];
            if self.messages.is_posted(message.ticket) {
                self.recorder.messages[at].has_waited = true;
                at += 1;
                continue;
            }
            self.recorder.messages.remove(at);
            let ended = match message.has_waited {
                false => Record::AT_ONCE,
                true => Record::ended_word(self.recorder.ticks.now(), false),
            };
            self.control.rank(self.rank).records.set(message.serial, ENDED, ended);
        }
    }

    /// The communicator has failed, and with it all calls that go on.
    #[cold]
    pub(super) fn record_failure(&mut self) {
        self.record_wait_over();
        let ended = Record::ended_word(self.recorder.ticks.now(), true);
        let records = self.control.rank(self.rank).records;
        let collective = std::mem::take(&mut self.recorder.collective);
        let messages = std::mem::take(&mut self.recorder.messages);
        let open = messages.iter().map(|message| message.serial).chain([collective]);
        open.filter(|serial| *serial != 0).for_each(|serial| records.set(serial, ENDED, ended));
    }

    /// A wait has lasted so long that readers should know.
    #[cold]
    pub(super) fn record_wait(&self, blocked: Blocked) {
        let peer = blocked.peer;
        let is_it = |message: &&OpenMessage| match (blocked.on, message.kind) {
            (On::Room, Kind::Send { to, .. } | Kind::SendRecv { to, .. }) => to as usize == peer,
            (On::News, Kind::Recv { from, .. } | Kind::SendRecv { from, .. }) => {
                from as usize == peer || from == u32::MAX
            }
            _ => false,
        };
        let (serial, on) = match blocked.on {
            On::News | On::Room => {
                let message = self.recorder.messages.iter().find(is_it);
                let on = if blocked.on == On::News { WaitsOn::Message } else { WaitsOn::Room };
                (message.map_or(0, |message| message.serial), on)
            }
            On::Slot => (self.recorder.collective, WaitsOn::Arrival),
            On::Completed => (self.recorder.collective, WaitsOn::Credit),
            // Steps of earlier calls are credit, those of this one its progress.
            On::Consumed if blocked.value <= self.step => (self.recorder.collective, WaitsOn::Credit),
            On::Produced | On::Reduced | On::Consumed => (self.recorder.collective, WaitsOn::Data),
        };
        let before = self.recorder.waiting.replace(serial);
        let records = self.control.rank(self.rank).records;
        if before != serial && before != 0 {
            records.set(before, WAITS, 0);
        }
        if serial != 0 {
            records.set(serial, WAITS, Waits { peer, on }.to_word());
        }
    }

    /// The wait that readers know of is over.
    #[inline]
    pub(super) fn record_wait_over(&self) {
        let serial = self.recorder.waiting.replace(0);
        if serial != 0 {
            self.control.rank(self.rank).records.set(serial, WAITS, 0);
        }
    }
}
