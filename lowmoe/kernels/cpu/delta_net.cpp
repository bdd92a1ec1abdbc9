#include "lowmoe/kernels/cpu/delta_net.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace lowmoe {

namespace {

constexpr float kKeyEpsilon = 1e-6f;  // under the root of queries' and keys' lengths

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

}  // namespace

DeltaNet::DeltaNet(Engine& engine, const DeltaLayer& like)
    : engine_(engine),
      normed_(engine.max_tokens() * like.n_hidden),
      parts_(engine.max_tokens() * like.n_in()),
      mixed_(engine.max_tokens() * like.n_mixed()),
      read_(engine.max_tokens() * like.n_values()),
      rates_(engine.max_tokens() * 2 * like.n_heads),
      ones_(std::max(like.key_size, like.group() * like.value_size)),
      rounded_in_(engine.max_tokens(), like.n_hidden),
      rounded_out_(engine.max_tokens(), like.n_values()) {
  std::fill_n(ones_.data(), ones_.size(), 1.0f);
}

void DeltaNet::run(const DeltaLayer& layer, const DeltaState& before,
                   std::span<const DeltaStop> stops, float* x, size_t n) {
  engine_.pool().run([&](Team& team) {
    engine_.norm_and_round(team, x, n, layer.norm, layer.in.d, normed_.data(),
                           rounded_in_.tokens());
    engine_.multiply(team, "delta net's input", layer.in.w, rounded_in_.tokens(), n, parts_.data(),
                     layer.n_in());
    engine_.keep_normed(team, normed_.data(), layer.kept, n, layer.n_hidden, x);
    rate(team, layer, n);
    mix(team, layer, before.window, n);
    keep_windows(team, layer, before.window, stops);
    read(team, layer, before.maps, stops);
    gate(team, layer, n);
    engine_.round(team, read_.data(), n, layer.out.d, rounded_out_.tokens());
    engine_.multiply_add(team, "delta net's output", layer.out.w, rounded_out_.tokens(), n, x,
                         layer.n_hidden);
  });
}

// How much each head is corrected by a token, and how much of its state the token leaves.
void DeltaNet::rate(Team& team, const DeltaLayer& layer, size_t n) {
  const VectorKernels& v = *engine_.isa().vector;
  team.each("delta net's rates", n * layer.n_heads, [&](size_t unit) {
    const size_t t = unit / layer.n_heads, head = unit % layer.n_heads;
    const float* token = normed_.data() + t * layer.n_hidden;
    const float* rows = layer.rates + head * layer.n_hidden;
    const float correction = v.dot(token, rows, layer.n_hidden);
    const float decay = v.dot(token, rows + layer.n_heads * layer.n_hidden, layer.n_hidden);
    float* to = rates_.data() + 2 * unit;
    to[0] = 1.0f / (1.0f + std::exp(-correction));
    to[1] = std::exp(-std::exp(layer.log_decay[head]) * softplus(decay + layer.decay_bias[head]));
  });
}

// The token at `at` of those still to be mixed in and then those of this call, [n_mixed].
const float* DeltaNet::row(const float* window, const DeltaLayer& layer, size_t at) const {
  const size_t n_before = layer.n_taps - 1;
  return at < n_before ? window + at * layer.n_mixed()
                       : parts_.data() + (at - n_before) * layer.n_in();
}

// Queries, keys and values out of neighbouring tokens; queries and keys of their lengths.
void DeltaNet::mix(Team& team, const DeltaLayer& layer, const float* window, size_t n) {
  const VectorKernels& v = *engine_.isa().vector;
  const size_t size = layer.key_size, n_values = layer.group() * layer.value_size;
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  team.each("delta net's mixing", n * layer.n_key_heads, [&](size_t unit) {
    const size_t t = unit / layer.n_key_heads, head = unit % layer.n_key_heads;
    float* token = mixed_.data() + t * layer.n_mixed();
    const auto to_length = [&](size_t first, float length) {
      mix_channels(layer, window, t, first, size);
      float* x = token + first;
      const float by = length / std::sqrt(v.dot(x, x, size) + kKeyEpsilon);
      for (size_t i = 0; i < size; i++) x[i] *= by;
    };
    to_length(head * size, scale);
    to_length(layer.n_keys() + head * size, 1.0f);
    mix_channels(layer, window, t, 2 * layer.n_keys() + head * n_values, n_values);
  });
}

void DeltaNet::mix_channels(const DeltaLayer& layer, const float* window, size_t t, size_t first,
                            size_t count) {
  float* to = mixed_.data() + t * layer.n_mixed() + first;
  std::fill_n(to, count, 0.0f);
  for (size_t tap = 0; tap < layer.n_taps; tap++) {
    const float* from = row(window, layer, t + tap) + first;
    const float* weight = layer.taps + tap * layer.n_mixed() + first;
    for (size_t i = 0; i < count; i++) to[i] += weight[i] * from[i];
  }
  engine_.isa().vector->silu_multiply(to, ones_.data(), count, to);
}

void DeltaNet::keep_windows(Team& team, const DeltaLayer& layer, const float* window,
                            std::span<const DeltaStop> stops) {
  team.each("delta net's mixing", stops.size(), [&](size_t i) {
    for (size_t tap = 0; tap + 1 < layer.n_taps; tap++) {
      std::memcpy(stops[i].state.window + tap * layer.n_mixed(),
                  row(window, layer, stops[i].end + tap), layer.n_mixed() * sizeof(float));
    }
  });
}

// Takes every head's state through the tokens, and reads it after each.
void DeltaNet::read(Team& team, const DeltaLayer& layer, const float* maps,
                    std::span<const DeltaStop> stops) {
  const VectorKernels& v = *engine_.isa().vector;
  const size_t size = layer.key_size * layer.value_size;
  team.each("delta net's states", layer.n_heads, [&](size_t head) {
    const float* from = maps + head * size;
    size_t t = 0;
    for (const DeltaStop& stop : stops) {
      float* to = stop.state.maps + head * size;
      for (; t < stop.end; t++, from = to) {
        v.step_state(step_of(layer, t, head), from, to,
                     read_.data() + (t * layer.n_heads + head) * layer.value_size);
      }
    }
  });
}

StateStep DeltaNet::step_of(const DeltaLayer& layer, size_t t, size_t head) const {
  const float* token = mixed_.data() + t * layer.n_mixed();
  const float* query = token + head / layer.group() * layer.key_size;
  const float* value = token + 2 * layer.n_keys() + head * layer.value_size;
  const float* rates = rates_.data() + 2 * (t * layer.n_heads + head);
  return {
      query, query + layer.n_keys(), value, layer.key_size, layer.value_size, rates[1], rates[0],
      true};
}

void DeltaNet::gate(Team& team, const DeltaLayer& layer, size_t n) {
  const VectorKernels& v = *engine_.isa().vector;
  const size_t size = layer.value_size;
  team.each("delta net's gates", n * layer.n_heads, [&](size_t unit) {
    const size_t t = unit / layer.n_heads, head = unit % layer.n_heads;
    float* out = read_.data() + unit * size;
    float* gate = parts_.data() + t * layer.n_in() + layer.n_mixed() + head * size;
    v.rms_norm(out, layer.head_norm, layer.head_norm_epsilon, size, out);
    v.silu_multiply(gate, out, size, gate);
    std::memcpy(out, gate, size * sizeof(float));
  });
}

}  // namespace lowmoe
