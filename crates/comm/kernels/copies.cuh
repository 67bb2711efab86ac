// The other way to run a program of pipeline.cuh: the hardware's bulk copies bring chunks of tiles into shared memory and take them
// out of it; threads fold what lies there, and move what does not lie on lines of 16 bytes. The hardware needs few
// threads to keep many bytes under way, so few blocks nearly fill the links.

#pragma once

#include "pipeline.cuh"

#if !HOST_PACKETS && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define BULK_COPIES 1
#define TILE_THREADS 1024
#else
#define BULK_COPIES 0
#define TILE_THREADS 512
#endif

#if BULK_COPIES

// Chains: each has a warp that loads, one that stores, some that fold, and places of its own in shared memory. They take tiles in
// turn: while one waits for a flag, for the far end of a link, or for a fence, the others go on. A launch gives a block all of a
// multiprocessor, or half of one: of threads, registers and shared memory.
constexpr u32 CHAINS = FLAG_WAYS;
static_assert(TILE_THREADS / 2 % (CHAINS * 32) == 0 && TILE_THREADS / 2 >= CHAINS * 3 * 32, "warps of half a multiprocessor");

// Warps of a chain that fold.
__device__ __forceinline__ u32 folders() { return blockDim.x / 32 / CHAINS - 2; }
static_assert(RANKS <= 16, "a warp has a lane for each input and each output");

constexpr u32 MOST_PLACES = 2;

// Of one chain.
struct Meeting {
  u64 full[MOST_PLACES];   // all inputs of the chunk are there
  u64 ready[MOST_PLACES];  // threads are through with it
  u64 empty[MOST_PLACES];  // all outputs were read from it
};

// Bytes that there are of `count` vectors from vector `from` of the side on.
__device__ __forceinline__ u32 bytes_of(const Side& side, u32 from, u32 count) {
  if (side.at == nullptr) return 0;
  const u64 begin = u64(from) * 16, rest = side.rest > begin ? side.rest - begin : 0;
  return rest < count * 16 ? u32(rest) : count * 16;
}

// Whether they must be moved element by element.
__device__ __forceinline__ bool is_slow(const Side& side, u32 from, u32 count) {
  return side.is_own && side.at != nullptr && (!is_on(side.at, 16) || bytes_of(side, from, count) % 16 != 0);
}

extern __shared__ __align__(128) u8 room[];

template <class Program>
struct Pipeline {
  const Args& args;
  const Entry& entry;
  const Program& program;
  Meeting* meeting;
  u32 chain;
  u32 chunk;           // vectors of one input in one place
  bool have_threads;   // part in it, or data goes straight through

  static constexpr u32 PLACES = Program::INPUTS <= 4 ? MOST_PLACES : 1;

  __device__ __forceinline__ u8* segment(u32 place, u32 side) const {
    return room + (u64(chain * PLACES + place) * Program::INPUTS + side) * chunk * 16;
  }

  // Those of this block that we wait for wait for peers themselves, and tell which.
  __device__ __forceinline__ bool wait_phase(u64* barrier, u32 phase) const {
    return wait_until(args, entry, args.rank, [&] { return rest_for_phase(barrier, phase & 1); });
  }

  // What a lane of the loader waits for before the tile moves.
  __device__ __forceinline__ bool wait_tile(const Flag& flag) const {
    bool is_there = flag.peer == NOBODY ||
                    is_flag_set(args, entry, program.channel, flag.peer, flag.stage, flag.round) ||
                    wait_for(args, entry, program.channel, flag);
    fence_copies_of_memory();
    return is_there;
  }

