// AVX2 and AVX-VNNI, which differ in how they multiply: 32 bytes are four words, 32 rows x 4
// columns.
//
// A byte of a word and the word turned right by four bits hold all windows of one row's four
// columns: column 0 is bits 0-5 of the word's byte and column 1 bits 2-7 of it, columns 2 and 3 the
// same of the turned word's byte. pshufb looks up 16 values; the table's 64 are four of them.
#pragma once

#include <immintrin.h>

#include "lowmoe/kernels/cpu/isa.h"
#include "lowmoe/kernels/cpu/trellis_tile.h"

namespace lowmoe {

namespace {

constexpr int kRows = layout::kBlockRows, kSliceBytes = layout::kWords * 8;
constexpr int kLanes = 8;     // rows of a register
constexpr int kQuarters = 4;  // of the rows: byte j of word w is row 16 * (j / 2) + 2 * w + j % 2

inline const __m256i* wide(const void* bytes) { return static_cast<const __m256i*>(bytes); }

// Sixteen values that differ from the sixteen before them by an exclusive or: as pshufb gives 0 for
// an index below 0, the look-ups at index, index - 16, .. combine to the value at index.
struct ChainedTable {
  __m256i steps[4];

  explicit ChainedTable(const Code& code, int offset = 0) {
    __m256i before = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
      const __m128i part = _mm_load_si128(reinterpret_cast<const __m128i*>(code.table + 16 * i));
      const __m256i sixteen = _mm256_sub_epi8(_mm256_broadcastsi128_si256(part),
                                              _mm256_set1_epi8(static_cast<char>(offset)));
      steps[i] = _mm256_xor_si256(sixteen, before);
      before = sixteen;
    }
  }
  // indices: bytes below 64.
  __m256i operator[](__m256i indices) const {
    __m256i value = _mm256_shuffle_epi8(steps[0], indices);
    for (int i = 1; i < 4; i++) {
      const __m256i from = _mm256_sub_epi8(indices, _mm256_set1_epi8(static_cast<char>(16 * i)));
      value = _mm256_xor_si256(value, _mm256_shuffle_epi8(steps[i], from));
    }
    return value;
  }
};

// Every word turned right by four bits.
inline __m256i turned(__m256i words) {
  return _mm256_or_si256(_mm256_srli_epi64(words, 4), _mm256_slli_epi64(words, 60));
}

inline __m256i low_windows(__m256i bytes) {
  return _mm256_and_si256(bytes, _mm256_set1_epi8(0x3f));
}
inline __m256i high_windows(__m256i bytes) { return low_windows(_mm256_srli_epi16(bytes, 2)); }

inline __m256i four_columns(const void* x) {
  int32_t columns;
  std::memcpy(&columns, x, sizeof columns);
  return _mm256_set1_epi32(columns);
}

// The scales of 8 rows of a quarter as 32-bit integers.
inline __m256i nibbles_of(const uint8_t* nibbles, int q, int half) {
  const auto* eight = reinterpret_cast<const __m128i*>(nibbles + q % 2 * 16 + half * kLanes);
  const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(eight));
  return q < 2 ? _mm256_and_si256(both, _mm256_set1_epi32(15)) : _mm256_srli_epi32(both, 4);
}

// The columns of each slice of a block in the order 0 2 1 3.
inline void swap_columns(const int8_t* x, int8_t* swapped) {
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
  for (int i = 0; i < layout::kBlockColumns; i += 32) {
    const __m256i columns = _mm256_loadu_si256(wide(x + i));
    _mm256_store_si256(reinterpret_cast<__m256i*>(swapped + i),
                       _mm256_shuffle_epi8(columns, order));
  }
}

// What dot_block needs, but for the products.
template <class Products>
struct Dots256 {
  using Table = ChainedTable;
  static constexpr size_t kMostDots = Products::kMostDots;

  static void widen(const uint8_t* halves, float* floats) {
    for (int r = 0; r < kRows; r += kLanes) {
      const auto* some = reinterpret_cast<const __m128i*>(halves + 2 * r);
      _mm256_store_ps(floats + r, _mm256_cvtph_ps(_mm_load_si128(some)));
    }
  }

  template <int kTokens>
  static void add_block(const uint8_t* codes, const Table& table, const uint8_t* nibbles,
                        const RoundedTokens& x, size_t block, RowSums* t) {
    alignas(32) int8_t swapped[kTokens][layout::kBlockColumns];
    for (int i = 0; i < kTokens; i++) {
      swap_columns(x.from(i).codes + block * layout::kBlockColumns, swapped[i]);
    }
    for (int half = 0; half < 2; half++) {
      __m256i sums[kTokens][kQuarters];
      for (int i = 0; i < kTokens; i++) {
        for (auto& sum : sums[i]) {
          sum = _mm256_set1_epi32(-kTableOffset * x.from(i).sums[block]);
        }
      }
      add_words<kTokens>(codes + half * 32, table, swapped, sums);
      for (int q = 0; q < kQuarters; q++) {
        const __m256i scale = nibbles_of(nibbles, q, half);
        for (int i = 0; i < kTokens; i++) {
          auto* rows = reinterpret_cast<__m256i*>(t[i] + q * 16 + half * kLanes);
          const __m256i scaled = _mm256_mullo_epi32(in_order(sums[i], q), scale);
          _mm256_store_si256(rows, _mm256_add_epi32(_mm256_load_si256(rows), scaled));
        }
      }
    }
  }

