// Bulk: large buffers anywhere, through scratch, as a pipeline over tiles.
//
// Rank p owns shard p; channel c moves tiles c, c + channels, … of every shard. A channel is three blocks, one for each step,
// so that none of them waits while another could work; in round t they
//
//   1. push our tiles of all shards to their owners                           then set PUSHED
//   2. reduce the tile that we own in rank order, and push it to all          then set REDUCED
//   3. copy the tiles of the other owners to the output                       then set COPIED
//
// Bytes out of each rank: 2 · S · (n − 1)/n. Each flag goes to the same channel of every peer. Scratch has three buffers for
// what is pushed and three for results: a tile of round t is overwritten in round t + 3, once the flag of the step that reads it
// came from every peer. Halves of alternate epochs keep the next call apart. A broadcast takes the root's tiles instead of
// sums. An all-gather has only results, and so two blocks for each channel and all six buffers.

#pragma once

#include "flags.cuh"
#include "one_shot.cuh"

struct Tiles {
  u64 bytes;     // of the part
  u64 vectors;   // of a shard
  u32 tile;      // vectors of a tile
  u32 channel;
  u32 channels;
  u32 epoch;

  // The vectors [begin, end) of a shard that this channel moves in round `round`.
  __device__ __forceinline__ u64 begin(u32 round) const { return (u64(round) * channels + channel) * tile; }
  __device__ __forceinline__ u64 end(u32 round) const {
    u64 end = begin(round) + tile;
    return end < vectors ? end : vectors;
  }
  __device__ __forceinline__ u32 rounds() const {
    u64 step = u64(channels) * tile;
    return u32((vectors + step - 1) / step);
  }
  // What is left of the part from a vector on.
  __device__ __forceinline__ u64 rest(u64 vector) const { return vector * 16 < bytes ? bytes - vector * 16 : 0; }
  // Where buffer `buffer` of this channel for `source` lies in scratch.
  __device__ __forceinline__ u64 at(u32 buffer, u32 source) const {
    return SCRATCH_AT + half_of(epoch) * SCRATCH_HALF_BYTES + (u64(buffer) * RANKS + source) * SCRATCH_AREA_BYTES +
           u64(channel) * tile * 16;
  }
};

__device__ __forceinline__ uint4* scratch_of(const Args& args, u32 rank, u64 at) {
  return reinterpret_cast<uint4*>(args.arenas[rank] + at);
}

enum Stage { PUSHED, REDUCED, COPIED };

// 1. Push our tiles of all shards to their owners.
template <int KIND, bool WIDE>
__device__ __forceinline__ bool push_tiles(const Args& args, const Entry& entry, const Tiles& tiles) {
  const u32 me = args.rank, rounds = tiles.rounds();
  const u8* source = args.sources[me];
  for (u32 t = 0; t < rounds; t++) {
    if (t >= BUFFERS && !await(args, entry, tiles.channel, REDUCED, t - BUFFERS)) return false;
    if (KIND != BROADCAST || me == args.root) {
      const u64 begin = tiles.begin(t), end = tiles.end(t), at = tiles.at(t % BUFFERS, me);
      for_vectors<TOGETHER<WIDE, RANKS - 1>>(begin, end, threadIdx.x, blockDim.x, [&](auto count, u64 v) {
        constexpr int N = decltype(count)::value;
        uint4 values[N][RANKS];
#pragma unroll
        for (int i = 0; i < N; i++) {
#pragma unroll
          for (u32 k = 1; k < RANKS; k++) {
            u64 vector = peer_behind(me, k) * tiles.vectors + v + i * blockDim.x;
            values[i][k] = load_vector<WIDE>(source + vector * 16, tiles.rest(vector));
          }
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
#pragma unroll
          for (u32 k = 1; k < RANKS; k++) {
            scratch_of(args, peer_behind(me, k), at)[v - begin + i * blockDim.x] = values[i][k];
          }
        }
      });
    }
    announce(args, entry, tiles.channel, PUSHED, t);
  }
  return true;
}

// 2. Reduce the tiles that we own in rank order, keep them and push them to all.
template <int KIND, int DTYPE, int OP, bool WIDE>
__device__ __forceinline__ bool reduce_tiles(const Args& args, const Entry& entry, const Tiles& tiles) {
  const u32 me = args.rank, rounds = tiles.rounds();
  const u8* source = args.sources[me];
  u8* target = args.targets[me];
  f64 scalars[RANKS];
  if (!load_scalars<OP>(args, entry, scalars)) return false;
  for (u32 t = 0; t < rounds; t++) {
    if (t >= BUFFERS && !await(args, entry, tiles.channel, COPIED, t - BUFFERS)) return false;
    if (!await(args, entry, tiles.channel, PUSHED, t)) return false;
    const u64 begin = tiles.begin(t), end = tiles.end(t), at = tiles.at(BUFFERS + t % BUFFERS, me);
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
            const uint4* slot = scratch_of(args, me, tiles.at(t % BUFFERS, rank));
            if (rank == me) inputs[i][rank] = load_vector<WIDE>(source + vector * 16, tiles.rest(vector));
            else inputs[i][rank] = slot[v - begin + i * blockDim.x];
          }
        }
#pragma unroll
        for (int i = 0; i < N; i++) results[i] = reduce_vectors<DTYPE, OP>(inputs[i], scalars);
      } else {
        const uint4* slot = scratch_of(args, me, tiles.at(t % BUFFERS, args.root));
#pragma unroll
        for (int i = 0; i < N; i++) {
          const u64 vector = me * tiles.vectors + v + i * blockDim.x;
          if (me == args.root) results[i] = load_vector<WIDE>(source + vector * 16, tiles.rest(vector));
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
        store_vector<WIDE>(target + vector * 16, tiles.rest(vector), results[i]);
      }
    });
    announce(args, entry, tiles.channel, REDUCED, t);
  }
  return true;
}

