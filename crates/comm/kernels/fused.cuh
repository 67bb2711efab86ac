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
// A team of eight blocks shares a row, because one multiprocessor sends no more than about 45 GB/s: packets of a row of 16 KiB for
// seven peers are 153 KB, which take 3.4 µs from one and 0.4 µs from eight. A thread keeps its one or two units of six elements of a
// row from the sum to the output. A team meets once for some rows (twice where the scale is the token's own): each warp stores its leaf of
// the sum as a packet in memory of this device, and polls for those of all, so a meeting is a store and a load of the second-level cache.
// No barrier and no fence: those of a cluster wait for everything that the multiprocessor has under way, packets to peers among it.
//
// Behind another kernel nobody waits for a peer, and a block takes the parts of all eight, one after the other: the same bits.
//
// What a thread needs of memory that nobody writes meanwhile (its first inputs, residuals, weights) is on its way before the epoch is
// known. Above the all-reduce alone, that leaves a meeting, two reductions over a warp, and the square root with two divisions: 2.2 µs
// (eight H200s) to 3.0 (four), where 0.8 had been expected.
//
// Over 500 lines because all three share how rows are dealt, met over and finished.
//
// Leaving. Whoever gives up has poisoned the device before, which everybody who waits looks at; so a warp that gives up just leaves.

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

constexpr u32 TEAM_BLOCKS = 8, TEAM_WARPS = 8, LEAVES = TEAM_BLOCKS * TEAM_WARPS, LANES = LEAVES * 32;
constexpr u32 UNIT_ELEMENTS = 6, UNIT_BYTES = 12;
constexpr u32 ALL_LANES = 0xffffffff;

struct Sum {
  static __device__ __forceinline__ f32 of(f32 a, f32 b) { return a + b; }
};

// NaN does not count.
struct Most {
  static __device__ __forceinline__ f32 of(f32 a, f32 b) { return fmaxf(a, b); }
};

// Over the 32 lanes of a warp, neighbours first; the same bits in all of them.
template <class Op>
__device__ __forceinline__ f32 over_warp(f32 value) {
#pragma unroll
  for (u32 apart = 1; apart < 32; apart *= 2) value = Op::of(value, __shfl_xor_sync(0xffffffff, value, apart));
  return value;
}

// Who shares rows, up to ROWS at a time. `put` hands in a leaf of each, the same in all lanes of a warp; `meet` waits for all
// leaves, and gives lane l leaves 2 l and 2 l + 1 of each row. Leaves of a meeting lie where those of the meeting before the last lay.

// A team of blocks.
template <u32 ROWS>
struct Team {
  static constexpr u32 SHARES = 1, PACKETS = ROWS / 2;  // shares that a block has of each row; packets of a leaf
  static_assert(PACKETS <= 2 && MAX_TEAMS * 2 * 2 * LEAVES * 16 == LEAVES_BYTES, "the host has other room");
  const Args& args;
  const Entry& entry;
  u32 member;
  u32 number;
  u32 teams;
  u32 turn = 0;

  __device__ __forceinline__ Team(const Args& args, const Entry& entry)
      : args(args), entry(entry), member(blockIdx.x % TEAM_BLOCKS), number(blockIdx.x / TEAM_BLOCKS), teams(workers() / TEAM_BLOCKS) {}

  // This thread's lane of a share.
  __device__ __forceinline__ u32 lane(u32) const { return (threadIdx.x / 32 * TEAM_BLOCKS + member) * 32 + threadIdx.x % 32; }
  __device__ __forceinline__ bool is_first() const { return member == 0; }

  __device__ __forceinline__ u8* packet_at(u32 packet, u32 leaf) const {
    return reinterpret_cast<u8*>(args.state) + LEAVES_AT + (((number * 2 + (turn & 1)) * 2 + packet) * LEAVES + leaf) * 16;
  }

  __device__ __forceinline__ void put(u32, const f32 (&leaves)[ROWS]) const {
    const u32 leaf = member * TEAM_WARPS + threadIdx.x / 32, packet = threadIdx.x % 32;
    f32 low = leaves[0], high = leaves[1];
    if (PACKETS > 1 && packet == 1) low = leaves[ROWS - 2], high = leaves[ROWS - 1];
    // SYNC: leaves were read before others lie in their place: who hands in those of a meeting has taken a leaf of the meeting before
    // from every warp of the team, which that warp stored after it had taken all of the one before that.
    if (packet < PACKETS) store_line(packet_at(packet, leaf), make_uint4(__float_as_uint(low), __float_as_uint(high), turn, entry.epoch));
  }

