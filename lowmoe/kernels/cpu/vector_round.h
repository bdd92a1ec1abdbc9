// Rounding to int8 with a scale: tokens for products with trellis planes, heads for the cache. For
// any instruction set S of simd_*.h, with the same bits in all: nothing here is contracted to fma,
// and sums are made in an order that the number of lanes does not change.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "lowmoe/kernels/cpu/isa.h"
#include "lowmoe/kernels/cpu/kv_cache.h"
#include "lowmoe/kernels/cpu/matrix.h"

namespace lowmoe::vector {

// A largest magnitude below this counts as 0, so that 127 / it stays finite.
inline constexpr float kSilence = 0x1p-100f;
inline constexpr float kMostCode = 127;
inline constexpr size_t kMostHadamard = 128;

// The largest power of two up to 128 that divides n_in, as in quant/transform.py.
constexpr size_t hadamard_size(size_t n_in) {
  const size_t power = n_in & (0 - n_in);
  return power < kMostHadamard ? power : kMostHadamard;
}

// 1 / sqrt(size) rounded to float32.
constexpr float hadamard_factor(size_t size) {
  constexpr float kRootHalf = 0x1.6a09e6p-1f;
  float factor = 1;
  for (; size >= 4; size /= 4) factor /= 2;
  return size == 2 ? factor * kRootHalf : factor;
}

struct RoundingSteps {
  float scale;    // what a code stands for
  float inverse;  // codes in what is rounded
};

// For numbers whose largest magnitude has these bits.
template <class S>
RoundingSteps rounding_steps(int32_t largest_bits) {
  constexpr int32_t kInfinity = 0x7f800000;
  if (largest_bits >= kInfinity) return {std::numeric_limits<float>::quiet_NaN(), 0};
  float largest;
  std::memcpy(&largest, &largest_bits, sizeof largest);
  if (largest < kSilence) return {0, 0};
  return {largest / kMostCode, kMostCode / largest};
}

// Butterflies between neighbours kStride lanes apart, from 1 up to half a register or half a block.
template <class S, size_t kStride, size_t kCount>
void butterflies_within(typename S::Float (&x)[kCount], size_t block) {
  if constexpr (kStride < S::kLanes) {
    if (kStride >= block) return;
    for (auto& lanes : x) lanes = S::template butterfly<kStride>(lanes);
    butterflies_within<S, 2 * kStride>(x, block);
  }
}

// Butterflies between whole registers, kStep of them apart.
template <class S, size_t kStep, size_t kCount>
void butterflies_between(typename S::Float (&x)[kCount], size_t block) {
  if constexpr (kStep < kCount) {
    if (kStep * S::kLanes >= block) return;
    for (size_t i = 0; i < kCount; i += 2 * kStep) {
      for (size_t j = i; j < i + kStep; j++) {
        const auto a = x[j], b = x[j + kStep];
        x[j] = a + b;
        x[j + kStep] = a - b;
      }
    }
    butterflies_between<S, 2 * kStep>(x, block);
  }
}

// n <= 128 columns with one scale, of a matrix whose Hadamard blocks have `block` columns.
// Overwrites the codes and sums of as many blocks of 64 as hold n columns.
template <class S>
void round_group(const float* x, const uint16_t* d, size_t n, size_t block, int8_t* codes,
                 float* scale, int32_t* sums) {
  constexpr size_t kCount = kScaleColumns / S::kLanes;
  constexpr size_t kBlockCount = layout::kBlockColumns / S::kLanes;
  typename S::Float turned[kCount];
  for (size_t k = 0; k < kCount; k++) {
    const size_t i = k * S::kLanes;
    if (i + S::kLanes <= n) {
      turned[k] = S::load(d + i) * S::load(x + i);
    } else if (i < n) {
      turned[k] = S::load_some(d + i, n - i) * S::load_some(x + i, n - i);
    } else {
      turned[k] = S::all(0);
    }
  }
  butterflies_within<S, 1>(turned, block);
  butterflies_between<S, 1>(turned, block);
  auto largest = S::zero();
  for (auto& lanes : turned) {
    lanes = lanes * S::all(hadamard_factor(block));
    largest = S::max(largest, S::absolute_bits(lanes));
  }
  const RoundingSteps steps = rounding_steps<S>(S::largest(largest));
  *scale = steps.scale;
  const bool finite = steps.scale == steps.scale;
  for (size_t b = 0; b * layout::kBlockColumns < n; b++) {
    auto sum = S::zero();
    for (size_t k = b * kBlockCount; k < (b + 1) * kBlockCount; k++) {
      const auto rounded = finite ? S::nearest_int(turned[k] * S::all(steps.inverse)) : S::zero();
      sum = S::add(sum, rounded);
      S::store(codes + k * S::kLanes, rounded);
    }
    sums[b] = S::sum(sum);
  }
}

template <class S>
void round_token(const float* x, const uint16_t* d, size_t first_column, size_t n,
                 const RoundedTokens& token) {
  const size_t block = hadamard_size(token.n_in);
  for (size_t i = 0; i < n; i += kScaleColumns) {
    const size_t column = first_column + i;
    const size_t some = n - i < kScaleColumns ? n - i : kScaleColumns;
    round_group<S>(x + i, d + column, some, block, token.codes + column,
                   token.scales + column / kScaleColumns,
                   token.sums + column / layout::kBlockColumns);
  }
}

template <class S>
void store_int8_head(const float* head, size_t size, uint8_t* to) {
  auto largest = S::zero();
  size_t i = 0;
  for (; i + S::kLanes <= size; i += S::kLanes) {
    largest = S::max(largest, S::absolute_bits(S::load(head + i)));
  }
  if (i < size) largest = S::max(largest, S::absolute_bits(S::load_some(head + i, size - i)));
  const RoundingSteps steps = rounding_steps<S>(S::largest(largest));
  std::memset(to, 0, head_scale_offset(size));
  std::memcpy(to + head_scale_offset(size), &steps.scale, sizeof steps.scale);
  if (steps.inverse == 0) return;
  int8_t* codes = reinterpret_cast<int8_t*>(to);
  const auto rounded = [&](auto x) { return S::nearest_int(x * S::all(steps.inverse)); };
  for (i = 0; i + S::kLanes <= size; i += S::kLanes) {
    S::store(codes + i, rounded(S::load(head + i)));
  }
  if (i < size) S::store_some(codes + i, rounded(S::load_some(head + i, size - i)), size - i);
}

template <class S>
void store_float16_head(const float* head, size_t size, uint8_t* to) {
  uint16_t* halves = reinterpret_cast<uint16_t*>(to);
  size_t i = 0;
  for (; i + S::kLanes <= size; i += S::kLanes) S::store(halves + i, S::load(head + i));
  if (i < size) S::store_some(halves + i, S::load_some(head + i, size - i), size - i);
}

template <class S>
void store_head(KvFormat format, const float* head, size_t size, uint8_t* to) {
  if (format == KvFormat::kFloat32) {
    std::memcpy(to, head, size * sizeof *head);
  } else if (format == KvFormat::kFloat16) {
    store_float16_head<S>(head, size, to);
  } else {
    store_int8_head<S>(head, size, to);
  }
}

}  // namespace lowmoe::vector
