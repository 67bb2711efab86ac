// Bulk: large buffers anywhere, through scratch, as a pipeline over tiles.
//
// All-reduce: rank p owns shard p; channel c moves tiles c, c + channels, … of every shard. A channel is three blocks, one for each
// step, so that none of them waits while another could work; in round t they
//
//   1. push our tiles of all shards to their owners                           then set PUSHED
//   2. reduce the tile that we own in rank order, and push it to all          then set REDUCED
//   3. copy the tiles of the other owners to the output                       then set COPIED
//
// Bytes out of each rank: 2 · S · (n − 1)/n. Each flag goes to the same channel of one peer. Scratch has buffers for what is
// pushed and for results, as many as there is room for: a tile is overwritten once the flag of the step that reads it came.
// Halves of alternate epochs keep the next call apart. A broadcast takes the root's tiles instead of sums; a reduce pushes sums
// to the root only. A reduce-scatter ends with step 2, which keeps the sums. What only moves parts has steps 1 and 3: so
// two blocks for each channel and all buffers. Parts may have sizes of their own: then each pair of ranks moves, and tells of, the
// tiles that its part has.
//
// Where another part goes to each rank, channels are dealt to as many lanes as there are ranks: in lane l, ranks a and b with
// a + b = l (modulo the ranks) give each other their parts, and who is alone in it keeps its own. So all that a block has under way goes to
// one rank, and whoever is slow delays nobody else.

#pragma once

#include "one_shot.cuh"
#include "copies.cuh"

enum Stage { PUSHED, REDUCED, COPIED };

constexpr u32 PEERS = RANKS > 1 ? RANKS - 1 : 1;

// What the blocks of one channel move.
struct Tiles {
  const Args& args;
  u32 epoch;
  u64 bytes;    // of the message
  u64 vectors;  // of a shard or part
  u32 channel;
  u32 channels;
  u32 turn, turns;  // ours, of those channels that share the tiles
  u32 sources;      // that have buffers of their own in our channel
  u32 buffers;      // for each source
  u32 rounds;

  __device__ __forceinline__ Tiles(const Args& args, const Entry& entry, u64 vectors, u32 team, u32 uses, u32 lanes = 1)
      : args(args), epoch(entry.epoch), bytes(args.bytes), vectors(vectors) {
    channel = blockIdx.x / team;
    channels = workers() / team;
    turn = channel / lanes;
    turns = channels < lanes ? 1 : channels / lanes;
    sources = lanes == 1 || channels < lanes ? RANKS : 1;
    buffers = u32(SCRATCH_HALF_BYTES / sources / uses / (u64(channels) * args.tile * 16));
    const u64 step = u64(turns) * args.tile, first = u64(turn) * args.tile;
    rounds = turn < turns && first < vectors ? u32((vectors - first + step - 1) / step) : 0;
  }

  __device__ __forceinline__ u64 begin(u32 t) const { return (u64(t) * turns + turn) * args.tile; }
  __device__ __forceinline__ u32 tiles() const { return rounds; }
  __device__ __forceinline__ u32 count(u32 t) const {
    u64 rest = vectors - begin(t);
    return rest < args.tile ? u32(rest) : args.tile;
  }

  // Where rank `at` keeps what rank `from` gives it for tile t, among the buffers of use `use`.
  __device__ __forceinline__ Side in_scratch(u32 at, u32 use, u32 t, u32 from) const {
    u64 buffer = (u64(use) * buffers + t % buffers) * sources + from % sources;
    Side side;
    side.at = args.arenas[at] + SCRATCH_AT + half_of(epoch) * SCRATCH_HALF_BYTES +
              (buffer * channels + channel) * args.tile * 16;
    return side;
  }

  // Tile t of the part that rank `to` is given in our input, and of the one that `from` gives in our output.
  template <int KIND>
  __device__ __forceinline__ Side in_source(u32 to, u32 t) const {
    return own_side(Flow<KIND>::source(args, to), begin(t) * 16, Flow<KIND>::bytes(args, args.rank, to));
  }
  template <int KIND>
  __device__ __forceinline__ Side in_target(u32 from, u32 t) const {
    return own_side(Flow<KIND>::target(args, from), begin(t) * 16, Flow<KIND>::bytes(args, from, args.rank));
  }

