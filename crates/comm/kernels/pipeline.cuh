// How a block carries out a program: tile after tile is loaded, perhaps folded, and stored, with flags between the ranks.
//
// A program has INPUTS sides that a tile is loaded from and OUTPUTS sides that it is stored to, in scratch or in users' buffers.
// Each may wait for a flag of a peer first, and tell a peer by a flag that it is done. IS_SPREAD: output k is input k; otherwise all
// outputs are the fold of all inputs, or input 0 where nothing is folded. There are two ways to run the same program:
//
// Threads (this file): all of a block load, fold and store a tile at a time. Many blocks fill the links.
//
// Bulk copies (copies.cuh; sm_90 and later, over NVLink): the hardware copies chunks of a tile into shared memory and out of it, and
// threads only fold. Few blocks nearly fill the links. Taken where the launch gives blocks shared memory for it.
//
// Both ways tell the same flags of the same tiles.

#pragma once

#include "buffers.cuh"
#include "flags.cuh"

constexpr u32 NOBODY = 0xffffffff;

struct Flag {
  u32 peer = NOBODY;
  u32 stage = 0;
  u32 round = 0;
};

// One input or output of a tile.
struct Side {
  u8* at = nullptr;    // null: there is none
  u64 rest = ~u64(0);  // bytes that there are from there on
  bool is_own = false; // in a user's buffer: it may lie anywhere, and end within the tile
  Flag wait;           // before it may be read or written
  Flag tell;           // once it was read or written
};

// The user's input, or output.
__device__ __forceinline__ Side own_side(const u8* base, u64 at, u64 bytes) {
  Side side;
  side.rest = at < bytes ? bytes - at : 0;
  // What lies behind the end moves nothing.
  if (side.rest > 0) side.at = const_cast<u8*>(base) + at;
  side.is_own = true;
  return side;
}

// Whether `count` vectors of the side are whole lines of 16 bytes.
__device__ __forceinline__ bool is_wide(const Side& side, u32 count) {
  return !side.is_own || side.at == nullptr || (is_on(side.at, 16) && side.rest >= u64(count) * 16);
}

__device__ __forceinline__ uint4 load_own(const Side& side, u64 vector) {
  return load_vector<false>(side.at + vector * 16, side.rest > vector * 16 ? side.rest - vector * 16 : 0);
}

__device__ __forceinline__ void store_own(const Side& side, u64 vector, uint4 value) {
  store_vector<false>(side.at + vector * 16, side.rest > vector * 16 ? side.rest - vector * 16 : 0, value);
}

__device__ __forceinline__ bool wait_for(const Args& args, const Entry& entry, u32 channel, const Flag& flag) {
  return flag.peer == NOBODY || wait_flag(args, entry, channel, flag.peer, flag.stage, flag.round);
}

__device__ __forceinline__ void tell(const Args& args, const Entry& entry, u32 channel, const Flag& flag) {
  if (flag.peer != NOBODY) set_flag(args, entry, channel, flag.peer, flag.stage, flag.round);
}

template <class Program, bool WIDE>
__device__ __forceinline__ void move_tile(const Program& program, u32 t, const Side* inputs, const Side* outputs) {
  auto load = [&](u32 k, u64 v) {
    const Side& side = inputs[k];
    if (side.at == nullptr) return make_uint4(0, 0, 0, 0);
    return WIDE || !side.is_own ? *reinterpret_cast<const uint4*>(side.at + v * 16) : load_own(side, v);
  };
  auto store = [&](u32 k, u64 v, uint4 value) {
    const Side& side = outputs[k];
    if (side.at == nullptr) return;
    if (WIDE || !side.is_own) *reinterpret_cast<uint4*>(side.at + v * 16) = value;
    else store_own(side, v, value);
  };
  const u32 count = program.count(t), step = blockDim.x;
  if constexpr (Program::IS_SPREAD) {
    for_vectors<TOGETHER<WIDE, Program::INPUTS>>(0, count, threadIdx.x, step, [&](auto together, u64 v) {
      constexpr int N = decltype(together)::value;
      uint4 values[N][Program::INPUTS];
#pragma unroll
      for (int i = 0; i < N; i++) {
#pragma unroll
        for (u32 k = 0; k < Program::INPUTS; k++) values[i][k] = load(k, v + i * step);
      }
#pragma unroll
      for (int i = 0; i < N; i++) {
#pragma unroll
        for (u32 k = 0; k < Program::OUTPUTS; k++) store(k, v + i * step, values[i][k]);
      }
    });
    return;
  }
  if constexpr (Program::FOLDS) {
    if (program.is_folded(t)) {
      for_vectors<TOGETHER<WIDE, Program::INPUTS>>(0, count, threadIdx.x, step, [&](auto together, u64 v) {
        constexpr int N = decltype(together)::value;
        uint4 values[N][Program::INPUTS];
#pragma unroll
        for (int i = 0; i < N; i++) {
#pragma unroll
          for (u32 k = 0; k < Program::INPUTS; k++) values[i][k] = load(k, v + i * step);
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
          const uint4 result = program.fold(t, [&](u32 k) { return values[i][k]; });
#pragma unroll
          for (u32 k = 0; k < Program::OUTPUTS; k++) store(k, v + i * step, result);
        }
      });
      return;
    }
  }
  for_vectors<TOGETHER<WIDE, 1>>(0, count, threadIdx.x, step, [&](auto together, u64 v) {
    constexpr int N = decltype(together)::value;
    uint4 values[N];
#pragma unroll
    for (int i = 0; i < N; i++) values[i] = load(0, v + i * step);
#pragma unroll
    for (int i = 0; i < N; i++) {
#pragma unroll
      for (u32 k = 0; k < Program::OUTPUTS; k++) store(k, v + i * step, values[i]);
    }
  });
}

// All threads of a block. False if one must leave.
template <class Program>
__device__ __forceinline__ bool run_by_threads(const Args& args, const Entry& entry, const Program& program) {
  __shared__ Side inputs[Program::INPUTS];
  __shared__ Side outputs[Program::OUTPUTS];
  const u32 thread = threadIdx.x, k = thread % 32;
  // The first warp cares for inputs, the second for outputs.
  const bool has_input = thread < Program::INPUTS, has_output = thread / 32 == 1 && k < Program::OUTPUTS;
  for (u32 t = 0; t < program.tiles(); t++) {
    Side side;
    if (has_input) inputs[k] = side = program.input(t, k);
    else if (has_output) outputs[k] = side = program.output(t, k);
    const bool is_there = wait_for(args, entry, program.channel, side.wait);
    if (!__syncthreads_and(is_there)) return false;
    if (__syncthreads_and(is_wide(side, program.count(t)))) move_tile<Program, true>(program, t, inputs, outputs);
    else move_tile<Program, false>(program, t, inputs, outputs);
    __syncthreads();
    if (side.tell.peer != NOBODY) {
      // SYNC: what a block stored for round r, in scratch and in outputs, and that it read what was there, is visible after its
      // flag of round r.
      fence_all();
      tell(args, entry, program.channel, side.tell);
    }
  }
  return true;
}
