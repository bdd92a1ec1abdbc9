// Norms queries and keys, turns them to their positions and puts keys and values into the cache.
// Source: arXiv 2104.09864; the halves of what turns of a head turn together.

#include "heads.cuh"

namespace lowmoe {

struct CacheOfHeads {
  int capacity;
  uint8_t *keys, *values;
};

// scale_of_all: 1 / rms of all heads that this one is normed with, if it is
template <class Number>
__device__ __forceinline__ void place_head(const Heads& heads, const CacheOfHeads& cache, int token,
                                           int head, const ScalesOfAll& of_all) {
  const bool is_query = heads.is_query(head), is_value = heads.is_value(head);
  const float* weights = is_query ? heads.q_norm : heads.k_norm;
  const int position = heads.positions[token];
  float* row = heads.row(token, head);
  HeadOfWarp mine;
  mine.load(heads, row);
  if (heads.norm == HeadNorm::kAllHeads && !is_value) {
    const int column = (is_query ? head : head - heads.n_heads) * heads.head_size;
    mine.multiply(heads, is_query ? of_all.queries : of_all.keys,
                  weights == nullptr ? nullptr : weights + column);
  }
  mine.keep_within(heads.clamp);
  if (!is_value) {
    if (heads.norm == HeadNorm::kBeforeRope) mine.norm(heads, weights);
    mine.turn(heads, position);
    if (heads.norm == HeadNorm::kAfterRope) mine.norm(heads, weights);
  }
  mine.store(heads, row);
  if (is_query) return;
  const int kv_head = (head - heads.n_heads) % heads.n_kv_heads;
  const size_t conversation = heads.sequences[token];
  const size_t at = (conversation * heads.n_kv_heads + kv_head) * cache.capacity + position;
  uint8_t* const to = is_value ? cache.values : cache.keys;
  mine.cache<Number>(heads, to + at * Cached<Number>::row_bytes(heads.head_size));
}

template <class Number>
__device__ __forceinline__ void rope_store(const Heads& heads, const CacheOfHeads& cache) {
  const int token = blockIdx.x, n_warps = blockDim.x / 32;
  ScalesOfAll of_all{};
  if (heads.norm == HeadNorm::kAllHeads) of_all = scales_of_all(heads, token);
  const int first = blockIdx.y * n_warps + threadIdx.x / 32;
  for (int head = first; head < heads.n_all(); head += gridDim.y * n_warps) {
    place_head<Number>(heads, cache, token, head, of_all);
  }
}

}  // namespace lowmoe

// Queries and keys in place, in this order: normed over all heads; kept, values too, within
// +-clamp; each head normed; turned, the first rope_size columns, and those times rope_length; or
// normed then. Keys and values go to the cache.
//   grid  (tokens, some); the warps of all blocks of a token share its heads of q, k and v. With a
//         norm of all heads one block has a token.
//   qkv            [tokens][n_heads + 2 n_kv_heads][head_size]: all heads of q, then k, then v
//   frequencies    [rope_size / 2], radians a token; rope_size is a multiple of 4
//   positions      [tokens], below capacity; sequences  [tokens], the conversation of each
//   norm           as HeadNorm; q_norm, k_norm  [head_size], of all heads [all of q], [all of k];
//                  null for ones
//   keys, values   [conversations][n_kv_heads][capacity] heads, see cached_heads.cuh
#define ROPE_STORE(name, Number)                                                              \
  extern "C" __global__ void __launch_bounds__(512) rope_store_##name(                        \
      float* qkv, const float* frequencies, const int* positions, const int* sequences,       \
      int n_heads, int n_kv_heads, int head_size, int rope_size, float rope_length, int norm, \
      const float* q_norm, const float* k_norm, float epsilon, float clamp, int capacity,     \
      uint8_t* keys, uint8_t* values) {                                                       \
    lowmoe::rope_store<Number>(                                                               \
        {qkv, frequencies, positions, sequences, n_heads, n_kv_heads, head_size, rope_size,   \
         rope_length, static_cast<lowmoe::HeadNorm>(norm), q_norm, k_norm, epsilon, clamp},   \
        {capacity, keys, values});                                                            \
  }                                                                                           \
  EXPORT_KERNEL(rope_store_##name, rope_store_##name)

ROPE_STORE(float16, __half)
ROPE_STORE(float32, float)
ROPE_STORE(int8, int8_t)
