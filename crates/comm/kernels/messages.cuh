// Messages from rank to rank: the sender stores into the receiver's memory, the receiver copies into its buffer.
//
// Every ordered pair of ranks has a ring of packets in the receiver's arena. A message begins there with a header of two packets (tag,
// dtype, bytes), which the receiver compares with what it expects; a small one follows in the ring. One hop, and nobody waits as long as
// the ring has room. Packets are counted for each pair, for ever; a packet is there when it has the number of its lap around the ring, so
// nothing is ever cleared. The receiver tells how many it has taken (its credit), before which the sender does not come round.
//
// A large message goes in tiles. Tile i belongs to channel i mod CHANNELS, whatever blocks each side has. A channel has a few slots in the
// receiver's arena; its tiles are rounds, counted from message to message. The receiver is told (stage SENT) that a round is in its slot,
// the sender (stage TAKEN) that it was copied out, and so may be overwritten by the round MESSAGE_SLOTS later. Rounds are counted anew after
// ERA_ROUNDS of them, once everything was taken; flags have the era where those of collectives have the epoch.
//
// A lane is all messages of one launch between us and one peer in one direction; lanes do not wait for each other. Block p of B carries
// out its part of messages one after the other: of each the header if it is block 0, every Bth packet, and the channels p, p + B, … of
// large ones, lowest first. So whatever B is on either side, the least unfinished (message, channel) of a pair has a block on both sides
// that is at it: nothing waits in a circle, as long as all blocks of a launch run at once. The last of a lane's blocks to have taken its
// packets of a message tells the credit.
//
// Counts of packets and rounds lie in memory of the device (Track): graphs are replayed where calls before them ended. Kernels of a
// communicator follow each other, so the next one reads what this one wrote.

#pragma once

#include "copies.cuh"

// As the host lists them.
struct Message {
  u8* at;
  u64 bytes;
  u32 tag;
  u8 dtype;
  u8 kind;     // of the collective that it is a part of, or 0
  u8 peer;     // this rank itself: a part that stays here, listed as sent and then as received
  u8 is_sent;
};

struct Messages {
  Args call;
  Message list[MAX_MESSAGES];
  u16 begins[2 * MAX_RANKS + 1];  // of each lane
  u16 blocks;                     // of each lane
  u32 first;                      // the rank to be looked at first, by who receives from any
};

static_assert(sizeof(Messages) == MESSAGES_BYTES, "the host lays messages out differently");
static_assert(sizeof(Messages) <= 4096, "arguments of a kernel");

// What went to a peer, or came from it, so far.
struct Track {
  u64 packets;
  u32 messages;
  u32 reserved;
  struct {
    u32 era;
    u32 rounds;  // of this era
  } channels[CHANNELS];
};

static_assert(sizeof(Track) == TRACK_BYTES, "the host makes other tracks");

// The latest message of a lane. Each of its two sectors of 32 bytes tells the number.
struct MessageRecord {
  u64 number;      // << 32 | tag
  u64 started_ns;
  u64 bytes;
  u64 kind;        // and dtype
  u64 same_number; // << 32
  u64 ended_ns;    // block 0 was through; of no message if it is before `started_ns`
  u64 reserved[2];
};

static_assert(sizeof(MessageRecord) == MESSAGE_RECORD_BYTES, "the host reads other records");

constexpr u32 SENT = MESSAGE_STAGE, TAKEN = MESSAGE_STAGE + 1;
constexpr u32 HEADER_UNITS = 2, UNIT_BYTES = 12;
// Packets that a thread has under way.
constexpr u32 AT_ONCE = 4;

__device__ __forceinline__ u8* of_lane(const Args& args, u64 offset, u64 stride, u32 peer, bool is_sent) {
  return reinterpret_cast<u8*>(args.state) + offset + (2 * peer + is_sent) * stride;
}

__device__ __forceinline__ Track* track_of(const Args& args, u32 peer, bool is_sent) {
  return reinterpret_cast<Track*>(of_lane(args, TRACKS_AT, TRACK_BYTES, peer, is_sent));
}

__device__ __forceinline__ MessageRecord* record_of(const Args& args, const Message& message) {
  return reinterpret_cast<MessageRecord*>(
      of_lane(args, MESSAGE_RECORDS_AT, MESSAGE_RECORD_BYTES, message.peer, message.is_sent));
}

__device__ __forceinline__ bool is_small(const Message& message) { return message.bytes <= MESSAGE_PACKETS_TO; }

// Packets of data.
__device__ __forceinline__ u32 units_of(const Message& message) {
  return is_small(message) ? (u32(message.bytes) + UNIT_BYTES - 1) / UNIT_BYTES : 0;
}

