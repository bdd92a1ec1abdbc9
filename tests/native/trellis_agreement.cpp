#include <initializer_list>

#include "tests/native/agreement.h"

namespace lowmoe::agreement {

namespace {

enum class Style {
  kOrdinary,
  kLargest,   // every sum of products as large as its type must hold
  kSmallest,  // subnormal scales
  kSilent,    // scales of 0
};

// The bits of a stack of planes and what they are multiplied by, of which any are allowed but in
// the scales.
struct Case {
  Array<uint8_t> bytes;
  Code code;
  TrellisMatrix w;

  Case(Random& random, size_t n_out, size_t n_in, int n_planes, Style style)
      : bytes(Array<uint8_t>::aligned(n_planes * layout::PlaneLayout{n_out, n_in}.plane_bytes())),
        w{{n_out, n_in}, &code, {}, n_planes} {
    for (uint8_t& value : code.table) {
      value = style == Style::kLargest ? 127 : static_cast<uint8_t>(1 + random.below(127));
    }
    code.scale_unit = 0.0028f;
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.bits());
    for (int p = 0; p < n_planes; p++) set_scales(random, p, style);
  }
  Case(const Case&) = delete;

 private:
  void set_scales(Random& random, int plane, Style style) {
    const layout::PlaneLayout& shape = w.shape;
    uint8_t* of_plane = bytes.data() + plane * shape.plane_bytes();
    w.planes[plane] = of_plane;
    for (size_t row = 0; row < shape.row_blocks() * layout::kBlockRows; row++) {
      // 2^-10 to 2^-5, each with any fraction.
      uint16_t half = static_cast<uint16_t>(5 * 1024 + random.below(5 * 1024));
      if (style == Style::kLargest) half = 0x7bff;
      if (style == Style::kSmallest) half = static_cast<uint16_t>(random.below(4));
      if (style == Style::kSilent) half = 0;
      std::memcpy(of_plane + shape.row_scale_offset() + 2 * row, &half, sizeof half);
    }
    const float gain = random.uniform(0.9f, 1.1f);
    std::memcpy(of_plane + shape.gain_offset(), &gain, sizeof gain);
    if (style == Style::kLargest) {
      std::memset(of_plane + shape.group_scale_offset(), 0xff,
                  shape.row_scale_offset() - shape.group_scale_offset());
    }
  }
};

struct Tokens {
  Array<int8_t> codes;
  Array<float> scales;
  Array<int32_t> sums;
  size_t n_in;

  Tokens(Random& random, size_t n, size_t n_in, Style style)
      : codes(n * padded_columns(n_in)),
        scales(n * scale_groups(n_in)),
        sums(n * (padded_columns(n_in) / layout::kBlockColumns)),
        n_in(n_in) {
    for (size_t i = 0; i < codes.size(); i++) {
      if (i % padded_columns(n_in) >= n_in) continue;
      const int code = static_cast<int>(random.below(255)) - 127;
      codes[i] = static_cast<int8_t>(style == Style::kLargest ? (i % 3 ? 127 : -127) : code);
      if (style == Style::kLargest && n == 1) codes[i] = 127;
      sums[i / layout::kBlockColumns] += codes[i];
    }
    random.fill(scales, 0.001f, 0.1f);
    if (n > 2) scales[scales.size() / 2] = std::nanf("");  // of a token that was infinite
    if (style == Style::kSmallest) scales[0] = 0;
  }
  RoundedTokens rounded() const { return {codes.data(), scales.data(), sums.data(), n_in}; }
};

std::string name_of(const Case& c, size_t n_tokens, Style style) {
  return std::to_string(c.w.n_planes) + " planes, " + std::to_string(c.w.shape.n_in) +
         " columns, " + std::to_string(n_tokens) + " tokens, style " +
         std::to_string(static_cast<int>(style));
}

constexpr Style kStyles[] = {Style::kOrdinary, Style::kLargest, Style::kSmallest, Style::kSilent};
constexpr size_t kWidths[] = {1, 64, 65, 128, 192, 320, 1408};
constexpr size_t kRows = 130;  // three blocks

void compare_dot(const Isa& isa, const Isa& scalar) {
  Check check(isa, "dot_block, bit for bit");
  Random random(1);
  for (int n_planes = 1; n_planes <= layout::kMaxPlanes; n_planes++) {
    for (const size_t n_in : kWidths) {
      for (const Style style : kStyles) {
        const Case c(random, kRows, n_in, n_planes, style);
        const Tokens x(random, 1, n_in, style);
        for (size_t block = 0; block < c.w.shape.row_blocks(); block++) {
          Array<float> found(layout::kBlockRows, 7), wanted(layout::kBlockRows, 8);
          isa.trellis->dot_block(c.w, block, x.rounded(), found.data());
          scalar.trellis->dot_block(c.w, block, x.rounded(), wanted.data());
          check.same(found, wanted, name_of(c, 1, style));
        }
      }
    }
  }
}

void multiply(const Isa& isa, const Case& c, size_t block, const Tokens& x, size_t n_tokens,
              const Array<float>& y, size_t stride) {
  const auto scratch = Array<uint8_t>::aligned(kTileScratchBytes);
  isa.trellis->multiply_block(c.w, block, x.rounded(), n_tokens, y.data(), stride, scratch.data());
}

// Between the outputs of two tokens are numbers that must stay.
void compare_product(Check& check, const Isa& isa, const Isa& scalar, const Case& c,
                     const Tokens& x, size_t n_tokens, Style style) {
  const size_t block = c.w.shape.row_blocks() - 1;
  const size_t stride = layout::kBlockRows + n_tokens % 3;
  const size_t size = (n_tokens - 1) * stride + layout::kBlockRows;
  const Array<float> found(size, 7), wanted(size, 7);
  multiply(isa, c, block, x, n_tokens, found, stride);
  multiply(scalar, c, block, x, n_tokens, wanted, stride);
  check.same(found, wanted, name_of(c, n_tokens, style));
}

void compare_multiply(const Isa& isa, const Isa& scalar) {
  Check check(isa, "multiply_block, bit for bit");
  Random random(2);
  constexpr size_t kMostTokens = 40;
  for (int n_planes = 1; n_planes <= layout::kMaxPlanes; n_planes++) {
    for (size_t n_tokens = 1; n_tokens <= kMostTokens; n_tokens++) {
      const Case c(random, kRows, 192, n_planes, Style::kOrdinary);
      const Tokens x(random, n_tokens, 192, Style::kOrdinary);
      compare_product(check, isa, scalar, c, x, n_tokens, Style::kOrdinary);
    }
    for (const size_t n_in : kWidths) {
      for (const Style style : kStyles) {
        const Case c(random, kRows, n_in, n_planes, style);
        for (const size_t n_tokens : {1, 7, 17}) {
          compare_product(check, isa, scalar, c, Tokens(random, n_tokens, n_in, style), n_tokens,
                          style);
        }
      }
    }
  }
}

}  // namespace

void compare_trellis(const Isa& isa, const Isa& scalar) {
  compare_dot(isa, scalar);
  compare_multiply(isa, scalar);
}

}  // namespace lowmoe::agreement
