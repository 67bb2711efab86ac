//! Several devices of one rank, and operations on a buffer of each.
//!
//! A communicator always has a world of its ranks, each on its first device. Where any rank has several, it has a second world, in
//! which every device has a *seat*: those of rank 0 in the order of its builder, then those of rank 1, and so on. That world has
//! arenas, kernels, epochs and blocks of its own, so both may be under way at once.
//!
//! An operation on several buffers is there the plain one on a buffer of each seat. So sums are by rank and then by buffer,
//! strictly so where sums of ranks are, an average is over all buffers, every device's links carry data, and nothing has to be
//! ordered between the streams: kernels of one rank find each other as those of different ranks do. Peers compare the call
//! as it was made.

use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;
use unisono_core::call::{HEADER_WORDS, Kind};
use unisono_core::device::Launch;
use unisono_core::device::layout::{REPORT_EACH, REPORT_MADE, REPORT_WAITING};
use unisono_core::layout::Field;
use unisono_core::recorder::{DeviceLabel, TickSource};
use unisono_cuda::Stream;
use unisono_node::SharedMemory;
use unisono_sync::{Ticks, Word};

use super::Gpu;
use crate::buffer::Place;
use crate::call::Call;
use crate::cause::Cause;
use crate::collectives::{Engine, Plan};
use crate::control::{Control, words_in};
use crate::error::{Error, Result};

/// Which seats are those of which rank.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Seats {
    /// The first seat of each rank, and the number of all.
    begins: Vec<usize>,
    /// The number that each seat's device has in the process of its rank.
    ordinals: Vec<u32>,
}

impl Seats {
    /// Of ranks whose devices have these numbers.
    pub(crate) fn new<'a>(devices: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let (mut begins, mut ordinals) = (vec![0], Vec::new());
        for devices in devices {
            ordinals.extend_from_slice(devices);
            begins.push(ordinals.len());
        }
        Self { begins, ordinals }
    }

    /// How many there are.
    pub(crate) fn number(&self) -> usize {
        self.ordinals.len()
    }

    /// Those of `rank`.
    pub(crate) fn of(&self, rank: usize) -> Range<usize> {
        self.begins[rank]..self.begins[rank + 1]
    }

    /// The most that any rank has.
    pub(crate) fn most(&self) -> usize {
        self.begins.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
    }

    /// The rank of a seat.
    fn rank_of(&self, seat: usize) -> usize {
        self.begins.partition_point(|begin| *begin <= seat) - 1
    }
}

/// One seat, as the side of the communicator on its GPU knows it.
#[derive(Clone, Debug)]
pub(crate) struct Seat {
    pub(crate) control: Arc<Control>,
    /// Its number, and how many there are.
    pub(crate) number: usize,
    pub(crate) all: usize,
    /// In the world of all devices; in that of the ranks, seats are ranks.
    seats: Option<Arc<Seats>>,
    /// What its kernels report into: a page of this memory.
    pub(crate) memory: Arc<SharedMemory>,
    pub(crate) page: Field,
    /// Where others read its flight recorder, in the same memory.
    pub(crate) records: Option<Field>,
}

impl Seat {
    /// Ours in the world of the ranks.
    pub(crate) fn of_rank(control: Arc<Control>) -> Self {
        let (number, all) = control.member();
        let (page, records) = (control.gpu_field(), Some(control.gpu_records(number)));
        Self { number, all, seats: None, memory: control.memory().clone(), page, records, control }
    }

    /// Our seat `number` in the world of all devices. No other rank reads what its kernels report, so it has memory of its own for that,
    /// which tells readers of the flight recorder whose it is.
    pub(crate) fn of_device(control: Arc<Control>, seats: Arc<Seats>, number: usize) -> Result<Self> {
        let (page, records) = (DeviceLabel::REPORT, DeviceLabel::RECORDS);
        let memory = Arc::new(SharedMemory::create(records.end())?);
        if let Some(job) = control.label() {
            let ticks = match Ticks::here() {
                Ticks::Counter => TickSource::Counter,
                Ticks::Clock => TickSource::Clock,
            };
            let (rank, ordinal) = (control.member().0, seats.ordinals[number]);
            let words = DeviceLabel { job, rank, seat: number, ordinal, ticks }.to_words();
            let label = words_in(&memory, DeviceLabel::FIELD);
            // SYNC: what a label says is visible before its first word.
            label.iter().zip(&words).skip(1).for_each(|(to, word)| to.store_relaxed(*word));
            label[0].store_release(words[0]);
        }
        let records = Some(records);
        Ok(Self { number, all: seats.number(), seats: Some(seats), memory, page, records, control })
    }