  // Whether what `from` gives `to` has a tile t. Where it has none, nobody waits for it and nobody tells of it.
  template <int KIND>
  __device__ __forceinline__ bool has_tile(u32 from, u32 to, u32 t) const {
    return Flow<KIND>::reaches(args, from, to, begin(t) * 16);
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
template <int KIND>
struct Push : Tiles {
  static constexpr u32 INPUTS = PEERS, OUTPUTS = PEERS;
  static constexpr bool IS_SPREAD = true, FOLDS = false;
  bool is_wide;

  __device__ __forceinline__ u32 tiles() const { return KIND == BROADCAST && args.rank != args.root ? 0 : Tiles::tiles(); }
  __device__ __forceinline__ bool needs_threads() const { return !is_wide; }
  __device__ __forceinline__ Side input(u32 t, u32 k) const {
    const u32 peer = peer_behind(args.rank, k + 1);
    if constexpr (Flow<KIND>::FOLDS_PARTS) return in_source<KIND>(peer, t);
    else return in_buffer(args.sources[args.rank], peer, t);
  }
  __device__ __forceinline__ Side output(u32 t, u32 k) const {
    const u32 peer = peer_behind(args.rank, k + 1);
    if (!has_tile<KIND>(args.rank, peer, t)) return Side();
    Side side = in_scratch(peer, 0, t, args.rank);
    if (input(t, k).at == nullptr) side.at = nullptr;
    side.wait = before(peer, REDUCED, t);
    side.tell = {peer, PUSHED, t};
    return side;
  }
};

// 2. The tiles that we own are reduced, or taken from the root, and go to who is to have them.
template <int KIND, int DTYPE, int OP>
struct Reduce : Tiles {
  static constexpr bool FOLDS = Flow<KIND>::FOLDS;
  static constexpr u32 INPUTS = FOLDS ? RANKS : 1, OUTPUTS = RANKS;
  static constexpr bool IS_SPREAD = false;
  bool is_wide;
  const f64* scalars;

  __device__ __forceinline__ bool needs_threads() const { return FOLDS || !is_wide; }
  __device__ __forceinline__ bool is_folded(u32) const { return FOLDS; }
  __device__ __forceinline__ u32 source(u32 k) const { return FOLDS ? k : args.root; }
  __device__ __forceinline__ u32 own_input(u32) const {
    return FOLDS ? args.rank : args.root == args.rank ? 0 : NOBODY;
  }
  __device__ __forceinline__ u32 own_output(u32) const { return args.rank; }
  __device__ __forceinline__ Side input(u32 t, u32 k) const {
    const u32 rank = source(k);
    if (rank == args.rank) {
      if constexpr (Flow<KIND>::FOLDS_PARTS) return in_source<KIND>(rank, t);
      else return in_buffer(args.sources[rank], rank, t);
    }
    Side side = in_scratch(args.rank, 0, t, rank);
    side.wait = {rank, PUSHED, t};
    return side;
  }
  __device__ __forceinline__ Side output(u32 t, u32 k) const {
    Side side;
    if (k == args.rank) {
      if constexpr (Flow<KIND>::FOLDS_PARTS) return in_target<KIND>(k, t);
      return KIND == REDUCE && k != args.root ? side : in_buffer(args.targets[k], k, t);
    }
    if (!Flow<KIND>::FOLDS_PARTS && (KIND != REDUCE || k == args.root)) {
      side = in_scratch(k, 1, t, args.rank);
      side.wait = before(k, COPIED, t);
    }
    // It may push into this buffer again, too.
    side.tell = {k, REDUCED, t};
    return side;
  }
  template <class Values>
  __device__ __forceinline__ uint4 fold(u32, Values values) const {
    if constexpr (FOLDS) return reduce_vectors<DTYPE, OP>(values, scalars);
    else return values(0);
  }
};

// 3. The tiles of the other owners go to the output.
template <int KIND>
struct Copy : Tiles {
  static constexpr u32 INPUTS = PEERS, OUTPUTS = PEERS;
  static constexpr bool IS_SPREAD = true, FOLDS = false;
  bool is_wide;

  __device__ __forceinline__ u32 tiles() const { return KIND == REDUCE && args.rank != args.root ? 0 : Tiles::tiles(); }
  __device__ __forceinline__ bool needs_threads() const { return !is_wide; }
  __device__ __forceinline__ Side input(u32 t, u32 k) const {
    const u32 owner = peer_behind(args.rank, k + 1);
    Side side = in_scratch(args.rank, 1, t, owner);
    side.wait = {owner, REDUCED, t};
    side.tell = {owner, COPIED, t};
    return side;
  }
  __device__ __forceinline__ Side output(u32 t, u32 k) const {
    return in_buffer(args.targets[args.rank], peer_behind(args.rank, k + 1), t);
  }
};

// Parts that are only moved: ours goes to all that are to have it, which is one part loaded once,
template <int KIND>
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
  __device__ __forceinline__ Side input(u32 t, u32) const { return in_source<KIND>(args.rank, t); }
  __device__ __forceinline__ Side output(u32 t, u32 k) const {
    Side side;
    if (!Flow<KIND>::flows(args, args.rank, k)) return side;
    if (k == args.rank) return args.is_same ? side : in_target<KIND>(k, t);
    side = in_scratch(k, 0, t, args.rank);
    side.wait = before(k, COPIED, t);
    side.tell = {k, PUSHED, t};
    return side;
  }
};

// or another part goes to each: this block's goes to `peer`.
template <int KIND>
struct Send : Tiles {
  static constexpr u32 INPUTS = 1, OUTPUTS = 1;
  static constexpr bool IS_SPREAD = true, FOLDS = false;
  bool is_wide;
  u32 peer;
  u32 done;  // tiles of our earlier lanes

