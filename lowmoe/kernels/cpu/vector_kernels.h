// All of VectorKernels for an instruction set S of simd_*.h.
#pragma once

#include "lowmoe/kernels/cpu/isa.h"
#include "lowmoe/kernels/cpu/vector_attention.h"
#include "lowmoe/kernels/cpu/vector_block.h"
#include "lowmoe/kernels/cpu/vector_math.h"
#include "lowmoe/kernels/cpu/vector_round.h"
#include "lowmoe/kernels/cpu/vector_state.h"

namespace lowmoe::vector {

template <class S>
constexpr VectorKernels kernels() {
  return {rms_norm<S>,      layer_norm<S>,   round_token<S, kMostHadamard>,
          silu_multiply<S>, dot<S>,          add_scaled<S>,
          multiply_rows<S>, rotate<S>,       store_head<S>,
          attend_part<S>,   attend_block<S>, step_state<S>};
}

}  // namespace lowmoe::vector
