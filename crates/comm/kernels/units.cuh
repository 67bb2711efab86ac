// What data travels in where it says itself that it is there, and how threads share that out: packets, which a thread stores and
// loads on its own, and lines of 128 bytes, which eight lanes of a warp store and load together. One-shot and two-shot are written
// over either: `Packets` and `Lines` below have the same members.
//
// A line carries 120 bytes of data and, in the last eight, the epoch; a packet 12 and 4. Lines come in units of two, 240 bytes of a
// buffer, which half a warp moves: fifteen vectors of 16 bytes, of which fourteen lie with one lane each, and the last lies half by
// half with the two lanes that have the tags. So vectors are whole where the buffer lies on 16 bytes. Elements of 16 bytes must not be
// cut: of those there are 224 bytes in a unit. Units are folded element by element, so who has which bytes matters to nobody.
//
// A warp works as one on lines: all of its lanes take every turn of a loop, poll together, and leave together. What a lane has nothing
// to do with it skips within the turn; both halves of the warp may, but never some lanes of a line.
//
// SYNC: a line is whole. Its eight lanes store it, on 128 bytes, and load it, in one instruction of their warp: `__syncwarp` stands right
// before either, so the lanes come there together, and the compiler has no second copy of the access for some of them. The hardware
// moves the 128 bytes of one instruction together. The programming model does not promise that; it was measured on NVLink 4 with such
// stores and loads: 7.8 thousand million looks saw no tag that was newer or older than the data beside it. No lane uses its data before
// the lane with the tag has told, by a vote of the warp, that the tag is of this epoch.
//
// When memory may be used again: packets have two halves for alternate epochs (call.cuh). Lines have two areas, and the word `late` of
// the state names that into which the calls so far sent what peers take last: they may not have taken it yet, and have taken all of
// the other area. A one-shot call sends into the other area, which is `late` for the next call. A two-shot call sends its first stage
// into the other area and its second into `late`, and leaves the word as it is; but a reduce, of which most ranks never hear whether
// others took their shards, sends both stages into the other area, as a one-shot call. Let the call be of epoch e:
//
// - Into the other area: what was there is of a two-shot call's first stage, or older than the call that made the area at hand `late`.
//   The first has been taken if that call was e − 1, because we completed it: every peer sent us what it made of it. If it was earlier,
//   or it is the second, then of an epoch below e − 1, and the header of e − 1 told that peers were done with it.
// - Into `late`, in the second stage: we have heard every peer in e. Of an all-reduce its data was there, for a broadcast we wait for its
//   header. Who is in e has taken everything of the calls before.

#pragma once

#include "buffers.cuh"
#include "call.cuh"

// Units of N packets: 12 · N bytes.
template <int N>
struct Packets {
  static constexpr int WORDS = 3 * N;
  static constexpr u32 BYTES = 12 * N, STRIDE = N * PACKET_BYTES;
  // One thread moves a unit, and no thread waits for another.
  static constexpr bool IS_SHARED = false;
  // Peers for which a thread loads before it stores what is for the first of them: loads do not pass stores.
  static constexpr u32 AHEAD = 1;

  static __device__ __forceinline__ u64 first() { return u64(blockIdx.x) * blockDim.x + threadIdx.x; }
  static __device__ __forceinline__ u64 step() { return u64(workers()) * blockDim.x; }
  static __device__ __forceinline__ u32 nth() { return 0; }

  static __device__ __forceinline__ u64 first_stage(const Entry& entry) { return PACKETS_AT + half_of(entry.epoch) * HALF_BYTES; }
  static __device__ __forceinline__ u64 behind_first(const Entry& entry, u64 slot_bytes) {
    return first_stage(entry) + RANKS * slot_bytes;
  }
  static __device__ __forceinline__ u64 second_stage(const Entry& entry, u64 slot_bytes) { return behind_first(entry, slot_bytes); }
  static __device__ __forceinline__ u32 slot(u32 source, u32 target) { return source; }

