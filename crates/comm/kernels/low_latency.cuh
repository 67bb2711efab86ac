// Low-latency calls of expert parallelism: what dispatch and combine stand on. Every rank writes into the memory of its peers; nobody
// reads across a link.
//
// Calls are numbered for ever, on the device (Progress), so a graph goes on where calls before it ended. They use two halves of the memory
// in turn. In a half each rank has a place of its own for each of its tokens, at every receiver. There is no barrier: whatever is stored
// comes with the number of the call, or is told by a word that gets it. So nothing is cleared, and no number comes twice.
//
//   head     tokens of the call and what it is; in a dispatch the selections of each expert          packets, for each receiver
//   choices  of a token: which experts of the receiver, and what goes with each; also that none      packets, for each token
//   piece    PIECE elements of a row, perhaps cast, with their scales                                told for each piece
//
// A packet is 8 bytes and the number, stored and loaded at once: whoever sees the number sees the bytes. Nothing waits until they have
// arrived, as the fence behind a piece does.
//
// A warp works on a piece, or on the choices of a token, alone; of a piece it stores, meets, fences, tells. Pieces are dealt to the warps of
// the grid whatever its size. All sending of a warp comes before all that waits for a peer's call of this number, but for the results of a combine,
// which wait for choices; and no choice waits for anything of this call. So the blocks of a kernel wait for nobody in a circle, as long
// as they run at once.
//
// Who has read a call tells every rank (its credit), before which nobody writes into that half again: two calls may be sent and not
// read. A rank that is left out (masked) is waited for no more. The last block then does the receiving part once more without it, for the
// whole call: so it took part in all sums of a rank or in none. The same where a rank is found closed at the end, though all of it came.
//
// Over 500 lines because both operations need all of it, and none of it alone.

#pragma once

#include "expert_parallel.cuh"
#include "quantised.cuh"

enum Phase { SENDS = 1, RECEIVES = 2 };
enum Cast { UNCAST, CAST_F32, CAST_POWER_OF_TWO, CAST_UE8M0 };

// A selection that cannot be, or is not that of the dispatch: `peer` says whose, then the token and what is wrong.
constexpr u32 REASON_CHOICE = REASON_DAMAGED + 1;

// The word of a header that says which call it is, for messages.
constexpr u32 NUMBERED = 8;
// Packets of a head: the number of tokens, and of the call what is compared and what is told.
constexpr u32 HEAD_PACKETS = 2 + COMPARED / 2;
static_assert(HEAD_PACKETS * PACKET_BYTES <= PLACE_STRIDE && NUMBERED < HEADER_WORDS, "a head has room for what is told of a call");

constexpr u32 WARP = 32, STEP = WARP * LANE_ELEMENTS, STEPS = PIECE / STEP, PIECE_SCALES = PIECE / GROUP, NOBODY = 0xffffffff;
constexpr u32 ALL_RANKS = (1u << RANKS) - 1;

// In memory of this device.
struct Progress {
  u64 sent;                  // calls
  u64 received;
  u64 heard_ns[MAX_RANKS];   // when something of a rank came that was waited for
  u32 left_out;              // ranks that had no part in the latest call that was received, by bits
  u32 reserved;
};

static_assert(sizeof(Progress) == PROGRESS_BYTES, "the host makes another one");

struct LowLatency {
  BufferArgs buffer;
  Progress* progress;
  // Where things lie in the memory of each rank, and in a half: see LowLatencyLayout.
  u64 credits_at;
  u64 halves[2];
  u64 counts_at;
  u64 choices_at;
  u64 pieces_told_at;
  u64 scales_at;
  u64 rows_at;
  const u8* x;
  const i64* selections;     // tokens × top-k
  const f32* weights;        // the same
  const u32* placement;      // of each expert: rank << 24 | its number there
  u8* out;
  u32* out_scales;
  i32* counts;               // rows of each of our experts
  i64* ranges;               // our experts × ranks
  i32* source_tokens;        // our experts × rows
  i32* slots;                // ranks × capacity × top-k: the row of each selection
  i64* waited;               // ranks
  u32 tokens;
  u32 top_k;
  u32 hidden;
  u32 experts;
  u32 per_rank;              // experts of each rank, in equal blocks; 0: where the placement says
  u32 capacity;
  u32 most_top_k;
  u32 most_experts;          // of a rank
  u32 pieces;
  u32 row_scales;
  u32 row_stride;
  u32 phases;
  u32 cast;
  u32 reserved;
  u32 experts_of[MAX_RANKS];
};

