// What becomes of a tile's sums: float rows, or rounded inner tokens.
#pragma once

#include "activation.cuh"
#include "tiles.cuh"

namespace lowmoe {

// Writes sums to float rows, or adds them.
//   first_row  of the 256 rows, in what row_of gives
//   n_out      rows of that at most
//   row_of(i)  where token i of the tile has its numbers
template <int kTokens, class RowOf>
__device__ __forceinline__ void write_rows(const TileSums<kTokens>& sums, int n_tokens,
                                           int first_row, int n_out, bool add, RowOf row_of) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row_of_warp = first_row + warp / 2 * layout::kBlockRows + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < kTokens / 16; m++) {
    for (int i = 0; i < 2; i++) {
      const int token = 16 * m + lane / 4 + 8 * i;
      if (token >= n_tokens) continue;
      float* to = row_of(token);
      for (int a = 0; a < kRowTiles; a++) {
        for (int j = 0; j < 2; j++) {
          const int row = row_of_warp + block_row(a, warp % 2, j);
          if (row >= n_out) continue;
          const float sum = sums[m][a][2 * i + j];
          to[row] = add ? to[row] + sum : sum;
        }
      }
    }
  }
}

// Rounded tokens that are written.
struct InnerTokens {
  int8_t* codes;
  float* scales;
  int n_inner;
  Activation activation;
};

// Writes the activation of gate and up of 128 channels, times d, turned and rounded, of 16 tokens;
// a warp does every eighth token.
//   rows   [16][..] sums of gate, up, gate and up, 64 rows each
//   d      of this lane's channels, 0 beyond n_inner
//   place  of the first token
template <int kPitch>
__device__ __forceinline__ void round_16(const float (&rows)[16][kPitch], int n_tokens,
                                         const float (&d)[kLaneColumns], int unit, size_t place,
                                         const InnerTokens& inner) {
  const int lane = threadIdx.x % 32, channel = unit * kScaleColumns + lane * kLaneColumns;
  const Tokens shape = tokens_of(inner.codes, inner.scales, inner.n_inner);
  for (int token = threadIdx.x / 32; token < n_tokens; token += kTileWarps) {
    const float* gate = &rows[token][lane / 16 * 128 + lane % 16 * kLaneColumns];
    const float* up = gate + layout::kBlockRows;
    float x[kLaneColumns], scale;
    for (int i = 0; i < kLaneColumns; i++) {
      const bool is_there = channel + i < inner.n_inner;
      x[i] = is_there ? inner.activation(gate[i], up[i]) * d[i] : 0;
    }
    const unsigned codes = round_group(x, hadamard_size(inner.n_inner), &scale);
    if (channel < shape.n_columns) {
      int8_t* to = inner.codes + (place + token) * shape.n_columns + channel;
      *reinterpret_cast<unsigned*>(to) = codes;
    }
    if (lane == 0) inner.scales[(place + token) * shape.n_groups + unit] = scale;
  }
}

// The tile's 256 rows are 128 channels of gate and up: see experts_inner in ops.py.
//   shared   of the block, no longer needed for anything else
//   place    of the tile's first token
//   d_inner  of the expert
template <int kTokens>
__device__ __forceinline__ void round_inner(const TileSums<kTokens>& sums, uint4* shared,
                                            size_t place, int n_tokens, const __half* d_inner,
                                            const InnerTokens& inner) {
  // Two tokens' rows lie 8 banks apart: 4 tokens x 4 lanes x 2 floats fill all 32.
  using Rows = float[16][kTileRows + 8];
  auto& rows = *reinterpret_cast<Rows(*)[2]>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, unit = blockIdx.y;
  float d[kLaneColumns];
  for (int i = 0; i < kLaneColumns; i++) {
    const int channel = unit * kScaleColumns + lane * kLaneColumns + i;
    d[i] = channel < inner.n_inner ? __half2float(d_inner[channel]) : 0;
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kTokens / 16; m++) {
    if (16 * m >= n_tokens) break;
    Rows& now = rows[m % 2];  // the other may still be read
    for (int a = 0; a < kRowTiles; a++) {
      const int row = warp / 2 * layout::kBlockRows + block_row(a, warp % 2, lane % 4 * 2);
      for (int i = 0; i < 2; i++) {
        *reinterpret_cast<float2*>(&now[lane / 4 + 8 * i][row]) =
            make_float2(sums[m][a][2 * i], sums[m][a][2 * i + 1]);
      }
    }
    __syncthreads();
    round_16(now, min(16, n_tokens - 16 * m), d, unit, place + 16 * m, inner);
  }
}

}  // namespace lowmoe
