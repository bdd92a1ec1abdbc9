// 512-bit registers; the members are explained in simd_scalar.h.
#pragma once

// GCC 12 warns of registers left undefined on purpose inside its own header (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include <cstddef>
#include <cstdint>

namespace lowmoe::simd {

struct Avx512 {
  using Float = __m512;
  using Int = __m512i;
  static constexpr size_t kLanes = 16;
  static constexpr size_t kSums = 16;

  static Float all(float x) { return _mm512_set1_ps(x); }
  static Float load(const float* from) { return _mm512_loadu_ps(from); }
  static Float load(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Float load(const int8_t* from) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Float load_some(const float* from, size_t n) {
    return _mm512_maskz_loadu_ps(first(n), from);
  }
  static Float load_some(const uint16_t* from, size_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), from));
  }
  static Float load_some(const int8_t* from, size_t n) {
    return widen(_mm_maskz_loadu_epi8(first(n), from));
  }
  static void store(float* to, Float x) { _mm512_storeu_ps(to, x); }
  static void store(uint16_t* to, Float x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves(x));
  }
  static void store(int8_t* to, Int x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(x));
  }
  static void store_some(float* to, Float x, size_t n) { _mm512_mask_storeu_ps(to, first(n), x); }
  static void store_some(uint16_t* to, Float x, size_t n) {
    _mm256_mask_storeu_epi16(to, first(n), halves(x));
  }
  static void store_some(int8_t* to, Int x, size_t n) {
    _mm_mask_storeu_epi8(to, first(n), _mm512_cvtepi32_epi8(x));
  }

  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
  static Float nearest(Float x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Int nearest_int(Float x) { return _mm512_cvtps_epi32(x); }
  static Float times_power(Float x, Float n) { return _mm512_scalef_ps(x, n); }

  static float sum(Float x) { return _mm512_reduce_add_ps(x); }
  static float largest(Float x) { return _mm512_reduce_max_ps(x); }
  static Float sum_each(const Float* v) {
    Float w[4];  // of the rows j, j + 4, j + 8, j + 12, whose lanes fill one 128-bit block each
    for (int j = 0; j < 4; j++) {
      w[j] = add_blocks(add_halves(v[j], v[j + 4]), add_halves(v[j + 8], v[j + 12]));
    }
    return add_pairs(add_neighbours(w[0], w[1]), add_neighbours(w[2], w[3]));
  }

  // Each lane and its partner kStride away become their sum and difference, as in Sylvester's
  // transform.
  template <int kStride>
  static Float butterfly(Float x) {
    if constexpr (kStride == 1) return combine<0xaaaa>(_mm512_permute_ps(x, 0xb1), x);
    if constexpr (kStride == 2) return combine<0xcccc>(_mm512_permute_ps(x, 0x4e), x);
    if constexpr (kStride == 4) return combine<0xf0f0>(_mm512_shuffle_f32x4(x, x, 0xb1), x);
    if constexpr (kStride == 8) return combine<0xff00>(_mm512_shuffle_f32x4(x, x, 0x4e), x);
  }

  static Int absolute_bits(Float x) {
    return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
  }
  static Int zero() { return _mm512_setzero_si512(); }
  static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Int max(Int a, Int b) { return _mm512_max_epi32(a, b); }
  static int32_t sum(Int x) { return _mm512_reduce_add_epi32(x); }
  static int32_t largest(Int x) { return _mm512_reduce_max_epi32(x); }

 private:
  static __mmask16 first(size_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static __m256i halves(Float x) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Float widen(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }

  static Float add_halves(Float a, Float b) {
    return _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
  }
  static Float add_blocks(Float a, Float b) {
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  }
  static Float add_neighbours(Float a, Float b) {
    return _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  }
  static Float add_pairs(Float a, Float b) {
    return _mm512_shuffle_ps(a, b, 0x44) + _mm512_shuffle_ps(a, b, 0xee);
  }
  // partner + x where a lane's bit of kUpper is 0, partner - x where it is 1; fma rounds neither
  // twice.
  template <int kUpper>
  static Float combine(Float partner, Float x) {
    const Float sign = _mm512_mask_blend_ps(kUpper, all(1.0f), all(-1.0f));
    return _mm512_fmadd_ps(x, sign, partner);
  }
};

}  // namespace lowmoe::simd
