#include <algorithm>
#include <initializer_list>
#include <limits>

#include "lowmoe/kernels/cpu/kv_cache.h"
#include "tests/native/agreement.h"

namespace lowmoe::agreement {

namespace {

constexpr size_t kSizes[] = {1,   2,   3,   4,   5,   7,   8,   9,    15,  16,  17,
                             23,  31,  32,  33,  48,  63,  64,  65,   96,  100, 127,
                             128, 129, 191, 192, 255, 256, 257, 1000, 4097};
constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::string name_of(size_t n) { return std::to_string(n) + " numbers"; }

void compare_dot(const Isa& isa, const Isa& scalar) {
  Check check(isa, "dot");
  Random random(3);
  for (const size_t n : kSizes) {
    const Array<float> a(n), b(n), found(1), wanted(1);
    random.fill(a);
    random.fill(b);
    found[0] = isa.vector->dot(a.data(), b.data(), n);
    wanted[0] = scalar.vector->dot(a.data(), b.data(), n);
    // Each product and each sum is rounded once at most, in both: n + 1 times along any path.
    double terms = 0;
    for (size_t i = 0; i < n; i++) terms += std::abs(double{a[i]} * b[i]);
    const double allowed = 2 * static_cast<double>(n + 1) * kRounding * terms;
    check.near(found, wanted, [=](size_t) { return allowed; }, name_of(n));
  }
}

void compare_rms_norm(const Isa& isa, const Isa& scalar) {
  Check check(isa, "rms_norm");
  Random random(4);
  for (const size_t n : kSizes) {
    for (const float scale : {1.0f, 1e-20f, 1e15f}) {
      const Array<float> x(n), weight(n), found(n), wanted(n);
      random.fill(x, -scale, scale);
      random.fill(weight);
      isa.vector->rms_norm(x.data(), weight.data(), 1e-6f, n, found.data());
      scalar.vector->rms_norm(x.data(), weight.data(), 1e-6f, n, wanted.data());
      // The root halves the error of a sum of squares; six more roundings follow it.
      const double relative = 2 * (static_cast<double>(n + 1) / 2 + 6) * kRounding;
      const auto allowed = [&](size_t i) { return relative * std::abs(wanted[i]) + 1e-37; };
      check.near(found, wanted, allowed, name_of(n));
      const Array<float> in_place(x);
      isa.vector->rms_norm(in_place.data(), weight.data(), 1e-6f, n, in_place.data());
      check.same(in_place, found, name_of(n) + " in place");
    }
  }
}

void compare_layer_norm(const Isa& isa, const Isa& scalar) {
  Check check(isa, "layer_norm");
  Random random(14);
  for (const size_t n : kSizes) {
    const Array<float> x(n), weight(n), found(n), wanted(n);
    random.fill(x, 1.0f, 3.0f);
    random.fill(weight);
    isa.vector->layer_norm(x.data(), weight.data(), 1e-2f, n, found.data());
    scalar.vector->layer_norm(x.data(), weight.data(), 1e-2f, n, wanted.data());
    // Means of numbers below 3 are off by n + 1 roundings, and are divided by 0.1 at least.
    const double off = 2 * static_cast<double>(n + 8) * kRounding * 3 / 0.1;
    const auto allowed = [&](size_t i) {
      return off * (std::abs(weight[i]) + std::abs(wanted[i]));
    };
    check.near(found, wanted, allowed, name_of(n));
  }
}

void compare_multiply_rows(const Isa& isa, const Isa& scalar) {
  Check check(isa, "multiply_rows");
  Random random(15);
  for (const size_t size : {1, 7, 16, 21, 64, 129, 512}) {
    const size_t stride = head_bytes(KvFormat::kInt8, size), n_rows = 37;
    const Array<uint8_t> rows(n_rows * stride);
    const Array<float> row(size);
    for (size_t r = 0; r < n_rows; r++) {
      random.fill(row);
      scalar.vector->store_head(KvFormat::kInt8, row.data(), size, rows.data() + r * stride);
    }
    for (const size_t n : {1, 2, 3, 4, 5, 8}) {
      const Array<float> x(n * size), found(n * n_rows), wanted(n * n_rows);
      random.fill(x);
      isa.vector->multiply_rows(x.data(), n, rows.data(), stride, size, n_rows, found.data(),
                                n_rows);
      scalar.vector->multiply_rows(x.data(), n, rows.data(), stride, size, n_rows, wanted.data(),
                                   n_rows);
      // Numbers below 1: a sum of so many products is rounded once for each, in both.
      const double allowed = 2 * static_cast<double>(size + 2) * kRounding * size;
      check.near(found, wanted, [=](size_t) { return allowed; }, name_of(size));
    }
  }
}

void compare_silu(const Isa& isa, const Isa& scalar) {
  Check check(isa, "silu_multiply");
  Random random(5);
  for (const size_t n : kSizes) {
    for (const float most : {1.0f, 10.0f, 100.0f, 3e38f}) {
      const Array<float> gate(n), up(n), found(n), wanted(n);
      random.fill(gate, -most / 2, most / 2);
      random.fill(up);
      if (n > 2) gate[n - 1] = std::nanf(""), gate[n - 2] = kInfinity, gate[n - 3] = -most;
      isa.vector->silu_multiply(gate.data(), up.data(), n, found.data());
      scalar.vector->silu_multiply(gate.data(), up.data(), n, wanted.data());
      // exp is within 2 units in the last place, 4 roundings' worth, and 3 roundings follow. Where
      // it overflows, between 88.7 and 89, silu is below 89 / 2^128.
      const auto allowed = [&](size_t i) {
        return 2 * 7 * kRounding * std::abs(wanted[i]) + 89 * 0x1p-128;
      };
      check.near(found, wanted, allowed, name_of(n));
      const Array<float> in_place(gate);
      isa.vector->silu_multiply(in_place.data(), up.data(), n, in_place.data());
      check.same(in_place, found, name_of(n) + " in place");
    }
  }
}

void compare_add_scaled(const Isa& isa, const Isa& scalar) {
  Check check(isa, "add_scaled");
  Random random(6);
  for (const size_t n : kSizes) {
    const Array<float> x(n), before(n);
    random.fill(x);
    random.fill(before);
    const Array<float> found(before), wanted(before);
    const float scale = random.uniform(-2, 2);
    isa.vector->add_scaled(x.data(), scale, n, found.data());
    scalar.vector->add_scaled(x.data(), scale, n, wanted.data());
    // One rounding of the sum in each, and one of the product in one of them.
    const auto allowed = [&](size_t i) {
      return kRounding * (std::abs(double{scale} * x[i]) + 2 * std::abs(wanted[i]) + 1e-30);
    };
    check.near(found, wanted, allowed, name_of(n));
  }
}

void compare_step_state(const Isa& isa, const Isa& scalar) {
  Check check(isa, "step_state");
  Random random(16);
  for (const size_t n_columns : kSizes) {
    const size_t n_rows = 10;
    const Array<float> query(n_rows), key(n_rows), value(n_columns), before(n_rows * n_columns);
    for (const auto* x : {&query, &key, &value, &before}) random.fill(*x);
    for (const bool corrects : {false, true}) {
      const StateStep token{query.data(), key.data(), value.data(), n_rows,
                            n_columns,    0.7f,       0.9f,         corrects};
      const Array<float> found(n_columns), wanted(n_columns);
      const Array<float> left(before), left_wanted(before);
      isa.vector->step_state(token, left.data(), left.data(), found.data());
      scalar.vector->step_state(token, left_wanted.data(), left_wanted.data(), wanted.data());
      // Sums of 10 products of numbers up to 2, twice one after the other.
      const auto allowed = [&](size_t) { return 1e3 * kRounding; };
      check.near(found, wanted, allowed, name_of(n_columns));
      check.near(left, left_wanted, allowed, name_of(n_columns));
    }
  }
}

void compare_rotate(const Isa& isa, const Isa& scalar) {
  Check check(isa, "rotate");
  Random random(7);
  for (const size_t half : kSizes) {
    const Array<float> before(2 * half), cos(half), sin(half);
    random.fill(before);
    for (size_t i = 0; i < half; i++) {
      const float angle = random.uniform(-4, 4);
      cos[i] = std::cos(angle), sin[i] = std::sin(angle);
    }
    const Array<float> found(before), wanted(before);
    isa.vector->rotate(found.data(), cos.data(), sin.data(), 2 * half);
    scalar.vector->rotate(wanted.data(), cos.data(), sin.data(), 2 * half);
    // Two products and their sum are rounded, in both; |a cos| + |b sin| <= 2 and so is the sum.
    check.near(found, wanted, [](size_t) { return 2 * 4 * kRounding; }, name_of(2 * half));
  }
}

enum class Style { kOrdinary, kTies, kWide, kSilent, kHuge, kNan, kInfinite };

// Inputs that a rounding may trip over.
void fill(Random& random, Style style, const Array<float>& x) {
  random.fill(x, -3, 3);
  if (style == Style::kTies) {
    // With the largest 127 a step is 1, and every half is a tie.
    for (float& value : x)
      value = 0.5f * static_cast<float>(static_cast<int>(random.below(255)) - 127);
    for (size_t i = 0; i < x.size(); i += 64) x[i] = 127;
  }
  for (float& value : x) {
    const int power = static_cast<int>(random.below(80)) - 40;
    if (style == Style::kWide) value = std::ldexp(value, power);
    if (style == Style::kSilent)
      value = std::ldexp(value, -105 - static_cast<int>(random.below(40)));
    if (style == Style::kHuge) value *= 1e38f;
  }
  if (style == Style::kNan) x[random.below(x.size())] = std::nanf("");
  if (style == Style::kInfinite) x[random.below(x.size())] = -kInfinity;
}

constexpr Style kStyles[] = {Style::kOrdinary, Style::kTies, Style::kWide,    Style::kSilent,
                             Style::kHuge,     Style::kNan,  Style::kInfinite};

struct Rounded {
  Array<int8_t> codes;
  Array<float> scales;
  Array<int32_t> sums;
  size_t n_in;

