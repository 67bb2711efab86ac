// Expert parallelism, throughput mode: where tokens go, counts, dispatch and combine.
//
// Layout. Tokens are dealt to portions, one for each block. Within its portion a token's place at each of its ranks is how many tokens before
// it go there too; the counts of all portions are kept. Touches memory of this rank only.
//
// Counts. One block: tells every peer how many tokens it gets (the row of all ranks goes to everybody) and how many selections each of its
// experts has, in packets, and computes from what comes where the rows of each source begin: here, and ours at every peer.
// So the final row of a token is its place in the portion, plus what this kernel found for the portion. One hop.
//
// Dispatch. Every rank tells where its rows lie. A warp takes a token at a time: reads it once, and stores it once to each rank that it goes to,
// where it stays. Scales, selections and weights go apart, each into its own array. Bytes out of a rank: rows · (row + scales + 12 · top-k + 4).
// From Hopper on rows move by bulk copies, through a place in shared memory for each warp.
//
// Combine. Every rank tells where its results lie; the source reads them there, adds in the order of ranks and then the bias, in f32, and
// rounds once. Bytes into a rank: as many rows as it sent.
//
// A grid has some blocks that move rows, and one more that greets. Blocks end when all they stored is through; the last one meets the peers.
//
// Over 500 lines because a call is all of these kernels, which hand each other what they find.

#include "expert_parallel.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define ROWS_BY_COPIES 1
#else
#define ROWS_BY_COPIES 0
#endif

// Of each expert: its rank and its number there.
__device__ __forceinline__ u32 rank_of(u32 expert) { return expert >> 24; }
__device__ __forceinline__ u32 number_of(u32 expert) { return expert & 0xffffff; }

// Layout. ----------------------------------------------------------------------------------------------------------------------

constexpr u32 LAYOUT_THREADS = 512, LAYOUT_WARPS = LAYOUT_THREADS / 32, EXPERTS_AT_ONCE = 4096;

struct LayoutArgs {
  const i64* selections;   // tokens × top_k
  const u32* experts;
  i32* places;             // tokens × RANKS: −1 where the token does not go
  u8* is_in_rank;          // tokens × RANKS
  u32* portion_counts;     // portions × RANKS
  u32* portion_selections; // portions × experts
  i32* rank_counts;        // RANKS
  i32* expert_counts;      // experts
  u32* finished;           // blocks; 0 before and after
  u64* complaint;          // host memory: 1 + the place of a selection that is no expert, and the selection (32 bits each)
  u32 tokens;
  u32 top_k;
  u32 number;              // of experts
  u32 portion;             // tokens of a block
};

static_assert(sizeof(LayoutArgs) == LAYOUT_ARGS_BYTES, "the host lays arguments out differently");

// The ranks of a token, by bits. Counts selections of the first experts.
__device__ __forceinline__ u32 ranks_of_token(const LayoutArgs& args, u32 token, u32* selected) {
  // So many loads are under way at once.
  constexpr u32 TOGETHER = 8;
  u32 ranks = 0;
  for (u32 k = 0; k < args.top_k; k += TOGETHER) {
    const u64 at = u64(token) * args.top_k + k;
    i64 selections[TOGETHER];
    u32 experts[TOGETHER];
#pragma unroll
    for (u32 j = 0; j < TOGETHER; j++) selections[j] = k + j < args.top_k ? args.selections[at + j] : -1;
#pragma unroll
    for (u32 j = 0; j < TOGETHER; j++) experts[j] = u64(selections[j]) < args.number ? args.experts[selections[j]] : ~0u;
#pragma unroll
    for (u32 j = 0; j < TOGETHER; j++) {
      if (experts[j] != ~0u) {
        ranks |= 1u << rank_of(experts[j]);
        if (selections[j] < EXPERTS_AT_ONCE) atomicAdd(&selected[selections[j]], 1u);
      } else if (selections[j] != -1) {
        store_word(args.complaint, (at + j + 1) << 32 | u32(selections[j]));
      }
    }
  }
  return ranks;
}

