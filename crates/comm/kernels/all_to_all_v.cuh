// An all-to-all of parts of any size in place, and one whose counts lie in memory of the device: both are made of messages.
//
// In place, a part that comes takes the place of the one that goes to the same rank, and both have the same size. So both directions of a
// pair are one lane. Its blocks send packets before they receive any: the thread that stores a unit is the one that has loaded it. Tiles
// go out a piece at a time, and the piece that comes in takes the place of one that has gone.
//
// Counted, nobody but the device of the sender knows how much it sends. It tells the receiver in one packet more of its header, tagged with
// the epoch as that is; the message follows at once. Whoever finds that a part lies outside of the input, or is more than the receiver has
// room for, reports it before anything is sent, or written, and leaves; the host ends the waits of all.

#pragma once

#include "messages.cuh"

// Tiles of a channel that go out before as many come in: one for each chain of copies.
constexpr u32 PIECE = FLAG_WAYS;
// Pieces that go out before the first comes in. Piece i needs the slots of piece i − AHEAD − 1, which the receiver, if it is in place
// itself, has taken before it sends its own piece i; so among all blocks of a pair the one with the least piece can always go on.
constexpr u32 AHEAD = MESSAGE_SLOTS / PIECE - 1;
static_assert(MESSAGE_SLOTS % PIECE == 0, "slots hold whole pieces");

// Some tiles of a channel.
template <bool IS_SENT>
struct Piece : Stretch<IS_SENT> {
  using Whole = Stretch<IS_SENT>;

  u32 first, number;

  __device__ __forceinline__ Piece(const Whole& whole, u32 piece) : Whole(whole), first(piece * PIECE) {
    number = whole.rounds - first < PIECE ? whole.rounds - first : PIECE;
  }

  __device__ __forceinline__ u32 tiles() const { return number; }
  __device__ __forceinline__ u32 count(u32 t) const { return Whole::count(first + t); }
  __device__ __forceinline__ Side input(u32 t, u32 k) const { return Whole::input(first + t, k); }
  __device__ __forceinline__ Side output(u32 t, u32 k) const { return Whole::output(first + t, k); }
};

// All threads of a block: one channel of two large messages of the same size in the same place, the first of which is sent. False if one
// must leave.
__device__ __noinline__ bool swap_channel(const Args& args, const Entry& call, const Message* pair, u32 channel) {
  const Message &sent = pair[0], &received = pair[1];
  auto& out = track_of(args, sent.peer, true)->channels[channel];
  auto& in = track_of(args, sent.peer, false)->channels[channel];
  Entry sending = call, receiving = call;
  sending.what = A_SEND, receiving.what = A_RECEIVE;
  u32 sent_before = out.rounds, received_before = in.rounds;
  sending.epoch = out.era, receiving.epoch = in.era;
  if (!begin_era<true>(args, sending, sent, channel, sent_before)) return false;
  if (!begin_era<false>(args, receiving, received, channel, received_before)) return false;
  const Stretch<true> going(args, sent, channel, sent_before);
  const Stretch<false> coming(args, received, channel, received_before);
  const u32 pieces = (going.rounds + PIECE - 1) / PIECE;
  for (u32 i = 0; i < pieces + AHEAD; i++) {
    if (i < pieces && !run(args, sending, Piece<true>(going, i))) return false;
    // What is overwritten was loaded before, by all threads and copies of this block: each program waits for its own.
    __syncthreads();
    if (i >= AHEAD && !run(args, receiving, Piece<false>(coming, i - AHEAD))) return false;
    __syncthreads();
  }
  // All threads have read the counts, and passed barriers since.
  if (threadIdx.x == 0) {
    out.rounds = sent_before + going.rounds, out.era = sending.epoch;
    in.rounds = received_before + coming.rounds, in.era = receiving.epoch;
  }
  return true;
}

