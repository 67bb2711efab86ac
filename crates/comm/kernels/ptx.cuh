// The inline PTX of all kernels, wrapped by meaning. Nothing else uses `asm`.
//
// Order: spin with relaxed loads, fence once after success. `sys` reaches other GPUs and the host, `gpu` this device.

#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i8 = signed char;
using i16 = short;
using i32 = int;
using i64 = long long;
using f32 = float;
using f64 = double;

// One access of 16 bytes, whole or not at all, as long as the memory is a GPU's.
__device__ __forceinline__ void store_line(u8* at, uint4 value) {
  u64 low = u64(value.y) << 32 | value.x, high = u64(value.w) << 32 | value.z;
  asm volatile(
      "{ .reg .b128 line; mov.b128 line, {%1, %2}; st.relaxed.sys.global.b128 [%0], line; }"
      :: "l"(at), "l"(low), "l"(high)
      : "memory");
}

__device__ __forceinline__ uint4 load_line(const u8* at) {
  u64 low, high;
  asm volatile(
      "{ .reg .b128 line; ld.relaxed.sys.global.b128 line, [%2]; mov.b128 {%0, %1}, line; }"
      : "=l"(low), "=l"(high)
      : "l"(at)
      : "memory");
  return make_uint4(u32(low), u32(low >> 32), u32(high), u32(high >> 32));
}

// 16 of the 128 bytes of a line: eight lanes of a warp that come here together store or load the line in one instruction. See units.cuh.
__device__ __forceinline__ void store_part_of_line(u8* at, uint4 value) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

__device__ __forceinline__ uint4 load_part_of_line(const u8* at) {
  uint4 value;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(at)
               : "memory");
  return value;
}

__device__ __forceinline__ void store_word(u64* at, u64 value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}

__device__ __forceinline__ u64 load_word(const u64* at) {
  u64 value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}

// What its writer released is visible to this thread, and past a barrier to its block. Unlike a fence it waits for nothing that
// this multiprocessor has under way.
__device__ __forceinline__ u64 acquire_word(const u64* at) {
  u64 value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}

__device__ __forceinline__ u32 load_short_word(const u32* at) {
  u32 value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

// Who sees the signal sees what this thread knew before.
__device__ __forceinline__ void release_signal(u32* at, u32 value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

// As `acquire_word`.
__device__ __forceinline__ u32 acquire_signal(const u32* at) {
  u32 value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

__device__ __forceinline__ u32 load_own_word(const u32* at) {
  u32 value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

__device__ __forceinline__ void store_own_word(u32* at, u32 value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

// Adds, after everything that this thread did before, and returns what stood there.
__device__ __forceinline__ u32 count_own(u32* at, u32 value) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(at), "r"(value)
               : "memory");
  return before;
}

// The same, after nothing in particular.
__device__ __forceinline__ u32 count_own_now(u32* at, u32 value) {
  u32 before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(at), "r"(value)
               : "memory");
  return before;
}

// Adds, and waits for nothing.
__device__ __forceinline__ void count_own_later(u32* at, u32 value) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

// Raises to `value` what is less, and waits for nothing.
__device__ __forceinline__ void raise_own_later(u64* at, u64 value) {
  asm volatile("red.relaxed.gpu.global.max.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}

__device__ __forceinline__ u32 swap_own(u32* at, u32 expected, u32 value) {
  u32 before;
  asm volatile("atom.relaxed.gpu.global.cas.b32 %0, [%1], %2, %3;"
               : "=r"(before)
               : "l"(at), "r"(expected), "r"(value)
               : "memory");
  return before;
}

__device__ __forceinline__ u64 swap_word(u64* at, u64 expected, u64 value) {
  u64 before;
  asm volatile("atom.relaxed.sys.global.cas.b64 %0, [%1], %2, %3;"
               : "=l"(before)
               : "l"(at), "l"(expected), "l"(value)
               : "memory");
  return before;
}

__device__ __forceinline__ void fence_all() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

__device__ __forceinline__ void fence_own() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Nanoseconds, in coarse steps; comparable on one GPU only.
__device__ __forceinline__ u64 now_ns() {
  u64 value;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value)::"memory");
  return value;
}

// Until the kernel before this one in the stream has ended, and what it wrote is visible; at once, unless the launch let this one begin
// before that.
__device__ __forceinline__ void await_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once all blocks have said so, or left, those of the next kernel may begin, if its launch lets them.
__device__ __forceinline__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// Barriers in shared memory, and bulk copies: the hardware moves bytes on its own, on lines of 16. Copies in count on a barrier;
// copies out are committed in groups, each thread's its own.

__device__ __forceinline__ u32 shared_at(const void* at) { return u32(__cvta_generic_to_shared(at)); }

__device__ __forceinline__ void make_barrier(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_at(barrier)), "r"(arrivals) : "memory");
}

// Its place may be used for something else, or for another barrier.
__device__ __forceinline__ void end_barrier(u64* barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_at(barrier)) : "memory");
}

// Barriers that were made are there for copies too.
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void arrive_at(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_at(barrier)) : "memory");
}

// Arrives; the phase ends not before so many bytes more were copied in.
__device__ __forceinline__ void arrive_with(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_at(barrier)), "r"(bytes) : "memory");
}

// Whether the phase of this parity has ended.
__device__ __forceinline__ bool is_phase_over(u64* barrier, u32 parity) {
  u32 is_over;
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(is_over)
      : "r"(shared_at(barrier)), "r"(parity)
      : "memory");
  return is_over;
}

// As `is_phase_over`; gives it a microsecond.
__device__ __forceinline__ bool rest_for_phase(u64* barrier, u32 parity) {
  u32 is_over;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, 1000; selp.u32 %0, 1, 0, p; }"
      : "=r"(is_over)
      : "r"(shared_at(barrier)), "r"(parity)
      : "memory");
  return is_over;
}

__device__ __forceinline__ void copy_in(u8* to, const u8* from, u32 bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_at(to)),
               "l"(from), "r"(bytes), "r"(shared_at(barrier))
               : "memory");
}

__device__ __forceinline__ void copy_out(u8* to, const u8* from, u32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_at(from)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void commit_copies_out() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all of this thread's groups but the last N are complete.
template <int N>
__device__ __forceinline__ void wait_copies_out() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

// Until all of them but the last N were read from shared memory.
template <int N>
__device__ __forceinline__ void wait_copies_out_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// What this thread knows to be in memory is there for the copies that it issues from now on.
__device__ __forceinline__ void fence_copies_of_memory() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// What this thread wrote into shared memory is there for copies out of it.
__device__ __forceinline__ void fence_copies_of_room() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Bytes of shared memory that the launch gave each block.
__device__ __forceinline__ u32 room_bytes() {
  u32 bytes;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
  return bytes;
}
#endif

__device__ __forceinline__ f32 half_to_float(u32 bits) {
  f32 value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(u16(bits)));
  return value;
}

__device__ __forceinline__ u32 float_to_half(f32 value) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ u32 floats_to_halves(f32 low, f32 high) {
  u32 bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

#if __CUDA_ARCH__ >= 890
// Pairs of f8e4m3: exact, and to nearest even, saturating at ±448, a NaN as one.
__device__ __forceinline__ u32 fp8s_to_halves(u16 codes) {
  u32 halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
  return halves;
}

__device__ __forceinline__ u16 floats_to_fp8s(f32 low, f32 high) {
  u16 codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}
#endif

__device__ __forceinline__ u32 floats_to_bf16s(f32 low, f32 high) {
  u32 bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

__device__ __forceinline__ u32 float_to_bf16(f32 value) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
