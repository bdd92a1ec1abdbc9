// Attention of one warp: some query heads of one token over some positions of the cache.
#pragma once

#include "cached_heads.cuh"

namespace lowmoe {

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000); }

// The sums of kCount numbers, each over 2 kApart neighbouring lanes; lane l ends with that of
// number l % (2 kApart) / (2 kApart / kCount). Where two lanes meet, each keeps one half of the
// numbers and gives the other: 15 shuffles for 16 numbers of 16 lanes, not 64. kCount is a power of
// two, up to 2 kApart; a recursion, for a loop of loops is not unrolled and its numbers leave the
// registers.
template <int kApart, int kCount>
__device__ __forceinline__ float sum_lanes(const float (&x)[kCount]) {
  if constexpr (kApart == 0) {
    return x[0];
  } else if constexpr (kCount == 1) {
    const float sum[1] = {x[0] + __shfl_xor_sync(kWholeWarp, x[0], kApart)};
    return sum_lanes<kApart / 2>(sum);
  } else {
    const bool is_upper = threadIdx.x & kApart;
    float sums[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; i++) {
      const float low = x[i], high = x[kCount / 2 + i];
      const float given = __shfl_xor_sync(kWholeWarp, is_upper ? low : high, kApart);
      sums[i] = (is_upper ? high : low) + given;
    }
    return sum_lanes<kApart / 2>(sums);
  }
}

// A softmax over some positions, not divided; see arXiv 1805.02867.
template <int kQueries>
struct Softmax {
  float top, total;  // of the query that this lane scores: largest exponent, sum of powers
  float out[kQueries][kChunk];  // of the columns that this lane adds up: times 2^-top of the query
};

template <int kCount>
__device__ __forceinline__ void load_shared(const float* from, float (&to)[kCount]) {
  if constexpr (kCount == 4) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i++) to[i] = from[i];
  }
}

// What one warp does with up to kQueries query heads, in steps of kStep positions. kLanes lanes
// read a row; a lane has kDepth rows of a step, whose keys and values are all asked for at once:
//   scores    each lane multiplies its 8 columns and lanes add up: each ends with one score, or
//             kAlike of them with the same
//   weights   2^(score - top), from there through shared memory to all lanes
//   values    each lane adds its 8 columns of its rows, for every query
// so that of two queries and rows nothing is computed twice. Columns beyond the head and rows
// beyond the end are 0 and weigh 0. At 4 queries of float16 a warp has 4 KiB under way in a step,
// and a lane 32 numbers of q, 32 of sums, 32 registers of the cache, 16 scores.
template <class Number, int kQueries, int kLanes>
struct Warp {
  using Cache = Cached<Number>;
  static constexpr int kDepth = kQueries == 1 ? Cache::kDepth : Cache::kDepth / 2;
  static constexpr int kRowsAtOnce = 32 / kLanes, kStep = kRowsAtOnce * kDepth;
  static constexpr int kScores = kDepth * kQueries, kAlike = kLanes / kScores;
  static constexpr int kSharedFloats = kQueries + kRowsAtOnce * kScores;

  const uint8_t *keys, *values;  // of position 0
  int head_size, end;
  float* shared;  // [kQueries] fades, then [kRowsAtOnce][kDepth][kQueries] weights; aligned to 16
  float q[kQueries][kChunk];

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int column() { return lane() % kLanes * kChunk; }
  // Which of its row's scores the lane ends with, row * kQueries + query.
  static __device__ __forceinline__ int own_score() { return lane() % kLanes / kAlike; }
  static __device__ __forceinline__ bool is_first_alike() { return lane() % kAlike == 0; }
  // Whether it speaks for its query, of those that all have one score of it.
  static __device__ __forceinline__ bool is_first_of_query() {
    return is_first_alike() && lane() / kAlike < kQueries;
  }

