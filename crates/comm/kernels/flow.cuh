// Who gives what to whom in each operation, and where it lies in users' buffers. Everything else follows.

#pragma once

#include "call.cuh"

enum Kind { ALL_REDUCE, BROADCAST, ALL_GATHER, REDUCE, REDUCE_SCATTER, GATHER, SCATTER, ALL_TO_ALL };

template <int KIND>
struct Flow {
  // Inputs are combined.
  static constexpr bool FOLDS = KIND == ALL_REDUCE || KIND == REDUCE || KIND == REDUCE_SCATTER;
  // The input has a part for each rank; the output has one of each.
  static constexpr bool HAS_PARTS_IN = KIND == REDUCE_SCATTER || KIND == SCATTER || KIND == ALL_TO_ALL;
  static constexpr bool HAS_PARTS_OUT = KIND == ALL_GATHER || KIND == GATHER || KIND == ALL_TO_ALL;
  static constexpr bool IS_FROM_ROOT = KIND == BROADCAST || KIND == SCATTER;
  static constexpr bool IS_TO_ROOT = KIND == REDUCE || KIND == GATHER;

  // Whether `from` gives `to` something.
  static __device__ __forceinline__ bool flows(const Args& args, u32 from, u32 to) {
    if constexpr (IS_FROM_ROOT) return from == args.root;
    if constexpr (IS_TO_ROOT) return to == args.root;
    return true;
  }
  // What is for rank `to`, in our input, and what is from rank `from`, in our output.
  static __device__ __forceinline__ const u8* source(const Args& args, u32 to) {
    return args.sources[args.rank] + (HAS_PARTS_IN ? to * args.bytes : 0);
  }
  static __device__ __forceinline__ u8* target(const Args& args, u32 from) {
    return args.targets[args.rank] + (HAS_PARTS_OUT ? from * args.bytes : 0);
  }
};
