// Rows: an all-reduce by sum whose result is added to the residual and normalised before it leaves the registers.
//
// A row (token) has `hidden` elements; what is computed of it, with which rounding and in which order, is told by unisono_core::fused.
//
//   one-shot  every rank pushes its rows to all as packets, and sums for itself. Bytes out: (n − 1) · S · 4/3. One hop.
//   two-shot  shard p of all units goes to rank p, which sums it and pushes the sums to all. Bytes out: 2 · S · (n − 1)/n · 4/3. Two hops.
//   behind    the sums were made by another kernel, and lie in memory.
//
// In each of them every rank adds its own residual and normalises all rows: sums alone are fewer bytes than new residuals and outputs
// would be, and the arithmetic is hidden behind the links.
//
// One block finishes a row: its 512 threads keep four units of six elements each from the sum to the output, and meet by a barrier of the
// block (twice where the scale is the token's own). Where eight blocks met through the second-level cache, a meeting took a store to it
// and polls of it, 1.3 to 1.6 µs. A multiprocessor sends no more than about 45 GB/s, so where rows are few, several blocks push a row,
// and all but the first of them are through then. What arrives of a row is read by one block: 22 KB from each peer, at about 120 GB/s. In
// two hops all blocks sum what this rank owns. A block fills a multiprocessor by its registers, and none is spilled where a load is on
// its way: each that is stored at once would be waited for.
//
// What a thread needs of memory that nobody writes meanwhile (its first inputs, residuals, weights) is on its way before the epoch is
// known, and that of the next row before the block meets for the one at hand. Rows of more than 2,048 units go in two passes, and through
// the new residual, because there are registers for one.
//
// To be expected above an all-reduce alone: two trees over a warp and the barrier (0.25 µs), a root and two divisions (0.1), reading what
// arrives (0.2 for each peer), and what packets cost where the all-reduce goes in lines (4/3 of the bytes instead of 16/15); several
// blocks push faster than those of a small all-reduce. With rows of 16 KiB, in µs, not measured yet:
//
//   ranks   1 token   16    32    64    128
//   2         +0.6   +0.6  +0.4  +0.2    0     one hop for all: two ranks send as many bytes in either form
//   4         +0.8   +0.9  +1.2  +1.7  +3      two hops from 17 on
//   8         +1.3   +1.2  +1.4  +2.1  +3.8    two hops from 7 on
//
// Leaving. Whoever gives up has poisoned the device before, which everybody who waits looks at. A thread that gives up comes to the barrier
// at which its block meets, which tells all threads to leave.

#pragma once

#include "one_shot.cuh"

enum Output { SAME, FP8, FP8_PER_TOKEN };

// What a kernel of rows is given beyond the call.
struct Rows {
  const u8* residual;
  u8* residual_out;  // may be the residual
  const u8* weight;
  u8* output;
  f32* scale;        // one that is given, or one for each row, or none
  u32 rows;
  u32 hidden;
  f32 epsilon;
  u32 kind;          // Output
};

struct FusedArgs {
  Args args;
  Rows rows;
};

static_assert(sizeof(FusedArgs) == FUSED_ARGS_BYTES, "the host lays arguments out differently");

// Lanes that the units of a row are dealt to, and their warps. A thread is four lanes, and a warp four.
constexpr u32 ROW_THREADS = 512, LANES = 2048, SLOTS = LANES / ROW_THREADS, LEAVES_OF_ROW = LANES / 32;
static_assert(SLOTS == 4, "four lanes of a thread are summed together");
constexpr u32 UNIT_ELEMENTS = 6, UNIT_BYTES = 12;
constexpr u32 ALL_LANES = 0xffffffff;

struct Sum {
  static __device__ __forceinline__ f32 of(f32 a, f32 b) { return a + b; }
};

// NaN does not count.
struct Most {
  static __device__ __forceinline__ f32 of(f32 a, f32 b) { return fmaxf(a, b); }
};

