// Bulk: large buffers anywhere, through scratch, as a pipeline over tiles.
//
// Rank p owns shard p; block b moves tiles b, b + blocks, … of every shard. In iteration t it does, for the tiles of these
// rounds:
//
//   1. t      push my tiles of all shards to their owners                    flag of stage 0
//   2. t − 1  reduce the tile that I own in rank order, push it to all       flag of stage 1
//   3. t − 2  copy the tiles of the other owners to the output
//
// Bytes out of each rank: 2 · S · (n − 1)/n. Flags are per block, so blocks do not wait for each other.
//
// Scratch has three buffers for each stage. A tile of round t in stage 0 overwrites round t − 3, which its owner reduced
// before it sent the results that we copied in iteration t − 1. In stage 1, round t − 1 overwrites round t − 4, which a peer
// copied in its iteration t − 2, before it set the flag of stage 0 for round t − 1 that we waited for. Halves of alternate
// epochs keep the next call apart. A broadcast takes the root's tiles instead of sums. An all-gather has stage 1 only, copies
// one round later, and so needs four buffers; it uses those of both stages.

#pragma once

#include "flags.cuh"
#include "one_shot.cuh"

struct Tiles {
  u64 bytes;    // of the part
  u64 vectors;  // of a shard
  u32 tile;     // vectors of a tile

  // The vectors [begin, end) of a shard that this block moves in round `round`.
  __device__ __forceinline__ u64 begin(u32 round) const { return (u64(round) * workers() + blockIdx.x) * tile; }
  __device__ __forceinline__ u64 end(u32 round) const {
    u64 end = begin(round) + tile;
    return end < vectors ? end : vectors;
  }
  __device__ __forceinline__ u32 rounds() const {
    u64 step = u64(workers()) * tile;
    return u32((vectors + step - 1) / step);
  }
  // Where buffer `buffer` of this block for `source` lies in scratch.
  __device__ __forceinline__ u64 at(u32 epoch, u32 buffer, u32 source) const {
    return SCRATCH_AT + half_of(epoch) * SCRATCH_HALF_BYTES + (u64(buffer) * RANKS + source) * SCRATCH_AREA_BYTES +
           u64(blockIdx.x) * tile * 16;
  }
};

__device__ __forceinline__ uint4* scratch_of(const Args& args, u32 rank, u64 at) {
  return reinterpret_cast<uint4*>(args.arenas[rank] + at);
}

template <int KIND, int DTYPE, int OP, bool WIDE>
__device__ __forceinline__ bool bulk_shards(const Args& args, const Entry& entry) {
  const u32 me = args.rank;
  Tiles tiles = {args.bytes, ((args.bytes + 15) / 16 + RANKS - 1) / RANKS, args.tile};
  const u8* source = args.sources[me];
  u8* target = args.targets[me];
  const u32 rounds = tiles.rounds();
  arrive(args, entry);
  f64 scalars[RANKS];
  if (!load_scalars<OP>(args, entry, scalars)) return false;
  auto rest = [&](u64 vector) { return vector * 16 < args.bytes ? args.bytes - vector * 16 : 0; };
  for (u32 t = 0; t < rounds + 2; t++) {
    if (t < rounds) {
      const u64 begin = tiles.begin(t), end = tiles.end(t);
      if (KIND != BROADCAST || me == args.root) {
        const u64 at = tiles.at(entry.epoch, t % 3, me);
        for_vectors<TOGETHER<WIDE, RANKS - 1>>(begin, end, threadIdx.x, blockDim.x, [&](auto count, u64 v) {
          uint4 values[decltype(count)::value][RANKS];
#pragma unroll
          for (int i = 0; i < decltype(count)::value; i++) {
#pragma unroll
            for (u32 k = 1; k < RANKS; k++) {
              u64 vector = peer_behind(me, k) * tiles.vectors + v + i * blockDim.x;
              values[i][k] = load_vector<WIDE>(source + vector * 16, rest(vector));
            }
          }
#pragma unroll
          for (int i = 0; i < decltype(count)::value; i++) {
#pragma unroll
            for (u32 k = 1; k < RANKS; k++) {
              scratch_of(args, peer_behind(me, k), at)[v - begin + i * blockDim.x] = values[i][k];
            }
          }
        });
      }
      announce(args, entry, 0, t);
    }
    if (t >= 1 && t - 1 < rounds) {
      const u32 round = t - 1;
      if (!await(args, entry, 0, round)) return false;
      const u64 begin = tiles.begin(round), end = tiles.end(round);
      const u64 at = tiles.at(entry.epoch, 3 + round % 3, me);
      for_vectors<TOGETHER<WIDE, RANKS>>(begin, end, threadIdx.x, blockDim.x, [&](auto count, u64 v) {
        constexpr int N = decltype(count)::value;
        uint4 results[N];
        if constexpr (KIND == ALL_REDUCE) {
          uint4 inputs[N][RANKS];
#pragma unroll
          for (int i = 0; i < N; i++) {
            const u64 vector = me * tiles.vectors + v + i * blockDim.x;
#pragma unroll
            for (int rank = 0; rank < RANKS; rank++) {
              const uint4* slot = scratch_of(args, me, tiles.at(entry.epoch, round % 3, rank));
              if (rank == me) inputs[i][rank] = load_vector<WIDE>(source + vector * 16, rest(vector));
              else inputs[i][rank] = slot[v - begin + i * blockDim.x];
            }
          }
#pragma unroll
          for (int i = 0; i < N; i++) results[i] = reduce_vectors<DTYPE, OP>(inputs[i], scalars);
        } else {
          const uint4* slot = scratch_of(args, me, tiles.at(entry.epoch, round % 3, args.root));
#pragma unroll
          for (int i = 0; i < N; i++) {
            const u64 vector = me * tiles.vectors + v + i * blockDim.x;
            if (me == args.root) results[i] = load_vector<WIDE>(source + vector * 16, rest(vector));
            else results[i] = slot[v - begin + i * blockDim.x];
          }
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
          const u64 vector = me * tiles.vectors + v + i * blockDim.x;
#pragma unroll
          for (u32 k = 1; k < RANKS; k++) {
            scratch_of(args, peer_behind(me, k), at)[v - begin + i * blockDim.x] = results[i];
          }
          store_vector<WIDE>(target + vector * 16, rest(vector), results[i]);
        }
      });
      announce(args, entry, 1, round);
    }
    if (t >= 2) {
      const u32 round = t - 2;
      if (!await(args, entry, 1, round)) return false;
      const u64 begin = tiles.begin(round), end = tiles.end(round);
      for_vectors<TOGETHER<WIDE, RANKS - 1>>(begin, end, threadIdx.x, blockDim.x, [&](auto count, u64 v) {
        constexpr int N = decltype(count)::value;
        uint4 values[N][RANKS];
#pragma unroll
        for (int i = 0; i < N; i++) {
#pragma unroll
          for (u32 rank = 0; rank < RANKS; rank++) {
            const uint4* slot = scratch_of(args, me, tiles.at(entry.epoch, 3 + round % 3, rank));
            if (rank != me) values[i][rank] = slot[v - begin + i * blockDim.x];
          }
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
#pragma unroll
          for (u32 rank = 0; rank < RANKS; rank++) {
            const u64 vector = rank * tiles.vectors + v + i * blockDim.x;
            if (rank != me) store_vector<WIDE>(target + vector * 16, rest(vector), values[i][rank]);
          }
        }
      });
    }
  }
  return true;
}

