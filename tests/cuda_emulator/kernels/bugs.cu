// Kernels of 64 threads with one bug each, that somebody must find: see test_detectors.py, which
// tells bugs apart by the lines that end in "// BUG".
#include "portable.cuh"

namespace lowmoe {

constexpr int kThreads = 64;

// In a template, where g++ treats static data differently.
template <int N>
__device__ float* shared_floats() {
  __shared__ __align__(16) float floats[N];
  return floats;
}

// y[i] = x[i + 32], without waiting for who writes it.
extern "C" __global__ void missing_barrier(const float* x, float* y) {
  float* s = shared_floats<kThreads>();
  s[threadIdx.x] = x[threadIdx.x];                    // BUG
  y[threadIdx.x] = s[(threadIdx.x + 32) % kThreads];  // BUG
}
EXPORT_KERNEL(missing_barrier, missing_barrier)

// y[i] = x[i / 2]: right in the forward order, in which the thread read from is always through.
extern "C" __global__ void order_race(const float* x, float* y) {
  float* s = shared_floats<kThreads>();
  s[threadIdx.x] = x[threadIdx.x];      // BUG
  y[threadIdx.x] = s[threadIdx.x / 2];  // BUG
}
EXPORT_KERNEL(order_race, order_race)

// y[i] = x[i / 2], but who has read writes again before all have.
extern "C" __global__ void write_after_read(const float* x, float* y) {
  float* s = shared_floats<kThreads>();
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x / 2];  // BUG
  s[threadIdx.x] = -1.0f;               // BUG
}
EXPORT_KERNEL(write_after_read, write_after_read)

// A shuffle brings values, but does not order memory: y[i] = x[i ^ 1].
extern "C" __global__ void shuffle_for_barrier(const float* x, float* y) {
  float* s = shared_floats<kThreads>();
  s[threadIdx.x] = x[threadIdx.x];  // BUG
  const int other = __shfl_xor_sync(~0u, static_cast<int>(threadIdx.x), 1);
  y[threadIdx.x] = s[other];  // BUG
}
EXPORT_KERNEL(shuffle_for_barrier, shuffle_for_barrier)

// All blocks add to the same sums.
extern "C" __global__ void blocks_add(const float* x, float* y) {
  y[threadIdx.x] += x[threadIdx.x];  // BUG
}
EXPORT_KERNEL(blocks_add, blocks_add)

// The last block to arrive adds up what all have stored: y[i] = gridDim.x * x[i], but nothing makes
// sure that what it counted as stored can be seen.
extern "C" __global__ void missing_fence(const float* x, float* y, float* parts, int* n_arrived) {
  __shared__ bool last;
  parts[blockIdx.x * kThreads + threadIdx.x] = x[threadIdx.x];  // BUG
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(n_arrived, 1) == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  if (!last) return;
  float sum = 0.0f;
  for (int b = 0; b < static_cast<int>(gridDim.x); b++)
    sum += parts[b * kThreads + threadIdx.x];  // BUG
  y[threadIdx.x] = sum;
}
EXPORT_KERNEL(missing_fence, missing_fence)

extern "C" __global__ void divergent_barrier(const float* x, float* y) {
  if (threadIdx.x < 40) __syncthreads();
  y[threadIdx.x] = x[threadIdx.x];
}
EXPORT_KERNEL(divergent_barrier, divergent_barrier)

extern "C" __global__ void missing_lane(const float* x, float* y) {
  float v = x[threadIdx.x];
  if (threadIdx.x != 5) v += __shfl_xor_sync(~0u, v, 1);
  y[threadIdx.x] = v;
}
EXPORT_KERNEL(missing_lane, missing_lane)

extern "C" __global__ void lane_outside_its_mask(const float* x, float* y) {
  y[threadIdx.x] = __shfl_sync(0x0000ffffu, x[threadIdx.x], 0);
}
EXPORT_KERNEL(lane_outside_its_mask, lane_outside_its_mask)

extern "C" __global__ void two_operations_meet(const float* x, float* y) {
  const float v = x[threadIdx.x];
  y[threadIdx.x] = threadIdx.x % 2 ? __shfl_xor_sync(~0u, v, 2) : __shfl_down_sync(~0u, v, 2);
}
EXPORT_KERNEL(two_operations_meet, two_operations_meet)

