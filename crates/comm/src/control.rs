//! The shared memory that a communicator works in, as words and addresses: the only place that turns the layout of
//! `unisono_core::layout` into references.
//!
//! It also keeps the first cause of a failure: whoever finds one writes it into its own record, then sets the abort
//! word, which ends every wait of every rank. Control words of peers are only ever copied and compared.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

#[cfg(feature = "cuda")]
use unisono_core::device::layout::{REPORT_EACH, REPORT_MADE, REPORT_WAITING};
use unisono_core::layout::{
    CAUSE_BYTES, ChannelFields, ControlLayout, Field, LATEST_WORDS, RECORD_WORDS, RankFields, SLOT_WORDS,
};
#[cfg(feature = "cuda")]
use unisono_core::recorder::{Clock, GpuView, GpuWait, GpuWork};
use unisono_core::recorder::{JobLabel, Presence, RankLabel, TickSource};
use unisono_node::identity::{self, ProcessStatus};
use unisono_node::{Lost, PlaneEvents, Process, SharedMemory};
use unisono_sync::memory::{words32, words64};
use unisono_sync::{AbortWord, EpochFlag, Fate, Journal, Sleepers, SlotRing, Ticks, Word};

use crate::cause::Cause;
use crate::error::{Error, Result};
#[cfg(feature = "cuda")]
use crate::recorder::ask::Page;

/// Settles the fate of a rank that leaves: no rank has this number.
pub(crate) const LEFT: u32 = u32::MAX - 1;

/// The words of one rank.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RankWords<'m> {
    /// Steps whose input chunk is staged.
    pub(crate) produced: EpochFlag<'m>,
    /// Steps whose reduced chunk is staged.
    pub(crate) reduced: EpochFlag<'m>,
    /// Calls completed in the high half, the chain's low half in the low half: one word, so that both fit together.
    pub(crate) trail: EpochFlag<'m>,
    /// Steps for which this rank has read all peers' chunks.
    pub(crate) consumed: EpochFlag<'m>,
    /// Calls completed, for observers: the trail counts modulo 2³².
    pub(crate) completed: EpochFlag<'m>,
    /// Its heartbeat.
    pub(crate) heartbeat: EpochFlag<'m>,
    /// Who sleeps on its words.
    pub(crate) sleepers: Sleepers<'m>,
    /// Whether it goes on into the next generation.
    fate: Fate<'m>,
    /// Its call slots.
    pub(crate) slots: SlotRing<'m>,
    /// What it did last.
    pub(crate) records: Journal<'m, RECORD_WORDS>,
    /// First byte of its staged input.
    pub(crate) staging_in: *mut u8,
    /// First byte of its staged results.
    pub(crate) staging_out: *mut u8,
}

/// The channel from one rank to another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Channel<'m> {
    /// Bytes written so far, by the sender.
    pub(crate) head: EpochFlag<'m>,
    /// How the latest message begins, if it was written whole; its number is the head behind it.
    pub(crate) latest: Journal<'m, LATEST_WORDS>,
    /// Bytes read so far, by the receiver.
    pub(crate) tail: EpochFlag<'m>,
    /// The ring.
    pub(crate) ring: *mut u8,
    /// Its length, a power of two.
    pub(crate) bytes: usize,
}

/// What the memory tells readers of other processes about its job.
#[derive(Clone, Debug)]
pub(crate) struct About {
    pub(crate) job: String,
    pub(crate) generation: u32,
    pub(crate) host: String,
    /// Whether this rank records its calls.
    pub(crate) is_recording: bool,
}