static_assert(sizeof(LowLatency) == LOW_LATENCY_BYTES, "the host lays arguments out differently");
static_assert(sizeof(LowLatency) <= 4096, "arguments of a kernel");

__device__ __forceinline__ u32 lane_of_warp() { return threadIdx.x % WARP; }

// Rows of an expert's block.
__device__ __forceinline__ u32 block_rows(const LowLatency& ll) { return RANKS * ll.capacity; }

// What call `number` uses in the memory of `rank`.
__device__ __forceinline__ u8* half_at(const LowLatency& ll, u32 rank, u64 number) {
  return ll.buffer.arenas[rank] + ll.halves[number & 1];
}

__device__ __forceinline__ u64* credit_of(const LowLatency& ll, u32 rank, u32 reader) {
  return reinterpret_cast<u64*>(ll.buffer.arenas[rank] + ll.credits_at + reader * PLACE_STRIDE);
}

__device__ __forceinline__ u8* head_of(const LowLatency& ll, u32 rank, u64 number, u32 source) {
  return half_at(ll, rank, number) + source * PLACE_STRIDE;
}

// Two counts in each packet.
__device__ __forceinline__ u8* counts_of(const LowLatency& ll, u32 rank, u64 number, u32 source) {
  return half_at(ll, rank, number) + ll.counts_at + u64(source) * ((ll.most_experts + 1) / 2) * PACKET_BYTES;
}

__device__ __forceinline__ u64 place_of(const LowLatency& ll, u32 source, u32 token) { return u64(source) * ll.capacity + token; }

// A packet for each selection.
__device__ __forceinline__ u8* choices_in(const LowLatency& ll, u32 rank, u64 number, u32 source, u32 token) {
  return half_at(ll, rank, number) + ll.choices_at + place_of(ll, source, token) * ll.most_top_k * PACKET_BYTES;
}

__device__ __forceinline__ u64* piece_told(const LowLatency& ll, u32 rank, u64 number, u32 source, u32 token, u32 piece) {
  return reinterpret_cast<u64*>(half_at(ll, rank, number) + ll.pieces_told_at) + place_of(ll, source, token) * ll.pieces + piece;
}

__device__ __forceinline__ u32* scales_in(const LowLatency& ll, u32 rank, u64 number, u32 source, u32 token) {
  return reinterpret_cast<u32*>(half_at(ll, rank, number) + ll.scales_at) + place_of(ll, source, token) * ll.row_scales;
}

__device__ __forceinline__ u8* row_in(const LowLatency& ll, u32 rank, u64 number, u32 source, u32 token) {
  return half_at(ll, rank, number) + ll.rows_at + place_of(ll, source, token) * ll.row_stride;
}

__device__ __forceinline__ void put_word(u8* at, u64 word, u64 number) {
  store_line(at, make_uint4(u32(word), u32(word >> 32), u32(number), u32(number >> 32)));
}

// Whether the packet is that of call `number`.
__device__ __forceinline__ bool take_word(const u8* at, u64 number, u64* word) {
  const uint4 line = load_line(at);
  *word = u64(line.y) << 32 | line.x;
  return (u64(line.w) << 32 | line.z) == number;
}

// The selections of an expert that a rank told.
__device__ __forceinline__ bool take_count(const LowLatency& ll, u64 number, u32 source, u32 expert, u32* count) {
  u64 both;
  const bool is_there = take_word(counts_of(ll, ll.buffer.rank, number, source) + u64(expert / 2) * PACKET_BYTES, number, &both);
  *count = u32(both >> (expert % 2 * 32));
  return is_there;
}

// A call of this buffer, as kernels tell what they wait for.
__device__ __forceinline__ u32 work_of(const BufferArgs& buffer) { return 16 + u32(buffer.header[0] & 0xff); }

