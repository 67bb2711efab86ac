// unisono/device.cuh: one-sided memory on devices (`Symmetric` of the library) in kernels of one's own.
//
// A kernel takes a `unisono::Symmetric` by value, alone or in a structure; the host gets it from `Symmetric::device_view()`. Every
// rank has a copy of the memory on its own GPU, and every kernel reaches all copies: by plain loads and stores, told by signals, or
// by packets, which tell themselves. This file needs no other one, neither for NVRTC nor for nvcc (CUDA 12.4 and later, C++17).
//
// Signals. A rank has SIGNAL_SLOTS of them. What a thread stored, to whomever, before it signals is there for whoever has seen the
// signal. A slot has one writer at a time, and its values grow (they may wrap). `Symmetric::signal` and `wait_signal` of the host
// are the same signals.
//
// Packets. 12 bytes and an epoch travel as 16 that are written at once, so there is no order to keep and nothing to tell: about one
// hop. They are for memory of their own, which nothing else is ever written to: a packet is there when its place holds the epoch
// that its reader expects. Epochs are the caller's, differ from 0 and from what the place held last. A place may be written again
// once its reader has it, which the writer must have heard; two halves for alternate epochs, where every rank hears every other one
// in each, are enough.
//
// Waits poll memory of the own GPU and end in any case: when the communicator fails, about a millisecond later, or after the
// patience. Then they answer false, the data is not there, and the kernel should leave: each further wait takes as long again. Why
// is told on the host, by `Symmetric::check()`. Nothing ever traps.
//
// Kernels that wait for each other must run at once: launch no more blocks than fit, beside those of other streams.
//
// Nothing is checked: ranks, slots and indices must be those that there are.

#pragma once

#include "device_layout.cuh"

namespace unisono {

namespace ptx {
#include "ptx.cuh"
}  // namespace ptx

constexpr unsigned MAX_RANKS = UNISONO_MAX_RANKS;
constexpr unsigned SIGNAL_SLOTS = UNISONO_SIGNAL_SLOTS;
constexpr unsigned SIGNAL_STRIDE = UNISONO_SIGNAL_STRIDE;
constexpr unsigned PACKET_BYTES = 16;

// What a packet carries: any bits.
struct Packet {
  unsigned words[3];
};

// The memory, as the kernels of one rank reach it. Made by the host.
struct Symmetric {
  // Where the copy of each rank begins, on 16 bytes at least.
  unsigned char* copies[MAX_RANKS];
  // Bytes from there to the signals of that rank.
  unsigned long long signals_at;
  // The word of the host that ends all waits.
  const unsigned* abort;
  // Bytes of each copy.
  unsigned long long bytes;
  // How long each wait lasts; 0 is until the communicator fails.
  unsigned long long patience_ns;
  // Own rank, and their number.
  unsigned rank;
  unsigned ranks;

  // Element `index` of the copy of `peer`, which may be our own rank.
  template <class T>
  __device__ __forceinline__ T* at(unsigned peer, unsigned long long index = 0) const {
    return reinterpret_cast<T*>(copies[peer]) + index;
  }

  // Signals. -----------------------------------------------------------------------------------------------------------------

  // Sets signal `slot` of `peer` to `value`, after everything that this thread did, or knew of, before.
  __device__ __forceinline__ void signal(unsigned peer, unsigned slot, unsigned value) const {
    // SYNC: what came before a signal, to whichever copy, is visible after it.
    ptx::release_signal(signal_of(peer, slot), value);
  }

  // As `signal`, for all threads of a block, which all call it: after everything that the block did before.
  __device__ __forceinline__ void signal_block(unsigned peer, unsigned slot, unsigned value) const {
    __syncthreads();
    if (is_first_thread()) signal(peer, slot, value);
  }

  // What signal `slot` of this rank holds; 0 at first. What came before it can be read.
  __device__ __forceinline__ unsigned signal_value(unsigned slot) const {
    // SYNC: what came before a signal, to whichever copy, is visible after it.
    return ptx::acquire_signal(signal_of(rank, slot));
  }

