// Who gives what to whom in each operation, and where it lies in users' buffers. Everything else follows.

#pragma once

#include "buffers.cuh"
#include "call.cuh"

enum Kind {
  ALL_REDUCE,
  BROADCAST,
  ALL_GATHER,
  REDUCE,
  REDUCE_SCATTER,
  GATHER,
  SCATTER,
  ALL_TO_ALL,
  ALL_GATHER_V,
  REDUCE_SCATTER_V
};

// Of calls with parts of any size. Their `bytes` are those of the largest part, and of the side that has a part for each rank,
// `sources[r]` or `targets[r]` is where the part of rank r lies in our buffer.
struct UnevenArgs : Args {
  u64 part_bytes[MAX_RANKS];
};

static_assert(sizeof(UnevenArgs) == UNEVEN_ARGS_BYTES, "the host lays arguments out differently");

template <int KIND>
struct Flow {
  // Inputs are combined.
  static constexpr bool FOLDS_PARTS = KIND == REDUCE_SCATTER || KIND == REDUCE_SCATTER_V;
  static constexpr bool FOLDS = KIND == ALL_REDUCE || KIND == REDUCE || FOLDS_PARTS;
  // The input has a part for each rank; the output has one of each.
  static constexpr bool HAS_PARTS_IN = FOLDS_PARTS || KIND == SCATTER || KIND == ALL_TO_ALL;
  static constexpr bool HAS_PARTS_OUT = KIND == ALL_GATHER || KIND == ALL_GATHER_V || KIND == GATHER || KIND == ALL_TO_ALL;
  static constexpr bool IS_FROM_ROOT = KIND == BROADCAST || KIND == SCATTER;
  static constexpr bool IS_TO_ROOT = KIND == REDUCE || KIND == GATHER;
  // Parts have sizes of their own.
  static constexpr bool IS_UNEVEN = KIND == ALL_GATHER_V || KIND == REDUCE_SCATTER_V;

  // Whether `from` gives `to` something.
  static __device__ __forceinline__ bool flows(const Args& args, u32 from, u32 to) {
    if constexpr (IS_FROM_ROOT) return from == args.root;
    if constexpr (IS_TO_ROOT) return to == args.root;
    return true;
  }
  // Bytes of what `from` gives `to`.
  static __device__ __forceinline__ u64 bytes(const Args& args, u32 from, u32 to) {
    if constexpr (IS_UNEVEN) return static_cast<const UnevenArgs&>(args).part_bytes[HAS_PARTS_IN ? to : from];
    else return args.bytes;
  }
  // Whether there are any from byte `at` on; always, where all parts have the size that loops go by.
  static __device__ __forceinline__ bool reaches(const Args& args, u32 from, u32 to, u64 at) {
    return !IS_UNEVEN || at < bytes(args, from, to);
  }
  // What is for rank `to`, in our input, and what is from rank `from`, in our output.
  static __device__ __forceinline__ const u8* source(const Args& args, u32 to) {
    if constexpr (IS_UNEVEN && HAS_PARTS_IN) return args.sources[to];
    return args.sources[args.rank] + (HAS_PARTS_IN ? to * args.bytes : 0);
  }
  static __device__ __forceinline__ u8* target(const Args& args, u32 from) {
    if constexpr (IS_UNEVEN && HAS_PARTS_OUT) return args.targets[from];
    return args.targets[args.rank] + (HAS_PARTS_OUT ? from * args.bytes : 0);
  }
  // Whether all that this rank gives and gets lies on lines of 16 bytes, in whole lines.
  static __device__ __forceinline__ bool is_wide(const Args& args) {
    const u32 me = args.rank;
    if constexpr (!IS_UNEVEN) return is_on(args.sources[me], 16) && is_on(args.targets[me], 16) && args.bytes % 16 == 0;
    bool is_wide = true;
#pragma unroll
    for (u32 rank = 0; rank < RANKS; rank++) {
      const u64 size = bytes(args, rank, rank);
      is_wide &= size == 0 || (size % 16 == 0 && is_on(source(args, rank), 16) && is_on(target(args, rank), 16));
    }
    return is_wide;
  }
};