// Warps of the grid, those of different multiprocessors side by side. What comes first in a call is dealt from the first one on, and what
// waits for it at peers from the last one back: as long as there are enough blocks, none has both.
__device__ __forceinline__ u32 warp_of_grid() { return threadIdx.x / WARP * gridDim.x + blockIdx.x; }

__device__ __forceinline__ u32 warps_of_grid() { return blockDim.x / WARP * gridDim.x; }

__device__ __forceinline__ u32 warp_from_end() { return warps_of_grid() - 1 - warp_of_grid(); }

// Behind the blocks that tell heads, which the rest of what comes first begins behind.
__device__ __forceinline__ u32 warp_behind_heads() {
  const u32 warp = warp_of_grid();
  return warp >= RANKS ? warp - RANKS : warp + warps_of_grid() - RANKS;
}

// What a block knows of its kernel, in shared memory.
struct Turn {
  Entry entry;
  u64 sent, received;  // the numbers of the calls that it sends and receives
  u64 credits[RANKS];  // of each reader, at the beginning
  u32 left_out;        // ranks, before this kernel
};

// Every thread of every block calls this first. If the entry is poisoned, the block leaves.
__device__ __forceinline__ void take_turn(const LowLatency& ll, Turn* turn) {
  // SYNC: the kernel before has moved the numbers on.
  await_kernel_before();
  if (threadIdx.x == WARP) {
    turn->sent = load_word(&ll.progress->sent) + 1;
    turn->received = load_word(&ll.progress->received) + 1;
    turn->left_out = load_own_word(&ll.progress->left_out);
  } else if (threadIdx.x >= 2 * WARP && threadIdx.x < 2 * WARP + RANKS) {
    const u32 reader = threadIdx.x - 2 * WARP;
    // SYNC: what lay in a half was read before the credit that counts its call.
    turn->credits[reader] = acquire_word(credit_of(ll, ll.buffer.rank, reader));
  }
  Entry entry = begin(ll.buffer);
  if (threadIdx.x == 0) {
    entry.epoch = u32(ll.phases & SENDS ? turn->sent : turn->received);
    entry.what = work_of(ll.buffer);
    entry.tag = entry.epoch;
    turn->entry = entry;
  }
  __syncthreads();
}

// Pairs of an outer and an inner number, dealt to warps: `first` has the first one, and each `step`th from there.
struct Walk {
  u32 outer, inner, outers, inners, step;

  __device__ __forceinline__ Walk(u32 first, u32 step, u32 outers, u32 inners)
      : outer(first / inners), inner(first % inners), outers(outers), inners(inners), step(step) {}
  __device__ __forceinline__ bool goes_on() const { return outer < outers; }
  __device__ __forceinline__ void next() {
    inner += step;
    outer += inner / inners;
    inner %= inners;
  }
};

// Calls `body(rank)` for each of `ranks`, beginning behind our own, so that not all ranks store to the same one.
template <class Body>
__device__ __forceinline__ void for_ranks(const LowLatency& ll, u32 ranks, Body body) {
  const u32 start = ll.buffer.rank + 1;
#pragma unroll 1
  for (u32 rest = (ranks >> start | ranks << (RANKS - start)) & ALL_RANKS; rest != 0; rest &= rest - 1) {
    const u32 rank = start + __ffs(rest) - 1;
    body(rank < RANKS ? rank : rank - RANKS);
  }
}

// Waits. --------------------------------------------------------------------------------------------------------------------------

// Looked at now and then by whoever waits for `rank` where ranks may be left out: whether this one is.
__device__ __noinline__ bool is_lost(const BufferArgs& buffer, const Entry& entry, u32 spins, u32 rank) {
  if (is_masked(buffer, rank)) return true;
  if ((spins & 1023) != 0 || rank == buffer.rank || !is_suspect(buffer, entry, rank)) return false;
  close_attendance(buffer, rank);
  leave_out(buffer, rank);
  return true;
}

