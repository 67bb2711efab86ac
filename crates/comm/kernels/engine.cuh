// The kernels of a call whose data copy engines move, and nothing else does: an all-gather or a broadcast, from neighbour to neighbour.
// The host puts the copies into streams of its own, between these kernels; core::device::engine says which, and why they are in order.
//
// The first kernel enters the call and exchanges headers, so whoever has passed it knows that nobody is in an earlier call any more:
// both halves of the scratch are ours. It does not leave. A kernel for each step tells both neighbours that the copies before it are
// done, and waits until theirs are. The last one tells all ranks, waits for all of them, and leaves for the first. So no rank
// completes the call, and nobody begins another one that would write into our scratch, before the copies of all ranks are done.
//
// One block of one warp each. Between them nobody runs on a multiprocessor; the epoch in memory is that of this call all the while,
// because the next call comes behind the last kernel. After poison none of them waits, and the copies write into memory of their own
// rank only.
//
// SYNC: copies are done before a kernel that the host put behind them begins, in memory of whichever device; so what a rank's copies
// wrote, and that they read what was there, is visible to its neighbours' copies behind the kernel that saw its flag.

#pragma once

#include "buffers.cuh"
#include "flags.cuh"

constexpr u32 ENGINE_THREADS = 32;

struct StepArgs : Args {
  u64 step;
};

static_assert(sizeof(StepArgs) == STEP_ARGS_BYTES, "the host lays arguments out differently");

// What all kernels of the call but the first do first: all threads.
__device__ __forceinline__ Entry resume(const Args& args) {
  await_kernel_before();
  Entry entry;
  entry.epoch = load_own_word(&args.state->epoch);
  entry.started_ns = now_ns();
  entry.what = A_CALL;
  entry.tag = 0;
  entry.is_poisoned = __syncthreads_or(load_own_word(&args.state->poison) != 0);
  return entry;
}

__device__ __forceinline__ void engine_begin_call(const Args& args) {
  Entry entry = enter(args);
  if (entry.is_poisoned) return;
  arrive(args, entry);
  exchange_headers<false>(args, entry);
}

__device__ __forceinline__ void engine_pass_step(const StepArgs& args) {
  const Entry entry = resume(args);
  if (entry.is_poisoned || threadIdx.x > 1) return;
  const u32 next = peer_behind(args.rank, 1), previous = peer_behind(args.rank, RANKS - 1);
  const u32 peer = threadIdx.x == 0 ? next : previous;
  // One word for each neighbour counts the steps.
  const u32 round = u32(args.step) * FLAG_WAYS;
  // SYNC: what a block stored for round r, in scratch and in outputs, and that it read what was there, is visible after its
  // flag of round r. Here copies did, which were done before this kernel began.
  fence_all();
  set_flag(args, entry, 0, peer, 0, round);
  wait_flag(args, entry, 0, peer, 0, round);
}

__device__ __forceinline__ void engine_end_call(const Args& args) {
  const Entry entry = resume(args);
  if (entry.is_poisoned) return;
  announce(args, entry, 0, 1, 0);
  if (!await(args, entry, 0, 1, 0)) return;
  record_end(args, entry);
  leave(args);
}
