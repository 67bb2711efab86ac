// A call on the device: its arguments, how a kernel enters it, how its ranks compare what they call, and the one wait.
//
// Epochs. The epoch of the communicator lies in device memory, and beside it which area of lines the next call may fill (units.cuh). Every block reads it on entry and counts itself; the last
// one to do so moves it on, while the data is on its way. Kernels of one communicator follow each other in the order of a
// stream, so the next one reads the new epoch.
//
// A launch may let a kernel begin while the one before it still runs (core::settings::GpuLaunch). So the first thing that every kernel
// does, before it touches any memory, is to wait until that has ended; then it lets the next begin, which waits in turn.
//
// Headers. The last block of the grid sends each peer our whole call, tagged with the epoch, and compares the peer's. That
// is also how every rank hears every other one in every call: hearing epoch e of a peer proves that it is done with e − 1,
// so what was sent for e − 1 (the other half) may be overwritten in e + 1.
//
// Records. A warp of the same block that has nothing to send meanwhile writes what the call is into a ring behind the words of
// this device; what follows are two times, when all headers are here and when large data is through. Nobody waits for these
// stores. The host has the ring copied when somebody asks, also while kernels hang (core::recorder).
//
// Waits. Whoever waits polls memory of its own device. Now and then it looks at the poison word beside the epoch, more
// seldom (one lane of a warp) at the abort word of the host and at the clock. Poison makes every thread, and every kernel
// that is queued behind, leave through its normal exit. Nothing traps.

#pragma once

#include "layout.cuh"
#include "ptx.cuh"

// Why a kernel gave up, as the host reads it.
enum Reason {
  REASON_NONE,
  REASON_MISMATCH,
  REASON_TIMEOUT,
  REASON_CONCURRENT,
  REASON_OUTSIDE,
  REASON_MESSAGE,
  REASON_ABORTED
};

// In memory of this device, used by this rank only. The host reads `epoch`, `left` and `expected` beside the records.
struct State {
  u32 epoch;
  u32 arrivals;  // blocks of the running kernel that read the epoch
  u32 poison;
  u32 reported;
  u32 left;      // blocks that are through, of all kernels so far
  u32 expected;  // what `left` is at least once the kernels before are done
  u32 cleared;   // blocks that cleared their part of the arena
  u32 open;      // the epoch for which the arena is clear
  u32 late;      // the area of lines, 0 or 1, of which peers may not have taken all
};

// A call in the ring behind those words. Each of its two sectors of 32 bytes tells the epoch.
struct Record {
  u64 launch;    // epoch << 32 | form and grid
  u64 started_ns;
  u64 kind;      // and dtype, op, root
  u64 count;
  u64 epoch;     // << 32
  u64 extra;     // parts, or windows
  u64 met_ns;    // all headers are here; of no call if it is before `started_ns`, as is the next
  u64 ended_ns;  // the last block so far was through
};

static_assert(sizeof(Record) == RECORD_BYTES, "the host reads other records");

// In host memory. `reason` is written last.
struct Report {
  u64 reason;
  u64 peer;
  u64 epoch;
  u64 expected;
  u64 seen;
  u64 waited_ns;
  // epoch, or tag << 32 | what << 16 | 1 + peer, from a wait that lasts; of no other use than to be read by people
  u64 waiting;
  u64 found;    // 1 + the rank that a message of any rank came from
  u32 mine[2 * HEADER_WORDS + 2];
  u32 theirs[2 * HEADER_WORDS + 2];
};

struct Args {
  u8* arenas[MAX_RANKS];
  // Where each rank's input and output lies: those of peers in direct forms only.
  u8* sources[MAX_RANKS];
  u8* targets[MAX_RANKS];
  State* state;
  const u32* abort;
  Report* report;
  u64 header[HEADER_WORDS];
  u64 bytes;        // of one part
  u64 source_bytes; // of the windows that the sides lie in, in direct forms
  u64 target_bytes;
  u64 patience_ns;  // 0 is for ever
  u32 rank;
  u32 root;
  u32 tile;         // vectors of 16 bytes that a block moves in one round
  u32 is_same;      // whether input and output are the same memory
};