/// The shared memory of all ranks of a communicator on this host.
pub(crate) struct Control {
    words: Vec<RankWords<'static>>,
    /// The channels to each rank and from each.
    channels: [Vec<Channel<'static>>; 2],
    abort: AbortWord<'static>,
    layout: ControlLayout,
    /// Our own rank here: where we record causes.
    me: usize,
    /// Names of the ranks, for causes.
    names: Vec<String>,
    about: About,
    /// Who made this: a child that was forked from it has no part in the job.
    process: Process,
    /// Held while our record is written: the operating thread, the plane's and observers' may all find a cause.
    recording: Mutex<()>,
    /// The generation that went on in other memory.
    superseded: OnceLock<u32>,
    /// Declared last, so that it is unmapped after everything above is gone.
    memory: Arc<SharedMemory>,
}

// SAFETY: the raw pointers in `words` point into `memory`, which is `Send` and `Sync`; what they point to is accessed
// through atomics, or (staging) by the one operating thread under the order that the flags give.
unsafe impl Send for Control {}
// SAFETY: as above.
unsafe impl Sync for Control {}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("me", &self.me)
            .field("ranks", &self.words.len())
            .finish_non_exhaustive()
    }
}

impl Control {
    /// Bytes of shared memory for this many ranks.
    pub(crate) fn bytes(ranks: usize) -> usize {
        ControlLayout::new(ranks).total_bytes()
    }

    /// The control region in `memory`, seen by rank `me`; `names[r]` is how messages call rank r. Tells readers of other
    /// processes that this rank is there.
    ///
    /// # Panics
    /// If `memory` is shorter than the layout: it was created or checked with that very length.
    pub(crate) fn new(memory: Arc<SharedMemory>, me: usize, names: Vec<String>, about: About) -> Self {
        let layout = ControlLayout::new(names.len());
        assert!(memory.bytes() >= layout.total_bytes(), "{} < {}", memory.bytes(), layout.total_bytes());
        let base = memory.as_ptr();
        let words = (0..names.len()).map(|rank| rank_words(base, &layout.rank(rank))).collect();
        // SAFETY: the abort word lies in the mapping, which is kept alive by `memory` beside it.
        let abort = AbortWord::new(unsafe { &words32(base.add(layout.abort().offset), 1)[0] });
        let channel = |sender, receiver| channel(base, &layout.channel(sender, receiver));
        let ranks = 0..names.len();
        let channels = [
            ranks.clone().map(|rank| channel(me, rank)).collect(),
            ranks.map(|rank| channel(rank, me)).collect(),
        ];
        let (process, recording) = (Process::this(), Mutex::new(()));
        let superseded = OnceLock::new();
        let control =
            Self { words, channels, abort, layout, me, names, about, process, recording, superseded, memory };
        control.introduce();
        control
    }

    /// Writes who we are, and as rank 0 what job this is.
    fn introduce(&self) {
        let ticks = Ticks::here();
        let label = RankLabel {
            presence: Presence::Here,
            pid: identity::pid(),
            started: ProcessStatus::of(identity::pid()).map_or(0, |status| status.started),
            ticks: if ticks == Ticks::Clock { TickSource::Clock } else { TickSource::Counter },
            is_recording: self.about.is_recording,
        };
        self.tell(self.layout.rank(self.me).identity, &label.to_words());
        if self.me == 0 {
            let About { job, generation, host, .. } = self.about.clone();
            let label = JobLabel { ranks: self.names.len(), generation, created: ticks.now(), job, host };
            self.tell(self.layout.job(), &label.to_words());
        }
    }

    /// Tells readers that this rank takes part no more.
    pub(crate) fn leave(&self, presence: Presence) {
        let identity = self.words_of(self.layout.rank(self.me).identity);
        identity[RankLabel::PRESENCE].store_release(presence as u64);
    }

    /// Writes `content` so that its first word, which makes the rest valid, is seen last.
    fn tell(&self, field: Field, content: &[u64]) {
        let words = self.words_of(field);
        words.iter().zip(content).skip(1).for_each(|(word, value)| word.store_relaxed(*value));
        words[0].store_release(content[0]);
    }

    /// What this memory tells about its job.
    pub(crate) const fn about(&self) -> &About {
        &self.about
    }

