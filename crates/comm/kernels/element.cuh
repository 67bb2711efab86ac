// Elements: how each dtype is read, combined and written. The bits are those of the scalar reference in unisono-core.
//
// Small floats are computed in f32 and rounded once; integers wrap in their own type; the fold starts from the first
// rank's value; a NaN is written as the canonical quiet one. Compiled with --fmad=false and --ftz=false.

#pragma once

#include "ptx.cuh"

// Codes of unisono-core: they never change.
enum DType { BOOL, I8, U8, I16, U16, I32, U32, I64, U64, F16, BF16, F32, F64, F8E4M3, F8E5M2, COMPLEX64, COMPLEX128 };
enum Op { SUM, PROD, MIN, MAX, AVG, PREMUL_SUM, BIT_AND, BIT_OR, BIT_XOR };

template <class T>
struct Complex {
  T re, im;
};

__device__ __forceinline__ bool is_nan(f32 value) { return value != value; }
__device__ __forceinline__ bool is_nan(f64 value) { return value != value; }
__device__ __forceinline__ bool is_negative(f32 value) { return __float_as_int(value) < 0; }
__device__ __forceinline__ bool is_negative(f64 value) { return __double_as_longlong(value) < 0; }
__device__ __forceinline__ void make_nan(f32& value) { value = __int_as_float(0x7fc00000); }
__device__ __forceinline__ void make_nan(f64& value) { value = __longlong_as_double(0x7ff8000000000000); }

// The f32 of a small float's exponent and mantissa field: exact, subnormals included.
template <int MANTISSA, int BIAS>
__device__ __forceinline__ u32 widen(u32 code) {
  u32 subnormal = __float_as_uint(f32(i32(code)) * __uint_as_float((128 - BIAS - MANTISSA) << 23));
  u32 normal = (code << (23 - MANTISSA)) + ((127 - BIAS) << 23);
  return code < (1u << MANTISSA) ? subnormal : normal;
}

// The small float nearest to a magnitude, ties to even, at most `largest`.
template <int MANTISSA, int BIAS>
__device__ __forceinline__ u32 narrow(f32 value, u32 largest) {
  u32 magnitude = __float_as_uint(value) & 0x7fffffff;
  constexpr int shift = 23 - MANTISSA;
  u32 to_even = (1u << (shift - 1)) - 1 + ((magnitude >> shift) & 1);
  u32 normal = ((magnitude + to_even) >> shift) - ((127u - BIAS) << MANTISSA);
  // One unit in the last place of the anchor is the smallest subnormal: the addition rounds.
  constexpr u32 anchor = (151 - BIAS - MANTISSA) << 23;
  u32 subnormal = __float_as_uint(__uint_as_float(magnitude) + __uint_as_float(anchor)) - anchor;
  u32 code = magnitude < ((128u - BIAS) << 23) ? subnormal : normal;
  return code > largest ? largest : code;
}

// What an element is in memory (SIZE bytes) and while it is computed with (Value).
template <int DTYPE>
struct Element;

template <class T, int BYTES>
struct Integer {
  using Value = T;
  static constexpr int SIZE = BYTES;
  static __device__ __forceinline__ T read(const u32* words, int i) {
    if constexpr (BYTES == 8) {
      return T(u64(words[2 * i + 1]) << 32 | words[2 * i]);
    } else {
      return T(words[i * BYTES / 4] >> (i * BYTES % 4 * 8));
    }
  }
  static __device__ __forceinline__ void write(u32* words, int i, T value) {
    if constexpr (BYTES == 8) {
      words[2 * i] = u32(u64(value));
      words[2 * i + 1] = u32(u64(value) >> 32);
    } else {
      constexpr u32 mask = BYTES == 4 ? 0xffffffff : (1u << (BYTES * 8 % 32)) - 1;
      words[i * BYTES / 4] |= (u32(value) & mask) << (i * BYTES % 4 * 8);
    }
  }
};

template <> struct Element<I8> : Integer<i8, 1> {};
template <> struct Element<U8> : Integer<u8, 1> {};
template <> struct Element<I16> : Integer<i16, 2> {};
template <> struct Element<U16> : Integer<u16, 2> {};
template <> struct Element<I32> : Integer<i32, 4> {};
template <> struct Element<U32> : Integer<u32, 4> {};
template <> struct Element<I64> : Integer<i64, 8> {};
template <> struct Element<U64> : Integer<u64, 8> {};