// 3. Copy the tiles of the others to the output: `place(rank)` is where that of `rank` begins, in bytes.
template <bool WIDE, class Place>
__device__ __forceinline__ bool copy_tiles(const Args& args, const Entry& entry, const Tiles& tiles, Place place,
                                           u32 first_buffer, u32 buffers) {
  const u32 me = args.rank, rounds = tiles.rounds();
  for (u32 t = 0; t < rounds; t++) {
    if (!await(args, entry, tiles.channel, REDUCED, t)) return false;
    const u64 begin = tiles.begin(t), end = tiles.end(t);
    for_vectors<TOGETHER<WIDE, RANKS - 1>>(begin, end, threadIdx.x, blockDim.x, [&](auto count, u64 v) {
      constexpr int N = decltype(count)::value;
      uint4 values[N][RANKS];
#pragma unroll
      for (int i = 0; i < N; i++) {
#pragma unroll
        for (u32 rank = 0; rank < RANKS; rank++) {
          const uint4* slot = scratch_of(args, me, tiles.at(first_buffer + t % buffers, rank));
          if (rank != me) values[i][rank] = slot[v - begin + i * blockDim.x];
        }
      }
#pragma unroll
      for (int i = 0; i < N; i++) {
#pragma unroll
        for (u32 rank = 0; rank < RANKS; rank++) {
          u64 rest, at = place(rank, v + i * blockDim.x, &rest);
          if (rank != me) store_vector<WIDE>(args.targets[me] + at, rest, values[i][rank]);
        }
      }
    });
    announce(args, entry, tiles.channel, COPIED, t);
  }
  return true;
}

template <int KIND, int DTYPE, int OP, bool WIDE>
__device__ __forceinline__ bool bulk_shards(const Args& args, const Entry& entry) {
  const u64 shard = ((args.bytes + 15) / 16 + RANKS - 1) / RANKS;
  const Tiles tiles = {args.bytes, shard, args.tile, blockIdx.x / 3, workers() / 3, entry.epoch};
  switch (blockIdx.x % 3) {
    case 0: return push_tiles<KIND, WIDE>(args, entry, tiles);
    case 1: return reduce_tiles<KIND, DTYPE, OP, WIDE>(args, entry, tiles);
  }
  auto place = [&](u32 rank, u64 v, u64* rest) {
    const u64 vector = rank * tiles.vectors + v;
    *rest = tiles.rest(vector);
    return vector * 16;
  };
  return copy_tiles<WIDE>(args, entry, tiles, place, BUFFERS, BUFFERS);
}

// All-gather: the part of every rank is its shard, and is what it "reduced".
template <bool WIDE>
__device__ __forceinline__ bool bulk_gather(const Args& args, const Entry& entry) {
  const u32 me = args.rank;
  const Tiles tiles = {args.bytes, (args.bytes + 15) / 16, args.tile, blockIdx.x / 2, workers() / 2, entry.epoch};
  if (blockIdx.x % 2 == 1) {
    auto place = [&](u32 rank, u64 v, u64* rest) {
      *rest = tiles.rest(v);
      return rank * tiles.bytes + v * 16;
    };
    return copy_tiles<WIDE>(args, entry, tiles, place, 0, 2 * BUFFERS);
  }
  const u8* source = args.sources[me];
  u8* target = args.targets[me];
  const u32 rounds = tiles.rounds();
  for (u32 t = 0; t < rounds; t++) {
    if (t >= 2 * BUFFERS && !await(args, entry, tiles.channel, COPIED, t - 2 * BUFFERS)) return false;
    const u64 begin = tiles.begin(t), end = tiles.end(t), at = tiles.at(t % (2 * BUFFERS), me);
    for_vectors<TOGETHER<WIDE, 1>>(begin, end, threadIdx.x, blockDim.x, [&](auto count, u64 v) {
      constexpr int N = decltype(count)::value;
      uint4 values[N];
#pragma unroll
      for (int i = 0; i < N; i++) {
        const u64 vector = v + i * blockDim.x;
        values[i] = load_vector<WIDE>(source + vector * 16, tiles.rest(vector));
      }
#pragma unroll
      for (int i = 0; i < N; i++) {
        const u64 vector = v + i * blockDim.x;
#pragma unroll
        for (u32 k = 1; k < RANKS; k++) scratch_of(args, peer_behind(me, k), at)[vector - begin] = values[i];
        if (!args.is_same) store_vector<WIDE>(target + me * args.bytes + vector * 16, tiles.rest(vector), values[i]);
      }
    });
    announce(args, entry, tiles.channel, REDUCED, t);
  }
  return true;
}

template <int KIND, int DTYPE, int OP>
__device__ __forceinline__ bool bulk(const Args& args, const Entry& entry) {
  const u32 me = args.rank;
  arrive(args, entry);
  if constexpr (KIND == ALL_GATHER) {
    bool is_wide = is_on(args.sources[me], 16) && is_on(args.targets[me], 16) && args.bytes % 16 == 0;
    return is_wide ? bulk_gather<true>(args, entry) : bulk_gather<false>(args, entry);
  } else {
    bool is_wide = is_on(args.sources[me], 16) && is_on(args.targets[me], 16);
    return is_wide ? bulk_shards<KIND, DTYPE, OP, true>(args, entry)
                   : bulk_shards<KIND, DTYPE, OP, false>(args, entry);
  }
}
