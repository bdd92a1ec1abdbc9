#include "lowmoe/kernels/cpu/experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace lowmoe {

namespace {

// Experts that one thread scores at a time; one after the other is too little work to share.
constexpr size_t kScoredTogether = 8;
// Columns of a token that one thread sums at a time.
constexpr size_t kSummedTogether = 512;

// An assignment whose expert has not run.
constexpr uint32_t kNoRow = ~uint32_t{0};

size_t divide_up(size_t count, size_t by) { return (count + by - 1) / by; }

TrellisMatrix matrix_of(const Code& code, const ExpertParts& parts, layout::PlaneLayout shape,
                        size_t offset) {
  TrellisMatrix w{shape, &code, {}, parts.n_parts};
  for (int p = 0; p < parts.n_parts; p++) w.planes[p] = parts.parts[p] + offset;
  return w;
}

// y[i] = activation of gate[i] and up[i], of gate[i] alone where up is null.  y may be gate.
void activate(const Activation& kind, const float* gate, const float* up, size_t n, float* y) {
  for (size_t i = 0; i < n; i++) {
    const float g = std::min(gate[i], kind.limit);
    const float factor = up ? std::clamp(up[i], -kind.limit, kind.limit) + kind.shift : 1.0f;
    y[i] = g / (1.0f + std::exp(-kind.steepness * (g + kind.cubic * g * g * g))) * factor;
  }
}

layout::PlaneLayout gate_up_shape(const ExpertsLayer& layer) {
  return {layer.n_halves() * layout::round_up(layer.n_inner, layout::kBlockRows), layer.n_hidden};
}

}  // namespace

namespace {

// A layer with experts, for their sizes; there is one.
const ExpertsLayer& with_experts(std::span<const ExpertsLayer> layers) {
  return *std::find_if(layers.begin(), layers.end(),
                       [](const ExpertsLayer& layer) { return layer.n_experts > 0; });
}

// Inner channels of the widest shared expert; 0 without any.
size_t most_shared(std::span<const ExpertsLayer> layers) {
  size_t most = 0;
  for (const ExpertsLayer& layer : layers) {
    if (layer.shared) most = std::max(most, layer.shared->n_inner());
  }
  return most;
}

// A view of the same memory for tokens of fewer columns.
RoundedTokens narrowed(const RoundedBuffer& buffer, size_t n_in) {
  RoundedTokens tokens = buffer.tokens();
  tokens.n_in = n_in;
  return tokens;
}

}  // namespace

Experts::Experts(Engine& engine, std::span<const ExpertsLayer> layers)
    : engine_(engine),
      normed_(engine.max_tokens() * layers.front().n_hidden),
      rounded_(engine.max_tokens(), layers.front().n_hidden) {
  const ExpertsLayer& like = with_experts(layers);
  const size_t n_tokens = engine.max_tokens(), n_assignments = n_tokens * like.n_active();
  scores_ = Buffer<float>(n_tokens * like.n_experts);
  choice_ = Buffer<float>(2 * n_tokens * like.n_experts);
  gathered_ = RoundedBuffer(n_assignments, like.n_hidden);
  inner_ = RoundedBuffer(n_assignments, like.n_inner);
  outputs_ = Buffer<float>(n_assignments * like.n_hidden);
  groups_ = Buffer<Group>(like.n_experts);
  source_ = Buffer<uint32_t>(n_assignments);
  heard_ = Buffer<float>(n_assignments);
  row_of_ = Buffer<uint32_t>(n_assignments);
  expert_at_ = Buffer<int32_t>(like.n_experts);
  if (std::any_of(layers.begin(), layers.end(), [](const auto& l) { return bool(l.out_norm); })) {
    out_ = Buffer<float>(n_tokens * like.n_hidden);
  }
  if (const size_t n_inner = most_shared(layers); n_inner > 0) {
    shared_in_ = RoundedBuffer(n_tokens, like.n_hidden);
    shared_rounded_ = RoundedBuffer(n_tokens, n_inner);
    shared_both_ = Buffer<float>(n_tokens * 2 * n_inner);
    shared_inner_ = Buffer<float>(n_tokens * n_inner);
  }
}

