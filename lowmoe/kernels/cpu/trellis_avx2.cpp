// AVX2: products of bytes by vpmaddubsw, whose 16-bit sums of two must not overflow.
//
// A table value + 64 is at most 127 and a token's code within +-127, so a sum of two products is
// within +-32258. A tile's codes + 128 would exceed it; they are multiplied as magnitudes, their
// signs moved to the token's codes: 2 * 126 * 127 = 32004.
#include "lowmoe/kernels/cpu/trellis_avx2.h"

namespace lowmoe {

namespace {

struct MultiplyAdd {
  static constexpr size_t kMostDots = 4;

  static __m256i add(__m256i sums, __m256i values, __m256i columns) {
    const __m256i pairs = _mm256_maddubs_epi16(values, columns);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

struct Avx2 : Dots256<MultiplyAdd>, Tiles256 {
  static constexpr size_t kMostTokens = 4;  // 8 sums, 4 registers of codes, 1 of ones, 3 for work
  static constexpr int kRegisters = 2;      // of rows at a time

  template <int kTokens>
  static void add(const Tile& tile, int n_slices, const RoundedTokens& x, size_t g, float* y,
                  size_t y_stride) {
    const int8_t* columns[kTokens];
    for (int t = 0; t < kTokens; t++) columns[t] = x.from(t).codes + g * kScaleColumns;
    const __m256i offset = _mm256_set1_epi8(static_cast<char>(kTileOffset));
    for (int row = 0; row < kRows; row += kRegisters * kLanes) {
      __m256i sums[kTokens][kRegisters];
      for (int t = 0; t < kTokens; t++) {
        for (auto& sum : sums[t]) sum = _mm256_setzero_si256();
      }
      for (int s = 0; s < n_slices; s++) {
        for (int t = 0; t < kTokens; t++) {
          const __m256i four = four_columns(columns[t] + s * layout::kSliceColumns);
          for (int i = 0; i < kRegisters; i++) {
            const __m256i codes =
                _mm256_xor_si256(_mm256_load_si256(wide(tile.codes[s][row + i * kLanes])), offset);
            sums[t][i] =
                MultiplyAdd::add(sums[t][i], _mm256_abs_epi8(codes), _mm256_sign_epi8(four, codes));
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

extern const TrellisKernels kTrellisAvx2;
const TrellisKernels kTrellisAvx2{dot_block<Avx2>, multiply_block<Avx2>};

}  // namespace lowmoe
