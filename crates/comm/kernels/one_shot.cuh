// One-shot: everybody pushes what a peer is to have to that peer as packets; every rank reduces, or gathers, for itself.
//
// Bytes out of each rank: (n − 1) · S · 4/3, S being the message, or a part where each peer gets another. One hop. A thread pushes its units, then waits for the same units of the
// peers; slot (source, unit) of the half of this epoch belongs to that source alone.

#pragma once

#include "buffers.cuh"
#include "flow.cuh"

template <int PACKETS>
__device__ __forceinline__ void put_unit(u8* at, const u32* words, u32 epoch) {
#pragma unroll
  for (int i = 0; i < PACKETS; i++) put_packet(at + i * PACKET_BYTES, words + 3 * i, epoch);
}

template <int PACKETS>
__device__ __forceinline__ bool take_unit(const u8* at, u32* words, u32 epoch) {
  bool is_there = true;
#pragma unroll
  for (int i = 0; i < PACKETS; i++) is_there &= take_packet(at + i * PACKET_BYTES, words + 3 * i, epoch);
  return is_there;
}

// Polls a unit of every peer at once until all are there: their latencies overlap. `slot(peer)` is where it lies.
template <int PACKETS, class Slot>
__device__ __forceinline__ bool take_units(const Args& args, const Entry& entry, u32 (&units)[RANKS][3 * PACKETS],
                                           Slot slot) {
  u32 spins = 0;
  while (true) {
    u32 missing = 0;
#pragma unroll
    for (int peer = 0; peer < RANKS; peer++) {
      if (peer != args.rank && !take_unit<PACKETS>(slot(peer), units[peer], entry.epoch)) missing |= 1u << peer;
    }
    if (missing == 0) {
      end_wait(args, spins);
      return true;
    }
    if ((++spins & 63) == 0 && must_leave(args, entry, spins, __ffs(missing) - 1, 0)) return false;
  }
}

template <int PACKETS>
__device__ __forceinline__ bool take_one(const Args& args, const Entry& entry, u32 peer, const u8* at, u32* words) {
  return wait_until(args, entry, peer, [&] { return take_unit<PACKETS>(at, words, entry.epoch); });
}

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

template <int KIND, int DTYPE, int OP>
__device__ __forceinline__ bool one_shot(const Args& args, const Entry& entry) {
  using U = UnitOf<Element<DTYPE>::SIZE>;
  using F = Flow<KIND>;
  constexpr u32 UNIT_STRIDE = U::PACKETS * PACKET_BYTES;
  const u32 me = args.rank, epoch = entry.epoch;
  const u64 bytes = args.bytes, units = (bytes + U::BYTES - 1) / U::BYTES;
  const u64 slot_bytes = units * UNIT_STRIDE, half = PACKETS_AT + half_of(epoch) * HALF_BYTES;
  const u64 step = u64(workers()) * blockDim.x, first = u64(blockIdx.x) * blockDim.x + threadIdx.x;
  // 1. Push.
  for (u64 i = first; i < units; i += step) {
    const u64 at = half + me * slot_bytes + i * UNIT_STRIDE;
    u32 own[U::WORDS];
    if (!F::HAS_PARTS_IN && (!F::IS_FROM_ROOT || me == args.root)) {
      load_words<U::WORDS>(F::source(args, me) + i * U::BYTES, bytes - i * U::BYTES, own);
    }
#pragma unroll
    for (u32 k = 1; k < RANKS; k++) {
      const u32 peer = peer_behind(me, k);
      if (!F::flows(args, me, peer)) continue;
      if (F::HAS_PARTS_IN) load_words<U::WORDS>(F::source(args, peer) + i * U::BYTES, bytes - i * U::BYTES, own);
      put_unit<U::PACKETS>(args.arenas[peer] + at, own, epoch);
    }
  }
  arrive(args, entry);
  // 2. Receive.
  const u8* arena = args.arenas[me] + half;
  f64 scalars[RANKS];
  if (!load_scalars<OP>(args, entry, scalars)) return false;
  if (F::IS_TO_ROOT && me != args.root) return true;
  for (u64 i = first; i < units; i += step) {
    const u64 at = i * U::BYTES, rest = bytes - at;
    u32 own[U::WORDS];
    if constexpr (F::IS_FROM_ROOT) {
      if (me == args.root) {
        if (args.is_same) break;
        load_words<U::WORDS>(F::source(args, me) + at, rest, own);
      } else if (!take_one<U::PACKETS>(args, entry, args.root, arena + args.root * slot_bytes + i * UNIT_STRIDE, own)) {
        return false;
      }
      store_words<U::WORDS>(F::target(args, me) + at, rest, own);
    } else {
      u32 all[RANKS][U::WORDS];
      load_words<U::WORDS>(F::source(args, me) + at, rest, own);
      auto slot = [&](int peer) { return arena + peer * slot_bytes + i * UNIT_STRIDE; };
      if (!take_units<U::PACKETS>(args, entry, all, slot)) return false;
      if constexpr (F::FOLDS) {
        u32 result[U::WORDS];
        place_own<U::WORDS>(all, own, me);
        reduce_units<DTYPE, OP, U::WORDS>(all, scalars, result);
        store_words<U::WORDS>(F::target(args, me) + at, rest, result);
      } else {
#pragma unroll
        for (int rank = 0; rank < RANKS; rank++) {
          if (rank != me) store_words<U::WORDS>(F::target(args, rank) + at, rest, all[rank]);
          else if (!args.is_same) store_words<U::WORDS>(F::target(args, rank) + at, rest, own);
        }
      }
    }
  }
  return true;
}
