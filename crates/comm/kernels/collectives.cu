// The kernels of one world size: compiled once for each purpose, which for reductions has a dtype and an operation.
//
// RANKS, HOST_PACKETS, PURPOSE (with CALL_DTYPE and CALL_OP) are defined by the host. Every grid is the blocks that move
// data and one more, which exchanges headers.

#define COPIES 0
#define SUMS 1
#define PARTS 2
#define PARTS_OF_SUMS 3
#define FUSED 8
#define QUANTISED 9

#include "bulk.cuh"
#include "direct.cuh"
#include "engine.cuh"
#if PURPOSE == FUSED
#include "fused.cuh"
#endif
#if PURPOSE == QUANTISED
#include "quantised.cuh"
#endif
#include "ring.cuh"
#include "two_shot.cuh"

#define KERNEL(NAME, THREADS, READY, BODY) KERNEL_OF(Args, NAME, THREADS, READY, BODY)
// With parts of any size.
#define UNEVEN(NAME, THREADS, BODY) KERNEL_OF(UnevenArgs, NAME, THREADS, false, BODY)
#define KERNEL_OF(ARGS, NAME, THREADS, READY, BODY)                                               \
  extern "C" __global__ void __launch_bounds__(THREADS) NAME(const __grid_constant__ ARGS args) { \
    Entry entry = enter(args);                                                                  \
    if (entry.is_poisoned) return;                                                              \
    if (is_header_block()) {                                                                    \
      arrive(args, entry);                                                                      \
      exchange_headers<READY>(args, entry);                                                     \
      leave(args);                                                                              \
    } else if (BODY(args, entry)) {                                                             \
      record_end(args, entry);                                                                  \
      leave(args);                                                                              \
    }                                                                                           \
  }

// Those in lines: on devices with bulk copies, over NVLink (units.cuh).
#if BULK_COPIES
#define ALONE 512, 1  // on a multiprocessor: with all of its registers
#define LINES(NAME, BODY) KERNEL_OF(Args, NAME, ALONE, false, BODY)
#define UNEVEN_LINES(NAME, BODY) KERNEL_OF(UnevenArgs, NAME, ALONE, false, BODY)
#else
#define LINES(NAME, BODY)
#define UNEVEN_LINES(NAME, BODY)
#endif

