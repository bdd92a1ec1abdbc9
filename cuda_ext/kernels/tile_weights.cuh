// Prompts: words of trellis planes become the int8 fragments that tensor cores multiply tokens
// with.
//
// As on the CPU (lowmoe/kernels/cpu/trellis_tile.h, whose codes and scales these are, bit for bit,
// and which says what it costs in accuracy), the planes of a stack are added up before they meet
// tokens. With A[p][r][h] = row_scale * nibble of plane p, row r and 64-column half h of 128
// columns, float32:
//
//   bound[r] = max over h of  A[0][r][h] + A[1][r][h] + ..
//   share[p][r][h] = round(A[p][r][h] * (255 / bound[r]))           to nearest even
//   code[r][k] = (sum over p of  share[p][r][h(k)] * value[p][r][k]  + 64) >> 7    within +-126
//   weight[r][k] = code * scale[r],   scale[r] = bound[r] * (scale_unit * gain * (128 / 255))
//
// So a weight costs one tensor core product however many planes it has, and the sum over 128
// columns leaves the integers once. In instructions of a warp for 128 rows, 128 tokens and 128
// columns: 512 mma, 3 * 512 for scales, 830 P + 130 to turn words into codes. Plane by plane, with
// nibbles applied to integers of 64 columns, it would be 512 P mma, 5 * 512 P for scales and 700 P
// for words.
//
// A warp decodes what it multiplies: 32 rows, straight into registers. In fragment B of
// mma.m16n8k32 lane l = 4 n + t holds, of row n of 8, the columns 4 t to 4 t + 3 and 16 + 4 t to 16
// + 4 t + 3: four neighbours in a row, which is what 12 bits of one word code. Rows n and n + 1 for
// even n are in one word, so lane l reads words n / 2 of slices t and t + 4, and finds all it needs
// for four tiles of eight rows in them: tile a is rows 16 a + 8 half + n of the block's 64.
#pragma once

#include "portable.cuh"
#include "quant/layout.h"
#include "round.cuh"

namespace lowmoe {

inline constexpr int kTileWarps = 8;
inline constexpr int kTileThreads = 32 * kTileWarps;
inline constexpr int kWarpRows = 32;
inline constexpr int kTileRows = kTileWarps * kWarpRows;
inline constexpr int kRowTiles = kWarpRows / 8;    // of one warp
inline constexpr int kSteps = kScaleColumns / 32;  // mma of 32 columns each in a scale group
inline constexpr int kHalves = kScaleColumns / layout::kBlockColumns;
inline constexpr int kGroupSlices = kScaleColumns / layout::kSliceColumns;
inline constexpr int kSliceBytes = layout::kWords * 8;
inline constexpr int kWarpWords = layout::kWords / 2;  // of a slice: those of a warp's rows

// Shared memory in lines of 256 bytes, for two uses side by side. Half of line w holds the values
// of two neighbouring weights whose window of 8 bits is w, once for each lane: 32 lanes read 32
// banks, so four weights take 2 cycles, where a table of all windows of 12 bits, 16 KB, would
// take 3.5 on average. 256 bytes apart, because a lane's address is then a byte of the word above
// the lane's own byte, which one PRMT puts together. The other half holds tokens.
struct Line {
  unsigned pairs[32];  // 2 (value + 64) of the first in the low half, of the second in the high
  int8_t codes[kScaleColumns];
};
inline constexpr int kLines = 256;

// Fills pairs; all threads of the block, a barrier must follow.
//   values  [64] int8, within +-63
__device__ __forceinline__ void fill_pairs(const int8_t* values, Line (&lines)[kLines]) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 32, window = threadIdx.x;
  const unsigned pair = (values[window % 64] + 64) * 2 | (values[window / 4] + 64) << 17;
  static_assert(kTileThreads == kLines);
  for (int i = 0; i < 32; i++) {
    lines[first + i].pairs[lane] = __shfl_sync(kWholeWarp, pair, i);
  }
}

// One warp's own shared memory.
template <int kPlanes>
struct alignas(16) WarpWeights {
  uint2 words[kPlanes][kGroupSlices][kWarpWords];  // of one scale group, low half first
  uint8_t nibbles[kPlanes][kHalves][layout::kBlockScaleBytes];
  uint2 shares[kHalves][kWarpRows];  // x: the planes' shares, a byte each; y: where sums begin
  float scales[kWarpRows];           // row 8 a + n is row n of tile a
};