  static __device__ __forceinline__ void load(const u8* part, u64 at, u64 bytes, u32* words) {
    load_words<WORDS>(part + at, bytes - at, words);
  }
  static __device__ __forceinline__ void store(u8* part, u64 at, u64 bytes, const u32* words) {
    store_words<WORDS>(part + at, bytes - at, words);
  }
  static __device__ __forceinline__ void put(u8* at, const u32* words, u32 epoch, bool is_due) {
    if (!is_due) return;
#pragma unroll
    for (int i = 0; i < N; i++) put_packet(at + i * PACKET_BYTES, words + 3 * i, epoch);
  }
  static __device__ __forceinline__ bool take(const u8* at, u32* words, u32 epoch) {
    bool is_there = true;
#pragma unroll
    for (int i = 0; i < N; i++) is_there &= take_packet(at + i * PACKET_BYTES, words + 3 * i, epoch);
    return is_there;
  }

  static __device__ __forceinline__ void meet() {}
  static __device__ __forceinline__ bool any(bool is_so) { return is_so; }
  static __device__ __forceinline__ bool all(bool is_so) { return is_so; }
  static __device__ __forceinline__ u32 unite(u32 mask) { return mask; }
};

// For elements of so many bytes: as few packets as carry whole ones.
template <int SIZE>
using PacketsOf = Packets<(SIZE <= 4 ? 1 : SIZE / 4)>;

// Units of two lines, of elements of SIZE bytes. All threads of a warp call each of these together.
template <int SIZE>
struct Lines {
  static constexpr int WORDS = 4;
  static constexpr u32 BYTES = UNIT_LINES * (SIZE <= 8 ? LINE_DATA : WIDE_LINE_DATA), STRIDE = UNIT_LINES * LINE_BYTES;
  static constexpr u32 LANES = STRIDE / 16, UNITS = 32 / LANES;
  // Bytes that the lanes without tags have.
  static constexpr u32 VECTORS = UNIT_LINES * WIDE_LINE_DATA;
  static constexpr bool IS_SHARED = true;
  static constexpr u32 AHEAD = 4;
  static_assert(UNITS == 2 && (BYTES == VECTORS || BYTES == VECTORS + 16), "two units in a warp, fourteen or fifteen vectors in each");

  static __device__ __forceinline__ u32 lane() { return threadIdx.x % LANES; }
  static __device__ __forceinline__ bool has_tag() { return threadIdx.x % 8 == 7; }
  // Where in the unit the bytes of this lane are.
  static __device__ __forceinline__ u32 offset() {
    return has_tag() ? VECTORS + lane() / 8 * 8 : (lane() - lane() / 8) * 16;
  }

  // The first unit of a warp; this thread's is the `nth` behind it.
  static __device__ __forceinline__ u64 first() { return (u64(blockIdx.x) * blockDim.x + threadIdx.x) / 32 * UNITS; }
  static __device__ __forceinline__ u64 step() { return u64(workers()) * blockDim.x / LANES; }
  static __device__ __forceinline__ u32 nth() { return threadIdx.x % 32 / LANES; }

  static __device__ __forceinline__ u64 first_stage(const Entry& entry) { return LINES_AT + (entry.late ^ 1u) * LINES_AREA_BYTES; }
  static __device__ __forceinline__ u64 behind_first(const Entry& entry, u64 slot_bytes) {
    return first_stage(entry) + (RANKS - 1) * slot_bytes;
  }
  static __device__ __forceinline__ u64 second_stage(const Entry& entry, u64) { return LINES_AT + entry.late * LINES_AREA_BYTES; }
  // Nobody sends to itself.
  static __device__ __forceinline__ u32 slot(u32 source, u32 target) { return source - (source > target ? 1 : 0); }

