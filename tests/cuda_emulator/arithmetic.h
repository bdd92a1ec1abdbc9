// CUDA's arithmetic functions that a C++ library has not, as the CUDA Math API describes them.
// Where a card only approximates (__expf, rsqrtf, ..) the result here is rounded once.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda_fp16.h"

// Bits.
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(static_cast<unsigned>(x)) + 1 : 0; }
inline int __ffsll(long long x) {
  return x ? std::countr_zero(static_cast<unsigned long long>(x)) + 1 : 0;
}
inline unsigned __brev(unsigned x) {
  unsigned turned = 0;
  for (int i = 0; i < 32; i++) turned |= (x >> i & 1) << (31 - i);
  return turned;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (by & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << (by & 31) >> 32);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned choice) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned chosen = 0;
  for (int i = 0; i < 4; i++)
    chosen |= static_cast<unsigned>(bytes >> (8 * (choice >> (4 * i) & 7)) & 0xff) << (8 * i);
  return chosen;
}

// Integers.
inline int __dp4a(int a, int b, int sum) {
  auto wrapping = static_cast<unsigned>(sum);
  for (int i = 0; i < 4; i++)
    wrapping += static_cast<unsigned>(static_cast<signed char>(a >> (8 * i)) *
                                      static_cast<signed char>(b >> (8 * i)));
  return static_cast<int>(wrapping);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

// The same bits as another type.
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

// Float to integer: what is too large becomes the largest, NaN 0.
namespace emu {
template <class Integer>
Integer to_integer(float x) {
  if (std::isnan(x)) return 0;
  if (x >= static_cast<float>(uint64_t{1} << std::numeric_limits<Integer>::digits))
    return std::numeric_limits<Integer>::max();
  if (x <= static_cast<float>(std::numeric_limits<Integer>::min()))
    return std::numeric_limits<Integer>::min();
  return static_cast<Integer>(x);
}
}  // namespace emu
inline int __float2int_rn(float x) { return emu::to_integer<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return emu::to_integer<int>(x); }
inline int __float2int_rd(float x) { return emu::to_integer<int>(std::floor(x)); }
inline int __float2int_ru(float x) { return emu::to_integer<int>(std::ceil(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

// Rounded once, never fused: the emulator is compiled with -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }

// Approximate on a card.
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(double{x})); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
