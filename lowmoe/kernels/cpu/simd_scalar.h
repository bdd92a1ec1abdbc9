// One float at a time, for every processor: the plainest meaning of what simd_*.h offer.
//
// A struct for each instruction set, with the same members, that vector_*.h are templates over:
//   Float, Int      kLanes floats, kLanes int32; + - * / between Floats are the compiler's
//   load, store     of float, float16 (as uint16_t) and int8_t; *_some the first n < kLanes of
//                   them: lanes beyond are loaded as 0 and memory beyond is not touched
//   fma             rounded once where the set can, twice here
//   max             b where either is NaN
// Functions that do vector work are templates over these, and so have the set in their names: the
// linker, which keeps one of each name, never hands code of a newer set to an older processor. What
// has no such name is inlined in every optimised build.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace lowmoe::simd {

// Same bits as the conversion instructions give, but for the payload of a NaN.
struct Float16 {
  static float widen(uint16_t half) {
    const uint32_t sign = uint32_t{half & 0x8000u} << 16;
    const uint32_t rest = half & 0x7fffu;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // Moving the bits up leaves an exponent too small by 112; a multiplication puts that right and
    // makes subnormals normal.
    return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));
  }

  // To the nearest, ties to even; 65520 and more to infinity.
  static uint16_t round(float value) {
    const uint32_t bits = to_bits(value);
    const uint32_t sign = bits >> 16 & 0x8000;
    const uint32_t rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    if (rest < 0x38800000) {  // subnormal: steps of 2^-24, which the sum with 1/2 has too
      const uint32_t steps = to_bits(from_bits(rest) + 0.5f) - to_bits(0.5f);
      return static_cast<uint16_t>(sign | steps);
    }
    const uint32_t odd = rest >> 13 & 1;
    return static_cast<uint16_t>(sign | (rest - 0x38000000 + 0xfff + odd) >> 13);
  }

 private:
  static float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  static uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
  }
};

struct Scalar {
  using Float = float;
  using Int = int32_t;
  static constexpr size_t kLanes = 1;
  static constexpr size_t kSums = 8;  // accumulators that registers hold beside what is added

  static Float all(float x) { return x; }
  static Float load(const float* from) { return *from; }
  static Float load(const uint16_t* from) { return Float16::widen(*from); }
  static Float load(const int8_t* from) { return *from; }
  template <class T>
  static Float load_some(const T*, size_t) {
    return 0;
  }
  static void store(float* to, Float x) { *to = x; }
  static void store(uint16_t* to, Float x) { *to = Float16::round(x); }
  static void store(int8_t* to, Int x) { *to = static_cast<int8_t>(x); }
  template <class T, class X>
  static void store_some(T*, X, size_t) {}

  static Float fma(Float a, Float b, Float c) { return a * b + c; }
  static Float max(Float a, Float b) { return a > b ? a : b; }
  static Float min(Float a, Float b) { return a < b ? a : b; }
  // To the nearest integer, ties to even.  |x| < 2^22.
  static Float nearest(Float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
  static Int nearest_int(Float x) { return static_cast<Int>(nearest(x)); }
  // x * 2^n, n a whole number in -250..250, or anything where x is NaN.
  static Float times_power(Float x, Float n) {
    const Int whole = n == n ? static_cast<Int>(n) : 0;
    return x * power(whole / 2) * power(whole - whole / 2);
  }

  static float sum(Float x) { return x; }
  static float largest(Float x) { return x; }
  // Lane i is the sum of v[i].
  static Float sum_each(const Float* v) { return *v; }

  // The bits without the sign, whose order is that of |x|, with NaN above infinity.
  static Int absolute_bits(Float x) {
    Int bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffff;
  }
  static Int zero() { return 0; }
  static Int add(Int a, Int b) { return a + b; }
  static Int max(Int a, Int b) { return a > b ? a : b; }
  static int32_t sum(Int x) { return x; }
  static int32_t largest(Int x) { return x; }

 private:
  static float power(Int n) {  // -126..127
    const Int bits = (n + 127) << 23;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

}  // namespace lowmoe::simd