// One of two values over the lanes of a warp that are `apart`: of lanes that have the bit `apart` the second. Half the shuffles of both.
template <class Op>
__device__ __forceinline__ f32 fold_pair(f32 a, f32 b, u32 apart) {
  const bool is_second = (threadIdx.x & apart) != 0;
  return Op::of(is_second ? b : a, __shfl_xor_sync(ALL_LANES, is_second ? a : b, apart));
}

// Over the lanes of a warp that are `first`, 2 · first and so on apart, neighbours first; the same bits in all of them.
template <class Op>
__device__ __forceinline__ f32 over_warp(f32 value, u32 first) {
#pragma unroll
  for (u32 apart = first; apart < 32; apart *= 2) value = Op::of(value, __shfl_xor_sync(ALL_LANES, value, apart));
  return value;
}

// All threads of a block: the value of a row, of that of each lane. False if they must leave, because one of them is not `well`. The
// `board` is used in turn with another one.
template <class Op>
__device__ __forceinline__ bool meet(f32 (&board)[LEAVES_OF_ROW], bool well, const f32 (&values)[SLOTS], f32* whole) {
  const u32 lane = threadIdx.x % 32;
  // The four warps of lanes that a warp of threads is, at once: thread l sums warp l mod 4 of them.
  const f32 low = fold_pair<Op>(values[0], values[1], 1), high = fold_pair<Op>(values[2], values[3], 1);
  const f32 leaf = over_warp<Op>(fold_pair<Op>(low, high, 2), 4);
  const u32 warp = (lane * ROW_THREADS + threadIdx.x) / 32;
  if (lane < SLOTS) board[warp % 8 * 8 + warp / 8] = leaf;
  // SYNC: leaves of a meeting are visible behind it. Those of the meeting before the last were read by then: every thread has come from
  // them to the last one.
  if (!__syncthreads_and(well)) return false;
  *whole = over_warp<Op>(Op::of(board[2 * lane], board[2 * lane + 1]), 1);
  return true;
}

// Units of a row, the last of which may be short, and bytes of it.
__device__ __forceinline__ u32 units_of(const Rows& rows) { return (rows.hidden + UNIT_ELEMENTS - 1) / UNIT_ELEMENTS; }
__device__ __forceinline__ u32 row_bytes(const Rows& rows) { return rows.hidden * 2; }

// Values over their scale. A call of its own, because it is long.
__device__ __noinline__ void store_fp8(u8* at, u32 count, f32 a, f32 b, f32 c, f32 d, f32 e, f32 f, f32 scale) {
  const f32 values[UNIT_ELEMENTS] = {a, b, c, d, e, f};
  u32 words[2] = {0, 0};
#pragma unroll
  for (u32 i = 0; i < UNIT_ELEMENTS; i++) Element<F8E4M3>::write(words, i, __fdiv_rn(values[i], scale));
  if (count == UNIT_ELEMENTS && is_on(at, 2)) {
    u16* to = reinterpret_cast<u16*>(at);
    to[0] = u16(words[0]), to[1] = u16(words[0] >> 16), to[2] = u16(words[1]);
  } else {
    for (u32 i = 0; i < count; i++) at[i] = u8((i < 4 ? words[0] : words[1]) >> (i % 4 * 8));
  }
}

template <int DTYPE>
struct Unit {
  using E = Element<DTYPE>;

  // The new residual.
  static __device__ __forceinline__ void add(const u32* sum, const u32* residual, u32* x) {
    Fold<DTYPE, SUM, 3> fold;
    fold.first(sum, 0);
    fold.next(residual, 0);
    fold.finish(x, 2);
  }
  static __device__ __forceinline__ f32 squares(const u32* x) {
    f32 total = E::read(x, 0) * E::read(x, 0);
#pragma unroll
    for (u32 i = 1; i < UNIT_ELEMENTS; i++) total = total + E::read(x, i) * E::read(x, i);
    return total;
  }
  static __device__ __forceinline__ f32 normalised(const u32* x, const u32* weight, f32 inverse, u32 i) {
    return E::read(x, i) * inverse * E::read(weight, i);
  }
  static __device__ __forceinline__ f32 largest(const u32* x, const u32* weight, f32 inverse) {
    f32 most = 0;
#pragma unroll
    for (u32 i = 0; i < UNIT_ELEMENTS; i++) most = fmaxf(most, fabsf(normalised(x, weight, inverse, i)));
    return most;
  }
  // To `x`.
  static __device__ __forceinline__ void normalise(u32* x, const u32* weight, f32 inverse) {
    Fold<DTYPE, SUM, 3> fold;
#pragma unroll
    for (u32 i = 0; i < UNIT_ELEMENTS; i++) fold.values[i] = normalised(x, weight, inverse, i);
    fold.partial(x);
  }
  static __device__ __forceinline__ void put_fp8(u8* at, u32 rest, const u32* x, const u32* weight, f32 inverse, f32 scale) {
    auto value = [&](u32 i) { return normalised(x, weight, inverse, i); };
    store_fp8(at, rest < UNIT_BYTES ? rest / 2 : UNIT_ELEMENTS, value(0), value(1), value(2), value(3), value(4), value(5), scale);
  }
};

