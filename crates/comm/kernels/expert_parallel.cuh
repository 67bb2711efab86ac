// The ground of expert parallelism on the device: how the kernels of a buffer meet those of its peers, and do without ranks that are lost.
//
// A buffer has memory, words of its own and a page of reports as a communicator has them, so call.cuh and flags.cuh serve it: a kernel that
// meets others is a round, and rounds are the epochs of that memory. Every rank takes part in every round, in one order.
//
// Header. The last block of a grid sends each peer what the round is, and what the others must know of this rank: where its rows lie, how many.
// The first words are compared. All blocks read what peers tell in the packets that arrived, so nobody waits for that block.
// Hearing round e of a peer proves that its kernels before are done, so the half of e − 1 may be written in e + 1.
//
// End. Every block counts itself when all that it stored is through; the last one tells the peers, and waits until they tell us. Then what
// they stored for us is there, and they have read what they wanted. The other blocks wait for nobody at the end.
//
// Left out. Where that is asked for, a rank that is lost or silent is left out instead of failing the call. Each rank has a word in its own
// memory: the rounds in which it took part, and whether it was closed. It moves that by compare-and-swap once all it pushed is through,
// and any peer closes it by compare-and-swap, over the link. So the word says once and for all in which rounds the rank took part, and all
// survivors agree. Whoever closes one tells every rank, in a word of that rank's own: nobody else has to wait until it has doubts itself.
// Memory of a process that died stays readable as long as it is mapped. A rank that was closed finds out when it waits, or would take part,
// and gives up; it closes nobody then.

#pragma once

#include "element.cuh"
#include "flags.cuh"

enum BufferReason { REASON_GIVEN_UP = 16, REASON_DAMAGED };

// Halves of header words: those that are compared, then what a rank tells.
constexpr u32 COMPARED = 10, TOLD = 8;

// What a rank tells in a round. Places are lines of 128 bytes from the start of its memory.
struct Told {
  u32 rows;
  u32 x_at;
  u32 scales_at;
  u32 indices_at;
  u32 weights_at;
  u32 tokens_at;
  u32 call;    // for messages
  u32 tokens;  // of its own
};

static_assert(sizeof(Told) == TOLD * 4 && COMPARED + TOLD <= 2 * HEADER_WORDS, "what a header has room for");

struct BufferArgs : Args {
  const u64* suspects;  // host memory: ranks that are lost, by bits
  u64* masked;          // host memory: a word for each rank that is left out
  u64 deadline_ns;      // after which a silent rank is left out, where that is asked for
  u64 memory_bytes;     // of each rank
  u32 is_masking;
  u32 counts_stride;
};

static_assert(sizeof(BufferArgs) == BUFFER_ARGS_BYTES, "the host lays arguments out differently");

// Behind the words that every communicator has.
struct BufferState {
  u32 finished;  // blocks of the running kernel that are through
  u32 reserved;
  u32 masked[MAX_RANKS];
};

__device__ __forceinline__ BufferState* words_of(const BufferArgs& buffer) {
  return reinterpret_cast<BufferState*>(reinterpret_cast<u8*>(buffer.state) + BUFFER_STATE_AT);
}

__device__ __forceinline__ bool is_masked(const BufferArgs& buffer, u32 peer) {
  return buffer.is_masking != 0 && load_own_word(&words_of(buffer)->masked[peer]) != 0;
}

// Lines of 128 bytes from the start of the memory of a rank.
__device__ __forceinline__ u8* line_of(const BufferArgs& buffer, u32 rank, u32 line) {
  return buffer.arenas[rank] + u64(line) * 128;
}

// Rounds in which the rank took part << 1 | whether it takes part no more.
__device__ __forceinline__ u64* attendance_of(const BufferArgs& buffer, u32 rank) {
  return reinterpret_cast<u64*>(buffer.arenas[rank] + ATTENDANCE_AT);
}

