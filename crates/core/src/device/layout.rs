//! Where everything lies in the arena of a GPU's rank: the memory that its peers write into. Over 500 lines because each place begins
//! where the one before ends.
//!
//! ```text
//! headers │ flags │ packets: half 0, half 1 │ lines: 2 areas │ gates │ scratch: half 0, half 1 │ messages: flags │ credits │ rings │ slots
//! └────────────────────── tagged with epochs ──────────────┘
//! ```
//! Half h serves the epochs with that lowest bit. Messages from rank to rank have no epochs, and places of their own for each source: a
//! ring of packets, and slots for the tiles of large ones. Kernels get the offsets through a header that is made here
//! ([`ArenaLayout::definitions`]), so they are written down once. An example of the sums, for eight ranks over NVLink: two
//! halves of 6 MiB carry all-reduces of up to 2¼ MiB in two shots, because 12 bytes travel as 16 and both stages
//! need room for the whole message (2 · 4/3 · S ≤ 6 MiB); two areas of 7½ MiB carry all-reduces of 8 MiB in lines, because 120 bytes
//! travel as 128, each stage has an area, and nothing comes from a rank itself (7/8 · 16/15 · S ≤ 7½ MiB); the pipeline for large ones
//! has six buffers of 512 KiB for each of eight ranks, twice. Areas of lines belong to no epoch: which of them is free follows from the
//! calls before (kernels/units.cuh), and so two are enough where halves would take four.

use super::select::Form;
use crate::call::{self, Kind};
use crate::layout::Field;
use crate::quantised::{GROUP, GROUP_BYTES};
use crate::reduce_op::ReduceOp;

