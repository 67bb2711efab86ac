// Quantised: an all-reduce by sum whose elements travel as f8e4m3 with an f32 scale for each group of 128 of them. What is computed, with
// which rounding and in which order, is told by unisono_core::quantised.
//
// A group is 11 packets: 128 codes and the scale are 132 bytes. Sixteen lanes share it, eight elements each. Lane l < 11 sends packet l:
// its own two words of codes, and one more, which is a word of the five lanes behind, or of lane 10 the scale.
//
//   one-shot  every rank pushes its groups to all, and sums for itself. Bytes out: (n − 1) · 176 for each group. One hop.
//   two-shot  shard p of all groups goes to rank p, which sums it, quantises the sums, and pushes them to all. Bytes out:
//             2 · (n − 1)/n · 176 for each group. Two hops.
//
// A warp has two groups. All of its lanes go through all of its rounds, those with nothing to do too: they exchange words. Lanes that
// wait for nothing meet the others behind the wait, and a warp leaves as one.

#pragma once

#include "two_shot.cuh"

constexpr u32 GROUP = 128, GROUP_LANES = 16, GROUP_PACKETS = 11, LANE_ELEMENTS = GROUP / GROUP_LANES;
constexpr u32 GROUP_STRIDE = GROUP_PACKETS * PACKET_BYTES, ALL_LANES = 0xffffffff;

template <int DTYPE>
struct Group {
  using E = Element<DTYPE>;
  static constexpr u32 BYTES = GROUP * E::SIZE, WORDS = LANE_ELEMENTS * E::SIZE / 4;

  static __device__ __forceinline__ u32 lane() { return threadIdx.x % GROUP_LANES; }
  // Where this lane's elements lie in the buffers.
  static __device__ __forceinline__ u64 at(u64 group) { return group * BYTES + lane() * WORDS * 4; }

  // What is behind the end reads as zero.
  static __device__ __forceinline__ void load(const u8* source, u64 bytes, u64 group, f32 (&values)[LANE_ELEMENTS]) {
    u32 words[WORDS] = {};
    if (at(group) < bytes) load_words<WORDS>(source + at(group), bytes - at(group), words);
#pragma unroll
    for (u32 i = 0; i < LANE_ELEMENTS; i++) values[i] = E::read(words, i);
  }

  static __device__ __forceinline__ void store(u8* target, u64 bytes, u64 group, const f32 (&values)[LANE_ELEMENTS]) {
    if (at(group) >= bytes) return;
    Fold<DTYPE, SUM, WORDS> fold;
#pragma unroll
    for (u32 i = 0; i < LANE_ELEMENTS; i++) fold.values[i] = values[i];
    u32 words[WORDS];
    fold.partial(words);
    store_words<WORDS>(target + at(group), bytes - at(group), words);
  }
};

__device__ __forceinline__ u32 in_group(u32 value, u32 lane) { return __shfl_sync(ALL_LANES, value, lane, GROUP_LANES); }

// Eight f8e4m3, in two words, and back: what the element does one by one. The hardware rounds to nearest even and saturates too, and
// what it writes for a NaN is one.
__device__ __forceinline__ void encode(const f32 (&values)[LANE_ELEMENTS], u32 (&codes)[2]) {
  codes[0] = codes[1] = 0;
#if __CUDA_ARCH__ >= 890
#pragma unroll
  for (u32 i = 0; i < LANE_ELEMENTS; i += 2) codes[i / 4] |= u32(floats_to_fp8s(values[i], values[i + 1])) << (i % 4 * 8);
#else
#pragma unroll
  for (u32 i = 0; i < LANE_ELEMENTS; i++) Element<F8E4M3>::write(codes, i, values[i]);
#endif
}

__device__ __forceinline__ void decode(const u32 (&codes)[2], f32 (&values)[LANE_ELEMENTS]) {
#pragma unroll
  for (u32 i = 0; i < LANE_ELEMENTS; i += 2) {
#if __CUDA_ARCH__ >= 890
    const u32 halves = fp8s_to_halves(u16(codes[i / 4] >> (i % 4 * 8)));
    values[i] = half_to_float(u16(halves)), values[i + 1] = half_to_float(u16(halves >> 16));
#else
    values[i] = Element<F8E4M3>::read(codes, i), values[i + 1] = Element<F8E4M3>::read(codes, i + 1);
#endif
  }
}

__device__ __forceinline__ bool is_finite(f32 value) { return fabsf(value) < __int_as_float(0x7f800000); }