void Experts::route(const ExpertsLayer& layer, const float* x, size_t n, float* weights,
                    int64_t* ids) {
  begin(layer, n);
  engine_.pool().run([&](Team& team) {
    if (layer.n_experts == 0) {
      team.each("norm", n, [&](size_t t) {
        engine_.norm(layer.norm, x + t * layer.n_hidden, layer.n_hidden,
                     normed_.data() + t * layer.n_hidden);
      });
      return;
    }
    engine_.norm_and_round(team, x, n, layer.norm, layer.d_in, normed_.data(), rounded_.tokens());
    score(team, layer, normed_.data(), n);
    choose(team, "router", layer, n, weights, ids);
  });
}

void Experts::take(const ExpertsLayer& layer, const int8_t* codes, const float* scales, size_t n) {
  begin(layer, n);
  const RoundedTokens to = rounded_.tokens();
  const size_t columns = padded_columns(layer.n_hidden);
  std::memcpy(to.codes, codes, n * columns);
  std::memcpy(to.scales, scales, n * scale_groups(layer.n_hidden) * sizeof(float));
  for (size_t block = 0; block < n * columns / layout::kBlockColumns; block++) {
    const int8_t* of_block = codes + block * layout::kBlockColumns;
    to.sums[block] = std::accumulate(of_block, of_block + layout::kBlockColumns, int32_t{0});
  }
}

// No expert has run for these tokens.
void Experts::begin(const ExpertsLayer& layer, size_t n) {
  n_rows_ = 0;
  std::fill_n(row_of_.data(), n * layer.n_active(), kNoRow);
}

void Experts::foresee(const ExpertsLayer& layer, const float* x, size_t n, float* weights,
                      int64_t* ids) {
  if (layer.n_experts == 0) return;
  // Outputs are free until run(), and hold at least a row for every token.
  float* normed = outputs_.data();
  engine_.pool().run([&](Team& team) {
    team.each("foresight", n, [&](size_t t) {
      engine_.norm(layer.norm, x + t * layer.n_hidden, layer.n_hidden, normed + t * layer.n_hidden);
    });
    score(team, layer, normed, n);
    choose(team, "foresight", layer, n, weights, ids);
  });
}

void Experts::choose(Team& team, const char* phase, const ExpertsLayer& layer, size_t n,
                     float* weights, int64_t* ids) {
  const size_t n_experts = layer.n_experts, n_active = layer.n_active();
  team.each(phase, n, [&](size_t t) {
    lowmoe::route(layer.router, n_experts, scores_.data() + t * n_experts,
                  choice_.data() + t * 2 * n_experts, weights + t * n_active, ids + t * n_active);
  });
}

void Experts::score(Team& team, const ExpertsLayer& layer, const float* x, size_t n) {
  const size_t n_shares = divide_up(layer.n_experts, kScoredTogether);
  team.each("router", n * n_shares, [&](size_t unit) {
    const size_t t = unit / n_shares, begin = unit % n_shares * kScoredTogether;
    const size_t end = std::min(layer.n_experts, begin + kScoredTogether);
    for (size_t e = begin; e < end; e++) {
      scores_[t * layer.n_experts + e] = engine_.isa().vector->dot(
          x + t * layer.n_hidden, layer.router.weights + e * layer.n_hidden, layer.n_hidden);
    }
  });
}

void Experts::run(const ExpertsLayer& layer, const int64_t* ids, const float* weights, size_t n,
                  const ExpertParts* experts, size_t n_experts) {
  const size_t first_row = n_rows_;
  const size_t n_groups = find_groups(layer, ids, weights, n, experts, n_experts);
  const size_t n_units = divide_up(layer.n_inner, kInnerChannels);
  const size_t n_blocks = divide_up(layer.n_hidden, layout::kBlockRows);
  engine_.pool().run([&](Team& team) {
    if (n > 1) gather(team, first_row, n_rows_ - first_row);
    team.each("gate, up", n_groups * n_units, [&](size_t unit) {
      run_inner(team.thread(), layer, groups_[unit / n_units], unit % n_units, n);
    });
    team.each("down", n_groups * n_blocks, [&](size_t unit) {
      run_down(team.thread(), layer, groups_[unit / n_blocks], unit % n_blocks);
    });
  });
}

