#include <initializer_list>
#include <limits>

#include "lowmoe/kernels/cpu/encoder.h"
#include "tests/native/agreement.h"

namespace lowmoe::agreement {

namespace {

enum class Style {
  kOrdinary,
  kUneven,  // magnitudes from 2^-20 to 2^20, and a row of zeros
  kSilent,
  kTooLarge,
  kNan,
  kInfinite,
};

// A matrix to be coded, for two sets that write to planes of their own.
class Problem {
 public:
  Problem(Random& random, layout::PlaneLayout shape, size_t h, int n_planes, bool with_metric,
          Style style)
      : task_{},
        weights_(shape.n_out * shape.n_in),
        d_(shape.n_in),
        metric_(shape.n_in * h),
        factors_(shape.n_in * h) {
    random.fill(weights_, -0.1f, 0.1f);
    set_style(random, style, shape.n_in);
    random.fill(d_, 0.5f, 2);
    // Any numbers are weighed alike in every set; a covariance they need not be.
    random.fill(metric_, -0.1f, 0.1f);
    random.fill(factors_, -0.1f, 0.1f);
    for (size_t i = 0; i < shape.n_in; i++) metric_[i * h + i % h] = 1;
    task_.shape = shape;
    task_.weights = weights_.data();
    task_.d = d_.data();
    task_.h = h;
    for (int8_t& value : task_.table) value = static_cast<int8_t>(random.below(127)) - 63;
    task_.unit = 0.042f;
    task_.n_planes = n_planes;
    task_.metric = with_metric ? metric_.data() : nullptr;
    task_.factors = with_metric ? factors_.data() : nullptr;
    task_.own_share = 0.5f;
  }

  struct Outcome {
    Array<int8_t> coded;
    Array<uint8_t> planes;
    Array<double> products;
  };

  Outcome outcome(const Isa& isa) const {
    EncoderTask task = task_;
    const size_t n_blocks = task.shape.row_blocks(), plane_bytes = task.shape.plane_bytes();
    Outcome out{Array<int8_t>(n_blocks), Array<uint8_t>(task.n_planes * plane_bytes),
                Array<double>(n_blocks * (1 + task.n_planes))};
    task.products = out.products.data();
    for (int p = 0; p < task.n_planes; p++) task.planes[p] = out.planes.data() + p * plane_bytes;
    const auto scratch = Array<uint8_t>::aligned(isa.encoder->scratch_bytes(task));
    for (size_t block = 0; block < n_blocks; block++) {
      const Coded coded = isa.encoder->encode_block(task, block, scratch.data());
      out.coded[block] = static_cast<int8_t>(coded);
    }
    return out;
  }
  bool is_fine(const Outcome& outcome) const {
    for (const int8_t coded : outcome.coded) {
      if (coded != static_cast<int8_t>(Coded::kFine)) return false;
    }
    return true;
  }

 private:
  void set_style(Random& random, Style style, size_t n_in) {
    for (size_t i = 0; i < weights_.size(); i++) {
      const int power = static_cast<int>(random.below(40)) - 20;
      if (style == Style::kUneven) weights_[i] = std::ldexp(weights_[i], i < n_in ? -200 : power);
      if (style == Style::kSilent) weights_[i] = 0;
      if (style == Style::kTooLarge) weights_[i] *= 1e9f;
    }
    float& any = weights_[random.below(weights_.size())];
    if (style == Style::kNan) any = std::nanf("");
    if (style == Style::kInfinite) any = std::numeric_limits<float>::infinity();
  }

  EncoderTask task_;
  Array<float> weights_, d_, metric_, factors_;
};

struct Size {
  size_t n_out, n_in, h;
};

class EncoderCheck {
 public:
  EncoderCheck(const Isa& isa, const Isa& scalar)
      : isa_(isa), scalar_(scalar), check_(isa, "encode_block, bit for bit") {}

  void compare(Size size, int n_planes, bool with_metric, Style style) {
    const Problem problem(random_, {size.n_out, size.n_in}, size.h, n_planes, with_metric, style);
    const Problem::Outcome found = problem.outcome(isa_), wanted = problem.outcome(scalar_);
    const std::string name = std::to_string(size.n_in) + " columns, " + std::to_string(n_planes) +
                             " planes, style " + std::to_string(static_cast<int>(style));
    check_.same(found.coded, wanted.coded, "outcomes of " + name);
    if (!problem.is_fine(wanted)) return;  // then planes and products mean nothing
    check_.same(found.planes, wanted.planes, "planes of " + name);
    check_.same(found.products, wanted.products, "products of " + name);
  }

 private:
  const Isa& isa_;
  const Isa& scalar_;
  Check check_;
  Random random_{14};
};

}  // namespace

void compare_encoder(const Isa& isa, const Isa& scalar) {
  EncoderCheck check(isa, scalar);
  for (const bool with_metric : {false, true}) {
    for (const Size size :
         {Size{70, 192, 64}, Size{64, 384, 128}, Size{3, 100, 4}, Size{64, 64, 32}}) {
      check.compare(size, 2, with_metric, Style::kOrdinary);
    }
    for (const Style style : {Style::kOrdinary, Style::kUneven, Style::kSilent, Style::kTooLarge,
                              Style::kNan, Style::kInfinite}) {
      for (const int n_planes : {1, 3}) check.compare({5, 64, 64}, n_planes, with_metric, style);
    }
  }
}

}  // namespace lowmoe::agreement
