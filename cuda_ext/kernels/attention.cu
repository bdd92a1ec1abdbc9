// Attention of a few tokens over the cache.
// Source: arXiv 2305.13245 (grouped queries), 2205.14135 (softmax in parts); positions are split
// over blocks, so that one token fills a card.

#include "attention_warp.cuh"
#include "last_block.cuh"

namespace lowmoe {

inline constexpr int kMostWarps = 8;

// What a kernel of attention is given, see its contract below.
struct Attention {
  const float* qkv;
  const uint8_t *keys, *values;
  const int *positions, *sequences;
  int n_heads, head_size, capacity, window, n_tiles;
  float score_scale;
  const float* sinks;  // or nullptr
  float* out;
  int* arrived;
  float* parts;

  // What one block computes: (part, key-value head, token) in the grid.
  __device__ int n_parts() const { return gridDim.x; }
  __device__ int n_kv_heads() const { return gridDim.y; }
  __device__ int kv_head() const { return blockIdx.y; }
  __device__ int token() const { return blockIdx.z; }
  __device__ int group() const { return n_heads / n_kv_heads(); }
  __device__ int n_quads() const { return group() * head_size / 4; }  // of 4 numbers, of its output

  __device__ const float* queries() const {
    const size_t n_all = n_heads + 2 * n_kv_heads();
    return qkv + (token() * n_all + kv_head() * group()) * head_size;
  }
  __device__ float* outputs() const {
    return out + (static_cast<size_t>(token()) * n_heads + kv_head() * group()) * head_size;
  }
  // What a query's sink adds to the total of its powers of 2^(score - top).
  __device__ __forceinline__ float nothing(int query, float top) const {
    constexpr float kLog2E = 0x1.715476p+0f;
    if (sinks == nullptr) return 0;
    return exp2f(sinks[kv_head() * group() + query] * kLog2E - top);
  }
  __device__ size_t first_row() const {
    return (static_cast<size_t>(sequences[token()]) * n_kv_heads() + kv_head()) * capacity;
  }
  // Sums of a part, [group][head_size]; its tops and totals, [group] each, lie behind all sums.
  __device__ float* sums_of(int part) const { return parts + index_of(part) * group() * head_size; }
  __device__ float2* tops_of(int part) const {
    const size_t all = index_of(0, gridDim.z * gridDim.y) * group() * head_size;
    return reinterpret_cast<float2*>(parts + all) + index_of(part) * group();
  }

 private:
  __device__ size_t index_of(int part) const {
    return index_of(part, token() * n_kv_heads() + kv_head());
  }
  __device__ size_t index_of(int part, int pair) const {
    return static_cast<size_t>(pair) * n_parts() + part;
  }
};

// The positions of one block, and how many blocks have any.
struct Share {
  int begin, end, n_shares;
};

// As even as multiples of 32 allow, and not below 128: a share costs a merge, of about 1 us.
__device__ __forceinline__ Share share_of(const Attention& a) {
  constexpr int kLeast = 128, kMultiple = 32;
  const int end = a.positions[a.token()] + 1;
  const int begin = a.window == 0 || end <= a.window ? 0 : end - a.window;
  const int even = (end - begin + a.n_parts() - 1) / a.n_parts();
  const int share = max(kLeast, (even + kMultiple - 1) / kMultiple * kMultiple);
  const int from = begin + static_cast<int>(blockIdx.x) * share;
  return {from, min(from + share, end), (end - begin + share - 1) / share};
}

// The query heads of each warp: tile after tile, as even as can be.
struct Tiles {
  int n_tiles, n_queries, of_each;

