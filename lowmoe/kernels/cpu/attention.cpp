#include "lowmoe/kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>

#include "lowmoe/kernels/cpu/attention_parts.h"

namespace lowmoe {

namespace {

size_t part_floats(size_t group, size_t head_size) { return group * (2 + head_size); }

}  // namespace

Attention::Attention(Engine& engine, const AttentionLayer& like, size_t max_context)
    : engine_(engine),
      n_qkv_(like.q_size() + 2 * like.kv_size()),
      q_size_(like.q_size()),
      head_size_(like.head_size),
      group_(like.group()),
      normed_(engine.max_tokens() * like.n_hidden),
      qkv_(engine.max_tokens() * n_qkv_),
      attended_(engine.max_tokens() * q_size_),
      angles_(engine.max_tokens() * like.head_size),
      rounded_in_(engine.max_tokens(), like.n_hidden),
      rounded_out_(engine.max_tokens(), q_size_),
      // Either one token in many parts or many tokens in one.
      parts_(part_floats(group_, head_size_) * like.n_kv_heads *
             std::max(engine.max_tokens(), max_context / kPartTokens + 2)),
      page_parts_(engine.pool().size() * part_floats(group_, head_size_)),
      scores_(engine.pool().size() * group_ * KvPages::kPageTokens) {}

void Attention::run(const AttentionLayer& layer, size_t layer_id, KvPages& cache, size_t first,
                    float* x, size_t n) {
  set_angles(layer, first, n);
  engine_.pool().run([&](Team& team) {
    engine_.norm_and_round(team, x, n, layer.norm, layer.norm_epsilon, layer.qkv.d,
                           normed_.data(), rounded_in_.tokens());
    engine_.multiply(team, "q, k, v", layer.qkv.w, rounded_in_.tokens(), n, qkv_.data(), n_qkv_);
    place(team, layer, layer_id, cache, first, n);
    attend(team, layer, layer_id, cache, first, n);
    engine_.round(team, attended_.data(), n, layer.out.d, rounded_out_.tokens());
    engine_.multiply_add(team, "attention's output", layer.out.w, rounded_out_.tokens(), n, x,
                         layer.n_hidden);
  });
}

void Attention::set_angles(const AttentionLayer& layer, size_t first, size_t n) {
  // Layers mostly share their frequencies, and a pass goes through all layers.
  if (angles_of_ == layer.frequencies && angles_first_ == first && angles_count_ == n) return;
  const size_t half = head_size_ / 2;
  for (size_t t = 0; t < n; t++) {
    float* cos = angles_.data() + t * head_size_;
    for (size_t i = 0; i < half; i++) {
      const float angle = static_cast<float>(first + t) * layer.frequencies[i];
      cos[i] = std::cos(angle);
      cos[half + i] = std::sin(angle);
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
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_size_));
  team.each("rotary positions", n * layer.n_kv_heads, [&](size_t unit) {
    const size_t t = unit / layer.n_kv_heads, head = unit % layer.n_kv_heads;
    const float* cos = angles_.data() + t * head_size_;
    const float* sin = cos + head_size_ / 2;
    float* token = qkv_.data() + t * n_qkv_;
    for (size_t q = head * group_; q < (head + 1) * group_; q++) {
      float* query = token + q * head_size_;
      v.rotate(query, cos, sin, head_size_);
      for (size_t i = 0; i < head_size_; i++) query[i] *= scale;
    }
    float* key = token + q_size_ + head * head_size_;
    const float* value = key + layer.kv_size();
    v.rotate(key, cos, sin, head_size_);
    const size_t page = (first + t) / KvPages::kPageTokens;
    const size_t at = (first + t) % KvPages::kPageTokens * cache.head_bytes();
    v.store_head(cache.format(), key, head_size_, cache.keys(layer_id, head, page) + at);
    v.store_head(cache.format(), value, head_size_, cache.values(layer_id, head, page) + at);
  });
}

void Attention::attend(Team& team, const AttentionLayer& layer, size_t layer_id,
                       const KvPages& cache, size_t first, size_t n) {
  const auto begin_of = [&](size_t position) {
    return layer.window == 0 || position < layer.window ? 0 : position + 1 - layer.window;
  };
  // A prompt has tokens enough for all threads; a single token is cut by positions.
  const size_t begin = begin_of(first) / kPartTokens;
  const size_t n_parts = n > 1 ? 1 : first / kPartTokens + 1 - begin;
  const size_t n_heads = layer.n_kv_heads;
  team.each("attention", n_heads * n * n_parts, [&](size_t unit) {
    const size_t head = unit / (n * n_parts), t = unit / n_parts % n, p = unit % n_parts;
    const size_t end = first + t + 1;
    size_t from = begin_of(first + t), to = end;
    if (n_parts > 1) {
      from = std::max(from, (begin + p) * kPartTokens);
      to = std::min(end, (begin + p + 1) * kPartTokens);
    }
    const size_t index = (t * n_heads + head) * n_parts + p;
    attend_pages(team.thread(), layer, layer_id, cache, head, t, from, to, part(index));
    if (n_parts == 1) finish(layer, head, t, 1);
  });
  if (n_parts == 1) return;
  team.each("attention", n_heads, [&](size_t head) { finish(layer, head, 0, n_parts); });
}

// Positions [begin, end), page by page, always merged in this order.
void Attention::attend_pages(int thread, const AttentionLayer& layer, size_t layer_id,
                             const KvPages& cache, size_t head, size_t token, size_t begin,
                             size_t end, const Part& to) {
  const float* queries = qkv_.data() + token * n_qkv_ + head * group_ * head_size_;
  float* scores = scores_.data() + thread * group_ * KvPages::kPageTokens;
  float* own = page_parts_.data() + thread * part_floats(group_, head_size_);
  const Part next{own, own + group_, own + 2 * group_};
  for (size_t at = begin; at < end;) {
    const size_t page = at / KvPages::kPageTokens, base = page * KvPages::kPageTokens;
    const size_t stop = std::min(end, base + KvPages::kPageTokens);
    const Part& into = at == begin ? to : next;
    engine_.isa().vector->attend_part(
        cache.format(), queries, group_, cache.keys(layer_id, head, page),
        cache.values(layer_id, head, page), cache.head_bytes(), head_size_, at - base, stop - base,
        into.top, into.total, into.out, scores);
    if (at != begin) {
      for (size_t q = 0; q < group_; q++) {
        merge_part(next.top[q], next.total[q], next.out + q * head_size_, head_size_, to.top[q],
                   to.total[q], to.out + q * head_size_);
      }
    }
    at = stop;
  }
  (void)layer;
}

// The merged and divided output of the queries of one head, from all its parts.
void Attention::finish(const AttentionLayer& layer, size_t head, size_t token, size_t n_parts) {
  const size_t index = (token * layer.n_kv_heads + head) * n_parts;
  const Part whole = part(index);
  for (size_t p = 1; p < n_parts; p++) {
    const Part more = part(index + p);
    for (size_t q = 0; q < group_; q++) {
      merge_part(more.top[q], more.total[q], more.out + q * head_size_, head_size_, whole.top[q],
                 whole.total[q], whole.out + q * head_size_);
    }
  }
  float* to = attended_.data() + token * q_size_ + head * group_ * head_size_;
  for (size_t q = 0; q < group_; q++) {
    const float scale = 1.0f / whole.total[q];
    for (size_t i = 0; i < head_size_; i++) {
      to[q * head_size_ + i] = whole.out[q * head_size_ + i] * scale;
    }
  }
}

Attention::Part Attention::part(size_t index) const {
  float* at = parts_.data() + index * part_floats(group_, head_size_);
  return {at, at + group_, at + 2 * group_};
}

}  // namespace lowmoe
