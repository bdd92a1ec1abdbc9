// The experts of each token, and the tokens of each expert.

#include "choice.cuh"
#include "groups.cuh"
#include "last_block.cuh"
#include "tokens.cuh"

namespace lowmoe {

// Scores of one expert, for up to kTokens tokens that were normed, by one block.
template <int kTokens>
__device__ __forceinline__ void score(const float* normed, const float* router, int n_tokens,
                                      int n_hidden, float (&scores)[kTokens]) {
  __shared__ float shared[kTokens][32];
  for (float& sum : scores) sum = 0;
#pragma unroll 4
  for (int i = kLaneColumns * threadIdx.x; i < n_hidden; i += kLaneColumns * blockDim.x) {
    float w[kLaneColumns], x[kLaneColumns];
    load_columns(router, i, n_hidden, w);
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
      if (t >= n_tokens) break;
      load_columns(normed + t * n_hidden, i, n_hidden, x);
      for (int j = 0; j < kLaneColumns; j++) scores[t] = fmaf(w[j], x[j], scores[t]);
    }
  }
  sums_of_block(scores, shared);
}

// The same of one token, normed on the way with the bits of norm_round_wide in a block of as many
// warps. What comes from far away, the router, is asked for first.
template <int kGroups>
__device__ __forceinline__ float norm_and_score(const float* x, const float* weight, float epsilon,
                                                const float* router, int n_hidden) {
  __shared__ float shared[1][32];
  float of_x[kGroups][kLaneColumns], of_weight[kGroups][kLaneColumns], w[kGroups][kLaneColumns];
#pragma unroll
  for (int k = 0; k < kGroups; k++) {
    const int column = Norm::column_of(threadIdx.x / 32 + k * (blockDim.x / 32));
    load_columns(router, column, n_hidden, w[k]);
    load_columns(x, column, n_hidden, of_x[k]);
    load_columns(weight, column, n_hidden, of_weight[k]);
  }
  float squares = 0, score[1] = {};
#pragma unroll
  for (int k = 0; k < kGroups; k++) squares = add_squares(of_x[k], squares);
  const float scale = norm_scale(sum_of_block(squares), n_hidden, epsilon);
#pragma unroll
  for (int k = 0; k < kGroups; k++) {
    for (int i = 0; i < kLaneColumns; i++) {
      score[0] = fmaf(of_x[k][i] * scale * of_weight[k][i], w[k][i], score[0]);
    }
  }
  sums_of_block(score, shared);
  return score[0];
}

// What the block of one expert does with its scores: leaves them; the last one chooses, a warp a
// token. Returns whether it was the last.
template <int kTokens>
__device__ __forceinline__ bool choose_in_last(const float (&scores)[kTokens], int n_tokens,
                                               float* logits, const Choice& choice, int* arrived) {
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int t = 0; t < kTokens; t++) {
    if (t < n_tokens && static_cast<int>(threadIdx.x) == t) {
      logits[t * choice.n_experts + blockIdx.x] = scores[t];
    }
  }
  if (!is_last_block(arrived, choice.n_experts)) return false;
  float* const likely = logits + n_tokens * choice.n_experts;
  const int first = warp * choice.n_experts;
  if (warp < n_tokens) choice.of_token(logits + first, likely + first, warp);
  return true;
}

}  // namespace lowmoe

// What a kernel is given of a Router, see choice.cuh.
#define ROUTER_PARAMETERS                                                                  \
  const float *bias, const float *choice_bias, int sigmoid, int renormalize, int n_groups, \
      int n_groups_active, float scale
#define ROUTER                                                                          \
  lowmoe::Router {                                                                      \
    bias, choice_bias, sigmoid != 0, renormalize != 0, n_groups, n_groups_active, scale \
  }

