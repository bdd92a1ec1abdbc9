#include "lowmoe/kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "lowmoe/kernels/cpu/attention_parts.h"

namespace lowmoe {

namespace {

size_t part_floats(size_t n_rows, size_t head_size) { return n_rows * (2 + head_size); }

// The first position that a token sees.
size_t first_seen(const AttentionLayer& layer, size_t position) {
  return layer.window == 0 || position < layer.window ? 0 : position + 1 - layer.window;
}

}  // namespace

Attention::Attention(Engine& engine, const AttentionLayer& like, size_t max_context)
    : engine_(engine),
      n_qkv_(like.n_qkv()),
      q_size_(like.q_size()),
      head_size_(like.head_size),
      group_(like.group()),
      normed_(engine.max_tokens() * like.n_hidden),
      qkv_(engine.max_tokens() * n_qkv_),
      attended_(engine.max_tokens() * q_size_),
      angles_(engine.max_tokens() * like.head_size),
      rounded_in_(engine.max_tokens(), like.n_hidden),
      rounded_out_(engine.max_tokens(), q_size_),
      parts_(part_floats(group_, head_size_) * like.n_kv_heads * (max_context / kPartTokens + 2)) {
  const size_t n_rows = tile_tokens() * group_;
  const size_t one = part_floats(group_, head_size_) + group_ * KvPages::kPageTokens;
  const size_t tile = part_floats(n_rows, head_size_) + block_scratch_floats(n_rows, head_size_);
  floats_of_thread_ = layout::round_up(std::max(one, tile), 16);  // no cache line of two threads
  thread_floats_ = Buffer<float>(engine.pool().size() * floats_of_thread_);
}

void Attention::run(const AttentionLayer& layer, size_t layer_id, KvPages& cache, size_t first,
                    float* x, size_t n) {
  set_angles(layer, first, n);
  engine_.pool().run([&](Team& team) {
    engine_.norm_and_round(team, x, n, layer.norm, layer.norm_epsilon, layer.qkv.d, normed_.data(),
                           rounded_in_.tokens());
    engine_.multiply(team, "q, k, v", layer.qkv.w, rounded_in_.tokens(), n, qkv_.data(), n_qkv_);
    engine_.keep_normed(team, normed_.data(), layer.kept, n, layer.n_hidden, x);
    adjust(team, layer, n);
    place(team, layer, layer_id, cache, first, n);
    if (n == 1) {
      attend_one(team, layer, layer_id, cache, first);
    } else {
      attend_many(team, layer, layer_id, cache, first, n);
    }
    if (layer.gated) gate(team, layer, n);
    engine_.round(team, attended_.data(), n, layer.out.d, rounded_out_.tokens());
    engine_.multiply_add(team, "attention's output", layer.out.w, rounded_out_.tokens(), n, x,
                         layer.n_hidden);
    if (!layer.out_bias) return;
    team.each("attention's output", n, [&](size_t t) {
      engine_.isa().vector->add_scaled(layer.out_bias, 1.0f, layer.n_hidden,
                                       x + t * layer.n_hidden);
    });
  });
}

// What concerns all heads of a token at once, in place.
void Attention::adjust(Team& team, const AttentionLayer& layer, size_t n) {
  const bool norms = layer.head_norm == HeadNorm::kAllHeads, clamps = !std::isinf(layer.clamp);
  if (!layer.qkv_bias && !norms && !clamps) return;
  const VectorKernels& v = *engine_.isa().vector;
  team.each("queries, keys and values", n, [&](size_t t) {
    float* token = qkv_.data() + t * n_qkv_;
    float* keys = token + q_size_;
    const size_t n_all = q_size_ + 2 * layer.kv_size();
    if (layer.qkv_bias) v.add_scaled(layer.qkv_bias, 1.0f, n_all, token);
    if (norms) {
      v.rms_norm(token, layer.q_norm, layer.head_norm_epsilon, q_size_, token);
      v.rms_norm(keys, layer.k_norm, layer.head_norm_epsilon, layer.kv_size(), keys);
    }
    for (size_t i = 0; clamps && i < n_all; i++) {
      token[i] = std::clamp(token[i], -layer.clamp, layer.clamp);
    }
  });
}

void Attention::set_angles(const AttentionLayer& layer, size_t first, size_t n) {
  // Layers mostly share their frequencies, and a pass goes through all layers.
  if (angles_of_ == layer.frequencies && angles_first_ == first && angles_count_ == n) return;
  const size_t half = layer.rope_size / 2;
  for (size_t t = 0; t < n; t++) {
    float* cos = angles_.data() + t * head_size_;
    for (size_t i = 0; i < half; i++) {
      const float angle = static_cast<float>(first + t) * layer.frequencies[i];
      cos[i] = std::cos(angle) * layer.rope_length;
      cos[half + i] = std::sin(angle) * layer.rope_length;
    }
  }
  angles_of_ = layer.frequencies;
  angles_first_ = first;
  angles_count_ = n;
}

// Turns queries and keys to their positions, and stores keys and values.
void Attention::place(Team& team, const AttentionLayer& layer, size_t layer_id,
                      const KvPages& cache, size_t first, size_t n) {
  const VectorKernels& v = *engine_.isa().vector;
  team.each("rotary positions", n * layer.n_kv_heads, [&](size_t unit) {
    const size_t t = unit / layer.n_kv_heads, head = unit % layer.n_kv_heads;
    const float* cos = angles_.data() + t * head_size_;
    const float* sin = cos + layer.rope_size / 2;
    const auto turn = [&](float* head, const float* weight) {
      const float epsilon = layer.head_norm_epsilon;
      if (layer.head_norm == HeadNorm::kBeforeRope) {
        v.rms_norm(head, weight, epsilon, head_size_, head);
      }
      v.rotate(head, cos, sin, layer.rope_size);
      if (layer.head_norm == HeadNorm::kAfterRope) {
        v.rms_norm(head, weight, epsilon, head_size_, head);
      }
    };
    float* token = qkv_.data() + t * n_qkv_;
    for (size_t q = head * group_; q < (head + 1) * group_; q++) {
      float* query = token + q * head_size_;
      turn(query, layer.q_norm);
      for (size_t i = 0; i < head_size_; i++) query[i] *= layer.score_scale;
    }
    float* key = token + q_size_ + head * head_size_;
    const float* value = key + layer.kv_size();
    turn(key, layer.k_norm);
    const size_t page = (first + t) / KvPages::kPageTokens;
    const size_t at = (first + t) % KvPages::kPageTokens * cache.head_bytes();
    v.store_head(cache.format(), key, head_size_, cache.keys(layer_id, head, page) + at);
    v.store_head(cache.format(), value, head_size_, cache.values(layer_id, head, page) + at);
  });
}

// A single token, cut by positions where there are many.
void Attention::attend_one(Team& team, const AttentionLayer& layer, size_t layer_id,
                           const KvPages& cache, size_t position) {
  const size_t begin = first_seen(layer, position), end = position + 1;
  const size_t first_part = begin / kPartTokens;
  const size_t n_parts = (end - 1) / kPartTokens + 1 - first_part;
  team.each("attention", layer.n_kv_heads * n_parts, [&](size_t unit) {
    const size_t head = unit / n_parts, at = (first_part + unit % n_parts) * kPartTokens;
    attend_pages(team.thread(), layer_id, cache, head, std::max(begin, at),
                 std::min(end, at + kPartTokens), part_of(unit));
    if (n_parts > 1) return;
    divide(part_of(unit), sinks_of(layer, head), attended_.data() + head * group_ * head_size_);
  });
  if (n_parts == 1) return;
  team.each("attention", layer.n_kv_heads, [&](size_t head) {
    const Part whole = part_of(head * n_parts);
    for (size_t p = 1; p < n_parts; p++) merge(part_of(head * n_parts + p), whole);
    divide(whole, sinks_of(layer, head), attended_.data() + head * group_ * head_size_);
  });
}

// Positions [begin, end), page by page, always merged in this order.
void Attention::attend_pages(int thread, size_t layer_id, const KvPages& cache, size_t head,
                             size_t begin, size_t end, const Part& to) {
  float* own = thread_floats_.data() + thread * floats_of_thread_;
  const Part next = part_at(own, group_);
  float* scores = own + part_floats(group_, head_size_);
  for (size_t at = begin; at < end;) {
    const size_t page = at / KvPages::kPageTokens, base = page * KvPages::kPageTokens;
    const size_t stop = std::min(end, base + KvPages::kPageTokens);
    const Part& into = at == begin ? to : next;
    engine_.isa().vector->attend_part(
        cache.format(), qkv_.data() + head * group_ * head_size_, group_,
        cache.keys(layer_id, head, page), cache.values(layer_id, head, page), cache.head_bytes(),
        head_size_, at - base, stop - base, into.top, into.total, into.out, scores);
    if (at != begin) merge(next, to);
    at = stop;
  }
}

// The tokens of a prompt, some at a time, so that keys and values are read once for them.
void Attention::attend_many(Team& team, const AttentionLayer& layer, size_t layer_id,
                            const KvPages& cache, size_t first, size_t n) {
  const size_t step = tile_tokens(), n_tiles = (n + step - 1) / step;
  team.each("attention", layer.n_kv_heads * n_tiles, [&](size_t unit) {
    const size_t head = unit / n_tiles, token = unit % n_tiles * step;
    attend_tile(team.thread(), layer, layer_id, cache, head, first, token,
                std::min(step, n - token));
  });
}

void Attention::attend_tile(int thread, const AttentionLayer& layer, size_t layer_id,
                            const KvPages& cache, size_t head, size_t first, size_t token,
                            size_t count) {
  const size_t n_rows = count * group_;
  float* own = thread_floats_.data() + thread * floats_of_thread_;
  const Part found = part_at(own, n_rows);
  float* scratch = own + part_floats(n_rows, head_size_);
  std::fill_n(found.top, n_rows, -std::numeric_limits<float>::infinity());
  std::fill_n(found.total, n_rows, 0.0f);
  std::fill_n(found.out, n_rows * head_size_, 0.0f);
  const QueryBlock queries{qkv_.data() + token * n_qkv_ + head * group_ * head_size_,
                           n_qkv_,
                           count,
                           group_,
                           first + token + 1,
                           layer.window == 0 ? SIZE_MAX : layer.window};
  const size_t end = first + token + count;
  for (size_t at = first_seen(layer, first + token); at < end;) {
    const size_t page = at / KvPages::kPageTokens, base = page * KvPages::kPageTokens;
    const size_t stop = std::min(end, base + KvPages::kPageTokens);
    const size_t offset = (at - base) * cache.head_bytes();
    engine_.isa().vector->attend_block(
        cache.format(), queries, cache.keys(layer_id, head, page) + offset,
        cache.values(layer_id, head, page) + offset, cache.head_bytes(), head_size_, at, stop,
        found.top, found.total, found.out, scratch);
    at = stop;
  }
  for (size_t t = 0; t < count; t++) {
    const size_t row = t * group_;
    divide({found.top + row, found.total + row, found.out + row * head_size_},
           sinks_of(layer, head),
           attended_.data() + (token + t) * q_size_ + head * group_ * head_size_);
  }
}

void Attention::merge(const Part& from, const Part& to) const {
  for (size_t row = 0; row < group_; row++) {
    merge_part(from.top[row], from.total[row], from.out + row * head_size_, head_size_, to.top[row],
               to.total[row], to.out + row * head_size_);
  }
}

// The query heads of one token.  sinks: of each, or null.
void Attention::divide(const Part& from, const float* sinks, float* to) const {
  for (size_t row = 0; row < group_; row++) {
    const float nothing = sinks ? std::exp(sinks[row] - from.top[row]) : 0.0f;
    const float scale = 1.0f / (from.total[row] + nothing);
    for (size_t i = 0; i < head_size_; i++) {
      to[row * head_size_ + i] = from.out[row * head_size_ + i] * scale;
    }
  }
}

void Attention::gate(Team& team, const AttentionLayer& layer, size_t n) {
  team.each("attention's gates", n * layer.n_heads, [&](size_t unit) {
    const size_t t = unit / layer.n_heads, head = unit % layer.n_heads;
    float* out = attended_.data() + unit * head_size_;
    const float* gate =
        qkv_.data() + t * n_qkv_ + q_size_ + 2 * layer.kv_size() + head * head_size_;
    for (size_t i = 0; i < head_size_; i++) out[i] /= 1.0f + std::exp(-gate[i]);
  });
}

const float* Attention::sinks_of(const AttentionLayer& layer, size_t head) const {
  return layer.sinks ? layer.sinks + head * group_ : nullptr;
}

size_t Attention::tile_tokens() const { return std::max<size_t>(1, kTileRows / group_); }

Attention::Part Attention::part_at(float* floats, size_t n_rows) const {
  return {floats, floats + n_rows, floats + 2 * n_rows};
}

Attention::Part Attention::part_of(size_t index) const {
  return part_at(parts_.data() + index * part_floats(group_, head_size_), group_);
}

}  // namespace lowmoe