  // This lane's words of the unit that begins at byte `at` of a part with so many bytes; what is missing reads as zero.
  static __device__ __forceinline__ void load(const u8* part, u64 at, u64 bytes, u32* words) {
    const u64 from = at + offset(), rest = from < bytes ? bytes - from : 0;
    if (has_tag()) {
      words[0] = words[1] = words[2] = words[3] = 0;
      if (BYTES > VECTORS) load_words<2>(part + from, rest, words);
    } else if (rest >= 16 && is_on(part + from, 16)) {
      const uint4 vector = *reinterpret_cast<const uint4*>(part + from);
      words[0] = vector.x, words[1] = vector.y, words[2] = vector.z, words[3] = vector.w;
    } else {
      load_words<4>(part + from, rest, words);
    }
  }
  static __device__ __forceinline__ void store(u8* part, u64 at, u64 bytes, const u32* words) {
    const u64 to = at + offset(), rest = to < bytes ? bytes - to : 0;
    if (has_tag()) {
      if (BYTES > VECTORS) store_words<2>(part + to, rest, words);
    } else if (rest >= 16 && is_on(part + to, 16)) {
      *reinterpret_cast<uint4*>(part + to) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
      store_words<4>(part + to, rest, words);
    }
  }
  // IS_DUE is the same for all lanes of a unit, here and below.
  static __device__ __forceinline__ void put(u8* at, const u32* words, u32 epoch, bool is_due) {
    const uint4 part = make_uint4(words[0], words[1], has_tag() ? epoch : words[2], has_tag() ? epoch : words[3]);
    __syncwarp();
    if (is_due) store_part_of_line(at + lane() * 16, part);
  }
  // False if this lane has a tag, and that is not of this epoch. Behind `meet`.
  static __device__ __forceinline__ bool take(const u8* at, u32* words, u32 epoch) {
    const uint4 part = load_part_of_line(at + lane() * 16);
    words[0] = part.x, words[1] = part.y, words[2] = part.z, words[3] = part.w;
    return !has_tag() || part.w == epoch;
  }

  static __device__ __forceinline__ void meet() { __syncwarp(); }
  static __device__ __forceinline__ bool any(bool is_so) { return __any_sync(~0u, is_so); }
  static __device__ __forceinline__ bool all(bool is_so) { return __all_sync(~0u, is_so); }
  static __device__ __forceinline__ u32 unite(u32 mask) { return __reduce_or_sync(~0u, mask); }
};

// Polls until nothing is missing: `poll()` is the peers of which something is, as bits. The same for all threads that share units.
template <class U, class Poll>
__device__ __forceinline__ bool take_until(const Args& args, const Entry& entry, Poll poll) {
  u32 spins = 0;
  while (true) {
    U::meet();
    const u32 missing = U::unite(poll());
    if (missing == 0) {
      end_wait(args, spins);
      return true;
    }
    if ((++spins & 63) == 0 && U::any(must_leave(args, entry, spins, __ffs(missing) - 1, 0))) return false;
  }
}

// Polls a unit of every peer at once until all that are due are there: their latencies overlap. `slot(peer)` is where it lies.
template <class U, class Slot, class Due>
__device__ __forceinline__ bool take_units(const Args& args, const Entry& entry, u32 (&units)[RANKS][U::WORDS], Slot slot,
                                           Due is_due) {
  return take_until<U>(args, entry, [&] {
    u32 missing = 0;
#pragma unroll
    for (int peer = 0; peer < RANKS; peer++) {
      const bool is_taken = peer != args.rank && is_due(peer);
      if (is_taken && !U::take(slot(peer), units[peer], entry.epoch)) missing |= 1u << peer;
    }
    return missing;
  });
}

template <class U, class Slot>
__device__ __forceinline__ bool take_units(const Args& args, const Entry& entry, u32 (&units)[RANKS][U::WORDS], Slot slot) {
  return take_units<U>(args, entry, units, slot, [](int) { return true; });
}

template <class U>
__device__ __forceinline__ bool take_one(const Args& args, const Entry& entry, u32 peer, const u8* at, u32* words, bool is_due) {
  return take_until<U>(args, entry, [&] { return is_due && !U::take(at, words, entry.epoch) ? 1u << peer : 0; });
}

// Calls `load(peer, at)` for the first N peers behind us, then `put(peer, at)` for these, and so on: `at` counts up to N.
template <u32 N, class Load, class Put>
__device__ __forceinline__ void for_peers(u32 me, Load load, Put put) {
#pragma unroll
  for (u32 first = 1; first < RANKS; first += N) {
#pragma unroll
    for (u32 at = 0; at < N; at++) {
      if (first + at < RANKS) load(peer_behind(me, first + at), at);
    }
#pragma unroll
    for (u32 at = 0; at < N; at++) {
      if (first + at < RANKS) put(peer_behind(me, first + at), at);
    }
  }
}

// Waits until every peer is in this call.
template <class U>
__device__ __forceinline__ bool hear_all(const Args& args, const Entry& entry) {
  u32 headers[RANKS][3];
  auto slot = [&](int peer) { return args.arenas[args.rank] + header_at(entry.epoch, peer); };
  return U::all(take_units<Packets<1>>(args, entry, headers, slot));
}