static_assert(sizeof(Args) == ARGS_BYTES, "the host lays arguments out differently");

// What a kernel works on.
enum What { A_CALL, A_SEND, A_RECEIVE };

struct Entry {
  u64 started_ns;
  u32 epoch;
  bool is_poisoned;
  u8 late;  // in 8 bits, so that what waits keep in memory is no larger
  u32 what;
  u32 tag;  // of a message

  // What it is known by: the epoch of a call.
  __device__ __forceinline__ u32 number() const { return what == A_CALL ? epoch : tag; }
};

// One lane of those that run.
__device__ __forceinline__ bool is_leader() {
  return (threadIdx.x & 31) == __ffs(__activemask()) - 1;
}

// Tells the host why this rank gave up, unless that was told already, and ends all waits of this device.
__device__ __noinline__ void give_up(const Args& args, u32 reason, u32 peer, u32 epoch, u64 expected, u64 seen,
                                     u64 waited_ns) {
  if (swap_own(&args.state->reported, 0, 1) == 0) {
    Report* report = args.report;
    store_word(&report->peer, peer);
    store_word(&report->epoch, epoch);
    store_word(&report->expected, expected);
    store_word(&report->seen, seen);
    store_word(&report->waited_ns, waited_ns);
    // SYNC: what a report says is visible before its reason.
    fence_all();
    store_word(&report->reason, reason);
  }
  store_own_word(&args.state->poison, 1);
}

// Looked at now and then by whoever waits for `peer`, or for others of this rank; true if it must leave.
__device__ __noinline__ bool must_leave(const Args& args, const Entry& entry, u32 spins, u32 peer, u64 seen) {
  if (load_own_word(&args.state->poison) != 0) return true;
  if ((spins & 1023) != 0 || !is_leader()) return false;
  // The host knows the cause, but not that a call ended without its data.
  if (load_short_word(args.abort) != 0) {
    give_up(args, REASON_ABORTED, peer, entry.epoch, entry.epoch, seen, 0);
    return true;
  }
  // Others of this rank wait for a peer, and tell which.
  if (peer == args.rank) return false;
  u64 waited_ns = now_ns() - entry.started_ns;
  if (waited_ns > 500000000) {
    store_word(&args.report->waiting, u64(entry.number()) << 32 | entry.what << 16 | (peer + 1));
  }
  if (args.patience_ns == 0 || waited_ns < args.patience_ns) return false;
  give_up(args, REASON_TIMEOUT, peer, entry.number(), entry.what, seen, waited_ns);
  return true;
}

// After a wait: nobody is waited for any more.
__device__ __forceinline__ void end_wait(const Args& args, u32 spins) {
  if (spins >= 1024) store_word(&args.report->waiting, 0);
}

// The spin primitive: polls until `is_ready` or until one must leave; true if it is ready.
template <class Poll>
__device__ __forceinline__ bool wait_until(const Args& args, const Entry& entry, u32 peer, Poll is_ready) {
  u32 spins = 0;
  while (!is_ready()) {
    if ((++spins & 63) == 0 && must_leave(args, entry, spins, peer, 0)) return false;
  }
  end_wait(args, spins);
  return true;
}

// Packets: 12 bytes of data and the epoch that makes them valid.
#if HOST_PACKETS
// Host memory gives 8 bytes at a time: 4 of data and 4 of epoch.
__device__ __forceinline__ void put_packet(u8* at, const u32* words, u32 epoch) {
  u64* to = reinterpret_cast<u64*>(at);
#pragma unroll
  for (int i = 0; i < 3; i++) store_word(to + i, u64(epoch) << 32 | words[i]);
}

