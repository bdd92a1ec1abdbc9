// AVX-512 with VBMI and VNNI: three instructions for 64 weights.
//
// vpmultishiftqb picks eight windows of every 64-bit word, vpermb looks them up in the table that
// fills one register, vpdpbusd multiplies four columns of 16 rows.
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 says it of its own intrinsics, which start from undefined registers (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <array>

#include "lowmoe/kernels/cpu/isa.h"
#include "lowmoe/kernels/cpu/trellis_tile.h"

namespace lowmoe {

namespace {

constexpr int kRows = layout::kBlockRows, kSliceBytes = layout::kWords * 8;
constexpr int kQuarters = 4;  // of 16 rows: the lanes of a register
constexpr int kLanes = kRows / kQuarters;
// Ahead. Measured once, one thread, best of 20 on a shared Zen 5: 30 to 40 GB/s without, 19 to 23
// at 512 bytes, 35 to 40 at 4 KiB, no more at 8 KiB.
constexpr int kPrefetchBytes = 4096;

using Bytes = std::array<uint8_t, 64>;

// Byte b of a word becomes the window of weight 8 * q + b.
constexpr Bytes window_bits(int q) {
  Bytes bits{};
  for (int b = 0; b < 64; b++)
    bits[b] = static_cast<uint8_t>(layout::kSymbolBits * (8 * q + b % 8));
  return bits;
}
alignas(64) constexpr Bytes kShifts[kQuarters] = {window_bits(0), window_bits(1), window_bits(2),
                                                  window_bits(3)};

// The table values of 16 rows of a slice. vpermb ignores the two bits above a window.
inline __m512i look_up(int q, __m512i slice, __m512i table) {
  const __m512i bits = _mm512_load_si512(kShifts[q].data());
  return _mm512_permutexvar_epi8(_mm512_multishift_epi64_epi8(bits, slice), table);
}

inline void prefetch(const uint8_t* codes) {
  _mm_prefetch(reinterpret_cast<const char*>(codes + kPrefetchBytes), _MM_HINT_T0);
}

inline __m512i four_columns(const int8_t* x) {
  int32_t columns;
  std::memcpy(&columns, x, sizeof columns);
  return _mm512_set1_epi32(columns);
}

// sums + products of four columns. Not the intrinsic: GCC 12 copies every sum that one changes to
// another register and, out of registers, to memory.
inline __m512i add_products(__m512i sums, __m512i values, __m512i columns) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(values), "v"(columns));
  return sums;
}

// The scales of 16 rows as 32-bit integers.
inline __m512i nibbles_of(const uint8_t* nibbles, int q) {
  const auto* half = reinterpret_cast<const __m128i*>(nibbles + q % 2 * kLanes);
  const __m512i both = _mm512_cvtepu8_epi32(_mm_load_si128(half));
  return q < 2 ? _mm512_and_si512(both, _mm512_set1_epi32(15)) : _mm512_srli_epi32(both, 4);
}

struct Avx512 {
  struct Table {
    __m512i values;
    explicit Table(const Code& code) : values(_mm512_load_si512(code.table)) {}
  };
  // Of up to 4 tokens all rows at once, of more half of the rows and then the others: 16 sums, 4
  // values, 4 registers of shifts, 1 of a token. More than 6 pointers to tokens do not fit beside.
  static constexpr size_t kMostDots = 6;

  static void widen(const uint8_t* halves, float* floats) {
    for (int r = 0; r < kRows; r += kLanes) {
      const auto* some = reinterpret_cast<const __m256i*>(halves + 2 * r);
      _mm512_store_ps(floats + r, _mm512_cvtph_ps(_mm256_load_si256(some)));
    }
  }

  template <int kTokens>
  static void add_block(const uint8_t* codes, const Table& table, const uint8_t* nibbles,
                        const RoundedTokens& x, size_t block, RowSums* t) {
    constexpr int kAtOnce = kTokens <= 4 ? kQuarters : kQuarters / 2;
    for (int first = 0; first < kQuarters; first += kAtOnce) {
      add_quarters<kTokens, kAtOnce>(codes, table, nibbles, x, block, first, t);
    }
  }

  template <int kTokens, int kAtOnce>
  static void add_quarters(const uint8_t* codes, const Table& table, const uint8_t* nibbles,
                           const RoundedTokens& x, size_t block, int first, RowSums* t) {
    const int8_t* columns[kTokens];
    __m512i sums[kTokens][kAtOnce];
    for (int i = 0; i < kTokens; i++) {
      const RoundedTokens token = x.from(i);
      columns[i] = token.codes + block * layout::kBlockColumns;
      for (auto& sum : sums[i]) sum = _mm512_set1_epi32(-kTableOffset * token.sums[block]);
    }
    for (int s = 0; s < layout::kSlices; s++) {
      const __m512i slice = _mm512_load_si512(codes + s * kSliceBytes);
      if (first == 0) prefetch(codes + s * kSliceBytes);
      __m512i values[kAtOnce];
      for (int q = 0; q < kAtOnce; q++) values[q] = look_up(first + q, slice, table.values);
      for (int i = 0; i < kTokens; i++) {
        const __m512i four = four_columns(columns[i] + s * layout::kSliceColumns);
        for (int q = 0; q < kAtOnce; q++) sums[i][q] = add_products(sums[i][q], values[q], four);
      }
    }
    for (int q = 0; q < kAtOnce; q++) {
      const __m512i scale = nibbles_of(nibbles, first + q);
      for (int i = 0; i < kTokens; i++) {
        int32_t* rows = t[i] + (first + q) * kLanes;
        const __m512i scaled = _mm512_mullo_epi32(sums[i][q], scale);
        _mm512_store_si512(rows, _mm512_add_epi32(_mm512_load_si512(rows), scaled));
      }
    }
  }

  static constexpr size_t kMostTokens = 6;  // 24 sums, 4 registers of codes, 1 of a token

  // Shares of two planes as pairs of bytes for each weight of 32, where unpacking has put them: of
  // every four rows of a quarter the first two, or the others.
  static __m512i share_pairs(const uint8_t* first, const uint8_t* second, int q, bool others) {
    alignas(64) static constexpr Bytes kPlaces = [] {
      Bytes places{};
      for (int b = 0; b < 64; b++)
        places[b] = static_cast<uint8_t>(b / 16 * 4 + b % 16 / 8 + b % 2 * 64);
      return places;
    }();
    const int row = q * kLanes + others * 2;
    const __m512i places = _mm512_add_epi8(_mm512_load_si512(kPlaces.data()),
                                           _mm512_set1_epi8(static_cast<char>(row)));
    return _mm512_permutex2var_epi8(_mm512_loadu_si512(first), places, _mm512_loadu_si512(second));
  }

  template <int kPlanes>
  static void fill(const TrellisMatrix& w, size_t row_block, size_t block,
                   const uint8_t (&shares)[layout::kMaxPlanes][kRows],
                   uint8_t (*codes)[kRows][layout::kSliceColumns]) {
    constexpr int kPairs = (kPlanes + 1) / 2;
    static constexpr uint8_t kNothing[kRows] = {};
    const __m512i table =
        _mm512_sub_epi8(_mm512_load_si512(w.code->table), _mm512_set1_epi8(kTableOffset));
    const uint8_t* words[kPlanes];
    for (int p = 0; p < kPlanes; p++) {
      words[p] = w.codes(p, row_block) + block * layout::kBlockCodeBytes;
      for (int s = 0; s < layout::kSlices; s++) prefetch(words[p] + s * kSliceBytes);
    }
    for (int q = 0; q < kQuarters; q++) {
      __m512i low[kPairs], high[kPairs];
      for (int i = 0; i < kPairs; i++) {
        const uint8_t* second = 2 * i + 1 < kPlanes ? shares[2 * i + 1] : kNothing;
        low[i] = share_pairs(shares[2 * i], second, q, false);
        high[i] = share_pairs(shares[2 * i], second, q, true);
      }
      for (int s = 0; s < layout::kSlices; s++) {
        __m512i values[2 * kPairs];
        for (int p = 0; p < kPlanes; p++) {
          values[p] = look_up(q, _mm512_load_si512(words[p] + s * kSliceBytes), table);
        }
        if (kPlanes % 2) values[kPlanes] = values[kPlanes - 1];  // its shares are 0
        _mm512_store_si512(codes[s][q * kLanes], mixed<kPairs>(values, low, high));
      }
    }
  }

  // The codes of 16 rows, kTileOffset added.
  template <int kPairs>
  static __m512i mixed(const __m512i (&values)[2 * kPairs], const __m512i (&low_shares)[kPairs],
                       const __m512i (&high_shares)[kPairs]) {
    __m512i low = _mm512_setzero_si512(), high = low;
    for (int i = 0; i < kPairs; i++) {
      const __m512i first = values[2 * i], second = values[2 * i + 1];
      low = _mm512_add_epi16(
          low, _mm512_maddubs_epi16(low_shares[i], _mm512_unpacklo_epi8(first, second)));
      high = _mm512_add_epi16(
          high, _mm512_maddubs_epi16(high_shares[i], _mm512_unpackhi_epi8(first, second)));
    }
    const __m512i rounding = _mm512_set1_epi16(1 << (15 - kShareBits));
    const __m512i rounded =
        _mm512_packs_epi16(_mm512_mulhrs_epi16(low, rounding), _mm512_mulhrs_epi16(high, rounding));
    return _mm512_xor_si512(rounded, _mm512_set1_epi8(static_cast<char>(kTileOffset)));
  }

  template <int kTokens>
  static void add(const Tile& tile, int n_slices, const RoundedTokens& x, size_t g, float* y,
                  size_t y_stride) {
    const int8_t* columns[kTokens];
    __m512i sums[kTokens][kQuarters];
    for (int t = 0; t < kTokens; t++) {
      const RoundedTokens token = x.from(t);
      columns[t] = token.codes + g * kScaleColumns;
      const int32_t start = -kTileOffset * sum_of_group(token, g, n_slices);
      for (auto& sum : sums[t]) sum = _mm512_set1_epi32(start);
    }
    for (int s = 0; s < n_slices; s++) {
      for (int t = 0; t < kTokens; t++) {
        const __m512i four = four_columns(columns[t] + s * layout::kSliceColumns);
        for (int q = 0; q < kQuarters; q++) {
          const __m512i codes = _mm512_load_si512(tile.codes[s][q * kLanes]);
          sums[t][q] = add_products(sums[t][q], codes, four);
        }
      }
    }
    for (int t = 0; t < kTokens; t++) {
      const __m512 x_scale = _mm512_set1_ps(x.from(t).scales[g]);
      for (int q = 0; q < kQuarters; q++) {
        float* rows = y + t * y_stride + q * kLanes;
        const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[t][q]), x_scale);
        _mm512_storeu_ps(rows, _mm512_fmadd_ps(sum, _mm512_load_ps(tile.scales + q * kLanes),
                                               _mm512_loadu_ps(rows)));
      }
    }
  }
};

}  // namespace

extern const TrellisKernels kTrellisAvx512;
const TrellisKernels kTrellisAvx512{dot_block<Avx512>, multiply_block<Avx512>};

}  // namespace lowmoe