extern "C" __global__ void __launch_bounds__(LAYOUT_THREADS) ep_layout(const __grid_constant__ LayoutArgs args) {
  __shared__ u32 of_warps[LAYOUT_WARPS][RANKS], running[RANKS], selected[EXPERTS_AT_ONCE];
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const u32 first = blockIdx.x * args.portion;
  const u32 end = first + args.portion < args.tokens ? first + args.portion : args.tokens;
  if (threadIdx.x < RANKS) running[threadIdx.x] = 0;
  for (u32 i = threadIdx.x; i < EXPERTS_AT_ONCE && i < args.number; i += LAYOUT_THREADS) selected[i] = 0;
  __syncthreads();
  for (u32 base = first; base < end; base += LAYOUT_THREADS) {
    const u32 token = base + threadIdx.x;
    const u32 ranks = token < end ? ranks_of_token(args, token, selected) : 0;
    u32 before[RANKS];
#pragma unroll
    for (u32 r = 0; r < RANKS; r++) {
      const u32 going = __ballot_sync(~0u, ranks >> r & 1);
      before[r] = __popc(going & ((1u << lane) - 1));
      if (lane == 0) of_warps[warp][r] = __popc(going);
    }
    __syncthreads();
    u32 start = 0;
    if (lane < RANKS) {
      start = running[lane];
      for (u32 w = 0; w < warp; w++) start += of_warps[w][lane];
    }
#pragma unroll
    for (u32 r = 0; r < RANKS; r++) {
      const u32 place = __shfl_sync(~0u, start, r) + before[r];
      const bool goes = (ranks >> r & 1) != 0;
      if (token < end) {
        args.places[u64(token) * RANKS + r] = goes ? i32(place) : -1;
        args.is_in_rank[u64(token) * RANKS + r] = goes;
      }
    }
    __syncthreads();
    if (threadIdx.x < RANKS) {
      for (u32 w = 0; w < LAYOUT_WARPS; w++) running[threadIdx.x] += of_warps[w][threadIdx.x];
    }
    __syncthreads();
  }
  if (threadIdx.x < RANKS) args.portion_counts[blockIdx.x * RANKS + threadIdx.x] = running[threadIdx.x];
  // Selections of each expert, as many experts at once as there is room for: the first ones are counted.
  for (u32 base = 0; base < args.number; base += EXPERTS_AT_ONCE) {
    const u32 some = args.number - base < EXPERTS_AT_ONCE ? args.number - base : EXPERTS_AT_ONCE;
    if (base > 0) {
      for (u32 i = threadIdx.x; i < some; i += LAYOUT_THREADS) selected[i] = 0;
      __syncthreads();
      for (u64 i = u64(first) * args.top_k + threadIdx.x; i < u64(end) * args.top_k; i += LAYOUT_THREADS) {
        const u64 expert = u64(args.selections[i]) - base;
        if (expert < some) atomicAdd(&selected[expert], 1u);
      }
      __syncthreads();
    }
    for (u32 i = threadIdx.x; i < some; i += LAYOUT_THREADS) {
      args.portion_selections[u64(blockIdx.x) * args.number + base + i] = selected[i];
    }
    __syncthreads();
  }
  // The last block adds up.
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    // SYNC: the counts of all portions are visible to the block that counts itself last.
    is_last = count_own(args.finished, 1) == gridDim.x - 1;
    if (is_last) store_own_word(args.finished, 0);
  }
  __syncthreads();
  if (!is_last) return;
  fence_own();
  if (threadIdx.x < RANKS) {
    u32 sum = 0;
    for (u32 p = 0; p < gridDim.x; p++) sum += args.portion_counts[p * RANKS + threadIdx.x];
    args.rank_counts[threadIdx.x] = i32(sum);
  }
  for (u32 e = threadIdx.x; e < args.number; e += LAYOUT_THREADS) {
    u32 sum = 0;
    for (u32 p = 0; p < gridDim.x; p++) sum += args.portion_selections[u64(p) * args.number + e];
    args.expert_counts[e] = i32(sum);
  }
}

// Counts. ----------------------------------------------------------------------------------------------------------------------

constexpr u32 COUNTS_THREADS = 512;