  // Lane k loads input k. Lanes 16 and on wait until outputs may be written, so that who stores waits for nobody.
  __device__ bool load() const {
    const u32 lane = threadIdx.x & 31;
    bool goes_on = true;
    u32 turn = 0;
    for (u32 t = chain; t < program.tiles() && goes_on; t += CHAINS) {
      const u32 count = program.count(t);
      Side side;
      if (lane < Program::INPUTS) side = program.input(t, lane);
      Flag flag = side.wait;
      if (lane >= 16 && lane - 16 < Program::OUTPUTS) flag = program.output(t, lane - 16).wait;
      bool is_there = wait_tile(flag);
      for (u32 at = 0; at < count && goes_on; at += chunk, turn++) {
        const u32 some = count - at < chunk ? count - at : chunk, place = turn % PLACES, phase = turn / PLACES;
        u64* full = &meeting->full[place];
        if (phase > 0) is_there = wait_phase(&meeting->empty[place], phase - 1) && is_there;
        goes_on = __all_sync(~0u, is_there);
        if (lane >= Program::INPUTS) continue;
        const u32 bytes = goes_on && !is_slow(side, at, some) ? bytes_of(side, at, some) : 0;
        if (bytes > 0) {
          arrive_with(full, bytes);
          copy_in(segment(place, lane), side.at + u64(at) * 16, bytes, full);
        } else {
          arrive_at(full);
        }
      }
    }
    // A block must not end while copies into its memory are under way. Those are from our own memory, and take no peer.
    for (u32 i = turn < PLACES ? 0 : turn - PLACES; !goes_on && i < turn; i++) {
      for (u32 polls = 0; polls < 10000 && !rest_for_phase(&meeting->full[i % PLACES], i / PLACES & 1); polls++) {
      }
    }
    return goes_on;
  }

  // Lane k stores output k; then it tells peers of input k, and lane 16 + k of output k. Of a tile that it told nobody of yet, the copies
  // are still under way: they are waited for when those of the next one have begun, or when there are none to begin. So there is always
  // something under way, and nobody waits for what we keep to ourselves while we wait.
  __device__ bool store() const {
    const u32 lane = threadIdx.x & 31;
    u64* filled = have_threads ? meeting->ready : meeting->full;
    Flag due;
    bool has_due = false;
    auto tell_of_it = [&] {
      __syncwarp();
      // SYNC: what a block stored for round r, in scratch and in outputs, and that it read what was there, is visible after its
      // flag of round r. Bulk copies were waited for.
      fence_all();
      tell(args, entry, program.channel, due);
      has_due = false;
    };
    u32 turn = 0;
    for (u32 t = chain; t < program.tiles(); t += CHAINS) {
      const u32 count = program.count(t);
      Side side;
      if (lane < Program::OUTPUTS) side = program.output(t, lane);
      for (u32 at = 0; at < count; at += chunk, turn++) {
        const u32 some = count - at < chunk ? count - at : chunk, place = turn % PLACES, phase = turn / PLACES;
        if (!__all_sync(~0u, is_phase_over(&filled[place], phase & 1))) {
          if (has_due) wait_copies_out<0>(), tell_of_it();
          if (!__all_sync(~0u, wait_phase(&filled[place], phase))) {
            wait_copies_out<0>();
            return false;
          }
        }
        const u32 bytes = is_slow(side, at, some) ? 0 : bytes_of(side, at, some);
        if (bytes > 0) copy_out(side.at + u64(at) * 16, segment(place, Program::IS_SPREAD ? lane : 0), bytes);
        commit_copies_out();
        if (has_due) wait_copies_out<1>(), tell_of_it();
        wait_copies_out_read<0>();
        __syncwarp();
        if (lane == 0) arrive_at(&meeting->empty[place]);
      }
      due = Flag();
      if (lane < Program::INPUTS) due = program.input(t, lane).tell;
      else if (lane >= 16 && lane - 16 < Program::OUTPUTS) due = program.output(t, lane - 16).tell;
      has_due = true;
    }
    wait_copies_out<0>();
    if (has_due) tell_of_it();
    return true;
  }

  __device__ bool fold(u32 thread) const {
    u32 turn = 0;
    for (u32 t = chain; t < program.tiles(); t += CHAINS) {
      const u32 count = program.count(t);
      for (u32 at = 0; at < count; at += chunk, turn++) {
        const u32 some = count - at < chunk ? count - at : chunk, place = turn % PLACES;
        if (!__all_sync(~0u, wait_phase(&meeting->full[place], turn / PLACES))) return false;
        if constexpr (Program::IS_SPREAD) spread_chunk(t, at, some, place, thread);
        else fold_chunk(t, at, some, place, thread);
        // What we wrote is there for the copies out of it.
        fence_copies_of_room();
        __syncwarp();
        if (thread % 32 == 0) arrive_at(&meeting->ready[place]);
      }
    }
    return true;
  }