#if PURPOSE == SUMS
KERNEL(all_reduce_one_shot, 512, false, (one_shot<ALL_REDUCE, CALL_DTYPE, CALL_OP>))
LINES(all_reduce_one_shot_lines, (one_shot<ALL_REDUCE, CALL_DTYPE, CALL_OP, Lines>))
KERNEL(all_reduce_two_shot, 512, false, (two_shot<ALL_REDUCE, CALL_DTYPE, CALL_OP>))
LINES(all_reduce_two_shot_lines, (two_shot<ALL_REDUCE, CALL_DTYPE, CALL_OP, Lines>))
KERNEL(all_reduce_bulk, TILE_THREADS, false, (bulk<ALL_REDUCE, CALL_DTYPE, CALL_OP>))
KERNEL(all_reduce_direct, 512, true, (direct<ALL_REDUCE, CALL_DTYPE, CALL_OP>))
KERNEL(all_reduce_ring, TILE_THREADS, false, (ring<ALL_REDUCE, CALL_DTYPE, CALL_OP>))
#elif PURPOSE == PARTS_OF_SUMS
KERNEL(reduce_one_shot, 512, false, (one_shot<REDUCE, CALL_DTYPE, CALL_OP>))
LINES(reduce_one_shot_lines, (one_shot<REDUCE, CALL_DTYPE, CALL_OP, Lines>))
LINES(reduce_two_shot_lines, (two_shot<REDUCE, CALL_DTYPE, CALL_OP, Lines>))
KERNEL(reduce_bulk, TILE_THREADS, false, (bulk<REDUCE, CALL_DTYPE, CALL_OP>))
KERNEL(reduce_ring, TILE_THREADS, false, (ring<REDUCE, CALL_DTYPE, CALL_OP>))
KERNEL(reduce_scatter_one_shot, 512, false, (one_shot<REDUCE_SCATTER, CALL_DTYPE, CALL_OP>))
LINES(reduce_scatter_one_shot_lines, (one_shot<REDUCE_SCATTER, CALL_DTYPE, CALL_OP, Lines>))
KERNEL(reduce_scatter_bulk, TILE_THREADS, false, (bulk<REDUCE_SCATTER, CALL_DTYPE, CALL_OP>))
KERNEL(reduce_scatter_ring, TILE_THREADS, false, (ring<REDUCE_SCATTER, CALL_DTYPE, CALL_OP>))
UNEVEN(reduce_scatter_v_one_shot, 512, (one_shot<REDUCE_SCATTER_V, CALL_DTYPE, CALL_OP>))
UNEVEN_LINES(reduce_scatter_v_one_shot_lines, (one_shot<REDUCE_SCATTER_V, CALL_DTYPE, CALL_OP, Lines>))
UNEVEN(reduce_scatter_v_bulk, TILE_THREADS, (bulk<REDUCE_SCATTER_V, CALL_DTYPE, CALL_OP>))
UNEVEN(reduce_scatter_v_ring, TILE_THREADS, (ring<REDUCE_SCATTER_V, CALL_DTYPE, CALL_OP>))
#elif PURPOSE == FUSED
#define ROW_KERNEL(NAME, BODY)                                                                        \
  extern "C" __global__ void __launch_bounds__(256, 2) NAME(const __grid_constant__ FusedArgs all) {  \
    if (is_header_block()) {                                                                          \
      Entry entry = enter(all.args);                                                                  \
      if (entry.is_poisoned) return;                                                                  \
      arrive(all.args, entry);                                                                        \
      exchange_headers<false>(all.args, entry);                                                       \
    } else if (!BODY<CALL_DTYPE>(all)) {                                                              \
      return;                                                                                         \
    }                                                                                                 \
    leave(all.args);                                                                                  \
  }