struct CountsArgs : BufferArgs {
  const u32* portion_counts;  // portions × RANKS
  const i32* rank_counts;     // RANKS
  const i32* expert_counts;   // experts
  const u32* order;           // experts, by rank
  const u32* begins;          // RANKS + 1: where those of each rank begin in it
  i32* prefix;                // RANKS × RANKS: at [i][r] what ranks 0 to i send to rank r
  u32* bases;                 // portions × RANKS: the row at which a portion begins at each rank
  u32* starts;                // RANKS + 1: the row at which each source begins here
  u32* selections;            // of each of our experts
  u64* told;                  // host memory: ticket, rows, selections of our experts; or null
  u64 ticket;
  u32 portions;
  u32 reserved;
};

static_assert(sizeof(CountsArgs) == COUNTS_ARGS_BYTES, "the host lays arguments out differently");

// More tokens than a rank may have: counts of peers are not trusted.
constexpr u32 MOST_COUNT = 1u << 25;

// Word i of what `peer` is told: our row of counts, then selections of its experts.
__device__ __forceinline__ u32 count_for(const CountsArgs& args, u32 peer, u32 i) {
  if (i < RANKS) return u32(args.rank_counts[i]);
  const u32 at = args.begins[peer] + i - RANKS;
  return at < args.begins[peer + 1] ? u32(args.expert_counts[args.order[at]]) : 0;
}

__device__ __forceinline__ u32 count_packets(const CountsArgs& args, u32 rank) {
  return (RANKS + args.begins[rank + 1] - args.begins[rank] + 2) / 3;
}

__device__ __forceinline__ u64 counts_at(const CountsArgs& args, u32 epoch, u32 source) {
  return PACKETS_AT + half_of(epoch) * HALF_BYTES + u64(source) * args.counts_stride;
}

__device__ void tell_counts(const CountsArgs& args, const Entry& entry) {
  // All peers at once: as many packets of each as the one with most experts gets.
  const u32 most = args.counts_stride / PACKET_BYTES;
  for (u32 at = threadIdx.x; at < RANKS * most; at += COUNTS_THREADS) {
    const u32 peer = at / most, i = at % most;
    if (peer == args.rank || i >= count_packets(args, peer) || is_masked(args, peer)) continue;
    const u32 words[3] = {count_for(args, peer, 3 * i), count_for(args, peer, 3 * i + 1), count_for(args, peer, 3 * i + 2)};
    put_packet(args.arenas[peer] + counts_at(args, entry.epoch, args.rank) + i * PACKET_BYTES, words, entry.epoch);
  }
}

// Takes the counts of all ranks: `counts` by source and rank; selections of our experts are added up. False in threads that must leave.
__device__ bool take_counts(const CountsArgs& args, const Entry& entry, u32 (*counts)[RANKS]) {
  const u32 me = args.rank, packets = count_packets(args, me), experts = args.begins[me + 1] - args.begins[me];
  bool goes_on = true;
  for (u32 at = threadIdx.x; at < RANKS * packets; at += COUNTS_THREADS) {
    const u32 source = at / packets, i = at % packets;
    u32 words[3] = {0, 0, 0};
    if (source == me) {
#pragma unroll
      for (u32 j = 0; j < 3; j++) words[j] = count_for(args, me, 3 * i + j);
    } else {
      const u8* from = args.arenas[me] + counts_at(args, entry.epoch, source) + i * PACKET_BYTES;
      const Came came = is_masked(args, source) ? LEFT_OUT : wait_for_rank<false>(args, entry, source, [&] {
        return take_packet(from, words, entry.epoch);
      });
      goes_on &= came != MUST_LEAVE;
      if (came != CAME) continue;
    }
#pragma unroll
    for (u32 j = 0; j < 3; j++) {
      const u32 word = 3 * i + j;
      if (word < RANKS) counts[source][word] = words[j] < MOST_COUNT ? words[j] : MOST_COUNT;
      else if (word - RANKS < experts && words[j] != 0) count_own_later(args.selections + word - RANKS, words[j]);
    }
  }
  return goes_on;
}