/// The most ranks whose GPUs share arenas.
pub const MAX_RANKS: usize = 16;
/// The most blocks that move data in one kernel.
pub const MAX_BLOCKS: usize = 160;
/// Words of a header as GPUs exchange it: those of the call, then where our input and our output lie in their windows.
pub const HEADER_WORDS: usize = call::HEADER_WORDS + 2;
/// The first word that is told and not compared: the offsets in windows.
pub const HEADER_OFFSETS: usize = call::HEADER_WORDS;
/// The word of a rank's report page in which a kernel that lasts says for whom it waits: its call in the high half, and one more
/// than the peer in the low half; 0 if none does.
pub const REPORT_WAITING: usize = 6;
/// The word of a header that tells form and grid.
pub const HEADER_LAUNCH: usize = 6;
/// Bytes of a device's words of its own: the epoch, counts of blocks, the latest messages, and room to grow. The recorder lies
/// behind them.
pub const STATE_BYTES: usize = 4096;
/// Where among these words the latest message to each rank and from each rank is told: that from rank r is number 2 · r, that to it the
/// next one.
pub const MESSAGE_RECORDS_AT: usize = 1024;
/// 64-bit words that tell a message: two sectors of 32 bytes, each of which is whole and begins with its number.
pub const MESSAGE_RECORD_WORDS: usize = 8;
/// Where among these words `u32` counts lie: blocks that are through, and how many are once the kernels so far are done.
pub const STATE_LEFT_AT: usize = 16;
/// See [`STATE_LEFT_AT`].
pub const STATE_EXPECTED_AT: usize = 20;
/// Calls that the flight recorder of a GPU keeps, a power of two.
pub const RECORDS: usize = 1024;
/// 64-bit words in its record of a call: two sectors of 32 bytes, each of which is whole and begins with the epoch.
pub const RECORD_WORDS: usize = 8;
/// Bytes of a device's words and of its recorder behind them: what is copied for who asks.
pub const RECORDER_BYTES: usize = STATE_BYTES + RECORDS * RECORD_WORDS * 8;
/// Where the device counts what went to each rank and came from each, behind what is copied.
const TRACKS_AT: usize = RECORDER_BYTES;
/// Bytes of these counts for one direction of one pair of ranks.
pub const TRACK_BYTES: usize = 16 + 8 * MESSAGE_CHANNELS;
/// Teams of blocks that normalise rows, at most: 128 blocks, as many as move data elsewhere.
pub const MAX_TEAMS: usize = 16;
/// Where blocks of a team tell each other their parts of a sum, behind these counts.
const LEAVES_AT: usize = TRACKS_AT + 2 * MAX_RANKS * TRACK_BYTES;
/// Two of each, in turn; for each up to two packets of 64 warps.
const LEAVES_BYTES: usize = MAX_TEAMS * 2 * 2 * 64 * 16;
/// Where blocks of a lane of messages are counted: for each lane, and for each message, behind as many as lanes are before it.
const COUNTS_AT: usize = LEAVES_AT + LEAVES_BYTES;
/// Lanes of messages in one kernel, at most.
const MAX_LANES: usize = 2 * MAX_RANKS;
/// Bytes that a device has for itself.
pub const DEVICE_BYTES: usize = COUNTS_AT + 4 * (2 * MAX_LANES + MAX_MESSAGES);
/// From so many bytes on, every block stamps its end: the data goes on for longer than the headers do.
pub const STAMPED_BYTES: usize = 256 << 10;
/// The word of a rank's report page that says whether its recorder is read for who asks: 0 there is none, else
/// [`RECORDER_SERVES`], [`RECORDER_KEPT`] or [`RECORDER_LOST`].
pub const REPORT_RECORDER: usize = 64;
/// It is read when [`REPORT_REQUEST`] changes; once it was, [`REPORT_ANSWER`] is the same.
pub const RECORDER_SERVES: u64 = 1;
/// The communicator is over, and its last calls were read.
pub const RECORDER_KEPT: u64 = 2;
/// The communicator is over, and its last calls were not read.
pub const RECORDER_LOST: u64 = 3;
/// A moment by the clock of the device, in nanoseconds, and by the ticks of the host.
pub const REPORT_CLOCKS: [usize; 2] = [65, 66];
/// What the host has put into streams: [`HAS_GPU`], perhaps [`HAS_CAPTURED`], and in the low half the number of the latest call that is in
/// no graph.
pub const REPORT_MADE: usize = 67;
/// Set in [`REPORT_MADE`] where there is a GPU.
pub const HAS_GPU: u64 = 1 << 32;
/// Set there once a call went into a graph: nobody on the host knows how often it is replayed.
pub const HAS_CAPTURED: u64 = 1 << 33;
/// In the page of a rank with several devices, what its first device has in its own page: [`REPORT_MADE`] of the world of all devices, and
/// [`REPORT_WAITING`], which the host copies now and then.
pub const REPORT_EACH: [usize; 2] = [68, 69];
/// Counted up by whoever wants to read the recorder.
pub const REPORT_REQUEST: usize = 80;
/// The latest request that was answered.
pub const REPORT_ANSWER: usize = 96;
/// Packets that a header takes: 12 bytes each.
pub const HEADER_PACKETS: usize = (HEADER_WORDS * 8).div_ceil(12);
/// The word of a header that is each rank's own: the scalar.
pub const HEADER_SCALAR: usize = 5;
/// Bytes for one header.
const HEADER_BYTES: usize = 256;
/// Bytes of data in a packet.
pub const PACKET_DATA: usize = 12;
/// Bytes of a line, which eight lanes of a warp store and load at once.
const LINE_BYTES: usize = 128;
/// Bytes of data in a line: the last eight tell its epoch. Of elements of 16 bytes there are seven.
const LINE_DATA: usize = 120;
const WIDE_LINE_DATA: usize = 112;
/// Lines that travel as one unit: so that all but two of its 16 lanes move 16 bytes on lines of 16.
const UNIT_LINES: usize = 2;
/// Threads that move a unit of lines.
pub const UNIT_LANES: usize = UNIT_LINES * LINE_BYTES / 16;
/// Bytes of data in a unit of lines, of elements of at most eight bytes.
pub const UNIT_DATA: usize = UNIT_LINES * LINE_DATA;
/// Packets that a group of a quantised sum takes: all of their data.
const GROUP_PACKETS: usize = GROUP_BYTES / PACKET_DATA;
const _: () = assert!(GROUP_BYTES.is_multiple_of(PACKET_DATA));
/// Tiles that a ring's sender may be ahead at least.
pub const RING_SLOTS: usize = 3;
/// Buffers of the pipeline in each half for each of two stages: tiles that a rank may be ahead at least.
const BUFFERS: usize = 3;
/// Stages that have flags.
const STAGES: usize = 3;
/// Words that the rounds of a flag are dealt to.
const FLAG_WAYS: usize = 4;
/// Bytes for the flags of one stage.
const STAGE_BYTES: usize = MAX_BLOCKS * MAX_RANKS * FLAG_WAYS * 8;
const PAGE: usize = 4096;
/// The most messages that one kernel carries out: those of a group, on one communicator.
pub const MAX_MESSAGES: usize = 128;
/// Channels that the tiles of a message are dealt to, the same whatever blocks each side has.
pub const MESSAGE_CHANNELS: usize = 32;
/// Tiles after which the rounds of a channel are counted anew.
const ERA_ROUNDS: usize = 1 << 28;
/// Bytes from one rank's credit to the next one's.
const CREDIT_STRIDE: usize = 64;

