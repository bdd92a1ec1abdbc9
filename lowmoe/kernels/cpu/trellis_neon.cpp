// NEON with dot products: tbl looks up all 64 values, sdot multiplies four columns of 4 rows.
//
// As in trellis_avx2.h, a byte of a word and the word turned right by four bits hold all windows of
// one row's four columns: column 0 is bits 0-5 of the word's byte and column 1 bits 2-7 of it,
// columns 2 and 3 the same of the turned word's byte. Table values and codes are signed here, for
// sdot takes nothing else.
#include <arm_neon.h>

#include <cstring>
#include <utility>

#include "lowmoe/kernels/cpu/isa.h"
#include "lowmoe/kernels/cpu/trellis_tile.h"

namespace lowmoe {

namespace {

constexpr int kRows = layout::kBlockRows, kSliceBytes = layout::kWords * 8;
constexpr int kLanes = 4;       // rows of a register of sums
constexpr int kQuarters = 4;    // of the rows: byte j of word w is row 16 * (j / 2) + 2 * w + j % 2
constexpr int kPairBytes = 16;  // words w and w + 1 of a slice, w even: a register
constexpr int kPairs = kSliceBytes / kPairBytes;

struct SignedTable {
  uint8x16x4_t values;

  explicit SignedTable(const Code& code) {
    for (int i = 0; i < 4; i++) {
      values.val[i] = vsubq_u8(vld1q_u8(code.table + 16 * i), vdupq_n_u8(kTableOffset));
    }
  }
  // indices: bytes below 64.
  int8x16_t operator[](uint8x16_t indices) const {
    return vreinterpretq_s8_u8(vqtbl4q_u8(values, indices));
  }
};

inline uint8x16_t low_windows(uint8x16_t bytes) { return vandq_u8(bytes, vdupq_n_u8(0x3f)); }
inline uint8x16_t high_windows(uint8x16_t bytes) { return vshrq_n_u8(bytes, 2); }

// Calls f.operator()<i>() for i from 0 to kCount - 1: the lane of an instruction is a constant.
template <int kCount, class F>
inline void each_constant(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (f.template operator()<i>(), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// The scales of 4 rows of quarter q, from `row` of it on.
inline int32x4_t nibbles_of(const uint8_t* nibbles, int q, int row) {
  uint32_t four;
  std::memcpy(&four, nibbles + q % 2 * 16 + row, sizeof four);
  const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(four));
  const uint8x8_t scales = q < 2 ? vand_u8(bytes, vdup_n_u8(15)) : vshr_n_u8(bytes, 4);
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(scales))));
}

// What dot_block needs. Lanes of sums are rows; a lane's four bytes are those of four slices in the
// same place, so that the columns of a slice meet their weights one after the other.
struct Dots {
  using Table = SignedTable;
  static constexpr size_t kMostDots = 4;  // 16 sums, 4 of columns, 4 of the table, 8 for work

  static void widen(const uint8_t* halves, float* floats) {
    for (int r = 0; r < kRows; r += kLanes) {
      const float16x4_t some = vreinterpret_f16_u8(vld1_u8(halves + 2 * r));
      vst1q_f32(floats + r, vcvt_f32_f16(some));
    }
  }

  template <int kTokens>
  static void add_block(const uint8_t* codes, const Table& table, const uint8_t* nibbles,
                        const RoundedTokens& x, size_t block, RowSums* t) {
    int8x16_t columns[kGroups][kTokens];
    for (int i = 0; i < kTokens; i++) {
      const int8_t* of_token = x.from(i).codes + block * layout::kBlockColumns;
      for (int g = 0; g < kGroups; g++) columns[g][i] = by_columns(of_token + 16 * g);
    }
    for (int pair = 0; pair < kPairs; pair++) {
      int32x4_t sums[kTokens][kQuarters];
      for (auto& token : sums) {
        for (auto& sum : token) sum = vdupq_n_s32(0);
      }
      add_pair<kTokens>(codes + pair * kPairBytes, table, columns, sums);
      for (int q = 0; q < kQuarters; q++) {
        const int32x4_t scales = nibbles_of(nibbles, q, pair * kLanes);
        for (int i = 0; i < kTokens; i++) {
          int32_t* rows = t[i] + q * 16 + pair * kLanes;
          vst1q_s32(rows, vmlaq_s32(vld1q_s32(rows), in_order(sums[i], q), scales));
        }
      }
    }
  }

 private:
  static constexpr int kTogether = 4;  // slices whose bytes of one row fill a lane
  static constexpr int kGroups = layout::kSlices / kTogether;