extern "C" __global__ void __launch_bounds__(COUNTS_THREADS) ep_counts(const __grid_constant__ CountsArgs args) {
  const Entry entry = enter_round(args);
  if (entry.is_poisoned) return;
  __shared__ u32 counts[RANKS][RANKS];
  const u32 me = args.rank, experts = args.begins[me + 1] - args.begins[me];
  for (u32 i = threadIdx.x; i < RANKS * RANKS; i += COUNTS_THREADS) counts[i / RANKS][i % RANKS] = 0;
  for (u32 i = threadIdx.x; i < experts; i += COUNTS_THREADS) store_own_word(args.selections + i, 0);
  tell_counts(args, entry);
  __syncthreads();
  bool goes_on = greet<false>(args, entry);
  goes_on &= take_counts(args, entry, counts);
  if (!__syncthreads_and(goes_on)) return;
  // Where ranks may be left out, one that is in for some is in for all.
  if (args.is_masking && !meet(args, entry)) return;
  if (threadIdx.x < RANKS && is_masked(args, threadIdx.x)) {
    for (u32 r = 0; r < RANKS; r++) counts[threadIdx.x][r] = 0;
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < RANKS * RANKS; i += COUNTS_THREADS) {
    const u32 source = i / RANKS, rank = i % RANKS;
    u32 sum = 0;
    for (u32 s = 0; s <= source; s++) sum += counts[s][rank];
    args.prefix[i] = i32(sum);
    if (rank == me) args.starts[source + 1] = sum;
  }
  if (threadIdx.x == 0) args.starts[0] = 0;
  for (u32 i = threadIdx.x; i < args.portions * RANKS; i += COUNTS_THREADS) {
    const u32 portion = i / RANKS, rank = i % RANKS;
    u32 base = 0;
    for (u32 s = 0; s < me; s++) base += counts[s][rank];
    for (u32 p = 0; p < portion; p++) base += args.portion_counts[p * RANKS + rank];
    args.bases[i] = base;
  }
  if (args.told != nullptr) {
    for (u32 i = threadIdx.x; i < experts; i += COUNTS_THREADS) store_word(args.told + 2 + i, load_own_word(args.selections + i));
    __syncthreads();
    if (threadIdx.x == 0) {
      u32 rows = 0;
      for (u32 s = 0; s < RANKS; s++) rows += counts[s][me];
      store_word(args.told + 1, rows);
      // SYNC: what a counts kernel tells the host is visible before its ticket.
      fence_all();
      store_word(args.told, args.ticket);
    }
  }
  leave(args);
}

// Rows. ------------------------------------------------------------------------------------------------------------------------

// Where our tokens went.
struct Ways {
  const i32* places;  // tokens × RANKS
  const u32* bases;   // portions × RANKS
  u32 portion;
  u32 tokens;
};

// Lane r: the row of `token` at rank r, −1 if it has none there.
__device__ __forceinline__ i32 row_at(const Ways& ways, const Told* told, u32 token, u32 lane) {
  if (lane >= RANKS) return -1;
  const i32 place = ways.places[u64(token) * RANKS + lane];
  if (place < 0) return -1;
  const u32 row = ways.bases[token / ways.portion * RANKS + lane] + u32(place);
  return row < told[lane].rows ? i32(row) : -1;
}

struct DispatchArgs : BufferArgs {
  Ways ways;
  const u8* x;
  const u32* scales;      // or null
  const i64* selections;  // or null
  const u32* weights;     // f32, or null
  const u32* experts;
  const u32* starts;      // RANKS + 1
  u64* overflow;          // host memory: rows that came, if there is no room for all
  u64 scale_strides[2];   // elements
  u32 scale_count;        // of a token
  u32 top_k;
  u32 row_bytes;
  u32 piece_bytes;        // of a row that moves at once
  u32 is_cached;
  u32 number;             // of experts
};

static_assert(sizeof(DispatchArgs) == DISPATCH_ARGS_BYTES, "the host lays arguments out differently");

constexpr u32 DISPATCH_THREADS = 1024, DISPATCH_WARPS = DISPATCH_THREADS / 32;