/// How the GPUs of a world reach each other's arenas.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Link {
    /// They load and store each other's memory: one access of 16 bytes is whole.
    Device,
    /// Through pinned memory of the host: accesses of 8 bytes are whole.
    Host,
}

impl Link {
    /// The name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Device => "device memory",
            Self::Host => "pinned host memory",
        }
    }
}

/// The arena of each of `ranks` ranks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ArenaLayout {
    ranks: usize,
    link: Link,
}

impl ArenaLayout {
    /// The layout for this number of ranks, at most [`MAX_RANKS`].
    pub const fn new(ranks: usize, link: Link) -> Self {
        Self { ranks, link }
    }

    /// How the arenas are reached.
    pub const fn link(&self) -> Link {
        self.link
    }

    /// Bytes of a packet, with its epochs.
    pub const fn packet_bytes(&self) -> usize {
        match self.link {
            Link::Device => 16,
            Link::Host => 24,
        }
    }

    const fn flags_at(&self) -> usize {
        (2 * MAX_RANKS * HEADER_BYTES).next_multiple_of(PAGE)
    }

    const fn flags_bytes(&self) -> usize {
        STAGES * STAGE_BYTES
    }

    const fn packets_at(&self) -> usize {
        (self.flags_at() + self.flags_bytes()).next_multiple_of(PAGE)
    }

    /// Bytes of packets for one epoch.
    pub const fn half_bytes(&self) -> usize {
        match self.link {
            Link::Device => 6 << 20,
            Link::Host => 1 << 20,
        }
    }

    const fn lines_at(&self) -> usize {
        self.packets_at() + 2 * self.half_bytes()
    }

    /// Bytes of an area of lines, of which there are two; none where lines are not whole.
    const fn lines_area_bytes(&self) -> usize {
        match self.link {
            Link::Device => 15 << 19,
            Link::Host => 0,
        }
    }

    const fn gates_at(&self) -> usize {
        self.lines_at() + 2 * self.lines_area_bytes()
    }

    const fn scratch_at(&self) -> usize {
        // On a large page of its own.
        (self.gates_at() + PAGE).next_multiple_of(2 << 20)
    }

    /// The 64-bit flags: all of them hold an epoch in their high half.
    pub const fn flags(&self) -> Field {
        Field { offset: self.flags_at(), bytes: self.flags_bytes() }
    }

    /// The packets of both halves, each [`ArenaLayout::half_bytes`] long.
    pub const fn packets(&self) -> Field {
        Field { offset: self.packets_at(), bytes: 2 * self.half_bytes() }
    }

    /// The scratch, both halves.
    pub const fn scratch(&self) -> Field {
        Field { offset: self.scratch_at(), bytes: 2 * self.scratch_half_bytes() }
    }