    /// The words of `rank`.
    #[inline(always)]
    pub(crate) fn rank(&self, rank: usize) -> &RankWords<'_> {
        &self.words[rank]
    }

    /// The channel to `rank`.
    #[inline(always)]
    pub(crate) fn channel_to(&self, rank: usize) -> &Channel<'_> {
        &self.channels[0][rank]
    }

    /// The channel from `rank`.
    #[inline(always)]
    pub(crate) fn channel_from(&self, rank: usize) -> &Channel<'_> {
        &self.channels[1][rank]
    }

    /// Our rank, and the number of ranks.
    pub(crate) fn member(&self) -> (usize, usize) {
        (self.me, self.words.len())
    }

    /// Number of ranks.
    pub(crate) fn world_size(&self) -> usize {
        self.words.len()
    }

    /// Whether `rank` goes on into the next generation, or who settled that it does not.
    pub(crate) fn fate(&self, rank: usize) -> Fate<'_> {
        self.words[rank].fate
    }

    /// The memory itself.
    pub(crate) const fn memory(&self) -> &Arc<SharedMemory> {
        &self.memory
    }

    /// From now on, windows of this memory say that the communicator went on as `generation`.
    pub(crate) fn supersede(&self, generation: u32) {
        // Only whoever leaves this memory calls it, once.
        let _ = self.superseded.set(generation);
    }

    /// What window `id` of this memory answers once the communicator went on elsewhere.
    pub(crate) fn outdated(&self, id: u64) -> Option<Error> {
        self.superseded.get().map(|generation| Error::Generation { window: id, generation: *generation })
    }

    /// How messages call `rank`.
    pub(crate) fn name(&self, rank: usize) -> &str {
        &self.names[rank]
    }

    /// The word that ends all waits.
    #[inline(always)]
    pub(crate) fn abort(&self) -> AbortWord<'_> {
        self.abort
    }

    /// Refuses a child that was forked from the process that made this.
    #[inline(always)]
    pub(crate) fn check_process(&self) -> Result<()> {
        if self.process.is_this() { Ok(()) } else { Err(self.forked()) }
    }

    #[cold]
    fn forked(&self) -> Error {
        Error::Forked { rank: self.me, parent: self.process.pid(), child: std::process::id() }
    }

    /// Records `cause` and ends all waits of all ranks, unless somebody was first. A forked child fails nobody.
    pub(crate) fn fail(&self, cause: &Cause) {
        if !self.process.is_this() {
            return;
        }
        let _guard = self.recording.lock().unwrap_or_else(PoisonError::into_inner);
        if self.abort.raised().is_some() {
            return;
        }
        let record = self.record(self.me);
        let bytes = cause.to_bytes(CAUSE_BYTES - 8);
        record[0].store_relaxed(bytes.len() as u64);
        for (word, chunk) in record[1..].iter().zip(bytes.chunks(8)) {
            let mut value = [0; 8];
            value[..chunk.len()].copy_from_slice(chunk);
            word.store_relaxed(u64::from_le_bytes(value));
        }
        self.abort.raise(self.me as u32);
    }

    /// The first cause, if anything failed. A record that makes no sense is reported as an abort by its rank.
    pub(crate) fn cause(&self) -> Option<Cause> {
        let member = self.abort.raised()? as usize;
        let unreadable = || Cause::Aborted {
            rank: member as u32,
            reason: "its record of the cause is unreadable".to_owned(),
        };
        if member >= self.words.len() {
            return Some(unreadable());
        }
        let words: Vec<u64> = self.record(member).iter().map(Word::load_relaxed).collect();
        Some(Cause::from_words(&words).unwrap_or_else(unreadable))
    }

    /// What the memory says of its job.
    #[cfg(feature = "cuda")]
    pub(crate) fn label(&self) -> Option<JobLabel> {
        let words: Vec<u64> = self.words_of(self.layout.job()).iter().map(Word::load_relaxed).collect();
        JobLabel::from_words(&words).ok()
    }

    /// Where the page lies that the GPU of this rank writes.
    #[cfg(feature = "cuda")]
    pub(crate) fn gpu_field(&self) -> Field {
        self.layout.rank(self.me).gpu
    }

    /// The words of that page.
    #[cfg(feature = "cuda")]
    pub(crate) fn gpu(&self) -> &[impl Word<u64>] {
        self.words_of(self.gpu_field())
    }

    /// The page of any rank, as who asks for its calls uses it.
    #[cfg(feature = "cuda")]
    pub(crate) fn gpu_page(&self, rank: usize) -> impl Page {
        Words(self.words_of(self.layout.rank(rank).gpu))
    }

    /// The calls that GPUs of `rank` have waited in for half a second: in the world of the ranks, and in that of all devices.
    #[cfg(feature = "cuda")]
    pub(crate) fn awaited_on_gpu(&self, rank: usize) -> [Option<u32>; 2] {
        let page = self.words_of(self.layout.rank(rank).gpu);
        [REPORT_WAITING, REPORT_EACH[1]].map(|at| match GpuWait::from_word(page[at].load_relaxed())?.work {
            GpuWork::Call(number) => Some(number),
            _ => None,
        })
    }

    /// The numbers of the latest calls that this rank put into streams, in both worlds; `None` where that is not known.
    #[cfg(feature = "cuda")]
    pub(crate) fn made_on_gpu(&self) -> [Option<u32>; 2] {
        let page = self.gpu();
        [REPORT_MADE, REPORT_EACH[0]].map(|at| GpuView::made_of(page[at].load_relaxed()))
    }

    /// Where the recorder of the GPU of `rank` lies.
    #[cfg(feature = "cuda")]
    pub(crate) fn gpu_records(&self, rank: usize) -> Field {
        self.layout.rank(rank).gpu_records
    }

    /// What is known of the GPU of `rank`; `None` if it works on none.
    #[cfg(feature = "cuda")]
    pub(crate) fn gpu_view(&self, rank: usize, clock: &Clock) -> Option<GpuView> {
        let fetch = |field: Field| -> Result<Vec<u64>> {
            Ok(self.words_of(field).iter().map(Word::load_relaxed).collect())
        };
        let fields = self.layout.rank(rank);
        GpuView::read((fields.gpu, fields.gpu_records), clock, &fetch).ok()?.1
    }

    fn record(&self, rank: usize) -> &[impl Word<u64>] {
        self.words_of(self.layout.rank(rank).cause)
    }

    /// The words of a field of the layout.
    pub(crate) fn words_of(&self, field: Field) -> &[impl Word<u64>] {
        words_in(&self.memory, field)
    }
}

