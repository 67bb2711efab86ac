// Bulk: large buffers anywhere, through scratch, as a pipeline over tiles.
//
// Rank p owns shard p; channel c moves tiles c, c + channels, … of every shard. A channel is three blocks, one for each step,
// so that none of them waits while another could work; in round t they
//
//   1. push our tiles of all shards to their owners                           then set PUSHED
//   2. reduce the tile that we own in rank order, and push it to all          then set REDUCED
//   3. copy the tiles of the other owners to the output                       then set COPIED
//
// Bytes out of each rank: 2 · S · (n − 1)/n. Each flag goes to the same channel of one peer. Scratch has buffers for what is
// pushed and for results, as many as there is room for: a tile is overwritten once the flag of the step that reads it came.
// Halves of alternate epochs keep the next call apart. A broadcast takes the root's tiles instead of
// sums. An all-gather has only results, and so two blocks for each channel and all buffers.

#pragma once

#include "one_shot.cuh"
#include "copies.cuh"

enum Stage { PUSHED, REDUCED, COPIED };

constexpr u32 PEERS = RANKS > 1 ? RANKS - 1 : 1;

// What the blocks of one channel move.
struct Tiles {
  const Args& args;
  u32 epoch;
  u64 bytes;    // of the part
  u64 vectors;  // of a shard
  u32 channel;
  u32 channels;
  u32 buffers;  // for each source
  u32 rounds;

  __device__ __forceinline__ Tiles(const Args& args, const Entry& entry, u64 vectors, u32 team, u32 uses)
      : args(args), epoch(entry.epoch), bytes(args.bytes), vectors(vectors) {
    channel = blockIdx.x / team;
    channels = workers() / team;
    buffers = u32(SCRATCH_HALF_BYTES / RANKS / uses / (u64(channels) * args.tile * 16));
    const u64 step = u64(channels) * args.tile, first = u64(channel) * args.tile;
    rounds = first < vectors ? u32((vectors - first + step - 1) / step) : 0;
  }

  __device__ __forceinline__ u64 begin(u32 t) const { return (u64(t) * channels + channel) * args.tile; }
  __device__ __forceinline__ u32 tiles() const { return rounds; }
  __device__ __forceinline__ u32 count(u32 t) const {
    u64 rest = vectors - begin(t);
    return rest < args.tile ? u32(rest) : args.tile;
  }

  // Where rank `at` keeps what rank `from` gives it for tile t, among the buffers of use `use`.
  __device__ __forceinline__ Side in_scratch(u32 at, u32 use, u32 t, u32 from) const {
    u64 buffer = (u64(use) * buffers + t % buffers) * RANKS + from;
    Side side;
    side.at = args.arenas[at] + SCRATCH_AT + half_of(epoch) * SCRATCH_HALF_BYTES +
              (buffer * channels + channel) * args.tile * 16;
    return side;
  }

  // Tile t of shard `shard` in a user's buffer.
  __device__ __forceinline__ Side in_buffer(const u8* base, u32 shard, u32 t) const {
    return own_side(base, (shard * vectors + begin(t)) * 16, bytes);
  }

  // What `peer` did with the tile that was in the same buffer before.
  __device__ __forceinline__ Flag before(u32 peer, u32 stage, u32 t) const {
    return t < buffers ? Flag() : Flag{peer, stage, t - buffers};
  }
};

// 1. Our tiles go to their owners.
struct Push : Tiles {
  static constexpr u32 INPUTS = PEERS, OUTPUTS = PEERS;
  static constexpr bool IS_SPREAD = true, FOLDS = false;
  bool is_wide, is_silent;

  __device__ __forceinline__ u32 tiles() const { return is_silent ? 0 : Tiles::tiles(); }
  __device__ __forceinline__ bool needs_threads() const { return !is_wide; }
  __device__ __forceinline__ Side input(u32 t, u32 k) const {
    return in_buffer(args.sources[args.rank], peer_behind(args.rank, k + 1), t);
  }
  __device__ __forceinline__ Side output(u32 t, u32 k) const {
    u32 peer = peer_behind(args.rank, k + 1);
    Side side = in_scratch(peer, 0, t, args.rank);
    if (input(t, k).at == nullptr) side.at = nullptr;
    side.wait = before(peer, REDUCED, t);
    side.tell = {peer, PUSHED, t};
    return side;
  }
};

// 2. The tiles that we own are reduced, or taken from the root, and go to all.
template <int KIND, int DTYPE, int OP>
struct Reduce : Tiles {
  static constexpr u32 INPUTS = KIND == ALL_REDUCE ? RANKS : 1, OUTPUTS = RANKS;
  static constexpr bool IS_SPREAD = false, FOLDS = KIND == ALL_REDUCE;
  bool is_wide;
  const f64* scalars;

