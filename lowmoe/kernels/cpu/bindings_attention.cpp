#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include "lowmoe/kernels/cpu/attention.h"
#include "lowmoe/kernels/cpu/bindings.h"
#include "lowmoe/kernels/cpu/bound.h"
#include "lowmoe/kernels/cpu/latent.h"

namespace lowmoe {

namespace {

// Whether the scratch of one serves the other.
bool same_latents(const AttentionLayer& one, const AttentionLayer& other) {
  if (!one.latent || !other.latent) return !one.latent && !other.latent;
  const LatentProjection &a = *one.latent, &b = *other.latent;
  const auto q_rank = [](const LatentProjection& of) {
    return of.q_down ? of.q_down->w.shape.n_out : 0;
  };
  return a.kv_rank() == b.kv_rank() && a.plain_size() == b.plain_size() &&
         a.value_size() == b.value_size() && q_rank(a) == q_rank(b);
}

}  // namespace

void bind_attention(nb::module_& m) {
  using namespace nb::literals;

  nb::class_<LatentProjection>(m, "LatentProjection", "latent.h")
      .def(
          "__init__",
          [](LatentProjection* self, Engine& engine, const Linear* q_down, Address q_norm,
             const Linear& q_up, const Linear& kv_down, Address kv_norm, float norm_epsilon,
             const Linear& kv_up, size_t n_heads, size_t plain_size, size_t rope_size,
             size_t value_size) {
            const size_t kv_rank = kv_up.w.shape.n_in;
            require(n_heads > 0 && plain_size > 0 && value_size > 0 && rope_size > 0 &&
                        rope_size % 2 == 0,
                    "sizes of heads");
            require(q_up.w.shape.n_out == n_heads * (plain_size + rope_size) &&
                        kv_up.w.shape.n_out == n_heads * (plain_size + value_size) &&
                        kv_down.w.shape.n_out == kv_rank + rope_size,
                    "the heads do not fit the matrices");
            const size_t n_in = q_down ? q_down->w.shape.n_in : q_up.w.shape.n_in;
            require(n_in == kv_down.w.shape.n_in &&
                        (!q_down || (q_norm && q_down->w.shape.n_out == q_up.w.shape.n_in)),
                    "the matrices do not fit each other");
            new (self) LatentProjection{q_down ? std::optional(*q_down) : std::nullopt,
                                        at<const float>(q_norm),
                                        q_up,
                                        kv_down,
                                        at<const float>(kv_norm),
                                        norm_epsilon,
                                        HeadRows(n_heads, kv_rank, plain_size),
                                        HeadRows(n_heads, value_size, kv_rank),
                                        n_heads,
                                        rope_size};
            nb::gil_scoped_release unlocked;
            split_heads(engine, kv_up, n_heads, self->keys_up, self->values_up);
          },
          nb::kw_only(), "engine"_a, "q_down"_a.none(), "q_norm"_a, "q_up"_a, "kv_down"_a,
          "kv_norm"_a, "norm_epsilon"_a, "kv_up"_a, "n_heads"_a, "plain_size"_a, "rope_size"_a,
          "value_size"_a, "q_down: None where queries come of x itself; kv_up is not kept.");

  nb::class_<AttentionLayer>(m, "AttentionLayer", "attention.h")
      .def(
          "__init__",
          [](AttentionLayer* self, const Norm& norm, const Linear* qkv, const Linear& out,
             Address frequencies, size_t n_heads, size_t n_kv_heads, size_t head_size,
             size_t window, size_t rope_size, float rope_length, float score_scale,
             Address qkv_bias, Address out_bias, int head_norm, Address q_norm, Address k_norm,
             float head_norm_epsilon, float clamp, Address sinks, bool gated, float kept,
             size_t chunk, size_t temperature_step, float temperature_scale, float score_cap,
             const Norm* out_norm, std::shared_ptr<const LatentProjection> latent) {
            require(qkv || latent, "a layer of no attention");
            new (self) AttentionLayer{norm,
                                      qkv ? *qkv : Linear{},
                                      out,
                                      at<const float>(frequencies),
                                      out.w.shape.n_out,
                                      n_heads,
                                      n_kv_heads,
                                      head_size,
                                      window,
                                      chunk,
                                      rope_size,
                                      rope_length,
                                      score_scale,
                                      score_cap,
                                      at<const float>(qkv_bias),
                                      at<const float>(out_bias),
                                      static_cast<HeadNorm>(head_norm),
                                      at<const float>(q_norm),
                                      at<const float>(k_norm),
                                      head_norm_epsilon,
                                      clamp,
                                      at<const float>(sinks),
                                      gated,
                                      kept,
                                      temperature_step,
                                      temperature_scale,
                                      out_norm ? std::optional(*out_norm) : std::nullopt,
                                      std::move(latent)};
            const LatentProjection* of = self->latent.get();
            require(n_heads > 0 && n_kv_heads > 0 && n_heads % n_kv_heads == 0 &&
                        out.w.shape.n_in == n_heads * (of ? of->value_size() : head_size),
                    "the heads do not fit the matrices");
            require(of || (head_size % 2 == 0 && qkv->w.shape.n_out == self->n_qkv() &&
                           out.w.shape.n_out == qkv->w.shape.n_in),
                    "the heads do not fit the matrices");
            require(!of || (of->n_heads == n_heads && n_kv_heads == 1 &&
                            head_size == of->kept_size() && rope_size == of->rope_size &&
                            of->kv_down.w.shape.n_in == out.w.shape.n_out),
                    "the heads do not fit the latents");
            require(!of || (!qkv_bias && !out_bias && !head_norm && std::isinf(clamp) && !sinks &&
                            window == 0 && chunk == 0 && temperature_step == 0 && !gated),
                    "latents with what only grouped queries have");
            require(rope_size % 2 == 0 && rope_size <= head_size && (!rope_size || frequencies),
                    "rope_size is odd, above head_size, or of no frequencies");
            require(head_norm >= 0 && head_norm <= 3 && (!head_norm || (q_norm && k_norm)),
                    "no such norm of heads, or one without weights");
          },
          nb::kw_only(), "norm"_a, "qkv"_a.none(), "out"_a, "frequencies"_a, "n_heads"_a,
          "n_kv_heads"_a, "head_size"_a, "window"_a, "rope_size"_a, "rope_length"_a,
          "score_scale"_a, "qkv_bias"_a, "out_bias"_a, "head_norm"_a, "q_norm"_a, "k_norm"_a,
          "head_norm_epsilon"_a, "clamp"_a, "sinks"_a, "gated"_a = false, "kept"_a = 0.0f,
          "chunk"_a = 0, "temperature_step"_a = 0, "temperature_scale"_a = 0.0f,
          "score_cap"_a = 0.0f, "out_norm"_a.none() = nb::none(), "latent"_a.none() = nb::none(),
          "qkv: None where latent takes its place. Addresses of what a layer has not are 0; "
          "head_norm: 0 none, 1 before rope, 2 after it, "
          "3 of all heads together.");

  nb::class_<BoundAttention>(m, "Attention", "attention.h")
      .def(
          "__init__",
          [](BoundAttention* self, Engine& engine, const std::vector<AttentionLayer>& layers,
             size_t max_context, size_t max_sequences) {
            require(!layers.empty(), "no layers");
            require(max_sequences > 0, "max_sequences is 0");
            for (const AttentionLayer& layer : layers) {
              const AttentionLayer& like = layers.front();
              require(layer.n_hidden == like.n_hidden && layer.n_heads == like.n_heads &&
                          layer.n_kv_heads == like.n_kv_heads &&
                          layer.head_size == like.head_size && layer.gated == like.gated &&
                          same_latents(layer, like),
                      "layers of different sizes");
            }
            new (self) BoundAttention{
                {layers, Attention(engine, layers.front(), max_context, max_sequences)},
                engine,
                max_context,
                max_sequences};
          },
          "engine"_a, "layers"_a, "max_context"_a, "max_sequences"_a, nb::keep_alive<1, 2>())
      .def(
          "run",
          [](BoundAttention& self, size_t layer_id, KvPages& cache, size_t first, Address x,
             size_t n) {
            self.check(cache, first, n);
            nb::gil_scoped_release unlocked;
            self.operation.run(self.layer(layer_id), layer_id, cache, first, at<float>(x), n);
          },
          "layer_id"_a, "cache"_a, "first"_a, "x"_a, "n"_a)
      .def(
          "step",
          [](BoundAttention& self, size_t layer_id, const std::vector<GivenPlace>& given,
             Address x) {
            const std::vector<Place> places = self.places(given);
            nb::gil_scoped_release unlocked;
            self.operation.step(self.layer(layer_id), layer_id, places, at<float>(x));
          },
          "layer_id"_a, "places"_a, "x"_a, "places: a cache and a position of each token");
}

}  // namespace lowmoe