  // All lanes of a warp; false if they must leave.
  __device__ __forceinline__ bool meet(f32 (&leaves)[2][ROWS]) {
    // A leaf is one access with the epoch and the number of the meeting, as packets are.
    const bool is_there = wait_until(args, entry, args.rank, [&] {
      bool all = true;
#pragma unroll
      for (u32 packet = 0; packet < PACKETS; packet++) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
          const uint4 line = load_line(packet_at(packet, 2 * (threadIdx.x % 32) + i));
          leaves[i][2 * packet] = __uint_as_float(line.x), leaves[i][2 * packet + 1] = __uint_as_float(line.y);
          all &= line.z == turn && line.w == entry.epoch;
        }
      }
      return all;
    });
    turn++;
    return __all_sync(ALL_LANES, is_there);
  }
};

// One block, which has the shares of all.
template <u32 ROWS>
struct Alone {
  static constexpr u32 SHARES = TEAM_BLOCKS;
  f32 (&board)[2][ROWS][LEAVES];  // in shared memory
  u32 number = blockIdx.x;
  u32 teams = gridDim.x;
  u32 turn = 0;

  __device__ __forceinline__ u32 lane(u32 share) const { return (threadIdx.x / 32 * TEAM_BLOCKS + share) * 32 + threadIdx.x % 32; }
  __device__ __forceinline__ bool is_first() const { return true; }

  __device__ __forceinline__ void put(u32 share, const f32 (&leaves)[ROWS]) const {
    if (threadIdx.x % 32 != 0) return;
#pragma unroll
    for (u32 row = 0; row < ROWS; row++) board[turn & 1][row][share * TEAM_WARPS + threadIdx.x / 32] = leaves[row];
  }

  __device__ __forceinline__ bool meet(f32 (&leaves)[2][ROWS]) {
    // SYNC: leaves of a meeting are visible behind it, and those of the meeting before the last are not needed any more.
    __syncthreads();
#pragma unroll
    for (u32 row = 0; row < ROWS; row++) {
#pragma unroll
      for (u32 i = 0; i < 2; i++) leaves[i][row] = board[turn & 1][row][2 * (threadIdx.x % 32) + i];
    }
    turn++;
    return true;
  }
};

// All lanes of a warp: hands in the values of a thread's units of some rows: one unit of each, or two.
template <class Op, u32 ROWS, class Sharers>
__device__ __forceinline__ void put_rows(const Sharers& sharers, u32 share, bool is_single, const f32 (&values)[ROWS]) {
  f32 leaves[ROWS];
#pragma unroll
  for (u32 row = 0; row < ROWS; row++) {
    const u32 pair = 2 * row < ROWS ? 2 * row : 0;
    leaves[row] = over_warp<Op>(is_single ? values[row] : Op::of(values[pair], values[pair + 1]));
  }
  sharers.put(share, leaves);
}

// All lanes of a warp: the value of row l in lane l. False if they must leave.
template <class Op, u32 ROWS, class Sharers>
__device__ __forceinline__ bool meet(Sharers& sharers, f32* of_lane) {
  f32 leaves[2][ROWS];
  if (!sharers.meet(leaves)) return false;
  *of_lane = 0;
#pragma unroll
  for (u32 row = 0; row < ROWS; row++) {
    const f32 whole = over_warp<Op>(Op::of(leaves[0][row], leaves[1][row]));
    if (threadIdx.x % 32 == row) *of_lane = whole;
  }
  return true;
}

// Units of a row, the last of which may be short, and bytes of it.
__device__ __forceinline__ u32 units_of(const Rows& rows) { return (rows.hidden + UNIT_ELEMENTS - 1) / UNIT_ELEMENTS; }
__device__ __forceinline__ u64 row_bytes(const Rows& rows) { return u64(rows.hidden) * 2; }