// Scores and chooses for a few tokens: logits[t][e] = sum over n of normed[t][n] * router[e][n].
//   grid    (n_experts); block  256, so that there is a warp for each token
//   normed  [n_tokens][n_hidden], n_tokens up to kTokens; router  [n_experts][n_hidden]
//   logits  [2][n_tokens][n_experts], anything before; afterwards logits, and what is likely of
//           experts unless that is a softmax
//   arrived [1], 0 before and after
#define ROUTE(kTokens)                                                                            \
  extern "C" __global__ void __launch_bounds__(256, 4) route_##kTokens(                           \
      const float* normed, const float* router, int n_tokens, int n_hidden, float* logits,        \
      int n_experts, int n_active, ROUTER_PARAMETERS, float* weights, int* ids, int* arrived) {   \
    float scores[kTokens];                                                                        \
    const size_t row = static_cast<size_t>(blockIdx.x) * n_hidden;                                \
    lowmoe::score(normed, router + row, n_tokens, n_hidden, scores);                              \
    lowmoe::choose_in_last(scores, n_tokens, logits, {n_experts, n_active, ROUTER, weights, ids}, \
                           arrived);                                                              \
  }                                                                                               \
  EXPORT_KERNEL(route_##kTokens, route_##kTokens)

ROUTE(1)
ROUTE(8)

// All that one token needs between attention and experts: the norm, its rounding in the basis of d,
// the choice and the groups.
//   grid    (n_experts + 1): a block for each expert's score, one that rounds; or + 2: one that
//           rounds in the basis of shared_d too, for an expert of all tokens
//   block   512, and n_hidden up to 512 * 4 * kGroups
//   arrays  as for norm_round, route and group, of one token
#define NORM_ROUTE(kGroups)                                                                        \
  extern "C" __global__ void __launch_bounds__(512) norm_route_##kGroups(                          \
      const float* x, const float* weight, float epsilon, const __half* d, int n_hidden,           \
      float* normed, int8_t* codes, float* scales, const float* router, float* logits,             \
      int n_experts, int n_active, ROUTER_PARAMETERS, float* weights, int* ids, int* first,        \
      int* order, int* active, const __half* shared_d, int8_t* shared_codes, float* shared_scales, \
      int* arrived) {                                                                              \
    using namespace lowmoe;                                                                        \
    const int expert = static_cast<int>(blockIdx.x);                                               \
    if (expert >= n_experts) {                                                                     \
      const bool is_shared = expert > n_experts;                                                   \
      const RoundedTokens to{is_shared ? shared_codes : codes, is_shared ? shared_scales : scales, \
                             n_hidden};                                                            \
      norm_round_wide(                                                                             \
          {x, weight, is_shared ? shared_d : d, epsilon, is_shared ? nullptr : normed, to, 0});    \
      return;                                                                                      \
    }                                                                                              \
    const float* row = router + static_cast<size_t>(expert) * n_hidden;                            \
    const float score[1] = {norm_and_score<kGroups>(x, weight, epsilon, row, n_hidden)};           \
    const Choice choice{n_experts, n_active, ROUTER, weights, ids};                                \
    if (!choose_in_last(score, 1, logits, choice, arrived)) return;                                \
    __syncthreads();                                                                               \
    group_assignments<16, kMostExperts>(n_active, n_experts, ids, first, order, active);           \
  }                                                                                                \
  EXPORT_KERNEL(norm_route_##kGroups, norm_route_##kGroups)

NORM_ROUTE(1)
NORM_ROUTE(2)
NORM_ROUTE(4)

// Chooses for any number of tokens by their logits [n_tokens][n_experts]; likely as they are.
//   grid  (tokens / warps of a block, rounded up)
extern "C" __global__ void __launch_bounds__(256)
    choose(int n_tokens, const float* logits, float* likely, int n_experts, int n_active,
           ROUTER_PARAMETERS, float* weights, int* ids) {
  const int token = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (token >= n_tokens) return;
  lowmoe::Choice{n_experts, n_active, ROUTER, weights, ids}.of_token(
      logits + static_cast<size_t>(token) * n_experts,
      likely + static_cast<size_t>(token) * n_experts, token);
}
EXPORT_KERNEL(choose, choose)

// The same by a softmax of the logits where experts that are there are preferred, see Nearness:
// weights are those of the logits.
//   parts  [n_experts][kMaxPlanes]
extern "C" __global__ void __launch_bounds__(256)
    choose_near(int n_tokens, const float* logits, const int64_t* parts, float boost, int n_experts,
                int n_active, int renormalize, float* weights, int* ids) {
  const int token = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (token >= n_tokens) return;
  const lowmoe::Router plain{nullptr, nullptr, false, renormalize != 0, 1, 1, 1};
  lowmoe::Choice{n_experts, n_active, plain, weights, ids}.of_token(
      logits + static_cast<size_t>(token) * n_experts, nullptr, token,
      lowmoe::Nearness{parts, boost});
}
EXPORT_KERNEL(choose_near, choose_near)

// Groups up to 65536 assignments, in one block; see group_assignments.
extern "C" __global__ void __launch_bounds__(1024)
    group(int n_assignments, int n_experts, const int* ids, int* first, int* order, int* active) {
  lowmoe::group_assignments<32, lowmoe::kMostExperts>(n_assignments, n_experts, ids, first, order,
                                                      active);
}
EXPORT_KERNEL(group, group)
