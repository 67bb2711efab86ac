// Ring: every rank sends to the next only, in tiles, through scratch. The fewest bytes on each link and one peer at a time:
// the highest bandwidth, at n − 1 hops per pass.
//
// All-reduce: shard p starts at rank p + 1 and goes round to p, each rank adding its own; then the finished shards go round
// once more. The order of a sum is p + 1, p + 2, …, p, and what is handed on is rounded to the dtype each time. Bytes out of
// each rank: 2 · S · (n − 1)/n. Broadcast: the root's tiles go round. All-gather: everybody's.
//
// Block b keeps a queue of its own to block b of the next rank: SLOTS tiles in that rank's scratch. Step j of the call uses
// slot j mod SLOTS; its flag (stage 0) says that it is filled, and the receiver's flag back (stage 1) that it was read.

#pragma once

#include "flags.cuh"
#include "one_shot.cuh"

template <int DTYPE, int OP, bool WIDE>
struct Ring {
  const Args& args;
  const Entry& entry;
  u32 next, previous, sent, received;

  __device__ __forceinline__ Ring(const Args& args, const Entry& entry) : args(args), entry(entry), sent(0), received(0) {
    next = args.rank + 1 == RANKS ? 0 : args.rank + 1;
    previous = args.rank == 0 ? RANKS - 1 : args.rank - 1;
  }

  __device__ __forceinline__ u64 slot(u32 step) const {
    return SCRATCH_AT + half_of(entry.epoch) * SCRATCH_HALF_BYTES +
           (u64(blockIdx.x) * RING_SLOTS + step % RING_SLOTS) * args.tile * 16;
  }

  // Moves `count` vectors: from the previous rank (RECEIVE) or from `own`; combined with `own` (ADD), finished (FINISH);
  // to the next rank (SEND) and to `out` (KEEP). Pointers are of users' buffers; `rest` bytes are left from there.
  template <bool RECEIVE, bool ADD, bool FINISH, bool SEND>
  __device__ __forceinline__ bool move(const u8* own, u8* out, u64 rest, u32 count, f64 scalar) {
    bool is_free = true;
    if (threadIdx.x == 0) {
      if (RECEIVE) is_free = wait_flag(args, entry, blockIdx.x, previous, 0, received);
      if (SEND && sent >= RING_SLOTS) is_free = is_free && wait_flag(args, entry, blockIdx.x, next, 1, sent - RING_SLOTS);
    }
    if (!__syncthreads_and(is_free)) return false;
    const uint4* from = scratch_of(args, args.rank, slot(received));
    uint4* to = scratch_of(args, next, slot(sent));
    for_vectors<TOGETHER<WIDE, ADD ? 2 : 1>>(0, count, threadIdx.x, blockDim.x, [&](auto together, u64 v) {
      constexpr int N = decltype(together)::value;
      uint4 values[N], mine[N];
      auto left = [&](u64 vector) { return rest > vector * 16 ? rest - vector * 16 : 0; };
#pragma unroll
      for (int i = 0; i < N; i++) {
        const u64 vector = v + i * blockDim.x;
        if (RECEIVE) values[i] = from[vector];
        if (!RECEIVE || ADD) mine[i] = load_vector<WIDE>(own + vector * 16, left(vector));
      }
#pragma unroll
      for (int i = 0; i < N; i++) {
        const u64 vector = v + i * blockDim.x;
        if (!RECEIVE || ADD) values[i] = combine<RECEIVE, ADD, FINISH>(values[i], mine[i], scalar);
        if (SEND) to[vector] = values[i];
        if (out != nullptr) store_vector<WIDE>(out + vector * 16, left(vector), values[i]);
      }
    });
    __syncthreads();
    if (threadIdx.x == 0) {
      // SYNC: what a block stored for step j, and that it read what was there, is visible after its flag of step j.
      fence_all();
      if (SEND) set_flag(args, entry, blockIdx.x, next, 0, sent);
      if (RECEIVE) set_flag(args, entry, blockIdx.x, previous, 1, received);
    }
    sent += SEND;
    received += RECEIVE;
    return true;
  }