  // Lane c: column c of each of four slices.
  static int8x16_t by_columns(const int8_t* x) {
    constexpr uint8_t kOrder[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    return vqtbl1q_s8(vld1q_s8(x), vld1q_u8(kOrder));
  }

  // Adds products of two words, w and w + 1, of all slices.
  //   sums  of the bytes 0-3 and 4-7 of word w, then of word w + 1
  template <int kTokens>
  static void add_pair(const uint8_t* codes, const Table& table,
                       const int8x16_t (&x)[kGroups][kTokens],
                       int32x4_t (&sums)[kTokens][kQuarters]) {
    for (int g = 0; g < kGroups; g++, codes += kTogether * kSliceBytes) {
      const uint8x16_t a = vld1q_u8(codes), b = vld1q_u8(codes + kSliceBytes);
      const uint8x16_t c = vld1q_u8(codes + 2 * kSliceBytes), d = vld1q_u8(codes + 3 * kSliceBytes);
      const uint16x8_t even_ab = vreinterpretq_u16_u8(vzip1q_u8(a, b));
      const uint16x8_t even_cd = vreinterpretq_u16_u8(vzip1q_u8(c, d));
      const uint16x8_t odd_ab = vreinterpretq_u16_u8(vzip2q_u8(a, b));
      const uint16x8_t odd_cd = vreinterpretq_u16_u8(vzip2q_u8(c, d));
      const uint8x16_t bytes[kQuarters] = {vreinterpretq_u8_u16(vzip1q_u16(even_ab, even_cd)),
                                           vreinterpretq_u8_u16(vzip2q_u16(even_ab, even_cd)),
                                           vreinterpretq_u8_u16(vzip1q_u16(odd_ab, odd_cd)),
                                           vreinterpretq_u8_u16(vzip2q_u16(odd_ab, odd_cd))};
      for (int k = 0; k < kQuarters; k++) {
        // Half a word and, in the same lanes, the bytes that follow each: a turned word's byte ends
        // with the next one's low bits, and after byte 7 comes byte 0.
        const uint8x16_t next = vextq_u8(bytes[k], bytes[k ^ 1], 4);
        const uint8x16_t turned = vsliq_n_u8(vshrq_n_u8(bytes[k], 4), next, 4);
        const int8x16_t values[4] = {table[low_windows(bytes[k])], table[high_windows(bytes[k])],
                                     table[low_windows(turned)], table[high_windows(turned)]};
        each_constant<layout::kSliceColumns>([&]<int column>() {
          for (int i = 0; i < kTokens; i++) {
            sums[i][k] = vdotq_laneq_s32(sums[i][k], values[column], x[g][i], column);
          }
        });
      }
    }
  }

  // 4 rows of quarter q: two of each word.
  static int32x4_t in_order(const int32x4_t (&sums)[kQuarters], int q) {
    const int64x2_t even = vreinterpretq_s64_s32(sums[q / 2]);
    const int64x2_t odd = vreinterpretq_s64_s32(sums[2 + q / 2]);
    return vreinterpretq_s32_s64(q % 2 ? vzip2q_s64(even, odd) : vzip1q_s64(even, odd));
  }
};

struct Neon : Dots {
  static constexpr size_t kMostTokens = 8;  // 16 sums, 8 registers of tokens, 2 of codes

  // The table values of 16 rows, a quarter's 4 in each register, rows and columns in order.
  static void look_up(const uint8_t* pair, const SignedTable& table,
                      int8x16_t (&values)[kQuarters]) {
    constexpr uint8_t kByQuarters[16] = {0, 1, 8,  9,  2, 3, 10, 11,   // neighbours are rows of
                                         4, 5, 12, 13, 6, 7, 14, 15};  // one quarter
    const uint64x2_t words = vreinterpretq_u64_u8(vld1q_u8(pair));
    const uint64x2_t turn = vsliq_n_u64(vshrq_n_u64(words, 4), words, 60);
    const uint8x16_t order = vld1q_u8(kByQuarters);
    const uint8x16_t bytes = vqtbl1q_u8(vreinterpretq_u8_u64(words), order);
    const uint8x16_t turned = vqtbl1q_u8(vreinterpretq_u8_u64(turn), order);
    const uint8x16_t both[2] = {vzip1q_u8(bytes, turned), vzip2q_u8(bytes, turned)};
    for (int i = 0; i < 2; i++) {
      const uint8x16_t low = low_windows(both[i]), high = high_windows(both[i]);
      values[2 * i] = table[vzip1q_u8(low, high)];
      values[2 * i + 1] = table[vzip2q_u8(low, high)];
    }
  }

  // Shares of 4 rows of one plane, each for its 4 columns.
  static int16x8x2_t shares_of(const uint8_t* shares) {
    uint32_t four;
    std::memcpy(&four, shares, sizeof four);
    const uint8x8_t rows = vreinterpret_u8_u32(vdup_n_u32(four));
    const uint8x8_t twice = vzip1_u8(rows, rows);
    const uint16x8_t wide = vmovl_u8(twice);  // rows 0 0 1 1 2 2 3 3
    const int32x4_t pairs = vreinterpretq_s32_u16(wide);
    return {{vreinterpretq_s16_s32(vzip1q_s32(pairs, pairs)),
             vreinterpretq_s16_s32(vzip2q_s32(pairs, pairs))}};
  }