  __device__ __forceinline__ void spread_chunk(u32 t, u32 at, u32 some, u32 place, u32 thread) const {
    for (u32 k = 0; k < Program::INPUTS; k++) {
      const Side input = program.input(t, k), output = program.output(t, k);
      const bool comes_slowly = is_slow(input, at, some), goes_slowly = is_slow(output, at, some);
      if (!comes_slowly && !goes_slowly) continue;
      uint4* words = reinterpret_cast<uint4*>(segment(place, k));
      for (u32 v = thread; v < some; v += folders() * 32) {
        uint4 value = comes_slowly ? load_own(input, at + v) : words[v];
        if (comes_slowly) words[v] = value;
        if (goes_slowly) store_own(output, at + v, value);
      }
    }
  }

  __device__ __forceinline__ void fold_chunk(u32 t, u32 at, u32 some, u32 place, u32 thread) const {
    const bool is_folded = program.is_folded(t);
    const u32 from = program.own_input(t), to = program.own_output(t);
    Side input, output;
    if (from != NOBODY) input = program.input(t, from);
    if (to != NOBODY) output = program.output(t, to);
    const bool comes_slowly = is_slow(input, at, some), goes_slowly = is_slow(output, at, some);
    if (!is_folded && !comes_slowly && !goes_slowly) return;
    uint4* words = reinterpret_cast<uint4*>(segment(place, 0));
    for (u32 v = thread; v < some; v += folders() * 32) {
      auto value = [&](u32 k) { return comes_slowly && k == from ? load_own(input, at + v) : words[k * chunk + v]; };
      const uint4 result = is_folded ? program.fold(t, value) : value(0);
      if (is_folded || comes_slowly) words[v] = result;
      if (goes_slowly) store_own(output, at + v, result);
    }
  }
};

// All threads of a block. False if one must leave.
template <class Program>
__device__ __forceinline__ bool run_by_copies(const Args& args, const Entry& entry, const Program& program) {
  __shared__ Meeting meetings[CHAINS];
  using Line = Pipeline<Program>;
  const u32 warp = threadIdx.x / 32, chain = warp % CHAINS, role = warp / CHAINS;
  Meeting& meeting = meetings[chain];
  if (threadIdx.x % 32 == 0 && role == 0) {
    for (u32 i = 0; i < Line::PLACES; i++) {
      make_barrier(&meeting.full[i], Program::INPUTS);
      make_barrier(&meeting.ready[i], folders());
      make_barrier(&meeting.empty[i], 1);
    }
    fence_barriers();
  }
  __syncthreads();
  // Whole lines of 128 bytes.
  const u32 chunk = room_bytes() / (CHAINS * Line::PLACES * Program::INPUTS * 128) * 8;
  const Line line = {args, entry, program, &meeting, chain, chunk, program.needs_threads()};
  bool went = true;
  if (role == 0) went = line.load();
  else if (role == 1) went = line.store();
  else if (line.have_threads) went = line.fold((role - 2) * 32 + threadIdx.x % 32);
  went = __syncthreads_and(went);
  // A block may run several programs, one after the other. Who has failed leaves.
  if (went && threadIdx.x % 32 == 0 && role == 0) {
    for (u32 i = 0; i < Line::PLACES; i++) {
      end_barrier(&meeting.full[i]);
      end_barrier(&meeting.ready[i]);
      end_barrier(&meeting.empty[i]);
    }
  }
  return went;
}

#endif

// Runs a program the way that the launch is made for. All threads of a block; false if one must leave.
template <class Program>
__device__ __forceinline__ bool run(const Args& args, const Entry& entry, const Program& program) {
#if BULK_COPIES
  if (room_bytes() > 0) return run_by_copies(args, entry, program);
#endif
  return run_by_threads(args, entry, program);
}
