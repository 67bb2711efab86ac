// Ring: every rank sends to the next only, in tiles, through scratch. The fewest bytes on each link and one peer at a time:
// the highest bandwidth, at n − 1 hops per pass.
//
// All-reduce: shard p starts at rank p + 1 and goes round to p, each rank adding its own; then the finished shards go round
// once more. The order of a sum is p + 1, p + 2, …, p, and what is handed on is rounded to the dtype each time. Bytes out of
// each rank: 2 · S · (n − 1)/n. Reduce-scatter: the first time round. Broadcast: the root's tiles go round. Reduce: partial sums go from
// the rank behind the root round to it. All-gather: everybody's tiles go round.
//
// Block b keeps a queue of its own to block b of the next rank: slots in that rank's scratch, as many as there is room for. What
// tile t sends lies in slot t mod slots. The next rank is told (stage 0) that our tile t is through, and so the slot filled; the
// previous one (stage 1), and so its slot is read.

#pragma once

#include "one_shot.cuh"
#include "copies.cuh"

template <int KIND, int DTYPE, int OP>
struct Ring {
  static constexpr u32 INPUTS = Flow<KIND>::FOLDS ? 2 : 1, OUTPUTS = 2;
  static constexpr bool IS_SPREAD = false, FOLDS = Flow<KIND>::FOLDS;
  // Tiles that go through this rank for each place in the shards, or parts: one after the other, because each comes of the one
  // before. Those of some places go round side by side, so that links and ranks have something to do meanwhile; with more slots
  // than those, nobody waits for a slot that is read later than what it wants to send was.
  static constexpr bool IS_CHAIN = KIND == BROADCAST || KIND == REDUCE;
  static constexpr u32 STEPS = KIND == ALL_REDUCE ? 2 * RANKS - 1 : IS_CHAIN ? 1 : RANKS;
  static constexpr u32 MOST_LANES = 8;

  const Args& args;
  u32 channel;
  u32 next, previous;
  u32 slots, lanes;
  u32 places;    // in the shards or parts, that this channel moves
  u32 tile;
  u64 scratch;   // our queues, in an arena
  u64 vectors;   // of a shard or part
  bool is_wide;
  f64 scalar;

  __device__ __forceinline__ Ring(const Args& args, const Entry& entry) : args(args), channel(blockIdx.x), tile(args.tile) {
    next = peer_behind(args.rank, 1);
    previous = args.rank == 0 ? RANKS - 1 : args.rank - 1;
    vectors = lines(KIND == ALL_REDUCE ? (args.bytes + RANKS - 1) / RANKS : args.bytes);
    slots = u32(SCRATCH_HALF_BYTES / (u64(workers()) * tile * 16));
    // Divisions of 64 bits take long: once.
    const u64 step = u64(workers()) * tile, first = u64(channel) * tile;
    places = first < vectors ? u32((vectors - first + step - 1) / step) : 0;
    lanes = slots / 2 < 1 ? 1 : slots / 2 < MOST_LANES ? slots / 2 : MOST_LANES;
    scratch = SCRATCH_AT + half_of(entry.epoch) * SCRATCH_HALF_BYTES + u64(channel) * slots * tile * 16;
    is_wide = is_on(args.sources[args.rank], 16) && is_on(args.targets[args.rank], 16) && args.bytes % 16 == 0;
    scalar = __longlong_as_double(args.header[HEADER_SCALAR]);
  }

  // Tile t is step `step` of place `place`.
  struct Place {
    u32 place, step;
    u32 side;  // places that go round together with it
  };
  __device__ __forceinline__ Place where(u32 t) const {
    const u32 begin = t / (lanes * STEPS) * lanes, rest = t - begin * STEPS;
    const u32 left = places - begin, side = left < lanes ? left : lanes;
    const u32 step = rest / side;
    return {begin + rest - step * side, step, side};
  }
  __device__ __forceinline__ u64 base(const Place& at) const {
    return (u64(at.place) * workers() + channel) * tile;
  }
  __device__ __forceinline__ u32 tiles() const { return places * STEPS; }
  __device__ __forceinline__ u32 count(u32 t) const {
    const u64 rest = vectors - base(where(t));
    return rest < tile ? u32(rest) : tile;
  }
  __device__ __forceinline__ bool needs_threads() const { return FOLDS || !is_wide; }