__device__ __forceinline__ void store_fp8(u8* at, u32 count, const u32* words) {
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
  static __device__ __forceinline__ void store(const Rows& rows, u64 at, u64 rest, const u32* x, const u32* weight, f32 inverse,
                                               f32 scale) {
    if (rows.kind == SAME) {
      Fold<DTYPE, SUM, 3> fold;
#pragma unroll
      for (u32 i = 0; i < UNIT_ELEMENTS; i++) fold.values[i] = normalised(x, weight, inverse, i);
      u32 words[3];
      fold.partial(words);
      store_words<3>(rows.output + at, rest, words);
    } else {
      u32 words[2] = {0, 0};
#pragma unroll
      for (u32 i = 0; i < UNIT_ELEMENTS; i++) {
        Element<F8E4M3>::write(words, i, __fdiv_rn(normalised(x, weight, inverse, i), scale));
      }
      store_fp8(rows.output + at / 2, rest < UNIT_BYTES ? u32(rest / 2) : UNIT_ELEMENTS, words);
    }
  }
};

// Where one of a thread's units lies.
struct Place {
  u32 row;
  u32 unit;
  u64 at;    // bytes into the buffers
  u64 rest;  // bytes of the row from there on
  bool is_due;
};

// The units that a thread has under way: one or two of each of some rows.
template <class Sharers, u32 SLOTS>
struct Batch {
  const Rows& rows;
  const Sharers& sharers;
  u32 units;
  bool is_single;  // one of each row
  u32 first;       // row

  __device__ __forceinline__ Batch(const Rows& rows, const Sharers& sharers)
      : rows(rows), sharers(sharers), units(units_of(rows)), is_single(units <= LANES), first(sharers.number) {}

  __device__ __forceinline__ u32 rows_at_once() const { return is_single ? SLOTS : SLOTS / 2; }
  __device__ __forceinline__ u32 row_of(u32 slot) const { return is_single ? slot : slot / 2; }
  // Whether its inputs were loaded before all else.
  __device__ __forceinline__ bool is_first() const { return first == sharers.number; }
  __device__ __forceinline__ bool is_some() const { return first < rows.rows; }
  __device__ __forceinline__ void go_on() { first += sharers.teams * rows_at_once(); }
  __device__ __forceinline__ Place place(u32 share, u32 slot) const {
    const u32 row = first + row_of(slot) * sharers.teams, unit = sharers.lane(share) + (is_single ? 0 : slot % 2 * LANES);
    const u64 row_length = row_bytes(rows), within = u64(unit) * UNIT_BYTES;
    return Place{row, unit, row * row_length + within, row_length - within, row < rows.rows && unit < units};
  }
  // The units of a buffer.
  __device__ __forceinline__ void load(u32 share, const u8* from, u32 (&words)[SLOTS][3]) const {
#pragma unroll
    for (u32 slot = 0; slot < SLOTS; slot++) {
      const Place due = place(share, slot);
      if (due.is_due) load_words<3>(from + due.at, due.rest, words[slot]);
    }
  }
};

__device__ __forceinline__ void load_weight(const Rows& rows, u32 unit, u32* weight) {
  const u64 row_length = row_bytes(rows), within = u64(unit) * UNIT_BYTES;
  if (unit < units_of(rows)) load_words<3>(rows.weight + within, row_length - within, weight);
}

// What a thread loads before all else: of its first units, the residual; its weights; the scale that is given.
template <u32 SLOTS>
struct Ahead {
  u32 residual[SLOTS][3] = {};
  u32 weights[2][3] = {};
  f32 scale = 1;

  template <class Sharers>
  __device__ __forceinline__ explicit Ahead(const Batch<Sharers, SLOTS>& batch) {
    const Rows& rows = batch.rows;
    if (rows.kind == FP8) scale = *rows.scale;
    // Who has several shares loads those of each when it comes to it.
    if constexpr (Sharers::SHARES == 1) {
      batch.load(0, rows.residual, residual);
      load_weight(rows, batch.sharers.lane(0), weights[0]);
      load_weight(rows, batch.sharers.lane(0) + LANES, weights[1]);
    }
  }
};

