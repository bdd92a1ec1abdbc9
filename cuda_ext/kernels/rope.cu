// Turns heads to their positions and puts keys and values into the cache.
// Source: arXiv 2104.09864; the halves of a head turn together.

#include "cached_heads.cuh"

namespace lowmoe {

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

// One warp a head of a token. A lane takes two columns of one half and two of the other, for the
// pairs that turn are head_size / 2 apart.
template <class Number>
__device__ __forceinline__ void rope_store(float* qkv, const float* frequencies,
                                           const int* positions, const int* sequences, int n_heads,
                                           int n_kv_heads, int head_size, int capacity,
                                           uint8_t* keys, uint8_t* values) {
  using Cache = Cached<Number>;
  constexpr int kMostQuads = kMostHead / 4 / 32;  // of a lane
  const int token = blockIdx.x, lane = threadIdx.x % 32, half = head_size / 2;
  const int head = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
  const int n_all = n_heads + 2 * n_kv_heads;
  if (head >= n_all) return;
  const int position = positions[token];
  const bool is_query = head < n_heads, is_value = head >= n_heads + n_kv_heads;
  float* row = qkv + (static_cast<size_t>(token) * n_all + head) * head_size;
  float2 low[kMostQuads], high[kMostQuads];
  unsigned largest = 0;
#pragma unroll
  for (int k = 0; k < kMostQuads; k++) {
    const int i = 2 * (lane + 32 * k);
    if (i >= half) break;
    float2* const first = reinterpret_cast<float2*>(row + i);
    float2* const second = reinterpret_cast<float2*>(row + half + i);
    const float2 a = *first, b = *second;
    low[k] = a, high[k] = b;
    if (!is_value) {
      float2 cos, sin;
      cos_sin(static_cast<float>(position) * frequencies[i], &cos.x, &sin.x);
      cos_sin(static_cast<float>(position) * frequencies[i + 1], &cos.y, &sin.y);
      *first = low[k] = make_float2(a.x * cos.x - b.x * sin.x, a.y * cos.y - b.y * sin.y);
      *second = high[k] = make_float2(b.x * cos.x + a.x * sin.x, b.y * cos.y + a.y * sin.y);
    }
    largest = max(largest, max(magnitude_bits(low[k].x), magnitude_bits(low[k].y)));
    largest = max(largest, max(magnitude_bits(high[k].x), magnitude_bits(high[k].y)));
  }
  if (is_query) return;
  const int kv_head = (head - n_heads) % n_kv_heads;
  const size_t at = (static_cast<size_t>(sequences[token]) * n_kv_heads + kv_head) * capacity;
  uint8_t* to = (is_value ? values : keys) + (at + position) * Cache::row_bytes(head_size);
  float inverse = 0;
  if constexpr (Cache::kScaled) {
    const RoundingSteps steps = rounding_steps(__reduce_max_sync(kWholeWarp, largest));
    inverse = steps.inverse;
    if (lane == 0) *reinterpret_cast<float*>(to + head_size) = steps.scale;
  }
#pragma unroll
  for (int k = 0; k < kMostQuads; k++) {
    const int i = 2 * (lane + 32 * k);
    if (i >= half) break;
    Cache::store(to, i, low[k].x, low[k].y, inverse);
    Cache::store(to, half + i, high[k].x, high[k].y, inverse);
  }
}

}  // namespace lowmoe

// Turns queries and keys in place; keys and values go to the cache.
//   grid  (tokens, heads / warps of a block, rounded up); a warp takes one head of q, k or v
//   qkv            [tokens][n_heads + 2 n_kv_heads][head_size]: all heads of q, then k, then v
//   frequencies    [head_size / 2], radians a token
//   positions      [tokens], below capacity; sequences  [tokens], the conversation of each
//   keys, values   [conversations][n_kv_heads][capacity] heads, see cached_heads.cuh
#define ROPE_STORE(name, Number)                                                                  \
  extern "C" __global__ void __launch_bounds__(256) rope_store_##name(                            \
      float* qkv, const float* frequencies, const int* positions, const int* sequences,           \
      int n_heads, int n_kv_heads, int head_size, int capacity, uint8_t* keys, uint8_t* values) { \
    lowmoe::rope_store<Number>(qkv, frequencies, positions, sequences, n_heads, n_kv_heads,       \
                               head_size, capacity, keys, values);                                \
  }                                                                                               \
  EXPORT_KERNEL(rope_store_##name, rope_store_##name)

ROPE_STORE(float16, __half)
ROPE_STORE(float32, float)
ROPE_STORE(int8, int8_t)
