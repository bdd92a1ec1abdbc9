#include "lowmoe/kernels/cpu/experts.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "lowmoe/kernels/cpu/router.h"

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

layout::PlaneLayout gate_up_shape(const ExpertsLayer& layer) {
  return {2 * layout::round_up(layer.n_inner, layout::kBlockRows), layer.n_hidden};
}

}  // namespace

Experts::Experts(Engine& engine, const ExpertsLayer& like)
    : engine_(engine),
      normed_(engine.max_tokens() * like.n_hidden),
      scores_(engine.max_tokens() * like.n_experts),
      rounded_(engine.max_tokens(), like.n_hidden),
      gathered_(engine.max_tokens() * like.n_active, like.n_hidden),
      inner_(engine.max_tokens() * like.n_active, like.n_inner),
      outputs_(engine.max_tokens() * like.n_active * like.n_hidden),
      groups_(like.n_experts),
      source_(engine.max_tokens() * like.n_active),
      row_of_(engine.max_tokens() * like.n_active),
      expert_at_(like.n_experts) {}

void Experts::route(const ExpertsLayer& layer, const float* x, size_t n, float* weights,
                    int64_t* ids) {
  begin(layer, n);
  engine_.pool().run([&](Team& team) {
    engine_.norm_and_round(team, x, n, layer.norm, layer.norm_epsilon, layer.d_in, normed_.data(),
                           rounded_.tokens());
    score(team, layer, normed_.data(), n);
    team.each("router", n, [&](size_t t) {
      route_softmax(scores_.data() + t * layer.n_experts, layer.n_experts, layer.n_active,
                    layer.renormalize, weights + t * layer.n_active, ids + t * layer.n_active);
    });
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
  std::fill_n(row_of_.data(), n * layer.n_active, kNoRow);
}

void Experts::foresee(const ExpertsLayer& layer, const float* x, size_t n, float* weights,
                      int64_t* ids) {
  const VectorKernels& v = *engine_.isa().vector;
  // Outputs are free until run(), and hold at least a row for every token.
  float* normed = outputs_.data();
  engine_.pool().run([&](Team& team) {
    team.each("foresight", n, [&](size_t t) {
      v.rms_norm(x + t * layer.n_hidden, layer.norm, layer.norm_epsilon, layer.n_hidden,
                 normed + t * layer.n_hidden);
    });
    score(team, layer, normed, n);
    team.each("foresight", n, [&](size_t t) {
      route_softmax(scores_.data() + t * layer.n_experts, layer.n_experts, layer.n_active,
                    layer.renormalize, weights + t * layer.n_active, ids + t * layer.n_active);
    });
  });
}

void Experts::score(Team& team, const ExpertsLayer& layer, const float* x, size_t n) {
  const size_t n_shares = divide_up(layer.n_experts, kScoredTogether);
  team.each("router", n * n_shares, [&](size_t unit) {
    const size_t t = unit / n_shares, begin = unit % n_shares * kScoredTogether;
    const size_t end = std::min(layer.n_experts, begin + kScoredTogether);
    for (size_t e = begin; e < end; e++) {
      scores_[t * layer.n_experts + e] = engine_.isa().vector->dot(
          x + t * layer.n_hidden, layer.router + e * layer.n_hidden, layer.n_hidden);
    }
  });
}

void Experts::run(const ExpertsLayer& layer, const int64_t* ids, size_t n,
                  const ExpertParts* experts, size_t n_experts) {
  const size_t first_row = n_rows_;
  const size_t n_groups = find_groups(layer, ids, n, experts, n_experts);
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
size_t Experts::find_groups(const ExpertsLayer& layer, const int64_t* ids, size_t n,
                            const ExpertParts* experts, size_t n_experts) {
  const layout::PlaneLayout gate_up = gate_up_shape(layer);
  const layout::PlaneLayout down{layer.n_hidden, layer.n_inner};
  std::fill_n(expert_at_.data(), layer.n_experts, -1);
  for (size_t i = 0; i < n_experts; i++) {
    const int64_t id = experts[i].expert_id;
    expert_at_[id] = static_cast<int32_t>(i);
    groups_[i] = {matrix_of(engine_.code(), experts[i], gate_up, 0),
                  matrix_of(engine_.code(), experts[i], down, gate_up.plane_bytes()),
                  layer.d_inner + id * layer.n_inner, 0, 0};
  }
  const size_t n_assignments = n * layer.n_active;
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
    source_[row] = static_cast<uint32_t>(a / layer.n_active);
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
    const size_t gate = 2 * ((channel + at) / layout::kBlockRows);
    for (size_t half = 0; half < 2; half++) {  // gate, then up
      engine_.multiply_block(thread, group.gate_up, gate + half, x, group.count,
                             rows + 2 * at + half * layout::kBlockRows, kUnitRows);
    }
  }
  for (size_t t = 0; t < group.count; t++) {
    float* both = rows + t * kUnitRows;
    for (size_t at = 0; at < n_channels; at += layout::kBlockRows) {
      v.silu_multiply(both + 2 * at, both + 2 * at + layout::kBlockRows, layout::kBlockRows,
                      both + at);
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
    std::copy_n(rows + t * layout::kBlockRows, n_rows,
                outputs_.data() + (group.first + t) * layer.n_hidden + first);
  }
}

void Experts::add(const ExpertsLayer& layer, const float* weights, size_t n, float* x) {
  const VectorKernels& v = *engine_.isa().vector;
  const size_t n_shares = divide_up(layer.n_hidden, kSummedTogether);
  const size_t n_active = layer.n_active;
  engine_.pool().run([&](Team& team) {
    team.each("weighted sum", n * n_shares, [&](size_t unit) {
      const size_t t = unit / n_shares, first = unit % n_shares * kSummedTogether;
      const size_t count = std::min(kSummedTogether, layer.n_hidden - first);
      float sum[kSummedTogether] = {};
      for (size_t a = t * n_active; a < (t + 1) * n_active; a++) {
        if (row_of_[a] == kNoRow) continue;
        v.add_scaled(outputs_.data() + row_of_[a] * layer.n_hidden + first, weights[a], count, sum);
      }
      v.add_scaled(sum, 1.0f, count, x + t * layer.n_hidden + first);
    });
  });
}

}  // namespace lowmoe
