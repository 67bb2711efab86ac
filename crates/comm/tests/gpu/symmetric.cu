// Kernels of the tests of one-sided memory on devices.

#include <unisono/device.cuh>

struct Arguments {
  unisono::Symmetric shared;
  unsigned* answer;  // words of this device
  unsigned slot;
  unsigned value;
};

// Any number of blocks: waits for a signal, and counts the threads whose waits went well, then those whose did not.
extern "C" __global__ void wait_each(Arguments arguments) {
  bool is_there = arguments.shared.wait_signal(arguments.slot, arguments.value);
  atomicAdd(arguments.answer + !is_there, 1u);
}

// As `wait_each`, for the first packet of our copy.
extern "C" __global__ void receive_each(Arguments arguments) {
  unisono::Packet packet;
  bool is_there = arguments.shared.receive(0, &packet, arguments.value);
  atomicAdd(arguments.answer + !is_there, 1u);
}

// One block: adds one to every number of our copy once the host has signalled, hands them to the next rank, and signals that.
extern "C" __global__ void pass_on(Arguments arguments) {
  const unisono::Symmetric& shared = arguments.shared;
  const unsigned next = (shared.rank + 1) % shared.ranks;
  const unsigned long long half = shared.bytes / 8;
  if (!shared.wait_signal_block(arguments.slot, arguments.value)) return;
  for (unsigned long long i = threadIdx.x; i < half; i += blockDim.x) {
    *shared.at<unsigned>(next, half + i) = *shared.at<unsigned>(shared.rank, i) + 1;
  }
  shared.signal_block(next, arguments.slot + 1, arguments.value);
}
