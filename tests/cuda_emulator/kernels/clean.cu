// Kernels without a bug: no detector may report anything.
#include "portable.cuh"

namespace lowmoe {

constexpr int kThreads = 64;

template <int N>
__device__ void rotate(const float* x, float* y, int by) {
  __shared__ float s[N];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[(threadIdx.x + by) % N];
}

// y[i] = x[(i + by) % 64] in every block's own 64 places.
extern "C" __global__ void rotated(const float* x, float* y, int by) {
  rotate<kThreads>(x, y + blockIdx.x * kThreads, by);
}
EXPORT_KERNEL(rotated, rotated)

// y[i] = the sum over blocks b, ascending, of (b + 1) * x[i]: by whoever arrives last, which leaves
// the counter at zero. A fence before the counter, so that who sees the count sees what was stored;
// one after it, so that what is read then was not read before.
extern "C" __global__ void sum_by_last(const float* x, float* y, float* parts, int* n_arrived) {
  __shared__ bool last;
  const int n = static_cast<int>(gridDim.x);
  parts[blockIdx.x * kThreads + threadIdx.x] = static_cast<float>(blockIdx.x + 1) * x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(n_arrived, 1) == n - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  float sum = 0.0f;
  for (int b = 0; b < n; b++) sum += parts[b * kThreads + threadIdx.x];
  y[threadIdx.x] = sum;
  if (threadIdx.x == 0) *n_arrived = 0;
}
EXPORT_KERNEL(sum_by_last, sum_by_last)

// y = x through two stages of 16 floats, read by warps that did not copy them. Threads share shared
// memory within a warp after __syncwarp alone.
extern "C" __global__ void staged_copy(const float* x, float* y, int n) {
  __shared__ __align__(16) float stages[2][2][16];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float (*mine)[16] = stages[warp];
  const auto begin = [&](int k) {
    if (k < n && lane < 4) cp_async16(&mine[k / 16 % 2][lane * 4], x + k + lane * 4);
    cp_async_commit();
  };
  begin(0);
  for (int k = 0; k < n; k += 16) {
    begin(k + 16);
    cp_async_wait<1>();
    __syncwarp();
    if (lane < 16) y[warp * n + k + lane] = mine[k / 16 % 2][15 - lane];
    __syncwarp();
  }
}
EXPORT_KERNEL(staged_copy, staged_copy)

}  // namespace lowmoe