    /// Bytes of scratch for one epoch.
    pub const fn scratch_half_bytes(&self) -> usize {
        match self.link {
            Link::Device => 24 << 20,
            Link::Host => 6 << 20,
        }
    }

    /// Bytes in one buffer of the pipeline for the tiles of one source: of all blocks together.
    pub const fn area_bytes(&self) -> usize {
        let share = self.scratch_half_bytes() / (2 * BUFFERS) / self.ranks;
        share - share % PAGE
    }

    const fn scratch_end(&self) -> usize {
        self.scratch_at() + 2 * self.scratch_half_bytes()
    }

    /// The first stage of messages. Their flags are counted on from the others, and lie where no epoch clears them.
    const fn message_stage(&self) -> usize {
        (self.scratch_end() - self.flags_at()).div_ceil(STAGE_BYTES)
    }

    /// The 64-bit flags of messages: tiles that were sent, and tiles that were taken.
    pub const fn message_flags(&self) -> Field {
        Field { offset: self.flags_at() + self.message_stage() * STAGE_BYTES, bytes: 2 * STAGE_BYTES }
    }

    /// A 64-bit word for each rank, `CREDIT_STRIDE` apart: packets of ours that it has taken.
    pub const fn credits(&self) -> Field {
        let flags = self.message_flags();
        let offset = (flags.offset + flags.bytes).next_multiple_of(PAGE);
        Field { offset, bytes: MAX_RANKS * CREDIT_STRIDE }
    }

    const fn rings_at(&self) -> usize {
        let credits = self.credits();
        (credits.offset + credits.bytes).next_multiple_of(PAGE)
    }

    const fn slots_at(&self) -> usize {
        let rings = self.ranks * self.ring_packets() * self.packet_bytes();
        (self.rings_at() + rings).next_multiple_of(2 << 20)
    }

    /// Messages of at most so many bytes travel as packets.
    pub const fn message_packets_to(&self) -> usize {
        // 4/3 of the bytes, at 300 GB/s over as many blocks as tiles have: 1 MiB is 4.7 µs and what the smallest takes, 4.4. In tiles it
        // took 15.7 (four H200, docs/gpu-results).
        match self.link {
            Link::Device => 1 << 20,
            Link::Host => 32 << 10,
        }
    }

    /// Packets in the ring of a source, a power of two: the largest message of packets, and half of the next.
    const fn ring_packets(&self) -> usize {
        match self.link {
            Link::Device => 131_072,
            Link::Host => 8192,
        }
    }

    /// Slots of a channel, a power of two.
    const fn message_slots(&self) -> usize {
        // A tile has left its slot some 12 µs after it set out, and the sender knows: 8 MiB of them from one source are more than links
        // carry in that time. Of each channel four are on their way to the far end at once, 4 MiB of all, for 4 to 6 µs.
        match self.link {
            Link::Device if self.ranks <= 8 => 8,
            _ => 4,
        }
    }

    /// Bytes of the largest tiles of messages: of those that fill all channels more than once.
    pub const fn message_tile_bytes(&self) -> usize {
        match self.link {
            Link::Device => 32 << 10,
            Link::Host => 4 << 10,
        }
    }

    /// Packets of each pair of ranks, and tiles of each channel, that count as done when communicators begin behind `epoch`: none, or,
    /// where a test begins elsewhere, nearly as many as wrap.
    pub const fn message_start(&self, epoch: u32) -> (u64, u32) {
        match (epoch, self.link) {
            (0, _) | (_, Link::Host) => (0, 0),
            _ => ((u32::MAX as u64 - 1) * self.ring_packets() as u64, ERA_ROUNDS as u32 - FLAG_WAYS as u32),
        }
    }