  template <bool RECEIVE, bool ADD, bool FINISH>
  __device__ __forceinline__ uint4 combine(uint4 value, uint4 mine, f64 scalar) {
    if constexpr (!ADD) return mine;
    Fold<DTYPE, OP, 4> fold;
    u32 ours[4] = {mine.x, mine.y, mine.z, mine.w}, words[4] = {value.x, value.y, value.z, value.w};
    if constexpr (RECEIVE) {
      fold.partial_first(words);
      fold.next(ours, scalar);
    } else {
      fold.first(ours, scalar);
    }
    if constexpr (FINISH) fold.finish(words, RANKS);
    else fold.partial(words);
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

template <int KIND, int DTYPE, int OP, bool WIDE>
__device__ __forceinline__ bool ring_passes(const Args& args, const Entry& entry) {
  const u32 me = args.rank;
  const u8* source = args.sources[me];
  u8* target = args.targets[me];
  const u64 all = (args.bytes + 15) / 16;
  const u64 vectors = KIND == ALL_REDUCE ? (all + RANKS - 1) / RANKS : all;
  const u64 step = u64(workers()) * args.tile;
  const f64 scalar = __longlong_as_double(args.header[HEADER_SCALAR]);
  Ring<DTYPE, OP, WIDE> ring(args, entry);
  arrive(args, entry);
  for (u64 base = u64(blockIdx.x) * args.tile; base < vectors; base += step) {
    const u32 count = u32(vectors - base < args.tile ? vectors - base : args.tile);
    if constexpr (KIND == ALL_REDUCE) {
      auto at = [&](u32 shard) { return (shard * vectors + base) * 16; };
      auto rest = [&](u32 shard) { return at(shard) < args.bytes ? args.bytes - at(shard) : 0; };
      u32 shard = me == 0 ? RANKS - 1 : me - 1;
      if (!ring.template move<false, true, false, true>(source + at(shard), nullptr, rest(shard), count, scalar)) return false;
      for (u32 k = 0; k + 2 < RANKS; k++) {
        shard = shard == 0 ? RANKS - 1 : shard - 1;
        if (!ring.template move<true, true, false, true>(source + at(shard), nullptr, rest(shard), count, scalar)) return false;
      }
      if (!ring.template move<true, true, true, true>(source + at(me), target + at(me), rest(me), count, scalar)) return false;
      shard = me;
      for (u32 k = 0; k + 2 < RANKS; k++) {
        shard = shard == 0 ? RANKS - 1 : shard - 1;
        if (!ring.template move<true, false, false, true>(nullptr, target + at(shard), rest(shard), count, 0)) return false;
      }
      shard = shard == 0 ? RANKS - 1 : shard - 1;
      if (!ring.template move<true, false, false, false>(nullptr, target + at(shard), rest(shard), count, 0)) return false;
    } else if constexpr (KIND == BROADCAST) {
      const u64 at = base * 16, rest = args.bytes - at;
      u8* out = target + at;
      bool is_last = ring.next == args.root;
      bool went = me == args.root
                      ? ring.template move<false, false, false, true>(source + at, args.is_same ? nullptr : out, rest, count, 0)
                  : is_last ? ring.template move<true, false, false, false>(nullptr, out, rest, count, 0)
                            : ring.template move<true, false, false, true>(nullptr, out, rest, count, 0);
      if (!went) return false;
    } else {
      const u64 at = base * 16, rest = args.bytes - at;
      auto out = [&](u32 rank) { return target + rank * args.bytes + at; };
      if (!ring.template move<false, false, false, true>(source + at, args.is_same ? nullptr : out(me), rest, count, 0)) return false;
      u32 rank = me;
      for (u32 k = 0; k + 2 < RANKS; k++) {
        rank = rank == 0 ? RANKS - 1 : rank - 1;
        if (!ring.template move<true, false, false, true>(nullptr, out(rank), rest, count, 0)) return false;
      }
      rank = rank == 0 ? RANKS - 1 : rank - 1;
      if (!ring.template move<true, false, false, false>(nullptr, out(rank), rest, count, 0)) return false;
    }
  }
  return true;
}

template <int KIND, int DTYPE, int OP>
__device__ __forceinline__ bool ring(const Args& args, const Entry& entry) {
  const u32 me = args.rank;
  bool is_wide = is_on(args.sources[me], 16) && is_on(args.targets[me], 16) && (KIND != ALL_GATHER || args.bytes % 16 == 0);
  return is_wide ? ring_passes<KIND, DTYPE, OP, true>(args, entry) : ring_passes<KIND, DTYPE, OP, false>(args, entry);
}