// All threads of a block: its part of a lane with both directions of a pair; `standing` is that of what is sent. False if one must leave.
template <bool IS_SMALL>
__device__ __forceinline__ bool swap(const Messages& messages, const Entry& call, const Standing& standing) {
  __shared__ u64 packets[2], credit;
  const Args& args = messages.call;
  const Part part(messages);
  const u32 begin = messages.begins[part.lane];
  const Message* pair = messages.list + begin;
  const u32 peer = pair->peer;
  // What stays is where it should be.
  if (peer == args.rank) return true;
  Track *out = track_of(args, peer, true), *in = track_of(args, peer, false);
  u32 received = 0;
  if (threadIdx.x == 0) {
    received = in->messages;
    packets[0] = standing.packets, packets[1] = in->packets, credit = standing.credit;
    if (part.block == 0) {
      record_message(args, pair[0], standing.messages + 1);
      record_message(args, pair[1], received + 1);
    }
  }
  __syncthreads();
  Entry sending = call, receiving = call;
  sending.what = A_SEND, receiving.what = A_RECEIVE;
  if (!put(args, sending, pair[0], part, packets[0], credit)) return false;
  if (threadIdx.x == 0 && part.is_last_of_lane(args)) {
    const u32 units = HEADER_UNITS + units_of(pair[0]);
    out->packets = packets[0] + units, out->messages = standing.messages + 1;
    in->packets = packets[1] + units, in->messages = received + 1;
  }
  // A thread stores the units that it has loaded, so what comes in overwrites nothing that has yet to go out.
  if (!take(args, receiving, pair[1], part, begin + 1, true, packets[1])) return false;
  if (!IS_SMALL && !is_small(pair[0])) {
    for (u32 channel = part.block; channel < CHANNELS; channel += part.blocks) {
      if (!swap_channel(args, call, pair, channel)) return false;
    }
  }
  if (part.block == 0 && threadIdx.x == 0) {
    for (u32 i = 0; i < 2; i++) store_word(&record_of(args, pair[i])->ended_ns, now_ns());
  }
  return true;
}

struct Counted {
  Args call;
  // A list has a number for each rank, in elements.
  const u8* counts;   // what goes to it
  const u8* offsets;  // where in the input that begins; null: parts follow each other
  u8* told;           // gets what came from it
  u64 most_in;        // elements of the input
  u64 most_out;       // elements of the output that each rank may fill
  u32 size;           // bytes of an element
  u16 blocks;         // of each lane
  u8 dtype;
  u8 kind;
  u32 is_wide;        // whether numbers have 64 bits
  u32 reserved;
};

static_assert(sizeof(Counted) == COUNTED_BYTES, "the host lays arguments out differently");

constexpr u32 REASON_COUNTS = REASON_ABORTED + 1;

// A part of the input, in elements.
struct Portion {
  u64 from, count;
};

__device__ __forceinline__ u64 number_in(const Counted& counted, const u8* list, u32 rank) {
  return counted.is_wide ? reinterpret_cast<const u64*>(list)[rank] : reinterpret_cast<const u32*>(list)[rank];
}

// Sums that have no room are as large as can be: they fit nowhere.
__device__ __forceinline__ u64 sum_of(u64 a, u64 b) { return a + b < a ? ~u64(0) : a + b; }

__device__ __forceinline__ Portion portion_for(const Counted& counted, u32 rank) {
  Portion portion = {0, number_in(counted, counted.counts, rank)};
  if (counted.offsets != nullptr) portion.from = number_in(counted, counted.offsets, rank);
  for (u32 before = 0; counted.offsets == nullptr && before < rank; before++) {
    portion.from = sum_of(portion.from, number_in(counted, counted.counts, before));
  }
  return portion;
}

// One thread: how many elements came from a rank.
__device__ __forceinline__ void tell_count(const Counted& counted, u32 rank, u64 count) {
  if (counted.is_wide) reinterpret_cast<u64*>(counted.told)[rank] = count;
  else reinterpret_cast<u32*>(counted.told)[rank] = u32(count);
}