  // Adds products of 32 rows: of the words 0-3 or 4-7 of all slices.
  //   x     columns of each slice in the order 0 2 1 3, in which unpacking leaves the values
  //   sums  of the bytes 0-3 and 4-7 of words 0 and 2, then of words 1 and 3
  template <int kTokens>
  static void add_words(const uint8_t* codes, const Table& table,
                        const int8_t (&x)[kTokens][layout::kBlockColumns],
                        __m256i (&sums)[kTokens][kQuarters]) {
    for (int s = 0; s < layout::kSlices; s++) {
      const __m256i words = _mm256_load_si256(wide(codes + s * kSliceBytes));
      const __m256i turn = turned(words);
      for (int odd = 0; odd < 2; odd++) {
        const __m256i bytes =
            odd ? _mm256_unpackhi_epi8(words, turn) : _mm256_unpacklo_epi8(words, turn);
        const __m256i of_02 = table[low_windows(bytes)], of_13 = table[high_windows(bytes)];
        const __m256i first = _mm256_unpacklo_epi16(of_02, of_13);
        const __m256i last = _mm256_unpackhi_epi16(of_02, of_13);
        for (int i = 0; i < kTokens; i++) {
          const __m256i columns = four_columns(x[i] + s * layout::kSliceColumns);
          __m256i* to = sums[i] + 2 * odd;
          to[0] = Products::add(to[0], first, columns);
          to[1] = Products::add(to[1], last, columns);
        }
      }
    }
  }

  // Rows of quarter q in order.
  static __m256i in_order(const __m256i (&sums)[kQuarters], int q) {
    return q % 2 ? _mm256_unpackhi_epi64(sums[q / 2], sums[2 + q / 2])
                 : _mm256_unpacklo_epi64(sums[q / 2], sums[2 + q / 2]);
  }
};

// Adds sums of products of 8 rows, the tile's scales and a token's applied, to y.
inline void add_scaled(__m256i sums, float x_scale, const float* scales, float* y) {
  const __m256 sum = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(x_scale));
  _mm256_storeu_ps(y, _mm256_fmadd_ps(sum, _mm256_load_ps(scales), _mm256_loadu_ps(y)));
}

// What multiply_block needs.  A set brings, as Products, where a token's sums start and how a
// tile's codes, kTileOffset added, are multiplied with a token's:
//   static int32_t start(const RoundedTokens& token, size_t g, int n_slices);
//   static __m256i add_tile(__m256i sums, __m256i codes, __m256i columns);
template <class Products>
struct Tiles256 {
  // The table values of 32 rows, a quarter's 8 in each register, rows and columns in order.
  static void look_up(__m256i words, const ChainedTable& table, __m256i (&values)[kQuarters]) {
    // Bytes 0, 1 of two words, their bytes 2, 3 and so on: neighbours are rows of one quarter.
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    const __m256i bytes = _mm256_shuffle_epi8(words, order);
    const __m256i turn = _mm256_shuffle_epi8(turned(words), order);
    const __m256i windows[4] = {low_windows(bytes), high_windows(bytes), low_windows(turn),
                                high_windows(turn)};
    const __m256i first_01 = table[_mm256_unpacklo_epi8(windows[0], windows[1])];
    const __m256i first_23 = table[_mm256_unpacklo_epi8(windows[2], windows[3])];
    const __m256i last_01 = table[_mm256_unpackhi_epi8(windows[0], windows[1])];
    const __m256i last_23 = table[_mm256_unpackhi_epi8(windows[2], windows[3])];
    values[0] = _mm256_unpacklo_epi16(first_01, first_23);
    values[1] = _mm256_unpackhi_epi16(first_01, first_23);
    values[2] = _mm256_unpacklo_epi16(last_01, last_23);
    values[3] = _mm256_unpackhi_epi16(last_01, last_23);
  }

  // Shares of two planes as pairs of bytes for each of the 4 columns of 8 rows, where unpacking
  // puts the values: of every four rows the first two, or the others.
  struct SharePairs {
    __m256i low, high;