__device__ __forceinline__ u8* packet_at(const Args& args, u32 rank, u32 source, u64 packet) {
  return args.arenas[rank] + RINGS_AT + (u64(source) * RING_PACKETS + packet % RING_PACKETS) * PACKET_BYTES;
}

// What makes a packet valid. Every lap overwrites the whole ring, so what is there is one lap old at most. Wrapping harms nothing.
__device__ __forceinline__ u32 lap_of(u64 packet) { return u32(packet / RING_PACKETS) + 1; }

// Word i of the header.
__device__ __forceinline__ u32 told(const Message& message, u32 i) {
  return i == 0   ? message.tag
         : i == 1 ? u32(message.kind) << 8 | message.dtype
         : i == 2 ? u32(message.bytes)
         : i == 3 ? u32(message.bytes >> 32)
                  : 0;
}

__device__ __forceinline__ u64* credit_at(const Args& args, u32 rank, u32 of) {
  return reinterpret_cast<u64*>(args.arenas[rank] + CREDITS_AT + of * CREDIT_STRIDE);
}

// Threads that move packets of data. The last warp cares for the header.
__device__ __forceinline__ u32 movers() { return blockDim.x - 32; }

// A block among those of its lane.
struct Part {
  u32 lane, block, blocks;

  __device__ __forceinline__ explicit Part(const Messages& messages)
      : lane(blockIdx.x / messages.blocks), block(blockIdx.x % messages.blocks), blocks(messages.blocks) {}

  // One thread: whether all blocks of the lane have come to this count, this one last. Then it is as it was, for the next kernel.
  __device__ __forceinline__ bool is_last(const Args& args, u32 which) const {
    if (blocks == 1) return true;
    u32* count = reinterpret_cast<u32*>(reinterpret_cast<u8*>(args.state) + COUNTS_AT) + which;
    // SYNC: what blocks of a lane have loaded before they count cannot change by what the last of them stores then: the loads have
    // answered, and those of other threads lie behind a barrier of the block.
    if (count_own_now(count, 1) != blocks - 1) return false;
    store_own_word(count, 0);
    return true;
  }
  // All of them know where the lane began.
  __device__ __forceinline__ bool is_last_of_lane(const Args& args) const { return is_last(args, lane); }
  // All of them have taken message `at` of the list. Lanes that each begin a list of their own have counts of their own too.
  __device__ __forceinline__ bool is_last_of_message(const Args& args, u32 at) const { return is_last(args, MAX_LANES + lane + at); }
};

// All threads of a block of a lane: its part of the header, from packet `first` of the ring on, and of what is small behind it. `credit` is
// what the peer is known to have taken. False if one must leave.
__device__ __forceinline__ bool put(const Args& args, const Entry& entry, const Message& message, const Part& part, u64 first, u64 credit) {
  const u32 me = args.rank, peer = message.peer, units = units_of(message);
  // SYNC: packets of a ring were read before the credit that counts them.
  const u64 due = first + HEADER_UNITS + units - RING_PACKETS;
  if (i64(credit - due) < 0) {
    const u64* told_here = credit_at(args, me, peer);
    bool has_room = threadIdx.x != 0 || wait_until(args, entry, peer, [&] { return i64(load_word(told_here) - due) >= 0; });
    if (!__syncthreads_and(has_room)) return false;
  }
  if (threadIdx.x >= movers()) {
    const u32 unit = threadIdx.x - movers();
    u32 words[3];
#pragma unroll
    for (u32 i = 0; i < 3; i++) words[i] = told(message, 3 * unit + i);
    if (part.block == 0 && unit < HEADER_UNITS) put_packet(packet_at(args, peer, me, first + unit), words, lap_of(first + unit));
    return true;
  }
  const u64 data = first + HEADER_UNITS;
  const u32 step = part.blocks * movers();
  for (u32 from = part.block * movers() + threadIdx.x; from < units; from += AT_ONCE * step) {
    u32 words[AT_ONCE][3];
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++) {
      const u32 unit = from + i * step;
      const u64 at = u64(unit) * UNIT_BYTES;
      if (unit < units) load_words<3>(message.at + at, message.bytes - at, words[i]);
    }
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++) {
      const u32 unit = from + i * step;
      if (unit < units) put_packet(packet_at(args, peer, me, data + unit), words[i], lap_of(data + unit));
    }
  }
  return true;
}

