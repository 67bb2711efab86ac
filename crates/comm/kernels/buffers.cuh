// Users' buffers, of any length and alignment, in words and in vectors of 16 bytes.
//
// What is loaded or stored together may be short at the end; nothing outside of the buffer is touched, and what is missing reads as zero.

#pragma once

#include "element.cuh"
#include "layout.cuh"

__device__ __forceinline__ bool is_on(const void* at, u32 bytes) { return (reinterpret_cast<u64>(at) & (bytes - 1)) == 0; }

template <int WORDS>
__device__ __noinline__ void load_slowly(const u8* at, u32 bytes, u32* words) {
  for (int i = 0; i < WORDS; i++) words[i] = 0;
  for (u32 i = 0; i < bytes; i++) words[i / 4] |= u32(at[i]) << (i % 4 * 8);
}

template <int WORDS>
__device__ __noinline__ void store_slowly(u8* at, u32 bytes, const u32* words) {
  for (u32 i = 0; i < bytes; i++) at[i] = u8(words[i / 4] >> (i % 4 * 8));
}

// `rest` is how many bytes there are from `at` on. An end of whole words is as quick as the rest: in rows each has one.
template <int WORDS>
__device__ __forceinline__ void load_words(const u8* at, u64 rest, u32* words) {
  const u32 bytes = rest < WORDS * 4 ? u32(rest) : WORDS * 4;
  if (is_on(at, 4) && bytes % 4 == 0) {
    const u32* from = reinterpret_cast<const u32*>(at);
#pragma unroll
    for (int i = 0; i < WORDS; i++) words[i] = i * 4 < bytes ? from[i] : 0;
  } else {
    u32 slow[WORDS];
    load_slowly<WORDS>(at, bytes, slow);
#pragma unroll
    for (int i = 0; i < WORDS; i++) words[i] = slow[i];
  }
}

template <int WORDS>
__device__ __forceinline__ void store_words(u8* at, u64 rest, const u32* words) {
  const u32 bytes = rest < WORDS * 4 ? u32(rest) : WORDS * 4;
  if (is_on(at, 4) && bytes % 4 == 0) {
    u32* to = reinterpret_cast<u32*>(at);
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      if (i * 4 < bytes) to[i] = words[i];
    }
  } else {
    u32 slow[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; i++) slow[i] = words[i];
    store_slowly<WORDS>(at, bytes, slow);
  }
}

// How many vectors of each of `sides` ranks a thread has under way at once: the latency of memory is hidden by bytes in flight,
// and there are 128 registers. Buffers that lie badly take their time.
template <bool WIDE, int SIDES>
constexpr int TOGETHER = !WIDE ? 1 : SIDES <= 1 ? 8 : SIDES <= 2 ? 4 : SIDES <= 4 ? 2 : 1;

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls `body(Count<N>, v)` for the vectors v, v + blockDim, … (N of them) until all of [begin, end) are done, by the threads
// of this block.
template <int N, class Body>
__device__ __forceinline__ void for_vectors(u64 begin, u64 end, u64 first, u64 step, Body body) {
  u64 v = begin + first;
  for (; v + (N - 1) * step < end; v += N * step) body(Count<N>{}, v);
  if constexpr (N > 1) {
    for (; v < end; v += step) body(Count<1>{}, v);
  }
}

// Vectors that so many bytes take, in whole lines of 128 bytes.
__device__ __forceinline__ u64 lines(u64 bytes) { return (bytes + 127) / 128 * 8; }

__device__ __forceinline__ u32 peer_behind(u32 me, u32 k) { return me + k < RANKS ? me + k : me + k - RANKS; }

// A vector of 16 bytes. WIDE: the buffer lies on 16 bytes.
template <bool WIDE>
__device__ __forceinline__ uint4 load_vector(const u8* at, u64 rest) {
  if (WIDE && rest >= 16) return *reinterpret_cast<const uint4*>(at);
  u32 words[4];
  load_words<4>(at, rest, words);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <bool WIDE>
__device__ __forceinline__ void store_vector(u8* at, u64 rest, uint4 value) {
  if (WIDE && rest >= 16) {
    *reinterpret_cast<uint4*>(at) = value;
  } else {
    u32 words[4] = {value.x, value.y, value.z, value.w};
    store_words<4>(at, rest, words);
  }
}

// Reduces vectors of all ranks, in rank order: `inputs(rank)` is that of a rank.
template <int DTYPE, int OP, class Inputs>
__device__ __forceinline__ uint4 reduce_vectors(Inputs inputs, const f64* scalars) {
  Fold<DTYPE, OP, 4> fold;
#pragma unroll
  for (int rank = 0; rank < RANKS; rank++) {
    const uint4 input = inputs(rank);
    u32 words[4] = {input.x, input.y, input.z, input.w};
    f64 scalar = OP == PREMUL_SUM ? scalars[rank] : 0;
    if (rank == 0) fold.first(words, scalar);
    else fold.next(words, scalar);
  }
  u32 words[4];
  fold.finish(words, RANKS);
  return make_uint4(words[0], words[1], words[2], words[3]);
}