// All threads of all blocks that share rows: residual, norm and output of them. A thread has SLOTS units under way, one or two of each
// row, and meets the others once (or twice) for all of these rows: their latencies overlap. `take(share, sums)` waits for the sums
// of the units of `batch` that are due; it answers false if one must leave.
template <int DTYPE, u32 SLOTS, class Sharers, class Take>
__device__ __forceinline__ bool finish_rows(Sharers& sharers, Batch<Sharers, SLOTS>& batch, Ahead<SLOTS>& ahead, Take take) {
  using U = Unit<DTYPE>;
  constexpr u32 SHARES = Sharers::SHARES;
  constexpr f32 LARGEST = 448.0f, LEAST_SCALE = 1.0f / (448.0f * 512.0f);
  constexpr bool KEEPS = SHARES == 1;  // units and weights stay in registers
  const Rows& rows = batch.rows;
  const bool is_single = batch.is_single;
  const u32 at_once = batch.rows_at_once();
  for (; batch.is_some(); batch.go_on()) {
    u32 kept[KEEPS ? SLOTS : 1][3] = {};
    auto recall = [&](const Place& place, u32 slot, u32* x, u32* weight) {
      if constexpr (KEEPS) {
#pragma unroll
        for (u32 i = 0; i < 3; i++) {
          x[i] = kept[slot][i];
          weight[i] = is_single || slot % 2 == 0 ? ahead.weights[0][i] : ahead.weights[1][i];
        }
      } else {
        // This very thread stored it.
        load_words<3>(rows.residual_out + place.at, place.rest, x);
        load_weight(rows, place.unit, weight);
      }
    };
    // 1. Sum, residual, squares.
#pragma unroll 1
    for (u32 share = 0; share < SHARES; share++) {
      u32 sums[SLOTS][3];
      f32 squares[SLOTS];
      if (!KEEPS || !batch.is_first()) batch.load(share, rows.residual, ahead.residual);
      if (!__all_sync(ALL_LANES, take(share, sums))) return false;
#pragma unroll
      for (u32 slot = 0; slot < SLOTS; slot++) {
        const Place place = batch.place(share, slot);
        squares[slot] = 0;
        if (!place.is_due) continue;
        u32 x[3];
        U::add(sums[slot], ahead.residual[slot], x);
        squares[slot] = U::squares(x);
        if constexpr (KEEPS) {
#pragma unroll
          for (u32 i = 0; i < 3; i++) kept[slot][i] = x[i];
        } else {
          store_words<3>(rows.residual_out + place.at, place.rest, x);
        }
      }
      put_rows<Sum>(sharers, share, is_single, squares);
    }
    // While leaves are on their way.
    if constexpr (KEEPS) {
#pragma unroll
      for (u32 slot = 0; slot < SLOTS; slot++) {
        const Place place = batch.place(0, slot);
        if (place.is_due) store_words<3>(rows.residual_out + place.at, place.rest, kept[slot]);
      }
    }
    f32 of_lane;
    if (!meet<Sum, SLOTS>(sharers, &of_lane)) return false;
    const f32 mean = __fdiv_rn(of_lane, f32(rows.hidden));
    const f32 inverse_of_lane = __fdiv_rn(1.0f, __fsqrt_rn(mean + rows.epsilon));
    // 2. The scales of the tokens.
    f32 scale_of_lane = ahead.scale;
    if (rows.kind == FP8_PER_TOKEN) {
#pragma unroll 1
      for (u32 share = 0; share < SHARES; share++) {
        f32 largest[SLOTS];
#pragma unroll
        for (u32 slot = 0; slot < SLOTS; slot++) {
          const Place place = batch.place(share, slot);
          const f32 inverse = __shfl_sync(ALL_LANES, inverse_of_lane, batch.row_of(slot));
          largest[slot] = 0;
          if (!place.is_due) continue;
          u32 x[3], weight[3];
          recall(place, slot, x, weight);
          largest[slot] = U::largest(x, weight, inverse);
        }
        put_rows<Most>(sharers, share, is_single, largest);
      }
      if (!meet<Most, SLOTS>(sharers, &of_lane)) return false;
      scale_of_lane = fmaxf(__fdiv_rn(of_lane, LARGEST), LEAST_SCALE);
      const u32 row = batch.first + threadIdx.x * sharers.teams;
      if (sharers.is_first() && threadIdx.x < at_once && row < rows.rows) rows.scale[row] = scale_of_lane;
    }
    // 3. Output.
#pragma unroll 1
    for (u32 share = 0; share < SHARES; share++) {
#pragma unroll
      for (u32 slot = 0; slot < SLOTS; slot++) {
        const Place place = batch.place(share, slot);
        const f32 inverse = __shfl_sync(ALL_LANES, inverse_of_lane, batch.row_of(slot));
        const f32 scale = __shfl_sync(ALL_LANES, scale_of_lane, batch.row_of(slot));
        if (!place.is_due) continue;
        u32 x[3], weight[3];
        recall(place, slot, x, weight);
        U::store(rows, place.at, place.rest, x, weight, inverse, scale);
      }
    }
  }
  return true;
}

