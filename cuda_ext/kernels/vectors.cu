// Rows of the embedding; tokens normed, activated and rounded to int8, see tokens.cuh.

#include "activation.cuh"
#include "tokens.cuh"

namespace lowmoe {

// Up to kGroups groups for each warp. Whatever a lane needs is asked for before the sum is waited
// for: one trip to memory, not two.
template <int kGroups>
__device__ __forceinline__ void norm_round(const Norm& norm) {
  const int n = norm.rounded.n_columns, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  float of_x[kGroups][kLaneColumns], of_weight[kGroups][kLaneColumns], squares = 0;
  uint2 of_d[kGroups];
#pragma unroll
  for (int k = 0; k < kGroups; k++) {
    const int column = norm.column_of(warp + k * n_warps);
    load_columns(norm.x, column, n, of_x[k]);
    load_columns(norm.weight, column, n, of_weight[k]);
    of_d[k] = load_columns(norm.d, column, n);
  }
#pragma unroll
  for (int k = 0; k < kGroups; k++) squares = add_squares(of_x[k], squares);
  const float scale = norm.scale_of(squares);
#pragma unroll
  for (int k = 0; k < kGroups; k++) {
    const int group = warp + k * n_warps;
    if (group * kScaleColumns < n) norm.finish(group, of_x[k], of_weight[k], of_d[k], scale);
  }
}

// Adds the lane's four columns of one row of a plane, in the basis it is coded in, without the
// gain: layout.py's drawing, read for one row.
__device__ __forceinline__ void add_plane(const uint8_t* plane, const layout::PlaneLayout& at,
                                          const int8_t* table, float scale_unit, int row,
                                          int column, float (&sum)[kLaneColumns]) {
  const size_t column_blocks = at.column_blocks(), b = column / layout::kBlockColumns;
  if (b >= column_blocks) return;
  const int r = row % layout::kBlockRows, slice = column % layout::kBlockColumns / kLaneColumns;
  // word_row's inverse: which word of a slice has the row, and its first weight there.
  const int w = r / 2 % layout::kWords, first = 8 * (r / 16) + 4 * (r % 2);
  const size_t block = row / layout::kBlockRows * column_blocks + b;
  const auto* words = reinterpret_cast<const uint64_t*>(plane);
  const uint64_t word = words[(block * layout::kSlices + slice) * layout::kWords + w];
  const uint8_t pair = plane[at.group_scale_offset() + block * layout::kBlockScaleBytes + r % 32];
  const auto* row_scales = reinterpret_cast<const __half*>(plane + at.row_scale_offset());
  const float scale = __half2float(row_scales[row]) * scale_unit * (r < 32 ? pair & 15 : pair >> 4);
#pragma unroll
  for (int i = 0; i < kLaneColumns; i++) {
    sum[i] += scale * table[layout::window(word, first + i, 6)];
  }
}

// The sigmoid of a token's score, by the whole block: x, router  [n]
__device__ __forceinline__ float sigmoid_of_score(const float* x, const float* router, int n) {
  float score = 0, a[kLaneColumns], b[kLaneColumns];
  for (int i = kLaneColumns * threadIdx.x; i < n; i += kLaneColumns * blockDim.x) {
    load_columns(x, i, n, a);
    load_columns(router, i, n, b);
    for (int j = 0; j < kLaneColumns; j++) score = fmaf(a[j], b[j], score);
  }
  return 1 / (1 + expf(-sum_of_block(score)));
}

}  // namespace lowmoe

// x[t] = row ids[t] of a matrix in its own basis, W = gain * W' H * d, n_rows a multiple of 64.
//   grid   (tokens, groups / warps of a block, rounded up); a warp takes a group
//   ids    [tokens]; planes  n_planes of the three are read; table  [64]; d  [n_columns]
// A word holds a row's weights of four columns beside those of seven other rows, so an eighth of
// what is read is of use: 16 KiB for a row of 4096 columns in 3 planes, one row a token.
extern "C" __global__ void __launch_bounds__(128)
    embed(const int* ids, const uint8_t* plane0, const uint8_t* plane1, const uint8_t* plane2,
          int n_planes, const int8_t* table, float scale_unit, const __half* d, int n_rows,
          int n_columns, float* x) {
  using namespace lowmoe;
  const int token = blockIdx.x, lane = threadIdx.x % 32;
  const int group = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
  if (group * kScaleColumns >= n_columns) return;
  const int column = group * kScaleColumns + lane * kLaneColumns;
  const layout::PlaneLayout at{static_cast<size_t>(n_rows), static_cast<size_t>(n_columns)};
  const uint8_t* planes[layout::kMaxPlanes] = {plane0, plane1, plane2};
  float sum[kLaneColumns] = {}, gain = 1;
#pragma unroll
  for (int p = 0; p < layout::kMaxPlanes; p++) {
    if (p >= n_planes) break;
    add_plane(planes[p], at, table, scale_unit, ids[token], column, sum);
    gain = *reinterpret_cast<const float*>(planes[p] + at.gain_offset());  // the last one's counts
  }
  turn_group(sum, hadamard_size(n_columns));
  for (float& mine : sum) mine *= gain;
  multiply(sum, load_columns(d, column, n_columns));
  store_columns(sum, column, n_columns, x + static_cast<size_t>(token) * n_columns);
}
EXPORT_KERNEL(embed, embed)