// Slots from SLOTS on are the second units of the lanes: rows that are longer than LANES units have some.
__device__ __forceinline__ u32 slots_of(const Rows& rows) { return units_of(rows) > LANES ? 2 * SLOTS : SLOTS; }
__device__ __forceinline__ u32 unit_of(u32 slot) { return threadIdx.x + slot * ROW_THREADS; }
__device__ __forceinline__ bool is_due(const Rows& rows, u32 slot) { return unit_of(slot) < units_of(rows); }

// Where the buffer lies badly, or rows are no whole words: one call for all units.
__device__ __noinline__ void load_units_slowly(const u8* of_row, u32 bytes, u32 from, u32* words) {
#pragma unroll 1
  for (u32 i = 0; i < SLOTS; i++) {
    const u32 at = unit_of(from + i) * UNIT_BYTES;
    load_slowly<3>(of_row + at, at < bytes ? min(bytes - at, UNIT_BYTES) : 0, words + 3 * i);
  }
}

__device__ __noinline__ void store_units_slowly(u8* of_row, u32 bytes, u32 from, const u32* words) {
#pragma unroll 1
  for (u32 i = 0; i < SLOTS; i++) {
    const u32 at = unit_of(from + i) * UNIT_BYTES;
    store_slowly<3>(of_row + at, at < bytes ? min(bytes - at, UNIT_BYTES) : 0, words + 3 * i);
  }
}

// This thread's units of a row of a buffer, in the slots from `from` on; what is behind the end reads as zero.
__device__ __forceinline__ void load_units(const Rows& rows, const u8* buffer, u32 row, u32 from, u32 (&words)[SLOTS][3]) {
  const u32 bytes = row < rows.rows ? row_bytes(rows) : 0;
  const u8* of_row = buffer + u64(row) * row_bytes(rows);
  if (is_on(buffer, 4) && row_bytes(rows) % 4 == 0) {
#pragma unroll
    for (u32 i = 0; i < SLOTS * 3; i++) {
      const u32 at = unit_of(from + i / 3) * UNIT_BYTES + i % 3 * 4;
      words[i / 3][i % 3] = at < bytes ? *reinterpret_cast<const u32*>(of_row + at) : 0;
    }
  } else {
    u32 slow[SLOTS * 3];
    load_units_slowly(of_row, bytes, from, slow);
#pragma unroll
    for (u32 i = 0; i < SLOTS * 3; i++) words[i / 3][i % 3] = slow[i];
  }
}

__device__ __forceinline__ void store_units(const Rows& rows, u8* buffer, u32 row, u32 from, const u32 (&words)[SLOTS][3]) {
  const u32 bytes = row_bytes(rows);
  u8* of_row = buffer + u64(row) * bytes;
  if (is_on(buffer, 4) && bytes % 4 == 0) {
#pragma unroll
    for (u32 i = 0; i < SLOTS * 3; i++) {
      const u32 at = unit_of(from + i / 3) * UNIT_BYTES + i % 3 * 4;
      if (at < bytes) *reinterpret_cast<u32*>(of_row + at) = words[i / 3][i % 3];
    }
  } else {
    u32 slow[SLOTS * 3];
#pragma unroll
    for (u32 i = 0; i < SLOTS * 3; i++) slow[i] = words[i / 3][i % 3];
    store_units_slowly(of_row, bytes, from, slow);
  }
}