// All lanes of a warp: the packets of two groups. Lanes from 11 on have none.
__device__ __forceinline__ void quantise(const f32 (&values)[LANE_ELEMENTS], u32 (&packet)[3]) {
  f32 largest = 0;
#pragma unroll
  for (u32 i = 0; i < LANE_ELEMENTS; i++) largest = is_finite(values[i]) ? fmaxf(largest, fabsf(values[i])) : largest;
#pragma unroll
  for (u32 apart = 1; apart < GROUP_LANES; apart *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, apart));
  }
  // No quotient of nothing by nothing: the least is the least normal number.
  const f32 scale = fmaxf(__fdiv_rn(largest, 448.0f), __int_as_float(0x00800000));
  f32 quotients[LANE_ELEMENTS];
#pragma unroll
  for (u32 i = 0; i < LANE_ELEMENTS; i++) {
    quotients[i] = is_finite(values[i]) ? __fdiv_rn(values[i], scale) : __int_as_float(0x7fc00000);
  }
  u32 codes[2];
  encode(quotients, codes);
  const u32 lane = threadIdx.x % GROUP_LANES, behind = GROUP_PACKETS + lane / 2;
  const u32 low = in_group(codes[0], behind), high = in_group(codes[1], behind);
  packet[0] = codes[0], packet[1] = codes[1];
  packet[2] = lane == GROUP_PACKETS - 1 ? __float_as_uint(scale) : lane % 2 == 0 ? low : high;
}

// All lanes of a warp: what the packets of two groups hold.
__device__ __forceinline__ void dequantise(const u32 (&packet)[3], f32 (&values)[LANE_ELEMENTS]) {
  const u32 lane = threadIdx.x % GROUP_LANES, ahead = 2 * (lane + GROUP_LANES - GROUP_PACKETS);
  const u32 low = in_group(packet[2], ahead), high = in_group(packet[2], ahead + 1);
  const f32 scale = __uint_as_float(in_group(packet[2], GROUP_PACKETS - 1));
  const bool is_behind = lane >= GROUP_PACKETS;
  const u32 codes[2] = {is_behind ? low : packet[0], is_behind ? high : packet[1]};
  decode(codes, values);
#pragma unroll
  for (u32 i = 0; i < LANE_ELEMENTS; i++) values[i] = values[i] * scale;
}

// All lanes of a warp: the sums of what all ranks sent, in rank order, as packets.
__device__ __forceinline__ void sum_quantised(const u32 (&packets)[RANKS][3], u32 (&result)[3]) {
  f32 sums[LANE_ELEMENTS];
#pragma unroll
  for (u32 rank = 0; rank < RANKS; rank++) {
    f32 values[LANE_ELEMENTS];
    dequantise(packets[rank], values);
#pragma unroll
    for (u32 i = 0; i < LANE_ELEMENTS; i++) sums[i] = rank == 0 ? values[i] : sums[i] + values[i];
  }
  quantise(sums, result);
}

// Whether a lane sends and takes packets of `group`.
__device__ __forceinline__ bool has_packet(u64 group, u64 groups) {
  return group < groups && threadIdx.x % GROUP_LANES < GROUP_PACKETS;
}

// Calls `body(group)` for this lane's groups, until it answers false; the lanes of a warp as often as each other, so that there may be
// groups from `groups` on.
template <class Body>
__device__ __forceinline__ bool for_groups(u64 groups, Body body) {
  const u64 step = u64(workers()) * blockDim.x / GROUP_LANES;
  const u64 first = (u64(blockIdx.x) * blockDim.x + threadIdx.x) / GROUP_LANES, other = first % 2;
  for (u64 round = first - other; round < groups; round += step) {
    if (!body(round + other)) return false;
  }
  return true;
}