  __device__ __forceinline__ bool needs_threads() const { return KIND == ALL_REDUCE || !is_wide; }
  __device__ __forceinline__ bool is_folded(u32) const { return KIND == ALL_REDUCE; }
  __device__ __forceinline__ u32 source(u32 k) const { return KIND == ALL_REDUCE ? k : args.root; }
  __device__ __forceinline__ u32 own_input(u32) const {
    return KIND == ALL_REDUCE ? args.rank : args.root == args.rank ? 0 : NOBODY;
  }
  __device__ __forceinline__ u32 own_output(u32) const { return args.rank; }
  __device__ __forceinline__ Side input(u32 t, u32 k) const {
    u32 rank = source(k);
    if (rank == args.rank) return in_buffer(args.sources[rank], rank, t);
    Side side = in_scratch(args.rank, 0, t, rank);
    side.wait = {rank, PUSHED, t};
    return side;
  }
  __device__ __forceinline__ Side output(u32 t, u32 k) const {
    if (k == args.rank) return in_buffer(args.targets[k], k, t);
    Side side = in_scratch(k, 1, t, args.rank);
    side.wait = before(k, COPIED, t);
    side.tell = {k, REDUCED, t};
    return side;
  }
  template <class Values>
  __device__ __forceinline__ uint4 fold(u32, Values values) const {
    if constexpr (KIND == ALL_REDUCE) return reduce_vectors<DTYPE, OP>(values, scalars);
    else return values(0);
  }
};

// 3. The tiles of the other owners go to the output. All-gather: what a rank owns is its part.
template <int KIND>
struct Copy : Tiles {
  static constexpr u32 INPUTS = PEERS, OUTPUTS = PEERS;
  static constexpr bool IS_SPREAD = true, FOLDS = false;
  bool is_wide;

  __device__ __forceinline__ bool needs_threads() const { return !is_wide; }
  __device__ __forceinline__ Side input(u32 t, u32 k) const {
    u32 owner = peer_behind(args.rank, k + 1);
    Side side = in_scratch(args.rank, KIND == ALL_GATHER ? 0 : 1, t, owner);
    side.wait = {owner, REDUCED, t};
    side.tell = {owner, COPIED, t};
    return side;
  }
  __device__ __forceinline__ Side output(u32 t, u32 k) const {
    u32 owner = peer_behind(args.rank, k + 1);
    u8* target = args.targets[args.rank];
    if constexpr (KIND == ALL_GATHER) return own_side(target + owner * bytes, begin(t) * 16, bytes);
    else return in_buffer(target, owner, t);
  }
};

// All-gather: our part goes to all.
struct Give : Tiles {
  static constexpr u32 INPUTS = 1, OUTPUTS = RANKS;
  static constexpr bool IS_SPREAD = false, FOLDS = false;
  bool is_wide;

  __device__ __forceinline__ bool needs_threads() const { return !is_wide; }
  __device__ __forceinline__ bool is_folded(u32) const { return false; }
  __device__ __forceinline__ u32 own_input(u32) const { return 0; }
  __device__ __forceinline__ u32 own_output(u32) const { return args.rank; }
  template <class Values>
  __device__ __forceinline__ uint4 fold(u32, Values values) const {
    return values(0);
  }
  __device__ __forceinline__ Side input(u32 t, u32) const { return own_side(args.sources[args.rank], begin(t) * 16, bytes); }
  __device__ __forceinline__ Side output(u32 t, u32 k) const {
    if (k == args.rank) {
      if (args.is_same) return Side();
      return own_side(args.targets[k] + k * bytes, begin(t) * 16, bytes);
    }
    Side side = in_scratch(k, 0, t, args.rank);
    side.wait = before(k, COPIED, t);
    side.tell = {k, REDUCED, t};
    return side;
  }
};

template <int KIND, int DTYPE, int OP>
__device__ __forceinline__ bool bulk(const Args& args, const Entry& entry) {
  const u32 me = args.rank;
  arrive(args, entry);
  const bool is_wide = is_on(args.sources[me], 16) && is_on(args.targets[me], 16) && args.bytes % 16 == 0;
  if constexpr (KIND == ALL_GATHER) {
    const Tiles tiles(args, entry, lines(args.bytes), 2, 1);
    if (blockIdx.x % 2 == 0) return run(args, entry, Give{tiles, is_wide});
    return run(args, entry, Copy<KIND>{tiles, is_wide});
  } else {
    const Tiles tiles(args, entry, lines((args.bytes + RANKS - 1) / RANKS), 3, 2);
    switch (blockIdx.x % 3) {
      case 0: return run(args, entry, Push{tiles, is_wide, KIND == BROADCAST && me != args.root});
      case 1: {
        f64 scalars[RANKS];
        if (!load_scalars<OP>(args, entry, scalars)) return false;
        return run(args, entry, Reduce<KIND, DTYPE, OP>{tiles, is_wide, scalars});
      }
    }
    return run(args, entry, Copy<KIND>{tiles, is_wide});
  }
}