// All-gather: the part of every rank is its shard.
template <bool WIDE>
__device__ __forceinline__ bool bulk_gather(const Args& args, const Entry& entry) {
  const u32 me = args.rank;
  Tiles tiles = {args.bytes, (args.bytes + 15) / 16, args.tile};
  const u8* source = args.sources[me];
  u8* target = args.targets[me];
  const u32 rounds = tiles.rounds();
  arrive(args, entry);
  auto rest = [&](u64 vector) { return vector * 16 < args.bytes ? args.bytes - vector * 16 : 0; };
  for (u32 t = 0; t < rounds + 1; t++) {
    if (t < rounds) {
      const u64 begin = tiles.begin(t), end = tiles.end(t), at = tiles.at(entry.epoch, t % 4, me);
      for_vectors<TOGETHER<WIDE, 1>>(begin, end, threadIdx.x, blockDim.x, [&](auto count, u64 v) {
        constexpr int N = decltype(count)::value;
        uint4 values[N];
#pragma unroll
        for (int i = 0; i < N; i++) {
          const u64 vector = v + i * blockDim.x;
          values[i] = load_vector<WIDE>(source + vector * 16, rest(vector));
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
          const u64 vector = v + i * blockDim.x;
#pragma unroll
          for (u32 k = 1; k < RANKS; k++) scratch_of(args, peer_behind(me, k), at)[vector - begin] = values[i];
          if (!args.is_same) store_vector<WIDE>(target + me * args.bytes + vector * 16, rest(vector), values[i]);
        }
      });
      announce(args, entry, 1, t);
    }
    if (t >= 1) {
      const u32 round = t - 1;
      if (!await(args, entry, 1, round)) return false;
      const u64 begin = tiles.begin(round), end = tiles.end(round);
      for_vectors<TOGETHER<WIDE, RANKS - 1>>(begin, end, threadIdx.x, blockDim.x, [&](auto count, u64 v) {
        constexpr int N = decltype(count)::value;
        uint4 values[N][RANKS];
#pragma unroll
        for (int i = 0; i < N; i++) {
#pragma unroll
          for (u32 rank = 0; rank < RANKS; rank++) {
            const uint4* slot = scratch_of(args, me, tiles.at(entry.epoch, round % 4, rank));
            if (rank != me) values[i][rank] = slot[v - begin + i * blockDim.x];
          }
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
#pragma unroll
          for (u32 rank = 0; rank < RANKS; rank++) {
            const u64 vector = v + i * blockDim.x;
            if (rank != me) store_vector<WIDE>(target + rank * args.bytes + vector * 16, rest(vector), values[i][rank]);
          }
        }
      });
    }
  }
  return true;
}

template <int KIND, int DTYPE, int OP>
__device__ __forceinline__ bool bulk(const Args& args, const Entry& entry) {
  const u32 me = args.rank;
  if constexpr (KIND == ALL_GATHER) {
    bool is_wide = is_on(args.sources[me], 16) && is_on(args.targets[me], 16) && args.bytes % 16 == 0;
    return is_wide ? bulk_gather<true>(args, entry) : bulk_gather<false>(args, entry);
  } else {
    bool is_wide = is_on(args.sources[me], 16) && is_on(args.targets[me], 16);
    return is_wide ? bulk_shards<KIND, DTYPE, OP, true>(args, entry)
                   : bulk_shards<KIND, DTYPE, OP, false>(args, entry);
  }
}
