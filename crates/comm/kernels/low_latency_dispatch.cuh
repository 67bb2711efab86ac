// Low-latency dispatch: every rank sends each of its tokens once to every rank that has one of its experts, and has a block of rows for
// each of its own experts then, in the order of source rank and token.
//
// One hop. Bytes out for each token and rank that it goes to: hidden · (1 + 4/128) cast, or as they are. The row of a token in an expert's
// block is the number of rows that ranks before its source have there (from their heads), and of tokens before it (which its source
// counts and tells with the choice). So the receiver places each piece as soon as it is there.

#pragma once

#include "low_latency.cuh"

// All lanes of a warp: for each lane's selection, how many tokens before this one have it, too.
__device__ __forceinline__ u32 count_before(const LowLatency& ll, u32 token, const Choices& choices) {
  constexpr u32 CHUNKS = 8;
  const u32 lane = lane_of_warp(), end = token * ll.top_k;
  u32 before = 0;
  for (u32 first = 0; first < end; first += CHUNKS * WARP) {
    i64 others[CHUNKS];
#pragma unroll
    for (u32 i = 0; i < CHUNKS; i++) {
      const u32 at = first + i * WARP + lane;
      others[i] = at < end ? ll.selections[at] : -2;
    }
#pragma unroll 1
    for (u32 k = 0; k < ll.top_k; k++) {
      const i64 selection = __shfl_sync(ALL_LANES, choices.selection, k);
      u32 same = 0;
#pragma unroll
      for (u32 i = 0; i < CHUNKS; i++) same += __popc(__ballot_sync(ALL_LANES, others[i] == selection));
      if (lane == k) before += same;
    }
  }
  return before;
}

// All lanes of a warp: stores a piece of one of our tokens at each of `present` that it goes to.
template <int DTYPE>
__device__ __forceinline__ void send_piece(const LowLatency& ll, const Turn& turn, u32 token, u32 piece, u32 present) {
  using E = Element<DTYPE>;
  constexpr u32 STEPS_AT_ONCE = STEPS * 2 / E::SIZE;
  const u32 lane = lane_of_warp(), me = ll.buffer.rank;
  const u8* row = ll.x + u64(token) * ll.hidden * E::SIZE;
  const bool is_wide = is_on(ll.x, 16);
  u32 ranks = 0;
#pragma unroll 1
  for (u32 part = 0; part < STEPS; part += STEPS_AT_ONCE) {
    const u32 first = piece * PIECE + part * STEP + lane * LANE_ELEMENTS;
    Slice<DTYPE> slices[STEPS_AT_ONCE];
#pragma unroll
    for (u32 q = 0; q < STEPS_AT_ONCE; q++) {
      slices[q].clear();
      if (first + q * STEP < ll.hidden) slices[q].load(row + (first + q * STEP) * E::SIZE, is_wide);
    }
    // Asked for while the row is under way.
    if (part == 0) ranks = choices_of(ll, token).ranks & present;
    if (ranks == 0) return;
    if (ll.cast == UNCAST) {
      for_ranks(ll, ranks, [&](u32 rank) {
        u8* to = row_in(ll, rank, turn.sent, me, token);
#pragma unroll
        for (u32 q = 0; q < STEPS_AT_ONCE; q++) {
          if (first + q * STEP < ll.hidden) slices[q].put(to + (first + q * STEP) * E::SIZE);
        }
      });
      continue;
    }
    u64 codes[STEPS_AT_ONCE];
    f32 scales[STEPS_AT_ONCE];
#pragma unroll
    for (u32 q = 0; q < STEPS_AT_ONCE; q++) {
      f32 values[LANE_ELEMENTS];
#pragma unroll
      for (u32 i = 0; i < LANE_ELEMENTS; i++) values[i] = slices[q].value(i);
      codes[q] = cast_slice(values, ll.cast, &scales[q]);
    }
    for_ranks(ll, ranks, [&](u32 rank) {
      u8* to = row_in(ll, rank, turn.sent, me, token);
      u32* to_scales = scales_in(ll, rank, turn.sent, me, token);
#pragma unroll
      for (u32 q = 0; q < STEPS_AT_ONCE; q++) {
        const u32 at = first + q * STEP;
        if (at >= ll.hidden) continue;
        *reinterpret_cast<u64*>(to + at) = codes[q];
        if (at % GROUP == 0) to_scales[at / GROUP] = __float_as_uint(scales[q]);
      }
    });
  }
  tell_piece(ll, turn, token, piece, ranks);
}

