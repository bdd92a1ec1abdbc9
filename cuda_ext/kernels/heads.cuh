// Heads of a token on their way into the cache, a warp each: normed, kept within bounds, turned.
#pragma once

#include "cached_heads.cuh"
#include "tokens.cuh"

namespace lowmoe {

// Of which queries and keys an RMS norm is taken: of none, of each head before or after it is
// turned, or of all heads together, before anything else.
enum class HeadNorm : int { kNone = 0, kBeforeRope = 1, kAfterRope = 2, kAllHeads = 3 };

// What a kernel of rope.cu is given, see there.
struct Heads {
  float* qkv;
  const float* frequencies;
  const int *positions, *sequences;
  int n_heads, n_kv_heads, head_size, rope_size;
  float rope_length;
  HeadNorm norm;
  const float *q_norm, *k_norm;
  float epsilon, clamp;

  __device__ int n_all() const { return n_heads + 2 * n_kv_heads; }
  __device__ bool is_query(int head) const { return head < n_heads; }
  __device__ bool is_value(int head) const { return head >= n_heads + n_kv_heads; }
  __device__ float* row(int token, int head) const {
    return qkv + (static_cast<size_t>(token) * n_all() + head) * head_size;
  }
};

// cos and sin of an angle, 0 <= angle < 2^23, within 1e-7 of the exact ones. CUDA's own need local
// memory for angles beyond 105615, which contexts reach; this is also the same in the emulator.
__device__ __forceinline__ void cos_sin(float angle, float* cos, float* sin) {
  // What is left of the nearest multiple of pi / 2, which two floats give to 50 bits: 5 million
  // times what they leave out is 1e-8. The first difference is exact, the second is rounded once.
  const float quarters = rintf(angle * 0x1.45f306p-1f);
  float r = fmaf(-quarters, 0x1.921fb6p+0f, angle);
  r = fmaf(-quarters, -0x1.777a5cp-25f, r);
  // Minimax on +-0.801, relative errors of 4e-9 and 1e-10 before rounding.
  const float s = r * r;
  float p = fmaf(-0x1.990902p-13f, s, 0x1.110694p-7f);
  p = fmaf(p, s, -0x1.555544p-3f);
  const float sin_r = fmaf(p * s, r, r);
  float q = fmaf(0x1.99c3cep-16f, s, -0x1.6c0bb6p-10f);
  q = fmaf(q, s, 0x1.55554ap-5f);
  const float cos_r = fmaf(q, s * s, fmaf(-0.5f, s, 1.0f));
  const int quadrant = static_cast<int>(quarters) & 3;
  const float c = quadrant & 1 ? sin_r : cos_r, other = quadrant & 1 ? cos_r : sin_r;
  *cos = quadrant == 1 || quadrant == 2 ? -c : c;
  *sin = quadrant & 2 ? -other : other;
}

// 1 / rms of all queries and of all keys of a token, by the whole block, which must have the token
// to itself: its heads are overwritten next.
struct ScalesOfAll {
  float queries, keys;
};

__device__ __forceinline__ ScalesOfAll scales_of_all(const Heads& heads, int token) {
  __shared__ float shared[2][32];
  const int n_queries = heads.n_heads * heads.head_size;
  const int n = n_queries + heads.n_kv_heads * heads.head_size;
  const float* row = heads.row(token, 0);
  float squares[2] = {};
  // Heads have a multiple of 8 columns, so no four are of queries and of keys.
  for (int i = kLaneColumns * threadIdx.x; i < n; i += kLaneColumns * blockDim.x) {
    float x[kLaneColumns];
    load_columns(row, i, n, x);
    if (i < n_queries) {
      squares[0] = add_squares(x, squares[0]);
    } else {
      squares[1] = add_squares(x, squares[1]);
    }
  }
  sums_of_block(squares, shared);
  return {norm_scale(squares[0], n_queries, heads.epsilon),
          norm_scale(squares[1], n - n_queries, heads.epsilon)};
}

// One head of a token: a lane takes two columns and the two that turn with them, rope_size / 2
// apart, of those that turn; and of those that do not, the two that are half of their number apart.
struct HeadOfWarp {
  static constexpr int kMostQuads = kMostHead / 4 / 32;  // of a lane
  float2 low[kMostQuads], high[kMostQuads];

  // Columns of the lane's quad k: i and i + 1, and j and j + 1; quads beyond the head have none.
  struct Columns {
    int i, j, pair;  // pair: the first of the two that turn, by its place in frequencies
    bool is_there, turns;
  };
  static __device__ __forceinline__ Columns columns(const Heads& heads, int k) {
    const int pair = 2 * (threadIdx.x % 32 + 32 * k), half = heads.rope_size / 2;
    const int still = (heads.head_size - heads.rope_size) / 2;
    const int first = half + pair;  // of those that do not turn: rope_size + pair - half
    const bool turns = pair < half;
    return {turns ? pair : first, turns ? half + pair : first + still, pair,
            pair < heads.head_size / 2, turns};
  }

