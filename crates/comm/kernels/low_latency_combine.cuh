// Low-latency combine: the rows that the experts of a rank made of a token are added there, weighted, and go back as one row; the token's
// rank adds those rows.
//
// Two hops: every rank tells the choices of its tokens with their weights, and gets rows for them. Bytes out for each token of a peer that
// came: hidden elements, or hidden · (1 + 4/128) quantised. Terms are added in f32, in the order of the token's selections, and rounded
// to what travels; then in f32, in the order of ranks, and rounded once more; see unisono_core::ep.

#pragma once

#include "low_latency.cuh"

// The row of a selection among the results of our experts, which the dispatch gave `row`: lane k has selection k. −1 if there is none, −2 if it is not as it was dispatched.
__device__ __forceinline__ i32 result_row(const LowLatency& ll, const Asked& asked, i32 row) {
  if (asked.expert == NOBODY) return -1;
  const u32 rows = block_rows(ll);
  if (asked.expert >= ll.experts_of[ll.buffer.rank]) return -2;
  const i64 within = i64(row) - i64(asked.expert) * rows;
  return within < 0 || within >= rows ? -2 : row;
}

// All lanes of a warp: the weighted sum of a piece of the rows that lanes have, to the rank of the token. False, and nothing is sent, if a
// lane's row is `named` as that of another token.
template <int DTYPE>
__device__ __forceinline__ bool send_sum(const LowLatency& ll, const Turn& turn, u32 source, u32 token, u32 piece, i32 row, i32 named,
                                         f32 weight) {
  using E = Element<DTYPE>;
  // Rows of experts that a lane has under way.
  constexpr u32 STEPS_AT_ONCE = STEPS / E::SIZE, ROWS_AT_ONCE = 4;
  const u32 lane = lane_of_warp(), me = ll.buffer.rank;
  const u32 chosen = __ballot_sync(ALL_LANES, row >= 0);
  const bool is_wide = is_on(ll.x, 16);
  u8* to = row_in(ll, source, turn.sent, me, token);
#pragma unroll 1
  for (u32 part = 0; part < STEPS; part += STEPS_AT_ONCE) {
    const u32 first = piece * PIECE + part * STEP + lane * LANE_ELEMENTS;
    f32 sums[STEPS_AT_ONCE][LANE_ELEMENTS] = {};
    bool is_first = true;
    for (u32 rest = chosen; rest != 0;) {
      Slice<DTYPE> slices[ROWS_AT_ONCE][STEPS_AT_ONCE];
      f32 by[ROWS_AT_ONCE];
      u32 asked = rest;
#pragma unroll
      for (u32 r = 0; r < ROWS_AT_ONCE; r++) {
        const u32 k = asked != 0 ? __ffs(asked) - 1 : 0;
        const u8* from = ll.x + u64(__shfl_sync(ALL_LANES, row, k)) * ll.hidden * E::SIZE;
        by[r] = __shfl_sync(ALL_LANES, weight, k);
#pragma unroll
        for (u32 q = 0; q < STEPS_AT_ONCE; q++) {
          slices[r][q].clear();
          if (asked != 0 && first + q * STEP < ll.hidden) slices[r][q].load(from + (first + q * STEP) * E::SIZE, is_wide);
        }
        asked &= asked - 1;
      }
#pragma unroll
      for (u32 r = 0; r < ROWS_AT_ONCE; r++) {
        if (rest == 0) break;
        rest &= rest - 1;
#pragma unroll
        for (u32 q = 0; q < STEPS_AT_ONCE; q++) {
#pragma unroll
          for (u32 i = 0; i < LANE_ELEMENTS; i++) {
            const f32 term = by[r] * slices[r][q].value(i);
            sums[q][i] = is_first ? term : sums[q][i] + term;
          }
        }
        is_first = false;
      }
    }
    if (__any_sync(ALL_LANES, named != i32(token))) return false;
#pragma unroll
    for (u32 q = 0; q < STEPS_AT_ONCE; q++) {
      const u32 at = first + q * STEP;
      if (ll.cast == UNCAST) {
        Slice<DTYPE> slice;
        slice.round(sums[q]);
        if (at < ll.hidden) slice.put(to + at * E::SIZE);
      } else {
        f32 scale;
        const u64 codes = cast_slice(sums[q], ll.cast, &scale);
        if (at < ll.hidden) *reinterpret_cast<u64*>(to + at) = codes;
        if (at < ll.hidden && at % GROUP == 0) {
          scales_in(ll, source, turn.sent, me, token)[at / GROUP] = __float_as_uint(scale);
        }
      }
    }
  }
  tell_piece(ll, turn, token, piece, 1u << source);
  return true;
}

