// The lanes of the encoder for any processor: what every instruction set's lanes must do.
//
// Lanes are words: 8 to a slice, so a vector holds kLanes / 8 slices, and whatever reads or writes
// memory by slices takes a pointer for each. Rounding is to nearest, ties to even.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "lowmoe/kernels/cpu/encoder_search.h"

namespace lowmoe {

namespace {

struct Portable {
  static constexpr int kLanes = 8;
  // Two registers of 4, by the vector extension of GCC and Clang: arithmetic is lane by lane, a
  // comparison gives -1 or 0.
  using I4 = int32_t __attribute__((vector_size(16)));
  using U4 = uint32_t __attribute__((vector_size(16)));
  using F4 = float __attribute__((vector_size(16)));
  struct I {
    I4 at[2];
  };
  struct F {
    F4 at[2];
  };
  struct Table {
    int8_t at[kTableSize];
  };

  // Integers: all wrap around.
  static I all(int32_t x) {
    return each<I>([=](int) { return I4{x, x, x, x}; });
  }
  static I add(I a, I b) {
    return each<I>([&](int n) { return a.at[n] + b.at[n]; });
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
    return each<I>([&](int n) { return a.at[n] << kBits; });
  }
  // Zeros come in from the left.
  template <int kBits>
  static I shift_right(I a) {
    return each<I>(
        [&](int n) { return reinterpret_cast<I4>(reinterpret_cast<U4>(a.at[n]) >> kBits); });
  }
  static I shift_right_by(I a, I bits) {
    return each<I>([&](int n) {
      return reinterpret_cast<I4>(reinterpret_cast<U4>(a.at[n]) >>
                                  reinterpret_cast<U4>(bits.at[n]));
    });
  }

  // Comparisons, and a choice by one.
  static I equal(I a, I b) {
    return each<I>([&](int n) { return a.at[n] == b.at[n]; });
  }
  static I less(I a, I b) {
    return each<I>([&](int n) { return a.at[n] < b.at[n]; });
  }
  static I choose(I which, I yes, I no) {
    return each<I>([&](int n) { return (which.at[n] & yes.at[n]) | (~which.at[n] & no.at[n]); });
  }

  // sum + low half * low half + high half * high half, halves signed.
  static I dot(I sum, I a, I b) {
    return each<I>([&](int n) {
      const I4 low = (a.at[n] << 16 >> 16) * (b.at[n] << 16 >> 16);
      return sum.at[n] + low + (a.at[n] >> 16) * (b.at[n] >> 16);
    });
  }
  // a with `bits` in place of what it has under the mask.
  template <int kMask>
  static I low_bits(I a, int32_t bits) {
    return either(both(a, all(~kMask)), all(bits));
  }
  // The low kBits of `low`, and `high` moved up to stand above them.
  template <int kBits>
  static I merge(I low, I high) {
    constexpr int32_t kMask = (1 << kBits) - 1;
    return either(both(low, all(kMask)), low_bits<kMask>(shift_left<kBits>(high), 0));
  }

  // The two low bits of 16 numbers, those of the n-th at bit 2 n.
  static I low_pairs(const I* from) { return low_pairs_by_merging<Portable>(from); }

  static Table table(const int8_t* values) {
    Table table;
    std::memcpy(table.at, values, sizeof table.at);
    return table;
  }
  static I look_up(const Table& table, I index) {
    int32_t values[kLanes];
    for (int n = 0; n < kLanes; n++) values[n] = table.at[index.at[n / 4][n % 4]];
    return std::bit_cast<I>(values);
  }

  // Bytes: kLanes in a row, of numbers that fit.
  static void put_bytes(int8_t* to, I a) {
    for (int n = 0; n < kLanes; n++) to[n] = static_cast<int8_t>(a.at[n / 4][n % 4]);
  }
  static I bytes(const int8_t* from) {
    int32_t values[kLanes];
    for (int n = 0; n < kLanes; n++) values[n] = from[n];
    return std::bit_cast<I>(values);
  }
  // For each slice 8 words of 64 bits.
  static void put_words(uint8_t* const* to, I low, I high) {
    for (int n = 0; n < kLanes; n++) {
      const uint32_t halves[2] = {uint32_t(low.at[n / 4][n % 4]), uint32_t(high.at[n / 4][n % 4])};
      const uint64_t word = uint64_t(halves[1]) << 32 | halves[0];
      std::memcpy(to[0] + 8 * n, &word, sizeof word);
    }
  }

  // Floats: each operation rounds once.
  static F all_floats(float x) {
    return each<F>([=](int) { return F4{x, x, x, x}; });
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
    return each<F>(
        [&](int n) { return reinterpret_cast<F4>(reinterpret_cast<I4>(a.at[n]) & 0x7fffffff); });
  }
  // |a| below 2^22: so far the last bit of a + 1.5 * 2^23 stands for 1.
  static I round(F a) {
    constexpr float kUnits = 0x1.8p23f;
    return each<I>([&](int n) {
      return reinterpret_cast<I4>(a.at[n] + kUnits) - std::bit_cast<int32_t>(kUnits);
    });
  }
  static F to_floats(I a) {
    return each<F>([&](int n) { return __builtin_convertvector(a.at[n], F4); });
  }
  // kLanes in a row.
  static F floats(const float* from) {
    F values;
    std::memcpy(values.at, from, sizeof values.at);
    return values;
  }
  static void put(float* to, F a) { std::memcpy(to, a.at, sizeof a.at); }
  // 8 in a row for each slice, at the same offset from its pointer.
  static F floats(const float* const* from, size_t offset) { return floats(from[0] + offset); }
  static void put(float* const* to, size_t offset, F a) { put(to[0] + offset, a); }

 private:
  template <class Vector, class Function>
  static Vector each(Function&& of_register) {
    return {of_register(0), of_register(1)};
  }
};

}  // namespace

}  // namespace lowmoe