// One thread: tells the host that the peer sent something else than what is expected here, and ends all waits of this device.
__device__ __noinline__ void refuse(const Args& args, const Message& message, const u32* theirs) {
  if (swap_own(&args.state->reported, 0, 1) == 0) {
    Report* report = args.report;
    for (u32 i = 0; i < 3 * HEADER_UNITS; i++) {
      report->mine[i] = told(message, i);
      report->theirs[i] = theirs[i];
    }
    store_word(&report->peer, message.peer);
    // SYNC: what a report says is visible before its reason.
    fence_all();
    store_word(&report->reason, REASON_MESSAGE);
  }
  store_own_word(&args.state->poison, 1);
}

// All threads of a block of a lane: the other side of `put`, of message `number` of the list, which others of the lane follow or not.
__device__ __forceinline__ bool take(const Args& args, const Entry& entry, const Message& message, const Part& part, u32 number,
                                     bool is_latest, u64 first) {
  const u32 me = args.rank, peer = message.peer, units = units_of(message);
  bool is_there = true;
  // Compared while others wait for data that may not come.
  if (part.block == 0 && threadIdx.x == movers()) {
    u32 theirs[3 * HEADER_UNITS];
    is_there = wait_until(args, entry, peer, [&] {
      bool all = true;
#pragma unroll
      for (u32 i = 0; i < HEADER_UNITS; i++) {
        all &= take_packet(packet_at(args, me, peer, first + i), theirs + 3 * i, lap_of(first + i));
      }
      return all;
    });
    bool differs = false;
#pragma unroll
    for (u32 i = 0; i < 3 * HEADER_UNITS; i++) differs |= theirs[i] != told(message, i);
    if (is_there && differs) {
      refuse(args, message, theirs);
      is_there = false;
    }
  }
  const u64 data = first + HEADER_UNITS;
  const u32 step = part.blocks * movers();
  for (u32 from = part.block * movers() + threadIdx.x; threadIdx.x < movers() && from < units && is_there; from += AT_ONCE * step) {
    u32 words[AT_ONCE][3];
    is_there = wait_until(args, entry, peer, [&] {
      bool all = true;
#pragma unroll
      for (u32 i = 0; i < AT_ONCE; i++) {
        const u64 packet = data + from + i * step;
        if (from + i * step < units) all &= take_packet(packet_at(args, me, peer, packet), words[i], lap_of(packet));
      }
      return all;
    });
    if (!is_there) break;
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++) {
      const u32 unit = from + i * step;
      const u64 at = u64(unit) * UNIT_BYTES;
      if (unit < units) store_words<3>(message.at + at, message.bytes - at, words[i]);
    }
  }
  if (!__syncthreads_and(is_there)) return false;
  // SYNC: packets of a ring were read before the credit that counts them: each load has answered, and a barrier of the block lies between,
  // and the count of the lane's blocks.
  if (threadIdx.x == 0 && part.is_last_of_message(args, number)) {
    store_word(credit_at(args, peer, me), first + HEADER_UNITS + units);
    // SYNC: a credit only grows: another block may tell that of the next message, once this one has counted there, and finds this one told.
    if (part.blocks > 1 && !is_latest) fence_all();
  }
  return true;
}

// The tiles of a large message on one channel: a program, see pipeline.cuh.
template <bool IS_SENT>
struct Stretch {
  static constexpr u32 INPUTS = 1, OUTPUTS = 1;
  static constexpr bool IS_SPREAD = true, FOLDS = false;

  const Args& args;
  const Message& message;
  u32 channel;
  u32 before;   // rounds of this era
  u32 tile;     // vectors
  u32 rounds;
  u64 vectors;
  bool is_wide;

  __device__ __forceinline__ Stretch(const Args& args, const Message& message, u32 channel, u32 before)
      : args(args), message(message), channel(channel), before(before) {
    vectors = (message.bytes + 15) / 16;
    // Both sides know the bytes. What is not that large is in all channels at once, and in four tiles of each as long as those have
    // 4 KiB: as many are under way together.
    const u64 share = (message.bytes + CHANNELS - 1) / CHANNELS, quarter = share < 4096 ? share : share < 4 * 4096 ? 4096 : (share + 3) / 4;
    tile = quarter < SLOT_BYTES ? u32(lines(quarter)) : u32(SLOT_BYTES / 16);
    const u64 step = u64(CHANNELS) * tile, first = u64(channel) * tile;
    rounds = first < vectors ? u32((vectors - first + step - 1) / step) : 0;
    is_wide = is_on(message.at, 16) && message.bytes % 16 == 0;
  }

  __device__ __forceinline__ u64 begin(u32 t) const { return (u64(t) * CHANNELS + channel) * tile; }
  __device__ __forceinline__ u32 tiles() const { return rounds; }
  __device__ __forceinline__ u32 count(u32 t) const {
    const u64 rest = vectors - begin(t);
    return rest < tile ? u32(rest) : tile;
  }
  __device__ __forceinline__ bool needs_threads() const { return !is_wide; }