// One lane, or several for one rank each: until `is_ready`, or `rank` is left out. TOGETHER: all lanes of a warp, until it is for all of them.
template <bool TOGETHER, class Poll>
__device__ __forceinline__ Came wait_for(const LowLatency& ll, const Turn& turn, u32 rank, Poll is_ready) {
  auto is_there = [&] {
    const bool is_mine = is_ready();
    return TOGETHER ? __all_sync(ALL_LANES, is_mine) != 0 : is_mine;
  };
  const bool looks = !TOGETHER || lane_of_warp() == 0;
  if (is_there()) return CAME;
  u32 spins = 0;
  while (!is_there()) {
    if ((++spins & 63) != 0) continue;
    Came came = CAME;
    if (looks) {
      if (must_leave(ll.buffer, turn.entry, spins, rank, 0)) came = MUST_LEAVE;
      else if (ll.buffer.is_masking && is_lost(ll.buffer, turn.entry, spins, rank)) came = LEFT_OUT;
    }
    if (TOGETHER) came = Came(__shfl_sync(ALL_LANES, u32(came), 0));
    if (came != CAME) return came;
  }
  if (looks) {
    end_wait(ll.buffer, spins);
    raise_own_later(&ll.progress->heard_ns[rank], now_ns());
  }
  return CAME;
}

// All lanes of a warp: until `is_ready(rank)` for each of `ranks`; `there` are those that came. False if one must leave.
template <class Poll>
__device__ __forceinline__ bool await_ranks(const LowLatency& ll, const Turn& turn, u32 ranks, u32* there, Poll is_ready) {
  const u32 lane = lane_of_warp();
  Came came = LEFT_OUT;
  if (lane < RANKS && (ranks >> lane & 1)) came = wait_for<false>(ll, turn, lane, [&] { return is_ready(lane); });
  *there = __ballot_sync(ALL_LANES, came == CAME);
  const bool goes_on = __all_sync(ALL_LANES, came != MUST_LEAVE);
  __syncwarp();
  return goes_on;
}

// All lanes of a warp: until `rank` has told a piece of call `number`. What it told is visible to the warp then.
__device__ __forceinline__ Came await_piece(const LowLatency& ll, const Turn& turn, u32 rank, const u64* told, u64 number) {
  Came came = CAME;
  // SYNC: a piece and its scales are visible before the word that tells it.
  if (lane_of_warp() == 0) came = wait_for<false>(ll, turn, rank, [&] { return acquire_word(told) == number; });
  came = Came(__shfl_sync(ALL_LANES, u32(came), 0));
  __syncwarp();
  return came;
}

// All threads of a block, before it stores anything of the call: until every rank has read the call before the last one, which used the
// same half. `present` are those that have. False if one must leave.
__device__ __forceinline__ bool await_credits(const LowLatency& ll, const Turn& turn, u32* present) {
  __shared__ u32 ranks;
  const u64 due = turn.sent < 2 ? 0 : turn.sent - 2;
  *present = ALL_RANKS & ~turn.left_out;
  bool goes_on = true;
#pragma unroll
  for (u32 rank = 0; rank < RANKS; rank++) goes_on &= (*present >> rank & 1) == 0 || i64(turn.credits[rank] - due) >= 0;
  // Mostly they were there at the beginning.
  if (goes_on) return true;
  goes_on = true;
  if (threadIdx.x < WARP) {
    u32 there;
    // SYNC: what lay in a half was read before the credit that counts its call.
    goes_on = await_ranks(ll, turn, *present, &there, [&](u32 rank) {
      return i64(acquire_word(credit_of(ll, ll.buffer.rank, rank)) - due) >= 0;
    });
    if (threadIdx.x == 0) ranks = there;
  }
  goes_on = __syncthreads_and(goes_on);
  *present = ranks;
  return goes_on;
}

// Choices. ------------------------------------------------------------------------------------------------------------------------

struct Place {
  u32 rank, expert;  // the expert's number there; both NOBODY if there is none
};

__device__ __forceinline__ Place find(const LowLatency& ll, i64 selection) {
  if (u64(selection) >= ll.experts) return {NOBODY, NOBODY};
  const u32 expert = u32(selection);
  if (ll.per_rank == 0) return {ll.placement[expert] >> 24, ll.placement[expert] & 0xffffff};
  const u32 rank = expert / ll.per_rank;
  return {rank, expert - rank * ll.per_rank};
}