    /// What a device has for itself when a communicator begins behind `epoch`.
    pub fn device_words(&self, epoch: u32) -> Vec<u8> {
        let mut bytes = vec![0; DEVICE_BYTES];
        bytes[..4].copy_from_slice(&epoch.to_le_bytes());
        let (packets, rounds) = self.message_start(epoch);
        for track in bytes[TRACKS_AT..LEAVES_AT].chunks_mut(TRACK_BYTES) {
            track[..8].copy_from_slice(&packets.to_le_bytes());
            let channels = track[TRACK_BYTES - 8 * MESSAGE_CHANNELS..].chunks_mut(8);
            channels.for_each(|channel| channel[4..].copy_from_slice(&rounds.to_le_bytes()));
        }
        bytes
    }

    /// The flag of so many tiles that are done, a multiple of the words that they are dealt to.
    pub const fn flag_of(rounds: u32) -> u64 {
        (rounds as usize / FLAG_WAYS) as u64
    }

    /// Bytes of the whole arena.
    pub const fn total_bytes(&self) -> usize {
        let area = MESSAGE_CHANNELS * self.message_slots() * self.message_tile_bytes();
        self.slots_at() + self.ranks * area
    }

    /// The largest part, in bytes of elements of `size`, that travels one-shot.
    pub const fn one_shot_capacity(&self, size: usize) -> usize {
        self.data_in(self.half_bytes() / self.ranks, size)
    }

    /// The largest message that travels two-shot.
    pub const fn two_shot_capacity(&self, size: usize) -> usize {
        self.data_in(self.half_bytes() / (2 * self.ranks), size) * self.ranks
    }

    /// The same two in lines, and what a reduce takes in two shots. An area has a slot for each peer; of that, one for each stage.
    pub const fn lines_capacity(&self, size: usize) -> [usize; 3] {
        let peers = if self.ranks > 1 { self.ranks - 1 } else { 1 };
        let data = if size <= 8 { LINE_DATA } else { WIDE_LINE_DATA };
        let units = self.lines_area_bytes() / peers / (UNIT_LINES * LINE_BYTES);
        let slot = units * UNIT_LINES * data;
        [slot, slot * self.ranks, units / 2 * UNIT_LINES * data * self.ranks]
    }

    /// The same two of an all-reduce that is quantised: bytes of elements of `size`, in whole groups.
    pub const fn quantised_capacity(&self, size: usize) -> [usize; 2] {
        let group = self.packet_bytes() * GROUP_PACKETS;
        let [one, two] = [self.half_bytes() / self.ranks, self.half_bytes() / (2 * self.ranks)];
        [one / group * GROUP * size, two / group * GROUP * size * self.ranks]
    }

    /// What fits into a slot of so many bytes, in whole units.
    const fn data_in(&self, slot: usize, size: usize) -> usize {
        let packets = if size <= 4 { 1 } else { size / 4 };
        slot / (packets * self.packet_bytes()) * packets * PACKET_DATA
    }