// What a thread loads before it is needed. SOURCE: our input is summed where the row is finished.
template <bool SOURCE>
struct Ahead {
  u32 own[SLOTS][3];
  u32 residual[SLOTS][3];
  u32 weights[SLOTS][3];  // which all rows share

  __device__ __forceinline__ void load(const Rows& rows, const u8* source, u32 row, u32 from) {
    if constexpr (SOURCE) load_units(rows, source, row, from, own);
    load_units(rows, rows.residual, row, from, residual);
  }
};

// All threads of a block: residual, norm and output of the rows from `first` on, `step` apart, of the first of which `ahead` was loaded.
// `take(row, from, own, sums)` waits for the sums of this thread's units in the slots from `from` on; it answers false if one must leave.
template <int DTYPE, bool SOURCE, class Take>
__device__ __forceinline__ bool finish_rows(const Rows& rows, const u8* source, u32 first, u32 step, Ahead<SOURCE>& ahead, Take take) {
  using U = Unit<DTYPE>;
  constexpr f32 LARGEST = 448.0f, LEAST_SCALE = 1.0f / (448.0f * 512.0f);
  __shared__ f32 boards[2][LEAVES_OF_ROW];
  const bool is_long = units_of(rows) > LANES;
  const u32 slots = slots_of(rows);
  u32 turn = 0;
#pragma unroll 1
  for (u32 row = first; row < rows.rows; row += step) {
    // 1. Sum, residual, squares.
    u32 x[SLOTS][3];
    f32 values[SLOTS] = {};
    bool well = true;
#pragma unroll 1
    for (u32 from = 0; from < slots && well; from += SLOTS) {
      well = take(row, from, ahead.own, x);
#pragma unroll
      for (u32 slot = 0; slot < SLOTS; slot++) {
        if (!well || !is_due(rows, from + slot)) continue;
        U::add(x[slot], ahead.residual[slot], x[slot]);
        values[slot] = values[slot] + U::squares(x[slot]);
      }
      // What is next, before anything is stored: loads do not pass stores.
      const bool is_end = from + SLOTS >= slots;
      ahead.load(rows, source, is_end ? row + step : row, is_end ? 0 : from + SLOTS);
      if (well) store_units(rows, rows.residual_out, row, from, x);
    }
    f32 whole, scale = rows.kind == FP8 ? *rows.scale : 1;
    if (!meet<Sum>(boards[turn++ % 2], well, values, &whole)) return false;
    const f32 mean = __fdiv_rn(whole, f32(rows.hidden));
    const f32 inverse = __fdiv_rn(1.0f, __fsqrt_rn(mean + rows.epsilon));
    // There are registers for the last slots only. This very thread stored them.
    auto recall = [&](u32 from) {
      if (!is_long) return;
      load_units(rows, rows.residual_out, row, from, x);
      load_units(rows, rows.weight, 0, from, ahead.weights);
    };
    // 2. The scale of the token.
    if (rows.kind == FP8_PER_TOKEN) {
      f32 largest[SLOTS] = {};
#pragma unroll 1
      for (u32 from = 0; from < slots; from += SLOTS) {
        recall(from);
#pragma unroll
        for (u32 slot = 0; slot < SLOTS; slot++) {
          if (is_due(rows, from + slot)) largest[slot] = fmaxf(largest[slot], U::largest(x[slot], ahead.weights[slot], inverse));
        }
      }
      if (!meet<Most>(boards[turn++ % 2], true, largest, &whole)) return false;
      scale = fmaxf(__fdiv_rn(whole, LARGEST), LEAST_SCALE);
      if (threadIdx.x == 0) rows.scale[row] = scale;
    }
    // 3. Output.
#pragma unroll 1
    for (u32 from = 0; from < slots; from += SLOTS) {
      recall(from);
      if (rows.kind == SAME) {
#pragma unroll
        for (u32 slot = 0; slot < SLOTS; slot++) {
          if (is_due(rows, from + slot)) U::normalise(x[slot], ahead.weights[slot], inverse);
        }
        store_units(rows, rows.output, row, from, x);
      } else {
        u8* of_row = rows.output + u64(row) * rows.hidden;
#pragma unroll
        for (u32 slot = 0; slot < SLOTS; slot++) {
          const u32 element = unit_of(from + slot) * UNIT_ELEMENTS;
          if (!is_due(rows, from + slot)) continue;
          U::put_fp8(of_row + element, (rows.hidden - element) * 2, x[slot], ahead.weights[slot], inverse, scale);
        }
      }
    }
  }
  return true;
}

