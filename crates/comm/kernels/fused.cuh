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
// row from the sum to the output; teams meet once for some rows (twice where the scale is the token's own) through the shared memory of
// a cluster. Where there are no clusters a block takes the parts of all eight, one after the other: the same bits.
//
// Leaving. Who writes into the shared memory of a block must know that it is there. So a block that gives up does not leave at once: it
// says so at the next meeting, behind which all of the team leave.

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

constexpr u32 TEAM_BLOCKS = 8, TEAM_WARPS = 8, LEAVES = TEAM_BLOCKS * TEAM_WARPS, LANES = LEAVES * 32, UNITS_OF_LANE = 2;
constexpr u32 UNIT_ELEMENTS = 6, UNIT_BYTES = 12;

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

// What the blocks of a team tell each other, in the shared memory of each. Two of each: a meeting writes the one that the meeting
// before does not read any more.
template <u32 ROWS>
struct Board {
  f32 leaves[2][ROWS][LEAVES];
  u32 have_failed[2];
};

// SIZE blocks, 8 or 1, that share rows, up to ROWS at a time.
template <u32 SIZE, u32 ROWS>
struct Team {
  static constexpr u32 SHARES = TEAM_BLOCKS / SIZE;  // that a block has of each row
  Board<ROWS>& board;
  u32 member;
  u32 number;
  u32 teams;
  u32 turn = 0;

  __device__ __forceinline__ u32 share_of(u32 share) const { return SIZE == 1 ? share : member; }
  // This thread's lane of a share.
  __device__ __forceinline__ u32 lane(u32 share) const {
    return (threadIdx.x / 32 * TEAM_BLOCKS + share_of(share)) * 32 + threadIdx.x % 32;
  }

  // All threads of a block, before anything else.
  __device__ __forceinline__ void begin() {
    if (threadIdx.x < 2) board.have_failed[threadIdx.x] = 0;
    if constexpr (SIZE > 1) arrive_at_cluster();
  }

  // The boards of all are there.
  __device__ __forceinline__ void await_boards() {
    // SYNC: boards are cleared before anybody writes to them.
    if constexpr (SIZE > 1) await_cluster();
    else __syncthreads();
  }

  // All threads: hands in their values of one share of row `row` of those under way.
  template <class Op>
  __device__ __forceinline__ void put(u32 share, u32 row, f32 value) {
    const f32 leaf = over_warp<Op>(value);
    const u32 lane = threadIdx.x % 32;
    f32* at = &board.leaves[turn & 1][row][share_of(share) * TEAM_WARPS + threadIdx.x / 32];
    if constexpr (SIZE > 1) {
      if (lane < SIZE) store_in_block(at, lane, leaf);
    } else {
      if (lane == 0) *at = leaf;
    }
  }

  // All threads, once all was handed in. False if a thread of the team is not `well`; then all leave.
  __device__ __forceinline__ bool meet(bool well) {
    const u32 now = turn++ & 1;
    if constexpr (SIZE > 1) {
      if (!well) {
        for (u32 block = 0; block < SIZE; block++) store_in_block(&board.have_failed[now], block, 1u);
      }
      // SYNC: what was written to the boards of a team for a meeting is visible behind it, and what was read from them behind the
      // meeting before is not needed any more.
      arrive_at_cluster();
      await_cluster();
    } else {
      if (!well) board.have_failed[now] = 1;
      __syncthreads();
    }
    return board.have_failed[now] == 0;
  }

  // Hands in the values of a thread's units of `batch` rows: one unit of each, or two.
  template <class Op>
  __device__ __forceinline__ void put_rows(u32 share, u32 batch, bool is_single, const f32 (&values)[ROWS]) {
#pragma unroll
    for (u32 row = 0; row < ROWS; row++) {
      const u32 pair = 2 * row < ROWS ? 2 * row : 0;
      const f32 value = is_single ? values[row] : Op::of(values[pair], values[pair + 1]);
      if (row < batch) put<Op>(share, row, value);
    }
  }

  // The value of row l of `batch`, in lane l of each warp.
  template <class Op>
  __device__ __forceinline__ f32 value_of_lane(u32 batch) const {
    f32 mine = 0;
#pragma unroll
    for (u32 row = 0; row < ROWS; row++) {
      if (row >= batch) break;
      const f32 whole = value<Op>(row);
      if (threadIdx.x % 32 == row) mine = whole;
    }
    return mine;
  }

