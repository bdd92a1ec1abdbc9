// Prompts: products of many tokens with trellis planes, by tensor cores of int8.
//
// A block multiplies up to kTokens tokens with 256 rows: eight warps of 32 rows, each with all of
// the block's tokens. One scale group of 128 columns after the other:
//
//   y[t][r] = fma(float(sum of code * x.codes[t]) * x.scales[t][g], scale[g][r], y[t][r])   from 0
//
// with codes and scales of tile_weights.cuh: the same bits as the CPU's tiles.
//
// What bounds it: cycles of a multiprocessor for a block's scale group, 256 rows x 128 tokens x 128
// columns, with two planes; by count from the machine code, no overlap lost.
//
//   issuing        8 warps x 1360 (sm_90) to 1460 (sm_89) instructions, 128 of them mma, of which
//                  four are issued a cycle                                        2700 to 2900
//   tensor cores   1024 mma of 4096 products; in a cycle sm_89 and sm_120 do 1024, sm_80 2048,
//   sm_90
//                  some 2500 by mma.sync, 60 % of what it does otherwise          4100, 2000, 1650
//   shared memory  128 bytes a cycle: 1024 cycles for the tokens, which every warp reads, 1024 for
//                  pairs of weights, 250 for what is copied in, 350 for words and scales   2650
//
// A 4090 is bound by its tensor cores, an H100 by nearly all at once. More would need fewer reads
// of tokens: warps of 64 rows, whose sums fill all registers; or codes in shared memory, decoded
// once for 256 tokens: 2560 instead of 2650.
#pragma once

#include "tile_weights.cuh"

namespace lowmoe {

// Rounded tokens, see cuda_ext/ops.py.
struct Tokens {
  const int8_t* codes;
  const float* scales;
  int n_columns;  // a multiple of 64
  int n_groups;
};

__device__ __forceinline__ Tokens tokens_of(const int8_t* codes, const float* scales, int n_in) {
  const int n_columns = static_cast<int>(layout::round_up(n_in, layout::kBlockColumns));
  return {codes, scales, n_columns, (n_in + kScaleColumns - 1) / kScaleColumns};
}

// Tokens for which sums are skipped together where a tile lacks them: in sixteens the branches
// would keep one sixteen's scaling from being done beside the next one's products.
constexpr int skipped_together(int n_tokens) { return n_tokens > 32 ? 32 : 16; }

template <int kTokens>
using TileSums = float[kTokens / 16][kRowTiles][4];

// Sums begin with what is added to each of the tile's rows: a bias costs no register then.
//   bias(row)  of one of the 256
template <int kTokens, class Bias>
__device__ __forceinline__ void begin(TileSums<kTokens>& sums, Bias bias) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row_of_warp = warp / 2 * layout::kBlockRows + lane % 4 * 2;
#pragma unroll
  for (int a = 0; a < kRowTiles; a++) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const float first = bias(row_of_warp + block_row(a, warp % 2, j));
#pragma unroll
      for (int m = 0; m < kTokens / 16; m++) sums[m][a][j] = sums[m][a][2 + j] = first;
    }
  }
}

template <int kPlanes, int kTokens>
struct TileMemory {
  Line lines[kLines];  // codes of two scale groups, kTokens lines each
  WarpWeights<kPlanes> weights[kTileWarps];
  float2 token_scales[2][kTokens / 2];  // tokens 8 apart side by side, as accumulators have them
  int from[kTokens];                    // rows of Tokens
};

// launches/tiles.py asks for as much.
template <int kPlanes, int kTokens>
constexpr int kTileBytes = 65536 + 12 * kTokens + kTileWarps * (640 + 1088 * kPlanes);

// Where 16 bytes of a token's codes are in its line: eight tokens' same columns in all the banks.
__device__ __forceinline__ int chunk_at(int token, int chunk) { return (chunk ^ token % 8) * 16; }