// What a token of this rank selects: lane k has selection k.
struct Choices {
  i64 selection;
  Place place;
  u32 ranks;  // of all lanes, by bits
};

__device__ __forceinline__ Choices choices_of(const LowLatency& ll, u32 token) {
  const u32 lane = lane_of_warp();
  Choices choices;
  choices.selection = lane < ll.top_k ? ll.selections[u64(token) * ll.top_k + lane] : -1;
  choices.place = find(ll, choices.selection);
  choices.ranks = __reduce_or_sync(ALL_LANES, choices.place.rank < RANKS ? 1u << choices.place.rank : 0);
  return choices;
}

// All lanes of a warp: whether each selection is an expert, once, or −1. If not, it is reported.
__device__ __forceinline__ bool are_possible(const LowLatency& ll, const Turn& turn, u32 token, const Choices& choices) {
  const u32 lane = lane_of_warp();
  const bool is_none = choices.place.rank >= RANKS;
  // A key of its own for each lane that selects nothing.
  const u64 key = is_none ? u64(1) << 63 | lane : u64(choices.selection);
  const bool is_wrong = (is_none && choices.selection != -1) || __ffs(__match_any_sync(ALL_LANES, key)) - 1 != lane;
  const u32 wrong = __ballot_sync(ALL_LANES, is_wrong);
  if (wrong == 0) return true;
  if (lane == __ffs(wrong) - 1) {
    give_up(ll.buffer, REASON_CHOICE, ll.buffer.rank, turn.entry.epoch, token, u64(choices.selection), 0);
  }
  return false;
}

// All lanes of a warp: tells each of `present` which of its experts the token goes to, and `value` with each.
__device__ __forceinline__ void tell_choices(const LowLatency& ll, const Turn& turn, u32 token, const Choices& choices, u32 value,
                                             u32 present) {
  const u32 lane = lane_of_warp();
  for_ranks(ll, present, [&](u32 rank) {
    const u64 word = choices.place.rank == rank ? u64(value) << 32 | (choices.place.expert + 1) : 0;
    u8* at = choices_in(ll, rank, turn.sent, ll.buffer.rank, token) + lane * PACKET_BYTES;
    if (lane < ll.top_k) put_word(at, word, turn.sent);
  });
}

// What a token of a peer selects here: lane k has selection k.
struct Asked {
  bool is_any;  // of all lanes
  u32 expert;   // of ours, or NOBODY
  u32 value;
};

// All lanes of a warp.
__device__ __forceinline__ Came await_choices(const LowLatency& ll, const Turn& turn, u64 number, u32 source, u32 token, Asked* asked) {
  const u32 lane = lane_of_warp();
  const u8* at = choices_in(ll, ll.buffer.rank, number, source, token) + lane * PACKET_BYTES;
  u64 word = 0;
  const Came came = wait_for<true>(ll, turn, source, [&] { return lane >= ll.top_k || take_word(at, number, &word); });
  asked->expert = came == CAME ? u32(word) - 1 : NOBODY;
  asked->value = u32(word >> 32);
  asked->is_any = __any_sync(ALL_LANES, asked->expert != NOBODY);
  return came;
}

// Heads. --------------------------------------------------------------------------------------------------------------------------

