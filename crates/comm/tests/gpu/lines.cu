// Stores lines to all peers over and over, into the same few places, while they look. One half of the blocks stores, the other looks.
// What a look must never see: a line in which the data is of another round than the tag, whichever of the two is newer.

#include "units.cuh"

// As the host has it: only the copies are of use here.
struct View {
  u8* copies[MAX_RANKS];
  u64 signals_at, abort, bytes, patience_ns;
  u32 rank, ranks;
};

struct Hammer {
  View shared;
  u64* answer;  // lines that were looked at, lanes that saw something else, warps that gave up
  u64 most_ns;
  u32 rounds, units;
};

using U = Lines<4>;

__device__ __forceinline__ u32 word(u32 round, u32 at) { return round * 2654435761u + U::lane() * 4 + at; }

__device__ __forceinline__ u8* place(const Hammer& args, u32 owner, u32 source, u32 unit) {
  return args.shared.copies[owner] + (u64(source) * args.units + unit) * U::STRIDE;
}

__device__ __forceinline__ void store(const Hammer& args, u32 first, u32 step) {
  for (u32 round = 1; round <= args.rounds; round++) {
    for (u32 turn = first; turn < args.units; turn += step) {
      const u32 unit = turn + U::nth();
      const u32 words[4] = {word(round, 0), word(round, 1), word(round, 2), word(round, 3)};
      for (u32 k = 1; k < RANKS; k++) {
        const u32 peer = peer_behind(args.shared.rank, k);
        U::put(place(args, peer, args.shared.rank, unit), words, round, unit < args.units);
      }
    }
  }
}

__device__ __forceinline__ void look(const Hammer& args, u32 first, u32 step) {
  const u64 started_ns = now_ns();
  u64 looks = 0, torn = 0;
  bool is_done = false, is_late = false;
  while (!is_done && !is_late) {
    is_done = true;
    for (u32 turn = first; turn < args.units; turn += step) {
      const u32 unit = turn + U::nth();
      for (u32 k = 1; k < RANKS; k++) {
        const u8* at = place(args, args.shared.rank, peer_behind(args.shared.rank, k), unit) + U::lane() * 16;
        uint4 part = make_uint4(0, 0, 0, args.rounds);
        U::meet();
        if (unit < args.units) part = load_part_of_line(at);
        const u32 round = __shfl_sync(~0u, part.w, threadIdx.x % 32 | 7);
        is_done &= round == args.rounds;
        if (round == 0 || unit >= args.units) continue;
        const bool is_right = U::has_tag() ? part.z == round : part.z == word(round, 2) && part.w == word(round, 3);
        torn += part.x != word(round, 0) || part.y != word(round, 1) || !is_right;
        looks += U::has_tag();
      }
    }
    is_done = U::all(is_done);
    is_late = U::any(now_ns() - started_ns > args.most_ns);
  }
  atomicAdd(args.answer, looks);
  atomicAdd(args.answer + 1, torn);
  if (!is_done && threadIdx.x % 32 == 0) atomicAdd(args.answer + 2, 1);
}

extern "C" __global__ void __launch_bounds__(512) hammer(const __grid_constant__ Hammer args) {
  const u32 half = gridDim.x / 2, warps = half * blockDim.x / 32;
  const u32 first = (blockIdx.x % half * blockDim.x + threadIdx.x) / 32 * U::UNITS, step = warps * U::UNITS;
  if (blockIdx.x < half) store(args, first, step);
  else look(args, first, step);
}
