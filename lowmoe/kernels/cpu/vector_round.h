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

// Butterflies inside registers: between lanes kStride apart, then twice as far, up to half a block.
template <class S, size_t kBlock, size_t kStride, size_t kCount>
void butterflies_within(typename S::Float (&x)[kCount]) {
  if constexpr (kStride < S::kLanes && kStride < kBlock) {
    for (auto& lanes : x) lanes = S::template butterfly<kStride>(lanes);
    butterflies_within<S, kBlock, 2 * kStride>(x);
  }
}

// The rest of them, between whole registers.
template <class S, size_t kBlock, size_t kStep, size_t kCount>
void butterflies_between(typename S::Float (&x)[kCount]) {
  if constexpr (kStep * S::kLanes < kBlock) {
    for (size_t i = 0; i < kCount; i += 2 * kStep) {
      for (size_t j = i; j < i + kStep; j++) {
        const auto a = x[j], b = x[j + kStep];
        x[j] = a + b;
        x[j + kStep] = a - b;
      }
    }
    butterflies_between<S, kBlock, 2 * kStep>(x);
  }
}

// The 128 columns that share a scale.  codes: [128], sums: [2], of each 64 columns.
template <class S, size_t kBlock>
void round_group(const float* x, const uint16_t* d, int8_t* codes, float* scale, int32_t* sums) {
  constexpr size_t kCount = kScaleColumns / S::kLanes;
  constexpr size_t kHalf = kCount / 2;
  typename S::Float turned[kCount];
  for (size_t k = 0; k < kCount; k++) {
    turned[k] = S::load(d + k * S::kLanes) * S::load(x + k * S::kLanes);
  }
  butterflies_within<S, kBlock, 1>(turned);
  butterflies_between<S, kBlock, 1>(turned);
  auto largest = S::zero();
  for (auto& lanes : turned) {
    lanes = lanes * S::all(hadamard_factor(kBlock));
    largest = S::max(largest, S::absolute_bits(lanes));
  }
  const RoundingSteps steps = rounding_steps<S>(S::largest(largest));
  *scale = steps.scale;
  if (steps.inverse == 0) {
    std::memset(codes, 0, kScaleColumns);
    sums[0] = sums[1] = 0;
    return;
  }
  for (size_t half = 0; half < 2; half++) {
    auto sum = S::zero();
    for (size_t k = half * kHalf; k < (half + 1) * kHalf; k++) {
      const auto rounded = S::nearest_int(turned[k] * S::all(steps.inverse));
      sum = S::add(sum, rounded);
      S::store(codes + k * S::kLanes, rounded);
    }
    sums[half] = S::sum(sum);
  }
}

// The last columns, n < 128 of them: as if followed by zeros, of which those are written that pad a
// block of 64.
template <class S, size_t kBlock>
void round_last_group(const float* x, const uint16_t* d, size_t n, int8_t* codes, float* scale,
                      int32_t* sums) {
  float some_x[kScaleColumns] = {};
  uint16_t some_d[kScaleColumns] = {};
  int8_t some_codes[kScaleColumns];
  int32_t some_sums[2];
  std::memcpy(some_x, x, n * sizeof *x);
  std::memcpy(some_d, d, n * sizeof *d);
  round_group<S, kBlock>(some_x, some_d, some_codes, scale, some_sums);
  const size_t n_blocks = n > layout::kBlockColumns ? 2 : 1;
  std::memcpy(codes, some_codes, n_blocks * layout::kBlockColumns);
  std::memcpy(sums, some_sums, n_blocks * sizeof *sums);
}

template <class S, size_t kBlock = kMostHadamard>
void round_token(const float* x, const uint16_t* d, size_t first_column, size_t n,
                 const RoundedTokens& token) {
  if constexpr (kBlock > 1) {
    if (hadamard_size(token.n_in) < kBlock) {
      return round_token<S, kBlock / 2>(x, d, first_column, n, token);
    }
  }
  for (size_t i = 0; i < n; i += kScaleColumns) {
    const size_t column = first_column + i;
    int8_t* codes = token.codes + column;
    float* scale = token.scales + column / kScaleColumns;
    int32_t* sums = token.sums + column / layout::kBlockColumns;
    if (n - i < kScaleColumns) {
      round_last_group<S, kBlock>(x + i, d + column, n - i, codes, scale, sums);
    } else {
      round_group<S, kBlock>(x + i, d + column, codes, scale, sums);
    }
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