// Sorts the assignments of these experts into groups, a row of outputs each; returns how many.
size_t Experts::find_groups(const ExpertsLayer& layer, const int64_t* ids, const float* weights,
                            size_t n, const ExpertParts* experts, size_t n_experts) {
  const layout::PlaneLayout gate_up = gate_up_shape(layer);
  const layout::PlaneLayout down{layer.n_hidden, layer.n_inner};
  std::fill_n(expert_at_.data(), layer.n_experts, -1);
  for (size_t i = 0; i < n_experts; i++) {
    const int64_t id = experts[i].expert_id;
    expert_at_[id] = static_cast<int32_t>(i);
    groups_[i] = {
        matrix_of(engine_.code(), experts[i], gate_up, 0),
        matrix_of(engine_.code(), experts[i], down, gate_up.plane_bytes()),
        layer.d_inner + id * layer.n_inner,
        layer.gate_up_bias ? layer.gate_up_bias + id * layer.n_halves() * layer.n_inner : nullptr,
        layer.down_bias ? layer.down_bias + id * layer.n_hidden : nullptr,
        0,
        0};
  }
  const size_t n_assignments = n * layer.n_active();
  for (size_t a = 0; a < n_assignments; a++) {
    if (expert_at_[ids[a]] >= 0) groups_[expert_at_[ids[a]]].count++;
  }
  for (size_t i = 0; i < n_experts; i++) {
    groups_[i].first = n_rows_;
    n_rows_ += groups_[i].count;
    groups_[i].count = 0;
  }
  for (size_t a = 0; a < n_assignments; a++) {
    if (expert_at_[ids[a]] < 0) continue;
    Group& group = groups_[expert_at_[ids[a]]];
    const size_t row = group.first + group.count++;
    row_of_[a] = static_cast<uint32_t>(row);
    source_[row] = static_cast<uint32_t>(a / layer.n_active());
    if (layer.weigh_input) heard_[row] = weights[a];
  }
  return n_experts;
}

void Experts::gather(Team& team, size_t first, size_t count) {
  const RoundedTokens from = rounded_.tokens(), to = gathered_.tokens();
  const size_t columns = padded_columns(from.n_in);
  team.each("gathering tokens", count, [&](size_t i) {
    const RoundedTokens a = from.from(source_[first + i]), b = to.from(first + i);
    std::memcpy(b.codes, a.codes, columns);
    std::memcpy(b.scales, a.scales, scale_groups(from.n_in) * sizeof(float));
    std::memcpy(b.sums, a.sums, columns / layout::kBlockColumns * sizeof(int32_t));
  });
}

RoundedTokens Experts::tokens_of(const Group& group, size_t n) const {
  return n == 1 ? rounded_.tokens() : gathered_.tokens().from(group.first);
}

// 128 inner channels of one expert, from words to int8: what one Hadamard block and one scale need.
void Experts::run_inner(int thread, const ExpertsLayer& layer, const Group& group, size_t unit,
                        size_t n) {
  const VectorKernels& v = *engine_.isa().vector;
  const RoundedTokens x = tokens_of(group, n), inner = inner_.tokens().from(group.first);
  const size_t channel = unit * kInnerChannels;
  const size_t n_channels = std::min(kInnerChannels, layer.n_inner - channel);
  float* rows = engine_.rows_of(thread);
  for (size_t at = 0; at < n_channels; at += layout::kBlockRows) {
    const size_t gate = layer.n_halves() * ((channel + at) / layout::kBlockRows);
    for (size_t half = 0; half < layer.n_halves(); half++) {  // gate, then up
      engine_.multiply_block(thread, group.gate_up, gate + half, x, group.count,
                             rows + 2 * at + half * layout::kBlockRows, kUnitRows);
    }
  }
  for (size_t t = 0; t < group.count; t++) {
    float* both = rows + t * kUnitRows;
    for (size_t at = 0; at < n_channels; at += layout::kBlockRows) {
      float* gate = both + 2 * at;
      float* up = layer.gated ? gate + layout::kBlockRows : nullptr;
      const size_t n_some = std::min<size_t>(layout::kBlockRows, n_channels - at);
      if (layer.weigh_input) {  // what multiplies the input multiplies products with it
        const float weight = heard_[group.first + t];
        for (size_t i = 0; i < n_some; i++) gate[i] *= weight;
        for (size_t i = 0; up && i < n_some; i++) up[i] *= weight;
      }
      if (group.gate_up_bias) {
        v.add_scaled(group.gate_up_bias + channel + at, 1.0f, n_some, gate);
        if (up) v.add_scaled(group.gate_up_bias + layer.n_inner + channel + at, 1.0f, n_some, up);
      }
      if (layer.activation.is_silu() && up) {
        v.silu_multiply(gate, up, layout::kBlockRows, both + at);
      } else {
        activate(layer.activation, gate, up, layout::kBlockRows, both + at);
      }
    }
    v.round_token(both, group.d_inner, channel, n_channels, inner.from(t));
  }
}

