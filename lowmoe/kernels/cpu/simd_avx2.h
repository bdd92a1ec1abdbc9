// 256-bit registers; the members are explained in simd_scalar.h.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace lowmoe::simd {

struct Avx2 {
  using Float = __m256;
  using Int = __m256i;
  static constexpr size_t kLanes = 8;
  static constexpr size_t kSums = 8;

  static Float all(float x) { return _mm256_set1_ps(x); }
  static Float load(const float* from) { return _mm256_loadu_ps(from); }
  static Float load(const uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Float load(const int8_t* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
  static Float load_some(const float* from, size_t n) { return _mm256_maskload_ps(from, first(n)); }
  template <class T>
  static Float load_some(const T* from, size_t n) {
    T all[kLanes] = {};
    for (size_t i = 0; i < n; i++) all[i] = from[i];
    return load(all);
  }
  static void store(float* to, Float x) { _mm256_storeu_ps(to, x); }
  static void store(uint16_t* to, Float x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store(int8_t* to, Int x) {
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
  }
  static void store_some(float* to, Float x, size_t n) { _mm256_maskstore_ps(to, first(n), x); }
  template <class T, class X>
  static void store_some(T* to, X x, size_t n) {
    T all[kLanes];
    store(all, x);
    for (size_t i = 0; i < n; i++) to[i] = all[i];
  }

  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
  static Float nearest(Float x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Int nearest_int(Float x) { return _mm256_cvtps_epi32(x); }
  static Float times_power(Float x, Float n) {
    const Int whole = _mm256_cvtps_epi32(n);
    const Int half = _mm256_srai_epi32(whole, 1);
    return x * power(half) * power(_mm256_sub_epi32(whole, half));
  }

  static float sum(Float x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static float largest(Float x) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  static Float sum_each(const Float* v) {
    Float w[4];  // of the rows j and j + 4, whose lanes fill one 128-bit half each
    for (int j = 0; j < 4; j++) {
      w[j] = _mm256_permute2f128_ps(v[j], v[j + 4], 0x20) +
             _mm256_permute2f128_ps(v[j], v[j + 4], 0x31);
    }
    const Float a = _mm256_unpacklo_ps(w[0], w[1]) + _mm256_unpackhi_ps(w[0], w[1]);
    const Float b = _mm256_unpacklo_ps(w[2], w[3]) + _mm256_unpackhi_ps(w[2], w[3]);
    return _mm256_shuffle_ps(a, b, 0x44) + _mm256_shuffle_ps(a, b, 0xee);
  }

  // As in simd_avx512.h.
  template <int kStride>
  static Float butterfly(Float x) {
    if constexpr (kStride == 1) return combine<0xaa>(_mm256_permute_ps(x, 0xb1), x);
    if constexpr (kStride == 2) return combine<0xcc>(_mm256_permute_ps(x, 0x4e), x);
    if constexpr (kStride == 4) return combine<0xf0>(_mm256_permute2f128_ps(x, x, 0x01), x);
  }

  static Int absolute_bits(Float x) {
    return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
  }
  static Int zero() { return _mm256_setzero_si256(); }
  static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Int max(Int a, Int b) { return _mm256_max_epi32(a, b); }
  static int32_t sum(Int x) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
  }
  static int32_t largest(Int x) {
    const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
  }

 private:
  static Int first(size_t n) {
    const Int lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
  }
  static Float power(Int n) {  // -126..127
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  template <int kUpper>
  static Float combine(Float partner, Float x) {
    return _mm256_blend_ps(partner + x, partner - x, kUpper);
  }
};

}  // namespace lowmoe::simd
