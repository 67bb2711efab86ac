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

__device__ __forceinline__ u32 load_host_word(const u32* at) {
  u32 value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
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

__device__ __forceinline__ void fence_all() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

__device__ __forceinline__ void fence_own() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Nanoseconds, in coarse steps; comparable on one GPU only.
__device__ __forceinline__ u64 now_ns() {
  u64 value;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value)::"memory");
  return value;
}

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

__device__ __forceinline__ u32 float_to_bf16(f32 value) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