    /// The rank that has it.
    pub(crate) fn rank(&self) -> usize {
        self.control.member().0
    }

    /// The page that its kernels write.
    #[inline]
    pub(crate) fn page(&self) -> &[impl Word<u64>] {
        words_in(&self.memory, self.page)
    }

    /// The rank that has seat `seat`, of those that there are.
    pub(crate) fn rank_of(&self, seat: usize) -> usize {
        self.seats.as_ref().map_or(seat, |seats| seats.rank_of(seat))
    }

    /// The seats of `rank`.
    fn of(&self, rank: usize) -> Range<usize> {
        self.seats.as_ref().map_or(rank..rank + 1, |seats| seats.of(rank))
    }

    /// How messages call seat `seat`: as its rank, and where that has several devices, with the device.
    pub(crate) fn name(&self, seat: usize) -> String {
        let name = self.control.name(self.rank_of(seat));
        match &self.seats {
            None => name.to_owned(),
            Some(seats) => format!("{name} on its cuda:{}", seats.ordinals[seat]),
        }
    }

    /// Tells what the host has put into streams of this seat.
    #[inline]
    pub(crate) fn tell_made(&self, word: u64) {
        self.page()[REPORT_MADE].store_relaxed(word);
        if self.speaks_for_all() {
            self.control.gpu()[REPORT_EACH[0]].store_relaxed(word);
        }
    }

    /// Tells the other ranks what kernels of all devices wait for, which only our page says; those of the ranks' world tell it themselves.
    pub(crate) fn tell_waiting(&self) {
        if self.speaks_for_all() {
            self.control.gpu()[REPORT_EACH[1]].store_relaxed(self.page()[REPORT_WAITING].load_relaxed());
        }
    }

    /// Whether this is the first of several devices of a rank.
    #[inline]
    fn speaks_for_all(&self) -> bool {
        self.seats.is_some() && self.of(self.rank()).start == self.number
    }

    /// Where our kernels run, as messages tell it.
    pub(crate) fn place(&self) -> String {
        match &self.seats {
            None => "its GPU".to_owned(),
            Some(seats) => format!("its cuda:{}", seats.ordinals[self.number]),
        }
    }
}

/// What seats do in a call on several buffers.
pub(super) const fn kind_of_seats(kind: Kind, root: usize) -> Kind {
    match kind {
        Kind::AllReduceMulti { op } => Kind::AllReduce { op },
        Kind::BroadcastMulti { .. } => Kind::Broadcast { root: root as u32 },
        other => other,
    }
}

/// A call on several buffers that passed all local checks.
#[derive(Debug)]
pub(crate) struct PreparedEach {
    kind: Kind,
    words: [u64; HEADER_WORDS],
    /// Of each seat.
    parts: SmallVec<[Plan; 8]>,
}

impl Gpu {
    /// Our seats: those of all devices, or the one that we have.
    fn seats_mut(&mut self) -> &mut [Self] {
        match self.seats.is_empty() {
            true => std::slice::from_mut(self),
            false => &mut self.seats,
        }
    }

    /// Form and grid of a call, as `explain` tells them.
    pub(crate) fn choice(&self, kind: Kind, bytes: usize, size: usize) -> Launch {
        match self.seats.first().filter(|_| kind.is_multi()) {
            Some(seat) => seat.decide(kind_of_seats(kind, 0), bytes, size),
            None => self.decide(kind_of_seats(kind, 0), bytes, size),
        }
    }

    /// Checks a call on a buffer of each device, to be put into a stream of each, and loads its kernels. Nothing is begun.
    pub(crate) fn prepare_each(
        &mut self,
        engine: &mut Engine,
        call: &Call<'_>,
        streams: &[&Stream],
    ) -> Result<PreparedEach> {
        engine.check()?;
        self.check()?;
        let seats = self.seats_mut();
        let ordinals: SmallVec<[u32; 8]> = seats.iter().map(Self::ordinal).collect();
        check_each(seats, call, streams, &ordinals)?;
        let plan = engine.plan_each(call, &ordinals)?;
        let root = root_seat(&seats[0].seat, call.kind)?;
        let kind = kind_of_seats(call.kind, root);
        let parts: SmallVec<[_; 8]> = (0..seats.len()).map(|at| plan.on_local(at, kind)).collect();
        // What may wait comes before any kernel that waits for the others of this rank.
        for ((seat, part), stream) in seats.iter_mut().zip(&parts).zip(streams) {
            seat.find_kernels(part, stream)?;
        }
        Ok(PreparedEach { kind: call.kind, words: plan.header.to_words(), parts })
    }