void Experts::run_down(int thread, const ExpertsLayer& layer, const Group& group, size_t block) {
  float* rows = engine_.rows_of(thread);
  engine_.multiply_block(thread, group.down, block, inner_.tokens().from(group.first), group.count,
                         rows, layout::kBlockRows);
  const size_t first = block * layout::kBlockRows;
  const size_t n_rows = std::min<size_t>(layout::kBlockRows, layer.n_hidden - first);
  for (size_t t = 0; t < group.count; t++) {
    float* to = outputs_.data() + (group.first + t) * layer.n_hidden + first;
    std::copy_n(rows + t * layout::kBlockRows, n_rows, to);
    if (group.down_bias) {
      engine_.isa().vector->add_scaled(group.down_bias + first, 1.0f, n_rows, to);
    }
  }
}

void Experts::add(const ExpertsLayer& layer, const float* weights, size_t n, float* x) {
  const VectorKernels& v = *engine_.isa().vector;
  const size_t n_shares = divide_up(layer.n_hidden, kSummedTogether);
  const size_t n_active = layer.n_active();
  float* const residual = x;
  if (layer.out_norm) {
    x = out_.data();
    std::fill_n(x, n * layer.n_hidden, 0.0f);
  }
  engine_.pool().run([&](Team& team) {
    engine_.keep_normed(team, normed_.data(), layer.kept, n, layer.n_hidden, residual);
    if (n_active > 0) {
      team.each("weighted sum", n * n_shares, [&](size_t unit) {
        const size_t t = unit / n_shares, first = unit % n_shares * kSummedTogether;
        const size_t count = std::min(kSummedTogether, layer.n_hidden - first);
        float sum[kSummedTogether] = {};
        for (size_t a = t * n_active; a < (t + 1) * n_active; a++) {
          if (row_of_[a] == kNoRow) continue;
          v.add_scaled(outputs_.data() + row_of_[a] * layer.n_hidden + first,
                       layer.weigh_input ? 1.0f : weights[a], count, sum);
        }
        v.add_scaled(sum, 1.0f, count, x + t * layer.n_hidden + first);
      });
    }
    if (layer.shared) share(team, layer, n, x);
    if (!layer.out_norm) return;
    team.each("norm", n, [&](size_t t) {
      float* out = x + t * layer.n_hidden;
      engine_.norm(*layer.out_norm, out, layer.n_hidden, out);
      v.add_scaled(out, 1.0f, layer.n_hidden, residual + t * layer.n_hidden);
    });
  });
}

// x += the shared expert's output for the tokens that route() normed.
void Experts::share(Team& team, const ExpertsLayer& layer, size_t n, float* x) {
  const VectorKernels& v = *engine_.isa().vector;
  const SharedExpert& shared = *layer.shared;
  const size_t n_hidden = layer.n_hidden, n_inner = shared.n_inner();
  const size_t n_shares = divide_up(n_inner, kSummedTogether);
  const RoundedTokens inner = narrowed(shared_rounded_, n_inner);
  engine_.round(team, normed_.data(), n, shared.gate_up.d, shared_in_.tokens());
  engine_.multiply(team, "shared gate, up", shared.gate_up.w, shared_in_.tokens(), n,
                   shared_both_.data(), 2 * n_inner);
  team.each("shared experts", n * n_shares, [&](size_t unit) {
    const size_t t = unit / n_shares, first = unit % n_shares * kSummedTogether;
    const size_t count = std::min(kSummedTogether, n_inner - first);
    const float* gate = shared_both_.data() + t * 2 * n_inner + first;
    float* to = shared_inner_.data() + t * n_inner + first;
    v.silu_multiply(gate, gate + n_inner, count, to);
    if (!shared.router) return;
    const float logit = v.dot(normed_.data() + t * n_hidden, shared.router, n_hidden);
    const float weight = 1.0f / (1.0f + std::exp(-logit));
    for (size_t i = 0; i < count; i++) to[i] *= weight;
  });
  engine_.round(team, shared_inner_.data(), n, shared.down.d, inner);
  engine_.multiply_add(team, "shared down", shared.down.w, inner, n, x, n_hidden);
}

}  // namespace lowmoe