// A warp: what travels beside a row, to its place at each rank in `rows`.
__device__ __forceinline__ void send_beside(const DispatchArgs& args, const Told* told, const i32* rows, u32 token, u32 lane) {
  for (u32 j = lane; j < args.scale_count; j += 32) {
    const u32 scale = args.scales[token * args.scale_strides[0] + j * args.scale_strides[1]];
    for (u32 r = 0; r < RANKS; r++) {
      if (rows[r] >= 0) reinterpret_cast<u32*>(line_of(args, r, told[r].scales_at))[u64(rows[r]) * args.scale_count + j] = scale;
    }
  }
  if (args.is_cached) return;
  if (lane < RANKS && rows[lane] >= 0) reinterpret_cast<u32*>(line_of(args, lane, told[lane].tokens_at))[rows[lane]] = token;
  if (args.selections == nullptr || lane >= args.top_k) return;
  const u64 at = u64(token) * args.top_k + lane;
  const i64 selection = args.selections[at];
  const bool is_one = u64(selection) < args.number;
  const u32 expert = is_one ? args.experts[selection] : 0, weight = args.weights != nullptr ? args.weights[at] : 0;
  for (u32 r = 0; r < RANKS; r++) {
    if (rows[r] < 0) continue;
    const bool is_there = is_one && rank_of(expert) == r;
    const u64 to = u64(rows[r]) * args.top_k + lane;
    reinterpret_cast<i64*>(line_of(args, r, told[r].indices_at))[to] = is_there ? i64(number_of(expert)) : -1;
    if (args.weights != nullptr) reinterpret_cast<u32*>(line_of(args, r, told[r].weights_at))[to] = is_there ? weight : 0;
  }
}

// A warp: `count` units of a row, to all ranks that it goes to.
template <class Unit>
__device__ __forceinline__ void send_units(const DispatchArgs& args, const Told* told, const i32* rows, u64 from, u32 count, u32 lane) {
  constexpr u32 TOGETHER = 4;
  const Unit* source = reinterpret_cast<const Unit*>(args.x + from);
  const u64 within = from % args.row_bytes;
  for (u32 v = lane; v < count; v += 32 * TOGETHER) {
    Unit units[TOGETHER];
#pragma unroll
    for (u32 i = 0; i < TOGETHER; i++) {
      if (v + 32 * i < count) units[i] = source[v + 32 * i];
    }
    for (u32 k = 1; k <= RANKS; k++) {
      const u32 r = (args.rank + k) % RANKS;
      if (rows[r] < 0) continue;
      Unit* target = reinterpret_cast<Unit*>(line_of(args, r, told[r].x_at) + u64(rows[r]) * args.row_bytes + within);
#pragma unroll
      for (u32 i = 0; i < TOGETHER; i++) {
        if (v + 32 * i < count) target[v + 32 * i] = units[i];
      }
    }
  }
}

#if ROWS_BY_COPIES
extern __shared__ __align__(128) u8 room[];
#endif