  __device__ __forceinline__ u32 tiles() const {
    const bool is_there = peer == args.rank && args.is_same;
    return is_there || (KIND == SCATTER && args.rank != args.root) ? 0 : Tiles::tiles();
  }
  __device__ __forceinline__ bool needs_threads() const { return !is_wide; }
  __device__ __forceinline__ Side input(u32 t, u32) const {
    Side side = in_source<KIND>(peer, t);
    // Whoever receives into the same buffer waits until we have read it.
    if (KIND == ALL_TO_ALL && args.is_same) side.tell = {args.rank, PUSHED, done + t};
    return side;
  }
  __device__ __forceinline__ Side output(u32 t, u32) const {
    if (peer == args.rank) return in_target<KIND>(peer, t);
    Side side = in_scratch(peer, 0, t, args.rank);
    side.wait = before(peer, COPIED, t);
    side.tell = {peer, PUSHED, t};
    return side;
  }
};

// What comes from `peer` goes to the output.
template <int KIND>
struct Receive : Tiles {
  static constexpr u32 INPUTS = 1, OUTPUTS = 1;
  static constexpr bool IS_SPREAD = true, FOLDS = false;
  bool is_wide;
  u32 peer;
  u32 done;

  __device__ __forceinline__ u32 tiles() const {
    return peer == args.rank || (KIND == SCATTER && peer != args.root) ? 0 : Tiles::tiles();
  }
  __device__ __forceinline__ bool needs_threads() const { return !is_wide; }
  __device__ __forceinline__ Side input(u32 t, u32) const {
    Side side = in_scratch(args.rank, 0, t, peer);
    side.wait = {peer, PUSHED, t};
    side.tell = {peer, COPIED, t};
    return side;
  }
  __device__ __forceinline__ Side output(u32 t, u32) const {
    Side side = in_target<KIND>(peer, t);
    if (KIND == ALL_TO_ALL && args.is_same) side.wait = {args.rank, PUSHED, done + t};
    return side;
  }
};

// Where everybody gives one part, what comes of the others goes to the output.
template <int KIND>
struct Take : Tiles {
  static constexpr u32 INPUTS = PEERS, OUTPUTS = PEERS;
  static constexpr bool IS_SPREAD = true, FOLDS = false;
  bool is_wide;