// All threads of a block: tells `rank` what the call is, and with COUNTS how many of our selections are its experts.
template <bool COUNTS>
__device__ __forceinline__ void tell_head(const LowLatency& ll, const Turn& turn, u32 rank) {
  constexpr u32 CHUNK = 1024;
  __shared__ u32 counts[CHUNK];
  if constexpr (COUNTS) {
    const u32 experts = ll.experts_of[rank], selections = ll.tokens * ll.top_k;
    u8* told = counts_of(ll, rank, turn.sent, ll.buffer.rank);
    for (u32 first = 0; first < experts; first += CHUNK) {
      for (u32 i = threadIdx.x; i < CHUNK && first + i <= experts; i += blockDim.x) counts[i] = 0;
      __syncthreads();
      for (u32 i = threadIdx.x; i < selections; i += blockDim.x) {
        const Place place = find(ll, ll.selections[i]);
        if (place.rank == rank && place.expert - first < CHUNK) atomicAdd(&counts[place.expert - first], 1);
      }
      __syncthreads();
      for (u32 i = 2 * threadIdx.x; i < CHUNK && first + i < experts; i += 2 * blockDim.x) {
        put_word(told + u64(first + i) / 2 * PACKET_BYTES, u64(counts[i + 1]) << 32 | counts[i], turn.sent);
      }
      __syncthreads();
    }
  }
  if (threadIdx.x < HEAD_PACKETS) {
    const u32 i = threadIdx.x;
    const u64 word = i == 0 ? ll.tokens : ll.buffer.header[i < HEAD_PACKETS - 1 ? i - 1 : NUMBERED];
    put_word(head_of(ll, rank, turn.sent, ll.buffer.rank) + i * PACKET_BYTES, word, turn.sent);
  }
}

// One lane: tells the host that `rank` makes another call than we, and ends all waits of this device.
__device__ __noinline__ void refuse_call(const LowLatency& ll, const Turn& turn, u32 rank, const u8* head) {
  auto theirs = [&](u32 i) { return load_word(reinterpret_cast<const u64*>(head + (1 + i) * PACKET_BYTES)); };
  if (swap_own(&ll.buffer.state->reported, 0, 1) == 0) {
    Report* report = ll.buffer.report;
    for (u32 i = 0; i < COMPARED / 2; i++) {
      store_word(reinterpret_cast<u64*>(report->mine) + i, ll.buffer.header[i]);
      store_word(reinterpret_cast<u64*>(report->theirs) + i, theirs(i));
    }
    store_word(reinterpret_cast<u64*>(report->mine) + NUMBERED, ll.buffer.header[NUMBERED]);
    store_word(reinterpret_cast<u64*>(report->theirs) + NUMBERED, theirs(COMPARED / 2));
    store_word(&report->peer, rank);
    store_word(&report->epoch, turn.entry.epoch);
    // SYNC: what a report says is visible before its reason.
    fence_all();
    store_word(&report->reason, REASON_MISMATCH);
  }
  store_own_word(&ll.buffer.state->poison, 1);
}

// What the ranks told of a call.
struct Heads {
  u32 present;        // ranks, by bits
  u32 most;           // tokens of a rank
  u32 tokens[RANKS];  // none of those that are not there
};

// All threads of a block: what every rank but `left_out` told of call `number`, in memory that they share. False if one must leave.
__device__ __forceinline__ bool await_heads(const LowLatency& ll, const Turn& turn, u64 number, u32 left_out, Heads* heads) {
  const u32 lane = lane_of_warp(), me = ll.buffer.rank;
  bool goes_on = true;
  if (threadIdx.x < WARP) {
    u32 present, tokens = 0;
    u64 words[HEAD_PACKETS] = {};
    goes_on = await_ranks(ll, turn, ALL_RANKS & ~left_out, &present, [&](u32 rank) {
      bool is_there = true;
#pragma unroll
      for (u32 i = 0; i < HEAD_PACKETS; i++) {
        is_there &= take_word(head_of(ll, me, number, rank) + i * PACKET_BYTES, number, &words[i]);
      }
      return is_there;
    });
    if (goes_on && (present >> lane & 1)) {
      tokens = words[0] < ll.capacity ? u32(words[0]) : ll.capacity;
#pragma unroll
      for (u32 i = 0; i < COMPARED / 2; i++) goes_on &= words[1 + i] == ll.buffer.header[i];
      if (!goes_on) refuse_call(ll, turn, lane, head_of(ll, me, number, lane));
    }
    const u32 most = __reduce_max_sync(ALL_LANES, tokens);
    if (lane < RANKS) heads->tokens[lane] = tokens;
    if (lane == 0) heads->present = present, heads->most = most;
  }
  return __syncthreads_and(goes_on);
}

// Rows. ---------------------------------------------------------------------------------------------------------------------------

