// A kernel of one's own over one-sided memory on devices: every round, all ranks exchange packets, then a table by signals.
//
// The memory of each rank, in bytes (P = ranks * PACKETS * 16, S = ranks * 8):
//
//   packets of even rounds: P | of odd rounds: P | sums of even rounds: S | of odd rounds: S
//
// In round r thread i of the block sends one packet to place i of its rank at every peer. It receives place i of every rank, so it
// has heard from all of them that round r - 1 is over, and the half of r - 1 may be written again in r + 1. Then each rank stores the
// sum of what it sent into the tables of all, by plain stores that a signal tells; the same holds for these. The answer is how many
// rounds went right, and how many values were wrong.

#include <unisono/device.cuh>

struct Arguments {
  unisono::Symmetric shared;
  unsigned* rounds_done;  // by this device, then how many values were wrong
  unsigned first_round;   // from 1 on: also the epoch of its packets, and the value of its signals
  unsigned rounds;
};

constexpr unsigned PACKETS = 256;

// What thread `i` of rank `from` tells rank `to`.
__device__ unsigned told(unsigned from, unsigned to, unsigned i, unsigned round) {
  return (round * 2654435761u ^ from << 20 ^ to << 12 ^ i) * 2246822519u;
}

// One block of PACKETS threads.
extern "C" __global__ void exchange(Arguments arguments) {
  const unisono::Symmetric& shared = arguments.shared;
  const unsigned me = shared.rank, ranks = shared.ranks, i = threadIdx.x;
  const unsigned long long sums_at = 2ull * ranks * PACKETS * unisono::PACKET_BYTES / 8;
  unsigned wrong = 0;
  for (unsigned r = 0; r < arguments.rounds; r++) {
    const unsigned round = arguments.first_round + r, half = round & 1;
    // 1. A packet to every rank, ourselves too.
    for (unsigned k = 0; k < ranks; k++) {
      unsigned peer = (me + k) % ranks, value = told(me, peer, i, round);
      shared.send(peer, (half * ranks + me) * PACKETS + i, {value, ~value, i}, round);
    }
    // 2. One of every rank.
    bool is_there = true;
    for (unsigned from = 0; from < ranks && is_there; from++) {
      unisono::Packet packet;
      is_there = shared.receive((half * ranks + from) * PACKETS + i, &packet, round);
      unsigned value = told(from, me, i, round);
      wrong += is_there && (packet.words[0] != value || packet.words[1] != ~value || packet.words[2] != i);
    }
    if (!__syncthreads_and(is_there)) break;
    // 3. A number of ours into the tables of all, by plain stores, and a signal each.
    if (i < ranks) {
      *shared.at<unsigned long long>(i, sums_at + half * ranks + me) = told(me, i, PACKETS, round) * 3ull;
    }
    for (unsigned peer = 0; peer < ranks; peer++) shared.signal_block(peer, me, round);
    // 4. What all ranks stored in ours.
    for (unsigned from = 0; from < ranks && is_there; from++) {
      is_there = shared.wait_signal_block(from, round);
      if (is_there && i == 0) {
        unsigned long long got = *shared.at<unsigned long long>(me, sums_at + half * ranks + from);
        wrong += got != told(from, me, PACKETS, round) * 3ull;
      }
    }
    if (!is_there) break;
    if (i == 0) arguments.rounds_done[0] = r + 1;
  }
  if (wrong > 0) atomicAdd(arguments.rounds_done + 1, wrong);
}
