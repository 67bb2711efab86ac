// Two-shot: rank p owns shard p. Everybody pushes shard p to p, as packets or in lines; p reduces it in rank order and pushes the
// result to all. A broadcast is the same with the root's shards instead of sums; a reduce pushes sums to the root only.
//
// Bytes out of each rank: 2 · S · (n − 1)/n · 4/3 as packets, · 16/15 in lines, of a reduce half of that. Two hops. A thread follows its units through all three
// phases and waits for nobody but the senders of these units. Each stage has places of its own (units.cuh).

#pragma once

#include "one_shot.cuh"

template <int KIND, int DTYPE, int OP, template <int> class Units = PacketsOf>
__device__ __forceinline__ bool two_shot(const Args& args, const Entry& entry) {
  using U = Units<Element<DTYPE>::SIZE>;
  const u32 me = args.rank, epoch = entry.epoch;
  // What fits into an arena is counted in 32 bits.
  const u64 bytes = args.bytes;
  const u32 units = u32((bytes + U::BYTES - 1) / U::BYTES), shard = (units + RANKS - 1) / RANKS;
  const u32 slot_bytes = shard * U::STRIDE, step = u32(U::step());
  const u64 stage = U::first_stage(entry);
  const u64 second = KIND == REDUCE ? U::behind_first(entry, slot_bytes) : U::second_stage(entry, slot_bytes);
  const u8* source = args.sources[me];
  u8* target = args.targets[me];
  u8* arena = args.arenas[me];
  // Whether shard `peer` has unit i.
  auto has = [&](u32 peer, u32 i) { return (!U::IS_SHARED || i < shard) && peer * shard + i < units; };
  // 1. Push each shard to its owner.
  if (KIND != BROADCAST || me == args.root) {
    for (u32 turn = u32(U::first()); turn < shard; turn += step) {
      const u32 i = turn + U::nth();
      u32 own[U::AHEAD][U::WORDS];
      for_peers<U::AHEAD>(me, [&](u32 peer, u32 at) {
        if (has(peer, i)) U::load(source, u64(peer * shard + i) * U::BYTES, bytes, own[at]);
      }, [&](u32 peer, u32 at) {
        U::put(args.arenas[peer] + stage + U::slot(me, peer) * slot_bytes + i * U::STRIDE, own[at], epoch, has(peer, i));
      });
    }
  }
  arrive(args, entry);
  // 2. Reduce our shard, and push the result.
  f64 scalars[RANKS];
  if (!U::all(load_scalars<OP>(args, entry, scalars))) return false;
  // Lines go where peers may still take what an earlier call sent. In an all-reduce their data tells that they are through.
  if (KIND == BROADCAST && U::IS_SHARED && !hear_all<U>(args, entry)) return false;
  for (u32 turn = u32(U::first()); turn < shard; turn += step) {
    const u32 i = turn + U::nth();
    const u64 at = u64(me * shard + i) * U::BYTES;
    const bool is_ours = has(me, i);
    if (!U::any(is_ours)) break;
    auto slot = [&](u32 peer) { return arena + stage + U::slot(peer, me) * slot_bytes + i * U::STRIDE; };
    u32 own[U::WORDS], result[U::WORDS];
    if (is_ours && (KIND != BROADCAST || me == args.root)) U::load(source, at, bytes, own);
    if constexpr (KIND != BROADCAST) {
      u32 all[RANKS][U::WORDS];
      if (!take_units<U>(args, entry, all, slot, [&](int) { return is_ours; })) return false;
      place_own<U::WORDS>(all, own, me);
      reduce_units<DTYPE, OP, U::WORDS>(all, scalars, result);
    } else {
      if (me != args.root && !take_one<U>(args, entry, args.root, slot(args.root), own, is_ours)) return false;
#pragma unroll
      for (int j = 0; j < U::WORDS; j++) result[j] = own[j];
    }
#pragma unroll
    for (u32 k = 1; k < RANKS; k++) {
      const u32 peer = peer_behind(me, k);
      if (KIND == REDUCE && peer != args.root) continue;
      U::put(args.arenas[peer] + second + U::slot(me, peer) * slot_bytes + i * U::STRIDE, result, epoch, is_ours);
    }
    if (is_ours && (KIND != REDUCE || me == args.root)) U::store(target, at, bytes, result);
  }
  if (KIND == REDUCE && me != args.root) return true;
  // 3. Take the other shards.
  for (u32 turn = u32(U::first()); turn < shard; turn += step) {
    const u32 i = turn + U::nth();
    u32 all[RANKS][U::WORDS];
    auto slot = [&](u32 peer) { return arena + second + U::slot(peer, me) * slot_bytes + i * U::STRIDE; };
    if (!take_units<U>(args, entry, all, slot, [&](u32 peer) { return has(peer, i); })) return false;
#pragma unroll
    for (u32 peer = 0; peer < RANKS; peer++) {
      if (peer != me && has(peer, i)) U::store(target, u64(peer * shard + i) * U::BYTES, bytes, all[peer]);
    }
  }
  return true;
}
