// Flags between a channel of one rank (a block, or a few that work together) and that of another. Rounds are dealt to FLAG_WAYS
// words, so that as many writers need not wait for each other; each word is a count of its rounds, tagged with the epoch, that only
// grows.
//
// A flag of a later epoch counts as set: its writer is beyond what we wait for. Comparing signed differences keeps that
// right when epochs wrap.

#pragma once

#include "call.cuh"

__device__ __forceinline__ u64 flag_at(u32 channel, u32 stage, u32 source, u32 round) {
  return FLAGS_AT + (((u64(stage) * MAX_BLOCKS + channel) * MAX_RANKS + source) * FLAG_WAYS + round % FLAG_WAYS) * 8;
}

__device__ __forceinline__ u64 due_in(const Entry& entry, u32 round) { return u64(entry.epoch) << 32 | (round / FLAG_WAYS + 1); }

// Tells this channel of `peer` that we are through round `round`.
__device__ __forceinline__ void set_flag(const Args& args, const Entry& entry, u32 channel, u32 peer, u32 stage, u32 round) {
  u64* flag = reinterpret_cast<u64*>(args.arenas[peer] + flag_at(channel, stage, args.rank, round));
  store_word(flag, due_in(entry, round));
}

// Whether this channel of `peer` is through round `round`: then what it released with that is visible.
__device__ __forceinline__ bool is_flag_set(const Args& args, const Entry& entry, u32 channel, u32 peer, u32 stage, u32 round) {
  const u64* flag = reinterpret_cast<const u64*>(args.arenas[args.rank] + flag_at(channel, stage, peer, round));
  // SYNC: what a block stored for round r, in scratch and in outputs, and that it read what was there, is visible after its
  // flag of round r.
  return i64(acquire_word(flag) - due_in(entry, round)) >= 0;
}

__device__ __forceinline__ bool wait_flag(const Args& args, const Entry& entry, u32 channel, u32 peer, u32 stage, u32 round) {
  const u64* flag = reinterpret_cast<const u64*>(args.arenas[args.rank] + flag_at(channel, stage, peer, round));
  const u64 due = due_in(entry, round);
  bool is_there = wait_until(args, entry, peer, [&] { return i64(load_word(flag) - due) >= 0; });
  // SYNC: what a block stored for round r, in scratch and in outputs, and that it read what was there, is visible after its
  // flag of round r.
  acquire_word(flag);
  return is_there;
}

// All threads: everything that the block stored is visible to the peers before they see the flags of this round.
__device__ __forceinline__ void announce(const Args& args, const Entry& entry, u32 channel, u32 stage, u32 round) {
  __syncthreads();
  if (threadIdx.x < RANKS && threadIdx.x != args.rank) {
    // SYNC: what a block stored for round r, in scratch and in outputs, and that it read what was there, is visible after its
    // flag of round r.
    fence_all();
    set_flag(args, entry, channel, threadIdx.x, stage, round);
  }
}

// All threads: what every peer's block stored for this round can be read. False if one must leave.
__device__ __forceinline__ bool await(const Args& args, const Entry& entry, u32 channel, u32 stage, u32 round) {
  bool is_there = true;
  if (threadIdx.x < RANKS && threadIdx.x != args.rank) {
    is_there = wait_flag(args, entry, channel, threadIdx.x, stage, round);
  }
  return __syncthreads_and(is_there);
}