// Polls packets until all of those in `missing` are there: their latencies overlap. `at(i)` is where packet i lies, `sender(i)` who
// sends it. False if one must leave.
template <u32 N, class At, class Sender>
__device__ __forceinline__ bool take_packets(const Args& args, const Entry& entry, u32 missing, u32 (&words)[N][3], At at, Sender sender) {
  u32 spins = 0;
  while (missing != 0) {
    // Apart from `missing`, so that no load waits for what the one before has found.
    u32 found = 0;
#pragma unroll
    for (u32 i = 0; i < N; i++) {
      if ((missing >> i & 1) != 0 && take_packet(at(i), words[i], entry.epoch)) found |= 1u << i;
    }
    missing &= ~found;
    if (missing == 0 || (++spins & 63) != 0) continue;
    if (must_leave(args, entry, spins, sender(__ffs(missing) - 1), 0)) return false;
  }
  end_wait(args, spins);
  return true;
}

// Sums of N units, in rank order, our own among them. `at(unit, peer)` is where that of a peer comes.
template <int DTYPE, u32 N, class At>
__device__ __forceinline__ bool take_sums(const Args& args, const Entry& entry, const bool (&due)[N], const u32 (&own)[N][3],
                                          u32 (&sums)[N][3], At at) {
  constexpr u32 TOGETHER = RANKS < 8 ? RANKS : 8;
  Fold<DTYPE, SUM, 3> folds[N];
#pragma unroll
  for (u32 first = 0; first < RANKS; first += TOGETHER) {
    u32 inputs[N * TOGETHER][3], missing = 0;
    auto rank_of = [&](u32 i) { return first + i % TOGETHER; };
#pragma unroll
    for (u32 i = 0; i < N * TOGETHER; i++) {
      // Ours goes where nothing arrives.
#pragma unroll
      for (u32 word = 0; word < 3; word++) inputs[i][word] = own[i / TOGETHER][word];
      if (due[i / TOGETHER] && rank_of(i) < RANKS && rank_of(i) != args.rank) missing |= 1u << i;
    }
    auto packet = [&](u32 i) { return at(i / TOGETHER, rank_of(i)); };
    if (!take_packets<N * TOGETHER>(args, entry, missing, inputs, packet, rank_of)) return false;
#pragma unroll
    for (u32 i = 0; i < N * TOGETHER; i++) {
      const u32 unit = i / TOGETHER;
      if (rank_of(i) >= RANKS) continue;
      if (rank_of(i) == 0) folds[unit].first(inputs[i], 0);
      else folds[unit].next(inputs[i], 0);
      if (rank_of(i) == RANKS - 1) folds[unit].finish(sums[unit], RANKS);
    }
  }
  return true;
}