__device__ __forceinline__ bool take_packet(const u8* at, u32* words, u32 epoch) {
  const u64* from = reinterpret_cast<const u64*>(at);
  bool is_there = true;
#pragma unroll
  for (int i = 0; i < 3; i++) {
    u64 word = load_word(from + i);
    words[i] = u32(word);
    is_there &= u32(word >> 32) == epoch;
  }
  return is_there;
}
#else
__device__ __forceinline__ void put_packet(u8* at, const u32* words, u32 epoch) {
  store_line(at, make_uint4(words[0], words[1], words[2], epoch));
}

__device__ __forceinline__ bool take_packet(const u8* at, u32* words, u32 epoch) {
  uint4 line = load_line(at);
  words[0] = line.x, words[1] = line.y, words[2] = line.z;
  return line.w == epoch;
}
#endif

// The half of everything that epoch `epoch` uses.
__device__ __forceinline__ u64 half_of(u32 epoch) { return epoch & 1; }

__device__ __forceinline__ u64 header_at(u32 epoch, u32 source) {
  return HEADERS_AT + (half_of(epoch) * RANKS + source) * HEADER_BYTES;
}

// Word `i` of the header as packets carry it: the 16 halves of its words, then nothing.
__device__ __forceinline__ u32 header_half(const Args& args, u32 i) {
  return i < 2 * HEADER_WORDS ? u32(args.header[i / 2] >> (i % 2 * 32)) : 0;
}

// The scalar of a pre-multiplied sum and places in windows are each rank's own: told, not compared.
__device__ __forceinline__ bool must_agree(u32 i) { return i / 2 != HEADER_SCALAR && i / 2 < HEADER_OFFSETS; }

__device__ __forceinline__ Record* record_of(const Args& args, const Entry& entry) {
  return reinterpret_cast<Record*>(reinterpret_cast<u8*>(args.state) + RECORDS_AT) + entry.epoch % RECORDS;
}

// Lanes of one warp: what this call is.
__device__ __forceinline__ void record_call(const Args& args, const Entry& entry, u32 lane) {
  if (lane > 5) return;
  const u64 epoch = u64(entry.epoch) << 32, *header = args.header;
  u64 word = epoch;
  if (lane == 0) word = epoch | u32(header[HEADER_LAUNCH]);
  if (lane == 1) word = entry.started_ns;
  if (lane == 2) word = header[0];
  if (lane == 3) word = header[1];
  if (lane == 5) word = header[4] != 0 ? header[4] : header[2] << 32 | u32(header[3]);
  store_word(reinterpret_cast<u64*>(record_of(args, entry)) + lane, word);
}

// Every block, where it is through with its part of the data.
__device__ __forceinline__ void record_end(const Args& args, const Entry& entry) {
  if (args.bytes >= STAMPED_BYTES && threadIdx.x == 0) raise_own_later(&record_of(args, entry)->ended_ns, now_ns());
}