template <>
struct Element<BOOL> {
  using Value = bool;
  static constexpr int SIZE = 1;
  static __device__ __forceinline__ bool read(const u32* words, int i) { return Integer<u8, 1>::read(words, i) != 0; }
  static __device__ __forceinline__ void write(u32* words, int i, bool value) { Integer<u8, 1>::write(words, i, value); }
};

template <>
struct Element<F16> {
  using Value = f32;
  static constexpr int SIZE = 2;
  static __device__ __forceinline__ f32 read(const u32* words, int i) {
    return half_to_float(Integer<u16, 2>::read(words, i));
  }
  static __device__ __forceinline__ void write(u32* words, int i, f32 value) {
    Integer<u16, 2>::write(words, i, is_nan(value) ? 0x7e00 : float_to_half(value));
  }
  static __device__ __forceinline__ u32 pair(f32 low, f32 high) { return floats_to_halves(low, high); }
};

template <>
struct Element<BF16> {
  using Value = f32;
  static constexpr int SIZE = 2;
  static __device__ __forceinline__ f32 read(const u32* words, int i) {
    return __uint_as_float(u32(Integer<u16, 2>::read(words, i)) << 16);
  }
  static __device__ __forceinline__ void write(u32* words, int i, f32 value) {
    Integer<u16, 2>::write(words, i, is_nan(value) ? 0x7fc0 : float_to_bf16(value));
  }
  static __device__ __forceinline__ u32 pair(f32 low, f32 high) { return floats_to_bf16s(low, high); }
};

template <int MANTISSA, int BIAS, u32 LARGEST, u32 FIRST_NAN, u32 INFINITE>
struct Small {
  using Value = f32;
  static constexpr int SIZE = 1;
  static __device__ __forceinline__ f32 read(const u32* words, int i) {
    u32 bits = Integer<u8, 1>::read(words, i), code = bits & 0x7f;
    u32 magnitude = widen<MANTISSA, BIAS>(code);
    if (code == INFINITE) magnitude = 0x7f800000;
    if (code >= FIRST_NAN) magnitude = 0x7fc00000;
    return __uint_as_float(magnitude | (bits & 0x80) << 24);
  }
  static __device__ __forceinline__ void write(u32* words, int i, f32 value) {
    u32 code = narrow<MANTISSA, BIAS>(value, LARGEST) | (__float_as_uint(value) >> 24 & 0x80);
    Integer<u8, 1>::write(words, i, is_nan(value) ? 0x7f : code);
  }
};

// The first has no infinities: no code of seven bits is 0x80.
template <> struct Element<F8E4M3> : Small<3, 7, 0x7e, 0x7f, 0x80> {};
template <> struct Element<F8E5M2> : Small<2, 15, 0x7b, 0x7d, 0x7c> {};

template <>
struct Element<F32> {
  using Value = f32;
  static constexpr int SIZE = 4;
  static __device__ __forceinline__ f32 read(const u32* words, int i) { return __uint_as_float(words[i]); }
  static __device__ __forceinline__ void write(u32* words, int i, f32 value) {
    if (is_nan(value)) make_nan(value);
    words[i] = __float_as_uint(value);
  }
};

template <>
struct Element<F64> {
  using Value = f64;
  static constexpr int SIZE = 8;
  static __device__ __forceinline__ f64 read(const u32* words, int i) {
    return __hiloint2double(words[2 * i + 1], words[2 * i]);
  }
  static __device__ __forceinline__ void write(u32* words, int i, f64 value) {
    if (is_nan(value)) make_nan(value);
    words[2 * i] = __double2loint(value);
    words[2 * i + 1] = __double2hiint(value);
  }
};

template <class Part>
struct Pair {
  using Value = Complex<typename Part::Value>;
  static constexpr int SIZE = 2 * Part::SIZE;
  static __device__ __forceinline__ Value read(const u32* words, int i) {
    return {Part::read(words, 2 * i), Part::read(words, 2 * i + 1)};
  }
  static __device__ __forceinline__ void write(u32* words, int i, Value value) {
    Part::write(words, 2 * i, value.re);
    Part::write(words, 2 * i + 1, value.im);
  }
};

template <> struct Element<COMPLEX64> : Pair<Element<F32>> {};
template <> struct Element<COMPLEX128> : Pair<Element<F64>> {};

template <int OP, class T>
__device__ __forceinline__ T extreme_float(T a, T b) {
  bool first = a < b || (a == b && is_negative(a));
  T value = (OP == MIN) == first ? a : b;
  // Equal signs of zero: either. NaN wins.
  if (is_nan(a) || is_nan(b)) make_nan(value);
  return value;
}

