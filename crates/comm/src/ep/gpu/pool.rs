//! What outputs are made of: the pool, which peers write into, and memory of our own where that is full.
//!
//! A slab goes back when its last owner drops it. Work on it may still be in streams then; so an event is recorded behind that, and whoever
//! gets the memory next waits for it on its stream. The host waits for nobody, but where a graph is captured: a graph cannot wait for events
//! outside of it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use unisono_core::layout::Field;
use unisono_cuda::capture::drop_released_of;
use unisono_cuda::{Device, DeviceBuffer, Event, Result, Stream};

use super::core::Core;

/// Slabs begin and end on multiples of this.
const STEP: usize = 512;

/// Memory of a call, until all who hold it are gone.
#[derive(Debug)]
pub(crate) struct Slab {
    core: Arc<Core>,
    at: At,
    /// Streams that may still work on it: that of its call first.
    streams: Mutex<Vec<Stream>>,
}

#[derive(Debug)]
enum At {
    /// Bytes of the pool.
    Pool(Range<usize>),
    /// Taken when it is given back.
    Own(Option<DeviceBuffer>),
}

/// Work that may still touch a range of the pool.
#[derive(Debug)]
struct Pending {
    range: Range<usize>,
    stream: Stream,
    event: Event,
}

/// Memory of our own that waits for its next use.
#[derive(Debug)]
struct Spare {
    buffer: DeviceBuffer,
    pending: Vec<(Stream, Event)>,
}

#[derive(Debug, Default)]
struct State {
    /// Free ranges: where each begins, and its bytes. No two touch.
    free: BTreeMap<usize, usize>,
    pending: Vec<Pending>,
    spares: Vec<Spare>,
    /// What was given back while a stream of it was captured: there could be no event.
    captured: Vec<(At, Vec<Stream>)>,
    /// Slabs that had no room in the pool.
    outside: u64,
}

/// The pool of one rank.
#[derive(Debug)]
pub(super) struct Pool {
    /// The memory of the buffer on our device.
    base: u64,
    field: Field,
    state: Mutex<State>,
}

/// For whom memory is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum For {
    /// Peers write there: the pool, or nothing.
    Peers,
    /// Memory of our own, if the pool is full.
    Us,
}

impl Pool {
    /// Of the pool at `field` of the memory that begins at `base`.
    pub(super) fn new(base: u64, field: Field) -> Self {
        let free = if field.bytes < STEP {
            BTreeMap::new()
        } else {
            BTreeMap::from([(0, field.bytes / STEP * STEP)])
        };
        Self { base, field, state: Mutex::new(State { free, ..State::default() }) }
    }

    /// Bytes that are free, and slabs so far that had no room.
    pub(super) fn standing(&self) -> (usize, u64) {
        let mut state = self.state();
        state.recall();
        (state.free.values().sum(), state.outside)
    }

    /// Where `bytes` at `address` lie, from the start of the memory that peers reach, if they lie in the pool.
    pub(super) fn find(&self, address: u64, bytes: usize) -> Option<usize> {
        let offset = usize::try_from(address.checked_sub(self.base)?).ok()?;
        let is_inside = offset >= self.field.offset && offset.checked_add(bytes)? <= self.field.end();
        is_inside.then_some(offset)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slab {
    /// Takes `bytes` for work in `stream`; `None` if they are for peers and the pool is full.
    pub(super) fn take(
        core: &Arc<Core>,
        bytes: usize,
        (stream, is_captured): (&Stream, bool),
        who: For,
    ) -> Result<Option<Arc<Self>>> {
        let bytes = bytes.max(1).next_multiple_of(STEP);
        // What graphs that are gone have kept: to give a slab back takes an event, and frees nothing.
        drop_released_of::<Self>();
        let mut state = core.pool.state();
        state.recall();
        let at = match state.take_range(bytes) {
            Some(range) => {
                state.settle(&range, stream, is_captured)?;
                At::Pool(range)
            }
            None if who == For::Peers => return Ok(None),
            None => {
                state.outside += 1;
                At::Own(Some(state.take_spare(&core.device, bytes, (stream, is_captured))?))
            }
        };
        drop(state);
        Ok(Some(Arc::new(Self { core: core.clone(), at, streams: Mutex::new(vec![stream.clone()]) })))
    }

    /// Its first byte.
    pub(crate) fn address(&self) -> u64 {
        match &self.at {
            At::Pool(range) => self.core.pool.base + (self.core.pool.field.offset + range.start) as u64,
            At::Own(buffer) => buffer.as_ref().map_or(0, DeviceBuffer::address),
        }
    }

    /// Bytes from the start of the memory that peers reach, if it lies there.
    pub(super) fn offset(&self) -> Option<usize> {
        match &self.at {
            At::Pool(range) => Some(self.core.pool.field.offset + range.start),
            At::Own(_) => None,
        }
    }

    pub(crate) const fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// Work of `stream` may touch it, too: its memory goes to nobody else before that is done.
    pub(crate) fn use_on(&self, stream: &Stream) {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        if streams.iter().all(|known| known.raw() != stream.raw()) {
            streams.push(stream.clone());
        }
    }
}

impl PartialEq for Slab {
    /// Whether both are the same memory.
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // A forked child has no part in this.
        if self.core.control.check_process().is_err() {
            std::mem::forget(std::mem::replace(&mut self.at, At::Own(None)));
            return;
        }
        let at = std::mem::replace(&mut self.at, At::Own(None));
        let streams = std::mem::take(&mut *self.streams.lock().unwrap_or_else(PoisonError::into_inner));
        let mut state = self.core.pool.state();
        if let Err((at, streams)) = state.give_back(at, streams) {
            state.captured.push((at, streams));
        }
    }
}

impl State {
    /// Takes the first range that is long enough.
    fn take_range(&mut self, bytes: usize) -> Option<Range<usize>> {
        let (start, length) =
            self.free.iter().map(|(start, length)| (*start, *length)).find(|(_, length)| *length >= bytes)?;
        self.free.remove(&start);
        if length > bytes {
            self.free.insert(start + bytes, length - bytes);
        }
        Some(start..start + bytes)
    }