  // All threads, behind a meeting: the value of a row.
  template <class Op>
  __device__ __forceinline__ f32 value(u32 row) const {
    const f32* leaves = board.leaves[(turn - 1) & 1][row];
    const u32 lane = threadIdx.x % 32;
    return over_warp<Op>(Op::of(leaves[2 * lane], leaves[2 * lane + 1]));
  }
};

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
template <u32 SIZE, u32 SLOTS>
struct Batch {
  const Rows& rows;
  const Team<SIZE, SLOTS>& team;
  u32 units;
  bool is_single;  // one of each row
  u32 first;       // row

  __device__ __forceinline__ u32 rows_at_once() const { return is_single ? SLOTS : SLOTS / 2; }
  __device__ __forceinline__ u32 row_of(u32 slot) const { return is_single ? slot : slot / 2; }
  __device__ __forceinline__ Place place(u32 share, u32 slot) const {
    const u32 row = first + row_of(slot) * team.teams, unit = team.lane(share) + (is_single ? 0 : slot % 2 * LANES);
    const u64 row_length = row_bytes(rows), within = u64(unit) * UNIT_BYTES;
    return Place{row, unit, row * row_length + within, row_length - within, row < rows.rows && unit < units};
  }
};

// All threads of all blocks of a team: residual, norm and output of its rows. A thread has SLOTS units under way, one or two of each
// row, and its team meets once (or twice) for all of these rows: their latencies overlap. `take(batch, share, sums)` waits for the sums
// of the units that are due; it answers false if one must leave.
template <int DTYPE, u32 SIZE, u32 SLOTS, class Take>
__device__ __forceinline__ bool finish_rows(const Rows& rows, Team<SIZE, SLOTS>& team, bool well, Take take) {
  using U = Unit<DTYPE>;
  constexpr u32 ALL_LANES = 0xffffffff, SHARES = Team<SIZE, SLOTS>::SHARES;
  constexpr f32 LARGEST = 448.0f, LEAST_SCALE = 1.0f / (448.0f * 512.0f);
  constexpr bool KEEPS = SHARES == 1;  // units and weights stay in registers
  const u32 units = units_of(rows);
  const u64 row_length = row_bytes(rows);
  Batch<SIZE, SLOTS> batch{rows, team, units, units <= LANES, team.number};
  const bool is_single = batch.is_single;
  const u32 at_once = batch.rows_at_once();
  const f32 given = rows.kind == FP8 ? *rows.scale : 1;
  u32 kept_weights[2][3] = {};
  auto load_weight = [&](u32 unit, u32* weight) {
    const u64 within = u64(unit) * UNIT_BYTES;
    if (unit < units) load_words<3>(rows.weight + within, row_length - within, weight);
  };
  if constexpr (KEEPS) {
    load_weight(team.lane(0), kept_weights[0]);
    load_weight(team.lane(0) + LANES, kept_weights[1]);
  }
  for (; batch.first < rows.rows; batch.first += team.teams * at_once) {
    u32 kept[KEEPS ? SLOTS : 1][3] = {};
    auto recall = [&](const Place& place, u32 slot, u32* x, u32* weight) {
      if constexpr (KEEPS) {
#pragma unroll
        for (u32 i = 0; i < 3; i++) {
          x[i] = kept[slot][i];
          weight[i] = is_single || slot % 2 == 0 ? kept_weights[0][i] : kept_weights[1][i];
        }
      } else {
        // This very thread stored it.
        load_words<3>(rows.residual_out + place.at, place.rest, x);
        load_weight(place.unit, weight);
      }
    };
    // 1. Sum, residual, squares.
#pragma unroll 1
    for (u32 share = 0; share < SHARES; share++) {
      u32 sums[SLOTS][3], before[SLOTS][3];
      f32 squares[SLOTS];
#pragma unroll
      for (u32 slot = 0; slot < SLOTS; slot++) {
        const Place place = batch.place(share, slot);
        if (place.is_due) load_words<3>(rows.residual + place.at, place.rest, before[slot]);
      }
      well = well && take(batch, share, sums);
#pragma unroll
      for (u32 slot = 0; slot < SLOTS; slot++) {
        const Place place = batch.place(share, slot);
        squares[slot] = 0;
        if (!well || !place.is_due) continue;
        u32 x[3];
        U::add(sums[slot], before[slot], x);
        store_words<3>(rows.residual_out + place.at, place.rest, x);
        squares[slot] = U::squares(x);
        if constexpr (KEEPS) {
#pragma unroll
          for (u32 i = 0; i < 3; i++) kept[slot][i] = x[i];
        }
      }
      team.template put_rows<Sum>(share, at_once, is_single, squares);
    }
    if (!team.meet(well)) return false;
    const f32 mean = __fdiv_rn(team.template value_of_lane<Sum>(at_once), f32(rows.hidden));
    const f32 inverse_of_lane = __fdiv_rn(1.0f, __fsqrt_rn(mean + rows.epsilon));
    // 2. The scales of the tokens.
    f32 scale_of_lane = given;
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
        team.template put_rows<Most>(share, at_once, is_single, largest);
      }
      if (!team.meet(well)) return false;
      scale_of_lane = fmaxf(__fdiv_rn(team.template value_of_lane<Most>(at_once), LARGEST), LEAST_SCALE);
      const u32 row = batch.first + threadIdx.x * team.teams;
      if (team.member == 0 && threadIdx.x < at_once && row < rows.rows) rows.scale[row] = scale_of_lane;
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

// Blocks that move rows: the last team's are for headers.
__device__ __forceinline__ u32 row_blocks() { return gridDim.x - TEAM_BLOCKS; }

template <u32 SIZE, u32 ROWS>
__device__ __forceinline__ Team<SIZE, ROWS> team_of_rows(Board<ROWS>& board) {
  return Team<SIZE, ROWS>{board, blockIdx.x % SIZE, blockIdx.x / SIZE, row_blocks() / SIZE};
}

template <int DTYPE, u32 SIZE>
__device__ __forceinline__ bool rows_one_shot(const FusedArgs& all, const Entry& entry) {
  constexpr u32 SLOTS = 2;
  __shared__ Board<SLOTS> board;
  const Args& args = all.args;
  const Rows& rows = all.rows;
  const u32 me = args.rank, epoch = entry.epoch, units = units_of(rows);
  const u64 slot_bytes = u64(rows.rows) * units * PACKET_BYTES, half = PACKETS_AT + half_of(epoch) * HALF_BYTES;
  const u64 row_length = row_bytes(rows);
  const u8* source = args.sources[me];
  const bool well = !entry.is_poisoned;
  Team<SIZE, SLOTS> team = team_of_rows<SIZE>(board);
  team.begin();
  if (well) {
    // 1. Push.
    for (u32 row = team.number; row < rows.rows; row += team.teams) {
#pragma unroll 1
      for (u32 share = 0; share < Team<SIZE, SLOTS>::SHARES; share++) {
        for (u32 unit = team.lane(share); unit < units; unit += LANES) {
          const u64 within = u64(unit) * UNIT_BYTES;
          u32 own[3];
          load_words<3>(source + row * row_length + within, row_length - within, own);
#pragma unroll
          for (u32 k = 1; k < RANKS; k++) {
            u8* slot = args.arenas[peer_behind(me, k)] + half + me * slot_bytes + (u64(row) * units + unit) * PACKET_BYTES;
            put_packet(slot, own, epoch);
          }
        }
      }
    }
    arrive(args, entry);
  }
  team.await_boards();
  // 2. Receive and sum; and the rest.
  const u8* arena = args.arenas[me] + half;
  return finish_rows<DTYPE>(rows, team, well, [&](const Batch<SIZE, SLOTS>& batch, u32 share, u32 (&sums)[SLOTS][3]) {
#pragma unroll
    for (u32 slot = 0; slot < SLOTS; slot++) {
      const Place place = batch.place(share, slot);
      if (!place.is_due) continue;
      u32 inputs[RANKS][3], own[3];
      load_words<3>(source + place.at, place.rest, own);
      const u64 at = (u64(place.row) * units + place.unit) * PACKET_BYTES;
      if (!take_units<Packets<1>>(args, entry, inputs, [&](int peer) { return arena + peer * slot_bytes + at; })) return false;
      place_own<3>(inputs, own, me);
      reduce_units<DTYPE, SUM, 3>(inputs, nullptr, sums[slot]);
    }
    return true;
  });
}

template <int DTYPE, u32 SIZE>
__device__ __forceinline__ bool rows_two_shot(const FusedArgs& all, const Entry& entry) {
  constexpr u32 SLOTS = SIZE > 1 ? 4 : 2;
  __shared__ Board<SLOTS> board;
  const Args& args = all.args;
  const Rows& rows = all.rows;
  const u32 me = args.rank, epoch = entry.epoch, units = units_of(rows);
  // Packets have room for far less than 2³² units.
  const u32 number = rows.rows * units, shard = (number + RANKS - 1) / RANKS;
  const u64 slot_bytes = u64(shard) * PACKET_BYTES, half = PACKETS_AT + half_of(epoch) * HALF_BYTES;
  const u64 second = half + RANKS * slot_bytes, row_length = row_bytes(rows);
  const u8* source = args.sources[me];
  const u32 step = row_blocks() * blockDim.x, first = blockIdx.x * blockDim.x + threadIdx.x;
  u8* arena = args.arenas[me];
  auto load = [&](u32 index, u32* words) {
    const u32 row = index / units, unit = index % units;
    const u64 within = u64(unit) * UNIT_BYTES;
    load_words<3>(source + row * row_length + within, row_length - within, words);
  };
  bool well = !entry.is_poisoned;
  Team<SIZE, SLOTS> team = team_of_rows<SIZE>(board);
  team.begin();
  if (well) {
    // 1. Push each shard to its owner.
    for (u32 i = first; i < shard; i += step) {
#pragma unroll
      for (u32 k = 1; k < RANKS; k++) {
        const u32 peer = peer_behind(me, k), index = peer * shard + i;
        if (index >= number) continue;
        u32 own[3];
        load(index, own);
        put_packet(args.arenas[peer] + half + me * slot_bytes + u64(i) * PACKET_BYTES, own, epoch);
      }
    }
    arrive(args, entry);
    // 2. Sum our shard, and push the sums to all. Ours go where those of the others do: other blocks of this device wait for them.
    for (u32 i = first; i < shard && me * shard + i < number; i += step) {
      u32 own[3], sum[3], inputs[RANKS][3];
      load(me * shard + i, own);
      const u64 slot = u64(i) * PACKET_BYTES;
      well = take_units<Packets<1>>(args, entry, inputs, [&](int peer) { return arena + half + peer * slot_bytes + slot; });
      if (!well) break;
      place_own<3>(inputs, own, me);
      reduce_units<DTYPE, SUM, 3>(inputs, nullptr, sum);
#pragma unroll
      for (u32 k = 1; k <= RANKS; k++) {
        put_packet(args.arenas[k < RANKS ? peer_behind(me, k) : me] + second + me * slot_bytes + slot, sum, epoch);
      }
    }
  }
  team.await_boards();
  // 3. Take the sums; and the rest.
  return finish_rows<DTYPE>(rows, team, well, [&](const Batch<SIZE, SLOTS>& batch, u32 share, u32 (&sums)[SLOTS][3]) {
    u32 packets[SLOTS], missing = 0, spins = 0;
#pragma unroll
    for (u32 slot = 0; slot < SLOTS; slot++) {
      const Place place = batch.place(share, slot);
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
}

// The sums lie at our source, which may be the output or the new residual.
template <int DTYPE>
__device__ __forceinline__ void rows_behind(const FusedArgs& all) {
  constexpr u32 SLOTS = 2;
  __shared__ Board<SLOTS> board;
  const u8* from = all.args.sources[all.args.rank];
  Team<1, SLOTS> team{board, 0, blockIdx.x, gridDim.x};
  team.begin();
  team.await_boards();
  finish_rows<DTYPE>(all.rows, team, true, [&](const Batch<1, SLOTS>& batch, u32 share, u32 (&sums)[SLOTS][3]) {
#pragma unroll
    for (u32 slot = 0; slot < SLOTS; slot++) {
      const Place place = batch.place(share, slot);
      if (place.is_due) load_words<3>(from + place.at, place.rest, sums[slot]);
    }
    return true;
  });
}