template <int OP, class T>
struct Combine {
  static __device__ __forceinline__ T of(T a, T b) {
    if constexpr (OP == SUM || OP == AVG) return T(a + b);
    else if constexpr (OP == PROD) return T(a * b);
    else if constexpr (OP == MIN) return a < b ? a : b;
    else if constexpr (OP == MAX) return a < b ? b : a;
    else if constexpr (OP == BIT_AND) return T(a & b);
    else if constexpr (OP == BIT_OR) return T(a | b);
    else return T(a ^ b);
  }
  static __device__ __forceinline__ T divide(T a, int count) {
    // Promoted, because 200 ranks do not fit into an i8; towards zero.
    if constexpr (sizeof(T) < 4) return T(i32(a) / count);
    else return a / T(count);
  }
  static __device__ __forceinline__ T scale(T a, f64) { return a; }
};

template <int OP, class T>
struct CombineFloat {
  static __device__ __forceinline__ T of(T a, T b) {
    if constexpr (OP == PROD) return a * b;
    else if constexpr (OP == MIN || OP == MAX) return extreme_float<OP>(a, b);
    else return a + b;
  }
  static __device__ __forceinline__ T divide(T a, int count) { return a / T(count); }
  static __device__ __forceinline__ T scale(T a, f64 scalar) { return a * T(scalar); }
};

template <int OP> struct Combine<OP, f32> : CombineFloat<OP, f32> {};
template <int OP> struct Combine<OP, f64> : CombineFloat<OP, f64> {};

template <int OP, class T>
struct Combine<OP, Complex<T>> {
  static __device__ __forceinline__ Complex<T> of(Complex<T> a, Complex<T> b) {
    if constexpr (OP == PROD) return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
    else return {a.re + b.re, a.im + b.im};
  }
  static __device__ __forceinline__ Complex<T> divide(Complex<T> a, int count) {
    return {a.re / T(count), a.im / T(count)};
  }
  static __device__ __forceinline__ Complex<T> scale(Complex<T> a, f64 scalar) {
    return {a.re * T(scalar), a.im * T(scalar)};
  }
};

template <int OP>
struct Combine<OP, bool> {
  static __device__ __forceinline__ bool of(bool a, bool b) {
    if constexpr (OP == MIN || OP == BIT_AND) return a && b;
    else if constexpr (OP == MAX || OP == BIT_OR) return a || b;
    else return a != b;
  }
  static __device__ __forceinline__ bool divide(bool a, int) { return a; }
  static __device__ __forceinline__ bool scale(bool a, f64) { return a; }
};

// The fold of one group of WORDS words: `first`, then `next` in rank order, then `finish`.
template <int DTYPE, int OP, int WORDS>
struct Fold {
  using E = Element<DTYPE>;
  using Value = typename E::Value;
  using C = Combine<OP, Value>;
  static constexpr int COUNT = WORDS * 4 / E::SIZE;
  Value values[COUNT];

  static __device__ __forceinline__ Value input(const u32* words, int i, f64 scalar) {
    Value value = E::read(words, i);
    if constexpr (OP == PREMUL_SUM) value = C::scale(value, scalar);
    return value;
  }
  __device__ __forceinline__ void first(const u32* words, f64 scalar) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) values[i] = input(words, i, scalar);
  }
  __device__ __forceinline__ void next(const u32* words, f64 scalar) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) values[i] = C::of(values[i], input(words, i, scalar));
  }
  // What another rank handed on.
  __device__ __forceinline__ void partial_first(const u32* words) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) values[i] = E::read(words, i);
  }
  // After the last rank's: the result of `count` inputs.
  __device__ __forceinline__ void finish(u32* words, int count) {
    if constexpr (OP == AVG) {
#pragma unroll
      for (int i = 0; i < COUNT; i++) values[i] = C::divide(values[i], count);
    }
    partial(words);
  }
  // As it is handed on to another rank.
  __device__ __forceinline__ void partial(u32* words) {
    if constexpr (DTYPE == F16 || DTYPE == BF16) {
      // Two at a time, as long as none is a NaN: the hardware writes those in its own way.
      bool have_nan = false;
#pragma unroll
      for (int i = 0; i < WORDS; i++) {
        have_nan |= is_nan(values[2 * i]) || is_nan(values[2 * i + 1]);
        words[i] = E::pair(values[2 * i], values[2 * i + 1]);
      }
      if (!have_nan) return;
    }
#pragma unroll
    for (int i = 0; i < WORDS; i++) words[i] = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i++) E::write(words, i, values[i]);
  }
};