  __device__ __forceinline__ Tiles(const Attention& a)
      : n_tiles(a.n_tiles), n_queries(a.group()), of_each((n_queries + n_tiles - 1) / n_tiles) {}
  __device__ int first_of(int warp) const { return warp % n_tiles * of_each; }
  __device__ int count_of(int warp) const { return min(of_each, n_queries - first_of(warp)); }
};

template <class Number, int kQueries, int kLanes>
__device__ __forceinline__ void load_queries(const Attention& a, const Tiles& tiles,
                                             Warp<Number, kQueries, kLanes>& warp) {
  const int index = threadIdx.x / 32, column = warp.column();
  const float* from = a.queries() + tiles.first_of(index) * a.head_size + column;
  const int count = column < a.head_size ? tiles.count_of(index) : 0;
#pragma unroll
  for (int g = 0; g < kQueries; g++) {
#pragma unroll
    for (int i = 0; i < kChunk; i += 4) {
      float4 four = make_float4(0, 0, 0, 0);
      if (g < count) four = *reinterpret_cast<const float4*>(from + g * a.head_size + i);
      warp.q[g][i] = four.x * a.score_scale, warp.q[g][i + 1] = four.y * a.score_scale;
      warp.q[g][i + 2] = four.z * a.score_scale, warp.q[g][i + 3] = four.w * a.score_scale;
    }
  }
}

// What the warps of a block have found, to be joined: numbers of out, tops and totals.
template <int kQueries, int kColumns>
struct Found {
  float out[kMostWarps][kQueries][kColumns];
  float2 tops[kMostWarps][kQueries];  // x the top, y the total
};

template <class Number, int kQueries, int kLanes>
__device__ __forceinline__ void leave(const Softmax<kQueries>& softmax,
                                      Found<kQueries, kLanes * kChunk>& found) {
  using OfWarp = Warp<Number, kQueries, kLanes>;
  const int index = threadIdx.x / 32, column = OfWarp::column();
  const float total = OfWarp::of_query(softmax.total, [](float a, float b) { return a + b; });
  if (OfWarp::is_first_of_query()) {
    found.tops[index][OfWarp::own_score()] = make_float2(softmax.top, total);
  }
#pragma unroll
  for (int g = 0; g < kQueries; g++) {
    float sums[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; i++) {
      sums[i] = softmax.out[g][i];
      for (int apart = kLanes; apart < 32; apart *= 2) {
        sums[i] += __shfl_xor_sync(kWholeWarp, sums[i], apart);
      }
    }
    if (OfWarp::lane() >= kLanes) continue;
    float4* to = reinterpret_cast<float4*>(&found.out[index][g][column]);
    to[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
    to[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
  }
}

__device__ __forceinline__ void add_scaled(float4& sum, float scale, const float4& x) {
  sum.x = fmaf(scale, x.x, sum.x), sum.y = fmaf(scale, x.y, sum.y);
  sum.z = fmaf(scale, x.z, sum.z), sum.w = fmaf(scale, x.w, sum.w);
}

// Joins the warps of the block, for four numbers of one query head: their sum and (top, total).
template <int kQueries, int kColumns>
__device__ __forceinline__ float4 join_warps(const Found<kQueries, kColumns>& found,
                                             const Tiles& tiles, int query, int column,
                                             float2* whole) {
  const int tile = query / tiles.of_each, g = query % tiles.of_each, n_warps = blockDim.x / 32;
  float top = minus_infinity(), total = 0;
  for (int w = tile; w < n_warps; w += tiles.n_tiles) top = fmaxf(top, found.tops[w][g].x);
  float4 sum = make_float4(0, 0, 0, 0);
  for (int w = tile; w < n_warps; w += tiles.n_tiles) {
    const float scale = exp2f(found.tops[w][g].x - top);
    total = fmaf(scale, found.tops[w][g].y, total);
    add_scaled(sum, scale, *reinterpret_cast<const float4*>(&found.out[w][g][column]));
  }
  *whole = make_float2(top, total);
  return sum;
}

// The last block of a token's key-value head: joins the parts in their order.
//   weights  shared memory, [group][n_shares]
__device__ __forceinline__ void join_parts(const Attention& a, int n_shares, float* weights) {
  const int lane = threadIdx.x % 32;
  for (int g = threadIdx.x / 32; g < a.group(); g += blockDim.x / 32) {
    float top = minus_infinity(), total = 0;
    for (int p = lane; p < n_shares; p += 32) top = fmaxf(top, a.tops_of(p)[g].x);
    for (int apart = 16; apart > 0; apart /= 2) {
      top = fmaxf(top, __shfl_xor_sync(kWholeWarp, top, apart));
    }
    for (int p = lane; p < n_shares; p += 32) {
      const float2 of_part = a.tops_of(p)[g];
      weights[g * n_shares + p] = exp2f(of_part.x - top);
      total = fmaf(weights[g * n_shares + p], of_part.y, total);
    }
    for (int apart = 16; apart > 0; apart /= 2) total += __shfl_xor_sync(kWholeWarp, total, apart);
    total += a.nothing(g, top);
    for (int p = lane; p < n_shares; p += 32) weights[g * n_shares + p] /= total;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < a.n_quads(); i += blockDim.x) {
    const float* of_query = weights + 4 * i / a.head_size * n_shares;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int p = 0; p < n_shares; p++) {
      add_scaled(sum, of_query[p], reinterpret_cast<const float4*>(a.sums_of(p))[i]);
    }
    reinterpret_cast<float4*>(a.outputs())[i] = sum;
  }
}

// Joins the warps of the block, then, in the last block, the parts.
template <int kQueries, int kColumns>
__device__ __forceinline__ void join(const Attention& a, Found<kQueries, kColumns>& found) {
  const Share share = share_of(a);  // anew: kept over the loop, it would be registers too many
  const Tiles tiles(a);
  for (int i = threadIdx.x; i < a.n_quads(); i += blockDim.x) {
    const int query = 4 * i / a.head_size, column = 4 * i % a.head_size;
    float2 whole;
    float4 sum = join_warps(found, tiles, query, column, &whole);
    if (share.n_shares == 1) {
      const float scale = 1 / (whole.y + a.nothing(query, whole.x));
      sum.x *= scale, sum.y *= scale, sum.z *= scale, sum.w *= scale;
      reinterpret_cast<float4*>(a.outputs())[i] = sum;
    } else {
      reinterpret_cast<float4*>(a.sums_of(blockIdx.x))[i] = sum;
      if (column == 0) a.tops_of(blockIdx.x)[query] = whole;
    }
  }
  if (share.n_shares == 1) return;
  if (!is_last_block(a.arrived + a.token() * a.n_kv_heads() + a.kv_head(), share.n_shares)) return;
  join_parts(a, share.n_shares, &found.out[0][0][0]);
}

template <class Number, int kQueries, int kLanes>
__device__ __forceinline__ void attend(const Attention& a) {
  using OfWarp = Warp<Number, kQueries, kLanes>;
  __shared__ Found<kQueries, kLanes * kChunk> found;
  __shared__ __align__(16) float shared[kMostWarps][OfWarp::kSharedFloats];
  const Share share = share_of(a);
  if (static_cast<int>(blockIdx.x) >= share.n_shares) return;
  const int index = threadIdx.x / 32, slot = index / a.n_tiles;
  const int stride = blockDim.x / 32 / a.n_tiles * OfWarp::kStep;
  const size_t first_byte = a.first_row() * OfWarp::Cache::row_bytes(a.head_size);
  OfWarp warp{a.keys + first_byte, a.values + first_byte, a.head_size,
              share.end,           shared[index],         {}};
  load_queries(a, Tiles(a), warp);
  Softmax<kQueries> softmax{minus_infinity(), 0, {}};
  for (int at = share.begin + slot * OfWarp::kStep; at < share.end; at += stride) {
    warp.step(at, softmax);
  }
  leave<Number, kQueries, kLanes>(softmax, found);
  __syncthreads();
  join(a, found);
}

}  // namespace lowmoe

// out [tokens][n_heads][head_size] = softmax(q k * some scale) v over the positions that each
// token sees: its own and those before, of which the latest `window`, 0 for all.
//   grid     (parts, n_kv_heads, tokens): the positions of a token are cut into up to so many
//            parts, up to 64, and blocks that a shorter past does not need leave at once
//   block    up to 8 warps, a multiple of n_tiles, which share rows of the cache: each takes
//            group / n_tiles query heads, rounded up, up to kQueries; group = n_heads / n_kv_heads.
//            What one of them has read the others find in the L1 cache.
//   qkv, positions, sequences, keys, values   as for rope_store, which has been there before
//   score_scale  log2(e) times the scale: scores become exponents of 2
//   sinks    [n_heads], scores of nothing that take part in the softmax, as they are; or null
//   arrived  [tokens][n_kv_heads], 0 before and after
//   parts    [tokens][n_kv_heads][parts][group][head_size + 2] floats, anything
// Requires head_size <= 8 * kLanes. Parts are joined in their order by the block that comes last,
// so the same positions and the same grid give the same bits. 128 registers allow two blocks of 8
// warps on a multiprocessor.
#define ATTEND(name, Number, kQueries, kLanes)                                                   \
  extern "C" __global__ void __launch_bounds__(256, 2) attend_##name##_##kQueries##_##kLanes(    \
      const float* qkv, const uint8_t* keys, const uint8_t* values, const int* positions,        \
      const int* sequences, int n_heads, int head_size, int capacity, int window, int n_tiles,   \
      float score_scale, const float* sinks, float* out, int* arrived, float* parts) {           \
    lowmoe::attend<Number, kQueries, kLanes>({qkv, keys, values, positions, sequences, n_heads,  \
                                              head_size, capacity, window, n_tiles, score_scale, \
                                              sinks, out, arrived, parts});                      \
  }                                                                                              \
  EXPORT_KERNEL(attend_##name##_##kQueries##_##kLanes, attend_##name##_##kQueries##_##kLanes)

#define ATTEND_ALL(name, Number) \
  ATTEND(name, Number, 1, 16)    \
  ATTEND(name, Number, 1, 32)    \
  ATTEND(name, Number, 4, 16)    \
  ATTEND(name, Number, 4, 32)

ATTEND_ALL(float16, __half)
ATTEND_ALL(float32, float)
ATTEND_ALL(int8, int8_t)