// In the memory of `rank`: the ranks that somebody closed, by bits.
__device__ __forceinline__ u64* closed_of(const BufferArgs& buffer, u32 rank) { return attendance_of(buffer, rank) + 1; }

// Those that this rank knows of.
__device__ __forceinline__ u64 closed_ranks(const BufferArgs& buffer) {
  return buffer.is_masking != 0 ? load_word(closed_of(buffer, buffer.rank)) : 0;
}

// Whether `peer` is closed, lost, or silent for too long. A rank that was closed itself gives up, and suspects nobody.
__device__ __forceinline__ bool is_suspect(const BufferArgs& buffer, const Entry& entry, u32 peer) {
  const u64 mine = load_word(attendance_of(buffer, buffer.rank));
  if ((mine & 1) != 0) {
    give_up(buffer, REASON_GIVEN_UP, buffer.rank, entry.epoch, 0, mine, 0);
    return false;
  }
  const u64 suspects = closed_ranks(buffer) | load_word(buffer.suspects);
  return (suspects >> peer & 1) != 0 || now_ns() - entry.started_ns >= buffer.deadline_ns;
}

// Closes the attendance of `peer`, unless somebody has, and tells everybody; the rounds in which it took part.
__device__ __forceinline__ u32 close_attendance(const BufferArgs& buffer, u32 peer) {
  u64* word = attendance_of(buffer, peer);
  u64 seen = load_word(word);
  while ((seen & 1) == 0) {
    const u64 before = swap_word(word, seen, seen | 1);
    if (before == seen) break;
    seen = before;
  }
  for (u32 rank = 0; rank < RANKS; rank++) atomicOr_system(closed_of(buffer, rank), u64(1) << peer);
  // SYNC: what a rank pushed in a round is visible to who sees that it took part in it.
  fence_all();
  return u32(seen >> 1);
}

__device__ __forceinline__ void leave_out(const BufferArgs& buffer, u32 peer) {
  store_own_word(&words_of(buffer)->masked[peer], 1);
  store_word(buffer.masked + peer, 1);
}

enum Judgement { IS_AWAITED, TOOK_PART, IS_LEFT_OUT };

// Looked at now and then by whoever waits for `peer` where ranks may be left out.
__device__ __noinline__ Judgement judge(const BufferArgs& buffer, const Entry& entry, u32 spins, u32 peer) {
  if (is_masked(buffer, peer)) return IS_LEFT_OUT;
  if ((spins & 1023) != 0 || !is_suspect(buffer, entry, peer)) return IS_AWAITED;
  if (i32(close_attendance(buffer, peer) - entry.epoch) >= 0) return TOOK_PART;
  leave_out(buffer, peer);
  return IS_LEFT_OUT;
}

enum Came { CAME, LEFT_OUT, MUST_LEAVE };

// Waits for something of `peer`. A flag says no more than that the rank took part in the round; other things are there then, too.
template <bool IS_FLAG, class Poll>
__device__ __forceinline__ Came wait_for_rank(const BufferArgs& buffer, const Entry& entry, u32 peer, Poll is_ready) {
  u32 spins = 0;
  while (!is_ready()) {
    if ((++spins & 63) != 0) continue;
    if (must_leave(buffer, entry, spins, peer, 0)) return MUST_LEAVE;
    if (!buffer.is_masking) continue;
    const Judgement judgement = judge(buffer, entry, spins, peer);
    if (judgement == IS_LEFT_OUT) return LEFT_OUT;
    if (judgement == IS_AWAITED) continue;
    if (IS_FLAG || is_ready()) break;
    give_up(buffer, REASON_DAMAGED, peer, entry.epoch, entry.epoch, 0, 0);
    return MUST_LEAVE;
  }
  end_wait(buffer, spins);
  return CAME;
}

// Enters a round: all threads of every block. If it answers poison, the block leaves.
__device__ __forceinline__ Entry enter_round(const BufferArgs& buffer) {
  Entry entry = enter(buffer);
  // Whoever waits says in which operation.
  entry.what = 16 + u32(buffer.header[0] & 0xff);
  entry.tag = entry.epoch;
  if (!entry.is_poisoned) arrive(buffer, entry);
  return entry;
}