  __device__ __forceinline__ Side own(u32 t) const { return own_side(message.at, begin(t) * 16, message.bytes); }
  __device__ __forceinline__ Side slot(u32 t) const {
    const u32 to = IS_SENT ? message.peer : args.rank, from = IS_SENT ? args.rank : message.peer;
    Side side;
    side.at = args.arenas[to] + SLOTS_AT + ((u64(from) * CHANNELS + channel) * MESSAGE_SLOTS + (before + t) % MESSAGE_SLOTS) * SLOT_BYTES;
    return side;
  }

  __device__ __forceinline__ Side input(u32 t, u32) const {
    if (IS_SENT) return own(t);
    Side side = slot(t);
    side.wait = {message.peer, SENT, before + t};
    side.tell = {message.peer, TAKEN, before + t};
    return side;
  }
  __device__ __forceinline__ Side output(u32 t, u32) const {
    if (!IS_SENT) return own(t);
    Side side = slot(t);
    if (before + t >= MESSAGE_SLOTS) side.wait = {message.peer, TAKEN, before + t - MESSAGE_SLOTS};
    side.tell = {message.peer, SENT, before + t};
    return side;
  }
};

// All threads of a block, before the tiles of a message: begins another era where it is time. False if one must leave.
template <bool IS_SENT>
__device__ __forceinline__ bool begin_era(const Args& args, Entry& entry, const Message& message, u32 channel, u32& before) {
  if (before >= ERA_ROUNDS) {
    // The slots are free before rounds are counted anew. The receiver has nothing to wait for: no flag of the new era came before.
    bool is_free = true;
    if (IS_SENT && threadIdx.x < FLAG_WAYS) {
      is_free = wait_flag(args, entry, channel, message.peer, TAKEN, before - 1 - threadIdx.x);
    }
    if (!__syncthreads_and(is_free)) return false;
    before = 0;
    entry.epoch++;
  }
  return true;
}

// All threads of a block: one channel of a large message. False if one must leave.
template <bool IS_SENT>
__device__ __noinline__ bool move_channel(const Args& args, Entry entry, const Message& message, Track* track, u32 channel) {
  auto& counts = track->channels[channel];
  u32 before = counts.rounds;
  entry.epoch = counts.era;
  if (!begin_era<IS_SENT>(args, entry, message, channel, before)) return false;
  const Stretch<IS_SENT> stretch(args, message, channel, before);
  if (!run(args, entry, stretch)) return false;
  // All threads have read both, and passed barriers since.
  if (threadIdx.x == 0) counts.rounds = before + stretch.rounds, counts.era = entry.epoch;
  __syncthreads();
  return true;
}

// One thread of block 0 of a lane.
__device__ __forceinline__ void record_message(const Args& args, const Message& message, u32 number) {
  MessageRecord* record = record_of(args, message);
  store_word(&record->number, u64(number) << 32 | message.tag);
  store_word(&record->started_ns, now_ns());
  store_word(&record->bytes, message.bytes);
  store_word(&record->kind, u64(message.kind) << 8 | message.dtype);
  store_word(&record->same_number, u64(number) << 32);
}

// All blocks of a lane: the part of a collective that stays here.
__device__ __noinline__ void keep(const Message& from, const Message& to, u32 block, u32 blocks) {
  if (from.at == to.at) return;
  const bool is_wide = is_on(from.at, 16) && is_on(to.at, 16) && from.bytes % 16 == 0;
  const u64 vectors = (from.bytes + 15) / 16, step = u64(blocks) * blockDim.x, first = u64(block) * blockDim.x + threadIdx.x;
  auto copy = [&](auto wide) {
    constexpr bool WIDE = decltype(wide)::value;
    for_vectors<TOGETHER<WIDE, 1>>(0, vectors, first, step, [&](auto together, u64 v) {
      constexpr int N = decltype(together)::value;
      uint4 values[N];
#pragma unroll
      for (int i = 0; i < N; i++) {
        const u64 at = (v + i * step) * 16;
        values[i] = load_vector<WIDE>(from.at + at, from.bytes - at);
      }
#pragma unroll
      for (int i = 0; i < N; i++) {
        const u64 at = (v + i * step) * 16;
        store_vector<WIDE>(to.at + at, to.bytes - at, values[i]);
      }
    });
  };
  if (is_wide) copy(Count<true>{});
  else copy(Count<false>{});
}

// Where a lane stands.
struct Standing {
  u64 packets, credit;
  u32 messages;
};

