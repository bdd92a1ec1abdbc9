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

  static int32_t start(const RoundedTokens&, size_t, int) { return 0; }
  static __m256i add_tile(__m256i sums, __m256i codes, __m256i columns) {
    const __m256i offset = _mm256_set1_epi8(static_cast<char>(kTileOffset));
    const __m256i signed_codes = _mm256_xor_si256(codes, offset);
    return add(sums, _mm256_abs_epi8(signed_codes), _mm256_sign_epi8(columns, signed_codes));
  }
};

struct Avx2 : Dots256<MultiplyAdd>, Tiles256<MultiplyAdd> {
  static constexpr size_t kMostTokens = 4;  // 8 sums, 4 registers of codes, 1 of ones, 3 for work
};

}  // namespace

extern const TrellisKernels kTrellisAvx2;
const TrellisKernels kTrellisAvx2{dot_block<Avx2>, multiply_block<Avx2>};

}  // namespace lowmoe
