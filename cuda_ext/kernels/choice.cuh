// The experts of a token, chosen by one warp.
//
// Any NaN among the logits makes all weights NaN, and ids are still different experts.
// 1 <= n_active <= 16, n_active <= n_experts <= 512.
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

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000); }

__device__ __forceinline__ float number_of(unsigned key) {
  constexpr unsigned kSign = 0x80000000;
  return __uint_as_float(key & kSign ? key & ~kSign : ~key);
}

// What experts are chosen and weighed by; lowmoe/kernels/cpu/router.h says the same. `likely` of an
// expert is a softmax over all scores, or its own score's sigmoid. Chosen are those whose likely
// plus choice_bias is highest, of the n_groups_active of n_groups groups whose two highest add up
// to most; weighed they are by likely, over the sum of the chosen ones' if renormalize, times
// scale.
struct Router {
  const float *bias, *choice_bias;  // of scores; [n_experts], or nullptr
  bool sigmoid, renormalize;
  int n_groups, n_groups_active;  // up to 32
  float scale;

  // Then likely is in the order of the scores, which need not become it.
  __device__ bool is_plain() const { return !sigmoid && choice_bias == nullptr; }
};

// Experts that are somewhere count as if their scores were higher by `boost`, for the choice only.
struct Nearness {
  const int64_t* parts;  // [n_experts][kMaxPlanes]: the first is 0 where an expert is not there
  float boost;

  __device__ __forceinline__ float of(int expert, float score) const {
    return parts[expert * layout::kMaxPlanes] != 0 ? score + boost : score;
  }
};

// Nobody is near.
struct Anywhere {
  __device__ __forceinline__ float of(int, float score) const { return score; }
};

struct Choice {
  static constexpr int kEach = kMostExperts / 32;  // of a lane: l, l + 32, ..

  int n_experts, n_active;
  Router router;
  float* weights;  // [tokens][n_active]; ids too
  int* ids;