    SharePairs() = default;
    SharePairs(const uint8_t* first, const uint8_t* second) {
      const auto eight = [](const uint8_t* shares) {
        return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(shares));
      };
      const __m256i pairs =
          _mm256_broadcastsi128_si256(_mm_unpacklo_epi8(eight(first), eight(second)));
      const auto rows = [&](int a, int b, int c, int d) {
        const auto places = [](int row) {
          return 0x0001000100010001ll * (2 * row | (2 * row + 1) << 8);
        };
        return _mm256_shuffle_epi8(pairs,
                                   _mm256_setr_epi64x(places(a), places(b), places(c), places(d)));
      };
      low = rows(0, 1, 4, 5);
      high = rows(2, 3, 6, 7);
    }
  };

  template <int kPlanes>
  static void fill(const TrellisMatrix& w, size_t row_block, size_t block,
                   const uint8_t (&shares)[layout::kMaxPlanes][kRows],
                   uint8_t (*codes)[kRows][layout::kSliceColumns]) {
    constexpr int kPairs = (kPlanes + 1) / 2;
    static constexpr uint8_t kNothing[kRows] = {};
    const ChainedTable table(*w.code, kTableOffset);
    const uint8_t* words[kPlanes];
    for (int p = 0; p < kPlanes; p++) {
      words[p] = w.codes(p, row_block) + block * layout::kBlockCodeBytes;
    }
    for (int half = 0; half < 2; half++) {
      SharePairs pairs[kQuarters][kPairs];
      for (int q = 0; q < kQuarters; q++) {
        for (int i = 0; i < kPairs; i++) {
          const int row = q * 16 + half * kLanes;
          const uint8_t* second = 2 * i + 1 < kPlanes ? shares[2 * i + 1] : kNothing;
          pairs[q][i] = SharePairs(shares[2 * i] + row, second + row);
        }
      }
      for (int s = 0; s < layout::kSlices; s++) {
        __m256i values[2 * kPairs][kQuarters];
        for (int p = 0; p < kPlanes; p++) {
          look_up(_mm256_load_si256(wide(words[p] + s * kSliceBytes + half * 32)), table,
                  values[p]);
        }
        for (int q = 0; q < kQuarters; q++) {
          if (kPlanes % 2) values[kPlanes][q] = values[kPlanes - 1][q];  // its shares are 0
          auto* to = reinterpret_cast<__m256i*>(codes[s][q * 16 + half * kLanes]);
          _mm256_store_si256(to, mixed<kPairs>(values, q, pairs[q]));
        }
      }
    }
  }

  // The codes of 8 rows, kTileOffset added.
  template <int kPairs>
  static __m256i mixed(const __m256i (&values)[2 * kPairs][kQuarters], int q,
                       const SharePairs (&pairs)[kPairs]) {
    __m256i low = _mm256_setzero_si256(), high = low;
    for (int i = 0; i < kPairs; i++) {
      const __m256i first = values[2 * i][q], second = values[2 * i + 1][q];
      low = _mm256_add_epi16(
          low, _mm256_maddubs_epi16(pairs[i].low, _mm256_unpacklo_epi8(first, second)));
      high = _mm256_add_epi16(
          high, _mm256_maddubs_epi16(pairs[i].high, _mm256_unpackhi_epi8(first, second)));
    }
    const __m256i rounding = _mm256_set1_epi16(1 << (15 - kShareBits));
    const __m256i rounded =
        _mm256_packs_epi16(_mm256_mulhrs_epi16(low, rounding), _mm256_mulhrs_epi16(high, rounding));
    return _mm256_xor_si256(rounded, _mm256_set1_epi8(static_cast<char>(kTileOffset)));
  }

  template <int kTokens>
  static void add(const Tile& tile, int n_slices, const RoundedTokens& x, size_t g, float* y,
                  size_t y_stride) {
    constexpr int kRegisters = 2;  // of rows at a time
    const int8_t* columns[kTokens];
    int32_t starts[kTokens];
    for (int t = 0; t < kTokens; t++) {
      const RoundedTokens token = x.from(t);
      columns[t] = token.codes + g * kScaleColumns;
      starts[t] = Products::start(token, g, n_slices);
    }
    for (int row = 0; row < kRows; row += kRegisters * kLanes) {
      __m256i sums[kTokens][kRegisters];
      for (int t = 0; t < kTokens; t++) {
        for (auto& sum : sums[t]) sum = _mm256_set1_epi32(starts[t]);
      }
      for (int s = 0; s < n_slices; s++) {
        for (int t = 0; t < kTokens; t++) {
          const __m256i four = four_columns(columns[t] + s * layout::kSliceColumns);
          for (int i = 0; i < kRegisters; i++) {
            const __m256i codes = _mm256_load_si256(wide(tile.codes[s][row + i * kLanes]));
            sums[t][i] = Products::add_tile(sums[t][i], codes, four);
          }
        }
      }
      for (int t = 0; t < kTokens; t++) {
        for (int i = 0; i < kRegisters; i++) {
          const int first = row + i * kLanes;
          add_scaled(sums[t][i], x.from(t).scales[g], tile.scales + first,
                     y + t * y_stride + first);
        }
      }
    }
  }
};

}  // namespace

}  // namespace lowmoe