    /// The offsets, as kernels include them.
    pub fn definitions(&self) -> String {
        let mut text = String::from("#pragma once\n");
        for (name, value) in [
            ("MAX_RANKS", MAX_RANKS),
            ("MAX_BLOCKS", MAX_BLOCKS),
            ("HEADER_WORDS", HEADER_WORDS),
            ("HEADER_SCALAR", HEADER_SCALAR),
            ("HEADER_OFFSETS", HEADER_OFFSETS),
            ("HEADER_LAUNCH", HEADER_LAUNCH),
            ("HEADER_PACKETS", HEADER_PACKETS),
            ("HEADER_BYTES", HEADER_BYTES),
            ("PACKET_BYTES", self.packet_bytes()),
            ("LINE_BYTES", LINE_BYTES),
            ("LINE_DATA", LINE_DATA),
            ("WIDE_LINE_DATA", WIDE_LINE_DATA),
            ("UNIT_LINES", UNIT_LINES),
            ("ONE_SHOT_LINES", Form::OneShotLines as usize),
            ("TWO_SHOT_LINES", Form::TwoShotLines as usize),
            ("REDUCE_CODE", Kind::Reduce { root: 0, op: ReduceOp::Sum }.code() as usize),
            ("FLAG_WAYS", FLAG_WAYS),
            ("RECORDS", RECORDS),
            ("RECORD_BYTES", RECORD_WORDS * 8),
            ("REPORT_CLOCK", REPORT_CLOCKS[0]),
            ("MAX_MESSAGES", MAX_MESSAGES),
            ("MAX_TEAMS", MAX_TEAMS),
            ("MAX_LANES", MAX_LANES),
            ("CHANNELS", MESSAGE_CHANNELS),
            ("MESSAGE_SLOTS", self.message_slots()),
            ("SLOT_BYTES", self.message_tile_bytes()),
            ("RING_PACKETS", self.ring_packets()),
            ("ERA_ROUNDS", ERA_ROUNDS),
            ("MESSAGE_STAGE", self.message_stage()),
            ("MESSAGE_RECORD_BYTES", MESSAGE_RECORD_WORDS * 8),
            ("TRACK_BYTES", TRACK_BYTES),
            ("CREDIT_STRIDE", CREDIT_STRIDE),
            ("RANKS", self.ranks),
            ("HOST_PACKETS", usize::from(self.link == Link::Host)),
        ] {
            text += &format!("#define {name} {value}\n");
        }
        for (name, value) in [
            ("HEADERS_AT", 0),
            ("RECORDS_AT", STATE_BYTES),
            ("STAMPED_BYTES", STAMPED_BYTES),
            ("FLAGS_AT", self.flags_at()),
            ("FLAGS_BYTES", self.flags_bytes()),
            ("PACKETS_AT", self.packets_at()),
            ("HALF_BYTES", self.half_bytes()),
            ("LINES_AT", self.lines_at()),
            ("LINES_AREA_BYTES", self.lines_area_bytes()),
            ("TAGGED_BYTES", self.gates_at()),
            ("GATES_AT", self.gates_at()),
            ("SCRATCH_AT", self.scratch_at()),
            ("SCRATCH_HALF_BYTES", self.scratch_half_bytes()),
            ("MESSAGE_RECORDS_AT", MESSAGE_RECORDS_AT),
            ("TRACKS_AT", TRACKS_AT),
            ("LEAVES_AT", LEAVES_AT),
            ("LEAVES_BYTES", LEAVES_BYTES),
            ("MESSAGE_PACKETS_TO", self.message_packets_to()),
            ("COUNTS_AT", COUNTS_AT),
            ("CREDITS_AT", self.credits().offset),
            ("RINGS_AT", self.rings_at()),
            ("SLOTS_AT", self.slots_at()),
        ] {
            text += &format!("#define {name} {value}ull\n");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_an_arena_follow_each_other_and_hold_what_they_must() {
        for link in [Link::Device, Link::Host] {
            for ranks in 1..=MAX_RANKS {
                let layout = ArenaLayout::new(ranks, link);
                // And one that tells how large a part is.
                assert!(layout.packet_bytes() * (HEADER_PACKETS + 1) <= HEADER_BYTES);
                assert!(layout.flags_at() >= 2 * ranks * HEADER_BYTES);
                assert!(layout.packets_at() >= layout.flags_at() + layout.flags_bytes());
                assert!(layout.scratch_at() >= layout.gates_at() + MAX_RANKS * 8);
                assert!(2 * BUFFERS * ranks * layout.area_bytes() <= layout.scratch_half_bytes());
                for size in [1, 2, 4, 8, 16] {
                    let unit = if size <= 4 { 12 } else { 3 * size };
                    let units = layout.one_shot_capacity(size) / unit;
                    assert!(ranks * units * unit / 12 * layout.packet_bytes() <= layout.half_bytes());
                    let shard = layout.two_shot_capacity(size) / ranks / unit;
                    assert!(2 * ranks * shard * unit / 12 * layout.packet_bytes() <= layout.half_bytes());
                    // Units of lines: as many as the largest part or shard has, from each peer, fit into an area.
                    let unit = if size <= 8 { 240 } else { 224 };
                    assert!(unit % size == 0 && UNIT_LANES * 16 == UNIT_LINES * LINE_BYTES);
                    let [one, two, of_reduce] = layout.lines_capacity(size);
                    let shard = two.div_ceil(unit).div_ceil(ranks);
                    let half = of_reduce.div_ceil(unit).div_ceil(ranks);
                    assert!(2 * (ranks - 1) * half * 256 <= layout.lines_area_bytes());
                    assert!((ranks - 1) * one.div_ceil(unit) * 256 <= layout.lines_area_bytes());
                    assert!((ranks - 1) * shard * 256 <= layout.lines_area_bytes());
                    assert_eq!(link == Link::Host, [one, two] == [0, 0]);
                }
                let lines = [layout.lines_at(), layout.lines_at() + layout.lines_area_bytes()];
                for at in [layout.flags_at(), layout.packets_at(), layout.gates_at(), layout.scratch_at()] {
                    assert!(lines.into_iter().chain([at]).all(|at| at.is_multiple_of(PAGE)));
                }
                // A message of packets fits into its ring, and every way of a flag has slots.
                let (flags, credits) = (layout.message_flags(), layout.credits());
                assert!(flags.offset >= layout.scratch_end() && credits.offset >= flags.offset + flags.bytes);
                assert!(layout.rings_at() >= credits.offset + ranks * CREDIT_STRIDE);
                let packets = 2 + layout.message_packets_to().div_ceil(PACKET_DATA);
                assert!(packets <= layout.ring_packets() && layout.ring_packets().is_power_of_two());
                assert!(layout.message_slots().is_power_of_two() && layout.message_slots() >= FLAG_WAYS);
                assert!(ERA_ROUNDS.is_multiple_of(layout.message_slots()) && MESSAGE_CHANNELS <= MAX_BLOCKS);
            }
        }
    }

    #[test]
    fn words_of_the_report_page_stand_apart_and_records_fill_lines() {
        const { assert!(RECORDS.is_power_of_two() && STATE_BYTES.is_multiple_of(RECORD_WORDS * 8)) };
        const { assert!(MESSAGE_RECORDS_AT + 2 * MAX_RANKS * MESSAGE_RECORD_WORDS * 8 <= STATE_BYTES) };
        const { assert!(TRACKS_AT.is_multiple_of(8) && TRACK_BYTES.is_multiple_of(8)) };
        const { assert!(LEAVES_AT.is_multiple_of(crate::layout::LINE)) };
        const { assert!(STATE_EXPECTED_AT < MESSAGE_RECORDS_AT && REPORT_ANSWER * 8 < crate::layout::PAGE) };
        // Kernels write what comes first, this rank's host the next, readers the request.
        let report = 8 + 2 * (HEADER_WORDS + 1);
        assert!(report <= REPORT_RECORDER, "{report}");
        let line = crate::layout::LINE / 8;
        assert!([REPORT_RECORDER, REPORT_REQUEST, REPORT_ANSWER].iter().all(|at| at.is_multiple_of(line)));
    }

    #[test]
    fn eight_ranks_over_nvlink_take_less_than_64_mib_and_15_for_lines_and_10_for_messages_of_each() {
        let layout = ArenaLayout::new(8, Link::Device);
        let lines = 2 * layout.lines_area_bytes();
        assert!(lines <= 15 << 20 && layout.scratch_end() - lines <= 62 << 20, "{}", layout.scratch_end());
        assert!(layout.total_bytes() <= (64 + 15 + 8 * 10) << 20, "{}", layout.total_bytes());
        let lines = layout.lines_capacity(2);
        assert!(lines[0] >= 1 << 20 && lines[1] >= 8 << 20 && lines[2] >= 4 << 20, "{lines:?}");
        let four = ArenaLayout::new(4, Link::Device).lines_capacity(2);
        assert!(four[0] >= 2 << 20 && four[1] >= 8 << 20, "{four:?}");
        assert_eq!(layout.area_bytes(), 512 << 10);
        assert!(layout.two_shot_capacity(2) >= 2 << 20, "{}", layout.two_shot_capacity(2));
        assert!(layout.definitions().contains("#define SCRATCH_HALF_BYTES 25165824ull\n"));
    }
}
