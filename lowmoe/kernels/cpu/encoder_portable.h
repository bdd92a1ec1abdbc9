// The lanes of the encoder in plain C++: what every instruction set's lanes must do.
//
// Lanes are words: 8 to a slice, so a vector holds kLanes / 8 slices, and whatever reads or writes
// memory by slices takes a pointer for each. Rounding is to nearest, ties to even.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "lowmoe/kernels/cpu/matrix.h"

namespace lowmoe {

namespace {

struct Portable {
  static constexpr int kLanes = 8;
  struct I {
    int32_t at[kLanes];
  };
  struct F {
    float at[kLanes];
  };
  struct Table {
    int8_t at[kTableSize];
  };

  // Integers: all wrap around.
  static I all(int32_t x) {
    return each<I>([&](int) { return x; });
  }
  static I add(I a, I b) {
    return each<I>(
        [&](int n) { return static_cast<int32_t>(unsigned(a.at[n]) + unsigned(b.at[n])); });
  }
  static I min(I a, I b) {
    return each<I>([&](int n) { return a.at[n] < b.at[n] ? a.at[n] : b.at[n]; });
  }
  static I max(I a, I b) {
    return each<I>([&](int n) { return a.at[n] > b.at[n] ? a.at[n] : b.at[n]; });
  }
  static I both(I a, I b) {
    return each<I>([&](int n) { return a.at[n] & b.at[n]; });
  }
  static I either(I a, I b) {
    return each<I>([&](int n) { return a.at[n] | b.at[n]; });
  }
  template <int kBits>
  static I shift_left(I a) {
    return each<I>([&](int n) { return static_cast<int32_t>(unsigned(a.at[n]) << kBits); });
  }
  // Zeros come in from the left.
  template <int kBits>
  static I shift_right(I a) {
    return each<I>([&](int n) { return static_cast<int32_t>(unsigned(a.at[n]) >> kBits); });
  }
  static I shift_right_by(I a, I bits) {
    return each<I>([&](int n) { return static_cast<int32_t>(unsigned(a.at[n]) >> bits.at[n]); });
  }

  // Comparisons, and a choice by one.
  static I equal(I a, I b) {
    return each<I>([&](int n) { return a.at[n] == b.at[n] ? -1 : 0; });
  }
  static I less(I a, I b) {
    return each<I>([&](int n) { return a.at[n] < b.at[n] ? -1 : 0; });
  }
  static I choose(I which, I yes, I no) {
    return each<I>([&](int n) { return (which.at[n] & yes.at[n]) | (~which.at[n] & no.at[n]); });
  }

  // sum + low half of pair * low half of step + high half * high half, halves signed.
  static I dot(I sum, I pair, int32_t step) {
    const int32_t low = static_cast<int16_t>(step), high = step >> 16;
    return each<I>([&](int n) {
      return sum.at[n] + static_cast<int16_t>(pair.at[n]) * low + (pair.at[n] >> 16) * high;
    });
  }
  // a with `bits` in place of what it has under the mask.
  template <int kMask>
  static I low_bits(I a, int32_t bits) {
    return each<I>([&](int n) { return (a.at[n] & ~kMask) | bits; });
  }
  // The low kBits of `low`, and `high` moved up to stand above them.
  template <int kBits>
  static I merge(I low, I high) {
    constexpr int32_t kMask = (1 << kBits) - 1;
    return either(both(low, all(kMask)), low_bits<kMask>(shift_left<kBits>(high), 0));
  }

  static Table table(const int8_t* values) {
    Table table;
    std::memcpy(table.at, values, sizeof table.at);
    return table;
  }
  static I look_up(const Table& table, I index) {
    return each<I>([&](int n) { return table.at[index.at[n]]; });
  }

  // Bytes: kLanes in a row, of numbers that fit.
  static void put_bytes(int8_t* to, I a) {
    for (int n = 0; n < kLanes; n++) to[n] = static_cast<int8_t>(a.at[n]);
  }
  static I bytes(const int8_t* from) {
    return each<I>([&](int n) { return from[n]; });
  }
  // For each slice 8 words of 64 bits.
  static void put_words(uint8_t* const* to, I low, I high) {
    for (int n = 0; n < kLanes; n++) {
      const uint64_t word = uint64_t(uint32_t(high.at[n])) << 32 | uint32_t(low.at[n]);
      std::memcpy(to[0] + 8 * n, &word, sizeof word);
    }
  }

  // Floats: each operation rounds once.
  static F all_floats(float x) {
    return each<F>([&](int) { return x; });
  }
  static F add(F a, F b) {
    return each<F>([&](int n) { return a.at[n] + b.at[n]; });
  }
  static F subtract(F a, F b) {
    return each<F>([&](int n) { return a.at[n] - b.at[n]; });
  }
  static F multiply(F a, F b) {
    return each<F>([&](int n) { return a.at[n] * b.at[n]; });
  }
  static F divide(F a, F b) {
    return each<F>([&](int n) { return a.at[n] / b.at[n]; });
  }
  // b where either is a NaN; likewise max.
  static F min(F a, F b) {
    return each<F>([&](int n) { return a.at[n] < b.at[n] ? a.at[n] : b.at[n]; });
  }
  static F max(F a, F b) {
    return each<F>([&](int n) { return a.at[n] > b.at[n] ? a.at[n] : b.at[n]; });
  }
  static F magnitude(F a) {
    return each<F>([&](int n) { return a.at[n] < 0 ? -a.at[n] : a.at[n]; });
  }
  // |a| below 2^22: so far the last bit of a + 1.5 * 2^23 stands for 1.
  static I round(F a) {
    constexpr float kUnits = 0x1.8p23f;
    return each<I>([&](int n) {
      return std::bit_cast<int32_t>(a.at[n] + kUnits) - std::bit_cast<int32_t>(kUnits);
    });
  }
  static F to_floats(I a) {
    return each<F>([&](int n) { return static_cast<float>(a.at[n]); });
  }
  // kLanes in a row.
  static F floats(const float* from) {
    return each<F>([&](int n) { return from[n]; });
  }
  static void put(float* to, F a) { std::memcpy(to, a.at, sizeof a.at); }
  // 8 in a row for each slice, at the same offset from its pointer.
  static F floats(const float* const* from, size_t offset) { return floats(from[0] + offset); }
  static void put(float* const* to, size_t offset, F a) { put(to[0] + offset, a); }

 private:
  template <class Vector, class Function>
  static Vector each(Function&& of_lane) {
    Vector result;
    for (int n = 0; n < kLanes; n++) result.at[n] = of_lane(n);
    return result;
  }
};

}  // namespace

}  // namespace lowmoe
