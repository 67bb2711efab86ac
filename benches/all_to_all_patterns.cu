// Equal parts from every GPU to every other, without any protocol around them: which way of moving them is the fastest?
//
//   nvcc -O3 -arch=sm_90 -std=c++17 all_to_all_patterns.cu -o all_to_all_patterns && ./all_to_all_patterns [GPUs] [MiB of a part]
//
// All GPUs that this process has, or the first so many, at most eight. A line is a way, an order and a grid; its figures are gigabytes per
// second that leave each GPU, medians of three runs of six rounds, of the slowest GPU each. What arrived is compared at the end of each line.

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#define OK(CALL)                                                                   \
  do {                                                                             \
    cudaError_t error = (CALL);                                                    \
    if (error != cudaSuccess) {                                                    \
      fprintf(stderr, "%s: %s\n", #CALL, cudaGetErrorString(error));               \
      exit(1);                                                                     \
    }                                                                              \
  } while (0)

constexpr int MOST_GPUS = 8, ROUNDS = 6, RUNS = 3;

// By stores to peers; by loads from peers; half of the blocks each, for half of the data.
enum Way { PUSH, PULL, HALVES };
// A block goes to all peers in turn, every block beginning with another; or has one peer; or all blocks have the same peer at a time.
enum Order { ROTATED, PAIRS, PHASES };

struct Args {
  const uint4* inputs[MOST_GPUS];  // of each rank: a part for each rank
  uint4* outputs[MOST_GPUS];       // a part of each rank
  int rank, ranks, way, order;
  int piece;                       // vectors of 16 bytes that a block moves at a time
  int rounds;
  size_t vectors;                  // of a part
};

struct Piece {
  const uint4* from;
  uint4* to;
  int vectors;
};

// Calls move(piece) for everything that this block moves in one round.
template <class Move>
__device__ void for_pieces(const Args& args, Move move) {
  const int peers = args.ranks - 1, halves = args.way == HALVES ? 2 : 1;
  const bool pulls = args.way == PULL || (args.way == HALVES && blockIdx.x % 2 == 1);
  const size_t blocks = gridDim.x / halves, block = blockIdx.x / halves;
  const size_t pieces = (args.vectors + args.piece - 1) / args.piece;
  const size_t first = halves == 2 && pulls ? pieces / 2 : 0, last = halves == 2 && !pulls ? pieces / 2 : pieces;
  auto one = [&](size_t behind, size_t nth) {
    const int me = args.rank, peer = (me + 1 + behind) % args.ranks;
    const size_t begin = nth * args.piece, ours = me * args.vectors + begin, theirs = peer * args.vectors + begin;
    const int vectors = int(min(size_t(args.piece), args.vectors - begin));
    move(pulls ? Piece{args.inputs[peer] + ours, args.outputs[me] + theirs, vectors}
               : Piece{args.inputs[me] + theirs, args.outputs[peer] + ours, vectors});
  };
  if (args.order == ROTATED) {
    for (size_t nth = first + block; nth < last; nth += blocks) {
      for (int k = 0; k < peers; k++) one((k + block) % peers, nth);
    }
  } else if (args.order == PAIRS) {
    const size_t each = blocks / peers;
    for (size_t nth = first + block / peers; block < each * peers && nth < last; nth += each) one(block % peers, nth);
  } else {
    for (int k = 0; k < peers; k++) {
      for (size_t nth = first + block; nth < last; nth += blocks) one(k, nth);
    }
  }
}

template <int UNDER_WAY>
__global__ void __launch_bounds__(512) by_threads(const __grid_constant__ Args args) {
  for (int round = 0; round < args.rounds; round++) {
    for_pieces(args, [](Piece piece) {
      for (int at = threadIdx.x; at < piece.vectors; at += blockDim.x * UNDER_WAY) {
        uint4 values[UNDER_WAY];
#pragma unroll
        for (int i = 0; i < UNDER_WAY; i++) {
          if (at + i * blockDim.x < piece.vectors) values[i] = __ldcg(piece.from + at + i * blockDim.x);
        }
#pragma unroll
        for (int i = 0; i < UNDER_WAY; i++) {
          if (at + i * blockDim.x < piece.vectors) __stcg(piece.to + at + i * blockDim.x, values[i]);
        }
      }
    });
  }
}

__device__ unsigned in_shared(const void* at) { return unsigned(__cvta_generic_to_shared(at)); }

// One thread of a block has bulk copies move pieces into shared memory and on: two on their way in, up to three on their way out.
constexpr int PLACES = 4;

__global__ void __launch_bounds__(32) by_copies(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) uint4 places[];
  __shared__ __align__(8) unsigned long long full[PLACES];
  __shared__ Piece pieces[PLACES];
  if (threadIdx.x != 0) return;
  for (int i = 0; i < PLACES; i++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(in_shared(&full[i])) : "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  unsigned loaded = 0, stored = 0;
  auto store = [&] {
    const unsigned place = stored % PLACES, phase = stored / PLACES % 2, barrier = in_shared(&full[place]);
    unsigned is_there = 0;
    while (!is_there) {
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
          : "=r"(is_there) : "r"(barrier), "r"(phase) : "memory");
    }
    const Piece piece = pieces[place];
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(piece.to),
                 "r"(in_shared(places + place * args.piece)), "r"(piece.vectors * 16) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    stored++;
  };
  for (int round = 0; round < args.rounds; round++) {
    for_pieces(args, [&](Piece piece) {
      if (loaded - stored == 2) store();
      // What was stored from this place has been read: all but the latest two.
      asm volatile("cp.async.bulk.wait_group.read 2;" ::: "memory");
      const unsigned place = loaded % PLACES, barrier = in_shared(&full[place]);
      pieces[place] = piece;
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(piece.vectors * 16) : "memory");
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       in_shared(places + place * args.piece)),
                   "l"(piece.from), "r"(piece.vectors * 16), "r"(barrier) : "memory");
      loaded++;
    });
  }
  while (stored < loaded) store();
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Part p of an output is all p + 1, part `rank` what it was.
__global__ void count_wrong(const uint4* output, int rank, int ranks, size_t vectors, unsigned long long* wrong) {
  for (int part = 0; part < ranks; part++) {
    const unsigned expected = part == rank ? 0 : (part + 1) * 0x01010101u;
    for (size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x; at < vectors; at += size_t(gridDim.x) * blockDim.x) {
      const uint4 got = output[part * vectors + at];
      if (got.x != expected || got.y != expected || got.z != expected || got.w != expected) atomicAdd(wrong, 1ull);
    }
  }
}

