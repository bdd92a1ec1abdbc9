#include "lowmoe/kernels/cpu/lightning.h"

#include <algorithm>
#include <cmath>

namespace lowmoe {

Lightning::Lightning(Engine& engine, const LightningLayer& like)
    : engine_(engine),
      normed_(engine.max_tokens() * like.n_hidden),
      qkv_(engine.max_tokens() * 3 * like.q_size()),
      gate_(engine.max_tokens() * like.q_size()),
      read_(engine.max_tokens() * like.q_size()),
      ones_(like.head_size),
      rounded_in_(engine.max_tokens(), like.n_hidden),
      rounded_out_(engine.max_tokens(), like.q_size()) {
  std::fill_n(ones_.data(), ones_.size(), 1.0f);
}

void Lightning::run(const LightningLayer& layer, const float* maps,
                    std::span<const LightningStop> stops, float* x, size_t n) {
  const VectorKernels& v = *engine_.isa().vector;
  const size_t size = layer.head_size, q_size = layer.q_size();
  engine_.pool().run([&](Team& team) {
    engine_.norm_and_round(team, x, n, layer.norm, layer.qkv.d, normed_.data(),
                           rounded_in_.tokens());
    engine_.multiply(team, "q, k, v", layer.qkv.w, rounded_in_.tokens(), n, qkv_.data(),
                     3 * q_size);
    engine_.round(team, normed_.data(), n, layer.gate.d, rounded_in_.tokens());
    engine_.multiply(team, "attention's gates", layer.gate.w, rounded_in_.tokens(), n, gate_.data(),
                     q_size);
    engine_.keep_normed(team, normed_.data(), layer.kept, n, layer.n_hidden, x);
    team.each("queries, keys and values", n * 3 * layer.n_heads, [&](size_t unit) {
      float* head = qkv_.data() + unit * size;
      v.silu_multiply(head, ones_.data(), size, head);
    });
    read(team, layer, maps, stops);
    team.each("attention's gates", n, [&](size_t t) {
      float* out = read_.data() + t * q_size;
      const float* gate = gate_.data() + t * q_size;
      v.rms_norm(out, layer.out_norm, layer.out_norm_epsilon, q_size, out);
      for (size_t i = 0; i < q_size; i++) out[i] /= 1.0f + std::exp(-gate[i]);
    });
    engine_.round(team, read_.data(), n, layer.out.d, rounded_out_.tokens());
    engine_.multiply_add(team, "attention's output", layer.out.w, rounded_out_.tokens(), n, x,
                         layer.n_hidden);
  });
}

// Takes every head's state through the tokens, and reads it after each.
void Lightning::read(Team& team, const LightningLayer& layer, const float* maps,
                     std::span<const LightningStop> stops) {
  const VectorKernels& v = *engine_.isa().vector;
  const size_t size = layer.head_size, q_size = layer.q_size();
  team.each("attention's states", layer.n_heads, [&](size_t head) {
    const float* from = maps + head * size * size;
    size_t t = 0;
    for (const LightningStop& stop : stops) {
      float* to = stop.maps + head * size * size;
      for (; t < stop.end; t++, from = to) {
        const float* query = qkv_.data() + t * 3 * q_size + head * size;
        const StateStep token{query, query + q_size, query + 2 * q_size,
                              size,  size,           layer.remains[head],
                              1.0f,  false};
        v.step_state(token, from, to, read_.data() + t * q_size + head * size);
      }
    }
  });
}

}  // namespace lowmoe