    /// Puts a call that was checked into the streams. If the driver fails once a kernel is under way, the communicator does.
    pub(crate) fn enqueue_each(&mut self, on_each: &PreparedEach, streams: &[&Stream]) -> Result<()> {
        let control = self.control.clone();
        let seats = self.seats_mut();
        for (seat, stream) in seats.iter_mut().zip(streams) {
            seat.order_after_latest(stream)?;
        }
        let all = seats.len();
        for (at, ((seat, part), stream)) in seats.iter_mut().zip(&on_each.parts).zip(streams).enumerate() {
            if let Err(error) = seat.launch(part, &on_each.words, stream) {
                if at > 0 {
                    let name = on_each.kind.name();
                    let reason = format!("{name} reached {at} of its {all} devices: {error}");
                    control.fail(&Cause::Aborted { rank: control.member().0 as u32, reason });
                }
                return Err(error);
            }
        }
        Ok(())
    }
}

/// Refuses streams and buffers that are not one of each device, in its order.
fn check_each(seats: &[Gpu], call: &Call<'_>, streams: &[&Stream], ordinals: &[u32]) -> Result<()> {
    let (kind, rank) = (call.kind, seats[0].seat.rank());
    let refuse = |what, expected: String, got: String| {
        Err(Error::Argument { call: kind.name(), rank, what, expected, got })
    };
    let one_each = || {
        let names: Vec<String> = ordinals.iter().map(|ordinal| format!("cuda:{ordinal}")).collect();
        format!("{}, one for each of {}", names.len(), names.join(", "))
    };
    for (what, got) in [("number of streams", streams.len()), ("number of buffers", call.buffers().len())] {
        if got != seats.len() {
            return refuse(what, one_each(), got.to_string());
        }
    }
    for (seat, stream) in seats.iter().zip(streams) {
        seat.check_stream(kind, stream)?;
    }
    let is_same = |a: &Stream, b: &Stream| a.device() == b.device() && a.raw() == b.raw();
    if (1..streams.len()).any(|at| streams[..at].iter().any(|before| is_same(before, streams[at]))) {
        // The kernels of a call wait for each other.
        return refuse("streams", "another one for each buffer".to_owned(), "one for two of them".to_owned());
    }
    for (ordinal, buffer) in ordinals.iter().zip(call.buffers()) {
        if let Place::Window { .. } = buffer.place {
            let (expected, got) = (format!("an address on cuda:{ordinal}"), buffer.place.to_string());
            return Err(Error::Place { call: kind.name(), rank, expected, got });
        }
    }
    let mut are_captured = false;
    for (at, stream) in streams.iter().enumerate() {
        let is_captured = stream.is_capturing().map_err(|error| Error::Cuda { rank, error })?;
        if at > 0 && is_captured != are_captured {
            return refuse("streams", "all in a capture or none".to_owned(), "some in one".to_owned());
        }
        are_captured = is_captured;
    }
    if let Kind::AllReduceMulti { .. } = kind {
        let number = |other: usize| seats[0].seat.of(other).len();
        if let Some(other) = (0..seats[0].control.world_size()).find(|other| number(*other) != seats.len()) {
            let got = format!("{} on rank {other}", number(other));
            return refuse("number of devices", format!("as many on every rank, {}", seats.len()), got);
        }
    }
    Ok(())
}

/// The seat whose buffer is the root's in a broadcast; 0 of other calls. The root's rank was checked.
fn root_seat(seat: &Seat, kind: Kind) -> Result<usize> {
    let Kind::BroadcastMulti { root, buffer } = kind else { return Ok(0) };
    let seats = seat.of(root as usize);
    if buffer as usize >= seats.len() {
        let (expected, got) =
            (format!("below {}, the devices of rank {root}", seats.len()), buffer.to_string());
        return Err(Error::Argument {
            call: kind.name(),
            rank: seat.rank(),
            what: "root buffer",
            expected,
            got,
        });
    }
    Ok(seats.start + buffer as usize)
}

#[cfg(test)]
mod tests {
    use unisono_core::device::layout::HAS_GPU;
    use unisono_core::recorder::GpuWork;