template <int DTYPE>
__device__ __forceinline__ bool rows_one_shot(const FusedArgs& all) {
  constexpr u32 SLOTS = 2;
  const Args& args = all.args;
  const Rows& rows = all.rows;
  await_kernel_before();
  Entry entry;
  Team<SLOTS> team(args, entry);
  Batch<Team<SLOTS>, SLOTS> batch(rows, team);
  const u8* source = args.sources[args.rank];
  u32 own[SLOTS][3];
  batch.load(0, source, own);
  Ahead<SLOTS> ahead(batch);
  entry = enter(args);
  if (entry.is_poisoned) return false;
  const u32 me = args.rank, epoch = entry.epoch, units = batch.units;
  const u64 slot_bytes = u64(rows.rows) * units * PACKET_BYTES, half = PACKETS_AT + half_of(epoch) * HALF_BYTES;
  auto packet_of = [&](const Place& place) { return half + (u64(place.row) * units + place.unit) * PACKET_BYTES; };
  // 1. Push.
  auto push = [&](const auto& pushed, const u32 (&words)[SLOTS][3]) {
#pragma unroll
    for (u32 slot = 0; slot < SLOTS; slot++) {
      const Place place = pushed.place(0, slot);
      if (!place.is_due) continue;
      const u64 at = packet_of(place) + me * slot_bytes;
#pragma unroll
      for (u32 k = 1; k < RANKS; k++) put_packet(args.arenas[peer_behind(me, k)] + at, words[slot], epoch);
    }
  };
  push(batch, own);
  auto later = batch;
  for (later.go_on(); later.is_some(); later.go_on()) {
    u32 words[SLOTS][3];
    later.load(0, source, words);
    push(later, words);
  }
  arrive(args, entry);
  // 2. Receive and sum; and the rest.
  const u8* arena = args.arenas[me];
  const bool is_done = finish_rows<DTYPE, SLOTS>(team, batch, ahead, [&](u32, u32 (&sums)[SLOTS][3]) {
    if (!batch.is_first()) batch.load(0, source, own);
#pragma unroll
    for (u32 slot = 0; slot < SLOTS; slot++) {
      const Place place = batch.place(0, slot);
      if (!place.is_due) continue;
      u32 inputs[RANKS][3];
      const u8* at = arena + packet_of(place);
      if (!take_units<Packets<1>>(args, entry, inputs, [&](int peer) { return at + peer * slot_bytes; })) return false;
      place_own<3>(inputs, own[slot], me);
      reduce_units<DTYPE, SUM, 3>(inputs, nullptr, sums[slot]);
    }
    return true;
  });
  if (is_done) record_end(args, entry);
  return is_done;
}