  __device__ __forceinline__ bool is_received(u32 step) const {
    return KIND == BROADCAST ? args.rank != args.root : KIND == REDUCE ? previous != args.root : step > 0;
  }
  __device__ __forceinline__ bool is_sent(u32 step) const {
    return KIND == BROADCAST ? next != args.root : KIND == REDUCE ? args.rank != args.root : step + 1 < STEPS;
  }
  __device__ __forceinline__ bool is_added(u32 step) const { return FOLDS && step < RANKS; }
  __device__ __forceinline__ bool is_folded(u32 t) const { return is_added(where(t).step); }
  // Nobody adds anything after this.
  __device__ __forceinline__ bool is_sum(u32 step) const {
    return KIND == REDUCE ? args.rank == args.root : step + 1 == RANKS;
  }
  // Whose shard or part a step is about.
  __device__ __forceinline__ u32 shard(u32 step) const {
    u32 behind = FOLDS ? step + 1 : step;
    return (args.rank + 2 * RANKS - behind) % RANKS;
  }
  // The tile of the previous rank that sent what tile t receives.
  __device__ __forceinline__ u32 sender_of(u32 t, const Place& at) const { return IS_CHAIN ? t : t - at.side; }
  // The tile of the next rank that receives what tile t sends.
  __device__ __forceinline__ u32 receiver_of(u32 t) const { return IS_CHAIN ? t : t + where(t).side; }

  __device__ __forceinline__ u8* slot(u32 rank, u32 t) const {
    return args.arenas[rank] + scratch + u64(t % slots) * tile * 16;
  }

  // Input 0 is what was received, or ours where nothing is; input 1 is ours where both are added.
  __device__ __forceinline__ u32 own_input_of(u32 step) const {
    return !is_received(step) ? 0 : is_added(step) ? 1 : NOBODY;
  }
  __device__ __forceinline__ u32 own_input(u32 t) const { return own_input_of(where(t).step); }
  __device__ __forceinline__ u32 own_output(u32) const { return 1; }

  __device__ __forceinline__ Side input(u32 t, u32 k) const {
    const Place at = where(t);
    Side side;
    if (k == own_input_of(at.step)) {
      if (KIND == REDUCE_SCATTER) return own_side(Flow<KIND>::source(args, shard(at.step)), base(at) * 16, args.bytes);
      u64 vector = KIND == ALL_REDUCE ? shard(at.step) * vectors + base(at) : base(at);
      return own_side(args.sources[args.rank], vector * 16, args.bytes);
    }
    if (k > 0 || !is_received(at.step)) return side;
    const u32 sender = sender_of(t, at);
    side.at = slot(args.rank, sender);
    side.wait = {previous, 0, sender};
    return side;
  }

  // Output 0 goes to the next rank, output 1 to the user. Both neighbours are told of every tile, and for every tile we wait until
  // the slot was read, whether something is sent in it or not: then none has to be counted.
  __device__ __forceinline__ Side output(u32 t, u32 k) const {
    const Place at = where(t);
    Side side;
    if (k == 0) {
      if (is_sent(at.step)) side.at = slot(next, t);
      // The last tiles send nothing, and so what would receive it is not there.
      if (t >= slots && receiver_of(t - slots) < tiles()) side.wait = {next, 1, receiver_of(t - slots)};
      side.tell = {next, 0, t};
      return side;
    }
    side.tell = {previous, 1, t};
    u8* target = args.targets[args.rank];
    if (FOLDS) {
      if (KIND == ALL_REDUCE ? at.step + 1 < RANKS : !is_sum(at.step)) return side;
      return to_user(side, target, KIND == ALL_REDUCE ? shard(at.step) * vectors + base(at) : base(at));
    }
    if (!is_received(at.step) && args.is_same) return side;
    return to_user(side, KIND == ALL_GATHER ? target + shard(at.step) * args.bytes : target, base(at));
  }
  __device__ __forceinline__ Side to_user(const Side& told, const u8* target, u64 vector) const {
    Side side = own_side(target, vector * 16, args.bytes);
    side.tell = told.tell;
    return side;
  }

  template <class Values>
  __device__ __forceinline__ uint4 fold(u32 t, Values values) const {
    if constexpr (FOLDS) {
      const uint4 a = values(0), b = values(1);
      u32 words[4] = {a.x, a.y, a.z, a.w}, ours[4] = {b.x, b.y, b.z, b.w};
      const u32 step = where(t).step;
      Fold<DTYPE, OP, 4> fold;
      if (!is_received(step)) {
        fold.first(words, scalar);
      } else {
        fold.partial_first(words);
        fold.next(ours, scalar);
      }
      if (is_sum(step)) fold.finish(words, RANKS);
      else fold.partial(words);
      return make_uint4(words[0], words[1], words[2], words[3]);
    } else {
      return values(0);
    }
  }
};

template <int KIND, int DTYPE, int OP>
__device__ __forceinline__ bool ring(const Args& args, const Entry& entry) {
  arrive(args, entry);
  return run(args, entry, Ring<KIND, DTYPE, OP>(args, entry));
}