/// The words of a field that lies in `memory`.
///
/// # Panics
/// If it does not.
pub(crate) fn words_in(memory: &SharedMemory, field: Field) -> &[impl Word<u64>] {
    assert!(field.end() <= memory.bytes(), "{field:?} in {} bytes", memory.bytes());
    // SAFETY: the field lies in the mapping, aligned to a line, and is accessed as 64-bit atomics only.
    unsafe { words64(memory.as_ptr().add(field.offset), field.bytes / 8) }
}

/// Words of our own mapping.
#[cfg(feature = "cuda")]
struct Words<'w, W>(&'w [W]);

#[cfg(feature = "cuda")]
impl<W: Word<u64>> Page for Words<'_, W> {
    fn load(&self, word: usize) -> Option<u64> {
        // SYNC: what the recorder held is visible after its answer.
        self.0.get(word).map(Word::load_acquire)
    }

    fn store(&self, word: usize, value: u64) -> bool {
        self.0.get(word).map(|word| word.store_release(value)).is_some()
    }
}

impl PlaneEvents for Control {
    fn beat(&self) {
        let heartbeat = self.words[self.me].heartbeat;
        // Whatever stands there, it must only be another value than before.
        heartbeat.publish(heartbeat.current().wrapping_add(1));
    }

    fn heartbeat_of(&self, rank: usize) -> u64 {
        self.words[rank].heartbeat.current()
    }

