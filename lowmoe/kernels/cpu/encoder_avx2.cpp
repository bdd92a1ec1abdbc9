#include <immintrin.h>

#include "lowmoe/kernels/cpu/encoder_rows.h"
#include "lowmoe/kernels/cpu/isa.h"

namespace lowmoe {

namespace {

// 8 words, one slice.  What each function does is said in encoder_portable.h.
struct Avx2 {
  static constexpr int kLanes = 8;
  using I = __m256i;
  using F = __m256;
  struct Table {
    alignas(32) int32_t values[kTableSize];
  };

  static I all(int32_t x) { return _mm256_set1_epi32(x); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I min(I a, I b) { return _mm256_min_epi32(a, b); }
  static I max(I a, I b) { return _mm256_max_epi32(a, b); }
  static I both(I a, I b) { return _mm256_and_si256(a, b); }
  static I either(I a, I b) { return _mm256_or_si256(a, b); }
  template <int kBits>
  static I shift_left(I a) {
    return _mm256_slli_epi32(a, kBits);
  }
  template <int kBits>
  static I shift_right(I a) {
    return _mm256_srli_epi32(a, kBits);
  }
  static I shift_right_by(I a, I bits) { return _mm256_srlv_epi32(a, bits); }
  static I equal(I a, I b) { return _mm256_cmpeq_epi32(a, b); }
  static I less(I a, I b) { return _mm256_cmpgt_epi32(b, a); }
  static I choose(I which, I yes, I no) { return _mm256_blendv_epi8(no, yes, which); }
  static I dot(I sum, I a, I b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
  template <int kMask>
  static I low_bits(I a, int32_t bits) {
    return _mm256_or_si256(_mm256_andnot_si256(all(kMask), a), all(bits));
  }
  template <int kBits>
  static I merge(I low, I high) {
    if constexpr (kBits == 16) return _mm256_blend_epi16(low, shift_left<16>(high), 0xaa);
    constexpr int32_t kMask = (1 << kBits) - 1;
    const I above = _mm256_andnot_si256(all(kMask), shift_left<kBits>(high));
    return _mm256_or_si256(_mm256_and_si256(low, all(kMask)), above);
  }
  static I low_pairs(const I* from) { return low_pairs_by_merging<Avx2>(from); }
  static Table table(const int8_t* values) {
    Table table;
    for (int n = 0; n < kTableSize; n++) table.values[n] = values[n];
    return table;
  }
  static I look_up(const Table& table, I index) {
    return _mm256_i32gather_epi32(table.values, index, 4);
  }
  static void put_bytes(int8_t* to, I a) {
    const __m128i words = _mm_packs_epi32(low(a), high(a));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
  }
  static I bytes(const int8_t* from) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }
  static void put_words(uint8_t* const* to, I lows, I highs) {
    __m256i* words = reinterpret_cast<__m256i*>(to[0]);
    _mm256_storeu_si256(words, joined(low(lows), low(highs)));
    _mm256_storeu_si256(words + 1, joined(high(lows), high(highs)));
  }

  static F all_floats(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F subtract(F a, F b) { return _mm256_sub_ps(a, b); }
  static F multiply(F a, F b) { return _mm256_mul_ps(a, b); }
  static F divide(F a, F b) { return _mm256_div_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F magnitude(F a) { return _mm256_andnot_ps(all_floats(-0.0f), a); }
  static I round(F a) { return _mm256_cvtps_epi32(a); }
  static F to_floats(I a) { return _mm256_cvtepi32_ps(a); }
  static F floats(const float* from) { return _mm256_loadu_ps(from); }
  static void put(float* to, F a) { _mm256_storeu_ps(to, a); }
  static F floats(const float* const* from, size_t offset) { return floats(from[0] + offset); }
  static void put(float* const* to, size_t offset, F a) { put(to[0] + offset, a); }

 private:
  static __m128i low(I a) { return _mm256_castsi256_si128(a); }
  static __m128i high(I a) { return _mm256_extracti128_si256(a, 1); }
  static I joined(__m128i low, __m128i high) {
    const I shifted = _mm256_slli_epi64(_mm256_cvtepu32_epi64(high), 32);
    return _mm256_or_si256(_mm256_cvtepu32_epi64(low), shifted);
  }
};

}  // namespace

extern const EncoderKernels kEncoderAvx2;
const EncoderKernels kEncoderAvx2 = encoder_kernels<Avx2>();

}  // namespace lowmoe