template <int DTYPE>
__device__ __forceinline__ bool rows_two_shot(const FusedArgs& all) {
  constexpr u32 SLOTS = 4;
  const Args& args = all.args;
  const Rows& rows = all.rows;
  await_kernel_before();
  Entry entry;
  Team<SLOTS> team(args, entry);
  Batch<Team<SLOTS>, SLOTS> batch(rows, team);
  // Packets have room for far less than 2³² units.
  const u32 me = args.rank, units = batch.units, number = rows.rows * units, shard = (number + RANKS - 1) / RANKS;
  const u64 row_length = row_bytes(rows);
  const u8* source = args.sources[me];
  const u32 step = workers() * blockDim.x, first = blockIdx.x * blockDim.x + threadIdx.x;
  auto index_of = [&](u32 k, u32 i) { return (k == 0 ? me : peer_behind(me, k)) * shard + i; };
  // Our unit i of the shard of each rank, as many ranks behind us.
  u32 own[RANKS][3];
  auto load = [&](u32 k, u32 i) {
    const u32 index = index_of(k, i), row = index / units;
    const u64 within = u64(index - row * units) * UNIT_BYTES;
    if (i < shard && index < number) load_words<3>(source + row * row_length + within, row_length - within, own[k]);
  };
#pragma unroll
  for (u32 k = 0; k < RANKS; k++) load(k, first);
  Ahead<SLOTS> ahead(batch);
  entry = enter(args);
  if (entry.is_poisoned) return false;
  const u32 epoch = entry.epoch;
  const u64 slot_bytes = u64(shard) * PACKET_BYTES, half = PACKETS_AT + half_of(epoch) * HALF_BYTES;
  const u64 second = half + RANKS * slot_bytes;
  u8* arena = args.arenas[me];
  // 1. Push each shard to its owner.
  for (u32 i = first; i < shard; i += step) {
#pragma unroll
    for (u32 k = 1; k < RANKS; k++) {
      if (i != first) load(k, i);
      u8* at = args.arenas[peer_behind(me, k)] + half + me * slot_bytes + u64(i) * PACKET_BYTES;
      if (index_of(k, i) < number) put_packet(at, own[k], epoch);
    }
  }
  arrive(args, entry);
  // 2. Sum our shard, and push the sums to all. Ours go where those of the others do: other blocks of this device wait for them.
  bool well = true;
  for (u32 i = first; i < shard && index_of(0, i) < number; i += step) {
    u32 sum[3], inputs[RANKS][3];
    if (i != first) load(0, i);
    const u64 slot = u64(i) * PACKET_BYTES;
    well = take_units<Packets<1>>(args, entry, inputs, [&](int peer) { return arena + half + peer * slot_bytes + slot; });
    if (!well) break;
    place_own<3>(inputs, own[0], me);
    reduce_units<DTYPE, SUM, 3>(inputs, nullptr, sum);
#pragma unroll
    for (u32 k = 1; k <= RANKS; k++) {
      put_packet(args.arenas[k < RANKS ? peer_behind(me, k) : me] + second + me * slot_bytes + slot, sum, epoch);
    }
  }
  // 3. Take the sums; and the rest.
  const bool is_done = finish_rows<DTYPE, SLOTS>(team, batch, ahead, [&](u32, u32 (&sums)[SLOTS][3]) {
    if (!well) return false;
    u32 packets[SLOTS], missing = 0, spins = 0;
#pragma unroll
    for (u32 slot = 0; slot < SLOTS; slot++) {
      const Place place = batch.place(0, slot);
      // Sums of an owner follow those of the one before it, as shards do.
      packets[slot] = place.row * units + place.unit;
      if (place.is_due) missing |= 1u << slot;
    }
    while (missing != 0) {
#pragma unroll
      for (u32 slot = 0; slot < SLOTS; slot++) {
        const u8* at = arena + second + u64(packets[slot]) * PACKET_BYTES;
        if ((missing >> slot & 1) != 0 && take_packet(at, sums[slot], epoch)) missing &= ~(1u << slot);
      }
      if (missing == 0 || (++spins & 63) != 0) continue;
      u32 owner = 0;
#pragma unroll
      for (u32 slot = 0; slot < SLOTS; slot++) owner = missing >> slot & 1 ? packets[slot] / shard : owner;
      if (must_leave(args, entry, spins, owner, 0)) return false;
    }
    end_wait(args, spins);
    return true;
  });
  if (is_done) record_end(args, entry);
  return is_done;
}

// The sums lie at our source, which may be the output or the new residual.
template <int DTYPE>
__device__ __forceinline__ void rows_behind(const FusedArgs& all) {
  constexpr u32 SLOTS = 2;
  __shared__ f32 board[2][SLOTS][LEAVES];
  await_kernel_before();
  const u8* from = all.args.sources[all.args.rank];
  Alone<SLOTS> block{board};
  Batch<Alone<SLOTS>, SLOTS> batch(all.rows, block);
  Ahead<SLOTS> ahead(batch);
  finish_rows<DTYPE, SLOTS>(block, batch, ahead, [&](u32 share, u32 (&sums)[SLOTS][3]) {
    batch.load(share, from, sums);
    return true;
  });
}