//   lines  the kTokens that are to hold the scale group
template <int kTokens>
__device__ __forceinline__ void fetch_codes(const Tokens& tokens, const int (&from)[kTokens],
                                            int group, Line* lines) {
  constexpr int kChunks = kScaleColumns / 16, kAtOnce = kTileThreads / kChunks;
  static_assert(kTokens % kAtOnce == 0);
  const int chunk = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
  if (group * kChunks + chunk >= tokens.n_columns / 16) return;  // met by weights of 0
  const int8_t* codes = tokens.codes + group * kScaleColumns + chunk * 16;
  int8_t* to = lines[first].codes + chunk_at(first, chunk);
  static_assert(kAtOnce % 8 == 0, "tokens of a thread have their chunks at the same place");
#pragma unroll
  for (int i = 0; i < kTokens; i += kAtOnce) {
    cp_async16(to + i * sizeof(Line),
               codes + static_cast<long long>(from[first + i]) * tokens.n_columns);
  }
}

// Adds the products of 16 tokens with the warp's 32 rows in a scale group.
__device__ __forceinline__ void multiply_16(const Line* tokens, const FragmentsB& b,
                                            float2 token_scales,
                                            const float2 (&row_scales)[kRowTiles],
                                            float (&sums)[kRowTiles][4]) {
  const int lane = threadIdx.x % 32;
  // A float of 1.5 * 2^23 plus an integer below 2^22 is their bits added: what tensor cores begin
  // with, so that a subtraction makes a float of the sum. 128 * 126 * 127 is below 2^21.
  constexpr float kOne = 12582912.0f;
  int integers[kRowTiles][4];
  for (int a = 0; a < kRowTiles; a++) {
    for (int i = 0; i < 4; i++) integers[a][i] = __float_as_int(kOne);
  }
#pragma unroll
  for (int step = 0; step < kSteps; step++) {
    unsigned a[4];
    ldmatrix_x4(a, tokens[lane % 16].codes + chunk_at(lane, 2 * step + lane / 16));
    for (int tile = 0; tile < kRowTiles; tile++) mma_m16n8k32(integers[tile], a, b[step][tile]);
  }
  for (int a = 0; a < kRowTiles; a++) {
    for (int i = 0; i < 4; i++) {
      const float sum = __int_as_float(integers[a][i]) - kOne;
      sums[a][i] = fmaf(sum * (i < 2 ? token_scales.x : token_scales.y),
                        i % 2 ? row_scales[a].y : row_scales[a].x, sums[a][i]);
    }
  }
}

// The products of a block's tile. Of lane 4 g + t, sums[m][a][i] is of token 16 m + g + i / 2 * 8
// and row 2 t + i % 2 of tile a; what is in the sums of tokens that the tile lacks is of no
// account.
//
// Decoding needs the ALUs and shared memory, multiplying the tensor cores: so half of the warps,
// one of the two that a scheduler has, multiply a scale group while the others decode, the first
// the next one, the second this one. Step 2 g of the first is decoding group g, step 2 g + 1 is
// multiplying it; the second come one step later. Before each odd step all wait for each other: the
// first are about to multiply group g, whose tokens must have come, and the second have done with
// those of group g - 1.
template <int kPlanes, int kTokens>
class TileProduct {
 public:
  using Memory = TileMemory<kPlanes, kTokens>;

  // memory.from must have been written.
  //   half      of its row block, this warp's
  //   n_tokens  of the tile; a reference, since in shared memory it takes no register
  __device__ __forceinline__ TileProduct(Memory& memory, const Tokens& tokens,
                                         const WarpRows<kPlanes>& rows, int half,
                                         const int& n_tokens)
      : memory_(memory),
        weights_(memory.weights[threadIdx.x / 32]),
        tokens_(tokens),
        rows_(rows),
        half_(half),
        n_tokens_(n_tokens) {}