template <int DTYPE>
__device__ __forceinline__ bool quantised_one_shot(const Args& args, const Entry& entry) {
  using G = Group<DTYPE>;
  const u32 me = args.rank, epoch = entry.epoch, lane = G::lane();
  const u64 bytes = args.bytes, groups = (bytes + G::BYTES - 1) / G::BYTES, slot_bytes = groups * GROUP_STRIDE;
  const u64 half = PACKETS_AT + half_of(epoch) * HALF_BYTES;
  const u8* source = args.sources[me];
  const u8* arena = args.arenas[me] + half;
  auto pack = [&](u64 group, u32 (&packet)[3]) {
    f32 values[LANE_ELEMENTS];
    G::load(source, bytes, group, values);
    quantise(values, packet);
  };
  // 1. Push.
  for_groups(groups, [&](u64 group) {
    u32 own[3];
    pack(group, own);
    if (!has_packet(group, groups)) return true;
#pragma unroll
    for (u32 k = 1; k < RANKS; k++) {
      put_packet(args.arenas[peer_behind(me, k)] + half + me * slot_bytes + group * GROUP_STRIDE + lane * PACKET_BYTES, own, epoch);
    }
    return true;
  });
  arrive(args, entry);
  // 2. Receive and sum. Where the input is replaced, the lanes that replace it have read it.
  return for_groups(groups, [&](u64 group) {
    u32 own[3], packets[RANKS][3] = {}, result[3];
    pack(group, own);
    auto slot = [&](int peer) { return arena + peer * slot_bytes + group * GROUP_STRIDE + lane * PACKET_BYTES; };
    const bool is_there = take_units<Packets<1>>(args, entry, packets, slot, [&](int) { return has_packet(group, groups); });
    if (!__all_sync(ALL_LANES, is_there)) return false;
    place_own<3>(packets, own, me);
    sum_quantised(packets, result);
    f32 values[LANE_ELEMENTS];
    dequantise(result, values);
    G::store(args.targets[me], bytes, group, values);
    return true;
  });
}

template <int DTYPE>
__device__ __forceinline__ bool quantised_two_shot(const Args& args, const Entry& entry) {
  using G = Group<DTYPE>;
  const u32 me = args.rank, epoch = entry.epoch, lane = G::lane();
  const u64 bytes = args.bytes, groups = (bytes + G::BYTES - 1) / G::BYTES, shard = (groups + RANKS - 1) / RANKS;
  const u64 slot_bytes = shard * GROUP_STRIDE, half = PACKETS_AT + half_of(epoch) * HALF_BYTES;
  const u64 second = half + RANKS * slot_bytes;
  const u8* source = args.sources[me];
  u8* target = args.targets[me];
  u8* arena = args.arenas[me];
  // Group i of a shard; none if the shard ends before.
  auto group_of = [&](u32 owner, u64 i) { return i < shard ? owner * shard + i : groups; };
  auto packet_at = [&](u64 i) { return i * GROUP_STRIDE + lane * PACKET_BYTES; };
  auto pack = [&](u64 group, u32 (&packet)[3]) {
    f32 values[LANE_ELEMENTS];
    G::load(source, bytes, group, values);
    quantise(values, packet);
  };
  auto unpack = [&](u64 group, const u32 (&packet)[3]) {
    f32 values[LANE_ELEMENTS];
    dequantise(packet, values);
    G::store(target, bytes, group, values);
  };
  // 1. Push each shard to its owner.
  for_groups(shard, [&](u64 i) {
#pragma unroll 1
    for (u32 k = 1; k < RANKS; k++) {
      const u32 peer = peer_behind(me, k);
      const u64 group = group_of(peer, i);
      u32 own[3];
      pack(group, own);
      if (has_packet(group, groups)) put_packet(args.arenas[peer] + half + me * slot_bytes + packet_at(i), own, epoch);
    }
    return true;
  });
  arrive(args, entry);
  // 2. Sum our shard, and push the sums.
  const bool is_summed = for_groups(shard, [&](u64 i) {
    const u64 group = group_of(me, i);
    u32 own[3], packets[RANKS][3] = {}, result[3];
    pack(group, own);
    auto slot = [&](int peer) { return arena + half + peer * slot_bytes + packet_at(i); };
    const bool is_there = take_units<Packets<1>>(args, entry, packets, slot, [&](int) { return has_packet(group, groups); });
    if (!__all_sync(ALL_LANES, is_there)) return false;
    place_own<3>(packets, own, me);
    sum_quantised(packets, result);
#pragma unroll
    for (u32 k = 1; k < RANKS; k++) {
      if (!has_packet(group, groups)) break;
      put_packet(args.arenas[peer_behind(me, k)] + second + me * slot_bytes + packet_at(i), result, epoch);
    }
    unpack(group, result);
    return true;
  });
  if (!is_summed) return false;
  // 3. Take the other shards. Where the input is replaced, the lanes that replace it have sent it.
  return for_groups(shard, [&](u64 i) {
    u32 packets[RANKS][3] = {};
    auto slot = [&](int peer) { return arena + second + peer * slot_bytes + packet_at(i); };
    const bool is_there =
        take_units<Packets<1>>(args, entry, packets, slot, [&](int peer) { return has_packet(group_of(peer, i), groups); });
    if (!__all_sync(ALL_LANES, is_there)) return false;
#pragma unroll
    for (u32 peer = 0; peer < RANKS; peer++) {
      if (peer != me) unpack(group_of(peer, i), packets[peer]);
    }
    return true;
  });
}
