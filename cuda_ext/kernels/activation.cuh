// What is between gate and up of an expert, and down.
#pragma once

#include "portable.cuh"

namespace lowmoe {

// gate * sigmoid(steepness * gate) * (up + shift), with gate kept under limit and up within +-limit
// before; what is no number stays none. 1, 0 and infinity are SwiGLU.
struct Activation {
  float steepness, shift, limit;

  __device__ __forceinline__ float operator()(float gate, float up) const {
    const float g = gate > limit ? limit : gate;
    const float u = up > limit ? limit : up < -limit ? -limit : up;
    return g / (1 + expf(-steepness * g)) * (u + shift);
  }
};

// The biases of a row of weights, or none.
struct Biases {
  const float* of_rows;  // or nullptr

  __device__ __forceinline__ Biases from(size_t row) const {
    return {of_rows == nullptr ? nullptr : of_rows + row};
  }
  __device__ __forceinline__ float operator[](int row) const {
    return of_rows == nullptr ? 0 : of_rows[row];
  }
};

}  // namespace lowmoe