    use super::*;
    use crate::control::About;
    use crate::gpu::args::Report;
    use crate::gpu::watch::cause_of;

    #[test]
    fn seats_are_counted_rank_after_rank() {
        let seats = Seats::new([&[0, 1][..], &[3], &[2, 2, 5]]);
        assert_eq!((seats.number(), seats.most()), (6, 3));
        assert_eq!([0, 1, 2].map(|rank| seats.of(rank)), [0..2, 2..3, 3..6]);
        assert_eq!([0, 1, 2, 3, 4, 5].map(|seat| seats.rank_of(seat)), [0, 0, 1, 2, 2, 2]);
        assert_eq!(seats.ordinals, [0, 1, 3, 2, 2, 5]);
    }

    fn control() -> Arc<Control> {
        let memory = SharedMemory::create(Control::bytes(2)).unwrap();
        let about = About { job: "test".into(), generation: 0, host: "here".into(), is_recording: true };
        Arc::new(Control::new(Arc::new(memory), 0, vec!["rank 0".into(), "rank 1".into()], about))
    }

    #[test]
    fn reports_of_seats_name_ranks_and_devices_and_those_of_ranks_only_ranks() {
        let late = |peer| Report::TimedOut { peer, work: GpuWork::Call(5), waited_ms: 7 };
        let told = |seat: &Seat, peer| match cause_of(late(peer), seat) {
            Cause::TimedOut { rank: 0, call, waited_ms: 7, missing } => (call, missing.join(", ")),
            other => panic!("{other:?}"),
        };
        let control = control();
        let seats = Arc::new(Seats::new([&[0, 1][..], &[3]]));
        let seat = Seat::of_device(control.clone(), seats, 1).unwrap();
        assert_eq!((seat.rank(), seat.number, seat.all), (0, 1, 3));
        let on = |text: &str| ("call #5 on its cuda:1".to_owned(), text.to_owned());
        assert_eq!(told(&seat, 0), on("rank 0 on its cuda:0"));
        assert_eq!(told(&seat, 2), on("rank 1 on its cuda:3"));
        let mismatch = |peer| Report::Mismatch { peer, epoch: 5, mine: None, theirs: None, is_grid: false };
        for peer in [2, 77] {
            let Cause::Mismatch { right, .. } = cause_of(mismatch(peer), &seat) else { panic!("{peer}") };
            assert_eq!(right, "call #5 of an unknown kind on rank 1");
        }
        let rank = Seat::of_rank(control.clone());
        let alone = ("call #5 on its GPU".to_owned(), "rank 1".to_owned());
        assert_eq!((told(&rank, 1), told(&rank, 9)), (alone.clone(), alone));
        // The rank's page has what the first seat says, and no other.
        let first = Seat::of_device(control.clone(), seat.seats.clone().unwrap(), 0).unwrap();
        for (number, seat) in [&seat, &first, &rank].into_iter().enumerate() {
            seat.tell_made(HAS_GPU | number as u64);
            seat.page()[REPORT_WAITING].store_relaxed((number as u64) << 32 | 2);
            seat.tell_waiting();
        }
        assert_eq!(control.made_on_gpu(), [Some(2), Some(1)]);
        assert_eq!(control.awaited_on_gpu(0), [Some(2), Some(1)]);
        // Each has a page of its own, and what kernels of a seat write there is no report of the rank.
        seat.page()[0].store_release(6);
        assert_eq!((Report::read(seat.page()), Report::read(rank.page())), (Some(Report::Aborted), None));
        control.gpu()[0].store_release(3);
        assert_eq!(Report::read(rank.page()), Some(Report::Concurrent));
    }

    #[test]
    fn the_root_buffer_is_found_at_every_rank() {
        let seats = Arc::new(Seats::new([&[0, 1][..], &[3]]));
        let seat = Seat::of_device(control(), seats, 2).unwrap();
        let root = |root, buffer| root_seat(&seat, Kind::BroadcastMulti { root, buffer });
        assert_eq!((root(0, 0), root(0, 1), root(1, 0)), (Ok(0), Ok(1), Ok(2)));
        assert_eq!(
            root(1, 1).unwrap_err().to_string(),
            "broadcast_multi on rank 0: root buffer should be below 1, the devices of rank 1, got 1. Nothing was written."
        );
        assert_eq!(
            kind_of_seats(Kind::BroadcastMulti { root: 1, buffer: 0 }, 2),
            Kind::Broadcast { root: 2 }
        );
    }
}