  __device__ __forceinline__ u32 tiles() const {
    return KIND == GATHER && args.rank != args.root ? 0 : Tiles::tiles();
  }
  __device__ __forceinline__ bool needs_threads() const { return !is_wide; }
  __device__ __forceinline__ Side input(u32 t, u32 k) const {
    const u32 from = peer_behind(args.rank, k + 1);
    Side side;
    if (!Flow<KIND>::flows(args, from, args.rank) || !has_tile<KIND>(from, args.rank, t)) return side;
    side = in_scratch(args.rank, 0, t, from);
    side.wait = {from, PUSHED, t};
    side.tell = {from, COPIED, t};
    return side;
  }
  __device__ __forceinline__ Side output(u32 t, u32 k) const {
    const u32 from = peer_behind(args.rank, k + 1);
    Side side;
    if (!Flow<KIND>::flows(args, from, args.rank)) return side;
    return in_target<KIND>(from, t);
  }
};

// All threads of a block: its lanes, one after the other where there are more than channels. All ranks take them in the same order. Each lane
// has flags of its own for its peer; those that a rank sets for itself count on from lane to lane.
template <int KIND>
__device__ __forceinline__ bool run_lanes(const Args& args, const Entry& entry, const Tiles& tiles, bool is_wide) {
  u32 done = 0;
  for (u32 lane = tiles.channel % RANKS; lane < RANKS; lane += tiles.channels) {
    const u32 peer = (lane + RANKS - args.rank) % RANKS;
    const bool went = blockIdx.x % 2 == 1 ? run(args, entry, Receive<KIND>{tiles, is_wide, peer, done})
                                          : run(args, entry, Send<KIND>{tiles, is_wide, peer, done});
    if (!went) return false;
    if (peer != args.rank) done += tiles.rounds;
  }
  return true;
}

template <int KIND, int DTYPE, int OP>
__device__ __forceinline__ bool bulk(const Args& args, const Entry& entry) {
  using F = Flow<KIND>;
  const u32 me = args.rank;
  arrive(args, entry);
  const bool is_wide = F::is_wide(args);
  constexpr bool HAS_PARTS = F::HAS_PARTS_IN || F::HAS_PARTS_OUT;
  const u64 vectors = lines(HAS_PARTS ? args.bytes : (args.bytes + RANKS - 1) / RANKS);
  // Of what is ours alone. Tiles lie in the same places whatever is counted.
  const u64 own = F::IS_UNEVEN ? lines(F::bytes(args, me, me)) : vectors;
  if constexpr (F::HAS_PARTS_IN && !F::FOLDS) {
    return run_lanes<KIND>(args, entry, Tiles(args, entry, vectors, 2, 1, RANKS), is_wide);
  } else if constexpr (HAS_PARTS && !F::FOLDS) {
    const Tiles tiles(args, entry, blockIdx.x % 2 == 1 ? vectors : own, 2, 1);
    if (blockIdx.x % 2 == 1) return run(args, entry, Take<KIND>{tiles, is_wide});
    return run(args, entry, Give<KIND>{tiles, is_wide});
  } else {
    constexpr u32 STEPS = F::FOLDS_PARTS ? 2 : 3;
    const Tiles tiles(args, entry, F::IS_UNEVEN && blockIdx.x % STEPS == 1 ? own : vectors, STEPS, STEPS - 1);
    switch (blockIdx.x % STEPS) {
      case 0: return run(args, entry, Push<KIND>{tiles, is_wide});
      case 1: {
        f64 scalars[RANKS];
        if (!load_scalars<OP>(args, entry, scalars)) return false;
        return run(args, entry, Reduce<KIND, DTYPE, OP>{tiles, is_wide, scalars});
      }
    }
    if constexpr (!F::FOLDS_PARTS) return run(args, entry, Copy<KIND>{tiles, is_wide});
    return true;
  }
}