    fn on_lost(&self, rank: usize, _pid: u32, lost: Lost) {
        // Who leaves in good order has at least met us: the meeting is the first call.
        if lost == Lost::Left && self.words[rank].completed.current() > 0 {
            return;
        }
        self.fail(&Cause::died(rank, self.names[rank].clone(), lost));
    }
}

/// The channel whose fields lie so, in the mapping at `base`.
fn channel(base: *mut u8, fields: &ChannelFields) -> Channel<'static> {
    // SAFETY: the fields lie in the mapping, aligned to lines; all but the ring is accessed as atomics only.
    unsafe {
        let sent = words64(base.add(fields.head.offset), 1 + LATEST_WORDS);
        Channel {
            head: EpochFlag::new(&sent[0]),
            latest: Journal::new(&sent[1..]),
            tail: EpochFlag::new(&words64(base.add(fields.tail.offset), 1)[0]),
            ring: base.add(fields.ring.offset),
            bytes: fields.ring.bytes,
        }
    }
}

fn rank_words(base: *mut u8, fields: &RankFields) -> RankWords<'static> {
    // SAFETY: all fields lie in the mapping that `Control` owns beside these words, and are aligned to lines; the
    // references never leave `Control` with a longer life than its own.
    let words = |field: Field| unsafe { words64(base.add(field.offset), field.bytes / 8) };
    let flag = |field: Field, at: usize| EpochFlag::new(&words(field)[at]);
    // SAFETY: as above; the count of sleepers has a 64-byte half line of its own.
    let sleepers = unsafe { &words32(base.add(fields.liveness.offset + 64), 1)[0] };
    // SAFETY: as above; the fate has a word of the heartbeat's half line.
    let fate = unsafe { &words32(base.add(fields.liveness.offset + 8), 1)[0] };
    // SAFETY: staging lies in the mapping.
    let at = |field: Field| unsafe { base.add(field.offset) };
    RankWords {
        produced: flag(fields.produced, 0),
        reduced: flag(fields.reduced, 0),
        trail: flag(fields.consumed, 0),
        consumed: flag(fields.consumed, 1),
        completed: flag(fields.consumed, 2),
        heartbeat: flag(fields.liveness, 0),
        sleepers: Sleepers::new(sleepers),
        fate: Fate::new(fate),
        slots: SlotRing::new(words(fields.slots), SLOT_WORDS),
        records: Journal::new(words(fields.records)),
        staging_in: at(fields.staging_in),
        staging_out: at(fields.staging_out),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control(me: usize) -> Control {
        let memory = SharedMemory::create(Control::bytes(2)).unwrap();
        let about = About { job: "test".into(), generation: 0, host: "here".into(), is_recording: true };
        Control::new(Arc::new(memory), me, vec!["rank 0".into(), "rank 1".into()], about)
    }

    #[test]
    fn the_first_cause_stands() {
        let control = control(1);
        assert_eq!(control.cause(), None);
        control.on_lost(0, 5, Lost::SocketClosed);
        control.fail(&Cause::Dropped { rank: 1 });
        let expected = Cause::Died { rank: 0, who: "rank 0".into(), how: "its socket closed".into() };
        assert_eq!(control.cause(), Some(expected));
    }

    #[test]
    fn a_farewell_is_a_failure_only_before_the_first_meeting() {
        let (early, late) = (control(0), control(0));
        early.on_lost(1, 5, Lost::Left);
        assert!(matches!(early.cause(), Some(Cause::Died { rank: 1, .. })));
        late.rank(1).completed.publish(1);
        late.on_lost(1, 5, Lost::Left);
        assert_eq!(late.cause(), None);
    }

    #[test]
    fn an_abort_word_or_record_from_nowhere_is_still_a_cause() {
        let control = control(0);
        assert!(control.abort().raise(1));
        assert!(matches!(control.cause(), Some(Cause::Aborted { rank: 1, .. })));
        let other = self::control(0);
        assert!(other.abort().raise(77));
        assert!(matches!(other.cause(), Some(Cause::Aborted { rank: 77, .. })));
    }
}
