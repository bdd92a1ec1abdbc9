// Prompts: what is left to do when all tiles are done. A thread does one number; grid x: tokens, y:
// as many threads' columns as there are.
#include "portable.cuh"

namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int column_of_thread() { return blockIdx.y * kThreads + threadIdx.x; }

}  // namespace

// x [T, H] += the sum over ranks k, from the heaviest on, of  weights [T, K] * outputs [T, K, H],
// from 0; each product fused with its sum.
extern "C" __global__ void __launch_bounds__(kThreads)
    add_experts(const float* outputs, const float* weights, int n_active, int n_hidden, float* x) {
  const size_t token = blockIdx.x;
  const int column = column_of_thread();
  if (column >= n_hidden) return;
  const float* output = outputs + token * n_active * n_hidden + column;
  float sum = 0;
  for (int k = 0; k < n_active; k++) {
    sum = fmaf(weights[token * n_active + k], output[static_cast<size_t>(k) * n_hidden], sum);
  }
  x[token * n_hidden + column] += sum;
}
EXPORT_KERNEL(add_experts, add_experts)

// y [T, n_out] = the sum of a product's parts, from the first on, or += ..
//   parts  [row tile][tile of tokens][n_parts][tile_tokens][256]
extern "C" __global__ void __launch_bounds__(kThreads)
    add_parts(const float* parts, int n_parts, int tile_tokens, int n_out, int add, float* y) {
  const int token = blockIdx.x, n_tokens = gridDim.x, row = column_of_thread();
  if (row >= n_out) return;
  const int token_tiles = (n_tokens + tile_tokens - 1) / tile_tokens;
  const size_t tile = static_cast<size_t>(blockIdx.y) * token_tiles + token / tile_tokens;
  const size_t tile_size = static_cast<size_t>(tile_tokens) * kThreads;
  const float* part =
      parts + tile * n_parts * tile_size + token % tile_tokens * kThreads + threadIdx.x;
  float sum = part[0];
  for (int i = 1; i < n_parts; i++) sum += part[i * tile_size];
  float* to = y + static_cast<size_t>(token) * n_out + row;
  *to = add ? *to + sum : sum;
}
EXPORT_KERNEL(add_parts, add_parts)