// 32 rows of a matrix, those of one half of a row block. A plane has less than 4 GiB.
template <int kPlanes>
struct WarpRows {
  const uint8_t* planes[kPlanes];
  unsigned words;    // bytes from a plane's beginning to those of the row block and the half
  unsigned nibbles;  // likewise, of the row block
  float row_scales[kPlanes];  // lane 8 a + n: of row n of tile a
  float unit;                 // of scale[r]
  int n_blocks;               // of 64 columns
};

// The row of the block's 64 that is row n of tile a.
__device__ __forceinline__ int block_row(int a, int half, int n) { return 16 * a + 8 * half + n; }

template <int kPlanes>
__device__ __forceinline__ WarpRows<kPlanes> warp_rows(const uint8_t* const (&planes)[kPlanes],
                                                       layout::PlaneLayout shape, int row_block,
                                                       int half, float scale_unit) {
  const int lane = threadIdx.x % 32;
  WarpRows<kPlanes> rows;
  rows.n_blocks = static_cast<int>(shape.column_blocks());
  const unsigned first_block = static_cast<unsigned>(row_block) * rows.n_blocks;
  const size_t row = row_block * layout::kBlockRows + block_row(lane / 8, half, lane % 8);
  rows.words = first_block * layout::kBlockCodeBytes + half * kWarpWords * 8;
  rows.nibbles =
      static_cast<unsigned>(shape.group_scale_offset()) + first_block * layout::kBlockScaleBytes;
  for (int p = 0; p < kPlanes; p++) {
    rows.planes[p] = planes[p];
    rows.row_scales[p] =
        __half2float(reinterpret_cast<const __half*>(planes[p] + shape.row_scale_offset())[row]);
  }
  const float gain = *reinterpret_cast<const float*>(planes[kPlanes - 1] + shape.gain_offset());
  rows.unit = scale_unit * gain * (128.0f / 255);
  return rows;
}

__device__ __forceinline__ int halves_of(int group, int n_blocks) {
  return min(kHalves, n_blocks - kHalves * group);
}

// Begins to copy the words and nibbles of a scale group. What is beyond the matrix's last column
// block is left as it is.
template <int kPlanes>
__device__ __forceinline__ void fetch_words(const WarpRows<kPlanes>& from, int group,
                                            WarpWeights<kPlanes>& to) {
  const int lane = threadIdx.x % 32, n_halves = halves_of(group, from.n_blocks);
  const unsigned block = group * kHalves;
  const unsigned words =
      from.words + block * layout::kBlockCodeBytes + lane / 2 * kSliceBytes + lane % 2 * 16;
  const unsigned nibbles = from.nibbles + block * layout::kBlockScaleBytes + lane * 16;
#pragma unroll
  for (int p = 0; p < kPlanes; p++) {
    // 32 bytes of each slice: two lanes. Both halves of the slice are read at about the same time,
    // by two warps of one block.
    const uint8_t* slices = from.planes[p] + words;
    uint2* to_slices = &to.words[p][lane / 2][lane % 2 * 2];
    cp_async16(to_slices, slices);
    if (n_halves == kHalves) {
      cp_async16(to_slices + layout::kSlices * kWarpWords, slices + layout::kBlockCodeBytes);
    }
    if (lane < 2 * n_halves) {
      cp_async16(&to.nibbles[p][lane / 2][lane % 2 * 16], from.planes[p] + nibbles);
    }
  }
}