// The last block, all threads, a warp for each peer: lane l sends and compares packet l. IS_READABLE: whoever hears us may read our rows. False
// in threads that must leave.
template <bool IS_READABLE>
__device__ bool greet(const BufferArgs& buffer, const Entry& entry) {
  // SYNC: what this device did before the round is visible to peers after our header.
  if (IS_READABLE) fence_all();
  const u32 lane = threadIdx.x & 31, me = buffer.rank;
  constexpr u32 lanes = (1u << HEADER_PACKETS) - 1;
  bool goes_on = true;
  for (u32 peer = threadIdx.x / 32; peer < RANKS; peer += blockDim.x / 32) {
    const bool is_out = __any_sync(~0u, is_masked(buffer, peer));
    if (peer == me || is_out || lane >= HEADER_PACKETS) continue;
    u32 mine[3], theirs[3];
#pragma unroll
    for (u32 i = 0; i < 3; i++) mine[i] = header_half(buffer, 3 * lane + i);
    put_packet(buffer.arenas[peer] + header_at(entry.epoch, me) + lane * PACKET_BYTES, mine, entry.epoch);
    const u8* at = buffer.arenas[me] + header_at(entry.epoch, peer) + lane * PACKET_BYTES;
    const Came came = wait_for_rank<false>(buffer, entry, peer, [&] { return take_packet(at, theirs, entry.epoch); });
    goes_on &= came != MUST_LEAVE;
    bool differs = false;
#pragma unroll
    for (u32 i = 0; i < 3; i++) differs |= 3 * lane + i < COMPARED && mine[i] != theirs[i];
    if (!__all_sync(lanes, came == CAME) || !__any_sync(lanes, differs)) continue;
    goes_on = false;
    // One warp tells: it owns the report before it writes the headers into it.
    const u32 before = lane == 0 ? swap_own(&buffer.state->reported, 0, 1) : 0;
    if (__shfl_sync(lanes, before, 0) == 0) {
#pragma unroll
      for (u32 i = 0; i < 3; i++) {
        buffer.report->mine[3 * lane + i] = mine[i];
        buffer.report->theirs[3 * lane + i] = theirs[i];
      }
      // SYNC: what a report says is visible before its reason.
      fence_all();
      __syncwarp(lanes);
      if (lane == 0) {
        store_word(&buffer.report->peer, peer);
        store_word(&buffer.report->epoch, entry.epoch);
        fence_all();
        store_word(&buffer.report->reason, REASON_MISMATCH);
      }
    }
    store_own_word(&buffer.state->poison, 1);
  }
  return goes_on;
}

