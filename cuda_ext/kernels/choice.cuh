// The experts of a token, chosen by one warp.
//
// Softmax over all n_experts, of which the n_active likeliest are used, heaviest first, among
// equals the one of lower id; lowmoe/kernels/cpu/router.h says the same, also of NaN: any among the
// logits makes all weights NaN, and ids are still different experts. 1 <= n_active <= 16, n_active
// <= n_experts <= 512.
#pragma once

#include "quant/layout.h"
#include "round.cuh"

namespace lowmoe {

template <typename A, typename B>
inline constexpr bool is_same = false;
template <typename A>
inline constexpr bool is_same<A, A> = true;

inline constexpr int kMostExperts = 512;

// Keys are in the order of the numbers: -0 is 0, NaN comes below all. No key is 0.
__device__ __forceinline__ unsigned key_of(float x) {
  constexpr unsigned kSign = 0x80000000, kNan = 1;
  if (x != x) return kNan;
  const unsigned bits = __float_as_uint(x + 0.0f);
  return bits & kSign ? ~bits : bits | kSign;
}

__device__ __forceinline__ float number_of(unsigned key) {
  constexpr unsigned kSign = 0x80000000;
  return __uint_as_float(key & kSign ? key & ~kSign : ~key);
}

// Experts that are somewhere count as if their logits were higher by `boost`, for the choice only.
struct Nearness {
  const int64_t* parts;  // [n_experts][kMaxPlanes]: the first is 0 where an expert is not there
  float boost;

  __device__ __forceinline__ float of(int expert, float logit) const {
    return parts[expert * layout::kMaxPlanes] != 0 ? logit + boost : logit;
  }
};

// Nobody is near.
struct Anywhere {
  __device__ __forceinline__ float of(int, float logit) const { return logit; }
};

struct Choice {
  int n_experts, n_active;
  bool renormalize;
  float* weights;  // [tokens][n_active]; ids too
  int* ids;

  // One warp chooses for one token; lane l has the experts l, l + 32, ..  logits: [n_experts]
  template <typename Near = Anywhere>
  __device__ __forceinline__ void of_token(const float* logits, int token,
                                           const Near& near = {}) const {
    constexpr bool kIsNear = !is_same<Near, Anywhere>;
    constexpr int kEach = kMostExperts / 32;
    const int lane = threadIdx.x % 32;
    unsigned keys[kEach];
    bool has_nan = false;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const int expert = i * 32 + lane;
      keys[i] = 0;
      if (expert < n_experts) {
        const float logit = logits[expert];
        has_nan |= logit != logit;
        keys[i] = key_of(near.of(expert, logit));
      }
    }
    // Lane k keeps the k-th choice.
    unsigned top = 0, chosen_key = 0, chosen_id = 0;
    float total = 0;
    for (int k = 0; k < n_active; k++) {
      unsigned best = 0, id = kMostExperts;
#pragma unroll
      for (int i = 0; i < kEach; i++) {
        if (i * 32 >= n_experts) break;
        if (keys[i] > best) best = keys[i], id = i * 32 + lane;
      }
      const unsigned most = __reduce_max_sync(kWholeWarp, best);
      const unsigned first = __reduce_min_sync(kWholeWarp, best == most ? id : kMostExperts);
      if (k == 0) {
        top = most;
        if (!renormalize) {
          total = kIsNear ? total_of(logits, number_of(top)) : total_of(keys, number_of(top));
        }
      }
#pragma unroll
      for (int i = 0; i < kEach; i++) {
        if (first == static_cast<unsigned>(i * 32 + lane)) keys[i] = 0;
      }
      if (lane == k) chosen_key = most, chosen_id = first;
    }
    float weight = 0;
    if (lane < n_active) {
      weight = expf((kIsNear ? logits[chosen_id] : number_of(chosen_key)) - number_of(top));
    }
    if (renormalize) total = sum_of_warp(weight);
    weight /= __any_sync(kWholeWarp, has_nan) ? __uint_as_float(0x7fffffff) : total;
    if (lane >= n_active) return;
    weights[token * n_active + lane] = weight;
    ids[token * n_active + lane] = static_cast<int>(chosen_id);
  }

 private:
  template <int kEach>
  __device__ __forceinline__ float total_of(const unsigned (&keys)[kEach], float top) const {
    float total = 0;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      if (keys[i] != 0) total += expf(number_of(keys[i]) - top);
    }
    return sum_of_warp(total);
  }

  __device__ __forceinline__ float total_of(const float* logits, float top) const {
    float total = 0;
    for (int e = threadIdx.x % 32; e < n_experts; e += 32) total += expf(logits[e] - top);
    return sum_of_warp(total);
  }
};

}  // namespace lowmoe