// normed = x / rms(x) * weight, and that rounded in the basis of d.
//   grid    (tokens); block  a warp for each 1 or 2 groups of a token, or, wide, 32 warps for any
//   x, normed   [tokens][n_columns]; weight, d  [n_columns]; normed is written only if keep is not
//   0
// Source: arXiv 1910.07467. The norm multiplies by 1 / rms, then by the weight, each rounded.
#define NORM_ROUND(name, norm_round)                                                             \
  extern "C" __global__ void __launch_bounds__(1024)                                             \
      name(const float* x, const float* weight, float epsilon, const __half* d, int n_columns,   \
           int keep, float* normed, int8_t* codes, float* scales) {                              \
    const size_t first = static_cast<size_t>(blockIdx.x) * n_columns;                            \
    norm_round({x + first, weight, d, epsilon, keep ? normed + first : nullptr,                  \
                lowmoe::RoundedTokens{codes, scales, n_columns}, static_cast<int>(blockIdx.x)}); \
  }                                                                                              \
  EXPORT_KERNEL(name, name)

NORM_ROUND(norm_round_1, lowmoe::norm_round<1>)
NORM_ROUND(norm_round_2, lowmoe::norm_round<2>)
NORM_ROUND(norm_round_wide, lowmoe::norm_round_wide)

// x rounded in the basis of d.
//   grid  (tokens, groups / warps of a block, rounded up); a warp takes a group
extern "C" __global__ void __launch_bounds__(128)
    round_tokens(const float* x, const __half* d, int n_columns, int8_t* codes, float* scales) {
  using namespace lowmoe;
  const int token = blockIdx.x, lane = threadIdx.x % 32;
  const int group = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
  if (group * kScaleColumns >= n_columns) return;
  const int column = group * kScaleColumns + lane * kLaneColumns;
  float mine[kLaneColumns];
  load_columns(x + static_cast<size_t>(token) * n_columns, column, n_columns, mine);
  multiply(mine, load_columns(d, column, n_columns));
  RoundedTokens{codes, scales, n_columns}.round(mine, token, group);
}
EXPORT_KERNEL(round_tokens, round_tokens)

// The activation of gate and up, times what the token's expert weighs, rounded in the basis of d.
//   grid     (tokens, groups / warps of a block, rounded up); a warp takes a group
//   gate_up  [tokens][2 * n_inner], gate's first
//   normed   [tokens][n_hidden]; router  [n_hidden], whose score's sigmoid is the weight; or null:
//            a weight of 1
// Every block scores its token anew, from the L2 cache: 16 KB for 2048 hidden channels, less than a
// launch of its own would take.
extern "C" __global__ void __launch_bounds__(128)
    gate_round(const float* gate_up, float steepness, float shift, float limit, const float* normed,
               const float* router, int n_hidden, const __half* d, int n_inner, int8_t* codes,
               float* scales) {
  using namespace lowmoe;
  const int token = blockIdx.x, lane = threadIdx.x % 32;
  const int group = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
  float weight = 1;
  if (router != nullptr) {
    weight = sigmoid_of_score(normed + static_cast<size_t>(token) * n_hidden, router, n_hidden);
  }
  if (group * kScaleColumns >= n_inner) return;
  const int column = group * kScaleColumns + lane * kLaneColumns;
  const float* of_token = gate_up + static_cast<size_t>(token) * 2 * n_inner;
  const Activation activation{steepness, shift, limit};
  float gate[kLaneColumns], up[kLaneColumns], mine[kLaneColumns];
  load_columns(of_token, column, n_inner, gate);
  load_columns(of_token + n_inner, column, n_inner, up);
#pragma unroll
  for (int i = 0; i < kLaneColumns; i++) mine[i] = activation(gate[i], up[i]) * weight;
  multiply(mine, load_columns(d, column, n_inner));
  RoundedTokens{codes, scales, n_inner}.round(mine, token, group);
}
EXPORT_KERNEL(gate_round, gate_round)
