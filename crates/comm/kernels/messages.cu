// The kernels of messages of one world size. A grid has as many blocks for each lane; where messages are the parts of a collective, one
// block more exchanges headers, and the call has an epoch. What is small has kernels of its own, which begin faster.

#include "messages.cuh"

template <bool IS_SMALL>
__device__ __forceinline__ void some(const Messages& messages) {
  const Standing standing = look(messages);
  Entry entry = begin(messages.call);
  if (entry.is_poisoned) return;
  if (carry_out<IS_SMALL>(messages, entry, standing)) leave(messages.call);
}

template <bool IS_SMALL>
__device__ __forceinline__ void all(const Messages& messages) {
  const Args& args = messages.call;
  const Standing standing = is_header_block() ? Standing{0, 0, 0} : look(messages);
  Entry entry = enter(args);
  if (entry.is_poisoned) return;
  arrive(args, entry);
  if (is_header_block()) {
    exchange_headers<false>(args, entry);
    leave(args);
  } else if (carry_out<IS_SMALL>(messages, entry, standing)) {
    record_end(args, entry);
    leave(args);
  }
}

#define KERNEL(NAME, THREADS, BODY) \
  extern "C" __global__ void __launch_bounds__(THREADS) NAME(const __grid_constant__ Messages messages) { BODY(messages); }

KERNEL(messages, 1024, some<false>)
KERNEL(messages_of_all, 1024, all<false>)
KERNEL(small_messages, 512, some<true>)
KERNEL(small_messages_of_all, 512, all<true>)

// Waits for a message from any rank; a kernel that receives it comes next.
extern "C" __global__ void __launch_bounds__(32) find_message(const __grid_constant__ Messages messages) {
  Entry entry = begin(messages.call);
  if (entry.is_poisoned) return;
  if (find(messages, entry)) leave(messages.call);
}
