// The tokens of each expert: assignments sorted by expert, those of one expert in their order.
//
// A counting sort in one block: each warp counts its part of the assignments by expert, all warps'
// counts become beginnings, and each warp puts its own in their places. No atomic operation: the
// result has one order only.
#pragma once

#include "round.cuh"

namespace lowmoe {

// The lanes of the warp whose number is this lane's; numbers are below `limit`. One vote for each
// bit: as fast as match.any where numbers differ, and of a length that does not depend on them.
__device__ __forceinline__ unsigned lanes_alike(int number, int limit) {
  unsigned alike = kWholeWarp;
  for (int bit = 1; bit < limit; bit *= 2) {
    const unsigned with = __ballot_sync(kWholeWarp, number & bit);
    alike &= number & bit ? with : ~with;
  }
  return alike;
}

// The sum of what threads up to and with this one bring; all threads of the block must call it.
__device__ __forceinline__ unsigned sum_up_to(unsigned mine) {
  __shared__ unsigned of_warps[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  for (int apart = 1; apart < 32; apart *= 2) {
    const unsigned before = __shfl_up_sync(kWholeWarp, mine, apart);
    if (lane >= apart) mine += before;
  }
  if (lane == 31) of_warps[warp] = mine;
  __syncthreads();
  const unsigned before_me = lane < n_warps && lane < warp ? of_warps[lane] : 0;
  return mine + __reduce_add_sync(kWholeWarp, before_me);
}

// A warp's part of the assignments: whole rows of 32, in order.
struct Rows {
  int first, end;  // assignments

  __device__ __forceinline__ Rows(int n_assignments) {
    const int n_rows = (n_assignments + 31) / 32, n_warps = blockDim.x / 32;
    const int of_each = 32 * ((n_rows + n_warps - 1) / n_warps), warp = threadIdx.x / 32;
    first = min(warp * of_each, n_assignments);
    end = min(first + of_each, n_assignments);
  }
};

// Goes through a warp's rows in order; counts [n_experts] is its own. Calls f(assignment, expert,
// count) for each, with what counts had of its expert when it came, and counts it.
template <class F>
__device__ __forceinline__ void count_rows(const int* ids, int n_assignments, int n_experts,
                                           uint16_t* counts, F f) {
  const Rows rows(n_assignments);
  const int lane = threadIdx.x % 32;
  for (int row = rows.first; row < rows.end; row += 32) {
    const bool is_there = row + lane < rows.end;
    const int expert = is_there ? ids[row + lane] : n_experts;
    const unsigned alike = lanes_alike(expert, n_experts + 1);
    const int before = __popc(alike & ((1u << lane) - 1));
    const int count = is_there ? counts[expert] + before : 0;
    __syncwarp();
    const bool is_last = alike >> lane == 1;
    if (is_there && is_last) counts[expert] = static_cast<uint16_t>(count + 1);
    __syncwarp();
    if (is_there) f(row + lane, expert, count);
  }
}

// All threads of the block must call it; it has kWarps warps at most, and as many threads as there
// are experts at least.
//   ids     [n_assignments], each below n_experts; up to 2048 for each warp, 65536 in all
//   first   [n_experts + 1]: where each expert begins; order  [n_assignments]: who is where
//   active  [n_experts + 1]: how many experts have any, then which, ascending; no more is written
// What the warps before one have of an expert is below 65536, so 16 bits hold it: 32 warps need
// 32 KiB of shared memory.
template <int kWarps, int kExperts>
__device__ __forceinline__ void group_assignments(int n_assignments, int n_experts, const int* ids,
                                                  int* first, int* order, int* active) {
  __shared__ uint16_t counts[kWarps][kExperts];
  __shared__ int begins[kExperts];
  const int thread = threadIdx.x, warp = thread / 32, n_warps = blockDim.x / 32;
  for (int w = 0; w < n_warps; w++) {
    if (thread < n_experts) counts[w][thread] = 0;
  }
  __syncthreads();
  count_rows(ids, n_assignments, n_experts, counts[warp], [](int, int, int) {});
  __syncthreads();
  int total = 0;
  if (thread < n_experts) {
    for (int w = 0; w < n_warps; w++) {
      const int of_warp = counts[w][thread];
      counts[w][thread] = total;
      total += of_warp;
    }
  }
  // Both sums at once: up to 65536 assignments in the low bits, up to 512 experts above.
  constexpr unsigned kExpert = 1u << 20;
  const unsigned sums = sum_up_to(total + (total > 0 ? kExpert : 0));
  const int end = sums % kExpert, n_active = sums / kExpert;
  if (thread < n_experts) {
    begins[thread] = end - total;
    first[thread] = end - total;
    if (total > 0) active[n_active] = thread;
  }
  __syncthreads();
  if (thread == n_experts - 1) first[n_experts] = n_assignments, active[0] = n_active;
  count_rows(
      ids, n_assignments, n_experts, counts[warp],
      [&](int assignment, int expert, int count) { order[begins[expert] + count] = assignment; });
}

}  // namespace lowmoe