// All threads of a block, a warp for each peer: lane l sends and compares packet l. READY: whoever sees our header may read our
// input where it lies.
template <bool READY>
__device__ void exchange_headers(const Args& args, const Entry& entry) {
  // SYNC: what this device did before the call is visible to peers after our header.
  if (READY) fence_all();
  const u32 lane = threadIdx.x & 31, me = args.rank;
  u32 mine[3];
#pragma unroll
  for (u32 i = 0; i < 3; i++) mine[i] = header_half(args, 3 * lane + i);
  // Where there are fewer warps than peers, nobody waits before all are told.
  for (u32 peer = threadIdx.x / 32; peer < RANKS; peer += blockDim.x / 32) {
    if (peer == me || lane >= HEADER_PACKETS) continue;
    put_packet(args.arenas[peer] + header_at(entry.epoch, me) + lane * PACKET_BYTES, mine, entry.epoch);
  }
  bool has_met = true;
  for (u32 peer = threadIdx.x / 32; peer < RANKS; peer += blockDim.x / 32) {
    if (peer == me) record_call(args, entry, lane);
    if (peer == me || lane >= HEADER_PACKETS) continue;
    u32 theirs[3];
    const u8* at = args.arenas[me] + header_at(entry.epoch, peer) + lane * PACKET_BYTES;
    bool is_there = wait_until(args, entry, peer, [&] { return take_packet(at, theirs, entry.epoch); });
    has_met &= is_there;
    bool differs = false;
#pragma unroll
    for (u32 i = 0; i < 3; i++) differs |= must_agree(3 * lane + i) && mine[i] != theirs[i];
    constexpr u32 lanes = (1u << HEADER_PACKETS) - 1;
    if (!__all_sync(lanes, is_there) || !__any_sync(lanes, differs)) continue;
    // One warp tells: it owns the report before it writes the headers into it.
    u32 before = lane == 0 ? swap_own(&args.state->reported, 0, 1) : 0;
    if (__shfl_sync(lanes, before, 0) == 0) {
#pragma unroll
      for (u32 i = 0; i < 3; i++) {
        args.report->mine[3 * lane + i] = mine[i];
        args.report->theirs[3 * lane + i] = theirs[i];
      }
      fence_all();
      __syncwarp(lanes);
      if (lane == 0) {
        store_word(&args.report->peer, peer);
        store_word(&args.report->epoch, entry.epoch);
        fence_all();
        store_word(&args.report->reason, REASON_MISMATCH);
      }
    }
    store_own_word(&args.state->poison, 1);
  }
  has_met = __syncthreads_and(has_met);
  if (has_met && threadIdx.x == 0) store_word(&record_of(args, entry)->met_ns, now_ns());
}

// Word `word` of the header of rank `peer`, which may be us.
__device__ __forceinline__ bool header_word(const Args& args, const Entry& entry, u32 peer, u32 word, u64* value) {
  if (peer == args.rank) {
    *value = args.header[word];
    return true;
  }
  u32 halves[2];
#pragma unroll
  for (u32 i = 0; i < 2; i++) {
    u32 half = 2 * word + i, words[3];
    const u8* at = args.arenas[args.rank] + header_at(entry.epoch, peer) + half / 3 * PACKET_BYTES;
    if (!wait_until(args, entry, peer, [&] { return take_packet(at, words, entry.epoch); })) return false;
    halves[i] = half % 3 == 0 ? words[0] : half % 3 == 1 ? words[1] : words[2];
  }
  *value = u64(halves[1]) << 32 | halves[0];
  return true;
}

__device__ __forceinline__ bool is_header_block() { return blockIdx.x == gridDim.x - 1; }

// Blocks that move data.
__device__ __forceinline__ u32 workers() { return gridDim.x - 1; }

// Twice in 2³² epochs: no tag in the arena is ever so old that it could be mistaken. Everybody clears its own arena, and
// nobody sends before all have: what was sent to us before this epoch was received in its own.
__device__ __noinline__ bool renew(const Args& args, const Entry& entry) {
  State* state = args.state;
  const u32 epoch = entry.epoch, opened = epoch ^ 1;
  const u32 never = epoch == 0 ? 0xffffffff : 0;
  u8* arena = args.arenas[args.rank];
  u64 step = u64(gridDim.x) * blockDim.x * 16, first = (u64(blockIdx.x) * blockDim.x + threadIdx.x) * 16;
  for (u64 at = first; at < TAGGED_BYTES; at += step) {
    bool is_flag = at >= FLAGS_AT && at < FLAGS_AT + FLAGS_BYTES;
    uint4 fill = is_flag ? make_uint4(0, epoch - 1, 0, epoch - 1) : make_uint4(never, never, never, never);
    *reinterpret_cast<uint4*>(arena + at) = fill;
  }
  // Leaves of rows are tagged as well.
  for (u64 at = first; at < LEAVES_BYTES; at += step) {
    *reinterpret_cast<uint4*>(reinterpret_cast<u8*>(state) + LEAVES_AT + at) = make_uint4(0, 0, 0, never);
  }
  __syncthreads();
  bool is_open = true;
  if (threadIdx.x == 0) {
    fence_all();
    count_own(&state->cleared, 1);
  }
  if (is_header_block()) {
    // All of ours are clear; tell every peer, and wait for every peer.
    if (threadIdx.x < RANKS) {
      is_open = wait_until(args, entry, threadIdx.x, [&] { return load_own_word(&state->cleared) == gridDim.x; });
      fence_all();
      u64* gates = reinterpret_cast<u64*>(args.arenas[threadIdx.x] + GATES_AT);
      store_word(gates + args.rank, opened);
      const u64* gate = reinterpret_cast<const u64*>(arena + GATES_AT) + threadIdx.x;
      is_open = is_open && wait_until(args, entry, threadIdx.x, [&] { return load_word(gate) == opened; });
      fence_all();
    }
    is_open = __syncthreads_and(is_open);
    if (threadIdx.x == 0 && is_open) {
      store_own_word(&state->cleared, 0);
      fence_own();
      store_own_word(&state->open, opened);
    }
  } else if (threadIdx.x == 0) {
    is_open = wait_until(args, entry, args.rank, [&] { return load_own_word(&state->open) == opened; });
    fence_all();
  }
  return __syncthreads_and(is_open);
}

