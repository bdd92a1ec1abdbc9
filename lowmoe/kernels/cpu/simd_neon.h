// 128-bit registers of 64-bit ARM; the members are explained in simd_scalar.h.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace lowmoe::simd {

struct Neon {
  using Float = float32x4_t;
  using Int = int32x4_t;
  static constexpr size_t kLanes = 4;
  static constexpr size_t kSums = 16;

  static Float all(float x) { return vdupq_n_f32(x); }
  static Float load(const float* from) { return vld1q_f32(from); }
  static Float load(const uint16_t* from) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
  }
  static Float load(const int8_t* from) {
    int32_t four;
    std::memcpy(&four, from, sizeof four);
    const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(four));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
  }
  template <class T>
  static Float load_some(const T* from, size_t n) {
    T all[kLanes] = {};
    for (size_t i = 0; i < n; i++) all[i] = from[i];
    return load(all);
  }
  static void store(float* to, Float x) { vst1q_f32(to, x); }
  static void store(uint16_t* to, Float x) { vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
  static void store(int8_t* to, Int x) {
    const int16x4_t words = vmovn_s32(x);
    const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
    const int32_t four = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
    std::memcpy(to, &four, sizeof four);
  }
  template <class T, class X>
  static void store_some(T* to, X x, size_t n) {
    T all[kLanes];
    store(all, x);
    for (size_t i = 0; i < n; i++) to[i] = all[i];
  }

  static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  static Float max(Float a, Float b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static Float min(Float a, Float b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static Float nearest(Float x) { return vrndnq_f32(x); }
  static Int nearest_int(Float x) { return vcvtnq_s32_f32(x); }
  static Float times_power(Float x, Float n) {
    const Int whole = vcvtnq_s32_f32(n);
    const Int half = vshrq_n_s32(whole, 1);
    return x * power(half) * power(vsubq_s32(whole, half));
  }

  static float sum(Float x) { return vaddvq_f32(x); }
  static float largest(Float x) { return vmaxvq_f32(x); }
  static Float sum_each(const Float* v) {
    return vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3]));
  }

  // As in simd_avx512.h.
  template <int kStride>
  static Float butterfly(Float x) {
    const Float partner = kStride == 1 ? vrev64q_f32(x) : vextq_f32(x, x, 2);
    const uint32x4_t upper = kStride == 1 ? uint32x4_t{0, ~0u, 0, ~0u} : uint32x4_t{0, 0, ~0u, ~0u};
    return vbslq_f32(upper, partner - x, partner + x);
  }

  static Int absolute_bits(Float x) {
    return vandq_s32(vreinterpretq_s32_f32(x), vdupq_n_s32(0x7fffffff));
  }
  static Int zero() { return vdupq_n_s32(0); }
  static Int add(Int a, Int b) { return vaddq_s32(a, b); }
  static Int max(Int a, Int b) { return vmaxq_s32(a, b); }
  static int32_t sum(Int x) { return vaddvq_s32(x); }
  static int32_t largest(Int x) { return vmaxvq_s32(x); }

 private:
  static Float power(Int n) {  // -126..127
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
  }
};

}  // namespace lowmoe::simd