template <int DTYPE>
__device__ __forceinline__ bool send_results(const LowLatency& ll, const Turn& turn) {
  const u32 lane = lane_of_warp();
  u32 present;
  if (!await_credits(ll, turn, &present)) return false;
  // 1. Heads, by the first blocks, and choices with their weights.
  for (u32 rank = blockIdx.x; rank < RANKS; rank += gridDim.x) {
    if (present >> rank & 1) tell_head<false>(ll, turn, rank);
  }
  bool goes_on = true;
  for (u32 token = warp_behind_heads(); token < ll.tokens; token += warps_of_grid()) {
    const Choices choices = choices_of(ll, token);
    goes_on = are_possible(ll, turn, token, choices);
    if (!goes_on) break;
    const f32 weight = lane < ll.top_k ? ll.weights[u64(token) * ll.top_k + lane] : 0;
    tell_choices(ll, turn, token, choices, __float_as_uint(weight), present);
  }
  // 2. Sums for the tokens of all ranks.
  __shared__ Heads heads;
  if (!__syncthreads_and(goes_on) || !await_heads(ll, turn, turn.sent, turn.left_out, &heads)) return false;
  for (Walk walk(warp_from_end(), warps_of_grid(), heads.most, RANKS * ll.pieces); walk.goes_on(); walk.next()) {
    const u32 token = walk.outer, source = peer_behind(ll.buffer.rank, walk.inner % RANKS), piece = walk.inner / RANKS;
    if (token >= heads.tokens[source]) continue;
    // Asked for while the choices are awaited.
    const i32 given = lane < ll.top_k ? ll.slots[place_of(ll, source, token) * ll.top_k + lane] : -1;
    Asked asked;
    if (await_choices(ll, turn, turn.sent, source, token, &asked) == MUST_LEAVE) return false;
    if (!asked.is_any) continue;
    const i32 row = result_row(ll, asked, given);
    // Compared once for a token, while its rows are under way.
    const i32 named = piece == 0 && row >= 0 ? ll.source_tokens[row] : i32(token);
    const bool is_there = __all_sync(ALL_LANES, row != -2);
    if (is_there && send_sum<DTYPE>(ll, turn, source, token, piece, row, named, __uint_as_float(asked.value))) continue;
    if (row == -2 || named != i32(token)) give_up(ll.buffer, REASON_CHOICE, source, turn.entry.epoch, token, asked.expert, 0);
    return false;
  }
  return true;
}

// All lanes of a warp: adds what `ranks` sent for a step of one of our tokens.
template <int DTYPE>
__device__ __forceinline__ void add_rows(const LowLatency& ll, u64 number, u32 token, u32 at, u32 ranks) {
  using E = Element<DTYPE>;
  constexpr u32 RANKS_AT_ONCE = RANKS < 8 / E::SIZE ? RANKS : 8 / E::SIZE;
  const u32 me = ll.buffer.rank;
  f32 sums[LANE_ELEMENTS] = {};
  bool is_first = true;
  auto add = [&](const f32 (&values)[LANE_ELEMENTS]) {
#pragma unroll
    for (u32 i = 0; i < LANE_ELEMENTS; i++) sums[i] = is_first ? values[i] : sums[i] + values[i];
    is_first = false;
  };
#pragma unroll 1
  for (u32 from = 0; from < RANKS; from += RANKS_AT_ONCE) {
    Slice<DTYPE> slices[RANKS_AT_ONCE];
    u64 codes[RANKS_AT_ONCE];
    u32 scales[RANKS_AT_ONCE];
#pragma unroll
    for (u32 i = 0; i < RANKS_AT_ONCE; i++) {
      const u32 rank = from + i;
      if (!(ranks >> rank & 1)) continue;
      const u8* row = row_in(ll, me, number, rank, token);
      if (ll.cast == UNCAST) {
        slices[i].take(row + at * E::SIZE);
      } else {
        codes[i] = load_word(reinterpret_cast<const u64*>(row + at));
        scales[i] = load_short_word(scales_in(ll, me, number, rank, token) + at / GROUP);
      }
    }
#pragma unroll
    for (u32 i = 0; i < RANKS_AT_ONCE; i++) {
      if (!(ranks >> (from + i) & 1)) continue;
      f32 values[LANE_ELEMENTS];
      if (ll.cast == UNCAST) {
#pragma unroll
        for (u32 j = 0; j < LANE_ELEMENTS; j++) values[j] = slices[i].value(j);
      } else {
        const u32 halves[2] = {u32(codes[i]), u32(codes[i] >> 32)};
        decode(halves, values);
#pragma unroll
        for (u32 j = 0; j < LANE_ELEMENTS; j++) values[j] = values[j] * __uint_as_float(scales[i]);
      }
      add(values);
    }
  }
  Slice<DTYPE> sum;
  sum.round(sums);
  sum.store(ll.out + (u64(token) * ll.hidden + at) * E::SIZE, is_on(ll.out, 16));
}

// All lanes of a warp. False if one must leave.
template <int DTYPE>
__device__ __forceinline__ bool receive_results(const LowLatency& ll, const Turn& turn, const Share& share) {
  const u32 me = ll.buffer.rank, steps = (ll.hidden + STEP - 1) / STEP;
  for (Walk walk(share.first, share.step, ll.tokens, steps); walk.goes_on(); walk.next()) {
    const u32 token = walk.outer, at = walk.inner * STEP + lane_of_warp() * LANE_ELEMENTS;
    const u32 ranks = choices_of(ll, token).ranks & ~share.left_out;
    u32 there;
    // SYNC: a piece and its scales are visible before the word that tells it.
    const bool goes_on = await_ranks(ll, turn, ranks, &there, [&](u32 rank) {
      return acquire_word(piece_told(ll, me, turn.received, rank, token, walk.inner / STEPS)) == turn.received;
    });
    if (!goes_on) return false;
    if (at < ll.hidden) add_rows<DTYPE>(ll, turn.received, token, at, there);
  }
  return true;
}

template <int DTYPE>
__device__ __forceinline__ void combine(const LowLatency& ll) {
  carry_out(
      ll, warp_of_grid(), [&](const Turn& turn) { return send_results<DTYPE>(ll, turn); },
      [&](const Turn& turn, const Share& share) { return receive_results<DTYPE>(ll, turn, share); });
}
