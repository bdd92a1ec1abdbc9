// The kernels around tiles.cuh, for a number of planes: tiles_1.cu, tiles_2.cu and tiles_3.cu stamp
// them out. One block for each tile of tokens (grid x) and 256 rows (grid y); neighbours share
// rows, so that words come from memory once. Dynamic shared memory: that of TileMemory.
//
// The tiles of experts: the places of an expert, kTokens at a time, from its first. That of active
// expert number i begins at grid x = first / kTokens + i, which leaves room for the tiles of all
// before it and needs no sum over them; so a block may find that it has nothing to do.
#pragma once

#include "tile_outputs.cuh"

namespace lowmoe {

// Blocks of small tiles that a multiprocessor is to run side by side, with half of its registers
// each: the H100's shared memory holds two, other cards' one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
inline constexpr int kSmallTileBlocks = 2;
#else
inline constexpr int kSmallTileBlocks = 1;
#endif

// Where tokens of a tile are among places.
struct Tile {
  int expert;
  int first;
  int count;  // 0: nothing to do
};

// The tile of this block, in shared memory so that it takes no registers meanwhile.  first, active:
// see cuda_ext/ops.py. All threads of the block.
template <int kTokens>
__device__ __forceinline__ const Tile& find_tile(const int* first, const int* active) {
  __shared__ Tile found;
  if (threadIdx.x == 0) found = {0, 0, 0};
  __syncthreads();
  const int n_active = active[0], slot = blockIdx.x;
  for (int i = threadIdx.x; i < n_active; i += kTileThreads) {
    const int expert = active[1 + i], begin = first[expert], end = first[expert + 1];
    const int at = begin + (slot - begin / kTokens - i) * kTokens;
    if (at >= begin && at < end) found = {expert, at, min(kTokens, end - at)};
  }
  __syncthreads();
  return found;
}

__device__ __forceinline__ layout::PlaneLayout shape_of(int n_out, int n_in) {
  return {static_cast<size_t>(n_out), static_cast<size_t>(n_in)};
}

__device__ __forceinline__ layout::PlaneLayout gate_up_shape(int n_hidden, int n_inner) {
  return {2 * layout::round_up(n_inner, layout::kBlockRows), static_cast<size_t>(n_hidden)};
}

// The planes of an expert's matrix, `offset` bytes into its parts; false if it is not here.
template <int kPlanes>
__device__ __forceinline__ bool planes_of(const long long* parts, int expert, size_t offset,
                                          const uint8_t* (&planes)[kPlanes]) {
  bool here = true;
  for (int p = 0; p < kPlanes; p++) {
    const long long part = parts[expert * layout::kMaxPlanes + p];
    here = here && part != 0;
    planes[p] = reinterpret_cast<const uint8_t*>(part) + offset;
  }
  return here;
}

template <int kPlanes>
struct TileMatrix {
  const uint8_t* planes[kPlanes];
  layout::PlaneLayout shape;
  const int8_t* table;
  float scale_unit;
};

// sums = the tile's tokens times the block's rows, of which those beyond the matrix are some
// others, in n scale groups from `group` on.
//   from(i)    the row of rounded tokens that token i of the tile is
//   bias(row)  what is added to one of the 256 rows
template <int kPlanes, int kTokens, class From, class Bias>
__device__ __forceinline__ void multiply(uint4* shared, const Tokens& tokens, const int& n_tokens,
                                         From from, const TileMatrix<kPlanes>& w, Bias bias,
                                         int group, int n, TileSums<kTokens>& sums) {
  auto& memory = *reinterpret_cast<TileMemory<kPlanes, kTokens>*>(shared);
  const int thread = threadIdx.x, half = threadIdx.x / 32 % 2;
  // Tokens that the tile lacks are the last one again, and written nowhere.
  if (thread < kTokens) memory.from[thread] = from(min(thread, n_tokens - 1));
  const int row_block = blockIdx.y * (kTileRows / layout::kBlockRows) + threadIdx.x / 64;
  const int last = static_cast<int>(w.shape.row_blocks()) - 1;
  const auto rows = warp_rows(w.planes, w.shape, min(row_block, last), half, w.scale_unit);
  begin<kTokens>(sums, bias);
  __syncthreads();
  TileProduct<kPlanes, kTokens>(memory, tokens, rows, half, n_tokens).add(group, n, w.table, sums);
}

// Of one of the block's rows, 0 beyond the n of a matrix whose first has the bias `first`.
__device__ __forceinline__ float bias_of_row(const Biases& bias, int first, int row, int n) {
  const int at = blockIdx.y * kTileRows + row;
  return at < n ? bias[first + at] : 0;
}

// y [T, n_out] = W x + bias, or += ..  Grid x: tiles of T; z: parts of the scale groups, whose
// sums, where there are several, go to parts [grid y][grid x][grid z][kTokens][256] instead: see
// add_parts.
template <int kPlanes, int kTokens>
__device__ __forceinline__ void linear(const int8_t* codes, const float* scales, int n_tokens,
                                       const TileMatrix<kPlanes>& w, const Biases& bias, bool add,
                                       float* y, float* parts) {
  DYNAMIC_SHARED(uint4, shared);
  const int n_out = static_cast<int>(w.shape.n_out), n_parts = gridDim.z, part = blockIdx.z;
  const int first = blockIdx.x * kTokens, count = min(kTokens, n_tokens - first);
  const Tokens tokens = tokens_of(codes, scales, static_cast<int>(w.shape.n_in));
  const int group = tokens.n_groups * part / n_parts;
  const int end = tokens.n_groups * (part + 1) / n_parts;
  TileSums<kTokens> sums;
  multiply<kPlanes, kTokens>(
      shared, tokens, count, [=](int i) { return first + i; }, w,
      [=](int row) { return blockIdx.z == 0 ? bias_of_row(bias, 0, row, n_out) : 0; }, group,
      end - group, sums);
  if (n_parts == 1) {
    write_rows<kTokens>(sums, count, blockIdx.y * kTileRows, n_out, add,
                        [=](int i) { return y + static_cast<size_t>(first + i) * n_out; });
  } else {
    const size_t tile = static_cast<size_t>(blockIdx.y * gridDim.x + blockIdx.x) * n_parts + part;
    float* to = parts + tile * kTokens * kTileRows;
    write_rows<kTokens>(sums, count, 0, kTileRows, false,
                        [=](int i) { return to + i * kTileRows; });
  }
}

// Rounded inner tokens of the places of experts that are here.
template <int kPlanes, int kTokens>
__device__ __forceinline__ void inner(const int8_t* codes, const float* scales,
                                      const long long* parts, const int8_t* table, float scale_unit,
                                      const int* first, const int* order, const int* active,
                                      const __half* d_inner, const Biases& bias, int n_hidden,
                                      int n_active, const InnerTokens& inner) {
  DYNAMIC_SHARED(uint4, shared);
  const Tile& tile = find_tile<kTokens>(first, active);
  TileMatrix<kPlanes> w{{}, gate_up_shape(n_hidden, inner.n_inner), table, scale_unit};
  if (tile.count == 0 || !planes_of(parts, tile.expert, 0, w.planes)) return;
  const Tokens tokens = tokens_of(codes, scales, n_hidden);
  TileSums<kTokens> sums;
  multiply<kPlanes, kTokens>(
      shared, tokens, tile.count, [&](int i) { return order[tile.first + i] / n_active; }, w,
      [&](int row) {  // row blocks of gate and up alternate
        const int block = row / layout::kBlockRows, unit = blockIdx.y * kScaleColumns;
        const int channel = unit + block / 2 * layout::kBlockRows + row % layout::kBlockRows;
        if (channel >= inner.n_inner) return 0.0f;
        return bias[(2 * tile.expert + block % 2) * inner.n_inner + channel];
      },
      0, tokens.n_groups, sums);
  round_inner<kTokens>(sums, shared, tile.first, tile.count,
                       d_inner + static_cast<size_t>(tile.expert) * inner.n_inner, inner);
}

// outputs [T * K, n_hidden], by assignment: the expert's down times the inner tokens of its places,
// and its bias; zeros if it is not here.
template <int kPlanes, int kTokens>
__device__ __forceinline__ void down(const int8_t* codes, const float* scales,
                                     const long long* parts, const int8_t* table, float scale_unit,
                                     const int* first, const int* order, const int* active,
                                     const Biases& bias, int n_hidden, int n_inner,
                                     float* outputs) {
  DYNAMIC_SHARED(uint4, shared);
  const Tile& tile = find_tile<kTokens>(first, active);
  if (tile.count == 0) return;
  TileMatrix<kPlanes> w{{}, shape_of(n_hidden, n_inner), table, scale_unit};
  const size_t offset = gate_up_shape(n_hidden, n_inner).plane_bytes();
  TileSums<kTokens> sums;
  if (planes_of(parts, tile.expert, offset, w.planes)) {
    const Tokens tokens = tokens_of(codes, scales, n_inner);
    multiply<kPlanes, kTokens>(
        shared, tokens, tile.count, [&](int i) { return tile.first + i; }, w,
        [&](int row) { return bias_of_row(bias, tile.expert * n_hidden, row, n_hidden); }, 0,
        tokens.n_groups, sums);
  } else {
    begin<kTokens>(sums, [](int) { return 0.0f; });
  }
  write_rows<kTokens>(sums, tile.count, blockIdx.y * kTileRows, n_hidden, false, [&](int i) {
    return outputs + static_cast<size_t>(order[tile.first + i]) * n_hidden;
  });
}

}  // namespace lowmoe

