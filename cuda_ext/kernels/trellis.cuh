// Few tokens times trellis planes: from a word in memory to an exact integer.
//
// A strip is two row blocks of a matrix, 128 rows; a cell is 64 columns of a strip in one plane,
// 2048 bytes of words. A warp multiplies a cell with up to 8 tokens by tensor cores of int8, which
// cost the same for one token as for eight; what costs is the way from windows to weights:
//
//   8 bits of a word choose two neighbouring weights, so a byte of the word chooses columns 0 and 1
//   of a slice in one row, and the same byte of the word turned by 4 bits columns 2 and 3. The
//   table of 256 pairs is kept 32 times in shared memory, once for each bank, so that a look-up of
//   a whole warp is one access, whatever the words are. A row of the table, 32 copies of a pair, is
//   256 bytes from the next: then one PRMT makes an address, the byte above the lane's offset. What
//   lies between the rows is 32 KB for other uses, see spare().
//
//   The pair goes into the product as it comes: bytes 0 and 1 of a fragment's register are weights,
//   2 and 3 are 0. Half of the tensor core's work is wasted, which nobody waits for, and nothing
//   needs to be packed.
//
// Of the 256 weights that a lane has in a cell, the machine code for sm_89 makes (420 instructions)
//
//   128 LDS, 144 PRMT, 16 SHF   look-ups: 2 for 4 weights, their addresses, words turned by 4 bits
//    32 IMMA
//    16 IMAD, I2F, FFMA each    nibbles and scales; 32 each for 5 to 8 tokens (475 in all)
//    70                         words, nibbles, codes, scales and their addresses
//
// 1.65 instructions a weight, or 1.85. Bounds in weights for one multiprocessor and clock:
//
//    78   issue: 4 schedulers, 32 lanes each
//    49   shared memory, 128 bytes a clock: for 8192 weights 128 look-ups, 16 to take the words out
//    and
//         16 in which they came, some 6 of L1
//    64   tensor cores of an RTX 4090, 1024 products: each weight takes 16; an H100 has 2.5 times
//    that
//
// What the memory of a card brings, 3.88 weights a byte: 12 on a 4090 (1008 GB/s, 128 at 2.5 GHz),
// 54 on an H100 (3350 GB/s, 132 at 1.8 GHz), 78 on an H200 (4800 GB/s). So a 4090 waits for its
// memory with a quarter of its time used, an H100 is about as fast as its memory, an H200 two
// thirds.
//
// Counted and left: windows of 12 bits in one table of 16 KB, half the look-ups, but 32 lanes meet
// in the banks 3.5 deep: 37 weights a clock. Windows of 10 bits, 3 weights each, cut rows where
// they like; tokens moved by bytes in B could mend that, for 88 look-ups instead of 128 and as many
// instructions, but the table takes 128 KB, more than most cards have.
#pragma once

#include "portable.cuh"
#include "quant/layout.h"

namespace lowmoe {

inline constexpr int kLanes = 32;
inline constexpr int kWarps = 8;  // of a block; Python launches kWarps * kLanes threads
inline constexpr int kThreads = kWarps * kLanes;
inline constexpr int kStripBlocks = 2;
inline constexpr int kStripRows = kStripBlocks * layout::kBlockRows;

// --- the table

inline constexpr int kPairs = 256;
inline constexpr int kPairWords = 64;  // from one row to the next; half of them are the table's
inline constexpr int kTableWords = kPairs * kPairWords;

// Where word `index` of what lies between the rows is; words that lie side by side up to a multiple
// of 32 do so here, and are in the bank that index says.
__device__ __forceinline__ int spare(int index) {
  return index / kLanes * kPairWords + kLanes + index % kLanes;
}
inline constexpr int kSpareWords = kTableWords / 2;

// Fills the rows: 32 KB, written 16 bytes a lane without conflicts, in some 260 clocks of a
// multiprocessor. A barrier must follow.
//   values  [64], of each window
__device__ __forceinline__ void build_table(unsigned* table, const int8_t* values) {
  const int lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes * kLanes;
  const int pair = first + lane;
  const unsigned mine = (values[pair % 64] & 0xffu) | (values[pair / 4] & 0xffu) << 8;
#pragma unroll
  for (int i = 0; i < kLanes; i += 4) {
    const int row = i + lane / 8;
    const unsigned both = __shfl_sync(~0u, mine, row);
    uint4* to = reinterpret_cast<uint4*>(table + (first + row) * kPairWords);
    to[lane % 8] = uint4{both, both, both, both};
  }
}

// The two weights that byte `byte` of some word chooses, in the low bytes.
__device__ __forceinline__ unsigned look_up(const unsigned* table, unsigned word, int byte) {
  const unsigned own = threadIdx.x % kLanes * sizeof(unsigned);
  const unsigned at = __byte_perm(word, own, 0x5504 | byte << 4);
  return *reinterpret_cast<const unsigned*>(reinterpret_cast<const char*>(table) + at);
}

// --- a cell

// Which part of a cell a lane has. The fragment A of mma.m16n8k32 wants of lane 4 g + t two rows,
// in 4 columns each of two groups of columns, the groups of t; B wants of it the same columns of
// token g; D gives it these rows for tokens 2 t and 2 t + 1. Which row and which column that is, is
// ours to say, so a lane takes, of the slices 4 t to 4 t + 3, the words 2 q and 2 q + 1: 16 bytes
// of each.
struct Part {
  int row_block;  // of the strip's two: g / 4
  int q;          // g % 4
  int t;