template <int DTYPE>
__device__ __forceinline__ bool rows_one_shot(const FusedArgs& all) {
  const Args& args = all.args;
  const Rows& rows = all.rows;
  await_kernel_before();
  // So many blocks push a row, each of them some warps' units; the first of them finishes it.
  const u32 sharers = workers() > rows.rows ? workers() / rows.rows : 1, teams = workers() / sharers;
  const u32 member = blockIdx.x / teams, first = blockIdx.x % teams;
  const bool finishes = member == 0, pushes = RANKS > 1 && threadIdx.x / 32 % sharers == member;
  const u8* source = args.sources[args.rank];
  Ahead<true> ahead;
  if (finishes) {
    ahead.load(rows, source, first, 0);
    load_units(rows, rows.weight, 0, 0, ahead.weights);
  } else if (pushes) {
    load_units(rows, source, first, 0, ahead.own);
  }
  Entry entry = enter(args);
  if (entry.is_poisoned) return false;
  const u32 me = args.rank, epoch = entry.epoch, units = units_of(rows);
  // What fits into an arena is counted in 32 bits.
  const u32 slot_bytes = rows.rows * units * PACKET_BYTES, half = u32(PACKETS_AT + half_of(epoch) * HALF_BYTES);
  auto packet_at = [&](u32 row, u32 slot, u32 source) {
    return half + source * slot_bytes + (row * units + unit_of(slot)) * PACKET_BYTES;
  };
  // 1. Push.
  auto push = [&](u32 row, u32 from, const u32 (&words)[SLOTS][3]) {
#pragma unroll
    for (u32 slot = 0; slot < SLOTS; slot++) {
      if (!is_due(rows, from + slot)) continue;
      const u32 at = packet_at(row, from + slot, me);
#pragma unroll
      for (u32 k = 1; k < RANKS; k++) put_packet(args.arenas[peer_behind(me, k)] + at, words[slot], epoch);
    }
  };
  const u32 slots = slots_of(rows);
#pragma unroll 1
  for (u32 row = first; pushes && row < rows.rows; row += teams) {
#pragma unroll 1
    for (u32 from = 0; from < slots; from += SLOTS) {
      if (row == first && from == 0) {
        push(row, from, ahead.own);
      } else {
        u32 words[SLOTS][3];
        load_units(rows, source, row, from, words);
        push(row, from, words);
      }
    }
  }
  arrive(args, entry);
  // 2. Receive and sum; and the rest.
  const u8* arena = args.arenas[me];
  const bool is_done = !finishes || finish_rows<DTYPE>(rows, source, first, teams, ahead,
      [&](u32 row, u32 from, const u32 (&own)[SLOTS][3], u32 (&sums)[SLOTS][3]) {
    // As many at once as there are registers for.
    constexpr u32 AT_ONCE = RANKS <= 2 ? SLOTS : RANKS <= 4 ? 2 : 1;
#pragma unroll
    for (u32 slot = 0; slot < SLOTS; slot += AT_ONCE) {
      bool due[AT_ONCE];
      u32 mine[AT_ONCE][3], sum[AT_ONCE][3];
#pragma unroll
      for (u32 i = 0; i < AT_ONCE; i++) {
        due[i] = is_due(rows, from + slot + i);
#pragma unroll
        for (u32 word = 0; word < 3; word++) mine[i][word] = own[slot + i][word];
      }
      auto at = [&](u32 i, u32 peer) { return arena + packet_at(row, from + slot + i, peer); };
      if (!take_sums<DTYPE>(args, entry, due, mine, sum, at)) return false;
#pragma unroll
      for (u32 i = 0; i < AT_ONCE; i++) {
#pragma unroll
        for (u32 word = 0; word < 3; word++) sums[slot + i][word] = sum[i][word];
      }
    }
    return true;
  });
  if (is_done) record_end(args, entry);
  return is_done;
}

