// One-shot: everybody pushes what a peer is to have to that peer, as packets or in lines; every rank reduces, or gathers, for itself.
//
// Bytes out of each rank: (n − 1) · S · 4/3 as packets, (n − 1) · S · 16/15 in lines, S being the message, or a part where each peer gets
// another. One hop. A thread pushes its units, then waits for the same units of the peers; slot (source, unit) belongs to that source
// alone. Where parts have sizes of their own, slots are as long as the largest, and what is behind the end of a part is neither sent nor
// waited for.

#pragma once

#include "flow.cuh"
#include "units.cuh"

// The scalars of all ranks, for kernels that need them.
template <int OP>
__device__ __forceinline__ bool load_scalars(const Args& args, const Entry& entry, f64 (&scalars)[RANKS]) {
  if constexpr (OP == PREMUL_SUM) {
#pragma unroll
    for (int rank = 0; rank < RANKS; rank++) {
      u64 bits;
      if (!header_word(args, entry, rank, HEADER_SCALAR, &bits)) return false;
      scalars[rank] = __longlong_as_double(bits);
    }
  }
  return true;
}

// Reduces units of all ranks, ours among them, in rank order.
template <int DTYPE, int OP, int WORDS>
__device__ __forceinline__ void reduce_units(const u32 (&units)[RANKS][WORDS], const f64* scalars, u32* result) {
  Fold<DTYPE, OP, WORDS> fold;
#pragma unroll
  for (int rank = 0; rank < RANKS; rank++) {
    f64 scalar = OP == PREMUL_SUM ? scalars[rank] : 0;
    if (rank == 0) fold.first(units[rank], scalar);
    else fold.next(units[rank], scalar);
  }
  fold.finish(result, RANKS);
}

// Puts our own unit among those of the others, without indexing registers at run time.
template <int WORDS>
__device__ __forceinline__ void place_own(u32 (&units)[RANKS][WORDS], const u32* own, u32 me) {
#pragma unroll
  for (int rank = 0; rank < RANKS; rank++) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) units[rank][i] = rank == me ? own[i] : units[rank][i];
  }
}

template <int KIND, int DTYPE, int OP, template <int> class Units = PacketsOf>
__device__ __forceinline__ bool one_shot(const Args& args, const Entry& entry) {
  using U = Units<Element<DTYPE>::SIZE>;
  using F = Flow<KIND>;
  const u32 me = args.rank, epoch = entry.epoch;
  const u64 bytes = args.bytes, units = (bytes + U::BYTES - 1) / U::BYTES;
  const u64 slot_bytes = units * U::STRIDE, stage = U::first_stage(entry);
  // 1. Push.
  for (u64 turn = U::first(); turn < units; turn += U::step()) {
    const u64 i = turn + U::nth(), from = i * U::BYTES;
    const bool is_unit = !U::IS_SHARED || i < units;
    u32 own[F::HAS_PARTS_IN ? U::AHEAD : 1][U::WORDS];
    auto gives = [&](u32 to) { return is_unit && F::reaches(args, me, to, from); };
    if (!F::HAS_PARTS_IN && (!F::IS_FROM_ROOT || me == args.root)) {
      if (!U::any(gives(me))) break;
      if (gives(me)) U::load(F::source(args, me), from, F::bytes(args, me, me), own[0]);
    }
    for_peers<U::AHEAD>(me, [&](u32 peer, u32 at) {
      if (!F::HAS_PARTS_IN || !F::flows(args, me, peer) || !gives(peer)) return;
      U::load(F::source(args, peer), from, F::bytes(args, me, peer), own[at]);
    }, [&](u32 peer, u32 at) {
      if (!F::flows(args, me, peer)) return;
      u8* to = args.arenas[peer] + stage + U::slot(me, peer) * slot_bytes + i * U::STRIDE;
      U::put(to, own[F::HAS_PARTS_IN ? at : 0], epoch, gives(F::HAS_PARTS_IN ? peer : me));
    });
  }
  arrive(args, entry);
  // 2. Receive.
  const u8* arena = args.arenas[me] + stage;
  f64 scalars[RANKS];
  if (!U::all(load_scalars<OP>(args, entry, scalars))) return false;
  if (F::IS_TO_ROOT && me != args.root) return true;
  for (u64 turn = U::first(); turn < units; turn += U::step()) {
    const u64 i = turn + U::nth(), at = i * U::BYTES;
    const bool is_unit = !U::IS_SHARED || i < units;
    auto slot = [&](u32 peer) { return arena + U::slot(peer, me) * slot_bytes + i * U::STRIDE; };
    u32 own[U::WORDS];
    if constexpr (F::IS_FROM_ROOT) {
      if (me == args.root) {
        if (args.is_same) break;
        if (is_unit) U::load(F::source(args, me), at, bytes, own);
      } else if (!take_one<U>(args, entry, args.root, slot(args.root), own, is_unit)) {
        return false;
      }
      if (is_unit) U::store(F::target(args, me), at, bytes, own);
    } else {
      u32 all[RANKS][U::WORDS];
      auto is_due = [&](u32 from) { return is_unit && F::reaches(args, from, me, at); };
      if (F::FOLDS && !U::any(is_due(me))) break;
      if (is_due(me)) U::load(F::source(args, me), at, F::bytes(args, me, me), own);
      if (!take_units<U>(args, entry, all, slot, is_due)) return false;
      if constexpr (F::FOLDS) {
        u32 result[U::WORDS];
        place_own<U::WORDS>(all, own, me);
        reduce_units<DTYPE, OP, U::WORDS>(all, scalars, result);
        if (is_due(me)) U::store(F::target(args, me), at, F::bytes(args, me, me), result);
      } else {
#pragma unroll
        for (int rank = 0; rank < RANKS; rank++) {
          if (!is_due(rank)) continue;
          if (rank != me) U::store(F::target(args, rank), at, F::bytes(args, rank, me), all[rank]);
          else if (!args.is_same) U::store(F::target(args, rank), at, F::bytes(args, rank, me), own);
        }
      }
    }
  }
  return true;
}