// Eight elements of a lane, as they lie in a buffer.
template <int DTYPE>
struct Slice {
  using E = Element<DTYPE>;
  static constexpr u32 WORDS = LANE_ELEMENTS * E::SIZE / 4;
  u32 words[WORDS];

  // From users' buffers; `is_wide`: on lines of 16 bytes.
  __device__ __forceinline__ void load(const u8* at, bool is_wide) {
    if (is_wide) {
#pragma unroll
      for (u32 i = 0; i < WORDS; i += 4) set(i, reinterpret_cast<const uint4*>(at)[i / 4]);
    } else {
      load_words<WORDS>(at, WORDS * 4, words);
    }
  }
  __device__ __forceinline__ void store(u8* at, bool is_wide) const {
    if (is_wide) {
#pragma unroll
      for (u32 i = 0; i < WORDS; i += 4) reinterpret_cast<uint4*>(at)[i / 4] = line(i);
    } else {
      store_words<WORDS>(at, WORDS * 4, words);
    }
  }
  // From our memory that peers write, and to theirs.
  __device__ __forceinline__ void take(const u8* at) {
#pragma unroll
    for (u32 i = 0; i < WORDS; i += 4) set(i, load_line(at + i * 4));
  }
  __device__ __forceinline__ void put(u8* at) const {
#pragma unroll
    for (u32 i = 0; i < WORDS; i += 4) reinterpret_cast<uint4*>(at)[i / 4] = line(i);
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (u32 i = 0; i < WORDS; i++) words[i] = 0;
  }
  __device__ __forceinline__ f32 value(u32 i) const { return E::read(words, i); }
  __device__ __forceinline__ void round(const f32 (&values)[LANE_ELEMENTS]) {
    Fold<DTYPE, SUM, WORDS> fold;
#pragma unroll
    for (u32 i = 0; i < LANE_ELEMENTS; i++) fold.values[i] = values[i];
    fold.partial(words);
  }

 private:
  __device__ __forceinline__ void set(u32 i, uint4 line) {
    words[i] = line.x, words[i + 1] = line.y, words[i + 2] = line.z, words[i + 3] = line.w;
  }
  __device__ __forceinline__ uint4 line(u32 i) const { return make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]); }
};

// All lanes of a warp: eight f8e4m3 of each, and the scale that sixteen lanes share; see unisono_core::ep::cast.
__device__ __forceinline__ u64 cast_slice(const f32 (&values)[LANE_ELEMENTS], u32 cast, f32* scale) {
  f32 largest = 1e-4f;
#pragma unroll
  for (u32 i = 0; i < LANE_ELEMENTS; i++) largest = is_finite(values[i]) ? fmaxf(largest, fabsf(values[i])) : largest;
#pragma unroll
  for (u32 apart = 1; apart < GROUP_LANES; apart *= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, apart));
  *scale = __fdiv_rn(largest, 448.0f);
  f32 inverse = __fdiv_rn(448.0f, largest);
  if (cast != CAST_F32) {
    const u32 bits = __float_as_uint(*scale), up = (bits & 0x007fffff) != 0;
    *scale = __uint_as_float(((bits >> 23) + up) << 23);
    inverse = __fdiv_rn(1.0f, *scale);
  }
  f32 scaled[LANE_ELEMENTS];
#pragma unroll
  for (u32 i = 0; i < LANE_ELEMENTS; i++) scaled[i] = is_finite(values[i]) ? values[i] * inverse : __int_as_float(0x7fc00000);
  u32 codes[2];
  encode(scaled, codes);
  return u64(codes[1]) << 32 | codes[0];
}

// All lanes of a warp, once it has stored its part of a piece of one of our tokens, or of one of theirs, at each of `ranks`.
__device__ __forceinline__ void tell_piece(const LowLatency& ll, const Turn& turn, u32 token, u32 piece, u32 ranks) {
  const u32 lane = lane_of_warp();
  __syncwarp();
  if (lane < RANKS && (ranks >> lane & 1)) {
    // SYNC: a piece and its scales are visible before the word that tells it.
    fence_all();
    store_word(piece_told(ll, lane, turn.sent, ll.buffer.rank, token, piece), turn.sent);
  }
}