extern "C" __global__ void shared_write_beyond(const float* x, float* y) {
  float* s = shared_floats<kThreads>();
  s[threadIdx.x + 1] = x[threadIdx.x];  // BUG
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
EXPORT_KERNEL(shared_write_beyond, shared_write_beyond)

extern "C" __global__ void shared_read_beyond(const float* x, float* y) {
  __shared__ float s[kThreads];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  const float* at = s + threadIdx.x;
  y[threadIdx.x] = at[1];  // BUG
}
EXPORT_KERNEL(shared_read_beyond, shared_read_beyond)

extern "C" __global__ void dynamic_shared_beyond(const float* x, float* y) {
  DYNAMIC_SHARED(float, s);
  s[threadIdx.x + 1] = x[threadIdx.x];  // BUG
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
EXPORT_KERNEL(dynamic_shared_beyond, dynamic_shared_beyond)

extern "C" __global__ void global_read_beyond(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x + 1];  // BUG
}
EXPORT_KERNEL(global_read_beyond, global_read_beyond)

extern "C" __global__ void global_write_beyond(const float* x, float* y) {
  y[threadIdx.x + 1] = x[threadIdx.x];  // BUG
}
EXPORT_KERNEL(global_write_beyond, global_write_beyond)

extern "C" __global__ void misaligned_load(const float* x, float* y) {
  if (threadIdx.x >= 8) return;
  const auto* four = reinterpret_cast<const float4*>(x + 1) + threadIdx.x;
  y[threadIdx.x] = four->x;  // BUG
}
EXPORT_KERNEL(misaligned_load, misaligned_load)

extern "C" __global__ void signed_overflow(const float* x, float* y) {
  int n = 2147483647 - 32 + static_cast<int>(x[threadIdx.x] * 0.0f);
  n += static_cast<int>(threadIdx.x);  // BUG
  y[threadIdx.x] = static_cast<float>(n);
}
EXPORT_KERNEL(signed_overflow, signed_overflow)

// y[i] = x[i] for all but thread 0, which nobody has written.
extern "C" __global__ void unwritten_shared(const float* x, float* y) {
  float* s = shared_floats<kThreads>();
  if (threadIdx.x) s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
EXPORT_KERNEL(unwritten_shared, unwritten_shared)

// y[i] = the larger of x[0] and x[i], but of nothing at all for i = 0; a maximum drops NaN.
extern "C" __global__ void unwritten_maximum(const float* x, float* y) {
  DYNAMIC_SHARED(float, s);
  if (threadIdx.x) s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = fmaxf(x[0], s[threadIdx.x]);
}
EXPORT_KERNEL(unwritten_maximum, unwritten_maximum)

// y[i] = x[i] through a copy that nobody waits for.
extern "C" __global__ void missing_wait(const float* x, float* y) {
  float* s = shared_floats<kThreads>();
  if (threadIdx.x < kThreads / 4) cp_async16(s + threadIdx.x * 4, x + threadIdx.x * 4);
  cp_async_commit();
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
EXPORT_KERNEL(missing_wait, missing_wait)

// y[i] = x[i], but the next copy into the same place begins before all have read.
extern "C" __global__ void copy_before_read(const float* x, float* y) {
  float* s = shared_floats<kThreads>();
  if (threadIdx.x < kThreads / 4) cp_async16(s + threadIdx.x * 4, x + threadIdx.x * 4);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  if (threadIdx.x == 7) cp_async16(s + 32, x);  // BUG
  cp_async_commit();
  y[threadIdx.x] = s[threadIdx.x];  // BUG
  cp_async_wait<0>();
}
EXPORT_KERNEL(copy_before_read, copy_before_read)

extern "C" __global__ void misaligned_copy(const float* x, float* y) {
  float* s = shared_floats<kThreads>();
  if (threadIdx.x == 0) cp_async16(s, x + 1);
  y[threadIdx.x] = x[threadIdx.x];
}
EXPORT_KERNEL(misaligned_copy, misaligned_copy)

}  // namespace lowmoe