// BLOCKS: of a multiprocessor, as far as registers go.
#define STAMP_TILES(P, M, BLOCKS)                                                                 \
  static_assert(sizeof(lowmoe::TileMemory<P, M>) == lowmoe::kTileBytes<P, M>);                    \
  extern "C" __global__ void __launch_bounds__(lowmoe::kTileThreads, BLOCKS) linear_##M(          \
      const int8_t* codes, const float* scales, int n_tokens, const uint8_t* plane_0,             \
      const uint8_t* plane_1, const uint8_t* plane_2, const int8_t* table, float scale_unit,      \
      int n_out, int n_in, const float* bias, int add, float* y, float* parts) {                  \
    const uint8_t* const planes[] = {plane_0, plane_1, plane_2};                                  \
    lowmoe::TileMatrix<P> w{{}, lowmoe::shape_of(n_out, n_in), table, scale_unit};                \
    for (int p = 0; p < P; p++) w.planes[p] = planes[p];                                          \
    lowmoe::linear<P, M>(codes, scales, n_tokens, w, lowmoe::Biases{bias}, add, y, parts);        \
  }                                                                                               \
  EXPORT_KERNEL(linear_##M, linear_##M)                                                           \
  extern "C" __global__ void __launch_bounds__(lowmoe::kTileThreads, BLOCKS) inner_##M(           \
      const int8_t* codes, const float* scales, const long long* parts, const int8_t* table,      \
      float scale_unit, const int* first, const int* order, const int* active,                    \
      const __half* d_inner, const float* bias, float steepness, float shift, float limit,        \
      int n_hidden, int n_inner, int n_active, int8_t* inner_codes, float* inner_scales) {        \
    lowmoe::inner<P, M>(codes, scales, parts, table, scale_unit, first, order, active, d_inner,   \
                        lowmoe::Biases{bias}, n_hidden, n_active,                                 \
                        {inner_codes, inner_scales, n_inner, {steepness, shift, limit}});         \
  }                                                                                               \
  EXPORT_KERNEL(inner_##M, inner_##M)                                                             \
  extern "C" __global__ void __launch_bounds__(lowmoe::kTileThreads, BLOCKS)                      \
      down_##M(const int8_t* codes, const float* scales, const long long* parts,                  \
               const int8_t* table, float scale_unit, const int* first, const int* order,         \
               const int* active, const float* bias, int n_hidden, int n_inner, float* outputs) { \
    lowmoe::down<P, M>(codes, scales, parts, table, scale_unit, first, order, active,             \
                       lowmoe::Biases{bias}, n_hidden, n_inner, outputs);                         \
  }                                                                                               \
  EXPORT_KERNEL(down_##M, down_##M)
