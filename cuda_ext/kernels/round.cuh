// Rounds to int8: tokens for products with trellis planes, heads for the cache. The same bits as
// quant/activations.py and lowmoe/kernels/cpu/vector_round.h give for the same input.
//
// A warp takes one scale group of 128 columns, four to a lane: so columns 1 and 2 apart meet inside
// a lane, those 4 to 64 apart by shuffles, and a whole group needs neither shared memory nor a
// barrier.
#pragma once

#include "portable.cuh"

namespace lowmoe {

inline constexpr int kScaleColumns = 128;
inline constexpr int kLaneColumns = kScaleColumns / 32;
inline constexpr unsigned kWholeWarp = ~0u;

// The same in all lanes, always added up in this order.
__device__ __forceinline__ float sum_of_warp(float x) {
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(kWholeWarp, x, apart);
  return x;
}

// The largest power of two up to 128 that divides n_in, as in quant/transform.py.
__device__ constexpr int hadamard_size(int n_in) {
  const int power = n_in & -n_in;
  return power < kScaleColumns ? power : kScaleColumns;
}

// 1 / sqrt(size) rounded to float32, for a power of two up to 128.
__device__ __forceinline__ float hadamard_factor(int size) {
  constexpr float kRootHalf = 0x1.6a09e6p-1f;
  const int power = 31 - __clz(size);
  const float even = __uint_as_float((127 - power / 2) << 23);  // 2^-(power / 2)
  return power % 2 ? even * kRootHalf : even;
}

// x' = H x of one group, in place: lane l holds columns 4 l to 4 l + 3.
//   hadamard  1, 2, 4, ..., 128: columns of a block
// All 32 lanes must call it. Sums and differences for the strides 1, 2, 4, ... in turn, each
// rounded, at last one product: the order of quant/activations.py.
__device__ __forceinline__ void turn_group(float (&x)[kLaneColumns], int hadamard) {
  if (hadamard > 1) {
    const float a = x[0], b = x[1], c = x[2], d = x[3];
    x[0] = a + b, x[1] = a - b, x[2] = c + d, x[3] = c - d;
  }
  if (hadamard > 2) {
    const float a = x[0], b = x[1], c = x[2], d = x[3];
    x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
  }
#pragma unroll
  for (int apart = 1; apart < 32; apart *= 2) {
    if (apart * kLaneColumns >= hadamard) break;
    // The lane of the lower column adds, the other subtracts its own from what it is given: as a
    // product with 1 or -1 is exact, fmaf rounds like a sum.
    const float sign = threadIdx.x & apart ? -1.0f : 1.0f;
    for (float& mine : x) mine = fmaf(sign, mine, __shfl_xor_sync(kWholeWarp, mine, apart));
  }
  const float factor = hadamard_factor(hadamard);
  for (float& mine : x) mine *= factor;
}

struct RoundingSteps {
  float scale;    // what a code stands for
  float inverse;  // codes in what is rounded; 0 makes all codes 0
};

// For numbers whose largest magnitude has these bits. As integers, magnitudes are in order, NaN
// above infinity.
__device__ __forceinline__ RoundingSteps rounding_steps(unsigned largest_bits) {
  constexpr unsigned kInfinity = 0x7f800000, kNan = 0x7fffffff;
  constexpr float kSilence = 0x1p-100f, kMostCode = 127;
  if (largest_bits >= kInfinity) return {__uint_as_float(kNan), 0};
  const float largest = __uint_as_float(largest_bits);
  if (largest < kSilence) return {0, 0};
  return {largest / kMostCode, kMostCode / largest};
}

__device__ __forceinline__ unsigned magnitude_bits(float x) {
  return __float_as_uint(x) & 0x7fffffff;
}

// To the nearest, ties to even; 0 where inverse is, whatever x.
__device__ __forceinline__ int round_to_code(float x, float inverse) {
  return inverse == 0 ? 0 : __float2int_rn(x * inverse);
}

// One warp turns and rounds the 128 columns of one scale group; all 32 lanes must call it.
//   x         columns 4 l to 4 l + 3 of lane l, already times d; 0 beyond the matrix
//   hadamard  1, 2, 4, ..., 128: columns of a Hadamard block
//   scale     becomes the group's, the same in all lanes
// Returns the lane's four int8 codes, column 4 l in the low byte.
__device__ __forceinline__ unsigned round_group(const float (&x)[kLaneColumns], int hadamard,
                                                float* scale) {
  float turned[kLaneColumns] = {x[0], x[1], x[2], x[3]};
  turn_group(turned, hadamard);
  unsigned largest = 0;
  for (float mine : turned) {
    const unsigned bits = magnitude_bits(mine);
    largest = bits > largest ? bits : largest;
  }
  const RoundingSteps steps = rounding_steps(__reduce_max_sync(kWholeWarp, largest));
  *scale = steps.scale;
  unsigned codes = 0;
  for (int i = 0; i < kLaneColumns; i++) {
    codes |= (round_to_code(turned[i], steps.inverse) & 0xffu) << (8 * i);
  }
  return codes;
}

}  // namespace lowmoe