  __device__ __forceinline__ explicit Part(int lane)
      : row_block(lane / 16), q(lane / 4 % 4), t(lane % 4) {}
  // The first of two rows of the strip that word 2 q + odd codes in its bytes 2 pair and 2 pair
  // + 1.
  __device__ __forceinline__ int row(int odd, int pair) const {
    return row_block * layout::kBlockRows + 16 * pair + 4 * q + 2 * odd;
  }
};

// A lane's part of the tokens of a cell. kTokens that D gives to a lane: 1 while there are up to 4
// tokens, which then take every other column of B and D, or 2. Tokens there are not are those of
// another one: nobody asks for their columns of D.
template <int kTokens>
struct CellTokens {
  uint4 codes;            // columns 16 t to 16 t + 15 of the token that is this lane's in B
  float scales[kTokens];  // of the tokens that are this lane's in D
};

// Bytes 4 q to 4 q + 3 of the row block's 32 group scales, and 16 further on.
struct CellNibbles {
  unsigned low, high;
};

// [odd][pair][row * kTokens + token]: of the rows Part::row(odd, pair) and the one after it.
template <int kTokens>
using Sums = float[2][4][2 * kTokens];

// sums += nibble * D * scale, D the exact sum over the cell's columns of weight times code.
//
// nibble * D is exact too: below 15 * 64 * 63 * 127 < 2^23. So a sum over many cells differs from
// the CPU's, which is exact over two cells that share their scale, by how often it was rounded
// alone.
template <int kTokens>
__device__ __forceinline__ void multiply(const uint4 (&words)[4], const CellNibbles& nibbles,
                                         const CellTokens<kTokens>& tokens, const unsigned* table,
                                         Sums<kTokens>& sums) {
  // Registers of a fragment B are neighbours: two slices' codes as they came, for columns 0 and 1,
  // and moved down for 2 and 3. What their upper bytes are does not count: they meet weights of 0.
  const uint4& whole = tokens.codes;
  const unsigned codes[2][4] = {{whole.x, whole.y, whole.z, whole.w},
                                {whole.x >> 16, whole.y >> 16, whole.z >> 16, whole.w >> 16}};
#pragma unroll
  for (int odd = 0; odd < 2; odd++) {
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
      int d[4] = {};
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          unsigned a[4];
#pragma unroll
          for (int slice = 0; slice < 2; slice++) {
            const uint4& both = words[i + slice];
            const unsigned low = odd ? both.z : both.x, high = odd ? both.w : both.y;
            const unsigned here = pair < 2 ? low : high, there = pair < 2 ? high : low;
            const unsigned bits = half ? __funnelshift_r(here, there, 4) : here;
            const int byte = pair % 2 * 2;
            a[2 * slice] = look_up(table, bits, byte);
            a[2 * slice + 1] = look_up(table, bits, byte + 1);
          }
          mma_m16n8k32(d, a, {codes[half][i], codes[half][i + 1]});
        }
      }
      // Rows below 32 have the low four bits of a byte, the others the high ones.
      const unsigned all = pair % 2 ? nibbles.high : nibbles.low;
      const unsigned four = all >> (pair / 2 * 4) & 0x0f0f0f0f;
#pragma unroll
      for (int row = 0; row < 2; row++) {
        const int nibble = static_cast<int>(__byte_perm(four, 0, 0x4440 | (2 * odd + row)));
#pragma unroll
        for (int k = 0; k < kTokens; k++) {
          float& sum = sums[odd][pair][row * kTokens + k];
          sum = fmaf(static_cast<float>(nibble * d[2 * row + k]), tokens.scales[k], sum);
        }
      }
    }
  }
}

}  // namespace lowmoe