  template <int kPlanes>
  static void fill(const TrellisMatrix& w, size_t row_block, size_t block,
                   const uint8_t (&shares)[layout::kMaxPlanes][kRows],
                   uint8_t (*codes)[kRows][layout::kSliceColumns]) {
    const SignedTable table(*w.code);
    const uint8_t* words[kPlanes];
    for (int p = 0; p < kPlanes; p++) {
      words[p] = w.codes(p, row_block) + block * layout::kBlockCodeBytes;
    }
    for (int pair = 0; pair < kPairs; pair++) {
      int16x8x2_t factors[kPlanes][kQuarters];
      for (int p = 0; p < kPlanes; p++) {
        for (int q = 0; q < kQuarters; q++) {
          factors[p][q] = shares_of(shares[p] + q * 16 + pair * kLanes);
        }
      }
      for (int s = 0; s < layout::kSlices; s++) {
        int8x16_t values[kPlanes][kQuarters];
        for (int p = 0; p < kPlanes; p++) {
          look_up(words[p] + s * kSliceBytes + pair * kPairBytes, table, values[p]);
        }
        for (int q = 0; q < kQuarters; q++) {
          vst1q_u8(codes[s][q * 16 + pair * kLanes], mixed<kPlanes>(values, factors, q));
        }
      }
    }
  }

  // The codes of 4 rows, kTileOffset added.
  template <int kPlanes>
  static uint8x16_t mixed(const int8x16_t (&values)[kPlanes][kQuarters],
                          const int16x8x2_t (&factors)[kPlanes][kQuarters], int q) {
    int16x8_t low = vdupq_n_s16(0), high = low;
    for (int p = 0; p < kPlanes; p++) {
      const int8x16_t plane = values[p][q];
      low = vmlaq_s16(low, vmovl_s8(vget_low_s8(plane)), factors[p][q].val[0]);
      high = vmlaq_s16(high, vmovl_high_s8(plane), factors[p][q].val[1]);
    }
    const int8x16_t rounded =
        vcombine_s8(vrshrn_n_s16(low, kShareBits), vrshrn_n_s16(high, kShareBits));
    return veorq_u8(vreinterpretq_u8_s8(rounded), vdupq_n_u8(kTileOffset));
  }

  template <int kTokens>
  static void add(const Tile& tile, int n_slices, const RoundedTokens& x, size_t g, float* y,
                  size_t y_stride) {
    // Sums of few tokens wait for each other, so they take more rows at a time.
    constexpr int kRegisters = kTokens > 4 ? 2 : 4;
    constexpr int kLoaded = 16 / layout::kSliceColumns;  // slices whose columns fill a register
    const uint8x16_t offset = vdupq_n_u8(kTileOffset);
    for (int row = 0; row < kRows; row += kRegisters * kLanes) {
      int32x4_t sums[kTokens][kRegisters];
      for (auto& token : sums) {
        for (auto& sum : token) sum = vdupq_n_s32(0);
      }
      for (int s = 0; s < n_slices; s += kLoaded) {
        int8x16_t columns[kTokens];
        for (int t = 0; t < kTokens; t++) {
          columns[t] = vld1q_s8(x.from(t).codes + g * kScaleColumns + s * layout::kSliceColumns);
        }
        each_constant<kLoaded>([&]<int i>() {
          for (int k = 0; k < kRegisters; k++) {
            const uint8x16_t codes = vld1q_u8(tile.codes[s + i][row + k * kLanes]);
            const int8x16_t rows = vreinterpretq_s8_u8(veorq_u8(codes, offset));
            for (int t = 0; t < kTokens; t++) {
              sums[t][k] = vdotq_laneq_s32(sums[t][k], rows, columns[t], i);
            }
          }
        });
      }
      for (int t = 0; t < kTokens; t++) {
        const float32x4_t x_scale = vdupq_n_f32(x.from(t).scales[g]);
        for (int k = 0; k < kRegisters; k++) {
          const int first = row + k * kLanes;
          float* rows = y + t * y_stride + first;
          const float32x4_t sum = vmulq_f32(vcvtq_f32_s32(sums[t][k]), x_scale);
          vst1q_f32(rows, vfmaq_f32(vld1q_f32(rows), sum, vld1q_f32(tile.scales + first)));
        }
      }
    }
  }
};

}  // namespace

extern const TrellisKernels kTrellisNeon;
const TrellisKernels kTrellisNeon{dot_block<Neon>, multiply_block<Neon>};

}  // namespace lowmoe
