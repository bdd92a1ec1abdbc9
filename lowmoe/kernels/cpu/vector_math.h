// Sums, norms and activations of float vectors, for any instruction set S of simd_*.h.
#pragma once

#include <cmath>
#include <cstddef>

namespace lowmoe::vector {

// e^x within one unit in the last place, subnormal or not (measured on every 37th float, with and
// without fma: 0.998); 0 and infinity beyond. NaN stays.
template <class S>
typename S::Float exp(typename S::Float x) {
  using Float = typename S::Float;
  // Beyond these e^x is 0 or infinite in float32, and 2^n stays what times_power can do.
  x = S::max(S::all(-104.0f), S::min(S::all(89.0f), x));
  const Float n = S::nearest(x * S::all(0x1.715476p+0f));  // 1 / log 2
  // log 2 in two parts, the first of 15 bits: n times it is exact.
  Float r = S::fma(n, S::all(-0x1.62e4p-1f), x);
  r = S::fma(n, S::all(-0x1.7f7d1cp-20f), r);
  // e^r = 1 + r + r^2 P(r) for |r| <= log(2) / 2: minimax, relative error 3.3e-9 before rounding.
  Float p = S::all(0x1.6ac36cp-10f);
  p = S::fma(p, r, S::all(0x1.123da6p-7f));
  p = S::fma(p, r, S::all(0x1.555858p-5f));
  p = S::fma(p, r, S::all(0x1.55548cp-3f));
  p = S::fma(p, r, S::all(0x1.fffffcp-2f));
  return S::times_power(S::fma(r * r, p, r) + S::all(1.0f), n);
}

template <class S>
float dot(const float* a, const float* b, size_t n) {
  constexpr size_t kChains = 4;  // so many fma in flight at once
  typename S::Float sums[kChains];
  for (auto& sum : sums) sum = S::all(0);
  size_t i = 0;
  for (; i + kChains * S::kLanes <= n; i += kChains * S::kLanes) {
    for (size_t k = 0; k < kChains; k++) {
      sums[k] = S::fma(S::load(a + i + k * S::kLanes), S::load(b + i + k * S::kLanes), sums[k]);
    }
  }
  for (; i + S::kLanes <= n; i += S::kLanes) {
    sums[0] = S::fma(S::load(a + i), S::load(b + i), sums[0]);
  }
  if (i < n) sums[1] = S::fma(S::load_some(a + i, n - i), S::load_some(b + i, n - i), sums[1]);
  return S::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Calls f(load, store, i) for every kLanes of n elements, the last ones with the *_some of S.
template <class S, class F>
void each_lanes(size_t n, F&& f) {
  const auto load = [](const float* from) { return S::load(from); };
  const auto store = [](float* to, typename S::Float x) { S::store(to, x); };
  size_t i = 0;
  for (; i + S::kLanes <= n; i += S::kLanes) f(load, store, i);
  if (i == n) return;
  f([=](const float* from) { return S::load_some(from, n - i); },
    [=](float* to, typename S::Float x) { S::store_some(to, x, n - i); }, i);
}

template <class S>
void rms_norm(const float* x, const float* weight, float epsilon, size_t n, float* y) {
  const float mean_square = dot<S>(x, x, n) / static_cast<float>(n);
  const auto scale = S::all(1.0f / std::sqrt(mean_square + epsilon));
  each_lanes<S>(n, [=](auto load, auto store, size_t i) {
    store(y + i, load(x + i) * scale * load(weight + i));
  });
}

template <class S>
void layer_norm(const float* x, const float* weight, float epsilon, size_t n, float* y) {
  auto sum = S::all(0);
  each_lanes<S>(n, [&](auto load, auto, size_t i) { sum = sum + load(x + i); });
  const auto mean = S::all(S::sum(sum) / static_cast<float>(n));
  each_lanes<S>(n, [=](auto load, auto store, size_t i) { store(y + i, load(x + i) - mean); });
  rms_norm<S>(y, weight, epsilon, n, y);
}

template <class S>
void silu_multiply(const float* gate, const float* up, size_t n, float* y) {
  each_lanes<S>(n, [=](auto load, auto store, size_t i) {
    const auto x = load(gate + i);
    store(y + i, x / (S::all(1.0f) + exp<S>(S::all(0.0f) - x)) * load(up + i));
  });
}

template <class S>
void add_scaled(const float* x, float scale, size_t n, float* y) {
  each_lanes<S>(n, [=](auto load, auto store, size_t i) {
    store(y + i, S::fma(S::all(scale), load(x + i), load(y + i)));
  });
}

template <class S>
void rotate(float* head, const float* cos, const float* sin, size_t size) {
  float* second = head + size / 2;
  each_lanes<S>(size / 2, [=](auto load, auto store, size_t i) {
    const auto a = load(head + i), b = load(second + i), c = load(cos + i), s = load(sin + i);
    store(head + i, a * c - b * s);
    store(second + i, b * c + a * s);
  });
}

}  // namespace lowmoe::vector