  __device__ __forceinline__ void load(const Heads& heads, const float* row) {
#pragma unroll
    for (int k = 0; k < kMostQuads; k++) {
      const Columns at = columns(heads, k);
      low[k] = high[k] = make_float2(0, 0);
      if (!at.is_there) continue;
      low[k] = *reinterpret_cast<const float2*>(row + at.i);
      high[k] = *reinterpret_cast<const float2*>(row + at.j);
    }
  }
  __device__ __forceinline__ void store(const Heads& heads, float* row) const {
#pragma unroll
    for (int k = 0; k < kMostQuads; k++) {
      const Columns at = columns(heads, k);
      if (!at.is_there) continue;
      *reinterpret_cast<float2*>(row + at.i) = low[k];
      *reinterpret_cast<float2*>(row + at.j) = high[k];
    }
  }

  // Times scale, then times the weights [head_size], each rounded; no weights are ones.
  __device__ __forceinline__ void multiply(const Heads& heads, float scale, const float* weights) {
#pragma unroll
    for (int k = 0; k < kMostQuads; k++) {
      const Columns at = columns(heads, k);
      float2 a = make_float2(1, 1), b = a;
      if (weights != nullptr && at.is_there) {
        a = *reinterpret_cast<const float2*>(weights + at.i);
        b = *reinterpret_cast<const float2*>(weights + at.j);
      }
      low[k] = make_float2(low[k].x * scale * a.x, low[k].y * scale * a.y);
      high[k] = make_float2(high[k].x * scale * b.x, high[k].y * scale * b.y);
    }
  }
  __device__ __forceinline__ void norm(const Heads& heads, const float* weights) {
    float squares = 0;
#pragma unroll
    for (int k = 0; k < kMostQuads; k++) {
      squares = fmaf(low[k].x, low[k].x, fmaf(low[k].y, low[k].y, squares));
      squares = fmaf(high[k].x, high[k].x, fmaf(high[k].y, high[k].y, squares));
    }
    multiply(heads, norm_scale(sum_of_warp(squares), heads.head_size, heads.epsilon), weights);
  }
  // What is no number stays none.
  __device__ __forceinline__ void keep_within(float limit) {
    const auto kept = [=](float x) { return x > limit ? limit : x < -limit ? -limit : x; };
#pragma unroll
    for (int k = 0; k < kMostQuads; k++) {
      low[k] = make_float2(kept(low[k].x), kept(low[k].y));
      high[k] = make_float2(kept(high[k].x), kept(high[k].y));
    }
  }
  __device__ __forceinline__ void turn(const Heads& heads, int position) {
#pragma unroll
    for (int k = 0; k < kMostQuads; k++) {
      const Columns at = columns(heads, k);
      if (!at.turns) continue;
      const float2 a = low[k], b = high[k];
      float2 cos, sin;
      cos_sin(static_cast<float>(position) * heads.frequencies[at.pair], &cos.x, &sin.x);
      cos_sin(static_cast<float>(position) * heads.frequencies[at.pair + 1], &cos.y, &sin.y);
      const float length = heads.rope_length;
      cos.x *= length, cos.y *= length, sin.x *= length, sin.y *= length;
      low[k] = make_float2(a.x * cos.x - b.x * sin.x, a.y * cos.y - b.y * sin.y);
      high[k] = make_float2(b.x * cos.x + a.x * sin.x, b.y * cos.y + a.y * sin.y);
    }
  }

  // To a row of the cache.
  template <class Number>
  __device__ __forceinline__ void cache(const Heads& heads, uint8_t* to) const {
    using Cache = Cached<Number>;
    float inverse = 0;
    if constexpr (Cache::kScaled) {
      unsigned largest = 0;
#pragma unroll
      for (int k = 0; k < kMostQuads; k++) {
        largest = max(largest, max(magnitude_bits(low[k].x), magnitude_bits(low[k].y)));
        largest = max(largest, max(magnitude_bits(high[k].x), magnitude_bits(high[k].y)));
      }
      const RoundingSteps steps = rounding_steps(__reduce_max_sync(kWholeWarp, largest));
      inverse = steps.inverse;
      if (threadIdx.x % 32 == 0) *reinterpret_cast<float*>(to + heads.head_size) = steps.scale;
    }
#pragma unroll
    for (int k = 0; k < kMostQuads; k++) {
      const Columns at = columns(heads, k);
      if (!at.is_there) continue;
      Cache::store(to, at.i, low[k].x, low[k].y, inverse);
      Cache::store(to, at.j, high[k].x, high[k].y, inverse);
    }
  }
};

}  // namespace lowmoe