  __device__ __forceinline__ void step(int at, Softmax<kQueries>& found) const {
    const int row_bytes = Cache::row_bytes(head_size);
    const int rows_left = column() < head_size ? end - at - lane() / kLanes : 0;
    size_t row = static_cast<size_t>(at + lane() / kLanes) * row_bytes;
    typename Cache::Chunk key[kDepth], value[kDepth];
#pragma unroll
    for (int k = 0; k < kDepth; k++) {
      key[k] = value[k] = {};
      if (k * kRowsAtOnce < rows_left) {
        key[k] = Cache::load(keys + row, column());
        value[k] = Cache::load(values + row, column());
      }
      row += kRowsAtOnce * row_bytes;
    }
    const int own_row = at + own_score() / kQueries * kRowsAtOnce + lane() / kLanes;
    float key_scale = 1, value_scale = 1;
    if constexpr (Cache::kScaled) {
      const size_t row = static_cast<size_t>(min(own_row, end - 1)) * row_bytes;
      key_scale = Cache::scale(keys + row, head_size);
      value_scale = Cache::scale(values + row, head_size);
    }
    float scores[kScores];
    multiply(key, scores);
    const float score = sum_lanes<kLanes / 2>(scores) * key_scale;
    weigh(own_row < end, score, value_scale, found);
    __syncwarp();
    add(value, found);
    __syncwarp();
  }

  // scores[row * kQueries + query] of this lane's columns.
  __device__ __forceinline__ void multiply(const typename Cache::Chunk (&key)[kDepth],
                                           float (&scores)[kScores]) const {
#pragma unroll
    for (int k = 0; k < kDepth; k++) {
      float of_key[kChunk];
      Cache::widen(key[k], of_key);
#pragma unroll
      for (int g = 0; g < kQueries; g++) {
        float sum = q[g][0] * of_key[0];
#pragma unroll
        for (int i = 1; i < kChunk; i++) sum = fmaf(q[g][i], of_key[i], sum);
        scores[k * kQueries + g] = sum;
      }
    }
  }

  __device__ __forceinline__ void weigh(bool is_seen, float score, float value_scale,
                                        Softmax<kQueries>& found) const {
    const float exponent = is_seen ? score : minus_infinity();
    const float top =
        fmaxf(found.top, of_query(exponent, [](float a, float b) { return fmaxf(a, b); }));
    const float fade = exp2f(found.top - top), weight = exp2f(exponent - top);
    found.top = top;
    found.total = found.total * fade + weight;
    if (is_first_of_query()) shared[own_score()] = fade;
    if (is_first_alike()) {
      shared[kQueries + lane() / kLanes * kScores + own_score()] =
          is_seen ? weight * value_scale : 0;
    }
  }

  __device__ __forceinline__ void add(const typename Cache::Chunk (&value)[kDepth],
                                      Softmax<kQueries>& found) const {
    float fades[kQueries];
    load_shared(shared, fades);
#pragma unroll
    for (int g = 0; g < kQueries; g++) {
#pragma unroll
      for (float& sum : found.out[g]) sum *= fades[g];
    }
    const float* of_rows = shared + kQueries + lane() / kLanes * kScores;
#pragma unroll
    for (int k = 0; k < kDepth; k++) {
      float of_value[kChunk], weights[kQueries];
      Cache::widen(value[k], of_value);
      load_shared(of_rows + k * kQueries, weights);
#pragma unroll
      for (int g = 0; g < kQueries; g++) {
#pragma unroll
        for (int i = 0; i < kChunk; i++) {
          found.out[g][i] = fmaf(weights[g], of_value[i], found.out[g][i]);
        }
      }
    }
  }

  // Lanes with scores of the same query differ in the bits from kAlike * kQueries up.
  template <class Join>
  static __device__ __forceinline__ float of_query(float x, Join join) {
#pragma unroll
    for (int apart = kAlike * kQueries; apart < 32; apart *= 2) {
      x = join(x, __shfl_xor_sync(kWholeWarp, x, apart));
    }
    return x;
  }
};

}  // namespace lowmoe