template <int DTYPE>
__device__ __forceinline__ bool send_tokens(const LowLatency& ll, const Turn& turn) {
  u32 present;
  if (!await_credits(ll, turn, &present)) return false;
  // 1. Heads, by the first blocks; the rest begins behind them.
  for (u32 rank = blockIdx.x; rank < RANKS; rank += gridDim.x) {
    if (present >> rank & 1) tell_head<true>(ll, turn, rank);
  }
  const u32 warps = warps_of_grid(), behind_heads = warp_behind_heads();
  // 2. Choices.
  for (u32 token = behind_heads; token < ll.tokens; token += warps) {
    const Choices choices = choices_of(ll, token);
    if (!are_possible(ll, turn, token, choices)) return false;
    tell_choices(ll, turn, token, choices, count_before(ll, token, choices), present);
  }
  // 3. Pieces, by the warps behind those.
  const u32 before = ll.tokens % warps;
  const u32 first = behind_heads >= before ? behind_heads - before : behind_heads + warps - before;
  for (Walk walk(first, warps, ll.tokens, ll.pieces); walk.goes_on(); walk.next()) {
    send_piece<DTYPE>(ll, turn, walk.outer, walk.inner, present);
  }
  return true;
}

// All lanes of a warp: until `source` has told how many of its selections are each lane's expert, of those that have one.
__device__ __noinline__ Came await_count(const LowLatency& ll, const Turn& turn, u64 number, u32 source, u32 expert, u32* count) {
  return wait_for<true>(ll, turn, source, [&] { return expert == NOBODY || take_count(ll, number, source, expert, count); });
}

// All lanes of a warp: the selections of each lane's expert by each of `ranks`. Mostly they came with the heads. False if one must leave.
__device__ __forceinline__ bool await_counts(const LowLatency& ll, const Turn& turn, u64 number, u32 ranks, u32 expert, u32 (&counts)[RANKS]) {
  bool are_there = true;
#pragma unroll
  for (u32 source = 0; source < RANKS; source++) {
    counts[source] = 0;
    if (expert != NOBODY && (ranks >> source & 1)) are_there &= take_count(ll, number, source, expert, &counts[source]);
  }
  if (__all_sync(ALL_LANES, are_there)) return true;
#pragma unroll
  for (u32 source = 0; source < RANKS; source++) {
    if (!(ranks >> source & 1)) continue;
    u32 count = 0;
    const Came came = await_count(ll, turn, number, source, expert, &count);
    if (came == MUST_LEAVE) return false;
    // Without it, all is received once more.
    counts[source] = came == CAME && expert != NOBODY ? count : 0;
  }
  return true;
}

// All lanes of a warp: rows of our experts by source, and in all. False if one must leave.
__device__ __forceinline__ bool write_ranges(const LowLatency& ll, const Turn& turn, u64 number, u32 present, u32 expert) {
  const bool is_ours = expert < ll.experts_of[ll.buffer.rank];
  u32 counts[RANKS], rows = 0;
  if (!await_counts(ll, turn, number, present, is_ours ? expert : NOBODY, counts)) return false;
  if (!is_ours) return true;
#pragma unroll
  for (u32 source = 0; source < RANKS; source++) {
    ll.ranges[u64(expert) * RANKS + source] = i64(u64(rows) << 32 | counts[source]);
    rows += counts[source];
  }
  ll.counts[expert] = i32(rows);
  return true;
}

