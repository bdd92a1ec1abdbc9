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
  const size_t in_window =
      layer.window == 0 || position < layer.window ? 0 : position + 1 - layer.window;
  const size_t in_chunk = layer.chunk == 0 ? 0 : position / layer.chunk * layer.chunk;
  return std::max(in_window, in_chunk);
}

}  // namespace

float AttentionLayer::query_scale(size_t position) const {
  if (temperature_step == 0) return score_scale;
  const float passed = static_cast<float>((position + 1) / temperature_step);
  return score_scale * (1.0f + temperature_scale * std::log1p(passed));
}

size_t AttentionLayer::group() const {
  if (!latent) return n_heads / n_kv_heads;
  // Few, so that there is work for many threads: a head reads what is cached either way, and what
  // another has read just before comes from a cache of the processor.
  size_t most = kMostLatentHeads;
  while (n_heads % most != 0) most--;
  return most;
}

Attention::Attention(Engine& engine, const AttentionLayer& like, size_t max_context,
                     size_t max_sequences)
    : engine_(engine),
      n_qkv_(like.n_qkv()),
      q_size_(like.q_size()),
      head_size_(like.head_size),
      group_(like.group()),
      n_groups_(like.n_heads / group_),
      groups_of_kv_head_(n_groups_ / like.n_kv_heads),
      normed_(engine.max_tokens() * like.n_hidden),
      qkv_(engine.max_tokens() * n_qkv_),
      attended_(engine.max_tokens() * q_size_),
      angles_(engine.max_tokens() * like.head_size),
      rounded_in_(engine.max_tokens(), like.n_hidden),
      rounded_out_(engine.max_tokens(), like.out.w.shape.n_in),
      parts_(part_floats(group_, head_size_) * n_groups_ * (max_context / kPartTokens + 2) *
             max_sequences) {
  if (like.latent) latents_.emplace(engine, *like.latent);
  const size_t n_rows = tile_tokens() * group_;
  const size_t one = part_floats(group_, head_size_) + group_ * KvPages::kPageTokens;
  const size_t tile = part_floats(n_rows, head_size_) + block_scratch_floats(n_rows, head_size_);
  floats_of_thread_ = layout::round_up(std::max(one, tile), 16);  // no cache line of two threads
  thread_floats_ = Buffer<float>(engine.pool().size() * floats_of_thread_);
}

void Attention::run(const AttentionLayer& layer, size_t layer_id, KvPages& cache, size_t first,
                    float* x, size_t n) {
  if (n == 1) {
    const Place place{&cache, first};
    return step(layer, layer_id, {&place, 1}, x);
  }
  places_.resize(n);
  for (size_t t = 0; t < n; t++) places_[t] = {&cache, first + t};
  compute(layer, layer_id, x,
          [&](Team& team) { attend_many(team, layer, layer_id, cache, first, n); });
}

void Attention::step(const AttentionLayer& layer, size_t layer_id, std::span<const Place> places,
                     float* x) {
  places_.assign(places.begin(), places.end());
  const size_t n_units = cut(layer);
  compute(layer, layer_id, x, [&](Team& team) { attend_each(team, layer, layer_id, n_units); });
}

// The whole operation for tokens at places_.
template <class Attend>
void Attention::compute(const AttentionLayer& layer, size_t layer_id, float* x,
                        const Attend& attend) {
  const size_t n = places_.size();
  set_angles(layer);
  engine_.pool().run([&](Team& team) {
    if (layer.latent) {
      latents_->fold(team, layer, x, places_, normed_.data(), rounded_in_.tokens(), angles_.data(),
                     head_size_, layer_id, qkv_.data(), n_qkv_);
    } else {
      engine_.norm_and_round(team, x, n, layer.norm, layer.qkv.d, normed_.data(),
                             rounded_in_.tokens());
      engine_.multiply(team, "q, k, v", layer.qkv.w, rounded_in_.tokens(), n, qkv_.data(), n_qkv_);
      adjust(team, layer, n);
      place(team, layer, layer_id);
    }
    engine_.keep_normed(team, normed_.data(), layer.kept, n, layer.n_hidden, x);
    attend(team);
    if (layer.gated) gate(team, layer, n);
    const float* found = attended_.data();
    if (layer.latent) found = latents_->unfold(team, *layer.latent, found, n);
    engine_.round(team, found, n, layer.out.d, rounded_out_.tokens());
    add_output(team, layer, rounded_out_.tokens(), x, n);
  });
}