  // Adds the products of n scale groups from `first` on to sums.
  //   table  see fill_pairs
  __device__ __forceinline__ void add(int first, int n, const int8_t* table,
                                      TileSums<kTokens>& sums) {
    fetch_codes(tokens_, memory_.from, first, memory_.lines);
    fetch_words(rows_, first, weights_);
    cp_async_commit();
    next_scale_ = scale_at(first);
    keep_next_scale(0);
    if (n > 1) next_scale_ = scale_at(first + 1);
    fill_pairs(table, memory_.lines);  // while the copies are under way
    cp_async_wait<0>();
    __syncthreads();
    const int late = threadIdx.x / 32 / (kTileWarps / 2);
    for (int step = 0; step <= 2 * n; step++) {
      if (step % 2) {
        // The first have asked for the words of their next group a moment ago, and do not wait for
        // them yet: the tokens were asked for before.
        if (late) cp_async_wait<0>();
        if (!late) cp_async_wait<1>();
        __syncthreads();
        if (step / 2 + 1 < n) fetch_tokens(first, step / 2 + 1, n);
        cp_async_commit();
      }
      const int own = step - late, group = own / 2;
      if (own < 0 || own == 2 * n) continue;
      if (own % 2 == 0) {
        if (!late) cp_async_wait<1>();  // the words; the tokens asked for last may still come
        decode_group(first + group, group + 1 < n);
      } else {
        multiply_group(group % 2, sums);
      }
    }
  }

 private:
  // Begins to copy the tokens of the group after `first` by `next`, and leaves it to be committed.
  __device__ __forceinline__ void fetch_tokens(int first, int next, int n) {
    fetch_codes(tokens_, memory_.from, first + next, memory_.lines + next % 2 * kTokens);
    keep_next_scale(next % 2);
    if (next + 1 < n) next_scale_ = scale_at(first + next + 1);
  }

  __device__ __forceinline__ float scale_at(int group) const {
    if (threadIdx.x >= kTokens) return 0;
    return tokens_
        .scales[static_cast<long long>(memory_.from[threadIdx.x]) * tokens_.n_groups + group];
  }

  __device__ __forceinline__ void keep_next_scale(int at) {
    const unsigned token = threadIdx.x;
    if (token >= kTokens) return;
    float* scales = reinterpret_cast<float*>(memory_.token_scales[at]);
    scales[token / 16 * 16 + token % 8 * 2 + token / 8 % 2] = next_scale_;
  }

  __device__ __forceinline__ void decode_group(int group, bool more) {
    __syncwarp();  // all lanes have the scales of the group before
    share_scales(rows_, group, weights_, half_);
    __syncwarp();
    decode(memory_.lines, weights_, b_);
    __syncwarp();
    if (more) fetch_words(rows_, group + 1, weights_);
    cp_async_commit();
  }

  //   at  which of the two places its tokens are in
  __device__ __forceinline__ void multiply_group(int at, TileSums<kTokens>& sums) {
    const unsigned lane = threadIdx.x % 32;
    const Line* lines = memory_.lines + at * kTokens;
    float2 row_scales[kRowTiles];
    for (int a = 0; a < kRowTiles; a++) {
      row_scales[a] = *reinterpret_cast<const float2*>(&weights_.scales[8 * a + lane % 4 * 2]);
    }
#pragma unroll
    for (int m = 0; m < kTokens / 16; m++) {
      if (16 * m % skipped_together(kTokens) == 0 && 16 * m >= n_tokens_) break;
      multiply_16(lines + 16 * m, b_, memory_.token_scales[at][8 * m + lane / 4], row_scales,
                  sums[m]);
    }
  }

  Memory& memory_;
  WarpWeights<kPlanes>& weights_;
  const Tokens tokens_;
  const WarpRows<kPlanes> rows_;
  const int half_;
  const int& n_tokens_;
  FragmentsB b_;
  float next_scale_;
};

}  // namespace lowmoe