  // Waits until signal `slot` of this rank holds at least `at_least` (or up to 2^31 more, modulo 2^32); then this thread can read
  // what came before the signal. False if it must leave.
  __device__ __forceinline__ bool wait_signal(unsigned slot, unsigned at_least) const {
    unsigned* word = signal_of(rank, slot);
    Wait wait;
    while (int(ptx::load_short_word(word) - at_least) < 0) {
      if (!wait.goes_on(*this)) return give_up(word + UNISONO_MISSED_SIGNAL, 0, word, at_least, wait.waited_ns);
    }
    // SYNC: what came before a signal, to whichever copy, is visible after it.
    ptx::acquire_signal(word);
    return true;
  }

  // As `wait_signal`, for all threads of a block, which all call it and get the same answer.
  __device__ __forceinline__ bool wait_signal_block(unsigned slot, unsigned at_least) const {
    bool is_there = !is_first_thread() || wait_signal(slot, at_least);
    return __syncthreads_and(is_there);
  }

  // Packets. -----------------------------------------------------------------------------------------------------------------

  // Sends `packet` to place `index` of the copy of `peer`, which is PACKET_BYTES times that from its beginning.
  __device__ __forceinline__ void send(unsigned peer, unsigned long long index, Packet packet, unsigned epoch) const {
    uint4 line = make_uint4(packet.words[0], packet.words[1], packet.words[2], epoch);
    ptx::store_line(copies[peer] + index * PACKET_BYTES, line);
  }

  // Whether the packet of this epoch is at place `index` of our own copy; if so, it is stored in `packet`.
  __device__ __forceinline__ bool try_receive(unsigned long long index, Packet* packet, unsigned epoch) const {
    uint4 line = ptx::load_line(copies[rank] + index * PACKET_BYTES);
    if (line.w != epoch) return false;
    packet->words[0] = line.x, packet->words[1] = line.y, packet->words[2] = line.z;
    return true;
  }

  // Waits for the packet of this epoch. False if it must leave.
  __device__ __forceinline__ bool receive(unsigned long long index, Packet* packet, unsigned epoch) const {
    Wait wait;
    while (!try_receive(index, packet, epoch)) {
      if (wait.goes_on(*this)) continue;
      const unsigned* word = at<unsigned>(rank, index * (PACKET_BYTES / 4) + 3);
      return give_up(signal_of(rank, 0) + UNISONO_MISSED_PACKET, index, word, epoch, wait.waited_ns);
    }
    return true;
  }

  // Waits of one's own. ------------------------------------------------------------------------------------------------------

  // Asked after every poll that found nothing: `while (!is_ready()) if (!wait.goes_on(shared)) return false;`
  struct Wait {
    unsigned polls = 0;
    unsigned long long started_ns = 0;
    unsigned long long waited_ns = 0;  // once it was too long; 0 if the communicator failed

    // False if one must leave.
    __device__ __forceinline__ bool goes_on(const Symmetric& shared) {
      return (++polls & 1023) != 0 || look(shared.abort, shared.patience_ns);
    }

    // At what ends waits: dear, so only now and then.
    __device__ __noinline__ bool look(const unsigned* abort, unsigned long long patience_ns) {
      if (ptx::load_short_word(abort) != 0) return false;
      unsigned long long now_ns = ptx::now_ns();
      if (started_ns == 0) started_ns = now_ns;
      if (patience_ns == 0 || now_ns - started_ns < patience_ns) return true;
      waited_ns = now_ns - started_ns;
      return false;
    }
  };

  // ---------------------------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ unsigned* signal_of(unsigned peer, unsigned slot) const {
    return reinterpret_cast<unsigned*>(copies[peer] + signals_at + slot * SIGNAL_STRIDE);
  }

  __device__ static __forceinline__ bool is_first_thread() { return (threadIdx.x | threadIdx.y | threadIdx.z) == 0; }

  // Leaves word beside our signals, where the host finds what was waited for in vain; false.
  __device__ static __noinline__ bool give_up(unsigned* missed_at, unsigned long long place, const unsigned* word,
                                              unsigned expected, unsigned long long waited_ns) {
    if (waited_ns == 0) return false;
    ptx::u64* missed = reinterpret_cast<ptx::u64*>(missed_at);
    ptx::store_word(missed + 1, ptx::u64(expected) << 32 | ptx::load_short_word(word));
    ptx::store_word(missed + 2, waited_ns);
    // SYNC: what a wait in vain says is visible before that there was one.
    ptx::fence_all();
    ptx::store_word(missed, place + 1);
    return false;
  }
};

static_assert(sizeof(Symmetric) == UNISONO_SYMMETRIC_BYTES, "the host lays this structure out differently");

}  // namespace unisono