// The first thing that a worker does: its loads are under way with those of `begin`.
__device__ __forceinline__ Standing look(const Messages& messages) {
  await_kernel_before();
  Standing standing = {0, 0, 0};
  if (threadIdx.x == 0) {
    const Message& message = messages.list[messages.begins[blockIdx.x / messages.blocks]];
    const Track* track = track_of(messages.call, message.peer, message.is_sent);
    standing.packets = track->packets;
    standing.messages = track->messages;
    standing.credit = load_word(credit_at(messages.call, messages.call.rank, message.peer));
  }
  return standing;
}

// One thread of each block: tells the next kernel where a lane stands behind these messages, once all blocks know where it stood.
__device__ __forceinline__ void move_on(const Messages& messages, const Part& part, const Standing& standing) {
  if (!part.is_last_of_lane(messages.call)) return;
  const u32 begin = messages.begins[part.lane], end = messages.begins[part.lane + 1];
  u64 packets = standing.packets;
  for (u32 at = begin; at < end; at++) packets += HEADER_UNITS + units_of(messages.list[at]);
  Track* track = track_of(messages.call, messages.list[begin].peer, messages.list[begin].is_sent);
  track->packets = packets;
  track->messages = standing.messages + (end - begin);
}

// All threads of a block: its part of a lane. IS_SMALL: no message goes in tiles. False if one must leave.
template <bool IS_SMALL>
__device__ __forceinline__ bool carry_out(const Messages& messages, const Entry& call, const Standing& standing) {
  __shared__ u64 packets, credit;
  __shared__ u32 number;
  const Args& args = messages.call;
  const Part part(messages);
  const u32 begin = messages.begins[part.lane], end = messages.begins[part.lane + 1];
  const u32 peer = messages.list[begin].peer;
  const bool is_sent = messages.list[begin].is_sent;
  if (peer == args.rank) {
    keep(messages.list[begin], messages.list[begin + 1], part.block, part.blocks);
    return true;
  }
  Track* track = track_of(args, peer, is_sent);
  if (threadIdx.x == 0) packets = standing.packets, credit = standing.credit, number = standing.messages;
  __syncthreads();
  // While packets are on their way here.
  if (threadIdx.x == 0 && !is_sent) move_on(messages, part, standing);
  u64 packet = packets;
  Entry entry = call;
  entry.what = is_sent ? A_SEND : A_RECEIVE;
  for (u32 at = begin; at < end; at++) {
    const Message& message = messages.list[at];
    entry.tag = message.tag;
    // A thread that has nothing to move tells; what is sent goes first.
    const bool tells = part.block == 0 && threadIdx.x == blockDim.x - 1;
    if (tells && !is_sent) record_message(args, message, number + (at - begin) + 1);
    if (!(is_sent ? put(args, entry, message, part, packet, credit) : take(args, entry, message, part, at, at + 1 == end, packet))) return false;
    if (tells && is_sent) record_message(args, message, number + (at - begin) + 1);
    packet += HEADER_UNITS + units_of(message);
    if (!IS_SMALL && !is_small(message)) {
      for (u32 channel = part.block; channel < CHANNELS; channel += part.blocks) {
        if (!(is_sent ? move_channel<true>(args, entry, message, track, channel)
                      : move_channel<false>(args, entry, message, track, channel))) {
          return false;
        }
      }
    }
    if (tells) store_word(&record_of(args, message)->ended_ns, now_ns());
  }
  if (threadIdx.x == 0 && is_sent) move_on(messages, part, standing);
  return true;
}

// One thread: which rank's next message has this tag; tells the host one more than that. Ranks are looked at in turn.
__device__ __forceinline__ bool find(const Messages& messages, const Entry& call) {
  const Args& args = messages.call;
  const Message& wanted = messages.list[0];
  Entry entry = call;
  entry.what = A_RECEIVE;
  entry.tag = wanted.tag;
  u32 found = 0;
  bool is_there = wait_until(args, entry, RANKS, [&] {
    for (u32 k = 0; k < RANKS; k++) {
      const u32 source = peer_behind(messages.first, k);
      if (source == args.rank) continue;
      const u64 first = track_of(args, source, false)->packets;
      u32 words[3];
      // Of a message, not of a part of a collective.
      const bool is_it = take_packet(packet_at(args, args.rank, source, first), words, lap_of(first)) &&
                         words[0] == wanted.tag && words[1] >> 8 == 0;
      if (is_it) {
        found = source + 1;
        return true;
      }
    }
    return false;
  });
  if (is_there) store_word(&args.report->found, found);
  return is_there;
}