// Sets the warp's shares and scales for a scale group; a lane does a row.
template <int kPlanes>
__device__ __forceinline__ void share_scales(const WarpRows<kPlanes>& rows, int group,
                                             WarpWeights<kPlanes>& weights, int half) {
  const int lane = threadIdx.x % 32, n_halves = halves_of(group, rows.n_blocks);
  const int row = block_row(lane / 8, half, lane % 8), shift = row / 32 * 4;
  float parts[kHalves][kPlanes], bound = 0;
  for (int h = 0; h < kHalves; h++) {
    float sum = 0;
    for (int p = 0; p < kPlanes; p++) {
      const int nibble = h < n_halves ? weights.nibbles[p][h][row % 32] >> shift & 15 : 0;
      parts[h][p] = static_cast<float>(nibble) * rows.row_scales[p];
      sum += parts[h][p];
    }
    bound = sum > bound ? sum : bound;
  }
  const float factor = bound > 0 ? 255 / bound : 0;
  for (int h = 0; h < kHalves; h++) {
    unsigned shares = 0, sum = 0;
    for (int p = 0; p < kPlanes; p++) {
      // 2^23 + v has no bits left for a fraction.
      const unsigned share = __float_as_uint(parts[h][p] * factor + 0x1p23f) & 0xff;
      shares |= share << (8 * p);
      sum += share;
    }
    // Of two sums side by side, each twice what code >> 7 is taken from, plus 2 * 256 * 128 and
    // less what the table's offset adds: bits 8 to 15 of a sum are then the code's. The low one may
    // carry into the high one, whose lowest bit is 0 and of no account.
    weights.shares[h][lane] = make_uint2(shares, (2 * (64 + 256 * 128) - 128 * sum) * 0x10001u);
  }
  weights.scales[lane] = bound * rows.unit;
}

// How a lane finds its windows: for PRMT, the choice of byte n % 2 of a word, or of byte 2 + n % 2,
// above the lane's place in a line.
struct Lookup {
  const char* lines;
  unsigned lane_bytes;
  unsigned choices[2];
};

__device__ __forceinline__ Lookup lookup_of(const Line (&lines)[kLines], int lane) {
  const unsigned odd = lane / 4 % 2 << 4;
  return {reinterpret_cast<const char*>(lines), 4u * lane, {0x5504 | odd, 0x5524 | odd}};
}

// Adds share[a] * value for the eight rows' 32 weights of a word that are this lane's: tile a's
// first two columns in sums[a][0], the others in sums[a][1]. Their windows begin at bits 16 a + 8
// (n % 2) and 4 further.
__device__ __forceinline__ void add_word(const Lookup& lookup, uint2 word,
                                         const unsigned (&share)[kRowTiles],
                                         unsigned (&sums)[kRowTiles][2]) {
  const unsigned halves[2][2] = {
      {word.x, word.y}, {__funnelshift_r(word.x, word.y, 4), __funnelshift_r(word.y, word.x, 4)}};
  for (int a = 0; a < kRowTiles; a++) {
    for (int i = 0; i < 2; i++) {
      const unsigned at = __byte_perm(halves[i][a / 2], lookup.lane_bytes, lookup.choices[a % 2]);
      sums[a][i] += share[a] * *reinterpret_cast<const unsigned*>(lookup.lines + at);
    }
  }
}

using FragmentsB = unsigned[kSteps][kRowTiles][2];

// All weights of the warp's rows in a scale group; shares must have been set by all lanes.
template <int kPlanes>
__device__ __forceinline__ void decode(const Line (&lines)[kLines],
                                       const WarpWeights<kPlanes>& weights, FragmentsB& b) {
  const int lane = threadIdx.x % 32, n = lane / 4, t = lane % 4;
  const Lookup lookup = lookup_of(lines, lane);
#pragma unroll
  for (int h = 0; h < kHalves; h++) {
    unsigned share[kPlanes][kRowTiles], begin[kRowTiles];
    for (int a = 0; a < kRowTiles; a++) {
      const uint2 shares = weights.shares[h][8 * a + n];
      for (int p = 0; p < kPlanes; p++) share[p][a] = shares.x >> (8 * p) & 0xff;
      begin[a] = shares.y;
    }
#pragma unroll
    for (int i = 0; i < 2 * kSteps / kHalves; i++) {
      const int step = h * kSteps / kHalves + i / 2, slice = 8 * step + i % 2 * 4 + t;
      unsigned sums[kRowTiles][2];
      for (int a = 0; a < kRowTiles; a++) sums[a][0] = sums[a][1] = begin[a];
      for (int p = 0; p < kPlanes; p++) {
        add_word(lookup, weights.words[p][slice][n / 2], share[p], sums);
      }
      for (int a = 0; a < kRowTiles; a++) {
        b[step][a][i % 2] = __byte_perm(sums[a][0], sums[a][1], 0x7531);
      }
    }
  }
}

}  // namespace lowmoe
