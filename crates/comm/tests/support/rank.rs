//! One rank that runs cases: it lays out buffers, submits a batch of calls back to back, and then verifies each alone.
//!
//! What ranks may do differently in one call is drawn per rank: in place or not, byte addresses, the door to the library,
//! whether it blocks, or runs in a scope or a group.

use unisono::{Communicator, Kind, Observer, Pending, Result, Stream, Window, group};

use super::case::{Action, Case, Memory};
use super::doors::{submit, take_from_anybody};
use super::prepared::{Buffer, Door, Form, Layout, Prepared};
use super::random::Random;
use super::region::{MAX_SHIFT, Region, footprint};
use super::sides::{Side, sides};
use super::verify::{Digests, Verifier, lay_out, scalar};

/// What runs between calls, to make ranks early and late.
pub(crate) type Pause<'a> = &'a mut dyn FnMut();

/// A rank, its communicator and its windows.
pub(crate) struct Rank {
    communicator: Communicator,
    windows: [Window<u8>; 2],
    seed: u64,
    /// What messages call the communicator.
    name: String,
    verifier: Verifier,
}

impl Rank {
    /// Makes the windows, of `window_bytes` each. Collective.
    pub(crate) fn new(
        communicator: Communicator,
        name: &str,
        seed: u64,
        window_bytes: usize,
    ) -> Result<Self> {
        let window = |memory| communicator.window::<u8>(window_bytes, memory);
        let windows = [window(unisono::Memory::Host)?, window(unisono::Memory::Pinned)?];
        let verifier = Verifier::new(seed);
        Ok(Self { communicator, windows, seed, name: name.to_owned(), verifier })
    }

    pub(crate) const fn rank(&self) -> usize {
        self.communicator.rank()
    }

    pub(crate) fn world_size(&self) -> usize {
        self.communicator.world_size()
    }

    pub(crate) fn observer(&self) -> Observer {
        self.communicator.observer()
    }

    /// Ends the world: closes one window, leaves the other to the communicator. Collective.
    pub(crate) fn end(self) -> Result<()> {
        let [first, _second] = self.windows;
        first.close(&self.communicator)?;
        self.communicator.destroy()
    }

    /// Runs these cases back to back, then verifies each. The digests of all results.
    pub(crate) fn run(&mut self, cases: &[Case], pause: Pause<'_>) -> std::result::Result<Digests, String> {
        let mut used = [0; 2];
        let mut prepared = Vec::with_capacity(cases.len());
        for case in cases {
            let ready = self.prepare(*case, &mut used);
            prepared.push(ready.map_err(|error| self.complaint(case, &error.to_string()))?);
        }
        self.submit_all(&prepared, pause)?;
        let mut digests = Digests::default();
        for ready in &mut prepared {
            let of_case = self.verifier.verify(ready).map_err(|problem| {
                let doors = format!("{:?} {:?}: {problem}", ready.form, ready.door);
                self.complaint(&ready.case, &doors)
            })?;
            digests = of_case.after(digests);
        }
        Ok(digests)
    }

    fn complaint(&self, case: &Case, problem: &str) -> String {
        let (rank, world_size, name) = (self.rank(), self.world_size(), &self.name);
        format!("rank {rank} of {world_size}, {name}, {case:?}, UNISONO_TEST_SEED={}: {problem}", self.seed)
    }

    /// Where the buffers of `case` lie: plain where the windows, of which `used` bytes are taken, are full. Equal on all
    /// ranks.
    fn memory(&self, case: &Case, used: &[usize; 2]) -> Memory {
        let both = 2 * footprint(case.most_bytes(self.world_size()));
        let fits = |which: usize| used[which] + both <= self.windows[which].len();
        match case.memory {
            Memory::OneWindow | Memory::ToWindow if fits(1) => case.memory,
            Memory::FromWindow if fits(0) => case.memory,
            Memory::TwoWindows if fits(0) && fits(1) => case.memory,
            _ => Memory::Plain,
        }
    }

    fn prepare(&mut self, case: Case, used: &mut [usize; 2]) -> Result<Prepared> {
        let (rank, world_size) = (self.rank(), self.world_size());
        let mut own = Random::of(&[self.seed, case.number, rank as u64, 1]);
        let (source_window, target_window) = match self.memory(&case, used) {
            Memory::Plain => (None, None),
            Memory::OneWindow => (Some(1), Some(1)),
            Memory::TwoWindows => (Some(0), Some(1)),
            Memory::FromWindow => (Some(0), None),
            Memory::ToWindow => (None, Some(1)),
        };
        let (mut source, target) = sides(&case, rank, world_size, &mut own);
        let form = form(&case, (&source, &target), source_window == target_window, &mut own);
        if form == Form::SameMemory && case.action == Action::Call(Kind::AllToAllV) {
            source.spread = target.spread.clone();
        }
        let is_plain = (source_window, target_window) == (None, None);
        let door = match is_plain && form != Form::SameMemory {
            true => own.pick(&[Door::Raw, Door::Slices, Door::Stream]),
            false => Door::Raw,
        };
        let is_from_anybody = matches!(case.action, Action::ToAnybody { .. });
        let poison = own.next() as u8;
        let most = case.most_bytes(world_size);
        let mut buffer = |layout: Layout, which: Option<usize>| -> Result<Buffer> {
            // Who takes from anybody hands over slices.
            let is_shifted = door == Door::Raw && !is_from_anybody && own.once_in(2);
            let shift = if is_shifted { own.below(MAX_SHIFT + 1) } else { 0 };
            // A side in which we have no part: nothing, or something that must stay as it is.
            let idle = if own.once_in(2) { case.count } else { 0 };
            let count = if layout.is_idle() { idle } else { layout.spread.room };
            let bytes = count * case.dtype.size();
            let region = match which {
                None => Region::plain(bytes, shift),
                Some(which) => Region::in_window(&mut self.windows[which], used[which], bytes, shift)?,
            };
            if let Some(which) = which {
                used[which] += footprint(most);
            }
            let mut buffer =
                Buffer { region, parts: layout.parts(case.dtype.size()), results: layout.results };
            lay_out(self.seed, &case, poison, &mut buffer);
            Ok(buffer)
        };
        let (first, second) = if form == Form::OutOfPlace {
            (
                buffer(Layout::input(&source), source_window)?,
                Some(buffer(Layout::output(&target), target_window)?),
            )
        } else {
            (buffer(Layout::both(&source, &target, rank), target_window)?, None)
        };
        if let (Some(which), None) = (source_window, &second) {
            // Taken in any case: ranks that are in place must find as much room as the others for what comes.
            used[which] += footprint(most);
        }
        Ok(Prepared {
            case,
            form,
            door,
            rank,
            world_size,
            scalar: scalar(self.seed, &case, rank),
            out: source.spread,
            into: target.spread,
            first,
            second,
            poison,
            senders: Vec::new().into(),
        })
    }

