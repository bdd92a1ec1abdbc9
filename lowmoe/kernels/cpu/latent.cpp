#include "lowmoe/kernels/cpu/latent.h"

#include <algorithm>
#include <cstring>

#include "lowmoe/kernels/cpu/attention.h"
#include "lowmoe/kernels/cpu/ends.h"
#include "lowmoe/kernels/cpu/kv_cache.h"

namespace lowmoe {

HeadRows::HeadRows(size_t n_heads, size_t n_rows, size_t size)
    : n_rows_(n_rows),
      size_(size),
      stride_(head_bytes(KvFormat::kInt8, size)),
      bytes_(n_heads * n_rows * stride_) {}

void HeadRows::multiply(const Isa& isa, size_t head, const float* x, size_t n, float* y,
                        size_t y_stride) const {
  isa.vector->multiply_rows(x, n, row(head, 0), stride_, size_, n_rows_, y, y_stride);
}

void split_heads(Engine& engine, const Linear& kv_up, size_t n_heads, const HeadRows& keys_up,
                 const HeadRows& values_up) {
  const size_t kv_rank = values_up.size(), plain_size = keys_up.size();
  const size_t of_head = plain_size + values_up.n_rows(), padded = padded_columns(kv_rank);
  const size_t floats = padded + of_head * kv_rank + plain_size;
  Buffer<float> scratch(engine.pool().size() * floats);
  const VectorKernels& v = *engine.isa().vector;
  engine.pool().run([&](Team& team) {
    team.each("heads of latents", n_heads, [&](size_t head) {
      float* row = scratch.data() + team.thread() * floats;
      float *all = row + padded, *column = all + of_head * kv_rank;
      for (size_t r = 0; r < of_head; r++) {
        restore_row(kv_up, head * of_head + r, row, all + r * kv_rank);
      }
      for (size_t i = 0; i < kv_rank; i++) {
        for (size_t r = 0; r < plain_size; r++) column[r] = all[r * kv_rank + i];
        v.store_head(KvFormat::kInt8, column, plain_size, keys_up.row(head, i));
      }
      for (size_t r = 0; r < values_up.n_rows(); r++) {
        v.store_head(KvFormat::kInt8, all + (plain_size + r) * kv_rank, kv_rank,
                     values_up.row(head, r));
      }
    });
  });
}

Latents::Latents(Engine& engine, const LatentProjection& like)
    : engine_(engine),
      q_rank_(like.q_down ? like.q_down->w.shape.n_out : 0),
      floats_of_thread_(
          layout::round_up(kTokensAtOnce * std::max(like.plain_size(), like.kv_rank()), 16)),
      q_latent_(engine.max_tokens() * q_rank_),
      full_(engine.max_tokens() * like.n_heads * like.key_size()),
      kept_(engine.max_tokens() * like.kept_size()),
      values_(engine.max_tokens() * like.n_heads * like.value_size()),
      gathered_(engine.pool().size() * floats_of_thread_),
      rounded_q_(engine.max_tokens(), q_rank_) {}

void Latents::fold(Team& team, const AttentionLayer& layer, const float* x, size_t n, float* normed,
                   const RoundedTokens& rounded, const float* angles, size_t angle_stride,
                   const KvPages& cache, size_t layer_id, size_t first, float* queries,
                   size_t query_stride) {
  const LatentProjection& of = *layer.latent;
  const Linear& of_x = of.q_down ? *of.q_down : of.q_up;
  const size_t n_full = of.n_heads * of.key_size();
  engine_.norm_and_round(team, x, n, layer.norm, of_x.d, normed, rounded);
  if (of.q_down) {
    engine_.multiply(team, "latents of queries", of_x.w, rounded, n, q_latent_.data(), q_rank_);
    engine_.norm_and_round(team, q_latent_.data(), n, {of.q_norm, of.norm_epsilon, nullptr, false},
                           of.q_up.d, q_latent_.data(), rounded_q_.tokens());
    engine_.multiply(team, "queries", of.q_up.w, rounded_q_.tokens(), n, full_.data(), n_full);
  } else {
    engine_.multiply(team, "queries", of.q_up.w, rounded, n, full_.data(), n_full);
  }
  engine_.round(team, normed, n, of.kv_down.d, rounded);
  engine_.multiply(team, "latents", of.kv_down.w, rounded, n, kept_.data(), of.kept_size());
  keep(team, of, n, angles, angle_stride, cache, layer_id, first);

  const VectorKernels& v = *engine_.isa().vector;
  const size_t plain = of.plain_size(), kv_rank = of.kv_rank();
  team.each("queries of latents", of.n_heads, [&](size_t head) {
    float* plains = gathered(team.thread());
    for (size_t t = 0; t < n; t += kTokensAtOnce) {
      const size_t count = std::min(kTokensAtOnce, n - t);
      for (size_t i = 0; i < count; i++) {
        std::copy_n(full_.data() + (t + i) * n_full + head * of.key_size(), plain,
                    plains + i * plain);
      }
      float* to = queries + t * query_stride + head * of.kept_size();
      of.keys_up.multiply(engine_.isa(), head, plains, count, to, query_stride);
      for (size_t i = 0; i < count; i++) {
        float* query = to + i * query_stride;
        float* turning = query + kv_rank;
        std::copy_n(full_.data() + (t + i) * n_full + head * of.key_size() + plain, of.rope_size,
                    turning);
        const float* cos = angles + (t + i) * angle_stride;
        v.rotate(turning, cos, cos + of.rope_size / 2, of.rope_size);
        for (size_t c = 0; c < of.kept_size(); c++) query[c] *= layer.score_scale;
      }
    }
  });
}

// Latents normed, the shared key turned, both as one row of the cache.
void Latents::keep(Team& team, const LatentProjection& of, size_t n, const float* angles,
                   size_t angle_stride, const KvPages& cache, size_t layer_id, size_t first) {
  const VectorKernels& v = *engine_.isa().vector;
  team.each("latents", n, [&](size_t t) {
    float* row = kept_.data() + t * of.kept_size();
    v.rms_norm(row, of.kv_norm, of.norm_epsilon, of.kv_rank(), row);
    const float* cos = angles + t * angle_stride;
    v.rotate(row + of.kv_rank(), cos, cos + of.rope_size / 2, of.rope_size);
    const size_t page = (first + t) / KvPages::kPageTokens;
    const size_t at = (first + t) % KvPages::kPageTokens * cache.head_bytes();
    v.store_head(cache.format(), row, of.kept_size(), cache.keys(layer_id, 0, page) + at);
  });
}

const float* Latents::unfold(Team& team, const LatentProjection& of, const float* sums, size_t n) {
  const size_t kv_rank = of.kv_rank(), n_values = of.n_heads * of.value_size();
  team.each("values of latents", of.n_heads, [&](size_t head) {
    float* latents = gathered(team.thread());
    for (size_t t = 0; t < n; t += kTokensAtOnce) {
      const size_t count = std::min(kTokensAtOnce, n - t);
      for (size_t i = 0; i < count; i++) {
        std::copy_n(sums + ((t + i) * of.n_heads + head) * of.kept_size(), kv_rank,
                    latents + i * kv_rank);
      }
      of.values_up.multiply(engine_.isa(), head, latents, count,
                            values_.data() + t * n_values + head * of.value_size(), n_values);
    }
  });
  return values_.data();
}

}  // namespace lowmoe