struct Gpu {
  cudaStream_t stream;
  cudaEvent_t begin, end;
  void *input, *output;
  unsigned long long* wrong;
};

int main(int argc, char** argv) {
  int ranks;
  OK(cudaGetDeviceCount(&ranks));
  ranks = std::min({ranks, MOST_GPUS, argc > 1 ? atoi(argv[1]) : MOST_GPUS});
  const size_t bytes = size_t(argc > 2 ? atoi(argv[2]) : 64) << 20;
  if (ranks < 2 || bytes == 0) {
    fprintf(stderr, "expected at least two GPUs and 1 MiB\n");
    return 2;
  }
  Args common{};
  common.ranks = ranks, common.vectors = bytes / 16;
  std::vector<Gpu> gpus(ranks);
  for (int rank = 0; rank < ranks; rank++) {
    Gpu& gpu = gpus[rank];
    OK(cudaSetDevice(rank));
    for (int peer = 0; peer < ranks; peer++) {
      if (peer != rank) OK(cudaDeviceEnablePeerAccess(peer, 0));
    }
    OK(cudaMalloc(&gpu.input, bytes * ranks));
    OK(cudaMalloc(&gpu.output, bytes * ranks));
    OK(cudaMallocHost(&gpu.wrong, 8));
    OK(cudaMemset(gpu.input, rank + 1, bytes * ranks));
    OK(cudaStreamCreate(&gpu.stream));
    OK(cudaEventCreate(&gpu.begin));
    OK(cudaEventCreate(&gpu.end));
    OK(cudaFuncSetAttribute(by_copies, cudaFuncAttributeMaxDynamicSharedMemorySize, PLACES * 3200 * 16));
    common.inputs[rank] = static_cast<const uint4*>(gpu.input);
    common.outputs[rank] = static_cast<uint4*>(gpu.output);
    OK(cudaDeviceSynchronize());
  }
  // On all GPUs at once.
  auto on_all = [&](auto work) {
    std::atomic<int> there{0};
    std::vector<std::thread> threads;
    for (int rank = 0; rank < ranks; rank++) {
      threads.emplace_back([&, rank] {
        OK(cudaSetDevice(rank));
        there++;
        while (there < ranks) {
        }
        work(rank, gpus[rank]);
      });
    }
    for (std::thread& thread : threads) thread.join();
  };
  auto speed = [&](auto kernel, Args args, int blocks, int threads, size_t shared) {
    std::vector<double> times;
    for (int run = 0; run < RUNS; run++) {
      std::vector<float> ms(ranks);
      on_all([&](int rank, Gpu& gpu) {
        Args own = args;
        own.rank = rank, own.rounds = 1;
        kernel<<<blocks, threads, shared, gpu.stream>>>(own);
        own.rounds = ROUNDS;
        OK(cudaEventRecord(gpu.begin, gpu.stream));
        kernel<<<blocks, threads, shared, gpu.stream>>>(own);
        OK(cudaEventRecord(gpu.end, gpu.stream));
        OK(cudaStreamSynchronize(gpu.stream));
        OK(cudaEventElapsedTime(&ms[rank], gpu.begin, gpu.end));
      });
      times.push_back(*std::max_element(ms.begin(), ms.end()) * 1e-3 / ROUNDS);
    }
    std::sort(times.begin(), times.end());
    return bytes * (ranks - 1) / times[RUNS / 2] / 1e9;
  };
  auto clear = [&] {
    on_all([&](int, Gpu& gpu) {
      OK(cudaMemset(gpu.output, 0, bytes * ranks));
      OK(cudaDeviceSynchronize());
    });
  };
  auto compare = [&] {
    on_all([&](int rank, Gpu& gpu) {
      *gpu.wrong = 0;
      count_wrong<<<256, 512, 0, gpu.stream>>>(static_cast<uint4*>(gpu.output), rank, ranks, bytes / 16, gpu.wrong);
      OK(cudaStreamSynchronize(gpu.stream));
    });
    for (int rank = 0; rank < ranks; rank++) {
      if (*gpus[rank].wrong > 0) {
        fprintf(stderr, "rank %d: %llu wrong vectors\n", rank, *gpus[rank].wrong);
        exit(1);
      }
    }
  };
  const char *ways[] = {"push", "pull", "halves"}, *orders[] = {"rotated", "pairs", "phases"};
  printf("%d GPUs, parts of %zu MiB; GB/s out of each GPU\n", ranks, bytes >> 20);
  printf("threads (blocks of 512): with 1, 2, 4, 8 vectors under way for each, pieces of 16 KiB, then of 64 KiB\n");
  printf("bulk copies: pieces of 6.4, 12.8, 25.6 and 51.2 KB\n");
  for (int way = 0; way < 3; way++) {
    for (int order = 0; order < 3; order++) {
      for (int blocks : {28, 56, 112}) {
        Args args = common;
        args.way = way, args.order = order;
        clear();
        printf("%-6s %-7s %3d blocks of threads", ways[way], orders[order], blocks);
        for (int piece : {1024, 4096}) {
          args.piece = piece;
          printf(" %6.1f", speed(by_threads<1>, args, blocks, 512, 0));
          printf(" %6.1f", speed(by_threads<2>, args, blocks, 512, 0));
          printf(" %6.1f", speed(by_threads<4>, args, blocks, 512, 0));
          printf(" %6.1f", speed(by_threads<8>, args, blocks, 512, 0));
        }
        compare();
        clear();
        printf("\n%-6s %-7s %3d of bulk copies   ", ways[way], orders[order], blocks);
        for (int piece : {400, 800, 1600, 3200}) {
          args.piece = piece;
          printf(" %6.1f", speed(by_copies, args, blocks, 32, size_t(PLACES) * piece * 16));
        }
        compare();
        printf("\n");
        fflush(stdout);
      }
    }
  }
}
