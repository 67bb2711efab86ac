// Direct: input and output of every rank can be reached where they lie. Nothing is staged.
//
// Rank p owns shard p: it reads it from all inputs, reduces it in rank order, and writes it to all outputs. Bytes in and out
// of each rank: 2 · S · (n − 1)/n. Headers tell where the sides of each rank lie in its windows, and that it has entered: its
// input is ready, its output may be written. Every block then works on strips of the shard on its own, and meets block b of
// all ranks at the end: outputs are complete, inputs were read. A broadcast reads from the
// root only; an all-gather writes its own part everywhere.

#pragma once

#include "flags.cuh"
#include "one_shot.cuh"

// Where the sides of all ranks lie, in the shared memory of a block.
struct Places {
  const u8* sources[RANKS];
  u8* targets[RANKS];
};

template <int KIND, int DTYPE, int OP, bool WIDE>
__device__ __forceinline__ void direct_shard(const Args& args, const Places& places, const f64* scalars) {
  const u32 me = args.rank;
  const u64 all = (args.bytes + 15) / 16, vectors = KIND == ALL_GATHER ? all : (all + RANKS - 1) / RANKS;
  const u64 base = KIND == ALL_GATHER ? 0 : me * vectors;
  const u64 end = base + vectors < all ? base + vectors : all;
  const u64 step = u64(workers()) * blockDim.x;
  const u64 first = u64(blockIdx.x) * blockDim.x + threadIdx.x;
  for_vectors<TOGETHER<WIDE, KIND == ALL_REDUCE ? RANKS : 1>>(base, end, first, step, [&](auto count, u64 v) {
    constexpr int N = decltype(count)::value;
    uint4 results[N];
    if constexpr (KIND == ALL_REDUCE) {
      uint4 inputs[N][RANKS];
#pragma unroll
      for (int i = 0; i < N; i++) {
        const u64 vector = v + i * step, rest = args.bytes - vector * 16;
#pragma unroll
        for (int rank = 0; rank < RANKS; rank++) {
          inputs[i][rank] = load_vector<WIDE>(places.sources[rank] + vector * 16, rest);
        }
      }
#pragma unroll
      for (int i = 0; i < N; i++) results[i] = reduce_vectors<DTYPE, OP>([&](int rank) { return inputs[i][rank]; }, scalars);
    } else {
      const u8* source = places.sources[KIND == BROADCAST ? args.root : me];
#pragma unroll
      for (int i = 0; i < N; i++) {
        const u64 vector = v + i * step;
        results[i] = load_vector<WIDE>(source + vector * 16, args.bytes - vector * 16);
      }
    }
    const u64 offset = KIND == ALL_GATHER ? me * args.bytes : 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const u64 vector = v + i * step, rest = args.bytes - vector * 16;
#pragma unroll
      for (u32 k = 0; k < RANKS; k++) {
        u32 peer = peer_behind(me, k);
        bool is_own = peer == (KIND == BROADCAST ? args.root : me);
        bool has_it = KIND != ALL_REDUCE && is_own && args.is_same;
        if (!has_it) store_vector<WIDE>(places.targets[peer] + offset + vector * 16, rest, results[i]);
      }
    }
  });
}

template <int KIND, int DTYPE, int OP>
__device__ __forceinline__ bool direct(const Args& args, const Entry& entry) {
  __shared__ Places places;
  const u32 me = args.rank, peer = threadIdx.x;
  arrive(args, entry);
  bool is_there = true;
  if (peer < RANKS) {
    u64 source = 0, target = 0;
    is_there = header_word(args, entry, peer, HEADER_OFFSETS, &source) &&
               header_word(args, entry, peer, HEADER_OFFSETS + 1, &target);
    // SYNC: what this device did before the call is visible to peers after our header.
    fence_all();
    // What a peer wrote is held to what all agreed on.
    const u64 output = KIND == ALL_GATHER ? RANKS * args.bytes : args.bytes;
    if (is_there && (source > args.source_bytes || args.bytes > args.source_bytes - source ||
                     target > args.target_bytes || output > args.target_bytes - target)) {
      give_up(args, REASON_OUTSIDE, peer, entry.epoch, args.source_bytes, source, 0);
      is_there = false;
    }
    places.sources[peer] = args.sources[peer] + source;
    places.targets[peer] = args.targets[peer] + target;
  }
  if (!__syncthreads_and(is_there)) return false;
  bool is_wide = KIND != ALL_GATHER || args.bytes % 16 == 0;
#pragma unroll
  for (int rank = 0; rank < RANKS; rank++) {
    is_wide &= (KIND == ALL_GATHER && rank != me) || is_on(places.sources[rank], 16);
    is_wide &= is_on(places.targets[rank], 16);
  }
  f64 scalars[RANKS];
  if (!load_scalars<OP>(args, entry, scalars)) return false;
  if (is_wide) direct_shard<KIND, DTYPE, OP, true>(args, places, scalars);
  else direct_shard<KIND, DTYPE, OP, false>(args, places, scalars);
  announce(args, entry, blockIdx.x, 0, 0);
  return await(args, entry, blockIdx.x, 0, 0);
}