    /// Submits all, in order: one after the other, or some in a scope or a group.
    fn submit_all(&self, prepared: &[Prepared], pause: Pause<'_>) -> std::result::Result<(), String> {
        let mut own = Random::of(&[
            self.seed,
            prepared.first().map_or(0, |one| one.case.number),
            self.rank() as u64,
            4,
        ]);
        let mut rest = prepared;
        while !rest.is_empty() {
            let some = 1 + own.below(rest.len().min(10));
            // Who takes from anybody blocks: it is in no group.
            let free = rest.iter().take(some).take_while(|one| !one.takes_from_anybody()).count();
            let (way, length, result) = match own.below(10) {
                0 => ("in a scope", some, self.in_scope(&rest[..some], &mut own, pause)),
                1 if free > 0 => ("in a group", free, self.in_group(&rest[..free], &mut own)),
                _ => ("alone", 1, self.alone(&rest[0], pause)),
            };
            let (now, later) = rest.split_at(length);
            result.map_err(|error| {
                let calls: Vec<_> = now.iter().map(|one| (one.case.action, one.form, one.door)).collect();
                self.complaint(&now[0].case, &format!("{way} {calls:?}: {error}"))
            })?;
            rest = later;
        }
        Ok(())
    }

    fn alone(&self, ready: &Prepared, pause: Pause<'_>) -> Result<()> {
        pause();
        if ready.takes_from_anybody() {
            return take_from_anybody(&self.communicator, ready);
        }
        let stream = Stream::host();
        for kind in ready.kinds(false) {
            match ready.door {
                Door::Stream => submit(&self.communicator.on(&stream), ready, kind)?,
                _ => submit(&self.communicator, ready, kind)?,
            }
        }
        Ok(())
    }

    /// Waits, tests and forgets in any order; some calls in between block.
    fn in_scope(&self, prepared: &[Prepared], own: &mut Random, pause: Pause<'_>) -> Result<()> {
        self.communicator.scope(|scope| {
            let mut pending: Vec<Pending<'_>> = Vec::new();
            for ready in prepared {
                if ready.takes_from_anybody() || own.once_in(4) {
                    self.alone(ready, pause)?;
                } else {
                    for kind in ready.kinds(own.once_in(2)) {
                        pending.push(submit(scope, ready, kind)?);
                    }
                }
                if !pending.is_empty() && own.once_in(4) {
                    let at = own.below(pending.len());
                    let _: bool = pending[at].test()?;
                }
            }
            while !pending.is_empty() {
                let mut one = pending.swap_remove(own.below(pending.len()));
                match own.below(4) {
                    0 => one.wait()?,
                    1 => while !one.test()? {},
                    // Not asked for again: the end of the scope waits for it.
                    _ => {}
                }
            }
            Ok(())
        })
    }

    /// Collectives keep their order; messages that have a tag of their own go anywhere.
    fn in_group(&self, prepared: &[Prepared], own: &mut Random) -> Result<()> {
        let mut all: Vec<&Prepared> = prepared.iter().collect();
        for _ in 0..all.len() {
            let (from, to) = (own.below(all.len()), own.below(all.len()));
            if !matches!(all[from].case.action, Action::Call(_)) && all[from].case.has_own_tag() {
                let moved = all.remove(from);
                all.insert(to, moved);
            }
        }
        let stream = Stream::host();
        group(|group| {
            let on = group.on(&self.communicator, &stream);
            for ready in &all {
                for kind in ready.kinds(own.once_in(2)) {
                    submit(&on, ready, kind)?;
                }
            }
            Ok(())
        })
    }
}

/// Which buffers a rank hands over; both sides may lie in one where they are in the same memory.
fn form(case: &Case, (source, target): (&Side, &Side), may_be_one: bool, own: &mut Random) -> Form {
    let Action::Call(kind) = case.action else { return Form::OutOfPlace };
    if kind.is_multi() {
        return Form::InPlace;
    }
    let is_equal = kind != Kind::AllToAllV || source.spread.counts == target.spread.counts;
    if kind == Kind::Barrier || !may_be_one || !is_equal {
        return Form::OutOfPlace;
    }
    let needs_two = kind.is_uneven() || matches!(kind, Kind::Gather { .. } | Kind::Scatter { .. });
    let one = if needs_two { Form::SameMemory } else { Form::InPlace };
    own.pick(&[one, Form::SameMemory, Form::OutOfPlace, Form::OutOfPlace])
}