// Every thread of every block calls this first, in kernels that have no epoch of their own. If it answers poison, the block leaves.
__device__ __forceinline__ Entry begin(const Args& args) {
  __shared__ Entry shared;
  // SYNC: kernels of a communicator follow each other: what the one before wrote is visible, its packets were read, its epoch is over.
  await_kernel_before();
  let_next_begin();
  if (threadIdx.x == 0) {
    State* state = args.state;
    shared.epoch = load_own_word(&state->epoch) + 1;
    shared.late = u8(load_own_word(&state->late) & 1);
    shared.started_ns = now_ns();
    shared.is_poisoned = load_own_word(&state->poison) != 0;
    if (is_header_block() && !shared.is_poisoned) {
      u32 expected = load_own_word(&state->expected);
      u32 left = load_own_word(&state->left);
      // Blocks of this very kernel may have left already: more is fine.
      if (i32(left - expected) < 0) {
        give_up(args, REASON_CONCURRENT, args.rank, shared.epoch, expected, left, 0);
        shared.is_poisoned = true;
      }
      store_own_word(&state->expected, expected + gridDim.x);
    }
  }
  __syncthreads();
  Entry entry = shared;
  entry.what = A_CALL;
  entry.tag = 0;
  return entry;
}

// The same, in kernels that have the next epoch.
__device__ __forceinline__ Entry enter(const Args& args) {
  Entry entry = begin(args);
  if (!entry.is_poisoned && (entry.epoch & 0x7fffffff) == 0) entry.is_poisoned = !renew(args, entry);
  return entry;
}

// Whether peers may not have taken all that the call sends in lines when it is over (units.cuh).
__device__ __forceinline__ bool fills_an_area(const Args& args) {
  const u32 form = args.header[HEADER_LAUNCH] & 0xff;
  return form == ONE_SHOT_LINES || (form == TWO_SHOT_LINES && (args.header[0] & 0xff) == REDUCE_CODE);
}

// One thread of every block calls this once after `enter`, where it has something to wait for anyhow.
__device__ __forceinline__ void arrive(const Args& args, const Entry& entry) {
  if (threadIdx.x != 0) return;
  // SYNC: every block has read the epoch, and which area of lines is late, before the last of them moves them. This thread has both: its
  // loads have answered, so nothing that is stored from now on can change them. A release would say the same, and be compiled to a fence
  // that waits for all packets that this multiprocessor has under way to peers, just when theirs arrive here.
  if (count_own_now(&args.state->arrivals, 1) == gridDim.x - 1) {
    store_own_word(&args.state->arrivals, 0);
    if (fills_an_area(args)) store_own_word(&args.state->late, entry.late ^ 1u);
    store_own_word(&args.state->epoch, entry.epoch);
  }
}

// The last thing that a block does.
__device__ __forceinline__ void leave(const Args& args) {
  if (threadIdx.x == 0) count_own_later(&args.state->left, 1);
}
