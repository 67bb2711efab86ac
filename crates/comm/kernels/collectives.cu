// The kernels of one world size: compiled once for each purpose, which for reductions has a dtype and an operation.
//
// RANKS, HOST_PACKETS, PURPOSE (with CALL_DTYPE and CALL_OP) are defined by the host. Every grid is the blocks that move
// data and one more, which exchanges headers.

#define COPIES 0
#define SUMS 1
#define PARTS 2
#define PARTS_OF_SUMS 3

#include "bulk.cuh"
#include "direct.cuh"
#include "ring.cuh"
#include "two_shot.cuh"

#define KERNEL(NAME, THREADS, READY, BODY)                                                             \
  extern "C" __global__ void __launch_bounds__(THREADS) NAME(const __grid_constant__ Args args) { \
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

#if PURPOSE == SUMS
KERNEL(all_reduce_one_shot, 512, false, (one_shot<ALL_REDUCE, CALL_DTYPE, CALL_OP>))
KERNEL(all_reduce_two_shot, 512, false, (two_shot<ALL_REDUCE, CALL_DTYPE, CALL_OP>))
KERNEL(all_reduce_bulk, TILE_THREADS, false, (bulk<ALL_REDUCE, CALL_DTYPE, CALL_OP>))
KERNEL(all_reduce_direct, 512, true, (direct<ALL_REDUCE, CALL_DTYPE, CALL_OP>))
KERNEL(all_reduce_ring, TILE_THREADS, false, (ring<ALL_REDUCE, CALL_DTYPE, CALL_OP>))
#elif PURPOSE == PARTS_OF_SUMS
KERNEL(reduce_one_shot, 512, false, (one_shot<REDUCE, CALL_DTYPE, CALL_OP>))
KERNEL(reduce_bulk, TILE_THREADS, false, (bulk<REDUCE, CALL_DTYPE, CALL_OP>))
KERNEL(reduce_ring, TILE_THREADS, false, (ring<REDUCE, CALL_DTYPE, CALL_OP>))
KERNEL(reduce_scatter_one_shot, 512, false, (one_shot<REDUCE_SCATTER, CALL_DTYPE, CALL_OP>))
KERNEL(reduce_scatter_bulk, TILE_THREADS, false, (bulk<REDUCE_SCATTER, CALL_DTYPE, CALL_OP>))
KERNEL(reduce_scatter_ring, TILE_THREADS, false, (ring<REDUCE_SCATTER, CALL_DTYPE, CALL_OP>))
#elif PURPOSE == PARTS
// Bytes, whatever they mean.
KERNEL(gather_one_shot, 512, false, (one_shot<GATHER, U8, SUM>))
KERNEL(gather_bulk, TILE_THREADS, false, (bulk<GATHER, U8, SUM>))
KERNEL(scatter_one_shot, 512, false, (one_shot<SCATTER, U8, SUM>))
KERNEL(scatter_bulk, TILE_THREADS, false, (bulk<SCATTER, U8, SUM>))
KERNEL(all_to_all_one_shot, 512, false, (one_shot<ALL_TO_ALL, U8, SUM>))
KERNEL(all_to_all_bulk, TILE_THREADS, false, (bulk<ALL_TO_ALL, U8, SUM>))
#else
KERNEL(broadcast_one_shot, 512, false, (one_shot<BROADCAST, U8, SUM>))
KERNEL(broadcast_two_shot, 512, false, (two_shot<BROADCAST, U8, SUM>))
KERNEL(broadcast_bulk, TILE_THREADS, false, (bulk<BROADCAST, U8, SUM>))
KERNEL(broadcast_direct, 512, true, (direct<BROADCAST, U8, SUM>))
KERNEL(broadcast_ring, TILE_THREADS, false, (ring<BROADCAST, U8, SUM>))
KERNEL(all_gather_one_shot, 512, false, (one_shot<ALL_GATHER, U8, SUM>))
KERNEL(all_gather_bulk, TILE_THREADS, false, (bulk<ALL_GATHER, U8, SUM>))
KERNEL(all_gather_direct, 512, true, (direct<ALL_GATHER, U8, SUM>))
KERNEL(all_gather_ring, TILE_THREADS, false, (ring<ALL_GATHER, U8, SUM>))

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
