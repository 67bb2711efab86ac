// The kernels of low-latency calls: one for each type of elements. Each sends, receives, or does both, as its arguments say.

#include "low_latency_combine.cuh"
#include "low_latency_dispatch.cuh"

// Two blocks share a multiprocessor, as the budget of blocks that wait has it.
#define KERNEL(NAME, BODY) \
  extern "C" __global__ void __launch_bounds__(LOW_LATENCY_THREADS, 2) low_latency_##NAME(const __grid_constant__ LowLatency ll) { BODY(ll); }

KERNEL(dispatch_bf16, dispatch<BF16>)
KERNEL(dispatch_f16, dispatch<F16>)
KERNEL(dispatch_f32, dispatch<F32>)
KERNEL(combine_bf16, combine<BF16>)
KERNEL(combine_f16, combine<F16>)
KERNEL(combine_f32, combine<F32>)
