// Tokens on their way through a warp: loaded, normed, rounded to int8. A warp takes 128 columns,
// see round.cuh.
//
// All tokens have n_columns columns, any number; where it is a multiple of 4, lanes read and write
// 16 bytes at once. Codes have a stride of n_columns padded to 64, scales of one for each 128.
#pragma once

#include "quant/layout.h"
#include "round.cuh"

namespace lowmoe {

// A lane's four columns of a row from `column` on; 0 beyond the n of the row.
__device__ __forceinline__ void load_columns(const float* row, int column, int n,
                                             float (&to)[kLaneColumns]) {
  if (n % kLaneColumns == 0) {
    const float4 four =
        column < n ? *reinterpret_cast<const float4*>(row + column) : make_float4(0, 0, 0, 0);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneColumns; i++) to[i] = column + i < n ? row[column + i] : 0;
}

// The same of float16, which take half the registers as long as they are not widened.
__device__ __forceinline__ uint2 load_columns(const __half* row, int column, int n) {
  uint2 bits = make_uint2(0, 0);
  if (n % kLaneColumns == 0) {
    if (column < n) bits = *reinterpret_cast<const uint2*>(row + column);
    return bits;
  }
  __half* const each = reinterpret_cast<__half*>(&bits);
#pragma unroll
  for (int i = 0; i < kLaneColumns; i++) {
    if (column + i < n) each[i] = row[column + i];
  }
  return bits;
}

__device__ __forceinline__ void multiply(float (&x)[kLaneColumns], const uint2& d) {
  const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&d.x));
  const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&d.y));
  x[0] *= low.x, x[1] *= low.y, x[2] *= high.x, x[3] *= high.y;
}

__device__ __forceinline__ void store_columns(const float (&from)[kLaneColumns], int column, int n,
                                              float* row) {
  if (n % kLaneColumns == 0) {
    if (column >= n) return;
    *reinterpret_cast<float4*>(row + column) = make_float4(from[0], from[1], from[2], from[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneColumns; i++) {
    if (column + i < n) row[column + i] = from[i];
  }
}

// Where the rounded tokens of a matrix with n_columns columns go.
struct RoundedTokens {
  int8_t* codes;
  float* scales;
  int n_columns;

  // Rounds what a warp brings of one group of a token: x as for round_group.
  __device__ __forceinline__ void round(const float (&x)[kLaneColumns], int token,
                                        int group) const {
    const int lane = threadIdx.x % 32, column = group * kScaleColumns + lane * kLaneColumns;
    const int padded = layout::round_up(n_columns, layout::kBlockColumns);
    const int n_groups = (n_columns + kScaleColumns - 1) / kScaleColumns;
    float scale;
    const unsigned four = round_group(x, hadamard_size(n_columns), &scale);
    if (column < padded) {
      int8_t* to = codes + static_cast<size_t>(token) * padded + column;
      *reinterpret_cast<unsigned*>(to) = four;
    }
    if (lane == 0) scales[static_cast<size_t>(token) * n_groups + group] = scale;
  }
};

// The sum over the block of what each thread brings, the same in all of them: first the lanes of a
// warp, then the warps, always in this order.
__device__ __forceinline__ float sum_of_block(float mine) {
  __shared__ float sums[32];
  const int lane = threadIdx.x % 32, n_warps = blockDim.x / 32;
  const float of_warp = sum_of_warp(mine);
  if (lane == 0) sums[threadIdx.x / 32] = of_warp;
  __syncthreads();
  return sum_of_warp(lane < n_warps ? sums[lane] : 0);
}

// The sums over the block of what each thread brings, several at once.
//   shared  [kCount][32], not in use
template <int kCount>
__device__ __forceinline__ void sums_of_block(float (&mine)[kCount], float (*shared)[32]) {
  const int lane = threadIdx.x % 32, n_warps = blockDim.x / 32;
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    const float sum = sum_of_warp(mine[i]);
    if (lane == 0) shared[i][threadIdx.x / 32] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; i++) mine[i] = sum_of_warp(lane < n_warps ? shared[i][lane] : 0);
}

// 1 / rms of n_columns numbers whose squares add up to this.
__device__ __forceinline__ float norm_scale(float squares, int n_columns, float epsilon) {
  return 1.0f / sqrtf(squares / n_columns + epsilon);
}

// One token's norm, for the block that has it; warp w takes groups w, w + n_warps, ..
struct Norm {
  const float *x, *weight;  // of the token; [n_columns] each
  const __half* d;
  float epsilon;
  float* normed;  // where it is to be kept; nullptr if nowhere
  RoundedTokens rounded;
  int token;  // of those

  __device__ __forceinline__ static int column_of(int group) {
    return group * kScaleColumns + threadIdx.x % 32 * kLaneColumns;
  }
  __device__ __forceinline__ float scale_of(float squares) const {
    return norm_scale(sum_of_block(squares), rounded.n_columns, epsilon);
  }
  __device__ __forceinline__ void finish(int group, const float (&of_x)[kLaneColumns],
                                         const float (&of_weight)[kLaneColumns], const uint2& of_d,
                                         float scale) const {
    float y[kLaneColumns];
#pragma unroll
    for (int i = 0; i < kLaneColumns; i++) y[i] = of_x[i] * scale * of_weight[i];
    if (normed != nullptr) store_columns(y, column_of(group), rounded.n_columns, normed);
    multiply(y, of_d);
    rounded.round(y, token, group);
  }
};

__device__ __forceinline__ float add_squares(const float (&x)[kLaneColumns], float sum) {
  for (float mine : x) sum = fmaf(mine, mine, sum);
  return sum;
}

// Any number of groups: x is read twice.
__device__ __forceinline__ void norm_round_wide(const Norm& norm) {
  const int n = norm.rounded.n_columns, n_groups = (n + kScaleColumns - 1) / kScaleColumns;
  const int warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  float of_x[kLaneColumns], of_weight[kLaneColumns], squares = 0;
  for (int group = warp; group < n_groups; group += n_warps) {
    load_columns(norm.x, norm.column_of(group), n, of_x);
    squares = add_squares(of_x, squares);
  }
  const float scale = norm.scale_of(squares);
  for (int group = warp; group < n_groups; group += n_warps) {
    load_columns(norm.x, norm.column_of(group), n, of_x);
    load_columns(norm.weight, norm.column_of(group), n, of_weight);
    norm.finish(group, of_x, of_weight, load_columns(norm.d, norm.column_of(group), n), scale);
  }
}

}  // namespace lowmoe