  explicit Rounded(size_t n_in)
      : codes(padded_columns(n_in), 85),
        scales(scale_groups(n_in), 85),
        sums(padded_columns(n_in) / layout::kBlockColumns, 85),
        n_in(n_in) {}
  RoundedTokens token() const { return {codes.data(), scales.data(), sums.data(), n_in}; }
};

void compare_round(const Isa& isa, const Isa& scalar) {
  Check check(isa, "round_token, bit for bit");
  Random random(8);
  for (const size_t n_in : {1,   2,   3,   6,   12,  24,  48,  64,  80,  96,  100, 112,
                            128, 129, 130, 132, 160, 192, 200, 256, 320, 384, 576, 1408}) {
    for (const Style style : kStyles) {
      const Array<float> x(n_in);
      const Array<uint16_t> d(n_in);
      fill(random, style, x);
      // 1 where ties are to stay ties, else 2^-4 to 2^3 with any fraction and sign.
      for (uint16_t& half : d) {
        half = static_cast<uint16_t>(random.below(2) << 15 | (11 * 1024 + random.below(8 * 1024)));
        if (style == Style::kTies) half = 0x3c00;
      }
      const Rounded found(n_in), wanted(n_in);
      isa.vector->round_token(x.data(), d.data(), 0, n_in, found.token());
      // In pieces, which must not matter.
      for (size_t first = 0; first < n_in; first += kScaleColumns) {
        const size_t n = std::min<size_t>(kScaleColumns, n_in - first);
        scalar.vector->round_token(x.data() + first, d.data(), first, n, wanted.token());
      }
      const std::string name =
          std::to_string(n_in) + " columns, style " + std::to_string(static_cast<int>(style));
      check.same(found.scales, wanted.scales, "scales of " + name);
      check.same(found.codes, wanted.codes, "codes of " + name);
      check.same(found.sums, wanted.sums, "sums of " + name);
    }
  }
}

bool is_nan_half(uint16_t half) { return (half & 0x7fff) > 0x7c00; }

// What a head's bytes mean must be the same, so each format is compared as its own numbers.
void compare_head(Check& check, KvFormat format, const Array<uint8_t>& found,
                  const Array<uint8_t>& wanted, size_t size) {
  const std::string name = "a head of " + std::to_string(size);
  const auto nan = [](float value) { return std::isnan(value); };
  if (format == KvFormat::kFloat16) {
    check.same(reinterpret_cast<const uint16_t*>(found.data()),
               reinterpret_cast<const uint16_t*>(wanted.data()), size, is_nan_half, name);
  } else if (format == KvFormat::kFloat32) {
    check.same(reinterpret_cast<const float*>(found.data()),
               reinterpret_cast<const float*>(wanted.data()), size, nan, name);
  } else {
    const size_t offset = head_scale_offset(size);
    check.same(found.data(), wanted.data(), offset, [](uint8_t) { return false; }, name);
    check.same(reinterpret_cast<const float*>(found.data() + offset),
               reinterpret_cast<const float*>(wanted.data() + offset), 1, nan, name);
  }
}

void compare_store_head(const Isa& isa, const Isa& scalar) {
  Check check(isa, "store_head, bit for bit");
  Random random(9);
  for (const KvFormat format : {KvFormat::kFloat32, KvFormat::kFloat16, KvFormat::kInt8}) {
    for (const size_t size : kSizes) {
      for (const Style style : kStyles) {
        const Array<float> head(size);
        fill(random, style, head);
        const size_t bytes = head_bytes(format, size);
        // As little aligned as kv_cache.h promises: 4 bytes, 2 for float16.
        const size_t lead = format == KvFormat::kFloat16 ? 2 : 4;
        const Array<uint8_t> found(bytes, 85, lead), wanted(bytes, 85, lead);
        isa.vector->store_head(format, head.data(), size, found.data());
        scalar.vector->store_head(format, head.data(), size, wanted.data());
        compare_head(check, format, found, wanted, size);
      }
    }
  }
}

// Every float16 and its neighbours in float32, where rounding turns.
void compare_halves(const Isa& isa, const Isa& scalar) {
  Check check(isa, "store_head, around every float16");
  constexpr size_t kSteps[] = {0, 1, 2047, 4095, 4096, 4097, 8191};
  constexpr size_t kCount = 256;
  const Array<float> head(kCount);
  for (uint32_t first = 0; first < 0x8000; first += kCount) {
    for (const size_t step : kSteps) {
      for (uint32_t i = 0; i < kCount; i++) {
        // float16's exponents begin at 2^-14; from 14 below that on, rounding gives 0.
        const uint32_t bits =
            ((127 - 29) << 23) + ((first + i) << 13) + static_cast<uint32_t>(step);
        head[i] = std::bit_cast<float>(i % 2 ? bits | 0x80000000u : bits);
      }
      const Array<uint8_t> found(2 * kCount, 0, 2), wanted(2 * kCount, 0, 2);
      isa.vector->store_head(KvFormat::kFloat16, head.data(), kCount, found.data());
      scalar.vector->store_head(KvFormat::kFloat16, head.data(), kCount, wanted.data());
      compare_head(check, KvFormat::kFloat16, found, wanted, kCount);
    }
  }
}

}  // namespace

void compare_vector(const Isa& isa, const Isa& scalar) {
  compare_dot(isa, scalar);
  compare_rms_norm(isa, scalar);
  compare_layer_norm(isa, scalar);
  compare_multiply_rows(isa, scalar);
  compare_silu(isa, scalar);
  compare_add_scaled(isa, scalar);
  compare_step_state(isa, scalar);
  compare_rotate(isa, scalar);
  compare_round(isa, scalar);
  compare_store_head(isa, scalar);
  compare_halves(isa, scalar);
}

}  // namespace lowmoe::agreement
