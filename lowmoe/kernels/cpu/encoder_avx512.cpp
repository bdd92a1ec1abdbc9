// GCC 12 takes its own headers' undefined registers for mistakes (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "lowmoe/kernels/cpu/encoder_rows.h"
#include "lowmoe/kernels/cpu/isa.h"

namespace lowmoe {

namespace {

// 16 words, two slices.  What each function does is said in encoder_portable.h.
struct Avx512 {
  static constexpr int kLanes = 16;
  using I = __m512i;
  using F = __m512;
  using Table = __m512i;

  static I all(int32_t x) { return _mm512_set1_epi32(x); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I min(I a, I b) { return _mm512_min_epi32(a, b); }
  static I max(I a, I b) { return _mm512_max_epi32(a, b); }
  static I both(I a, I b) { return _mm512_and_si512(a, b); }
  static I either(I a, I b) { return _mm512_or_si512(a, b); }
  template <int kBits>
  static I shift_left(I a) {
    return _mm512_slli_epi32(a, kBits);
  }
  template <int kBits>
  static I shift_right(I a) {
    return _mm512_srli_epi32(a, kBits);
  }
  static I shift_right_by(I a, I bits) { return _mm512_srlv_epi32(a, bits); }
  static __mmask16 equal(I a, I b) { return _mm512_cmpeq_epi32_mask(a, b); }
  static __mmask16 less(I a, I b) { return _mm512_cmplt_epi32_mask(a, b); }
  static I choose(__mmask16 which, I yes, I no) { return _mm512_mask_mov_epi32(no, which, yes); }
  static I dot(I sum, I a, I b) { return _mm512_dpwssd_epi32(sum, a, b); }
  template <int kMask>
  static I low_bits(I a, int32_t bits) {
    return _mm512_ternarylogic_epi32(a, all(kMask), all(bits), 0xba);  // a & ~mask | bits
  }
  template <int kBits>
  static I merge(I low, I high) {
    constexpr int32_t kMask = (1 << kBits) - 1;
    return _mm512_ternarylogic_epi32(low, all(kMask), shift_left<kBits>(high), 0xe2);
  }
  static I low_pairs(const I* from) {
    I quarters[4];  // numbers k, 4 + k, 8 + k and 12 + k in a byte each
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      I quarter = from[k];
      quarter = _mm512_mask_shuffle_epi8(quarter, 0x2222222222222222, from[4 + k], lowest_bytes());
      quarter = _mm512_mask_shuffle_epi8(quarter, 0x4444444444444444, from[8 + k], lowest_bytes());
      quarter = _mm512_mask_shuffle_epi8(quarter, 0x8888888888888888, from[12 + k], lowest_bytes());
      quarters[k] = quarter;
    }
    const I low = merge_bytes<2, 0x03030303>(quarters[0], quarters[1]);
    const I high = merge_bytes<2, 0x03030303>(quarters[2], quarters[3]);
    return merge_bytes<4, 0x0f0f0f0f>(low, high);
  }
  static Table table(const int8_t* values) { return _mm512_loadu_si512(values); }
  static I look_up(Table table, I index) {
    const I bytes = _mm512_permutexvar_epi8(index, table);
    return _mm512_srai_epi32(_mm512_slli_epi32(bytes, 24), 24);
  }
  static void put_bytes(int8_t* to, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(a));
  }
  static I bytes(const int8_t* from) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static void put_words(uint8_t* const* to, I low, I high) {
    _mm512_storeu_si512(to[0], words(_mm512_castsi512_si256(low), _mm512_castsi512_si256(high)));
    _mm512_storeu_si512(
        to[1], words(_mm512_extracti64x4_epi64(low, 1), _mm512_extracti64x4_epi64(high, 1)));
  }

  static F all_floats(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F subtract(F a, F b) { return _mm512_sub_ps(a, b); }
  static F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
  static F divide(F a, F b) { return _mm512_div_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F magnitude(F a) { return _mm512_abs_ps(a); }
  static I round(F a) { return _mm512_cvtps_epi32(a); }
  static F to_floats(I a) { return _mm512_cvtepi32_ps(a); }
  static F floats(const float* from) { return _mm512_loadu_ps(from); }
  static void put(float* to, F a) { _mm512_storeu_ps(to, a); }
  static F floats(const float* const* from, size_t offset) {
    const F low = _mm512_castps256_ps512(_mm256_loadu_ps(from[0] + offset));
    return _mm512_insertf32x8(low, _mm256_loadu_ps(from[1] + offset), 1);
  }
  static void put(float* const* to, size_t offset, F a) {
    _mm256_storeu_ps(to[0] + offset, _mm512_castps512_ps256(a));
    _mm256_storeu_ps(to[1] + offset, _mm512_extractf32x8_ps(a, 1));
  }

 private:
  // Of every 32 bits the lowest byte, four times.
  static I lowest_bytes() { return _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0); }
  template <int kBits, int32_t kMask>
  static I merge_bytes(I low, I high) {
    return _mm512_ternarylogic_epi32(low, all(kMask), shift_left<kBits>(high), 0xe2);
  }
  static __m512i words(__m256i low, __m256i high) {
    const __m512i shifted = _mm512_slli_epi64(_mm512_cvtepu32_epi64(high), 32);
    return _mm512_or_si512(_mm512_cvtepu32_epi64(low), shifted);
  }
};

}  // namespace

extern const EncoderKernels kEncoderAvx512;
const EncoderKernels kEncoderAvx512 = encoder_kernels<Avx512>();

}  // namespace lowmoe