// All threads of a block: what every rank tells in this round; no rows of those that are left out. `bytes` are those of a row in each of the places
// behind `rows`, and places that lie outside of the memory are damage. IS_READABLE: their rows are read. False if the block must leave.
template <bool IS_READABLE>
__device__ __forceinline__ bool learn(const BufferArgs& buffer, const Entry& entry, const u32 (&bytes)[5], Told* told) {
  constexpr u32 FIRST = COMPARED / 3, PACKETS = (COMPARED + TOLD + 2) / 3 - FIRST;
  const u32 me = buffer.rank;
  bool goes_on = true;
  for (u32 i = threadIdx.x; i < RANKS * PACKETS; i += blockDim.x) {
    const u32 peer = i / PACKETS, packet = FIRST + i % PACKETS;
    u32 words[3] = {0, 0, 0};
    if (peer == me) {
#pragma unroll
      for (u32 j = 0; j < 3; j++) words[j] = header_half(buffer, 3 * packet + j);
    } else {
      const u8* at = buffer.arenas[me] + header_at(entry.epoch, peer) + packet * PACKET_BYTES;
      const Came came = is_masked(buffer, peer)
                            ? LEFT_OUT
                            : wait_for_rank<false>(buffer, entry, peer, [&] { return take_packet(at, words, entry.epoch); });
      goes_on &= came != MUST_LEAVE;
      if (came != CAME) words[0] = words[1] = words[2] = 0;
    }
    u32* to = reinterpret_cast<u32*>(told + peer);
#pragma unroll
    for (u32 j = 0; j < 3; j++) {
      const u32 half = 3 * packet + j;
      if (half >= COMPARED && half < COMPARED + TOLD) to[half - COMPARED] = words[j];
    }
    // SYNC: what this device did before the round is visible to peers after our header.
    if (IS_READABLE) fence_all();
  }
  goes_on = __syncthreads_and(goes_on);
  if (threadIdx.x < RANKS && goes_on) {
    Told& of = told[threadIdx.x];
    if (is_masked(buffer, threadIdx.x)) of.rows = 0;
    const u32 places[5] = {of.x_at, of.scales_at, of.indices_at, of.weights_at, of.tokens_at};
#pragma unroll
    for (int i = 0; i < 5; i++) {
      if (u64(places[i]) * 128 + u64(of.rows) * bytes[i] > buffer.memory_bytes) goes_on = false;
    }
    if (!goes_on) give_up(buffer, REASON_DAMAGED, threadIdx.x, entry.epoch, buffer.memory_bytes, of.rows, 0);
  }
  return __syncthreads_and(goes_on);
}

// All threads of every block, when it is through: whether it is the last one of the grid. Copies out were waited for.
__device__ __forceinline__ bool is_last_block(const BufferArgs& buffer) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    // SYNC: what all blocks of a rank stored in a round, and that they read what was there, is visible after its flag.
    fence_all();
    BufferState* state = words_of(buffer);
    is_last = count_own(&state->finished, 1) == gridDim.x - 1;
    if (is_last) store_own_word(&state->finished, 0);
  }
  __syncthreads();
  return is_last;
}

// Moves our attendance on. False if we were left out.
__device__ __forceinline__ bool attend(const BufferArgs& buffer, const Entry& entry) {
  if (!buffer.is_masking) return true;
  // SYNC: what a rank pushed in a round is visible to who sees that it took part in it.
  fence_all();
  const u64 before = u64(entry.epoch - 1) << 1, seen = swap_word(attendance_of(buffer, buffer.rank), before, u64(entry.epoch) << 1);
  if (seen == before) return true;
  give_up(buffer, REASON_GIVEN_UP, buffer.rank, entry.epoch, before, seen, 0);
  return false;
}

// The last block, all threads: tells all ranks that this one is through, and waits until all are. False if one must leave.
__device__ __forceinline__ bool meet(const BufferArgs& buffer, const Entry& entry) {
  const bool is_in = __syncthreads_and(threadIdx.x != 0 || attend(buffer, entry));
  if (!is_in) return false;
  bool goes_on = true;
  const u32 peer = threadIdx.x;
  Entry since = entry;
  // Who came later than we did may still have to lose its patience with a rank that we have left out: ours with it begins anew.
  if (buffer.is_masking) since.started_ns = now_ns();
  if (peer < RANKS && peer != buffer.rank && !is_masked(buffer, peer)) {
    // SYNC: what all blocks of a rank stored in a round, and that they read what was there, is visible after its flag.
    fence_all();
    set_flag(buffer, entry, 0, peer, 0, 0);
    const u64* flag = reinterpret_cast<const u64*>(buffer.arenas[buffer.rank] + flag_at(0, 0, peer, 0));
    const u64 due = due_in(entry, 0);
    const Came came = wait_for_rank<true>(buffer, since, peer, [&] { return i64(load_word(flag) - due) >= 0; });
    // SYNC: what all blocks of a rank stored in a round, and that they read what was there, is visible after its flag.
    acquire_word(flag);
    goes_on = came != MUST_LEAVE;
  }
  return __syncthreads_and(goes_on);
}