// The packet in which `source` tells `rank` how many elements it has for it: behind those of its header, with a tag as they have, and
// cleared with them. What holds for headers holds for it: it stays until all blocks of the receiver's kernel have left.
static_assert((HEADER_PACKETS + 1) * PACKET_BYTES <= HEADER_BYTES, "a header has room for one more packet");

__device__ __forceinline__ u8* size_at(const Args& args, u32 rank, u32 epoch, u32 source) {
  return args.arenas[rank] + header_at(epoch, source) + HEADER_PACKETS * PACKET_BYTES;
}

// One thread: whether that many elements have room in the input, or in the output's part; else it is reported, with the other rank.
__device__ __forceinline__ bool fits(const Args& args, const Entry& entry, u32 peer, u64 needed, u64 room, bool is_input) {
  if (needed <= room) return true;
  give_up(args, REASON_COUNTS, peer, entry.epoch, room, needed, is_input);
  return false;
}

// The first lane of a counted call has what stays here; then each distance has one for what comes and one for what goes.
struct CountedLane {
  u32 lane, peer;
  bool is_own, is_sent, is_first;  // of its blocks

  __device__ __forceinline__ explicit CountedLane(const Counted& counted) {
    lane = blockIdx.x / counted.blocks;
    peer = peer_behind(counted.call.rank, (lane + 1) / 2);
    is_own = lane == 0;
    is_sent = lane > 0 && lane % 2 == 0;
    is_first = blockIdx.x % counted.blocks == 0;
  }
};

// All threads of a block: our lane alone, as `look` and `carry_out` want it, but for what lies where.
__device__ __forceinline__ void list_lane(const Counted& counted, const CountedLane& lane, Messages* messages) {
  const u32* from = reinterpret_cast<const u32*>(&counted.call);
  for (u32 i = threadIdx.x; i < sizeof(Args) / 4; i += blockDim.x) reinterpret_cast<u32*>(&messages->call)[i] = from[i];
  if (threadIdx.x < 2) {
    Message message = {nullptr, 0, 0, counted.dtype, counted.kind, u8(lane.peer), lane.is_own ? threadIdx.x == 0 : lane.is_sent};
    messages->list[threadIdx.x] = message;
    messages->begins[lane.lane + threadIdx.x] = threadIdx.x == 0 ? 0 : lane.is_own ? 2 : 1;
    messages->blocks = counted.blocks;
  }
  __syncthreads();
}

// One thread: finds, and checks, how much the lane moves, and lists it. What goes to a peer is told it. False if one must leave.
__device__ __forceinline__ bool settle(const Counted& counted, const Entry& entry, const CountedLane& lane, const Portion& portion,
                                       Messages* messages, u64* count) {
  const Args& args = counted.call;
  const u32 me = args.rank, peer = lane.peer;
  *count = portion.count;
  if (lane.is_own || lane.is_sent) {
    if (!fits(args, entry, peer, sum_of(portion.from, portion.count), counted.most_in, true)) return false;
  }
  if (lane.is_sent && lane.is_first) {
    const u32 words[3] = {u32(portion.count), u32(portion.count >> 32), 0};
    put_packet(size_at(args, peer, entry.epoch, me), words, entry.epoch);
  }
  if (!lane.is_own && !lane.is_sent) {
    u32 words[3];
    const u8* at = size_at(args, me, entry.epoch, peer);
    if (!wait_until(args, entry, peer, [&] { return take_packet(at, words, entry.epoch); })) return false;
    *count = u64(words[1]) << 32 | words[0];
  }
  if (!lane.is_sent && !fits(args, entry, peer, *count, counted.most_out, false)) return false;
  u8* in = args.sources[me] + portion.from * counted.size;
  u8* out = args.targets[me] + peer * counted.most_out * counted.size;
  messages->list[0].at = lane.is_own || lane.is_sent ? in : out;
  messages->list[1].at = out;
  messages->list[0].bytes = messages->list[1].bytes = *count * counted.size;
  return true;
}