// All threads of a block that moves rows: its share of the pieces of all tokens. False if it must leave.
__device__ __forceinline__ bool send_rows(const DispatchArgs& args, const Entry& entry, const Told* told) {
  __shared__ i32 rows_of_warps[DISPATCH_WARPS][RANKS];
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  i32* rows = rows_of_warps[warp];
  u32 warps = blockDim.x / 32;
#if ROWS_BY_COPIES
  __shared__ u64 barriers[DISPATCH_WARPS];
  const bool by_copies = room_bytes() >= args.piece_bytes;
  if (by_copies && room_bytes() / args.piece_bytes < warps) warps = room_bytes() / args.piece_bytes;
  if (by_copies && lane == 0) {
    make_barrier(&barriers[warp], 1);
    fence_barriers();
  }
  __syncwarp();
  u32 phase = 0;
#endif
  bool goes_on = true;
  const u32 pieces = (args.row_bytes + args.piece_bytes - 1) / args.piece_bytes;
  const u64 all = u64(args.ways.tokens) * pieces, step = u64(workers()) * warps;
  // Neighbouring tokens are sent by different blocks at the same time.
  for (u64 item = warp < warps ? u64(warp) * workers() + blockIdx.x : all; item < all && goes_on; item += step) {
    const u32 token = u32(item / pieces), piece = u32(item % pieces);
    const i32 row = row_at(args.ways, told, token, lane);
    if (!__any_sync(~0u, row >= 0)) continue;
    __syncwarp();
    if (lane < RANKS) rows[lane] = row;
    __syncwarp();
    const u32 within = piece * args.piece_bytes, rest = args.row_bytes - within;
    const u32 bytes = rest < args.piece_bytes ? rest : args.piece_bytes;
    const u64 from = u64(token) * args.row_bytes + within;
#if ROWS_BY_COPIES
    if (by_copies) {
      u8* place = room + u64(warp) * args.piece_bytes;
      if (lane == 0) {
        wait_copies_out_read<0>();
        arrive_with(&barriers[warp], bytes);
        copy_in(place, args.x + from, bytes, &barriers[warp]);
      }
      if (piece == 0) send_beside(args, told, rows, token, lane);
      // From our own memory: it takes no peer, and must be over before the block ends.
      goes_on = wait_until(args, entry, args.rank, [&] { return rest_for_phase(&barriers[warp], phase & 1); });
      goes_on = __all_sync(~0u, goes_on);
      phase++;
      if (lane == 0 && goes_on) {
        for (u32 k = 1; k <= RANKS; k++) {
          const u32 r = (args.rank + k) % RANKS;
          if (rows[r] >= 0) copy_out(line_of(args, r, told[r].x_at) + u64(rows[r]) * args.row_bytes + within, place, bytes);
        }
        commit_copies_out();
      }
      continue;
    }
#endif
    if (piece == 0) send_beside(args, told, rows, token, lane);
    if (((reinterpret_cast<u64>(args.x) | args.row_bytes) & 15) == 0) send_units<uint4>(args, told, rows, from, bytes / 16, lane);
    else send_units<u64>(args, told, rows, from, bytes / 8, lane);
  }
#if ROWS_BY_COPIES
  if (by_copies && lane == 0) {
    wait_copies_out<0>();
    // A block must not end while a copy into its memory is under way.
    for (u32 polls = 0; !goes_on && polls < 10000 && !rest_for_phase(&barriers[warp], (phase - 1) & 1); polls++) {
    }
  }
#endif
  return goes_on;
}

// Rows of our output that nobody fills: behind the last one that came.
__device__ __forceinline__ void empty_rows(const DispatchArgs& args, const Told& mine, u64 begin, u64 end, u64 first, u64 step, bool with_data) {
  const u32 me = args.rank;
  if (!args.is_cached) {
    for (u64 i = begin + first; i < end; i += step) reinterpret_cast<i32*>(line_of(args, me, mine.tokens_at))[i] = -1;
    for (u64 i = begin * args.top_k + first; i < end * args.top_k && args.selections != nullptr; i += step) {
      reinterpret_cast<i64*>(line_of(args, me, mine.indices_at))[i] = -1;
      if (args.weights != nullptr) reinterpret_cast<u32*>(line_of(args, me, mine.weights_at))[i] = 0;
    }
  }
  if (!with_data) return;
  u64* x = reinterpret_cast<u64*>(line_of(args, me, mine.x_at));
  for (u64 i = begin * args.row_bytes / 8 + first; i < end * args.row_bytes / 8; i += step) x[i] = 0;
  u32* scales = reinterpret_cast<u32*>(line_of(args, me, mine.scales_at));
  for (u64 i = begin * args.scale_count + first; i < end * args.scale_count; i += step) scales[i] = 0;
}

extern "C" __global__ void __launch_bounds__(DISPATCH_THREADS) ep_dispatch(const __grid_constant__ DispatchArgs args) {
  const Entry entry = enter_round(args);
  if (entry.is_poisoned) return;
  __shared__ Told told[RANKS];
  const u32 bytes[5] = {args.row_bytes, args.scale_count * 4, args.selections != nullptr ? args.top_k * 8 : 0,
                        args.weights != nullptr ? args.top_k * 4 : 0, args.is_cached ? 0u : 4u};
  const u32 me = args.rank, came = args.starts[RANKS];
  bool goes_on = true;
  if (is_header_block()) goes_on = __syncthreads_and(greet<false>(args, entry));
  goes_on = learn<false>(args, entry, bytes, told) && goes_on;
  if (!goes_on) return;
  const u32 rows = told[me].rows;
  if (is_header_block()) {
    if (threadIdx.x == 0 && came > rows && args.overflow != nullptr) store_word(args.overflow, came);
  } else {
    empty_rows(args, told[me], came < rows ? came : rows, rows, u64(blockIdx.x) * blockDim.x + threadIdx.x, u64(workers()) * blockDim.x, false);
    if (!__syncthreads_and(send_rows(args, entry, told))) return;
  }
  if (is_last_block(args)) {
    if (!meet(args, entry)) return;
    // Rows of ranks that are left out: of this round, or since their tokens were counted.
    for (u32 source = 0; source < RANKS && args.is_masking; source++) {
      if (!is_masked(args, source)) continue;
      const u64 begin = args.starts[source] < rows ? args.starts[source] : rows;
      const u64 end = args.starts[source + 1] < rows ? args.starts[source + 1] : rows;
      empty_rows(args, told[me], begin, end, threadIdx.x, blockDim.x, true);
    }
  }
  leave(args);
}

