// The kernels of all-to-alls of parts of any size that are not as those of messages.cu: in place, and with counts in memory of the device.
// Grids are as there: as many blocks for each lane, and one that exchanges headers. What is small has kernels of its own.

#include "all_to_all_v.cuh"

template <bool IS_SMALL>
__device__ __forceinline__ void in_place(const Messages& messages) {
  const Args& args = messages.call;
  const Standing standing = is_header_block() ? Standing{0, 0, 0} : look(messages);
  Entry entry = enter(args);
  if (entry.is_poisoned) return;
  arrive(args, entry);
  if (is_header_block()) {
    exchange_headers<false>(args, entry);
    leave(args);
  } else if (swap<IS_SMALL>(messages, entry, standing)) {
    record_end(args, entry);
    leave(args);
  }
}

template <bool IS_SMALL>
__device__ __forceinline__ void counted(const Counted& counted) {
  const Args& args = counted.call;
  if (is_header_block()) {
    Entry entry = enter(args);
    if (entry.is_poisoned) return;
    arrive(args, entry);
    exchange_headers<false>(args, entry);
    leave(args);
    return;
  }
  __shared__ Messages messages;
  const CountedLane lane(counted);
  list_lane(counted, lane, &messages);
  const Standing standing = look(messages);
  Portion portion = {0, 0};
  if (threadIdx.x == 0 && (lane.is_own || lane.is_sent)) portion = portion_for(counted, lane.peer);
  Entry entry = enter(args);
  bool goes_on = !entry.is_poisoned;
  u64 count = 0;
  if (goes_on) {
    arrive(args, entry);
    if (threadIdx.x == 0) goes_on = settle(counted, entry, lane, portion, &messages, &count);
    goes_on = __syncthreads_and(goes_on) && carry_out<IS_SMALL>(messages, entry, standing);
  }
  // Also where nothing came: what follows finds no count that is older than this call, or has no room.
  if (threadIdx.x == 0 && lane.is_first && !lane.is_sent) tell_count(counted, lane.peer, goes_on ? count : 0);
  if (!goes_on) return;
  record_end(args, entry);
  leave(args);
}

#define KERNEL(NAME, ARGUMENTS, THREADS, BODY) \
  extern "C" __global__ void __launch_bounds__(THREADS) NAME(const __grid_constant__ ARGUMENTS arguments) { BODY(arguments); }

KERNEL(in_place_of_all, Messages, 1024, in_place<false>)
KERNEL(small_in_place_of_all, Messages, 512, in_place<true>)
KERNEL(counted_of_all, Counted, 1024, counted<false>)
KERNEL(small_counted_of_all, Counted, 512, counted<true>)