ROW_KERNEL(rows_one_shot_of_all, rows_one_shot)
ROW_KERNEL(rows_two_shot_of_all, rows_two_shot)
extern "C" __global__ void __launch_bounds__(256, 4) rows_behind_all(const __grid_constant__ FusedArgs all) {
  rows_behind<CALL_DTYPE>(all);
}
#elif PURPOSE == QUANTISED
KERNEL(all_reduce_quantised_one_shot, 512, false, (quantised_one_shot<CALL_DTYPE>))
KERNEL(all_reduce_quantised_two_shot, 512, false, (quantised_two_shot<CALL_DTYPE>))
#elif PURPOSE == PARTS
// Bytes, whatever they mean.
KERNEL(gather_one_shot, 512, false, (one_shot<GATHER, U8, SUM>))
LINES(gather_one_shot_lines, (one_shot<GATHER, U8, SUM, Lines>))
KERNEL(gather_bulk, TILE_THREADS, false, (bulk<GATHER, U8, SUM>))
KERNEL(scatter_one_shot, 512, false, (one_shot<SCATTER, U8, SUM>))
LINES(scatter_one_shot_lines, (one_shot<SCATTER, U8, SUM, Lines>))
KERNEL(scatter_bulk, TILE_THREADS, false, (bulk<SCATTER, U8, SUM>))
KERNEL(all_to_all_one_shot, 512, false, (one_shot<ALL_TO_ALL, U8, SUM>))
LINES(all_to_all_one_shot_lines, (one_shot<ALL_TO_ALL, U8, SUM, Lines>))
KERNEL(all_to_all_bulk, TILE_THREADS, false, (bulk<ALL_TO_ALL, U8, SUM>))
UNEVEN(all_gather_v_one_shot, 512, (one_shot<ALL_GATHER_V, U8, SUM>))
UNEVEN_LINES(all_gather_v_one_shot_lines, (one_shot<ALL_GATHER_V, U8, SUM, Lines>))
UNEVEN(all_gather_v_bulk, TILE_THREADS, (bulk<ALL_GATHER_V, U8, SUM>))
UNEVEN(all_gather_v_ring, TILE_THREADS, (ring<ALL_GATHER_V, U8, SUM>))
#else
KERNEL(broadcast_one_shot, 512, false, (one_shot<BROADCAST, U8, SUM>))
LINES(broadcast_one_shot_lines, (one_shot<BROADCAST, U8, SUM, Lines>))
KERNEL(broadcast_two_shot, 512, false, (two_shot<BROADCAST, U8, SUM>))
LINES(broadcast_two_shot_lines, (two_shot<BROADCAST, U8, SUM, Lines>))
KERNEL(broadcast_bulk, TILE_THREADS, false, (bulk<BROADCAST, U8, SUM>))
KERNEL(broadcast_direct, 512, true, (direct<BROADCAST, U8, SUM>))
KERNEL(broadcast_ring, TILE_THREADS, false, (ring<BROADCAST, U8, SUM>))
KERNEL(all_gather_one_shot, 512, false, (one_shot<ALL_GATHER, U8, SUM>))
LINES(all_gather_one_shot_lines, (one_shot<ALL_GATHER, U8, SUM, Lines>))
KERNEL(all_gather_bulk, TILE_THREADS, false, (bulk<ALL_GATHER, U8, SUM>))
KERNEL(all_gather_direct, 512, true, (direct<ALL_GATHER, U8, SUM>))
KERNEL(all_gather_ring, TILE_THREADS, false, (ring<ALL_GATHER, U8, SUM>))

// Between these three, copy engines move the data of all-gathers and broadcasts.
extern "C" __global__ void __launch_bounds__(512) engine_begin(const __grid_constant__ Args args) { engine_begin_call(args); }
extern "C" __global__ void __launch_bounds__(ENGINE_THREADS) engine_step(const __grid_constant__ StepArgs args) {
  engine_pass_step(args);
}
extern "C" __global__ void __launch_bounds__(ENGINE_THREADS) engine_end(const __grid_constant__ Args args) { engine_end_call(args); }

// Only headers: nobody leaves before all have entered.
extern "C" __global__ void __launch_bounds__(512) barrier(const __grid_constant__ Args args) {
  Entry entry = enter(args);
  if (entry.is_poisoned) return;
  arrive(args, entry);
  exchange_headers<false>(args, entry);
  leave(args);
}

// What time it is here, for a host that looks at its own clock before and after.
extern "C" __global__ void tell_time(const __grid_constant__ Args args) {
  // Who waits for this kernel waits for those before it.
  await_kernel_before();
  store_word(reinterpret_cast<u64*>(args.report) + REPORT_CLOCK, now_ns());
}

// What this side reads in arguments that the host filled, and takes the layout to be: for a test that compares them.
extern "C" __global__ void probe(const __grid_constant__ Args args) {
  const u64 facts[] = {sizeof(Args), sizeof(Report), sizeof(State), u64(args.arenas[MAX_RANKS - 1]), u64(args.sources[1]),
                       u64(args.targets[2]), u64(args.abort), u64(args.report), args.header[HEADER_WORDS - 1], args.bytes, args.source_bytes, args.target_bytes,
                       args.patience_ns, args.rank, args.root, args.tile, args.is_same, PACKET_BYTES, SCRATCH_AT,
                       u64(&args.state->left) - u64(args.state), u64(&args.state->expected) - u64(args.state)};
  for (u32 i = 0; i < sizeof(facts) / 8; i++) reinterpret_cast<u64*>(args.targets[0])[i] = facts[i];
}
#endif