template <int DTYPE>
__device__ __forceinline__ bool rows_two_shot(const FusedArgs& all) {
  const Args& args = all.args;
  const Rows& rows = all.rows;
  await_kernel_before();
  // Packets have room for far less than 2³² units.
  const u32 me = args.rank, units = units_of(rows), number = rows.rows * units, shard = (number + RANKS - 1) / RANKS;
  const u8* source = args.sources[me];
  // Warps of all blocks in turn, so that few units are pushed by many multiprocessors.
  const u32 step = workers() * ROW_THREADS, first = (threadIdx.x / 32 * workers() + blockIdx.x) * 32 + threadIdx.x % 32;
  // Unit i of the shard of a rank.
  auto load = [&](u32 owner, u32 i, u32* words) {
    const u32 index = owner * shard + i, row = index / units;
    const u32 within = (index - row * units) * UNIT_BYTES;
    if (i < shard && index < number) load_words<3>(source + u64(row) * row_bytes(rows) + within, row_bytes(rows) - within, words);
  };
  // As many peers as there are registers for: those that are all of them are loaded before all else.
  constexpr u32 TOGETHER = RANKS == 1 ? 1 : RANKS <= 8 ? RANKS - 1 : 8;
  constexpr bool IS_AHEAD = RANKS - 1 <= TOGETHER;
  u32 theirs[TOGETHER][3], own[1][3];
  load(me, first, own[0]);
#pragma unroll
  for (u32 k = 1; IS_AHEAD && k < RANKS; k++) load(peer_behind(me, k), first, theirs[k - 1]);
  Ahead<false> ahead;
  ahead.load(rows, source, blockIdx.x, 0);
  load_units(rows, rows.weight, 0, 0, ahead.weights);
  Entry entry = enter(args);
  if (entry.is_poisoned) return false;
  const u32 epoch = entry.epoch;
  const u32 slot_bytes = shard * PACKET_BYTES, half = u32(PACKETS_AT + half_of(epoch) * HALF_BYTES);
  const u32 second = half + RANKS * slot_bytes;
  u8* arena = args.arenas[me];
  // 1. Push each shard to its owner.
  for (u32 i = first; i < shard; i += step) {
    for_peers<TOGETHER>(me, [&](u32 peer, u32 at) {
      if (!IS_AHEAD || i != first) load(peer, i, theirs[at]);
    }, [&](u32 peer, u32 at) {
      if (peer * shard + i < number) put_packet(args.arenas[peer] + half + me * slot_bytes + i * PACKET_BYTES, theirs[at], epoch);
    });
  }
  arrive(args, entry);
  // 2. Sum our shard, and push the sums to all. Ours go where those of the others do: other blocks of this device wait for them.
  bool well = true;
  for (u32 i = first; i < shard && me * shard + i < number; i += step) {
    const u32 slot = i * PACKET_BYTES;
    u32 sum[1][3];
    if (i != first) load(me, i, own[0]);
    well = take_sums<DTYPE>(args, entry, {true}, own, sum, [&](u32, u32 peer) { return arena + half + peer * slot_bytes + slot; });
    if (!well) break;
#pragma unroll
    for (u32 k = 1; k <= RANKS; k++) {
      put_packet(args.arenas[k < RANKS ? peer_behind(me, k) : me] + second + me * slot_bytes + slot, sum[0], epoch);
    }
  }
  // 3. Take the sums; and the rest.
  const bool is_done = finish_rows<DTYPE>(rows, source, blockIdx.x, workers(), ahead,
      [&](u32 row, u32 from, const u32 (&)[SLOTS][3], u32 (&sums)[SLOTS][3]) {
    if (!well) return false;
    // Sums of an owner follow those of the one before it, as shards do.
    u32 missing = 0;
    auto index_of = [&](u32 slot) { return row * units + unit_of(from + slot); };
#pragma unroll
    for (u32 slot = 0; slot < SLOTS; slot++) missing |= u32(is_due(rows, from + slot)) << slot;
    auto at = [&](u32 slot) { return arena + second + index_of(slot) * PACKET_BYTES; };
    return take_packets<SLOTS>(args, entry, missing, sums, at, [&](u32 slot) { return index_of(slot) / shard; });
  });
  if (well && is_done) record_end(args, entry);
  return well && is_done;
}

// The sums lie at our source, which may be the output or the new residual.
template <int DTYPE>
__device__ __forceinline__ void rows_behind(const FusedArgs& all) {
  await_kernel_before();
  const u8* source = all.args.sources[all.args.rank];
  Ahead<true> ahead;
  ahead.load(all.rows, source, blockIdx.x, 0);
  load_units(all.rows, all.rows.weight, 0, 0, ahead.weights);
  finish_rows<DTYPE>(all.rows, source, blockIdx.x, gridDim.x, ahead,
      [](u32, u32, const u32 (&own)[SLOTS][3], u32 (&sums)[SLOTS][3]) {
#pragma unroll
    for (u32 slot = 0; slot < SLOTS; slot++) {
#pragma unroll
      for (u32 word = 0; word < 3; word++) sums[slot][word] = own[slot][word];
    }
    return true;
  });
}