    /// Makes `range` free, as one with its neighbours.
    fn insert(&mut self, range: Range<usize>) {
        let (mut start, mut end) = (range.start, range.end);
        if let Some((before, length)) =
            self.free.range(..start).next_back().map(|(at, length)| (*at, *length))
            && before + length == start
        {
            self.free.remove(&before);
            start = before;
        }
        if let Some(length) = self.free.remove(&end) {
            end += length;
        }
        self.free.insert(start, end - start);
    }

    /// What was touched on other streams is waited for: by `stream`, or where that is captured by us.
    fn settle(&mut self, range: &Range<usize>, stream: &Stream, is_captured: bool) -> Result<()> {
        let touches = |pending: &Pending| pending.range.start < range.end && range.start < pending.range.end;
        let (ours, others) = std::mem::take(&mut self.pending).into_iter().partition(touches);
        self.pending = others;
        let ours: Vec<Pending> = ours;
        for pending in ours {
            wait(&pending.stream, &pending.event, stream, is_captured)?;
            // What lies beside the range may still be touched.
            for rest in [pending.range.start..range.start, range.end..pending.range.end] {
                if rest.start < rest.end {
                    self.pending.push(Pending {
                        range: rest,
                        stream: pending.stream.clone(),
                        event: pending.event.clone(),
                    });
                }
            }
        }
        Ok(())
    }

    fn take_spare(
        &mut self,
        device: &Device,
        bytes: usize,
        (stream, is_captured): (&Stream, bool),
    ) -> Result<DeviceBuffer> {
        let fits = |spare: &Spare| (bytes..=bytes.saturating_mul(2)).contains(&spare.buffer.bytes());
        if let Some(at) = self.spares.iter().position(fits) {
            let spare = self.spares.swap_remove(at);
            for (other, event) in &spare.pending {
                wait(other, event, stream, is_captured)?;
            }
            return Ok(spare.buffer);
        }
        Stream::beside_captures(|| DeviceBuffer::new(device, bytes))
    }

    /// Takes back what `streams` may still work on. Not while one of them is captured.
    fn give_back(&mut self, mut at: At, streams: Vec<Stream>) -> std::result::Result<(), (At, Vec<Stream>)> {
        // A stream that cannot tell has failed, and does nothing any more.
        if streams.iter().any(|stream| stream.is_capturing().unwrap_or(false)) {
            return Err((at, streams));
        }
        let mut events = Vec::new();
        for stream in streams {
            let recorded =
                Event::new(stream.device(), false).and_then(|event| event.record(&stream).map(|()| event));
            match recorded {
                Ok(event) => events.push((stream, event)),
                // The context is lost, or the driver has no more of what events need: the memory is not used again.
                Err(_) => {
                    std::mem::forget(at);
                    return Ok(());
                }
            }
        }
        match &mut at {
            At::Pool(range) => {
                let pending = |(stream, event)| Pending { range: range.clone(), stream, event };
                self.pending.extend(events.into_iter().map(pending));
                self.insert(range.clone());
            }
            At::Own(buffer) => {
                self.spares.extend(buffer.take().map(|buffer| Spare { buffer, pending: events }));
            }
        }
        Ok(())
    }

    /// Takes back what could not be before.
    fn recall(&mut self) {
        for (at, streams) in std::mem::take(&mut self.captured) {
            if let Err(still) = self.give_back(at, streams) {
                self.captured.push(still);
            }
        }
    }
}

/// Work of `stream` comes behind `event` of `other`.
fn wait(other: &Stream, event: &Event, stream: &Stream, is_captured: bool) -> Result<()> {
    if is_captured {
        return Stream::beside_captures(|| event.synchronize());
    }
    if other.raw() == stream.raw() { Ok(()) } else { stream.wait(event) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(free: &[(usize, usize)]) -> State {
        State { free: free.iter().copied().collect(), ..State::default() }
    }

    #[test]
    fn ranges_are_taken_from_the_front_and_join_their_neighbours() {
        let mut pool = state(&[(0, 4096)]);
        let taken: Vec<_> =
            [512, 1024, 512].into_iter().map(|bytes| pool.take_range(bytes).unwrap()).collect();
        assert_eq!(taken, [0..512, 512..1536, 1536..2048]);
        assert_eq!(pool.take_range(4096), None);
        pool.insert(taken[0].clone());
        pool.insert(taken[2].clone());
        assert_eq!(pool.free, BTreeMap::from([(0, 512), (1536, 2560)]));
        assert_eq!(pool.take_range(1024), Some(1536..2560));
        pool.insert(1536..2560);
        pool.insert(taken[1].clone());
        assert_eq!(pool.free, BTreeMap::from([(0, 4096)]));
    }
}