// The end. ------------------------------------------------------------------------------------------------------------------------

// Who receives what: number `first` of `step`, from all but `left_out`.
struct Share {
  u32 first, step, left_out;
};

// Whether no peer has closed this rank. If one has, it is reported.
__device__ __forceinline__ bool is_in(const LowLatency& ll, const Turn& turn) {
  const u64 seen = ll.buffer.is_masking ? load_word(attendance_of(ll.buffer, ll.buffer.rank)) : 0;
  if ((seen & 1) == 0) return true;
  if (threadIdx.x == 0) give_up(ll.buffer, REASON_GIVEN_UP, ll.buffer.rank, turn.entry.epoch, 0, seen, 0);
  return false;
}

// All threads of a block, once all of them have received their share; `is_last` says whether this is the last block. True if the last one
// has to receive all once more, because a rank was left out meanwhile.
__device__ __forceinline__ bool close(const LowLatency& ll, const Turn& turn, Share* share, bool* is_last) {
  __shared__ bool are_all_through;
  __shared__ u32 left_out;
  Progress* progress = ll.progress;
  __syncthreads();
  if (threadIdx.x == 0) {
    // SYNC: all blocks have read their numbers, and what came, before the last of them goes on: they stored what they made of it, so those
    // loads have answered. Where ranks may be left out, the last block may store the same rows again, after all other stores.
    u32* finished = &words_of(ll.buffer)->finished;
    const bool may_repeat = ll.buffer.is_masking != 0;
    const u32 others = *is_last ? gridDim.x - 1 : may_repeat ? count_own(finished, 1) : count_own_now(finished, 1);
    are_all_through = others == gridDim.x - 1;
    left_out = 0;
    if (are_all_through) {
      const u64 closed = closed_ranks(ll.buffer);
      for (u32 rank = 0; rank < RANKS; rank++) {
        const bool is_new = (closed >> rank & 1) != 0 && rank != ll.buffer.rank && !is_masked(ll.buffer, rank);
        if (is_new) leave_out(ll.buffer, rank);
        left_out |= u32(is_masked(ll.buffer, rank)) << rank;
      }
    }
  }
  __syncthreads();
  *is_last = are_all_through;
  if (!*is_last) return false;
  if (!is_in(ll, turn)) return false;
  if (ll.phases & RECEIVES) {
    if (left_out != share->left_out) {
      *share = {threadIdx.x / WARP, blockDim.x / WARP, left_out};
      return true;
    }
    if (threadIdx.x < RANKS) {
      // SYNC: what lay in a half was read before the credit that counts its call, by loads that have answered, as above.
      store_word(credit_of(ll, threadIdx.x, ll.buffer.rank), turn.received);
      const u64 heard_ns = load_word(&progress->heard_ns[threadIdx.x]), started_ns = turn.entry.started_ns;
      ll.waited[threadIdx.x] = heard_ns > started_ns ? i64(heard_ns - started_ns) : 0;
    }
  }
  if (threadIdx.x == 0) {
    store_own_word(&words_of(ll.buffer)->finished, 0);
    if (ll.phases & SENDS) store_word(&progress->sent, turn.sent);
    if (ll.phases & RECEIVES) {
      store_word(&progress->received, turn.received);
      store_own_word(&progress->left_out, share->left_out);
    }
  }
  return false;
}

// All threads of a kernel: `send(turn)` and `receive(turn, share)`, as far as they are asked for; false from them if one must leave.
// `first`: which number each warp has among those that receive.
template <class Send, class Receive>
__device__ __forceinline__ void carry_out(const LowLatency& ll, u32 first, Send send, Receive receive) {
  __shared__ Turn turn;
  take_turn(ll, &turn);
  if (turn.entry.is_poisoned) return;
  if ((ll.phases & SENDS) && !__syncthreads_and(send(turn))) return;
  Share share = {first, warps_of_grid(), turn.left_out};
  bool is_last = false;
  do {
    if ((ll.phases & RECEIVES) && !__syncthreads_and(receive(turn, share))) return;
  } while (close(ll, turn, &share, &is_last));
  leave(ll.buffer);
}