void Attention::add_output(Team& team, const AttentionLayer& layer, const RoundedTokens& found,
                           float* x, size_t n) {
  const char* phase = "attention's output";
  const size_t n_hidden = layer.n_hidden;
  if (layer.out_norm) {
    engine_.multiply(team, phase, layer.out.w, found, n, normed_.data(), n_hidden);
  } else {
    engine_.multiply_add(team, phase, layer.out.w, found, n, x, n_hidden);
  }
  if (!layer.out_norm && !layer.out_bias) return;
  const VectorKernels& v = *engine_.isa().vector;
  team.each(phase, n, [&](size_t t) {
    float* out = layer.out_norm ? normed_.data() + t * n_hidden : x + t * n_hidden;
    if (layer.out_bias) v.add_scaled(layer.out_bias, 1.0f, n_hidden, out);
    if (!layer.out_norm) return;
    engine_.norm(*layer.out_norm, out, n_hidden, out);
    v.add_scaled(out, 1.0f, n_hidden, x + t * n_hidden);
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

void Attention::set_angles(const AttentionLayer& layer) {
  // Layers mostly share their frequencies, and a pass goes through all layers.
  const bool same =
      angles_of_ == layer.frequencies &&
      std::equal(places_.begin(), places_.end(), angles_positions_.begin(), angles_positions_.end(),
                 [](const Place& a, size_t position) { return a.position == position; });
  if (same) return;
  const size_t half = layer.rope_size / 2;
  angles_positions_.clear();
  for (size_t t = 0; t < places_.size(); t++) {
    float* cos = angles_.data() + t * head_size_;
    for (size_t i = 0; i < half; i++) {
      const float angle = static_cast<float>(places_[t].position) * layer.frequencies[i];
      cos[i] = std::cos(angle) * layer.rope_length;
      cos[half + i] = std::sin(angle) * layer.rope_length;
    }
    angles_positions_.push_back(places_[t].position);
  }
  angles_of_ = layer.frequencies;
}

// Turns queries and keys to their positions, and stores keys and values.
void Attention::place(Team& team, const AttentionLayer& layer, size_t layer_id) {
  const VectorKernels& v = *engine_.isa().vector;
  team.each("rotary positions", places_.size() * layer.n_kv_heads, [&](size_t unit) {
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
    const float scale = layer.query_scale(places_[t].position);
    float* token = qkv_.data() + t * n_qkv_;
    for (size_t q = head * group_; q < (head + 1) * group_; q++) {
      float* query = token + q * head_size_;
      turn(query, layer.q_norm);
      for (size_t i = 0; i < head_size_; i++) query[i] *= scale;
    }
    float* key = token + q_size_ + head * head_size_;
    const float* value = key + layer.kv_size();
    turn(key, layer.k_norm);
    const KvPages& cache = *places_[t].cache;
    const size_t page = places_[t].position / KvPages::kPageTokens;
    const size_t at = places_[t].position % KvPages::kPageTokens * cache.head_bytes();
    v.store_head(cache.format(), key, head_size_, cache.keys(layer_id, head, page) + at);
    v.store_head(cache.format(), value, head_size_, cache.values(layer_id, head, page) + at);
  });
}

// Shares out what the tokens of a step see, cut by positions where there are many; returns how many
// units of work that is.  A token's parts are the same whatever else is in the step.
size_t Attention::cut(const AttentionLayer& layer) {
  size_t n_units = 0;
  cuts_.clear();
  for (const Place& place : places_) {
    const size_t begin = first_seen(layer, place.position), end = place.position + 1;
    const size_t first_part = begin / kPartTokens;
    const size_t n_parts = (end - 1) / kPartTokens + 1 - first_part;
    cuts_.push_back({begin, end, first_part, n_parts, n_units});
    n_units += n_groups_ * n_parts;
  }
  return n_units;
}

// One token of each conversation.
void Attention::attend_each(Team& team, const AttentionLayer& layer, size_t layer_id,
                            size_t n_units) {
  team.each("attention", n_units, [&](size_t unit) {
    size_t token = 0;
    while (token + 1 < cuts_.size() && unit >= cuts_[token + 1].first_unit) token++;
    const Cut& cut = cuts_[token];
    const size_t head = (unit - cut.first_unit) / cut.n_parts;
    const size_t part = (unit - cut.first_unit) % cut.n_parts;
    const size_t at = (cut.first_part + part) * kPartTokens;
    attend_pages(team.thread(), layer, layer_id, token, head, std::max(cut.begin, at),
                 std::min(cut.end, at + kPartTokens), part_of(unit));
    if (cut.n_parts > 1) return;
    divide(part_of(unit), sinks_of(layer, head), attended_of(token, head));
  });
  if (n_units == cuts_.size() * n_groups_) return;
  team.each("attention", cuts_.size() * n_groups_, [&](size_t unit) {
    const size_t token = unit / n_groups_, head = unit % n_groups_;
    const Cut& cut = cuts_[token];
    if (cut.n_parts == 1) return;
    const size_t first = cut.first_unit + head * cut.n_parts;
    const Part whole = part_of(first);
    for (size_t p = 1; p < cut.n_parts; p++) merge(part_of(first + p), whole);
    divide(whole, sinks_of(layer, head), attended_of(token, head));
  });
}

// Positions [begin, end), page by page, always merged in this order.
void Attention::attend_pages(int thread, const AttentionLayer& layer, size_t layer_id, size_t token,
                             size_t head, size_t begin, size_t end, const Part& to) {
  const KvPages& cache = *places_[token].cache;
  const float* queries = qkv_.data() + token * n_qkv_ + head * group_ * head_size_;
  float* own = thread_floats_.data() + thread * floats_of_thread_;
  const Part next = part_at(own, group_);
  float* scores = own + part_floats(group_, head_size_);
  const size_t of = head / groups_of_kv_head_;
  for (size_t at = begin; at < end;) {
    const size_t page = at / KvPages::kPageTokens, base = page * KvPages::kPageTokens;
    const size_t stop = std::min(end, base + KvPages::kPageTokens);
    const Part& into = at == begin ? to : next;
    engine_.isa().vector->attend_part(
        cache.format(), queries, group_, cache.keys(layer_id, of, page),
        cache.values(layer_id, of, page), cache.head_bytes(), head_size_, at - base, stop - base,
        into.top, into.total, into.out, scores, layer.score_cap);
    if (at != begin) merge(next, to);
    at = stop;
  }
}

// The tokens of a prompt, some at a time, so that keys and values are read once for them.
void Attention::attend_many(Team& team, const AttentionLayer& layer, size_t layer_id,
                            const KvPages& cache, size_t first, size_t n) {
  const size_t step = tile_tokens(), n_tiles = (n + step - 1) / step;
  team.each("attention", n_groups_ * n_tiles, [&](size_t unit) {
    const size_t head = unit / n_tiles, token = unit % n_tiles * step;
    const size_t end = token + std::min(step, n - token);
    // Those of one tile begin to see at the same token, unless a window says so.
    for (size_t at = token; at < end;) {
      const size_t left = layer.chunk == 0 ? n : layer.chunk - (first + at) % layer.chunk;
      const size_t count = std::min(left, end - at);
      attend_tile(team.thread(), layer, layer_id, cache, head, first, at, count);
      at += count;
    }
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
                           layer.window == 0 ? SIZE_MAX : layer.window,
                           layer.score_cap};
  const size_t end = first + token + count, of = head / groups_of_kv_head_;
  for (size_t at = first_seen(layer, first + token); at < end;) {
    const size_t page = at / KvPages::kPageTokens, base = page * KvPages::kPageTokens;
    const size_t stop = std::min(end, base + KvPages::kPageTokens);
    const size_t offset = (at - base) * cache.head_bytes();
    engine_.isa().vector->attend_block(
        cache.format(), queries, cache.keys(layer_id, of, page) + offset,
        cache.values(layer_id, of, page) + offset, cache.head_bytes(), head_size_, at, stop,
        found.top, found.total, found.out, scratch);
    at = stop;
  }
  for (size_t t = 0; t < count; t++) {
    const size_t row = t * group_;
    divide({found.top + row, found.total + row, found.out + row * head_size_},
           sinks_of(layer, head), attended_of(token + t, head));
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

// Where the query heads of a token that share a key-value head put their values.
float* Attention::attended_of(size_t token, size_t head) const {
  return attended_.data() + token * q_size_ + head * group_ * head_size_;
}

size_t Attention::tile_tokens() const { return std::max<size_t>(1, kTileRows / group_); }

Attention::Part Attention::part_at(float* floats, size_t n_rows) const {
  return {floats, floats + n_rows, floats + 2 * n_rows};
}

Attention::Part Attention::part_of(size_t index) const {
  return part_at(parts_.data() + index * part_floats(group_, head_size_), group_);
}

}  // namespace lowmoe
