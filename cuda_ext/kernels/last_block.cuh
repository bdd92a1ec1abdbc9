// Work that waits for other blocks of the same launch, without anybody waiting: each block leaves
// what it found in memory and counts itself, and the last to come goes on with what all have left.
#pragma once

#include "portable.cuh"

namespace lowmoe {

// Whether this block is the last of n_blocks; the same in all its threads. All of them must call
// it, after they have written what the last block is to read; to that one everything is visible
// then.
//   arrived  0 before the first block comes, and again after the last one: for the next launch
// The fences of one thread stand for those of the block: what came before a barrier comes before
// whatever comes after it (PTX ISA, memory consistency model, causality order).
__device__ __forceinline__ bool is_last_block(int* arrived, int n_blocks) {
  __shared__ int is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(arrived, 1) == n_blocks - 1;
    __threadfence();
    if (is_last) *arrived = 0;
  }
  __syncthreads();
  return is_last;
}

}  // namespace lowmoe
