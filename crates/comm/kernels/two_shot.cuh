// Two-shot: rank p owns shard p. Everybody pushes shard p to p as packets; p reduces it in rank order and pushes the
// result to all. A broadcast is the same with the root's shards instead of sums.
//
// Bytes out of each rank: 2 · S · (n − 1)/n · 4/3. Two hops. A thread follows its units through all three phases and waits
// for nobody but the senders of these units. The first stage uses the first part of the half, the second the rest.

#pragma once

#include "one_shot.cuh"

template <int KIND, int DTYPE, int OP>
__device__ __forceinline__ bool two_shot(const Args& args, const Entry& entry) {
  using U = UnitOf<Element<DTYPE>::SIZE>;
  constexpr u32 UNIT_STRIDE = U::PACKETS * PACKET_BYTES;
  const u32 me = args.rank, epoch = entry.epoch;
  const u64 bytes = args.bytes, units = (bytes + U::BYTES - 1) / U::BYTES, shard = (units + RANKS - 1) / RANKS;
  const u64 slot_bytes = shard * UNIT_STRIDE, half = PACKETS_AT + half_of(epoch) * HALF_BYTES;
  const u64 second = half + RANKS * slot_bytes;
  const u64 step = u64(workers()) * blockDim.x, first = u64(blockIdx.x) * blockDim.x + threadIdx.x;
  const u8* source = args.sources[me];
  u8* target = args.targets[me];
  u8* arena = args.arenas[me];
  // 1. Push each shard to its owner.
  if (KIND != BROADCAST || me == args.root) {
    for (u64 i = first; i < shard; i += step) {
#pragma unroll
      for (u32 k = 1; k < RANKS; k++) {
        u32 peer = peer_behind(me, k);
        u64 unit = peer * shard + i;
        if (unit >= units) continue;
        u32 own[U::WORDS];
        load_words<U::WORDS>(source + unit * U::BYTES, bytes - unit * U::BYTES, own);
        put_unit<U::PACKETS>(args.arenas[peer] + half + me * slot_bytes + i * UNIT_STRIDE, own, epoch);
      }
    }
  }
  arrive(args, entry);
  // 2. Reduce our shard, and push the result.
  f64 scalars[RANKS];
  if (!load_scalars<OP>(args, entry, scalars)) return false;
  for (u64 i = first; i < shard; i += step) {
    const u64 unit = me * shard + i, at = unit * U::BYTES;
    if (unit >= units) break;
    u32 own[U::WORDS], result[U::WORDS];
    if (KIND != BROADCAST || me == args.root) load_words<U::WORDS>(source + at, bytes - at, own);
    if constexpr (KIND == ALL_REDUCE) {
      u32 all[RANKS][U::WORDS];
      auto slot = [&](int peer) { return arena + half + peer * slot_bytes + i * UNIT_STRIDE; };
      if (!take_units<U::PACKETS>(args, entry, all, slot)) return false;
      place_own<U::WORDS>(all, own, me);
      reduce_units<DTYPE, OP, U::WORDS>(all, scalars, result);
    } else {
      const u8* slot = arena + half + args.root * slot_bytes + i * UNIT_STRIDE;
      if (me != args.root && !take_one<U::PACKETS>(args, entry, args.root, slot, own)) return false;
#pragma unroll
      for (int j = 0; j < U::WORDS; j++) result[j] = own[j];
    }
#pragma unroll
    for (u32 k = 1; k < RANKS; k++) {
      u32 peer = peer_behind(me, k);
      put_unit<U::PACKETS>(args.arenas[peer] + second + me * slot_bytes + i * UNIT_STRIDE, result, epoch);
    }
    store_words<U::WORDS>(target + at, bytes - at, result);
  }
  // 3. Take the other shards.
  for (u64 i = first; i < shard; i += step) {
    u32 all[RANKS][U::WORDS], spins = 0, missing;
    do {
      missing = 0;
#pragma unroll
      for (int peer = 0; peer < RANKS; peer++) {
        bool is_due = peer != me && peer * shard + i < units;
        const u8* slot = arena + second + peer * slot_bytes + i * UNIT_STRIDE;
        if (is_due && !take_unit<U::PACKETS>(slot, all[peer], epoch)) missing |= 1u << peer;
      }
      if (missing != 0 && (++spins & 63) == 0 && must_leave(args, entry, spins, __ffs(missing) - 1, 0)) return false;
    } while (missing != 0);
    end_wait(args, spins);
#pragma unroll
    for (int peer = 0; peer < RANKS; peer++) {
      const u64 unit = peer * shard + i, at = unit * U::BYTES;
      if (peer != me && unit < units) store_words<U::WORDS>(target + at, bytes - at, all[peer]);
    }
  }
  return true;
}