  // One warp chooses for one token.
  //   logits  [n_experts], which stay
  //   likely  [n_experts], anything before and after
  //   near    of a router that is plain, which then needs no likely
  template <typename Near = Anywhere>
  __device__ __forceinline__ void of_token(const float* logits, float* likely, int token,
                                           const Near& near = {}) const {
    constexpr bool kIsNear = !is_same<Near, Anywhere>;
    const int lane = threadIdx.x % 32;
    const bool is_plain = kIsNear || router.is_plain();
    if (!is_plain) find_likely(logits, likely);
    unsigned keys[kEach];
    bool has_nan = false;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const int expert = i * 32 + lane;
      keys[i] = 0;
      if (expert < n_experts) {
        const float* more = is_plain ? router.bias : router.choice_bias;
        const float choice =
            (is_plain ? logits : likely)[expert] + (more == nullptr ? 0 : more[expert]);
        has_nan |= choice != choice;
        keys[i] = key_of(near.of(expert, choice));
      }
    }
    float top = 0, total = 1;
    if (is_plain) {
      top = number_of(highest(keys));
      if (!router.renormalize) total = kIsNear ? total_of(logits, top) : total_of(keys, top);
    } else if (router.n_groups_active < router.n_groups) {
      close_groups(keys);
    }
    const unsigned chosen = take_highest(keys);  // lane k keeps the k-th
    const bool is_chosen = lane < n_active;
    float weight = 0;
    if (is_chosen) weight = is_plain ? expf(score_of(logits, chosen) - top) : likely[chosen];
    if (router.renormalize) total = sum_of_warp(weight);
    // The least that torch divides by; of a softmax there is always more.
    if (!is_plain && router.renormalize) total += 1e-20f;
    weight /= __any_sync(kWholeWarp, has_nan) ? __uint_as_float(0x7fffffff) : total;
    if (!is_chosen) return;
    weights[token * n_active + lane] = weight * router.scale;
    ids[token * n_active + lane] = static_cast<int>(chosen);
  }

 private:
  __device__ __forceinline__ float score_of(const float* logits, int expert) const {
    return router.bias == nullptr ? logits[expert] : logits[expert] + router.bias[expert];
  }

  // What is likely of experts by their logits. Loops over memory, not over registers: a division
  // has a rare way that takes registers, and unrolled there would be one for each of 16.
  __device__ __forceinline__ void find_likely(const float* logits, float* likely) const {
    const int lane = threadIdx.x % 32;
    float top = minus_infinity(), total = 0;
    if (!router.sigmoid) {
#pragma unroll 1
      for (int e = lane; e < n_experts; e += 32) top = fmaxf(top, score_of(logits, e));
      top = number_of(__reduce_max_sync(kWholeWarp, key_of(top)));
#pragma unroll 1
      for (int e = lane; e < n_experts; e += 32) total += expf(score_of(logits, e) - top);
      total = sum_of_warp(total);
    }
#pragma unroll 1
    for (int e = lane; e < n_experts; e += 32) {
      const float score = score_of(logits, e);
      const float power = expf(router.sigmoid ? -score : score - top);
      likely[e] = (router.sigmoid ? 1 : power) / (router.sigmoid ? 1 + power : total);
    }
    __syncwarp();
  }

  static __device__ __forceinline__ unsigned highest(const unsigned (&keys)[kEach]) {
    unsigned most = 0;
#pragma unroll
    for (int i = 0; i < kEach; i++) most = max(most, keys[i]);
    return __reduce_max_sync(kWholeWarp, most);
  }

  static __device__ __forceinline__ float total_of(const unsigned (&keys)[kEach], float top) {
    float total = 0;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      if (keys[i] != 0) total += expf(number_of(keys[i]) - top);
    }
    return sum_of_warp(total);
  }

  // Experts of groups that are not among the best come below all others.
  __device__ __forceinline__ void close_groups(unsigned (&keys)[kEach]) const {
    const int lane = threadIdx.x % 32, size = n_experts / router.n_groups;
    float sum = 0;  // of the group that has the lane's number
    for (int g = 0; g < router.n_groups; g++) {
      unsigned best = 0, second = 0;
#pragma unroll
      for (int i = 0; i < kEach; i++) {
        if (!is_within(i * 32 + lane, g, size) || keys[i] <= second) continue;
        second = min(best, keys[i]), best = max(best, keys[i]);
      }
      const unsigned first = __reduce_max_sync(kWholeWarp, best);
      const int owner = __ffs(__ballot_sync(kWholeWarp, best == first)) - 1;
      const unsigned next = __reduce_max_sync(kWholeWarp, lane == owner ? second : best);
      if (lane == g) sum = number_of(first) + (next == 0 ? 0 : number_of(next));
    }
    int n_better = 0;
    for (int g = 0; g < router.n_groups; g++) {
      const float other = __shfl_sync(kWholeWarp, sum, g);
      n_better += other > sum || (other == sum && g < lane);
    }
    const unsigned closed = __ballot_sync(kWholeWarp, n_better >= router.n_groups_active);
    const unsigned lowest = key_of(minus_infinity());
    for (int g = 0; g < router.n_groups; g++) {
      if (!(closed >> g & 1)) continue;
#pragma unroll
      for (int i = 0; i < kEach; i++) {
        if (is_within(i * 32 + lane, g, size)) keys[i] = lowest;
      }
    }
  }

  static __device__ __forceinline__ bool is_within(int expert, int group, int size) {
    return expert >= group * size && expert < (group + 1) * size;
  }

  // Highest first, among equals the one of lower id: lane k gets the k-th.
  __device__ __forceinline__ unsigned take_highest(unsigned (&keys)[kEach]) const {
    const int lane = threadIdx.x % 32;
    unsigned chosen = 0;
    for (int k = 0; k < n_active; k++) {
      unsigned best = 0, id = kMostExperts;
#pragma unroll
      for (int i = 0; i < kEach; i++) {
        if (i * 32 >= n_experts) break;
        if (keys[i] > best) best = keys[i], id = i * 32 + lane;
      }
      const unsigned most = __reduce_max_sync(kWholeWarp, best);
      const unsigned first = __reduce_min_sync(kWholeWarp, best == most ? id : kMostExperts);
#pragma unroll
      for (int i = 0; i < kEach; i++) {
        if (first == static_cast<unsigned>(i * 32 + lane)) keys[i] = 0;
      }
      if (lane == k) chosen = first;
    }
    return chosen;
  }

  __device__ __forceinline__ float total_of(const float* logits, float top) const {
    float total = 0;
    for (int e = threadIdx.x % 32; e < n_experts; e += 32) {
      total += expf(score_of(logits, e) - top);
    }
    return sum_of_warp(total);
  }
};

}  // namespace lowmoe
