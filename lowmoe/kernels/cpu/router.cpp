#include "lowmoe/kernels/cpu/router.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace lowmoe {

namespace {

// Puts expert e among the best so far, ids[0..n_found), of which n_active are kept; returns how
// many there are then.
int insert(const float* logits, int64_t e, int n_active, int n_found, int64_t* ids) {
  if (n_found == n_active && !(logits[e] > logits[ids[n_found - 1]])) return n_found;
  int place = n_found < n_active ? n_found : n_active - 1;
  const int n_now = place + 1 > n_found ? place + 1 : n_found;
  for (; place > 0 && logits[e] > logits[ids[place - 1]]; place--) ids[place] = ids[place - 1];
  ids[place] = e;
  return n_now;
}

}  // namespace

void route_softmax(const float* logits, size_t n_experts, int n_active, bool renormalize,
                   float* weights, int64_t* ids) {
  int n_found = 0;
  bool has_nan = false;
  for (size_t e = 0; e < n_experts; e++) {
    has_nan |= std::isnan(logits[e]);
    n_found = insert(logits, static_cast<int64_t>(e), n_active, n_found, ids);
  }
  const float top = logits[ids[0]];
  float total = 0;
  for (int k = 0; k < n_active; k++) {
    weights[k] = std::exp(logits[ids[k]] - top);
    total += weights[k];
  }
  if (!renormalize) {
    total = 0;
    for (size_t e = 0; e < n_experts; e++) total += std::exp(logits[e] - top);
  }
  if (has_nan) total = std::numeric_limits<float>::quiet_NaN();
  for (int k = 0; k < n_active; k++) weights[k] /= total;
}

namespace {

// Logits become what experts are weighed by.
void make_likely(const Router& router, size_t n_experts, float* logits) {
  if (router.sigmoid) {
    for (size_t e = 0; e < n_experts; e++) logits[e] = 1.0f / (1.0f + std::exp(-logits[e]));
    return;
  }
  float top = logits[0], total = 0;
  for (size_t e = 1; e < n_experts; e++) top = logits[e] > top ? logits[e] : top;
  for (size_t e = 0; e < n_experts; e++) {
    logits[e] = std::exp(logits[e] - top);
    total += logits[e];
  }
  for (size_t e = 0; e < n_experts; e++) logits[e] /= total;
}

// Experts of groups that are not among the best get -infinity: by their two highest, or after a
// softmax by their highest.  sums: [n_groups]
void close_groups(const Router& router, size_t n_experts, float* choice, float* sums) {
  constexpr float kClosed = -std::numeric_limits<float>::infinity();
  const size_t size = n_experts / router.n_groups;
  for (size_t g = 0; g < router.n_groups; g++) {
    const bool is_pair = router.sigmoid && size > 1;
    float best = kClosed, second = is_pair ? kClosed : 0.0f;
    for (size_t e = g * size; e < (g + 1) * size; e++) {
      if (choice[e] > best) {
        second = is_pair ? best : second;
        best = choice[e];
      } else if (is_pair && choice[e] > second) {
        second = choice[e];
      }
    }
    sums[g] = best + second;
  }
  for (size_t g = 0; g < router.n_groups; g++) {
    size_t n_better = 0;
    for (size_t h = 0; h < router.n_groups; h++) {
      n_better += sums[h] > sums[g] || (sums[h] == sums[g] && h < g);
    }
    if (n_better < router.n_groups_active) continue;
    for (size_t e = g * size; e < (g + 1) * size; e++) choice[e] = kClosed;
  }
}

// Logits of a given deviation, of n_experts - 1 degrees of freedom.
void spread(const Router& router, size_t n_experts, float* logits) {
  float mean = 0, square = 0;
  for (size_t e = 0; e < n_experts; e++) mean += logits[e] / static_cast<float>(n_experts);
  for (size_t e = 0; e < n_experts; e++) square += (logits[e] - mean) * (logits[e] - mean);
  const float deviation = std::sqrt(square / static_cast<float>(n_experts - 1));
  for (size_t e = 0; e < n_experts; e++) logits[e] = logits[e] / (deviation / router.spread);
}

// The highest, then the highest of the others, each weighed among those left that are close to it.
void mix_sparsely(const Router& router, size_t n_experts, const float* logits, float* weights,
                  int64_t* ids) {
  bool has_nan = false;
  for (size_t e = 0; e < n_experts; e++) has_nan |= std::isnan(logits[e]);
  for (int k = 0; k < router.n_active; k++) {
    const auto is_left = [&](size_t e) { return k == 0 || static_cast<int64_t>(e) != ids[0]; };
    int64_t best = -1;
    for (size_t e = 0; e < n_experts; e++) {
      if (is_left(e) && (best < 0 || logits[e] > logits[best])) best = static_cast<int64_t>(e);
    }
    const float top = logits[best];
    float total = 0;
    for (size_t e = 0; e < n_experts; e++) {
      const float size = std::max(std::abs(logits[e]), top);
      if (is_left(e) && !((top - logits[e]) / size > 2 * router.jitter)) {
        total += std::exp(logits[e] - top);
      }
    }
    ids[k] = best;
    weights[k] = has_nan ? std::numeric_limits<float>::quiet_NaN() : 1.0f / total;
  }
}

}  // namespace

void route(const Router& router, size_t n_experts, float* logits, float* scratch, float* weights,
           int64_t* ids) {
  if (router.spread > 0) spread(router, n_experts, logits);
  if (router.jitter > 0) {
    mix_sparsely(router, n_experts, logits, weights, ids);
  } else if (router.is_plain()) {
    route_softmax(logits, n_experts, router.n_active, router.renormalize, weights, ids);
  } else {
    bool has_nan = false;
    for (size_t e = 0; e < n_experts; e++) {
      if (router.bias) logits[e] += router.bias[e];
      has_nan |= std::isnan(logits[e]);
    }
    make_likely(router, n_experts, logits);
    float* choice = scratch;
    for (size_t e = 0; e < n_experts; e++) {
      choice[e] = logits[e] * (router.preference ? router.preference[e] : 1.0f) +
                  (router.choice_bias ? router.choice_bias[e] : 0.0f);
    }
    if (router.n_groups_active < router.n_groups) {
      close_groups(router, n_experts, choice, scratch + n_experts);
    }
    int n_found = 0;
    for (size_t e = 0; e < n_experts; e++) {
      n_found = insert(choice, static_cast<int64_t>(e), router.n_active, n_found, ids);
    }
    float total = 0;
    for (int k = 0; k < router.n_active; k++) total += weights[k] = logits[ids[k]];
    // The least that torch divides by, too.
    const float divisor = router.renormalize ? total + 1e-20f : 1.0f;
    for (int k = 0; k < router.n_active; k++) {
      weights[k] = has_nan ? std::numeric_limits<float>::quiet_NaN() : weights[k] / divisor;
    }
  }
  for (int k = 0; k < router.n_active; k++) weights[k] *= router.scale;
}

}  // namespace lowmoe
