// How a head of a token lies in the cache of keys or values: see lowmoe/kernels/cpu/kv_cache.h.
//
// Heads have a multiple of 8 numbers, up to 256. Rows of float16 and float32 begin at multiples of
// 16 bytes, those of int8 at multiples of 4.
#pragma once

#include "round.cuh"

namespace lowmoe {

inline constexpr int kMostHead = 256;
inline constexpr int kChunk = 8;  // numbers that a lane reads of a row: 16 bytes of float16

// A cache of float16 (__half), float32 or int8.
//   Chunk    a lane's 8 numbers as loaded, kept so until they are used: half the registers
//   kDepth   rows that a lane of attention_warp.cuh has under way with one query head: 4 or 8
template <class Number>
struct Cached;

template <>
struct Cached<__half> {
  using Chunk = uint4;
  static constexpr bool kScaled = false;
  static constexpr int kDepth = 8;
  static __device__ __forceinline__ int row_bytes(int head_size) { return 2 * head_size; }
  static __device__ __forceinline__ Chunk load(const uint8_t* row, int column) {
    return *reinterpret_cast<const uint4*>(row + 2 * column);
  }
  static __device__ __forceinline__ void widen(const Chunk& chunk, float (&to)[kChunk]) {
    const unsigned pairs[] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < kChunk / 2; i++) {
      const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&pairs[i]));
      to[2 * i] = two.x, to[2 * i + 1] = two.y;
    }
  }
  static __device__ __forceinline__ void store(uint8_t* row, int column, float a, float b, float) {
    *reinterpret_cast<__half2*>(row + 2 * column) =
        __halves2half2(__float2half_rn(a), __float2half_rn(b));
  }
};

template <>
struct Cached<float> {
  struct Chunk {
    float4 low, high;
  };
  static constexpr bool kScaled = false;
  static constexpr int kDepth = 4;  // rows are twice as long
  static __device__ __forceinline__ int row_bytes(int head_size) { return 4 * head_size; }
  static __device__ __forceinline__ Chunk load(const uint8_t* row, int column) {
    const float4* at = reinterpret_cast<const float4*>(row + 4 * column);
    return {at[0], at[1]};
  }
  static __device__ __forceinline__ void widen(const Chunk& chunk, float (&to)[kChunk]) {
    to[0] = chunk.low.x, to[1] = chunk.low.y, to[2] = chunk.low.z, to[3] = chunk.low.w;
    to[4] = chunk.high.x, to[5] = chunk.high.y, to[6] = chunk.high.z, to[7] = chunk.high.w;
  }
  static __device__ __forceinline__ void store(uint8_t* row, int column, float a, float b, float) {
    *reinterpret_cast<float2*>(row + 4 * column) = make_float2(a, b);
  }
};

// head_size codes, then the scale: rows begin at multiples of 4 bytes and no more.
template <>
struct Cached<int8_t> {
  using Chunk = uint2;
  static constexpr bool kScaled = true;
  static constexpr int kDepth = 8;
  static __device__ __forceinline__ int row_bytes(int head_size) { return head_size + 4; }
  static __device__ __forceinline__ float scale(const uint8_t* row, int head_size) {
    return *reinterpret_cast<const float*>(row + head_size);
  }
  static __device__ __forceinline__ Chunk load(const uint8_t* row, int column) {
    const unsigned* at = reinterpret_cast<const unsigned*>(row + column);
    return make_uint2(at[0], at[1]);
  }
  // A byte b of 0 to 255 under the exponent of 2^23 is the float 2^23 + b: one permutation and one
  // difference, where a conversion has a quarter of their rate.
  static __device__ __forceinline__ void widen(const Chunk& chunk, float (&to)[kChunk]) {
    constexpr unsigned kTwo23 = 0x4b000000;
    const unsigned words[] = {chunk.x ^ 0x80808080, chunk.y ^ 0x80808080};  // codes + 128
#pragma unroll
    for (int i = 0; i < kChunk; i++) {
      const unsigned bits = __byte_perm(words[i / 4], kTwo23, 0x7650 + i % 4);
      to[i] = __uint_as_float(bits) - (0x1p23f + 128);
    }
  }
  static __device__ __forceinline__ void store(uint8_t* row, int column, float a, float b,
                                               float inverse) {
    const unsigned low = round_to_code(a, inverse) & 0xff, high = round_to_code(b, inverse) & 0xff;
    *reinterpret_cast<uint16_t*>(row + column) = static_cast<uint16_t>(low | high << 8);
  }
};

}  // namespace lowmoe