// Combine. ---------------------------------------------------------------------------------------------------------------------

struct CombineArgs : BufferArgs {
  Ways ways;
  u8* out;
  u32* weights_out;    // f32, tokens × top_k, or null
  const u8* bias[2];   // or null
  u32 row_bytes;
  u32 top_k;
  u32 pieces;          // of a row, for a warp each
  u32 reserved;
};

static_assert(sizeof(CombineArgs) == COMBINE_ARGS_BYTES, "the host lays arguments out differently");

// COMBINED_TOGETHER vectors of a lane, of all ranks, are under way at once: the way to a peer and back is long.

// A warp: vectors `first` to `end` of one token. Lane r has its row at rank r.
template <int DTYPE>
__device__ __forceinline__ void combine_token(const CombineArgs& args, const Told* told, u32 token, i32 row, u32 lane, u32 first, u32 end) {
  using Sum = Fold<DTYPE, SUM, 4>;
  constexpr u32 TOGETHER = COMBINED_TOGETHER;
  const u32 from = __ballot_sync(~0u, row >= 0);
  const u8* sources[RANKS];
#pragma unroll
  for (u32 r = 0; r < RANKS; r++) {
    const i32 of_rank = __shfl_sync(~0u, row, r);
    sources[r] = line_of(args, r, told[r].x_at) + u64(of_rank < 0 ? 0 : of_rank) * args.row_bytes;
  }
  const u64 start = u64(token) * args.row_bytes;
  for (u32 v = first + lane; v < end; v += 32 * TOGETHER) {
    uint4 parts[TOGETHER][RANKS];
#pragma unroll
    for (u32 t = 0; t < TOGETHER; t++) {
#pragma unroll
      for (u32 r = 0; r < RANKS; r++) {
        if ((from >> r & 1) && v + 32 * t < end) parts[t][r] = *reinterpret_cast<const uint4*>(sources[r] + u64(v + 32 * t) * 16);
      }
    }
#pragma unroll
    for (u32 t = 0; t < TOGETHER; t++) {
      if (v + 32 * t >= end) break;
      Sum sum;
      u32 words[4] = {0, 0, 0, 0};
      // The sum of nothing is +0.
      sum.first(words, 0);
      bool is_empty = true;
      auto add = [&](const uint4& part) {
        words[0] = part.x, words[1] = part.y, words[2] = part.z, words[3] = part.w;
        if (is_empty) sum.first(words, 0);
        else sum.next(words, 0);
        is_empty = false;
      };
#pragma unroll
      for (u32 r = 0; r < RANKS; r++) {
        if (from >> r & 1) add(parts[t][r]);
      }
      const u64 at = start + u64(v + 32 * t) * 16;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (args.bias[i] != nullptr) add(*reinterpret_cast<const uint4*>(args.bias[i] + at));
      }
      sum.partial(words);
      *reinterpret_cast<uint4*>(args.out + at) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
  if (args.weights_out == nullptr || first != 0) return;
  // All lanes: rows of other ranks are asked of their lanes.
  f32 sum = 0;
  bool is_empty = true;
  for (u32 r = 0; r < RANKS; r++) {
    const i32 of_rank = __shfl_sync(~0u, row, r);
    if (of_rank < 0 || lane >= args.top_k) continue;
    const f32 weight = reinterpret_cast<const f32*>(line_of(args, r, told[r].weights_at))[u64(of_rank) * args.top_k + lane];
    sum = is_empty ? weight : sum + weight;
    is_empty = false;
  }
  if (is_nan(sum)) make_nan(sum);
  if (lane < args.top_k) args.weights_out[u64(token) * args.top_k + lane] = __float_as_uint(sum);
}

template <int DTYPE>
__device__ __forceinline__ void combine(const CombineArgs& args) {
  const Entry entry = enter_round(args);
  if (entry.is_poisoned) return;
  __shared__ Told told[RANKS];
  const u32 bytes[5] = {args.row_bytes, 0, 0, args.weights_out != nullptr ? args.top_k * 4 : 0, 0};
  bool goes_on = true;
  if (is_header_block()) goes_on = __syncthreads_and(greet<true>(args, entry));
  goes_on = learn<true>(args, entry, bytes, told) && goes_on;
  if (!goes_on) return;
  if (!is_header_block()) {
    const u32 lane = threadIdx.x & 31, warps = blockDim.x / 32, vectors = args.row_bytes / 16;
    const u32 some = ((vectors + args.pieces - 1) / args.pieces + 31) / 32 * 32;
    const u64 all = u64(args.ways.tokens) * args.pieces;
    for (u64 item = u64(threadIdx.x / 32) * workers() + blockIdx.x; item < all; item += u64(workers()) * warps) {
      const u32 token = u32(item / args.pieces), first = u32(item % args.pieces) * some;
      const u32 end = first + some < vectors ? first + some : vectors;
      if (first < end) combine_token<DTYPE>(args, told, token, row_at(args.ways, told, token, lane), lane, first, end);
    }
  }
  if (is_last_block(args) && !meet(args, entry)) return;
  leave(args);
}

struct AddArgs {
  const u8* x;     // rows × parts × row
  u8* out;         // rows × row
  u64 rows;
  u32 row_bytes;
  u32 parts;
};

static_assert(sizeof(AddArgs) == ADD_ARGS_BYTES, "the host lays arguments out differently");

// Adds the parts of each row, in their order. Touches memory of this rank only.
template <int DTYPE>
__device__ __forceinline__ void add_parts(const AddArgs& args) {
  const u64 vectors = args.row_bytes / 16, all = args.rows * vectors;
  for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < all; i += u64(gridDim.x) * blockDim.x) {
    const u8* from = args.x + (i / vectors * args.parts * vectors + i % vectors) * 16;
    Fold<DTYPE, SUM, 4> sum;
    u32 words[4];
    for (u32 part = 0; part < args.parts; part++) {
      const uint4 value = *reinterpret_cast<const uint4*>(from + u64(part) * args.row_bytes);
      words[0] = value.x, words[1] = value.y, words[2] = value.z, words[3] = value.w;
      if (part == 0) sum.first(words, 0);
      else sum.next(words, 0);
    }
    sum.partial(words);
    *reinterpret_cast<uint4*>(args.out + i * 16) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

#define KERNELS(NAME, DTYPE)                                                                                                      \
  extern "C" __global__ void __launch_bounds__(COMBINE_THREADS) ep_combine_##NAME(const __grid_constant__ CombineArgs args) {     \
    combine<DTYPE>(args);                                                                                                         \
  }                                                                                                                               \
  extern "C" __global__ void __launch_bounds__(512) ep_add_##NAME(const __grid_constant__ AddArgs args) { add_parts<DTYPE>(args); }

KERNELS(bf16, BF16)
KERNELS(f16, F16)
KERNELS(f32, F32)

// Leaves a rank out: of the next call in which it has not taken part. -----------------------------------------------------------

struct MaskArgs : BufferArgs {
  u64 rank_to_mask;
};

static_assert(sizeof(MaskArgs) == MASK_ARGS_BYTES, "the host lays arguments out differently");

// One thread. Kernels that meet others find it closed, in eager calls and in graphs.
extern "C" __global__ void __launch_bounds__(32) ep_mask(const __grid_constant__ MaskArgs args) {
  if (threadIdx.x != 0) return;
  const u32 rank = u32(args.rank_to_mask);
  close_attendance(args, rank);
  store_word(args.masked + rank, 1);
}