// All lanes of a warp: copies a piece to the rows of lanes that have one (an expert that is not NOBODY, and the row in its block).
template <int DTYPE>
__device__ __forceinline__ void place_piece(const LowLatency& ll, u64 number, u32 source, u32 token, u32 piece, u32 expert, u32 row) {
  using E = Element<DTYPE>;
  const u32 lane = lane_of_warp(), me = ll.buffer.rank, first = piece * PIECE + lane * LANE_ELEMENTS;
  const u8* from = row_in(ll, me, number, source, token);
  const u32 chosen = __ballot_sync(ALL_LANES, expert != NOBODY);
  const u64 rows = block_rows(ll);
  auto for_rows = [&](auto body) {
#pragma unroll 1
    for (u32 rest = chosen; rest != 0; rest &= rest - 1) {
      const u32 k = __ffs(rest) - 1;
      body(__shfl_sync(ALL_LANES, expert, k), __shfl_sync(ALL_LANES, row, k));
    }
  };
  if (ll.cast == UNCAST) {
    constexpr u32 STEPS_AT_ONCE = STEPS / E::SIZE;
#pragma unroll 1
    for (u32 part = first; part < first + PIECE; part += STEPS_AT_ONCE * STEP) {
      Slice<DTYPE> slices[STEPS_AT_ONCE];
#pragma unroll
      for (u32 q = 0; q < STEPS_AT_ONCE; q++) {
        if (part + q * STEP < ll.hidden) slices[q].take(from + (part + q * STEP) * E::SIZE);
      }
      for_rows([&](u32 to, u32 at) {
        u8* target = ll.out + (to * rows + at) * ll.hidden * E::SIZE;
#pragma unroll
        for (u32 q = 0; q < STEPS_AT_ONCE; q++) {
          if (part + q * STEP < ll.hidden) slices[q].store(target + (part + q * STEP) * E::SIZE, true);
        }
      });
    }
    return;
  }
  u64 codes[STEPS];
#pragma unroll
  for (u32 q = 0; q < STEPS; q++) {
    if (first + q * STEP < ll.hidden) codes[q] = load_word(reinterpret_cast<const u64*>(from + first + q * STEP));
  }
  // Lane i has scale i of the piece. Four exponents share a word as UE8M0: then rows have a multiple of four.
  const u32 scale = piece * PIECE_SCALES + lane;
  const bool has_scale = lane < PIECE_SCALES && scale < ll.row_scales;
  const bool is_packed = ll.cast == CAST_UE8M0;
  u32 word = has_scale ? load_short_word(scales_in(ll, me, number, source, token) + scale) : 0;
  if (is_packed) {
    word = (word >> 23) << (lane % 4 * 8);
    word |= __shfl_xor_sync(ALL_LANES, word, 1);
    word |= __shfl_xor_sync(ALL_LANES, word, 2);
  }
  const u32 columns = is_packed ? ll.row_scales / 4 : ll.row_scales, column = is_packed ? scale / 4 : scale;
  for_rows([&](u32 to, u32 at) {
    u8* target = ll.out + (to * rows + at) * ll.hidden;
#pragma unroll
    for (u32 q = 0; q < STEPS; q++) {
      if (first + q * STEP < ll.hidden) *reinterpret_cast<u64*>(target + first + q * STEP) = codes[q];
    }
    if (has_scale && !(is_packed && lane % 4 != 0)) ll.out_scales[(u64(to) * columns + column) * rows + at] = word;
  });
}

// All threads of a block. False from those that must leave.
template <int DTYPE>
__device__ __forceinline__ bool receive_tokens(const LowLatency& ll, const Turn& turn, const Share& share) {
  const u32 lane = lane_of_warp(), me = ll.buffer.rank, rows = block_rows(ll);
  const u64 number = turn.received;
  __shared__ Heads heads;
  if (!await_heads(ll, turn, number, share.left_out, &heads)) return false;
  // By other warps than those that have the first pieces.
  for (u32 expert = (share.first + share.step / 2) % share.step * WARP; expert < ll.experts_of[me]; expert += share.step * WARP) {
    if (!write_ranges(ll, turn, number, heads.present, expert + lane)) return false;
  }
  for (Walk walk(share.first, share.step, heads.most, RANKS * ll.pieces); walk.goes_on(); walk.next()) {
    const u32 token = walk.outer, source = peer_behind(me, walk.inner % RANKS), piece = walk.inner / RANKS;
    if (token >= heads.tokens[source]) continue;
    Asked asked;
    Came came = await_choices(ll, turn, number, source, token, &asked);
    if (came == MUST_LEAVE) return false;
    if (!asked.is_any) continue;
    // Rows that ranks before the source have there come before.
    const bool is_ours = asked.expert < ll.experts_of[me];
    u32 counts[RANKS], row = asked.value;
    if (!await_counts(ll, turn, number, heads.present & ((1u << source) - 1), is_ours ? asked.expert : NOBODY, counts)) return false;
    came = await_piece(ll, turn, source, piece_told(ll, me, number, source, token, piece), number);
    if (came == MUST_LEAVE) return false;
    if (came == LEFT_OUT) continue;
#pragma unroll
    for (u32 before = 0; before < RANKS; before++) row += counts[before];
    const bool is_possible = asked.expert == NOBODY || (is_ours && row < rows);
    if (!is_possible) give_up(ll.buffer, REASON_CHOICE, source, turn.entry.epoch, token, asked.expert, 0);
    if (!__all_sync(ALL_LANES, is_possible)) return false;
    if (piece == 0 && lane < ll.top_k) {
      const u64 at = u64(asked.expert) * rows + row;
      ll.slots[place_of(ll, source, token) * ll.top_k + lane] = asked.expert == NOBODY ? -1 : i32(at);
      if (asked.expert != NOBODY) ll.source_tokens[at] = i32(token);
    }
    place_piece<DTYPE>(ll, number, source, token, piece, asked.expert, row);
  }
  return true;
}

template <int DTYPE>
__device__ __forceinline__ void dispatch(const LowLatency& ll) {
  carry_out(
      ll, warp_from_end(), [&](const Turn& turn) { return send_tokens<DTYPE>(ll, turn); },
      [&](const Turn& turn, const Share& share) { return receive_tokens<DTYPE>(ll, turn, share); });
}
